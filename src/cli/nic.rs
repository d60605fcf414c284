//! `pavo nic`: interfaces of nodes, one by one.

use clap::{Args, Subcommand};
use serde_json::Value;

use super::App;
use super::inventory;
use super::out::OutputArgs;
use super::records::How;
use crate::error::{Error, Result};
use crate::model::node::Tree;
use crate::model::node::kinds::Kind;
use crate::model::node::request::{Noun, Outcome, Request, Verb as Change};

/// Keep the interfaces of nodes
///
/// An interface is called by its node and its name, `node1/eth0`, several by a set of nodes:
/// `node[1-4]/eth0`. It is a part of its node: `pavo node update node1 nics/eth0/ip=10.0.0.1`
/// is the same.
#[derive(Debug, Args)]
pub struct Nic {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    List(List),
    Show(Show),
    Create(Create),
    Update(Update),
    Delete(Delete),
}

/// List interfaces
#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    format: OutputArgs,

    /// With these settings: `mac,ip,node`
    #[arg(short = 'i', long, value_name = "NAMES", value_delimiter = ',')]
    fields: Vec<String>,

    /// The one with this MAC address
    #[arg(long, value_name = "ADDRESS")]
    mac: Option<String>,

    /// Those of these nodes; without, of all
    #[arg(value_name = "NODES")]
    nodes: Option<String>,
}

/// Show interfaces
#[derive(Debug, Args)]
struct Show {
    #[command(flatten)]
    format: OutputArgs,

    /// Only these settings: `mac,ip,node`
    #[arg(short = 'i', long, value_name = "NAMES", value_delimiter = ',')]
    fields: Vec<String>,

    /// The one with this MAC address
    #[arg(long, value_name = "ADDRESS", required_unless_present = "nic")]
    mac: Option<String>,

    /// Which: `node1/eth0`
    #[arg(value_name = "NODES/NAME")]
    nic: Option<String>,
}

/// Add an interface
///
/// `node=NODE mac=ADDRESS`, and perhaps `name=` (the first free of eth0, eth1, …), `ip=`,
/// `netmask=`, `network=`, `primary=`, `extra=`.
#[derive(Debug, Args)]
struct Create {
    /// Its settings
    #[arg(value_name = "NAME=VALUE", required = true)]
    settings: Vec<String>,

    #[command(flatten)]
    how: How,
}

/// Change interfaces
#[derive(Debug, Args)]
struct Update {
    /// Which: `node1/eth0`, `node[1-4]/eth0`
    #[arg(value_name = "NODES/NAME")]
    nic: String,

    /// The changes; `name=` removes
    #[arg(value_name = "NAME=VALUE", required = true)]
    settings: Vec<String>,

    #[command(flatten)]
    how: How,
}

/// Remove interfaces
#[derive(Debug, Args)]
struct Delete {
    /// Which: `node1/eth0`, `node[1-4]/eth0`
    #[arg(value_name = "NODES/NAME")]
    nic: String,

    #[command(flatten)]
    how: How,
}

impl Nic {
    pub fn run(self, app: &App) -> Result<u8> {
        match self.verb {
            Verb::List(verb) => verb.run(app),
            Verb::Show(verb) => verb.run(app),
            Verb::Create(verb) => verb.run(app),
            Verb::Update(verb) => verb.run(app),
            Verb::Delete(verb) => verb.run(app),
        }
    }
}

/// The nodes and the name of an interface.
fn parts(nic: &str) -> Result<(&str, &str)> {
    nic.rsplit_once('/').filter(|(nodes, name)| !nodes.is_empty() && !name.is_empty()).ok_or_else(
        || {
            Error::usage(format!("`{}` is no interface", nic.escape_debug()))
                .help("as in `node1/eth0`; `pavo nic list` has them all")
        },
    )
}

/// The interfaces of nodes, each with its node's name as `node`.
fn nics(app: &App, nodes: Option<&str>) -> Result<inventory::Rows> {
    let only = ["nics".to_owned()];
    let (rows, missing) = app.block_on(inventory::rows(app, Noun::Node, nodes, &only, true))?;
    let mut nics = Vec::new();
    for (node, mut row) in rows {
        let Some(Value::Object(of)) = row.remove("nics") else { continue };
        for (name, nic) in of {
            let mut tree = nic.as_object().cloned().unwrap_or_default();
            tree.insert("node".into(), node.clone().into());
            nics.push((format!("{node}/{name}"), tree));
        }
    }
    Ok((nics, missing))
}

/// Those with a MAC address, if one is wanted; an error if there is none.
fn with_mac(nics: &mut Vec<(String, Tree)>, mac: Option<&str>) -> Result<()> {
    let Some(mac) = mac else { return Ok(()) };
    let kept = Kind::Mac.keep(mac.into()).map_err(Error::usage)?;
    nics.retain(|(_, nic)| nic.get("mac") == Some(&kept));
    match nics.is_empty() {
        true => Err(Error::not_found(format!("no interface has the MAC address {mac}"))),
        false => Ok(()),
    }
}

/// Only the settings that are wanted.
fn select(nics: &mut [(String, Tree)], fields: &[String]) {
    if !fields.is_empty() {
        nics.iter_mut().for_each(|(_, nic)| nic.retain(|key, _| fields.contains(key)));
    }
}

impl List {
    fn run(self, app: &App) -> Result<u8> {
        let (mut nics, missing) = nics(app, self.nodes.as_deref())?;
        with_mac(&mut nics, self.mac.as_deref())?;
        if self.fields.is_empty() && self.format.output.is_none() {
            let text = |(name, nic): &(String, Tree)| {
                let mac = nic.get("mac").and_then(Value::as_str).unwrap_or("-");
                format!("{name} (nic) {mac} (mac)\n")
            };
            app.out.data(&nics.iter().map(text).collect::<String>())?;
        } else {
            select(&mut nics, &self.fields);
            inventory::print_fields(app, self.format, &self.fields, nics)?;
        }
        Ok(inventory::complain(app, &missing))
    }
}

impl Show {
    fn run(self, app: &App) -> Result<u8> {
        let (nodes, name) = match &self.nic {
            Some(nic) => parts(nic).map(|(nodes, name)| (Some(nodes), Some(name)))?,
            None => (None, None),
        };
        let (all, mut missing) = nics(app, nodes)?;
        let mut found = all;
        if let Some(name) = name {
            let (there, lacking) = having(app, nodes.unwrap_or("all"), name)?;
            found.retain(|(id, _)| there.iter().any(|node| *id == format!("{node}/{name}")));
            missing = lacking;
        }
        with_mac(&mut found, self.mac.as_deref())?;
        select(&mut found, &self.fields);
        inventory::print_rows(app, self.format, "nic", found)?;
        Ok(inventory::complain(app, &missing))
    }
}

/// The nodes that have an interface of this name, and those that do not, or are not there.
fn having(app: &App, nodes: &str, name: &str) -> Result<(Vec<String>, Vec<Outcome>)> {
    let field = [format!("nics/{name}")];
    let (rows, missing) =
        app.block_on(inventory::rows(app, Noun::Node, Some(nodes), &field, true))?;
    let (mut there, mut lacking) = (Vec::new(), Vec::new());
    for (node, row) in rows {
        match row.is_empty() {
            true => lacking.push(Outcome::missing(format!("{node}/{name}"))),
            false => there.push(node),
        }
    }
    let absent = missing.into_iter().map(|it| Outcome::missing(format!("{}/{name}", it.name)));
    lacking.extend(absent);
    Ok((there, lacking))
}

/// Changes an interface of nodes, and says so of it.
fn change(
    app: &App,
    how: How,
    (nodes, mut others): (Vec<String>, Vec<Outcome>),
    name: &str,
    edits: Vec<String>,
    text: &str,
) -> Result<u8> {
    let mut outcomes = Vec::new();
    if !nodes.is_empty() {
        let verb = Change::Update { names: nodes.join(","), edits };
        let request = Request { noun: Noun::Node, verb, dry_run: how.dry_run };
        for outcome in app.block_on(inventory::apply(app, request))? {
            let id = format!("{}/{name}", outcome.name);
            outcomes.push(match outcome.ok {
                true => Outcome::ok(id, text),
                false => Outcome { name: id, ..outcome },
            });
        }
    }
    outcomes.append(&mut others);
    inventory::report(app, how.format, &outcomes, how.dry_run)
}

impl Create {
    fn run(self, app: &App) -> Result<u8> {
        let (mut node, mut name, mut mac, mut edits) = (None, None, false, Vec::new());
        for setting in &self.settings {
            match setting.split_once('=') {
                Some(("node", value)) => node = Some(value.to_owned()),
                Some(("name", value)) => name = Some(value.to_owned()),
                // The older system's; ours have none.
                Some(("uuid", _)) => {}
                pair => {
                    mac |= pair.is_some_and(|(key, value)| key == "mac" && !value.is_empty());
                    edits.push(setting.clone());
                }
            }
        }
        let Some(node) = node.filter(|_| mac) else {
            return Err(Error::usage("an interface has a node and a MAC address")
                .help("`pavo nic create node=node1 mac=42:87:0a:05:00:01 ip=10.0.0.1`"));
        };
        let (rows, missing) = nics(app, Some(&node))?;
        let taken = |name: &str| rows.iter().any(|(id, _)| *id == format!("{node}/{name}"));
        let free = || (0..).map(|index| format!("eth{index}")).find(|name| !taken(name));
        let name = name.or_else(free).unwrap_or_default();
        let edits = edits.iter().map(|edit| format!("nics/{name}/{edit}")).collect();
        let absent: Vec<Outcome> =
            missing.iter().map(|it| Outcome::missing(format!("{}/{name}", it.name))).collect();
        let targets = match (absent.is_empty(), taken(&name)) {
            (false, _) => (Vec::new(), absent),
            (_, true) => {
                let id = format!("{node}/{name}");
                (Vec::new(), vec![Outcome::failed(id, "Error: duplicate name")])
            }
            _ => (vec![node], Vec::new()),
        };
        change(app, self.how, targets, &name, edits, "ok")
    }
}

impl Update {
    fn run(self, app: &App) -> Result<u8> {
        let (nodes, name) = parts(&self.nic)?;
        let edits = self.settings.iter().map(|edit| format!("nics/{name}/{edit}")).collect();
        change(app, self.how, having(app, nodes, name)?, name, edits, "updated")
    }
}

impl Delete {
    fn run(self, app: &App) -> Result<u8> {
        let (nodes, name) = parts(&self.nic)?;
        let edits = vec![format!("nics/{name}=")];
        change(app, self.how, having(app, nodes, name)?, name, edits, "deleted")
    }
}
