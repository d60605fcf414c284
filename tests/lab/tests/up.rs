//! A lab comes up, does what a cluster does, and goes.

use pavo_lab::{Etcd, Lab, Options};

#[test]
fn up() {
    let start = std::time::Instant::now();
    let lab = Lab::up(Options { etcd: Etcd::Three, ovs: true, ..Options::default() }).unwrap();
    eprintln!("up after {:?}", start.elapsed());
    let said = lab.login().run(Some("alice"), &["srun", "-N3", "-l", "hostname"]).unwrap().ok();
    eprintln!("{}", said.unwrap());
    eprintln!("{}", lab.etcdctl(&["endpoint", "health"]).unwrap());
    eprintln!("srun after {:?}", start.elapsed());
    eprintln!("{}", lab.leaks("n1").unwrap());
    let start = std::time::Instant::now();
    drop(lab);
    eprintln!("gone after {:?}", start.elapsed());
}
