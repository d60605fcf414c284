//! Waiting for the hosts of a cluster, naming those that have not come.
//!
//! A host has come when the process of one of its VMs has said so; until then Slurm is
//! starting the step there, or root is setting the host up. A failure of that ends the step,
//! and is its own report.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::launch::Cluster;
use super::watch::Progress;
use crate::error::{Error, Result};
use crate::model::vmset::fold;

/// Hosts that are named in a message.
const NAMED: usize = 6;

/// Waits until all VMs' processes are there. `hosts` are those of the job.
///
/// # Errors
/// A VM that failed; the deadline, naming who has not come.
pub async fn gather(
    cluster: &mut Cluster,
    hosts: &[String],
    limit: Duration,
    progress: Progress<'_>,
) -> Result<()> {
    let start = Instant::now();
    // Later than the clock can tell is never.
    let deadline = start.checked_add(limit);
    let mut ticks = interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks.tick().await;
    let mut shown = 0;
    loop {
        if let Some((_, error)) = cluster.take_failure() {
            return Err(error);
        }
        let Some(absent) = absent(cluster, hosts) else { return Ok(()) };
        let seconds = start.elapsed().as_secs();
        if seconds >= shown + progress.every {
            shown = seconds;
            (progress.say)(&format!("Configuring hosts... (waiting for {absent}, {seconds} s)"));
        }
        tokio::select! {
            report = cluster.next_report() => drop(report?),
            _ = ticks.tick() => {}
            () = async {
                match deadline {
                    Some(deadline) => sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            } => {
                let seconds = limit.as_secs();
                return Err(Error::system(format!("{absent} did not come within {seconds} s"))
                    .help("slurmd's log there says why; or wait longer: `--timeout`"));
            }
        }
    }
}

/// Who has not come: hosts, and VMs that may be anywhere.
fn absent(cluster: &Cluster, hosts: &[String]) -> Option<String> {
    let vms = &cluster.book.record.vms;
    let missing: Vec<u32> = vms.iter().filter(|vm| vm.host.is_empty()).map(|vm| vm.rank).collect();
    if missing.is_empty() {
        return None;
    }
    let come: BTreeSet<&str> = vms.iter().map(|vm| vm.host.as_str()).collect();
    let absent: Vec<&str> =
        hosts.iter().map(String::as_str).filter(|host| !come.contains(host)).collect();
    Some(named(&absent, &fold(&missing)))
}

fn named(hosts: &[&str], vms: &str) -> String {
    let first = hosts[..hosts.len().min(NAMED)].join(", ");
    match hosts.len() {
        0 => vms.to_owned(),
        1 => format!("host {first}: {vms}"),
        count if count <= NAMED => format!("hosts {first}: {vms}"),
        count => format!("hosts {first} and {} more: {vms}", count - NAMED),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_named_as_far_as_one_reads_them() {
        assert_eq!(named(&[], "vm3"), "vm3");
        assert_eq!(named(&["n2"], "vm[2-3]"), "host n2: vm[2-3]");
        let many: Vec<&str> = vec!["n"; 8];
        assert_eq!(named(&many, "vm[0-9]"), "hosts n, n, n, n, n, n and 2 more: vm[0-9]");
    }
}
