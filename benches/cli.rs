//! What the commands cost that only look, beside a program that does nothing.
//!
//! `cargo bench --bench cli` needs no privilege. CPU, wall-clock time and peak memory of
//! each run are the kernel's own figures for that child; shown are the medians. What must
//! hold (README): at most 5 ms of CPU and 10 MiB.

#![expect(clippy::print_stdout, reason = "a bench prints")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::libc;
use pavo::config::Repo;
use pavo::host::process;
use pavo::image::library::Library;
use pavo::model::job::{JobRecord, VmRecord};
use pavo::model::owner::Owner;
use pavo::store::{Change, Commit, Store, embedded, keys};

const ROUNDS: usize = 41;
const IMAGES: usize = 200;
const JOBS: u32 = 10;
const MAX_CPU: Duration = Duration::from_millis(5);
const MAX_KIB: i64 = 10 << 10;
/// For a list of 1,000 images with 10,000 revisions.
const MAX_LIST: Duration = Duration::from_millis(30);

/// What one run took.
#[derive(Clone, Copy)]
struct Cost {
    cpu: Duration,
    wall: Duration,
    /// The most memory that was resident at once.
    kib: i64,
}

fn main() {
    let dir = tempfile::tempdir().unwrap();
    for folder in ["conf", "repo", "none"] {
        std::fs::create_dir(dir.path().join(folder)).unwrap();
    }
    let repos = format!("repos:\n  - name: user\n    path: {}/repo\n", dir.path().display());
    std::fs::write(dir.path().join("conf/repos.yaml"), repos).unwrap();

    println!("{:<28} {:>8} {:>9} {:>11}", "median of 41", "CPU", "wall", "memory");
    let nothing = measured(&mut Command::new("/bin/true"));
    println!("{}", line("/bin/true (floor)", nothing));
    let pavo = |what: &str, words: &[&str]| {
        let cost = measured(&mut command(dir.path(), words));
        let met = if cost.cpu <= MAX_CPU && cost.kib <= MAX_KIB { "ok" } else { "MISSED" };
        println!("{}   ≤ 5 ms, ≤ 10 MiB: {met}", line(what, cost));
    };
    pavo("--version", &["--version"]);
    pavo("template list", &["template", "list"]);
    pavo("ps, no store", &["ps"]);
    let jobs = records(dir.path());
    pavo("ps, 10 jobs", &["ps"]);
    assert_eq!(lines(&mut command(dir.path(), &["ps"])), jobs + 1);
    pavo("image list, no image", &["image", "list"]);
    images(dir.path());
    pavo("image list, 200 images", &["image", "list"]);
    assert_eq!(lines(&mut command(dir.path(), &["image", "list"])), IMAGES + 1);
    pavo("template list, 200 images", &["template", "list"]);
    let images = many(dir.path());
    let cost = measured(&mut command(dir.path(), &["image", "list"]));
    let met = if cost.wall <= MAX_LIST { "ok" } else { "MISSED" };
    println!("{}   ≤ 30 ms: {met}", line("image list, 1,000 × 10", cost));
    assert_eq!(lines(&mut command(dir.path(), &["image", "list"])), images + 1);
}

fn line(what: &str, cost: Cost) -> String {
    let millis = |time: Duration| time.as_secs_f64() * 1e3;
    let mib = cost.kib as f64 / 1024.0;
    format!("{what:<28} {:>5.2} ms {:>6.2} ms {mib:>7.1} MiB", millis(cost.cpu), millis(cost.wall))
}

/// The program, in a world of its own below `dir`.
fn command(dir: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pavo"));
    command.args(words).env_clear().env("HOME", dir).env("PAVO_STATE_DIR", dir.join("state"));
    command.env("PAVO_SYSTEM_CONF_DIR", dir.join("none"));
    command.env("PAVO_USER_CONF_DIR", dir.join("conf"));
    command
}

fn lines(command: &mut Command) -> usize {
    let output = command.output().unwrap();
    output.stdout.iter().filter(|byte| **byte == b'\n').count()
}

fn measured(command: &mut Command) -> Cost {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    once(command);
    let costs: Vec<Cost> = (0..ROUNDS).map(|_| once(command)).collect();
    let cpu = median(costs.iter().map(|cost| cost.cpu).collect());
    let wall = median(costs.iter().map(|cost| cost.wall).collect());
    Cost { cpu, wall, kib: median(costs.iter().map(|cost| cost.kib).collect()) }
}

#[expect(clippy::zombie_processes, reason = "wait4 waits for it, and tells what it took")]
fn once(command: &mut Command) -> Cost {
    let start = Instant::now();
    let child = command.spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let mut status = 0;
    #[expect(unsafe_code)]
    // SAFETY: a struct of numbers, for which all zeros is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    #[expect(unsafe_code)]
    // SAFETY: both pointers are to values of ours that outlive the call.
    let waited = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) };
    let wall = start.elapsed();
    assert_eq!((waited, status), (pid, 0), "{command:?} succeeds");
    let time = |time: libc::timeval| {
        Duration::from_secs(time.tv_sec as u64) + Duration::from_micros(time.tv_usec as u64)
    };
    Cost { cpu: time(usage.ru_utime) + time(usage.ru_stime), wall, kib: usage.ru_maxrss }
}

fn median<T: Ord + Copy>(mut values: Vec<T>) -> T {
    values.sort();
    values[values.len() / 2]
}

/// A store with jobs of this process, which is alive; returns how many.
fn records(dir: &Path) -> usize {
    let uid = nix::unistd::geteuid();
    let user = nix::unistd::User::from_uid(uid).unwrap().map_or(uid.to_string(), |user| user.name);
    let vm = |rank| VmRecord {
        rank,
        template: "tiny".into(),
        image: Some("user:tiny@0".into()),
        cores: 1,
        memory_mib: 512,
        host: "here".into(),
        addresses: vec![[10, 200, 0, rank as u8 + 1].into()],
        ports: Vec::new(),
        ssh_user: "root".into(),
        drives: Vec::new(),
        control: None,
    };
    let change = |job| {
        let record = JobRecord {
            version: JobRecord::VERSION,
            owner: Owner::local(job),
            name: "bench".into(),
            user: user.clone(),
            definition: "tiny:4".into(),
            started: 0,
            time_limit: None,
            launcher: process::current(),
            dir: dir.join("job"),
            host: "here".into(),
            vms: (0..4).map(vm).collect(),
        };
        Change::put_json(keys::job_record(&user, record.owner), &record).unwrap()
    };
    let changes: Vec<Change> = (1..=JOBS).map(change).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = embedded::open(&dir.join("state")).await.unwrap();
        let done = store.commit(&[], &changes).await.unwrap();
        assert!(matches!(done, Commit::Done(_)));
    });
    changes.len()
}

/// A repository of images, all of the same content.
fn images(dir: &Path) {
    let disk = dir.join("disk.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&disk)
        .arg("1M")
        .status()
        .expect("qemu-img is installed");
    assert!(made.success());
    let library = Library::open(&[Repo { name: "user".into(), path: dir.join("repo") }]);
    for number in 0..IMAGES {
        let make = |target: &Path, _: &Path| {
            std::fs::copy(&disk, target).expect("a copy");
            Ok(())
        };
        library.create(&format!("image-{number:03}"), "bench", false, make).unwrap();
    }
}

/// More of them, with ten revisions each; returns how many images there are then. Their
/// files are written as they would be after so many saves, without waiting for the disk.
fn many(dir: &Path) -> usize {
    let meta = dir.join("repo/meta");
    let text = std::fs::read_to_string(meta.join("image-000@0")).unwrap();
    let first: serde_json::Value = serde_json::from_str(&text).unwrap();
    for number in 0..1000 {
        let name = format!("image-{number:03}");
        for revision in 0..10 {
            let mut text = first.clone();
            text["name"] = name.as_str().into();
            text["revision"] = revision.into();
            let path = meta.join(format!("{name}@{revision}"));
            if !path.exists() {
                std::fs::write(path, serde_json::to_vec_pretty(&text).unwrap()).unwrap();
            }
        }
    }
    1000
}
