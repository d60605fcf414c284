//! `pavo image cache`

use clap::{Args, Subcommand};

use super::{counted, date, size};
use crate::cli::App;
use crate::cli::out::{Column, OutputArgs};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::image::derive::Size;
use crate::image::library::Library;
use crate::ops::image_cache::{Fetched, ImageCache, Layer};

/// Look after the copies of images that this host keeps
///
/// With `cache: {path: …, size: …}` in repos.yaml a VM's host copies the layers of its image to
/// a disk of its own first, checks them by their hashes, and uses these copies from then on.
/// VMs that start at once share one copy; no more are kept than there is to be room for, and
/// what was not used for longest goes first. Each user has their own. On a site this is about
/// the host where it is run, such as `srun -w node1 pavo image cache list`.
#[derive(Debug, Args)]
pub(super) struct Cache {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    List(List),
    Fetch(Fetch),
    Delete(Delete),
    Gc(Gc),
}

impl Cache {
    pub(super) fn run(self, app: &App, config: &Config, library: &Library) -> Result<()> {
        let cache = ImageCache::of(config, library)?;
        match self.verb {
            Verb::List(verb) => verb.run(app, &cache),
            Verb::Fetch(verb) => verb.run(app, &cache),
            Verb::Delete(verb) => verb.run(app, &cache),
            Verb::Gc(verb) => verb.run(app, &cache),
        }
    }
}

/// List the copies, layer by layer
#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    output: OutputArgs,
}

impl List {
    fn run(self, app: &App, cache: &ImageCache) -> Result<()> {
        let columns: &[Column<Layer>] = &[
            Column { title: "layer", text: |row| row.hash.chars().take(12).collect() },
            Column { title: "size", text: |row| size(row.bytes) },
            Column { title: "used", text: |row| date(row.used) },
            Column { title: "in use", text: |row| if row.in_use { "yes" } else { "no" }.into() },
            Column { title: "images", text: |row| row.images.join(",") },
        ];
        app.out.list(self.output, &cache.list()?, columns)
    }
}

/// Copy an image to this host before it is needed
#[derive(Debug, Args)]
struct Fetch {
    #[arg(value_name = "IMAGE[@REVISION]")]
    image: String,
}

impl Fetch {
    fn run(self, app: &App, cache: &ImageCache) -> Result<()> {
        let image = self.image.escape_debug();
        app.out.progress(&format!("Copying {image}"));
        match cache.fetch(&self.image)? {
            Fetched::Here(bytes) => {
                app.out.status(&format!("{image} is on this host ({})", size(bytes)));
                Ok(())
            }
            Fetched::NoNeed => {
                app.out.status(&format!("{image} is as near as its copy would be"));
                Ok(())
            }
            Fetched::NoRoom => Err(Error::system(format!("there is no room for {image}"))
                .help("set a larger `size` in repos.yaml, or `pavo image cache gc --below SIZE`")),
        }
    }
}

/// Remove the copies of an image; those in use stay
#[derive(Debug, Args)]
struct Delete {
    #[arg(value_name = "IMAGE[@REVISION]")]
    image: String,
}

impl Delete {
    fn run(self, app: &App, cache: &ImageCache) -> Result<()> {
        let removed = cache.delete(&self.image)?;
        said(app, removed.count, removed.bytes);
        Ok(())
    }
}

/// Remove copies that were not used for longest, and what killed programs left
///
/// Those in use stay.
#[derive(Debug, Args)]
struct Gc {
    /// Until no more than this is left [default: the size in repos.yaml]
    #[arg(short = 'b', long, value_name = "SIZE")]
    below: Option<Size>,

    /// All of them
    #[arg(short, long, conflicts_with = "below")]
    clear: bool,
}

impl Gc {
    fn run(self, app: &App, cache: &ImageCache) -> Result<()> {
        let below = match self.below {
            _ if self.clear => Some(0),
            None => None,
            Some(Size::To(bytes)) => Some(bytes),
            Some(Size::By(_)) => {
                return Err(Error::usage("it is to be a size, not a difference").help("write `5G`"));
            }
        };
        let removed = cache.shrink(below)?;
        said(app, removed.count, removed.bytes);
        Ok(())
    }
}

fn said(app: &App, count: usize, bytes: u64) {
    let (copies, bytes) = (counted(count, "layer"), size(bytes));
    app.out.status(&format!("Removed the copies of {copies}, {bytes} freed"));
}
