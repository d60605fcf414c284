//! `pavo run true` in the guests of 200 and of 1,000 VMs, answers gathered, against `clush -R exec` of 200
//! processes.
//!
//! `cargo bench --bench run` needs no privilege, and for the comparison `clush` (package clustershell).
//! This program is the VMs' processes: each serves its port of the cluster's secure channel
//! and of its folder by pavo's own code, and behind it a guest's agent that answers at once.
//! At a site all of it but the command itself happens on other hosts; here it takes the same processors.
//! Beside that the real agent runs the real `true` for each of 200, which is what `clush` does.
//! What must hold (README): 0.3 s and half of what `clush` takes for 200, 1.0 s for 1,000.

#![expect(clippy::print_stdout, reason = "a bench prints")]
#![expect(clippy::print_stderr, reason = "it says aloud that it cannot run")]

use std::fs;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pavo::host::{limits, process};
use pavo::model::agent::PROGRAM;
use pavo::model::job::{JobRecord, VmRecord, VmState, VmStatus};
use pavo::model::owner::Owner;
use pavo::model::vm::{Accel, VmSpec};
use pavo::ops::reach::IDENTITY;
use pavo::store::{Change, Commit, Store, embedded, keys};
use pavo::vm::agent::{Agent, Port};
use pavo::vm::channel::{Identity, Listener};
use pavo::vm::checkpoint::Subject;
use pavo::vm::console::Console;
use pavo::vm::control::{self, Endpoint};
use pavo::vm::display::Screen;
use pavo::vm::guest_ports::GuestPorts;
use pavo::vm::usage::Meter;
use pavo_agent::{Decoder, Event, Exit, Frame, Hello, Kind, Started, mark};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};

const ROUNDS: usize = 7;
/// Threads that are VMs' processes.
const HOSTS: u32 = 2;

/// What is at the other end of a VM's line.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Guest {
    /// An agent that answers at once, and runs nothing.
    Light,
    /// The program of guests.
    Real,
}

fn main() {
    limits::raise_open_files();
    println!("pavo run true, median of {ROUNDS}          pavo     clush   ratio");
    let clush = clush();
    let compare = |title: &str, ours: Duration, most: &str| match clush {
        Some(theirs) => {
            let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
            let (ours, theirs) = (ours.as_secs_f64(), theirs.as_secs_f64());
            println!("{title:34} {ours:6.3} s {theirs:6.3} s {ratio:6.2}   {most}");
        }
        None => println!("{title:34} {:6.3} s                  {most}", ours.as_secs_f64()),
    };
    let far = Cluster::start(200, Guest::Light, true);
    compare("200 VMs, other hosts", far.time(), "0.3 s and 0.50 at most");
    drop(far);
    let real = Cluster::start(200, Guest::Real, true);
    compare("200, and `true` is run here", real.time(), "");
    drop(real);
    let near = Cluster::start(200, Guest::Light, false);
    compare("200 VMs, this host", near.time(), "");
    drop(near);
    let many = Cluster::start(1000, Guest::Light, true).time();
    println!(
        "1,000 VMs, other hosts             {:6.3} s                   1.0 s at most",
        many.as_secs_f64()
    );
}

/// How long `clush` takes for 200 processes.
fn clush() -> Option<Duration> {
    let run = || {
        let mut command = Command::new("clush");
        command.args(["-R", "exec", "-b", "-w", "vm[0-199]", "true"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).status()
    };
    match run() {
        Ok(status) => assert!(status.success(), "clush: {status}"),
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "clush: {error}");
            eprintln!("SKIPPED: no comparison: `clush` (package clustershell): {error}");
            return None;
        }
    }
    Some(median(|| assert!(run().unwrap().success())))
}

fn median(mut run: impl FnMut()) -> Duration {
    let mut times: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let begun = Instant::now();
            run();
            begun.elapsed()
        })
        .collect();
    times.sort();
    times[ROUNDS / 2]
}

/// A cluster as its record and its VMs' processes are seen by commands.
struct Cluster {
    dir: tempfile::TempDir,
    count: u32,
    /// Guests' agents that are processes.
    agents: Vec<Child>,
    /// The threads end with it.
    _life: watch::Sender<()>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for agent in &mut self.agents {
            let _ = agent.kill();
            let _ = agent.wait();
        }
    }
}

impl Cluster {
    fn start(count: u32, guest: Guest, far: bool) -> Self {
        let dir = tempfile::Builder::new().prefix("pavo-bench.").tempdir_in("/var/tmp").unwrap();
        let job = dir.path().join("job");
        for folder in ["conf", "none", "tmp", "job"] {
            fs::create_dir(dir.path().join(folder)).unwrap();
        }
        let identity = Arc::new(Identity::generate("bench").unwrap());
        let secret = job.join(IDENTITY);
        fs::write(&secret, serde_json::to_vec(&*identity).unwrap()).unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        // Before there are others who could start it while it is written.
        let program = job.join("pavo-agent");
        fs::write(&program, PROGRAM).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let (life, lives) = watch::channel(());
        let (told, tell) = std::sync::mpsc::channel();
        for host in 0..HOSTS {
            let (job, identity, told, mut lives) =
                (job.clone(), identity.clone(), told.clone(), lives.clone());
            let ranks = (0..count).filter(move |rank| rank % HOSTS == host);
            std::thread::spawn(move || {
                runtime().block_on(async {
                    for rank in ranks {
                        told.send(serve(&job, rank, &identity, guest)).unwrap();
                    }
                    drop(told);
                    // Until nobody wants them any more.
                    while lives.changed().await.is_ok() {}
                });
            });
        }
        drop(told);
        let (mut vms, mut agents) = (Vec::new(), Vec::new());
        for (rank, address, agent) in tell {
            vms.push(record(rank, far.then_some(address)));
            agents.extend(agent);
        }
        vms.sort_by_key(|vm| vm.rank);
        let cluster = Self { dir, count, agents, _life: life };
        runtime().block_on(cluster.store(vms));
        cluster
    }

    async fn store(&self, vms: Vec<VmRecord>) {
        let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).unwrap().unwrap().name;
        let owner = Owner::local(1);
        let job = JobRecord {
            version: JobRecord::VERSION,
            owner,
            name: "bench".into(),
            user: user.clone(),
            definition: format!("tiny:{}", self.count),
            started: 0,
            time_limit: None,
            launcher: process::current(),
            dir: self.dir.path().join("job"),
            host: "elsewhere".into(),
            vms,
        };
        let store = embedded::open(&self.dir.path().join("state")).await.unwrap();
        let put = Change::put_json(keys::job_record(&user, owner), &job).unwrap();
        assert!(matches!(store.commit(&[], &[put]).await.unwrap(), Commit::Done(_)));
    }

    /// How long the command takes, from its start to its end.
    fn time(&self) -> Duration {
        // The first shows that all have answered.
        let said = self.pavo(&["agent", "ping", "--timeout", "30"]).output().unwrap();
        let all = format!("{} VMs answered", self.count);
        assert!(String::from_utf8_lossy(&said.stdout).starts_with(&all), "{said:?}");
        median(|| {
            let said = self.pavo(&["run", "--fold", "true"]).output().unwrap();
            assert!(said.status.success() && said.stderr.is_empty(), "{said:?}");
        })
    }

    fn pavo(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pavo"));
        let path = std::env::var_os("PATH").unwrap_or_default();
        command.args(words).env_clear().env("PATH", path).stdin(Stdio::null());
        for (name, folder) in [
            ("HOME", "."),
            ("PAVO_STATE_DIR", "state"),
            ("PAVO_TMPDIR", "tmp"),
            ("PAVO_SYSTEM_CONF_DIR", "none"),
            ("PAVO_USER_CONF_DIR", "conf"),
        ] {
            command.env(name, self.dir.path().join(folder));
        }
        command
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn record(rank: u32, control: Option<SocketAddr>) -> VmRecord {
    VmRecord {
        rank,
        template: "tiny".into(),
        image: None,
        cores: 1,
        memory_mib: 64,
        host: "elsewhere".into(),
        addresses: Vec::new(),
        ports: Vec::new(),
        ssh_user: "root".into(),
        drives: Vec::new(),
        control,
    }
}

/// Is the process of a VM; where it is reached, and its guest's process, if it has one.
fn serve(
    job: &Path,
    rank: u32,
    identity: &Identity,
    guest: Guest,
) -> (u32, SocketAddr, Option<Child>) {
    let spec = spec(job, rank);
    fs::create_dir(&spec.dir).unwrap();
    let (line, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    line.set_nonblocking(true).unwrap();
    let (opened, port) = watch::channel(Port { changes: 1, open: true });
    let (agent, served, _pcoccs) = Agent::new(spec.name(), spec.dir.clone());
    let line = UnixStream::from_std(line).unwrap();
    tokio::spawn(async move {
        served.serve(line, port).await;
        drop(opened);
    });
    let process = match guest {
        Guest::Light => {
            theirs.set_nonblocking(true).unwrap();
            tokio::spawn(answer(UnixStream::from_std(theirs).unwrap()));
            None
        }
        Guest::Real => Some(real(job, theirs.into())),
    };
    let endpoint = endpoint(&spec, agent);
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let members = Listener::bind(any, identity).unwrap();
    let address = members.address().unwrap();
    tokio::spawn(control::serve_members(members, endpoint.clone()));
    let socket = control::listen(&spec.dir, control::SOCKET).unwrap();
    socket.set_nonblocking(true).unwrap();
    tokio::spawn(control::serve(UnixListener::from_std(socket).unwrap(), endpoint));
    (rank, address, process)
}

fn spec(job: &Path, rank: u32) -> VmSpec {
    VmSpec {
        owner: Owner::local(1),
        rank,
        template: "tiny".into(),
        dir: job.join(format!("vm{rank}")),
        dial: None,
        cores: 1,
        memory_mib: 64,
        accel: Accel::Tcg,
        qemu_bin: "qemu-system-x86_64".into(),
        machine_type: "q35".into(),
        cpu_model: None,
        disk: None,
        nics: Vec::new(),
        seed: None,
        kernel: None,
        custom_args: Vec::new(),
        paused: false,
        restore: None,
        extras: Default::default(),
    }
}

/// What requests act on, of a VM whose QEMU nobody asks for.
fn endpoint(spec: &VmSpec, agent: Agent) -> Endpoint {
    let (console, guest) = UnixStream::pair().unwrap();
    let status = VmStatus { state: VmState::Running, since: 0, detail: String::new() };
    let (status_now, status) = watch::channel(status);
    let (client, qmp) = watch::channel(None);
    let (stop, mut stops) = mpsc::channel(1);
    tokio::spawn(async move {
        while stops.recv().await.is_some() {}
        drop((guest, status_now, client));
    });
    Endpoint {
        name: spec.name(),
        status,
        qmp,
        console: Console::start(console, &spec.dir).unwrap(),
        stop,
        dir: spec.dir.clone(),
        disk: None,
        saves: Arc::default(),
        ports: GuestPorts::new(spec),
        screen: Screen::new(spec),
        meter: Meter::new(spec),
        agent,
        subject: Subject::new(spec, &[]),
    }
}

/// The program of guests, at this port.
fn real(job: &Path, port: OwnedFd) -> Child {
    Command::new(job.join("pavo-agent")).arg("--stdio").stdin(port).spawn().unwrap()
}

/// Answers as a guest's agent whose commands have ended when they begin.
async fn answer(mut port: UnixStream) {
    let mut decoder = Decoder::new();
    let mut bytes = vec![0; 4096];
    let hello = Hello { version: 1, agent: "0".into(), cores: 1, ..Hello::default() }.encode();
    loop {
        let count = port.read(&mut bytes).await.unwrap_or(0);
        if count == 0 {
            return;
        }
        decoder.push(&bytes[..count]);
        let mut said = Vec::new();
        while let Some(event) = decoder.next_event().unwrap() {
            match event {
                Event::Mark(nonce) => {
                    said.extend(mark(&nonce));
                    Frame::new(0, Kind::Pong, [&[0; 8], &*hello].concat()).write(&mut said);
                }
                Event::Frame(frame) if frame.kind == Kind::Ping => {
                    Frame::new(0, Kind::Pong, [&*frame.payload, &*hello].concat()).write(&mut said);
                }
                Event::Frame(frame) if frame.kind == Kind::Open => {
                    let started = Started { id: 1, pid: 1 }.encode();
                    Frame::new(frame.stream, Kind::Started, started).write(&mut said);
                    let exit = Exit::Code(0).encode();
                    Frame::new(frame.stream, Kind::Exit, exit).write(&mut said);
                }
                Event::Frame(_) => {}
            }
        }
        if port.write_all(&said).await.is_err() {
            return;
        }
    }
}
