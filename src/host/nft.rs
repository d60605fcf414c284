//! nftables, by `nft -j -f -`.
//!
//! Tables are written whole, in one transaction, and deleted whole. Nothing is read
//! back: tables of others need not be understood, and are never touched.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::cmd::{self, Command};
use super::step::Outcome;
use crate::error::{Error, Result};

/// How long one transaction may take.
const LIMIT: Duration = Duration::from_secs(30);

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
    let mut batch = Vec::new();
    for table in tables {
        // Older versions of nft have no `destroy`: adding first lets deleting succeed.
        batch.push(json!({ "add": table.named() }));
        batch.push(json!({ "delete": table.named() }));
        batch.push(json!({ "add": table.named() }));
        for object in &table.objects {
            batch.push(json!({ "add": located(object, table)? }));
        }
    }
    transaction(namespace, batch).await
}

/// Deletes the tables, in one transaction if all are there.
pub async fn delete(namespace: Option<&Path>, tables: &[Table]) -> Result<Outcome> {
    if delete_all(namespace, tables).await? == Outcome::Changed {
        return Ok(Outcome::Changed);
    }
    let mut outcome = Outcome::AlreadySo;
    for table in tables.iter().filter(|_| tables.len() > 1) {
        if delete_all(namespace, std::slice::from_ref(table)).await? == Outcome::Changed {
            outcome = Outcome::Changed;
        }
    }
    Ok(outcome)
}

/// Deletes all these tables, or none if one is missing.
async fn delete_all(namespace: Option<&Path>, tables: &[Table]) -> Result<Outcome> {
    let batch = tables.iter().map(|table| json!({ "delete": table.named() })).collect();
    match transaction(namespace, batch).await {
        Ok(()) => Ok(Outcome::Changed),
        // The error number has no other way out of nft; its locale is ours.
        Err(error) if error.report().contains("No such file or directory") => {
            Ok(Outcome::AlreadySo)
        }
        Err(error) => Err(error),
    }
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
