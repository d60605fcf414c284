//! `pavo forward` and `pavo nc`

use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::App;
use super::job::{JobSelector, one_vm};
use crate::error::{Context, Error, Kind, Result};
use crate::model::vmset::VmSet;
use crate::ops::forward::{self, Listening};
use crate::ops::reach::{Reach, reach};
use crate::vm::control::{Client, Connection};

/// How long the VM's process may take to answer again, before the VM counts as ended.
const AGAIN: Duration = Duration::from_secs(1);

/// Let ports of this machine lead to ports of a VM
///
/// `pavo forward vm0 8080:80` listens at port 8080 of this machine, where only programs of
/// this machine get to (127.0.0.1), and connects each caller to port 80 of vm0. A local port 0
/// means one that is free; each is printed. It goes on until Ctrl-C, or the VM's end.
///
/// It works from wherever the cluster is seen, also for a VM on another host: connections go
/// through the cluster's own secure channel, and nothing is published. At 127.0.0.1 only your
/// own programs are let in, other users' of the machine are not. Where an address is given
/// (`0.0.0.0:8080:80`), whoever reaches it gets to the guest.
#[derive(Debug, Args)]
pub struct Forward {
    #[command(flatten)]
    job: JobSelector,

    /// The VM
    #[arg(value_name = "VM")]
    vm: VmSet,

    /// `[ADDRESS:]LOCAL:PORT`, a port here and a TCP port of the guest
    #[arg(value_name = "LOCAL:PORT", required = true)]
    forwards: Vec<forward::Forward>,
}

/// Connect to a TCP port of a VM
///
/// Standard input goes to the guest, what it says to standard output. Programs that take
/// such a command reach VMs without a published port:
/// `ssh -o ProxyCommand='pavo nc %h %p' root@vm0`.
#[derive(Debug, Args)]
pub struct Nc {
    #[command(flatten)]
    job: JobSelector,

    /// The VM
    #[arg(value_name = "VM")]
    vm: VmSet,

    /// The guest's port
    #[arg(value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
}

impl Forward {
    pub fn run(self, app: &App) -> Result<u8> {
        app.block_on(async {
            let (known, job) = self.job.find(app).await?;
            let rank = one_vm(&self.vm, &job)?;
            let serve = async {
                let way = Arc::new(reach(known.store(), &job, rank).await?);
                self.serve(app, &way, rank).await
            };
            serve.await.while_doing(|| format!("forwarding ports to vm{rank}"))?;
            Ok(0)
        })
    }

    async fn serve(self, app: &App, way: &Arc<Reach>, rank: u32) -> Result<()> {
        // A VM that is not there is said before anything listens.
        let end = way.connect().await?;
        let (trouble, troubles) = mpsc::channel(1);
        let (mut ports, mut lines) = (JoinSet::new(), String::new());
        for forward in self.forwards {
            let listening = Listening::bind(forward).await?;
            lines += &format!("{} -> vm{rank}:{}\n", listening.address()?, forward.port);
            ports.spawn(listening.serve(way.clone(), trouble.clone()));
        }
        app.out.data(&lines)?;
        until_over(app, way, rank, end, troubles).await
    }
}

/// Until Ctrl-C, or the VM's end, which `vm` sees; says meanwhile what goes wrong.
pub(super) async fn until_over(
    app: &App,
    way: &Reach,
    rank: u32,
    vm: Client,
    mut troubles: mpsc::Receiver<Error>,
) -> Result<()> {
    let listen = |kind| signal(kind).while_doing(|| "listening for signals".into());
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut end = Box::pin(vm.attend());
    let mut said = String::new();
    loop {
        tokio::select! {
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
            _ = &mut end => {
                end = Box::pin(still_there(way, rank).await?.attend());
            }
            Some(error) = troubles.recv() => {
                // A program that tries again and again is told of once.
                let report = error.report();
                if report != said {
                    app.out.warn(report.strip_prefix("error: ").unwrap_or(&report));
                    said = report;
                }
            }
        }
    }
}

/// A connection that has ended may have been the network's fault.
async fn still_there(way: &Reach, rank: u32) -> Result<Client> {
    tokio::time::sleep(AGAIN).await;
    way.connect().await.map_err(|error| {
        Error::new(Kind::NotFound, format!("vm{rank} has ended, or the way to it")).because(error)
    })
}

impl Nc {
    pub fn run(self, app: &App) -> Result<u8> {
        app.block_on(async {
            let (known, job) = self.job.find(app).await?;
            let rank = one_vm(&self.vm, &job)?;
            let way = reach(known.store(), &job, rank).await?;
            pump(app, way.connect().await?.connect_guest(self.port).await?).await?;
            Ok(0)
        })
    }
}

/// Until the guest has nothing more to say.
async fn pump(app: &App, guest: Box<dyn Connection>) -> Result<()> {
    let (mut from, mut to) = tokio::io::split(guest);
    let mut stdin = super::terminal::input()?;
    let (mut typed, mut said) = (vec![0; 16 << 10], vec![0; 16 << 10]);
    let hear = async {
        loop {
            match from.read(&mut said).await {
                Ok(0) | Err(_) => return Ok(()),
                Ok(count) => app.out.raw(&said[..count])?,
            }
        }
    };
    // Beside the other, which must go on while the guest takes nothing: it may wait for us.
    let tell = async {
        let mut open = true;
        while open {
            let count = stdin.read(&mut typed).await;
            let count = count.while_doing(|| "reading standard input".into())?;
            let sent = async {
                if count == 0 {
                    return to.shutdown().await;
                }
                to.write_all(&typed[..count]).await?;
                to.flush().await
            };
            // A guest that takes no more may still have something to say.
            open = sent.await.is_ok() && count > 0;
        }
        std::future::pending().await
    };
    tokio::select! {
        heard = hear => heard,
        told = tell => told,
    }
}
