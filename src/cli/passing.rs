//! Options that are not pavo's but the scheduler's.
//!
//! `pavo alloc -p gpu --wait ssh --nodes=2 tiny:4` becomes
//! `pavo alloc --wait ssh -- -p gpu --nodes=2 tiny:4`: what pavo does not know keeps its
//! order and goes on to salloc or sbatch. The last word is the cluster.
//!
//! `pavo ssh -j42 vm0` becomes `pavo ssh -j 42 vm0`: all else is ssh's and scp's. So does
//! `pavo run -n6 hostname` become `pavo run -n 6 hostname`: clap would run `-n6`.

use std::ffi::OsString;

use clap::{Arg, ArgAction, Command};

/// The verbs whose unknown options belong to the scheduler.
const VERBS: [&str; 2] = ["alloc", "batch"];

/// Moves what the verb does not know behind `--`. Arguments of other verbs, and those with
/// a `--` of their own, stay as they are.
pub fn arrange(root: &Command, mut arguments: Vec<OsString>) -> Vec<OsString> {
    part_job_id(&mut arguments);
    part_values(root, &mut arguments);
    let verb = arguments.iter().position(|word| VERBS.iter().any(|verb| word == verb));
    let Some(verb) = verb.filter(|_| !arguments.iter().any(|word| word == "--")) else {
        return arguments;
    };
    let name = arguments[verb].to_str().unwrap_or_default();
    let Some(command) = root.find_subcommand(name) else { return arguments };
    let (head, words) = arguments.split_at(verb + 1);
    let (mut ours, mut theirs) = (head.to_vec(), Vec::new());
    let mut words = words.iter().cloned().peekable();
    while let Some(word) = words.next() {
        match find(root, command, &word) {
            Some(wants_next) => {
                ours.push(word);
                ours.extend(wants_next.then(|| words.next()).flatten());
            }
            None => theirs.push(word),
        }
    }
    if theirs.len() > 1 || theirs.iter().any(|word| word.to_string_lossy().starts_with('-')) {
        ours.push("--".into());
    }
    ours.append(&mut theirs);
    ours
}

/// The verbs that take another program's words and would take `-j42` for one.
const PASSING: [&str; 2] = ["ssh", "scp"];

fn part_job_id(arguments: &mut Vec<OsString>) {
    let verb = arguments.iter().skip(1).position(|word| !word.to_string_lossy().starts_with('-'));
    let Some(at) = verb.map(|at| at + 2) else { return };
    if !PASSING.iter().any(|verb| arguments[at - 1] == *verb) {
        return;
    }
    let id = arguments.get(at).and_then(|word| word.to_str()?.strip_prefix("-j"));
    if let Some(id) = id.filter(|id| id.bytes().next().is_some_and(|b| b.is_ascii_digit())) {
        let parted = [OsString::from("-j"), id.into()];
        arguments.splice(at..=at, parted);
    }
}

/// Parts the options of `run`, up to the command, from values in the same word.
fn part_values(root: &Command, arguments: &mut Vec<OsString>) {
    const RUN: &str = "run";
    let verb = arguments.iter().skip(1).position(|word| !word.to_string_lossy().starts_with('-'));
    let Some(mut at) = verb.map(|at| at + 2) else { return };
    let Some(command) = root.find_subcommand(RUN) else { return };
    if arguments[at - 1] != RUN {
        return;
    }
    while let Some(wants_next) = arguments.get(at).and_then(|word| find(root, command, word)) {
        let word = arguments[at].to_str().unwrap_or_default();
        let name = word.strip_prefix('-').and_then(|word| word.chars().next());
        let name =
            name.filter(|name| *name != '-').map_or(word, |name| &word[..1 + name.len_utf8()]);
        let value = &word[name.len()..];
        if !value.is_empty() && find(root, command, &name.into()) == Some(true) {
            let parted = [OsString::from(name), value.into()];
            arguments.splice(at..=at, parted);
            at += 2;
        } else {
            at += 1 + usize::from(wants_next);
        }
    }
}

/// Whether a word is an option of ours, and then whether its value is the next word.
fn find(root: &Command, command: &Command, word: &OsString) -> Option<bool> {
    let word = word.to_str()?;
    if ["-h", "--help", "-V", "--version"].contains(&word) {
        return Some(false);
    }
    let globals = root.get_arguments().filter(|arg| arg.is_global_set());
    let mut all = command.get_arguments().chain(globals);
    let takes_value = |arg: &Arg| matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
    if let Some(long) = word.strip_prefix("--") {
        let (name, value) = long.split_once('=').map_or((long, None), |(n, v)| (n, Some(v)));
        let arg = all.find(|arg| arg.get_long() == Some(name))?;
        return Some(takes_value(arg) && value.is_none());
    }
    let mut short = word.strip_prefix('-')?.chars();
    let letter = short.next()?;
    let arg = all.find(|arg| arg.get_short() == Some(letter))?;
    Some(takes_value(arg) && short.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arranged(line: &str) -> String {
        let alloc = Command::new("alloc")
            .arg(Arg::new("wait").long("wait").action(ArgAction::Set))
            .arg(Arg::new("cores").short('c').action(ArgAction::Set))
            .arg(Arg::new("words").action(ArgAction::Append));
        let run = Command::new("run")
            .arg(Arg::new("processes").short('n').action(ArgAction::Set))
            .arg(Arg::new("user").short('u').long("user").action(ArgAction::Set))
            .arg(Arg::new("pty").long("pty").action(ArgAction::SetTrue))
            .arg(Arg::new("words").action(ArgAction::Append));
        let verbose = Arg::new("verbose").short('v').action(ArgAction::Count).global(true);
        let root = Command::new("pavo").arg(verbose).subcommand(alloc).subcommand(run);
        let words = arrange(&root, line.split(' ').map(OsString::from).collect());
        words.join(std::ffi::OsStr::new(" ")).into_string().unwrap()
    }

    #[test]
    fn what_is_not_ours_goes_behind_two_dashes_in_its_order() {
        for (line, expected) in [
            ("pavo alloc tiny:2", "pavo alloc tiny:2"),
            ("pavo alloc -c 4 tiny:2", "pavo alloc -c 4 tiny:2"),
            ("pavo alloc -c4 --wait=ssh -v tiny", "pavo alloc -c4 --wait=ssh -v tiny"),
            ("pavo -v alloc -p big --wait ssh -N2 t", "pavo -v alloc --wait ssh -- -p big -N2 t"),
            ("pavo alloc --wait ssh -- -c t", "pavo alloc --wait ssh -- -c t"),
            ("pavo alloc --wiat ssh t", "pavo alloc -- --wiat ssh t"),
            ("pavo alloc --help", "pavo alloc --help"),
            ("pavo ps -c alloc2", "pavo ps -c alloc2"),
            ("pavo -v ssh -j42 vm0 -j43", "pavo -v ssh -j 42 vm0 -j43"),
            ("pavo scp -jump x", "pavo scp -jump x"),
            ("pavo ssh", "pavo ssh"),
            ("pavo run -n6 --pty -uada -v cc -n6", "pavo run -n 6 --pty -u ada -v cc -n6"),
            ("pavo -v run -n 6 --user=ada cc -uada", "pavo -v run -n 6 --user=ada cc -uada"),
            ("pavo run -vv -n6 cc", "pavo run -vv -n 6 cc"),
            ("pavo run -- -n6", "pavo run -- -n6"),
            ("pavo run -x -n6", "pavo run -x -n6"),
            ("pavo run -n", "pavo run -n"),
        ] {
            assert_eq!(arranged(line), expected, "{line}");
        }
    }
}
