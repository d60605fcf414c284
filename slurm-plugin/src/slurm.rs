//! Slurm's functions, by hand: no header, no binding generator, no crate. Only what
//! the oldest supported Slurm (22.05) has.
#![expect(unsafe_code, reason = "calls C")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};

/// The handle that Slurm gives each callback.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub struct Spank(*mut c_void);

/// Where the plugin is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// srun.
    Local,
    /// slurmstepd, for a step.
    Remote,
    /// salloc, sbatch.
    Allocator,
    /// slurmd, and its prolog and epilog.
    Other,
}

/// Facts of the step that are one number.
#[derive(Clone, Copy, Debug)]
#[repr(i32)]
pub enum Item {
    Uid = 0,
    Gid = 1,
    Job = 2,
    Step = 3,
    Nodes = 4,
    NodeId = 5,
    LocalTasks = 6,
    TotalTasks = 7,
    TaskId = 11,
    RestartCount = 29,
    ArrayJob = 30,
    ArrayTask = 31,
}

const S_JOB_ARGV: c_int = 9;
const S_JOB_LOCAL_TO_GLOBAL_ID: c_int = 17;

type Callback = extern "C" fn(c_int, *const c_char, c_int) -> c_int;

#[repr(C)]
#[derive(Debug)]
struct SpankOption {
    name: *const c_char,
    arginfo: *const c_char,
    usage: *const c_char,
    has_arg: c_int,
    val: c_int,
    cb: Option<Callback>,
}

unsafe extern "C" {
    fn spank_context() -> c_int;
    fn spank_option_register(spank: Spank, option: *const SpankOption) -> c_int;
    fn spank_get_item(spank: Spank, item: c_int, ...) -> c_int;
    fn spank_getenv(spank: Spank, name: *const c_char, value: *mut c_char, len: c_int) -> c_int;
    fn spank_unsetenv(spank: Spank, name: *const c_char) -> c_int;
    fn slurm_error(format: *const c_char, ...);
    fn slurm_spank_log(format: *const c_char, ...);
}

/// Registers `--NAME=ARGUMENT`. Only from `slurm_spank_init`.
pub fn register(spank: Spank, name: &CStr, arginfo: &CStr, usage: &CStr, cb: Callback) -> bool {
    let option = SpankOption {
        name: name.as_ptr(),
        arginfo: arginfo.as_ptr(),
        usage: usage.as_ptr(),
        has_arg: 1,
        val: 0,
        cb: Some(cb),
    };
    // SAFETY: `spank` came from Slurm, which copies the option.
    unsafe { spank_option_register(spank, &option) == 0 }
}

pub fn context() -> Context {
    // SAFETY: no argument.
    match unsafe { spank_context() } {
        1 => Context::Local,
        2 => Context::Remote,
        3 => Context::Allocator,
        _ => Context::Other,
    }
}

/// A fact of the step, if Slurm has it here.
pub fn item(spank: Spank, item: Item) -> Option<u32> {
    let mut value = 0u32;
    // SAFETY: each of these items is written through one pointer to 32 bits.
    let done = unsafe { spank_get_item(spank, item as c_int, &raw mut value) == 0 };
    done.then_some(value)
}

/// The rank of a local task. Slurm's own bound is one too large: `local` must be
/// below the number of local tasks.
pub fn rank(spank: Spank, local: u32) -> Option<u32> {
    let mut rank = 0u32;
    // SAFETY: this item takes a number and a pointer to 32 bits.
    let done =
        unsafe { spank_get_item(spank, S_JOB_LOCAL_TO_GLOBAL_ID, local, &raw mut rank) == 0 };
    done.then_some(rank)
}

/// How many words the step's command has.
pub fn command_words(spank: Spank) -> Option<usize> {
    let (mut count, mut words) = (0 as c_int, std::ptr::null_mut::<*mut c_char>());
    // SAFETY: this item takes pointers to an int and to a `char **`.
    let done = unsafe { spank_get_item(spank, S_JOB_ARGV, &raw mut count, &raw mut words) == 0 };
    usize::try_from(count).ok().filter(|_| done)
}

/// A variable of the step's environment: the user's word. Too long counts as absent.
pub fn step_env<const LEN: usize>(spank: Spank, name: &CStr) -> Option<String> {
    let mut buffer = [0u8; LEN];
    let len = c_int::try_from(LEN).ok()?;
    // SAFETY: Slurm writes at most `len` bytes, the last of them NUL.
    let done = unsafe { spank_getenv(spank, name.as_ptr(), buffer.as_mut_ptr().cast(), len) == 0 };
    let text = CStr::from_bytes_until_nul(&buffer).ok()?.to_str().ok()?;
    done.then(|| text.to_owned())
}

/// Takes a variable out of the step's environment.
pub fn unset_step_env(spank: Spank, name: &CStr) {
    // SAFETY: both come from Slurm or are NUL-terminated; absence is no error.
    unsafe { spank_unsetenv(spank, name.as_ptr()) };
}

/// An argument that Slurm hands over, if it is text.
///
/// # Safety
/// `text` must be null or NUL-terminated.
pub unsafe fn text<'a>(text: *const c_char) -> Option<&'a str> {
    // SAFETY: the caller's promise.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) })?.to_str().ok()
}

/// The plugin's arguments in plugstack.conf.
///
/// # Safety
/// `words` must hold `count` NUL-terminated strings.
pub unsafe fn arguments<'a>(count: c_int, words: *const *const c_char) -> Vec<&'a str> {
    let count = if words.is_null() { 0 } else { usize::try_from(count).unwrap_or(0) };
    // SAFETY: the caller's promise.
    (0..count).filter_map(|i| unsafe { text(*words.add(i)) }).collect()
}

/// A line for whoever sees this program's errors; Slurm puts its name before it.
pub fn error(line: &str) {
    say(slurm_error, line);
}

/// A bare line for the user.
pub fn tell(line: &str) {
    say(slurm_spank_log, line);
}

fn say(to: unsafe extern "C" fn(*const c_char, ...), line: &str) {
    let clean: Vec<u8> = line.bytes().map(|b| if b == 0 { b'?' } else { b }).collect();
    let Ok(line) = CString::new(clean) else { return };
    // SAFETY: the format takes one string.
    unsafe { to(c"%s".as_ptr(), line.as_ptr()) };
}
