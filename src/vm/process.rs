//! The process around one VM, as its launcher sees it: one stream.
//!
//! ```text
//! launcher → process   the VmSpec, then wishes:   {"stop":"graceful","seconds":10}  {"stop":"now"}
//! process → launcher   a VmReport for each state
//! ```
//!
//! One JSON value a line. The stream is also the life line: when the launcher's
//! end closes, the VM ends at once.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::driver;
use super::machine::Stop;
use crate::error::{Context, Error, Result};
use crate::model::job::VmReport;
use crate::model::vm::VmSpec;

/// How long a guest has for shutting down where nobody says otherwise.
pub const GRACE: Duration = Duration::from_secs(10);

/// The longest line, in bytes: a spec with the largest user-data.
const MAX_LINE: u64 = 16 << 20;
/// How long the launcher may take to hand over the spec.
const SPEC_TIME: Duration = Duration::from_secs(60);
/// How long reports are written for after the VM's end.
pub const FAREWELL: Duration = Duration::from_secs(2);

/// A wish of the launcher's, as it is on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "stop", rename_all = "lowercase")]
pub enum Wish {
    Graceful { seconds: Option<u64> },
    Now,
}

impl From<Stop> for Wish {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Graceful { deadline } => Self::Graceful { seconds: Some(deadline.as_secs()) },
            Stop::Now => Self::Now,
        }
    }
}

impl From<Wish> for Stop {
    fn from(wish: Wish) -> Self {
        match wish {
            Wish::Graceful { seconds } => {
                Self::Graceful { deadline: seconds.map_or(GRACE, Duration::from_secs) }
            }
            Wish::Now => Self::Now,
        }
    }
}

/// The line by which a launcher asks a VM's process to stop.
pub fn stop_line(stop: Stop) -> String {
    serde_json::to_string(&Wish::from(stop)).expect("a wish is always valid JSON") + "\n"
}

/// Runs the VM whose spec comes first on `stream`, until it has ended. SIGTERM
/// asks for a graceful stop, a second one for an immediate one; SIGINT and SIGHUP
/// are the launcher's business, whose end of the stream tells.
///
/// # Errors
/// When no spec comes, or why the VM failed (then the launcher has been told).
pub async fn main(stream: std::os::unix::net::UnixStream) -> Result<()> {
    let stream = stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream));
    let (reader, writer) =
        stream.while_doing(|| "taking over the launcher's connection".into())?.into_split();
    let mut reader = BufReader::new(reader);
    let spec = tokio::time::timeout(SPEC_TIME, line(&mut reader)).await;
    let spec = spec.map_err(|_| Error::system(format!("no VM was given within {SPEC_TIME:?}")))?;
    let spec = spec.ok_or_else(|| Error::system("the launcher ended before it gave a VM"))?;
    let spec: VmSpec = serde_json::from_slice(&spec).while_doing(|| "reading the VM".into())?;

    let (stop, stops) = mpsc::channel(4);
    let (report, reports) = mpsc::channel(16);
    let wishes = tokio::spawn(wishes(reader, stop.clone()));
    let signals = tokio::spawn(signals(stop)?);
    let mut writing = tokio::spawn(write_reports(writer, reports));
    let outcome = driver::run(spec, report, stops).await;
    // The sender is gone; the task ends once the last report is written.
    let _ = tokio::time::timeout(FAREWELL, &mut writing).await;
    for task in [wishes, signals, writing] {
        task.abort();
    }
    outcome
}

/// A line without its end; `None` at the end of the stream, or where it is longer
/// than [`MAX_LINE`].
async fn line(reader: &mut (impl AsyncBufRead + Unpin)) -> Option<Vec<u8>> {
    let mut line = Vec::new();
    reader.take(MAX_LINE).read_until(b'\n', &mut line).await.ok()?;
    line.pop().filter(|last| *last == b'\n').map(|_| line)
}

/// Passes on what the launcher wishes; its end means: now.
async fn wishes(mut reader: BufReader<OwnedReadHalf>, stop: mpsc::Sender<Stop>) {
    while let Some(line) = line(&mut reader).await {
        let wish = match serde_json::from_slice(&line) {
            Ok(Wish::Graceful { seconds }) => {
                Stop::Graceful { deadline: seconds.map_or(GRACE, Duration::from_secs) }
            }
            Ok(Wish::Now) => Stop::Now,
            Err(error) => {
                tracing::warn!("the launcher's wish is not understood: {error}");
                continue;
            }
        };
        if stop.send(wish).await.is_err() {
            return;
        }
    }
    // The VM has ended by itself already: as good.
    let _ = stop.send(Stop::Now).await;
}

/// Catches signals from now on; the future passes them on.
pub fn signals(stop: mpsc::Sender<Stop>) -> Result<impl Future<Output = ()>> {
    let catch = |kind| signal(kind).while_doing(|| "catching signals".into());
    let mut terminate = catch(SignalKind::terminate())?;
    let ignored = [catch(SignalKind::interrupt())?, catch(SignalKind::hangup())?];
    Ok(async move {
        let _ignored = ignored;
        let first = Stop::Graceful { deadline: GRACE };
        for wish in std::iter::once(first).chain(std::iter::repeat(Stop::Now)) {
            terminate.recv().await;
            if stop.send(wish).await.is_err() {
                return;
            }
        }
    })
}

async fn write_reports(mut writer: OwnedWriteHalf, mut reports: mpsc::Receiver<VmReport>) {
    while let Some(report) = reports.recv().await {
        let mut line = serde_json::to_vec(&report).expect("a report is always valid JSON");
        line.push(b'\n');
        if writer.write_all(&line).await.is_err() {
            // The launcher is gone. Reports are still taken, so that none blocks.
            while reports.recv().await.is_some() {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn wishes_are_read_and_the_launchers_end_means_now() {
        let (mut launcher, ours) = UnixStream::pair().unwrap();
        let (stop, mut stops) = mpsc::channel(1);
        tokio::spawn(wishes(BufReader::new(ours.into_split().0), stop));
        let graceful = Stop::Graceful { deadline: Duration::from_secs(3) };
        launcher.write_all(stop_line(graceful).as_bytes()).await.unwrap();
        launcher.write_all(b"{\"stop\":\"graceful\"}\n{\"sing\":true}\n").await.unwrap();
        assert_eq!(stops.recv().await, Some(graceful));
        assert_eq!(stops.recv().await, Some(Stop::Graceful { deadline: GRACE }));
        drop(launcher);
        assert_eq!(stops.recv().await, Some(Stop::Now));
        assert_eq!(stops.recv().await, None);
    }

    #[tokio::test]
    async fn when_the_launcher_is_gone_so_is_the_vm() {
        let dir = tempfile::tempdir().unwrap();
        let spec = crate::vm::testing::spec(dir.path());
        let disk = spec.dir.join("disk.qcow2");
        let (launcher, ours) = std::os::unix::net::UnixStream::pair().unwrap();
        launcher.set_nonblocking(true).unwrap();
        let mut launcher = BufReader::new(UnixStream::from_std(launcher).unwrap());
        let launch = async {
            let spec = serde_json::to_string(&spec).unwrap() + "\n";
            launcher.write_all(spec.as_bytes()).await.unwrap();
            loop {
                let report = line(&mut launcher).await.unwrap();
                let report: VmReport = serde_json::from_slice(&report).unwrap();
                if report.state == crate::model::job::VmState::Running {
                    break;
                }
            }
            assert!(crate::vm::testing::process_with(&disk).is_some());
            drop(launcher);
        };
        let (outcome, ()) = tokio::join!(main(ours), launch);
        outcome.unwrap();
        assert_eq!(crate::vm::testing::process_with(&disk), None);
    }

    #[tokio::test]
    async fn without_a_vm_there_is_an_error() {
        for (said, expected) in [
            ("", "the launcher ended before it gave a VM"),
            ("{\"rank\":0}", "the launcher ended before it gave a VM"),
            ("{\"rank\":0}\n", "reading the VM"),
        ] {
            let (mut launcher, ours) = std::os::unix::net::UnixStream::pair().unwrap();
            std::io::Write::write_all(&mut launcher, said.as_bytes()).unwrap();
            drop(launcher);
            assert_eq!(main(ours).await.unwrap_err().to_string(), expected);
        }
    }
}
