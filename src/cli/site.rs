//! The person at a site: known to its store by a secret that only they and root read.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::{Instant, sleep};

use super::App;
use crate::config::Etcd as EtcdConfig;
use crate::error::{Context, Error, Result};
use crate::ops::setup::SITE_DIR;
use crate::ops::site;
use crate::ops::step::LogIn;
use crate::store::Store;
use crate::store::etcd::{Access, Etcd};
use crate::store::secret::{Letter, Secret, SitePublic, person_secret};
use crate::vm::channel::Identity;

/// How long the site may take to know a person whose first job has just begun.
pub const INTRODUCTION: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(100);

/// Who uses the site's store, and how they get in.
#[derive(Debug)]
pub struct Person {
    user: String,
    uid: u32,
    secret: Secret,
    access: Access,
}

impl Person {
    /// `None` where the site has no store.
    pub fn new(app: &App, etcd: Option<&EtcdConfig>) -> Result<Option<Self>> {
        let Some(etcd) = etcd else { return Ok(None) };
        let (user, secret) = (app.env.user.clone(), person_secret(&app.env.home)?);
        let access = site::as_person(etcd, &user, &secret);
        Ok(Some(Self { user, uid: app.env.uid, secret, access }))
    }

    /// What root on the hosts of a job is told, sealed to the site: ciphertext, for the
    /// environment of a step.
    pub fn sealed(&self, job: u32, member: &Identity) -> Result<String> {
        let file: PathBuf = Path::new(SITE_DIR).join("site.pub");
        let letter = Letter::new(&self.user, self.uid, job, self.secret.clone(), member);
        let sealed = SitePublic::read(&file).and_then(|public| public.seal(&letter));
        sealed.map_err(|error| {
            error.help("an administrator prepares the site: `pavo internal setup store`")
        })
    }

    /// Logs in: at once, or never.
    pub async fn log_in(&self) -> Result<Arc<dyn Store>> {
        let store = Etcd::connect(&self.access).await;
        let store = store.while_doing(|| "logging in to the site's store".into())?;
        Ok(Arc::new(store))
    }

    /// Logs in once a host has let the site know the person.
    pub fn log_in_later(self) -> LogIn {
        let access = self.access;
        Box::new(move || {
            let access = access.clone();
            async move {
                let deadline = Instant::now() + INTRODUCTION;
                loop {
                    match Etcd::connect(&access).await {
                        Ok(store) => return Ok(Arc::new(store) as Arc<dyn Store>),
                        Err(error) if Instant::now() >= deadline => {
                            return Err::<_, Error>(error)
                                .while_doing(|| "logging in to the site's store".into());
                        }
                        Err(_) => sleep(PAUSE).await,
                    }
                }
            }
            .boxed()
        })
    }
}
