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
use tokio::time::{Instant, sleep, timeout};

pub use http::{Certificates, Trust, config as tls};

use self::http::Connection;
use self::model::{PRESS, Reset, State, System};
use super::{Boot, Change, Controller, Device, Failure, Power, cannot_boot};
use crate::error::Error;
use crate::store::secret::Secret;

/// Of HTTPS.
pub const PORT: u16 = 443;

const SYSTEMS: &str = "/redfish/v1/Systems";

/// The most pages of systems that are read.
const MAX_PAGES: usize = 100;

/// How often one that is going off is looked at, before it is switched on.
const LOOK: Duration = Duration::from_millis(200);

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
        let mut connection = Connection::new(&self.settings, &self.certificates)?;
        let all = async {
            let path = self.find(&mut connection).await?;
            let found = connection.get(&path).await?;
            next(&mut connection, System::read(path, &found)?).await
        };
        let result = timeout(self.limit, all).await.unwrap_or_else(|_| {
            let limit = self.limit.as_secs_f32();
            let error = Error::system(format!("no answer within {limit} s"));
            Err(match connection.has_told() {
                true => Failure::unconfirmed(error),
                false => Failure::passing(error),
            })
        });
        result.map_err(|failure| {
            let (address, port) = (&self.settings.address, self.settings.port);
            failure.while_doing(format!("asking `{}:{port}` by Redfish", address.escape_debug()))
        })
    }

    /// The systems of the controller, page by page.
    async fn systems(&self, connection: &mut Connection<'_>) -> Result<Vec<String>, Failure> {
        let mut all = Vec::new();
        let mut next = Some(SYSTEMS.to_owned());
        for _ in 0..MAX_PAGES {
            let Some(path) = next else { return Ok(all) };
            let page = connection.get(&path).await?;
            all.extend(model::members(&page));
            next = model::next_page(&page);
        }
        Err(Error::system(format!("the controller has more than {MAX_PAGES} pages of systems"))
            .into())
    }

    async fn find(&self, connection: &mut Connection<'_>) -> Result<String, Failure> {
        let all = self.systems(connection).await?;
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
                let help = format!("say which: `control/bmc_system`, one of {}", ids.join(", "));
                Err(Error::config(what).help(help).into())
            }
        }
    }
}

impl Controller for Redfish {
    async fn power(&self) -> Result<Power, Failure> {
        self.talk(async |_, system| {
            let unsaid = || Error::system("the system does not say whether it is on");
            Ok(system.state.ok_or_else(unsaid)?.power())
        })
        .await
    }

    async fn change(&self, change: Change) -> Result<(), Failure> {
        let late = Instant::now() + self.limit * 3 / 4;
        self.talk(async |connection, mut system| {
            // Switched on now, it would be off in the end.
            while change == Change::On && system.state == Some(State::PoweringOff) {
                if Instant::now() > late {
                    let what = "it is going off, and cannot be switched on before it is";
                    return Err(Failure::passing(Error::system(what)));
                }
                sleep(LOOK).await;
                let found = connection.get(&system.path).await?;
                system = System::read(system.path, &found)?;
            }
            // Many refuse to do what is so already.
            if system.state.is_some_and(|state| state.is_done(change)) {
                return Ok(());
            }
            let mut reset: Reset = system.reset()?;
            if let (None, Some(info)) = (&reset.offered, &reset.info) {
                reset.offered = model::offered_by(&connection.get(info).await?);
            }
            let word = reset.choose(change, system.state)?;
            let told = connection.post(&reset.target, &json!({ "ResetType": word })).await;
            // A second press would undo the first.
            told.map_err(|failure| match word == PRESS && failure.perhaps_done {
                true => Failure { again: false, ..failure },
                false => failure,
            })
        })
        .await
    }

    async fn boot(&self) -> Result<Boot, Failure> {
        self.talk(async |_, system| Ok(system.boot)).await
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
