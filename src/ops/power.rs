//! What the inventory knows of a node's controller, as the drivers of power want it; and who
//! must not be switched off.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use super::queue;
use crate::error::{Context, Error, Result};
use crate::model::node::inventory::Inventory;
use crate::model::node::{self, Packed, Settings};
use crate::node::power::fanout::{Checked, Guard};
use crate::node::power::ipmi::{Privilege, Suite, SuiteChoice};
use crate::node::power::redfish::{self, Trust};
use crate::node::power::{Bmc, Control, exec, ipmi, ipmitool, qmp, virsh};
use crate::store::secret::Secret;
use crate::store::secret::vault::Vault;

/// The controller of a node.
///
/// # Errors
/// When the inventory does not say what it takes, with the command that would.
pub fn bmc(inventory: &Inventory, vault: &Vault, node: &str, own: &Packed) -> Result<Bmc> {
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
    let user = || {
        user.map(str::to_owned).ok_or_else(|| {
            missing("control/bmc_username").help(format!(
                "or name a password record: `pavo node update {node} control/passwd=…`"
            ))
        })
    };
    let secret = || -> Result<Secret> {
        let unset = || {
            missing("control/bmc_password").help(format!(
                "give it where nobody reads along: `pavo node update {node} control/bmc_password=@-`"
            ))
        };
        vault.unseal(password.ok_or_else(unset)?)
    };
    Ok(match driver {
        "ipmi" => {
            let mut settings = ipmi::Settings::new(address?, user()?, secret()?);
            settings.key = of.bmc_key.as_deref().map(|key| vault.unseal(key)).transpose()?;
            set_ipmi(&mut settings, of);
            Control::Ipmi(settings)
        }
        "ipmitool" => {
            let mut settings = ipmitool::Settings::new(address?, user()?, secret()?);
            set_ipmitool(&mut settings, of);
            Control::Ipmitool(settings)
        }
        "redfish" => {
            let mut settings = redfish::Settings::new(address?, user()?, secret()?);
            set_redfish(&mut settings, of)?;
            Control::Redfish(settings)
        }
        "qmp" => {
            let socket = of.qmp_socket.clone().ok_or_else(|| missing("control/qmp_socket"))?;
            Control::Qmp(qemu(socket, of))
        }
        "virsh" | "kvm" => Control::Virsh(libvirt(of, node)),
        "exec" => {
            let words = of.exec.as_deref().ok_or_else(|| missing("control/exec"))?;
            let password = password.map(|it| vault.unseal(it)).transpose()?;
            Control::Exec(site_program(words, password, node)?)
        }
        other => return Err(no_driver(other, node)),
    })
}

fn no_driver(name: &str, node: &str) -> Error {
    Error::config(format!("the driver `{name}` is not there yet")).help(format!(
        "`redfish`, `ipmi`, `ipmitool`, `qmp`, `virsh` and `exec` are: \
         `pavo node update {node} mgt=redfish`"
    ))
}

fn set_ipmi(settings: &mut ipmi::Settings, of: &node::Control) {
    settings.port = of.bmc_port.unwrap_or(settings.port);
    settings.efi = of.bmc_efi.unwrap_or_default();
    settings.suite = match of.bmc_cipher.as_deref() {
        Some("3") => SuiteChoice::Only(Suite::Three),
        Some(_) => SuiteChoice::Only(Suite::Seventeen),
        None => SuiteChoice::Best,
    };
    settings.privilege = match of.bmc_privilege.as_deref() {
        Some("user") => Privilege::User,
        Some("administrator") => Privilege::Administrator,
        _ => Privilege::Operator,
    };
}

fn set_ipmitool(settings: &mut ipmitool::Settings, of: &node::Control) {
    settings.port = of.bmc_port.unwrap_or(settings.port);
    settings.efi = of.bmc_efi.unwrap_or_default();
    let cipher = of.bmc_cipher.clone().map(|suite| ["-C".to_owned(), suite]);
    settings.options = cipher.into_iter().flatten().collect();
}

fn set_redfish(settings: &mut redfish::Settings, of: &node::Control) -> Result<()> {
    settings.trust = trust(of.bmc_trust.as_deref())?;
    settings.port = of.bmc_port.unwrap_or(settings.port);
    settings.system.clone_from(&of.bmc_system);
    Ok(())
}

fn qemu(socket: String, of: &node::Control) -> qmp::Settings {
    let (net, disk, cdrom) = (of.qmp_net.clone(), of.qmp_disk.clone(), of.qmp_cdrom.clone());
    qmp::Settings { socket: socket.into(), net, disk, cdrom }
}

fn libvirt(of: &node::Control, node: &str) -> virsh::Settings {
    let host = of.ssh_address.clone().map(|address| virsh::Host {
        user: of.ssh_username.clone(),
        address,
        port: of.ssh_port,
        key: of.ssh_key_filename.clone(),
    });
    let uri = virsh::uri(host.as_ref());
    virsh::Settings { program: "virsh".into(), uri, domain: node.to_owned() }
}

fn site_program(words: &str, password: Option<Secret>, node: &str) -> Result<exec::Settings> {
    let mut words = words.split_ascii_whitespace().map(str::to_owned);
    let program = words.next().filter(|program| program.starts_with('/')).ok_or_else(|| {
        Error::config("`control/exec` is no path of a program")
            .help("write it from the root on, `/usr/local/sbin/relay --board 3`")
    })?;
    let (arguments, node) = (words.collect(), node.to_owned());
    Ok(exec::Settings { program, arguments, node, password })
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

/// How old an answer of Slurm may be when a node is touched.
const FRESH: Duration = Duration::from_secs(5);

/// Who keeps nodes on which something runs from being switched.
#[derive(Debug)]
pub enum Jobs {
    /// Slurm is asked before the first node, and again whenever one starts later than
    /// [`FRESH`]: when, and which were taken then.
    Slurm(Mutex<(Instant, BTreeSet<String>)>),
    /// Hosts of one's own clusters, where there is no Slurm.
    Clusters(BTreeSet<String>),
}

impl Jobs {
    /// Asks Slurm.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn of_slurm() -> Result<Self> {
        Ok(Self::Slurm(Mutex::new(with_jobs().await?)))
    }

    pub fn of_clusters(hosts: impl IntoIterator<Item = String>) -> Self {
        Self::Clusters(hosts.into_iter().map(|host| bare(&host).to_owned()).collect())
    }

    /// What runs on the node.
    async fn on(&self, node: &str) -> Result<Option<&'static str>> {
        Ok(match self {
            Self::Slurm(known) => {
                let mut known = known.lock().await;
                if known.0.elapsed() >= FRESH {
                    *known = with_jobs().await?;
                }
                known.1.contains(bare(node)).then_some("a job")
            }
            Self::Clusters(hosts) => hosts.contains(bare(node)).then_some("a cluster of yours"),
        })
    }
}

async fn with_jobs() -> Result<(Instant, BTreeSet<String>)> {
    let asked = Instant::now();
    let busy = queue::hosts_with_jobs().await?;
    Ok((asked, busy.iter().map(|name| bare(name).to_owned()).collect()))
}

impl Guard for Jobs {
    fn check<'a>(&'a self, node: &'a str) -> Checked<'a> {
        const ALL_THE_SAME: &str = "all the same: `--force`";
        Box::pin(async move {
            match self.on(node).await {
                Ok(None) => Ok(()),
                Ok(Some(what)) => {
                    Err(Error::system(format!("{what} runs there")).help(ALL_THE_SAME))
                }
                Err(error) => Err(Error::system("whether a job runs there is not known")
                    .because(error)
                    .help(ALL_THE_SAME)),
            }
        })
    }
}

/// A host's name without its domain, which Slurm may know and the inventory not, or the other
/// way round.
fn bare(name: &str) -> &str {
    match name.parse::<IpAddr>() {
        Ok(_) => name,
        Err(_) => name.split('.').next().unwrap_or(name),
    }
}
