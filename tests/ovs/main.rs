//! Open vSwitch for real: its daemons run for each test, on hosts that are namespaces.
//!
//! The datapath is ovs-vswitchd itself, which needs no module of the kernel. Needs root; elsewhere
//! the tests are skipped, loudly; where `CI` is set that is a failure.

#[path = "../netns/lab.rs"]
#[allow(dead_code)]
mod lab;
mod steps;
mod traffic;
mod world;
