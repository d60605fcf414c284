//! `pavo internal`: what pavo starts of itself. Nobody types these.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use clap::Subcommand;

use super::App;
use crate::error::{Context, Result};
use crate::network::responder;

/// Parts of a running cluster
#[derive(Debug, clap::Args)]
pub struct Internal {
    #[command(subcommand)]
    part: Part,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Answer DHCP and DNS for a network's guests; standard input is the life line
    Responder,
}

impl Internal {
    pub fn run(self, _app: &App) -> Result<u8> {
        match self.part {
            Part::Responder => {
                let lifeline = lifeline()?;
                let doing = || "starting the event loop".to_owned();
                let mut runtime = tokio::runtime::Builder::new_current_thread();
                let runtime = runtime.enable_all().build().while_doing(doing)?;
                runtime.block_on(async {
                    let lifeline = tokio::net::UnixStream::from_std(lifeline);
                    responder::main(lifeline.while_doing(doing)?).await
                })?;
                Ok(0)
            }
        }
    }
}

/// Standard input, as the socket that it is.
fn lifeline() -> Result<UnixStream> {
    let doing = || "taking standard input as a socket".to_owned();
    let stdin = io::stdin().as_fd().try_clone_to_owned().while_doing(doing)?;
    let stream = UnixStream::from(stdin);
    stream.set_nonblocking(true).while_doing(doing)?;
    Ok(stream)
}
