//! Labs do not disturb each other, and nothing of one outlives it.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pavo_lab::{Etcd, Lab, Options, can_run, people};

/// What a lab could leave on the machine.
struct Traces {
    prefix: String,
    pids: Vec<i32>,
}

impl Traces {
    fn of(lab: &Lab) -> Self {
        let pids = lab.hosts().iter().flat_map(|host| {
            let inner = host.processes().unwrap().into_iter().map(|process| process.pid);
            inner.chain([host.pid().unwrap()]).collect::<Vec<_>>()
        });
        Self { prefix: lab.prefix().to_owned(), pids: pids.collect() }
    }

    fn left(&self) -> Vec<PathBuf> {
        let mut left: Vec<PathBuf> =
            self.pids.iter().map(|pid| PathBuf::from(format!("/proc/{pid}"))).collect();
        left.push(Path::new("/tmp/pavo-lab").join(&self.prefix));
        left.push(PathBuf::from(format!("/dev/shm/pavo-lab-{}", self.prefix)));
        for controller in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            let groups = fs::read_dir(controller.path()).into_iter().flatten().flatten();
            let ours = format!("slurm_{}n", self.prefix);
            left.extend(groups.map(|group| group.path()).filter(|group| {
                group.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&ours))
            }));
        }
        left.retain(|path| path.exists());
        left
    }
}

/// Whether the machine itself has mounts of labs.
fn mounted() -> bool {
    fs::read_to_string("/proc/self/mountinfo").unwrap().contains("pavo-lab")
}

#[test]
fn two_labs_at_once_do_not_meet_and_nothing_is_left_of_either() {
    if !can_run() {
        return;
    }
    let options = || Options { hosts: 2, etcd: Etcd::One, ovs: true, ..Options::default() };
    let (one, two) = std::thread::scope(|scope| {
        let one = scope.spawn(|| Lab::up(options()).unwrap());
        let two = Lab::up(options()).unwrap();
        (one.join().unwrap(), two)
    });
    assert_ne!(one.prefix(), two.prefix());
    for lab in [&one, &two] {
        lab.etcdctl(&["put", "whose", lab.prefix()]).unwrap();
    }
    for lab in [&one, &two] {
        let said = lab.login().run(Some("alice"), &["srun", "-N2", "hostname"]).unwrap();
        let said = said.ok().unwrap();
        assert!(said.lines().all(|name| name.starts_with(lab.prefix())), "{said}");
        let whose = lab.etcdctl(&["get", "--print-value-only", "whose"]).unwrap();
        assert_eq!(whose.trim(), lab.prefix());
        let key = lab.etc().join("munge/munge.key");
        assert_ne!(fs::read(key).unwrap(), fs::read("/etc/munge/munge.key").unwrap());
    }
    let traces = [Traces::of(&one), Traces::of(&two)];
    assert!(traces[0].left().len() > 10, "the test sees what is there");
    assert!(!mounted());
    drop(one);
    assert_eq!(traces[0].left(), Vec::<PathBuf>::new());
    two.login().run(Some("bob"), &["srun", "-N2", "true"]).unwrap().ok().unwrap();
    drop(two);
    assert_eq!(traces[1].left(), Vec::<PathBuf>::new());
}

#[test]
fn a_lab_goes_when_its_test_panics_with_a_job_running() {
    if !can_run() {
        return;
    }
    let (send, receive) = std::sync::mpsc::channel();
    let test = std::thread::spawn(move || {
        let lab = Lab::up(Options { hosts: 1, ..Options::default() }).unwrap();
        let job = ["sbatch", "-o", "said", "--wrap", "setsid -f sleep 1000; sleep 1000"];
        lab.login().run(Some("alice"), &job).unwrap().ok().unwrap();
        lab.wait_state("n1", &["mix", "alloc"]).unwrap();
        send.send(Traces::of(&lab)).unwrap();
        panic!("as wanted");
    });
    assert!(test.join().is_err());
    assert_eq!(receive.recv().unwrap().left(), Vec::<PathBuf>::new());
}

#[test]
fn signals_reach_the_command_and_its_end_is_seen() {
    if !can_run() {
        return;
    }
    let lab = Lab::up(Options { hosts: 1, slurmd: false, ..Options::default() }).unwrap();
    let host = lab.host("n1");
    let script = "trap 'echo got it; exit 7' USR1; echo ready; while :; do sleep 0.05; done";
    let mut command = host.command(Some("alice"), &["sh", "-c", script]).unwrap();
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGUSR1).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(7));
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "got it\n");

    use std::os::unix::process::ExitStatusExt;
    let ended = host.run(None, &["sh", "-c", "kill -TERM $$"]).unwrap();
    assert_eq!(ended.status.signal(), Some(15));
    let start = Instant::now();
    let slow = host.run_within(Duration::from_millis(300), None, &["sleep", "1000"]);
    assert!(slow.unwrap_err().to_string().contains("took over 300ms"));
    assert!(start.elapsed() < Duration::from_secs(10));
    assert!(host.command(None, &["no-such-program"]).unwrap().spawn().is_err());
}

/// `pavo-lab` with a lab of one bare host, once it is up.
fn open(words: &[&str]) -> (std::process::Child, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_pavo-lab"))
        .args(words)
        .args(["--hosts", "1", "--etcd", "0", "--no-ovs", "--no-pavo"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.as_mut().unwrap()).lines().map(Result::unwrap);
    let prefix =
        |line: String| Some(line.strip_prefix("Hosts: ")?.split("login").next()?.to_owned());
    let prefix = lines.filter_map(prefix).next().expect("the lab is not up");
    (child, prefix)
}

/// What a lab of another process could leave.
fn traces(prefix: &str) -> Traces {
    let keepers = fs::read_dir(Path::new("/tmp/pavo-lab").join(prefix).join("keepers")).unwrap();
    let record = |entry: fs::DirEntry| fs::read_to_string(entry.path()).unwrap();
    let pid = |text: String| text.split(' ').next().unwrap().parse().unwrap();
    Traces { prefix: prefix.to_owned(), pids: keepers.flatten().map(record).map(pid).collect() }
}

#[test]
fn an_owner_that_is_killed_leaves_no_process_and_its_folder_is_swept() {
    if !can_run() {
        return;
    }
    let (mut owner, prefix) = open(&["up"]);
    let traces = traces(&prefix);
    assert_eq!(traces.pids.len(), 3, "the switch and two hosts");
    owner.kill().unwrap();
    owner.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while traces.pids.iter().any(|pid| Path::new(&format!("/proc/{pid}")).exists()) {
        assert!(Instant::now() < deadline, "hosts outlive their owner: {:?}", traces.left());
        std::thread::sleep(Duration::from_millis(10));
    }
    pavo_lab::sweep();
    assert_eq!(traces.left(), Vec::<PathBuf>::new());
}

#[test]
fn a_lab_of_people_goes_when_it_is_told_to() {
    if !can_run() {
        return;
    }
    for words in [&["up"][..], &["shell", "--new"][..]] {
        let (mut owner, prefix) = open(words);
        let traces = traces(&prefix);
        let open = people::open().into_iter().find(|open| open.prefix() == prefix).unwrap();
        // From another terminal.
        let said = open.command("n1", Some("bob"), &["id", "-un"]).unwrap().output().unwrap();
        assert_eq!(said.stdout, b"bob\n");
        open.end().unwrap();
        assert!(owner.wait().unwrap().success());
        assert_eq!(traces.left(), Vec::<PathBuf>::new());
    }
}
