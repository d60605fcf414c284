//! The processes that a cell's first process starts: responders and VMs.
//!
//! Each is this program again, with one end of a socket as its standard input: orders go
//! in, reports come out, and its end is the life line.

use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::program;
use crate::error::{Context, Error, Result};
use crate::host::spawn::{die_with_parent, inherit};
use crate::model::job::{VmReport, VmState};
use crate::model::vm::VmSpec;
use crate::network::responder;

/// How long a responder may take until it is ready.
const READY_LIMIT: Duration = Duration::from_secs(10);

/// What to do where a process of ours was ended by somebody else.
pub const START_ANEW: &str = "was it killed, or is memory short (`dmesg`)? start the cluster anew";

/// The last report of a VM that `error` ended.
pub fn failed(rank: u32, error: &Error) -> VmReport {
    VmReport {
        rank,
        state: VmState::Failed,
        detail: error.to_string(),
        error: Some(error.to_wire()),
    }
}

/// A `pavo internal VERB` with one end of a new socket as its standard input.
fn child(verb: &str, inherited: Vec<OwnedFd>) -> Result<(Command, StdUnixStream)> {
    let (ours, theirs) =
        StdUnixStream::pair().while_doing(|| format!("making a socket for `internal {verb}`"))?;
    let mut command = program::again();
    command.args(["internal", verb]).stdin(Stdio::from(OwnedFd::from(theirs)));
    die_with_parent(&mut command);
    inherit(&mut command, inherited);
    Ok((command, ours))
}

/// A socket that the runtime waits for.
pub fn waited_for(stream: StdUnixStream) -> Result<UnixStream> {
    let stream = stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream));
    stream.while_doing(|| "waiting for a socket".into())
}

/// Sends `network` once a responder's end of its socket has closed.
pub async fn tell_end(mut read: OwnedReadHalf, network: String, lost: mpsc::Sender<String>) {
    let mut ignored = [0; 64];
    while !matches!(read.read(&mut ignored).await, Ok(0) | Err(_)) {}
    // At the end of the cell nobody listens any more.
    let _ = lost.send(network).await;
}

/// Copies of the descriptors a responder is to inherit; the specification names the
/// copies from then on. Several responders may share one.
pub fn hand_over(spec: &mut responder::Spec) -> Result<Vec<OwnedFd>> {
    let mut copies = Vec::new();
    let listeners = spec.publish.iter_mut().map(|port| &mut port.listener);
    for number in spec.upstream.iter_mut().chain(listeners) {
        #[expect(unsafe_code)]
        // SAFETY: the launcher opened it for us, and nothing here closes it; it is borrowed
        // for one call, which fails if the number is wrong.
        let fd = unsafe { BorrowedFd::borrow_raw(*number) };
        let copy =
            fd.try_clone_to_owned().while_doing(|| "taking the launcher's sockets".into())?;
        *number = copy.as_raw_fd();
        copies.push(copy);
    }
    Ok(copies)
}

/// Starts the responder of a network and waits until it is ready; returns its life line.
pub async fn start_responder(
    spec: &responder::Spec,
    inherited: Vec<OwnedFd>,
) -> Result<UnixStream> {
    let doing = || format!("starting the DHCP and DNS responder of network `{}`", spec.network);
    let (mut command, stream) = child("responder", inherited)?;
    command.spawn().while_doing(doing)?;
    drop(command);
    let mut stream = waited_for(stream)?;
    let ready = async {
        let line = serde_json::to_string(spec).expect("a specification is valid JSON") + "\n";
        stream.write_all(line.as_bytes()).await?;
        let mut answer = String::new();
        BufReader::new(&mut stream).read_line(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let ended = || Error::system("it ended without a word").help(START_ANEW);
    let answer = match timeout(READY_LIMIT, ready).await {
        Ok(answer) => answer.map_err(|error| ended().because(error)),
        Err(_) => Err(Error::system("it is not ready after 10 s")),
    };
    let answer = answer
        .and_then(|answer| serde_json::from_str::<responder::Answer>(&answer).map_err(|_| ended()));
    match answer.while_doing(doing)? {
        responder::Answer::Ready(_) => Ok(stream),
        responder::Answer::Error(error) => Err(Error::from(error)).while_doing(doing),
    }
}

/// Starts a VM's process; its reports go to `reports`, and if it ends without a last
/// word, that is reported too.
pub fn start_vm(spec: &VmSpec, reports: mpsc::Sender<VmReport>) -> Result<OwnedWriteHalf> {
    let doing = || format!("starting the process of {}", spec.name());
    let (mut command, mut stream) = child("run", Vec::new())?;
    let process = command.spawn().while_doing(doing)?;
    drop(command);
    let line = serde_json::to_string(spec).expect("a specification is valid JSON") + "\n";
    // Blocks at most until the process reads, and only if the user-data is very long.
    stream
        .set_write_timeout(Some(READY_LIMIT))
        .and_then(|()| stream.write_all(line.as_bytes()))
        .while_doing(doing)?;
    let (read, write) = waited_for(stream)?.into_split();
    let rank = spec.rank;
    tokio::spawn(async move {
        let mut lines = BufReader::new(read).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            if let Ok(report) = serde_json::from_str::<VmReport>(&line) {
                if reports.send(VmReport { rank, ..report }).await.is_err() {
                    return;
                }
            }
        }
        let status = reap(process);
        let error = Error::system(format!("its process ended: {status}")).help(START_ANEW);
        let _ = reports.send(failed(rank, &error)).await;
    });
    Ok(write)
}

/// Its socket is closed, so it has ended or is about to.
fn reap(mut process: std::process::Child) -> String {
    match process.wait() {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    }
}
