//! Builds the demo image and boots it in QEMU, without KVM and without privilege.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use pavo::image::tiny;

/// Far more than a boot takes when every core is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(180);

/// The image, built once for all tests: apt is asked only when there is none.
fn image() -> PathBuf {
    let shared = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let lock = fs::File::create(shared.join("tiny.lock")).unwrap();
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno).unwrap();
    let image = shared.join("tiny.qcow2");
    let new = shared.join("tiny.new.qcow2");
    // What was built from other sources is not what is to be tested.
    let test = std::env::current_exe().unwrap().metadata().unwrap().modified().unwrap();
    if image.metadata().is_ok_and(|data| data.modified().unwrap() > test) {
        return image;
    }
    let _ = fs::remove_file(&new);
    let cache = shared.join("packages");
    let options = tiny::Options { cache: &cache, output: &new, progress: &|_| () };
    tiny::build(options).unwrap();
    fs::rename(new, &image).unwrap();
    image
}

/// A FAT volume labelled CIDATA with these files below `pavo/`.
fn seed(path: &Path, files: &[(&str, &[u8])]) {
    let disk = fs::OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
    disk.set_len(1 << 20).unwrap();
    let options = fatfs::FormatVolumeOptions::new().volume_label(*b"CIDATA     ");
    fatfs::format_volume(&disk, options).unwrap();
    let volume = fatfs::FileSystem::new(&disk, fatfs::FsOptions::new()).unwrap();
    let folder = volume.root_dir().create_dir("pavo").unwrap();
    for (name, content) in files {
        folder.create_file(name).unwrap().write_all(content).unwrap();
    }
}

/// An ed25519 host key as dropbear keeps it: name, then private and public half.
fn dropbear_key(private: &[u8; 32], public: &[u8; 32]) -> Vec<u8> {
    [&[0, 0, 0, 11], b"ssh-ed25519".as_slice(), &[0, 0, 0, 64], private, public].concat()
}

/// A guest on the system disk and a seed; killed if it is still there at the end.
struct Guest {
    qemu: Child,
    console: Console,
    qmp: UnixStream,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.qemu.kill().ok();
        self.qemu.wait().ok();
    }
}

impl Guest {
    fn boot(dir: &Path, seed: &Path) -> Self {
        let consoles = UnixListener::bind(dir.join("console")).unwrap();
        let monitors = UnixListener::bind(dir.join("qmp")).unwrap();
        let disk = |file: &Path, more: &str| format!("if=virtio,file={},{more}", file.display());
        let socket = |name: &str| format!("unix:{}", dir.join(name).display());
        let qemu = Command::new("qemu-system-x86_64")
            .args(["-M", "q35", "-accel", "tcg", "-m", "96", "-nodefaults", "-display", "none"])
            .arg("-no-reboot")
            .args(["-drive", &disk(&image(), "format=qcow2,snapshot=on")])
            .args(["-drive", &disk(seed, "format=raw,readonly=on")])
            .args(["-nic", "user,model=virtio-net-pci,net=10.9.8.0/24"])
            .args(["-serial", &socket("console"), "-qmp", &socket("qmp")])
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU is installed");
        let console = Console { stream: consoles.accept().unwrap().0, seen: String::new() };
        console.stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let mut guest = Self { qemu, console, qmp: monitors.accept().unwrap().0 };
        guest.qmp.set_read_timeout(Some(PATIENCE)).unwrap();
        guest.qmp.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").unwrap();
        guest
    }

    /// Presses the power button, and waits for QEMU to end.
    fn power_down(mut self) {
        self.qmp.write_all(b"{\"execute\":\"system_powerdown\"}\n").unwrap();
        let mut said = String::new();
        // It ends with the connection: QEMU is gone.
        self.qmp.read_to_string(&mut said).unwrap();
        assert!(said.contains("\"guest-shutdown\""), "{said}");
        assert!(self.qemu.wait().unwrap().success());
    }
}

/// The serial console.
struct Console {
    stream: UnixStream,
    seen: String,
}

impl Console {
    /// Waits until the console has shown `text`; returns all that it has shown.
    fn wait_for(&mut self, text: &str) -> &str {
        let end = Instant::now() + PATIENCE;
        while !self.seen.contains(text) {
            assert!(Instant::now() < end, "no `{text}` on the console:\n{}", self.seen);
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => panic!("the guest has ended:\n{}", self.seen),
                Ok(count) => self.seen += &String::from_utf8_lossy(&bytes[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => panic!("{error}"),
            }
        }
        &self.seen
    }

    /// Runs a command in the console's shell; returns what it said.
    fn run(&mut self, command: &str) -> String {
        self.seen.clear();
        // The mark is not in the echo of the command itself.
        self.stream.write_all(format!("{command}; echo do''ne\n").as_bytes()).unwrap();
        let text = self.wait_for("done\r\n");
        text.to_owned()
    }
}

#[test]
fn a_seeded_guest_becomes_that_machine_and_obeys_the_power_button() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("seed.img");
    let key = dropbear_key(&[7; 32], &[9; 32]);
    seed(
        &path,
        &[
            ("hostname", b"vm7\n"),
            ("domain", b"pavo.test\n"),
            ("authorized_keys", b"ssh-ed25519 AAAAtest alice\n"),
            ("dropbear_ed25519_host_key", &key),
            ("user-script", b"echo the script runs on $(hostname)\n"),
        ],
    );
    let mut guest = Guest::boot(dir.path(), &path);
    let console = &mut guest.console;
    console.wait_for("tiny vm7 ready");
    console.wait_for("the script runs on vm7");

    assert!(console.run("cat /root/.ssh/authorized_keys").contains("AAAAtest alice"));
    let sum = console.run("sha256sum < /etc/dropbear/dropbear_ed25519_host_key");
    assert!(sum.contains(&sha256(&key)), "{sum}");
    let hosts = console.run("ping -c1 -W1 vm7.pavo.test");
    assert!(hosts.contains("1 packets received"), "{hosts}");
    let lease = console.run("ip addr show eth0; ip route; cat /etc/resolv.conf");
    assert!(lease.contains("inet 10.9.8.15/24"), "{lease}");
    assert!(lease.contains("default via 10.9.8.2"), "{lease}");
    assert!(lease.contains("nameserver 10.9.8.3"), "{lease}");
    let ports = console.run("netstat -tln");
    assert!(ports.contains("0.0.0.0:22"), "{ports}");
    guest.power_down();
}

#[test]
fn a_guest_without_seed_boots_as_itself() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other.img");
    let volume = fs::File::create(&path).unwrap();
    volume.set_len(1 << 20).unwrap();
    let mut guest = Guest::boot(dir.path(), &path);
    guest.console.wait_for("tiny tiny ready");
    let key = guest.console.run("wc -c < /etc/dropbear/dropbear_ed25519_host_key");
    assert!(key.contains("83"), "a key was made: {key}");
    guest.power_down();
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_image_is_a_disk_that_stands_alone() {
    let header = pavo::image::header::inspect(&image()).unwrap();
    assert_eq!(header.format, pavo::image::header::Format::Qcow2);
    assert!(header.virtual_size < 64 << 20, "{header:?}");
}
