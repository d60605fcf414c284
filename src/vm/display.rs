//! The guest's screen, for whoever may control the VM.
//!
//! QEMU shows it at a socket in the VM's directory, which nobody else enters, and asks for
//! a password all the same. The password is this process's own and lives in its memory
//! alone; QEMU is told it by QMP, each time for a moment: who reads it later, out of a
//! viewer's file, gets nowhere with it.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{control, qmp};
use crate::error::{Context, Error, Result};
use crate::model::vm::{RemoteDisplay, VmSpec};

/// The socket's name in the VM's directory.
pub const SOCKET: &str = "display.sock";

/// Connections to one screen at once; a viewer of SPICE makes some ten.
const AT_ONCE: usize = 64;
/// How long, in seconds, the password is good for a connection that was asked for.
const GOOD_FOR: u32 = 60;
/// VNC looks at eight characters only: six bits each.
const PASSWORD: usize = 8;
const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// How a viewer gets to see the screen.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    pub protocol: RemoteDisplay,
    pub password: String,
}

impl std::fmt::Debug for Offer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Offer").field("protocol", &self.protocol).finish_non_exhaustive()
    }
}

/// A guest's screen; clones share it.
#[derive(Clone)]
pub struct Screen {
    name: String,
    dir: PathBuf,
    protocol: Option<RemoteDisplay>,
    password: Arc<OnceLock<String>>,
    room: Arc<Semaphore>,
}

impl std::fmt::Debug for Screen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Screen").field("protocol", &self.protocol).finish_non_exhaustive()
    }
}

/// A connection to the screen.
#[derive(Debug)]
pub struct Connected {
    stream: UnixStream,
    _room: OwnedSemaphorePermit,
}

impl Screen {
    pub fn new(spec: &VmSpec) -> Self {
        Self {
            name: spec.name(),
            dir: spec.dir.clone(),
            protocol: spec.extras.display,
            password: Arc::default(),
            room: Arc::new(Semaphore::new(AT_ONCE)),
        }
    }

    /// Lets whoever has the password in for a moment.
    ///
    /// # Errors
    /// When the VM has no screen, or QEMU refuses.
    pub async fn open(&self, qmp: &qmp::Client) -> Result<Offer> {
        let protocol = self.protocol.ok_or_else(|| {
            Error::usage(format!("{} has no screen", self.name))
                .help("set `remote-display: vnc` in its template, or use `pavo console`")
        })?;
        let password = match self.password.get() {
            Some(password) => password,
            None => {
                let new = random()?;
                self.password.get_or_init(|| new)
            }
        };
        let word = protocol.as_str();
        for (command, arguments) in [
            ("set_password", json!({ "protocol": word, "password": password })),
            ("expire_password", json!({ "protocol": word, "time": format!("+{GOOD_FOR}") })),
        ] {
            let told = qmp.call(command, arguments).await;
            told.while_doing(|| format!("telling QEMU of {} `{command}`", self.name))?;
        }
        Ok(Offer { protocol, password: password.clone() })
    }

    /// Connects to the screen.
    ///
    /// # Errors
    /// When too many are connected, or QEMU does not listen.
    pub fn connect(&self) -> Result<Connected> {
        let room = self.room.clone().try_acquire_owned().map_err(|_| {
            Error::system(format!("{AT_ONCE} connections show {} already", self.name))
                .help("close viewers that nobody looks at")
        })?;
        let stream = control::connect(&self.dir, SOCKET);
        let stream = stream.while_doing(|| format!("connecting to the screen of {}", self.name))?;
        Ok(Connected { stream, _room: room })
    }
}

impl Connected {
    /// Carries what both sides have to say, until both are done or one is gone.
    pub async fn carry(&mut self, stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
        // It has ended, one way or another.
        let _ = copy_bidirectional(stream, &mut self.stream).await;
    }
}

fn random() -> Result<String> {
    let mut bytes = [0; PASSWORD];
    getrandom::fill(&mut bytes).while_doing(|| "asking for random numbers".into())?;
    Ok(bytes.iter().map(|byte| char::from(LETTERS[usize::from(byte % 64)])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_new_each_time_and_in_no_debug_text() {
        let (one, two) = (random().unwrap(), random().unwrap());
        assert_eq!((one.len(), two.len()), (PASSWORD, PASSWORD));
        assert_ne!(one, two);
        let offer = Offer { protocol: RemoteDisplay::Vnc, password: one.clone() };
        assert!(!format!("{offer:?}").contains(&one));
    }
}
