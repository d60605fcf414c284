//! `pavo run` where there is no cluster: srun, with the options as it calls them.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use super::super::App;
use super::{Run, exec};
use crate::error::{Context, Error, Result};
use crate::model::vmset::VmSet;

impl Run {
    /// Becomes srun.
    pub(super) fn outside(&self, app: &App) -> Result<u8> {
        self.refuse_what_vms_have()?;
        let mut command = Command::new("srun");
        command.args(self.srun_options()).arg("--").args(self.words()?);
        for (name, value) in self.variables()? {
            command.env(name, value);
        }
        app.out.status("You have no running cluster: srun runs it on a compute host");
        app.out.end_progress();
        Err(Error::system("srun cannot be run")
            .because(command.exec())
            .help("is Slurm installed on this host? batch.yaml says `type: slurm`"))
    }

    fn refuse_what_vms_have(&self) -> Result<()> {
        let conduct = &self.conduct;
        let wished = [
            (self.vms != VmSet::All, "-w"),
            (self.user.is_some(), "--user"),
            (self.wait.is_some(), "--wait"),
            (conduct.fold, "--fold"),
            (conduct.detach, "--detach"),
            (conduct.ok_file.is_some(), "--ok-file"),
            (conduct.ko_file.is_some(), "--ko-file"),
        ];
        match wished.iter().find(|(wished, _)| *wished) {
            Some((_, option)) => {
                let text = format!("`{option}` is for VMs, and you have no running cluster");
                Err(Error::usage(text).help("start one: `pavo alloc TEMPLATE`"))
            }
            None => Ok(()),
        }
    }

    fn srun_options(&self) -> Vec<String> {
        let conduct = &self.conduct;
        let number = |value: Option<u32>| value.map(|value| value.to_string());
        let valued = [
            ("ntasks", number(self.processes)),
            ("nodes", number(self.nodes)),
            ("cpus-per-task", number(self.cores)),
            ("partition", self.partition.clone()),
            ("chdir", self.cwd.clone()),
        ];
        let valued = valued.into_iter().filter_map(|(name, value)| Some((name, value?)));
        // What the site's `SLURM_EXPORT_ENV` says is no reason to lose what was asked for.
        let mut options = vec!["--export=ALL".to_owned()];
        options.extend(valued.map(|(name, value)| format!("--{name}={value}")));
        for (wished, option) in [
            (self.pty, "--pty"),
            (conduct.label, "--label"),
            (conduct.kill_on_fail, "--kill-on-bad-exit=1"),
            (conduct.input_none, "--input=none"),
            (conduct.input_first, "--input=0"),
        ] {
            options.extend(wished.then(|| option.to_owned()));
        }
        options
    }

    /// What each task runs. A script is run as in a guest: by its first line, or by the shell.
    fn words(&self) -> Result<Vec<OsString>> {
        let mut words: Vec<OsString> = Vec::new();
        if let Some(seconds) = self.conduct.timeout {
            let limit = ["timeout", "--kill-after=3", &seconds.to_string()].map(OsString::from);
            words.extend(limit);
        }
        if let Some(path) = &self.script {
            let doing = || format!("reading the script `{}`", path.display());
            let script = std::fs::canonicalize(path).while_doing(doing)?;
            let about = script.metadata().while_doing(doing)?;
            if about.permissions().mode() & 0o111 == 0 {
                words.push("/bin/sh".into());
            }
            words.push(script.into());
        }
        words.extend(self.command.iter().cloned());
        Ok(words)
    }

    /// What differs from our environment, all of which srun passes on.
    fn variables(&self) -> Result<Vec<(OsString, OsString)>> {
        let here: Vec<_> = std::env::vars_os().collect();
        let mut variables: Vec<(OsString, OsString)> = Vec::new();
        for word in exec::environment(&here, &self.env, false)? {
            variables.extend(parted(&word));
        }
        for (option, words, before) in [
            ("--path-prefix", &self.path_prefix, true),
            ("--path-suffix", &self.path_suffix, false),
        ] {
            for (name, value) in
                exec::assignments(option, words)?.iter().filter_map(|it| parted(it))
            {
                let all = variables.iter().rev().chain(&here);
                let now = all.into_iter().find(|(known, _)| *known == name);
                let now = now.map(|(_, value)| value.clone()).unwrap_or_default();
                let (first, last) = if before { (value, now) } else { (now, value) };
                let colon = if first.is_empty() || last.is_empty() { "" } else { ":" };
                let joined = [first.as_bytes(), colon.as_bytes(), last.as_bytes()].concat();
                variables.push((name, OsString::from_vec(joined)));
            }
        }
        Ok(variables)
    }
}

/// `NAME=VALUE`
fn parted(word: &[u8]) -> Option<(OsString, OsString)> {
    let at = word.iter().position(|byte| *byte == b'=')?;
    let part = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
    Some((part(&word[..at]), part(&word[at + 1..])))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: Run,
    }

    fn run(words: &[&str]) -> Run {
        Line::parse_from([&["run"], words].concat()).run
    }

    #[test]
    fn options_are_called_as_srun_does() {
        let line = "-n 6 -N 2 -c 3 -p gpu --cwd /x -l --kill-on-fail --timeout 9 --input-none a -b";
        let run = run(&line.split(' ').collect::<Vec<_>>());
        run.refuse_what_vms_have().unwrap();
        let expected = "--export=ALL --ntasks=6 --nodes=2 --cpus-per-task=3 --partition=gpu --chdir=/x --label \
            --kill-on-bad-exit=1 --input=none";
        assert_eq!(run.srun_options().join(" "), expected);
        assert_eq!(run.words().unwrap(), ["timeout", "--kill-after=3", "9", "a", "-b"]);
    }

    #[test]
    fn what_only_vms_have_is_refused_by_name() {
        for words in [&["-w", "vm0"][..], &["--user", "ada"], &["--fold"], &["--detach"]] {
            let error = run(&[words, &["true"]].concat()).refuse_what_vms_have().unwrap_err();
            assert!(
                error.to_string().starts_with(&format!("`{}` is for VMs", words[0])),
                "{error}"
            );
        }
    }

    #[test]
    fn paths_are_joined_to_what_is_set() {
        let words = ["-e", "A=b", "--path-prefix", "A=a", "--path-suffix", "A=c", "true"];
        let variables = run(&words).variables().unwrap();
        assert_eq!(variables.last().unwrap(), &("A".into(), "a:b:c".into()));
    }
}
