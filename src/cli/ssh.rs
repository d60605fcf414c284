//! `pavo ssh`, `pavo scp` and `pavo ssh-config`

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use clap::Args;

use super::App;
use super::job::JobSelector;
use crate::error::{Error, Result};
use crate::model::job::JobRecord;
use crate::ops::elsewhere::ssh_files;
use crate::ops::reach::check_guest;
use crate::ops::ssh::SshFiles;

/// Log in to a VM, or run a command in it
///
/// Takes all of ssh's options; the host is a VM: `pavo ssh vm0 uptime`,
/// `pavo ssh -L 8080:localhost:80 root@vm1`. Keys and host keys are the cluster's own:
/// there is nothing to set up, and nothing is asked. Exits with ssh's exit code.
#[derive(Debug, Args)]
pub struct Ssh {
    #[command(flatten)]
    job: JobSelector,

    /// ssh's options, `[user@]vmN`, and the command
    #[arg(
        value_name = "SSH_ARGS",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    args: Vec<OsString>,
}

/// Copy files from and to VMs
///
/// Takes all of scp's options: `pavo scp -r data vm0:/tmp`. Exits with scp's exit code.
#[derive(Debug, Args)]
pub struct Scp {
    #[command(flatten)]
    job: JobSelector,

    /// scp's options and files; `vmN:PATH` is in a VM
    #[arg(
        value_name = "SCP_ARGS",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    args: Vec<OsString>,
}

/// Print the ssh client configuration of a cluster
///
/// For other programs that speak ssh: `pavo ssh-config > c; rsync -e 'ssh -F c' …`.
#[derive(Debug, Args)]
pub struct SshConfig {
    #[command(flatten)]
    job: JobSelector,
}

impl Ssh {
    pub fn run(self, app: &App) -> Result<u8> {
        let named = self.args.iter().find_map(|word| rank_of(word.to_str()?));
        let (_, files) = published(app, &self.job, named)?;
        exec("ssh", &files, self.args)
    }
}

impl Scp {
    pub fn run(self, app: &App) -> Result<u8> {
        let vm = |word: &OsString| rank_of(word.to_str()?.split_once(':')?.0);
        let (_, files) = published(app, &self.job, self.args.iter().filter_map(vm))?;
        exec("scp", &files, self.args)
    }
}

impl SshConfig {
    pub fn run(self, app: &App) -> Result<u8> {
        let (job, files) = published(app, &self.job, None)?;
        app.out.data(&files.client_config(&job.vms))?;
        Ok(0)
    }
}

/// Which VM is meant by `[user@]vmN`.
fn rank_of(host: &str) -> Option<u32> {
    let name = host.rsplit_once('@').map_or(host, |(_, name)| name);
    name.strip_prefix("vm")?.parse().ok()
}

/// The cluster and its ssh files, if any port of it leads to an ssh server. That of a VM that
/// has ended, is off or stands still answers nobody: then its state is the error.
fn published(
    app: &App,
    selector: &JobSelector,
    named: impl IntoIterator<Item = u32>,
) -> Result<(JobRecord, SshFiles)> {
    app.block_on(async {
        let (known, job) = selector.find(app).await?;
        if !job.vms.iter().any(|vm| vm.ports.iter().any(|port| port.vm_port == 22)) {
            return Err(Error::not_found("Error: port 22 is not reverse NATed")
                .help("publish it: `reverse-nat: {vm-port: 22, …}` in networks.yaml"));
        }
        let states = known.states(&job).await?;
        for rank in named {
            if let Some(Some(status)) = states.get(rank as usize) {
                check_guest(rank, status)?;
            }
        }
        let files = ssh_files(known.store(), &job, &app.env.home).await?;
        Ok((job, files))
    })
}

/// Becomes `program`, which then exits for us.
fn exec(program: &str, files: &SshFiles, args: Vec<OsString>) -> Result<u8> {
    let error = Command::new(program).arg("-F").arg(files.config()).args(args).exec();
    Err(Error::system(format!("starting `{program}`"))
        .because(error)
        .help("install the package `openssh-client`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_found_among_the_words_of_ssh() {
        for (word, rank) in [("vm0", Some(0)), ("ada@vm12", Some(12)), ("vmx", None), ("-v", None)]
        {
            assert_eq!(rank_of(word), rank, "{word}");
        }
    }
}
