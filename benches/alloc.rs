//! From the command to two VMs that answer ssh, against the same two QEMUs started bare.
//!
//! `cargo bench --bench alloc` needs QEMU, pasta and /dev/net/tun. The floor are the same
//! command lines on QEMU's own user-mode network, both at once, their disks and seeds made
//! before the clock starts. The two alternate, so that a busy machine disturbs both alike.
//! What must hold (README): at most 0.7 s more than the floor.

#![expect(clippy::print_stdout, reason = "a bench prints")]
#![expect(clippy::print_stderr, reason = "it says aloud that it cannot run")]

mod lab;

use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use lab::Lab;
use pavo::host::spawn;
use pavo::model::address::{Mac, Subnet};
use pavo::model::owner::Owner;
use pavo::model::vm::{Accel, Disk, DiskCache, DiskModel, Nic, NicIpv4, Seed, VmSpec};
use pavo::ops::ssh;
use pavo::vm::{args, overlay, seed};

const ROUNDS: usize = 3;
const VMS: u32 = 2;
const MEMORY_MIB: u64 = 128;
const ALLOWED: Duration = Duration::from_millis(700);
/// How often a silent port is tried again, and how long one try may take: as pavo does.
const RETRY: Duration = Duration::from_millis(50);
const TRY: Duration = Duration::from_millis(1500);
/// Far more than a boot takes.
const PATIENCE: Duration = Duration::from_secs(180);

fn main() {
    let Some(lab) = Lab::new() else { return };
    let [mut ours, mut bare] = [const { Vec::new() }; 2];
    println!("{VMS} VMs to ssh      pavo alloc      plain QEMU");
    for round in 0..ROUNDS {
        ours.push(alloc(&lab));
        bare.push(plain(&lab, round));
        println!(
            "round {}         {:7.2} s       {:7.2} s",
            round + 1,
            secs(ours[round]),
            secs(bare[round])
        );
    }
    let (ours, bare) = (median(ours), median(bare));
    let added = ours.saturating_sub(bare);
    let met = if added <= ALLOWED { "ok" } else { "MISSED" };
    println!("median          {:7.2} s       {:7.2} s", secs(ours), secs(bare));
    println!("pavo adds {:.2} s   ≤ {} s: {met}", secs(ours) - secs(bare), secs(ALLOWED));
}

/// From the start of the command until its script runs.
fn alloc(lab: &Lab) -> Duration {
    let definition = format!("tiny:{VMS}");
    let memory = MEMORY_MIB.to_string();
    let words = ["alloc", "--mem", &memory, "--wait", "ssh", "-E", "echo up", &definition];
    let mut command = lab.pavo(&words);
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
fn plain(lab: &Lab, round: usize) -> Duration {
    let mut prepared: Vec<_> = (0..VMS).map(|rank| Plain::prepare(lab, round, rank)).collect();
    let start = Instant::now();
    let guests: Vec<Guest> =
        prepared.iter_mut().map(|plain| Guest(plain.command.spawn().unwrap())).collect();
    let (answer, answers) = mpsc::channel();
    for plain in &prepared {
        let (answer, port) = (answer.clone(), plain.port);
        thread::spawn(move || ask(port, start, &answer));
    }
    let times: Vec<Duration> =
        prepared.iter().map(|_| answers.recv_timeout(PATIENCE).expect("ssh answers")).collect();
    drop(guests);
    *times.iter().max().unwrap()
}

/// A VM's command, and our end of its monitor.
struct Plain {
    command: Command,
    port: u16,
    _monitor: UnixStream,
}

impl Plain {
    fn prepare(lab: &Lab, round: usize, rank: u32) -> Self {
        let mut spec = spec(lab, lab.path().join(format!("tmp/plain-{round}-{rank}")), rank);
        std::fs::create_dir(&spec.dir).unwrap();
        let (disk, seed) = (spec.dir.join("disk.qcow2"), spec.dir.join("seed.img"));
        let (below, size) = (&lab.image.path, lab.image.virtual_size);
        overlay::create(&disk, below, lab.image.format, size).unwrap();
        seed::write(&seed, spec.seed.as_ref().unwrap(), &spec.nics).unwrap();
        let agent = UnixListener::bind(spec.dir.join("agent.sock")).unwrap();
        lab.give(&spec.dir);

        let nic = spec.nics.remove(0);
        let port = free_port();
        let (monitor, qmp) = UnixStream::pair().unwrap();
        let (mut output, console) = UnixStream::pair().unwrap();
        // A console that nobody reads would stop the guest.
        thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
        let mut command = lab.ordinary(&spec.qemu_bin);
        let ends = vec![qmp.into(), console.into(), agent.into()];
        let [qmp, console, agent] = spawn::inherit(&mut command, ends).try_into().unwrap();
        let extras = &Default::default();
        let wiring = args::Wiring { qmp, console, agent, disk: &disk, seed: &seed, extras };
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

/// What pavo makes of `tiny` with one network, but for the names.
fn spec(lab: &Lab, dir: PathBuf, rank: u32) -> VmSpec {
    let subnet = Subnet::new([10, 0, 2, 0].into(), 24).unwrap();
    let nic = Nic {
        network: "default".into(),
        tap: String::new(),
        mac: Mac([0x52, 0x54, 0, 0, 0, rank as u8]),
        model: "virtio-net".into(),
        mtu: 1500,
        ipv4: Some(NicIpv4 {
            address: [10, 0, 2, 15].into(),
            subnet,
            gateway: subnet.gateway(),
            domain: "pavo.local".into(),
        }),
        offloads: true,
    };
    VmSpec {
        owner: Owner::local(1),
        rank,
        template: "tiny".into(),
        dir,
        cores: 1,
        memory_mib: MEMORY_MIB,
        accel: Accel::Tcg,
        qemu_bin: "qemu-system-x86_64".into(),
        machine_type: "q35".into(),
        cpu_model: None,
        disk: Some(Disk {
            backing: lab.image.path.clone(),
            backing_format: lab.image.format,
            virtual_size: lab.image.virtual_size,
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
        extras: Default::default(),
    }
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// Sends, once, when the server at this port has sent `SSH-`. Tries overlap: packets of
/// a guest that still boots are lost.
fn ask(port: u16, start: Instant, answer: &mpsc::Sender<Duration>) {
    let end = start + PATIENCE;
    let answered = Arc::new(AtomicBool::new(false));
    while !answered.load(Relaxed) && Instant::now() < end {
        let (answer, answered) = (answer.clone(), answered.clone());
        thread::spawn(move || {
            if banner(port).is_ok() && !answered.swap(true, Relaxed) {
                let _ = answer.send(start.elapsed());
            }
        });
        thread::sleep(RETRY);
    }
}

fn banner(port: u16) -> std::io::Result<()> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(TRY))?;
    let mut start = [0; 4];
    stream.read_exact(&mut start)?;
    if &start == b"SSH-" { Ok(()) } else { Err(std::io::ErrorKind::InvalidData.into()) }
}

fn secs(time: Duration) -> f64 {
    time.as_secs_f64()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
