//! How a failure reaches the user: with the reason, the host's name and a bad exit.

use crate::world::{World, plugin, told, until};

/// Fails on the second host only.
const FAILS: &str = "if [ \"$(hostname | tail -c3)\" = n2 ]; then
    echo 'no switch here'; echo 'help: start it'; exit 5; fi";

#[test]
fn srun_salloc_and_sbatch_say_why_and_fail_and_no_node_is_drained() {
    let world = World::new(2);
    let before = world.lab.leaks("n2").unwrap();
    world.answer("create", FAILS);
    let n2 = world.lab.host("n2").name();
    let expected =
        [format!("pavo: host {n2}: no switch here"), format!("pavo: host {n2}: help: start it")];

    let output = world.alice("srun -N2 -n6 --vm=eth:6 true");
    assert_eq!(output.status.code(), Some(1), "{}", output.stderr);
    assert_eq!(told(&output), expected, "once, though it has three tasks");

    let output = world.alice("salloc -N2 -n2 srun --vm=eth:2 true");
    assert_eq!((output.status.code(), told(&output)), (Some(1), vec![&*expected[0], &expected[1]]));

    let output = world.alice("salloc --vm=eth:2 -N2 -n2 srun true");
    assert_eq!((output.status.code(), told(&output)), (Some(1), vec![&*expected[0], &expected[1]]));

    let line = "sbatch -W -N2 -n2 -o out --wrap 'srun --vm=eth:2 true'; r=$?; cat out; exit $r";
    let output = world.alice(line);
    assert_eq!(output.status.code(), Some(1), "{}", output.stdout);
    assert!(expected.iter().all(|line| output.stdout.contains(line)), "{}", output.stdout);

    // Where it went well, it is removed; where not, pavo has done so itself.
    assert_eq!(world.steps("n1"), ["create 0", "delete 0"].repeat(4));
    assert_eq!(world.steps("n2"), ["create 0"].repeat(4));
    world.lab.wait_idle().unwrap();
    world.lab.settled("n2", &before, std::time::Duration::from_secs(10)).unwrap();
}

#[test]
fn nonsense_fails_where_it_is_typed() {
    let world = World::new(1);
    for (argument, why) in [
        ("eth", "`eth` is not RESOURCESET:COUNT"),
        ("eth:0", "asks for no VM"),
        ("../../etc:1", "is not RESOURCESET:COUNT"),
        ("$'eth:1\\nuid=0'", "is not RESOURCESET:COUNT"),
        ("eth:10001", "more than 10000 VMs"),
        ("$(printf 'a:1,%.0s' {1..500})", "at most 1024"),
    ] {
        let quoted =
            if argument.starts_with("$'") { argument.into() } else { format!("\"{argument}\"") };
        for command in ["srun VM true", "salloc VM true", "sbatch VM --wrap=true"] {
            let line = command.replace("VM", &format!("-n1 --vm={quoted}"));
            let output = world.alice(&line);
            assert!(!output.status.success(), "{line}");
            assert!(output.stderr.contains(why), "{line}: {}", output.stderr);
        }
    }
    assert_eq!(world.done("squeue -h"), "");
    assert!(world.asked("n1").is_empty());
}

#[test]
fn a_hostile_argument_past_srun_is_refused_on_the_node() {
    let world = World::new(1);
    // Slurm takes the option from this variable on the node, whatever srun thinks of it.
    let output = world.alice("_SLURM_SPANK_OPTION_pavo_vm=$'x\\nuid=0' srun -n1 true");
    assert_eq!(output.status.code(), Some(1), "{}", output.stderr);
    let [line] = told(&output)[..] else { panic!("{}", output.stderr) };
    assert!(line.contains("`x\\nuid=0` is not RESOURCESET:COUNT"), "{line}");
    assert!(world.steps("n1").is_empty());
    world.lab.wait_idle().unwrap();
}

#[test]
fn a_set_up_that_hangs_is_ended_and_removed() {
    let world = World::new(1);
    world.plugstack("limit=1");
    world.answer("create", "echo 'waiting for n9'; sleep 100 & echo $! >/run/stand-in/pid; wait");
    let output = world.alice("srun -n1 --vm=eth:1 true");
    assert_eq!(output.status.code(), Some(1), "{}", output.stderr);
    let host = world.lab.host("n1").name();
    let expected = [
        format!("pavo: host {host}: `/usr/bin/pavo internal setup create` took more than 1 s"),
        format!("pavo: host {host}: waiting for n9"),
    ];
    assert_eq!(told(&output), expected);
    assert_eq!(world.steps("n1"), ["create 0", "delete 0"]);
    let sleeps = || world.lab.host("n1").processes().unwrap().iter().any(|p| p.name == "sleep");
    until("what it started is gone", || !sleeps());
    world.lab.wait_idle().unwrap();
}

#[test]
fn a_set_up_that_is_killed_is_removed() {
    let world = World::new(1);
    world.answer("create", "kill -9 $$");
    let output = world.alice("srun -n1 --vm=eth:1 true");
    assert_eq!(output.status.code(), Some(1));
    assert!(told(&output)[0].contains("was killed (signal: 9"), "{}", output.stderr);
    assert_eq!(world.steps("n1"), ["create 0", "delete 0"]);
}

#[test]
fn a_long_or_wild_report_cannot_hurt() {
    let world = World::new(1);
    world.answer(
        "create",
        "printf 'a\\033[2Jb\\0c\\377\\n'; head -c 1000000 /dev/zero | tr '\\0' x; exit 5",
    );
    let output = world.alice("srun -n1 --vm=eth:1 true");
    assert_eq!(output.status.code(), Some(1));
    let lines = told(&output);
    assert!(lines[0].ends_with("a [2Jb c\u{fffd}"), "{lines:?}");
    let len: usize = lines.iter().map(|line| line.len()).sum();
    assert!((4000..4300).contains(&len), "{len}");
}

#[test]
fn wrong_words_in_plugstack_conf_and_no_pavo_hurt_only_who_wants_vms() {
    let world = World::new(1);
    for (words, why) in [
        ("pavo=pavo", "`pavo=` takes an absolute path"),
        ("limit=0", "1 to 3600 seconds"),
        ("pavo=/nowhere/pavo", "cannot start `/nowhere/pavo`: No such file"),
    ] {
        world.plugstack(words);
        world.done("srun -n1 true");
        let output = world.alice("srun -n1 --vm=eth:1 true");
        assert_eq!(output.status.code(), Some(1), "{words}");
        assert!(told(&output)[0].contains(why), "{words}: {}", output.stderr);
    }
    world.lab.wait_idle().unwrap();
}

#[test]
fn a_removal_that_fails_is_the_administrators_business() {
    let world = World::with(1, &plugin(), &["SlurmdLogFile=/run/slurmd.log"]);
    world.answer("delete", "echo 'link busy'; exit 5");
    world.done("srun -n1 --vm=eth:1 true");
    world.quiet("n1");
    let log = world.lab.host("n1").sh("cat /run/slurmd.log").unwrap();
    assert!(log.contains("pavo: removing: link busy"), "{log}");
}
