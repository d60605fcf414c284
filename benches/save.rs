//! `pavo save` of a VM's disk on which 1 GiB was written, against `qemu-img convert` of the
//! same data on the same file system.
//!
//! `cargo bench --bench save` needs what `alloc` needs, and 8 GiB of room. QEMU itself writes
//! the data; the VM has not booted. Both sides end when the data is on the disk
//! (`qemu-img` by `sync`), and take turns. What must hold (README): 1.15 of `qemu-img`'s.

#![expect(clippy::print_stdout, reason = "a bench prints")]
#![expect(clippy::print_stderr, reason = "it says aloud that it cannot run")]

#[expect(dead_code, reason = "another bench uses more of it")]
mod lab;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::Lab;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const ROUNDS: usize = 5;
/// What QEMU calls the device that the guest writes to.
const DISK: &str = "/machine/peripheral/disk-dev/virtio-backend";

fn main() {
    let Some(lab) = Lab::new() else { return };
    let raw = lab.path().join("work/empty.raw");
    fs::create_dir_all(raw.parent().unwrap()).unwrap();
    lab.give(raw.parent().unwrap());
    fs::File::create(&raw).unwrap().set_len(2 << 30).unwrap();
    lab.give(&raw);
    let images = lab.path().join("work/images");
    let repos = format!("repos:\n  - name: user\n    path: {}\n", images.display());
    fs::write(lab.path().join("conf/repos.yaml"), repos).unwrap();
    run(lab.pavo(&["image", "import", raw.to_str().unwrap(), "large"]));

    let words = ["alloc", "--mem", "128", "-E", "echo up; exec sleep 3600", "large"];
    let mut command = lab.pavo(&words);
    let mut launcher = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(launcher.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "up\n", "the cluster runs");
    for part in 0..16 {
        // Different bytes, which no tool finds to be zeros.
        let write = format!("qemu-io -d {DISK} \"write -P {} {}M 64M\"", part + 1, part * 64);
        run(lab.pavo(&["monitor-cmd", "vm0", &write]));
    }
    let [mut ours, mut theirs] = [const { Vec::new() }; 2];
    for round in 0..ROUNDS {
        let name = format!("round{round}");
        ours.push(timed(lab.pavo(&["save", "-d", &name, "vm0"])));
        let saved = blob(&images, &name);
        let copy = lab.path().join("work/copy.qcow2");
        let mut convert = lab.ordinary(Path::new("sh"));
        convert.arg("-c").arg(format!(
            "qemu-img convert -f qcow2 -O qcow2 -B {} -F qcow2 {} {copy} && sync {copy}",
            blob(&images, "large"),
            saved,
            copy = copy.display()
        ));
        theirs.push(timed(convert));
        fs::remove_file(&copy).unwrap();
        run(lab.pavo(&["image", "delete", &name]));
    }
    let (ours, theirs) = (median(ours), median(theirs));
    let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
    println!("save of 1 GiB, median of {ROUNDS}      pavo  qemu-img  ratio");
    println!(
        "time (s)                       {:9.2} {:9.2} {ratio:6.2}   1.15 at most",
        ours.as_secs_f64(),
        theirs.as_secs_f64()
    );
    kill(Pid::from_raw(i32::try_from(launcher.id()).unwrap()), Signal::SIGTERM).unwrap();
    launcher.wait().unwrap();
}

fn run(mut command: Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn timed(command: Command) -> Duration {
    let start = Instant::now();
    run(command);
    start.elapsed()
}

/// The top layer of an image's first revision.
fn blob(images: &Path, name: &str) -> String {
    let meta = fs::read(images.join(format!("meta/{name}@0"))).unwrap();
    let meta: serde_json::Value = serde_json::from_slice(&meta).unwrap();
    let hash = meta["data_blobs"].as_array().unwrap().last().unwrap().as_str().unwrap();
    images.join("data").join(&hash[..2]).join(hash).display().to_string()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
