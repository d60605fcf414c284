//! Screens of guests: who sees them, and who does not.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use des::Des;
use des::cipher::{BlockEncrypt, KeyInit};
use nix::sys::signal::Signal;

use super::running::Running;
use super::world::{World, world};

/// A user that is neither root nor the one of the cluster.
const STRANGER: u32 = 12_345;

/// A value of the file that was printed for a viewer.
fn value(display: &Running, key: &str) -> String {
    display.wait_for("\ntitle=");
    let text = display.stdout();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    line.unwrap().to_owned()
}

fn display(world: &World, words: &[&str]) -> Running {
    let mut command = world.pavo_command(&["display"]);
    command.args(words);
    world.start(command)
}

fn connect(display: &Running) -> TcpStream {
    let port: u16 = value(display, "port").parse().unwrap();
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream
}

fn take<const N: usize>(stream: &mut TcpStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Greets a VNC server, and answers its challenge; returns its verdict, 0 for a good one.
fn answer_vnc(stream: &mut TcpStream, password: &str) -> u32 {
    assert_eq!(&take(stream), b"RFB 003.008\n");
    stream.write_all(b"RFB 003.008\n").unwrap();
    // One way in: by a password.
    assert_eq!(take(stream), [1, 2]);
    stream.write_all(&[2]).unwrap();
    let mut key = [0; 8];
    for (to, from) in key.iter_mut().zip(password.bytes()) {
        *to = from.reverse_bits();
    }
    let mut answer: [u8; 16] = take(stream);
    for half in answer.chunks_mut(8) {
        Des::new(&key.into()).encrypt_block(half.into());
    }
    stream.write_all(&answer).unwrap();
    u32::from_be_bytes(take(stream))
}

#[test]
fn a_screen_is_seen_with_the_password_by_its_user_alone() {
    world(|world| {
        world.template("seen", "remote-display: vnc");
        let alloc = world.idle(&["seen"]);
        let shown = display(world, &["--print", "vm0"]);
        assert_eq!(value(&shown, "type"), "vnc");
        let password = value(&shown, "password");

        let mut viewer = connect(&shown);
        assert_eq!(answer_vnc(&mut viewer, &password), 0);
        viewer.write_all(&[1]).unwrap();
        let size: [u8; 4] = take(&mut viewer);
        // A text screen of the BIOS, or larger.
        assert!(u16::from_be_bytes([size[0], size[1]]) >= 320, "{size:?}");
        assert!(u16::from_be_bytes([size[2], size[3]]) >= 200, "{size:?}");

        assert_eq!(answer_vnc(&mut connect(&shown), "wrong"), 1);
        assert_eq!(answer_vnc(&mut connect(&shown), ""), 1);
        strangers_do_not_see_it(&shown);
        the_password_is_nowhere(world, &password);

        // A second viewer is given the same.
        let again = display(world, &["--print", "vm0"]);
        assert_eq!(value(&again, "password"), password);
        again.signal(Signal::SIGINT);
        assert_eq!(again.finish().code, Some(0));
        world.ok(&["cancel"]);
        alloc.finish();
        let output = shown.finish();
        assert_eq!(output.code, Some(4), "{output}");
        assert!(output.stderr.contains("vm0 has ended"), "{output}");
    });
}

fn strangers_do_not_see_it(shown: &Running) {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let port = value(shown, "port");
    let script =
        format!("exec 3<>/dev/tcp/127.0.0.1/{port}; read -r -n 3 -u 3 word; echo \"$word\"");
    let mut bash = Command::new("bash");
    let output = bash.args(["-c", &script]).uid(STRANGER).gid(STRANGER).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "");
    shown.wait_for("turned away a program of another user (uid 12345)");
}

/// Neither in a file of the job, nor in what anybody sees of a process.
fn the_password_is_nowhere(world: &World, password: &str) {
    let job = world.job_dir();
    let found = Command::new("grep").args(["-rlaF", "-D", "skip", password]).arg(&job).output();
    assert_eq!(String::from_utf8_lossy(&found.unwrap().stdout), "");
    for process in world.processes() {
        assert!(!process.command.contains(password), "{}", process.command);
        let environment = fs::read(format!("/proc/{}/environ", process.pid)).unwrap_or_default();
        let found = environment.windows(password.len()).any(|part| part == password.as_bytes());
        assert!(!found, "in the environment of {}", process.command);
    }
    let socket = job.join("vm0/display.sock");
    assert!(socket.exists());
    let about = fs::metadata(job.join("vm0")).unwrap();
    assert_eq!(about.permissions().mode() & 0o777, 0o700);
}

#[test]
fn a_viewer_is_started_and_ends_it() {
    world(|world| {
        world.template("seen", "remote-display: vnc");
        let alloc = world.idle(&["seen"]);
        let viewer = world.write("viewer", "#!/bin/sh\nstat -c %a \"$1\"; cat \"$1\"; exit 7\n");
        fs::set_permissions(&viewer, fs::Permissions::from_mode(0o755)).unwrap();
        let shown = world.pavo(&["display", &format!("--viewer={}", viewer.display())]);
        assert_eq!(shown.code, Some(7), "{shown}");
        assert!(shown.stdout.starts_with("600\n[virt-viewer]\ntype=vnc\n"), "{shown}");
        let absent = world.pavo(&["display", "--viewer=/no/viewer"]);
        assert!(absent.stderr.contains("help: install it (Debian: virt-viewer)"), "{absent}");
        world.ok(&["cancel"]);
        alloc.finish();

        let alloc = world.idle(&["tiny"]);
        let none = world.pavo(&["display"]);
        assert_eq!(none.code, Some(2), "{none}");
        assert!(none.stderr.contains("because: vm0 has no screen"), "{none}");
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

/// The link message of SPICE's main channel: magic, version 2.2, its size; connection 0,
/// channel 1, no capabilities.
fn spice_link() -> Vec<u8> {
    let mut link = b"REDQ".to_vec();
    link.extend([2_u32, 2, 18].iter().flat_map(|word| word.to_le_bytes()));
    link.extend([0, 0, 0, 0, 1, 0]);
    link.extend([0_u32, 0, 18].iter().flat_map(|word| word.to_le_bytes()));
    link
}

#[test]
fn spice_asks_for_the_password_too_and_a_qemu_without_it_says_so() {
    world(|world| {
        world.template("seen", "remote-display: spice");
        let alloc = world.alloc(&["--mem", "128", "-E", "sleep 600", "seen"]);
        let offered = Command::new("qemu-system-x86_64").args(["-spice", "help"]).output().unwrap();
        if !String::from_utf8_lossy(&offered.stdout).contains("disable-ticketing") {
            let output = alloc.finish();
            assert!(output.stderr.contains("this QEMU has no SPICE"), "{output}");
            return;
        }
        alloc.wait_for("vm0 runs\n");
        let shown = display(world, &["-p"]);
        assert_eq!(value(&shown, "type"), "spice");
        let verdict = |password: Option<&str>| {
            let mut stream = connect(&shown);
            stream.write_all(&spice_link()).unwrap();
            let header: [u8; 16] = take(&mut stream);
            assert_eq!(&header[..4], b"REDQ");
            let mut reply = vec![0; u32::from_le_bytes(header[12..].try_into().unwrap()) as usize];
            stream.read_exact(&mut reply).unwrap();
            assert_eq!(reply[..4], [0; 4], "it takes the link");
            let ticket = password.map_or(vec![0; 128], |text| sealed(world, &reply[4..166], text));
            stream.write_all(&ticket).unwrap();
            u32::from_le_bytes(take(&mut stream))
        };
        // Permission denied.
        assert_eq!(verdict(None), 7);
        assert_eq!(verdict(Some("wrong")), 7);
        assert_eq!(verdict(Some(&value(&shown, "password"))), 0);
        world.ok(&["cancel"]);
        alloc.finish();
        shown.finish();
    });
}

/// A password as SPICE's server reads it: by RSA, with the key that it has sent.
fn sealed(world: &World, key: &[u8], password: &str) -> Vec<u8> {
    let [key_file, text, out] = ["spice.key", "spice.text", "spice.out"].map(|it| world.path(it));
    fs::write(&key_file, key).unwrap();
    fs::write(&text, format!("{password}\0")).unwrap();
    let mut openssl = Command::new("openssl");
    openssl.args(["pkeyutl", "-encrypt", "-pubin", "-keyform", "DER", "-inkey"]).arg(&key_file);
    openssl.args(["-pkeyopt", "rsa_padding_mode:oaep", "-in"]).arg(&text).arg("-out").arg(&out);
    assert!(openssl.status().unwrap().success());
    fs::read(&out).unwrap()
}
