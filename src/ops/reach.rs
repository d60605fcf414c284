//! Where commands reach the process of a VM: on this host, or on another.

use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;

use super::jobs;
use crate::error::{Context, Error, Result};
use crate::model::job::{JobRecord, VmRecord, VmState, VmStatus};
use crate::model::vm::HostKey;
use crate::store::{Store, get_json, keys};
use crate::vm::channel::{Caller, Identity};
use crate::vm::console::{self, LOG};
use crate::vm::control::Client;

/// The file, in the job's directory, that makes its reader a member of the cluster.
pub const IDENTITY: &str = "identity.json";

/// The most bytes of it.
const MAX_IDENTITY: u64 = 16 << 10;
/// How long a process on another host may take until it is connected.
const CONNECT: Duration = Duration::from_secs(10);

/// Where the process of a VM is reached.
#[derive(Debug)]
pub enum Reach {
    /// On this host, by the socket in this directory.
    Here(PathBuf),
    /// On another, by the cluster's secure channel.
    Remote(SocketAddr, Caller),
}

/// What opens the VMs of one cluster on other hosts. Found and prepared once, with the first
/// that needs it, it serves for all.
#[derive(Debug, Default)]
pub struct Pass {
    caller: OnceCell<Caller>,
    /// How the VMs were. An end is for good: of that it need not be the newest.
    states: OnceCell<Vec<Option<VmStatus>>>,
}

impl Pass {
    /// Where the process of a VM of a running job is reached.
    ///
    /// # Errors
    /// When the VM has ended, or is on another host that no way leads to.
    pub async fn reach(
        &self,
        store: Option<&dyn Store>,
        job: &JobRecord,
        rank: u32,
    ) -> Result<Reach> {
        let vm = job.vms.iter().find(|vm| vm.rank == rank);
        let vm = vm.ok_or_else(|| Error::not_found(format!("the cluster has no vm{rank}")))?;
        if let Some(store) = store {
            let states = self.states.get_or_try_init(|| jobs::states(store, job)).await?;
            match states.get(rank as usize) {
                Some(Some(status)) if status.state.is_over() => return Err(ended(rank, status)),
                _ => {}
            }
        }
        self.reach_vm(store, job, vm).await
    }

    /// The same of a VM that is known better than by the job's record.
    ///
    /// # Errors
    /// As [`Self::reach`].
    pub async fn reach_vm(
        &self,
        store: Option<&dyn Store>,
        job: &JobRecord,
        vm: &VmRecord,
    ) -> Result<Reach> {
        let dir = job.dir.join(format!("vm{}", vm.rank));
        match vm.control {
            Some(address) if !(is_this_host(&vm.host) && is_ours(&dir)) => {
                let caller = async { Caller::new(&identity(store, job).await?) };
                Ok(Reach::Remote(address, self.caller.get_or_try_init(|| caller).await?.clone()))
            }
            // A cluster of this machine, or the short way to one that has both.
            _ => Ok(Reach::Here(dir)),
        }
    }
}

/// A VM whose process is there no more.
pub fn ended(rank: u32, status: &VmStatus) -> Error {
    let how = match (status.state, &*status.detail) {
        (VmState::Failed, "") => "it failed",
        (VmState::Failed, why) => why,
        _ => return Error::not_found(format!("vm{rank} has ended")).help(NO_MORE),
    };
    Error::not_found(format!("vm{rank} has failed: {how}")).help(NO_MORE)
}

/// Fails for a VM whose guest cannot answer: it has ended, is off, or stands still.
pub fn check_guest(rank: u32, status: &VmStatus) -> Result<()> {
    let why = match &*status.detail {
        "" => String::new(),
        why => format!(": {why}"),
    };
    match status.state {
        state if state.is_over() => Err(ended(rank, status)),
        VmState::Off => Err(Error::system(format!("vm{rank} is off{why}"))
            .help(format!("start its guest again: `pavo reset vm{rank}`"))),
        VmState::Paused => Err(Error::system(format!("vm{rank} is paused{why}"))
            .help(format!("let it go on: `pavo resume vm{rank}`"))),
        _ => Ok(()),
    }
}

/// What is left of such a VM.
const NO_MORE: &str = "what its guest has said: `pavo console -l VM`; it comes back with a new \
                       cluster only";

/// As [`Pass::reach`], of one VM.
///
/// # Errors
/// As that.
pub async fn reach(store: Option<&dyn Store>, job: &JobRecord, rank: u32) -> Result<Reach> {
    Pass::default().reach(store, job, rank).await
}

/// The same of a VM that is known better than by the job's record.
///
/// # Errors
/// As that.
pub async fn reach_vm(store: Option<&dyn Store>, job: &JobRecord, vm: &VmRecord) -> Result<Reach> {
    Pass::default().reach_vm(store, job, vm).await
}

/// What lets its reader into a job: the cluster's channels, and its guests by ssh. Kept in
/// the store for the user's commands on other hosts than the launcher's.
#[derive(Debug, Serialize, Deserialize)]
pub struct Secrets {
    pub identity: Identity,
    pub key: HostKey,
    /// The guests' public keys, by rank.
    pub known: Vec<String>,
}

/// What makes this process a member of the job's cluster.
///
/// # Errors
/// When it is neither in the job's directory, and only ours, nor in the store.
pub async fn identity(store: Option<&dyn Store>, job: &JobRecord) -> Result<Identity> {
    let path = job.dir.join(IDENTITY);
    if is_ours(&job.dir) {
        return read_identity(&path).while_doing(|| format!("reading `{}`", path.display()));
    }
    secrets(store, job).await.map(|secrets| secrets.identity)
}

/// What the launcher has stored for commands on other hosts.
pub async fn secrets(store: Option<&dyn Store>, job: &JobRecord) -> Result<Secrets> {
    let key = keys::job_secrets(&job.user, job.owner);
    let found = match store {
        Some(store) => get_json(store, &key).await?,
        None => None,
    };
    match (found, store) {
        (Some((secrets, _)), _) => Ok(secrets),
        (None, Some(store))
            if store.get(&keys::job_record(&job.user, job.owner)).await?.is_none() =>
        {
            Err(Error::not_found(format!("job {} has ended", job.owner.job)))
        }
        _ => {
            let (host, dir) = (&job.host, job.dir.display());
            Err(Error::system(format!("job {} is reached from `{host}` only", job.owner.job))
                .help(format!("go there, or to where `{dir}` is seen")))
        }
    }
}

fn read_identity(path: &Path) -> Result<Identity> {
    let no_links = nix::fcntl::OFlag::O_NOFOLLOW.bits();
    let file = File::options().read(true).custom_flags(no_links).open(path);
    let file = file.while_doing(|| "opening it".into())?;
    let about = file.metadata().while_doing(|| "looking at it".into())?;
    let us = nix::unistd::geteuid().as_raw();
    let foreign = about.uid() != us && us != 0;
    if foreign || about.mode() & 0o077 != 0 {
        return Err(Error::system("others may have read or written it")
            .help("start the cluster anew; its folder must be yours alone"));
    }
    let mut text = Vec::new();
    file.take(MAX_IDENTITY).read_to_end(&mut text).while_doing(|| "reading it".into())?;
    // What serde quotes may be secret.
    serde_json::from_slice(&text).map_err(|_| Error::system("it is no identity of a cluster"))
}

fn is_this_host(name: &str) -> bool {
    let ours = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    let short = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
    ours.is_some_and(|ours| short(&ours) == short(name))
}

/// Whether a folder is there and the user's own, so that what is in it can be believed.
pub fn is_ours(dir: &Path) -> bool {
    let about = std::fs::symlink_metadata(dir);
    let us = nix::unistd::geteuid().as_raw();
    about.is_ok_and(|about| about.is_dir() && (about.uid() == us || us == 0))
}

impl Reach {
    /// Connects to the VM's process.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn connect(&self) -> Result<Client> {
        match self {
            Self::Here(dir) => Client::connect(dir),
            Self::Remote(address, caller) => {
                Client::connect_remote(*address, caller, CONNECT).await
            }
        }
    }

    /// What the VM's console has said so far, the newest [`LOG`] bytes.
    ///
    /// # Errors
    /// When there is no log, or it does not come from the other host.
    pub async fn log(&self) -> Result<Vec<u8>> {
        match self {
            Self::Here(dir) => console::newest(dir, usize::MAX),
            Self::Remote(..) => self.connect().await?.log(LOG as usize).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::model::job::ProcessId;
    use crate::model::owner::Owner;
    use crate::store::embedded;

    /// A job with one VM, on `host`, in a folder that holds the VM's if `local`.
    fn job(dir: &Path, host: &str, control: Option<SocketAddr>, local: bool) -> JobRecord {
        if local {
            std::fs::create_dir(dir.join("vm0")).unwrap();
        }
        JobRecord {
            version: JobRecord::VERSION,
            owner: Owner::local(7),
            name: "tiny".into(),
            user: "alice".into(),
            definition: "tiny:1".into(),
            started: 0,
            time_limit: None,
            launcher: ProcessId { pid: 1, start_time: 1 },
            dir: dir.into(),
            host: "login".into(),
            vms: vec![VmRecord {
                rank: 0,
                template: "tiny".into(),
                image: None,
                cores: 1,
                memory_mib: 64,
                host: host.into(),
                addresses: Vec::new(),
                ports: Vec::new(),
                ssh_user: "root".into(),
                drives: Vec::new(),
                control,
            }],
        }
    }

    #[tokio::test]
    async fn a_vm_is_reached_by_its_folder_only_on_its_own_host() {
        let ours = nix::unistd::gethostname().unwrap().into_string().unwrap();
        let long = format!("{ours}.example.org");
        let control = Some(SocketAddr::from(([127, 0, 0, 1], 9)));
        for (host, control, local, here) in [
            (ours.as_str(), None, true, true),
            ("renamed-since", None, true, true),
            (&ours, control, true, true),
            (&long, control, true, true),
            (&ours, control, false, false),
            // A shared folder shows another host's socket.
            ("elsewhere", control, true, false),
        ] {
            let temp = tempfile::tempdir().unwrap();
            let store = embedded::open(&temp.path().join("state")).await.unwrap();
            let dir = temp.path().join("job");
            std::fs::create_dir(&dir).unwrap();
            let identity = serde_json::to_vec(&Identity::generate("7").unwrap()).unwrap();
            std::fs::write(dir.join(IDENTITY), identity).unwrap();
            let private = std::fs::Permissions::from_mode(0o600);
            std::fs::set_permissions(dir.join(IDENTITY), private).unwrap();
            let job = job(&dir, host, control, local);
            let way = reach(Some(&store), &job, 0).await.unwrap();
            assert_eq!(matches!(way, Reach::Here(_)), here, "{host} {local} {way:?}");
            assert!(reach(Some(&store), &job, 1).await.is_err());
        }
    }
}
