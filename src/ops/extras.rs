//! What a template asks for beside disk, networks and user-data: checked as far as the user
//! can have got it wrong, and made part of the VM's specification.
//!
//! Paths are resolved here, where the user's environment is, and opened on the VM's host, as
//! the user.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::drives::Wanted;
use super::resolve::{Blueprint, Job, VmBlueprint};
use crate::config::{
    BatchManager, Config, Layer, Mmp, Network, ResourceSet, Template, Vars, expand,
};
use crate::error::{Context, Error, Result};
use crate::host::blobs;
use crate::model::job::DriveRecord;
use crate::model::vm::{
    Accel, Bind, Cpus, DiskModel, Drive, Extras, Firmware, Mount, MountKind, NodeCache,
};
use crate::vm::attach;

/// Refuses what cannot be carried out together, or not at all.
///
/// # Errors
/// With the setting, and where it stands.
pub fn check(template: &Template) -> Result<()> {
    let refuse = |key: &str, why: &str, help: &str| {
        Err(Error::config(format!("{} {why}", template.setting(key))).help(help))
    };
    let fs = |point: &&crate::config::MountPoint| point.kind == MountKind::VirtioFs;
    if template.mount_points.values().filter(fs).any(|point| point.readonly) {
        let why = "asks for a virtio-fs that cannot be written, which there is not";
        return refuse("mount-points", why, "use `type: virtio-9p` for what is `readonly`");
    }
    if template.iothreads > 0 && template.disk_model == DiskModel::Ide {
        return refuse("iothreads", "does nothing for IDE disks", "set `disk-model: virtio`");
    }
    if template.nic_queues.is_some_and(|queues| queues > 1)
        && !template.nic_model.starts_with("virtio-net")
    {
        let why = "is for virtio-net only";
        return refuse("nic-queues", why, "set `nic-model: virtio-net`");
    }
    if template.firmware == Firmware::Uefi && !is_pc(&template.machine_type) {
        let why = "needs a machine of the types `q35` or `pc`";
        return refuse("firmware", why, "leave `machine-type` out");
    }
    check_sensitive(template)
}

/// How many queues each interface of a VM has. On a site root makes the interfaces, and reads
/// no templates.
pub fn nic_queues(config: &Config, template: &Template, set: &ResourceSet) -> Result<u32> {
    let is_virtio = template.nic_model.starts_with("virtio-net");
    let wanted = template.nic_queues.unwrap_or(if is_virtio { set.nic_queues } else { 1 });
    if config.batch.manager != BatchManager::Slurm || wanted == set.nic_queues {
        return Ok(wanted);
    }
    let name = &template.resource_set;
    let what = match template.nic_queues {
        Some(_) => template.setting("nic-queues"),
        None => template.setting("nic-model"),
    };
    Err(Error::config(format!(
        "{what} asks for {wanted} queues, and the site's resource set `{name}` gives {}",
        set.nic_queues
    ))
    .help(format!("use a resource set with `nic-queues: {wanted}` in resources.yaml")))
}

fn is_pc(machine: &str) -> bool {
    ["q35", "pc"].iter().any(|kind| machine == *kind || machine.starts_with(&format!("pc-{kind}-")))
}

/// Nothing of the host, and nothing that pavo does not know, gets into a sensitive VM.
fn check_sensitive(template: &Template) -> Result<()> {
    if !template.sensitive {
        return Ok(());
    }
    let open = [
        ("mount-points", !template.mount_points.is_empty()),
        ("custom-args", !template.custom_args.is_empty()),
    ];
    match open.iter().find(|(_, given)| *given) {
        Some((key, _)) => Err(Error::config(format!(
            "{} opens the VM to its host, and it is {}",
            template.setting(key),
            template.setting("sensitive")
        ))
        .help("take one of the two out")),
        None => Ok(()),
    }
}

/// Closes the networks of sensitive VMs to the outside, where they are ours to close.
///
/// # Errors
/// Where they are the site's, and open.
pub fn close_networks(
    config: &Config,
    vms: &[VmBlueprint],
    networks: &mut [(String, Network)],
) -> Result<()> {
    for vm in vms.iter().filter(|vm| vm.template.sensitive) {
        for (name, network) in networks.iter_mut().filter(|(name, _)| vm.networks.contains(name)) {
            let Network::Ethernet(ethernet) = network else { continue };
            if ethernet.layer == Layer::L2 || !ethernet.allow_outbound {
                continue;
            }
            if config.batch.manager == BatchManager::Slurm {
                let (vm, setting) = (&vm.template, vm.template.setting("sensitive"));
                return Err(Error::config(format!(
                    "template `{}` is {setting}, and the site's network `{name}` is open to the \
                     outside",
                    vm.name
                ))
                .help("use a resource set whose networks have `allow-outbound: none`"));
            }
            ethernet.allow_outbound = false;
        }
    }
    Ok(())
}

/// What the job decides about a VM's extras.
///
/// # Errors
/// When a path is none, or the job has too little.
pub fn extras(vm: &VmBlueprint, job: &Job<'_>) -> Result<Extras> {
    let template = &vm.template;
    check_allocation(template, job.allocation.cores)?;
    check_accel(template, job.accel)?;
    let vars = vm.vars.clone().with("clusterdir", job.cluster_dir.to_string_lossy());
    let bind = match (template.bind_vcpus, job.first_cpu) {
        (Some(false), _) | (None, Some(_)) => Bind::No,
        (Some(true), Some(first)) => Bind::From(if template.full_node { 0 } else { first }),
        (_, None) => Bind::Allotted,
    };
    Ok(Extras {
        drives: drives(template, &vars)?,
        mounts: mounts(template, &vars)?,
        firmware: template.firmware,
        iothreads: template.iothreads,
        huge_pages: template.huge_pages,
        tpm: template.tpm,
        display: template.remote_display,
        node_cache: node_cache(vm),
        inject_agent: template.inject_agent,
        cpus: Cpus { emulator: template.emulator_cores, bind, full_node: template.full_node },
        places: template.places.clone(),
    })
}

/// Where copies of the VM's image are kept, if it can have any.
fn node_cache(vm: &VmBlueprint) -> Option<NodeCache> {
    let (image, cache) = (vm.image.as_ref()?, vm.image_cache.as_ref()?);
    let (path, layers) = (blobs::folder(&cache.path), image.layers.clone());
    (!layers.is_empty()).then_some(NodeCache { path, bytes: cache.bytes, layers })
}

/// Refuses an allocation of which the guest gets nothing.
pub fn check_allocation(template: &Template, cores: u32) -> Result<()> {
    if cores > template.emulator_cores || template.full_node {
        return Ok(());
    }
    let setting = template.setting("emulator-cores");
    let plural = if cores == 1 { "core" } else { "cores" };
    Err(Error::config(format!("{setting} leaves nothing of {cores} {plural} to the guest"))
        .help(format!("ask for more: `-c {}`", template.emulator_cores + 1)))
}

/// QEMU itself asks not to trust emulation with keeping a guest in.
fn check_accel(template: &Template, accel: Accel) -> Result<()> {
    if !template.sensitive || accel == Accel::Kvm {
        return Ok(());
    }
    Err(Error::system(format!(
        "it is {}, which is for KVM only, and there is none on the VM's host",
        template.setting("sensitive")
    ))
    .help("`pavo doctor` says why; emulated guests are not kept apart well enough"))
}

fn drives(template: &Template, vars: &Vars) -> Result<Vec<Drive>> {
    let drive = |drive: &crate::config::PersistentDrive| {
        Ok(Drive {
            path: absolute(template, "persistent-drives", &drive.path, vars)?,
            format: drive.format,
            cache: drive.cache,
            shared: drive.mmp != Mmp::Yes,
        })
    };
    template.persistent_drives.iter().map(drive).collect()
}

/// What commands have to know of a VM's persistent drives.
pub fn drive_records(vm: &VmBlueprint) -> Vec<DriveRecord> {
    let backup = |image: &String| expand(image, &vm.vars);
    let drives = vm.template.persistent_drives.iter();
    drives.map(|drive| DriveRecord { backup: drive.backup.as_ref().map(backup) }).collect()
}

fn mounts(template: &Template, vars: &Vars) -> Result<Vec<Mount>> {
    let mount = |(tag, point): (&String, &crate::config::MountPoint)| {
        Ok(Mount {
            tag: tag.clone(),
            path: absolute(template, "mount-points", &point.path, vars)?,
            readonly: point.readonly,
            kind: point.kind,
        })
    };
    template.mount_points.iter().map(mount).collect()
}

pub(super) fn absolute(template: &Template, key: &str, path: &str, vars: &Vars) -> Result<PathBuf> {
    let expanded = PathBuf::from(expand(path, vars));
    if expanded.is_absolute() {
        return Ok(expanded);
    }
    let setting = template.setting(key);
    Err(Error::config(format!("{setting}: `{}` is no absolute path", expanded.display()))
        .help("begin it with `/`, `~` or a variable such as `%{homedir}`"))
}

/// Refuses a cluster whose VMs would write to a drive that is meant for one.
pub fn check_drives(vms: &[VmBlueprint]) -> Result<()> {
    let mut users: BTreeMap<PathBuf, (&VmBlueprint, Mmp)> = BTreeMap::new();
    for vm in vms.iter().filter(|vm| !vm.template.persistent_drives.is_empty()) {
        let vars = vm.vars.clone().with("clusterdir", "/%clusterdir");
        let drives = drives(&vm.template, &vars)?;
        for (drive, wanted) in drives.into_iter().zip(&vm.template.persistent_drives) {
            let path = drive.path.display().to_string();
            // Whatever leads there, as far as it can be seen from here.
            let real = drive.path.canonicalize().unwrap_or(drive.path);
            let Some((other, mmp)) = users.insert(real, (vm, wanted.mmp)) else { continue };
            if wanted.mmp == Mmp::Yes || mmp == Mmp::Yes {
                let setting = vm.template.setting("persistent-drives");
                return Err(Error::config(format!(
                    "{setting}: both vm{} and vm{} would write to `{path}`",
                    other.rank, vm.rank
                ))
                .help("give each its own, with `%{vm_rank}` in the path, or set `mmp: cluster`"));
            }
        }
    }
    Ok(())
}

/// Says which setting it is that cannot be carried out.
fn carry_out<T>(template: &Template, key: &str, outcome: Result<T>) -> Result<T> {
    outcome.while_doing(|| format!("carrying out {}", template.setting(key)))
}

impl Blueprint {
    /// The drives that VMs want to have for their job alone; of one VM, or of all.
    pub fn claimed(&self, rank: Option<u32>, dir: &Path, host: &str) -> Result<Vec<Wanted>> {
        let mut claimed = Vec::new();
        for vm in self.vms.iter().filter(|vm| rank.is_none_or(|rank| vm.rank == rank)) {
            let vars = vm.vars.clone().with("clusterdir", dir.to_string_lossy());
            let all = drives(&vm.template, &vars)?.into_iter().zip(&vm.template.persistent_drives);
            let held = all.filter(|(_, wanted)| wanted.mmp != Mmp::No);
            claimed.extend(held.map(|(drive, wanted)| Wanted {
                path: drive.path,
                vm: format!("vm{}", vm.rank),
                host: host.to_owned(),
                alone: wanted.mmp == Mmp::Yes,
            }));
        }
        Ok(claimed)
    }

    /// Whether a guest of it keeps data that it should write before it ends.
    pub fn keeps_data(&self) -> bool {
        self.vms.iter().any(|vm| !vm.template.persistent_drives.is_empty())
    }

    /// Looks, on the machine where all VMs will run, at what they will open, and at what
    /// they will have of it; for errors before there is a job.
    ///
    /// # Errors
    /// With the template and the setting.
    pub fn check_here(&self, cores: u32, accel: Accel) -> Result<()> {
        for vm in &self.vms {
            let template = &vm.template;
            let check = || {
                check_allocation(template, cores)?;
                check_accel(template, accel)?;
                if let Some(kernel) = &template.kernel {
                    carry_out(template, "kernel", attach::check_kernel(kernel))?;
                }
                let known = |path: &Path| !path.to_string_lossy().contains("%clusterdir");
                let mut vars = vm.vars.clone();
                vars = vars.with("clusterdir", "/%clusterdir");
                for mount in mounts(template, &vars)?.iter().filter(|it| known(&it.path)) {
                    carry_out(template, "mount-points", attach::check_mount(mount))?;
                }
                for drive in drives(template, &vars)?.iter().filter(|it| known(&it.path)) {
                    carry_out(template, "persistent-drives", attach::check_drive(drive))?;
                }
                Ok::<_, Error>(())
            };
            check().while_doing(|| format!("resolving the template `{}`", template.name))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::local::Allocation;
    use crate::config::{Ethernet, MountPoint};
    use crate::model::owner::Owner;

    fn vm(change: impl FnOnce(&mut Template)) -> VmBlueprint {
        let mut template = Template::new("t", "templates.yaml");
        change(&mut template);
        VmBlueprint {
            rank: 0,
            template,
            image: None,
            user_data: None,
            networks: vec!["nat".into()],
            image_cache: None,
            vars: Vars::default().with("vm_rank", "0"),
            origin: None,
        }
    }

    fn extras_of(vm: &VmBlueprint, cores: u32, first_cpu: Option<u32>) -> Result<Extras> {
        extras(
            vm,
            &Job {
                owner: Owner::local(1),
                dir: Path::new("/job"),
                cluster_dir: Path::new("/job"),
                first_cpu,
                allocation: &Allocation { cores, memory_mib: 64 },
                accel: Accel::Tcg,
                authorized_key: "",
                host_keys: &[],
                nonce: 0,
            },
        )
    }

    #[test]
    fn networks_of_a_sensitive_vm_are_closed_or_have_to_be() {
        let vms = [vm(|template| template.sensitive = true)];
        let open = || vec![("nat".to_owned(), Network::Ethernet(Ethernet::default()))];
        let mut config = Config::default();
        let mut networks = open();
        close_networks(&config, &vms, &mut networks).unwrap();
        let Network::Ethernet(closed) = &networks[0].1 else { panic!() };
        assert!(!closed.allow_outbound);
        config.batch.manager = BatchManager::Slurm;
        let error = close_networks(&config, &vms, &mut open()).unwrap_err();
        assert!(error.to_string().contains("network `nat` is open to the outside"), "{error}");
        close_networks(&config, &vms, &mut networks).unwrap();
    }

    #[test]
    fn cpus_are_bound_where_they_are_allotted_or_where_it_is_asked_for() {
        for (wish, first, bind) in [
            (None, None, Bind::Allotted),
            (None, Some(4), Bind::No),
            (Some(true), None, Bind::Allotted),
            (Some(true), Some(4), Bind::From(4)),
            (Some(false), None, Bind::No),
        ] {
            let vm = vm(|template| template.bind_vcpus = wish);
            assert_eq!(extras_of(&vm, 2, first).unwrap().cpus.bind, bind, "{wish:?} {first:?}");
        }
        let vm = vm(|template| template.emulator_cores = 2);
        assert!(
            extras_of(&vm, 2, None).unwrap_err().report().contains("help: ask for more: `-c 3`")
        );
    }

    #[test]
    fn paths_know_their_vm_and_their_job() {
        let vm = vm(|template| {
            let path = "%clusterdir/%{vm_rank}".to_owned();
            let point = MountPoint { path, readonly: false, kind: MountKind::Virtio9p };
            template.mount_points.insert("a".into(), point);
        });
        assert_eq!(extras_of(&vm, 1, None).unwrap().mounts[0].path, Path::new("/job/0"));
    }
}
