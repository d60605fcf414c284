//! One session with a controller, from its opening to its end.
//!
//! ```text
//!  open request  ->  <-  open response      both name the session, and agree on a cipher suite
//!  RAKP 1        ->  <-  RAKP 2             the controller proves that it knows the password
//!  RAKP 3        ->  <-  RAKP 4             we do; it proves that it has the session's keys
//!  commands, signed and encrypted, one at a time
//!  close session ->                         also where the session is dropped in the middle
//! ```
//!
//! What is not answered is said again, after longer and longer times, until the limit. What is
//! said again in the beginning has a new tag, and only the answer to the newest counts: a
//! controller makes a new random number each time.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::keys::{Exchange, Keys, Suite};
use super::port::Conversation;
use super::wire::{self, Command, Kind, Packet, u32_at};
use super::{Privilege, Settings};
use crate::error::{Context, Error};
use crate::node::power::Failure;

/// After which time a question is asked again; twice as long each time.
const AGAIN: Duration = Duration::from_millis(700);

/// A message of the beginning has this many bytes before what is its own.
const ANSWER: usize = 8;

/// An open session.
#[derive(Debug)]
pub struct Session {
    line: Line,
    /// The controller's number of it.
    id: u32,
    keys: Keys,
    /// Of packets, for the controller to tell old ones.
    sequence: u32,
    /// Of commands.
    number: u8,
}

/// A conversation that has to be over in time.
#[derive(Debug)]
struct Line {
    conversation: Conversation,
    end: Instant,
    limit: Duration,
    /// Packets that were for us and of no use.
    odd: u32,
    /// What is asked now is not said again.
    once: bool,
}

impl Line {
    /// Says `question` until `answer` takes what came. Each time it is told how often it was
    /// asked before.
    async fn ask<T>(
        &mut self,
        what: &str,
        mut question: impl FnMut(u8) -> Result<Vec<u8>, Error>,
        mut answer: impl FnMut(u8, &Packet<'_>) -> Option<T>,
    ) -> Result<T, Failure> {
        let mut patience = AGAIN;
        for asked in 0_u8.. {
            let sent = self.conversation.send(&question(asked)?).await;
            sent.while_doing(|| format!("sending to {}", self.conversation.peer()))
                .map_err(Failure::passing)?;
            let until = if self.once { self.end } else { self.end.min(Instant::now() + patience) };
            patience *= 2;
            while let Ok(bytes) = timeout_at(until, self.conversation.receive()).await {
                let taken = Packet::read(&bytes).and_then(|packet| answer(asked, &packet));
                match taken {
                    Some(taken) => return Ok(taken),
                    None => self.odd = self.odd.saturating_add(1),
                }
            }
            if until == self.end {
                break;
            }
        }
        Err(self.silence(what))
    }

    fn silence(&self, what: &str) -> Failure {
        let (peer, limit) = (self.conversation.peer(), self.limit.as_secs_f32());
        let odd = match self.odd {
            0 => String::new(),
            1 => " (a packet that came made no sense)".into(),
            odd => format!(" ({odd} packets that came made no sense)"),
        };
        let error = Error::system(format!("no answer of {peer} to {what} within {limit} s{odd}"));
        if self.once { Failure::unconfirmed(error) } else { Failure::passing(error) }
    }
}

/// A question of the beginning and its answer, less the tag and the session number.
async fn exchange(
    line: &mut Line,
    what: &str,
    kinds: [Kind; 2],
    payload: &[u8],
) -> Result<Result<Vec<u8>, u8>, Failure> {
    let question = |asked| Ok(wire::plain(kinds[0], &[&[asked], payload].concat()));
    line.ask(what, question, |asked, packet| {
        let (tag, status) = (*packet.payload.first()?, *packet.payload.get(1)?);
        if packet.kind != kinds[1] || tag != asked {
            return None;
        }
        Some(if status == 0 { Ok(packet.payload.get(ANSWER..)?.to_vec()) } else { Err(status) })
    })
    .await
}

/// What the controller says no with. The words are ours.
fn refusal(status: u8) -> (bool, &'static str) {
    match status {
        0x01 => (true, "it has no room for another session"),
        0x02 | 0x08 => (true, "it does not know the session any more"),
        0x04 | 0x05 | 0x10 | 0x11 => (false, "it has no such cipher suite"),
        0x09 => (false, "the user does not have this privilege"),
        0x0d => (false, "there is no such user"),
        0x0e => (false, "it takes no names of users"),
        0x0f => (false, "the password, or the controller's key, is wrong"),
        _ => (false, "it refuses"),
    }
}

fn refused(what: &str, status: u8) -> Failure {
    let (again, why) = refusal(status);
    let error = Error::system(format!("{what}: {why} (status {status:#04x})"));
    let error = match status {
        0x09 => error.help("give the user more, or ask for less: `control/bmc_privilege`"),
        _ => error,
    };
    Failure { again, ..error.into() }
}

/// What controllers say of a suite that they do not have.
fn lacks_suite(status: u8) -> bool {
    matches!(status, 0x04 | 0x05 | 0x10 | 0x11)
}

/// Opens a session, with the first suite of these that the controller has.
pub async fn open(
    conversation: Conversation,
    settings: &Settings,
    end: Instant,
    limit: Duration,
) -> Result<Session, Failure> {
    let mut line = Line { conversation, end, limit, odd: 0, once: false };
    let suites = settings.suite.candidates();
    for (index, suite) in suites.iter().enumerate() {
        match begin(&mut line, *suite, settings.privilege).await? {
            Ok(controller) => return log_in(line, settings, *suite, controller).await,
            Err(status) if lacks_suite(status) && index + 1 < suites.len() => {}
            Err(status) => return Err(refused("opening a session", status)),
        }
    }
    Err(Error::bug("there is no cipher suite to try").into())
}

/// The controller's number of the session, or its status.
async fn begin(
    line: &mut Line,
    suite: Suite,
    privilege: Privilege,
) -> Result<Result<u32, u8>, Failure> {
    let mut payload = vec![privilege as u8, 0, 0];
    payload.extend_from_slice(&line.conversation.number().to_le_bytes());
    for (kind, number) in (0..).zip(suite.algorithms()) {
        payload.extend_from_slice(&[kind, 0, 0, 8, number, 0, 0, 0]);
    }
    let kinds = [Kind::OpenRequest, Kind::OpenResponse];
    let answer = match exchange(line, "opening a session", kinds, &payload).await? {
        Ok(answer) => answer,
        Err(status) => return Ok(Err(status)),
    };
    let chosen = [8, 16, 24].map(|at| answer.get(at).copied());
    if chosen != suite.algorithms().map(Some) {
        let what = format!(
            "the controller does not keep to the cipher suite {} that it was asked for",
            suite.number()
        );
        return Err(Error::system(what)
            .help("try another one: `control/bmc_cipher=3`, or `17`")
            .into());
    }
    match u32_at(&answer, 0).filter(|id| *id != 0) {
        Some(id) => Ok(Ok(id)),
        None => Err(Error::system("the controller gives the session no number").into()),
    }
}

async fn log_in(
    mut line: Line,
    settings: &Settings,
    suite: Suite,
    controller: u32,
) -> Result<Session, Failure> {
    let mut exchanged = Exchange {
        suite,
        password: settings.password.expose().as_bytes(),
        key: settings.key.as_ref().map(|key| key.expose().as_bytes()),
        user: settings.user.as_bytes(),
        // The user is looked up by name alone.
        role: settings.privilege as u8 | 0x10,
        console: line.conversation.number(),
        console_random: random()?,
        controller,
        controller_random: [0; 16],
        controller_id: [0; 16],
    };
    let mut payload = vec![0, 0, 0];
    payload.extend_from_slice(&controller.to_le_bytes());
    payload.extend_from_slice(&exchanged.console_random);
    payload.extend_from_slice(&[exchanged.role, 0, 0, exchanged.user.len() as u8]);
    payload.extend_from_slice(exchanged.user);
    let kinds = [Kind::Rakp1, Kind::Rakp2];
    let answer = exchange(&mut line, "logging in", kinds, &payload).await?;
    let answer = answer.map_err(|status| refused("logging in", status))?;
    let (randoms, code) = answer.split_at_checked(32).unwrap_or((&[0; 32], &[]));
    exchanged.controller_random.copy_from_slice(&randoms[..16]);
    exchanged.controller_id.copy_from_slice(&randoms[16..]);
    if !exchanged.knows_password(code) {
        return Err(wrong_password());
    }

    let mut payload = vec![0, 0, 0];
    payload.extend_from_slice(&controller.to_le_bytes());
    payload.extend_from_slice(&exchanged.proof());
    let kinds = [Kind::Rakp3, Kind::Rakp4];
    let answer = exchange(&mut line, "the proof of the password", kinds, &payload).await?;
    let code = answer.map_err(|status| refused("logging in", status))?;
    match exchanged.keys(&code) {
        Some(keys) => Ok(Session { line, id: controller, keys, sequence: 0, number: 0 }),
        None => Err(Error::system("logging in: the controller's own key is another")
            .help("say it: `control/bmc_key=-`")
            .into()),
    }
}

fn wrong_password() -> Failure {
    Error::system("logging in: the password is wrong, or whoever answers does not know it").into()
}

fn random() -> Result<[u8; 16], Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).while_doing(|| "asking for random numbers".into())?;
    Ok(bytes)
}

impl Session {
    /// Runs a command. What it answers, or the code that the controller completes it with.
    ///
    /// What must not be done twice is said `once`: said again it would be another command to the
    /// controller, since each packet has a number of its own.
    pub async fn run(
        &mut self,
        what: &str,
        command: Command<'_>,
        once: bool,
    ) -> Result<Result<Vec<u8>, u8>, Failure> {
        self.number = (self.number + 1) % 64;
        let Self { line, id, keys, sequence, number } = self;
        let message = command.message(*number);
        let question = |_| packet(keys, *id, sequence, &message);
        line.once = once;
        let answer = line.ask(what, question, |_, packet| {
            let (signed, code) = packet.signed(keys.code_length())?;
            // Outside the session anybody may say anything.
            if !packet.in_session || !keys.is_signed(signed, code) {
                return None;
            }
            let message = keys.decrypt(packet.payload)?;
            let (code, data) = command.answer(*number, &message)?;
            Some(if code == 0 { Ok(data.to_vec()) } else { Err(code) })
        });
        answer.await
    }
}

fn packet(keys: &Keys, id: u32, sequence: &mut u32, message: &[u8]) -> Result<Vec<u8>, Error> {
    *sequence += 1;
    Ok(wire::signed(id, *sequence, &keys.encrypt(random()?, message), |bytes| keys.sign(bytes)))
}

/// The controller has few sessions. It is told once, and not waited for: one that is not heard
/// ends by itself, within a minute.
impl Drop for Session {
    fn drop(&mut self) {
        let id = self.id.to_le_bytes();
        let close = Command { function: 6, command: 0x3c, data: &id };
        self.number = (self.number + 1) % 64;
        let message = close.message(self.number);
        if let Ok(bytes) = packet(&self.keys, self.id, &mut self.sequence, &message) {
            self.line.conversation.send_now(&bytes);
        }
    }
}
