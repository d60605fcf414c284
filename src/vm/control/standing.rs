//! What can be asked of a VM as it is: of one that stands still, or is off, not all.

use std::time::Duration;

use tokio::time::timeout;

use super::{Endpoint, Op};
use crate::error::{Error, Result};
use crate::model::job::VmState;

/// How long what QEMU has done may take to be known here.
const SEEN: Duration = Duration::from_secs(1);

impl Op {
    /// Whether it is to happen now, or not at all.
    pub(super) fn changes(&self) -> bool {
        matches!(
            self,
            Self::Reset { .. }
                | Self::Powerdown
                | Self::Pause
                | Self::Resume
                | Self::Monitor { .. }
                | Self::Qmp { .. }
        )
    }
}

impl Endpoint {
    /// Fails at once where it could only fail later, or do nothing.
    pub(super) fn check_standing(&self, op: &Op) -> Result<()> {
        let (needs_power, needs_guest) = match op {
            Op::Exec | Op::Connect { .. } | Op::AgentHello { .. } => (true, true),
            Op::Pause | Op::Resume | Op::Powerdown => (true, false),
            _ => return Ok(()),
        };
        let (name, status) = (&self.name, self.status.borrow());
        let with_detail = |what: &str| match &*status.detail {
            "" => format!("{name} is {what}"),
            why => format!("{name} is {what}: {why}"),
        };
        match status.state {
            VmState::Off if needs_power => Err(Error::system(with_detail("off"))
                .help(format!("start its guest again: `pavo reset {name}`"))),
            VmState::Paused if needs_guest => Err(Error::system(with_detail("paused"))
                .help(format!("let it go on: `pavo resume {name}`"))),
            _ => Ok(()),
        }
    }

    /// What was done is known before it is said: the next request finds it so.
    pub(super) async fn once_seen(
        &self,
        done: Result<()>,
        is_so: impl Fn(VmState) -> bool,
    ) -> Result<()> {
        if done.is_ok() {
            let mut status = self.status.clone();
            // It may have become something else meanwhile.
            let _ = timeout(SEEN, status.wait_for(|status| is_so(status.state))).await;
        }
        done
    }
}
