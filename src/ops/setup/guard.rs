//! `pavo internal setup guard`: holds a cluster's responders on one host.
//!
//! It waits for one of two things and never polls: the word that all is about to be
//! removed (SIGTERM, from `setup delete`), or the end of the step's process, after which
//! nobody else would remove anything.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use super::holding::Holding;
use super::release::release;
use crate::error::{Context, Error, Result, WireError};
use crate::host::spawn::inherit;
use crate::host::{crash, process};
use crate::network::responder;
use crate::ops::children::{hand_over, start_responder, waited_for};

/// How long the guard may take until the responders are ready.
const READY_LIMIT: Duration = Duration::from_secs(15);

/// What the guard is told.
#[derive(Debug, Serialize, Deserialize)]
struct Watch {
    job: u32,
    step: u32,
    responders: Vec<responder::Spec>,
}

/// Its one answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Ready,
    Error(WireError),
}

/// Starts the guard of a set-up, notes it, and waits until its responders are ready.
/// `handed` are the descriptors that `responders` name.
pub async fn start(
    holding: &mut Holding,
    responders: Vec<responder::Spec>,
    handed: Vec<OwnedFd>,
) -> Result<()> {
    let doing = || "starting the guard of the cluster".to_owned();
    let exe = std::env::current_exe().while_doing(|| "finding this program".into())?;
    let (mut ours, theirs) = StdUnixStream::pair().while_doing(doing)?;
    let mut command = Command::new(exe);
    command.args(["internal", "setup", "guard"]);
    command.stdin(Stdio::from(OwnedFd::from(theirs)));
    command.stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
    // Nobody's terminal, nobody's group: signals to the step are not for it.
    command.process_group(0);
    inherit(&mut command, handed);
    // It is not waited for: it goes on when this process has ended.
    let guard = command.spawn().while_doing(doing)?;
    drop(command);
    crash::point("guard.spawned")?;
    // Before it knows what to do: whatever becomes of us, it is found.
    holding.guard = process::identify(guard.id());
    holding.save()?;
    let watch = Watch { job: holding.ask.job, step: holding.ask.step, responders };
    let line = serde_json::to_string(&watch).expect("a watch is always valid JSON") + "\n";
    ours.set_write_timeout(Some(READY_LIMIT)).while_doing(doing)?;
    ours.write_all(line.as_bytes()).while_doing(doing)?;
    let mut answer = String::new();
    let mut stream = BufReader::new(waited_for(ours)?);
    let read = timeout(READY_LIMIT, stream.read_line(&mut answer)).await;
    read.map_err(|_| Error::system("it is not ready after 15 s"))
        .while_doing(doing)?
        .while_doing(doing)?;
    match serde_json::from_str(&answer) {
        Ok(Answer::Ready) => Ok(()),
        Ok(Answer::Error(error)) => Err(error.into()),
        Err(_) => Err(Error::system("it ended without a word")).while_doing(doing),
    }
}

/// The guard's whole life. Its responders end with the sockets it holds.
pub async fn main(stdin: StdUnixStream) -> Result<()> {
    let stream = UnixStream::from_std(stdin).while_doing(|| "opening standard input".into())?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line).await.while_doing(|| "reading what to guard".into())?;
    let watch: Watch = serde_json::from_str(&line)
        .map_err(|error| Error::bug(format!("not what a guard is told: {error}")))?;
    let begun = async {
        crash::point("guard.begin")?;
        let terminate =
            signal(SignalKind::terminate()).while_doing(|| "listening for signals".into())?;
        let holding = Holding::of(watch.job, watch.step)?
            .ok_or_else(|| Error::bug("there is nothing to guard"))?;
        let responders = start_all(watch.responders).await?;
        crash::point("guard.responders")?;
        Ok((terminate, holding, responders))
    };
    let begun: Result<_> = begun.await;
    let answer = match &begun {
        Ok(_) => Answer::Ready,
        Err(error) => Answer::Error(error.to_wire()),
    };
    let line = serde_json::to_string(&answer).expect("an answer is always valid JSON") + "\n";
    // Whoever started us may have been killed: then nobody notes us, and we have to end.
    let told = stream.write_all(line.as_bytes()).await.is_ok();
    drop(stream);
    let (mut terminate, holding, responders) = begun?;
    crash::point("guard.told")?;
    if told {
        tokio::select! {
            _ = terminate.recv() => {
                drop(responders);
                return crash::point("guard.end");
            }
            ended = process::ended(&holding.keeper) => {
                ended.while_doing(|| "waiting for the step's end".into())?;
            }
        }
    }
    drop(responders);
    // `setup delete` comes first where the step ends as it should; both may.
    match Holding::of(watch.job, watch.step)? {
        Some(holding) => tokio::select! {
            // Somebody removes it already, and waits for our end.
            _ = terminate.recv() => Ok(()),
            released = release(&holding) => released,
        },
        None => Ok(()),
    }
}

async fn start_all(specs: Vec<responder::Spec>) -> Result<Vec<UnixStream>> {
    let mut responders = Vec::new();
    for mut spec in specs {
        let inherited = hand_over(&mut spec)?;
        responders.push(start_responder(&spec, inherited).await?);
    }
    Ok(responders)
}
