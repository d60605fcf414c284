//! Nodes of a site on which jobs run.

use super::world::Site;

#[test]
fn what_has_a_job_is_not_switched_off_unless_it_must_be() {
    let site = Site::up(2);
    // Nobody is at these addresses: it does not come to that.
    let names = site.sh("alice", "sinfo -hNo %N | sort -u");
    let [first, second] = names.lines().collect::<Vec<_>>()[..] else { panic!("{names}") };
    let set = format!("{first},{second}");
    let create = format!("pavo node create {set} mgt=ipmi control/bmc_address=127.9.9.{{n}}");
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
    site.sh("alice", "scancel -u alice");
}
