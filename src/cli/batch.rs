//! `pavo batch`: a cluster that nobody waits for, as a batch job of Slurm.

use std::os::unix::process::CommandExt;
use std::process::Command;

use clap::Args;

use super::App;
use super::alloc::{JobArgs, look_up};
use super::launcher;
use super::session::SessionArgs;
use crate::config::BatchManager;
use crate::error::{Error, Result};

/// Submit a cluster of VMs as a job that nobody waits for
///
/// With `-E COMMAND` the command runs beside the cluster, on its first host, and the cluster
/// ends with it: not with its guests, whose disks the command may save once they are off.
/// Without one the job ends when all guests are off. What the command and pavo say is in the
/// job's output file.
///
/// Options that are not pavo's are sbatch's, and so is what is printed: `Submitted batch job
/// 42`, or with `--parsable` only the number. Mistakes in the cluster are found before the job
/// is submitted. From any host, `pavo ssh|console|status|wait|cancel -j 42` reach the cluster.
#[derive(Debug, Args)]
pub struct Batch {
    #[command(flatten)]
    job: JobArgs,

    #[command(flatten)]
    session: SessionArgs,
}

impl Batch {
    pub fn run(self, app: &App) -> Result<u8> {
        self.session.check()?;
        self.job.check_name()?;
        let definition = self.job.definition()?;
        let (config, blueprint) = look_up(app, &definition, &self.job.changes)?;
        if config.batch.manager == BatchManager::Local {
            return Err(Error::usage("there is no scheduler here that could keep a job")
                .help(format!("start it and stay: `pavo alloc -E COMMAND {definition}`")));
        }
        let wish = self.job.for_slurm(&config, &blueprint)?;
        if wish.passed.iter().any(|word| word == "--wrap" || word.starts_with("--wrap=")) {
            return Err(Error::usage("`--wrap` is for jobs without a cluster")
                .help("run a command beside the cluster: `-E COMMAND`"));
        }
        let launcher =
            launcher::command(&self.session, &self.job.changes, &blueprint.definition, true)?;
        let mut command = Command::new("sbatch");
        // Before the user's words: an option that lacks its value must not take ours. With
        // it, sbatch refuses a word that would otherwise be a script to run instead.
        command.arg(format!("--wrap={}", script(&launcher)));
        command.args(wish.options());
        app.out.end_progress();
        Err(Error::system("sbatch cannot be run")
            .because(command.exec())
            .help("is Slurm installed on this host? batch.yaml says `type: slurm`"))
    }
}

/// The script of the job: a shell that becomes the launcher.
fn script(words: &[String]) -> String {
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    format!("exec {}", words.join(" "))
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
        let script = script(&words.map(String::from));
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert_eq!(said, words[2..].join("|") + "|");
    }
}
