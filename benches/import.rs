//! `pavo image import` of 1 GiB, against reading, hashing and writing it once.
//!
//! `cargo bench --bench import` needs 8 GiB of room; nothing runs. The floor is `tee` into
//! `sha256sum` and a file, and `sync` of that; both take turns on the same file system, with
//! the source in memory. What must hold (README): 1.2 of the floor.

#![expect(clippy::print_stdout, reason = "a bench prints")]
#![expect(clippy::print_stderr, reason = "it says aloud that it cannot run")]

#[expect(dead_code, reason = "another bench uses more of it")]
mod lab;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use lab::Lab;

const ROUNDS: usize = 5;
const SIZE: usize = 1 << 30;

fn main() {
    let Some(lab) = Lab::new() else { return };
    let work = lab.path().join("work");
    fs::create_dir_all(&work).unwrap();
    lab.give(&work);
    let repos = format!("repos:\n  - name: user\n    path: {}\n", work.join("images").display());
    fs::write(lab.path().join("conf/repos.yaml"), repos).unwrap();
    let raw = work.join("disk.raw");
    fill(&raw);
    lab.give(&raw);
    let qcow2 = work.join("disk.qcow2");
    let mut convert = lab.ordinary(Path::new("qemu-img"));
    run(convert.args(["convert", "-f", "raw", "-O", "qcow2"]).args([&raw, &qcow2]));
    println!("import of 1 GiB, median of {ROUNDS}    pavo  floor  ratio");
    for (what, file) in [("raw", &raw), ("qcow2", &qcow2)] {
        let [mut ours, mut floor] = [const { Vec::new() }; 2];
        for round in 0..ROUNDS {
            let name = format!("{what}{round}");
            ours.push(timed(&mut lab.pavo(&["image", "import", file.to_str().unwrap(), &name])));
            run(&mut lab.pavo(&["image", "delete", &name]));
            let copy = work.join("copy");
            let mut plain = lab.ordinary(Path::new("sh"));
            let (from, to) = (file.display(), copy.display());
            plain.arg("-c").arg(format!("tee {to} <{from} | sha256sum >/dev/null && sync {to}"));
            floor.push(timed(&mut plain));
            fs::remove_file(&copy).unwrap();
        }
        let (ours, floor) = (median(ours), median(floor));
        let ratio = ours.as_secs_f64() / floor.as_secs_f64();
        println!(
            "{what:<8} time (s)               {:8.2} {:6.2} {ratio:6.2}   1.2 at most",
            ours.as_secs_f64(),
            floor.as_secs_f64()
        );
    }
}

/// Writes numbers without an end to find: nothing in it is empty, or twice.
fn fill(path: &Path) {
    let mut file = std::io::BufWriter::new(fs::File::create(path).unwrap());
    let mut number = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..SIZE / 8 {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        file.write_all(&number.to_le_bytes()).unwrap();
    }
    file.flush().unwrap();
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn timed(command: &mut Command) -> Duration {
    let start = Instant::now();
    run(command);
    start.elapsed()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
