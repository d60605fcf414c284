//! One action on one node, made of what its controller can do once.
//!
//! Each question to the controller is tried again where that may help. `soft` and `cycle` wait
//! until the machine is in the state that they want; `cycle` is off and on with the wait in
//! between, because a machine that a controller cycles by itself was seen off by nobody.

use std::fmt;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::{Answer, Boot, Change, Driver, Failure, Power};
use crate::error::{Error, Result};

/// What is done to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Status,
    On,
    Off,
    /// Shuts the operating system down, and waits for that.
    Soft,
    Reset,
    /// Off, and on again once it is off.
    Cycle,
    /// Starts from the beginning: on, or reset where it is on.
    Boot,
    BootDevice,
    SetBootDevice(Boot),
}

impl Action {
    /// Whether it leaves everything as it is.
    pub fn only_looks(self) -> bool {
        matches!(self, Self::Status | Self::BootDevice)
    }

    /// Whether doing it a second time does no more than doing it once.
    pub fn may_be_repeated(self) -> bool {
        !matches!(self, Self::Soft | Self::Reset | Self::Cycle | Self::Boot)
    }

    /// What it does, as in "would …".
    fn doing(self) -> String {
        match self {
            Self::Status | Self::BootDevice => "look".into(),
            Self::On => "switch on".into(),
            Self::Off => "switch off".into(),
            Self::Soft => "shut down".into(),
            Self::Reset => "reset".into(),
            Self::Cycle => "switch off and on".into(),
            Self::Boot => "switch on, or reset".into(),
            Self::SetBootDevice(boot) => format!("boot from {boot}"),
        }
    }
}

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// One question to a controller.
    pub answer: Duration,
    /// How often it is asked.
    pub tries: u32,
    /// Until a machine is in the state that it was told to go to.
    pub settle: Duration,
    /// How often that is looked at.
    pub look: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(5),
            tries: 2,
            settle: Duration::from_secs(120),
            look: Duration::from_secs(1),
        }
    }
}

/// What came of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// Its power is so, or it was told to be.
    Power(Power),
    /// It was seen in this state, after some time.
    Reached(Power, Duration),
    /// It was seen off after some time, and told to be on.
    Cycled(Duration),
    Reset,
    Boot(Boot),
    /// What would be done to one whose power is so.
    Would(Action, Power),
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Power(power) => power.fmt(f),
            Self::Reached(power, took) => write!(f, "{power} (after {} s)", took.as_secs()),
            Self::Cycled(took) => write!(f, "on (off after {} s)", took.as_secs()),
            Self::Reset => f.write_str("reset"),
            Self::Boot(boot) => boot.fmt(f),
            Self::Would(action, power) => write!(f, "would {} (is {power})", action.doing()),
        }
    }
}

/// What a driver may take beyond its limit before it is dropped.
const GRACE: Duration = Duration::from_millis(100);

/// A controller that is asked with patience.
struct Asked<'a> {
    driver: &'a dyn Driver,
    patience: &'a Patience,
}

impl Asked<'_> {
    async fn ask<'d, T>(&'d self, question: impl Fn(&'d dyn Driver) -> Answer<'d, T>) -> Result<T> {
        self.try_to(true, question).await.map_err(|failure| failure.error)
    }

    /// Asks until there is an answer. What may have been done is asked again only where that
    /// `may_be_repeated`.
    async fn try_to<'d, T>(
        &'d self,
        may_be_repeated: bool,
        question: impl Fn(&'d dyn Driver) -> Answer<'d, T>,
    ) -> Result<T, Failure> {
        let limit = self.patience.answer + GRACE;
        let mut tried = 1;
        loop {
            let late = || {
                let limit = self.patience.answer.as_secs_f32();
                Failure::unconfirmed(Error::system(format!("no answer within {limit} s")))
            };
            let answer = timeout(limit, question(self.driver)).await;
            match answer.unwrap_or_else(|_| Err(late())) {
                Ok(answer) => return Ok(answer),
                Err(failure) if failure.perhaps_done && !may_be_repeated => return Err(failure),
                Err(failure) if failure.again && tried < self.patience.tries => tried += 1,
                Err(failure) if failure.again && tried > 1 => {
                    return Err(failure.while_doing(format!("given up after {tried} tries")));
                }
                Err(failure) => return Err(failure),
            }
        }
    }

    async fn power(&self) -> Result<Power> {
        self.ask(|driver| driver.power()).await
    }

    async fn change(&self, change: Change) -> Result<()> {
        let told = self.try_to(change.may_be_repeated(), |driver| driver.change(change)).await;
        told.map_err(|Failure { perhaps_done, error, .. }| match perhaps_done {
            true if !change.may_be_repeated() => {
                Error::new(error.kind(), "it was told, and whether it was done is not known")
                    .because(error)
            }
            _ => error,
        })
    }

    /// Presses the power button. What comes of it is seen; so whether the controller said that
    /// it did matters only where nothing does.
    async fn press(&self) -> Result<Option<Error>> {
        match self.try_to(false, |driver| driver.change(Change::Soft)).await {
            Ok(()) => Ok(None),
            Err(failure) if failure.perhaps_done => Ok(Some(failure.error)),
            Err(failure) => Err(failure.error),
        }
    }

    /// Waits until the machine is off.
    async fn until_off(&self, what: &str) -> Result<Duration> {
        let begun = Instant::now();
        let settle = self.patience.settle;
        loop {
            // One that is not heard now may be at the next look.
            let power = self.power().await;
            if matches!(power, Ok(Power::Off)) {
                return Ok(begun.elapsed());
            }
            let left = settle.saturating_sub(begun.elapsed());
            if left.is_zero() {
                let still = Error::system(format!("still on {} s after {what}", settle.as_secs()));
                return Err(match power {
                    Ok(_) => still,
                    Err(error) => {
                        Error::system(format!("not seen off after {what}")).because(error)
                    }
                });
            }
            sleep(self.patience.look.min(left)).await;
        }
    }
}

/// Does it.
///
/// # Errors
/// When the controller refuses or does not answer, or the machine is not in time in the state
/// that was wanted.
pub async fn perform(driver: &dyn Driver, action: Action, patience: &Patience) -> Result<Done> {
    let asked = Asked { driver, patience };
    Ok(match action {
        Action::Status => Done::Power(asked.power().await?),
        Action::On => {
            asked.change(Change::On).await?;
            Done::Power(Power::On)
        }
        Action::Off => {
            asked.change(Change::Off).await?;
            Done::Power(Power::Off)
        }
        Action::Soft => soft(&asked).await?,
        Action::Reset => {
            asked.change(Change::Reset).await?;
            Done::Reset
        }
        Action::Cycle => cycle(&asked).await?,
        Action::Boot => match asked.power().await? {
            Power::Off => {
                asked.change(Change::On).await?;
                Done::Power(Power::On)
            }
            Power::On => {
                asked.change(Change::Reset).await?;
                Done::Reset
            }
        },
        Action::BootDevice => Done::Boot(asked.ask(|driver| driver.boot()).await?),
        Action::SetBootDevice(boot) => {
            asked.ask(|driver| driver.set_boot(boot)).await?;
            Done::Boot(boot)
        }
    })
}

async fn soft(asked: &Asked<'_>) -> Result<Done> {
    if asked.power().await? == Power::Off {
        return Ok(Done::Power(Power::Off));
    }
    let unconfirmed = asked.press().await?;
    let took = asked.until_off("its power button was pressed").await.map_err(|error| {
        let error = match unconfirmed {
            None => error,
            Some(why) => {
                let what = format!("{error}, and whether it was is not known");
                Error::new(error.kind(), what).because(why)
            }
        };
        error.help("its operating system may not listen to that; `off` does not ask it")
    })?;
    Ok(Done::Reached(Power::Off, took))
}

async fn cycle(asked: &Asked<'_>) -> Result<Done> {
    if asked.power().await? == Power::Off {
        asked.change(Change::On).await?;
        return Ok(Done::Power(Power::On));
    }
    asked.change(Change::Off).await?;
    let took = asked.until_off("it was switched off").await?;
    asked.change(Change::On).await.map_err(|error| {
        Error::new(error.kind(), "it is off, and was not switched on again")
            .because(error)
            .help("switch it on: `pavo power NODE on`")
    })?;
    Ok(Done::Cycled(took))
}

/// What it would do, after a look at the node; nothing is changed.
///
/// # Errors
/// As [`perform`], of a look.
pub async fn rehearse(driver: &dyn Driver, action: Action, patience: &Patience) -> Result<Done> {
    if action.only_looks() {
        return perform(driver, action, patience).await;
    }
    let power = Asked { driver, patience }.power().await?;
    Ok(Done::Would(action, power))
}
