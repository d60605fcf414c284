//! Images: what may be booted, where it is kept, and the demo image.
//!
//! | part | what |
//! |---|---|
//! | [`header`] | reads foreign image headers before any tool opens the file |
//! | [`repository`] | one object store on disk, in pcocc's layout |
//! | [`library`] | the configured repositories together: names, revisions, import |
//! | [`convert`] | `qemu-img`, kept on a short leash |
//! | [`tiny`] | builds the demo image from Debian packages, without any privilege |

pub mod tiny;
mod tool;
