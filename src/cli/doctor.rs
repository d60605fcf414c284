//! `pavo doctor`: whether this machine can do its part.

use clap::ValueEnum;

use super::App;
use super::out::OutputArgs;
use crate::config;
use crate::error::{Kind, Result};
use crate::ops::doctor::{Finding, Patient, Role, Verdict, examine, of_config};

/// Lines end here.
const WIDTH: usize = 80;
/// Where the text of a line begins.
const INDENT: usize = 18;

/// Check this machine: what works, what does not, and how to mend it
///
/// Run it as the user who will start clusters, and as root on compute nodes, where more can be
/// looked at. Exits with 1 if something fails.
#[derive(Debug, clap::Args)]
pub struct Doctor {
    /// What this machine is for, where that is guessed wrong
    #[arg(long = "as", value_name = "ROLE")]
    role: Option<As>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum As {
    /// VMs run here, without Slurm
    Alone,
    /// People start clusters from here
    Login,
    /// Slurm runs clusters here
    Node,
}

impl Doctor {
    pub fn run(self, app: &App) -> Result<u8> {
        let loaded = config::load(&super::config::sources(app));
        let config = loaded.config.clone();
        let mistakes = loaded.into_config().err();
        let role = match self.role {
            Some(As::Alone) => Role::Alone,
            Some(As::Login) => Role::Login,
            Some(As::Node) => Role::Node,
            None => Patient::guess(&config),
        };
        let patient = Patient {
            config,
            role,
            is_root: app.env.uid == 0,
            user: app.env.user.clone(),
            home: app.env.home.clone(),
            tmp: app.env.tmp.clone(),
            hostname: app.env.hostname(),
        };
        let mut findings = vec![of_config(mistakes.as_ref())];
        findings.extend(app.block_on(async { Ok(examine(&patient).await) })?);
        if self.output.output.is_some() {
            app.out.list(self.output, &findings, &[])?;
        } else {
            app.out.data(&findings.iter().map(text).collect::<String>())?;
        }
        let failed = findings.iter().any(|finding| finding.verdict == Verdict::Fail);
        Ok(if failed { Kind::Partial.exit_code() } else { 0 })
    }
}

fn text(finding: &Finding) -> String {
    let verdict = match finding.verdict {
        Verdict::Ok => "ok",
        Verdict::Warn => "warn",
        Verdict::Fail => "fail",
    };
    let head = format!("{verdict:<5}{:<13}", finding.check);
    let mut text = wrap(&head, &finding.found);
    for help in &finding.help {
        text += &wrap(&" ".repeat(INDENT), &format!("help: {help}"));
    }
    text
}

/// The words after `head`, in lines that fit; what follows the first is below it.
fn wrap(head: &str, words: &str) -> String {
    let mut lines = vec![head.to_owned()];
    let clean = |letter: char| if letter.is_control() { ' ' } else { letter };
    let words: String = words.chars().map(clean).collect();
    for word in words.split_whitespace() {
        let line = lines.last_mut().expect("there is one");
        let is_first = line.len() <= INDENT;
        if !is_first && line.chars().count() + 1 + word.chars().count() > WIDTH {
            lines.push(format!("{}{word}", " ".repeat(INDENT)));
        } else {
            let blank = if is_first { "" } else { " " };
            line.push_str(&format!("{blank}{word}"));
        }
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_fit_a_terminal_and_commands_stay_readable() {
        let finding = Finding {
            check: "etcd-login",
            verdict: Verdict::Fail,
            found: "nothing listens: 192.0.2.1:2379: Connection refused; 192.0.2.2:2379: no answer"
                .into(),
            help: vec!["start etcd".into()],
        };
        let text = text(&finding);
        assert_eq!(
            text,
            "fail etcd-login   nothing listens: 192.0.2.1:2379: Connection refused;\n\
             \x20                 192.0.2.2:2379: no answer\n\
             \x20                 help: start etcd\n"
        );
    }
}
