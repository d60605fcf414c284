//! `pavo completion`

use clap::Args;
use clap_complete::Shell;

use super::App;
use crate::error::Result;

/// Print the completion script of a shell
///
/// For bash: `source <(pavo completion bash)`.
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
        Ok(0)
    }
}
