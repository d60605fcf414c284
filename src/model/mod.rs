//! Pure values and rules: no file, no clock, no environment.

pub mod address;
pub mod agent;
pub mod api;
pub mod checkpoint;
pub mod cluster;
pub mod dial;
pub mod hostlist;
pub mod job;
pub mod nearest;
pub mod node;
pub mod nodeset;
pub mod order;
pub mod owner;
pub mod prefix;
pub mod vm;
pub mod vmset;
