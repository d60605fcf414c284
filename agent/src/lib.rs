//! The protocol between a VM's process and the agent in its guest.
//!
//! They share one line of bytes, a port of virtio-serial, on which either may find what an
//! earlier one left half said. Whoever begins anew says a mark; nothing before it counts.
//!
//! ```text
//! host   ── mark, nonce ─────────────►  agent      whenever the guest has opened the port
//!        ◄── mark, the same nonce ────             all that came before is of another agent
//!        ◄── Pong ────────────────────             who answers
//!        ── Open(1, exec …) ──────────►            a stream begins; the host counts them
//!        ◄── Started(1) ──────────────
//!        ── Data(1) ── End(1) ────────►            standard input, as far as there is credit
//!        ◄── Data(1) ── Errors(1) ────             standard output and error, the same
//!        ── Credit(1) ────────────────►            so many bytes more may come
//!        ◄── Exit(1) ─────────────────             the stream is over, and nothing follows
//! ```
//!
//! A frame is its payload's length (4 bytes, little endian), its stream (4), its kind (1) and
//! the payload, of at most [`MAX_PAYLOAD`] bytes. A mark begins like a frame of impossible
//! length, so that it is known between frames as well.
//!
//! Each stream has credit of its own in both directions. A frame of data longer than the
//! credit is an error of the line: none who is read slowly, or not at all, fills memory or
//! keeps others waiting. The stream that begins has [`WINDOW`] bytes of credit in both
//! directions. Between a command and a VM's process the same frames go over the control
//! connection, there for one stream only.
//!
//! A stream that is opened for a copy carries the records of [`copy`], as the input and output
//! of a process that the agent starts for it.
//!
//! A guest that goes on from another's memory is told by a stream for that who it is
//! ([`Opening::Assume`]): on its input comes an [`Identity`], after its length (4 bytes); once the
//! guest is that, [`ASSUMED`] comes back, and when the input ends, its network is there.
//!
//! The last frame of a stream is the agent's ([`Kind::Exit`], [`Kind::Fail`]). Until then the
//! host keeps its number, also after it has said [`Kind::Close`]: who asked is gone.

pub mod copy;
mod frame;
mod identity;
mod message;

pub use frame::{Decoder, Event, Frame, Kind, Malformed, mark};
pub use identity::{Identity, Interface, MAX_IDENTITY};
pub use message::{
    Command, Copy, Credit, Exec, Exit, Failure, Hello, Opening, Size, Started, THAWED_BEFORE,
};

/// What an agent has among its features that can make its guest another
/// ([`Opening::Assume`]).
pub const ASSUMES: &str = "assume";

/// What it says once the guest is no longer the other, before it is on the network.
pub const ASSUMED: &[u8] = b"assumed\n";

/// The version of this protocol, which the agent says first.
pub const VERSION: u32 = 1;

/// The port's name in the guest.
pub const PORT: &str = "org.pavo.agent.0";

/// The longest payload, in bytes.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// Data is sent in pieces of at most so many bytes: others come between.
pub const PIECE: usize = 16 << 10;

/// The credit that a stream begins with, and the most it ever has.
pub const WINDOW: u32 = 256 << 10;

/// The longest request: what [`Kind::Part`] frames and the [`Kind::Open`] after them hold.
pub const MAX_OPENING: usize = 1 << 20;

/// How many streams there may be at once.
pub const MAX_STREAMS: usize = 128;

/// As many bytes of the output of a command that may be left are kept for who comes back.
pub const REPLAY: usize = 64 << 10;

/// What tells one beginning from another: 16 bytes that nobody can have said before.
pub type Nonce = [u8; 16];
