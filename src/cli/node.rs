//! `pavo node`

use clap::{Args, Subcommand};

use super::App;
use super::records::{self, Delete, Export, How, Import, List, Show, Update};
use crate::error::Result;
use crate::model::node::request::Noun;
use crate::model::node::schema;

/// Keep an inventory of the machines below the clusters
///
/// Nodes are named by sets: `node[1-25]`, `@rack1!node7`, `arch=x86_64`, `all`; see `pavo
/// nodeset`. For now the inventory is yours and on this machine, beside what runs here.
#[derive(Debug, Args)]
pub struct Node {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(Create),
    Import(Import),
    Export(Export),
    List(List),
    Show(Show),
    Update(Update),
    Delete(Delete),
}

/// Add nodes
///
/// `pavo node create node[1-250] arch=x86_64 control/bmc_address={node}-bmc
/// nics/eth0/ip=10.1.0.{n}` gives each its own: `n` is the last number in a node's name,
/// `{n%250+1}` a sum, `{n:03d}` with zeros in front. If one cannot be, none is added.
#[derive(Debug, Args)]
struct Create {
    /// How its power is controlled, as `mgt=…`
    #[arg(long, value_name = "DRIVER")]
    mgt: Option<String>,

    /// How it boots from the network, as `netboot=…`
    #[arg(long, value_name = "METHOD")]
    netboot: Option<String>,

    /// Its processor, as `arch=…`
    #[arg(long)]
    arch: Option<String>,

    /// Its type, as `type=…`
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,

    /// Settings of its control, `bmc_address=…,bmc_username=…`
    #[arg(short, long, value_name = "KEY=VALUE,…")]
    control: Vec<String>,

    /// An interface, `mac=…,ip=…,name=eth0`; more than once for several
    #[arg(short = 'i', long, value_name = "KEY=VALUE,…")]
    nic: Vec<String>,

    /// The nodes
    #[arg(value_name = "NODES")]
    nodes: String,

    /// Settings, `path=value`
    #[arg(value_name = "PATH=VALUE")]
    edits: Vec<String>,

    #[command(flatten)]
    how: How,
}

impl Node {
    pub fn run(self, app: &App) -> Result<u8> {
        match self.verb {
            Verb::Create(verb) => verb.run(app),
            Verb::Import(verb) => verb.run(app, Noun::Node),
            Verb::Export(verb) => verb.run(app, Noun::Node),
            Verb::List(verb) => verb.run(app, Noun::Node),
            Verb::Show(verb) => verb.run(app, Noun::Node),
            Verb::Update(verb) => verb.run(app, Noun::Node),
            Verb::Delete(verb) => verb.run(app, Noun::Node),
        }
    }
}

impl Create {
    fn run(self, app: &App) -> Result<u8> {
        let mut edits = Vec::new();
        for (path, value) in [
            ("mgt", &self.mgt),
            ("netboot", &self.netboot),
            ("arch", &self.arch),
            ("type", &self.kind),
        ] {
            edits.extend(value.as_ref().map(|value| format!("{path}={value}")));
        }
        for control in &self.control {
            edits.extend(pairs(control).iter().map(|pair| format!("control/{pair}")));
        }
        for (index, nic) in self.nic.iter().enumerate() {
            let pairs: Vec<&str> = nic.split(',').collect();
            let name = pairs.iter().find_map(|pair| pair.strip_prefix("name="));
            let name = name.map_or_else(|| format!("eth{index}"), str::to_owned);
            let others = pairs.iter().filter(|pair| !pair.starts_with("name="));
            edits.extend(others.map(|pair| format!("nics/{name}/{pair}")));
        }
        edits.extend(self.edits);
        records::create(app, Noun::Node, self.nodes, edits, self.how)
    }
}

/// Settings of a control with commas between them. A password may have commas in it: what
/// follows one and is no setting belongs to what is before.
fn pairs(text: &str) -> Vec<String> {
    let mut pairs: Vec<String> = Vec::new();
    for part in text.split(',') {
        let key = part.split_once('=').map(|(key, _)| key);
        let known = |key: &&str| schema::find(Noun::Node, &["control", key]).is_ok();
        match pairs.last_mut() {
            Some(last) if key.filter(known).is_none() => {
                last.push(',');
                last.push_str(part);
            }
            _ => pairs.push(part.to_owned()),
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_may_have_commas() {
        assert_eq!(
            pairs("bmc_address=a,bmc_password=x,y=z,,bmc_username=b"),
            ["bmc_address=a", "bmc_password=x,y=z,", "bmc_username=b"]
        );
    }
}
