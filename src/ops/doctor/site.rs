//! What hosts of a site share: etcd, the site's key, its configuration; and what `setup
//! init` makes on each.

use std::fs;
use std::net::ToSocketAddrs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{Outcome, Patient, Role, at_once, ok, run, warn};
use crate::config::Etcd as Servers;
use crate::error::{Context, Error};
use crate::host::journal::Journal;
use crate::model::owner::Owner;
use crate::ops::cleanup::JOURNAL_DIR;
use crate::ops::setup::{SITE_DIR, wreck::Wreck};
use crate::ops::site::{as_node, as_person};
use crate::store::Store;
use crate::store::etcd::Etcd;
use crate::store::keys;
use crate::store::secret::{Letter, Secret, SiteKey, SitePublic};

/// How long one member of etcd may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(3);

pub(super) fn checks(patient: &Patient) -> Vec<(&'static str, BoxFuture<'_, Outcome>)> {
    let mut checks = Vec::new();
    if let Some(etcd) = &patient.config.batch.etcd {
        checks.push(("etcd", reachable(etcd).boxed()));
        checks.push(("etcd-login", log_in(patient, etcd).boxed()));
        checks.push(("site-key", at_once(keys_of_site(patient))));
    }
    if Path::new(SITE_DIR).exists() {
        checks.push(("permissions", at_once(permissions())));
    }
    if patient.role == Role::Node && patient.is_root {
        checks.push(("init", at_once(initialised())));
        checks.push(("clusters", at_once(readable())));
        if Path::new("/run/systemd/system").exists() {
            checks.push(("sweep", swept().boxed()));
        }
    }
    checks
}

/// Whether something listens at each member.
async fn reachable(etcd: &Servers) -> Outcome {
    let mut silent = Vec::new();
    for server in &etcd.servers {
        let port = etcd.client_port;
        let named = server.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let address = if named { server.clone() } else { format!("{server}:{port}") };
        let connect = async {
            let found = address.to_socket_addrs()?.next();
            let found = found.ok_or_else(|| std::io::Error::other("it has no address"))?;
            TcpStream::connect(found).await.map(drop)
        };
        match timeout(CONNECT, connect).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => silent.push(format!("{address}: {error}")),
            Err(_) => silent.push(format!("{address}: no answer")),
        }
    }
    let all = etcd.servers.len();
    let help = "start etcd there: `systemctl start etcd`; see `etcd-servers` in batch.yaml";
    match silent.len() {
        0 => ok(format!("{all} of {all} members listen")),
        some if some < all => {
            warn(format!("{} of {all} members listen; {}", all - some, silent.join("; ")), help)
        }
        _ => Err(Error::system(format!("nothing listens: {}", silent.join("; "))).help(help)),
    }
}

/// Logs in as whoever asks.
async fn log_in(patient: &Patient, etcd: &Servers) -> Outcome {
    let (access, who) = match (patient.is_root, patient.role) {
        (true, Role::Node) => (as_node(etcd)?, "this node".to_owned()),
        _ => {
            let file = patient.home.join(".pavo/etcd-secret");
            if !file.exists() {
                return ok(format!("{} has a log-in from the first cluster on", patient.user));
            }
            (as_person(etcd, &patient.user, &Secret::read(&file)?), patient.user.clone())
        }
    };
    let store = Etcd::connect(&access).await;
    let store = store.while_doing(|| format!("logging in as {who}"))?;
    let schema = store.get(&keys::schema()).await?;
    match schema {
        Some(_) => ok(format!("as {who}")),
        None => Err(Error::system("etcd is not prepared for pavo")
            .help("as root, once: `pavo internal setup store`")),
    }
}

/// The pair of keys by which people's secrets travel.
fn keys_of_site(patient: &Patient) -> Outcome {
    let help = "as root, once, on one host: `pavo internal setup store`; then copy site.pub to \
                all hosts, and site.key (0600) to compute nodes";
    let dir = Path::new(SITE_DIR);
    let public = SitePublic::read(&dir.join("site.pub")).map_err(|error| error.help(help))?;
    if !(patient.is_root && patient.role == Role::Node) {
        return ok("site.pub can be read");
    }
    let private = SiteKey::read(&dir.join("site.key")).map_err(|error| error.help(help))?;
    let letter = Letter::new("doctor", 1, 1, Secret::random()?, ());
    let opened = public.seal(&letter).and_then(|text| private.open::<()>(&text, "doctor", 1, 1));
    match opened {
        Ok(opened) if opened.secret == letter.secret => ok("site.key opens what site.pub seals"),
        _ => Err(Error::system("site.key and site.pub are not a pair").help(help)),
    }
}

/// Root reads only what nobody else can change.
fn permissions() -> Outcome {
    let mut wrong = Vec::new();
    let entries = fs::read_dir(SITE_DIR).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    for path in std::iter::once(SITE_DIR.into()).chain(paths) {
        let Ok(data) = fs::metadata(&path) else { continue };
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let secret = ["site.key", "etcd-password", "node"].contains(&name.as_str());
        let forbidden = if secret { 0o077 } else { 0o022 };
        if data.uid() != 0 {
            wrong.push(format!("chown root {}", path.display()));
        }
        if data.mode() & forbidden != 0 {
            let mode = if secret { "go=" } else { "go-w" };
            wrong.push(format!("chmod {mode} {}", path.display()));
        }
    }
    if wrong.is_empty() {
        return ok(format!("of `{SITE_DIR}` are as they should be"));
    }
    Err(Error::system("others can change, or read, what is root's").help(wrong.join("\n  help: ")))
}

/// Whether `setup init` has run since the host booted.
fn initialised() -> Outcome {
    let plan = Journal::peek(JOURNAL_DIR).read(Owner::NODE)?;
    match plan.filter(|plan| crate::host::process::alive(&plan.keeper)) {
        Some(_) => ok("`setup init` has run"),
        None => warn(
            "`setup init` has not run since the host booted",
            "`systemctl enable --now pavo-node.service`, or `pavo internal setup init`",
        ),
    }
}

/// Whether all that is noted of clusters here can be read.
fn readable() -> Outcome {
    match Wreck::all()?.into_iter().next() {
        Some(wreck) => Err(wreck.error()),
        None => ok("what is noted of clusters here can be read"),
    }
}

async fn swept() -> Outcome {
    match run("systemctl", &["is-active", "pavo-sweep.timer"], b"").await {
        Ok(_) => ok("pavo-sweep.timer is active"),
        Err(_) => warn(
            "pavo-sweep.timer is not active: what killed clusters leave stays",
            "`systemctl enable --now pavo-sweep.timer`",
        ),
    }
}
