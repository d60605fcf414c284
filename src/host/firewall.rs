//! Firewalls of others that drop what guests send. Read only: they are the site's.
//!
//! Every base chain of a hook judges a packet, and one that drops wins over all that
//! accept. So a policy of `drop` on forwarded packets, as Docker and firewalls set it,
//! cuts clusters off, and only the site can let them through there. Rules are not read:
//! who has accepted them in its own way is warned in vain.

use std::fs;
use std::time::Duration;

use serde::Deserialize;

use super::cmd::{self, Command};
use crate::error::{Context, Result};

/// How long a list may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Clusters' ways out, as nft and iptables write a group of links.
const UPLINKS: (&str, &str) = ("pv*", "pv+");
/// Clusters' bridges.
const BRIDGES: &str = "pb*";

/// A chain that drops forwarded packets unless a rule in it accepts them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForwardDrop {
    Nft {
        family: String,
        table: String,
        chain: String,
    },
    /// The older iptables, which nft does not show.
    Legacy,
}

impl ForwardDrop {
    /// Which it is, for people.
    pub fn name(&self) -> String {
        match self {
            Self::Nft { family, table, chain } => format!("nft chain `{family} {table} {chain}`"),
            Self::Legacy => "chain FORWARD of iptables-legacy".into(),
        }
    }

    /// The commands by which the site lets clusters through.
    pub fn rules(&self) -> Vec<String> {
        let (nft, iptables) = UPLINKS;
        let by_iptables = |program: &str| {
            vec![
                format!("{program} -I FORWARD -i {iptables} -j ACCEPT"),
                format!(
                    "{program} -I FORWARD -o {iptables} -m conntrack --ctstate \
                     ESTABLISHED,RELATED -j ACCEPT"
                ),
            ]
        };
        match self {
            Self::Legacy => by_iptables("iptables-legacy"),
            // This one is made, and shown, by iptables.
            Self::Nft { family, table, chain }
                if (family == "ip" && table == "filter" && chain == "FORWARD") =>
            {
                by_iptables("iptables")
            }
            Self::Nft { family, table, chain } if family == "bridge" => {
                vec![format!(
                    "nft insert rule bridge {table} {chain} ibrname '\"{BRIDGES}\"' accept"
                )]
            }
            Self::Nft { family, table, chain } => {
                let insert = format!("nft insert rule {family} {table} {chain}");
                vec![
                    format!("{insert} iifname '\"{nft}\"' accept"),
                    format!("{insert} oifname '\"{nft}\"' ct state established,related accept"),
                ]
            }
        }
    }
}

/// The chains of others that drop forwarded IPv4 packets, or frames between ports of a
/// bridge. Root only.
pub async fn forward_drops() -> Result<Vec<ForwardDrop>> {
    let nft = list("nft", &["-j", "list", "chains"]).await?;
    let mut found = in_nft(&nft)?;
    // Asking iptables-legacy would load the very module whose absence says that there is
    // nothing to ask.
    let tables = fs::read_to_string("/proc/net/ip_tables_names").unwrap_or_default();
    if tables.lines().any(|table| table == "filter") {
        // Without the program nobody here has set a policy.
        let rules = list("iptables-legacy", &["-w", "-S", "FORWARD"]).await.unwrap_or_default();
        if rules.lines().any(|line| line.trim() == "-P FORWARD DROP") {
            found.push(ForwardDrop::Legacy);
        }
    }
    Ok(found)
}

async fn list(program: &str, args: &[&str]) -> Result<String> {
    let command = Command { program, args, input: b"", namespace: None, limit: LIMIT };
    cmd::run(&command).await.map(|text| String::from_utf8_lossy(&text).into_owned())
}

#[derive(Deserialize)]
struct Listed {
    nftables: Vec<Object>,
}

#[derive(Deserialize)]
struct Object {
    chain: Option<Chain>,
}

#[derive(Deserialize)]
struct Chain {
    family: String,
    table: String,
    name: String,
    hook: Option<String>,
    policy: Option<String>,
}

fn in_nft(text: &str) -> Result<Vec<ForwardDrop>> {
    let listed: Listed = serde_json::from_str(text).while_doing(|| "reading nft's list".into())?;
    let chains = listed.nftables.into_iter().filter_map(|object| object.chain);
    let drops = chains.filter(|chain| {
        let is = |field: &Option<String>, word| field.as_deref() == Some(word);
        is(&chain.hook, "forward")
            && is(&chain.policy, "drop")
            && ["ip", "inet", "bridge"].contains(&chain.family.as_str())
            && !chain.table.starts_with("pavo_")
    });
    let named =
        |Chain { family, table, name: chain, .. }| ForwardDrop::Nft { family, table, chain };
    Ok(drops.map(named).collect())
}

/// Whether the kernel shows frames on bridges to the host's IP rules, too.
pub fn bridges_call_iptables() -> bool {
    let file = "/proc/sys/net/bridge/bridge-nf-call-iptables";
    fs::read_to_string(file).is_ok_and(|text| text.trim() == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_others_base_chains_that_drop_forwarded_packets_are_found() {
        let chain = |family: &str, table: &str, name: &str, hook: &str, policy: &str| {
            serde_json::json!({ "chain": { "family": family, "table": table, "name": name,
                "handle": 1, "type": "filter", "hook": hook, "prio": 0, "policy": policy } })
        };
        let listed = serde_json::json!({ "nftables": [
            { "metainfo": { "version": "1.0.6" } },
            chain("ip", "filter", "FORWARD", "forward", "drop"),
            chain("inet", "site", "through", "forward", "drop"),
            chain("bridge", "site", "frames", "forward", "drop"),
            chain("ip6", "filter", "FORWARD", "forward", "drop"),
            chain("inet", "site", "in", "input", "drop"),
            chain("inet", "open", "fwd", "forward", "accept"),
            chain("ip", "pavo_42", "forward", "forward", "drop"),
            { "chain": { "family": "ip", "table": "filter", "name": "DOCKER", "handle": 2 } },
        ] });
        let found = in_nft(&listed.to_string()).unwrap();
        let names: Vec<String> = found.iter().map(ForwardDrop::name).collect();
        assert_eq!(
            names,
            [
                "nft chain `ip filter FORWARD`",
                "nft chain `inet site through`",
                "nft chain `bridge site frames`"
            ]
        );
        assert!(found[0].rules()[0].starts_with("iptables -I FORWARD -i pv+"));
        assert!(found[1].rules()[0].starts_with("nft insert rule inet site through iifname"));
    }
}
