//! What the journal says of a node before it is touched, where doing it twice is more than doing
//! it once: a machine that is switched off and on while its daemon dies must not look as if
//! nobody had been there.
//!
//! The work waits for the journal here, and many nodes for one commit. What cannot be written
//! is not done. Orders that may be repeated wait for nothing.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use crate::error::{Context, Error, Result, WireError};
use crate::node::power::fanout::{Checked, Guard, Plan};

/// Those that wait.
pub type Begins = mpsc::UnboundedReceiver<Begun>;

/// A node that is to be touched when the journal says so.
#[derive(Debug)]
pub struct Begun {
    pub node: String,
    written: oneshot::Sender<Result<(), WireError>>,
}

impl Begun {
    /// Lets the nodes of a plan wait for the journal, if what it does may not be repeated.
    pub fn guard(plan: &mut Plan) -> Begins {
        let (begins, waiting) = mpsc::unbounded_channel();
        if !plan.dry_run && !plan.action.may_be_repeated() {
            let before = plan.guard.take();
            plan.guard = Some(Arc::new(Journal { before, begins }));
        }
        waiting
    }

    /// Lets it be touched, or tells why not.
    pub fn tell(self, written: &Result<()>) {
        let written = written.as_ref().copied().map_err(Error::to_wire);
        // It may have been interrupted.
        let _ = self.written.send(written);
    }
}

/// Asks whoever was to be asked, and then waits for the journal.
#[derive(Debug)]
struct Journal {
    before: Option<Arc<dyn Guard>>,
    begins: mpsc::UnboundedSender<Begun>,
}

impl Guard for Journal {
    fn check<'a>(&'a self, node: &'a str) -> Checked<'a> {
        Box::pin(async move {
            if let Some(before) = &self.before {
                before.check(node).await?;
            }
            let (written, told) = oneshot::channel();
            let asked = self.begins.send(Begun { node: node.to_owned(), written });
            let told = match asked {
                Ok(()) => told.await.ok(),
                Err(_) => None,
            };
            let told = told.map(|it| it.map_err(Error::from));
            told.unwrap_or_else(|| Err(Error::system("nobody writes it any more")))
                .while_doing(|| "writing into the journal that it begins; nothing was done".into())
        })
    }
}
