//! `pavo batch`: a cluster that nobody waits for, as a batch job of Slurm.

use std::ffi::OsString;
use std::io::{Seek, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use clap::Args;

use super::App;
use super::alloc::{JobArgs, look_up};
use super::launcher;
use super::rescue::RescueArgs;
use super::session::SessionArgs;
use crate::batch::slurm::JobWish;
use crate::batch::warning::Warning;
use crate::config::BatchManager;
use crate::error::{Context, Error, Result};
use crate::ops::series::Series;

/// Submit a cluster of VMs as a job that nobody waits for
///
/// With `-E COMMAND` the command runs beside the cluster, on its first host, and the cluster
/// ends with it: not with its guests, whose disks the command may save once they are off.
/// With `-b SCRIPT` the script, as it is now, runs in vm0, and the cluster ends with it; so does
/// the job, with its exit code. Without either the job ends when all guests are off. What the command and pavo say is in the
/// job's output file.
///
/// Options that are not pavo's are sbatch's, and so is what is printed: `Submitted batch job
/// 42`, or with `--parsable` only the number. Mistakes in the cluster are found before the job
/// is submitted. From any host, `pavo ssh|console|status|wait|cancel -j 42` reach the cluster.
///
/// With `--ckpt-on-signal DIR` the cluster is written down before it has to end: when Slurm warns
/// the job (pavo asks it to, `--signal=B:USR2@SECONDS`, unless you do), preempts it with a grace
/// time, or its time is up. The checkpoint is DIR/JOB-WORD.N; the one before goes once it is
/// whole. With sbatch's `--requeue`, or after a preemption, the job then goes back into the queue.
/// Whenever it starts again, it goes on from its newest checkpoint that is whole, or says that there is none. A script
/// of `-b` goes on where it was, and its exit code is the job's; a command of `-E` begins anew,
/// with PAVO_RESUMED naming the checkpoint. Where no checkpoint can be taken, the reason is said and the
/// cluster goes on to its end.
#[derive(Debug, Args)]
pub struct Batch {
    #[command(flatten)]
    job: JobArgs,

    #[command(flatten)]
    session: SessionArgs,
}

impl Batch {
    pub fn run(mut self, app: &App) -> Result<u8> {
        self.session.check()?;
        self.job.check_name()?;
        let definition = self.job.definition()?;
        let (config, blueprint) = look_up(app, &definition, &self.job.changes)?;
        if config.batch.manager == BatchManager::Local {
            return Err(Error::usage("there is no scheduler here that could keep a job")
                .help(format!("start it and stay: `pavo alloc -E COMMAND {definition}`")));
        }
        self.session.check_site(&config)?;
        let text = self.session.read_batch_script()?;
        self.session.check_rescue(&blueprint)?;
        let mut wish = self.job.for_slurm(&config, &blueprint)?;
        if wish.passed.iter().any(|word| word == "--wrap" || word.starts_with("--wrap=")) {
            return Err(Error::usage("`--wrap` is for jobs without a cluster")
                .help("run a command beside the cluster: `-E COMMAND`"));
        }
        if text.is_some() {
            // As it is now, whatever becomes of the file until the job begins.
            self.session.batch_script = Some("-".into());
        }
        let rescue = self.rescue(&mut wish)?;
        let launcher = launcher::command(
            &self.session,
            &self.job.changes,
            &blueprint.definition,
            Some(&rescue),
        )?;
        let script = script(&launcher, text.as_deref())?;
        let mut command = submission(&script, text.is_some(), &wish.options())?;
        app.out.end_progress();
        Err(no_sbatch(command.exec()))
    }
}

fn no_sbatch(error: std::io::Error) -> Error {
    Error::system("sbatch cannot be run")
        .because(error)
        .help("is Slurm installed on this host? batch.yaml says `type: slurm`")
}

/// The sbatch that submits a script. One that holds a text of the user's goes there on standard
/// input: what is an argument, everybody on this host can read.
fn submission(script: &[u8], holds_text: bool, options: &[String]) -> Result<Command> {
    let mut command = Command::new("sbatch");
    // It takes no file with such ends of lines.
    let is_file = !script.windows(2).any(|bytes| bytes == b"\r\n");
    if !(holds_text && is_file) {
        // Before the user's words: an option that lacks its value must not take ours. With
        // it, sbatch refuses a word that would otherwise be a script to run instead.
        command.arg(OsString::from_vec([&b"--wrap="[..], script].concat())).args(options);
    } else if are_options(options)? {
        let mut file = tempfile::tempfile().while_doing(|| "keeping the script".into())?;
        let written = file.write_all(b"#!/bin/sh\n").and_then(|()| file.write_all(script));
        written.and_then(|()| file.rewind()).while_doing(|| "keeping the script".into())?;
        command.args(options).stdin(file);
    } else {
        // It says what is wrong with them, and submits nothing.
        command.args(NOTHING).args(options);
    }
    Ok(command)
}

/// What keeps sbatch from submitting anything, whatever follows.
const NOTHING: [&str; 2] = ["--test-only", "--wrap=:"];

/// Whether sbatch takes all these words for options and their values. It would run any other
/// word as a script. Only sbatch knows which options have values; `--version` ends it, and it
/// comes so far if nothing is wrong before.
fn are_options(words: &[String]) -> Result<bool> {
    let mut command = Command::new("sbatch");
    command.args(NOTHING).args(words).arg("--version").stdin(Stdio::null());
    let output = command.output().map_err(no_sbatch)?;
    Ok(output.status.success() && output.stdout.starts_with(b"slurm"))
}

impl Batch {
    /// What the launcher does when Slurm warns it, and sbatch's part of that.
    fn rescue(&mut self, wish: &mut JobWish) -> Result<RescueArgs> {
        let Some(dir) = &mut self.session.ckpt_on_signal else {
            return Ok(RescueArgs::default());
        };
        *dir = std::path::absolute(&dir).while_doing(|| "finding the current folder".into())?;
        Series::prepare(dir)?;
        let warning = Warning::of(wish)?;
        // What the job said before it was requeued stays.
        wish.passed.insert(0, "--open-mode=append".into());
        wish.passed.push(warning.option());
        let said = wish.passed.iter().rev().find(|word| word.ends_with("-requeue"));
        RescueArgs::new(warning.signal, said.is_some_and(|word| word == "--requeue"))
    }
}

/// The script of the job: a shell that becomes the launcher, with `input` for it.
fn script(words: &[String], input: Option<&[u8]>) -> Result<Vec<u8>> {
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    let line = format!("exec {}", words.join(" "));
    let Some(input) = input else { return Ok(line.into_bytes()) };
    if input.contains(&0) {
        return Err(Error::usage("the batch script is none: it holds a NUL")
            .help("programs can lie in the image, or on a mount"));
    }
    let is_line = |word: &str| input.split(|byte| *byte == b'\n').any(|it| it == word.as_bytes());
    let mut end = String::from("END");
    while is_line(&end) {
        end.push('_');
    }
    let newline: &[u8] = if input.ends_with(b"\n") || input.is_empty() { b"" } else { b"\n" };
    let head = format!("{line} <<'{end}'\n");
    Ok([head.as_bytes(), input, newline, end.as_bytes(), b"\n"].concat())
}

/// A word as the shell takes it for one, whatever it holds.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shell_reads_the_words_that_are_meant() {
        let words =
            ["printf", "%s|", "", "a b", "it's", "'", "\\", "\"$HOME\" `id` $(id) *", "\n!"];
        let script = script(&words.map(String::from), None).unwrap();
        let said = shell(script);
        assert_eq!(said, (words[2..].join("|") + "|").into_bytes());
    }

    fn shell(script: Vec<u8>) -> Vec<u8> {
        Command::new("sh").arg("-c").arg(OsString::from_vec(script)).output().unwrap().stdout
    }

    #[test]
    fn a_batch_script_arrives_as_it_was_written() {
        let long = "echo $HOME `id` \\ 'x'\nEND\nEND_\n\n".repeat(1000);
        for text in
            [&b""[..], b"#!/bin/sh\nexit 3\n", b"no end", b"\x81\x88\xff\n", long.as_bytes()]
        {
            let said = shell(script(&["cat".into()], Some(text)).unwrap());
            // Its last line is one in any case.
            let newline: &[u8] = if text.is_empty() || text.ends_with(b"\n") { b"" } else { b"\n" };
            assert!(said == [text, newline].concat(), "{} bytes", said.len());
        }
        script(&["cat".into()], Some(b"\x7fELF\0")).unwrap_err();
    }
}
