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
    let control = control(&settings, vault, node)?;
    Ok(Bmc { node: node.to_owned(), control })
}

fn control(settings: &Settings, vault: &Vault, node: &str) -> Result<Control> {
    let missing = |path: &str| {
        Error::config(format!("`{path}` is not set"))
            .help(format!("set it: `pavo node update {node} {path}=…`"))
    };
    let driver = settings.mgt.as_deref().ok_or_else(|| missing("mgt"))?;
    let of = &settings.control;
    let address = of.bmc_address.clone().ok_or_else(|| missing("control/bmc_address"));
    let user = of.bmc_username.clone().unwrap_or_default();
    let password = || -> Result<Secret> {
        let sealed = of.bmc_password.as_deref();
        sealed.map_or_else(|| Ok(Secret::from(String::new())), |sealed| vault.unseal(sealed))
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
