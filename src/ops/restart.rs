//! Clusters that go on from a checkpoint, and VMs that begin from a snapshot.
//!
//! A checkpoint is checked before there is a job: its manifest, that its files are there, and
//! that templates, images and resource sets still make the VMs that it is of. What only the
//! VMs' hosts know (their processors, QEMU, every byte of the files) their processes check
//! before a guest goes on.
//!
//! QEMU trusts what it reads: a stream that somebody has made up can take it over. So nothing is
//! read that another person can have written (see [`trusted`]), and each byte is compared with
//! what the manifest says before QEMU sees it.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::resolve::{Blueprint, Job, VmBlueprint};
use super::trusted;
use crate::batch::local::Allocation;
use crate::error::{Context, Error, Result};
use crate::image::folder;
use crate::model::checkpoint::{
    Layer, MANIFEST, MAX_MANIFEST, Manifest, SNAPSHOT, SavedVm, Snapshot, UNFINISHED,
};
use crate::model::cluster::ClusterDef;
use crate::model::owner::Owner;
use crate::model::vm::{HostKey, Nic, VmSpec};

/// A checkpoint that can be gone on from, as far as is known here.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    manifest: Manifest,
}

/// What one VM goes on from, or begins from.
#[derive(Debug)]
pub struct Origin {
    dir: PathBuf,
    pub vm: SavedVm,
    /// Whether it is a snapshot: the VM is another, with a guest that remembers this one.
    clone: bool,
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
        let manifest = read(&dir).and_then(|manifest: Manifest| {
            trusted::check(&dir, &[])?;
            check_vms(&manifest)?;
            manifest.vms.iter().try_for_each(|vm| check_files(&dir, vm))?;
            Ok(manifest)
        });
        let manifest = manifest.while_doing(doing)?;
        Ok(Self { dir, manifest })
    }

    /// The job's script, if the agent in vm0 keeps it.
    pub fn script(&self) -> Option<&str> {
        self.manifest.script.as_deref()
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
        check_images(&self.manifest.images, "checkpoint")?;
        let dir = self.dir;
        for (vm, saved) in blueprint.vms.iter_mut().zip(self.manifest.vms) {
            let origin = Arc::new(Origin { dir: dir.clone(), vm: saved, clone: false });
            origin.preview(vm)?;
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

/// What makes a folder a checkpoint, or a snapshot.
trait Record: serde::de::DeserializeOwned {
    const FILE: &str;
    const VERSION: u32;
    /// What it is called, and by what it is written.
    const WORDS: (&str, &str);
    /// What the other one is called, its file and how it is used.
    const OTHER: (&str, &str, &str);
}

impl Record for Manifest {
    const FILE: &str = MANIFEST;
    const VERSION: u32 = Self::VERSION;
    const WORDS: (&str, &str) = ("checkpoint", "`pavo ckpt`");
    const OTHER: (&str, &str, &str) =
        ("snapshot", SNAPSHOT, "name it in a template: `snapshot: DIR`");
}

impl Record for Snapshot {
    const FILE: &str = SNAPSHOT;
    const VERSION: u32 = Self::VERSION;
    const WORDS: (&str, &str) = ("snapshot", "`pavo snapshot`");
    const OTHER: (&str, &str, &str) =
        ("checkpoint", MANIFEST, "go on from it: `pavo alloc -r DIR`");
}

fn read<R: Record>(dir: &Path) -> Result<R> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let (file, (what, by)) = (R::FILE, R::WORDS);
    let path = dir.join(file);
    let opened = trusted::open(&path).map_err(|error| {
        if dir.join(UNFINISHED).exists() {
            return Error::usage(format!(
                "it is not finished: {by} writes it still, or was killed"
            ))
            .help("use an earlier one; remove this one if nothing writes it");
        }
        if error.kind() == std::io::ErrorKind::NotFound && !dir.exists() {
            return Error::not_found("there is no such folder");
        }
        let (other, its, use_it) = R::OTHER;
        if dir.join(its).exists() {
            return Error::usage(format!("it is a {other}, and no {what}")).help(use_it);
        }
        if error.kind() == std::io::ErrorKind::NotFound {
            return Error::not_found(format!("it has no `{file}`: it is no {what}"))
                .help(format!("name a folder that {by} has written"));
        }
        Error::system(format!("`{file}` cannot be read")).because(error)
    })??;
    let mut text = Vec::new();
    let doing = || format!("reading `{file}`");
    opened.take(MAX_MANIFEST).read_to_end(&mut text).while_doing(doing)?;
    // What serde quotes may be secret.
    let damaged = |error: serde_json::Error| {
        let (line, column) = (error.line(), error.column());
        Error::config(format!("`{file}` is damaged at line {line}, column {column}"))
            .help(format!("use another {what}"))
    };
    let versioned: Versioned = serde_json::from_slice(&text).map_err(damaged)?;
    if versioned.version > R::VERSION {
        let error = format!(
            "it has version {} of the format, this pavo reads {}",
            versioned.version,
            R::VERSION
        );
        return Err(Error::usage(error).help("use the pavo that wrote it, or a newer one"));
    }
    serde_json::from_slice(&text).map_err(damaged)
}

/// Whether it has all VMs of its cluster, each in its place.
fn check_vms(manifest: &Manifest) -> Result<()> {
    let count = manifest.definition.parse::<ClusterDef>()?.count();
    let whole =
        (0..).zip(&manifest.vms).all(|(rank, vm)| vm.spec.rank == rank && vm.spec.seed.is_some());
    if whole && manifest.vms.len() == count as usize {
        return Ok(());
    }
    Err(Error::config(format!("`{MANIFEST}` is damaged: its VMs are not those of its cluster"))
        .help("use another checkpoint"))
}

/// Whether what was written is there; its hosts read it through.
fn check_files(dir: &Path, vm: &SavedVm) -> Result<()> {
    for stored in vm.restore(dir).files() {
        let name = &*stored.name;
        if Path::new(name).components().count() != 1 || name.starts_with('.') {
            return Err(Error::config(format!("`{}` is no name of a file", name.escape_debug())));
        }
        let length = trusted::check(dir, &[name])?.iter().map(Metadata::len).sum::<u64>();
        if length != stored.bytes {
            return Err(Error::config(format!(
                "`{name}` has {length} bytes, and {} were written: it is damaged",
                stored.bytes
            ))
            .help("use another one, or the file from a backup"));
        }
    }
    Ok(())
}

/// A disk is only what is written over its image, which may have been replaced since.
fn check_images(images: &BTreeMap<String, Vec<Layer>>, what: &str) -> Result<()> {
    for (image, then) in images {
        let now = folder::layers(Path::new(image))?;
        if now == *then {
            continue;
        }
        let changed = |layer: &&Layer| !now.contains(layer);
        let name = then.iter().find(changed).map_or("a layer of it", |layer| &layer.name);
        let (image, name) = (image.escape_debug(), name.escape_debug());
        return Err(Error::config(format!(
            "the image `{image}` is not what it was when the {what} was taken: `{name}` has \
             changed, in size or time"
        ))
        .help("bring the file of then back, with its time: `cp -p`, `touch -d`"));
    }
    Ok(())
}

/// As many as the scheduler has to grant.
fn cores(then: &VmSpec) -> u32 {
    then.cores + then.extras.cpus.emulator
}

impl Blueprint {
    /// The cores and MiB of each VM that goes on, or begins from a snapshot.
    pub fn former(&self) -> Option<(u32, u64)> {
        let then = &self.vms.iter().find_map(|vm| vm.origin.as_ref())?.vm.spec;
        Some((cores(then), then.memory_mib))
    }

    /// # Errors
    /// When VMs that go on would have more cores than they know, or fewer.
    pub fn check_cores(&self, asked: Option<u32>) -> Result<()> {
        let Some(now) = asked.or(self.former().map(|(cores, _)| cores)) else { return Ok(()) };
        for vm in &self.vms {
            let Some(origin) = &vm.origin else { continue };
            let then = &origin.vm.spec;
            if now != cores(then) && !then.extras.cpus.full_node {
                let (name, template) = (format!("vm{}", vm.rank), &vm.template.name);
                let (then, now) = (cores(then).to_string(), now.to_string());
                return Err(origin.differs(&name, template, "cores", &then, &now));
            }
        }
        Ok(())
    }
}

impl Origin {
    /// Reads a snapshot.
    ///
    /// # Errors
    /// When it is none, not whole, of a newer pavo, or can be of a stranger.
    pub fn snapshot(dir: &Path) -> Result<Self> {
        let doing = || format!("opening the snapshot `{}`", dir.display());
        let read = || {
            let Snapshot { vm, images, .. } = read(dir)?;
            trusted::check(dir, &[])?;
            check_files(dir, &vm)?;
            check_images(&images, "snapshot")?;
            Ok::<_, Error>(Self { dir: dir.into(), vm, clone: true })
        };
        read().while_doing(doing)
    }

    /// Compares a VM with what it is to go on from, as far as it is decided: its interfaces are
    /// those that its networks had.
    ///
    /// # Errors
    /// When it is another, with the first difference.
    pub fn preview(&self, vm: &VmBlueprint) -> Result<()> {
        let then = &self.vm.spec;
        let (name, template) = (format!("vm{}", vm.rank), &vm.template.name);
        // Whether the resource set has networks that gave it no interface then.
        let networks: Vec<_> = then.nics.iter().map(|nic| nic.network.clone()).collect();
        if self.clone && networks.len() != vm.networks.len() {
            let (then, now) = (networks.len().to_string(), vm.networks.len().to_string());
            return Err(self.differs(&name, template, "interfaces", &then, &now));
        }
        if !self.clone && networks != vm.networks {
            let (then, now) = (networks.join(", "), vm.networks.join(", "));
            let what = "the networks of its resource set";
            return Err(self.differs(&name, template, what, &then, &now));
        }
        let nic = |(at, name): (usize, &String)| {
            let known = then.nics.iter().find(|nic| nic.network == *name);
            let nic = if self.clone { then.nics.get(at) } else { known.or(then.nics.first()) };
            let model = vm.template.nic_model.clone();
            nic.cloned().map(|nic| Nic { network: name.clone(), model, ..nic })
        };
        let nics = vm.networks.iter().enumerate().filter_map(nic).collect();
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
        let spec = vm.own_spec(&job, nics)?;
        self.compare(&VmSpec { cores: then.cores, ..spec })
    }

    /// The same VM, to go on from here; or another one, to begin here.
    ///
    /// # Errors
    /// When it is another machine, with the first difference.
    pub fn go_on(&self, spec: VmSpec) -> Result<VmSpec> {
        let then = &self.vm.spec;
        if spec.memory_mib < then.memory_mib {
            let (name, has, needs) = (spec.name(), spec.memory_mib, then.memory_mib);
            let what = self.word();
            return Err(Error::usage(format!(
                "{name} had {needs} MiB of memory when the {what} was taken, and gets {has} MiB"
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
        self.compare(&spec)?;
        let (restore, seed) = match self.clone {
            true => (self.vm.clone_order(&self.dir), spec.seed),
            false => (self.vm.restore(&self.dir), then.seed.clone()),
        };
        let (memory_mib, restore) = (then.memory_mib, Some(Box::new(restore)));
        Ok(VmSpec { memory_mib, seed, restore, ..spec })
    }

    fn word(&self) -> &'static str {
        if self.clone { "snapshot" } else { "checkpoint" }
    }

    fn compare(&self, now: &VmSpec) -> Result<()> {
        let then = &self.vm.spec;
        // Another VM is told what it is called, and where it is.
        let of_this_vm = |what: &str| self.clone && OF_ONE_VM.contains(&what);
        for (what, aspect) in ASPECTS.iter().filter(|(what, _)| !of_this_vm(what)) {
            let (then, here) = (aspect(then), aspect(now));
            if then != here {
                return Err(self.differs(&now.name(), &now.template, what, &then, &here));
            }
        }
        Ok(())
    }

    fn differs(&self, name: &str, template: &str, what: &str, then: &str, now: &str) -> Error {
        let word = |text: &str| match text {
            "" => "nothing".into(),
            text => format!("`{}`", text.escape_debug()),
        };
        let (template, (then_, now_)) = (template.escape_debug(), (word(then), word(now)));
        let error = match self.clone {
            true => format!(
                "{name} cannot begin from the snapshot `{}`, which is of another machine: {what}: \
                 {then_} there, {now_} now",
                self.dir.display()
            ),
            false => format!(
                "{name} cannot go on as another machine: {what}: {then_} in the checkpoint, \
                 {now_} now"
            ),
        };
        Error::config(error).help(match what {
            "cores" => format!("ask for as many: `-c {then}`"),
            "MTU" => "a network over several hosts has less room in its packets than one on a \
                      single host: restart it on one host"
                .into(),
            "offloading" => "restart it where the switch does what it did: `pavo doctor`".into(),
            "the image" if self.clone => format!(
                "take another snapshot, or leave `image` out of template `{template}`: the \
                 snapshot knows its own"
            ),
            _ if self.clone => {
                format!("make template `{template}` as it was, or take another snapshot")
            }
            _ => format!("make template `{template}` and what it uses as they were"),
        })
    }
}

/// What may differ between VMs that begin from the same snapshot.
const OF_ONE_VM: &[&str] =
    &["the networks of its resource set", "MAC addresses", "addresses", "MTU"];

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
    ("layers of its networks", |vm| nics(vm, |nic| word(&nic.ipv4.is_some()))),
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
