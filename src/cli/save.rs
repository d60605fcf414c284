//! `pavo save`

use std::cell::RefCell;

use clap::Args;
use futures_util::{StreamExt, stream};

use super::App;
use super::copying::Copying;
use super::job::{JobSelector, ranks};
use crate::error::{Error, Kind, Result};
use crate::image::library::{Library, Resolved};
use crate::model::vmset::{VmSet, fold};
use crate::ops::reach::Pass;
use crate::ops::save::{Order, check_apart, name_of_one, prepare};
use crate::vm::save::{Progress, Saved};

/// How many VMs are saved at once: each is copied by its own host.
const AT_ONCE: usize = 16;

/// Save the disks of running VMs
///
/// A disk becomes the next revision of the image that the VM was started from, or a new image.
/// The VM runs on; it may also have halted or powered off. If pavo's agent or QEMU's runs in the guest,
/// its file systems are at rest for the moment that is saved; otherwise it is as if the power had
/// failed then, and that is said.
///
/// Several VMs are saved at the same time, each at a moment of its own, with `-d NAME` to images
/// called NAME-vm0, NAME-vm1 and so on. One that fails keeps no other from being saved.
#[derive(Debug, Args)]
pub struct Save {
    #[command(flatten)]
    job: JobSelector,

    /// A new image, `[REPO:]NAME`, instead of a revision of the VM's; of several VMs one each
    #[arg(short = 'd', long, value_name = "IMAGE")]
    dest: Option<String>,

    /// All of the disk, as an image that needs no other, not only what the VM has written
    #[arg(long)]
    full: bool,

    /// Fail unless the guest brings its file systems to rest
    #[arg(short = 's', long)]
    safe: bool,

    /// Which drive: 0 is the VM's disk; 1 is the first of its persistent ones, which goes
    /// whole to `-d`, or else becomes a revision of the image that its `backup` names
    #[arg(short = 'i', long, value_name = "N", default_value_t = 0)]
    drive_index: u32,

    /// The VM, or several, such as `vm[0-3]` or `all`
    #[arg(value_name = "VMS", default_value = "vm0")]
    vms: VmSet,
}

/// What came of it, by rank.
type Outcome = (u32, Result<(Resolved, Saved)>);

impl Save {
    pub fn run(self, app: &App) -> Result<u8> {
        let library = app.library(&super::config::load(app)?);
        let outcomes = app.block_on(self.save(app, &library));
        app.warn_of(&library);
        let outcomes = outcomes?;
        let all = outcomes.len();
        let mut failed = Vec::new();
        for (rank, outcome) in outcomes {
            match outcome {
                Ok((image, saved)) => self.tell(app, rank, &image, saved),
                Err(error) => failed.push(error),
            }
        }
        match failed.len() {
            0 => Ok(0),
            1 if all == 1 => Err(failed.remove(0)),
            count => {
                failed.iter().for_each(|error| app.out.error(&error.report()));
                Err(Error::new(Kind::Partial, format!("{count} of {all} VMs were not saved")))
            }
        }
    }

    async fn save(&self, app: &App, library: &Library) -> Result<Vec<Outcome>> {
        let (known, job) = self.job.find(app).await?;
        let ranks = ranks(&self.vms, &job)?;
        let dests: Vec<Option<String>> = match (&self.dest, ranks.len()) {
            (Some(dest), 1) => vec![Some(dest.clone())],
            (Some(dest), _) => ranks.iter().map(|rank| Some(name_of_one(dest, *rank))).collect(),
            (None, _) => vec![None; ranks.len()],
        };
        if self.dest.is_none() {
            check_apart(&job, &ranks, self.drive_index)?;
        }
        let order = |(rank, dest): (&u32, &'_ Option<String>)| Order {
            rank: *rank,
            drive: self.drive_index,
            dest: dest.clone(),
            full: self.full,
            safe: self.safe,
        };
        let orders: Vec<Order> = ranks.iter().zip(&dests).map(order).collect();
        let places = prepare(&job, library, &orders)?;
        let told = RefCell::new(Told::new(app, &ranks));
        let pass = Pass::default();
        let saves = places.into_iter().enumerate().map(|(index, place)| {
            let (told, pass, job, store) = (&told, &pass, &job, known.store());
            async move {
                let rank = place.rank;
                let mut tell = |progress| told.borrow_mut().hear(index, progress);
                (rank, place.save(store, job, pass, &mut tell).await)
            }
        });
        let saved = stream::iter(saves).buffer_unordered(AT_ONCE);
        let mut outcomes: Vec<Outcome> = saved.collect().await;
        outcomes.sort_by_key(|(rank, _)| *rank);
        Ok(outcomes)
    }

    fn tell(&self, app: &App, rank: u32, image: &Resolved, saved: Saved) {
        if let Some(trouble) = saved.trouble {
            let trouble = trouble.trim_start_matches("error: ");
            app.out.warn(&format!("the file systems of vm{rank} were not at rest: {trouble}"));
        }
        let (name, revision) = image.uri.rsplit_once('@').unwrap_or((&image.uri, ""));
        let revision = if revision.is_empty() { "" } else { &format!(" revision {revision}") };
        let drive = match self.drive_index {
            0 => "disk".to_owned(),
            index => format!("drive {index}"),
        };
        app.out.status(&format!("vm{rank} {drive} successfully saved to {name}{revision}"));
    }
}

/// How far all copies together are.
struct Told<'a> {
    copying: Copying<'a>,
    ranks: Vec<u32>,
    all: Vec<Progress>,
}

impl<'a> Told<'a> {
    fn new(app: &'a App, ranks: &[u32]) -> Self {
        let copying = Copying::new(&app.out, format!("Saving {}", fold(ranks)));
        Self { copying, ranks: ranks.to_vec(), all: vec![Progress::default(); ranks.len()] }
    }

    fn hear(&mut self, index: usize, progress: Progress) {
        if progress.total == 0 {
            let rank = self.ranks[index];
            return self.copying.waits(format!("Waiting for another save of vm{rank}"));
        }
        self.all[index] = progress;
        let sum = |of: fn(&Progress) -> u64| self.all.iter().map(of).sum();
        self.copying.at(Progress { done: sum(|it| it.done), total: sum(|it| it.total) });
    }
}
