//! `pavo batch`, and its clusters seen from hosts that are not the launcher's.

use super::world::Site;

#[test]
fn a_batch_job_runs_its_script_and_mistakes_cost_no_job() {
    let site = Site::up(2);
    let before = site.snapshot();
    mistakes_are_found_before_there_is_a_job(&site);

    let script = r#"echo "it's ($PAVO_JOB_ID)"  'two  blanks' \$HOME
        echo "second line of $(hostname)"; pavo status -o ndjson; exit 7"#;
    let quoted = script.replace('\'', r"'\''");
    let line = format!("pavo batch -o out-%j -c1 -N2 -n2 -E '{quoted}' tiny:2");
    // The first one: nothing of the mistakes was submitted.
    assert_eq!(site.sh("alice", &line), "Submitted batch job 1\n");
    // A person whom the site does not know yet, in an environment that is not passed on.
    let bobs = site.sh("bob", "pavo batch --parsable --export=NONE -o out -E 'pavo ps' tiny");
    assert_eq!(bobs, "2\n");

    site.until("alice", "scontrol show job 1", "ExitCode=7:0");
    let said = site.sh("alice", "cat out-1");
    let host = format!("{}n1", site.lab.prefix());
    for expected in [
        "it's (1) two  blanks $HOME\n",
        &format!("second line of {host}\n"),
        "\"state\":\"running\"",
        "Terminating the cluster...\n",
    ] {
        assert!(said.contains(expected), "{expected} in {said}");
    }
    site.until("bob", "scontrol show job 2", "JobState=COMPLETED");
    let said = site.sh("bob", "cat out");
    assert!(said.contains("\ttiny:1\t1\trunning\t"), "{said}");
    guests_that_are_off_end_a_job_without_a_script_only(&site);
    site.nothing_left(&before);
}

#[test]
fn a_batch_script_runs_in_the_first_vm_as_it_was_when_submitted() {
    let site = Site::up(2);
    let before = site.snapshot();
    let script = "#!/bin/sh\necho \"in $(hostname) as $(id -u) $HOME\"; echo e >&2; exit 9\n";
    let write = |text: &str| site.sh("alice", &format!("cat >script <<'EOF'\n{text}EOF"));
    write(script);
    let job = site.batch("alice", "-c1 -N2 -n2 -b script tiny:2");
    // What becomes of the file later is another matter.
    site.sh("alice", "echo 'exit 1' >script");
    site.until("alice", &format!("scontrol show job {job}"), "ExitCode=9:0");
    let said = site.sh("alice", &format!("cat job-{job}"));
    for expected in ["in vm0 as 0 /root\n", "\ne\n", "Terminating the cluster...\n"] {
        assert!(said.contains(expected), "{expected} in {said}");
    }
    nobody_reads_the_script_along(&site);
    // Cancelled while it runs.
    write("echo begun; exec sleep 600\n");
    let job = site.batch("alice", "-c1 -b script tiny");
    site.until("alice", &format!("cat job-{job} || true"), "begun");
    site.sh("alice", &format!("pavo cancel {job} 2>&1"));
    for (line, expected) in [
        ("-b nosuch tiny", "reading the script `nosuch`"),
        ("-b script -E true tiny", "cannot be used with"),
        ("-b /bin/true tiny", "it holds a NUL"),
        ("-b script /bin/hostname tiny", "Script arguments not permitted"),
        ("-b script -p nosuch tiny", "invalid partition specified: nosuch"),
        ("-b script -p tiny", "option requires an argument -- 'p'"),
        ("-b script --bogus tiny", "unrecognized option '--bogus'"),
    ] {
        let output = site.run("alice", &["sh", "-c", &format!("pavo batch {line}")]);
        assert!(!output.status.success() && output.stderr.contains(expected), "{output:?}");
    }
    site.nothing_left(&before);
}

/// What is said to sbatch is seen by all of the host while it submits.
fn nobody_reads_the_script_along(site: &Site) {
    let said = site.sh(
        "alice",
        r#"mkdir bin; cat >bin/sbatch <<'EOF'
#!/bin/sh
tr '\0' '\n' </proc/$$/cmdline >>"$HOME/seen"
PATH=${PATH#*:} exec sbatch "$@"
EOF
chmod +x bin/sbatch
printf '#!/bin/sh\n#SBATCH --bogus\necho "a se""cret, $(basename "$0")"; exit 8\n' >hidden
PATH=$HOME/bin:$PATH pavo batch --parsable -o hidden-%j -J own -c1 -b hidden tiny"#,
    );
    let job: u32 = said.trim().parse().unwrap();
    let seen = site.sh("alice", "cat seen");
    assert!(seen.contains("--ntasks=1\n") && seen.contains("--job-name=own\n"), "{seen}");
    assert!(!seen.contains("cret"), "{seen}");
    site.until("alice", &format!("scontrol show job {job}"), "ExitCode=8:0");
    let said = site.sh("alice", &format!("cat hidden-{job}"));
    assert!(said.contains("a secret, "), "{said}");
}

fn guests_that_are_off_end_a_job_without_a_script_only(site: &Site) {
    let script = "pavo powerdown vm0; pavo wait --for stopped; pavo status; sleep 2; exit 4";
    let with = site.batch("alice", &format!("-c1 --wait ssh -E '{script}' tiny"));
    let without = site.batch("alice", "-c1 tiny");
    site.sh("alice", &format!("pavo wait -j {without} --for ssh"));
    site.sh("alice", &format!("pavo powerdown -j {without} vm0"));
    site.until("alice", &format!("scontrol show job {without}"), "ExitCode=0:0");
    site.until("alice", &format!("scontrol show job {without}"), "JobState=COMPLETED");
    site.until("alice", &format!("scontrol show job {with}"), "ExitCode=4:0");
    let said = site.sh("alice", &format!("cat job-{with}"));
    for expected in ["vm0\toff\t", "All guests are off; the cluster stays until the script ends"] {
        assert!(said.contains(expected), "{expected} in {said}");
    }
}

fn mistakes_are_found_before_there_is_a_job(site: &Site) {
    for (line, code, expected) in [
        ("nosuch:2", 4, "Template not found: nosuch"),
        ("tiny:0", 2, "`tiny` is asked for 0 times"),
        ("-J 'a b' tiny", 2, "cannot be the name of a job"),
        ("--wrap=hostname tiny", 2, "`--wrap` is for jobs without a cluster"),
        ("--wait stopped -E true tiny", 2, "leaves nothing for a script"),
        ("/bin/hostname tiny", 1, "Script arguments not permitted"),
        ("-p nosuch tiny", 1, "invalid partition specified: nosuch"),
    ] {
        let output = site.run("alice", &["sh", "-c", &format!("pavo batch {line}")]);
        assert_eq!(output.status.code(), Some(code), "{line}: {output:?}");
        assert!(output.stderr.contains(expected), "{line}: {output:?}");
        assert_eq!(output.stdout, "", "{line}");
    }
}

#[test]
fn a_batch_job_is_reached_from_every_host() {
    let site = Site::up(2);
    let before = site.snapshot();
    let job = site.batch("alice", "-c1 -N2 tiny:2");
    site.until("alice", &format!("pavo status -j {job} || true"), "vm1");
    // Its folder is on n1 only.
    let script = format!(
        "set -e; pavo wait -j {job} --for ssh
         pavo ssh -j{job} vm1 hostname
         echo some text >file; pavo scp -j {job} file vm0:/root/; pavo ssh -j {job} vm0 cat file
         pavo ssh-config -j {job} >config; ssh -F config vm0 hostname
         find ~/.pavo/jobs ! -user alice -o -perm /077
         pavo console -l -j {job} vm1 | grep -c 'vm1 ready'"
    );
    assert_eq!(site.sh("alice", &script), "vm1\nsome text\nvm0\n1\n");
    for host in ["n1", "n2"] {
        let output = site.on(host, "alice", &["pavo", "ssh", "vm1", "hostname"]);
        assert_eq!(output.stdout, "vm1\n", "{host}: {output:?}");
    }
    let output = site.run("bob", &["pavo", "ssh", "-j", &job.to_string(), "vm1", "hostname"]);
    assert_eq!(output.status.code(), Some(4), "{output:?}");

    let said = site.sh("alice", &format!("pavo reset -j {job} vm1; pavo cancel {job} 2>&1"));
    assert!(said.ends_with(&format!("Job {job} has ended.\n")), "{said}");
    assert_eq!(site.sh("alice", "pavo status 2>&1 || true; ls ~/.pavo/jobs").lines().count(), 2);
    site.nothing_left(&before);
}

#[test]
fn a_job_in_the_queue_is_waited_for_and_says_why_it_waits() {
    let site = Site::up(1);
    let before = site.snapshot();
    // All CPUs of the only host.
    let first = site.sh("bob", "sbatch --parsable --exclusive -o first --wrap 'sleep 600'");
    let first = first.trim();
    site.until("bob", &format!("squeue -h -j {first} -o %T"), "RUNNING");
    let job = site.batch("alice", "-c1 tiny:1");
    site.until("alice", &format!("squeue -h -j {job} -o %R"), "(Resources)");

    let run = |line: &str| site.run("alice", &["sh", "-c", line]);
    let queued = format!("job {job} waits in Slurm's queue (pending: Resources)");
    for line in ["ssh -j JOB vm0 true", "console -j JOB vm0", "status -j JOB", "ssh vm0 true"] {
        let output = run(&format!("pavo {}", line.replace("JOB", &job.to_string())));
        assert_eq!(output.status.code(), Some(4), "{line}: {output:?}");
        assert!(output.stderr.contains(&queued), "{line}: {output:?}");
        assert!(output.stderr.contains(&format!("`pavo wait -j {job}`")), "{line}: {output:?}");
    }
    let late = run(&format!("pavo wait -j {job} --timeout 1"));
    assert_eq!(late.status.code(), Some(5), "{late:?}");
    assert!(late.stderr.contains(&format!("error: {queued}")), "{late:?}");
    // What is not pavo's, or nobody's, is not waited for.
    let unknown = run("pavo wait -j 4711");
    assert_eq!(unknown.status.code(), Some(4), "{unknown:?}");

    let end = format!("(sleep 3; scancel {first}) >/dev/null 2>&1 &");
    assert_eq!(site.sh("bob", &end), "");
    let waited = run(&format!("pavo wait -j {job} && pavo status -j {job} -o ndjson"));
    assert!(waited.status.success(), "{waited:?}");
    assert!(waited.stderr.contains(&format!("Waiting: {queued}\n")), "{waited:?}");
    assert!(waited.stdout.contains("\"state\":\"running\""), "{waited:?}");

    // One that never begins.
    let job = site.batch("alice", "-c1 --hold tiny:1");
    let end = format!("(sleep 3; scancel {job}) >/dev/null 2>&1 &");
    let given_up = run(&format!("{end} pavo wait -j {job}"));
    assert_eq!(given_up.status.code(), Some(5), "{given_up:?}");
    assert!(given_up.stderr.contains("JobHeldUser"), "{given_up:?}");
    assert!(given_up.stderr.contains(&format!("job {job} has ended")), "{given_up:?}");
    site.sh("alice", "pavo cancel");
    site.nothing_left(&before);
}
