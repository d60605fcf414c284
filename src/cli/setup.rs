//! `pavo internal setup`: root's part of clusters on this host.

use std::io::Read;
use std::path::Path;

use clap::Subcommand;

use super::App;
use super::internal::stdin;
use crate::error::{Context, Error, Kind, Result};
use crate::ops::setup::ask::{Ask, MAX_ASK};
use crate::ops::setup::{SITE_DIR, create, delete, guard, init, site_config, sweep};
use crate::ops::site;
use crate::ops::site_store::{Persons, prepare};
use crate::store::secret::SiteKey;

/// Root's part of clusters on this host
#[derive(Debug, Subcommand)]
pub enum Setup {
    /// Make this host ready for clusters: once, and at each boot
    Init,
    /// Make what the VMs of a step need; the ask is on standard input
    Create,
    /// Remove what `create` made for the same ask
    Delete,
    /// Remove what no living step owns
    Sweep,
    /// Prepare the site's etcd: users, roles, authentication, the site's key; safe to run
    /// again
    Store {
        /// Nodes may not make etcd's users: run `internal setup person NAME` for each person
        #[arg(long)]
        closed: bool,
    },
    /// Hold the responders of a cluster
    #[command(hide = true)]
    Guard,
}

impl Setup {
    pub fn run(self, app: &App) -> Result<u8> {
        if app.env.uid != 0 {
            return Err(Error::usage("`internal setup` is for root")
                .help("Slurm's plugin runs it; by hand, as root: `pavo internal setup sweep`"));
        }
        match &self {
            Self::Init => app.block_on(init()).map(|()| 0),
            Self::Create => self.for_plugin(app, app.block_on(async { create(&ask()?).await })),
            Self::Delete => app.block_on(async { delete(&ask()?).await }).map(|()| 0),
            Self::Sweep => {
                for owner in app.block_on(sweep())? {
                    app.out.status(&format!("Removed what job {owner} had left"));
                }
                Ok(0)
            }
            Self::Store { closed } => self.store(app, *closed),
            Self::Guard => {
                let stdin = stdin()?;
                app.block_on(async { guard(stdin).await }).map(|()| 0)
            }
        }
    }

    fn store(&self, app: &App, closed: bool) -> Result<u8> {
        let etcd = site_config()?.batch.etcd.ok_or_else(|| {
            Error::config("batch.yaml names no etcd").help("add `etcd-servers` and its settings")
        })?;
        let persons = if closed { Persons::MadeByAdministrator } else { Persons::MadeByNodes };
        let dir = Path::new(SITE_DIR);
        let report = app.block_on(async {
            prepare(&site::as_administrator_to_be(&etcd), persons, site::keep_password).await
        })?;
        let (_, new_key) = SiteKey::ensure(dir)?;
        for line in &report.done {
            app.out.status(line);
        }
        if new_key {
            app.out.status("made the site's key: /etc/pavo/site.key and site.pub");
        }
        if report.done.is_empty() && !new_key {
            app.out.status("everything was there already");
        }
        Ok(0)
    }

    /// The plugin hands to the user what it reads on standard output.
    fn for_plugin(&self, app: &App, outcome: Result<()>) -> Result<u8> {
        match outcome {
            Ok(()) => Ok(0),
            Err(error) => {
                app.out.data(&(error.report() + "\n"))?;
                Ok(error.kind().exit_code())
            }
        }
    }
}

/// The ask on standard input.
fn ask() -> Result<Ask> {
    let mut text = String::new();
    let read = std::io::stdin().take(MAX_ASK as u64 + 1).read_to_string(&mut text);
    read.while_doing(|| "reading the plugin's ask".into())?;
    if text.len() > MAX_ASK {
        return Err(Error::new(Kind::Usage, "the plugin's ask is too long"));
    }
    Ask::parse(&text)
}
