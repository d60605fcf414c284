//! The callbacks that Slurm calls by name. Each does nothing where `--vm` was not
//! given, and none lets a panic through.
#![expect(unsafe_code, reason = "exported to C by name")]

use std::ffi::{CStr, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::slurm::{self, Spank};
use crate::state::State;

const OK: c_int = 0;
const FAILED: c_int = -1;

#[unsafe(no_mangle)]
pub static plugin_name: [u8; 5] = *b"pavo\0";
#[unsafe(no_mangle)]
pub static plugin_type: [u8; 6] = *b"spank\0";
/// The Slurm that this is built for; another refuses it.
#[unsafe(no_mangle)]
pub static plugin_version: u32 = crate::SLURM_VERSION;
#[unsafe(no_mangle)]
pub static spank_plugin_version: u32 = 1;

const NAME: &CStr = c"vm";
const ARGUMENT: &CStr = c"SET:COUNT[,...]";
const USAGE: &CStr = c"give the step's tasks virtual machines of these resource sets (see pavo)";

#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_init(spank: Spank, _: c_int, _: *const *const c_char) -> c_int {
    guarded("init", || {
        if !slurm::register(spank, NAME, ARGUMENT, USAGE, option) {
            slurm::error("pavo: Slurm does not take the option --vm");
        }
        OK
    })
}

extern "C" fn option(_: c_int, argument: *const c_char, remote: c_int) -> c_int {
    guarded("option", || {
        // SAFETY: Slurm gives a string, or nothing.
        let argument = unsafe { slurm::text(argument) };
        result(State::with(|state| state.option(argument.unwrap_or("\u{fffd}"), remote != 0)))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_init_post_opt(
    spank: Spank,
    count: c_int,
    words: *const *const c_char,
) -> c_int {
    guarded("init_post_opt", || {
        // SAFETY: Slurm gives the words of plugstack.conf.
        let arguments = || unsafe { slurm::arguments(count, words) };
        result(State::with(|state| state.options_known(spank, arguments)))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_local_user_init(
    spank: Spank,
    _: c_int,
    _: *const *const c_char,
) -> c_int {
    guarded("local_user_init", || result(State::with(|state| state.launching(spank))))
}

#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_task_init_privileged(
    spank: Spank,
    _: c_int,
    _: *const *const c_char,
) -> c_int {
    guarded("task_init_privileged", || result(State::with(|state| state.task(spank))))
}

#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_exit(spank: Spank, _: c_int, _: *const *const c_char) -> c_int {
    let _ = spank;
    guarded("exit", || result(State::with(State::exit)))
}

fn result(done: Result<(), ()>) -> c_int {
    if done.is_ok() { OK } else { FAILED }
}

/// A panic becomes a line in the log, and a step that goes on without us.
fn guarded(place: &str, body: impl FnOnce() -> c_int) -> c_int {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        slurm::error(&format!("pavo: a bug in the plugin, in {place}; please report it"));
        State::with(|state| state.fail("a bug in the plugin; see slurmd's log"));
        OK
    })
}
