//! etcd members on loopback ports, for tests.
//!
//! Each runs below a shell that waits for the end of its standard input, which this
//! process holds: however the test ends, the member is killed and its folder removed.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Kills the member when nobody is left, then its folder goes too.
const GUARD: &str = r#"
dir=$1; shift
"$@" >"$dir/log" 2>&1 </dev/null & pid=$!
echo $pid
read -r order
kill -CONT $pid 2>/dev/null; kill -9 $pid 2>/dev/null; wait $pid 2>/dev/null
[ "$order" = keep ] || rm -rf "$dir"
"#;

/// How the members of a cluster are started.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    pub members: usize,
    pub args: Vec<String>,
    /// A folder with `ca.pem`, `server.pem` and `server.key`.
    pub tls: Option<PathBuf>,
}

/// A cluster, gone with this value or this process.
#[derive(Debug)]
pub struct Cluster {
    pub members: Vec<Member>,
    setup: Setup,
    peers: String,
    dir: tempfile::TempDir,
}

#[derive(Debug)]
pub struct Member {
    name: String,
    pub client: String,
    peer: String,
    running: Option<(Child, Pid)>,
}

impl Cluster {
    pub fn single() -> Self {
        Self::start(Setup { members: 1, ..Setup::default() })
    }

    /// Starts the members; returns when all listen.
    pub fn start(setup: Setup) -> Self {
        for _ in 0..5 {
            if let Some(cluster) = Self::try_start(&setup) {
                return cluster;
            }
        }
        panic!("etcd does not start: is the Debian package `etcd-server` installed?");
    }

    fn try_start(setup: &Setup) -> Option<Self> {
        let ports = free_ports(2 * setup.members);
        let scheme = if setup.tls.is_some() { "https" } else { "http" };
        let members: Vec<Member> = ports
            .chunks(2)
            .enumerate()
            .map(|(number, port)| Member {
                name: format!("m{number}"),
                client: format!("{scheme}://127.0.0.1:{}", port[0]),
                peer: format!("http://127.0.0.1:{}", port[1]),
                running: None,
            })
            .collect();
        let peers: Vec<String> = members.iter().map(|m| format!("{}={}", m.name, m.peer)).collect();
        // Where nothing waits for a disk.
        let shm = Path::new("/dev/shm");
        let dir = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
        let dir = tempfile::Builder::new().prefix("pavo-etcd").tempdir_in(dir).unwrap();
        let mut cluster = Self { members, setup: setup.clone(), peers: peers.join(","), dir };
        for number in 0..setup.members {
            cluster.run(number);
        }
        cluster.wait_until_all_listen().then_some(cluster)
    }

    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|member| member.client.clone()).collect()
    }

    /// Starts a member, again perhaps: it finds what it had.
    pub fn run(&mut self, number: usize) {
        let dir = self.dir.path().join(&self.members[number].name);
        fs::create_dir_all(&dir).unwrap();
        let member = &mut self.members[number];
        let mut command = Command::new("sh");
        command.args(["-c", GUARD, "sh"]).arg(&dir).arg("etcd");
        command.arg("--data-dir").arg(dir.join("data")).args([
            "--name",
            &member.name,
            "--listen-client-urls",
            &member.client,
            "--advertise-client-urls",
            &member.client,
            "--listen-peer-urls",
            &member.peer,
            "--initial-advertise-peer-urls",
            &member.peer,
            "--initial-cluster",
            &self.peers,
            "--bcrypt-cost=4",
            "--logger=zap",
            "--log-level=warn",
        ]);
        // A leader is missed sooner than by default, to save the tests' time.
        command.args(["--heartbeat-interval=50", "--election-timeout=500"]);
        if let Some(tls) = &self.setup.tls {
            command.arg("--cert-file").arg(tls.join("server.pem"));
            command.arg("--key-file").arg(tls.join("server.key"));
            command.arg("--trusted-ca-file").arg(tls.join("ca.pem"));
        }
        command.args(&self.setup.args);
        let guard = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut guard = guard.expect("a shell");
        let mut pid = String::new();
        BufReader::new(guard.stdout.take().unwrap()).read_line(&mut pid).unwrap();
        member.running = Some((guard, Pid::from_raw(pid.trim().parse().unwrap())));
    }

    fn wait_until_all_listen(&self) -> bool {
        let end = Instant::now() + Duration::from_secs(20);
        let mut waiting: Vec<&Member> = self.members.iter().collect();
        while Instant::now() < end {
            waiting.retain(|member| TcpStream::connect(member.address()).is_err());
            if waiting.is_empty() {
                return true;
            }
            // A port that was taken meanwhile: etcd has ended.
            if waiting.iter().any(|member| !member.is_alive()) {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }
}

impl Member {
    fn address(&self) -> &str {
        self.client.split_once("://").unwrap().1
    }

    fn pid(&self) -> Pid {
        self.running.as_ref().expect("the member runs").1
    }

    /// Ended ones stay as zombies until the guard, which has no `wait` left, ends.
    fn is_alive(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
    }

    /// Ends it without notice.
    pub fn kill(&mut self) {
        let (mut guard, _) = self.running.take().expect("the member runs");
        use std::io::Write;
        guard.stdin.take().unwrap().write_all(b"keep\n").unwrap();
        guard.wait().unwrap();
    }

    /// From now on it takes connections and answers nothing.
    pub fn pause(&self) {
        kill(self.pid(), Signal::SIGSTOP).unwrap();
    }

    pub fn resume(&self) {
        kill(self.pid(), Signal::SIGCONT).unwrap();
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some((mut guard, _)) = self.running.take() {
            drop(guard.stdin.take());
            let _ = guard.wait();
        }
    }
}

/// Ports that nobody listens on, all different.
fn free_ports(count: usize) -> Vec<u16> {
    let held: Vec<TcpListener> =
        (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    held.iter().map(|listener| listener.local_addr().unwrap().port()).collect()
}
