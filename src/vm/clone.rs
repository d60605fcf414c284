//! A VM that begins from a snapshot: its guest remembers to be another, and becomes this one.
//!
//! ```text
//!  memory is read ─ links down ─ guest runs ─ agent: who it is ─ links up ─ leases, ssh ─ running
//! ```
//!
//! Until it is itself, not a frame of it leaves QEMU, nobody else speaks to its agent, and it
//! is not reported to run. All that is secret or its own is new: keys, random numbers, its
//! machine's id. QEMU gives its interfaces the address of the other, as the guest remembers it;
//! the guest's driver sets the new one, and a reset brings the same. (What QEMU announces when
//! the memory is read is the new one already. `announce-rounds: 0` would have QEMU 7.2 use a
//! timer that it has freed, at the next reset.)

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pavo_agent::{Identity, Interface};
use serde_json::json;
use tokio::time::sleep;

use super::agent::{Agent, Assumed};
use super::{qmp, seed};
use crate::error::{Context, Error, Result};
use crate::model::checkpoint::Former;
use crate::model::prefix::Prefix64;
use crate::model::vm::{Nic, VmSpec};

/// How often a guest is told whose agent ends meanwhile, and how long after.
const TRIES: (u32, Duration) = (3, Duration::from_millis(500));
/// Bytes of randomness for a guest.
const ENTROPY: usize = 256;

/// What its guest is to be told.
#[derive(Debug)]
pub struct Newborn {
    spec: VmSpec,
    former: Former,
    agent: Agent,
}

impl Newborn {
    /// If this VM begins from a snapshot. From here on, its agent is nobody's.
    pub fn of(spec: &VmSpec, agent: &Agent) -> Option<Self> {
        let former = spec.restore.as_ref()?.former.clone()?;
        agent.set_strange(true);
        Some(Self { spec: spec.clone(), former, agent: agent.clone() })
    }

    /// Gives all interfaces their links, or takes them away.
    pub async fn link(&self, qmp: &qmp::Client, up: bool) -> Result<()> {
        for index in 0..self.spec.nics.len() {
            let link = json!({ "name": format!("net{index}-dev"), "up": up });
            let told = qmp.call("set_link", link).await;
            told.while_doing(|| "telling QEMU `set_link`".into())?;
        }
        Ok(())
    }

    /// Makes a guest that runs, without links, the one of this VM.
    ///
    /// # Errors
    /// When it cannot be.
    pub async fn become_itself(self, qmp: &qmp::Client) -> Result<()> {
        let mut tries = TRIES.0;
        loop {
            let identity = || identity(&self.spec, &self.former);
            let assumed = self.agent.assume(identity, async || self.link(qmp, true).await).await?;
            tries -= 1;
            match assumed {
                Assumed::Done => break,
                Assumed::Lost(error) if tries == 0 => return Err(error),
                Assumed::Lost(error) => tracing::info!("asking again: {}", error.report()),
            }
            sleep(TRIES.1).await;
        }
        self.agent.set_strange(false);
        Ok(())
    }
}

/// Who it is to be, now.
fn identity(spec: &VmSpec, former: &Former) -> Result<Identity> {
    let random = |bytes: &mut [u8]| {
        getrandom::fill(bytes).map_err(|error| Error::system("no random numbers").because(error))
    };
    let (mut entropy, mut id) = (vec![0; ENTROPY], [0; 16]);
    random(&mut entropy)?;
    random(&mut id)?;
    let own = spec.seed.as_ref().ok_or_else(|| Error::bug("a VM that is nobody"))?;
    let pairs = former.nics.iter().zip(&spec.nics);
    let interface =
        |(then, now): (&Nic, &Nic)| Interface { former: then.mac.0, mac: now.mac.0, mtu: now.mtu };
    let mut words = Vec::new();
    for (then, now) in pairs.clone() {
        words.push((then.mac.to_string(), now.mac.to_string()));
        if let (Some(then), Some(now)) = (then.ipv6, now.ipv6) {
            let text = |address| format!("{address}/{}", Prefix64::BITS);
            words.push((text(then.address), text(now.address)));
        }
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(Identity {
        hostname: own.hostname.clone(),
        domain: own.domain.clone(),
        machine_id: machine_id(id),
        interfaces: pairs.map(interface).collect(),
        words,
        keys: former.authorized_keys.iter().cloned().zip(own.authorized_keys.clone()).collect(),
        host_key: (own.host_key.openssh_private.clone(), own.host_key.openssh_public.clone()),
        dropbear_key: seed::dropbear_key(&own.host_key)?,
        entropy,
        now: u64::try_from(now.as_nanos()).unwrap_or_default(),
    })
}

/// As systemd makes them: a random UUID without dashes.
fn machine_id(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use crate::model::address::Mac;

    #[test]
    fn two_from_one_snapshot_have_nothing_in_common_but_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = testing::spec(dir.path());
        let nic = |last: u8| Nic {
            network: "net".into(),
            tap: format!("ptl3-{last}"),
            mac: Mac([0x52, 0x54, 0, 0, 0, last]),
            model: "virtio-net".into(),
            queues: 1,
            mtu: 1450,
            ipv4: None,
            ipv6: None,
            offloads: true,
        };
        spec.nics = vec![nic(4)];
        spec.seed.as_mut().unwrap().authorized_keys = vec!["ssh-ed25519 NEW".into()];
        let former = Former {
            nics: vec![Nic { mtu: 1500, ..nic(1) }],
            authorized_keys: vec!["ssh-ed25519 OLD".into()],
            seed_bytes: 0,
        };
        let one = identity(&spec, &former).unwrap();
        let two = identity(&spec, &former).unwrap();
        assert_ne!(one.machine_id, two.machine_id);
        assert_ne!(one.entropy, two.entropy);
        assert_eq!((one.machine_id.len(), &one.machine_id[12..13]), (32, "4"));
        assert_eq!(one.interfaces[0].mtu, 1450);
        assert_eq!(one.interfaces[0].former, [0x52, 0x54, 0, 0, 0, 1]);
        assert_eq!(one.words, [("52:54:00:00:00:01".into(), "52:54:00:00:00:04".into())]);
        assert_eq!(one.keys, [("ssh-ed25519 OLD".into(), "ssh-ed25519 NEW".into())]);
        assert!(one.encode().len() <= pavo_agent::MAX_IDENTITY);
    }
}
