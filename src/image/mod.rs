//! Images: what may be booted, where it is kept, and the demo image.
//!
//! | part | what |
//! |---|---|
//! | [`header`] | reads foreign image headers before any tool opens the file |
//! | [`repository`] | one object store on disk, in pcocc's layout |
//! | [`folder`] | a folder of revisions, as pcocc had before it had repositories |
//! | [`library`] | the configured repositories together: names, revisions, import |
//! | [`save`] | a disk that lies on an image becomes a revision of it, or a new image |
//! | [`derive`] | images made of others: copied, resized, squashed, exported |
//! | [`repos`] | the repositories themselves: what is in them, what may go |
//! | [`build`] | builds an image from a recipe: a whole distribution |
//! | [`download`] | images from a web server |
//! | `archive` | images that come compressed |
//! | `convert` | `qemu-img`, kept on a short leash |
//! | `packages`, `grub` | Debian packages, unpacked but not installed; the boot loader |
//! | [`tiny`] | builds the demo image from Debian packages, without any privilege |

mod archive;
pub mod build;
mod convert;
pub mod derive;
pub mod download;
pub mod folder;
mod grub;
pub mod header;
pub mod library;
mod packages;
pub mod repos;
pub mod repository;
pub mod save;
mod scratch;
#[cfg(test)]
mod testing;
pub mod tiny;
mod tool;
mod unfinished;
mod uri;
