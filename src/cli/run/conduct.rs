//! Commands under way: what they say is shown, what is typed and signals reach them, and how
//! they ended becomes an exit code.

use std::future::pending;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use pavo_agent::{Exec, Exit, Opening, PIECE};
use tokio::signal::unix::SignalKind;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::super::App;
use super::super::agent::{no_command, report};
use super::super::job::Jobs;
use super::super::terminal::{RawTerminal, input, terminal_size};
use super::show::{Show, Stream, Style, openable};
use super::signals::{HUP, INT, QUIT, Signals, TERM, listen};
use crate::error::{Context, Error, Result};
use crate::model::job::JobRecord;
use crate::model::vmset::fold;
use crate::ops::run::place::Place;
use crate::ops::run::{Commands, Heard, Order};

/// How long what was told to end may take.
const GRACE: Duration = Duration::from_secs(3);
/// Two interrupts within this time mean us.
const TWICE: Duration = Duration::from_secs(1);
/// How long nothing is said before it is shown who is waited for.
const QUIET: Duration = Duration::from_secs(2);

const TIMED_OUT: u8 = 124;
const LOST: u8 = 255;
const INTERRUPTED: u8 = 130;

/// How commands are shown and ended.
#[derive(Clone, Debug, Default, Args)]
pub struct Conduct {
    /// End it after so many seconds, with the exit code 124
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,

    /// Show each line as it comes, with its VM before it
    #[arg(short, long, conflicts_with = "fold")]
    pub label: bool,

    /// Show what VMs say alike once, when all have ended: so it is on a terminal
    #[arg(long)]
    pub fold: bool,

    /// Give standard input to all processes: so it is unless it is a terminal
    #[arg(long)]
    pub input_all: bool,

    /// Give it to none: so it is on a terminal, for more than one process
    #[arg(long, conflicts_with_all = ["input_all", "input_first"])]
    pub input_none: bool,

    /// Give it to the first process
    #[arg(long, conflicts_with = "input_all")]
    pub input_first: bool,

    /// When one fails, end all others
    #[arg(long)]
    pub kill_on_fail: bool,

    /// Start it and leave; `pavo agent attach` shows it
    #[arg(long, conflicts_with_all = ["pty", "timeout", "kill_on_fail"])]
    pub detach: bool,

    /// Write to this file in which VMs all went well, as a set for `-w`
    #[arg(long, value_name = "FILE")]
    pub ok_file: Option<PathBuf>,

    /// The same of those where something did not
    #[arg(long, value_name = "FILE")]
    pub ko_file: Option<PathBuf>,

    /// The script of a job, which outlives us with its guest: this file tells that it has begun
    #[arg(long, hide = true, value_name = "FILE")]
    pub begun: Option<PathBuf>,
}

/// Who gets standard input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    All,
    First,
    None,
}

impl Conduct {
    fn input(&self, processes: usize) -> Input {
        let many_at_terminal = processes > 1 && std::io::stdin().is_terminal();
        match () {
            () if self.input_none || self.detach => Input::None,
            () if self.input_first => Input::First,
            () if many_at_terminal && !self.input_all => Input::None,
            () => Input::All,
        }
    }

    /// Runs a command at these places to its end.
    pub async fn conduct(
        &self,
        app: &App,
        known: &Jobs,
        job: &JobRecord,
        places: Vec<Place>,
        exec: Exec,
    ) -> Result<u8> {
        self.ok_file.iter().chain(&self.ko_file).try_for_each(|path| openable(path))?;
        let input = self.input(places.len());
        let count = places.len();
        let openings = places.iter().enumerate().map(|(index, place)| {
            let mut exec = exec.clone();
            exec.cpus.clone_from(&place.cpus);
            exec.env.push(format!("PAVO_PROCESS={index}").into_bytes());
            exec.env.push(format!("PAVO_PROCESSES={count}").into_bytes());
            exec.input = exec.terminal.is_none()
                && (input == Input::All || input == Input::First && index == 0);
            (place.rank, Opening::Exec(exec))
        });
        let openings = openings.collect();
        let shares = |rank| places.iter().filter(|place| place.rank == rank).count() > 1;
        let name = |place: &Place| match shares(place.rank) {
            true => format!("vm{}.{}", place.rank, place.local),
            false => format!("vm{}", place.rank),
        };
        let names = places.iter().map(name).collect();
        let commands = Commands::start(known.shared_store(), job, openings);
        let pty = exec.terminal.is_some();
        Performance::new(app, self, commands, names, pty).perform(input).await
    }

    /// Shows a command that was left, to its end.
    pub async fn attach(
        &self,
        app: &App,
        known: &Jobs,
        job: &JobRecord,
        rank: u32,
        id: u64,
    ) -> Result<u8> {
        // Of a job's script is shown what was not before.
        let unseen = self.begun.is_some();
        let opening = Opening::Attach { id, unseen };
        let commands = Commands::start(known.shared_store(), job, vec![(rank, opening)]);
        let names = vec![format!("vm{rank}")];
        let mut performance = Performance::new(app, self, commands, names, false);
        performance.leaves = !unseen;
        // It was begun without one.
        performance.perform(Input::None).await
    }
}

/// How far a command is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing was heard of it.
    Begun,
    Runs,
    Ended(u8),
}

struct Performance<'a> {
    app: &'a App,
    conduct: &'a Conduct,
    commands: Commands,
    names: Vec<String>,
    stages: Vec<Stage>,
    show: Show<'a>,
    pty: bool,
    /// What it shows goes on without it.
    leaves: bool,
    failed: Vec<(u32, Error)>,
    /// By exit code, or by signal.
    signalled: Vec<Option<u8>>,
    /// Of ids, of commands that were left.
    left: Vec<(u32, u64)>,
    timed_out: bool,
    begun: Instant,
    last_said: Instant,
    /// When what does not end is left alone.
    end: Option<Instant>,
    interrupted: Option<Instant>,
}

impl<'a> Performance<'a> {
    fn new(
        app: &'a App,
        conduct: &'a Conduct,
        commands: Commands,
        names: Vec<String>,
        pty: bool,
    ) -> Self {
        let count = names.len();
        let style = match () {
            () if conduct.label => Style::Labelled,
            () if conduct.fold => Style::Folded,
            () if count == 1 => Style::Bytes,
            () if app.out.stdout_is_terminal() => Style::Folded,
            () => Style::Lines,
        };
        let ranks = commands.all.iter().map(|command| command.rank).collect();
        let now = Instant::now();
        Self {
            app,
            conduct,
            commands,
            show: Show::new(&app.out, style, names.clone(), ranks),
            names,
            stages: vec![Stage::Begun; count],
            pty,
            leaves: false,
            failed: Vec::new(),
            signalled: vec![None; count],
            left: Vec::new(),
            timed_out: false,
            begun: now,
            last_said: now,
            end: None,
            interrupted: None,
        }
    }

    async fn perform(mut self, input: Input) -> Result<u8> {
        let raw = self.pty.then(RawTerminal::new);
        let typing = self.typing(input)?;
        let played = self.play().await;
        if let Some(typing) = typing {
            typing.abort();
        }
        drop(raw);
        self.app.out.end_progress();
        played?;
        self.finish()
    }

    /// Passes on what is typed.
    fn typing(&self, input_to: Input) -> Result<Option<JoinHandle<()>>> {
        let all = self.commands.all.iter().map(|command| command.input.clone());
        let mut to: Vec<mpsc::Sender<Arc<[u8]>>> = match input_to {
            Input::All => all.collect(),
            Input::First => all.take(1).collect(),
            Input::None => return Ok(None),
        };
        let mut stdin = input()?;
        Ok(Some(tokio::spawn(async move {
            let mut bytes = vec![0; PIECE];
            while !to.is_empty() {
                // What cannot be read has ended.
                let count = stdin.read(&mut bytes).await.unwrap_or(0);
                let piece: Arc<[u8]> = bytes[..count].into();
                let mut still = Vec::with_capacity(to.len());
                for command in to {
                    // One that has ended takes nothing.
                    if command.send(piece.clone()).await.is_ok() {
                        still.push(command);
                    }
                }
                to = still;
                if count == 0 {
                    return;
                }
            }
        })))
    }

    async fn play(&mut self) -> Result<()> {
        let mut signals = Signals::new()?;
        let mut resized = listen(SignalKind::window_change())?;
        let limit = self.conduct.timeout.map(Duration::from_secs);
        let deadline = limit.and_then(|limit| self.begun.checked_add(limit));
        let mut deadline = deadline;
        let mut ticks = interval(Duration::from_secs(1));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        while self.stages.iter().any(|stage| !matches!(stage, Stage::Ended(_))) {
            tokio::select! {
                heard = self.commands.next() => match heard {
                    Some((index, heard)) => self.heard(index, heard).await?,
                    None => return Ok(()),
                },
                number = signals.next() => {
                    if self.signalled(number).await {
                        return Ok(());
                    }
                }
                _ = resized.recv(), if self.pty => {
                    self.tell(Order::Resize(terminal_size())).await;
                }
                () = at(deadline) => {
                    deadline = None;
                    self.timed_out = true;
                    self.end_all().await;
                }
                () = at(self.end) => return Ok(()),
                _ = ticks.tick() => self.show_progress(),
            }
        }
        Ok(())
    }

    async fn heard(&mut self, index: usize, heard: Heard) -> Result<()> {
        let rank = self.commands.all[index].rank;
        self.last_said = Instant::now();
        match heard {
            Heard::Started(started) => {
                self.stages[index] = Stage::Runs;
                if let Some(path) = &self.conduct.begun {
                    let written = std::fs::write(path, "");
                    written.while_doing(|| format!("writing `{}`", path.display()))?;
                }
                if self.conduct.detach {
                    self.left.push((rank, started.id));
                    // An older agent was not told so at once.
                    let _ = self.commands.all[index].orders.send(Order::Leave).await;
                }
            }
            // Who comes back is shown what it writes until we have left it.
            Heard::Output(_) | Heard::Errors(_) if self.conduct.detach => {}
            Heard::Output(bytes) => self.show.said(index, Stream::Output, &bytes)?,
            Heard::Errors(bytes) => self.show.said(index, Stream::Errors, &bytes)?,
            Heard::Item(_) => {}
            Heard::Exit(Exit::Left) => self.ended(index, 0).await?,
            Heard::Exit(Exit::Code(code)) => self.ended(index, code).await?,
            Heard::Exit(Exit::Signal(signal)) => {
                self.signalled[index] = Some(signal);
                self.ended(index, 128_u8.saturating_add(signal)).await?;
            }
            // Only that there is none of this number is said so.
            Heard::Failed(failure) if self.leaves && failure.code == 1 => {
                return Err(no_command(rank, &failure.why));
            }
            Heard::Failed(failure) => {
                self.failed.push((rank, Error::system(failure.why)));
                self.ended(index, failure.code).await?;
            }
            Heard::Lost(error) => {
                self.failed.push((rank, error));
                self.ended(index, LOST).await?;
            }
        }
        Ok(())
    }

    async fn ended(&mut self, index: usize, code: u8) -> Result<()> {
        self.stages[index] = Stage::Ended(code);
        self.show.ended(index)?;
        if code != 0 && self.conduct.kill_on_fail && self.end.is_none() {
            self.end_all().await;
        }
        Ok(())
    }

    /// Tells all that run the same.
    async fn tell(&self, order: Order) {
        for (command, stage) in self.commands.all.iter().zip(&self.stages) {
            if !matches!(stage, Stage::Ended(_)) {
                // One that has not even begun gets it then; one that takes none is ended.
                let _ = command.orders.try_send(order);
            }
        }
    }

    async fn end_all(&mut self) {
        self.tell(Order::Signal(TERM)).await;
        self.end = Some(Instant::now() + GRACE);
    }

    /// A signal came; says whether that is the end.
    async fn signalled(&mut self, number: u8) -> bool {
        let now = Instant::now();
        let before = if number == INT { self.interrupted.replace(now) } else { None };
        let twice = before.is_some_and(|before| now.duration_since(before) < TWICE);
        // Others are for the commands alone.
        let nothing_runs =
            [HUP, INT, QUIT, TERM].contains(&number) && !self.stages.contains(&Stage::Runs);
        if self.leaves && [HUP, TERM].contains(&number) {
            return true;
        }
        let number = match number {
            // Slurm's, which it sends to all of a job that is to end: the launcher decides
            // what becomes of the script, and says it in another way.
            TERM if self.conduct.begun.is_some() => return false,
            HUP if self.conduct.begun.is_some() => TERM,
            number => number,
        };
        self.tell(Order::Signal(number)).await;
        twice || nothing_runs
    }

    fn show_progress(&self) {
        if self.pty || self.conduct.label || self.last_said.elapsed() < QUIET {
            return;
        }
        let waits = |(_, stage): &(_, &Stage)| !matches!(stage, Stage::Ended(_));
        let all = self.commands.all.iter().zip(&self.stages).filter(waits);
        let mut ranks: Vec<u32> = all.map(|(command, _)| command.rank).collect();
        ranks.dedup();
        // What a single command says goes on in the same line.
        if self.names.len() > 1 || self.stages[0] == Stage::Begun {
            let seconds = self.begun.elapsed().as_secs();
            self.app.out.transient(&format!("Waiting for {} ({seconds} s)…", fold(&ranks)));
        }
    }

    /// Shows what was kept, says who failed, and returns the exit code.
    fn finish(mut self) -> Result<u8> {
        for index in 0..self.names.len() {
            if !matches!(self.stages[index], Stage::Ended(_)) {
                self.show.ended(index)?;
            }
        }
        self.show.finish()?;
        for (rank, id) in &self.left {
            self.app.out.data(&format!("vm{rank} {id}\n"))?;
        }
        self.say_codes();
        report(self.app, std::mem::take(&mut self.failed));
        self.write_files()?;
        let ended = self.stages.iter().map(|stage| match stage {
            Stage::Ended(code) => *code,
            _ if self.timed_out => TIMED_OUT,
            _ => INTERRUPTED,
        });
        let highest = ended.max().unwrap_or(0);
        Ok(if self.timed_out && highest != LOST { TIMED_OUT } else { highest })
    }

    /// Says, of several, how those ended that did not end well.
    fn say_codes(&self) {
        let mut groups: Vec<(String, Vec<u32>)> = Vec::new();
        for (index, stage) in self.stages.iter().enumerate() {
            let rank = self.commands.all[index].rank;
            let how = match (stage, self.signalled[index]) {
                (Stage::Ended(0), _) => continue,
                (Stage::Ended(_), _) if self.failed.iter().any(|(other, _)| *other == rank) => {
                    continue;
                }
                (Stage::Ended(_), Some(signal)) => format!("killed by signal {signal}"),
                (Stage::Ended(code), None) => format!("exit code {code}"),
                (Stage::Begun, _) => "has not answered".into(),
                (Stage::Runs, _) => "still running, and told to end".into(),
            };
            match groups.iter_mut().find(|(known, _)| *known == how) {
                Some((_, ranks)) => ranks.push(rank),
                None => groups.push((how, vec![rank])),
            }
        }
        if self.timed_out {
            let seconds = self.conduct.timeout.unwrap_or_default();
            self.app.out.error(&format!("error: it has taken more than {seconds} s"));
        } else if self.names.len() == 1 {
            return;
        }
        for (how, mut ranks) in groups {
            ranks.dedup();
            self.app.out.status(&format!("{}: {how}", fold(&ranks)));
        }
    }

    fn write_files(&self) -> Result<()> {
        let (mut ok, mut ko): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
        for (command, stage) in self.commands.all.iter().zip(&self.stages) {
            if *stage == Stage::Ended(0) { ok.push(command.rank) } else { ko.push(command.rank) }
        }
        ko.dedup();
        ok.dedup();
        ok.retain(|rank| !ko.contains(rank));
        let write = |path: &Option<PathBuf>, ranks: &[u32]| match path {
            Some(path) => write_set(path, ranks),
            None => Ok(()),
        };
        write(&self.conduct.ok_file, &ok)?;
        write(&self.conduct.ko_file, &ko)
    }
}

/// A set, or nothing.
fn write_set(path: &Path, ranks: &[u32]) -> Result<()> {
    let text = if ranks.is_empty() { String::new() } else { fold(ranks) + "\n" };
    std::fs::write(path, text).while_doing(|| format!("writing `{}`", path.display()))
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => pending().await,
    }
}
