//! Runs `inside.sh` where we are root: in a mount and PID namespace, and as an ordinary user
//! in a user namespace, too, with the ids that the administrator has set aside for that.
//!
//! Everything in it ends with its first process, which ends with us; the tree lies on a
//! file system in memory that only this mount namespace knows.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{Uid, User};

use super::disk::Extent;
use crate::error::{Context, Error, Result};
use crate::image::tool;

/// How many subordinate ids a system needs: Debian's `nobody` is 65534.
const IDS: u64 = 65_536;

/// Programs, and the Debian packages that have them.
const TOOLS: &[(&str, &str)] = &[
    ("mmdebstrap", "mmdebstrap"),
    ("mke2fs", "e2fsprogs"),
    ("unshare", "util-linux"),
    ("mount", "mount"),
    ("qemu-img", "qemu-utils"),
];
/// Writes the ids of a user namespace.
const ID_MAPPER: (&str, &str) = ("newuidmap", "uidmap");

/// Where tools are, whatever the user's PATH.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// As whom the namespace is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    Root,
    /// An ordinary user with subordinate ids.
    User,
}

/// What is to be done in there.
#[derive(Debug)]
pub(super) struct Job<'a> {
    /// What `inside.sh` reads, and the disk that it writes.
    pub(super) dir: &'a Path,
    /// Of packages of this suite.
    pub(super) cache: &'a Path,
    pub(super) suite: &'a str,
    /// The most memory that the tree may take.
    pub(super) memory_mib: u64,
    /// Where on the disk the root file system goes.
    pub(super) root: Extent,
    pub(super) root_uuid: &'a str,
}

/// Finds out whether it can be done, before anything is.
pub(super) fn check() -> Result<Who> {
    let who = if Uid::effective().is_root() { Who::Root } else { Who::User };
    let tools = TOOLS.iter().chain((who == Who::User).then_some(&ID_MAPPER));
    let missing: Vec<_> = tools.filter(|(program, _)| !installed(program)).collect();
    if let Some((program, _)) = missing.first() {
        let packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
        return Err(Error::system(format!("`{program}` is not installed"))
            .help(format!("as root: `apt-get install {}`", packages.join(" "))));
    }
    if who == Who::User {
        let name = User::from_uid(Uid::effective()).ok().flatten().map(|user| user.name);
        let name = name.unwrap_or_default();
        for file in ["/etc/subuid", "/etc/subgid"] {
            let text = fs::read_to_string(file).unwrap_or_default();
            if subordinate(&text, &name, Uid::effective().as_raw()) < IDS {
                return Err(no_ids(file, &name));
            }
        }
    }
    Ok(who)
}

fn installed(program: &str) -> bool {
    PATH.split(':').any(|folder| Path::new(folder).join(program).exists())
}

fn no_ids(file: &str, name: &str) -> Error {
    Error::system(format!(
        "building an image takes root, or {IDS} subordinate ids, and `{file}` has none for you"
    ))
    .help(format!(
        "as root, once: `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}` \
         (a range that nobody else has); or build it as root and `pavo image import` it"
    ))
}

/// How many ids in a row the file gives to the user.
fn subordinate(text: &str, name: &str, uid: u32) -> u64 {
    let count = |line: &str| {
        let mut parts = line.trim().split(':');
        let (owner, _start, count) = (parts.next()?, parts.next()?, parts.next()?);
        let ours = owner == name || owner.parse() == Ok(uid);
        ours.then(|| count.parse().ok()).flatten()
    };
    text.lines().filter_map(count).max().unwrap_or(0)
}

/// Runs `inside.sh`.
pub(super) fn run(who: Who, job: &Job<'_>, progress: &dyn Fn(&str)) -> Result<()> {
    fs::create_dir_all(job.cache).while_doing(|| format!("creating `{}`", job.cache.display()))?;
    let absolute = |path: &Path| -> Result<PathBuf> {
        std::path::absolute(path).while_doing(|| format!("naming `{}`", path.display()))
    };
    let (dir, cache) = (absolute(job.dir)?, absolute(job.cache)?);
    let lock = File::open(&cache).while_doing(|| format!("opening `{}`", cache.display()))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .while_doing(|| format!("locking `{}`", cache.display()))?;
    let mut command = Command::new("unshare");
    if who == Who::User {
        command.args(["--user", "--map-root-user", "--map-auto"]);
    }
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--", "sh"]);
    command.arg(dir.join("inside.sh")).arg("build").current_dir("/");
    command.env("PATH", PATH).env("BUILD", &dir).env("CACHE", &cache);
    command.env("SUITE", job.suite).env("SIZE", format!("{}M", job.memory_mib));
    command.env("OFFSET", job.root.start.to_string()).env("ROOT_UUID", job.root_uuid);
    command.env("ROOT_KIB", (job.root.size >> 10).to_string());
    tool::follow(&mut command, progress).map_err(|error| match who {
        Who::Root => error,
        Who::User => error.help(
            "if a namespace could not be made: user namespaces may be off here (`sysctl \
             user.max_user_namespaces`, AppArmor)",
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_of_the_name_or_the_number_and_in_one_row() {
        let text = "bob:100000:65536\nada:165536:1000\n1001:300000:65536\nada:400000:65536\nx\n";
        assert_eq!(subordinate(text, "ada", 7), 65_536);
        assert_eq!(subordinate(text, "eve", 1001), 65_536);
        assert_eq!(subordinate(text, "eve", 7), 0);
        assert_eq!(subordinate("ada:165536:1000\n", "ada", 7), 1000);
    }

    #[test]
    fn who_has_none_is_told_what_to_ask_for() {
        let error = no_ids("/etc/subuid", "ada").report();
        assert!(error.contains("`/etc/subuid` has none for you"), "{error}");
        assert!(error.contains("--add-subgids 100000-165535 ada`"), "{error}");
    }
}
