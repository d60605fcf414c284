//! A cluster of hosts on one machine.
