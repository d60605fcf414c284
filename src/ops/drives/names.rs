//! What a persistent drive is called: one file has several names, whichever of them a template
//! has, and two that have one in common are the same.
//!
//! ```text
//! seen from here           host, device and inode; host and the path without links
//! on the VM's own host     host and path, as the template has it
//! on a shared file system  what is mounted and inode; the server's path; inode and path
//! ```
//!
//! Through a link, a second link to the file, a bind mount or another export a drive is the
//! same on one host. Across hosts it is, on a shared file system, where the server's path or
//! inode tells; a file of another host is known by its path only.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::sys::statfs::statfs;
use sha2::{Digest, Sha256};

/// File systems that several hosts see, by their magic numbers (statfs(2)): NFS, Lustre, GPFS,
/// Ceph, BeeGFS, SMB, CIFS, AFS, OCFS2, GFS2, 9P, FUSE.
const SHARED: [i64; 12] = [
    0x6969,
    0x0BD0_0BD0,
    0x4750_4653,
    0x00C3_6400,
    0x1983_0326,
    0xFE53_4D42,
    0xFF53_4D42,
    0x5346_414F,
    0x7461_636f,
    0x0116_1970,
    0x0102_1997,
    0x6573_5546,
];

/// All names of a drive, each as a digest that tells nothing.
pub fn names(path: &Path, host: &str, this_host: &str) -> BTreeSet<String> {
    let found = path.canonicalize().and_then(|real| Ok((real.metadata()?, real))).ok();
    let names = match &found {
        Some((about, real)) if is_shared(real) => {
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
            let mut names = shared_names(&mounts, real, about.ino());
            names.push(device(this_host, about));
            names
        }
        Some((about, real)) if host == this_host => {
            vec![local(host, path), local(host, real), device(host, about)]
        }
        // The other host may have something else there.
        _ => vec![local(host, path)],
    };
    names.into_iter().map(|name| digest(&name)).collect()
}

pub fn is_shared(path: &Path) -> bool {
    statfs(path).is_ok_and(|about| SHARED.contains(&(about.filesystem_type().0)))
}

fn digest(name: &str) -> String {
    Sha256::digest(name).iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

fn local(host: &str, path: &Path) -> String {
    format!("{host}\0{}", path.display())
}

fn device(host: &str, about: &Metadata) -> String {
    format!("{host}\0{}\0{}", about.dev(), about.ino())
}

/// Names of a file on a file system of several hosts, of which these are the `mounts`
/// (`mountinfo`, proc(5)).
fn shared_names(mounts: &str, real: &Path, inode: u64) -> Vec<String> {
    let mut names = vec![format!("inode\0{inode}\0{}", real.display())];
    let mounted = mounts.lines().filter_map(Mounted::parse);
    let under = mounted.filter(|mount| real.starts_with(&mount.target));
    // Of several at one place the last one is seen.
    if let Some(mount) = under.max_by_key(|mount| mount.target.components().count()) {
        names.push(format!("{}\0{inode}", mount.source));
        names.extend(mount.server_path(real).map(|path| format!("server\0{path}")));
    }
    names
}

/// A line of `mountinfo`.
struct Mounted {
    /// What of the file system is mounted; all of it is `/`.
    root: PathBuf,
    target: PathBuf,
    /// Such as `nfs1:/work`.
    source: String,
}

impl Mounted {
    fn parse(line: &str) -> Option<Self> {
        let (about, rest) = line.split_once(" - ")?;
        let mut about = about.split(' ').skip(3);
        let (root, target) = (plain(about.next()?).into(), plain(about.next()?).into());
        Some(Self { root, target, source: plain(rest.split(' ').nth(1)?) })
    }

    /// Where the server has it, if the mount names one: `nfs1:/work`, `10.0.0.1@tcp:/fs`.
    fn server_path(&self, path: &Path) -> Option<String> {
        let inner = path.strip_prefix(&self.target).unwrap_or(path);
        let (server, export) = self.source.rsplit_once(":/")?;
        let parts = [Path::new(export), &self.root, inner];
        let all = parts.iter().flat_map(|part| part.components());
        let names = all.filter(|part| matches!(part, Component::Normal(_)));
        Some(format!("{server}:/{}", names.collect::<PathBuf>().display()))
    }
}

/// The text that `mountinfo` has with some bytes as `\040`.
fn plain(escaped: &str) -> String {
    let mut parts = escaped.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let byte = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match byte.filter(u8::is_ascii) {
            Some(byte) => {
                plain.push(byte.into());
                plain += &part[3..];
            }
            None => {
                plain.push('\\');
                plain += part;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn same(one: &Path, other: &Path) -> bool {
        !names(one, "n1", "n1").is_disjoint(&names(other, "n1", "n1"))
    }

    #[test]
    fn on_one_host_a_file_is_itself_whatever_leads_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("drive"), "").unwrap();
        std::fs::write(path("other"), "").unwrap();
        std::os::unix::fs::symlink(path("drive"), path("link")).unwrap();
        std::fs::hard_link(path("drive"), path("second")).unwrap();
        for name in ["drive", "link", "second", "./link"] {
            assert!(same(&path("drive"), &path(name)), "{name}");
            assert!(!same(&path("other"), &path(name)), "{name}");
        }
        // A launcher elsewhere knows it by the path that its template has.
        let seen_from = |here| names(&path("link"), "n1", here);
        assert!(!seen_from("n1").is_disjoint(&seen_from("n2")));
        assert!(seen_from("n1").is_disjoint(&names(&path("link"), "n2", "n1")));
        assert!(seen_from("n1").iter().all(|name| name.len() == 32));
    }

    #[test]
    fn on_a_shared_file_system_the_server_tells() {
        let mount = |root: &str, target: &str, source: &str| {
            format!("99 1 0:40 {root} {target} rw,noatime shared:1 - nfs4 {source} rw,vers=4.2\n")
        };
        let of = |mounts: &str, path: &str, inode| {
            let names = shared_names(mounts, Path::new(path), inode);
            BTreeSet::from_iter(names)
        };
        let under = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n";
        let work = under.to_owned() + &mount("/", "/work", "nfs1:/work");
        let usual = of(&work, "/work/me/drive", 7);
        for (mounts, path) in [
            // Mounted elsewhere, a bind mount of a part, another export, another name.
            (mount("/", "/mnt", "nfs1:/work"), "/mnt/me/drive"),
            (mount("/me", "/home/me", "nfs1:/work"), "/home/me/drive"),
            (mount("/", "/n", "nfs1:/"), "/n/work/me/drive"),
            (mount("/", "/n\\040n", "nfs1:/work/me/"), "/n n/drive"),
            (mount("/", "/work", "nfs1.cluster:/work"), "/work/me/drive"),
        ] {
            let names = of(&(under.to_owned() + &mounts), path, 7);
            assert!(!names.is_disjoint(&usual), "{mounts}: {names:?} {usual:?}");
        }
        for (mounts, path, inode) in [
            (mount("/", "/work", "nfs1:/work"), "/work/me/other", 8),
            (mount("/", "/mnt", "nfs2:/work"), "/mnt/me/drive", 7),
            (mount("/", "/work", "nfs2:/work"), "/work/me/drive", 8),
        ] {
            let names = of(&(under.to_owned() + &mounts), path, inode);
            assert!(names.is_disjoint(&usual), "{mounts}: {names:?} {usual:?}");
        }
    }
}
