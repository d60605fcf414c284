//! What shells complete, with names as they are at that moment.

use std::fs;
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use super::running::{Output, PATIENCE};
use super::world::{World, world};

fn complete(world: &World, line: &str) -> Vec<String> {
    let words: Vec<&str> = line.split(' ').collect();
    let said = world.ok(&[&["internal", "complete", "--"], &words[..]].concat());
    said.lines().map(str::to_owned).collect()
}

/// Looks again while it is not so: a busy machine may not find the names in the time that a
/// shell may wait for them.
#[track_caller]
fn becomes<T: PartialEq + std::fmt::Debug>(expected: &T, look: impl Fn() -> T) {
    let end = Instant::now() + PATIENCE;
    loop {
        let found = look();
        if found == *expected || Instant::now() > end {
            return assert_eq!(found, *expected);
        }
    }
}

/// Runs a script of this shell that finds `pavo`, if there is such a shell.
#[expect(clippy::print_stderr, reason = "a skip is never silent")]
fn shell(world: &World, shell: &str, script: &str) -> Option<Output> {
    if Command::new(shell).arg("--version").output().is_err() {
        let why = format!("{shell} is not installed (scripts/packages test)");
        assert!(std::env::var_os("CI").is_none(), "{why}");
        eprintln!("skipped: {why}");
        return None;
    }
    let path = format!("{}:/usr/bin:/bin", world.program().parent().unwrap().display());
    let mut command = world.command(shell);
    command.env("PATH", path).args(["-c", script]);
    Some(world.run(command))
}

#[test]
fn names_are_those_of_the_moment() {
    world(|world| {
        world.template("front", "description: mine");
        assert!(complete(world, "console ").is_empty());
        let first = world.idle(&["tiny:2", "-J", "first"]);
        let second = world.idle(&["front", "-J", "second"]);
        for (line, expected) in [
            ("console v", &["vm0", "vm1"][..]),
            ("console -J second ", &["vm0"]),
            ("reset -j 1 ", &["all", "vm0", "vm1"]),
            ("scp -J second v", &["vm0:"]),
            ("cancel ", &["1", "2"]),
            ("ps -J s", &[]),
            ("status -J s", &["second"]),
            ("alloc tiny:2,f", &["tiny:2,front"]),
            ("template show ", &["front", "tiny"]),
            ("image show user:t", &["user:tiny"]),
            ("image show tiny@", &["tiny@0"]),
            ("image show absent@", &[]),
            ("image repo gc u", &["user"]),
        ] {
            let expected = expected.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
            becomes(&(line, expected), || (line, complete(world, line)));
        }
        in_bash(world);
        in_zsh(world);
        in_fish(world);
        for (alloc, id) in [(first, "1"), (second, "2")] {
            world.ok(&["cancel", id]);
            alloc.finish();
        }
    });
}

fn in_bash(world: &World) {
    let script = r#"source <(pavo completion bash)
        try() {
            COMP_LINE="$1" COMP_POINT=${#1} COMPREPLY=()
            read -ra COMP_WORDS <<<"$1"; [[ $1 == *" " ]] && COMP_WORDS+=("")
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
            _pavo_live pavo "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}" 2>/dev/null
            echo "${COMPREPLY[@]}"
        }
        try "pavo console "; try "pavo image show user:t"; try "pavo cons"; complete -p pavo"#;
    let expected =
        "vm0 vm1\ntiny\nconsole\ncomplete -o bashdefault -o default -F _pavo_live pavo\n";
    if shell(world, "bash", script).is_some() {
        becomes(&expected.to_owned(), || shell(world, "bash", script).unwrap().stdout);
    }
}

fn in_zsh(world: &World) {
    // The builtin works in widgets only; where it is called is what is to be seen.
    let script = r#"autoload -Uz compinit && compinit -u -D; source <(pavo completion zsh)
        compadd() { print -r -- compadd "$@" }
        try() { words=("$@") CURRENT=$# PREFIX="${@[-1]}"; _pavo_live }
        try pavo console v; try pavo scp -J second v
        print -r -- ${_comps[pavo]}"#;
    let expected = "compadd -Q -- vm0 vm1\ncompadd -Q -S  -- vm0:\n_pavo_live\n";
    if shell(world, "zsh", script).is_some() {
        becomes(&expected.to_owned(), || shell(world, "zsh", script).unwrap().stdout);
    }
}

fn in_fish(world: &World) {
    let script = "pavo completion fish | source
        complete -C 'pavo console v'; complete -C 'pavo status -J s'; complete -C 'pavo cons'";
    let has = |output: Output, name| {
        output.stdout.lines().any(|line| line.split('\t').next() == Some(name))
    };
    if shell(world, "fish", script).is_some() {
        for name in ["vm0", "vm1", "second", "console"] {
            becomes(&(name, true), || (name, has(shell(world, "fish", script).unwrap(), name)));
        }
    }
}

#[test]
fn a_store_that_is_away_costs_a_fifth_of_a_second_and_no_word() {
    world(|world| {
        // It takes connections, and says nothing.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let silent = silent.local_addr().unwrap();
        for address in ["127.0.0.1:1".to_owned(), silent.to_string()] {
            let (host, port) = address.split_once(':').unwrap();
            let batch = format!(
                "type: slurm\nsettings:\n  etcd-servers: [{host}]\n  etcd-client-port: {port}\n  \
                 etcd-protocol: http\n  etcd-auth-type: none\n"
            );
            fs::write(world.path("site/batch.yaml"), batch).unwrap();
            let ps = world.pavo(&["config", "check"]);
            assert_eq!(ps.code, Some(0), "{ps}");
            // The best of some, and then not to the millisecond: this machine may be busy.
            let once = || {
                let begin = Instant::now();
                let output = world.pavo(&["internal", "complete", "--", "console", ""]);
                assert_eq!(output.code, Some(0), "{output}");
                assert_eq!((&*output.stdout, &*output.stderr), ("", ""), "{output}");
                begin.elapsed()
            };
            let best = (0..10).map(|_| once()).min().unwrap();
            assert!(best <= Duration::from_secs(1), "{address}: {best:?}");
        }
        fs::remove_file(world.path("site/batch.yaml")).unwrap();
    });
}
