//! The process around one VM, as its launcher sees it: one stream.
//!
//! ```text
//! launcher → process   the VmSpec, then wishes:   {"stop":"graceful","seconds":10}  {"stop":"now"}
//! process → launcher   a VmReport for each state
//! ```
//!
//! One JSON value a line. The stream is also the life line: when the launcher's
//! end closes, the VM ends at once. Where the launcher is on another host ([`task`])
//! the stream is a [`link`](super::link), and the life line one more.

use std::time::Duration;

use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::channel::Listener;
use super::driver;
use super::link::{LifeLine, Receiver, Sender, ToLauncher, ToTask, Wish};
use super::machine::{GRACE, Order, Stop};
use crate::error::{Context, Error, Result};
use crate::model::job::VmReport;
use crate::model::vm::VmSpec;

/// How long the launcher may take to hand over the spec.
const SPEC_TIME: Duration = Duration::from_secs(60);
/// How long reports are written for after the VM's end.
const FAREWELL: Duration = Duration::from_secs(2);

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
    let mut receiver = Receiver::new(reader);
    let spec = tokio::time::timeout(SPEC_TIME, receiver.line()).await;
    let spec =
        spec.map_err(|_| Error::system(format!("no VM was given within {SPEC_TIME:?}")))??;
    let spec = spec.ok_or_else(|| Error::system("the launcher ended before it gave a VM"))?;
    let spec: VmSpec = serde_json::from_slice(&spec).while_doing(|| "reading the VM".into())?;

    let (stop, stops) = mpsc::channel(4);
    let read = |line: &[u8]| serde_json::from_slice(line).map(|wish: Wish| wish.into());
    let wishes = tokio::spawn(wishes(receiver, stop.clone(), read));
    let (report, reports) = mpsc::channel(16);
    let writing = tokio::spawn(write_reports(Sender::new(writer), reports));
    let signals = tokio::spawn(Signals::catch()?.pass_on(stop, Some(Stop::Now)));
    let outcome = driver::run(spec, report, stops, None).await;
    farewell(writing, &[wishes, signals]).await;
    outcome
}

/// What a task has of its launcher.
#[derive(Debug)]
pub struct Launcher {
    pub link: (Sender, Receiver),
    pub life: LifeLine,
    /// Whether the scheduler's wish that it ends is the launcher's to follow: it may take a
    /// checkpoint first. The scheduler kills whoever does not end in time.
    pub leads: bool,
}

/// Runs the VM that a launcher, on whatever host, gave to this task of its step, until it
/// has ended: also when the connection or the life line does. Signals as in [`main`], unless
/// the launcher leads.
/// On `remote`, other members of the cluster control the VM. What `trouble` ends with is
/// told to the launcher, too.
///
/// # Errors
/// Why the VM failed; the launcher has been told.
pub async fn task(
    spec: VmSpec,
    launcher: Launcher,
    remote: Option<Listener>,
    trouble: impl Future<Output = Error> + Send + 'static,
) -> Result<()> {
    let Launcher { link: (sender, receiver), mut life, leads } = launcher;
    let (stop, stops) = mpsc::channel(4);
    let read = |line: &[u8]| match serde_json::from_slice(line)? {
        ToTask::Stop(wish) => Ok(wish.into()),
        ToTask::Spec(_) | ToTask::Wait | ToTask::Refused { .. } => {
            Err(serde::de::Error::custom("it has a VM already"))
        }
    };
    let wishes = tokio::spawn(wishes(receiver, stop.clone(), read));
    let cut = stop.clone();
    let life = tokio::spawn(async move {
        life.cut().await;
        // The VM has ended by itself already: as good.
        let _ = cut.send(Order::Stop(Stop::Now)).await;
    });
    let (report, reports) = mpsc::channel(16);
    let writing = tokio::spawn(tell_launcher(sender, reports, trouble));
    // Slurm says it more than once, and then does not ask any more.
    let again = Stop::Graceful { deadline: GRACE };
    let terminated = if leads { None } else { Some(again) };
    let signals = tokio::spawn(Signals::catch()?.pass_on(stop, terminated));
    let outcome = driver::run(spec, report, stops, remote).await;
    farewell(writing, &[wishes, life, signals]).await;
    outcome
}

/// Lets the last report be written, and ends the rest.
async fn farewell(mut writing: JoinHandle<()>, rest: &[JoinHandle<()>]) {
    // The sender of reports is gone; the task ends once the last is written.
    let _ = tokio::time::timeout(FAREWELL, &mut writing).await;
    writing.abort();
    rest.iter().for_each(JoinHandle::abort);
}

/// Passes on what the launcher wishes; its end means: now.
async fn wishes<R: AsyncRead + Unpin>(
    mut receiver: Receiver<R>,
    stop: mpsc::Sender<Order>,
    read: fn(&[u8]) -> serde_json::Result<Stop>,
) {
    // A line without end is an end, too.
    while let Ok(Some(line)) = receiver.line().await {
        match read(&line) {
            Ok(wish) => {
                if stop.send(Order::Stop(wish)).await.is_err() {
                    return;
                }
            }
            Err(error) => tracing::warn!("the launcher's wish is not understood: {error}"),
        }
    }
    // The VM has ended by itself already: as good.
    let _ = stop.send(Order::Stop(Stop::Now)).await;
}

/// Signals, caught from their making on. Those of a terminal are for the launcher.
struct Signals {
    terminate: Signal,
    /// Slurm suspends a job: SIGTSTP, and two seconds later SIGSTOP to all of it.
    suspend: Signal,
    go_on: Signal,
    _ignored: [Signal; 2],
}

impl Signals {
    fn catch() -> Result<Self> {
        let catch = |kind| signal(kind).while_doing(|| "catching signals".into());
        let kind = |signal: nix::sys::signal::Signal| SignalKind::from_raw(signal as i32);
        Ok(Self {
            terminate: catch(SignalKind::terminate())?,
            suspend: catch(kind(nix::sys::signal::Signal::SIGTSTP))?,
            go_on: catch(kind(nix::sys::signal::Signal::SIGCONT))?,
            _ignored: [catch(SignalKind::interrupt())?, catch(SignalKind::hangup())?],
        })
    }

    /// Passes them on; a SIGTERM that is not the first means `again`, or none means anything.
    async fn pass_on(mut self, orders: mpsc::Sender<Order>, again: Option<Stop>) {
        let mut stop = Stop::Graceful { deadline: GRACE };
        loop {
            let order = tokio::select! {
                // Who is to go on and to end goes on first.
                biased;
                _ = self.suspend.recv() => Order::Hold,
                _ = self.go_on.recv() => Order::Release,
                _ = self.terminate.recv() => match again {
                    Some(again) => Order::Stop(std::mem::replace(&mut stop, again)),
                    None => continue,
                },
            };
            if orders.send(order).await.is_err() {
                return;
            }
        }
    }
}

async fn write_reports<W: AsyncWrite + Unpin, M: Serialize>(
    mut sender: Sender<W>,
    mut messages: mpsc::Receiver<M>,
) {
    while let Some(message) = messages.recv().await {
        if sender.send(&message).await.is_err() {
            // The launcher is gone. Reports are still taken, so that none blocks.
            while messages.recv().await.is_some() {}
        }
    }
    sender.close().await;
}

/// Tells a launcher all reports, and once what is wrong besides.
async fn tell_launcher(
    sender: Sender,
    mut reports: mpsc::Receiver<VmReport>,
    trouble: impl Future<Output = Error> + Send,
) {
    let (post, messages) = mpsc::channel(1);
    let collect = async move {
        let (mut trouble, mut told) = (std::pin::pin!(trouble), false);
        loop {
            let message = tokio::select! {
                biased;
                report = reports.recv() => match report {
                    Some(report) => ToLauncher::Report(report),
                    None => return,
                },
                error = &mut trouble, if !told => {
                    told = true;
                    ToLauncher::Trouble(error.to_wire())
                }
            };
            // It takes them to their end.
            let _ = post.send(message).await;
        }
    };
    tokio::join!(collect, write_reports(sender, messages));
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn wishes_are_read_and_the_launchers_end_means_now() {
        let (mut launcher, ours) = UnixStream::pair().unwrap();
        let (stop, mut stops) = mpsc::channel(1);
        let read = |line: &[u8]| serde_json::from_slice(line).map(|wish: Wish| wish.into());
        tokio::spawn(wishes(Receiver::new(ours.into_split().0), stop, read));
        let graceful = Stop::Graceful { deadline: Duration::from_secs(3) };
        launcher.write_all(stop_line(graceful).as_bytes()).await.unwrap();
        launcher.write_all(b"{\"stop\":\"graceful\"}\n{\"sing\":true}\n").await.unwrap();
        assert_eq!(stops.recv().await, Some(Order::Stop(graceful)));
        let usual = Stop::Graceful { deadline: GRACE };
        assert_eq!(stops.recv().await, Some(Order::Stop(usual)));
        drop(launcher);
        assert_eq!(stops.recv().await, Some(Order::Stop(Stop::Now)));
        assert_eq!(stops.recv().await, None);
    }

    #[tokio::test]
    async fn when_the_launcher_is_gone_so_is_the_vm() {
        let dir = tempfile::tempdir().unwrap();
        let spec = crate::vm::testing::spec(dir.path());
        let disk = spec.dir.join("disk.qcow2");
        let (launcher, ours) = std::os::unix::net::UnixStream::pair().unwrap();
        launcher.set_nonblocking(true).unwrap();
        let (reader, mut writer) = UnixStream::from_std(launcher).unwrap().into_split();
        let mut reader = Receiver::new(reader);
        let launch = async {
            let spec = serde_json::to_string(&spec).unwrap() + "\n";
            writer.write_all(spec.as_bytes()).await.unwrap();
            loop {
                let report: VmReport = reader.receive().await.unwrap().unwrap();
                if report.state == crate::model::job::VmState::Running {
                    break;
                }
            }
            assert!(crate::vm::testing::process_with(&disk).is_some());
            drop((reader, writer));
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
