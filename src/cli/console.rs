//! `pavo console`

use std::time::Duration;

use clap::Args;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

use super::App;
use super::job::{JobSelector, one_vm};
use super::terminal::RawTerminal;
use crate::error::{Context, Result};
use crate::model::vmset::VmSet;
use crate::ops::reach::{Reach, reach};
use crate::vm::console;
use crate::vm::control::Viewer;

/// Ctrl-C, as a raw terminal sends it.
const CTRL_C: u8 = 3;
/// Three of them within this time leave the console.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);
/// How much of the past one sees when one comes: about a screen.
const REPLAY: usize = 2000;

/// Open the serial console of a VM, or show what it has said
///
/// Leave it with three times Ctrl-C within two seconds. What the guest wrote before is in
/// the log, from the first byte on.
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
                let vm = reach(known.store(), &job, rank).await?;
                match (self.log, self.follow) {
                    (false, false) => attach(app, &vm, rank).await,
                    (_, follow) => show_log(app, &vm, follow).await,
                }
            };
            show.await.while_doing(|| format!("opening the console of vm{rank}"))?;
            Ok(0)
        })
    }
}

/// Prints the log; if `follow`, goes on until the VM ends.
async fn show_log(app: &App, vm: &Reach, follow: bool) -> Result<()> {
    if !follow {
        return app.out.data(&String::from_utf8_lossy(&vm.log().await?));
    }
    let mut stream = vm.connect().await?.console(console::LOG as usize).await?.stream;
    let mut said = [0; 8192];
    loop {
        match stream.read(&mut said).await {
            Ok(0) | Err(_) => return Ok(()),
            Ok(count) => app.out.raw(&said[..count])?,
        }
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
    app.out.status(&format!("Console of vm{rank}; leave with three times Ctrl-C."));
    let raw = RawTerminal::new();
    let outcome = pump(app, viewer).await;
    drop(raw);
    app.out.status("");
    outcome
}

async fn pump(app: &App, viewer: Viewer) -> Result<()> {
    let (mut from, mut to) = tokio::io::split(viewer.stream);
    // tokio's own standard input would keep a thread that cannot be stopped.
    let mut stdin = super::terminal::input()?;
    let mut leaving = Leaving::default();
    let (mut typed, mut said) = ([0; 1024], [0; 8192]);
    loop {
        tokio::select! {
            count = from.read(&mut said) => match count {
                Ok(0) | Err(_) => return Ok(()),
                Ok(count) => app.out.raw(&said[..count])?,
            },
            count = stdin.read(&mut typed) => {
                let count = count.while_doing(|| "reading the terminal".into())?;
                if count == 0 {
                    return drain(app, from).await;
                }
                if leaving.typed(&typed[..count], Instant::now()) {
                    return Ok(());
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
    while let Ok(Ok(count @ 1..)) = tokio::time::timeout(moment, from.read(&mut said)).await {
        app.out.raw(&said[..count])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
