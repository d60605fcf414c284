//! The signal by which Slurm tells a job beforehand that its time is nearly up: `--signal`.

use nix::sys::signal::Signal;

use super::slurm::JobWish;
use super::{parse_memory, parse_time};
use crate::error::{Error, Result};

/// Those that can be caught, and mean nothing else to a launcher; SIGTERM means that anyway.
const SIGNALS: [Signal; 5] =
    [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGQUIT, Signal::SIGALRM, Signal::SIGTERM];
/// What Slurm takes where no time is given, and the longest.
const USUAL: u32 = 60;
const LONGEST: u32 = 65_535;
/// What it takes to write a cluster down, at least.
const LEAST: u64 = 180;
/// What a host writes in a second, if it is a slow one.
const MIB_A_SECOND: u64 = 100;

/// A signal, and how long before the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Warning {
    pub signal: Signal,
    pub seconds: u32,
    /// Also before a reservation that overlaps begins.
    reservation: bool,
}

impl Warning {
    /// What a job is to have: that of its user, which is taken out of the options, or one that
    /// leaves the time to write the cluster down.
    ///
    /// # Errors
    /// When the user wants a signal that cannot be caught.
    pub fn of(wish: &mut JobWish) -> Result<Self> {
        let site = take(&mut wish.site)?;
        match take(&mut wish.passed)?.or(site) {
            Some(text) => Self::parse(&text),
            None => Ok(Self::fitting(wish)),
        }
    }

    fn fitting(wish: &JobWish) -> Self {
        let memory = wish.memory.as_deref().and_then(|memory| parse_memory(memory).ok());
        let seconds = LEAST + memory.unwrap_or(0) / MIB_A_SECOND;
        // Of a short job it is not to take all.
        let time = wish.time.as_deref().and_then(|time| parse_time(time).ok());
        let seconds = time.map_or(seconds, |time| seconds.min(time / 2));
        let seconds = u32::try_from(seconds).unwrap_or(LONGEST).clamp(1, LONGEST);
        Self { signal: Signal::SIGUSR2, seconds, reservation: false }
    }

    /// Reads `[{R|B}:]SIGNAL[@SECONDS]`.
    fn parse(text: &str) -> Result<Self> {
        let wrong = |why: &str| {
            Error::usage(format!("`--signal={}` {why}", text.escape_debug()))
                .help("write `--signal=USR1@300`, with one of USR1, USR2, QUIT, ALRM, TERM")
        };
        let (how, rest) = text.split_once(':').unwrap_or(("", text));
        let how = how.to_uppercase();
        if how.chars().any(|letter| !"RB".contains(letter)) {
            return Err(wrong("is not understood"));
        }
        let (name, seconds) = match rest.split_once('@') {
            Some((name, seconds)) => (name, seconds.parse().ok()),
            None => (rest, Some(USUAL)),
        };
        let seconds = seconds.filter(|seconds| (1..=LONGEST).contains(seconds));
        let seconds = seconds.ok_or_else(|| wrong("names no time"))?;
        let signal = signal(name).ok_or_else(|| wrong("names no signal"))?;
        if !SIGNALS.contains(&signal) {
            return Err(wrong("is none by which a checkpoint could be taken"));
        }
        Ok(Self { signal, seconds, reservation: how.contains('R') })
    }

    /// The option of sbatch: the signal is for the launcher, not for the VMs.
    pub fn option(self) -> String {
        let how = if self.reservation { "RB" } else { "B" };
        let name = self.signal.as_str().trim_start_matches("SIG");
        format!("--signal={how}:{name}@{}", self.seconds)
    }
}

/// A signal by name or number.
pub fn signal(text: &str) -> Option<Signal> {
    let upper = text.to_uppercase();
    let name = format!("SIG{}", upper.trim_start_matches("SIG"));
    let number = text.parse().ok().and_then(|number: i32| Signal::try_from(number).ok());
    number.or_else(|| name.parse().ok())
}

/// Takes the last `--signal` out of some options, and those before it.
fn take(words: &mut Vec<String>) -> Result<Option<String>> {
    let (mut rest, mut found) = (Vec::new(), None);
    let mut all = words.drain(..);
    while let Some(word) = all.next() {
        if word == "--signal" {
            let value = all.next();
            found = Some(value.ok_or_else(|| Error::usage("`--signal` lacks its value"))?);
        } else if let Some(value) = word.strip_prefix("--signal=") {
            found = Some(value.to_owned());
        } else {
            rest.push(word);
        }
    }
    drop(all);
    *words = rest;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(memory: Option<&str>, time: Option<&str>, passed: &[&str]) -> Result<(String, String)> {
        let mut wish = JobWish {
            memory: memory.map(Into::into),
            time: time.map(Into::into),
            passed: passed.iter().map(|word| (*word).into()).collect(),
            ..JobWish::default()
        };
        let warning = Warning::of(&mut wish)?;
        Ok((warning.option(), wish.passed.join(" ")))
    }

    #[test]
    fn a_users_own_signal_is_taken_and_told_to_the_launcher_alone() {
        let own = |words: &[&str]| of(None, None, words).unwrap();
        let both = |option: &str, rest: &str| (option.to_owned(), rest.to_owned());
        assert_eq!(own(&["-p", "a", "--signal=USR1@9"]), both("--signal=B:USR1@9", "-p a"));
        assert_eq!(own(&["--signal", "B:sigterm", "-N2"]), both("--signal=B:TERM@60", "-N2"));
        assert_eq!(own(&["--signal=r:10@5", "--signal=R:12@7"]), both("--signal=RB:USR2@7", ""));
        for wrong in
            ["KILL@5", "B:TSTP", "HUP", "X:USR1", "USR1@", "USR1@0", "NOSUCH", "", "USR1@70000"]
        {
            assert!(of(None, None, &[&format!("--signal={wrong}")]).is_err(), "{wrong}");
        }
        of(None, None, &["--signal"]).unwrap_err();
    }

    #[test]
    fn without_one_there_is_the_time_to_write_memory_down() {
        let seconds = |memory, time| of(memory, time, &[]).unwrap().0;
        assert_eq!(seconds(None, None), "--signal=B:USR2@180");
        assert_eq!(seconds(Some("64G"), Some("1-0")), "--signal=B:USR2@835");
        assert_eq!(seconds(Some("64G"), Some("2")), "--signal=B:USR2@60");
        assert_eq!(seconds(Some("0"), Some("UNLIMITED")), "--signal=B:USR2@180");
        assert_eq!(seconds(Some("100T"), None), "--signal=B:USR2@65535");
    }
}
