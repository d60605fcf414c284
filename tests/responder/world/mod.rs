//! Three namespaces, a responder in one of them, and what asks it.

mod guest;
mod ipv6;
mod name_server;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::Pid;
use pavo::host::spawn;
use pavo::network::responder::{Answer, Guest, Spec};

pub use guest::*;
pub use ipv6::*;
pub use name_server::*;

pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 200, 255, 254);
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 1);
const NOBODY: u32 = 65534;
const MAC: &str = "52:54:00:00:00:00";
/// The end of every wait; never reached when all is well.
pub const LIMIT: Duration = Duration::from_secs(20);

/// A network namespace, which lives as long as this.
pub struct Namespace(File);

impl Namespace {
    fn new() -> Self {
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a new network namespace");
            // A broadcast is heard before there is an address.
            for file in ["all/rp_filter", "default/rp_filter"] {
                std::fs::write(format!("/proc/sys/net/ipv4/conf/{file}"), "0").unwrap();
            }
            ip("link set lo up");
            Self(File::open("/proc/thread-self/ns/net").unwrap())
        })
        .join()
        .unwrap()
    }

    /// Runs this on a thread inside.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let enter = || {
            setns(&self.0, CloneFlags::CLONE_NEWNET).expect("entering a namespace");
            work()
        };
        std::thread::scope(|scope| scope.spawn(enter).join().expect("it failed inside"))
    }

    /// A path to it for our children, while we live.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

pub fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
}

pub struct World {
    pub outside: Namespace,
    pub cluster: Namespace,
    pub guest: Namespace,
}

impl World {
    /// `None`, said aloud, for who may not make namespaces.
    #[expect(clippy::print_stderr, reason = "a skipped test is loud")]
    pub fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "needs root");
            eprintln!("skipped: needs root; try `unshare -rn cargo test --test responder`");
            return None;
        }
        let world =
            Self { outside: Namespace::new(), cluster: Namespace::new(), guest: Namespace::new() };
        let peer = world.guest.path();
        world.cluster.run(|| {
            ip(&format!("link add gw type veth peer name eth0 address {MAC} netns {peer}"));
            ip(&format!("addr add {GATEWAY}/16 dev gw"));
            ip("link set gw up");
        });
        world.guest.run(|| ip("link set eth0 up"));
        Some(world)
    }

    /// Gives the cluster an uplink, by which outside has a route to the gateway's address.
    pub fn join_outside(&self) {
        let peer = self.outside.path();
        self.cluster.run(|| {
            ip(&format!("link add uplink type veth peer name eth1 netns {peer}"));
            ip("addr add 192.0.2.1/30 dev uplink");
            ip("link set uplink up");
        });
        self.outside.run(|| {
            ip("addr add 192.0.2.2/30 dev eth1");
            ip("link set eth1 up");
            ip("route add 10.200.0.0/16 via 192.0.2.1");
        });
    }

    /// Starts a responder, and panics with its reason if it does not.
    pub fn start(&self, change: impl FnOnce(&mut Draft)) -> Running {
        let (child, lifeline, answer) = self.spawn(change);
        let mut running = Running { child, lifeline: Some(lifeline) };
        assert!(matches!(answer, Answer::Ready(true)), "{answer:?}: {:?}", running.child.wait());
        running
    }

    /// Starts a responder that is not expected to become ready.
    pub fn try_start(&self, change: impl FnOnce(&mut Draft)) -> (Child, Answer) {
        let (child, _, answer) = self.spawn(change);
        (child, answer)
    }

    fn spawn(&self, change: impl FnOnce(&mut Draft)) -> (Child, UnixStream, Answer) {
        let mut draft = Draft { spec: self.spec(), inherited: Vec::new() };
        change(&mut draft);
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_pavo"));
        command.args(["internal", "responder"]).stdin(Stdio::from(OwnedFd::from(theirs)));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        spawn::inherit(&mut command, draft.inherited);
        let child = command.spawn().unwrap();
        drop(command);
        let line = serde_json::to_string(&draft.spec).unwrap();
        ours.write_all(format!("{line}\n").as_bytes()).unwrap();
        ours.set_read_timeout(Some(LIMIT)).unwrap();
        let mut answer = String::new();
        BufReader::new(&ours).read_line(&mut answer).unwrap();
        let answer =
            serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error}: `{answer}`"));
        (child, ours, answer)
    }

    fn spec(&self) -> Spec {
        let guest = |rank: u32| Guest {
            rank,
            name: format!("vm{rank}"),
            mac: format!("52:54:00:00:00:{rank:02x}").parse().unwrap(),
            address: Ipv4Addr::from(u32::from(GUEST) + rank),
            address6: None,
            default_route: rank != 1,
        };
        Spec {
            network: "nat".into(),
            namespace: Some(self.cluster.path().into()),
            interface: "gw".into(),
            gateway: GATEWAY,
            subnet: "10.200.0.0/16".parse().unwrap(),
            ipv6: None,
            mtu: 1450,
            domain: "pavo.local".into(),
            dns_search: Vec::new(),
            dns_server: None,
            ntp_server: None,
            guests: (0..2).map(guest).collect(),
            others: vec![guest(7)],
            upstream: Vec::new(),
            publish: Vec::new(),
            dial: None,
            drop_to: None,
        }
    }

    /// How many bytes wait at the socket for router solicitations.
    pub fn waiting_solicitations(&self) -> usize {
        let table = self.cluster.run(|| std::fs::read_to_string("/proc/thread-self/net/raw6"));
        let table = table.unwrap();
        let socket = table.lines().nth(1).expect("the responder's socket");
        let queues = socket.split_whitespace().nth(4).unwrap();
        usize::from_str_radix(queues.split(':').nth(1).unwrap(), 16).unwrap()
    }

    /// Connects from outside.
    pub fn connect(&self, address: SocketAddr) -> TcpStream {
        self.outside.run(|| {
            let stream = TcpStream::connect_timeout(&address, LIMIT).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream
        })
    }
}

/// A specification, and the descriptors that go with it.
pub struct Draft {
    spec: Spec,
    inherited: Vec<OwnedFd>,
}

impl Draft {
    pub fn inherit(&mut self, descriptor: impl Into<OwnedFd>) -> RawFd {
        let descriptor = descriptor.into();
        let number = descriptor.as_raw_fd();
        self.inherited.push(descriptor);
        number
    }

    pub fn inherit_upstream(&mut self, socket: UdpSocket) {
        let number = self.inherit(socket);
        self.spec.upstream.push(number);
    }
}

impl Deref for Draft {
    type Target = Spec;

    fn deref(&self) -> &Spec {
        &self.spec
    }
}

impl DerefMut for Draft {
    fn deref_mut(&mut self) -> &mut Spec {
        &mut self.spec
    }
}

/// A responder that is ready.
pub struct Running {
    child: Child,
    lifeline: Option<UnixStream>,
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Lets it sleep until what is returned is dropped.
    pub fn stop(&self) -> impl Drop {
        struct Asleep(Pid);
        impl Drop for Asleep {
            fn drop(&mut self) {
                kill(self.0, Signal::SIGCONT).unwrap();
            }
        }
        let pid = Pid::from_raw(self.pid().try_into().unwrap());
        kill(pid, Signal::SIGSTOP).unwrap();
        let end = Instant::now() + LIMIT;
        while self.status("State:")[0] != "T" {
            assert!(Instant::now() < end, "it does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
        Asleep(pid)
    }

    /// The words of a field of `/proc/PID/status`.
    pub fn status(&self, field: &str) -> Vec<String> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.split_whitespace().map(str::to_owned).collect()
    }

    /// Closes the life line and waits for the process.
    pub fn ends_with_life_line(&mut self, limit: Duration) -> ExitStatus {
        drop(self.lifeline.take());
        let since = Instant::now();
        while since.elapsed() < limit {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("it lives on without its life line");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whom to become: nobody, unless a user namespace knows of root only.
pub fn unprivileged() -> Option<(u32, u32)> {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap();
    let count: u64 = map.split_whitespace().nth(2).unwrap().parse().unwrap();
    (count > NOBODY.into()).then_some((NOBODY, NOBODY))
}

/// Gives the guest the address that DHCP would.
pub fn configure_guest() {
    ip(&format!("addr add {GUEST}/16 dev eth0"));
}

/// Tells the gateway the guest's hardware address, in the cluster.
pub fn know_the_guests_link() {
    ip(&format!("neigh replace {GUEST} lladdr {MAC} dev gw nud permanent"));
}

/// All IPv4 packets that come to the guest, from their IPv4 headers on.
pub fn packets() -> OwnedFd {
    let (kind, flags) = (SockType::Datagram, SockFlag::SOCK_CLOEXEC);
    let all = SockProtocol::EthAll;
    let socket = socket(AddressFamily::Packet, kind, flags, Some(all)).unwrap();
    let limit = TimeVal::seconds(LIMIT.as_secs() as i64);
    setsockopt(&socket, sockopt::ReceiveTimeout, &limit).unwrap();
    socket
}

/// The port from which the packet that comes next begins a connection, if it does.
pub fn first_of_a_connection(packets: &OwnedFd) -> Option<u16> {
    let mut packet = [0; 1500];
    let length = recv(packets.as_raw_fd(), &mut packet, MsgFlags::empty()).expect("a packet");
    let (tcp, syn) = (6, 0x02);
    let plain = length >= 40 && packet[0] == 0x45 && packet[9] == tcp && packet[33] & 0x3f == syn;
    plain.then(|| u16::from_be_bytes([packet[20], packet[21]]))
}

/// A listener on the loopback of the namespace it is called in.
pub fn on_one_host() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A listener whose `accept` does not wait for ever.
pub fn listen(address: SocketAddr) -> TcpListener {
    let listener = TcpListener::bind(address).unwrap();
    let limit = TimeVal::seconds(LIMIT.as_secs() as i64);
    setsockopt(&listener, sockopt::ReceiveTimeout, &limit).unwrap();
    listener
}

/// The socket by which the cluster's user asks for connections to guests.
pub struct Dial {
    dir: tempfile::TempDir,
}

impl Dial {
    /// Gives a responder that is about to start such a socket.
    pub fn of(draft: &mut Draft) -> Self {
        let dial = Self { dir: tempfile::tempdir().unwrap() };
        let listener = draft.inherit(UnixListener::bind(dial.path()).unwrap());
        draft.dial = Some(listener);
        dial
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("dial-nat")
    }

    /// What this request begins.
    pub fn ask(&self, request: &str) -> UnixStream {
        let mut caller = UnixStream::connect(self.path()).unwrap();
        caller.set_read_timeout(Some(LIMIT)).unwrap();
        caller.write_all(request.as_bytes()).unwrap();
        caller
    }
}
