//! How much slower a VM starts under our driver than under a bare shell.
//!
//! `cargo bench --bench vm_start` needs QEMU and nothing else: the VMs have no
//! network and stay paused. Each pair of runs is one of ours and one of the
//! floor, in turns, so that a busy machine disturbs both alike; read the ratios.
//!
//! - one VM: from its spec to the driver's `paused`, which means that QMP carried
//!   out a command, against the same arguments started by `sh`: up to QMP's
//!   greeting, and up to its answer to a first command. QEMU greets before it has
//!   made its machine, so only the second is the same work as ours;
//! - 16 VMs at once, the same;
//! - overlay and seed of one VM.

#![expect(clippy::print_stdout, reason = "a bench prints")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use pavo::host::spawn;
use pavo::model::job::VmState;
use pavo::model::owner::Owner;
use pavo::model::vm::{Accel, Disk, DiskCache, DiskFormat, DiskModel, HostKey, Seed, VmSpec};
use pavo::vm::machine::{Order, Stop};
use pavo::vm::{args, driver, overlay, seed};
use tokio::sync::mpsc;

const ROUNDS: usize = 15;
const MANY: usize = 16;

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    std::fs::File::create(&base).unwrap().set_len(1 << 30).unwrap();

    for count in [1, MANY] {
        let rounds = if count == 1 { ROUNDS } else { ROUNDS / 3 };
        let [mut ours, mut cpu, mut greeted, mut answered] = [const { Vec::new() }; 4];
        for round in 0..rounds {
            let specs = |who: &str| -> Vec<VmSpec> {
                let name = |rank| dir.path().join(format!("{who}-{count}-{round}-{rank}"));
                (0..count).map(|rank| spec(name(rank), &base, rank as u32)).collect()
            };
            let (time, own) = runtime.block_on(driven(specs("ours")));
            ours.push(time);
            cpu.push(own);
            let (greeting, answer) = bare(&specs("bare"));
            greeted.push(greeting);
            answered.push(answer);
        }
        let [ours, cpu] = [ours, cpu].map(median);
        println!("{count:3} VMs  driver {:7.1} ms, own CPU {:.1} ms", millis(ours), millis(cpu));
        for (what, floor) in [("greeting", median(greeted)), ("answer", median(answered))] {
            println!(
                "         shell, to {what:8} {:7.1} ms: we add {:+.1} ms, at {:.2} of its rate",
                millis(floor),
                millis(ours) - millis(floor),
                floor.as_secs_f64() / ours.as_secs_f64(),
            );
        }
    }
    let mut files = Vec::new();
    for round in 0..200 {
        let spec = spec(dir.path().join(format!("files-{round}")), &base, 0);
        let start = Instant::now();
        make_files(&spec);
        files.push(start.elapsed());
    }
    println!("overlay and seed  {:.3} ms", millis(median(files)));
}

/// Starts VMs by the driver, until each says it is paused. The second figure is
/// this process's own CPU time (QEMU's is not in it).
async fn driven(specs: Vec<VmSpec>) -> (Duration, Duration) {
    let mut running = Vec::new();
    let used = own_cpu();
    let start = Instant::now();
    for spec in specs {
        let (report, reports) = mpsc::channel(16);
        let (stop, stops) = mpsc::channel(1);
        running.push((tokio::spawn(driver::run(spec, report, stops, None)), reports, stop));
    }
    for (_, reports, _) in &mut running {
        while reports.recv().await.expect("it starts").state != VmState::Paused {}
    }
    let (time, used) = (start.elapsed(), own_cpu() - used);
    for (_, _, stop) in &running {
        stop.send(Order::Stop(Stop::Now)).await.unwrap();
    }
    for (done, mut reports, _) in running {
        while reports.recv().await.is_some() {}
        done.await.unwrap().unwrap();
    }
    (time, used)
}

/// The same VMs by `sh -c 'exec "$@"'`, until each greets, and until each has
/// answered. Their disks and seeds are made beforehand.
fn bare(specs: &[VmSpec]) -> (Duration, Duration) {
    let mut commands: Vec<(Command, UnixStream, UnixStream)> = specs.iter().map(shell).collect();
    let start = Instant::now();
    let mut children = Vec::new();
    for (command, qmp, _) in &mut commands {
        children.push(command.spawn().unwrap());
        qmp.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").unwrap();
    }
    let mut qmps: Vec<_> = commands.iter().map(|(_, qmp, _)| BufReader::new(qmp)).collect();
    let mut line = || {
        for qmp in &mut qmps {
            assert!(qmp.read_line(&mut String::new()).unwrap() > 0, "it starts");
        }
        start.elapsed()
    };
    let times = (line(), line());
    for child in &mut children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    times
}

fn shell(spec: &VmSpec) -> (Command, UnixStream, UnixStream) {
    make_files(spec);
    let (ours, qmp) = UnixStream::pair().unwrap();
    let (console, qemu_console) = UnixStream::pair().unwrap();
    let agent = UnixListener::bind(spec.dir.join("agent.sock")).unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\"", "sh"]).arg(&spec.qemu_bin);
    let (_, own_agent) = UnixStream::pair().unwrap();
    let (_, pcoccs_agent) = UnixStream::pair().unwrap();
    let ends =
        vec![qmp.into(), qemu_console.into(), agent.into(), own_agent.into(), pcoccs_agent.into()];
    let [qmp, qemu_console, agent, own_agent, pcoccs_agent] =
        spawn::inherit(&mut command, ends).try_into().unwrap();
    let (disk, seed) = (spec.dir.join("disk.qcow2"), spec.dir.join("seed.img"));
    let extras = Default::default();
    let wiring = args::Wiring {
        qmp,
        console: qemu_console,
        agent,
        own_agent,
        pcoccs_agent,
        disk: &disk,
        seed: &seed,
        extras: &extras,
    };
    command.args(args::qemu(spec, &wiring).unwrap()).stdin(Stdio::null());
    spawn::die_with_parent(&mut command);
    (command, ours, console)
}

fn make_files(spec: &VmSpec) {
    std::fs::create_dir(&spec.dir).unwrap();
    let disk = spec.disk.as_ref().unwrap();
    let path = spec.dir.join("disk.qcow2");
    overlay::create(&path, &disk.backing, disk.backing_format, disk.virtual_size).unwrap();
    seed::write(&spec.dir.join("seed.img"), spec.seed.as_ref().unwrap(), &spec.nics, false)
        .unwrap();
}

fn spec(dir: PathBuf, base: &Path, rank: u32) -> VmSpec {
    VmSpec {
        owner: Owner::local(1),
        rank,
        template: "bench".into(),
        dir,
        cores: 1,
        memory_mib: 256,
        accel: Accel::Tcg,
        qemu_bin: "qemu-system-x86_64".into(),
        machine_type: "q35".into(),
        cpu_model: None,
        disk: Some(Disk {
            backing: base.into(),
            backing_format: DiskFormat::Raw,
            virtual_size: 1 << 30,
            model: DiskModel::Virtio,
            cache: DiskCache::Unsafe,
        }),
        nics: Vec::new(),
        seed: Some(Seed {
            instance_id: format!("bench-{rank}"),
            hostname: format!("vm{rank}"),
            domain: Some("pavo.local".into()),
            user_data: Some("#cloud-config\npackages: [gcc]\n".into()),
            authorized_keys: vec!["ssh-ed25519 AAAA bench".into()],
            host_key: HostKey {
                seed: "01".repeat(32),
                public: "02".repeat(32),
                openssh_private: "key\n".into(),
                openssh_public: "ssh-ed25519 AAAA".into(),
            },
        }),
        kernel: None,
        custom_args: Vec::new(),
        dial: None,
        paused: true,
        restore: None,
        extras: Default::default(),
    }
}

fn own_cpu() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let part = |time: nix::sys::time::TimeVal| {
        Duration::new(time.tv_sec() as u64, time.tv_usec() as u32 * 1000)
    };
    part(usage.user_time()) + part(usage.system_time())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
