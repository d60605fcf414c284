//! Waiting for the hosts of a cluster, naming those that have not come.
//!
//! A host has come when the process of one of its VMs has said so; until then Slurm is
//! starting the step there, or root is setting the host up. A failure of that ends the step,
//! and is its own report.

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
        // Asked once for each VM: who is absent is for those who read it.
        if cluster.book.record.vms.iter().all(|vm| !vm.host.is_empty()) {
            return Ok(());
        }
        let seconds = start.elapsed().as_secs();
        if seconds >= shown + progress.every {
            shown = seconds;
            let waiting = || format!("waiting for {}", absent(cluster, hosts));
            let waiting = held_up(cluster).unwrap_or_else(waiting);
            (progress.say)(&format!("Configuring hosts... ({waiting}, {seconds} s)"));
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
                if let Some(held) = held_up(cluster) {
                    return Err(Error::system(format!("{held} (for {seconds} s)"))
                        .help("wait longer: `--timeout`"));
                }
                let absent = absent(cluster, hosts);
                return Err(Error::system(format!("{absent} did not come within {seconds} s"))
                    .help("slurmd's log there says why; or wait longer: `--timeout`"));
            }
        }
    }
}

/// What keeps a VM from beginning whose process is there.
fn held_up(cluster: &Cluster) -> Option<String> {
    let mut vms = cluster.book.record.vms.iter().zip(&cluster.book.states);
    let held = vms.find(|(vm, status)| vm.host.is_empty() && !status.detail.is_empty());
    held.map(|(vm, status)| format!("vm{} waits: {}", vm.rank, status.detail))
}

/// Who has not come: hosts, and VMs that may be anywhere.
fn absent(cluster: &Cluster, hosts: &[String]) -> String {
    let come: Vec<&str> = cluster.book.record.vms.iter().map(|vm| vm.host.as_str()).collect();
    let places = places(&come, hosts);
    let names: Vec<_> = places.iter().map(|(hosts, ranks)| named(hosts, &fold(ranks))).collect();
    names.join("; ")
}

/// The VMs that have not come, with the hosts where they can be. `come` has each VM's host,
/// or nothing.
///
/// Slurm fills host after host: a VM is between those of lower and of higher rank. Where a
/// host has not come at all, it is what is waited for.
fn places<'a>(come: &[&str], hosts: &'a [String]) -> Vec<(Vec<&'a str>, Vec<u32>)> {
    let at = |host: &&str| hosts.iter().position(|known| known == host);
    let mut places: Vec<(Vec<&str>, Vec<u32>)> = Vec::new();
    for (rank, _) in (0..).zip(come).filter(|(_, host)| host.is_empty()) {
        let (before, after) = come.split_at(rank as usize);
        let first = before.iter().rev().find_map(at).unwrap_or(0);
        let last = after.iter().find_map(at).map_or(hosts.len(), |last| last + 1);
        let between = hosts.get(first..last).unwrap_or(hosts).iter().map(String::as_str);
        let silent: Vec<&str> = between.clone().filter(|host| !come.contains(host)).collect();
        let hosts = if silent.is_empty() { between.collect() } else { silent };
        match places.last_mut().filter(|(same, _)| *same == hosts) {
            Some((_, ranks)) => ranks.push(rank),
            None => places.push((hosts, vec![rank])),
        }
    }
    places
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
    fn a_vm_that_has_not_come_is_looked_for_between_its_neighbours() {
        let hosts = ["n1", "n2", "n3"].map(String::from);
        let said = |come: &[&str]| {
            let places = places(come, &hosts);
            places.iter().map(|(hosts, ranks)| named(hosts, &fold(ranks))).collect::<Vec<_>>()
        };
        assert_eq!(said(&["n1", "n1", "n2", "n2", "n3", "n3"]), [""; 0]);
        assert_eq!(said(&[""; 4]), ["hosts n1, n2, n3: vm[0-3]"]);
        assert_eq!(said(&["n1", "n1", "", "", "n3", "n3"]), ["host n2: vm[2-3]"]);
        assert_eq!(said(&["n1", "", "n1", "n2", "n3", ""]), ["host n1: vm1", "host n3: vm5"]);
        assert_eq!(said(&["n1", "n1", "", "n2", "n3", "n3"]), ["hosts n1, n2: vm2"]);
        assert_eq!(places(&["", "n1"], &[]), [(Vec::new(), vec![0])]);
    }

    #[test]
    fn hosts_are_named_as_far_as_one_reads_them() {
        assert_eq!(named(&[], "vm3"), "vm3");
        assert_eq!(named(&["n2"], "vm[2-3]"), "host n2: vm[2-3]");
        let many: Vec<&str> = vec!["n"; 8];
        assert_eq!(named(&many, "vm[0-9]"), "hosts n, n, n, n, n, n and 2 more: vm[0-9]");
    }
}
