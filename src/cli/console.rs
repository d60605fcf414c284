//! `pavo console`

use std::time::Duration;

use clap::Args;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::App;
use super::job::{JobSelector, one_vm};
use super::tame::{Tamer, Wild};
use super::terminal::RawTerminal;
use crate::error::{Context, Result};
use crate::model::job::{VmState, VmStatus};
use crate::model::vmset::VmSet;
use crate::ops::reach::{Reach, reach, reach_vm};
use crate::vm::console;
use crate::vm::control::Viewer;

/// Ctrl-C, as a raw terminal sends it.
const CTRL_C: u8 = 3;
/// Three of them within this time leave the console.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);
/// How long after a console's end its VM may still say why.
const LAST_NEWS: Duration = Duration::from_secs(1);
/// How much of the past one sees when one comes: about a screen.
const REPLAY: usize = 2000;

/// Open the serial console of a VM, or show what it has said
///
/// Leave it with three times Ctrl-C within two seconds. What the guest wrote before is in
/// the log, from the first byte on.
///
/// When the guest powers off the console stays, and says so on standard error: it goes on when
/// `pavo reset` starts the guest again. It ends with the VM.
#[derive(Debug, Args)]
pub struct Console {
    #[command(flatten)]
    job: JobSelector,

    /// Print what the console has said so far (the newest MiB)
    #[arg(short, long)]
    log: bool,

    /// Go on printing what it says
    #[arg(short, long)]
    follow: bool,

    /// The VM
    #[arg(value_name = "VM", default_value = "vm0")]
    vm: VmSet,
}

impl Console {
    pub fn run(self, app: &App) -> Result<u8> {
        app.block_on(async {
            let (known, job) = self.job.find(app).await?;
            let rank = one_vm(&self.vm, &job)?;
            let show = async {
                // A log outlives its VM.
                let vm = match (self.log, job.vms.iter().find(|vm| vm.rank == rank)) {
                    (true, Some(vm)) => reach_vm(known.store(), &job, vm).await?,
                    _ => reach(known.store(), &job, rank).await?,
                };
                match (self.log, self.follow) {
                    (false, false) => attach(app, &vm, rank).await,
                    (_, follow) => show_log(app, &vm, rank, follow).await,
                }
            };
            show.await.while_doing(|| format!("opening the console of vm{rank}"))?;
            Ok(0)
        })
    }
}

/// Prints the log; if `follow`, goes on until the VM ends.
async fn show_log(app: &App, vm: &Reach, rank: u32, follow: bool) -> Result<()> {
    let mut tamer = app.out.stdout_is_terminal().then(|| Tamer::new(Wild::Dropped));
    if !follow {
        let log = vm.log().await?;
        return app.out.raw(&tamer.as_mut().map_or(log.clone(), |tamer| tamer.take(&log)));
    }
    let mut stream = vm.connect().await?.console(console::LOG as usize).await?.stream;
    let mut fate = Fate::of(vm).await?;
    let mut said = [0; 8192];
    loop {
        tokio::select! {
            count = stream.read(&mut said) => match count {
                Ok(0) | Err(_) => {
                    app.out.status(&fate.end(rank).await);
                    return Ok(());
                }
                Ok(count) => match &mut tamer {
                    Some(tamer) => app.out.raw(&tamer.take(&said[..count]))?,
                    None => app.out.raw(&said[..count])?,
                },
            },
            Some(news) = fate.next(rank) => app.out.status(&news),
        }
    }
}

/// What becomes of a VM while its console is looked at.
struct Fate {
    changes: mpsc::Receiver<VmStatus>,
    last: VmStatus,
    /// Whether what it was at first is still to be said.
    new: bool,
    _watching: JoinSet<()>,
}

impl Fate {
    async fn of(vm: &Reach) -> Result<Self> {
        let mut client = vm.connect().await?;
        let last = client.status().await?;
        let (tell, changes) = mpsc::channel(1);
        let mut watching = JoinSet::new();
        let mut known = last.clone();
        watching.spawn(async move {
            // A process of an older release tells nothing.
            while let Ok(status) = client.changed(&known).await {
                if status != known {
                    known = status.clone();
                    if tell.send(status).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Self { changes, last, new: true, _watching: watching })
    }

    /// What is to be said, when there is something; `None` once nothing more can come.
    async fn next(&mut self, rank: u32) -> Option<String> {
        loop {
            let before = if std::mem::take(&mut self.new) {
                VmState::Running
            } else {
                let status = self.changes.recv().await?;
                std::mem::replace(&mut self.last, status).state
            };
            if let Some(news) = news(rank, before, &self.last) {
                return Some(news);
            }
        }
    }

    /// What is to be said when its console has ended.
    async fn end(&mut self, rank: u32) -> String {
        let rest = async {
            while let Some(status) = self.changes.recv().await {
                self.last = status;
            }
        };
        // The way to it may have ended instead.
        let known = timeout(LAST_NEWS, rest).await.is_ok();
        let VmStatus { state, detail, .. } = &self.last;
        match (*state > VmState::Off, detail.is_empty()) {
            (true, false) => format!("vm{rank} has ended: {detail}"),
            (true, true) => format!("vm{rank} has ended"),
            (false, _) if known => format!("vm{rank} has ended, or the way to it"),
            (false, _) => format!("The console of vm{rank} has ended"),
        }
    }
}

/// What a change of a VM's state means to who looks at its console.
fn news(rank: u32, before: VmState, now: &VmStatus) -> Option<String> {
    let why = || match &*now.detail {
        "" => String::new(),
        detail => format!(" ({detail})"),
    };
    match now.state {
        VmState::Off => Some(format!("vm{rank} powered off; `pavo reset vm{rank}` starts it")),
        VmState::Paused => {
            Some(format!("vm{rank} stands still{}; `pavo resume vm{rank}` lets it go on", why()))
        }
        state if state.is_up() && matches!(before, VmState::Off | VmState::Paused) => {
            Some(format!("vm{rank} runs"))
        }
        _ => None,
    }
}

/// Counts Ctrl-C: true at the third within [`LEAVE_WITHIN`].
#[derive(Default)]
struct Leaving(Vec<Instant>);

impl Leaving {
    fn typed(&mut self, bytes: &[u8], now: Instant) -> bool {
        for byte in bytes {
            if *byte == CTRL_C {
                self.0.push(now);
            } else {
                self.0.clear();
            }
        }
        self.0.retain(|at| now.duration_since(*at) <= LEAVE_WITHIN);
        self.0.len() >= 3
    }
}

async fn attach(app: &App, vm: &Reach, rank: u32) -> Result<()> {
    let viewer = vm.connect().await?.console(REPLAY).await?;
    let mut fate = Fate::of(vm).await?;
    app.out.status(&format!("Console of vm{rank}; leave with three times Ctrl-C."));
    let raw = RawTerminal::new();
    let edge = if raw.is_raw() { "\r" } else { "" };
    let told = |news: String| app.out.status(&format!("{edge}\n{news}{edge}"));
    let outcome = pump(app, viewer, (&mut fate, rank), told).await;
    drop(raw);
    app.out.status("");
    if outcome? {
        app.out.status(&fate.end(rank).await);
    }
    Ok(())
}

/// Returns whether it was the VM's side that ended.
async fn pump(
    app: &App,
    viewer: Viewer,
    (fate, rank): (&mut Fate, u32),
    told: impl Fn(String),
) -> Result<bool> {
    let (mut from, mut to) = tokio::io::split(viewer.stream);
    // tokio's own standard input would keep a thread that cannot be stopped.
    let mut stdin = super::terminal::input()?;
    let mut leaving = Leaving::default();
    let (mut typed, mut said) = ([0; 1024], [0; 8192]);
    loop {
        tokio::select! {
            count = from.read(&mut said) => match count {
                Ok(0) | Err(_) => return Ok(true),
                Ok(count) => app.out.raw(&said[..count])?,
            },
            Some(news) = fate.next(rank) => told(news),
            count = stdin.read(&mut typed) => {
                let count = count.while_doing(|| "reading the terminal".into())?;
                if count == 0 {
                    return drain(app, from).await.map(|()| false);
                }
                if leaving.typed(&typed[..count], Instant::now()) {
                    return Ok(false);
                }
                let sent = async {
                    to.write_all(&typed[..count]).await?;
                    to.flush().await
                };
                sent.await.while_doing(|| "writing to the guest".into())?;
            }
        }
    }
}

/// Input has ended (a script's): give the guest a moment to answer.
async fn drain(app: &App, mut from: impl AsyncRead + Unpin) -> Result<()> {
    let mut said = [0; 8192];
    let moment = Duration::from_secs(1);
    while let Ok(Ok(count @ 1..)) = timeout(moment, from.read(&mut said)).await {
        app.out.raw(&said[..count])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_concerns_the_console_is_said_and_nothing_else() {
        let at = |state, detail: &str| VmStatus { state, since: 0, detail: detail.into() };
        let said = |before, state, detail| news(0, before, &at(state, detail));
        let off = said(VmState::Running, VmState::Off, "the guest powered off").unwrap();
        assert_eq!(off, "vm0 powered off; `pavo reset vm0` starts it");
        assert_eq!(said(VmState::Off, VmState::Running, "").unwrap(), "vm0 runs");
        let full = said(VmState::Ssh, VmState::Paused, "its disk is full").unwrap();
        assert!(full.starts_with("vm0 stands still (its disk is full); "), "{full}");
        for quiet in [VmState::Ssh, VmState::Running, VmState::Stopping] {
            assert_eq!(said(VmState::Running, quiet, ""), None);
        }
    }

    #[test]
    fn three_quick_interrupts_leave_and_slow_or_mixed_ones_do_not() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let mut quick = Leaving::default();
        assert!(!quick.typed(&[CTRL_C, CTRL_C], start));
        assert!(quick.typed(&[CTRL_C], after(1900)));
        let mut slow = Leaving::default();
        assert!(!slow.typed(&[CTRL_C, CTRL_C], start));
        assert!(!slow.typed(&[CTRL_C], after(2100)));
        let mut mixed = Leaving::default();
        assert!(!mixed.typed(&[CTRL_C, CTRL_C, b'x', CTRL_C], start));
    }
}
