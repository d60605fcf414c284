//! A copy of a VM's disk, taken while the VM runs.
//!
//! QEMU copies (`blockdev-backup`): the copy is what the disk held at one moment, whatever
//! the guest writes meanwhile. At that moment a guest with an agent has its file systems at
//! rest; without one the copy is what the disk of a computer is whose power fails.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::guest_agent::Agent;
use super::{agent, overlay, qmp};
use crate::error::{Context, Error, Result};
use crate::model::vm::DiskFormat;

/// How often QEMU is asked how far it is: seldom enough to cost nothing, often enough that
/// a short copy does not wait.
pub(super) const FIRST_LOOK: Duration = Duration::from_millis(5);
pub(super) const LOOKS: Duration = Duration::from_millis(250);

/// What is to be copied where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// 0 for the VM's disk, 1 for its first persistent drive.
    #[serde(default)]
    pub drive: u32,
    /// The new file, absolute; nothing is there yet.
    pub file: PathBuf,
    /// What lies below the copy, absolute or beside the file: then it holds only what the
    /// VM has written. Without it, the copy holds all and stands alone.
    pub below: Option<PathBuf>,
    /// Whether a guest that does not bring its file systems to rest is an error.
    #[serde(default)]
    pub safe: bool,
}

/// How far a copy is, in bytes. While another one is being made, it is nothing of nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    pub done: u64,
    pub total: u64,
}

/// How a copy was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// The file systems that were at rest.
    pub frozen: u64,
    /// Why they were not.
    pub trouble: Option<String>,
}

/// The disk of one VM, as far as copying it needs.
#[derive(Clone, Debug)]
pub struct Source<'a> {
    pub qmp: &'a qmp::Client,
    /// The VM's directory.
    pub dir: &'a Path,
    /// Bytes of the VM's disk, if it has one.
    pub disk: Option<u64>,
    /// Unique among the copies of this VM.
    pub number: u64,
    /// The way to the guest's agent; none where the guest is off, and its disk at rest anyway.
    pub guest: Option<&'a agent::Agent>,
    /// Whether it stands still, and answers nobody.
    pub paused: bool,
}

/// Copies, telling how far it is; when nobody listens, nobody wants it any more. Nothing of it
/// is left then, nor after a failure.
///
/// # Errors
/// When the file cannot be made or the copy fails: a full file system, a disk that cannot
/// be read.
pub async fn save(source: Source<'_>, wish: &Wish, tell: mpsc::Sender<Progress>) -> Result<Saved> {
    if !wish.file.is_absolute() {
        return Err(Error::usage(format!("`{}` is not absolute", wish.file.display())));
    }
    let below = wish.below.as_deref().map(|below| (below, DiskFormat::Qcow2));
    overlay::layer(&wish.file, below, source.size(wish.drive).await?)?;
    let outcome = source.copy(wish, tell).await;
    if outcome.is_err() {
        // The error says more than that it cannot be removed.
        let _ = std::fs::remove_file(&wish.file);
    }
    outcome
}

/// A job of QEMU's, as it says.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Job {
    id: String,
    status: String,
    current_progress: u64,
    total_progress: u64,
    error: Option<String>,
}

/// The node of QEMU that the guest writes to (see [`args`](super::args)).
fn written(drive: u32) -> String {
    match drive {
        0 => "disk".into(),
        drive => format!("drive{drive}"),
    }
}

impl Source<'_> {
    /// The size of a drive, in bytes. Of a persistent one QEMU knows it.
    async fn size(&self, drive: u32) -> Result<u64> {
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Node {
            node_name: Option<String>,
            image: Image,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Image {
            virtual_size: u64,
        }
        if drive == 0 {
            return self.disk.ok_or_else(|| Error::usage("the VM has no disk"));
        }
        let nodes = self.call("query-named-block-nodes", json!({ "flat": true })).await?;
        let nodes: Vec<Node> =
            serde_json::from_value(nodes).while_doing(|| "reading QEMU's answer".into())?;
        let name = written(drive);
        let found = nodes.into_iter().find(|node| node.node_name.as_deref() == Some(&name));
        let missing = || Error::usage(format!("the VM has no drive {drive}"));
        found.map(|node| node.image.virtual_size).ok_or_else(missing)
    }

    fn node(&self) -> String {
        format!("save{}", self.number)
    }

    async fn call(&self, command: &str, arguments: Value) -> Result<Value> {
        self.qmp.call(command, arguments).await.while_doing(|| format!("telling QEMU `{command}`"))
    }

    async fn copy(&self, wish: &Wish, tell: mpsc::Sender<Progress>) -> Result<Saved> {
        let file =
            wish.file.to_str().ok_or_else(|| Error::usage("the file's name is not UTF-8"))?;
        // Whoever asked writes it through to the disk, once it is whole.
        let cache = json!({ "direct": false, "no-flush": true });
        let node = json!({
            "driver": "qcow2",
            "node-name": self.node(),
            // What lies below is not read: it is not copied.
            "backing": null,
            "discard": "unmap",
            "detect-zeroes": if wish.below.is_some() { "off" } else { "unmap" },
            "cache": cache,
            "file": { "driver": "file", "filename": file, "discard": "unmap", "cache": cache },
        });
        self.call("blockdev-add", node).await?;
        let outcome = self.begin_and_follow(wish, tell).await;
        let removed = self.call("blockdev-del", json!({ "node-name": self.node() })).await;
        let saved = outcome?;
        removed.map(|_| saved)
    }

    async fn begin_and_follow(&self, wish: &Wish, tell: mpsc::Sender<Progress>) -> Result<Saved> {
        let rest = self.rest().await?;
        if wish.safe && self.guest.is_some() && !matches!(rest.count(), Ok(1..)) {
            let trouble = rest.count().err().map(Error::report);
            rest.end().await?;
            let why = "the guest did not bring its file systems to rest";
            let error = Error::system(why).help(
                "run pavo's agent in the guest (`agent: inject`), or qemu-guest-agent, or leave \
                 `-s` away",
            );
            return Err(match trouble {
                Some(trouble) => error.because(trouble.trim_start_matches("error: ").to_owned()),
                None => error.because("none of its disks has one that is mounted"),
            });
        }
        let sync = if wish.below.is_some() { "top" } else { "full" };
        let begin = json!({
            "job-id": self.node(),
            "device": written(wish.drive),
            "target": self.node(),
            "sync": sync,
            // So that it can be asked how it ended.
            "auto-dismiss": false,
        });
        let begun = self.call("blockdev-backup", begin).await;
        // The copy is of this moment: the guest may go on.
        let (count, mut trouble) = match rest.count() {
            Ok(count) => (count, None),
            Err(trouble) => (0, Some(trouble.report())),
        };
        let ours = matches!(rest, Rest::Ours(_));
        let mut thawed = rest.end().await;
        if let (true, Err(error)) = (ours, &thawed) {
            // It goes on by itself; but it may have done so too soon.
            trouble = Some(error.report());
            thawed = Ok(());
        }
        begun?;
        let outcome = self.follow(tell).await;
        self.call("job-dismiss", json!({ "id": self.node() })).await?;
        outcome?;
        thawed?;
        let frozen = if trouble.is_some() { 0 } else { count };
        Ok(Saved { frozen, trouble })
    }

    /// Brings the guest's file systems to rest, by our agent rather than by QEMU's.
    async fn rest(&self) -> Result<Rest> {
        let Some(guest) = self.guest else { return Ok(Rest::Off) };
        if self.paused {
            return Ok(Rest::None(Error::system("it is paused")));
        }
        let ours = match guest.freeze().await {
            Ok(Some(frozen)) => return Ok(Rest::Ours(frozen)),
            Ok(None) => None,
            Err(trouble) => Some(trouble),
        };
        Ok(match (self.agent().await?, ours) {
            (Some(mut agent), _) => {
                let frozen = agent.freeze().await;
                Rest::Qemus(agent, frozen)
            }
            (None, Some(trouble)) => Rest::None(trouble),
            (None, None) => Rest::None(Error::system("no agent answers in the guest")),
        })
    }

    /// QEMU's agent, if the guest has one.
    async fn agent(&self) -> Result<Option<Agent>> {
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Chardev {
            label: String,
            frontend_open: bool,
        }
        let all = self.call("query-chardev", json!({})).await?;
        let all: Vec<Chardev> =
            serde_json::from_value(all).while_doing(|| "reading QEMU's answer".into())?;
        // Somebody in the guest has opened the agent's port.
        if all.iter().any(|chardev| chardev.label == "agent" && chardev.frontend_open) {
            // Whoever it is need not be an agent.
            return Ok(Agent::connect(self.dir).await.ok());
        }
        Ok(None)
    }

    /// Until the job has ended; then it is still to be dismissed.
    async fn follow(&self, tell: mpsc::Sender<Progress>) -> Result<()> {
        let mut pause = FIRST_LOOK;
        let mut wanted = true;
        loop {
            let jobs = self.call("query-jobs", json!({})).await?;
            let jobs: Vec<Job> =
                serde_json::from_value(jobs).while_doing(|| "reading QEMU's answer".into())?;
            let job = jobs.into_iter().find(|job| job.id == self.node());
            let job = job.ok_or_else(|| Error::system("QEMU has forgotten the copy"))?;
            if job.status == "concluded" {
                return match job.error {
                    _ if !wanted => Err(Error::usage("nobody waits for the copy any more")),
                    Some(error) => Err(Error::system(format!("QEMU could not copy it: {error}"))
                        .help("see that there is room for it: `df`")),
                    None => Ok(()),
                };
            }
            let progress = Progress { done: job.current_progress, total: job.total_progress };
            if wanted && tell.send(progress).await.is_err() {
                wanted = false;
                self.call("job-cancel", json!({ "id": self.node() })).await?;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LOOKS);
        }
    }
}

/// How a guest's file systems are at rest.
enum Rest {
    /// It has ended.
    Off,
    Ours(agent::Frozen),
    /// By QEMU's agent, which may have failed.
    Qemus(Agent, Result<u64>),
    /// Not at all.
    None(Error),
}

impl Rest {
    /// How many are.
    fn count(&self) -> Result<u64, &Error> {
        match self {
            Self::Off => Ok(0),
            Self::Ours(frozen) => Ok(frozen.count),
            Self::Qemus(_, frozen) => frozen.as_ref().copied(),
            Self::None(why) => Err(why),
        }
    }

    /// They go on.
    async fn end(self) -> Result<()> {
        match self {
            Self::Ours(frozen) => frozen.thaw().await,
            Self::Qemus(mut agent, frozen) => agent.thaw_after(&frozen).await,
            Self::Off | Self::None(_) => Ok(()),
        }
    }
}
