//! Nodes of a site on which jobs run.

use super::world::Site;

#[test]
fn what_has_a_job_is_not_switched_off_unless_it_must_be() {
    let site = Site::up(2);
    // Nobody is at these addresses: it does not come to that.
    let names = site.sh("alice", "sinfo -hNo %N | sort -u");
    let [first, second] = names.lines().collect::<Vec<_>>()[..] else { panic!("{names}") };
    let set = format!("{first},{second}");
    let create = format!(
        "pavo node create {set} mgt=ipmi control/bmc_address=127.9.9.{{n}} \
         control/bmc_username=admin control/bmc_password=hunter2"
    );
    site.sh("alice", &create);
    site.sh("alice", &format!("sbatch -w {first} --wrap 'sleep 600'"));
    site.until("alice", "squeue -h -o '%T %N'", &format!("RUNNING {first}"));
    let power = |words: &[&str]| {
        let limits = ["--timeout", "1", "--retries", "0"];
        let output = site.run("alice", &[&["pavo", "power", &set], words, &limits].concat());
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        output.stdout
    };
    let said = power(&["off"]);
    let left_alone = format!("{first}: a job runs there\n  help: all the same: `--force`");
    assert!(said.contains(&left_alone), "{said}");
    assert!(said.contains(&format!("{second}: no answer")), "{said}");
    for words in [&["off", "--force"][..], &["status"], &["off", "--force", "--dry-run"]] {
        let said = power(words);
        assert!(!said.contains("a job runs there"), "{words:?}: {said}");
    }
    // Whatever the environment says, and whosever the job is.
    let options = "SQUEUE_USERS=bob SQUEUE_STATES=PENDING SINFO_STATES=down SLURM_CLUSTERS=other";
    let said = site.sh("alice", &format!("{options} pavo power {first} off --dry-run || true"));
    assert!(said.contains("a job runs there"), "{said}");
    // In a partition that is shown to nobody; and suspended, when it takes no processor.
    for script in [
        "scontrol update PartitionName=$(sinfo -ho %R | head -1) Hidden=YES",
        "scontrol suspend $(squeue -ahu alice -o %A)",
        "scontrol resume $(squeue -ahu alice -o %A)",
    ] {
        site.sh("root", script);
        let said = power(&["off"]);
        assert!(said.contains(&left_alone), "{script}: {said}");
    }
    site.sh("alice", "scancel -u alice");
}
