//! Which step of which job owns the cluster.

use crate::world::{World, plugin, told, until};

#[test]
fn of_an_allocation_with_vms_the_first_ordinary_step_owns_the_cluster() {
    let world = World::new(1);
    world.done("salloc -n1 --vm=eth:1 bash -c 'srun true; srun true; srun --overlap true'");
    assert_eq!(world.steps("n1"), ["create 0", "delete 0"]);
    world.forget("n1");

    world.done("printf '#!/bin/sh\\n#SBATCH --vm=eth:1 -n1\\nsrun true\\nsrun true\\n' >script");
    world.done("sbatch -W script");
    assert_eq!(world.steps("n1"), ["create 0", "delete 0"], "nor does the batch step");
    world.forget("n1");

    world.done("sbatch -W -n1 --vm=eth:1 --wrap true");
    assert!(world.steps("n1").is_empty(), "a script alone has no cluster");
}

#[test]
fn a_step_with_an_own_option_owns_a_cluster() {
    let world = World::new(1);
    world.done("salloc -n1 bash -c 'srun true; srun --vm=eth:1 true; srun true'");
    assert_eq!(world.steps("n1"), ["create 1", "delete 1"]);
    world.forget("n1");
    let line =
        "salloc -n1 --vm=eth:1 bash -c 'srun true; srun --vm=two:1 true; srun --vm=eth:1 true'";
    world.done(line);
    let steps = ["create 0", "delete 0", "create 1", "delete 1", "create 2", "delete 2"];
    assert_eq!(world.steps("n1"), steps);
    assert_eq!(world.asked("n1")[2]["vm"], "two:1");
}

#[test]
fn a_step_that_overlaps_inherits_nothing() {
    let world = World::new(1);
    world.done("salloc -n1 --vm=eth:1 srun --overlap true");
    world.done("salloc -n1 --vm=eth:1 env SLURM_OVERLAP=1 srun true");
    assert!(world.steps("n1").is_empty());
    // The word is its command's, not srun's.
    world.done("salloc -n1 --vm=eth:1 srun echo --overlap");
    assert_eq!(world.steps("n1"), ["create 0", "delete 0"]);
}

#[test]
fn what_a_step_starts_inherits_nothing_of_it() {
    let world = World::new(1);
    let env = world.done("salloc -n1 srun --vm=eth:1 env");
    assert!(!env.contains("SLURM_PAVO_STEP") && !env.contains("OPTION_pavo"), "{env}");
    world.forget("n1");
    world.done("salloc -n2 srun -n1 --vm=eth:1 srun --overlap -n1 true");
    assert_eq!(world.steps("n1"), ["create 0", "delete 0"]);
}

#[test]
fn shells_on_the_node_and_extern_steps_inherit_nothing() {
    let world = World::with(1, &plugin(), &["PrologFlags=contain"]);
    // A shell without a command is an interactive step.
    world.done("script -qec 'salloc -Q -n1 --vm=eth:1' /dev/null <<<'echo in; exit'");
    assert!(world.steps("n1").is_empty());
    world.done("script -qec 'salloc -Q -n1 --vm=eth:1' /dev/null <<<'srun -n1 true; exit'");
    assert_eq!(world.steps("n1"), ["create 0", "delete 0"]);
}

#[test]
fn each_task_of_an_array_has_a_cluster() {
    let world = World::new(1);
    let line = "sbatch --parsable -W -a 3,5 -n1 --wrap 'srun --vm=eth:1 true'";
    let array = world.done(line).trim().to_owned();
    world.quiet("n1");
    let asked = world.asked("n1");
    let created: Vec<_> = asked.iter().filter(|ask| ask["action"] == "create").collect();
    let mut tasks: Vec<&str> = created.iter().map(|ask| &*ask["array"]).collect();
    tasks.sort_unstable();
    assert_eq!(tasks, [format!("{array}_3"), format!("{array}_5")]);
    assert_ne!(created[0]["job"], created[1]["job"]);
    assert_eq!(asked.len(), 4);
}

#[test]
fn a_requeued_job_is_a_new_incarnation() {
    let world = World::new(1);
    let line = "sbatch --parsable --requeue -n1 --vm=eth:1 --wrap 'srun sleep 60'";
    let job = world.done(line).trim().to_owned();
    until("it runs", || world.asked("n1").len() == 1);
    world.lab.login().run(None, &["scontrol", "requeue", &job]).unwrap().ok().unwrap();
    // Not before the first is removed; Slurm holds it back for a while.
    until("the first is removed", || world.asked("n1").len() == 2);
    let begin = ["scontrol", "update", &format!("jobid={job}"), "starttime=now"];
    until("it runs again", || {
        let _ = world.lab.login().run(None, &begin);
        world.asked("n1").len() == 3
    });
    world.done(&format!("scancel {job}"));
    world.quiet("n1");
    let asked = world.asked("n1");
    let facts: Vec<[&str; 4]> = asked
        .iter()
        .map(|ask| ["action", "job", "step", "restart"].map(|key| &*ask[key]))
        .collect();
    let incarnations = [("create", "0"), ("delete", "0"), ("create", "1"), ("delete", "1")];
    assert_eq!(facts, incarnations.map(|(action, restart)| [action, &job, "0", restart]));
}

#[test]
fn a_second_cluster_while_one_runs_is_refused_and_leaves_the_first_alone() {
    let world = World::new(1);
    world.answer(
        "create",
        "mkdir /run/stand-in/held 2>/dev/null || { echo 'step 0 of this job has VMs'; exit 5; }",
    );
    world.answer("delete", "rmdir /run/stand-in/held");
    let output = world.alice(
        "salloc -n2 bash -c 'srun -n1 --mem=100 --vm=eth:1 sleep 3 & sleep 1
        srun --overlap -n1 --mem=100 --vm=eth:1 true; echo second $?; wait $!; echo first $?'",
    );
    assert_eq!(output.stdout, "second 1\nfirst 0\n", "{}", output.stderr);
    let [line] = told(&output)[..] else { panic!("{}", output.stderr) };
    assert!(line.ends_with(": step 0 of this job has VMs"), "{line}");
    assert_eq!(world.steps("n1"), ["create 0", "create 1", "delete 0"]);
}

#[test]
fn heterogeneous_jobs_and_steps_are_refused_with_the_reason() {
    // Only the backfill scheduler starts heterogeneous jobs, in its own time.
    let often = "SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1";
    let world = World::with(2, &plugin(), &[often]);
    world
        .done("printf '#!/bin/sh\\n#SBATCH -n1 --vm=eth:1\\n#SBATCH hetjob\\n#SBATCH -n1\\n' >het");
    for line in [
        "srun -n1 --vm=eth:1 true : -n1 true",
        "salloc -n1 --vm=eth:1 : -n1 true",
        "salloc -n1 : -n1 --vm=eth:1 true",
        "salloc -n1 : -n1 srun --vm=eth:1 true",
        "salloc -n1 : -n1 srun --het-group=0,1 --vm=eth:1 true",
        "salloc -n2 srun -n1 --vm=eth:1 true : -n1 true",
        "sbatch het",
    ] {
        let output = world.alice(line);
        assert!(!output.status.success(), "{line}");
        assert!(output.stderr.contains("--vm does not work in heterogeneous jobs"), "{line}");
    }
    // A node looks for itself, should srun not have.
    let past = "SLURM_HET_SIZE=2 _SLURM_SPANK_OPTION_pavo_vm=eth:1 srun -n1 true";
    let output = world.alice(past);
    assert_eq!(output.status.code(), Some(1), "{}", output.stderr);
    assert!(told(&output)[0].contains("heterogeneous"), "{}", output.stderr);
    assert!(world.steps("n1").is_empty());
}

#[test]
fn a_suspended_task_is_told_two_seconds_before_it_is_stopped() {
    let world = World::new(1);
    // What `pavo internal task` can rely on to pause its guest, and let it go on.
    let task = "trap 'echo tstp >>seen' TSTP; trap 'echo cont >>seen' CONT; echo up >>seen; \
        while :; do sleep 0.05; echo tick >ticks; done";
    let line =
        format!("sbatch --parsable -n1 -o log --wrap \"srun --vm=eth:1 bash -c \\\"{task}\\\"\"");
    let job = world.done(&line).trim().to_owned();
    let seen = world.lab.home("alice").join("seen");
    let read = || std::fs::read_to_string(&seen).unwrap_or_default();
    until("the task runs", || read() == "up\n");
    let root = |words: &[&str]| world.lab.login().run(None, words).unwrap().ok().unwrap();
    root(&["scontrol", "suspend", &job]);
    until("the task is told", || read() == "up\ntstp\n");
    let ticks = world.lab.home("alice").join("ticks");
    let stopped = || {
        let _ = std::fs::remove_file(&ticks);
        std::thread::sleep(std::time::Duration::from_millis(300));
        !ticks.exists()
    };
    until("the task stands still", stopped);
    root(&["scontrol", "resume", &job]);
    until("the task goes on", || read() == "up\ntstp\ncont\n" && ticks.exists());
    world.done(&format!("scancel {job}"));
    assert_eq!(world.steps("n1"), ["create 0", "delete 0"]);
}

#[test]
fn a_job_id_that_comes_again_is_another_job() {
    let world = World::new(1);
    world.done("srun -n1 --vm=eth:1 true");
    world.quiet("n1");
    // A controller without memory counts from the beginning.
    let controller = world.lab.login().service("slurmctld").unwrap();
    controller.stop().unwrap();
    world.lab.login().sh("rm -rf /var/spool/slurmctld/*").unwrap();
    controller.start().unwrap();
    world.lab.wait_idle().unwrap();
    let bob = ["srun", "-n1", "--vm=other:1", "true"];
    world.lab.login().run(Some("bob"), &bob).unwrap().ok().unwrap();
    world.quiet("n1");
    let asked = world.asked("n1");
    assert_eq!(asked.len(), 4, "{asked:?}");
    assert_eq!(asked[0]["job"], asked[2]["job"]);
    assert_ne!(asked[0]["uid"], asked[2]["uid"]);
    assert_eq!((&*asked[2]["vm"], &*asked[3]["vm"]), ("other:1", "other:1"));
    assert_ne!(asked[0]["keeper"], asked[2]["keeper"]);
}
