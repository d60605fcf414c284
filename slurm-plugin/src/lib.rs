//! Slurm's hook into pavo: a SPANK plugin, loaded into srun, salloc, sbatch, slurmd and
//! slurmstepd by a line of plugstack.conf:
//!
//! ```text
//! required /usr/lib/pavo/spank_pavo.so [pavo=/usr/bin/pavo] [limit=60]
//! ```
//!
//! It adds `--vm=RESOURCESET:COUNT[,RESOURCESET:COUNT]…`. On each host of a step that
//! owns a cluster it runs, as root, `pavo internal setup create` before the tasks start
//! and `pavo internal setup delete` after they have ended. It decides nothing else: what
//! a resource set is, and whether the job may have a cluster, pavo knows.
//!
//! ```text
//! srun                    option → local_user_init: leaves a mark for the nodes
//! slurmstepd, root        option → init_post_opt: setup create; a failure is kept
//!   └ each task, root     task_init_privileged: the failure, told once per host
//! slurmstepd, root        exit: setup delete
//! ```
//!
//! # Which step owns a cluster
//!
//! Slurm hands `--vm` of salloc and sbatch down to all steps. An own `--vm` on srun's
//! command line always counts, an inherited one only for step 0.
//!
//! | step | what happens |
//! |---|---|
//! | `srun --vm`, alone or in a job | owns a cluster |
//! | `salloc --vm`, `sbatch --vm`, `#SBATCH --vm`: the first ordinary step, which is step 0 | owns a cluster |
//! | the same: later ordinary steps | no-op |
//! | the same: batch, interactive and extern steps (ids from `0xfffffff0` on) | no-op |
//! | the same: `srun --overlap`, or `SLURM_OVERLAP` set, even as step 0 | no-op |
//! | `srun --overlap --vm` | owns a cluster: it was asked for |
//! | what a step starts | inherits nothing of the step's |
//! | an own `--vm` while the job has a cluster | asked for; pavo's journal refuses, the user reads why, and no delete is run |
//! | tasks of an array | each a job with an id of its own, and so with a cluster of its own |
//! | requeued | asked for anew, after the first incarnation was removed; `restart` counts |
//! | heterogeneous job or step | refused by srun, salloc and sbatch, and by the node |
//! | suspended | nothing here; the task pauses its guest, see below |
//! | a job id that comes again | nothing of the first is kept anywhere |
//! | without `--vm` | nothing: no exec, no file |
//!
//! Only srun can tell an own option from an inherited one: Slurm tells it of the
//! inherited one first, from `SLURM_SPANK__SLURM_SPANK_OPTION_pavo_vm`, and then of the
//! command line's. So it leaves a mark in the step's environment (`step.rs`), which
//! the node takes out again. `--overlap` is nowhere but on srun's own command line. Were
//! step 0 an overlapping one, no step of the allocation inherits: hosts cannot know what
//! steps there were elsewhere, so the rule must not need it.
//!
//! # What pavo can rely on
//!
//! - The ask (`ask.rs`) is complete on standard input when pavo starts, and ends. The
//!   environment is empty, the working directory `/`, nothing but 0, 1 and 2 is open,
//!   standard error is `/dev/null`; no signal is blocked or ignored; pavo leads a session.
//! - It is in groups `pavo.NODE.JOB.STEP` at the root of each cgroup hierarchy in which
//!   slurmstepd was in a group: a `scancel` does not reach it, the job's limits do not
//!   count it. What it leaves running stays there. The plugin removes the group when it
//!   is empty after a run; if slurmstepd was killed, nobody has, and the sweep must.
//! - After `limit` seconds its process group is killed.
//! - `create`: exit 0 means set up. Any other *exit* means that it says why on standard
//!   output (4 KiB count) and has left nothing; no delete follows. Killed, or out of time,
//!   it is followed by a delete, with the same ask, when the step ends.
//! - `node` is what slurmd calls itself (`SLURMD_NODENAME` of slurmstepd's own
//!   environment, which slurmstepd sets from slurmd's configuration). The step's
//!   environment has a variable of that name, too, and it is the user's.
//! - The user's word are `vm`, `node_list`, `sealed` and, on Slurm 22.05, `restart`:
//!   there Slurm tells plugins 0 always. Only their characters were checked.
//! - slurmstepd reports a step's end to Slurm after `delete`. srun returns before it.
//!
//! # How a failure reaches the user
//!
//! An error of `init_post_opt` shows nothing, srun exits 0, and a batch job's node is
//! drained. In `task_init_privileged` an error shows the text, fails srun and drains
//! nothing. So the former always succeeds and the latter says it, in the first task of
//! the host, a line each: `pavo: host n2: …`. The administrator has it in slurmd's log.
//!
//! # Suspended jobs
//!
//! slurmstepd sends SIGTSTP to each task's first process (with proctrack/pgid and
//! linuxproc to all of them), 2 s later stops or freezes all of the step, and on
//! resuming lets all go on and sends SIGCONT. SPANK has no callback for it. So `pavo
//! internal task` must catch SIGTSTP, which would stop it, and pause its guest by QMP
//! within the 2 s; on SIGCONT let it go on. QEMU must ignore SIGTSTP.
//!
//! # Rules for this crate
//!
//! No dependency, no thread, and no panic through `extern "C"`: slurmstepd would die
//! with the job. Slurm loads a plugin only of its own release, such as 22.05 (the third
//! number does not matter); `build.rs` finds which.
#![cfg_attr(test, allow(dead_code, reason = "Slurm's side is not there"))]

mod ask;
mod cgroup;
#[cfg(not(test))]
mod hooks;
mod option;
mod settings;
mod setup;
#[cfg(not(test))]
mod slurm;
#[cfg(not(test))]
mod state;
mod step;
mod sys;
#[cfg(test)]
mod version;

/// The release of Slurm that this is built for, as `slurm_version.h` writes it.
#[cfg(not(test))]
const SLURM_VERSION: u32 = include!(concat!(env!("OUT_DIR"), "/slurm_version"));
