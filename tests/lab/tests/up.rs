//! A lab comes up, does what a cluster does, and goes.

use pavo_lab::{Etcd, Lab, Options};

#[test]
fn up() {
    let start = std::time::Instant::now();
    let lab = Lab::up(Options { etcd: Etcd::Three, ..Options::default() }).unwrap();
    eprintln!("up after {:?}", start.elapsed());
    let said = lab.login().run(Some("alice"), &["srun", "-N3", "-l", "hostname"]).unwrap().ok();
    eprintln!("{}", said.unwrap());
    eprintln!("{}", lab.etcdctl(&["endpoint", "health"]).unwrap());
    eprintln!("srun after {:?}", start.elapsed());
    drop(lab);
    eprintln!("gone after {:?}", start.elapsed());
}
