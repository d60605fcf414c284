//! How far a long copy is, and that it stands still.
//!
//! A copy ends when the file systems it reads and writes let it: who waits for a file server
//! that does not answer cannot be ended, not even by us. So there is no limit, but a word.

use std::time::{Duration, Instant};

use super::out::Out;
use crate::model::vmset::fold;
use crate::vm::save::Progress;

/// How long nothing may be copied before that is told.
pub const STILL: Duration = Duration::from_secs(10);

/// How often, elsewhere than on a terminal, it is told how far one is that goes on.
const SELDOM: Duration = Duration::from_secs(10);

/// Tells how far a copy is; at a terminal each second, elsewhere on change.
#[derive(Debug)]
pub struct Copying<'a> {
    out: &'a Out,
    /// Such as `Saving vm0`.
    what: String,
    done: u64,
    since: Instant,
    said: String,
    /// When, elsewhere than on a terminal, it was last said how far it is.
    last: Option<Instant>,
}

impl<'a> Copying<'a> {
    pub fn new(out: &'a Out, what: String) -> Self {
        Self { out, what, done: 0, since: Instant::now(), said: String::new(), last: None }
    }

    /// How far it is now.
    pub fn at(&mut self, progress: Progress) {
        if progress.done != self.done {
            (self.done, self.since) = (progress.done, Instant::now());
        }
        let (still, at_terminal) = (self.since.elapsed(), self.out.stderr_is_terminal());
        let soon = self.last.is_some_and(|last| last.elapsed() < SELDOM);
        if !at_terminal && still < STILL && soon {
            return;
        }
        self.last = Some(Instant::now());
        self.say(line(&self.what, progress, still, at_terminal));
    }

    /// Of these VMs nothing has come for so long.
    pub fn still(&mut self, vms: &[u32], still: Duration) {
        let seconds = told_now_and_then(still, self.out.stderr_is_terminal());
        let (what, vms) = (&self.what, fold(vms));
        self.say(format!("{what}: nothing for {seconds} s with {vms}"));
    }

    /// It has not begun, for this reason.
    pub fn waits(&mut self, why: String) {
        self.since = Instant::now();
        self.say(why);
    }

    fn say(&mut self, line: String) {
        if line != self.said {
            self.out.progress(&line);
            self.said = line;
        }
    }
}

fn line(what: &str, progress: Progress, still: Duration, at_terminal: bool) -> String {
    let percent = u128::from(progress.done) * 100 / u128::from(progress.total.max(1));
    if still < STILL {
        return format!("{what}: {percent} %");
    }
    let seconds = told_now_and_then(still, at_terminal);
    format!("{what}: {percent} % (nothing for {seconds} s: do the file systems answer?)")
}

/// The seconds, so that they do not fill a log.
fn told_now_and_then(still: Duration, at_terminal: bool) -> u64 {
    match still.as_secs() {
        seconds if at_terminal => seconds,
        seconds if seconds < 60 => STILL.as_secs(),
        seconds => seconds / 60 * 60,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_that_stands_still_says_so_in_a_log_now_and_then() {
        let half = Progress { done: 1, total: 2 };
        let at =
            |seconds, terminal| line("Saving vm0", half, Duration::from_secs(seconds), terminal);
        assert_eq!(at(9, true), "Saving vm0: 50 %");
        let still = "Saving vm0: 50 % (nothing for 12 s: do the file systems answer?)";
        assert_eq!(at(12, true), still);
        let log: Vec<String> = (0..180).map(|seconds| at(seconds, false)).collect();
        let mut lines = log.clone();
        lines.dedup();
        assert_eq!(lines.len(), 4, "{lines:?}");
        assert!(lines[3].contains("nothing for 120 s"), "{lines:?}");
        let most = Progress { done: u64::MAX, total: u64::MAX };
        assert_eq!(line("It", most, Duration::ZERO, false), "It: 100 %");
    }
}
