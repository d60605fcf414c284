//! One socket for all addresses, and one thread that answers when it is time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg, setsockopt,
    sockopt,
};

use crate::ipmi::{Said, Sessions};
use crate::{Bmc, index, lock};

/// How long the thread may take to see that it is over.
const LOOK: Duration = Duration::from_millis(50);
const QUEUE: usize = 4 << 20;

#[derive(Debug)]
pub struct Server {
    port: u16,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // What it panicked with was printed.
            let _ = thread.join();
        }
    }
}

/// A packet that leaves at its time.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Leaving {
    at: Instant,
    order: u64,
    from: Ipv4Addr,
    to: SocketAddrV4,
    bytes: Vec<u8>,
}

impl Server {
    pub fn start(all: Arc<Mutex<Vec<Bmc>>>, port: u16) -> io::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
        // Nobody else's traffic comes here.
        setsockopt(&socket, sockopt::BindToDevice, &"lo".into())?;
        setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
        if setsockopt(&socket, sockopt::RcvBufForce, &QUEUE).is_err() {
            let _ = setsockopt(&socket, sockopt::RcvBuf, &QUEUE);
        }
        socket.set_nonblocking(true)?;
        let port = socket.local_addr()?.port();
        let over = Arc::new(AtomicBool::new(false));
        let seen = over.clone();
        let sessions = vec![Sessions::default(); lock(&all).len()];
        let mut serving = Serving { socket, all, sessions, leaving: BinaryHeap::new(), order: 0 };
        let thread = std::thread::Builder::new().name("bmcs".into()).spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                serving.round();
            }
        })?;
        Ok(Self { port, over, thread: Some(thread) })
    }

    pub fn port(&self) -> u16 {
        self.port
    }
}

struct Serving {
    socket: UdpSocket,
    all: Arc<Mutex<Vec<Bmc>>>,
    sessions: Vec<Sessions>,
    leaving: BinaryHeap<Reverse<Leaving>>,
    order: u64,
}

impl Serving {
    fn round(&mut self) {
        let next = self.leaving.peek().map(|Reverse(first)| first.at);
        let wait = next.map_or(LOOK, |at| at.saturating_duration_since(Instant::now()).min(LOOK));
        // Up to a millisecond late is not early.
        let wait = wait.as_micros().div_ceil(1000) as u16;
        let mut ready = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut ready, PollTimeout::from(wait));
        while let Some((from, to, bytes)) = self.receive() {
            self.answer(from, to, &bytes);
        }
        let now = Instant::now();
        while self.leaving.peek().is_some_and(|Reverse(first)| first.at <= now) {
            let Some(Reverse(leaving)) = self.leaving.pop() else { break };
            self.send(&leaving);
        }
    }

    fn receive(&self) -> Option<(SocketAddrV4, Ipv4Addr, Vec<u8>)> {
        let mut bytes = vec![0; 2048];
        let mut control = nix::cmsg_space!(nix::libc::in_pktinfo);
        let (length, from, to) = {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let fd = self.socket.as_raw_fd();
            let flags = MsgFlags::MSG_DONTWAIT;
            let message = recvmsg::<SockaddrIn>(fd, &mut parts, Some(&mut control), flags).ok()?;
            let to = message.cmsgs().ok()?.find_map(|control| match control {
                ControlMessageOwned::Ipv4PacketInfo(info) => {
                    Some(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr)))
                }
                _ => None,
            })?;
            (message.bytes, SocketAddrV4::from(message.address?), to)
        };
        bytes.truncate(length);
        Some((from, to, bytes))
    }

    fn answer(&mut self, from: SocketAddrV4, to: Ipv4Addr, bytes: &[u8]) {
        let mut all = lock(&self.all);
        let Some(index) = index(to, all.len()) else { return };
        let bmc = &mut all[index];
        bmc.packets += 1;
        bmc.settle();
        let said = self.sessions[index].answer(bmc, bytes);
        let Said(packets) = said;
        let at = Instant::now() + bmc.delay;
        for bytes in packets {
            self.order += 1;
            let leaving = Leaving { at, order: self.order, from: to, to: from, bytes };
            self.leaving.push(Reverse(leaving));
        }
    }

    fn send(&self, leaving: &Leaving) {
        let source = nix::libc::in_pktinfo {
            ipi_ifindex: 0,
            ipi_spec_dst: nix::libc::in_addr { s_addr: u32::from(leaving.from).to_be() },
            ipi_addr: nix::libc::in_addr { s_addr: 0 },
        };
        let control = [ControlMessage::Ipv4PacketInfo(&source)];
        let parts = [IoSlice::new(&leaving.bytes)];
        let to = SockaddrIn::from(leaving.to);
        // It is UDP.
        let fd = self.socket.as_raw_fd();
        let _ = sendmsg(fd, &parts, &control, MsgFlags::MSG_DONTWAIT, Some(&to));
    }
}
