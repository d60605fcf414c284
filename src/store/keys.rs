//! Every stored key, with its owner and how long it lives.
//!
//! ```text
//! /pavo/v1/meta/schema                     the version of all this
//! /pavo/v1/counter/job                     the last local job id
//! /pavo/v1/counter/pool/<pool>             below which no id of the pool is free
//! /pavo/v1/pool/<pool>/<id>                whose an id is
//! /pavo/v1/job/<user>/<job>/record         the resolved cluster
//! /pavo/v1/job/<user>/<job>/vm/<rank>      how far each VM is
//! ```
//!
//! Names are escaped, so that no user's text adds a `/` or leaves its place. Prefixes
//! end in `/`. Numbers are padded: the order of keys is their order.

use std::fmt::Write;

use crate::model::owner::Owner;

const ROOT: &str = "/pavo/v1";

/// The version of the keys' meaning. Written by who opens a store first; stays.
pub fn schema() -> String {
    format!("{ROOT}/meta/schema")
}

/// The id of the latest local job. Written by every launcher; stays.
pub fn job_counter() -> String {
    format!("{ROOT}/counter/job")
}

/// A number below which no id of the pool is free. Written with every change of the
/// pool; stays.
pub fn pool_floor(pool: &str) -> String {
    format!("{ROOT}/counter/pool/{}", escape(pool))
}

/// The ids of a pool that are taken.
pub fn pool(pool: &str) -> String {
    format!("{ROOT}/pool/{}/", escape(pool))
}

/// Whose an id of a pool is. Written by the job's first host (locally, its launcher);
/// freed with the job.
pub fn pool_id(pool: &str, id: u32) -> String {
    format!("{}{id:010}", self::pool(pool))
}

/// The id that a key below [`pool`] is about.
pub fn parse_pool_id(key: &str) -> Option<u32> {
    key.rsplit('/').next()?.parse().ok()
}

/// All jobs of a user.
pub fn jobs(user: &str) -> String {
    format!("{ROOT}/job/{}/", escape(user))
}

/// All that is known of a job. Deleted as a whole when it ends.
pub fn job(user: &str, job: Owner) -> String {
    format!("{}{job}/", jobs(user))
}

/// The [`JobRecord`](crate::model::job::JobRecord). Written by the job's launcher before
/// its first VM starts; deleted with the job.
pub fn job_record(user: &str, job: Owner) -> String {
    format!("{}record", self::job(user, job))
}

/// The states of a job's VMs.
pub fn vm_statuses(user: &str, job: Owner) -> String {
    format!("{}vm/", self::job(user, job))
}

/// A VM's [`VmStatus`](crate::model::job::VmStatus). Written by the job's launcher, as
/// the VM's process reports; deleted with the job.
pub fn vm_status(user: &str, job: Owner, rank: u32) -> String {
    format!("{}{rank:05}", vm_statuses(user, job))
}

/// At a site, the states of all VMs of a job, a list by rank. Written by the job's
/// launcher now and then; deleted with the job.
pub fn vm_states(user: &str, job: Owner) -> String {
    format!("{}states", self::job(user, job))
}

/// By which a handle of a site's store orders its commits. Written with them by the
/// handles of this etcd user that chose this slot; stays.
pub fn fence(user: &str, slot: u32) -> String {
    format!("{}{slot:04}", fences(user))
}

/// The fences of an etcd user.
pub fn fences(user: &str) -> String {
    format!("{ROOT}/fence/{}/", escape(user))
}

/// What a key below [`jobs`] holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKey {
    Record,
    VmStatus { rank: u32 },
    VmStates,
}

/// The job that a key below [`jobs`] belongs to, and what it holds; `None` for what a
/// newer pavo may keep there.
pub fn parse_job_key(key: &str) -> Option<(Owner, JobKey)> {
    let (_user, rest) = key.strip_prefix(ROOT)?.strip_prefix("/job/")?.split_once('/')?;
    let (job, rest) = rest.split_once('/')?;
    let what = match rest.split_once('/') {
        None if rest == "record" => JobKey::Record,
        None if rest == "states" => JobKey::VmStates,
        Some(("vm", rank)) => JobKey::VmStatus { rank: rank.parse().ok()? },
        _ => return None,
    };
    Some((job.parse().ok()?, what))
}

/// The name as one part of a key: ASCII letters, digits and `-_.:@+` as they are, each
/// other byte as `%` and two hexadecimal digits. No two names share an escaped form; the
/// empty name is `%`.
fn escape(name: &str) -> String {
    if name.is_empty() {
        return "%".into();
    }
    let mut escaped = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.:@+".contains(&byte) {
            escaped.push(byte.into());
        } else {
            write!(escaped, "%{byte:02X}").expect("writing to a string");
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keys_are_where_the_permissions_of_a_site_expect_them() {
        let job = Owner::local(7);
        assert_eq!(job_record("ada", job), "/pavo/v1/job/ada/l7/record");
        assert_eq!(vm_status("ada", job, 3), "/pavo/v1/job/ada/l7/vm/00003");
        assert_eq!(pool_id("uplink", 12), "/pavo/v1/pool/uplink/0000000012");
        assert_eq!(schema(), "/pavo/v1/meta/schema");
    }

    #[test]
    fn a_job_is_not_found_below_one_whose_id_it_begins_with() {
        assert!(!job_record("ada", Owner::local(12)).starts_with(&job("ada", Owner::local(1))));
        assert!(!jobs("adam").starts_with(&jobs("ada")));
    }

    #[test]
    fn a_key_tells_its_job_and_what_it_holds() {
        let job = Owner::local(7);
        let parse = |key: String| parse_job_key(&key);
        assert_eq!(parse(job_record("a/b", job)), Some((job, JobKey::Record)));
        assert_eq!(parse(vm_status("", job, 3)), Some((job, JobKey::VmStatus { rank: 3 })));
        assert_eq!(parse(self::job("ada", job) + "later/thing"), None);
        assert_eq!(parse(schema()), None);
        assert_eq!(parse_pool_id(&pool_id("uplink", u32::MAX)), Some(u32::MAX));
    }

    proptest! {
        #[test]
        fn no_name_leaves_its_place(user in ".*", other in ".*") {
            let key = jobs(&user);
            prop_assert_eq!(key.matches('/').count(), 5);
            prop_assert!(key.bytes().all(|byte| byte.is_ascii_graphic()));
            prop_assert_eq!(user == other, key == jobs(&other));
        }
    }
}
