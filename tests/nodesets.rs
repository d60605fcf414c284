//! Node sets beside the tools that people have: ClusterShell's and Slurm's.
//!
//! Sets are random, the same ones in every run. What one of them folds the other expands to
//! the same names; what both read they read alike.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use pavo::model::hostlist;
use pavo::model::nodeset::NodeSet;
use pavo::model::nodeset::fold::Style;
use pavo::model::nodeset::parse::nodes;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

type Names = BTreeSet<String>;

/// So many values of a strategy.
fn some<T: std::fmt::Debug>(count: usize, strategy: impl Strategy<Value = T>) -> Vec<T> {
    let mut runner = TestRunner::deterministic();
    (0..count).map(|_| strategy.new_tree(&mut runner).unwrap().current()).collect()
}

/// Whether a program is there, whatever it says: Slurm's tell their version only where they are
/// configured.
#[expect(clippy::print_stderr, reason = "a skip is never silent")]
fn there_is(program: &str) -> bool {
    if Command::new(program).arg("--version").output().is_ok() {
        return true;
    }
    let why = format!("`{program}` is not installed (scripts/packages test)");
    assert!(std::env::var_os("CI").is_none(), "{why}");
    eprintln!("skipped: {why}");
    false
}

fn ours(text: &str) -> Option<Names> {
    let set = nodes(text, &mut |want| panic!("{want}")).ok()?;
    Some(set.names().into_iter().collect())
}

/// What ClusterShell makes of each text: expanded and folded; nothing of what it refuses.
fn cluster_shell(texts: &[String]) -> Vec<Option<(Names, String)>> {
    const SCRIPT: &str = "
import sys
from ClusterShell.NodeSet import NodeSet
for line in sys.stdin.read().split('\\n')[:-1]:
    try:
        nodes = NodeSet(line)
        print(' '.join(nodes) + '\\t' + str(nodes))
    except Exception as error:
        print('error\\t')
";
    // Debian's own: others do not know its modules.
    let mut child = Command::new("/usr/bin/python3")
        .args(["-c", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let text: String = texts.iter().map(|text| text.clone() + "\n").collect();
    let writer = std::thread::spawn(move || input.write_all(text.as_bytes()).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    let answers: Vec<_> = output
        .lines()
        .map(|line| {
            let (names, folded) = line.split_once('\t').unwrap();
            let names: Names = names.split_whitespace().map(Into::into).collect();
            (!folded.is_empty() || names.is_empty()).then(|| (names, folded.to_owned()))
        })
        .collect();
    assert_eq!(answers.len(), texts.len());
    answers
}

/// Names as sites have them, close to each other.
fn names() -> impl Strategy<Value = Names> {
    let number = prop_oneof![
        (0_u32..14).prop_map(|n| n.to_string()),
        (0_u32..14).prop_map(|n| format!("{n:02}")),
        (94_u32..106).prop_map(|n| n.to_string()),
        (94_u32..106).prop_map(|n| format!("{n:03}")),
        (0_u32..99_999).prop_map(|n| n.to_string()),
    ];
    let digit = (0_u32..4).prop_map(|n| n.to_string());
    let name = prop_oneof![
        4 => number.clone().prop_map(|n| format!("n{n}")),
        4 => (digit.clone(), digit.clone()).prop_map(|(r, u)| format!("r{r}u{u}")),
        1 => (digit.clone(), number.clone()).prop_map(|(r, u)| format!("r{r}u{u}")),
        1 => (digit.clone(), digit.clone(), digit).prop_map(|(x, y, z)| format!("x{x}y{y}-{z}")),
        1 => number.prop_map(|n| format!("n{n}-bmc.a")),
        1 => Just("login".to_owned()),
    ];
    proptest::collection::btree_set(name, 1..80)
}

/// A bracket; all its numbers have `width` digits, or as many as they happen to have.
fn bracket(width: Option<usize>) -> impl Strategy<Value = String> {
    let range = (0_u32..12, 0_u32..12, 1_u32..4, 0_usize..3);
    let range = range.prop_map(move |(first, more, step, some)| {
        let width = width.unwrap_or(some);
        let (last, step) =
            (first + more, if step > 1 { format!("/{step}") } else { String::new() });
        match more {
            0 => format!("{first:0width$}"),
            _ => format!("{first:0width$}-{last:0width$}{step}"),
        }
    });
    proptest::collection::vec(range, 1..4).prop_map(|it| format!("[{}]", it.join(",")))
}

/// One term with brackets.
fn term() -> impl Strategy<Value = String> {
    prop_oneof![
        bracket(None).prop_map(|a| format!("n{a}")),
        bracket(None).prop_map(|a| format!("n{a}-ib")),
        (bracket(None), bracket(None)).prop_map(|(a, b)| format!("r{a}u{b}")),
        // ClusterShell 1.9.1 takes `n7[9-10]` for n79 to n710, all 632 of them.
        (1_u32..12, bracket(Some(2))).prop_map(|(a, b)| format!("n{a}{b}")),
        (0_u32..12).prop_map(|n| format!("n{n}")),
        Just("login".to_owned()),
    ]
}

fn expression() -> impl Strategy<Value = String> {
    let operator = proptest::sample::select(vec![",", "!", "&", "^", " ! ", ", "]);
    (term(), proptest::collection::vec((operator, term()), 0..5)).prop_map(|(first, rest)| {
        rest.into_iter().fold(first, |text, (operator, term)| text + operator + &term)
    })
}

#[test]
fn cluster_shell_and_we_read_each_others_folded_sets() {
    if !there_is("nodeset") {
        return;
    }
    let sets = some(400, names());
    let fold = |style| move |names: &Names| names.iter().collect::<NodeSet>().fold(style);
    let full: Vec<String> = sets.iter().map(fold(Style::Full)).collect();
    let slurm: Vec<String> = sets.iter().map(fold(Style::Slurm)).collect();
    let theirs = cluster_shell(&[full.clone(), slurm.clone()].concat());
    for (index, set) in sets.iter().enumerate() {
        for (text, answer) in
            [(&full[index], &theirs[index]), (&slurm[index], &theirs[sets.len() + index])]
        {
            let (names, folded) = answer.as_ref().unwrap_or_else(|| panic!("refuses {text}"));
            assert_eq!(names, set, "{text}");
            assert_eq!(&ours(text).unwrap(), set, "{text}");
            assert_eq!(&ours(folded).unwrap(), set, "theirs: {folded}");
        }
        // Nobody is to see a longer text than theirs.
        let terms = |text: &str| hostlist::split_outside_brackets(text).count();
        let theirs = &theirs[index].as_ref().unwrap().1;
        assert!(terms(&full[index]) <= terms(theirs) + 2, "{} {theirs}", full[index]);
    }
}

#[test]
fn cluster_shell_and_we_read_expressions_alike() {
    if !there_is("nodeset") {
        return;
    }
    let texts = some(1000, expression());
    let (mut alike, mut refused) = (0, 0);
    for (text, theirs) in texts.iter().zip(cluster_shell(&texts)) {
        let Some((names, _)) = theirs else {
            // Such as widths that differ, `[8-012]`, of which Slurm takes some, and so do we.
            refused += 1;
            continue;
        };
        // An empty set is an error of ours.
        assert_eq!(ours(text).unwrap_or_default(), names, "{text}");
        alike += 1;
    }
    assert!(alike > 800, "{alike} alike, {refused} refused");
}

/// A configuration that lets `scontrol` expand and fold without any daemon.
fn scontrol(dir: &Path, verb: &str, text: &str) -> Output {
    let conf = dir.join("slurm.conf");
    if !conf.exists() {
        let text =
            "ClusterName=x\nSlurmctldHost=localhost\nNodeName=n1\nPartitionName=p Nodes=n1\n";
        fs::write(&conf, text).unwrap();
    }
    let mut command = Command::new("scontrol");
    command.args(["show", verb, text]).env("SLURM_CONF", conf).output().unwrap()
}

#[test]
fn slurm_reads_what_we_fold_and_we_what_slurm_folds() {
    if !there_is("scontrol") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let hostnames = |text: &str| {
        let output = scontrol(dir.path(), "hostnames", text);
        assert!(output.status.success(), "{text}: {output:?}");
        String::from_utf8(output.stdout).unwrap().lines().map(Into::into).collect::<Vec<String>>()
    };
    for set in some(100, names()) {
        let text = set.iter().collect::<NodeSet>().fold(Style::Slurm);
        let names = hostnames(&text);
        assert_eq!(names.len(), set.len(), "{text}");
        assert_eq!(names.into_iter().collect::<Names>(), set, "{text}");
        let list: Vec<&str> = set.iter().map(String::as_str).collect();
        let output = scontrol(dir.path(), "hostlist", &list.join(","));
        let folded = String::from_utf8(output.stdout).unwrap();
        assert_eq!(ours(folded.trim()).unwrap(), set, "{folded}");
        let expanded = hostlist::expand(folded.trim()).unwrap();
        assert_eq!(expanded, hostnames(folded.trim()), "{folded}");
    }
    // Its longest range is split.
    let set = nodes("n[1-100000]", &mut |_| unreachable!()).unwrap();
    assert_eq!(hostnames(&set.fold(Style::Slurm)).len(), 100_000);
}

struct Run {
    code: i32,
    stdout: String,
    stderr: String,
}

/// Runs `pavo nodeset`.
fn pavo(words: &[&str], input: &str, path: Option<&Path>) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pavo"));
    command.arg("nodeset").args(words).env("NO_COLOR", "1").env("HOME", "/nonexistent");
    if let Some(path) = path {
        command.env("PATH", path).current_dir(path);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // It may refuse its arguments before it reads.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    Run {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

#[test]
fn sets_are_folded_expanded_counted_and_split() {
    let out = |words: &[&str], input: &str| {
        let run = pavo(words, input, None);
        assert_eq!(run.code, 0, "{words:?}: {}", run.stderr);
        run.stdout
    };
    assert_eq!(out(&["fold", "n3,n1", "n2"], ""), "n[1-3]\n");
    assert_eq!(out(&["fold", "n[1-2]-bmc"], ""), "n1-bmc,n2-bmc\n");
    assert_eq!(out(&["fold", "--fold-all", "n[1-2]-bmc"], ""), "n[1-2]-bmc\n");
    assert_eq!(out(&["fold"], "n2 # a\n\nn[3-5]!n4\n"), "n[2-3,5]\n");
    assert_eq!(out(&["fold", "n[1-9]", "-x", "n[2-8]"], ""), "n[1,9]\n");
    assert_eq!(out(&["expand", "n[08-10]"], ""), "n08\nn09\nn10\n");
    assert_eq!(out(&["expand", "-S", ",", "n[1-3]"], ""), "n1,n2,n3\n");
    assert_eq!(out(&["count", "n[1-100000]"], ""), "100000\n");
    assert_eq!(out(&["split", "3", "n[1-10]"], ""), "n[1-4]\nn[5-7]\nn[8-10]\n");
    let json = |words: &[&str]| serde_json::from_str::<serde_json::Value>(&out(words, "")).unwrap();
    assert_eq!(
        json(&["fold", "-o", "json", "n[1-3]"]),
        serde_json::json!({"nodes": "n[1-3]", "count": 3})
    );
    assert_eq!(json(&["expand", "-o", "json", "n[1-2]"]), serde_json::json!(["n1", "n2"]));
    assert_eq!(json(&["count", "-o", "json", "n1"]), serde_json::json!({"count": 1}));
    let parts = json(&["split", "-o", "json", "2", "n[1-3]"]);
    assert_eq!(parts[1], serde_json::json!({"nodes": "n3", "count": 1}));
}

#[test]
fn what_cannot_be_is_said_and_nothing_is_printed() {
    for (words, input, code, said) in [
        (&["fold", "node[1-"][..], "", 2, "this bracket is not closed:\n    node[1-\n        ^\n"),
        (&["expand", "node[9-1]"], "", 2, "`9-1` runs backwards"),
        (&["count", "n[1-10000000]"], "", 2, "10000000 names, more than 1000000"),
        (&["fold", "n1!n1"], "", 2, "`n1!n1` is a set without any node"),
        (&["fold", "n1", "-x", "n1"], "", 2, "no node is left"),
        (&["fold"], "# none\n\n", 2, "standard input has no node"),
        (&["fold"], "n1\nn[2\n", 2, "reading line 2 of standard input\n  because: `n[2` is no set"),
        (&["fold", "@missing"], "", 4, "there is neither a group nor a file `missing`"),
        (&["fold", "@./missing"], "", 5, "reading `./missing`"),
        (&["fold", "@slrum:debug"], "", 4, "did you mean `slurm`?"),
        (&["fold", "all"], "", 4, "there is no inventory of nodes"),
        (&["fold", "arch=x86_64"], "", 4, "looking up the nodes of `arch=x86_64`"),
        (&["split", "0", "n1"], "", 2, "0 is not in 1.."),
    ] {
        let run = pavo(words, input, None);
        assert_eq!((run.code, run.stdout.as_str()), (code, ""), "{words:?}: {}", run.stderr);
        assert!(run.stderr.contains(said), "{words:?}: {}", run.stderr);
    }
}

#[test]
fn a_group_of_very_many_brackets_is_a_mistake() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("set");
    fs::write(&file, format!("@g{}\n", "[1][1]".repeat(100_000))).unwrap();
    let run = pavo(&["count", &format!("@{}", file.display())], "", None);
    assert_eq!(run.code, 2, "{}", run.stderr);
    assert!(run.stderr.contains("there are too many brackets"), "{}", run.stderr);
}

#[test]
fn files_and_slurm_are_asked_for_their_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    write("rack.txt", "n1 # first\nn[2-3]\n@more\n");
    write("more", "n9\n");
    write("loop.txt", "@loop.txt\n");
    // Slurm's own answers are in `tests/slurm`; here, what is made of them.
    let script = "#!/bin/sh\ncase \"$*\" in *=debug) echo 's[1-2],t1';; *=1234) echo s2;; esac\n";
    for name in ["sinfo", "squeue"] {
        write(name, script);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(dir.path().join(name), mode).unwrap();
    }
    let fold = |text: &str, input: &str| pavo(&["fold", text], input, Some(dir.path()));
    for (text, folded) in [
        ("@rack.txt", "n[1-3,9]\n"),
        ("@more", "n9\n"),
        ("@-,n1", "n[1,5]\n"),
        ("@slurm:debug", "s[1-2],t1\n"),
        ("@slurm:debug!@job:1234", "s1,t1\n"),
    ] {
        let run = fold(text, "n5\n");
        assert_eq!(run.stdout, folded, "{}", run.stderr);
    }
    let run = fold("@loop.txt", "");
    assert_eq!(run.code, 2);
    assert!(run.stderr.contains("files name files, more than 10 deep"), "{}", run.stderr);
    let run = fold("@slurm:none", "");
    assert!(run.stderr.contains("Slurm has no partition `none`"), "{}", run.stderr);
}
