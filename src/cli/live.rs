//! `pavo internal complete`: the names that may stand where a shell's cursor is.
//!
//! The scripts of `pavo completion` ask for them; all that does not change with time they
//! know themselves. It answers soon or not at all, and never says what went wrong.

use std::collections::BTreeSet;
use std::sync::mpsc;
use std::time::Duration;

use clap::{Arg, ArgAction, Args, Command};

use super::App;
use super::job::{JobSelector, Jobs};
use super::out::Out;
use crate::error::Result;
use crate::model::job::JobRecord;
use crate::ops::jobs::{choose, stored};
use crate::ops::resolve::templates;

/// How long is looked, so that all is over within 200 ms.
const LIMIT: Duration = Duration::from_millis(140);

/// What may stand at the end of a command line
#[derive(Debug, Args)]
pub struct Complete {
    /// The words up to the cursor, without the program's name; the last may be empty
    #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
    words: Vec<String>,
}

impl Complete {
    pub fn run(self, app: &App) -> Result<u8> {
        let (sender, receiver) = mpsc::channel();
        let own = App { out: Out::new(), env: app.env.clone(), verbose: 0 };
        // A store or a file system that hangs holds this thread; the process ends without it.
        std::thread::spawn(move || {
            let found = candidates(&own, &super::command(), &self.words);
            // Nobody waits any more.
            let _ = sender.send(found.unwrap_or_default());
        });
        let found: BTreeSet<String> = receiver.recv_timeout(LIMIT).unwrap_or_default();
        app.out.data(&found.iter().map(|name| format!("{name}\n")).collect::<String>())?;
        Ok(0)
    }
}

/// What is meant by a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Vm,
    /// Several, or `all`.
    Vms,
    /// Files in them, too.
    VmFile,
    JobId,
    JobName,
    Templates,
    Template,
    /// Also one of its revisions.
    Image,
    Repo,
}

impl Kind {
    fn of(arg: &Arg) -> Option<Self> {
        if arg.get_id() == "jobname" {
            return Some(Self::JobName);
        }
        let name = arg.get_value_names()?.first()?;
        Some(match (name.as_str(), arg.get_long()) {
            ("VM", _) | ("SSH_ARGS", _) => Self::Vm,
            ("VMS", _) => Self::Vms,
            ("SCP_ARGS", _) => Self::VmFile,
            ("JOBID", _) => Self::JobId,
            ("CLUSTER", _) => Self::Templates,
            ("TEMPLATE", _) => Self::Template,
            // A new one where it is an option.
            ("IMAGE" | "IMAGE[@REVISION]", None) => Self::Image,
            ("REPO", _) => Self::Repo,
            _ => return None,
        })
    }
}

/// What the last word is, if it is something that changes.
fn wanted(root: &Command, words: &[String]) -> Option<Kind> {
    let (last, before) = words.split_last()?;
    let (mut command, mut position, mut pending, mut only_words) = (root, 0, None, false);
    for word in before {
        if pending.take().is_some() {
            continue;
        }
        if only_words || !word.starts_with('-') || word == "-" {
            match command.find_subcommand(word).filter(|_| position == 0) {
                Some(below) => command = below,
                None => position += 1,
            }
        } else if word == "--" {
            only_words = true;
        } else {
            pending = option(root, command, word);
        }
    }
    if let Some(option) = pending {
        return Kind::of(option);
    }
    if last.starts_with('-') {
        return None;
    }
    let all: Vec<&Arg> = command.get_positionals().collect();
    match (all.get(position), all.last()) {
        (Some(arg), _) => Kind::of(arg),
        // What follows ssh's host is the guest's command.
        (None, Some(arg)) if takes_many(arg) && Kind::of(arg) != Some(Kind::Vm) => Kind::of(arg),
        _ => None,
    }
}

fn takes_many(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append)
        || arg.get_num_args().is_some_and(|range| range.max_values() > 1)
}

/// The option that takes the next word.
fn option<'a>(root: &'a Command, command: &'a Command, word: &str) -> Option<&'a Arg> {
    let globals = root.get_arguments().filter(|arg| arg.is_global_set());
    let mut all = command.get_arguments().chain(globals);
    let takes = |arg: &&Arg| arg.get_action().takes_values();
    if let Some(long) = word.strip_prefix("--") {
        return all.find(|arg| arg.get_long() == Some(long)).filter(takes);
    }
    // `-j` takes the next word, `-j42` has it, `-lf` are two without.
    let mut letters = word.chars().skip(1);
    let first = letters.next()?;
    let option = all.find(|arg| arg.get_short() == Some(first)).filter(takes)?;
    letters.next().is_none().then_some(option)
}

fn candidates(app: &App, root: &Command, words: &[String]) -> Result<BTreeSet<String>> {
    let (Some(kind), Some(last)) = (wanted(root, words), words.last()) else {
        return Ok(BTreeSet::new());
    };
    // Of `tiny:2,de` only the end is still to be found.
    let (done, begun) = match (kind, last.rfind(',')) {
        (Kind::Templates, Some(comma)) => last.split_at(comma + 1),
        _ => ("", last.as_str()),
    };
    let found = names(app, kind, begun, words)?;
    let fits = found.into_iter().filter(|name| name.starts_with(begun));
    Ok(fits.map(|name| format!("{done}{name}")).collect())
}

fn names(app: &App, kind: Kind, begun: &str, words: &[String]) -> Result<Vec<String>> {
    Ok(match kind {
        Kind::Vm | Kind::Vms | Kind::VmFile => {
            let jobs = jobs(app)?;
            let selector = selector(words).selector(app);
            let chosen = choose(jobs.clone(), &selector).map(|job| vec![job]).unwrap_or(jobs);
            let end = if kind == Kind::VmFile { ":" } else { "" };
            let ranks = chosen.iter().flat_map(|job| &job.vms).map(|vm| vm.rank);
            let all = (kind == Kind::Vms && !chosen.is_empty()).then(|| "all".to_owned());
            ranks.map(|rank| format!("vm{rank}{end}")).chain(all).collect()
        }
        Kind::JobId => jobs(app)?.iter().map(|job| job.owner.job.to_string()).collect(),
        Kind::JobName => jobs(app)?.into_iter().map(|job| job.name).collect(),
        Kind::Templates | Kind::Template => {
            let config = super::config::load(app)?;
            templates(&config, &app.library(&config))?.into_keys().collect()
        }
        Kind::Image => {
            let library = app.library(&super::config::load(app)?);
            match begun.rsplit_once('@') {
                Some((name, _)) => {
                    let revisions = library.show(name)?.revisions.into_iter();
                    revisions.map(|it| format!("{name}@{}", it.revision)).collect()
                }
                None => {
                    let rows = library.list(None, |_| true)?.into_iter();
                    let both = |row: crate::image::library::ImageRow| {
                        let full = format!("{}:{}", row.repo, row.name);
                        // Where nothing is begun, the short names are enough to look at.
                        [Some(row.name), (!begun.is_empty()).then_some(full)]
                    };
                    rows.flat_map(both).flatten().collect()
                }
            }
        }
        Kind::Repo => {
            let config = super::config::load(app)?;
            config.repos.iter().map(|repo| repo.name.clone()).collect()
        }
    })
}

/// The cluster that the line names already.
fn selector(words: &[String]) -> JobSelector {
    let after = |short: &str, long: &str| {
        let value = |(at, word): (usize, &String)| {
            let attached = word.strip_prefix(&format!("{long}="));
            let attached =
                attached.or_else(|| word.strip_prefix(short).filter(|it| !it.is_empty()));
            let next = || (word == short || word == long).then(|| words.get(at + 1)).flatten();
            attached.map(str::to_owned).or_else(|| next().cloned())
        };
        words.iter().enumerate().find_map(value)
    };
    JobSelector { jobid: after("-j", "--jobid"), jobname: after("-J", "--jobname") }
}

/// The user's clusters, as they are written down: nothing is asked of anybody else.
fn jobs(app: &App) -> Result<Vec<JobRecord>> {
    app.block_on(async {
        let known = Jobs::open(app).await?;
        let Some(store) = known.store() else { return Ok(Vec::new()) };
        let all = stored(store, &app.env.user).await?;
        Ok(all.iter().filter_map(|job| job.record().ok()).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_what_its_place_makes_it() {
        let root = crate::cli::command();
        for (line, expected) in [
            ("console ", Some(Kind::Vm)),
            ("-v console -l v", Some(Kind::Vm)),
            ("console -j ", Some(Kind::JobId)),
            ("console -J ", Some(Kind::JobName)),
            ("console --jobid 4 v", Some(Kind::Vm)),
            ("console -j4 v", Some(Kind::Vm)),
            ("console -j", None),
            ("console vm0 ", None),
            ("reset ", Some(Kind::Vms)),
            ("nc vm0 ", None),
            ("dump -z ", Some(Kind::Vm)),
            ("ssh -j 4 vm", Some(Kind::Vm)),
            ("ssh vm0 ", None),
            ("scp -r data ", Some(Kind::VmFile)),
            ("cancel ", Some(Kind::JobId)),
            ("alloc -c 2 ti", Some(Kind::Templates)),
            ("alloc -J ", None),
            ("image show ", Some(Kind::Image)),
            ("image export tiny ", None),
            ("image repo gc ", Some(Kind::Repo)),
            ("save -d ", None),
            ("template show ", Some(Kind::Template)),
            ("al", None),
            ("", None),
        ] {
            let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            assert_eq!(wanted(&root, &words), expected, "{line}");
        }
        assert_eq!(wanted(&root, &[]), None);
    }

    #[test]
    fn the_cluster_of_the_line_is_found_in_every_form() {
        for (line, id, name) in [
            ("ssh -j 4 vm", Some("4"), None),
            ("ssh -j4 vm", Some("4"), None),
            ("ssh --jobid=4 vm", Some("4"), None),
            ("ssh -J mine vm", None, Some("mine")),
            ("ssh vm", None, None),
            ("ssh -j", None, None),
        ] {
            let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            let found = selector(&words);
            assert_eq!((found.jobid.as_deref(), found.jobname.as_deref()), (id, name), "{line}");
        }
    }
}
