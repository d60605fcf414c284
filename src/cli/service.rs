//! `pavo service`

use clap::{Args, Subcommand};

use super::out::{Column, OutputArgs};
use super::{App, daemon, duration};
use crate::error::{Error, Result};
use crate::model::api::{Service as Daemon, Services};
use crate::ops::book::now;

/// Look at what runs for the site
#[derive(Debug, Subcommand)]
pub enum Service {
    List(List),
}

/// List the daemons, their versions, and which of them is active
#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    format: OutputArgs,
}

impl Service {
    pub fn run(self, app: &App) -> Result<u8> {
        let Self::List(list) = self;
        let remote = daemon::find(app)?.ok_or_else(|| {
            Error::not_found("there is no daemon").help("start one: `systemctl start pavo-daemon`")
        })?;
        let all: Services = app.block_on(remote.get("/v1/services", &()))?;
        app.out.list(
            list.format,
            &all.services,
            &[
                Column { title: "SERVICE", text: |it: &Daemon| it.kind.clone() },
                Column { title: "HOST", text: |it: &Daemon| it.host.clone() },
                Column { title: "VERSION", text: |it: &Daemon| it.version.clone() },
                Column {
                    title: "STATE",
                    text: |it: &Daemon| if it.active { "active" } else { "waiting" }.into(),
                },
                Column {
                    title: "FOR",
                    text: |it: &Daemon| duration(now().saturating_sub(it.begun)),
                },
                Column { title: "PID", text: |it: &Daemon| it.pid.to_string() },
            ],
        )?;
        Ok(0)
    }
}
