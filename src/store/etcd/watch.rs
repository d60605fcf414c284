//! Watches that go on after a lost connection, elsewhere if need be.
//!
//! etcd sends whole revisions: what one commit changed below a prefix is in one message
//! (fragmenting is a client's wish, and not ours), several commits may share one. The
//! revision of the last commit that was given is where a new stream begins; what comes
//! twice nevertheless is dropped.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    Client, Error as EtcdError, EventType, WatchOptions, WatchResponse, WatchStream,
};
use futures_util::{StreamExt, stream};
use tokio::time::timeout;

use super::explain::Verdict;
use super::link::{Failure, Link, Member, Patience};
use super::{entry, signed, unsigned};
use crate::error::{Context, Error, Result};
use crate::store::{Event, Revision, Seen, Watch};

/// How long a stream may take to begin.
const BEGIN: Duration = Duration::from_secs(5);

/// How etcd puts it that users or roles have changed while it looked at ours.
const STALE: &str = "revision of auth store is old";

/// The largest message: all that up to a thousand commits changed.
const MAX_MESSAGE: usize = 1 << 30;

/// Starts a watch: the prefix is one that we may read, and what follows `after` is
/// known or said to be lost.
pub async fn start(link: Arc<Link>, prefix: &str, after: Revision) -> Result<Watch> {
    let prefix = prefix.to_owned();
    let mut watcher = Watcher { link, prefix, after, stream: None, ready: VecDeque::new() };
    watcher.begin().await?;
    let stream = stream::unfold(Some(watcher), |watcher| async {
        let mut watcher = watcher?;
        let seen = watcher.next().await.while_doing(|| format!("watching `{}`", watcher.prefix));
        let over = matches!(seen, Err(_) | Ok(Seen::HistoryLost));
        Some((seen, (!over).then_some(watcher)))
    });
    Ok(stream.boxed())
}

struct Watcher {
    link: Arc<Link>,
    prefix: String,
    after: Revision,
    stream: Option<(Member, WatchStream)>,
    ready: VecDeque<Seen>,
}

impl Watcher {
    async fn next(&mut self) -> Result<Seen> {
        loop {
            if let Some(seen) = self.ready.pop_front() {
                return Ok(seen);
            }
            if self.stream.is_none() {
                self.begin().await?;
                continue;
            }
            if let Err(failure) = self.receive().await {
                self.stream = None;
                if let Failure::Refused(error) = failure {
                    return Err(error);
                }
            }
        }
    }

    /// Opens a stream, on another member if need be.
    async fn begin(&mut self) -> Result<()> {
        let (mut patience, mut renewed) = (Patience::new(), false);
        loop {
            match self.try_begin(&mut renewed).await {
                Ok(()) => return Ok(()),
                Err(failure) => patience.wait(failure).await?,
            }
        }
    }

    async fn try_begin(&mut self, renewed: &mut bool) -> Result<(), Failure> {
        let member = self.link.member().await?;
        let open = open(member.client.clone(), &self.prefix, self.after);
        let opened = match timeout(BEGIN, open).await {
            Ok(opened) => opened,
            Err(_elapsed) => {
                self.link.leave(&member);
                return Err(member.lost(false, format!("no watch in {} s", BEGIN.as_secs())));
            }
        };
        let (stream, first) = match opened {
            Ok(opened) => opened,
            Err(error) => return Err(self.judge(&member, error).await?),
        };
        // etcd refuses a watch in these words also when the token is too old.
        let denied = first.canceled() && first.cancel_reason().contains("permission denied");
        if denied && !*renewed && self.link.has_password() {
            *renewed = true;
            self.link.log_in(&member).await?;
            return Err(member.lost(false, "its permission was denied".into()));
        }
        if first.canceled() && first.cancel_reason().contains(STALE) {
            // A certificate is looked at anew each time.
            if self.link.has_password() {
                self.link.log_in(&member).await?;
            }
            return Err(member.lost(false, first.cancel_reason().into()));
        }
        self.stream = Some((member, stream));
        self.take(&first)
    }

    /// Waits for a message and takes what it says.
    async fn receive(&mut self) -> Result<(), Failure> {
        let Some((member, stream)) = &mut self.stream else { return Ok(()) };
        let message = match stream.message().await {
            Ok(Some(message)) => message,
            Ok(None) => return Err(member.lost(false, "it ended the watch".into())),
            Err(error) => {
                let member = member.clone();
                return Err(self.judge(&member, error).await?);
            }
        };
        self.take(&message)
    }

    /// Decides about a stream that failed; a member that lost one is given up.
    async fn judge(&self, member: &Member, error: EtcdError) -> Result<Failure, Failure> {
        Ok(match self.link.judge(error) {
            Verdict::Final(error) => Failure::Refused(error),
            Verdict::LogIn => {
                self.link.log_in(member).await?;
                member.lost(false, "the log-in was too old".into())
            }
            Verdict::Again { reason, .. } => {
                self.link.leave(member);
                member.lost(false, reason)
            }
        })
    }

    fn take(&mut self, message: &WatchResponse) -> Result<(), Failure> {
        if message.compact_revision() > 0 {
            self.ready.push_back(Seen::HistoryLost);
            return Ok(());
        }
        if message.canceled() {
            return Err(self.canceled(message.cancel_reason()));
        }
        for event in message.events() {
            let Some(kv) = event.kv() else { continue };
            let at = unsigned(kv.mod_revision());
            let event = match event.event_type() {
                EventType::Put => Event::Put(entry(kv)),
                EventType::Delete => Event::Delete { key: entry(kv).key, revision: at },
            };
            match self.ready.back_mut() {
                Some(Seen::Changes { revision, events }) if *revision == at => events.push(event),
                _ if at > self.after => {
                    self.ready.push_back(Seen::Changes { revision: at, events: vec![event] });
                    self.after = at;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn canceled(&self, reason: &str) -> Failure {
        if reason.contains("permission denied") {
            return Failure::Refused(self.link.denied());
        }
        match &self.stream {
            Some((member, _)) if reason.contains("no leader") => {
                self.link.leave(member);
                member.lost(false, reason.into())
            }
            _ => Failure::Refused(Error::system("etcd ended the watch").because(reason)),
        }
    }
}

/// A stream, and its first message, which says how the watch begins.
async fn open(
    client: Client,
    prefix: &str,
    after: Revision,
) -> Result<(WatchStream, WatchResponse), EtcdError> {
    let options = WatchOptions::new()
        .with_range(super::end(prefix))
        .with_start_revision(signed(after.saturating_add(1)));
    let mut client = client.watch_client().max_decoding_message_size(MAX_MESSAGE);
    let mut stream = client.watch(format!("{prefix}\0"), Some(options)).await?;
    match stream.message().await? {
        Some(first) => Ok((stream, first)),
        None => Err(EtcdError::WatchError("the watch ended before it began".into())),
    }
}
