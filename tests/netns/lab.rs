//! Namespaces of a test's own, and guests that are a file descriptor each.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{setsockopt, sockopt};
use pavo::config::{Ethernet, Network};
use pavo::error::Result;
use pavo::host::journal::{Journal, Plan};
use pavo::host::{Host, netns, process, tap};
use pavo::model::address::Mac;
use pavo::model::owner::Owner;
use pavo::model::vm::Nic;
use pavo::network::{Fabric, Outside, Peer, Request, Switch, SwitchKind, VmNetworks};

/// How long something that must happen may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A network namespace standing for a host, with a journal.
pub struct Lab {
    pub host: Host,
    pub journal: Journal,
    pub dir: PathBuf,
    runtime: tokio::runtime::Runtime,
}

/// Runs `test` on a thread that has left for an empty network namespace. All it
/// makes dies with the thread.
///
/// Who is not root becomes it in a user namespace, in another process: a process of
/// several threads may not.
pub fn in_netns(test: impl FnOnce(&Lab) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        return again_as_root();
    }
    // Outside of the thread: there the folder is a mount point and cannot be removed.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("new namespaces");
        // It is inherited from whatever this machine does.
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").expect("a namespace of our own");
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("private mounts");
        if tap::open("probe").is_err() {
            return skip("/dev/net/tun is not open to us");
        }
        test(&Lab::new(&path));
    };
    std::thread::spawn(run).join().expect("the test failed in its namespace");
}

fn again_as_root() {
    let test = std::thread::current().name().expect("tests have names").to_owned();
    let unshare = ["--user", "--map-root-user", "--net", "--mount", "--kill-child"];
    if !Command::new("unshare").args(unshare).arg("true").status().is_ok_and(|s| s.success()) {
        return skip("needs root, or user namespaces");
    }
    let status = Command::new("unshare")
        .args(unshare)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &test, "--nocapture"])
        .status();
    assert!(status.unwrap().success(), "the test failed in its user namespace");
}

/// Says loudly that nothing was tested; where all must be tested it is a failure.
#[expect(clippy::print_stderr, reason = "a test that is skipped must be seen")]
pub fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "{why}");
    eprintln!("skipped: {why}");
}

impl Lab {
    pub fn new(dir: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let host = Host::new(dir.join("netns"));
        let journal = Journal::open(dir.join("journal")).unwrap();
        Self { host, journal, dir: dir.to_owned(), runtime }
    }

    pub fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    pub fn apply(&self, plan: &Plan) -> Result<()> {
        self.run(self.journal.apply(plan, &self.host))
    }

    pub fn undo(&self, owner: Owner) -> Result<()> {
        self.run(self.journal.undo(owner, &self.host))
    }

    pub fn sweep(&self) -> Vec<Owner> {
        self.run(self.journal.sweep(&self.host)).unwrap()
    }

    /// All that a job can leave behind.
    pub fn traces(&self) -> BTreeSet<String> {
        let mut traces = BTreeSet::new();
        for line in sh(None, "ip -o link show").lines() {
            traces.insert(format!("link {}", line.split([':', '@']).nth(1).unwrap().trim()));
        }
        for line in sh(None, "nft list tables").lines() {
            traces.insert(line.to_owned());
        }
        for dir in [self.host.netns_dir().to_owned(), self.dir.join("journal")] {
            for entry in std::fs::read_dir(dir).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.file_name().is_some_and(|name| name != "lock") {
                    traces.insert(format!("file {}", path.display()));
                }
            }
        }
        traces
    }

    /// The counters of a job's table, by name, in packets.
    pub fn counters(&self, netns: Option<&str>, family: &str, owner: Owner) -> Counters {
        let netns = netns.map(|name| self.host.netns(name));
        counters(netns.as_deref(), family, &format!("pavo_{owner}"))
    }

    /// A namespace that stands for the world, behind the link `link` of the host.
    pub fn world(&self, link: &str, ours: &str, theirs: &str) -> PathBuf {
        let path = self.host.netns("world");
        netns::create(&path).unwrap();
        let make = format!(
            "ip link add {link} type veth peer name eth0; ip link set eth0 netns {}
             ip addr add {ours} dev {link}; ip link set {link} up; ip link set lo up",
            path.display()
        );
        sh(None, &make);
        sh(Some(&path), &format!("ip addr add {theirs} dev eth0; ip link set eth0 up"));
        path
    }
}

/// The counters of a table, by name, in packets.
pub fn counters(netns: Option<&Path>, family: &str, table: &str) -> Counters {
    let list = format!("nft -j list counters table {family} {table}");
    let found: serde_json::Value = serde_json::from_str(&sh(netns, &list)).unwrap();
    let objects = found["nftables"].as_array().unwrap().iter();
    objects
        .filter_map(|object| object.get("counter"))
        .map(|counter| {
            (counter["name"].as_str().unwrap().into(), counter["packets"].as_u64().unwrap())
        })
        .collect()
}

pub type Counters = BTreeMap<String, u64>;

/// Those of `after` that grew, and by how much.
pub fn grown(before: &Counters, after: &Counters) -> Counters {
    let grown = after.iter().map(|(name, count)| (name.clone(), count - before[name]));
    grown.filter(|(_, count)| *count > 0).collect()
}

/// What `attempt` finds at last. Another test's child may hold copies of our
/// descriptors for the moment between its fork and its exec.
pub fn eventually<T>(attempt: impl Fn() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = attempt() {
            return found;
        }
        assert!(Instant::now() < deadline, "it does not come about");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What a shell script prints, in a namespace.
pub fn sh(netns: Option<&Path>, script: &str) -> String {
    let run = || {
        let path = std::env::var("PATH").unwrap_or_default();
        let sh = Command::new("sh")
            .args(["-ec", script])
            .env("PATH", format!("{path}:/usr/sbin:/sbin"))
            .output()
            .unwrap();
        assert!(sh.status.success(), "{script}: {}", String::from_utf8_lossy(&sh.stderr));
        String::from_utf8(sh.stdout).unwrap()
    };
    match netns {
        Some(path) => netns::with_netns(path, run).unwrap(),
        None => run(),
    }
}

/// What a program of an ordinary user does in a namespace. Nothing, said loudly, where there
/// is no other user than root: in a user namespace.
pub fn as_user<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> Option<T> {
    const USER: libc::uid_t = 4711;
    let on_a_thread_of_its_own = || {
        #[expect(unsafe_code)]
        // SAFETY: it takes numbers only. Without the C library it changes this thread alone.
        let answer = unsafe { libc::syscall(libc::SYS_setresuid, USER, USER, USER) };
        (answer == 0).then(work)
    };
    let done = netns::with_netns(netns, on_a_thread_of_its_own).unwrap();
    if done.is_none() {
        skip("needs a second user");
    }
    done
}

/// Sends datagrams of one length as one packet, which the kernel cuts at the last moment.
pub fn send_in_one(socket: &UdpSocket, parts: &[&[u8]], to: SocketAddrV4) -> std::io::Result<()> {
    assert!(parts.iter().all(|part| part.len() == parts[0].len()));
    setsockopt(socket, sockopt::UdpGsoSegment, &(parts[0].len() as i32)).unwrap();
    socket.send_to(&parts.concat(), to).map(drop)
}

/// A request for `vms` VMs on each of these networks.
pub fn request(job: u32, vms: u32, networks: &[(&str, Ethernet)]) -> Request {
    let named =
        |(name, config): &(&str, Ethernet)| ((*name).to_owned(), Network::Ethernet(config.clone()));
    let names: Vec<String> = networks.iter().map(|(name, _)| (*name).to_owned()).collect();
    let vm = |rank| VmNetworks {
        rank,
        nic_model: "virtio-net".into(),
        nic_queues: 1,
        networks: names.clone(),
    };
    Request {
        switch: Switch::Linux,
        owner: Owner::local(job),
        keeper: process::current(),
        tap_uid: 0,
        outside: Outside::Host,
        uplink_slot: job,
        networks: networks.iter().map(named).collect(),
        vms: (0..vms).map(vm).collect(),
        fabric: None,
    }
}

/// The request of host `this` of several, each with so many VMs, by rank. Host 0 is
/// 192.0.2.1; the keys are of the job.
pub fn across(request: Request, this: usize, vms: &[u32]) -> Request {
    let networks: Vec<String> = request.networks.iter().map(|(name, _)| name.clone()).collect();
    let vm = |rank| VmNetworks {
        rank,
        nic_model: "virtio-net".into(),
        nic_queues: 1,
        networks: networks.clone(),
    };
    let mut first = 0;
    let mut hosts = (0..).zip(vms).map(|(index, count)| {
        let ranks = first..first + count;
        first += count;
        Peer {
            node: format!("n{index}"),
            address: [192, 0, 2, index + 1].into(),
            switch: SwitchKind::Linux,
            vms: ranks.map(vm).collect(),
        }
    });
    let mut peers: Vec<Peer> = hosts.by_ref().collect();
    let own = peers.remove(this);
    let keys = (1..).map(|number| request.owner.job << 8 | number);
    let fabric = Fabric {
        keys: keys.take(networks.len()).collect(),
        address: own.address,
        link: "underlay".into(),
        mtu: 1500,
        peers,
    };
    Request { vms: own.vms, fabric: Some(fabric), ..request }
}

/// The other end of a TAP device: what a hostile guest can do, this can.
pub struct Guest {
    tap: File,
    pub mac: [u8; 6],
    pub ip: Ipv4Addr,
    pub gateway_mac: [u8; 6],
    pub gateway: Ipv4Addr,
}

pub const BROADCAST: [u8; 6] = [0xff; 6];

impl Guest {
    pub fn plug(nic: &Nic) -> Self {
        let ipv4 = nic.ipv4.as_ref();
        let Mac([a, b, c, ..]) = nic.mac;
        Self {
            tap: eventually(|| tap::open(&nic.tap).ok()),
            mac: nic.mac.0,
            ip: ipv4.map_or(Ipv4Addr::UNSPECIFIED, |ipv4| ipv4.address),
            gateway_mac: [a, b, c, 0xff, 0xff, 0xfe],
            gateway: ipv4.map_or(Ipv4Addr::UNSPECIFIED, |ipv4| ipv4.gateway),
        }
    }

    pub fn send(&self, frame: &[u8]) {
        (&self.tap).write_all(frame).unwrap();
    }

    /// The next frame that waits here, if one does.
    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 65536];
        match (&self.tap).read(&mut frame) {
            Ok(length) => Some(frame[..length].to_vec()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("reading frames: {error}"),
        }
    }

    /// Everything up to the first frame that is `wanted`, answering ARP like a guest.
    /// `again` is sent until then, now and then: a port is deaf until the kernel
    /// noticed that it is open.
    pub fn exchange(&self, again: &[u8], wanted: impl Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            self.send(again);
            let pause = Instant::now() + Duration::from_millis(100);
            while Instant::now() < pause {
                let Some(frame) = self.receive() else {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                };
                self.answer_arp(&frame);
                let found = wanted(&frame);
                seen.push(frame);
                if found {
                    return seen;
                }
            }
            assert!(Instant::now() < deadline, "the frame did not come; got {seen:02x?}");
        }
    }

    /// Everything that arrives here up to `marker`, which `sender` sends until then.
    pub fn until(&self, sender: &Self, marker: &[u8]) -> Vec<Vec<u8>> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            sender.send(marker);
            let pause = Instant::now() + Duration::from_millis(100);
            while Instant::now() < pause {
                match self.receive() {
                    Some(frame) if frame == marker => return seen,
                    Some(frame) => seen.push(frame),
                    None => std::thread::sleep(Duration::from_millis(1)),
                }
            }
            assert!(Instant::now() < deadline, "the marker did not come; got {seen:02x?}");
        }
    }

    fn answer_arp(&self, frame: &[u8]) {
        let asked = frame.len() >= 42
            && frame[12..14] == [8, 6]
            && frame[20..22] == [0, 1]
            && frame[38..42] == self.ip.octets();
        if asked {
            let (mac, ip) = (self.mac, self.ip);
            let asker: [u8; 6] = frame[22..28].try_into().unwrap();
            let address: [u8; 4] = frame[28..32].try_into().unwrap();
            self.send(&arp(2, mac, mac, ip, asker, address.into()));
        }
    }

    /// The gateway answers our echo request; what came before the answer.
    pub fn ping_gateway(&self) -> Vec<Vec<u8>> {
        let echo = [8, 0, 0xf7, 0xfd, 0, 1, 0, 1];
        let frame = self.to_gateway(self.gateway, 1, &echo);
        let gateway = self.gateway.octets();
        self.exchange(&frame, move |got| {
            got.len() >= 42 && got[26..30] == gateway && got[23] == 1 && got[34] == 0
        })
    }

    /// A packet of ours to an address, by the gateway.
    pub fn to_gateway(&self, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
        ethernet(self.gateway_mac, self.mac, 0x0800, &ipv4(self.ip, to, protocol, payload))
    }
}

/// Without padding: some kernels cut it off on the way.
pub fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

/// An ARP packet in a frame: from the Ethernet address `frame_mac`, saying that
/// `mac` has `ip`.
pub fn arp(
    operation: u16,
    frame_mac: [u8; 6],
    mac: [u8; 6],
    ip: Ipv4Addr,
    to: [u8; 6],
    about: Ipv4Addr,
) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4];
    let target = if operation == 1 { [0; 6] } else { to };
    let payload =
        [&head[..], &operation.to_be_bytes(), &mac, &ip.octets(), &target, &about.octets()];
    ethernet(to, frame_mac, 0x0806, &payload.concat())
}

pub fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut head = vec![0x45, 0, length[0], length[1], 0, 0, 0, 0, 64, protocol, 0, 0];
    head.extend(from.octets());
    head.extend(to.octets());
    let words = head.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    head[10..12].copy_from_slice(&sum.to_be_bytes());
    [head, payload.to_vec()].concat()
}

/// A UDP datagram without checksum.
pub fn udp(from: u16, to: u16, data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + data.len()).unwrap();
    let head = [from.to_be_bytes(), to.to_be_bytes(), length.to_be_bytes(), [0, 0]].concat();
    [head, data.to_vec()].concat()
}
