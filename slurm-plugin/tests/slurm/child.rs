//! How pavo is started, and what it is asked.

use std::fs;

use crate::world::{World, told, until};

#[test]
fn the_ask_says_all_about_the_step_and_delete_says_it_again() {
    let world = World::new(2);
    let (n1, n2) = (world.lab.host("n1").name(), world.lab.host("n2").name());
    // A user's word for Slurm's own facts is worth nothing.
    let lies = "SLURMD_NODENAME=evil SLURM_JOB_UID=0 PAVO_SEALED=c2VhbA==";
    let job = world.done(&format!(
        "{lies} srun -N2 -n3 --vm=eth:2,other:1 sh -c 'echo $SLURM_JOB_ID' | sort -u"
    ));
    let mut ranks = Vec::new();
    for (host, id) in [("n1", "0"), ("n2", "1")] {
        world.quiet(host);
        let asked = world.asked(host);
        let [create, delete] = &asked[..] else { panic!("{asked:?}") };
        assert_eq!((&*create["action"], &*delete["action"]), ("create", "delete"));
        let rest = |ask: &crate::world::Asked| {
            ask.iter()
                .filter(|(key, _)| *key != "action")
                .map(|(k, v)| format!("{k}={v}"))
                .collect()
        };
        let (first, second): (Vec<String>, Vec<String>) = (rest(create), rest(delete));
        assert_eq!(first, second);
        let expected = [
            ("version", "1"),
            ("job", job.trim()),
            ("step", "0"),
            ("restart", "0"),
            ("uid", &*uid(&world)),
            ("gid", &*uid(&world)),
            ("node", world.lab.host(host).name()),
            ("node_id", id),
            ("nodes", "2"),
            ("tasks", "3"),
            ("vm", "eth:2,other:1"),
            ("sealed", "c2VhbA=="),
        ];
        for (key, value) in expected {
            assert_eq!(create[key], value, "{key}");
        }
        assert!(!create.contains_key("array"));
        assert!(create["keeper"].parse::<u32>().unwrap() > 1);
        let list = &create["node_list"];
        assert!(list.contains(n1.trim_end_matches('1')), "{list} names {n1} and {n2}");
        ranks.extend(create["local_tasks"].split(',').map(|rank| rank.parse::<u32>().unwrap()));
    }
    assert_eq!(ranks, [0, 1, 2]);
}

fn uid(world: &World) -> String {
    world.done("id -u").trim().to_owned()
}

#[test]
fn nothing_of_the_environment_can_add_a_line() {
    let world = World::new(1);
    let lies = "SLURM_STEP_NODELIST=$'n1\\nuid=0' PAVO_SEALED=$'QQ\\nuid=0'";
    // srun sets the first itself; `task-prolog` and the like come later.
    world.done(&format!("{lies} srun --vm=eth:1 true"));
    world.quiet("n1");
    let ask = &world.asked("n1")[0];
    assert_eq!(ask["uid"], uid(&world));
    assert!(!ask.contains_key("sealed"), "{ask:?}");
    assert!(ask.get("node_list").is_none_or(|list| list == world.lab.host("n1").name()), "{ask:?}");

    for (length, passed) in [(4096, true), (4097, false)] {
        let long = world.done(&format!("printf 'A%.0s' {{1..{length}}}"));
        world.forget("n1");
        world.done(&format!("PAVO_SEALED={long} srun --vm=eth:1 true"));
        world.quiet("n1");
        assert_eq!(world.asked("n1")[0].contains_key("sealed"), passed);
    }
}

#[test]
fn pavo_starts_in_a_clean_process() {
    let world = World::new(1);
    let before = world.lab.leaks("n1").unwrap();
    // The signal masks without a fork: around one, the shell has its own.
    world.answer(
        "create",
        "cd /proc/$$; while read -r line; do echo \"$line\"; done <status >/run/stand-in/status
        { tr '\\0' ' ' <environ; echo; } >/run/stand-in/environ; cp cgroup stat /run/stand-in/
        ls -l fd >/run/stand-in/fd; umask >/run/stand-in/umask",
    );
    world.done("LD_PRELOAD= EVIL=1 srun --vm=eth:1 true");
    let dir = world.lab.host("n1").root().unwrap().join("run/stand-in");
    let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap();

    assert_eq!(read("environ").trim(), "");
    let target = |line: &str| Some(line.split_once(" -> ")?.1.to_owned());
    let fds: Vec<String> = read("fd").lines().filter_map(target).collect();
    // The shell's own: its scripts, and where it writes.
    let own = ["/usr/bin/pavo", "/etc/pavo/create", "/run/stand-in/fd", "/dev/null"];
    let known = |to: &String| to.starts_with("pipe:") || own.contains(&to.as_str());
    assert!(fds.iter().all(known), "{fds:?}");
    assert_eq!(fds.iter().filter(|to| to.starts_with("pipe:")).count(), 2, "{fds:?}");
    let status = read("status");
    for mask in ["SigBlk:", "SigIgn:"] {
        let line = status.lines().find_map(|line| line.strip_prefix(mask)).unwrap();
        // 32 and 33 are the C library's.
        let signals = u64::from_str_radix(line.trim(), 16).unwrap() & !(0b11 << 31);
        assert_eq!(signals, 0, "{mask}{line}");
    }
    let stat = read("stat");
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let pid = stat.split(' ').next().unwrap();
    assert_eq!((fields[2], fields[3]), (pid, pid), "it leads a group and a session");
    assert_eq!(read("umask").trim(), "0022");

    // No group of the step's, which Slurm kills and limits.
    let groups = read("cgroup");
    assert!(!groups.contains("slurm_"), "{groups}");
    assert!(groups.contains(&format!("/pavo.{}.", world.lab.host("n1").name())), "{groups}");
    world.lab.settled("n1", &before, std::time::Duration::from_secs(10)).unwrap();
}

#[test]
fn a_cancelled_job_does_not_kill_a_set_up_half_way() {
    let world = World::new(1);
    world.answer(
        "create",
        "trap 'echo signal >>/run/stand-in/half' TERM INT HUP CONT
        touch /run/stand-in/begun; sleep 3; echo whole >/run/stand-in/whole",
    );
    let job = world.done("sbatch --parsable -n1 --vm=eth:1 --wrap 'exec srun sleep 100'");
    let dir = world.lab.host("n1").root().unwrap().join("run/stand-in");
    until("set-up has begun", || dir.join("begun").exists());
    world.done(&format!("scancel {}", job.trim()));
    until("the job is gone", || world.done("squeue -h").is_empty());
    assert_eq!(world.steps("n1"), ["create 0", "delete 0"]);
    assert!(dir.join("whole").exists());
    assert!(!dir.join("half").exists());
}

#[test]
fn what_pavo_leaves_running_keeps_nobody_waiting_and_goes_with_the_step() {
    let world = World::new(1);
    let before = world.lab.leaks("n1").unwrap();
    // It even keeps its output open.
    world.answer("create", "sleep 40 & echo $! >/run/stand-in/left");
    world.answer("delete", "kill $(cat /run/stand-in/left)");
    let start = std::time::Instant::now();
    let output = world.alice("srun --vm=eth:1 true");
    assert!(output.status.success() && told(&output).is_empty(), "{}", output.stderr);
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    assert_eq!(world.steps("n1"), ["create 0", "delete 0"]);
    world.lab.settled("n1", &before, std::time::Duration::from_secs(10)).unwrap();
}
