//! What a guest asks its gateway.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use dhcproto::v4::{self, DhcpOption, MessageType, OptionCode};
use dhcproto::{Decodable, Encodable};
use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RecordType};
use nix::sys::socket::{setsockopt, sockopt};

use super::{GATEWAY, GUEST, LIMIT, MAC};

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

pub fn option(message: &v4::Message, code: OptionCode) -> DhcpOption {
    message.opts().get(code).unwrap_or_else(|| panic!("{code:?} in {message}")).clone()
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
