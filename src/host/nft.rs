//! nftables, by `nft -j -f -`.
//!
//! A table is written whole, in one transaction, and deleted whole. Nothing is read
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
    Bridge,
    Inet,
}

impl Family {
    /// As `nft` writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Inet => "inet",
        }
    }
}

/// Puts the table in place of any of the same name, in one transaction.
///
/// `objects` are counters, sets, maps, chains and rules in the form of
/// libnftables-json(5), in the order in which they refer to each other, without
/// `family` and `table`, which are added here.
pub async fn replace_table(
    namespace: Option<&Path>,
    family: Family,
    name: &str,
    objects: &[Value],
) -> Result<()> {
    let table = json!({ "table": { "family": family, "name": name } });
    // Older versions of nft have no `destroy`: adding first lets deleting succeed.
    let mut batch =
        vec![json!({ "add": table }), json!({ "delete": table }), json!({ "add": table })];
    for object in objects {
        batch.push(json!({ "add": located(object, family, name)? }));
    }
    transaction(namespace, batch).await
}

/// Deletes the table.
pub async fn delete_table(namespace: Option<&Path>, family: Family, name: &str) -> Result<Outcome> {
    let delete = json!({ "delete": { "table": { "family": family, "name": name } } });
    match transaction(namespace, vec![delete]).await {
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
fn located(object: &Value, family: Family, table: &str) -> Result<Value> {
    let mut object = object.clone();
    let inner = object.as_object_mut().and_then(|outer| outer.values_mut().next());
    let Some(inner) = inner.and_then(Value::as_object_mut) else {
        return Err(Error::bug(format!("`{object}` is no nftables object")));
    };
    inner.insert("family".into(), family.as_str().into());
    inner.insert("table".into(), table.into());
    Ok(object)
}
