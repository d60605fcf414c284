//! How a VM's process asks for a connection to its guest: the guest's network is not its own.
//!
//! Each L3 network has, on each host, a socket of the cluster's user, at which its responder
//! takes connections:
//!
//! ```text
//! → 10.200.0.1 22\n
//! ← connected\n       then both ways what guest and caller have to say
//! ← refused\n         or another word, and the end
//! ```

use std::net::Ipv4Addr;

/// The longest line of either side, with its end.
pub const MAX_LINE: usize = 64;

/// Connections at once to one guest, and to all guests that a network has on a host.
pub const PER_GUEST: usize = 128;
pub const PER_NETWORK: usize = 512;

/// The name of a network's socket in its folder.
pub fn socket(network: &str) -> String {
    format!("dial-{network}")
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub address: Ipv4Addr,
    pub port: u16,
}

impl Request {
    pub fn line(self) -> String {
        format!("{} {}\n", self.address, self.port)
    }

    pub fn parse(line: &str) -> Option<Self> {
        let (address, port) = line.strip_suffix('\n')?.split_once(' ')?;
        Some(Self { address: address.parse().ok()?, port: port.parse().ok()? })
    }
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Connected,
    /// The guest is there, and nothing listens.
    Refused,
    /// The guest does not answer.
    Silent,
    /// No guest here has this address.
    Unknown,
    /// As many connections as there may be are open already.
    Busy,
}

impl Answer {
    const ALL: [(Self, &str); 5] = [
        (Self::Connected, "connected\n"),
        (Self::Refused, "refused\n"),
        (Self::Silent, "silent\n"),
        (Self::Unknown, "unknown\n"),
        (Self::Busy, "busy\n"),
    ];

    pub fn line(self) -> &'static str {
        Self::ALL.iter().find(|(answer, _)| *answer == self).map_or("", |(_, line)| line)
    }

    pub fn parse(line: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, word)| *word == line).map(|(answer, _)| *answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_they_were_written_and_nothing_else_is() {
        let request = Request { address: [10, 200, 0, 1].into(), port: 22 };
        assert_eq!(request.line(), "10.200.0.1 22\n");
        assert_eq!(Request::parse(&request.line()), Some(request));
        for wrong in ["", "\n", "10.200.0.1 22", "10.200.0.1\n", "vm0 22\n", "10.200.0.1 70000\n"] {
            assert_eq!(Request::parse(wrong), None, "{wrong}");
        }
        for (answer, line) in Answer::ALL {
            assert_eq!((answer.line(), Answer::parse(line)), (line, Some(answer)));
        }
        assert_eq!(Answer::parse("connected"), None);
    }
}
