//! Redfish over HTTPS: what a controller offers is asked, not assumed.
//!
//! A question is one connection: the systems that the controller has, the one that is meant, and
//! what is done to it. The ways of resetting and the boot devices are those that it says it has.
//! No link that a controller gives leads to another host, and no redirection is followed.

mod http;
pub mod model;

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;

pub use http::{Certificates, Trust, config as tls};

use self::http::Connection;
use self::model::{Reset, System};
use super::{Answer, Boot, Change, Device, Driver, Failure, Power, cannot_boot};
use crate::error::Error;
use crate::store::secret::Secret;

/// Of HTTPS.
pub const PORT: u16 = 443;

const SYSTEMS: &str = "/redfish/v1/Systems";

/// How a controller is reached and who we are there.
#[derive(Clone, Debug)]
pub struct Settings {
    /// A name or address.
    pub address: String,
    pub port: u16,
    /// Who is believed to be the controller.
    pub trust: Trust,
    pub user: String,
    pub password: Secret,
    /// Which of its systems the node is, by its id; the only one where there is no other.
    pub system: Option<String>,
}

impl Settings {
    /// The usual ones.
    pub fn new(address: impl Into<String>, user: impl Into<String>, password: Secret) -> Self {
        Self {
            address: address.into(),
            port: PORT,
            trust: Trust::System,
            user: user.into(),
            password,
            system: None,
        }
    }
}

/// The driver.
#[derive(Debug)]
pub struct Redfish {
    settings: Settings,
    certificates: Arc<Certificates>,
    limit: Duration,
}

impl Redfish {
    pub fn new(settings: Settings, certificates: Arc<Certificates>, limit: Duration) -> Self {
        Self { settings, certificates, limit }
    }

    /// Connects and finds the system, for what comes next; within the limit.
    async fn talk<T>(
        &self,
        next: impl AsyncFnOnce(&mut Connection<'_>, System) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let all = async {
            let mut connection = Connection::new(&self.settings, &self.certificates)?;
            let path = self.find(&mut connection).await?;
            let found = connection.get(&path).await?;
            next(&mut connection, System::read(path, &found)?).await
        };
        let result = timeout(self.limit, all).await.unwrap_or_else(|_| {
            let limit = self.limit.as_secs_f32();
            Err(Failure::passing(Error::system(format!("no answer within {limit} s"))))
        });
        result.map_err(|Failure { again, error }| {
            let (address, port) = (&self.settings.address, self.settings.port);
            let what = format!("asking `{}:{port}` by Redfish", address.escape_debug());
            Failure { again, error: Error::new(error.kind(), what).because(error) }
        })
    }

    async fn find(&self, connection: &mut Connection<'_>) -> Result<String, Failure> {
        let all = model::members(&connection.get(SYSTEMS).await?);
        let wanted = self.settings.system.as_deref();
        let is_wanted = |path: &&String| wanted.is_none_or(|id| model::id(path) == id);
        let mut found = all.iter().filter(is_wanted);
        match (found.next(), found.next()) {
            (Some(path), None) => Ok(path.clone()),
            (None, _) if wanted.is_none() => {
                Err(Error::system("the controller has no systems").into())
            }
            (first, _) => {
                let ids: Vec<&str> = all.iter().take(8).map(|path| model::id(path)).collect();
                let what = match (first, wanted) {
                    (None, Some(id)) => format!("there is no system `{}`", id.escape_debug()),
                    _ => format!("the controller has {} systems", all.len()),
                };
                let help = format!("say which: `system`, one of {}", ids.join(", "));
                Err(Error::config(what).help(help).into())
            }
        }
    }

    async fn change(&self, change: Change) -> Result<(), Failure> {
        self.talk(async |connection, system| {
            // Many refuse to do what is so already.
            match (change, system.power) {
                (Change::On, Some(Power::On)) | (Change::Off | Change::Soft, Some(Power::Off)) => {
                    return Ok(());
                }
                _ => {}
            }
            let mut reset: Reset = system.reset()?;
            if let (None, Some(info)) = (&reset.offered, &reset.info) {
                reset.offered = model::offered_by(&connection.get(info).await?);
            }
            let body = json!({ "ResetType": reset.choose(change)? });
            connection.post(&reset.target, &body).await
        })
        .await
    }

    async fn set_boot(&self, boot: Boot) -> Result<(), Failure> {
        if boot.device == Device::Other {
            return Err(cannot_boot(boot).into());
        }
        self.talk(async |connection, system| {
            let body: Value = system.boot_request(boot)?;
            connection.patch(&system.path, &body).await
        })
        .await
    }
}

impl Driver for Redfish {
    fn power(&self) -> Answer<'_, Power> {
        Box::pin(self.talk(async |_, system| {
            let unsaid = || Error::system("the system does not say whether it is on");
            Ok(system.power.ok_or_else(unsaid)?)
        }))
    }

    fn change(&self, change: Change) -> Answer<'_, ()> {
        Box::pin(self.change(change))
    }

    fn boot(&self) -> Answer<'_, Boot> {
        Box::pin(self.talk(async |_, system| Ok(system.boot)))
    }

    fn set_boot(&self, boot: Boot) -> Answer<'_, ()> {
        Box::pin(self.set_boot(boot))
    }
}
