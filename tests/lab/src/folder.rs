//! The folder of a lab, and the name that goes with it.
//!
//! Host names, and with them Slurm's cgroups, are the machine's: each lab takes a
//! prefix (`a1`, `a2`, …) by locking a file, and what the folder of an earlier owner
//! of that prefix still tells of is removed first. The lock ends with the owner.
//!
//! There are two folders. What jobs write, homes and `/tmp`, is on disk: in memory it
//! would count as the job's. What a lab makes and removes of its own, a thousand small
//! files, is in memory where there is some: on a slow disk that takes seconds.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use crate::error::{Context, Error, Result};
use crate::{cgroups, keeper};

/// All labs of the machine.
const BASE: &str = "/tmp/pavo-lab";

/// A file system in memory that is always there; followed by the prefix.
const MEMORY: &str = "/dev/shm/pavo-lab-";

/// Free bytes in it that a lab may want: three members of etcd take 64 MiB each at once.
const ENOUGH: u64 = 1 << 30;

#[derive(Debug)]
pub(crate) struct Folder {
    pub prefix: String,
    /// On disk.
    pub path: PathBuf,
    /// In memory, or else on disk, too.
    pub memory: PathBuf,
    /// Held as long as the lab is.
    _lock: Flock<File>,
}

impl Folder {
    pub fn take() -> Result<Self> {
        let base = base()?;
        sweep_all();
        let digits = || (1..=9).map(|digit| digit.to_string());
        let prefixes =
            ('a'..='z').flat_map(|letter| digits().map(move |digit| format!("{letter}{digit}")));
        for prefix in prefixes {
            if let Some(lock) = lock(&base, &prefix) {
                let path = base.join(&prefix);
                sweep(&path);
                fs::create_dir_all(path.join("keepers"))
                    .while_doing(|| format!("making {}", path.display()))?;
                hold(&path);
                let memory = match enough_memory() {
                    true => memory(&path),
                    false => path.join("memory"),
                };
                fs::create_dir(&memory).while_doing(|| format!("making {}", memory.display()))?;
                return Ok(Self { prefix, path, memory, _lock: lock });
            }
        }
        Err(Error::new(format!("no name is free in {BASE}")))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        remove(&self.path);
        held().retain(|path| path != &self.path);
    }
}

/// The labs of this process. One that lies in a static is not dropped.
static HELD: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn held() -> std::sync::MutexGuard<'static, Vec<PathBuf>> {
    HELD.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[expect(unsafe_code)]
fn hold(path: &Path) {
    static AT_EXIT: Once = Once::new();
    held().push(path.to_owned());
    // SAFETY: the function is there as long as the program; it unwinds nowhere.
    AT_EXIT.call_once(|| unsafe {
        nix::libc::atexit(remove_held);
    });
}

extern "C" fn remove_held() {
    let _ = std::panic::catch_unwind(|| held().drain(..).for_each(|path| remove(&path)));
}

fn memory(path: &Path) -> PathBuf {
    let prefix = path.file_name().unwrap_or_default();
    PathBuf::from(format!("{MEMORY}{}", prefix.to_string_lossy()))
}

fn enough_memory() -> bool {
    let free = nix::sys::statvfs::statvfs("/dev/shm");
    free.is_ok_and(|free| free.blocks_available() * free.fragment_size() > ENOUGH)
}

/// Takes down what is left of a lab, its lock being held, and its names.
fn remove(path: &Path) {
    sweep(path);
    let _ = fs::remove_file(path.with_extension("lock"));
    let _ = fs::remove_dir(BASE);
}

/// Removes what owners left who could not do it themselves.
pub(crate) fn sweep_all() {
    for prefix in prefixes() {
        if let Some(_lock) = lock(Path::new(BASE), &prefix) {
            remove(&Path::new(BASE).join(prefix));
        }
    }
}

/// The folders of the labs that somebody owns.
pub(crate) fn living() -> Vec<PathBuf> {
    let base = Path::new(BASE);
    let owned = prefixes().into_iter().filter(|prefix| lock(base, prefix).is_none());
    owned.map(|prefix| base.join(prefix)).collect()
}

fn prefixes() -> Vec<String> {
    let entries = fs::read_dir(BASE).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut prefixes: Vec<_> =
        names.map(|name| name.trim_end_matches(".lock").to_owned()).collect();
    prefixes.sort();
    prefixes.dedup();
    prefixes
}

fn base() -> Result<PathBuf> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::new("a lab needs root"));
    }
    let base = Path::new(BASE);
    fs::create_dir_all(base).while_doing(|| format!("making {BASE}"))?;
    // In a folder of everybody's: nobody else may have made it.
    if fs::symlink_metadata(base)?.uid() != 0 {
        return Err(Error::new(format!("{BASE} is not root's; remove it")));
    }
    fs::set_permissions(base, fs::Permissions::from_mode(0o755))?;
    Ok(base.to_owned())
}

/// The lock of a name, unless somebody has it.
fn lock(base: &Path, prefix: &str) -> Option<Flock<File>> {
    let path = base.join(prefix).with_extension("lock");
    let open = || OpenOptions::new().create(true).append(true).open(&path);
    // Whoever goes last removes the base.
    let again = |_| fs::create_dir_all(base).and_then(|()| open());
    let file = open().or_else(again).ok()?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).ok()?;
    // Between open and lock another owner may have removed the name.
    let same = fs::metadata(&path).is_ok_and(|now| {
        lock.metadata().is_ok_and(|mine| (mine.ino(), mine.dev()) == (now.ino(), now.dev()))
    });
    same.then_some(lock)
}

/// Ends the hosts that the folder tells of, removes their cgroups and the folder.
fn sweep(path: &Path) {
    let keepers = fs::read_dir(path.join("keepers")).into_iter().flatten().flatten();
    keepers.for_each(|record| keeper::kill_recorded(&record.path()));
    let hosts = fs::read_dir(path.join("hosts")).into_iter().flatten().flatten();
    for host in hosts.filter_map(|host| host.file_name().into_string().ok()) {
        cgroups::remove(&host);
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    for dir in [&memory(path), path] {
        while dir.exists() && fs::remove_dir_all(dir).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
