//! `pavo cp` of 1 GiB into a guest, and out of it, against `socat` over the same kind of socket.
//!
//! `cargo bench --bench cp` needs `socat`, and 2 GiB of room in `/dev/shm`. The guest is the agent
//! itself on this machine; a process of its own carries between it and us, as each VM's does.
//! So bytes pass two sockets, a pipe and four processes; with `socat` one socket and two. Both
//! read a file that is in memory and write another. What must hold (README): 0.6 of `socat`'s rate.

#![expect(clippy::print_stdout, reason = "a bench prints")]
#![expect(clippy::print_stderr, reason = "it says aloud that it cannot run")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use pavo::model::agent::PROGRAM;
use pavo::model::job::{JobRecord, VmState, VmStatus};
use pavo::model::owner::Owner;
use pavo::model::vm::{Accel, VmSpec};
use pavo::ops::copy::{Copies, Order, Way};
use pavo::vm::agent::{Agent, Port};
use pavo::vm::checkpoint::Subject;
use pavo::vm::console::Console;
use pavo::vm::control::{self, Endpoint};
use pavo::vm::display::Screen;
use pavo::vm::guest_ports::GuestPorts;
use pavo::vm::usage::Meter;
use tokio::sync::{mpsc, watch};

const ROUNDS: usize = 5;
const SIZE: usize = 1 << 30;
/// Says to this program that it is the VM's process.
const SERVE: &str = "PAVO_BENCH_SERVE";

fn main() {
    if let Some(dir) = std::env::var_os(SERVE) {
        return serve(Path::new(&dir));
    }
    if Command::new("socat").arg("-V").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "socat is not installed");
        eprintln!("skipped: socat is not installed");
        return;
    }
    let work = tempfile::tempdir_in("/dev/shm").unwrap();
    let dir = work.path();
    fs::create_dir(dir.join("vm0")).unwrap();
    let (source, copy) = (dir.join("source"), dir.join("copy"));
    let mut file = fs::File::create(&source).unwrap();
    let block: Vec<u8> = (0..1_u32 << 20).map(|n| (n.wrapping_mul(n) >> 5) as u8).collect();
    (0..SIZE >> 20).for_each(|_| file.write_all(&block).unwrap());
    drop(file);
    let mut vm = Command::new(std::env::current_exe().unwrap());
    let mut vm = vm.env(SERVE, dir).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(vm.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "up\n");
    let [mut into, mut out, mut beside] = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        into.push(rate(&copy, || ours(dir, inward(&source, &copy))));
        beside.push(rate(&copy, || socat(dir, &source, &copy)));
        out.push(rate(&copy, || ours(dir, outward(&source, &copy))));
    }
    vm.kill().unwrap();
    vm.wait().unwrap();
    let (into, out, beside) = (median(into), median(out), median(beside));
    println!("1 GiB, median of {ROUNDS}              GiB/s  ratio");
    println!("socat                          {beside:9.2}   1.00");
    println!("pavo cp, into the guest        {into:9.2} {:6.2}   0.60 at least", into / beside);
    println!("pavo cp, out of it             {out:9.2} {:6.2}", out / beside);
}

/// How many GiB a second a copy makes, which must be a whole one.
fn rate(copy: &Path, make: impl FnOnce()) -> f64 {
    let start = Instant::now();
    make();
    let seconds = start.elapsed().as_secs_f64();
    assert_eq!(fs::metadata(copy).unwrap().len(), SIZE as u64);
    fs::remove_file(copy).unwrap();
    1.0 / seconds
}

fn inward(source: &Path, copy: &Path) -> Way {
    let to = copy.to_str().unwrap().into();
    Way::In { sources: vec![source.into()], to, into: false }
}

fn outward(source: &Path, copy: &Path) -> Way {
    let source = source.to_str().unwrap().into();
    Way::Out { sources: vec![source], to: copy.into(), into: false }
}

fn ours(dir: &Path, way: Way) {
    let order = Order { rank: 0, way, user: None };
    runtime().block_on(async {
        let mut copies = Copies::start(None, &job(dir), vec![order]);
        let ended = copies.next().await.unwrap();
        ended.outcome.unwrap();
        assert_eq!(ended.troubles, [""; 0]);
    });
}

fn socat(dir: &Path, source: &Path, copy: &Path) {
    let socket = dir.join("socat");
    let mut listening = Command::new("socat")
        .arg("-u")
        .arg(format!("UNIX-LISTEN:{}", socket.display()))
        .arg(format!("OPEN:{},creat,trunc", copy.display()))
        .spawn()
        .unwrap();
    while !socket.exists() {
        std::thread::yield_now();
    }
    let connect = format!("UNIX-CONNECT:{}", socket.display());
    let from = format!("OPEN:{},rdonly", source.display());
    let sent = Command::new("socat").args(["-u", &from, &connect]).status().unwrap();
    assert!(sent.success() && listening.wait().unwrap().success());
    // Whoever listens removes it, at its end.
    fs::remove_file(socket).ok();
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// As each process of ours has it.
fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn job(dir: &Path) -> JobRecord {
    serde_json::from_value(serde_json::json!({
        "version": JobRecord::VERSION, "owner": Owner::local(1), "name": "bench",
        "user": "bench", "definition": "bench:1", "started": 0, "time_limit": null,
        "launcher": { "pid": 1, "start_time": 0 }, "dir": dir, "host": "here",
        "vms": [{
            "rank": 0, "template": "bench", "image": null, "cores": 1, "memory_mib": 1,
            "host": "here", "addresses": [], "ports": [], "ssh_user": "root",
        }],
    }))
    .unwrap()
}

fn spec(dir: &Path) -> VmSpec {
    VmSpec {
        owner: Owner::local(1),
        rank: 0,
        template: "bench".into(),
        dir: dir.join("vm0"),
        cores: 1,
        memory_mib: 1,
        accel: Accel::Tcg,
        qemu_bin: PathBuf::new(),
        machine_type: String::new(),
        cpu_model: None,
        disk: None,
        nics: Vec::new(),
        seed: None,
        kernel: None,
        custom_args: Vec::new(),
        dial: None,
        paused: false,
        restore: None,
        extras: Default::default(),
    }
}

/// The guest, at the other end of the port.
fn agent(dir: &Path, port: &Path) -> Child {
    let path = dir.join("pavo-agent");
    fs::write(&path, PROGRAM).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    Command::new(path).arg("--port").arg(port).spawn().unwrap()
}

/// What a VM's process does for commands, until it is killed: the agent ends with its port.
fn serve(dir: &Path) {
    runtime().block_on(async {
        let spec = spec(dir);
        let path = dir.join("port");
        let port = tokio::net::UnixListener::bind(&path).unwrap();
        let mut guest = agent(dir, &path);
        let (stream, _) = port.accept().await.unwrap();
        let (agent, line, _pcoccs) = Agent::new("vm0".into(), spec.dir.clone());
        let (_open, opened) = watch::channel(Port { changes: 1, open: true });
        tokio::spawn(line.serve(stream, opened));
        agent.hello(std::time::Duration::from_secs(10)).await.unwrap();
        let running = VmStatus { state: VmState::Running, since: 0, detail: String::new() };
        let ((_told, status), (_qemu, qmp)) = (watch::channel(running), watch::channel(None));
        let (_silent, console) = tokio::net::UnixStream::pair().unwrap();
        let endpoint = Endpoint {
            name: "vm0".into(),
            status,
            qmp,
            console: Console::start(console, &spec.dir).unwrap(),
            stop: mpsc::channel(1).0,
            dir: spec.dir.clone(),
            disk: None,
            saves: Arc::default(),
            ports: GuestPorts::new(&spec),
            screen: Screen::new(&spec),
            meter: Meter::new(&spec),
            agent,
            subject: Subject::new(&spec, &[]),
        };
        let listener = control::listen(&spec.dir, control::SOCKET).unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::UnixListener::from_std(listener).unwrap();
        println!("up");
        control::serve(listener, endpoint).await;
        guest.wait().unwrap();
    });
}
