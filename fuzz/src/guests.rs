//! What guests and their images say.

use std::net::Ipv4Addr;
use std::sync::LazyLock;

use pavo::image::header::{self, Format, MAX_SIZE};
use pavo::network::responder::{Spec, advertise, dhcp, dhcp6, dns};
use pavo::vm::agent;
use pavo::vm::agent::pcocc::exchange::{self, Exchange, Listener};
use pavo::vm::agent::pcocc::wire::{self, Lines, Message};
use pavo::vm::guest_agent::Agent;
use pavo_agent::copy::{self, Entry, Record};
use pavo_agent::{Credit, Decoder, Event, Exit, Failure, Frame, Hello, Kind, Opening, Started};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use super::people::folder;

#[path = "../../tests/shared/disks.rs"]
mod disks;

/// The header of a disk image; the first byte adds as many 64 KiB of zeros behind it.
pub fn image(data: &[u8]) -> bool {
    let Some((zeros, head)) = data.split_first() else { return false };
    let folder = folder();
    let path = folder.path().join("disk");
    std::fs::write(&path, head).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(head.len() as u64 + (u64::from(*zeros) << 16)).unwrap();
    if let Ok(header) = header::inspect(&path) {
        assert!((1..=MAX_SIZE).contains(&header.virtual_size), "{header:?}");
        assert_eq!(header.backing, None);
    }
    let Ok(header) = header::inspect_layer(&path) else { return false };
    let name = header.backing.map(|backing| backing.file);
    assert!(name.is_none_or(|name| name.len() <= 1023));
    header.format != Format::Raw
}

pub fn image_seeds() -> Vec<Vec<u8>> {
    // What counts is in the first KiB; zeros are counted.
    let seed = |image: Vec<u8>| {
        let mut seed = vec![(image.len() >> 16) as u8];
        seed.extend(&image[..image.len().min(1024)]);
        seed
    };
    let name: &[(usize, &[u8])] =
        &[(8, &120_u64.to_be_bytes()), (16, &4_u32.to_be_bytes()), (120, b"base")];
    let text = b"# Disk DescriptorFile\n".to_vec();
    let layer = disks::patch(disks::qcow2(), name);
    let vmdk = disks::vmdk(disks::VMDK_TEXT);
    let images = [disks::qcow2(), layer, disks::qed(), disks::vdi(), vmdk, disks::vhd(3), text];
    images.map(seed).into()
}

static SPEC: LazyLock<Spec> = LazyLock::new(|| {
    let guest = |rank: u32| {
        serde_json::json!({
            "rank": rank,
            "name": format!("vm{rank}"),
            "mac": format!("52:54:00:00:00:0{rank}"),
            "address": format!("10.200.0.{}", 1 + rank),
            "address6": format!("fd12:3456:789a:1::{}", 1 + rank),
            "default_route": true,
        })
    };
    serde_json::from_value(serde_json::json!({
        "network": "nat", "interface": "gw", "gateway": "10.200.255.254",
        "ipv6": {"prefix": "fd12:3456:789a:1::/64", "gateway_mac": "52:54:00:ff:ff:fe"},
        "subnet": "10.200.0.0/16", "mtu": 1450, "domain": "pavo.internal", "dns_search": ["a.b"],
        "ntp_server": "10.200.0.9", "guests": [guest(0), guest(1)], "others": [guest(7)],
        "upstream": [], "publish": [], "dial": null,
    }))
    .unwrap()
});

/// A packet to our DHCP server: what it answers is of that transaction, to a guest of ours.
pub fn dhcp(data: &[u8]) -> bool {
    static SERVER: LazyLock<dhcp::Server> = LazyLock::new(|| dhcp::Server::new(&SPEC).unwrap());
    let Ok(reply) = SERVER.answer(data) else { return false };
    let known = SPEC.guests.iter().any(|guest| guest.address == reply.to);
    assert!(known || reply.to == Ipv4Addr::BROADCAST, "{reply:?}");
    assert!((300..=1500).contains(&reply.bytes.len()), "{reply:?}");
    assert_eq!(reply.bytes[0], 2, "an answer");
    assert_eq!(reply.bytes[4..8], data[4..8], "of the same transaction");
    assert_eq!(reply.bytes[28..34], data[28..34], "to the same client");
    true
}

pub fn dhcp_seeds() -> Vec<Vec<u8>> {
    let packet = |mac: u8, options: &[u8]| {
        let mut packet = vec![0; 236];
        packet[..4].copy_from_slice(&[1, 1, 6, 0]);
        packet[4..8].copy_from_slice(b"xid!");
        packet[28..34].copy_from_slice(&[0x52, 0x54, 0, 0, 0, mac]);
        packet.extend([99, 130, 83, 99]);
        packet.extend(options);
        packet.push(255);
        packet
    };
    let asked: &[u8] = &[55, 7, 1, 3, 6, 15, 26, 42, 119];
    vec![
        packet(0, &[&[53, 1, 1], asked].concat()),
        packet(1, &[&[53, 1, 3, 50, 4, 10, 200, 0, 2, 54, 4, 10, 200, 255, 254], asked].concat()),
        packet(1, &[53, 1, 3, 57, 2, 2, 64, 61, 7, 1, 0x52, 0x54, 0, 0, 0, 1, 80, 0]),
        packet(0, &[53, 1, 8]),
        packet(9, &[53, 1, 1]),
    ]
}

/// A packet to our DHCPv6 server, or a router solicitation; its first byte says of which
/// guest. What is answered is of that transaction, and gives that guest's address or none.
pub fn dhcp6(data: &[u8]) -> bool {
    static SERVER: LazyLock<dhcp6::Server> = LazyLock::new(|| dhcp6::Server::new(&SPEC).unwrap());
    let Some((rank, packet)) = data.split_first() else { return false };
    if advertise::is_solicitation(packet) {
        return true;
    }
    let port = dhcp6::port_of((*rank).into()).unwrap();
    let Ok(reply) = SERVER.answer(packet, port) else { return false };
    assert!(*rank < 2, "a guest on this host");
    assert!(reply.len() <= 1232, "{reply:?}");
    assert!([2, 7].contains(&reply[0]), "an answer");
    assert_eq!(reply[1..4], packet[1..4], "of the same transaction");
    true
}

pub fn dhcp6_seeds() -> Vec<Vec<u8>> {
    let packet = |rank: u8, kind: u8, options: &[&[u8]]| {
        [&[rank, kind][..], b"xid", &[0, 1, 0, 7, 0, 2, 0, 0, 0, 9, 9], &options.concat()].concat()
    };
    let server = [0, 2, 0, 10, 0, 3, 0, 1, 0x52, 0x54, 0, 0xff, 0xff, 0xfe];
    let empty = [0, 3, 0, 12, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut full = [&[0, 3, 0, 40, 0, 0, 0, 1][..], &[0; 8], &[0, 5, 0, 24]].concat();
    full.extend("fd12:3456:789a:1::2".parse::<std::net::Ipv6Addr>().unwrap().octets());
    full.extend([0; 8]);
    vec![
        packet(0, 1, &[&empty, &[0, 14, 0, 0], &[0, 6, 0, 4, 0, 23, 0, 24]]),
        packet(1, 3, &[&server, &full]),
        packet(0, 4, &[&full]),
        packet(0, 5, &[&server, &full, &empty]),
        packet(1, 11, &[]),
        packet(9, 1, &[&empty]),
        vec![0, 133, 0, 9, 9, 0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7],
    ]
}

/// A packet to our DNS server: what it answers has the question's number and is an answer.
pub fn dns(data: &[u8]) -> bool {
    static ZONE: LazyLock<dns::Zone> = LazyLock::new(|| dns::Zone::new(&SPEC).unwrap());
    match ZONE.answer(data) {
        dns::Verdict::Reply(bytes) => {
            assert_eq!(bytes[..2], data[..2], "its number");
            assert_eq!(bytes[2] & 0x80, 0x80, "an answer");
            true
        }
        dns::Verdict::Forward(message) => {
            let refused = dns::refusal(&message, message.response_code());
            assert_eq!(refused[..2], data[..2], "its number");
            true
        }
        dns::Verdict::Ignore => false,
    }
}

pub fn dns_seeds() -> Vec<Vec<u8>> {
    let query = |labels: &[&str], kind: u8| {
        let mut query = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0".to_vec();
        for label in labels {
            query.push(label.len() as u8);
            query.extend(label.as_bytes());
        }
        query.extend([0, 0, kind, 0, 1]);
        query
    };
    let mut extended = query(&["vm7", "pavo", "internal"], 28);
    extended[11] = 1;
    extended.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
    vec![
        query(&["vm1", "pavo", "internal"], 1),
        query(&["1", "0", "200", "10", "in-addr", "arpa"], 12),
        query(&["vm1"], 28),
        query(
            &"2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.1.0.0.0.a.9.8.7.6.5.4.3.2.1.d.f.ip6.arpa"
                .split('.')
                .collect::<Vec<_>>(),
            12,
        ),
        query(&["nobody", "pavo", "internal"], 255),
        query(&["elsewhere"], 1),
        query(&["pavo", "internal"], 6),
        extended,
    ]
}

/// An agent in a guest, which says what it likes.
pub fn qemu_agent(data: &[u8]) -> bool {
    super::block_on(async {
        let Ok(mut agent) = Agent::over(super::said(data).await, 1).await else { return false };
        let frozen = agent.freeze().await;
        agent.thaw_after(&frozen).await.is_ok() && frozen.is_ok()
    })
}

pub fn qemu_agent_seeds() -> Vec<Vec<u8>> {
    vec![
        b"\xff{\"return\": 1}\n{\"return\": 2}\n{\"return\": 2}\n".to_vec(),
        b"old\xff{\"return\": 1}\n{\"return\": 0}\n{\"return\": {}}\n".to_vec(),
        b"\xff{\"return\": 9}\n\xff{\"return\": 1}\n{\"error\": {\"desc\": \"no\"}}\n".to_vec(),
        b"\xff{\"return\": 1}\n{\"return\": -1}\n{\"return\": {}, \"error\": null}\n".to_vec(),
    ]
}

/// Our own agent in a guest, which has answered as it should and been asked for one thing: to
/// the client comes nothing but frames of its stream, within its credit, and a last one.
pub fn line(data: &[u8]) -> bool {
    super::block_on(async {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (agent, line, _) = agent::Agent::new("vm0".into(), "/nonexistent".into());
        let (_port, opened) = watch::channel(agent::Port { changes: 1, open: true });
        tokio::spawn(line.serve(ours, opened));
        let mut mark = [0; 32];
        guest.read_exact(&mut mark).await.unwrap();
        let hello = Hello { version: 1, ..Hello::default() }.encode();
        let pong = |token: &[u8]| Frame::new(0, Kind::Pong, [token, &hello].concat()).bytes();
        guest.write_all(&[&mark[..], &pong(&[0; 8])].concat()).await.unwrap();
        let connect = async {
            loop {
                match agent.connect().await {
                    Ok(relay) => break relay,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        };
        // Whether it is still there.
        let mut ping = Frame::new(0, Kind::Ping, [0; 8]).bytes();
        let answer = async {
            guest.read_exact(&mut ping).await.unwrap();
            let mut decoder = Decoder::in_step();
            decoder.push(&ping);
            let Ok(Some(Event::Frame(ping))) = decoder.next_event() else { panic!("no frame") };
            guest.write_all(&pong(&ping.payload)).await.unwrap();
        };
        let (relay, ()) = tokio::join!(connect, answer);
        let (mut client, mut theirs) = tokio::io::duplex(1 << 20);
        tokio::spawn(async move { relay.carry(&mut theirs).await });
        let open = Frame::new(1, Kind::Open, Opening::List.encode()).bytes();
        client.write_all(&open).await.unwrap();
        let mut asked = vec![0; open.len()];
        guest.read_exact(&mut asked).await.unwrap();
        assert_eq!(asked, open);
        let said = data.to_vec();
        tokio::spawn(async move {
            // One that is not in step is not listened to.
            let _ = guest.write_all(&said).await;
            let _ = guest.shutdown().await;
            let _ = tokio::io::copy(&mut guest, &mut tokio::io::sink()).await;
        });
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).await.unwrap();
        let mut decoder = Decoder::in_step();
        decoder.push(&heard);
        let (mut bytes, mut last) = (0, None);
        while let Some(event) = decoder.next_event().unwrap() {
            let Event::Frame(frame) = event else { panic!("{event:?}") };
            assert_eq!((frame.stream, last.is_some_and(Kind::ends)), (1, false));
            bytes += if frame.kind.is_output() { frame.payload.len() } else { 0 };
            last = Some(frame.kind);
        }
        assert!(bytes <= pavo_agent::WINDOW as usize);
        assert!(last.is_some_and(Kind::ends), "{last:?}");
        last == Some(Kind::Exit)
    })
}

pub fn line_seeds() -> Vec<Vec<u8>> {
    let frame = |kind, payload: Vec<u8>| Frame::new(1, kind, payload).bytes();
    let started = || frame(Kind::Started, Started { id: 1, pid: 2 }.encode());
    let item = frame(Kind::Item, pavo_agent::Command::default().encode());
    let exit = || frame(Kind::Exit, Exit::Code(0).encode());
    let failure = Failure { why: "no".into(), code: 127 };
    vec![
        [started(), frame(Kind::Data, vec![b'x'; 99]), frame(Kind::Errors, vec![0]), exit()]
            .concat(),
        [started(), frame(Kind::Data, vec![0; 60_000]).repeat(5), exit()].concat(),
        [item.repeat(3), exit()].concat(),
        [started(), frame(Kind::Credit, Credit(9).encode().into()), exit()].concat(),
        frame(Kind::Fail, failure.encode()),
        pavo_agent::mark(&[0; 16]),
    ]
}

/// What is asked of pcocc's agent, after an attachment.
const ASKED: [&str; 4] = ["hello", "execve", "listexec", "stdin"];

/// pcocc's agent in a guest, to which somebody is attached and which has been asked: lines in
/// pieces of the length that the first byte says, or, of 128 and more, what is in one line. To who is attached comes one end at most, and nothing
/// after it.
pub fn pcocc(data: &[u8]) -> bool {
    let Some((length, data)) = data.split_first() else { return false };
    let mut exchange = Exchange::default();
    exchange.begin_anew("", 0);
    let (to, mut events) = mpsc::unbounded_channel();
    let listener = Listener { to, held: exchange.held() };
    exchange.attach(7, listener);
    let asked = ASKED.map(|name| {
        let (tell, told) = oneshot::channel();
        exchange.ask(name, tell);
        told
    });
    let mut lines = Lines::default();
    let mut hear = |piece: &[u8]| {
        lines.push(piece);
        while let Some(bytes) = lines.next_line()? {
            exchange.hear(Message::decode(&bytes)?)?;
        }
        Ok::<_, pavo_agent::Malformed>(())
    };
    let all = match length {
        0..128 => data.chunks(usize::from(*length).max(1)).try_for_each(&mut hear),
        _ => Message::decode(data).and_then(|message| exchange.hear(message)),
    };
    let mut ended = false;
    while let Ok(event) = events.try_recv() {
        assert!(!ended, "{event:?}");
        match event {
            exchange::Event::Attached => {}
            exchange::Event::Piece(piece) => {
                assert!((1..=64 << 10).contains(&piece.bytes.len()) && [0, 7].contains(&piece.id));
            }
            _ => ended = true,
        }
    }
    let answered = asked.into_iter().any(|mut told| told.try_recv().is_ok());
    all.is_ok() && (ended || answered)
}

pub fn pcocc_seeds() -> Vec<Vec<u8>> {
    use wire::{Fields, Kind, line};
    let empty = Fields::default;
    let piece = |kind| empty().number(1, kind).bytes(3, "text").number(4, 7);
    let streamed = |of, data| line(Kind::StreamReply, "attach", 1, of, data);
    let reply = |name, tag, of, data| line(Kind::Reply, name, tag, of, data);
    let status = |code| reply("attach", 1, "ExitStatus", empty().signed(1, code));
    let hello = || reply("hello", 2, "HelloResult", empty().number(1, 9).number(2, 1));
    let list = empty().items(1, &[empty().number(1, 300).into_bytes(), Vec::new()]);
    let lines = [
        [streamed("AttachResult", empty()), streamed("IOMessage", piece(1)), status(0)].concat(),
        [streamed("IOMessage", piece(2)), status(-1)].concat(),
        [b"\n".to_vec(), hello(), reply("execve", 3, "ExecResult", empty())].concat(),
        reply("listexec", 4, "ListExecResult", list),
        reply("stdin", 5, "GenericError", empty().number(1, 5).bytes(2, "no")),
        reply("attach", 1, "DetachResult", empty()),
    ];
    let mut inner = Lines::default();
    lines.iter().for_each(|line| inner.push(line));
    let mut seeds: Vec<_> = lines.iter().map(|line| [&[50], &line[..]].concat()).collect();
    while let Ok(Some(message)) = inner.next_line() {
        seeds.push([&[200], &message[..]].concat());
    }
    seeds
}

/// A guest that sends files, of which two were asked for: it writes them and nothing else.
pub fn copy(data: &[u8]) -> bool {
    let folder = folder();
    let (to, outside) = (folder.path().join("to"), folder.path().join("outside"));
    std::fs::create_dir(&to).unwrap();
    std::fs::write(&outside, "precious").unwrap();
    std::fs::write(to.join("mine"), "mine").unwrap();
    let names = Some(vec![b"a".to_vec(), b"d".to_vec()]);
    let place = copy::Place { path: to.clone(), into: false, names };
    let mut said = Vec::new();
    let received = copy::receive(data, &mut said, &place, &mut drop);
    let list = |path: &std::path::Path| {
        let names = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(list(folder.path()), ["outside", "to"]);
    assert_eq!(std::fs::read_to_string(&outside).unwrap(), "precious");
    assert_eq!(std::fs::read_to_string(to.join("mine")).unwrap(), "mine");
    let known = ["a", "d", "mine", ".a.pavo-part", ".d.pavo-part"];
    assert!(list(&to).iter().all(|name| known.contains(&&**name)), "{:?}", list(&to));
    if received.is_ok() {
        assert!(!list(&to).iter().any(|name| name.ends_with("part")), "{:?}", list(&to));
    }
    received.is_ok()
}

pub fn copy_seeds() -> Vec<Vec<u8>> {
    let entry = |source, name: &str, size, asks| {
        let (name, target) = (name.into(), b"../outside".into());
        Entry { source, name, mode: 0o640, time: (1, 2), size, target, asks }
    };
    let said = |records: &[Record<'_>]| {
        let mut bytes = Vec::new();
        records.iter().for_each(|record| record.write(&mut bytes).unwrap());
        bytes
    };
    let file = |source, name: &str| {
        let parts = [Record::Content(b"text"), Record::Hole(5), Record::End];
        [&[Record::File(entry(source, name, 9, false))], &parts[..]].concat()
    };
    let (folder, leave) = (|name: &str| Record::Folder(entry(1, name, 0, false)), Record::Leave);
    let link = |source, name: &str| Record::Link(entry(source, name, 0, false));
    let tree = [folder("d"), folder("e"), link(1, "l"), leave.clone()];
    let large = [Record::File(entry(0, "a", 3, true)), Record::From(0), Record::Content(b"abc")];
    vec![
        said(&[&[Record::Total(9)], &*file(0, "a"), &[Record::Finish]].concat()),
        said(&[&tree[..], &*file(1, "x"), &[leave, Record::Finish]].concat()),
        said(&[&large[..], &[Record::End, Record::Trouble("no".into()), Record::Finish]].concat()),
        said(&[link(0, "a"), folder("d"), link(1, "l"), folder("l")]),
        said(&large),
    ]
}
