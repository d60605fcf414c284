//! How fast guests are answered, against a plain UDP echo in the same namespaces, and
//! against dnsmasq where it is installed; what the process costs at rest.
//!
//! `cargo bench --bench responder`, as root or under `unshare -rn`.
#![expect(clippy::print_stdout, reason = "a bench prints its table")]
#![expect(clippy::print_stderr, reason = "it says aloud that it cannot run")]

#[path = "../tests/responder/world/mod.rs"]
#[expect(dead_code, unused_imports, reason = "the tests use more of it")]
mod world;

use std::net::UdpSocket;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dhcproto::Encodable;
use dhcproto::v4::{DhcpOption, MessageType};
use hickory_proto::rr::RecordType;
use world::{GATEWAY, GUEST, World, client, dhcp};

/// Requests of each kind, one after the other.
const ROUNDS: u32 = 20_000;
/// How long the process is watched doing nothing.
const REST: Duration = Duration::from_secs(3);
const ECHO: u16 = 7;

fn main() {
    let Some(world) = World::new() else { return };
    world.guest.run(world::configure_guest);
    let floor = echo(&world);
    println!("{:<24} {:>9} {:>7}", "one at a time", "per s", "ratio");
    let line = |what: &str, rate: f64| println!("{what:<24} {rate:>9.0} {:>7.2}", rate / floor);
    line("UDP echo (floor)", floor);
    {
        let running = world.start(|_| {});
        line("DHCP offer", offers(&world));
        line("DNS answer", answers(&world));
        line("DHCP exchange", exchanges(&world));
        let before = switches(running.pid());
        std::thread::sleep(REST);
        let woken = switches(running.pid()) - before;
        println!("at rest: {woken} wake-ups in {REST:?}, {} KiB PSS", pss(running.pid()));
    }
    match dnsmasq(&world) {
        Some(mut child) => {
            line("DHCP offer, dnsmasq", offers(&world));
            line("DHCP exchange, dnsmasq", exchanges(&world));
            child.kill().and_then(|()| child.wait()).expect("dnsmasq ends");
        }
        None => eprintln!("skipped: dnsmasq is not installed"),
    }
}

/// Whole exchanges: discover, offer, request, acknowledgement. (perfdhcp passes for a relay,
/// whom we do not answer: all our guests are on our own segment.)
fn exchanges(world: &World) -> f64 {
    world.guest.run(|| {
        let (client, discover) = (client(), dhcp(MessageType::Discover, &[]));
        let chosen = [DhcpOption::RequestedIpAddress(GUEST), DhcpOption::ServerIdentifier(GATEWAY)];
        let request = dhcp(MessageType::Request, &chosen);
        rate(|| {
            assert_eq!(client.exchange(&discover).expect("an offer").yiaddr(), GUEST);
            assert_eq!(client.exchange(&request).expect("an answer").yiaddr(), GUEST);
        })
    })
}

/// Rounds per second.
fn rate(mut round: impl FnMut()) -> f64 {
    round();
    let start = Instant::now();
    (0..ROUNDS).for_each(|_| round());
    f64::from(ROUNDS) / start.elapsed().as_secs_f64()
}

fn offers(world: &World) -> f64 {
    world.guest.run(|| {
        let (client, discover) = (client(), dhcp(MessageType::Discover, &[]));
        rate(|| {
            let offer = client.exchange(&discover).expect("an offer");
            assert_eq!(offer.yiaddr(), GUEST);
        })
    })
}

fn answers(world: &World) -> f64 {
    world.guest.run(|| rate(|| assert_eq!(world::ask("vm1", RecordType::A).answers().len(), 1)))
}

/// A packet of a DHCP message's size there and back, by a thread that does nothing else.
fn echo(world: &World) -> f64 {
    let server = world.cluster.run(|| UdpSocket::bind((GATEWAY, ECHO)).expect("an echo port"));
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, from)) = server.recv_from(&mut buffer) {
            if server.send_to(&buffer[..length], from).is_err() || length == 0 {
                return;
            }
        }
    });
    world.guest.run(|| {
        let socket = UdpSocket::bind((GUEST, 0)).expect("a client");
        socket.connect((GATEWAY, ECHO)).expect("an echo server");
        let packet = dhcp(MessageType::Discover, &[]).to_vec().expect("a packet");
        let mut buffer = [0; 1500];
        let rate = rate(|| {
            socket.send(&packet).expect("a round");
            socket.recv(&mut buffer).expect("a round");
        });
        socket.send(&[]).expect("the end");
        rate
    })
}

fn dnsmasq(world: &World) -> Option<Child> {
    let mut command = Command::new("dnsmasq");
    command.args(["--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--no-ping"]);
    command.args(["--interface=gw", "--bind-interfaces", "--dhcp-authoritative"]);
    command.args(["--leasefile-ro", "--quiet-dhcp", "--user=root", "--pid-file="]);
    command.args(["--dhcp-range=10.200.0.0,static,255.255.0.0"]);
    command.args([format!("--dhcp-host=52:54:00:00:00:00,{GUEST}")]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let child = world.cluster.run(|| command.spawn()).ok()?;
    // Its socket is bound before it serves; packets wait there.
    std::thread::sleep(Duration::from_millis(500));
    Some(child)
}

/// How often the process has gone to sleep.
fn switches(pid: u32) -> u64 {
    field(pid, "status", "voluntary_ctxt_switches:")
}

fn pss(pid: u32) -> u64 {
    field(pid, "smaps_rollup", "Pss:")
}

fn field(pid: u32, file: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/{file}")).expect("a process");
    let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("a field");
    line.split_whitespace().next().and_then(|word| word.parse().ok()).expect("a number")
}
