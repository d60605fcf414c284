//! srun as a process: what it says is heard to its end.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::Child;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// How long srun may take to end after a signal.
const LIMIT: Duration = Duration::from_secs(10);
/// The longest line of srun's that is kept whole, in bytes; a longer one counts as several.
const MAX_LINE: u64 = 4096;

/// Passes on what srun says, whatever bytes these are: tasks may say what they like, and srun
/// must always find somebody who reads.
pub async fn listen<News>(
    stderr: impl AsyncRead + Unpin,
    tell: mpsc::Sender<News>,
    said: impl Fn(String) -> News,
) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line).await;
        if !matches!(read, Ok(1..)) {
            return;
        }
        let text = String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_owned();
        if tell.send(said(text)).await.is_err() {
            return;
        }
    }
}

/// Ends srun, which ends its step when it is told to; should it hang, it is killed, and the
/// step ends with the job.
pub async fn end<News>(srun: &mut Child, news: &mut mpsc::Receiver<News>) {
    let pid = srun.id().and_then(|pid| i32::try_from(pid).ok());
    if let Some(pid) = pid {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    if timeout(LIMIT, ended(srun, news)).await.is_err() {
        let _ = srun.start_kill();
        ended(srun, news).await;
    }
}

/// Waits for srun's end. It, and the tasks, must not wait for us to take their news.
pub async fn ended<News>(srun: &mut Child, news: &mut mpsc::Receiver<News>) {
    loop {
        tokio::select! {
            _ = srun.wait() => return,
            Some(_) = news.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    #[tokio::test]
    async fn whatever_srun_says_is_read_to_its_end() {
        let (tell, mut news) = mpsc::channel(256);
        let mut said = b"one\nbad \xff byte\n".to_vec();
        said.extend([b'x'; 10_000]);
        said.extend(b"\npavo: host n1: why");
        listen(&said[..], tell, |line| line).await;
        let mut lines = Vec::new();
        while let Some(line) = news.recv().await {
            lines.push(line);
        }
        assert_eq!(lines[..2], ["one", "bad \u{fffd} byte"]);
        assert_eq!(lines[2..5].iter().map(String::len).collect::<Vec<_>>(), [4096, 4096, 1808]);
        assert_eq!(lines[5..], ["pavo: host n1: why"]);
    }

    #[tokio::test]
    async fn one_that_has_much_to_say_in_the_end_is_not_killed_for_it() {
        let script =
            "trap 'seq 100000 >&2; exit 7' TERM; echo ready >&2; while :; do sleep 0.01; done";
        let mut command = tokio::process::Command::new("sh");
        command.args(["-c", script]).stderr(Stdio::piped()).kill_on_drop(true);
        let mut srun = command.spawn().unwrap();
        let (tell, mut news) = mpsc::channel(256);
        tokio::spawn(listen(srun.stderr.take().unwrap(), tell, |line| line));
        assert_eq!(news.recv().await.as_deref(), Some("ready"));
        end(&mut srun, &mut news).await;
        assert_eq!(srun.wait().await.unwrap().code(), Some(7));
    }
}
