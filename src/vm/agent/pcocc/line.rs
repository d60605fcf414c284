//! The line to pcocc's agent: one reader and one writer, from QEMU's start to its end.

use pavo_agent::Malformed;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Duration, Instant, sleep_until, timeout};

use super::super::{Port, Presence};
use super::wire::{Fields, Lines, Message, Said};
use super::{END_ALL, GREETING, Link};

/// Before one that lied is asked anew.
const PAUSE: Duration = Duration::from_secs(1);

/// What is to be served.
#[derive(Debug)]
pub struct Line {
    link: Link,
    queue: mpsc::Receiver<(u64, Vec<u8>)>,
}

impl Line {
    pub(super) fn new(link: Link, queue: mpsc::Receiver<(u64, Vec<u8>)>) -> Self {
        Self { link, queue }
    }

    /// Serves the guest at the other end of `stream` until QEMU closes it. `port` says when
    /// the guest has opened its end.
    pub async fn serve(self, stream: UnixStream, port: watch::Receiver<Port>) {
        let (mut from, to) = stream.into_split();
        let writer = write(self.link.clone(), to, self.queue);
        let mut reader =
            Reader { link: self.link, lines: Lines::default(), greeting: JoinSet::new() };
        tokio::select! {
            () = reader.read(&mut from, port) => {}
            () = writer => {}
        }
        reader.begin("its VM has ended", false);
    }
}

struct Reader {
    link: Link,
    lines: Lines,
    /// Finds out who is there.
    greeting: JoinSet<()>,
}

impl Reader {
    async fn read(
        &mut self,
        from: &mut (impl AsyncReadExt + Unpin),
        mut port: watch::Receiver<Port>,
    ) {
        let mut bytes = vec![0; 32 << 10];
        let mut again: Option<Instant> = None;
        if port.borrow_and_update().open {
            self.begin("it has only begun", true);
        }
        loop {
            let pause = async {
                match again {
                    Some(time) => sleep_until(time).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // What the guest does with its port comes before what it says there.
                biased;
                changed = port.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    again = None;
                    let open = port.borrow_and_update().open;
                    self.begin("the guest's agent has ended", open);
                }
                () = pause => {
                    again = None;
                    self.begin("the guest's agent is asked anew", true);
                }
                count = from.read(&mut bytes) => match count {
                    Ok(0) | Err(_) => return,
                    Ok(count) => {
                        if again.is_some() {
                            continue;
                        }
                        self.lines.push(&bytes[..count]);
                        if let Err(wrong) = self.take_all() {
                            self.distrust(&wrong);
                            again = Some(Instant::now() + PAUSE);
                        }
                    }
                },
            }
        }
    }

    /// Forgets what was, and asks who is there if the port is open.
    fn begin(&mut self, why: &str, open: bool) {
        self.greeting.abort_all();
        let epoch = self.begin_anew(why);
        self.lines = Lines::default();
        let presence = if open { Presence::Silent } else { Presence::Away };
        self.link.shared.presence.send_replace(presence);
        if open {
            self.greeting.spawn(greet(self.link.clone(), epoch));
        }
    }

    fn begin_anew(&self, why: &str) -> u64 {
        let mut base = [0; 4];
        // Without it another's leftovers might count, and no more.
        let _ = getrandom::fill(&mut base);
        self.link.exchange().begin_anew(why, u32::from_le_bytes(base))
    }

    fn take_all(&mut self) -> Result<(), Malformed> {
        loop {
            let message = match self.lines.next_line() {
                Ok(None) => return Ok(()),
                Ok(Some(bytes)) => Message::decode(&bytes),
                Err(wrong) => Err(wrong),
            };
            let mut exchange = self.link.exchange();
            match message {
                Ok(message) => exchange.hear(message)?,
                // What is said before it has answered is of nobody we know.
                Err(_) if !exchange.is_greeted() => {}
                Err(wrong) => return Err(wrong),
            }
        }
    }

    fn distrust(&mut self, wrong: &Malformed) {
        tracing::info!("pcocc's agent of {}: {wrong}", self.link.shared.name);
        self.greeting.abort_all();
        self.begin_anew(&format!("the guest's agent has sent {wrong}"));
        self.link.shared.presence.send_replace(Presence::Wrong(wrong.to_string()));
    }
}

/// Finds out whether one answers, and ends what it has left of an earlier conversation.
async fn greet(link: Link, epoch: u64) {
    loop {
        // Whatever an earlier host left half said ends here.
        if link.send(epoch, b"\n".to_vec()).is_err() {
            return;
        }
        let Ok(asked) = link.ask(epoch, "hello", "HelloMessage", Fields::default()) else { return };
        match timeout(GREETING, asked.answer()).await {
            Ok(Ok(_)) => break,
            Ok(Err(_)) => return,
            Err(_) => {}
        }
    }
    let left = link.get(epoch, "listexec", "ListExecMessage", Fields::default()).await;
    if let Ok(Said::Commands(left)) = left {
        link.exchange().skip_ids(&left);
        if !left.is_empty() {
            // An older one cannot, and then they go on.
            let _ = link.shell(epoch, END_ALL, &[]).await;
        }
    }
    let exchange = link.exchange();
    if exchange.epoch() == epoch {
        link.shared.presence.send_replace(Presence::Here);
    }
}

/// Writes what is to be said, line by line: what is begun is brought to its end, also when the
/// guest takes it late.
async fn write(link: Link, mut to: OwnedWriteHalf, mut queue: mpsc::Receiver<(u64, Vec<u8>)>) {
    while let Some((epoch, bytes)) = queue.recv().await {
        // For another agent, which is gone.
        if link.exchange().epoch() != epoch {
            continue;
        }
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
}
