//! `pavo internal setup`: root's part of clusters on this host.

use std::io::Read;
use std::path::Path;
use std::time::SystemTime;

use clap::Subcommand;

use super::internal::stdin;
use super::out::{Column, OutputArgs};
use super::{App, duration};
use crate::error::{Context, Error, Kind, Result};
use crate::model::vmset;
use crate::ops::setup::ask::{Ask, MAX_ASK};
use crate::ops::setup::{self, ClusterHere, NodeStatus, Patience, Preview, Switch};
use crate::ops::setup::{SITE_DIR, create, delete, guard, init, lost, site_config, sweep};
use crate::ops::site;
use crate::ops::site_store::{self, Persons, prepare};
use crate::store::etcd::Etcd;
use crate::store::secret::SiteKey;

/// Root's part of clusters on this host
#[derive(Debug, Subcommand)]
pub enum Setup {
    /// Make this host ready for clusters: once, and at each boot
    Init(DryRun),
    /// Make what the VMs of a step need; the ask is on standard input
    Create(DryRun),
    /// Remove what `create` made for the same ask
    Delete(DryRun),
    /// Remove all that pavo has made on this host, and what `init` has made
    Cleanup {
        /// Also under clusters that run
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        dry: DryRun,
    },
    /// Show what pavo holds on this host
    Status(OutputArgs),
    /// Let the daemon on this host use the site's etcd: before it is started for the first time
    Daemon,
    /// Remove what no living step owns
    Sweep {
        /// At the site: free VXLAN keys of jobs that are gone, on hosts that are down
        #[arg(long)]
        ids: bool,
        #[command(flatten)]
        dry: DryRun,
    },
    /// Prepare the site's etcd: users, roles, authentication, the site's key; safe to run
    /// again
    Store,
    /// Hold the responders of a cluster
    #[command(hide = true)]
    Guard,
}

/// Looking before doing.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct DryRun {
    /// Show what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    output: OutputArgs,
}

impl Setup {
    pub fn run(self, app: &App) -> Result<u8> {
        if app.env.uid != 0 {
            return Err(Error::usage("`internal setup` is for root")
                .help("Slurm's plugin runs it; by hand, as root: `pavo internal setup sweep`"));
        }
        if let Some((previews, output)) = self.preview(app)? {
            return show(app, output, &previews);
        }
        match &self {
            Self::Init(_) => {
                app.block_on(init())?.iter().for_each(|warning| app.out.warn(warning));
                Ok(0)
            }
            Self::Create(_) => self.for_plugin(app, app.block_on(async { create(&ask()?).await })),
            Self::Delete(_) => app.block_on(async { delete(&ask()?).await }).map(|()| 0),
            Self::Cleanup { force, .. } => app.block_on(setup::cleanup(*force)).map(|()| 0),
            Self::Status(output) => describe(app, *output, &setup::status()?),
            Self::Sweep { ids: true, dry } => free_ids(app, dry.dry_run),
            Self::Sweep { .. } => {
                for owner in app.block_on(sweep(Patience::Long))? {
                    app.out.status(&format!("Removed what job {owner} had left"));
                }
                Ok(0)
            }
            Self::Store => self.store(app),
            Self::Daemon => Self::daemon(app),
            Self::Guard => {
                let stdin = stdin()?;
                app.block_on(async { guard::main(stdin).await }).map(|()| 0)
            }
        }
    }

    /// What would be done, where only that is asked for.
    fn preview(&self, app: &App) -> Result<Option<(Vec<Preview>, OutputArgs)>> {
        let dry = match self {
            Self::Init(dry) | Self::Create(dry) | Self::Delete(dry) => dry,
            Self::Cleanup { dry, .. } | Self::Sweep { dry, ids: false } => dry,
            _ => return Ok(None),
        };
        if !dry.dry_run {
            return Ok(None);
        }
        let previews = match self {
            Self::Init(_) => vec![setup::init_preview()?],
            Self::Create(_) => {
                vec![app.block_on(async { setup::create_preview(&ask()?).await })?]
            }
            Self::Delete(_) => setup::delete_preview(&ask()?)?,
            Self::Cleanup { .. } => setup::cleanup_preview()?,
            _ => setup::sweep_preview()?,
        };
        Ok(Some((previews, dry.output)))
    }

    fn store(&self, app: &App) -> Result<u8> {
        let etcd = etcd()?;
        let dir = Path::new(SITE_DIR);
        let report = app.block_on(async {
            prepare(&site::as_administrator_to_be(&etcd), Persons::MadeByNodes, site::keep_password)
                .await
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

    fn daemon(app: &App) -> Result<u8> {
        let etcd = etcd()?;
        let state = super::daemon::load(app)?.state;
        let by_certificate = state.join("etcd.pem").exists();
        let made = app.block_on(async {
            let store = Etcd::connect(&site::as_administrator_to_be(&etcd)).await?;
            let secret = match by_certificate {
                true => None,
                false => Some(site::daemon_password(&state)?),
            };
            site_store::ensure_daemon(&store, secret.as_ref()).await
        })?;
        app.out.status(match made {
            true => "the daemon may use etcd: `systemctl enable --now pavo-daemon`",
            false => "everything was there already",
        });
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

fn show(app: &App, output: OutputArgs, previews: &[Preview]) -> Result<u8> {
    if output.output.is_some() {
        return app.out.list(output, previews, &[]).map(|()| 0);
    }
    for preview in previews {
        let lines: String =
            preview.lines().iter().map(|line| format!("{}: {line}\n", preview.owner)).collect();
        app.out.data(&lines)?;
    }
    Ok(0)
}

fn describe(app: &App, output: OutputArgs, status: &NodeStatus) -> Result<u8> {
    if output.output.is_some() {
        return app.out.record(output, status, &[]).map(|()| 0);
    }
    let columns: [Column<ClusterHere>; 7] = [
        Column { title: "job", text: |it| format!("{}.{}", it.job, it.step) },
        Column { title: "user", text: |it| it.user.clone() },
        Column { title: "vms", text: |it| vmset::fold(&it.vms) },
        Column { title: "for", text: |it| duration(age(it.since)) },
        Column {
            title: "switch",
            text: |it| match it.switch {
                Switch::None => "-".into(),
                Switch::Linux => "linux".into(),
                Switch::Ovs => "ovs".into(),
            },
        },
        Column { title: "step", text: |it| if it.keeper_alive { "runs" } else { "gone" }.into() },
        Column {
            title: "guard",
            text: |it| match it.guard_alive {
                Some(true) => "runs".into(),
                Some(false) => "gone".into(),
                None => "-".into(),
            },
        },
    ];
    app.out.list(OutputArgs::default(), &status.clusters, &columns)?;
    let texts = |title: &str, texts: &[String]| -> String {
        texts.iter().map(|text| format!("{title}: {text}\n")).collect()
    };
    app.out.data(&texts("node", &status.node))?;
    app.out.data(&texts("left", &status.leftovers))?;
    app.out.data(&texts("unreadable", &status.unreadable))?;
    app.out.data(&texts("keys in etcd", &status.pending)).map(|()| 0)
}

fn age(since: u64) -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now.as_secs().saturating_sub(since)
}

fn free_ids(app: &App, pretend: bool) -> Result<u8> {
    let etcd = etcd()?;
    let found = app.block_on(lost::free_ids(&etcd, pretend))?;
    for (owner, hosts) in &found.waiting {
        let hosts = hosts.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        app.out.warn(&format!(
            "job {owner} is gone, but not for {hosts}: `pavo internal setup sweep` there"
        ));
    }
    let verb = if pretend { "Would free" } else { "Freed" };
    for (owner, count) in &found.freed {
        app.out.status(&format!("{verb} {count} VXLAN keys of job {owner}"));
    }
    Ok(0)
}

fn etcd() -> Result<crate::config::Etcd> {
    site_config()?.batch.etcd.ok_or_else(|| {
        Error::config("batch.yaml names no etcd").help("add `etcd-servers` and its settings")
    })
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
