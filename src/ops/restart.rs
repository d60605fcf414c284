//! Clusters that go on from a checkpoint.
//!
//! A checkpoint is checked before there is a job: its manifest, that its files are there, and
//! that templates, images and resource sets still make the VMs that it is of. What only the
//! VMs' hosts know (their processors, QEMU, every byte of the files) their processes check
//! before a guest goes on.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::resolve::{Blueprint, Job, VmBlueprint};
use crate::batch::local::Allocation;
use crate::error::{Context, Error, Result};
use crate::model::checkpoint::{MANIFEST, Manifest, SavedVm, UNFINISHED};
use crate::model::cluster::ClusterDef;
use crate::model::owner::Owner;
use crate::model::vm::{HostKey, Nic, VmSpec};

/// The longest manifest that is read.
const MAX_MANIFEST: u64 = 64 << 20;

/// A checkpoint that can be gone on from, as far as is known here.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    manifest: Manifest,
}

/// What one VM goes on from.
#[derive(Debug)]
pub struct Origin {
    dir: PathBuf,
    pub vm: SavedVm,
}

/// What guests that go on know already.
#[derive(Clone, Debug)]
pub struct Known {
    pub key: HostKey,
    pub host_keys: Vec<HostKey>,
}

impl Checkpoint {
    /// Reads it.
    ///
    /// # Errors
    /// When it is none, not whole, or of a newer pavo.
    pub fn open(dir: &Path) -> Result<Self> {
        let doing = || format!("opening the checkpoint `{}`", dir.display());
        let dir = std::path::absolute(dir).while_doing(doing)?;
        let manifest = read(&dir).and_then(|manifest| {
            manifest.vms.iter().try_for_each(|vm| check_files(&dir, vm))?;
            Ok(manifest)
        });
        let manifest = manifest.while_doing(doing)?;
        Ok(Self { dir, manifest })
    }

    pub fn definition(&self) -> Result<ClusterDef> {
        self.manifest.definition.parse()
    }

    /// # Errors
    /// When another cluster is wanted.
    pub fn check_definition(&self, wanted: &ClusterDef) -> Result<()> {
        let then = self.definition()?;
        if then == *wanted {
            return Ok(());
        }
        Err(Error::usage(format!("the checkpoint is of `{then}`, and `{wanted}` is asked for"))
            .help("leave the cluster away: the checkpoint knows it"))
    }

    /// The images of its templates, with their revisions.
    pub fn images(&self) -> Vec<(Option<String>, String)> {
        let image = |vm: &SavedVm| Some((Some(vm.spec.template.clone()), vm.image.clone()?));
        self.manifest.vms.iter().filter_map(image).collect()
    }

    /// Makes the VMs of a blueprint those of the checkpoint.
    ///
    /// # Errors
    /// When they are others, with the first difference.
    pub fn apply(self, blueprint: &mut Blueprint) -> Result<()> {
        let dir = self.dir;
        for (vm, saved) in blueprint.vms.iter_mut().zip(self.manifest.vms) {
            let origin = Arc::new(Origin { dir: dir.clone(), vm: saved });
            preview(vm, &origin)?;
            vm.origin = Some(origin);
        }
        let keys = blueprint
            .vms
            .iter()
            .filter_map(|vm| Some(vm.origin.as_ref()?.vm.spec.seed.as_ref()?.host_key.clone()));
        let (key, host_keys) = (self.manifest.key, keys.collect());
        blueprint.known = Some(Known { key, host_keys });
        Ok(())
    }
}

fn read(dir: &Path) -> Result<Manifest> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let path = dir.join(MANIFEST);
    let file = File::open(&path).map_err(|error| {
        if dir.join(UNFINISHED).exists() {
            return Error::usage("it is not finished: `pavo ckpt` writes it still, or was killed")
                .help("use an earlier one; remove this one if nothing writes it");
        }
        if error.kind() == std::io::ErrorKind::NotFound && !dir.exists() {
            return Error::not_found("there is no such folder");
        }
        if error.kind() == std::io::ErrorKind::NotFound {
            return Error::not_found(format!("it has no `{MANIFEST}`: it is no checkpoint"))
                .help("name a folder that `pavo ckpt` has written");
        }
        Error::system(format!("`{MANIFEST}` cannot be read")).because(error)
    })?;
    let mut text = Vec::new();
    let doing = || format!("reading `{MANIFEST}`");
    file.take(MAX_MANIFEST).read_to_end(&mut text).while_doing(doing)?;
    // What serde quotes may be secret.
    let damaged = |error: serde_json::Error| {
        let (line, column) = (error.line(), error.column());
        Error::config(format!("`{MANIFEST}` is damaged at line {line}, column {column}"))
            .help("use another checkpoint")
    };
    let versioned: Versioned = serde_json::from_slice(&text).map_err(damaged)?;
    if versioned.version > Manifest::VERSION {
        let error = format!(
            "it has version {} of the format, this pavo reads {}",
            versioned.version,
            Manifest::VERSION
        );
        return Err(Error::usage(error).help("use the pavo that wrote it, or a newer one"));
    }
    serde_json::from_slice(&text).map_err(damaged)
}

/// Whether what was written is there; its hosts read it through.
fn check_files(dir: &Path, vm: &SavedVm) -> Result<()> {
    for stored in vm.restore(dir).files() {
        let name = &stored.name;
        if Path::new(name).components().count() != 1 || name.starts_with('.') {
            return Err(Error::config(format!("`{}` is no name of a file", name.escape_debug())));
        }
        let about = fs::metadata(dir.join(name)).while_doing(|| format!("looking at `{name}`"))?;
        if about.len() != stored.bytes {
            return Err(Error::config(format!(
                "`{name}` has {} bytes, and {} were written: the checkpoint is damaged",
                about.len(),
                stored.bytes
            ))
            .help("use another checkpoint, or the file from a backup"));
        }
    }
    Ok(())
}

/// Compares a VM with what it is to go on from, as far as it is decided: its interfaces are
/// those that its networks had.
fn preview(vm: &VmBlueprint, origin: &Origin) -> Result<()> {
    let then = &origin.vm.spec;
    let nic = |name: &String| {
        let known = then.nics.iter().find(|nic| nic.network == *name);
        let nic = known.or(then.nics.first()).cloned();
        nic.map(|nic| Nic { network: name.clone(), ..nic })
    };
    let nics = vm.networks.iter().filter_map(nic).collect();
    let allocation = Allocation { cores: cores(then), memory_mib: then.memory_mib };
    let host_keys: Vec<HostKey> = then.seed.iter().map(|seed| seed.host_key.clone()).collect();
    let Some(host_key) = host_keys.first() else { return Ok(()) };
    let job = Job {
        owner: Owner::local(1),
        dir: &then.dir,
        cluster_dir: &then.dir,
        first_cpu: None,
        allocation: &allocation,
        accel: then.accel,
        authorized_key: "",
        host_keys: &vec![host_key.clone(); vm.rank as usize + 1],
        nonce: 0,
    };
    let spec = vm.spec(&job, nics)?;
    // Whether the resource set has networks that gave it no interface then.
    let networks = |nics: &[Nic]| nics.iter().map(|nic| nic.network.clone()).collect::<Vec<_>>();
    if networks(&then.nics) != vm.networks {
        let spec = VmSpec { nics: Vec::new(), ..spec.clone() };
        let (then, now) = (networks(&then.nics).join(", "), vm.networks.join(", "));
        return Err(differs(&spec, "the networks of its resource set", &then, &now));
    }
    compare(then, &VmSpec { cores: then.cores, ..spec })
}

/// As many as the scheduler has to grant.
fn cores(then: &VmSpec) -> u32 {
    then.cores + then.extras.cpus.emulator
}

impl Blueprint {
    /// The cores and MiB of each VM that goes on.
    pub fn former(&self) -> Option<(u32, u64)> {
        let then = &self.vms.first()?.origin.as_ref()?.vm.spec;
        Some((cores(then), then.memory_mib))
    }

    /// # Errors
    /// When VMs that go on would have more cores than they know, or fewer.
    pub fn check_cores(&self, asked: Option<u32>) -> Result<()> {
        let origin = self.vms.first().and_then(|vm| vm.origin.as_ref());
        let (Some(asked), Some(origin)) = (asked, origin) else { return Ok(()) };
        let then = &origin.vm.spec;
        if asked == cores(then) || then.extras.cpus.full_node {
            return Ok(());
        }
        Err(differs(then, "cores", &cores(then).to_string(), &asked.to_string()))
    }
}

impl Origin {
    /// The same VM, to go on from here.
    ///
    /// # Errors
    /// When it is another, with the first difference.
    pub fn go_on(&self, spec: VmSpec) -> Result<VmSpec> {
        let then = &self.vm.spec;
        if spec.memory_mib < then.memory_mib {
            let (name, has, needs) = (spec.name(), spec.memory_mib, then.memory_mib);
            return Err(Error::usage(format!(
                "{name} had {needs} MiB of memory when the checkpoint was taken, and gets {has} MiB"
            ))
            .help("ask for more: `--mem`, or with Slurm `--mem-per-cpu`"));
        }
        let nics = spec.nics.iter().enumerate();
        let nics = nics.map(|(at, nic)| {
            then.nics.get(at).map_or(nic.clone(), |then| {
                // Where there is more than the guest knows of, it does with less.
                let mtu = if nic.mtu > then.mtu { then.mtu } else { nic.mtu };
                Nic { mtu, offloads: nic.offloads && then.offloads, ..nic.clone() }
            })
        });
        let spec = VmSpec { nics: nics.collect(), ..spec };
        compare(then, &spec)?;
        Ok(VmSpec {
            memory_mib: then.memory_mib,
            seed: then.seed.clone(),
            restore: Some(Box::new(self.vm.restore(&self.dir))),
            ..spec
        })
    }
}

/// What a guest has seen of its machine: as it is called, and as text.
type Aspect = (&'static str, fn(&VmSpec) -> String);

const ASPECTS: &[Aspect] = &[
    // Of a host that is all its own its process sees how many.
    ("cores", |vm| match vm.extras.cpus.full_node {
        true => "all".into(),
        false => cores(vm).to_string(),
    }),
    ("`machine-type`", |vm| vm.machine_type.clone()),
    ("`cpu-model`", |vm| vm.cpu_model.clone().unwrap_or_default()),
    ("the image", |vm| {
        let name = vm.disk.as_ref().and_then(|disk| disk.backing.file_name());
        name.unwrap_or_default().to_string_lossy().into_owned()
    }),
    ("bytes of its disk", |vm| {
        vm.disk.as_ref().map(|disk| disk.virtual_size.to_string()).unwrap_or_default()
    }),
    ("`disk-model`", |vm| vm.disk.as_ref().map(|disk| word(&disk.model)).unwrap_or_default()),
    ("the networks of its resource set", |vm| nics(vm, |nic| nic.network.clone())),
    ("`nic-model`", |vm| nics(vm, |nic| nic.model.clone())),
    ("MAC addresses", |vm| nics(vm, |nic| nic.mac.to_string())),
    ("addresses", |vm| {
        nics(vm, |nic| nic.addresses().map(|it| it.to_string()).collect::<Vec<_>>().join(" "))
    }),
    ("`nic-queues`", |vm| nics(vm, |nic| nic.queues.to_string())),
    ("MTU", |vm| nics(vm, |nic| nic.mtu.to_string())),
    ("offloading", |vm| nics(vm, |nic| nic.offloads.to_string())),
    ("`mount-points`", |vm| {
        let mount =
            |mount: &crate::model::vm::Mount| format!("{}:{}", mount.tag, mount.kind.as_str());
        vm.extras.mounts.iter().map(mount).collect::<Vec<_>>().join(", ")
    }),
    ("`persistent-drives`", |vm| vm.extras.drives.len().to_string()),
    ("`firmware`", |vm| word(&vm.extras.firmware)),
    ("`iothreads`", |vm| vm.extras.iothreads.to_string()),
    ("`huge-pages`", |vm| vm.extras.huge_pages.to_string()),
    ("`tpm`", |vm| vm.extras.tpm.to_string()),
    ("`remote-display`", |vm| vm.extras.display.map(|it| it.as_str().into()).unwrap_or_default()),
    ("`kernel`", |vm| {
        vm.kernel.as_ref().map(|kernel| kernel.path.display().to_string()).unwrap_or_default()
    }),
    ("`custom-args`", |vm| vm.custom_args.join(" ")),
];

fn nics(vm: &VmSpec, aspect: fn(&Nic) -> String) -> String {
    vm.nics.iter().map(aspect).collect::<Vec<_>>().join(", ")
}

/// As it is in a template.
fn word(value: &impl serde::Serialize) -> String {
    let value = serde_json::to_value(value).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

fn compare(then: &VmSpec, now: &VmSpec) -> Result<()> {
    for (what, aspect) in ASPECTS {
        let (then, here) = (aspect(then), aspect(now));
        if then != here {
            return Err(differs(now, what, &then, &here));
        }
    }
    Ok(())
}

fn differs(vm: &VmSpec, what: &str, then: &str, now: &str) -> Error {
    let word = |text: &str| match text {
        "" => "nothing".into(),
        text => format!("`{}`", text.escape_debug()),
    };
    let (name, template) = (vm.name(), vm.template.escape_debug());
    Error::config(format!(
        "{name} cannot go on as another machine: {what}: {} in the checkpoint, {} now",
        word(then),
        word(now)
    ))
    .help(match what {
        "cores" => format!("ask for as many: `-c {then}`"),
        "MTU" => "a network over several hosts has less room in its packets than one on a single \
                  host: restart it on one host"
            .into(),
        "offloading" => "restart it where the switch does what it did: `pavo doctor`".into(),
        _ => format!("make template `{template}` and what it uses as they were"),
    })
}
