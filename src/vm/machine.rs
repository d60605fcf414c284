//! What happens next to a VM, decided from events alone: no clock, no QEMU.
//!
//! ```text
//!  Preparing ──Prepared──► Starting ──Greeted──► Paused ◄──STOP── Running ◄─Release─ Held
//!      │                      │                    │  └───RESUME───►  │  └────Hold────► │
//!      │                      │                    │                  │
//!      │                      │        Quit        │     Powerdown    │
//!      │                      │ Kill    ▼──────────┘         ▼────────┘
//!      │                      └────► Leaving { Powerdown ► Quit ► Kill }
//!      │                                      │ Exited
//!      └──────────────► Over ◄────────────────┘
//! ```
//!
//! One that begins from a snapshot is `Becoming` before it is `Running`: its guest runs, and is
//! still another.
//!
//! A guest that powers itself off is `Off`: its QEMU is kept, so that its disk can still be
//! saved, and ends by the way out like any other.
//!
//! There is one way out, with three doors. Each has a deadline, and what does not
//! leave by one door in time is pushed through the next: the guest is asked to
//! power down, QEMU is asked to quit, QEMU is killed. [`on`] is the whole policy;
//! the driver turns what happens into [`Event`]s and carries out [`Action`]s.

use std::time::Duration;

use crate::model::job::VmState;

/// How long QEMU has from its start to answering QMP. Generous: a loaded host is
/// slow, not broken.
pub const START: Duration = Duration::from_secs(60);
/// How long QEMU has to end, once told to quit or once the guest has shut down.
pub const QUIT: Duration = Duration::from_secs(5);
/// How long a guest has to become another: all of them on a host do so at once.
pub const BECOME: Duration = Duration::from_secs(180);
/// How long the kernel has to end a killed process.
pub const KILL: Duration = Duration::from_secs(5);

/// How long a guest has for shutting down where nobody says otherwise.
pub const GRACE: Duration = Duration::from_secs(10);

/// How a VM is told to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The guest may shut down first, for as long as this.
    Graceful { deadline: Duration },
    /// At once.
    Now,
}

/// What is asked of a VM by who keeps its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Stop(Stop),
    /// The scheduler suspends the job: the guest is to stand still.
    Hold,
    /// And lets it go on.
    Release,
}

/// Where a VM is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Disk and seed are being made; there is no QEMU.
    Preparing,
    /// QEMU was started; QMP has not answered.
    Starting,
    /// The guest's CPUs stand still.
    Paused,
    Running,
    /// The guest runs, and is still another.
    Becoming,
    /// It ran when the scheduler suspended the job. Nobody else lets it go on by mistake.
    Held,
    /// It stood still already when the scheduler suspended the job, as for a checkpoint. Who
    /// lets it go on before the scheduler does makes it `Held`.
    HeldPaused,
    /// The guest has powered itself off. Its disk is as it left it.
    Off,
    /// On its way out. With a fault it will have failed, without it stopped.
    Leaving {
        door: Door,
        fault: Option<String>,
    },
    Over,
}

/// The ways out, gentlest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Door {
    /// The guest is asked to shut down (ACPI).
    Powerdown,
    /// QEMU is ending by itself, or was asked to.
    Quit,
    /// QEMU is killed.
    Kill,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// QEMU was started.
    Started,
    /// QMP answered, and the guest's memory comes from a checkpoint, however long that takes.
    Loading,
    /// The memory is that of a snapshot: the guest is to run, and to become another.
    Strange,
    /// It is the one that it is to be.
    Became,
    /// QMP answered. Whether the guest is to run.
    Greeted { run: bool },
    /// QMP's RESUME: guest CPUs run.
    Resumed,
    /// QMP's STOP, and why, where it is known.
    Suspended { why: String },
    /// QMP's SHUTDOWN, of the guest's own will: QEMU stays.
    PoweredOff { why: String },
    /// QMP's SHUTDOWN, for another reason: QEMU is to end.
    ShuttingDown { why: String },
    /// Somebody wants it to end, or to stand still.
    Asked(Order),
    /// The time that was last armed is over.
    Deadline,
    /// QEMU closed its control connection, or does not do what it should.
    Broken { why: String },
    /// QEMU is gone; with its exit status where that is not 0.
    Exited { fault: Option<String> },
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// `cont`
    Continue,
    /// `stop`
    Pause,
    /// `system_powerdown`
    Powerdown,
    /// `quit`
    Quit,
    /// SIGKILL
    Kill,
    /// Replaces the deadline.
    Arm(Duration),
    /// There is nothing to wait for any more.
    Disarm,
    /// Tell the launcher.
    Report(VmState, String),
}

use Action::{Arm, Continue, Disarm, Kill, Pause, Powerdown, Quit, Report};

/// The next state, and what to do to get there.
pub fn on(state: State, event: Event) -> (State, Vec<Action>) {
    match (state, event) {
        (State::Over, _) => (State::Over, vec![]),
        (state, Event::Exited { fault }) => on_exit(state, fault),
        (state, Event::Asked(Order::Stop(stop))) => on_stop(state, stop),
        (state, Event::Deadline) => on_deadline(state),

        (state, event @ Event::Asked(Order::Hold | Order::Release))
        | (
            state @ (State::Held | State::HeldPaused),
            event @ (Event::Resumed | Event::Suspended { .. }),
        ) => on_hold(state, event),
        (
            state,
            event @ (Event::PoweredOff { .. } | Event::ShuttingDown { .. } | Event::Broken { .. }),
        ) => on_end(state, event),

        (State::Preparing, Event::Started) => {
            (State::Starting, vec![Report(VmState::Starting, String::new()), Arm(START)])
        }

        (State::Starting, Event::Loading) => {
            (State::Starting, vec![Disarm, Report(VmState::Starting, "its memory is read".into())])
        }
        (State::Starting, Event::Greeted { run: true }) => {
            (State::Paused, vec![Arm(START), Continue])
        }
        (State::Starting, Event::Greeted { run: false }) => {
            (State::Paused, vec![Disarm, Report(VmState::Paused, "not started".into())])
        }

        (State::Starting, Event::Strange) => {
            let report = Report(VmState::Starting, "its guest is made another".into());
            (State::Becoming, vec![report, Arm(BECOME), Continue])
        }
        (State::Becoming, Event::Became) => {
            (State::Running, vec![Disarm, Report(VmState::Running, String::new())])
        }

        (State::Starting | State::Paused | State::Running, Event::Resumed) => {
            (State::Running, vec![Disarm, Report(VmState::Running, String::new())])
        }
        (State::Starting | State::Paused | State::Running, Event::Suspended { why }) => {
            (State::Paused, vec![Report(VmState::Paused, why)])
        }
        // Its reset button was pressed.
        (State::Off, Event::Resumed) => {
            (State::Running, vec![Report(VmState::Running, String::new())])
        }
        (state, _) => (state, vec![]),
    }
}

/// The job is suspended, or let go on: what its guest does is held, and kept as it was.
fn on_hold(state: State, event: Event) -> (State, Vec<Action>) {
    match (state, event) {
        (State::Paused, Event::Asked(Order::Hold)) => (State::HeldPaused, vec![]),
        (State::HeldPaused, Event::Asked(Order::Release)) => (State::Paused, vec![]),
        (State::HeldPaused, Event::Resumed) => (State::Held, vec![Disarm, Pause]),
        (State::HeldPaused, Event::Suspended { why }) => {
            (State::HeldPaused, vec![Report(VmState::Paused, why)])
        }

        (State::Running, Event::Asked(Order::Hold)) => (State::Held, vec![Pause]),
        (State::Held, Event::Suspended { .. }) => {
            (State::Held, vec![Report(VmState::Paused, "the job is suspended".into())])
        }
        (State::Held, Event::Asked(Order::Release)) => (State::Running, vec![Continue]),
        (State::Held, Event::Resumed) => {
            (State::Running, vec![Report(VmState::Running, String::new())])
        }
        (state, _) => (state, vec![]),
    }
}

/// The guest has powered off, or QEMU ends, or is of no use any more.
fn on_end(state: State, event: Event) -> (State, Vec<Action>) {
    match (state, event) {
        (State::Preparing, Event::Broken { why }) => failed(why),
        (
            State::Starting
            | State::Paused
            | State::Running
            | State::Becoming
            | State::Held
            | State::HeldPaused,
            Event::PoweredOff { why },
        ) => (State::Off, vec![Disarm, Report(VmState::Off, why)]),
        // QEMU was told to stay when its machine ends (see `args`): this time it is not to.
        (
            State::Starting
            | State::Paused
            | State::Running
            | State::Becoming
            | State::Held
            | State::HeldPaused
            | State::Off,
            Event::ShuttingDown { why },
        ) => {
            let state = State::Leaving { door: Door::Quit, fault: None };
            (state, vec![Report(VmState::Stopping, why), Quit, Arm(QUIT)])
        }
        (
            State::Leaving { door: Door::Powerdown, fault },
            Event::ShuttingDown { .. } | Event::PoweredOff { .. },
        ) => (State::Leaving { door: Door::Quit, fault }, vec![Quit, Arm(QUIT)]),

        // Mostly because QEMU is dying. It gets the time to: its own exit status
        // says more than that of a process which we killed.
        // QEMU is well, and its guest cannot be used.
        (State::Becoming, Event::Broken { why }) => leave(Door::Quit, Some(why)),
        (
            State::Starting
            | State::Paused
            | State::Running
            | State::Held
            | State::HeldPaused
            | State::Off,
            Event::Broken { why },
        ) => {
            let report = Report(VmState::Stopping, why.clone());
            (State::Leaving { door: Door::Quit, fault: Some(why) }, vec![report, Arm(QUIT)])
        }
        (State::Leaving { door: Door::Powerdown, fault }, Event::Broken { .. }) => {
            (State::Leaving { door: Door::Quit, fault }, vec![Arm(QUIT)])
        }
        (state, _) => (state, vec![]),
    }
}

/// QEMU is gone: was it meant to be?
fn on_exit(state: State, status: Option<String>) -> (State, Vec<Action>) {
    match (state, status) {
        // A process that we killed tells nothing by its exit status.
        (State::Leaving { door: Door::Kill, fault: None }, _) => stopped(),
        (State::Leaving { door: Door::Kill, fault: Some(fault) }, _) => failed(fault),
        (_, Some(status)) => failed(status),
        (State::Leaving { fault: Some(fault), .. }, None) => failed(fault),
        (State::Leaving { .. } | State::Preparing, None) => stopped(),
        (_, None) => failed("QEMU ended unasked".into()),
    }
}

/// Opens the first door, or for an impatient wish the next one.
fn on_stop(state: State, stop: Stop) -> (State, Vec<Action>) {
    match (state, stop) {
        (State::Preparing, _) => stopped(),
        // Without QMP there is only one door.
        (State::Starting, _) => leave(Door::Kill, None),
        // A guest that stands still cannot shut down.
        (State::Paused | State::HeldPaused | State::Off | State::Becoming, _)
        | (State::Running | State::Held, Stop::Now) => leave(Door::Quit, None),
        (state @ (State::Running | State::Held), Stop::Graceful { deadline }) => {
            let report = Report(VmState::Stopping, "the guest is asked to power down".into());
            let first = (state == State::Held).then_some(Continue);
            let actions = [report].into_iter().chain(first).chain([Powerdown, Arm(deadline)]);
            (State::Leaving { door: Door::Powerdown, fault: None }, actions.collect())
        }
        (State::Leaving { door: Door::Powerdown, fault }, Stop::Now) => leave(Door::Quit, fault),
        (state, _) => (state, vec![]),
    }
}

/// What was waited for did not happen: on to the next door.
fn on_deadline(state: State) -> (State, Vec<Action>) {
    match state {
        State::Starting => leave(Door::Kill, Some(format!("QEMU did not answer within {START:?}"))),
        State::Paused | State::HeldPaused => {
            leave(Door::Quit, Some(format!("the guest did not start within {START:?}")))
        }
        State::Becoming => {
            leave(Door::Quit, Some(format!("the guest did not become another within {BECOME:?}")))
        }
        State::Leaving { door: Door::Powerdown, fault } => leave(Door::Quit, fault),
        State::Leaving { door: Door::Quit, fault } => leave(Door::Kill, fault),
        State::Leaving { door: Door::Kill, .. } => {
            failed(format!("QEMU cannot be killed (waited {KILL:?})"))
        }
        state => (state, vec![]),
    }
}

fn leave(door: Door, fault: Option<String>) -> (State, Vec<Action>) {
    let why = fault.clone().unwrap_or_default();
    let (action, patience) = match door {
        Door::Kill => (Kill, KILL),
        Door::Quit | Door::Powerdown => (Quit, QUIT),
    };
    let actions = vec![Report(VmState::Stopping, why), action, Arm(patience)];
    (State::Leaving { door, fault }, actions)
}

fn stopped() -> (State, Vec<Action>) {
    (State::Over, vec![Disarm, Report(VmState::Stopped, String::new())])
}

fn failed(why: String) -> (State, Vec<Action>) {
    (State::Over, vec![Disarm, Report(VmState::Failed, why)])
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACEFUL: Event =
        Event::Asked(Order::Stop(Stop::Graceful { deadline: Duration::from_secs(9) }));
    const NOW: Event = Event::Asked(Order::Stop(Stop::Now));
    const HOLD: Event = Event::Asked(Order::Hold);
    const RELEASE: Event = Event::Asked(Order::Release);

    fn exited() -> Event {
        Event::Exited { fault: None }
    }

    fn died() -> Event {
        Event::Exited { fault: Some("killed by signal 9".into()) }
    }

    fn shutting_down() -> Event {
        Event::ShuttingDown { why: "the guest shut down".into() }
    }

    fn broken() -> Event {
        Event::Broken { why: "lost".into() }
    }

    /// Feeds events to a VM from its beginning: its state and all it did.
    fn after(events: impl IntoIterator<Item = Event>) -> (State, Vec<Action>) {
        let mut all = Vec::new();
        let state = events.into_iter().fold(State::Preparing, |state, event| {
            let (state, actions) = on(state, event);
            all.extend(actions);
            state
        });
        (state, all)
    }

    fn running(more: impl IntoIterator<Item = Event>) -> (State, Vec<Action>) {
        let start = [Event::Started, Event::Greeted { run: true }, Event::Resumed];
        after(start.into_iter().chain(more))
    }

    fn reports(actions: &[Action]) -> Vec<VmState> {
        let state = |action: &Action| match action {
            Report(state, _) => Some(*state),
            _ => None,
        };
        actions.iter().filter_map(state).collect()
    }

    fn doors(actions: &[Action]) -> Vec<&Action> {
        actions.iter().filter(|action| matches!(action, Powerdown | Quit | Kill)).collect()
    }

    fn powered_off() -> Event {
        Event::PoweredOff { why: "the guest powered off".into() }
    }

    #[test]
    fn a_guest_that_powers_off_is_kept_until_somebody_ends_it_or_starts_it_again() {
        let stop = Event::Suspended { why: String::new() };
        let (state, actions) = running([powered_off(), stop.clone(), HOLD, RELEASE]);
        assert_eq!(state, State::Off);
        assert_eq!(reports(&actions)[2..], [VmState::Off]);
        assert_eq!(doors(&actions), Vec::<&Action>::new());
        for wish in [GRACEFUL, NOW] {
            let (state, actions) = running([powered_off(), wish, exited()]);
            assert_eq!((state, doors(&actions)), (State::Over, vec![&Quit]));
            assert_eq!(reports(&actions).last(), Some(&VmState::Stopped));
        }
        let (state, actions) = running([powered_off(), stop, Event::Resumed]);
        assert_eq!((state, reports(&actions).last()), (State::Running, Some(&VmState::Running)));
        let (_, actions) = running([powered_off(), died()]);
        assert_eq!(reports(&actions).last(), Some(&VmState::Failed));
        // It was asked to, because the cluster ends.
        let (_, actions) = running([GRACEFUL, powered_off()]);
        assert_eq!(doors(&actions), [&Powerdown, &Quit]);
    }

    #[test]
    fn running_is_said_only_once_qemu_said_so() {
        let (state, actions) = after([Event::Started, Event::Greeted { run: true }]);
        assert_eq!(state, State::Paused);
        assert_eq!(reports(&actions), [VmState::Starting]);
        assert_eq!(reports(&running([]).1), [VmState::Starting, VmState::Running]);
    }

    #[test]
    fn a_vm_that_is_to_stay_paused_is_not_continued() {
        let (_, actions) = after([Event::Started, Event::Greeted { run: false }]);
        assert!(!actions.contains(&Continue));
        assert_eq!(reports(&actions), [VmState::Starting, VmState::Paused]);
        assert_eq!(actions.iter().rfind(|a| matches!(a, Arm(_) | Disarm)), Some(&Disarm));
    }

    #[test]
    fn memory_may_take_long_to_come_and_the_guest_may_not_then() {
        let deadline = |actions: &[Action]| {
            actions.iter().rfind(|action| matches!(action, Arm(_) | Disarm)).cloned()
        };
        let (state, actions) = after([Event::Started, Event::Loading]);
        assert_eq!((state, deadline(&actions)), (State::Starting, Some(Disarm)));
        let greeted = Event::Greeted { run: true };
        let (_, actions) = after([Event::Started, Event::Loading, greeted]);
        assert_eq!(deadline(&actions), Some(Arm(START)));
        let (state, actions) = after([Event::Started, Event::Loading, broken(), exited()]);
        assert_eq!((state, reports(&actions).last()), (State::Over, Some(&VmState::Failed)));
    }

    #[test]
    fn one_from_a_snapshot_runs_once_it_is_itself() {
        let strange = |more: &[Event]| {
            let start = [Event::Started, Event::Loading, Event::Strange, Event::Resumed];
            after(start.into_iter().chain(more.iter().cloned()))
        };
        let stop = Event::Suspended { why: String::new() };
        let (state, actions) = strange(&[stop, Event::Resumed]);
        assert_eq!(state, State::Becoming);
        assert!(!reports(&actions).contains(&VmState::Running));
        assert_eq!(actions.iter().filter(|action| **action == Continue).count(), 1);
        let (state, actions) = strange(&[Event::Became]);
        assert_eq!((state, reports(&actions).last()), (State::Running, Some(&VmState::Running)));
        assert_eq!(actions.iter().rfind(|a| matches!(a, Arm(_) | Disarm)), Some(&Disarm));
        // It is of no use, and need not power down.
        for end in [Event::Deadline, broken()] {
            let (_, actions) = strange(&[end, exited()]);
            assert_eq!(doors(&actions), [&Quit]);
            assert_eq!(reports(&actions).last(), Some(&VmState::Failed));
        }
        for wish in [GRACEFUL, NOW] {
            let (state, actions) = strange(&[wish, exited()]);
            assert_eq!((state, doors(&actions)), (State::Over, vec![&Quit]));
            assert_eq!(reports(&actions).last(), Some(&VmState::Stopped));
        }
        let (state, _) = strange(&[powered_off()]);
        assert_eq!(state, State::Off);
    }

    #[test]
    fn a_running_guest_is_not_waited_for() {
        let (_, actions) = running([]);
        assert_eq!(actions.iter().rfind(|a| matches!(a, Arm(_) | Disarm)), Some(&Disarm));
    }

    #[test]
    fn the_way_out_is_powerdown_then_quit_then_kill() {
        let (state, actions) = running([GRACEFUL, Event::Deadline, Event::Deadline, exited()]);
        assert_eq!(doors(&actions), [&Powerdown, &Quit, &Kill]);
        assert_eq!(state, State::Over);
        assert_eq!(reports(&actions).last(), Some(&VmState::Stopped));
    }

    #[test]
    fn each_door_has_a_deadline() {
        let (_, actions) = running([GRACEFUL, Event::Deadline, Event::Deadline]);
        let armed: Vec<_> = actions.iter().filter(|action| matches!(action, Arm(_))).collect();
        let grace = Arm(Duration::from_secs(9));
        assert_eq!(armed, [&Arm(START), &Arm(START), &grace, &Arm(QUIT), &Arm(KILL)]);
    }

    #[test]
    fn a_guest_that_powers_down_in_time_is_not_pushed() {
        let (_, actions) = running([GRACEFUL, powered_off(), exited()]);
        assert_eq!(doors(&actions), [&Powerdown, &Quit]);
        assert_eq!(reports(&actions).last(), Some(&VmState::Stopped));
    }

    #[test]
    fn an_impatient_stop_overtakes_a_graceful_one_and_not_the_other_way_round() {
        assert_eq!(doors(&running([GRACEFUL, NOW]).1), [&Powerdown, &Quit]);
        assert_eq!(doors(&running([NOW, GRACEFUL]).1), [&Quit]);
        assert_eq!(doors(&running([GRACEFUL, GRACEFUL]).1), [&Powerdown]);
    }

    #[test]
    fn a_paused_guest_is_not_asked_to_power_down() {
        let stop = Event::Suspended { why: String::new() };
        assert_eq!(doors(&running([stop, GRACEFUL]).1), [&Quit]);
    }

    #[test]
    fn a_suspended_job_pauses_its_guest_and_lets_it_go_on() {
        let stood = Event::Suspended { why: String::new() };
        let (state, actions) = running([HOLD, stood.clone(), RELEASE, Event::Resumed]);
        assert_eq!(state, State::Running);
        let turns: Vec<_> = actions.iter().filter(|a| matches!(a, Pause | Continue)).collect();
        assert_eq!(turns, [&Continue, &Pause, &Continue]);
        assert_eq!(reports(&actions)[2..], [VmState::Paused, VmState::Running]);
        // A guest that somebody had paused stays so.
        let (state, actions) = running([stood.clone(), HOLD, RELEASE]);
        assert_eq!((state, actions.contains(&Pause)), (State::Paused, false));
        // One that stood still for a checkpoint does not go on before the job does.
        let (state, actions) = running([stood.clone(), HOLD, Event::Resumed, stood.clone()]);
        assert_eq!((&state, actions.iter().filter(|it| **it == Pause).count()), (&State::Held, 1));
        assert_eq!(reports(&actions).last(), Some(&VmState::Paused));
        assert_eq!(on(state, RELEASE), (State::Running, vec![Continue]));
        let (state, _) = running([stood.clone(), HOLD, RELEASE, Event::Resumed]);
        assert_eq!(state, State::Running);
        let (_, actions) = running([stood.clone(), HOLD, GRACEFUL]);
        assert_eq!(doors(&actions), [&Quit]);
        // Slurm lets a suspended job go on to end it.
        for events in [vec![RELEASE, GRACEFUL], vec![GRACEFUL, RELEASE]] {
            let (_, actions) = running([HOLD, stood.clone()].into_iter().chain(events));
            assert_eq!(doors(&actions), [&Powerdown]);
            assert_eq!(actions.iter().filter(|action| **action == Continue).count(), 2);
        }
    }

    #[test]
    fn before_qmp_answers_there_is_only_killing() {
        let (_, actions) = after([Event::Started, GRACEFUL, died()]);
        assert_eq!(doors(&actions), [&Kill]);
        assert_eq!(reports(&actions).last(), Some(&VmState::Stopped), "we killed it");
    }

    #[test]
    fn before_qemu_starts_stopping_needs_no_door() {
        let (state, actions) = after([GRACEFUL]);
        assert_eq!((state, reports(&actions)), (State::Over, vec![VmState::Stopped]));
    }

    #[test]
    fn a_machine_that_ends_otherwise_has_stopped() {
        let (_, actions) = running([shutting_down(), exited()]);
        assert_eq!(reports(&actions)[2..], [VmState::Stopping, VmState::Stopped]);
        assert_eq!(doors(&actions), [&Quit]);
    }

    #[test]
    fn a_qemu_that_hangs_after_its_guest_shut_down_is_killed() {
        assert_eq!(doors(&running([shutting_down(), Event::Deadline]).1), [&Quit, &Kill]);
    }

    #[test]
    fn a_qemu_that_dies_has_failed_whichever_news_comes_first() {
        for events in [vec![died()], vec![broken(), died()], vec![broken(), exited()]] {
            let (state, actions) = running(events);
            assert_eq!(state, State::Over);
            assert_eq!(reports(&actions).last(), Some(&VmState::Failed));
        }
        let Some(Report(_, why)) = running([broken(), died()]).1.pop() else { panic!() };
        assert_eq!(why, "killed by signal 9", "the status says more than the lost connection");
    }

    #[test]
    fn a_qemu_that_ends_well_but_unasked_has_failed() {
        assert_eq!(reports(&running([exited()]).1).last(), Some(&VmState::Failed));
    }

    #[test]
    fn the_connection_closes_on_the_way_out_and_that_is_no_fault() {
        let (_, actions) = running([NOW, broken(), exited()]);
        assert_eq!(doors(&actions), [&Quit]);
        assert_eq!(reports(&actions).last(), Some(&VmState::Stopped));
    }

    #[test]
    fn a_qemu_that_never_answers_is_killed_and_has_failed() {
        let (_, mut actions) = after([Event::Started, Event::Deadline, died()]);
        assert_eq!(doors(&actions), [&Kill]);
        let Some(Report(VmState::Failed, why)) = actions.pop() else { panic!("{actions:?}") };
        assert!(why.starts_with("QEMU did not answer"), "{why}");
    }

    #[test]
    fn what_cannot_be_killed_is_given_up_and_said() {
        let (state, actions) = running([NOW, Event::Deadline, Event::Deadline]);
        assert_eq!(state, State::Over);
        assert_eq!(reports(&actions).last(), Some(&VmState::Failed));
    }

    #[test]
    fn whatever_happens_in_whatever_order_the_end_is_reported_once() {
        let all = [
            Event::Started,
            Event::Greeted { run: true },
            Event::Resumed,
            Event::Suspended { why: String::new() },
            shutting_down(),
            powered_off(),
            GRACEFUL,
            NOW,
            HOLD,
            RELEASE,
            Event::Deadline,
            broken(),
            exited(),
            died(),
        ];
        // Every sequence of four events, then three deadlines: always over.
        for number in 0..all.len().pow(4) {
            let pick = |place: u32| all[number / all.len().pow(place) % all.len()].clone();
            let events = (0..4).map(pick).chain([NOW, NOW]);
            let ends = std::iter::repeat_n(Event::Deadline, 3);
            let (state, actions) = after(events.chain(ends));
            assert_eq!(state, State::Over, "{number}");
            let over = reports(&actions).into_iter().filter(|state| state.is_over()).count();
            assert_eq!(over, 1, "{number}");
        }
    }
}
