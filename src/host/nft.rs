//! nftables: tables are written by `nft -j -f -`, and deleted without any program.
//!
//! Tables are written whole, in one transaction, and deleted whole. Nothing is read
//! back: tables of others need not be understood, and are never touched.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::cmd::{self, Command};
use super::nfnetlink;
use super::step::Outcome;
use crate::error::{Error, Result};

/// How long one transaction may take.
const LIMIT: Duration = Duration::from_secs(30);

/// The error number has no other way out of nft; its locale is ours.
const EXISTS: &str = "File exists";

/// Which packets a table sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    Arp,
    Bridge,
    Inet,
    Ip,
}

impl Family {
    /// As `nft` writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Arp => "arp",
            Self::Bridge => "bridge",
            Self::Inet => "inet",
            Self::Ip => "ip",
        }
    }

    /// As the kernel does.
    pub(super) fn number(self) -> u8 {
        match self {
            // NFPROTO_INET, which only nftables has.
            Self::Inet => 1,
            Self::Ip => 2,
            Self::Arp => 3,
            Self::Bridge => 7,
        }
    }
}

/// A whole table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    pub family: Family,
    pub name: String,
    /// Counters, sets, maps, chains and rules in the form of libnftables-json(5), in
    /// the order in which they refer to each other, without `family` and `table`,
    /// which are added when they are used.
    pub objects: Vec<Value>,
}

impl Table {
    fn named(&self) -> Value {
        json!({ "table": { "family": self.family, "name": self.name } })
    }
}

/// Puts the tables in place of any of the same names, in one transaction.
pub async fn replace(namespace: Option<&Path>, tables: &[Table]) -> Result<()> {
    // Nearly always they are new. Where the kernel has nothing to take away, nft need not
    // wait, at its end, until all CPUs have let go of that: some 15 ms.
    match put(namespace, tables, How::New).await {
        Err(error) if error.report().contains(EXISTS) => put(namespace, tables, How::Instead).await,
        done => done,
    }
}

/// What becomes of a table of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// It is in the way.
    New,
    Instead,
}

async fn put(namespace: Option<&Path>, tables: &[Table], how: How) -> Result<()> {
    let mut batch = Vec::new();
    for table in tables {
        match how {
            How::New => batch.push(json!({ "create": table.named() })),
            // Older versions of nft have no `destroy`: adding first lets deleting succeed.
            How::Instead => {
                batch.extend(["add", "delete", "add"].map(|verb| json!({ verb: table.named() })))
            }
        }
        for object in &table.objects {
            batch.push(json!({ "add": located(object, table)? }));
        }
    }
    transaction(namespace, batch).await
}

/// Deletes those of the tables that are there, in one transaction.
pub async fn delete(namespace: Option<&Path>, tables: &[Table]) -> Result<Outcome> {
    let names = tables.iter().map(|table| (table.family, table.name.clone())).collect();
    nfnetlink::delete_tables(namespace, names).await
}

async fn transaction(namespace: Option<&Path>, batch: Vec<Value>) -> Result<()> {
    let input = serde_json::to_vec(&json!({ "nftables": batch })).expect("a value is JSON");
    let args = ["-j", "-f", "-"];
    let nft = Command { program: "nft", args: &args, input: &input, namespace, limit: LIMIT };
    cmd::run(&nft).await.map(drop)
}

/// The object, with the table it belongs to.
fn located(object: &Value, table: &Table) -> Result<Value> {
    let mut object = object.clone();
    let inner = object.as_object_mut().and_then(|outer| outer.values_mut().next());
    let Some(inner) = inner.and_then(Value::as_object_mut) else {
        return Err(Error::bug(format!("`{object}` is no nftables object")));
    };
    inner.insert("family".into(), table.family.as_str().into());
    inner.insert("table".into(), table.name.as_str().into());
    Ok(object)
}
