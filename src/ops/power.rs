//! What the inventory knows of a node's controller, as the drivers of power want it; and who
//! must not be switched off.

use std::collections::BTreeSet;

use super::queue::{self, Hosts};
use crate::error::{Context, Error, Result};
use crate::model::hostlist;
use crate::model::node::Settings;
use crate::model::node::inventory::Inventory;
use crate::node::power::redfish::{self, Trust};
use crate::node::power::{Bmc, Control, ipmi, ipmitool};
use crate::store::secret::Secret;
use crate::store::secret::vault::Vault;

/// The controller of a node.
///
/// # Errors
/// When the inventory does not say what it takes, with the command that would.
pub fn bmc(inventory: &Inventory, vault: &Vault, node: &str, own: &Settings) -> Result<Bmc> {
    let settings = inventory.effective(own)?;
    let account = account(inventory, &settings)?;
    let control = control(&settings, account, vault, node)?;
    Ok(Bmc { node: node.to_owned(), control })
}

/// The name and the sealed password that a controller is asked with: what is said of the node
/// itself, and else what the password record says that it names.
fn account<'a>(
    inventory: &'a Inventory,
    settings: &'a Settings,
) -> Result<(Option<&'a str>, Option<&'a str>)> {
    let of = &settings.control;
    let own = (of.bmc_username.as_deref(), of.bmc_password.as_deref());
    let Some(name) = &of.passwd else { return Ok(own) };
    let record = inventory.passwords.get(name).ok_or_else(|| {
        Error::config(format!("there is no password record `{name}`"))
            .help(format!("make it: `pavo passwd create {name} username=… password=@-`"))
    })?;
    let (user, password) = own;
    Ok((user.or(record.username.as_deref()), password.or(record.password.as_deref())))
}

fn control(
    settings: &Settings,
    (user, password): (Option<&str>, Option<&str>),
    vault: &Vault,
    node: &str,
) -> Result<Control> {
    let missing = |path: &str| {
        Error::config(format!("`{path}` is not set"))
            .help(format!("set it: `pavo node update {node} {path}=…`"))
    };
    let driver = settings.mgt.as_deref().ok_or_else(|| missing("mgt"))?;
    let of = &settings.control;
    let address = of.bmc_address.clone().ok_or_else(|| missing("control/bmc_address"));
    if user.is_none() && password.is_none() && of.bmc_address.is_some() {
        return Err(missing("control/bmc_username").help(format!(
            "or name a password record: `pavo node update {node} control/passwd=…`"
        )));
    }
    let user = user.unwrap_or_default().to_owned();
    let password = || -> Result<Secret> {
        password.map_or_else(|| Ok(Secret::from(String::new())), |sealed| vault.unseal(sealed))
    };
    Ok(match driver {
        "ipmi" => {
            let mut settings = ipmi::Settings::new(address?, user, password()?);
            settings.port = of.bmc_port.unwrap_or(settings.port);
            Control::Ipmi(settings)
        }
        "ipmitool" => {
            let mut settings = ipmitool::Settings::new(address?, user, password()?);
            settings.port = of.bmc_port.unwrap_or(settings.port);
            Control::Ipmitool(settings)
        }
        "redfish" => {
            let mut settings = redfish::Settings::new(address?, user, password()?);
            settings.trust = trust(of.bmc_trust.as_deref())?;
            settings.port = of.bmc_port.unwrap_or(settings.port);
            settings.system.clone_from(&of.bmc_system);
            Control::Redfish(settings)
        }
        other => {
            let text = format!("the driver `{other}` is not there yet");
            return Err(Error::config(text).help(format!(
                "`redfish`, `ipmi` and `ipmitool` are: `pavo node update {node} mgt=redfish`"
            )));
        }
    })
}

/// Who is believed to be the controller: what `control/bmc_trust` says.
fn trust(said: Option<&str>) -> Result<Trust> {
    Ok(match said {
        None | Some("system") => Trust::System,
        Some("anybody") => Trust::Anybody,
        Some("plain") => Trust::Plain,
        Some(path) if path.starts_with('/') => Trust::Ca(path.into()),
        Some(text) => {
            let fingerprint = text.strip_prefix("sha256:").unwrap_or(text).parse();
            Trust::Certificate(fingerprint.while_doing(|| "reading `control/bmc_trust`".into())?)
        }
    })
}

/// Those of these nodes on which jobs of Slurm run.
///
/// # Errors
/// When Slurm does not answer.
pub async fn busy(nodes: &BTreeSet<String>) -> Result<BTreeSet<String>> {
    let running = queue::hosts(Hosts::WithJobs).await?;
    let mut busy = BTreeSet::new();
    for line in running.lines().map(str::trim).filter(|line| !line.is_empty()) {
        busy.extend(hostlist::expand(line)?.into_iter().filter(|name| nodes.contains(name)));
    }
    Ok(busy)
}
