//! A cluster of hosts on one machine: Slurm, etcd and Open vSwitch, in namespaces.
//!
//! ```no_run
//! # fn main() -> pavo_lab::Result<()> {
//! use pavo_lab::{Etcd, Lab, Options};
//!
//! let lab = Lab::up(Options { hosts: 2, etcd: Etcd::Three, ..Options::default() })?;
//! let said = lab.login().run(Some("alice"), &["srun", "-N2", "hostname"])?.ok()?;
//! lab.host("n2").cut_off()?;
//! # Ok(())
//! # }
//! ```
//!
//! Hosts are named `login`, `n1`… and `e1`… (members of the store), with a prefix of the
//! lab's own: `a1login`. Everything takes the names with or without it. All of a lab
//! goes when it is dropped, and when its owner dies nothing keeps running.
//!
//! From the inside out: `keeper` holds namespaces, `mounts` makes a host of them,
//! `wire` connects them, `service` runs daemons there, `slurm`, `etcd` and `ovs` know which.

mod certs;
mod cgroups;
mod clock;
mod enter;
mod error;
mod etcd;
mod folder;
mod host;
mod keeper;
mod leaks;
mod mounts;
mod ovs;
pub mod people;
mod ready;
mod run;
mod service;
mod site;
mod slurm;
mod wire;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use certs::{Certs, Pair};
pub use error::{Error, Result};
pub use etcd::{Etcd, Store};
pub use host::{Host, Process};
pub use leaks::Snapshot;
pub use ready::build_tiny;
pub use run::Output;
pub use service::Service;

use folder::Folder;
use host::Role;
use site::Site;
use wire::{Port, Wire};

/// The most compute hosts that a lab has addresses for.
const MOST: u8 = 200;

/// What to bring up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Compute hosts.
    pub hosts: u8,
    pub etcd: Etcd,
    /// CPUs of each compute host, as far as Slurm knows.
    pub cpus: u16,
    /// Open vSwitch on every compute host, and the network that its tunnels run on.
    pub ovs: bool,
    /// Slurm on the hosts; without it they are bare.
    pub slurmd: bool,
    /// Becomes `/usr/lib/pavo/spank_pavo.so`, required by Slurm.
    pub plugin: Option<PathBuf>,
    /// Becomes `/usr/bin/pavo`.
    pub pavo: Option<PathBuf>,
    /// Seconds after which an unused token of etcd's is forgotten.
    pub token_ttl: u32,
    /// etcd talks to nobody without a certificate, and takes the common name of one for
    /// the user where no password was given. Otherwise it asks for none.
    pub client_certs: bool,
    /// More arguments of etcd.
    pub etcd_args: Vec<String>,
    /// More lines of slurm.conf.
    pub slurm: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hosts: 3,
            etcd: Etcd::None,
            cpus: 8,
            ovs: false,
            slurmd: true,
            plugin: None,
            pavo: None,
            token_ttl: 300,
            client_certs: false,
            etcd_args: Vec::new(),
            slurm: Vec::new(),
        }
    }
}

/// A cluster that is up.
#[derive(Debug)]
pub struct Lab {
    // In the order in which they go: the folder last, when nothing runs in it.
    hosts: Vec<Host>,
    store: Option<Store>,
    site: Arc<Site>,
    folder: Folder,
}

impl Lab {
    /// Brings a lab up; it is ready for jobs when this returns.
    pub fn up(options: Options) -> Result<Self> {
        let folder = Folder::take()?;
        let site = Arc::new(Site::make(&folder, &options)?);
        let wire = Arc::new(Wire::start(&folder.path.join("keepers"))?);
        let host = |short: String, role, port| {
            Host::new(&folder.prefix, short, role, port, site.clone(), wire.clone())
        };
        if options.hosts > MOST {
            return Err(Error::new(format!("a lab has up to {MOST} compute hosts")));
        }
        let port = |number, underlay| Port { number, underlay };
        let mut hosts = vec![host("login".into(), Role::Login, port(1, false))];
        for member in 1..=options.etcd.members() {
            hosts.push(host(format!("e{member}"), Role::Store, port(1 + member, false)));
        }
        for node in 1..=options.hosts {
            hosts.push(host(format!("n{node}"), Role::Compute, port(10 + node, options.ovs)));
        }
        site.write_hosts(hosts.iter().map(|host| (host.name(), host.short(), host.address())))?;
        slurm::configure(&site, &hosts, &options)?;
        each(hosts.iter().collect(), Host::boot)?;
        let store = etcd::prepare(&site, &hosts)?;
        let lab = Self { hosts, store, site, folder };
        lab.start(&options)?;
        Ok(lab)
    }

    fn start(&self, options: &Options) -> Result<()> {
        std::thread::scope(|scope| {
            let store = scope.spawn(|| etcd::start(&self.hosts, options));
            let switches = scope.spawn(|| match options.ovs {
                true => each(self.computes().collect(), ovs::start),
                false => Ok(()),
            });
            if options.slurmd {
                slurm::start(&self.hosts)?;
                self.wait_idle()?;
            }
            for started in [store, switches] {
                started.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            }
            Ok(())
        })
    }

    /// What all names of this lab begin with.
    pub fn prefix(&self) -> &str {
        &self.folder.prefix
    }

    /// A host by name; asking for one that is not there is a mistake in the test.
    #[track_caller]
    pub fn host(&self, name: &str) -> &Host {
        let found = self.hosts.iter().find(|host| host.name() == name || host.short() == name);
        found.unwrap_or_else(|| panic!("the lab has no host `{name}`"))
    }

    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    pub fn login(&self) -> &Host {
        self.host("login")
    }

    pub fn computes(&self) -> impl Iterator<Item = &Host> {
        self.hosts.iter().filter(|host| host.role == Role::Compute)
    }

    /// The hosts of the store's members.
    pub fn stores(&self) -> impl Iterator<Item = &Host> {
        self.hosts.iter().filter(|host| host.role == Role::Store)
    }

    /// Where a host is on the management network.
    #[track_caller]
    pub fn address(&self, host: &str) -> Ipv4Addr {
        self.host(host).address()
    }

    /// The store, if the lab has one.
    pub fn store(&self) -> Option<&Store> {
        self.store.as_ref()
    }

    /// Runs `etcdctl` on the login host as etcd's administrator.
    pub fn etcdctl(&self, words: &[&str]) -> Result<String> {
        let store = self.store().ok_or_else(|| Error::new("the lab has no store"))?;
        let argv = store.etcdctl(words);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        self.login().run(None, &argv)?.ok()
    }

    /// The site's folder, seen on every host as `/etc/pavo`.
    pub fn etc_pavo(&self) -> PathBuf {
        self.site.etc().join("pavo")
    }

    /// Seen on every host as `/etc`.
    pub fn etc(&self) -> PathBuf {
        self.site.etc()
    }

    /// A user's home, seen on every host as `/home/<user>`.
    pub fn home(&self, user: &str) -> PathBuf {
        self.site.home().join(user)
    }

    /// What is there now that a job could leave behind; see [`Snapshot`].
    #[track_caller]
    pub fn leaks(&self, host: &str) -> Result<Snapshot> {
        leaks::snapshot(self.host(host))
    }

    /// Waits until every member of the store whose host is up follows a leader.
    pub fn wait_store(&self) -> Result<()> {
        etcd::wait_healthy(self.stores().filter(|host| host.is_up()).collect())
    }

    /// Waits until a host is as it was in `before`: kernel and daemons tidy in their own
    /// time. What still differs after `limit` is the error.
    #[track_caller]
    pub fn settled(&self, host: &str, before: &Snapshot, limit: Duration) -> Result<()> {
        leaks::settle(self.host(host), before, limit)
    }

    /// Everything that the lab keeps on the machine.
    pub fn dir(&self) -> &Path {
        &self.folder.path
    }

    /// Waits until all nodes are idle.
    pub fn wait_idle(&self) -> Result<()> {
        let names: Vec<&str> = self.computes().map(Host::name).collect();
        slurm::wait_for(self.login(), &names, &["idle"])
    }

    /// Waits until Slurm gives the state of a node as one that begins like one of `states`.
    #[track_caller]
    pub fn wait_state(&self, host: &str, states: &[&str]) -> Result<()> {
        slurm::wait_for(self.login(), &[self.host(host).name()], states)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // At the same time: each one's end is waited for. One that is down is no error.
        let _ = each(self.hosts.iter().filter(|host| host.is_up()).collect(), Host::kill);
    }
}

/// Removes what labs left whose owners are gone.
pub fn sweep() {
    folder::sweep_all();
}

/// Whether a lab can run here. If not, it says so loudly; where `CI` is set it is an
/// error instead.
#[expect(clippy::print_stderr, reason = "a test that is skipped must be seen")]
pub fn can_run() -> bool {
    let programs = ["slurmctld", "slurmd", "munged", "etcd", "etcdctl", "ovs-vswitchd", "nft"];
    let dirs = ["/usr/sbin", "/usr/bin"].map(Path::new);
    let missing: Vec<&str> = programs
        .into_iter()
        .filter(|program| !dirs.iter().any(|dir| dir.join(program).exists()))
        .collect();
    let why = match missing.as_slice() {
        [] if nix::unistd::geteuid().is_root() => return true,
        [] => "a lab needs root".to_owned(),
        missing => format!("not installed: {} (scripts/packages test)", missing.join(" ")),
    };
    assert!(std::env::var_os("CI").is_none(), "{why}");
    eprintln!("skipped: {why}");
    false
}

/// Does something with all hosts at the same time; the first failure is told.
pub(crate) fn each<'a>(
    hosts: Vec<&'a Host>,
    work: impl Fn(&'a Host) -> Result<()> + Sync,
) -> Result<()> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            hosts.into_iter().map(|host| scope.spawn(move || work(host))).collect();
        let done = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        // All are waited for, whatever the first one says.
        done.collect::<Vec<_>>().into_iter().collect()
    })
}
