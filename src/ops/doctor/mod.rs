//! `pavo doctor`: whether this machine can do its part, and how to mend what it cannot.
//!
//! Each check stands alone: it has its own time limit, needs no other, and ends in a
//! [`Finding`]. What a check is about decides where it is made ([`Role`]) and who can make it.
//!
//! | file | looks at |
//! |---|---|
//! | [`slurm`] | Slurm's commands, controller, plugin and clock, munge |
//! | [`site`] | etcd, keys, permissions of the configuration, what `setup init` makes |
//! | [`machine`] | KVM, QEMU, the kernel, firewalls, Open vSwitch, space, limits |

mod elf;
mod machine;
mod site;
mod slurm;

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, join_all};
use serde::Serialize;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

use crate::config::{BatchManager, Config};
use crate::error::Error;

/// How long one check may take.
const LIMIT: Duration = Duration::from_secs(10);

/// What a machine is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// VMs run here, without a scheduler.
    Alone,
    /// People start clusters from here.
    Login,
    /// Slurm runs clusters here.
    Node,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// What a check has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub check: &'static str,
    pub verdict: Verdict,
    pub found: String,
    /// How to mend it.
    pub help: Vec<String>,
}

/// What checks look at.
#[derive(Clone, Debug)]
pub struct Patient {
    /// Without what is wrong in it.
    pub config: Config,
    pub role: Role,
    pub is_root: bool,
    pub user: String,
    pub home: PathBuf,
    /// Where ordinary users' clusters keep their disks.
    pub tmp: PathBuf,
    pub hostname: String,
}

impl Patient {
    /// What this machine seems to be: compute nodes run slurmd.
    pub fn guess(config: &Config) -> Role {
        match config.batch.manager {
            BatchManager::Local => Role::Alone,
            BatchManager::Slurm if machine::runs("slurmd") => Role::Node,
            BatchManager::Slurm => Role::Login,
        }
    }
}

/// The outcome of a check, before it has a name. An error is a failure.
type Outcome = Result<Good, Error>;

/// What is not wrong.
enum Good {
    Ok(String),
    Warn(String, Vec<String>),
}

fn ok(found: impl Into<String>) -> Outcome {
    Ok(Good::Ok(found.into()))
}

fn warn(found: impl Into<String>, help: impl Into<String>) -> Outcome {
    Ok(Good::Warn(found.into(), vec![help.into()]))
}

/// Makes all checks that concern this machine and this user, at once.
pub async fn examine(patient: &Patient) -> Vec<Finding> {
    let mut checks: Vec<(&'static str, BoxFuture<'_, Outcome>)> = Vec::new();
    if patient.role != Role::Alone {
        checks.extend(slurm::checks(patient));
    }
    checks.extend(site::checks(patient));
    checks.extend(machine::checks(patient));
    let judged = checks.into_iter().map(|(name, check)| async move {
        match timeout(LIMIT, check).await {
            Ok(outcome) => finding(name, outcome),
            Err(_) => {
                let text = format!("no answer after {} s", LIMIT.as_secs());
                finding(name, Err(Error::system(text)))
            }
        }
    });
    join_all(judged).await
}

/// A failure of the configuration, which is read before anything can be examined.
pub fn of_config(error: Option<&Error>) -> Finding {
    match error {
        None => finding("config", ok("no mistakes")),
        Some(error) => failed("config", error),
    }
}

fn finding(check: &'static str, outcome: Outcome) -> Finding {
    match outcome {
        Ok(Good::Ok(found)) => Finding { check, verdict: Verdict::Ok, found, help: Vec::new() },
        Ok(Good::Warn(found, help)) => Finding { check, verdict: Verdict::Warn, found, help },
        Err(error) => failed(check, &error),
    }
}

/// An error's report, apart: causes in one line, ways out in another.
fn failed(check: &'static str, error: &Error) -> Finding {
    let report = error.report();
    let lines = || report.lines().map(str::trim);
    let help = lines().filter_map(|line| line.strip_prefix("help: ")).map(str::to_owned).collect();
    let cause = |line: &str| {
        let line = line.strip_prefix("error: ").unwrap_or(line);
        line.strip_prefix("because: ").unwrap_or(line).to_owned()
    };
    let causes = lines().filter(|line| !line.starts_with("help: ")).map(cause);
    let found = causes.collect::<Vec<_>>().join(": ");
    Finding { check, verdict: Verdict::Fail, found, help }
}

/// What a program says, both ways, run as the user would.
async fn run(program: &str, args: &[&str], input: &[u8]) -> Result<String, Error> {
    let mut command = Command::new(program);
    command.args(args).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let missing = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::system(format!("`{program}` is not installed")),
        _ => Error::system(format!("`{program}` does not start")).because(error),
    };
    let mut child = command.spawn().map_err(missing)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not read says why when it ends.
        let _ = stdin.write_all(input).await;
    }
    let output = child.wait_with_output().await;
    let output =
        output.map_err(|error| Error::system(format!("`{program}` is lost")).because(error))?;
    let (stdout, stderr) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() {
        return Ok(stdout.into_owned());
    }
    let said = stderr.trim().lines().chain(stdout.trim().lines()).next().unwrap_or_default();
    let said = if said.is_empty() { output.status.to_string() } else { said.to_owned() };
    Err(Error::system(format!("`{}`", [&[program], args].concat().join(" "))).because(said))
}

/// A check that asks nobody.
fn at_once<'a>(outcome: Outcome) -> BoxFuture<'a, Outcome> {
    async { outcome }.boxed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Context;

    #[test]
    fn a_failure_tells_its_causes_in_a_line_and_how_to_mend_it_apart() {
        let error = Err::<(), _>(Error::system("no such file").help("make it\n  help: or buy it"))
            .while_doing(|| "reading `x`".into())
            .unwrap_err();
        let found = finding("x", Err(error));
        assert_eq!(found.found, "reading `x`: no such file");
        assert_eq!(found.help, ["make it", "or buy it"]);
    }
}
