//! What VMs use, as rates: two looks at their counters.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::StreamExt;
use serde::Serialize;
use tokio::time::timeout;

use super::reach::Pass;
use crate::error::{Context, Result};
use crate::model::job::{JobRecord, VmRecord, VmState};
use crate::model::owner::Owner;
use crate::store::Store;
use crate::vm::control::{Client, Op};
use crate::vm::usage::Usage;

/// How many VMs are asked at once.
const AT_ONCE: usize = 32;
/// How long one may take to answer.
const ANSWER: Duration = Duration::from_secs(3);

/// What one VM does.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Doing {
    pub job: u32,
    pub name: String,
    pub rank: u32,
    pub host: String,
    pub cores: u32,
    pub memory_mib: u64,
    /// Absent where the VM's process does not answer.
    pub state: Option<VmState>,
    /// Of the host's memory.
    pub memory_bytes: Option<u64>,
    pub rates: Option<Rates>,
}

/// Between two looks, per second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rates {
    /// 100 for each processor that is busy.
    pub cpu_percent: f64,
    pub disk_read_bytes: f64,
    pub disk_written_bytes: f64,
    pub received_bytes: f64,
    pub sent_bytes: f64,
}

impl Rates {
    /// `None` where no time has passed.
    pub fn between(before: &Usage, after: &Usage) -> Option<Self> {
        let seconds = after.at_ms.checked_sub(before.at_ms).filter(|ms| *ms > 0)? as f64 / 1000.0;
        let rate = |of: fn(&Usage) -> u64| of(after).saturating_sub(of(before)) as f64 / seconds;
        Some(Self {
            cpu_percent: rate(|usage| usage.cpu_ms) / 10.0,
            disk_read_bytes: rate(|usage| usage.disk_read_bytes),
            disk_written_bytes: rate(|usage| usage.disk_written_bytes),
            received_bytes: rate(|usage| usage.received_bytes),
            sent_bytes: rate(|usage| usage.sent_bytes),
        })
    }
}

/// Remembers the look before, and stays connected.
#[derive(Debug, Default)]
pub struct Watcher {
    vms: BTreeMap<(Owner, u32), Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    client: Option<Client>,
    last: Option<Usage>,
}

impl Watcher {
    /// Looks at every VM of these clusters, many at once.
    pub async fn look(&mut self, store: Option<&dyn Store>, jobs: &[JobRecord]) -> Vec<Doing> {
        let mut before = std::mem::take(&mut self.vms);
        let passes: Vec<Pass> = jobs.iter().map(|_| Pass::default()).collect();
        let mut looks = Vec::new();
        for (job, pass) in jobs.iter().zip(&passes) {
            for vm in &job.vms {
                let seen = before.remove(&(job.owner, vm.rank)).unwrap_or_default();
                looks.push(look((pass, store), job, vm, seen));
            }
        }
        let all: Vec<(Doing, (Owner, u32), Seen)> =
            futures_util::stream::iter(looks).buffered(AT_ONCE).collect().await;
        let mut doing = Vec::new();
        for (vm, key, seen) in all {
            self.vms.insert(key, seen);
            doing.push(vm);
        }
        doing
    }
}

async fn look(
    way: (&Pass, Option<&dyn Store>),
    job: &JobRecord,
    vm: &VmRecord,
    mut seen: Seen,
) -> (Doing, (Owner, u32), Seen) {
    let asked = timeout(ANSWER, ask(way, job, vm.rank, &mut seen.client)).await;
    let usage = match asked {
        Ok(Ok(usage)) => Some(usage),
        // It has not started or has ended, or is too busy: the next look may tell.
        Ok(Err(_)) | Err(_) => {
            seen.client = None;
            None
        }
    };
    let rates = usage.zip(seen.last).and_then(|(now, last)| Rates::between(&last, &now));
    seen.last = usage.or(seen.last);
    let doing = Doing {
        job: job.owner.job,
        name: job.name.clone(),
        rank: vm.rank,
        host: vm.host.clone(),
        cores: vm.cores,
        memory_mib: vm.memory_mib,
        state: usage.map(|usage| usage.state),
        memory_bytes: usage.map(|usage| usage.memory_bytes),
        rates,
    };
    (doing, (job.owner, vm.rank), seen)
}

async fn ask(
    (pass, store): (&Pass, Option<&dyn Store>),
    job: &JobRecord,
    rank: u32,
    client: &mut Option<Client>,
) -> Result<Usage> {
    if client.is_none() {
        *client = Some(pass.reach(store, job, rank).await?.connect().await?);
    }
    // It has just been put there.
    let client = client.as_mut().expect("it is connected");
    let usage = client.ask(Op::Usage).await?;
    serde_json::from_value(usage).while_doing(|| "reading what the VM uses".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_per_second_and_no_time_is_none() {
        let before = Usage {
            state: VmState::Running,
            at_ms: 1000,
            cpu_ms: 500,
            memory_bytes: 0,
            disk_read_bytes: 100,
            disk_written_bytes: 0,
            received_bytes: 7,
            sent_bytes: 0,
        };
        let after =
            Usage { at_ms: 3000, cpu_ms: 3500, disk_read_bytes: 300, sent_bytes: 5, ..before };
        let rates = Rates::between(&before, &after).unwrap();
        assert_eq!((rates.cpu_percent, rates.disk_read_bytes), (150.0, 100.0));
        assert_eq!((rates.received_bytes, rates.sent_bytes), (0.0, 2.5));
        assert_eq!(Rates::between(&after, &after), None);
        // Of a process that was started anew.
        assert_eq!(Rates::between(&after, &before), None);
    }
}
