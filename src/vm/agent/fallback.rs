//! Where there is no agent of ours: what QEMU's can do of it. It runs a program with
//! arguments as root, and tells its output when it has ended; no input, no terminal.

use std::path::Path;
use std::time::Duration;

use base64ct::{Base64, Encoding};
use pavo_agent::{
    Credit, Decoder, Event, Exec, Exit, Failure, Frame, Kind, Opening, PIECE, Started, WINDOW,
};
use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, sleep};

use super::super::guest_agent::Agent;
use crate::error::{Context, Error, Result};

/// How often it is asked whether a command has ended, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// How long it may not answer while a command runs.
const SILENCE: Duration = Duration::from_secs(30);

/// What root has from logging in.
const LOGIN: [&str; 3] = [
    "HOME=/root",
    "USER=root",
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
];

/// The version of QEMU's agent that answers in a guest.
///
/// # Errors
/// When none does.
pub(super) async fn version(dir: &Path) -> Result<String> {
    #[derive(Deserialize)]
    struct Info {
        version: String,
    }
    let info = Agent::connect(dir).await?.execute("guest-info", json!({})).await?;
    let info: Info = serde_json::from_value(info).while_doing(|| "reading its answer".into())?;
    Ok(info.version.chars().filter(|letter| !letter.is_control()).take(40).collect())
}

/// Serves a client by QEMU's agent.
pub(super) async fn carry(dir: &Path, client: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
    let mut conversation = Conversation { client, decoder: Decoder::in_step(), credit: WINDOW };
    let Some(opening) = conversation.opening().await else { return };
    if let Err(error) = conversation.run(dir, &opening).await {
        let why = error.report().replace("error: ", "").replace('\n', "; ");
        let failure = Failure { why, code: 255 };
        // The client may be gone.
        let _ = conversation.say(Kind::Fail, failure.encode()).await;
    }
}

#[derive(Deserialize)]
struct Begun {
    pid: u64,
}

#[derive(Deserialize)]
struct Status {
    exited: bool,
    exitcode: Option<u8>,
    signal: Option<u8>,
    #[serde(rename = "out-data", default)]
    out: String,
    #[serde(rename = "err-data", default)]
    err: String,
}

struct Conversation<'a, C> {
    client: &'a mut C,
    decoder: Decoder,
    credit: u32,
}

impl<C: AsyncRead + AsyncWrite + Unpin> Conversation<'_, C> {
    /// The next frame; `None` when the client is gone.
    async fn hear(&mut self) -> Option<Frame> {
        let mut bytes = [0; 4096];
        loop {
            match self.decoder.next_event().ok()? {
                Some(Event::Frame(frame)) => return Some(frame),
                Some(Event::Mark(_)) => return None,
                None => {}
            }
            let count = self.client.read(&mut bytes).await.ok().filter(|count| *count > 0)?;
            self.decoder.push(&bytes[..count]);
        }
    }

    async fn opening(&mut self) -> Option<Vec<u8>> {
        let mut opening = Vec::new();
        loop {
            let frame = self.hear().await?;
            if opening.len() + frame.payload.len() > pavo_agent::MAX_OPENING {
                return None;
            }
            opening.extend(&frame.payload);
            match frame.kind {
                Kind::Open => return Some(opening),
                Kind::Part => {}
                _ => return None,
            }
        }
    }

    async fn say(&mut self, kind: Kind, payload: Vec<u8>) -> Option<()> {
        let bytes = Frame::new(1, kind, payload).bytes();
        self.client.write_all(&bytes).await.ok()?;
        self.client.flush().await.ok()
    }

    async fn run(&mut self, dir: &Path, opening: &[u8]) -> Result<()> {
        let doing = || "running it by QEMU's agent".to_owned();
        let arguments = arguments(&Opening::decode(opening).while_doing(doing)?)?;
        let mut agent = Agent::connect(dir).await?;
        let begun = agent.execute("guest-exec", arguments).await?;
        // Others may ask meanwhile, and not more than one at a time can.
        drop(agent);
        let Begun { pid } = serde_json::from_value(begun).while_doing(doing)?;
        let started = Started { id: 0, pid: u32::try_from(pid).unwrap_or(0) };
        if self.say(Kind::Started, started.encode()).await.is_none() {
            return Ok(());
        }
        let (mut pause, mut heard) = (PAUSES.0, Instant::now());
        let status: Status = loop {
            // Who is gone leaves it running: this agent ends nothing.
            tokio::select! {
                () = sleep(pause) => {}
                frame = self.hear() => match frame {
                    Some(_) => continue,
                    None => return Ok(()),
                },
            }
            pause = (pause * 2).min(PAUSES.1);
            let mut agent = match Agent::connect(dir).await {
                Ok(agent) => agent,
                // A guest that is busy greets late.
                Err(_) if heard.elapsed() < SILENCE => continue,
                Err(error) => return Err(error),
            };
            heard = Instant::now();
            let status = agent.execute("guest-exec-status", json!({ "pid": pid })).await?;
            let status: Status = serde_json::from_value(status).while_doing(doing)?;
            if status.exited {
                break status;
            }
        };
        for (kind, text) in [(Kind::Data, &status.out), (Kind::Errors, &status.err)] {
            let bytes = Base64::decode_vec(text).while_doing(doing)?;
            for piece in bytes.chunks(PIECE) {
                if self.show(kind, piece).await.is_none() {
                    return Ok(());
                }
            }
        }
        let exit = match (status.exitcode, status.signal) {
            (_, Some(signal)) => Exit::Signal(signal),
            (code, None) => Exit::Code(code.unwrap_or(0)),
        };
        let _ = self.say(Kind::Exit, exit.encode()).await;
        Ok(())
    }

    /// Shows a piece of output, once there is credit for it.
    async fn show(&mut self, kind: Kind, piece: &[u8]) -> Option<()> {
        while (self.credit as usize) < piece.len() {
            let frame = self.hear().await?;
            if frame.kind == Kind::Credit {
                let Credit(more) = Credit::decode(&frame.payload).ok()?;
                self.credit = self.credit.saturating_add(more).min(WINDOW);
            }
        }
        self.credit -= piece.len() as u32;
        self.say(kind, piece.to_vec()).await
    }
}

/// The arguments of `guest-exec`, if it can do what is wanted.
fn arguments(opening: &Opening) -> Result<serde_json::Value> {
    let lacks = |what: &str| {
        Error::system(format!("only QEMU's agent answers in this guest, and it {what}"))
            .help("give the image pavo's own: `agent: inject` in the template")
    };
    let exec = match opening {
        Opening::Exec(exec) => exec,
        Opening::Copy(_) => return Err(lacks("copies no files")),
        _ => return Err(lacks("knows no such commands")),
    };
    let Exec { argv, script, env, prefixes, suffixes, cwd, user, terminal, .. } = exec;
    let Exec { cpus, input, keep, leave, .. } = exec;
    for (wanted, what) in [
        (script.is_some(), "runs no scripts"),
        (terminal.is_some(), "has no terminals"),
        (*input, "gives a command no input: add `--input-none`"),
        (*keep || *leave, "lets no command be left"),
        (cwd.is_some(), "does not change the folder"),
        (user.as_deref().is_some_and(|user| user != b"root"), "runs commands as root only"),
        (!(cpus.is_empty() && prefixes.is_empty() && suffixes.is_empty()), "only runs commands"),
    ] {
        if wanted {
            return Err(lacks(what));
        }
    }
    let word = |bytes: &Vec<u8>| {
        String::from_utf8(bytes.clone()).map_err(|_| lacks("takes words in UTF-8 only"))
    };
    let words = argv.iter().map(word).collect::<Result<Vec<_>>>()?;
    let env = env.iter().map(word).collect::<Result<Vec<_>>>()?;
    let (path, rest) = words.split_first().ok_or_else(|| Error::usage("no command was given"))?;
    // What is given is all that there is.
    let env: Vec<_> = LOGIN.iter().map(|word| (*word).to_owned()).chain(env).collect();
    Ok(json!({ "path": path, "arg": rest, "env": env, "capture-output": true }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::{control, guest_agent};
    use serde_json::Value;
    use tokio::io::{AsyncBufReadExt, BufReader};

    /// An agent of QEMU's that answers each command as told; its socket's folder.
    fn qemus(answer: fn(&Value) -> Value) -> tempfile::TempDir {
        qemus_that_misses(answer, usize::MAX)
    }

    /// The same, but for one connection that it does not answer.
    fn qemus_that_misses(answer: fn(&Value) -> Value, missed: usize) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let listener = control::listen(dir.path(), guest_agent::SOCKET).unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::UnixListener::from_std(listener).unwrap();
        tokio::spawn(async move {
            for number in 0.. {
                let Ok((stream, _)) = listener.accept().await else { return };
                if number == missed {
                    continue;
                }
                let mut stream = BufReader::new(stream);
                let mut line = Vec::new();
                while stream.read_until(b'\n', &mut line).await.is_ok_and(|count| count > 0) {
                    let text = String::from_utf8_lossy(&line).replace('\u{fffd}', "");
                    let command: Value = serde_json::from_str(&text).unwrap();
                    let greeting = command["execute"] == "guest-sync-delimited";
                    let value = match greeting {
                        true => command["arguments"]["id"].clone(),
                        false => answer(&command),
                    };
                    let mut said = if greeting { vec![0xff] } else { Vec::new() };
                    said.extend(json!({ "return": value }).to_string().into_bytes());
                    said.push(b'\n');
                    stream.get_mut().write_all(&said).await.unwrap();
                    line.clear();
                }
            }
        });
        dir
    }

    /// What a client hears of it.
    async fn heard(dir: &Path, opening: Opening) -> Vec<Frame> {
        let (mut client, mut theirs) = tokio::io::duplex(1 << 20);
        client.write_all(&Frame::new(1, Kind::Open, opening.encode()).bytes()).await.unwrap();
        carry(dir, &mut theirs).await;
        drop(theirs);
        let mut bytes = Vec::new();
        client.read_to_end(&mut bytes).await.unwrap();
        let mut decoder = Decoder::in_step();
        decoder.push(&bytes);
        let frames = std::iter::from_fn(|| decoder.next_event().unwrap());
        let frame = |event| match event {
            Event::Frame(frame) => frame,
            Event::Mark(_) => panic!("a mark"),
        };
        frames.map(frame).collect()
    }

    fn exec(change: impl FnOnce(&mut Exec)) -> Opening {
        let mut exec = Exec { argv: vec![b"id".into(), b"-u".into()], ..Exec::default() };
        change(&mut exec);
        Opening::Exec(exec)
    }

    #[tokio::test]
    async fn a_command_runs_to_its_end_and_then_tells_what_it_wrote() {
        let dir = qemus(|command| match command["execute"].as_str().unwrap() {
            "guest-exec" => {
                assert_eq!(command["arguments"]["path"], "id");
                assert_eq!(command["arguments"]["arg"], json!(["-u"]));
                json!({ "pid": 7 })
            }
            "guest-exec-status" => json!({
                "exited": true, "exitcode": 3, "out-data": "b3V0", "err-data": "ZXJy",
            }),
            _ => json!({ "version": "7.2" }),
        });
        assert_eq!(version(dir.path()).await.unwrap(), "7.2");
        let frames = heard(dir.path(), exec(|_| {})).await;
        let kinds: Vec<Kind> = frames.iter().map(|frame| frame.kind).collect();
        assert_eq!(kinds, [Kind::Started, Kind::Data, Kind::Errors, Kind::Exit]);
        assert_eq!((&*frames[1].payload, &*frames[2].payload), (&b"out"[..], &b"err"[..]));
        assert_eq!(Exit::decode(&frames[3].payload).unwrap(), Exit::Code(3));
    }

    #[tokio::test]
    async fn one_that_greets_late_does_not_end_a_command() {
        let answer: fn(&Value) -> Value = |command| match command["execute"] == "guest-exec" {
            true => json!({ "pid": 7 }),
            false => json!({ "exited": true, "exitcode": 3 }),
        };
        let dir = qemus_that_misses(answer, 1);
        let frames = heard(dir.path(), exec(|_| {})).await;
        let last = frames.last().unwrap();
        assert_eq!(last.kind, Kind::Exit, "{frames:?}");
        assert_eq!(Exit::decode(&last.payload).unwrap(), Exit::Code(3));
    }

    #[tokio::test]
    async fn what_it_cannot_do_is_refused_by_name() {
        let dir = qemus(|_| panic!("it is not asked"));
        for (opening, lacks) in [
            (exec(|exec| exec.input = true), "add `--input-none`"),
            (exec(|exec| exec.keep = true), "lets no command be left"),
            (exec(|exec| exec.script = Some(Vec::new())), "runs no scripts"),
            (exec(|exec| exec.user = Some(b"ada".into())), "as root only"),
            (Opening::List, "knows no such commands"),
            (Opening::Copy(pavo_agent::Copy::default()), "copies no files"),
        ] {
            let frames = heard(dir.path(), opening).await;
            let failure = Failure::decode(&frames.last().unwrap().payload).unwrap();
            assert!(failure.why.contains(lacks), "{failure:?}");
            assert_eq!(failure.code, 255);
        }
    }

    #[tokio::test]
    async fn answers_that_make_no_sense_are_an_error() {
        let answers: [fn(&Value) -> Value; 2] = [|_| json!({ "pid": "x" }), |_| json!([])];
        for answer in answers {
            let dir = qemus(answer);
            let frames = heard(dir.path(), exec(|_| {})).await;
            assert_eq!(frames.last().unwrap().kind, Kind::Fail);
        }
    }
}
