//! `pavo display`

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use clap::Args;
use tempfile::NamedTempFile;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::App;
use super::forward::until_over;
use super::job::{JobSelector, one_vm};
use crate::error::{Context, Error, Result};
use crate::model::job::JobRecord;
use crate::model::vmset::VmSet;
use crate::ops::forward::Listening;
use crate::ops::reach::reach;
use crate::vm::display::Offer;

/// What shows both protocols, of the package virt-viewer.
const VIEWER: &str = "remote-viewer";

/// Show the screen of a VM
///
/// Its template must have `remote-display: vnc` or `spice`. The screen is seen at a port of
/// this machine (127.0.0.1), to which only your own programs get, through the cluster's own
/// secure channel: also that of a VM on another host, and nothing is published.
///
/// On a desktop `remote-viewer` is started, and all ends with it. Elsewhere, or with
/// `--print`, a file for such a viewer is printed, with address, port and password; the port
/// is served until Ctrl-C, or the VM's end. From a laptop: `ssh -L 5900:127.0.0.1:5900
/// login pavo display --print --port 5900 vm0`.
#[derive(Debug, Args)]
pub struct Display {
    #[command(flatten)]
    job: JobSelector,

    /// Start no viewer, print a file for one
    #[arg(short, long, conflicts_with = "viewer")]
    print: bool,

    /// Start this viewer, which is given such a file
    #[arg(long, value_name = "PROGRAM", num_args = 0..=1, default_missing_value = VIEWER)]
    #[arg(require_equals = true)]
    viewer: Option<PathBuf>,

    /// The local port [default: one that is free]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    port: u16,

    /// The VM
    #[arg(value_name = "VM", default_value = "vm0")]
    vm: VmSet,
}

impl Display {
    pub fn run(self, app: &App) -> Result<u8> {
        app.block_on(async {
            let (known, job) = self.job.find(app).await?;
            let rank = one_vm(&self.vm, &job)?;
            let show = async {
                let way = Arc::new(reach(known.store(), &job, rank).await?);
                let offer = way.connect().await?.display().await?;
                let end = way.connect().await?;
                let listening = Listening::bind_screen(self.port).await?;
                let port = listening.address()?.port();
                let (trouble, troubles) = mpsc::channel(1);
                let mut serving = JoinSet::new();
                serving.spawn(listening.serve(way.clone(), trouble));
                let text = viewer_file(&offer, port, &job, rank);
                let over = until_over(app, &way, rank, end, troubles);
                match self.start(app, &text)? {
                    Some(viewer) => viewer.show(over).await,
                    None => {
                        app.out.data(&text)?;
                        app.out.status(&format!("Serving the screen of vm{rank} until Ctrl-C."));
                        over.await.map(|()| 0)
                    }
                }
            };
            show.await.while_doing(|| format!("showing the screen of vm{rank}"))
        })
    }

    /// Starts the viewer that is meant; `None`, where there is to be none.
    fn start(&self, app: &App, text: &str) -> Result<Option<Viewer>> {
        let program = match &self.viewer {
            Some(program) => program,
            None if !self.print && app.env.graphical => Path::new(VIEWER),
            None => return Ok(None),
        };
        let doing = || format!("starting `{}`", program.display());
        match Viewer::start(program, &app.env.tmp, text) {
            Ok(viewer) => Ok(Some(viewer)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => match &self.viewer {
                Some(_) => Err(Error::system("there is no such program")
                    .help("install it (Debian: virt-viewer), or use `--print`"))
                .while_doing(doing),
                None => Ok(None),
            },
            Err(error) => Err(error).while_doing(doing),
        }
    }
}

/// A viewer that runs, and the file that it was given: only its user may read it.
struct Viewer {
    child: tokio::process::Child,
    _file: NamedTempFile,
}

impl Viewer {
    fn start(program: &Path, tmp: &Path, text: &str) -> std::io::Result<Self> {
        let mut file = tempfile::Builder::new().prefix("pavo-").suffix(".vv").tempfile_in(tmp)?;
        file.write_all(text.as_bytes())?;
        let mut command = tokio::process::Command::new(program);
        command.arg(file.path()).stdin(Stdio::null()).kill_on_drop(true);
        Ok(Self { child: command.spawn()?, _file: file })
    }

    /// Until it or the VM ends; returns its exit code.
    async fn show(mut self, over: impl Future<Output = Result<()>>) -> Result<u8> {
        tokio::select! {
            status = self.child.wait() => {
                let status = status.while_doing(|| "waiting for the viewer".into())?;
                Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
            }
            over = over => over.map(|()| 0),
        }
    }
}

/// What `remote-viewer` reads.
fn viewer_file(offer: &Offer, port: u16, job: &JobRecord, rank: u32) -> String {
    let (protocol, password) = (offer.protocol.as_str(), &offer.password);
    let id = job.owner.job;
    format!(
        "[virt-viewer]\ntype={protocol}\nhost=127.0.0.1\nport={port}\npassword={password}\n\
         title=vm{rank} of job {id}\n"
    )
}
