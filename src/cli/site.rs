//! The person at a site: known to its store by a secret that only they and root read.

use crate::config::Config;
use crate::error::Result;
use crate::ops::step::LogIn;

use super::App;

/// Who uses the site's store, and how they get in.
#[derive(Debug)]
pub struct Person {}

impl Person {
    pub fn new(_app: &App, _config: &Config) -> Result<Self> {
        Ok(Self {})
    }

    /// The secret, sealed to the site.
    pub fn sealed(&self) -> Result<Option<String>> {
        Ok(None)
    }

    /// How to log in.
    pub fn log_in(&self) -> Option<LogIn> {
        None
    }
}
