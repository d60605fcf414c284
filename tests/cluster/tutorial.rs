//! The tutorial's session, on the image `debian` that `pavo image build` makes: once by an
//! ordinary user with subordinate ids, kept for as long as nothing that it is made of
//! changes. Booting it takes half a minute of two processors where there is no KVM; eight
//! VMs are for `make test-full`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use sha2::{Digest, Sha256};

use super::running::{Output, Running};
use super::session::Terminal;
use super::world::{World, prepared_world};

/// Longer than a boot takes when every core is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(900);

/// What the image is made of: a change makes it anew.
const MADE_OF: &[&str] = &[
    "etc/recipes",
    "src/image/build",
    "src/image/grub.rs",
    "src/config/recipe.rs",
    "agent/src",
    "agent/pavo-agent.service",
];

const TEMPLATE: &str = "\
mine:
  image: debian
  description: the tutorial's
  user-data:
    write_files:
      - path: /etc/motd
        content: |
          written by cloud-init
    runcmd:
      - echo \"set up on $(hostname)\" >/root/done
other:
  inherits: mine
  agent: inject
";

const OWN_NAME: &str = "vm0.pavo.internal\n10.200.0.1\n";

#[test]
fn the_tutorials_session() {
    prepared_world(|world| {
        debian(world);
        // The disk is larger than the image was made: the root file system follows.
        world.ok(&["image", "resize", "debian", "+1G"]);
        world.write("conf/templates.yaml", TEMPLATE);
        assert!(world.ok(&["template", "list"]).contains("mine\tdebian"));

        let alloc = up(world, "mine:1");
        let vm0 = |command: &str| patiently(world, &["ssh", "vm0", command]);
        assert_eq!(vm0("cloud-init status --wait | tail -n 1").trim(), "status: done");
        assert_eq!(
            vm0("cat /root/done; tail -n 1 /etc/motd"),
            "set up on vm0\nwritten by cloud-init\n"
        );
        let size: u64 = vm0("df --output=size -k / | tail -n 1").trim().parse().unwrap();
        assert!(size > 4 << 20, "the root file system has {size} KiB");
        assert_eq!(vm0("systemctl is-system-running; true").trim(), "running");
        // What MPI, Slurm and others ask of their host.
        assert_eq!(vm0("hostname -f; getent hosts vm0 | cut -d' ' -f1"), OWN_NAME);
        the_console_is_a_root_shell(world);
        let said = patiently(world, &["run", "--user", "debian", "sh", "-c", "id -un; pwd"]);
        assert_eq!(said, "debian\n/home/debian\n");

        qemus_agent_serves_where_ours_is_missing(world, || drop(vm0("systemctl stop pavo-agent")));
        vm0("echo kept >/root/kept && sync");
        // As an image of others' is.
        let unit = "/etc/systemd/system/pavo-agent.service";
        vm0(&format!("systemctl --quiet disable pavo-agent; rm {unit} /usr/local/sbin/pavo-agent"));
        // It ends the connection on its way.
        world.pavo(&["ssh", "vm0", "shutdown -H now"]);
        console_says(world, "System halted");
        let saved = world.pavo(&["save", "vm0"]);
        let message = "vm0 disk successfully saved to user:debian revision 2\n";
        assert!(saved.stderr.contains(message), "{saved}");
        end(world, alloc);

        let alloc = up(world, "other:1");
        assert_eq!(vm0("cat /root/kept"), "kept\n");
        patiently(world, &["wait", "--for", "agent"]);
        let said = patiently(world, &["run", "systemctl", "is-enabled", "pavo-agent"]);
        assert_eq!(said, "enabled\n");
        our_agent_brings_its_disks_to_rest(world, &vm0);
        // It is another VM: cloud-init has done its work again.
        assert_eq!(vm0("cloud-init status --wait >/dev/null; cat /root/done"), "set up on vm0\n");
        end(world, alloc);
        if std::env::var_os("PAVO_FULL").is_some() {
            let alloc = up_within(world, "mine:8", 3 * PATIENCE);
            for rank in 0..8 {
                let said =
                    patiently(world, &["ssh", &format!("vm{rank}"), "hostname; ping -qc1 vm7"]);
                assert!(said.starts_with(&format!("vm{rank}\n")), "{said}");
            }
            end(world, alloc);
        }
    });
}

/// To where the system on the disk has been found and started.
#[test]
fn the_image_starts_with_uefi_too() {
    prepared_world(|world| {
        debian(world);
        let disk = world.path("own/disk.qcow2");
        world.ok(&["image", "export", "debian@0", disk.to_str().unwrap()]);
        // Its other half is where the firmware keeps what it is set to.
        let variables = world.path("own/vars");
        fs::copy("/usr/share/OVMF/OVMF_VARS_4M.fd", &variables).unwrap();
        let console = world.path("own/console");
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-M", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "512"]);
        qemu.args(["-nodefaults", "-display", "none", "-device", "virtio-rng-pci"]);
        let flash = "if=pflash,format=raw,file=";
        qemu.args(["-drive", &format!("{flash}/usr/share/OVMF/OVMF_CODE_4M.fd,readonly=on")]);
        qemu.args(["-drive", &format!("{flash}{}", variables.display())]);
        qemu.args(["-drive", &format!("if=virtio,file={},cache=unsafe", disk.display())]);
        qemu.args(["-serial", &format!("file:{}", console.display())]);
        let qemu = world.start(qemu);
        until(|| {
            let said = fs::read(&console).unwrap_or_default();
            String::from_utf8_lossy(&said).contains("root: clean")
        });
        qemu.signal(nix::sys::signal::Signal::SIGKILL);
        qemu.finish();
    });
}

/// A cluster whose VMs answer ssh.
fn up(world: &World, cluster: &str) -> Running {
    up_within(world, cluster, PATIENCE)
}

fn up_within(world: &World, cluster: &str, limit: Duration) -> Running {
    let limit = limit.as_secs().to_string();
    let words = ["--mem", "384", "--wait", "ssh", "--timeout", &limit, "-E", "sleep 7200", cluster];
    let alloc = world.alloc(&words);
    // It has an end of its own, and says who has not got there.
    while !alloc.stderr().contains(" ssh\n") {
        let said = alloc.stderr();
        assert!(!said.contains("error: "), "{said}");
        sleep(Duration::from_millis(200));
    }
    alloc
}

fn end(world: &World, alloc: Running) {
    world.ok(&["cancel"]);
    assert_eq!(alloc.finish().code, Some(130));
    world.nothing_runs();
}

fn until(is_so: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "it has not happened within {PATIENCE:?}");
        sleep(Duration::from_millis(200));
    }
}

/// Runs `pavo`, however long it takes, and returns what it printed.
fn patiently(world: &World, args: &[&str]) -> String {
    let output = world.pavo_command(args).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "pavo {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn console_says(world: &World, text: &str) {
    until(|| world.ok(&["console", "-l", "vm0"]).contains(text));
}

fn the_console_is_a_root_shell(world: &World) {
    console_says(world, "root@vm0:~#");
    let mut terminal = Terminal::new(world, &["console", "vm0"]);
    terminal.type_in("\n");
    terminal.wait_for("root@vm0:~#");
    terminal.type_in("echo it is $(id -un) on $(tty)\n");
    terminal.wait_for("it is root on /dev/ttyS0");
    terminal.type_in("\x03\x03\x03");
    assert!(terminal.ends_cooked());
}

fn qemus_agent_serves_where_ours_is_missing(world: &World, stop: impl Fn()) {
    stop();
    until(|| world.pavo(&["agent", "ping"]).stderr.contains("vm0: only QEMU's agent answers"));
    let line = "echo out; echo err >&2; exit 3";
    let said = world.pavo(&["run", "--input-none", "sh", "-c", line]);
    assert_eq!((&*said.stdout, &*said.stderr, said.code), ("out\n", "err\n", Some(3)), "{said}");
    let said = world.pavo(&["run", "--cwd", "/", "--input-none", "true"]);
    assert_eq!(said.code, Some(255), "{said}");
    assert!(said.stderr.contains("only QEMU's agent answers in this guest"), "{said}");
}

/// With nobody else to ask, and a root file system in use.
fn our_agent_brings_its_disks_to_rest(world: &World, vm0: &dyn Fn(&str) -> String) {
    vm0("systemctl stop qemu-guest-agent");
    let saved = world.pavo(&["save", "-s", "-d", "user:rested", "vm0"]);
    assert_eq!(saved.code, Some(0), "{saved}");
    // It writes again.
    vm0("echo on >/root/on && sync");
}

/// Gives the world the image `debian`, in a repository of its own.
fn debian(world: &World) {
    let shared = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let kept = shared.join(format!("debian-{}", &digest()[..16]));
    let lock = fs::File::create(shared.join("debian.lock")).unwrap();
    let lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno).unwrap();
    let images = world.folder("own");
    let repos = format!("repos:\n  - name: user\n    path: {}\n", images.display());
    world.write("conf/repos.yaml", &repos);
    if !kept.exists() {
        let output = build(world);
        assert_eq!(output.code, Some(0), "{output}");
        assert!(output.stderr.contains("Built user:debian@0 (debian)"), "{output}");
        for old in fs::read_dir(shared).unwrap().map(|entry| entry.unwrap().path()) {
            let name = old.file_name().unwrap().to_str().unwrap();
            if name.starts_with("debian-") {
                fs::remove_dir_all(&old).unwrap();
            }
        }
        let new = shared.join("debian-new");
        copy(&images, &new);
        fs::rename(new, kept).unwrap();
    } else {
        copy(&kept, &images);
        let mut own = Command::new("chown");
        own.args(["-R", "nobody:nogroup"]).arg(&images);
        assert!(own.status().unwrap().success());
    }
    drop(lock);
}

/// Builds as the account that owns nothing but subordinate ids.
fn build(world: &World) -> Output {
    give_ids(world);
    let packages = world.folder("packages");
    // What earlier builds of any image have downloaded.
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("debian.packages");
    if kept.exists() {
        copy(&kept, &packages);
        let mut own = Command::new("chown");
        own.args(["-R", "nobody:nogroup"]).arg(&packages);
        assert!(own.status().unwrap().success());
    }
    let cache = packages.to_str().unwrap();
    let mut command = world.pavo_command(&["image", "build", "debian", "debian", "--cache", cache]);
    let output = command.stdin(Stdio::null()).output().unwrap();
    copy(&packages, &kept);
    Output {
        code: output.status.code(),
        signal: None,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Gives the account subordinate ids, in this world.
pub fn give_ids(world: &World) {
    for file in ["subuid", "subgid"] {
        let ids = world.path(file);
        fs::write(&ids, "nobody:2000000:65536\n").unwrap();
        fs::set_permissions(&ids, fs::Permissions::from_mode(0o644)).unwrap();
        let none = None::<&str>;
        mount(Some(&ids), &*format!("/etc/{file}"), none, MsFlags::MS_BIND, none).unwrap();
    }
}

fn copy(from: &Path, to: &Path) {
    let mut command = Command::new("cp");
    command.args(["-rT", "--sparse=always"]).args([from, to]);
    assert!(command.status().unwrap().success(), "copying {}", from.display());
}

/// Of all that the image is made of.
fn digest() -> String {
    fn files(path: PathBuf) -> Vec<PathBuf> {
        if !path.is_dir() {
            return vec![path];
        }
        let mut entries: Vec<_> =
            fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
        entries.sort();
        entries.into_iter().flat_map(files).collect()
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let all = MADE_OF.iter().flat_map(|path| files(root.join(path)));
    let digest =
        all.fold(Sha256::new(), |digest, file| digest.chain_update(fs::read(file).unwrap()));
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
