//! `pavo cp`

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use pavo_agent::copy::name_of;
use tokio::time::{MissedTickBehavior, interval};

use super::App;
use super::agent::report;
use super::copying::{Copying, STILL};
use super::job::{JobSelector, ranks};
use super::out::printable;
use super::run::signals::{HUP, INT, QUIT, Signals, TERM};
use crate::error::{Context, Error, Kind, Result};
use crate::model::job::JobRecord;
use crate::model::vmset::{VmSet, fold};
use crate::ops::copy::{Copies, Ended, Order, Way};

/// How often it is shown how far a copy is.
const TICK: Duration = Duration::from_millis(250);

/// Copy files and folders into VMs, or out of them
///
/// A file of a VM is written `vm0:PATH`; a relative path begins at the user's home. As DEST,
/// `vm[0-3]:PATH` or `all:PATH` is each of those VMs. As SOURCE, what comes from several VMs,
/// or from `all:`, goes to DEST/vm0, DEST/vm1 and so on. It needs neither ssh nor a network:
/// pavo's agent in the guest reads and writes the files.
///
/// Names are as with `cp -r`: a folder is copied with all it holds, into DEST if that is a
/// folder or ends with a slash, and otherwise as DEST; `SOURCE/.` is only what it holds. Below
/// it `/proc`, `/sys`, `/dev` and the like are left out. Links
/// stay links, but for a SOURCE that is one. Modes, times and holes are kept; owners, hard
/// links and set-user-ID marks are not: files belong to `--user` in the guest, and to you here.
///
/// A file has its name only once it is whole; until then it is `.NAME.pavo-part`. After an
/// interrupt the same command goes on with it, and does not send again what is there, if
/// that is the same: files of 1 MiB and more. What cannot be read is said and left out, with the
/// exit code 1; so is, of several VMs, one that fails.
#[derive(Debug, Args)]
pub struct Cp {
    #[command(flatten)]
    job: JobSelector,

    /// Read or write the guest's files as this user of it [default: root]
    #[arg(short, long, value_name = "NAME")]
    user: Option<OsString>,

    /// Folders are copied with all they hold in any case
    #[arg(short, long, short_aliases = ['R', 'a'], hide = true)]
    recursive: bool,

    /// Files or folders, all here or all in VMs: `vm0:PATH`
    #[arg(value_name = "SOURCE", required = true)]
    sources: Vec<OsString>,

    /// Where to: `vm0:PATH`, or, from VMs, a path here
    #[arg(value_name = "DEST")]
    dest: OsString,
}

/// One side of a copy, as it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Side {
    Here(PathBuf),
    Vms(VmSet, Vec<u8>),
}

impl Side {
    /// `./vm0:x` is a file here, as with scp.
    fn parse(text: &OsStr) -> Result<Self> {
        let here = || Ok(Self::Here(text.into()));
        let bytes = text.as_bytes();
        let Some(colon) = bytes.iter().position(|byte| *byte == b':') else { return here() };
        let set = String::from_utf8_lossy(&bytes[..colon]);
        let numbered = set.strip_prefix("vm").and_then(|rest| rest.bytes().next());
        if set != "all" && !numbered.is_some_and(|byte| byte == b'[' || byte.is_ascii_digit()) {
            return here();
        }
        Ok(Self::Vms(set.parse()?, bytes[colon + 1..].to_vec()))
    }
}

impl Cp {
    pub fn run(self, app: &App) -> Result<u8> {
        let _as_it_is_anyway = self.recursive;
        let dest = Side::parse(&self.dest)?;
        let sources: Vec<Side> =
            self.sources.iter().map(|text| Side::parse(text)).collect::<Result<_>>()?;
        app.block_on(async {
            let ways = Ways::of(sources, dest)?;
            let (known, job) = self.job.find(app).await?;
            let user = self.user.map(|user| user.as_bytes().to_vec());
            let orders = ways.orders(&job, user)?;
            let copies = Copies::start(known.shared_store(), &job, orders.clone());
            conduct(app, copies, &orders, ways.direction()).await
        })
    }
}

/// What is copied, before it is known which VMs there are.
#[derive(Debug, PartialEq, Eq)]
enum Ways {
    In { sources: Vec<PathBuf>, set: VmSet, to: Vec<u8> },
    Out { sources: Vec<(VmSet, Vec<u8>)>, to: PathBuf },
}

impl Ways {
    fn of(sources: Vec<Side>, dest: Side) -> Result<Self> {
        let (mut here, mut there) = (Vec::new(), Vec::new());
        for source in sources {
            match source {
                Side::Here(path) => here.push(path),
                Side::Vms(set, path) => there.push((set, path)),
            }
        }
        match (dest, here.is_empty(), there.is_empty()) {
            (Side::Vms(set, to), false, true) => Ok(Self::In { sources: here, set, to }),
            (Side::Here(to), true, false) => Ok(Self::Out { sources: there, to }),
            (Side::Here(_), false, true) => Err(Error::usage("none of these files is in a VM")
                .help("write `vm0:PATH` for a file of a VM")),
            (Side::Vms(..), true, false) => Err(Error::usage("both sides are in VMs")
                .help("copy to here first, and from here to the other VM")),
            _ => Err(Error::usage("some sources are here, and some in VMs")
                .help("copy them with one command each")),
        }
    }

    fn orders(&self, job: &JobRecord, user: Option<Vec<u8>>) -> Result<Vec<Order>> {
        match self {
            Self::In { sources, set, to } => {
                differ(sources.iter().map(|path| name_of(path)))?;
                for path in sources {
                    // Nothing is begun for what is not there.
                    std::fs::metadata(path).map_err(|error| {
                        Error::not_found(format!("reading `{}`", path.display())).because(error)
                    })?;
                }
                let into = sources.len() > 1 || to.ends_with(b"/");
                let order = |rank| {
                    let (sources, to) = (sources.clone(), to.clone());
                    Order { rank, way: Way::In { sources, to, into }, user: user.clone() }
                };
                Ok(ranks(set, job)?.into_iter().map(order).collect())
            }
            Self::Out { sources, to } => {
                let mut by_vm: BTreeMap<u32, Vec<Vec<u8>>> = BTreeMap::new();
                for (set, path) in sources {
                    for rank in ranks(set, job)? {
                        by_vm.entry(rank).or_default().push(path.clone());
                    }
                }
                let several = by_vm.len() > 1 || sources.iter().any(|(set, _)| *set == VmSet::All);
                let ends = to.as_os_str().as_bytes().ends_with(b"/");
                let order = |(rank, sources): (u32, Vec<Vec<u8>>)| {
                    differ(sources.iter().map(|path| name_of(Path::new(OsStr::from_bytes(path)))))?;
                    let into = several || ends || sources.len() > 1;
                    let to = if several { to.join(format!("vm{rank}")) } else { to.clone() };
                    let user = user.clone();
                    Ok(Order { rank, way: Way::Out { sources, to, into }, user })
                };
                by_vm.into_iter().map(order).collect()
            }
        }
    }

    fn direction(&self) -> &'static str {
        match self {
            Self::In { .. } => "to",
            Self::Out { .. } => "from",
        }
    }
}

/// What has the same name would be there only once.
fn differ<'a>(names: impl Iterator<Item = &'a [u8]>) -> Result<()> {
    let mut seen = std::collections::BTreeSet::new();
    for name in names.filter(|name| !name.is_empty()) {
        if !seen.insert(name) {
            let name = String::from_utf8_lossy(name);
            return Err(Error::usage(format!("two of the sources are called `{name}`"))
                .help("copy them to different folders"));
        }
    }
    Ok(())
}

/// Shows how far it is, until it has ended, or the user ends it.
async fn conduct(app: &App, mut copies: Copies, orders: &[Order], direction: &str) -> Result<u8> {
    let mut signals = Signals::new()?;
    let all: Vec<u32> = orders.iter().map(|order| order.rank).collect();
    let mut copying = Copying::new(&app.out, format!("Copying {direction} {}", fold(&all)));
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut failed, mut missing) = (Vec::new(), BTreeMap::<String, Vec<u32>>::new());
    let mut whole = Vec::new();
    loop {
        tokio::select! {
            ended = copies.next() => {
                let Some(Ended { rank, outcome, troubles }) = ended else { break };
                for trouble in troubles {
                    missing.entry(trouble).or_default().push(rank);
                }
                match outcome {
                    Ok(()) => whole.push(rank),
                    Err(error) => failed.push((rank, error)),
                }
            }
            _ = ticks.tick() => match copies.still(STILL) {
                Some((vms, still)) => copying.still(&vms, still),
                // A log has no use for it.
                None => if app.out.stderr_is_terminal() {
                    copying.at(copies.progress());
                },
            },
            signal = signals.next() => if [HUP, INT, QUIT, TERM].contains(&signal) {
                return interrupted(app, copies, &mut signals, whole).await;
            },
        }
    }
    app.out.end_progress();
    for (trouble, ranks) in &mut missing {
        ranks.sort_unstable();
        app.out.warn(&format!("{}: {}", fold(ranks), printable(trouble)));
    }
    match failed.pop() {
        None => Ok(u8::from(!missing.is_empty())),
        Some((rank, error)) if all.len() == 1 => {
            Err(error).while_doing(|| format!("copying {direction} vm{rank}"))
        }
        Some(last) => {
            failed.push(last);
            report(app, failed);
            Ok(Kind::Partial.exit_code())
        }
    }
}

async fn interrupted(
    app: &App,
    copies: Copies,
    signals: &mut Signals,
    mut whole: Vec<u32>,
) -> Result<u8> {
    app.out.end_progress();
    tokio::select! {
        () = copies.interrupt() => {}
        // A file system that does not answer is not waited for.
        _ = signals.next() => {}
    }
    let mut text = "interrupted: what was copied so far is kept".to_owned();
    whole.sort_unstable();
    if !whole.is_empty() {
        text += &format!(", and {} done", fold(&whole));
    }
    Err(Error::new(Kind::Interrupted, text).help("the same command goes on with it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(text: &str) -> Side {
        Side::parse(OsStr::new(text)).unwrap()
    }

    #[test]
    fn files_are_here_or_in_vms() {
        let vms = |set: &str, path: &str| Side::Vms(set.parse().unwrap(), path.into());
        for (text, meant) in [
            ("vm0:/etc/hosts", vms("vm0", "/etc/hosts")),
            ("vm[0-3]:", vms("vm[0-3]", "")),
            ("vm0-3,vm7:a:b", vms("vm[0-3,7]", "a:b")),
            ("all:x", vms("all", "x")),
        ] {
            assert_eq!(side(text), meant, "{text}");
        }
        for text in ["vm0", "./vm0:x", "/vm0:x", "host:x", "vmlinuz:x", "0:x", "a:vm0:x", ":x"] {
            assert_eq!(side(text), Side::Here(text.into()), "{text}");
        }
        Side::parse(OsStr::new("vm0x:y")).unwrap_err();
    }

    #[test]
    fn one_side_is_here_and_the_other_in_vms() {
        let ways = |texts: &[&str], dest: &str| {
            Ways::of(texts.iter().map(|text| side(text)).collect(), side(dest))
        };
        assert!(matches!(ways(&["a", "b"], "vm0:"), Ok(Ways::In { .. })));
        assert!(matches!(ways(&["vm0:a", "vm1:b"], "d"), Ok(Ways::Out { .. })));
        for (sources, dest) in [
            (&["a"][..], "b"),
            (&["vm0:a"], "vm1:b"),
            (&["vm0:a", "b"], "c"),
            (&["a", "vm0:b"], "vm1:c"),
        ] {
            assert_eq!(ways(sources, dest).unwrap_err().kind(), Kind::Usage);
        }
    }

    #[test]
    fn names_that_would_meet_are_refused() {
        differ([&b"a"[..], b"b", b"", b""].into_iter()).unwrap();
        differ([&b"a"[..], b"b", b"a"].into_iter()).unwrap_err();
    }
}
