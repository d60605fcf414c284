//! Networks for real, each test in namespaces of its own.
//!
//! Runs as root, or as anyone who may make user namespaces and open `/dev/net/tun`.
//! Elsewhere the tests are skipped, loudly; where `CI` is set that is a failure.

mod fabric;
mod forged;
mod ipv6;
mod journal;
mod lab;
mod traffic;
