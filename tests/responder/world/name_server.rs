//! A name server outside.

use std::net::UdpSocket;

use hickory_proto::op::{Message, MessageType};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record};

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
    message.set_message_type(MessageType::Response);
    let name = message.queries()[0].name().clone();
    let count = if name.iter().next() == Some(b"many") { 60 } else { 1 };
    for _ in 0..count {
        let data = RData::A(A::new(192, 0, 2, 80));
        message.add_answer(Record::from_rdata(name.clone(), 60, data));
    }
    message.to_vec().unwrap()
}
