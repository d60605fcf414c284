//! `pavo completion`

use clap::Args;
use clap_complete::Shell;

use super::App;
use crate::error::Result;

/// Print the completion script of a shell
///
/// For bash: `source <(pavo completion bash)`; for zsh, after `compinit`:
/// `source <(pavo completion zsh)`; for fish: `pavo completion fish | source`. Packages install
/// all three. VMs, clusters, templates and images are completed by the names that they have at
/// that moment, where these are found within 0.2 s.
#[derive(Debug, Args)]
pub struct Completion {
    /// The shell to complete for
    shell: Shell,
}

impl Completion {
    pub fn run(self, app: &App) -> Result<u8> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::command(), "pavo", &mut script);
        app.out.data(&String::from_utf8_lossy(&script))?;
        let live = match self.shell {
            Shell::Bash => include_str!("completion/live.bash"),
            Shell::Zsh => include_str!("completion/live.zsh"),
            Shell::Fish => include_str!("completion/live.fish"),
            _ => "",
        };
        app.out.data(live)?;
        Ok(0)
    }
}
