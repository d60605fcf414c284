//! The contract of [`Store`]: what every implementation must pass.
//!
//! Each test is written to the trait and to a [`Place`], which opens one more handle of
//! one store. `contract!` at the end runs them all for an implementation: a second one
//! is a second `Place` and a second line there.
//!
//! Some tests start processes of their own: this same binary, told by [`CHILD`] what to
//! do, running the test `child` only.

// Killing and pausing is for `tests/etcd`.
#[expect(dead_code)]
#[path = "../etcd/server.rs"]
mod server;

#[path = "../shared/store.rs"]
mod helpers;

mod commits;
mod leases;
mod place;
mod pools;
mod random;
mod watches;

use commits::*;
use leases::*;
use place::{EmbeddedPlace, EtcdPlace, Place, child};
use pools::*;
use random::*;
use watches::*;

/// Runs the contract for each kind of store.
macro_rules! contract {
    ($($store:ident: $place:ty;)*) => {
        $(mod $store {
            each_test!($place);
        })*
    };
}

macro_rules! tests {
    ($($test:ident)*) => {
        macro_rules! each_test {
            ($place:ty) => {
                #[test]
                fn child() {
                    super::child::<$place>();
                }

                $(#[test]
                fn $test() {
                    super::helpers::run(super::$test::<$place>(super::Place::new()));
                })*
            };
        }
    };
}

tests! {
    a_commit_is_done_only_if_all_checks_hold
    a_commit_as_large_as_the_limits_is_done
    json_is_read_as_it_was_written
    no_increment_is_lost_between_threads
    no_increment_is_lost_between_processes
    a_prefix_ends_at_its_slash
    pages_cover_a_prefix_without_gap_or_overlap
    pages_hold_what_stays_while_others_write
    a_watch_gives_a_commit_whole_however_large
    a_watch_that_is_interrupted_again_and_again_misses_nothing
    a_watch_sees_each_change_once_and_in_order
    a_watch_resumes_from_any_revision
    a_watch_sees_all_that_processes_and_threads_write
    a_lost_history_is_said
    a_lease_takes_its_entries_along
    the_end_of_a_lease_is_seen_by_watches
    a_paused_holder_changes_nothing_when_it_wakes
    a_pool_gives_an_id_to_one_owner_only
    a_pool_gives_the_smallest_ids_first
    a_pool_remembers_what_was_freed
    an_empty_pool_says_who_has_it_all
    job_ids_count_up_and_begin_again_at_the_end
    a_store_of_a_newer_pavo_is_refused
    any_commits_leave_what_a_map_would_hold
}

contract! {
    embedded_store: super::EmbeddedPlace;
    etcd_store: super::EtcdPlace;
}
