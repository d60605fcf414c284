//! `pavo image export`, `copy`, `resize` and `squash`

use std::path::PathBuf;

use clap::Args;

use super::size;
use crate::cli::App;
use crate::error::Result;
use crate::image::derive::Size;
use crate::image::header::Format;
use crate::image::library::Library;

/// Export an image to a file
///
/// The file stands alone, whatever layers the image has.
#[derive(Debug, Args)]
pub(super) struct Export {
    /// The format: qcow2, raw, vmdk, vdi, vpc or qed [default: by suffix, else raw]
    #[arg(short = 't', long = "fmt", value_name = "FORMAT")]
    format: Option<Format>,

    /// Replace the file if it exists
    #[arg(long)]
    force: bool,

    #[arg(value_name = "IMAGE[@REVISION]")]
    image: String,

    /// The file
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl Export {
    pub(super) fn run(self, app: &App, library: &Library) -> Result<()> {
        app.out.progress(&format!("Exporting {}", self.image.escape_debug()));
        let format = library.export(&self.image, &self.file, self.format, self.force)?;
        let (image, file) = (&self.image, self.file.display());
        app.out.status(&format!("Exported {image} to {file} ({})", format.as_str()));
        Ok(())
    }
}

/// Copy an image
///
/// The new image starts at revision 0 and has what the chosen revision has. Within a
/// repository the two share it; into another one it is copied, and checked.
#[derive(Debug, Args)]
pub(super) struct Copy {
    /// Which image; or the path (with a `/`) of a folder of the older form
    #[arg(value_name = "IMAGE[@REVISION]")]
    source: String,

    /// [REPO:]NAME of the new image
    #[arg(value_name = "DEST")]
    dest: String,
}

impl Copy {
    pub(super) fn run(self, app: &App, library: &Library) -> Result<()> {
        app.out.progress(&format!("Copying {}", self.source.escape_debug()));
        let made = library.copy(&self.source, &self.dest, &app.env.user)?;
        app.out.status(&format!("Copied {} to {made}", self.source));
        Ok(())
    }
}

/// Make an image's disk larger
///
/// That is a new revision. The guest still has to grow its partition and file system;
/// cloud-init does so when it starts.
#[derive(Debug, Args)]
pub(super) struct Resize {
    #[arg(value_name = "IMAGE[@REVISION]")]
    image: String,

    /// How large: `20G`, or `+5G` for so much more
    #[arg(value_name = "SIZE")]
    size: Size,
}

impl Resize {
    pub(super) fn run(self, app: &App, library: &Library) -> Result<()> {
        let made = library.resize(&self.image, self.size, &app.env.user)?;
        app.out.status(&format!("Resized to {} ({})", made.uri, size(made.virtual_size)));
        Ok(())
    }
}

/// Make an image need no layers below it
///
/// That is a new revision with the same disk, in one layer: reading it does not get slower
/// with every save, and older revisions may be deleted to free their room.
#[derive(Debug, Args)]
pub(super) struct Squash {
    #[arg(value_name = "IMAGE[@REVISION]")]
    image: String,
}

impl Squash {
    pub(super) fn run(self, app: &App, library: &Library) -> Result<()> {
        app.out.progress(&format!("Squashing {}", self.image.escape_debug()));
        match library.squash(&self.image, &app.env.user)? {
            Some(made) => app.out.status(&format!("Squashed to {}", made.uri)),
            None => app.out.status(&format!("{} has one layer already", self.image)),
        }
        Ok(())
    }
}
