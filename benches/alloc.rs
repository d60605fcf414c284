//! From the command to two VMs that answer ssh, against the same two QEMUs started bare.
//!
//! `cargo bench --bench alloc [-- tiny | debian]` needs QEMU, pasta and /dev/net/tun, and for
//! `debian` what building that image takes. The floor are the same
//! command lines on QEMU's own user-mode network, both at once, their disks and seeds made
//! before the clock starts. The two alternate, so that a busy machine disturbs both alike.
//! What must hold: at most 0.7 s more than the floor with the demo image, 1 s with `debian`.

#![expect(clippy::print_stdout, reason = "a bench prints")]
#![expect(clippy::print_stderr, reason = "it says aloud that it cannot run")]

mod lab;

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use lab::Lab;
use pavo::host::spawn;
use pavo::image::library::Resolved;
use pavo::model::address::{Mac, Subnet};
use pavo::model::owner::Owner;
use pavo::model::vm::{Accel, Disk, DiskCache, DiskModel, Nic, NicIpv4, Seed, VmSpec};
use pavo::ops::banner::answers_through;
use pavo::ops::ssh;
use pavo::vm::{args, overlay, seed};

const ROUNDS: usize = 3;
const VMS: u32 = 2;
/// Far more than a boot takes.
const PATIENCE: Duration = Duration::from_secs(900);

/// What is started.
struct Guests {
    image: Resolved,
    memory_mib: u64,
    allowed: Duration,
}

fn main() {
    let Some(lab) = Lab::new() else { return };
    let words: Vec<String> =
        std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let wanted = |name: &str| words.is_empty() || words.iter().any(|word| word == name);
    if wanted("tiny") {
        let allowed = Duration::from_millis(700);
        compare(&lab, &Guests { image: lab.image.clone(), memory_mib: 128, allowed });
    }
    if wanted("debian") {
        let allowed = Duration::from_secs(1);
        compare(&lab, &Guests { image: lab.debian(), memory_mib: 384, allowed });
    }
}

impl Guests {
    /// As `pavo alloc` is given it.
    fn template(&self) -> &str {
        self.image.uri.split(['@', ':']).nth(1).expect("REPO:NAME@REVISION")
    }
}

fn compare(lab: &Lab, guests: &Guests) {
    let [mut ours, mut bare] = [const { Vec::new() }; 2];
    println!("{VMS} × {:<7} to ssh      pavo alloc      plain QEMU", guests.template());
    for round in 0..ROUNDS {
        ours.push(alloc(lab, guests));
        bare.push(plain(lab, guests, round));
        println!(
            "round {}               {:7.2} s       {:7.2} s",
            round + 1,
            secs(ours[round]),
            secs(bare[round])
        );
    }
    let (ours, bare) = (median(ours), median(bare));
    let added = ours.saturating_sub(bare);
    let met = if added <= guests.allowed { "ok" } else { "MISSED" };
    println!("median                {:7.2} s       {:7.2} s", secs(ours), secs(bare));
    println!("pavo adds {:.2} s   ≤ {} s: {met}", secs(ours) - secs(bare), secs(guests.allowed));
}

/// From the start of the command until its script runs.
fn alloc(lab: &Lab, guests: &Guests) -> Duration {
    let definition = format!("{}:{VMS}", guests.template());
    let memory = guests.memory_mib.to_string();
    let limit = PATIENCE.as_secs().to_string();
    let mut command = lab.pavo(&["alloc", "--mem", &memory, "--wait", "ssh", "--timeout", &limit]);
    command.args(["-E", "echo up", &definition]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let time = start.elapsed();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && line == "up\n", "{said}");
    time
}

/// A QEMU that ends with this value.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// From the start of the first QEMU until both guests have sent their ssh banners.
fn plain(lab: &Lab, guests: &Guests, round: usize) -> Duration {
    let mut prepared: Vec<_> =
        (0..VMS).map(|rank| Plain::prepare(lab, guests, round, rank)).collect();
    let start = Instant::now();
    let running: Vec<Guest> =
        prepared.iter_mut().map(|plain| Guest(plain.command.spawn().unwrap())).collect();
    let (answer, answers) = mpsc::channel();
    for plain in &prepared {
        let (answer, port) = (answer.clone(), plain.port);
        thread::spawn(move || ask(port, start, &answer));
    }
    let times: Vec<Duration> =
        prepared.iter().map(|_| answers.recv_timeout(PATIENCE).expect("ssh answers")).collect();
    drop(running);
    *times.iter().max().unwrap()
}

/// A VM's command, and our end of its monitor.
struct Plain {
    command: Command,
    port: u16,
    _monitor: UnixStream,
}

impl Plain {
    fn prepare(lab: &Lab, guests: &Guests, round: usize, rank: u32) -> Self {
        let dir = format!("tmp/plain-{}-{round}-{rank}", guests.template());
        let mut spec = spec(guests, lab.path().join(dir), rank);
        std::fs::create_dir(&spec.dir).unwrap();
        let (disk, seed) = (spec.dir.join("disk.qcow2"), spec.dir.join("seed.img"));
        let (below, size) = (&guests.image.path, guests.image.virtual_size);
        overlay::create(&disk, below, guests.image.format, size).unwrap();
        seed::write(&seed, spec.seed.as_ref().unwrap(), &spec.nics, false).unwrap();
        let agent = UnixListener::bind(spec.dir.join("agent.sock")).unwrap();
        lab.give(&spec.dir);

        let nic = spec.nics.remove(0);
        let port = free_port();
        let (monitor, qmp) = UnixStream::pair().unwrap();
        let (mut output, console) = UnixStream::pair().unwrap();
        // A console that nobody reads would stop the guest.
        thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
        let mut command = lab.ordinary(&spec.qemu_bin);
        let (_, own_agent) = UnixStream::pair().unwrap();
        let (_, pcoccs_agent) = UnixStream::pair().unwrap();
        let ends =
            vec![qmp.into(), console.into(), agent.into(), own_agent.into(), pcoccs_agent.into()];
        let [qmp, console, agent, own_agent, pcoccs_agent] =
            spawn::inherit(&mut command, ends).try_into().unwrap();
        let extras = &Default::default();
        let (disk, seed) = (disk.as_path(), seed.as_path());
        let wiring =
            args::Wiring { qmp, console, agent, own_agent, pcoccs_agent, disk, seed, extras };
        let arguments = args::qemu(&spec, &wiring).unwrap();
        // Its processors start by themselves: nobody says so by QMP.
        command.args(arguments.into_iter().filter(|word| word != "-S"));
        command.args(["-netdev", &format!("user,id=net0,hostfwd=tcp:127.0.0.1:{port}-:22")]);
        let device = format!("{}-pci,netdev=net0,mac={},romfile=", nic.model, nic.mac);
        command.args(["-device", &device]).stdout(Stdio::null());
        spawn::die_with_parent(&mut command);
        Self { command, port, _monitor: monitor }
    }
}

/// What pavo makes of the image with one network, but for the names.
fn spec(guests: &Guests, dir: PathBuf, rank: u32) -> VmSpec {
    let subnet = Subnet::new([10, 0, 2, 0].into(), 24).unwrap();
    let nic = Nic {
        network: "default".into(),
        tap: String::new(),
        mac: Mac([0x52, 0x54, 0, 0, 0, rank as u8]),
        model: "virtio-net".into(),
        queues: 1,
        mtu: 1500,
        ipv4: Some(NicIpv4 {
            address: [10, 0, 2, 15].into(),
            subnet,
            gateway: subnet.gateway(),
            domain: "pavo.local".into(),
        }),
        ipv6: None,
        offloads: true,
    };
    VmSpec {
        owner: Owner::local(1),
        rank,
        template: guests.template().into(),
        dir,
        cores: 1,
        memory_mib: guests.memory_mib,
        accel: Accel::Tcg,
        qemu_bin: "qemu-system-x86_64".into(),
        machine_type: "q35".into(),
        cpu_model: None,
        disk: Some(Disk {
            backing: guests.image.path.clone(),
            backing_format: guests.image.format,
            virtual_size: guests.image.virtual_size,
            model: DiskModel::Virtio,
            cache: DiskCache::Unsafe,
        }),
        nics: vec![nic],
        seed: Some(Seed {
            instance_id: format!("bench-{rank}"),
            hostname: format!("vm{rank}"),
            domain: Some("pavo.local".into()),
            user_data: None,
            authorized_keys: vec![ssh::generate("bench").unwrap().openssh_public],
            host_key: ssh::generate("vm").unwrap(),
        }),
        kernel: None,
        custom_args: Vec::new(),
        dial: None,
        paused: false,
        restore: None,
        extras: Default::default(),
    }
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// Sends when the server at this port has sent `SSH-`. It is asked as pavo asks: who is asked
/// too often never answers.
fn ask(port: u16, start: Instant, answer: &mpsc::Sender<Duration>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // QEMU's user network takes the connection before the guest does.
    let answers = answers_through((Ipv4Addr::LOCALHOST, port).into(), Duration::from_millis(1500));
    if runtime.block_on(async { tokio::time::timeout(PATIENCE, answers).await }).is_ok() {
        // The bench may have given up.
        let _ = answer.send(start.elapsed());
    }
}

fn secs(time: Duration) -> f64 {
    time.as_secs_f64()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
