//! Makes a guest that goes on from another's memory the one that it is to be.
//!
//! A process of its own, which is this program again. First what makes it the other: random
//! numbers, clock, addresses, name, keys. Its interfaces have no link meanwhile. Then, once
//! they have one, what only the guest's own programs can do: leases, the ssh server. An image
//! that has a way of its own for that has a program [`HOOK`]; for others, [`SERVICES`] knows
//! what distributions have.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use pavo_agent::{ASSUMED, Exec, Identity, Interface, MAX_IDENTITY};

use super::copying::OURSELVES;

const ASSUME: &str = "--assume";
/// An image's own program for what follows.
const HOOK: &str = "/etc/pavo/assume";
/// The same for distributions: run by `sh`, its arguments are the interfaces.
const SERVICES: &str = include_str!("assume.sh");
/// Where a network's configuration names addresses.
const NETWORK: &[&str] = &[
    "etc/netplan",
    "etc/network",
    "etc/network/interfaces.d",
    "etc/systemd/network",
    "run/systemd/network",
    "etc/udev/rules.d",
    "etc/NetworkManager/system-connections",
    "run/NetworkManager/system-connections",
    "etc/sysconfig/network-scripts",
];
/// The longest file that is looked through.
const MAX_FILE: u64 = 256 << 10;
/// How long links may take to be there.
const LINKS: (Duration, Duration) = (Duration::from_secs(20), Duration::from_millis(5));

nix::ioctl_write_ptr_bad!(set_address, libc::SIOCSIFHWADDR, libc::ifreq);
nix::ioctl_write_ptr_bad!(add_entropy, nix::request_code_write!(b'R', 0x03, 8), Entropy);
nix::ioctl_none!(reseed, b'R', 0x07);

/// What the kernel calls `rand_pool_info`.
#[repr(C)]
pub struct Entropy {
    bits: libc::c_int,
    length: libc::c_int,
    bytes: [u8; 256],
}

/// The command that does it.
pub fn command() -> Exec {
    let argv = [OURSELVES, ASSUME].map(|word| word.as_bytes().to_vec()).into();
    Exec { argv, input: true, ..Exec::default() }
}

/// Does it, if that is what this process was started for.
pub fn assume(words: &[OsString]) -> Option<ExitCode> {
    if words != [ASSUME] {
        return None;
    }
    Some(match run(Path::new("/")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            let _ = writeln!(io::stderr(), "{why}");
            ExitCode::FAILURE
        }
    })
}

/// What went wrong, with what was being done.
type Done<T = ()> = Result<T, String>;

trait Doing<T> {
    fn doing(self, what: impl std::fmt::Display) -> Done<T>;
}

impl<T, E: std::fmt::Display> Doing<T> for Result<T, E> {
    fn doing(self, what: impl std::fmt::Display) -> Done<T> {
        self.map_err(|error| format!("{what}: {error}"))
    }
}

fn run(root: &Path) -> Done {
    let mut input = io::stdin().lock();
    let identity = read(&mut input)?;
    stir(root, &identity)?;
    let now = Duration::from_nanos(identity.now);
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(now)).doing("its clock")?;
    let links = links(&identity.interfaces)?;
    for (name, interface) in &links {
        readdress(name, interface)?;
    }
    let former = nix::unistd::gethostname().unwrap_or_default();
    nix::unistd::sethostname(&identity.hostname).doing("its name")?;
    files(root, &identity, &former.to_string_lossy())?;
    let mut output = io::stdout();
    output.write_all(ASSUMED).and_then(|()| output.flush()).doing("telling the host")?;
    // The host gives its interfaces their links, and ends our input.
    io::copy(&mut input, &mut io::sink()).doing("waiting for the host")?;
    let names: Vec<&str> = links.iter().map(|(name, _)| &**name).collect();
    wait_for_links(&names)?;
    services(&names)
}

/// What comes on the input, which does not end with it.
fn read(input: &mut impl Read) -> Done<Identity> {
    let mut length = [0; 4];
    input.read_exact(&mut length).doing("reading who it is")?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_IDENTITY {
        return Err(format!("an identity of {length} bytes"));
    }
    let mut bytes = vec![0; length];
    input.read_exact(&mut bytes).doing("reading who it is")?;
    Identity::decode(&bytes).doing("reading who it is")
}

/// Gives it other random numbers than whoever goes on from the same memory.
fn stir(root: &Path, identity: &Identity) -> Done {
    let doing = "its random numbers";
    let device = File::options().read(true).write(true).open("/dev/urandom").doing(doing)?;
    for piece in identity.entropy.chunks(256) {
        let mut entropy = Entropy { bits: 0, length: piece.len() as libc::c_int, bytes: [0; 256] };
        entropy.bytes[..piece.len()].copy_from_slice(piece);
        entropy.bits = entropy.length * 8;
        #[expect(unsafe_code)]
        // SAFETY: the kernel reads so many bytes as `length` says, which are there.
        unsafe { add_entropy(device.as_raw_fd(), &entropy) }.doing(doing)?;
    }
    #[expect(unsafe_code)]
    // SAFETY: it has no argument. A kernel that does not know it takes what was added by itself.
    let _ = unsafe { reseed(device.as_raw_fd()) };
    let kept = root.join("var/lib/systemd/random-seed");
    if kept.exists() {
        let mut bytes = [0; 512];
        File::open("/dev/urandom").and_then(|mut it| it.read_exact(&mut bytes)).doing(doing)?;
        write_over(&kept, &bytes)?;
    }
    Ok(())
}

/// The names of the interfaces, each by the address that it still has.
fn links(interfaces: &[Interface]) -> Done<Vec<(String, Interface)>> {
    let entries = fs::read_dir("/sys/class/net").doing("its interfaces")?;
    let mut there: Vec<(u32, String, String)> = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        let say = |what: &str| fs::read_to_string(path.join(what)).unwrap_or_default();
        let index = say("ifindex").trim().parse().unwrap_or(u32::MAX);
        // What the guest has made on top of them has the same address.
        if let (Some(name), true) = (path.file_name(), path.join("device").exists()) {
            there.push((index, name.to_string_lossy().into_owned(), say("address").trim().into()));
        }
    }
    there.sort();
    let find = |interface: &Interface| {
        let at = |mac: [u8; 6]| there.iter().position(|(_, _, address)| *address == text(mac));
        let former = text(interface.former);
        // It may have been told before.
        let found = at(interface.former).or_else(|| at(interface.mac));
        let found =
            found.ok_or_else(|| format!("it has no interface with the address {former}"))?;
        Ok((there.remove(found).1, interface.clone()))
    };
    interfaces.iter().map(find).collect()
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn readdress(name: &str, interface: &Interface) -> Done {
    let doing = || format!("the address of {name}");
    #[expect(unsafe_code)]
    // SAFETY: it is a plain structure of numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    let mut address = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: [0; 14] };
    for (to, from) in address.sa_data.iter_mut().zip(interface.mac) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_hwaddr = address;
    let socket = UdpSocket::bind("127.0.0.1:0").or_else(|_| UdpSocket::bind("[::1]:0"));
    let socket = socket.doing(doing())?;
    #[expect(unsafe_code)]
    // SAFETY: the kernel reads the structure, which outlives the call.
    unsafe { set_address(socket.as_raw_fd(), &request) }.doing(doing())?;
    let mtu = format!("/sys/class/net/{name}/mtu");
    fs::write(mtu, interface.mtu.to_string()).doing(format!("the MTU of {name}"))
}

/// All that is on its disk, or in its memory as files.
fn files(root: &Path, identity: &Identity, former: &str) -> Done {
    let (name, domain) = (&identity.hostname, identity.domain.as_deref());
    let path = root.join("etc/hostname");
    if path.exists() {
        write_over(&path, format!("{name}\n").as_bytes())?;
    }
    change(&root.join("etc/hosts"), |text| rename(text, former, name, domain))?;
    let path = root.join("etc/machine-id");
    if path.metadata().is_ok_and(|it| it.len() > 0) {
        write_over(&path, format!("{}\n", identity.machine_id).as_bytes())?;
    }
    for folder in NETWORK {
        for path in entries(&root.join(folder)) {
            change(&path, |text| replace(text, &identity.words))?;
        }
    }
    for home in homes(root) {
        for name in ["authorized_keys", "authorized_keys2"] {
            change(&home.join(".ssh").join(name), |text| replace(text, &identity.keys))?;
        }
    }
    host_keys(root, identity)
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// Where people of this guest are at home.
fn homes(root: &Path) -> Vec<PathBuf> {
    let passwd = fs::read_to_string(root.join("etc/passwd")).unwrap_or_default();
    let home = |line: &str| Some(line.split(':').nth(5)?.trim_start_matches('/').to_owned());
    let mut homes: Vec<String> = passwd.lines().filter_map(home).collect();
    homes.sort();
    homes.dedup();
    homes.into_iter().map(|home| root.join(home)).collect()
}

/// Changes a file of text, if there is one and there is something to change.
fn change(path: &Path, how: impl FnOnce(&str) -> String) -> Done {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = File::options().read(true).custom_flags(flags).open(path);
    let Ok(file) = file else { return Ok(()) };
    let plain = file.metadata().is_ok_and(|about| about.is_file() && about.len() <= MAX_FILE);
    let mut text = String::new();
    if !plain || file.take(MAX_FILE).read_to_string(&mut text).is_err() {
        return Ok(());
    }
    let changed = how(&text);
    if changed == text { Ok(()) } else { write_over(path, changed.as_bytes()) }
}

/// Writes what is to be in a file that is there: whose it is and who may read it stays.
fn write_over(path: &Path, bytes: &[u8]) -> Done {
    let mut options = File::options();
    options.write(true).truncate(true).custom_flags(libc::O_NOFOLLOW);
    let written = options.open(path).and_then(|mut file| file.write_all(bytes));
    written.doing(format!("writing `{}`", path.display()))
}

/// Replaces words, all at the same time: one may become another's former one.
fn replace(text: &str, words: &[(String, String)]) -> String {
    let (mut rest, mut replaced) = (text, String::with_capacity(text.len()));
    let found = |rest: &str| {
        let places = words.iter().filter_map(|(from, to)| Some((rest.find(&**from)?, from, to)));
        places
            .min_by_key(|(at, from, _)| (*at, usize::MAX - from.len()))
            .map(|(at, from, to)| (at, from.len(), to.clone()))
    };
    while let Some((at, length, to)) = found(rest) {
        replaced.push_str(&rest[..at]);
        replaced.push_str(&to);
        rest = &rest[at + length..];
    }
    replaced + rest
}

/// The name of the guest itself in `/etc/hosts`.
fn rename(hosts: &str, former: &str, name: &str, domain: Option<&str>) -> String {
    let full = domain.map_or(name.to_owned(), |domain| format!("{name}.{domain}"));
    let word = |word: &str| match word.strip_prefix(former) {
        Some("") => name.to_owned(),
        Some(rest) if rest.starts_with('.') => full.clone(),
        _ => word.to_owned(),
    };
    let line = |line: &str| {
        let own = line.starts_with("127.") || line.starts_with("::1");
        if !own || former.is_empty() || former == "localhost" {
            return line.to_owned();
        }
        line.split_inclusive([' ', '\t', '\n'])
            .map(|piece| {
                let end = piece.trim_end_matches([' ', '\t', '\n']);
                word(end) + &piece[end.len()..]
            })
            .collect()
    };
    hosts.split_inclusive('\n').map(line).collect()
}

/// The ssh server's: of the other none is left.
fn host_keys(root: &Path, identity: &Identity) -> Done {
    let line = |text: &str| format!("{}\n", text.trim_end()).into_bytes();
    let (private, public) = (line(&identity.host_key.0), line(&identity.host_key.1));
    let ssh = root.join("etc/ssh");
    if forget_keys(&ssh, "ssh_host_")? {
        write_new(&ssh.join("ssh_host_ed25519_key"), 0o600, &private)?;
        write_new(&ssh.join("ssh_host_ed25519_key.pub"), 0o644, &public)?;
    }
    let dropbear = root.join("etc/dropbear");
    if forget_keys(&dropbear, "dropbear_")? {
        let path = dropbear.join("dropbear_ed25519_host_key");
        write_new(&path, 0o600, &identity.dropbear_key)?;
    }
    Ok(())
}

/// Removes the keys in a folder; false where there is no such folder.
fn forget_keys(folder: &Path, start: &str) -> Done<bool> {
    if !folder.is_dir() {
        return Ok(false);
    }
    for path in entries(folder) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let key = name.strip_suffix(".pub").unwrap_or(&name);
        if name.starts_with(start) && (key.ends_with("_key") || key.ends_with("-cert")) {
            fs::remove_file(&path).doing(format!("removing `{}`", path.display()))?;
        }
    }
    Ok(true)
}

fn write_new(path: &Path, mode: u32, bytes: &[u8]) -> Done {
    let file = File::options().write(true).create_new(true).mode(mode).open(path);
    let written = file.and_then(|mut file| file.write_all(bytes));
    written.doing(format!("writing `{}`", path.display()))
}

/// Waits until those that are in use have a carrier.
fn wait_for_links(names: &[&str]) -> Done {
    let say = |name: &str, what: &str| {
        fs::read_to_string(format!("/sys/class/net/{name}/{what}")).unwrap_or_default()
    };
    let in_use = |name: &str| {
        let flags = u32::from_str_radix(say(name, "flags").trim().trim_start_matches("0x"), 16);
        flags.is_ok_and(|flags| flags & libc::IFF_UP as u32 != 0)
    };
    let end = Instant::now() + LINKS.0;
    for name in names {
        while in_use(name) && say(name, "carrier").trim() != "1" {
            if Instant::now() >= end {
                return Err(format!("{name} has no link"));
            }
            sleep(LINKS.1);
        }
    }
    Ok(())
}

/// What the guest's own programs have to do.
fn services(names: &[&str]) -> Done {
    let mut command = match fs::metadata(HOOK) {
        Ok(about) if about.permissions().mode() & 0o111 != 0 => Command::new(HOOK),
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(format!("{HOOK}: {error}"));
        }
        _ => {
            let mut shell = Command::new("/bin/sh");
            shell.args(["-c", SERVICES, "assume"]);
            shell
        }
    };
    let command = command.args(names).stdin(Stdio::null()).stdout(Stdio::null());
    let status = command.status().doing("its services")?;
    if status.success() { Ok(()) } else { Err(format!("its services are not there: {status}")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(from, to)| ((*from).into(), (*to).into())).collect()
    }

    #[test]
    fn words_are_replaced_at_the_same_time() {
        let words = pairs(&[("a:1", "a:2"), ("a:2", "a:3"), ("fd::1/64", "fd::2/64")]);
        assert_eq!(replace("x a:1 a:2\nfd::1/64", &words), "x a:2 a:3\nfd::2/64");
        assert_eq!(replace("fd::1", &words), "fd::1");
        assert_eq!(replace("a:1", &[]), "a:1");
        // The longest of those that begin at the same place.
        assert_eq!(replace("abc", &pairs(&[("a", "x"), ("ab", "y")])), "yc");
    }

    #[test]
    fn only_its_own_name_becomes_another() {
        let hosts = "127.0.0.1 localhost\n127.0.1.1\tvm0.pavo.internal vm0 vm01\n10.0.0.1 vm0\n";
        let expected = "127.0.0.1 localhost\n127.0.1.1\tvm2.x.org vm2 vm01\n10.0.0.1 vm0\n";
        assert_eq!(rename(hosts, "vm0", "vm2", Some("x.org")), expected);
        assert_eq!(rename(hosts, "", "vm2", None), hosts);
        assert_eq!(rename(hosts, "localhost", "vm2", None), hosts);
    }

    #[test]
    fn nothing_of_the_other_is_left_in_its_files() {
        let dir = std::env::temp_dir().join(format!("pavo-assume-{}", std::process::id()));
        let put = |name: &str, text: &str| {
            let path = dir.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
        };
        let get = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
        put("etc/hostname", "vm0\n");
        put("etc/machine-id", "old\n");
        put("etc/hosts", "127.0.1.1 vm0\n");
        put("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nada:x:1:1::/home/ada:/bin/sh\n");
        put("etc/netplan/50.yaml", "macaddress: 52:54:00:00:00:01\n");
        put("root/.ssh/authorized_keys", "command=\"x\" ssh-ed25519 OLD me\nssh-rsa MINE\n");
        put("home/ada/.ssh/authorized_keys", "ssh-ed25519 OLD me\n");
        for name in ["ssh_host_rsa_key", "ssh_host_rsa_key.pub", "ssh_host_ed25519_key"] {
            put(&format!("etc/ssh/{name}"), "old");
        }
        put("etc/ssh/sshd_config", "Port 22\n");
        put("etc/dropbear/dropbear_ed25519_host_key", "old");
        let mode = |name: &str| fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777;
        fs::set_permissions(dir.join("etc/netplan/50.yaml"), Permissions::from_mode(0o600))
            .unwrap();
        let identity = Identity {
            hostname: "vm3".into(),
            machine_id: "new".into(),
            words: pairs(&[("52:54:00:00:00:01", "52:54:00:00:00:04")]),
            keys: pairs(&[("ssh-ed25519 OLD", "ssh-ed25519 NEW")]),
            host_key: ("private\n".into(), "public".into()),
            dropbear_key: b"binary".to_vec(),
            ..Identity::default()
        };
        // Twice is as good as once: a guest may be told again.
        for former in ["vm0", "vm3"] {
            files(&dir, &identity, former).unwrap();
            assert_eq!(get("etc/hostname"), "vm3\n");
            assert_eq!(get("etc/machine-id"), "new\n");
            assert_eq!(get("etc/hosts"), "127.0.1.1 vm3\n");
            assert_eq!(get("etc/netplan/50.yaml"), "macaddress: 52:54:00:00:00:04\n");
            assert_eq!(mode("etc/netplan/50.yaml"), 0o600);
            let keys = "command=\"x\" ssh-ed25519 NEW me\nssh-rsa MINE\n";
            assert_eq!(get("root/.ssh/authorized_keys"), keys);
            assert_eq!(get("home/ada/.ssh/authorized_keys"), "ssh-ed25519 NEW me\n");
            assert_eq!(get("etc/ssh/ssh_host_ed25519_key"), "private\n");
            assert_eq!(get("etc/ssh/ssh_host_ed25519_key.pub"), "public\n");
            assert_eq!(get("etc/dropbear/dropbear_ed25519_host_key"), "binary");
            assert_eq!(entries(&dir.join("etc/ssh")).len(), 3);
            assert_eq!(mode("etc/ssh/ssh_host_ed25519_key"), 0o600);
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
