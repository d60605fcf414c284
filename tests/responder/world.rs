//! Three namespaces, a responder in one of them, and what asks it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use dhcproto::v4::{self, DhcpOption, MessageType, OptionCode};
use dhcproto::{Decodable, Encodable};
use hickory_proto::op::{Message, MessageType as Direction, Query};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::Pid;
use pavo::host::spawn;
use pavo::model::prefix::Prefix64;
use pavo::network::responder::{Answer, Guest, Ipv6, Spec};

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

/// A DHCP client's socket, in the guest.
pub struct DhcpClient(UdpSocket);

pub fn client() -> DhcpClient {
    let socket = UdpSocket::bind("0.0.0.0:68").unwrap();
    setsockopt(&socket, sockopt::BindToDevice, &"eth0".into()).unwrap();
    socket.set_broadcast(true).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    DhcpClient(socket)
}

impl DhcpClient {
    pub fn send(&self, message: &v4::Message) {
        let to = if message.ciaddr().is_unspecified() { Ipv4Addr::BROADCAST } else { GATEWAY };
        self.0.send_to(&message.to_vec().unwrap(), (to, 67)).unwrap();
    }

    /// Sends a message, again where it got lost (a link that has just come up drops), and
    /// returns the answer to it, or to an earlier one.
    pub fn exchange(&self, message: &v4::Message) -> std::io::Result<v4::Message> {
        let mut buffer = [0; 1500];
        let end = Instant::now() + LIMIT;
        loop {
            self.send(message);
            match self.0.recv(&mut buffer) {
                Ok(length) => {
                    let mut decoder = v4::Decoder::new(&buffer[..length]);
                    return Ok(v4::Message::decode(&mut decoder).unwrap());
                }
                Err(error) if Instant::now() > end => return Err(error),
                Err(_) => {}
            }
        }
    }
}

/// A message of the first guest, which asks for everything.
pub fn dhcp(kind: MessageType, options: &[DhcpOption]) -> v4::Message {
    let none = Ipv4Addr::UNSPECIFIED;
    let mac: pavo::model::address::Mac = MAC.parse().unwrap();
    let mut message = v4::Message::new(none, none, none, none, &mac.0);
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    for option in options {
        message.opts_mut().insert(option.clone());
    }
    message
}

/// Gives the gateway what it has of IPv6 where the network does.
pub fn with_ipv6(world: &World) -> Ipv6 {
    let prefix: Prefix64 = "fd12:3456:789a:1::/64".parse().unwrap();
    world.cluster.run(|| {
        std::fs::write("/proc/sys/net/ipv6/conf/gw/accept_dad", "0").unwrap();
        ip(&format!("addr add {}/64 dev gw nodad", prefix.gateway()));
        let text = output("link show dev gw");
        let mac = text.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
        Ipv6 { prefix, gateway_mac: mac.parse().unwrap() }
    })
}

fn output(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// The guest's routes, once there is one to this network. It asks for a router when its link
/// comes up.
pub fn until_route(network: &str) -> String {
    let end = Instant::now() + LIMIT;
    loop {
        ip("link set eth0 down");
        ip("link set eth0 up");
        let asked = Instant::now();
        while asked.elapsed() < Duration::from_secs(5) {
            let routes = output("-6 route show dev eth0");
            if routes.contains(network) {
                return routes;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(Instant::now() < end, "no advertisement");
    }
}

/// The addresses that the guest has, but for its link's.
pub fn addresses6() -> String {
    output("-6 -o addr show dev eth0 scope global")
}

/// Sends echo requests to all on the link, in the guest, until one is answered.
pub fn ping_all_nodes() {
    const ALL: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let (kind, protocol) = (SockType::Raw, Some(SockProtocol::IcmpV6));
    let socket = socket(AddressFamily::Inet6, kind, SockFlag::SOCK_CLOEXEC, protocol).unwrap();
    let socket = UdpSocket::from(socket);
    socket.set_multicast_loop_v6(false).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let to = SocketAddrV6::new(ALL, 0, 0, nix::net::if_::if_nametoindex("eth0").unwrap());
    let end = Instant::now() + LIMIT;
    let mut buffer = [0; 1500];
    loop {
        // Its address may still be looked at.
        let _ = socket.send_to(&[128, 0, 0, 0, 0, 7, 0, 1], to);
        if socket.recv(&mut buffer).is_ok() && buffer[0] == 129 {
            return;
        }
        assert!(Instant::now() < end, "no answer");
    }
}

/// What a server says to a first message from this port.
pub fn solicit(port: u16) -> Vec<u8> {
    const SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
    let identifier = [0, 1, 0, 7, 0, 2, 0, 0, 0, 9, 9];
    let association = [0, 3, 0, 12, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    let message = [&[1, 7, 7, 7][..], &identifier, &association].concat();
    let index = nix::net::if_::if_nametoindex("eth0").unwrap();
    let bind = |port| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap();
    let (client, asking) = (bind(546), bind(port));
    client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut buffer = [0; 1500];
    let end = Instant::now() + LIMIT;
    loop {
        // Its address may still be looked at.
        let _ = asking.send_to(&message, SocketAddrV6::new(SERVERS, 547, 0, index));
        match client.recv(&mut buffer) {
            Ok(length) => return buffer[..length].to_vec(),
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
    }
}

pub fn option(message: &v4::Message, code: OptionCode) -> DhcpOption {
    message.opts().get(code).unwrap_or_else(|| panic!("{code:?} in {message}")).clone()
}

/// Gives the guest the address that DHCP would.
pub fn configure_guest() {
    ip(&format!("addr add {GUEST}/16 dev eth0"));
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new();
    message.set_id(0x1234).set_recursion_desired(true);
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

/// Asks the gateway, in the guest.
pub fn ask(name: &str, kind: RecordType) -> Message {
    let socket = UdpSocket::bind((GUEST, 0)).unwrap();
    socket.connect((GATEWAY, 53)).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket.send(&query(name, kind).to_vec().unwrap()).unwrap();
    let mut buffer = [0; 4096];
    let length = socket.recv(&mut buffer).unwrap();
    let answer = Message::from_vec(&buffer[..length]).unwrap();
    assert_eq!(answer.id(), 0x1234);
    answer
}

pub fn ask_by_stream(name: &str, kind: RecordType) -> Message {
    try_ask_by_stream(name, kind).unwrap()
}

/// Fails if the connection is closed without an answer.
pub fn try_ask_by_stream(name: &str, kind: RecordType) -> std::io::Result<Message> {
    let mut stream = TcpStream::connect((GATEWAY, 53))?;
    stream.set_read_timeout(Some(LIMIT))?;
    let query = query(name, kind).to_vec().unwrap();
    stream.write_all(&u16::try_from(query.len()).unwrap().to_be_bytes())?;
    stream.write_all(&query)?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut answer)?;
    Ok(Message::from_vec(&answer).unwrap())
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

/// Ends its server when dropped.
pub struct NameServer {
    socket: UdpSocket,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for NameServer {
    fn drop(&mut self) {
        // An empty packet to itself: only the namespace's own sockets reach it.
        let _ = self.socket.send_to(&[], self.socket.local_addr().unwrap());
        let _ = self.thread.take().unwrap().join();
    }
}

/// A name server on this namespace's loopback, and a socket that leads to it.
pub fn name_server() -> (NameServer, UdpSocket) {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(server.local_addr().unwrap()).unwrap();
    let socket = server.try_clone().unwrap();
    let thread = std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).unwrap();
            if length == 0 {
                return;
            }
            socket.send_to(&answer(&buffer[..length]), from).unwrap();
        }
    });
    (NameServer { socket: server, thread: Some(thread) }, client)
}

/// A socket that leads to a port where nobody listens.
pub fn dead_name_server() -> UdpSocket {
    let gone = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(gone).unwrap();
    client
}

/// One address for every name, sixty for those that start with `many`.
fn answer(packet: &[u8]) -> Vec<u8> {
    let mut message = Message::from_vec(packet).unwrap();
    message.set_message_type(Direction::Response);
    let name = message.queries()[0].name().clone();
    let count = if name.iter().next() == Some(b"many") { 60 } else { 1 };
    for _ in 0..count {
        let data = RData::A(A::new(192, 0, 2, 80));
        message.add_answer(Record::from_rdata(name.clone(), 60, data));
    }
    message.to_vec().unwrap()
}
