//! A place in which pavo runs real VMs as an ordinary user: the program, an image, a
//! home. As root the commands drop to `nobody`, in a mount namespace of this process in
//! which /dev/net/tun is open to all, as distributions with systemd have it.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use pavo::config::{Recipe, Repo, Sources};
use pavo::image::build;
use pavo::image::library::{Library, Resolved};
use pavo::image::tiny;

const NOBODY: u32 = 65_534;

pub struct Lab {
    dir: tempfile::TempDir,
    pub image: Resolved,
}

impl Lab {
    /// `None` where QEMU, pasta or /dev/net/tun are missing, which it says.
    pub fn new() -> Option<Self> {
        for (program, package) in [("qemu-system-x86_64", "qemu-system-x86"), ("pasta", "passt")] {
            if Command::new(program).arg("--version").stdout(Stdio::null()).status().is_err() {
                return skipped(&format!("`{program}` is not installed (package {package})"));
            }
        }
        if is_root() {
            open_tun();
        } else if let Err(error) = File::options().read(true).write(true).open("/dev/net/tun") {
            return skipped(&format!("/dev/net/tun does not open: {error}"));
        }
        // Where an account that owns nothing can reach it, wherever this clone lies.
        let dir = tempfile::Builder::new().prefix("pavo-bench.").tempdir_in("/var/tmp").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for folder in ["conf", "none", "repo", "tmp"] {
            fs::create_dir(dir.path().join(folder)).unwrap();
        }
        let repo = dir.path().join("repo");
        let repos = format!("repos:\n  - name: user\n    path: {}\n", repo.display());
        fs::write(dir.path().join("conf/repos.yaml"), repos).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_pavo"), dir.path().join("pavo")).unwrap();
        let library = Library::open(&[Repo { name: "user".into(), path: repo }]);
        let copy = |target: &Path, _: &Path| {
            fs::copy(kept("tiny", build_tiny), target).expect("a copy");
            Ok(())
        };
        let image = library.create("tiny", "bench", false, copy).unwrap();
        let lab = Self { dir, image };
        lab.give(lab.path());
        Some(lab)
    }

    /// The image `debian`, which is made here unless there is one newer than this program.
    #[allow(dead_code, reason = "not every bench starts a distribution")]
    pub fn debian(&self) -> Resolved {
        let repo = self.path().join("repo");
        let library = Library::open(&[Repo { name: "user".into(), path: repo.clone() }]);
        let copy = |target: &Path, _: &Path| {
            fs::copy(kept("debian", build_debian), target).expect("a copy");
            Ok(())
        };
        let image = library.create("debian", "bench", false, copy).unwrap();
        self.give(&repo);
        image
    }

    /// Makes a folder, and all in it, the ordinary user's.
    pub fn give(&self, folder: &Path) {
        if is_root() {
            let mut chown = Command::new("chown");
            chown.args(["-R", &format!("{NOBODY}:{NOBODY}")]).arg(folder);
            assert!(chown.status().unwrap().success());
        }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// pavo, as the ordinary user.
    pub fn pavo(&self, words: &[&str]) -> Command {
        let mut command = self.ordinary(&self.path().join("pavo"));
        command.args(words);
        command
    }

    /// Any program, as the ordinary user.
    pub fn ordinary(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        let path = std::env::var_os("PATH").unwrap_or_default();
        command.env_clear().env("PATH", path).current_dir(self.path()).stdin(Stdio::null());
        command.env("HOME", self.path()).env("PAVO_STATE_DIR", self.path().join("state"));
        command.env("PAVO_TMPDIR", self.path().join("tmp"));
        command.env("PAVO_SYSTEM_CONF_DIR", self.path().join("none"));
        command.env("PAVO_USER_CONF_DIR", self.path().join("conf"));
        if is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    }
}

/// An image, built if there is none newer than this program.
fn kept(name: &str, build: fn(&Path, &Path)) -> PathBuf {
    let shared = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let lock = File::create(shared.join(format!("{name}.lock"))).unwrap();
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno).unwrap();
    let image = shared.join(format!("{name}.qcow2"));
    let new = shared.join(format!("{name}.new.qcow2"));
    let program = std::env::current_exe().unwrap().metadata().unwrap().modified().unwrap();
    if image.metadata().is_ok_and(|data| data.modified().unwrap() > program) {
        return image;
    }
    let _ = fs::remove_file(&new);
    build(&shared.join("packages"), &new);
    fs::rename(new, &image).unwrap();
    image
}

fn build_tiny(cache: &Path, output: &Path) {
    tiny::build(tiny::Options { cache, output, progress: &|_| () }).unwrap();
}

fn build_debian(cache: &Path, output: &Path) {
    let scratch = tempfile::tempdir_in("/var/tmp").unwrap();
    let nowhere = Sources {
        system: "/nonexistent".into(),
        user: None,
        home: "/nonexistent".into(),
        user_name: "bench".into(),
        env: Default::default(),
    };
    let (recipe, _) = Recipe::load("debian", &nowhere).unwrap();
    let (recipe, scratch, progress) = (&recipe, scratch.path(), &|_: &str| ());
    build::build(build::Options { recipe, name: "debian", cache, scratch, output, progress })
        .unwrap();
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn open_tun() {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
    fs::create_dir_all("/dev/net").unwrap();
    mount(Some("tmpfs"), "/dev/net", Some("tmpfs"), MsFlags::empty(), Some("mode=755")).unwrap();
    mknod("/dev/net/tun", SFlag::S_IFCHR, Mode::empty(), makedev(10, 200)).unwrap();
    fs::set_permissions("/dev/net/tun", fs::Permissions::from_mode(0o666)).unwrap();
}

fn skipped<T>(why: &str) -> Option<T> {
    assert!(std::env::var_os("CI").is_none(), "{why}");
    eprintln!("SKIPPED: {why}");
    None
}
