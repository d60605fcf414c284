//! The command's part, with processes of VMs that do what no real one does when asked.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;
use tokio::task::JoinSet;

use super::super::ssh;
use super::*;
use crate::model::checkpoint::Machine;
use crate::model::job::ProcessId;
use crate::model::owner::Owner;
use crate::model::vm::Accel;
use crate::vm::control;
use crate::vm::testing;

/// A job of VMs whose processes are this test; each step that they are told is remembered.
struct Cluster {
    temp: TempDir,
    job: JobRecord,
    told: Arc<Mutex<Vec<(u32, String)>>>,
    _serving: JoinSet<()>,
}

impl Cluster {
    /// `refuse` is what a VM cannot do.
    fn new(count: u32, refuse: &'static [(u32, &'static str)]) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("job");
        let (told, mut serving) = (Arc::default(), JoinSet::new());
        let vm = |rank| {
            let vm_dir = dir.join(format!("vm{rank}"));
            fs::create_dir_all(&vm_dir).unwrap();
            let listener = control::listen(&vm_dir, control::SOCKET).unwrap();
            listener.set_nonblocking(true).unwrap();
            let listener = UnixListener::from_std(listener).unwrap();
            let spec = testing::spec(&fs::canonicalize(temp.path()).unwrap());
            serving.spawn(serve(listener, rank, refuse, Arc::clone(&told), json!(spec)));
            VmRecord {
                rank,
                template: "tiny".into(),
                image: None,
                cores: 1,
                memory_mib: 64,
                host: "here".into(),
                addresses: Vec::new(),
                ports: Vec::new(),
                ssh_user: "root".into(),
                drives: Vec::new(),
                control: None,
            }
        };
        let vms: Vec<_> = (0..count).map(vm).collect();
        let key = ssh::generate("7").unwrap();
        let known = vec![String::new(); vms.len()];
        ssh::SshFiles::of_job(&dir).write(&key, &vms, &known).unwrap();
        let job = JobRecord {
            version: JobRecord::VERSION,
            owner: Owner::local(7),
            name: "tiny".into(),
            user: "alice".into(),
            definition: format!("tiny:{count}"),
            started: 0,
            time_limit: None,
            launcher: ProcessId { pid: 1, start_time: 1 },
            dir,
            host: "here".into(),
            vms,
        };
        Self { temp, job, told, _serving: serving }
    }

    fn dir(&self) -> PathBuf {
        self.temp.path().join("saved")
    }

    async fn take(&self, keep_running: bool) -> Result<Vec<Error>> {
        let order = Order { dir: &self.dir(), keep_running, script: None, home: self.temp.path() };
        take(None, &self.job, order, &|_| {}, std::future::pending()).await
    }

    /// The last step of a VM.
    fn last(&self, vm: u32) -> String {
        let told = self.told.lock().unwrap();
        told.iter().rev().find(|(rank, _)| *rank == vm).unwrap().1.clone()
    }
}

async fn serve(
    listener: UnixListener,
    rank: u32,
    refuse: &'static [(u32, &'static str)],
    told: Arc<Mutex<Vec<(u32, String)>>>,
    spec: Value,
) {
    let (stream, _) = listener.accept().await.unwrap();
    let (from, mut to) = stream.into_split();
    let (mut lines, mut dir) = (BufReader::new(from).lines(), PathBuf::new());
    while let Ok(Some(line)) = lines.next_line().await {
        let said: Value = serde_json::from_str(&line).unwrap();
        let step = said["step"].as_str().unwrap_or_default().to_owned();
        if let Some(path) = said["dir"].as_str() {
            dir = path.into();
        }
        told.lock().unwrap().push((rank, step.clone()));
        if step == "wait" {
            continue;
        }
        if step == "keep" && refuse.contains(&(rank, "keep slowly")) {
            sleep(Duration::from_millis(100)).await;
        }
        let answer = if refuse.contains(&(rank, &*step)) {
            let error = Error::system("QEMU does not").because(format!("{step} is too much"));
            json!({ "error": error.to_wire() })
        } else if step == "write" {
            let name = format!("vm{rank}.memory.zst");
            fs::write(dir.join(&name), "memory").unwrap();
            let memory = json!(Stored { name, bytes: 6, sha256: String::new() });
            let machine = Machine {
                qemu: [7, 2, 0],
                kind: "q35".into(),
                accel: Accel::Tcg,
                processor: None,
                lacking: Vec::new(),
                cores: 1,
                nodes: Vec::new(),
                pcocc: false,
            };
            json!({ "return": {
                "spec": spec, "paused": false, "machine": machine, "memory": memory
            } })
        } else {
            json!({ "return": null })
        };
        to.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
    }
}

#[tokio::test]
async fn a_vm_that_does_not_go_on_afterwards_is_named() {
    let cluster = Cluster::new(3, &[(1, "resume")]);
    let troubles = cluster.take(true).await.unwrap();
    assert!(cluster.dir().join(MANIFEST).exists());
    let [trouble] = &*troubles else { panic!("{troubles:?}") };
    let report = trouble.report();
    assert!(report.contains("resuming vm1 on `here`"), "{report}");
    assert!(report.contains("because: resume is too much"), "{report}");
    assert!(report.contains("`pavo resume vm1`"), "{report}");

    let cluster = Cluster::new(2, &[(0, "quit"), (1, "quit")]);
    let troubles = cluster.take(false).await.unwrap();
    assert_eq!(troubles.len(), 2, "{troubles:?}");
    assert!(troubles[0].report().contains("`pavo cancel`"), "{troubles:?}");
}

#[tokio::test]
async fn a_checkpoint_that_fails_names_vms_that_stand_still_besides() {
    let cluster = Cluster::new(3, &[(0, "write"), (2, "resume"), (1, "resume")]);
    let report = cluster.take(true).await.unwrap_err().report();
    assert!(
        report.starts_with("error: vm[1-2] may stand still (resuming vm1 on `here`: "),
        "{report}"
    );
    assert!(report.contains("because: writing vm0 on `here`"), "{report}");
    assert!(report.contains("`pavo resume vm[1-2]`"), "{report}");
    assert!(!cluster.dir().exists());
    // Where all go on, there is nothing more to say.
    let cluster = Cluster::new(3, &[(0, "write")]);
    let report = cluster.take(true).await.unwrap_err().report();
    assert!(report.starts_with("error: writing vm0 on `here`"), "{report}");
    assert!(!report.contains("help: "), "{report}");
    assert_eq!((cluster.last(0), cluster.last(2)), ("resume".into(), "resume".into()));
}

#[tokio::test]
async fn an_interrupted_one_says_that_the_cluster_goes_on_if_it_does() {
    // The step that is answered last is never.
    for (refuse, goes_on) in
        [(&[(0, "keep slowly")][..], true), (&[(0, "keep slowly"), (1, "resume")], false)]
    {
        let cluster = Cluster::new(2, refuse);
        let (dir, home) = (cluster.dir(), cluster.temp.path());
        let order = Order { dir: &dir, keep_running: true, script: None, home };
        let ended = async {
            while !cluster.told.lock().unwrap().iter().any(|(_, step)| step == "keep") {
                sleep(Duration::from_millis(5)).await;
            }
            Error::new(Kind::Interrupted, "interrupted")
        };
        let taken = take(None, &cluster.job, order, &|_| {}, ended).await;
        let report = taken.unwrap_err().report();
        assert_eq!(report.contains("the cluster goes on"), goes_on, "{report}");
        assert!(!cluster.dir().exists());
    }
}

#[tokio::test]
async fn a_manifest_that_nobody_would_read_is_not_written() {
    let cluster = Cluster::new(1, &[]);
    cluster.take(true).await.unwrap();
    let manifest = fs::read(cluster.dir().join(MANIFEST)).unwrap();
    let mut manifest: Manifest = serde_json::from_slice(&manifest).unwrap();
    text(MANIFEST, &manifest).unwrap();
    manifest.name = "x".repeat(MAX_MANIFEST as usize);
    let report = text(MANIFEST, &manifest).unwrap_err().report();
    assert!(report.contains("would have 65 MiB, and no more than 64 are read"), "{report}");
}

#[test]
fn what_is_no_checkpoint_after_all_has_no_manifest_either() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("saved");
    let folder = Folder::make(&path).unwrap();
    // Written, and not synced.
    fs::write(path.join(MANIFEST), "{}").unwrap();
    fs::write(path.join("vm0.memory.zst"), "memory").unwrap();
    drop(folder);
    assert!(!path.exists());
}

#[test]
fn a_folder_that_others_could_write_to_is_closed_to_them() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("saved");
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o2777)).unwrap();
    let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
    let folder = Folder::make(&path).unwrap();
    assert_eq!(mode() & 0o777, 0o700);
    drop(folder);
    assert_eq!(mode(), 0o2777, "it is as it was");
}

#[test]
fn of_many_at_once_in_a_folder_one_is_the_first_and_the_others_are_told_so() {
    let temp = tempfile::tempdir().unwrap();
    for round in 0..100 {
        let path = temp.path().join(round.to_string());
        let all = std::sync::Barrier::new(4);
        let made = std::thread::scope(|scope| {
            let make = || {
                all.wait();
                let made = Folder::make(&path);
                // Who has failed early must not make room for one who comes late.
                all.wait();
                made.map(Folder::keep).map_err(|error| error.report())
            };
            let threads = [(); 4].map(|()| scope.spawn(make));
            threads.map(|thread| thread.join().unwrap())
        });
        assert_eq!(made.iter().filter(|made| made.is_ok()).count(), 1, "{made:?}");
        for why in made.iter().filter_map(|made| made.as_ref().err()) {
            assert!(why.contains("a checkpoint is being taken there"), "{why}");
        }
    }
}
