//! The store: etcd members, each on a host of its own (`e1`…), so that one can be cut
//! off or restarted without anything else.
//!
//! Clients and members speak TLS. Authentication is off: who tests it turns it on.
//!
//! etcd 3.4 knows two ways of treating its clients' certificates, tried here. Without
//! `--trusted-ca-file` it asks for none. With it, `--client-cert-auth` or not, it talks
//! to nobody without one; and only with `--client-cert-auth` is the common name a user,
//! for requests that bring no token. So where hosts log in by certificate, people with
//! passwords show one, too: `/etc/pavo/user.pem`, which is no user's of etcd.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::certs::{Authority, Certs, Pair};
use crate::error::{Error, Result};
use crate::host::{Host, Role};
use crate::service::Daemon;
use crate::site::Site;
use crate::{Options, each};

/// How many members the store has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Etcd {
    #[default]
    None,
    One,
    Three,
}

impl Etcd {
    pub(crate) fn members(self) -> u8 {
        match self {
            Self::None => 0,
            Self::One => 1,
            Self::Three => 3,
        }
    }
}

/// Where the store is and how to talk to it.
#[derive(Clone, Debug)]
pub struct Store {
    /// `https://10.99.0.2:2379`, …: reachable from the hosts.
    pub endpoints: Vec<String>,
    /// Paths on the machine; see [`Store::etcdctl`] for those on a host.
    pub certs: Certs,
}

impl Store {
    /// The command line of `etcdctl` on the login host, as etcd's administrator.
    pub fn etcdctl(&self, words: &[&str]) -> Vec<String> {
        let dir = "/etc/pavo/node";
        let mut argv = vec![
            "env".to_owned(),
            "ETCDCTL_API=3".to_owned(),
            "etcdctl".to_owned(),
            format!("--endpoints={}", self.endpoints.join(",")),
            format!("--cacert={dir}/ca.pem"),
            format!("--cert={dir}/root.pem"),
            format!("--key={dir}/root-key.pem"),
        ];
        argv.extend(words.iter().map(|&word| word.to_owned()));
        argv
    }
}

/// Makes the certificates and gives each host those that are its.
pub(crate) fn prepare(site: &Site, hosts: &[Host]) -> Result<Option<Store>> {
    let members: Vec<&Host> = hosts.iter().filter(|host| host.role == Role::Store).collect();
    if members.is_empty() {
        return Ok(None);
    }
    let authority = Authority::make(&site.certs())?;
    let certs = Certs {
        ca: authority.ca(),
        node: authority.issue("node", "pavo-node", &[])?,
        root: authority.issue("root", "root", &[])?,
        user: authority.issue("user", "pavo-nobody", &[])?,
    };
    for host in hosts {
        let own = match host.role {
            Role::Login => vec![certs.root.clone()],
            Role::Compute => vec![certs.node.clone()],
            Role::Store => {
                let addresses = [host.address(), [127, 0, 0, 1].into()];
                vec![authority.issue(host.short(), host.name(), &addresses)?]
            }
        };
        give(host, &certs, &own)?;
    }
    // Everybody's: people log in with passwords.
    for file in [&certs.ca, &certs.user.cert, &certs.user.key] {
        let copy = site.etc().join("pavo").join(file_name(file)?);
        fs::copy(file, &copy)?;
        fs::set_permissions(copy, fs::Permissions::from_mode(0o644))?;
    }
    let endpoint = |host: &&Host| format!("https://{}:2379", host.address());
    Ok(Some(Store { endpoints: members.iter().map(endpoint).collect(), certs }))
}

fn give(host: &Host, certs: &Certs, own: &[Pair]) -> Result<()> {
    let own = own.iter().flat_map(|pair| [&pair.cert, &pair.key]);
    for file in own.chain([&certs.ca]) {
        fs::copy(file, host.node_dir().join(file_name(file)?))?;
    }
    Ok(())
}

fn file_name(path: &Path) -> Result<&OsStr> {
    path.file_name().ok_or_else(|| Error::new("a nameless file"))
}

/// Starts all members and waits until they have a leader.
pub(crate) fn start(hosts: &[Host], options: &Options) -> Result<()> {
    let members: Vec<&Host> = hosts.iter().filter(|host| host.role == Role::Store).collect();
    let cluster = members.iter().map(|host| format!("{}={}", host.name(), peer(host)));
    let cluster = cluster.collect::<Vec<_>>().join(",");
    each(members.clone(), |host| host.install(daemon(host, &cluster, options)))?;
    wait_healthy(members)
}

/// Waits until each of `members` says that it follows a leader.
pub(crate) fn wait_healthy(members: Vec<&Host>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    each(members, |host| {
        loop {
            let health = host.inside(|| Ok(health()?)).unwrap_or_else(|error| error.to_string());
            if health.contains("\"health\":\"true\"") {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::new(format!("{} has no leader: {health}", host.name())));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    })
}

/// What the member on this host says of itself.
fn health() -> io::Result<String> {
    let limit = Some(Duration::from_secs(2));
    let mut stream = TcpStream::connect("127.0.0.1:2381")?;
    stream.set_read_timeout(limit)?;
    stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn peer(host: &Host) -> String {
    format!("https://{}:2380", host.address())
}

fn daemon(host: &Host, cluster: &str, options: &Options) -> Daemon {
    let (name, address, dir) = (host.name(), host.address(), "/etc/pavo/node");
    let cert = format!("{dir}/{}.pem", host.short());
    let key = format!("{dir}/{}-key.pem", host.short());
    let mut argv = [
        format!("--name={name}"),
        "--data-dir=/var/lib/etcd/lab".into(),
        format!("--listen-client-urls=https://{address}:2379,https://127.0.0.1:2379"),
        format!("--advertise-client-urls=https://{address}:2379"),
        format!("--listen-peer-urls={}", peer(host)),
        format!("--initial-advertise-peer-urls={}", peer(host)),
        format!("--initial-cluster={cluster}"),
        format!("--cert-file={cert}"),
        format!("--key-file={key}"),
        format!("--peer-cert-file={cert}"),
        format!("--peer-key-file={key}"),
        format!("--peer-trusted-ca-file={dir}/ca.pem"),
        "--peer-client-cert-auth".into(),
        // Health without certificates, for who waits for it on this host.
        "--listen-metrics-urls=http://127.0.0.1:2381".into(),
        // The default makes each log-in cost 100 ms.
        "--bcrypt-cost=4".into(),
        format!("--auth-token-ttl={}", options.token_ttl),
        "--logger=zap".into(),
    ]
    .to_vec();
    if options.client_certs {
        argv.push(format!("--trusted-ca-file={dir}/ca.pem"));
        argv.push("--client-cert-auth".into());
    }
    argv.extend(options.etcd_args.iter().cloned());
    let argv: Vec<&str> = ["etcd"].into_iter().chain(argv.iter().map(String::as_str)).collect();
    let mut daemon = Daemon::new("etcd", &argv);
    // A member alone after a restart is ready when it listens: others may be down.
    daemon.ready = "bash -c '</dev/tcp/127.0.0.1/2381' 2>/dev/null".into();
    daemon
}
