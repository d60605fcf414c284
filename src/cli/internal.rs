//! `pavo internal`: what pavo starts of itself. Not for people.

use clap::Subcommand;

use super::App;
use crate::batch::slurm::Environment;
use crate::error::{Context, Result};
use crate::network::responder;
use crate::ops::{cell, rehearsal, task};
use crate::vm;

/// What pavo starts of itself
#[derive(Debug, Subcommand)]
pub enum Internal {
    /// Make the namespaces of a job
    Cell {
        #[arg(long)]
        rootless: bool,
    },
    /// The first process of a job's namespaces
    CellInit,
    /// One VM
    Run,
    /// One VM, as a task of a Slurm step
    Task {
        /// Leave SIGTERM to the launcher, who may want a checkpoint first
        #[arg(long)]
        led: bool,
    },
    Complete(super::live::Complete),
    /// Inside a Slurm job, start its cluster
    Launcher(Box<super::launcher::Launcher>),
    /// DHCP, DNS and published ports of one network
    Responder,
    /// Whether KVM runs guest code
    KvmProbe,
    /// Whether this machine can carry a cluster's network
    Rehearsal,
    /// Root's part of a cluster on this host
    #[command(subcommand)]
    Setup(super::setup::Setup),
}

impl Internal {
    pub fn run(self, app: &App) -> Result<u8> {
        match self {
            Self::Cell { rootless } => cell::outer(rootless)?,
            Self::CellInit => app.block_on(cell::init())?,
            Self::Run => app.block_on(async { vm::process::main(stdin()?).await })?,
            Self::Task { led } => app.block_on(async {
                use std::os::fd::AsFd;
                let input = std::io::stdin().as_fd().try_clone_to_owned();
                let input = input.while_doing(|| "opening standard input".into())?;
                let environment = Environment::new(app.env.slurm.iter().cloned());
                task::main(input, &environment, led).await
            })?,
            Self::Complete(verb) => return verb.run(app),
            Self::Launcher(verb) => return verb.run(app),
            Self::Responder => app.block_on(async {
                let stream = tokio::net::UnixStream::from_std(stdin()?);
                responder::main(stream.while_doing(|| "opening the life line".into())?).await
            })?,
            Self::Setup(verb) => return verb.run(app),
            Self::Rehearsal => {
                // Its one thread leaves before the runtime has others.
                let outcome = rehearsal::leave().and_then(|()| app.block_on(rehearsal::perform()));
                let answer = outcome.err().map(|error| error.to_wire());
                let text = serde_json::to_string(&answer).expect("an error is always valid JSON");
                app.out.data(&text)?;
            }
            Self::KvmProbe => {
                if let Err(why) = vm::kvm::probe_in_this_process() {
                    // Whoever started the probe reads it there.
                    app.out.status(&why);
                    return Ok(1);
                }
            }
        }
        Ok(0)
    }
}

/// Standard input, which is a socket to whoever started this process.
pub fn stdin() -> Result<std::os::unix::net::UnixStream> {
    use std::os::fd::AsFd;
    let doing = || "opening the socket on standard input".to_owned();
    let owned = std::io::stdin().as_fd().try_clone_to_owned().while_doing(doing)?;
    let stream = std::os::unix::net::UnixStream::from(owned);
    stream.set_nonblocking(true).while_doing(doing)?;
    Ok(stream)
}
