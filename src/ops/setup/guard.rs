//! `pavo internal setup guard`: holds a cluster's responders on one host.
//!
//! It waits for one of two things and never polls: the word that all is about to be
//! removed (SIGTERM, from `setup delete`), or the end of the step's process, after which
//! nobody else would remove anything.
//!
//! Should it die itself, or a responder, the guests lose their addresses in the end. It is
//! not started anew (who killed it may do so again), but never silently gone: the processes
//! of the VMs here are connected to it, see its end, and tell the launcher.

use std::convert::Infallible;
use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::Duration;

use nix::unistd::{Uid, chown};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::holding::{Holding, run_dir};
use super::release::{leave_groups, release_step};
use crate::error::{Context, Error, Result, WireError};
use crate::host::spawn::inherit;
use crate::host::{crash, process};
use crate::network::responder;
use crate::ops::children::{START_ANEW, hand_over, start_responder, tell_end, waited_for};
use crate::ops::{dial, program};

/// How long the guard may take until the responders are ready.
const READY_LIMIT: Duration = Duration::from_secs(15);

/// In the step's folder: who is connected here sees the guard's end.
const SOCKET: &str = "guard";
/// How many may be, beside a process for each VM.
const SPARE: usize = 16;

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
    let (mut ours, theirs) = StdUnixStream::pair().while_doing(doing)?;
    let mut command = program::again();
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
        let witnesses = Witnesses::listen(&holding)?;
        let (lost, losses) = mpsc::channel(1);
        let responders = start_all(watch.responders, &holding, &lost).await?;
        crash::point("guard.responders")?;
        Ok((terminate, holding, responders, witnesses, losses))
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
    let (mut terminate, holding, responders, witnesses, losses) = begun?;
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
            never = witnesses.serve(losses) => match never {},
        }
    }
    drop(responders);
    // `setup delete` comes first where the step ends as it should; both may.
    tokio::select! {
        // Somebody removes it already, and waits for our end.
        _ = terminate.recv() => Ok(()),
        released = release_step(watch.job, watch.step) => {
            if matches!(released, Ok(false)) {
                leave_groups(&holding.ask).await;
            }
            released.map(drop)
        }
    }
}

/// Their life lines. The networks whose responders end are told to `lost`.
async fn start_all(
    specs: Vec<responder::Spec>,
    holding: &Holding,
    lost: &mpsc::Sender<String>,
) -> Result<Vec<OwnedWriteHalf>> {
    let mut responders = Vec::new();
    for mut spec in specs {
        let mut inherited = hand_over(&mut spec)?;
        inherited.push(dial::listen(&holding.dir(), &mut spec, Some(holding.ask.uid))?);
        let (read, write) = start_responder(&spec, inherited).await?.into_split();
        responders.push(write);
        tokio::spawn(tell_end(read, spec.network, lost.clone()));
    }
    Ok(responders)
}

/// The processes of the VMs here, which tell the user what happens to their guard. Nothing
/// is read from them.
struct Witnesses {
    listener: UnixListener,
    most: usize,
}

impl Witnesses {
    fn listen(holding: &Holding) -> Result<Self> {
        let path = holding.dir().join(SOCKET);
        let doing = || format!("listening at `{}`", path.display());
        let listener = UnixListener::bind(&path).while_doing(doing)?;
        // Connecting takes the right to write.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o200)).while_doing(doing)?;
        chown(&path, Some(Uid::from_raw(holding.ask.uid)), None).while_doing(doing)?;
        Ok(Self { listener, most: holding.ask.ranks.len() + SPARE })
    }

    /// Tells all, also who comes later, which networks have no responder any more.
    async fn serve(self, mut losses: mpsc::Receiver<String>) -> Infallible {
        let (mut all, mut told) = (Vec::new(), String::new());
        loop {
            tokio::select! {
                Some(network) = losses.recv() => {
                    told += &format!("{network}\n");
                    all.iter().for_each(|one| tell(one, &told));
                }
                Ok((one, _)) = self.listener.accept() => {
                    if let (true, Ok(one)) = (all.len() < self.most, one.into_std()) {
                        tell(&one, &told);
                        all.push(one);
                    }
                }
                else => std::future::pending().await,
            }
        }
    }
}

/// Lines are no more than a socket takes at once: nobody is waited for.
fn tell(mut witness: &StdUnixStream, lines: &str) {
    let _ = witness.write(lines.as_bytes());
}

/// Waits until nobody answers the guests of a step on this host, of at least one network.
pub async fn unanswered(job: u32, step: u32, node: String) -> Error {
    let stream = UnixStream::connect(run_dir(job, step).join(SOCKET)).await;
    let mut network = String::new();
    if let Ok(stream) = stream {
        // Whatever ends it ends the guard's word.
        let _ = BufReader::new(stream).read_line(&mut network).await;
    }
    let who = match network.trim_end() {
        "" => format!("the processes that answer the guests on {node} have ended"),
        network => format!("the responder of network `{network}` on {node} has ended"),
    };
    Error::system(format!("{who}: no DHCP, no DNS, no published ports there")).help(START_ANEW)
}
