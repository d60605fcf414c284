//! Every stored key, with its owner and how long it lives.
//!
//! ```text
//! /pavo/v1/meta/schema                     the version of all this
//! /pavo/v1/counter/job                     the last local job id
//! /pavo/v1/counter/pool/<pool>             below which no id of the pool is free
//! /pavo/v1/pool/<pool>/<id>                whose an id is
//! /pavo/v1/host/<user>/<job>/node/<host>   where a host of the job is
//! /pavo/v1/host/<user>/<job>/key/<network> what tells the job's network from others
//! /pavo/v1/job/<user>/<job>/record         the resolved cluster
//! /pavo/v1/job/<user>/<job>/secrets        what opens its control channels
//! /pavo/v1/job/<user>/<job>/vm/<rank>      how far each VM is
//! /pavo/v1/drive/<user>/<job>/<drive>      who uses a persistent drive
//! /pavo/v1/fence/<etcd user>/<slot>        orders the commits of a site's store
//! /pavo/v1/node/<name>                     what the inventory knows of a node; likewise
//!     group/ profile/ net/ passwd/ project/
//! /pavo/v1/op/<id>                         how far a long change of the inventory is
//! /pavo/v1/daemon/inventory                orders the changes of the inventory
//! /pavo/v1/result/<id>/<n>                 what came of an order to machines
//!     <id>/begun/<n>                       and which were begun
//! /pavo/v1/lock/… svc/…                    which daemon is active, and which there are
//! ```
//!
//! At a site, `pool/`, `counter/` and `host/` are written by the nodes (root), the rest
//! by the user whose name is in the key; `ops::site_store` has the table of who may
//! read what.
//!
//! Names are escaped, so that no user's text adds a `/` or leaves its place. Prefixes
//! end in `/`. Numbers are padded: the order of keys is their order.

use std::fmt::Write;

use crate::model::node::request::Noun;
use crate::model::owner::Owner;

const ROOT: &str = "/pavo/v1";

/// What everybody may read. Written by who prepares the store; stays.
pub fn meta() -> String {
    format!("{ROOT}/meta/")
}

/// The version of the keys' meaning. Written by who opens a store first; stays.
pub fn schema() -> String {
    format!("{}schema", meta())
}

/// All counters. At a site written by the nodes; they stay.
pub fn counters() -> String {
    format!("{ROOT}/counter/")
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

/// All ids that are taken. At a site written by the nodes; freed with their jobs.
pub fn pools() -> String {
    format!("{ROOT}/pool/")
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

/// What the nodes say of all jobs.
pub fn all_hosts() -> String {
    format!("{ROOT}/host/")
}

/// What the nodes say of a user's jobs. Written by them, read by that user.
pub fn hosts(user: &str) -> String {
    format!("{}{}/", all_hosts(), escape(user))
}

/// What the nodes say of a step of a job. Deleted as a whole by its last host when it ends.
/// Of the step and not of the job: two steps of a job count their hosts from 0 both.
pub fn step_hosts(user: &str, job: Owner, step: u32) -> String {
    format!("{}{job}/{step}/", hosts(user))
}

/// The records of a step's hosts.
pub fn host_records(user: &str, job: Owner, step: u32) -> String {
    format!("{}node/", step_hosts(user, job, step))
}

/// Where a host of the step is: its name, underlay address, VMs. Written by that host
/// (0-based in the step) when its set-up begins; deleted with the step.
pub fn host_record(user: &str, job: Owner, step: u32, node_id: u32) -> String {
    format!("{}{node_id:05}", host_records(user, job, step))
}

/// The VXLAN keys of a step's networks.
pub fn network_keys(user: &str, job: Owner, step: u32) -> String {
    format!("{}key/", step_hosts(user, job, step))
}

/// The VXLAN key of a network, in the step. Written by the step's first host, which takes
/// it from its pool, in one commit; deleted with the step, once the key is free again.
pub fn network_key(user: &str, job: Owner, step: u32, network: &str) -> String {
    format!("{}{}", network_keys(user, job, step), escape(network))
}

/// What a key below [`hosts`] holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostKey {
    Record { node_id: u32 },
    NetworkKey { network: String },
}

/// The job that a key below [`hosts`] belongs to, and what it holds; `None` for what a
/// newer pavo may keep there.
pub fn parse_host_key(key: &str) -> Option<(Owner, HostKey)> {
    let (job, rest) = job_part(key, "/host/")?;
    let (step, rest) = rest.split_once('/')?;
    let _: u32 = step.parse().ok()?;
    let what = match rest.split_once('/')? {
        ("node", node_id) => HostKey::Record { node_id: node_id.parse().ok()? },
        ("key", network) => HostKey::NetworkKey { network: unescape(network)? },
        _ => return None,
    };
    Some((job, what))
}

/// The [`step_hosts`] of the user, job and step that a key is below of.
pub fn step_hosts_of(key: &str) -> Option<String> {
    let hosts = all_hosts();
    let mut parts = key.strip_prefix(&hosts)?.split('/');
    let (user, job, step) = (parts.next()?, parts.next()?, parts.next()?);
    parts.next().map(|_| format!("{hosts}{user}/{job}/{step}/"))
}

/// All jobs of all users.
pub fn all_jobs() -> String {
    format!("{ROOT}/job/")
}

/// All jobs of a user.
pub fn jobs(user: &str) -> String {
    format!("{}{}/", all_jobs(), escape(user))
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

/// What opens the control channels of a job's VMs. At a site written by the job's
/// launcher before its first VM starts, and read by that user only; deleted with the job.
pub fn job_secrets(user: &str, job: Owner) -> String {
    format!("{}secrets", self::job(user, job))
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

/// The locks of all persistent drives.
pub fn all_drives() -> String {
    format!("{ROOT}/drive/")
}

/// The locks of a user's persistent drives.
pub fn drives(user: &str) -> String {
    format!("{}{}/", all_drives(), escape(user))
}

/// The drives that a job uses. They end with their leases; on one machine, with the job.
pub fn job_drives(user: &str, job: Owner) -> String {
    format!("{}{job}/", drives(user))
}

/// That a job uses the drive of this digest. Written by the job's launcher, with a lease,
/// and read by everybody; ends with that.
pub fn drive_claim(user: &str, job: Owner, drive: &str) -> String {
    format!("{}{}", job_drives(user, job), escape(drive))
}

/// User, job and drive of a [`drive_claim`]; `None` for what a newer pavo may keep there.
pub fn parse_drive_claim(key: &str) -> Option<(String, Owner, String)> {
    let mut parts = key.strip_prefix(&all_drives())?.split('/');
    let (user, job, drive) = (parts.next()?, parts.next()?, parts.next()?);
    let rest = parts.next();
    rest.is_none().then_some((unescape(user)?, job.parse().ok()?, unescape(drive)?))
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
    Secrets,
    VmStatus { rank: u32 },
    VmStates,
}

/// The job that a key below [`jobs`] belongs to, and what it holds; `None` for what a
/// newer pavo may keep there.
pub fn parse_job_key(key: &str) -> Option<(Owner, JobKey)> {
    let (job, rest) = job_part(key, "/job/")?;
    let what = match rest.split_once('/') {
        None if rest == "record" => JobKey::Record,
        None if rest == "states" => JobKey::VmStates,
        None if rest == "secrets" => JobKey::Secrets,
        Some(("vm", rank)) => JobKey::VmStatus { rank: rank.parse().ok()? },
        _ => return None,
    };
    Some((job, what))
}

/// All places of what the daemon keeps.
pub fn inventories() -> Vec<String> {
    let records = Noun::ALL.into_iter().map(records);
    let more = ["op", "result", "lock", "svc", "daemon"];
    records.chain(more.map(|place| format!("{ROOT}/{place}/"))).collect()
}

/// All records of a kind in the inventory.
pub fn records(noun: Noun) -> String {
    format!("{ROOT}/{}/", noun.as_str())
}

/// What the inventory knows of a node, a group and so on. Written by who changes the
/// inventory; stays until it is deleted.
pub fn record(noun: Noun, name: &str) -> String {
    format!("{}{}", records(noun), escape(name))
}

/// The name of the record that a key below [`records`] is about.
pub fn parse_record(noun: Noun, key: &str) -> Option<String> {
    unescape(key.strip_prefix(&records(noun))?)
}

/// All [`Operation`](crate::model::node::operation::Operation)s.
pub fn ops() -> String {
    format!("{ROOT}/op/")
}

/// How far a change of the inventory is that takes several commits. Written by who makes it,
/// with each of them; the latest hundred stay.
pub fn op(id: u64) -> String {
    format!("{}{id:012}", ops())
}

/// The latest change of the inventory: each requires that it is still the one that was
/// read. Written with every change; stays.
pub fn inventory_counter() -> String {
    format!("{ROOT}/daemon/inventory")
}

/// What came of an order's nodes.
pub fn op_results(id: u64) -> String {
    format!("{ROOT}/result/{id:012}/")
}

/// Some of it, as it came. Goes with the operation.
pub fn op_result(id: u64, shard: usize) -> String {
    format!("{}{shard:06}", op_results(id))
}

/// The nodes of an order that were begun, where doing it twice is more than doing it once.
pub fn op_begun(id: u64) -> String {
    format!("{}begun/", op_results(id))
}

/// Some of them, written before they are touched. Goes with the operation.
pub fn op_begun_some(id: u64, shard: usize) -> String {
    format!("{}{shard:06}", op_begun(id))
}

/// What only one process holds at a time.
pub fn locks() -> String {
    format!("{ROOT}/lock/")
}

/// Who the one daemon is that writes. Ends with its lease; every change requires that it is
/// still the same.
pub fn daemon_leader() -> String {
    format!("{}daemon", locks())
}

/// The fingerprint of the key with which the inventory's secrets are sealed. Written by the
/// first daemon; stays.
pub fn vault_mark() -> String {
    format!("{}vault", locks())
}

/// What runs for the site, on which hosts.
pub fn services() -> String {
    format!("{ROOT}/svc/")
}

/// A daemon on a host. Written by it; ends with its lease.
pub fn service(kind: &str, host: &str) -> String {
    format!("{}{}/{}", services(), escape(kind), escape(host))
}

/// The job of a key that has `<user>/<job>/…` below `place`, and what follows it.
fn job_part<'k>(key: &'k str, place: &str) -> Option<(Owner, &'k str)> {
    let (_user, rest) = key.strip_prefix(ROOT)?.strip_prefix(place)?.split_once('/')?;
    let (job, rest) = rest.split_once('/')?;
    Some((job.parse().ok()?, rest))
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

/// The name that [`escape`] made this of.
fn unescape(escaped: &str) -> Option<String> {
    let mut name = Vec::with_capacity(escaped.len());
    let mut bytes = escaped.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            name.push(byte);
            continue;
        }
        let digits = [bytes.next(), bytes.next()];
        match digits {
            [None, None] if escaped == "%" => {}
            [Some(high), Some(low)] => {
                let digits = [high, low];
                let text = std::str::from_utf8(&digits).ok()?;
                name.push(u8::from_str_radix(text, 16).ok()?);
            }
            _ => return None,
        }
    }
    String::from_utf8(name).ok()
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
        assert_eq!(host_record("ada", job, 1, 3), "/pavo/v1/host/ada/l7/1/node/00003");
        assert_eq!(network_key("ada", job, 0, "a/b"), "/pavo/v1/host/ada/l7/0/key/a%2Fb");
        assert_eq!(job_secrets("ada", job), "/pavo/v1/job/ada/l7/secrets");
        assert_eq!(drives("ada"), "/pavo/v1/drive/ada/");
        let claim = drive_claim("a/b", job, "0f");
        assert_eq!(parse_drive_claim(&claim), Some(("a/b".into(), job, "0f".into())));
        assert_eq!(parse_drive_claim(&(claim + "/more")), None);
        assert_eq!(fence("pavo-node", 12), "/pavo/v1/fence/pavo-node/0012");
        for (key, place) in [
            (pool_id("p", 1), pools()),
            (pool_floor("p"), counters()),
            (job_counter(), counters()),
            (schema(), meta()),
            (hosts("ada"), all_hosts()),
            (jobs("ada"), all_jobs()),
        ] {
            assert!(key.starts_with(&place), "{key} {place}");
        }
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
        assert_eq!(parse(job_secrets("ada", job)), Some((job, JobKey::Secrets)));
        let (parse, record) = (parse_host_key, |node_id| HostKey::Record { node_id });
        assert_eq!(parse(&host_record("a/b", job, 0, 7)), Some((job, record(7))));
        assert_eq!(parse(&(step_hosts("ada", job, 0) + "later/thing")), None);
        assert_eq!(parse(&job_record("ada", job)), None);
        assert_eq!(parse_pool_id(&pool_id("uplink", u32::MAX)), Some(u32::MAX));
        let key = host_record("a/b", job, 3, 7);
        assert_eq!(step_hosts_of(&key), Some(step_hosts("a/b", job, 3)));
        assert_eq!(step_hosts_of(&hosts("ada")), None);
    }

    proptest! {
        #[test]
        fn no_name_leaves_its_place(user in ".*", other in ".*") {
            let key = jobs(&user);
            prop_assert_eq!(key.matches('/').count(), 5);
            prop_assert!(key.bytes().all(|byte| byte.is_ascii_graphic()));
            prop_assert_eq!(user == other, key == jobs(&other));
            let network = network_key(&user, Owner::local(1), 0, &other);
            let what = HostKey::NetworkKey { network: other };
            prop_assert_eq!(parse_host_key(&network), Some((Owner::local(1), what)));
        }
    }
}
