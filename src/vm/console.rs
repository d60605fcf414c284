//! The serial console: a bounded log from the first byte, and any number of viewers.
//!
//! The log is a ring of two halves, `console.log` and before it `console.log.1`,
//! so that a guest that writes for ever fills [`LOG`] bytes and no disk. Nothing
//! here ever makes the guest wait: a log that cannot be written is given up, and a
//! viewer that does not keep up misses output and is told so.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::{broadcast, mpsc, watch};

use crate::error::{Context, Result};

/// The most that is kept, in bytes.
pub const LOG: u64 = 1 << 20;
const HALF: u64 = LOG / 2;

/// What is read from the guest or a viewer at once.
const CHUNK: usize = 4096;
/// How many chunks a viewer may be behind (256 KiB at most).
const BEHIND: usize = 64;

const DROPPED: &[u8] = b"\r\n[pavo: this viewer is too slow; some output is only in the log]\r\n";

/// A guest's console; clones share it.
#[derive(Clone, Debug)]
pub struct Console {
    output: Arc<Mutex<Output>>,
    input: mpsc::Sender<Vec<u8>>,
    /// Each viewer holds a receiver.
    viewers: Arc<watch::Sender<()>>,
}

/// What one viewer is to see, from a moment on.
#[derive(Debug)]
pub struct Viewing {
    past: Vec<u8>,
    live: Option<broadcast::Receiver<Arc<[u8]>>>,
    input: mpsc::Sender<Vec<u8>>,
    _present: watch::Receiver<()>,
}

#[derive(Debug)]
struct Output {
    log: Log,
    /// `None` once the guest's side is closed.
    live: Option<broadcast::Sender<Arc<[u8]>>>,
}

impl Console {
    /// Takes over the guest's side of a console, with its log in `dir`. Ends when
    /// QEMU closes it.
    ///
    /// # Errors
    /// When the log cannot be made.
    pub fn start(guest: UnixStream, dir: &Path) -> Result<Self> {
        let log = Log::create(dir)?;
        let (live, _) = broadcast::channel(BEHIND);
        let output = Arc::new(Mutex::new(Output { log, live: Some(live) }));
        let (input, mut typed) = mpsc::channel::<Vec<u8>>(4);
        let (mut from_guest, mut to_guest) = guest.into_split();
        let viewers = Arc::new(watch::Sender::new(()));
        let console = Self { output: output.clone(), input, viewers };
        tokio::spawn(async move {
            let mut chunk = [0; CHUNK];
            while let Ok(count @ 1..) = from_guest.read(&mut chunk).await {
                locked(&output).add(&chunk[..count]);
            }
            locked(&output).live = None;
        });
        tokio::spawn(async move {
            while let Some(bytes) = typed.recv().await {
                if to_guest.write_all(&bytes).await.is_err() {
                    break;
                }
            }
        });
        Ok(console)
    }

    /// The newest `replay` bytes of the log and then, without a gap, what the guest
    /// writes.
    pub fn view(&self, replay: usize) -> Viewing {
        let output = locked(&self.output);
        Viewing {
            past: output.log.newest(replay),
            live: output.live.as_ref().map(broadcast::Sender::subscribe),
            input: self.input.clone(),
            _present: self.viewers.subscribe(),
        }
    }

    /// Waits until all viewers have gone, which they do once they have seen the guest's
    /// end; one that does not read never does.
    pub async fn seen(&self) {
        self.viewers.closed().await;
    }
}

impl Viewing {
    /// How many bytes of the log come first.
    pub fn replay(&self) -> usize {
        self.past.len()
    }

    /// Shows all that to a viewer, and gives the guest what it types. Ends with either
    /// side.
    pub async fn show(&mut self, viewer: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
        let (mut from_viewer, mut to_viewer) = tokio::io::split(viewer);
        let show = async {
            to_viewer.write_all(&self.past).await?;
            to_viewer.flush().await?;
            let Some(live) = &mut self.live else { return Ok(()) };
            let mut shown = Vec::new();
            loop {
                match live.recv().await {
                    Ok(bytes) => shown.extend_from_slice(&bytes),
                    Err(RecvError::Lagged(_)) => shown.extend_from_slice(DROPPED),
                    Err(RecvError::Closed) => return Ok::<_, std::io::Error>(()),
                }
                // A guest writes byte by byte: what is there already goes with the first.
                while shown.len() < CHUNK {
                    match live.try_recv() {
                        Ok(bytes) => shown.extend_from_slice(&bytes),
                        Err(TryRecvError::Lagged(_)) => shown.extend_from_slice(DROPPED),
                        Err(TryRecvError::Empty | TryRecvError::Closed) => break,
                    }
                }
                to_viewer.write_all(&shown).await?;
                to_viewer.flush().await?;
                shown.clear();
            }
        };
        let typed = async {
            let mut chunk = [0; CHUNK];
            while let Ok(count @ 1..) = from_viewer.read(&mut chunk).await {
                if self.input.send(chunk[..count].to_vec()).await.is_err() {
                    // QEMU takes no more; what it wrote is still to be shown.
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::select! {
            // A viewer that is gone is no failure.
            _ = show => {}
            () = typed => {}
        }
    }
}

fn locked(output: &Mutex<Output>) -> MutexGuard<'_, Output> {
    output.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Output {
    fn add(&mut self, bytes: &[u8]) {
        self.log.add(bytes);
        if let Some(live) = self.live.as_ref().filter(|live| live.receiver_count() > 0) {
            // They may all have left since.
            let _ = live.send(bytes.into());
        }
    }
}

/// The ring on disk.
#[derive(Debug)]
struct Log {
    dir: PathBuf,
    current: File,
    written: u64,
}

fn paths(dir: &Path) -> [PathBuf; 2] {
    [dir.join("console.log.1"), dir.join("console.log")]
}

impl Log {
    fn create(dir: &Path) -> Result<Self> {
        let [_, path] = paths(dir);
        let current = open(&path).while_doing(|| format!("creating `{}`", path.display()))?;
        Ok(Self { dir: dir.to_owned(), current, written: 0 })
    }

    /// Adds output. Where it cannot be written (a full disk) it is not logged.
    fn add(&mut self, bytes: &[u8]) {
        if self.written + bytes.len() as u64 > HALF {
            let [older, newer] = paths(&self.dir);
            let turned = std::fs::rename(&newer, older).and_then(|()| open(&newer));
            match turned {
                Ok(file) => (self.current, self.written) = (file, 0),
                Err(error) => return tracing::warn!("the console log: {error}"),
            }
        }
        match self.current.write_all(bytes) {
            Ok(()) => self.written += bytes.len() as u64,
            Err(error) => tracing::warn!("the console log: {error}"),
        }
    }

    fn newest(&self, limit: usize) -> Vec<u8> {
        if limit == 0 { Vec::new() } else { newest(&self.dir, limit).unwrap_or_default() }
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// The newest `limit` bytes of the log in a VM's directory, also while it is
/// written and after the VM has ended.
///
/// # Errors
/// When it cannot be read, or there is none.
pub fn newest(dir: &Path, limit: usize) -> Result<Vec<u8>> {
    let [older, newer] = paths(dir);
    let read = || loop {
        let mut last = File::open(&newer)?;
        let first = File::open(&older).ok();
        let mut bytes = Vec::new();
        if let Some(mut first) = first {
            // Turned over between the two lines above: look again.
            if first.metadata()?.ino() == last.metadata()?.ino() {
                continue;
            }
            first.read_to_end(&mut bytes)?;
        }
        last.read_to_end(&mut bytes)?;
        bytes.drain(..bytes.len().saturating_sub(limit));
        return Ok::<_, std::io::Error>(bytes);
    };
    read().while_doing(|| format!("reading the console log `{}`", newer.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A console, its guest's end and its directory.
    fn console() -> (Console, UnixStream, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let (ours, guest) = UnixStream::pair().unwrap();
        (Console::start(ours, dir.path()).unwrap(), guest, dir)
    }

    /// Attaches a viewer.
    fn viewer(console: &Console, replay: usize) -> UnixStream {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let console = console.clone();
        tokio::spawn(async move { console.view(replay).show(&mut theirs).await });
        ours
    }

    async fn read(viewer: &mut UnixStream, count: usize) -> String {
        let mut bytes = vec![0; count];
        viewer.read_exact(&mut bytes).await.unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[tokio::test]
    async fn a_viewer_sees_the_past_and_then_the_present_without_a_gap() {
        let (console, mut guest, _dir) = console();
        let mut first = viewer(&console, 0);
        guest.write_all(b"boot ").await.unwrap();
        assert_eq!(read(&mut first, 5).await, "boot ");
        let mut second = viewer(&console, 100);
        assert_eq!(read(&mut second, 5).await, "boot ");
        guest.write_all(b"login:").await.unwrap();
        assert_eq!(read(&mut first, 6).await, "login:");
        assert_eq!(read(&mut second, 6).await, "login:");
    }

    #[tokio::test]
    async fn what_any_viewer_types_reaches_the_guest() {
        let (console, mut guest, _dir) = console();
        let (mut one, mut two) = (viewer(&console, 0), viewer(&console, 0));
        one.write_all(b"1").await.unwrap();
        assert_eq!(read(&mut guest, 1).await, "1");
        two.write_all(b"2").await.unwrap();
        assert_eq!(read(&mut guest, 1).await, "2");
    }

    #[tokio::test]
    async fn a_flood_fills_a_megabyte_and_keeps_the_newest() {
        let (console, mut guest, dir) = console();
        // It never reads; the flood passes all the same.
        let mut stuck = viewer(&console, 0);
        tokio::task::yield_now().await;
        for line in 0..40_000 {
            guest.write_all(format!("{line:079}\n").as_bytes()).await.unwrap();
        }
        drop(guest);
        let mut all = Vec::new();
        stuck.read_to_end(&mut all).await.unwrap();
        let note = |all: &[u8]| all.windows(DROPPED.len()).any(|part| part == DROPPED);
        assert!(note(&all), "the stuck viewer is told what it missed");

        let size: u64 = paths(dir.path()).iter().map(|path| path.metadata().unwrap().len()).sum();
        assert!(size <= LOG && size > LOG / 4, "{size}");
        let text = String::from_utf8(newest(dir.path(), LOG as usize).unwrap()).unwrap();
        assert!(text.ends_with("39999\n"));
        let numbers: Vec<u32> = text.lines().skip(1).map(|line| line.parse().unwrap()).collect();
        assert!(numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]));
        assert_eq!(newest(dir.path(), 6).unwrap(), b"39999\n");
    }

    #[tokio::test]
    async fn a_guest_that_reads_nothing_still_shows_its_output() {
        let (console, mut guest, _dir) = console();
        let mut deaf = viewer(&console, 0);
        let (mut reader, mut writer) = deaf.split();
        let typing = async { while writer.write_all(&[b'x'; CHUNK]).await.is_ok() {} };
        let shown = async {
            guest.write_all(b"busy").await.unwrap();
            let mut bytes = [0; 4];
            reader.read_exact(&mut bytes).await.unwrap();
            bytes
        };
        tokio::select! {
            () = typing => panic!("nobody takes this"),
            bytes = shown => assert_eq!(&bytes, b"busy"),
        }
    }

    #[tokio::test]
    async fn viewers_are_let_go_when_the_guest_ends() {
        let (console, guest, _dir) = console();
        let mut present = viewer(&console, 0);
        tokio::task::yield_now().await;
        drop(guest);
        assert_eq!(present.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(viewer(&console, 10).read(&mut [0]).await.unwrap(), 0);
    }
}
