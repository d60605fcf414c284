//! Whole clusters on real QEMU, driven through the program as a user drives it.
//!
//! Run as root, the tests drop to an ordinary account inside a mount namespace with a
//! `/dev/net/tun` that anybody may open; run as an ordinary user, they go as they are.
//! Where that cannot be they are skipped, loudly; where `CI` is set that is a failure.
//! Each test has a world of its own, and nothing may be left in it at the end.
//!
//! Booting is slow without KVM: only [`boot`], [`cp`], [`pcocc`], [`run`] and [`settings`] do; all else is done with VMs that
//! run without having got anywhere.

mod boot;
mod cache;
mod ckpt;
mod completion;
mod console;
mod cp;
mod death;
mod display;
mod dump;
mod forward;
mod ipv6;
mod luck;
mod networks;
mod pcocc;
mod probe;
mod processes;
mod recipe;
mod refused;
mod rescue;
mod run;
mod running;
mod save;
mod session;
mod settings;
mod snapshot;
#[path = "../shared/tiny.rs"]
mod tiny;
mod top;
mod tutorial;
mod world;
