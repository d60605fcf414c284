//! Every key there is, with who writes it and how long it lives. Only this file builds keys.
//!
//! Names of users and pools are escaped (`%2f` for `/`), so that no name can reach into
//! another's part. Prefixes end in `/`.

use crate::model::owner::Owner;

const ROOT: &str = "/pavo/v1";

/// The shape of everything else: a number. Written when the store is made.
pub fn schema() -> String {
    format!("{ROOT}/meta/schema")
}

/// The id last given to a job of the local manager. Written by `alloc`; never deleted.
pub fn job_counter() -> String {
    format!("{ROOT}/meta/last-job")
}

/// All jobs of a user.
pub fn jobs_prefix(user: &str) -> String {
    format!("{ROOT}/job/{}/", escape(user))
}

/// Everything of one job. Written by its launcher; deleted with the job.
pub fn job_prefix(user: &str, owner: Owner) -> String {
    format!("{}{owner}/", jobs_prefix(user))
}

/// The job's record ([`JobRecord`](crate::model::job::JobRecord)).
pub fn job_record(user: &str, owner: Owner) -> String {
    format!("{}record", job_prefix(user, owner))
}

/// Whether a key below [`jobs_prefix`] is a job's record.
pub fn is_job_record(key: &str) -> bool {
    key.ends_with("/record")
}

/// The states of a job's VMs.
pub fn vm_states_prefix(user: &str, owner: Owner) -> String {
    format!("{}vm/", job_prefix(user, owner))
}

/// A VM's state ([`VmStatus`](crate::model::job::VmStatus)).
pub fn vm_state(user: &str, owner: Owner, rank: u32) -> String {
    format!("{}{rank}", vm_states_prefix(user, owner))
}

/// The rank in a key of [`vm_state`].
pub fn vm_rank(key: &str) -> Option<u32> {
    key.rsplit_once('/')?.1.parse().ok()
}

/// All taken ids of a pool.
pub fn pool_prefix(pool: &str) -> String {
    format!("{ROOT}/pool/{}/", escape(pool))
}

/// A taken id: its value names the owner. Written by whoever takes it; deleted with the
/// job. Padded, so that ids are listed in their order.
pub fn pool_id(pool: &str, id: u32) -> String {
    format!("{}{id:010}", pool_prefix(pool))
}

/// The id in a key of [`pool_id`].
pub fn id_of_pool_key(key: &str) -> Option<u32> {
    key.rsplit_once('/')?.1.parse().ok()
}

/// Where the next search in a pool begins. Written by whoever took ids; a hint only.
pub fn pool_hint(pool: &str) -> String {
    format!("{ROOT}/pool-hint/{}", escape(pool))
}

fn escape(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.@".contains(&byte);
    name.bytes().fold(String::new(), |mut text, byte| {
        if plain(byte) {
            text.push(byte.into());
        } else {
            text += &format!("%{byte:02x}");
        }
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_reaches_into_another_part() {
        let key = job_record("../root/l1", Owner::local(7));
        assert_eq!(key, "/pavo/v1/job/..%2froot%2fl1/l7/record");
        assert!(!jobs_prefix("alice2").starts_with(&jobs_prefix("alice")));
        assert!(!job_prefix("a", Owner::local(12)).starts_with(&job_prefix("a", Owner::local(1))));
    }

    #[test]
    fn ids_are_listed_in_their_order_and_read_back() {
        assert!(pool_id("vni", 9) < pool_id("vni", 10));
        assert_eq!(id_of_pool_key(&pool_id("vni", 4_000_000_000)), Some(4_000_000_000));
        assert_eq!(vm_rank(&vm_state("a", Owner::local(1), 12)), Some(12));
    }
}
