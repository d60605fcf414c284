//! Persistent drives and folders of hosts at a site.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::world::Site;

#[test]
fn a_drive_is_one_jobs_at_a_time_whoevers_it_is() {
    let site = Site::up(1);
    let before = site.snapshot();
    // Both may write it: the rights of files do not keep them apart.
    let drive = site.lab.home("drive");
    fs::write(&drive, vec![0; 1 << 20]).unwrap();
    fs::set_permissions(&drive, fs::Permissions::from_mode(0o666)).unwrap();
    let templates = "kept: {image: tiny, persistent-drives: [/home/drive: {mmp: cluster}]}\n";
    site.write("templates.yaml", templates);

    let job = site.batch("alice", "-c1 --wait ssh -E 'echo ready; sleep 600' kept");
    site.until("alice", &format!("cat job-{job}"), "ready\n");
    let mine = format!("pavo ssh -j {job} vm0 'echo written > /dev/vdb'");
    site.sh("alice", &mine);
    let alloc = ["pavo", "alloc", "-c1", "-E", "true", "kept"];
    let refused = site.run("bob", &alloc);
    assert!(!refused.status.success(), "{refused:?}");
    let said = format!("in use by job {job} of alice (vm0 on ");
    assert!(refused.stderr.contains(&said), "{refused:?}");
    assert!(refused.stderr.contains("taking the persistent drive `/home/drive`"), "{refused:?}");

    site.sh("alice", &format!("pavo cancel -j {job}"));
    site.ended(job);
    // What the guest had in its memory only is there.
    assert!(fs::read(&drive).unwrap().starts_with(b"written\n"));
    let free = site.run("bob", &alloc);
    assert!(free.status.success(), "{free:?}");
    a_start_waits_for_what_an_earlier_one_has(&site);
    site.nothing_left(&before);
}

fn a_start_waits_for_what_an_earlier_one_has(site: &Site) {
    let etcdctl = |words: &[&str]| site.lab.etcdctl(words).unwrap();
    let job = site.batch("alice", "-c1 kept");
    // Guests that have booted shut down at once.
    let booted = || {
        site.until("alice", &format!("pavo status -j {job} || true"), "vm0\trunning");
        site.sh("alice", &format!("pavo wait -j {job} --for ssh"));
    };
    booted();
    let claim = etcdctl(&["get", "--prefix", "/pavo/v1/drive/"]);
    let (key, value) = claim.split_once('\n').unwrap();
    let value = value.lines().next().unwrap();
    site.sh("alice", &format!("scontrol requeue {job}"));
    site.until("alice", "pavo ps", "\tpending\t(BeginTime)\t");
    site.lab.wait_idle().unwrap();
    // A node takes no job whose credential is of the second in which it ended the job.
    std::thread::sleep(std::time::Duration::from_secs(2));
    // As if its launcher were somewhere out of reach, where nobody has ended its guest.
    let granted = etcdctl(&["lease", "grant", "600"]);
    let lease = granted.split(' ').nth(1).unwrap();
    etcdctl(&["put", &format!("--lease={lease}"), key, value]);
    site.sh("alice", &format!("pavo ps; scontrol update jobid={job} StartTime=now"));
    let said = "in use by an earlier start of this job (vm0 on ";
    site.until("alice", &format!("pavo status -j {job} || true"), said);
    site.until("alice", &format!("cat job-{job}"), "Configuring hosts... (vm0 waits: the persist");
    assert!(etcdctl(&["get", key]).ends_with(&format!("{value}\n")));
    etcdctl(&["lease", "revoke", lease]);
    booted();
    site.sh("alice", &format!("pavo cancel -j {job}"));
    site.ended(job);
}

#[test]
fn a_folder_is_opened_on_the_vms_host_as_the_user() {
    let site = Site::up(1);
    let mount = |folder: &str, script: &str| {
        let mount = format!("data={folder},readonly=true");
        site.run("alice", &["pavo", "alloc", "-c1", "--mount", &mount, "-E", script, "tiny"])
    };
    let devices = mount("/home/alice", "pavo monitor-cmd vm0 info qtree");
    assert!(devices.stdout.contains("mount_tag = \"data\""), "{devices:?}");
    // Root there could.
    site.lab.host("n1").sh("mkdir -m 700 /home/roots").unwrap();
    let refused = mount("/home/roots", "true");
    assert!(!refused.status.success(), "{refused:?}");
    for said in ["carrying out `mount-points` of template `tiny` (--mount)", "Permission denied"] {
        assert!(refused.stderr.contains(said), "{refused:?}");
    }
}
