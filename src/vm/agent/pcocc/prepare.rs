//! What comes before a command, and after: its environment, its script, its words for the agent.

use std::time::Instant;

use pavo_agent::{Exec, Failure, Size};

use super::command::{fail, lacks, lost};
use super::exchange::Running;
use super::wire::{Fields, Said};
use super::{Link, Session};

/// Where programs are looked for, unless the caller says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// A script is sent in pieces of so many bytes.
const PIECE: usize = 48 << 10;

/// Changes the folder as the user, tells the number of the process group on standard error, and
/// becomes the parent of the command: a shell knows by which signal it ended.
const BEGIN: &str = r#"if [ -n "$1" ]; then cd "$1" 2>/dev/null || { echo no folder >&2; exit 126; }
else cd 2>/dev/null || cd /; fi
shift
command -v "$1" >/dev/null 2>&1 || { echo no program >&2; exit 127; }
trap : HUP INT QUIT USR1 USR2 ALRM TERM
echo $$ >&2
(exec "$@")
exit $?"#;

/// A command that the agent has begun.
#[derive(Debug)]
pub(super) struct Ready {
    pub id: i64,
    pub size: Option<Size>,
    pub input: bool,
    /// What it may not find.
    pub program: String,
    pub folder: String,
    script: Option<String>,
}

/// Lets the agent begin a command.
pub(super) async fn begin(session: &Session, exec: &Exec) -> Result<Ready, Failure> {
    let Session { link, epoch } = session;
    let user = exec.user.as_deref().map_or(Ok("root"), text)?;
    let words = exec.argv.iter().map(|word| text(word)).collect::<Result<Vec<_>, _>>()?;
    let cwd = exec.cwd.as_deref().map_or(Ok(""), text)?;
    let asked = Fields::default().bytes(1, user);
    let home = match link.get(*epoch, "userinfo", "UserInfoMessage", asked).await.map_err(lost)? {
        Said::Home(home) => home,
        _ => return Err(fail(126, format!("the guest has no user `{user}`"))),
    };
    let environment = environment(exec, user, &home)?;
    let script = match &exec.script {
        Some(script) => Some(bring(link, *epoch, script).await?),
        None => None,
    };
    let mut all = vec!["-c", BEGIN, "sh", cwd];
    match (&script, &exec.script) {
        (Some(path), Some(content)) => {
            all.extend((!content.starts_with(b"#!")).then_some("/bin/sh"));
            all.push(path);
            all.extend(words.iter().skip(1));
        }
        _ if words.is_empty() => return Err(fail(127, "no command was given")),
        _ => all.extend(&words),
    }
    let shown = words.join(" ");
    let shown = if script.is_some() { format!("(script) {shown}") } else { shown };
    let listed = shown.trim_end().chars().take(1000).collect();
    let id = {
        let mut exchange = link.exchange();
        let id = exchange.new_id();
        let (user, began) = (user.into(), Instant::now());
        exchange.running.insert(id, Running { pid: None, user, words: listed, began });
        id
    };
    let data = Fields::default().signed(1, id).bytes(2, "/bin/sh").items(3, &all);
    let data = data.items(4, &environment).bytes(5, user);
    let data = data.numbers(6, exec.cpus.iter().map(|cpu| u64::from(*cpu)));
    let data = data.number(7, exec.terminal.is_some().into());
    let (program, folder) = ((*words.first().unwrap_or(&"")).into(), cwd.into());
    // What is on a terminal has its input from there.
    let (size, input) = (exec.terminal, exec.input || exec.terminal.is_some());
    let ready = Ready { id, size, input, program, folder, script };
    let why = match link.get(*epoch, "execve", "ExecMessage", data).await {
        Ok(Said::Done(_)) => return Ok(ready),
        Ok(Said::Refused(why)) => fail(126, format!("the guest's agent does not run it: {why}")),
        Ok(_) => lost("the guest's agent does not answer"),
        Err(why) => lost(why),
    };
    link.exchange().running.remove(&id);
    clean_up(link, *epoch, &ready).await;
    Err(why)
}

/// Removes what was brought for it.
pub(super) async fn clean_up(link: &Link, epoch: u64, ready: &Ready) {
    if let Some(path) = &ready.script {
        let data = Fields::default().bytes(1, path);
        // A guest that is gone has nothing left.
        let _ = link.get(epoch, "remove", "RemoveMessage", data).await;
    }
}

/// Its protocol has words for texts only.
fn text(bytes: &[u8]) -> Result<&str, Failure> {
    std::str::from_utf8(bytes).map_err(|_| lacks("takes words in UTF-8 only"))
}

/// What the user has from logging in, and what the caller adds.
fn environment(exec: &Exec, user: &str, home: &str) -> Result<Vec<String>, Failure> {
    let login = [("PATH", PATH), ("HOME", home), ("USER", user), ("LOGNAME", user)];
    let mut all: Vec<(String, String)> =
        login.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    if exec.terminal.is_some() {
        all.push(("TERM".into(), "xterm".into()));
    }
    let mut set = |name: &str, change: &dyn Fn(&str) -> String| match all
        .iter_mut()
        .find(|(known, _)| known == name)
    {
        Some((_, value)) => *value = change(value),
        None => all.push((name.into(), change(""))),
    };
    let both = |first: &str, last: &str| match (first, last) {
        ("", only) | (only, "") => only.to_owned(),
        _ => format!("{first}:{last}"),
    };
    for word in &exec.env {
        if let Some((name, value)) = parted(word)? {
            set(name, &|_| value.into());
        }
    }
    for word in &exec.prefixes {
        if let Some((name, value)) = parted(word)? {
            set(name, &|now| both(value, now));
        }
    }
    for word in &exec.suffixes {
        if let Some((name, value)) = parted(word)? {
            set(name, &|now| both(now, value));
        }
    }
    Ok(all.into_iter().map(|(name, value)| format!("{name}={value}")).collect())
}

/// `NAME=VALUE`
fn parted(word: &[u8]) -> Result<Option<(&str, &str)>, Failure> {
    Ok(text(word)?.split_once('=').filter(|(name, _)| !name.is_empty()))
}

/// Writes a script to a file of the guest that nobody can have guessed.
async fn bring(link: &Link, epoch: u64, script: &[u8]) -> Result<String, Failure> {
    use std::fmt::Write;
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|error| lost(error.to_string()))?;
    let mut path = "/tmp/.pavo-".to_owned();
    for byte in random {
        let _ = write!(path, "{byte:02x}");
    }
    let pieces = if script.is_empty() { vec![&[][..]] } else { script.chunks(PIECE).collect() };
    for (index, piece) in pieces.into_iter().enumerate() {
        let data = Fields::default().bytes(1, &path).bytes(2, piece);
        let data = data.number(3, (index > 0).into()).number(4, 0o755);
        match link.get(epoch, "writefile", "WriteFileMessage", data).await.map_err(lost)? {
            Said::Written(bytes) if bytes == piece.len() as u64 => {}
            Said::Refused(why) => return Err(fail(126, format!("the script: {why}"))),
            _ => return Err(fail(126, "the script cannot be written in the guest")),
        }
    }
    Ok(path)
}
