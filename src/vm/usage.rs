//! What a VM has used so far: counters, so that rates are the reader's business.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::qmp;
use crate::error::{Context, Error, Result};
use crate::model::job::VmState;
use crate::model::vm::VmSpec;

/// What was used since the VM's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub state: VmState,
    /// When this was so, by a clock of the VM's process.
    pub at_ms: u64,
    /// Of all processors together, by QEMU.
    pub cpu_ms: u64,
    /// Of the host's memory, at this moment.
    pub memory_bytes: u64,
    pub disk_read_bytes: u64,
    pub disk_written_bytes: u64,
    /// By the guest.
    pub received_bytes: u64,
    pub sent_bytes: u64,
}

/// Where that is read.
#[derive(Clone, Debug)]
pub struct Meter {
    since: Instant,
    /// QEMU's process, once it was started, as this process calls it.
    qemu: Arc<OnceLock<u32>>,
    /// The same as `/proc` calls it.
    shown: Arc<OnceLock<u32>>,
    taps: BTreeSet<String>,
}

impl Meter {
    pub fn new(spec: &VmSpec) -> Self {
        let taps = spec.nics.iter().map(|nic| nic.tap.clone()).collect();
        Self { since: Instant::now(), qemu: Arc::default(), shown: Arc::default(), taps }
    }

    /// QEMU runs.
    pub fn starts(&self, pid: Option<u32>) {
        if let Some(pid) = pid {
            // It starts once.
            let _ = self.qemu.set(pid);
        }
    }

    /// A cell has process ids of its own, and the host's `/proc`.
    fn shown(&self) -> Result<u32> {
        if let Some(shown) = self.shown.get() {
            return Ok(*shown);
        }
        let pid = *self.qemu.get().ok_or_else(|| Error::system("QEMU has not started yet"))?;
        let us = std::fs::read_link("/proc/self").while_doing(|| "reading `/proc/self`".into())?;
        let us = us.to_str().and_then(|us| us.parse().ok());
        let mut all = std::fs::read_dir("/proc").while_doing(|| "listing `/proc`".into())?;
        let found = all.find_map(|entry| {
            let name = entry.ok()?.file_name();
            let shown: u32 = name.to_str()?.parse().ok()?;
            let status = std::fs::read_to_string(format!("/proc/{shown}/status")).ok()?;
            (us.is_some() && parent_and_id(&status) == (us, Some(pid))).then_some(shown)
        });
        let found = found.ok_or_else(|| Error::system("QEMU's process is not in `/proc`"))?;
        Ok(*self.shown.get_or_init(|| found))
    }

    /// Reads it; a few files and one question to QEMU.
    ///
    /// # Errors
    /// When the VM has not started, or has ended.
    pub async fn read(&self, qmp: &qmp::Client, state: VmState) -> Result<Usage> {
        let pid = self.shown()?;
        let process = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            std::fs::read_to_string(&path).while_doing(|| format!("reading `{path}`"))
        };
        let garbled = || Error::system("what the kernel says of QEMU is not understood");
        let cpu_ms = cpu_ms(&process("stat")?).ok_or_else(garbled)?;
        let memory_bytes = resident_bytes(&process("statm")?).ok_or_else(garbled)?;
        let links = std::fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
        let (received_bytes, sent_bytes) = traffic(&links, &self.taps);
        let blocks = qmp.call("query-blockstats", json!({})).await;
        let blocks = blocks.while_doing(|| "asking QEMU about its disks".into())?;
        let (disk_read_bytes, disk_written_bytes) = disks(&blocks);
        Ok(Usage {
            state,
            at_ms: u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX),
            cpu_ms,
            memory_bytes,
            disk_read_bytes,
            disk_written_bytes,
            received_bytes,
            sent_bytes,
        })
    }
}

/// From `/proc/PID/status`: the parent, and what the process itself takes its id to be.
fn parent_and_id(status: &str) -> (Option<u32>, Option<u32>) {
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_ascii_whitespace().last()?.parse().ok()
    };
    (field("PPid:"), field("NSpid:"))
}

/// From `/proc/PID/stat`: time in user and kernel mode.
fn cpu_ms(stat: &str) -> Option<u64> {
    // The name may hold anything, parentheses too.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    Some(ticks * 1000 / u64::try_from(per_second).ok()?)
}

/// From `/proc/PID/statm`.
fn resident_bytes(statm: &str) -> Option<u64> {
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
    Some(pages * u64::try_from(page).ok()?)
}

/// From `/proc/net/dev`: what the guest received and sent. The host sees the other end.
fn traffic(links: &str, taps: &BTreeSet<String>) -> (u64, u64) {
    let mut all = (0, 0);
    for (name, counters) in links.lines().filter_map(|line| line.split_once(':')) {
        if !taps.contains(name.trim()) {
            continue;
        }
        let nth = |index: usize| {
            let field = counters.split_ascii_whitespace().nth(index);
            field.and_then(|field| field.parse().ok()).unwrap_or(0_u64)
        };
        all = (all.0 + nth(8), all.1 + nth(0));
    }
    all
}

/// What was read from and written to those that are devices of the guest.
fn disks(blocks: &Value) -> (u64, u64) {
    let all = blocks.as_array().into_iter().flatten();
    let devices = all.filter(|block| block["qdev"].as_str().is_some_and(|it| !it.is_empty()));
    let counter = |block: &Value, name: &str| block["stats"][name].as_u64().unwrap_or(0);
    devices.fold((0, 0), |(read, written), block| {
        (read + counter(block, "rd_bytes"), written + counter(block, "wr_bytes"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_from_what_the_kernel_writes() {
        let status = "Name:\ta\nPid:\t70\nPPid:\t60\nNSpid:\t70\t7\n";
        assert_eq!(parent_and_id(status), (Some(60), Some(7)));
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 9 0 0 0 150 50 0 0 20 0 4 0 1 1 1";
        assert_eq!(cpu_ms(stat), Some(2000));
        assert_eq!(cpu_ms("7 (a) S 1"), None);
        assert_eq!(resident_bytes("100 2 1 1 0 1 0"), Some(2 * 4096));
        let links = "Inter-|   Receive  |  Transmit\n face |bytes    packets\n\
            \x20   lo: 5 1 0 0 0 0 0 0 5 1 0 0 0 0 0 0\n\
            pt1-0:     900  1 0 0 0 0 0 0   70 1 0 0 0 0 0 0\n\
            pt1-1:100  1 0 0 0 0 0 0   30 1 0 0 0 0 0 0\n\
            pt1-10: 4 1 0 0 0 0 0 0 4 1 0 0 0 0 0 0\n";
        let taps = ["pt1-0", "pt1-1"].map(String::from).into();
        assert_eq!(traffic(links, &taps), (100, 1000));
        let blocks = json!([
            { "qdev": "/machine/x", "stats": { "rd_bytes": 5, "wr_bytes": 6 } },
            { "qdev": "", "stats": { "rd_bytes": 50, "wr_bytes": 60 } },
            { "node-name": "below", "stats": { "rd_bytes": 50, "wr_bytes": 60 } },
        ]);
        assert_eq!(disks(&blocks), (5, 6));
    }
}
