//! From a definition to machines: templates, images and networks looked up once.
//!
//! Everything a user can have got wrong is found here, before a job exists.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::changes::Changes;
use super::extras;
use super::restart::{Known, Origin};
use crate::batch::local::Allocation;
use crate::config::{Config, ImageCache, Network, Template, UserData, Vars, expand, nearest};
use crate::error::{Context, Error, Result};
use crate::image::library::{Library, Resolved};
use crate::image::repository::Kind;
use crate::model::cluster::ClusterDef;
use crate::model::job::VmRecord;
use crate::model::owner::Owner;
use crate::model::vm::{Accel, Disk, HostKey, Kernel, Nic, Seed, VmSpec};

/// User-data larger than this is a mistake (cloud providers stop at 16 KiB to 64 KiB).
const MAX_USER_DATA: u64 = 1 << 20;

/// A cluster that can be started, but for what only the job decides.
#[derive(Clone, Debug)]
pub struct Blueprint {
    pub definition: ClusterDef,
    pub vms: Vec<VmBlueprint>,
    /// The networks any VM uses, once each.
    pub networks: Vec<(String, Network)>,
    /// What guests that go on know already.
    pub known: Option<Known>,
}

/// One VM to be.
#[derive(Clone, Debug)]
pub struct VmBlueprint {
    pub rank: u32,
    pub template: Template,
    pub image: Option<Resolved>,
    pub user_data: Option<String>,
    /// In the order in which the guest sees them.
    pub networks: Vec<String>,
    pub image_cache: Option<ImageCache>,
    /// What variables in the template's paths stand for.
    pub vars: Vars,
    /// What it goes on from, if it does not begin.
    pub origin: Option<Arc<Origin>>,
}

/// Every template by name: those configured, and one for each image of a VM that has no
/// template of its name, as in pcocc.
pub fn templates(config: &Config, library: &Library) -> Result<BTreeMap<String, Template>> {
    let mut all = config.templates.clone();
    let Some(set) = &config.default_resource_set else { return Ok(all) };
    for image in library.list(None, |_| true)?.into_iter().filter(|image| image.kind == Kind::Vm) {
        let origin = format!("image {}:{}", image.repo, image.name);
        all.entry(image.name.clone()).or_insert_with(|| Template {
            image: Some(image.name.clone()),
            resource_set: set.clone(),
            ..Template::new(image.name, origin)
        });
    }
    Ok(all)
}

/// The error of a name that is no template's.
pub fn unknown_template(name: &str, templates: &BTreeMap<String, Template>) -> Error {
    let error = Error::not_found(format!("Template not found: {name}"));
    match nearest(name, templates.keys().map(String::as_str)) {
        Some(word) => error.help(format!("did you mean `{word}`?")),
        None if templates.is_empty() => {
            error.help("there is none yet: `pavo image build tiny tiny` makes a first image")
        }
        None => error.help("`pavo template list` shows what there is"),
    }
}

/// Looks everything up. `vars` are what `%{…}` in templates may name, `changes` what is
/// wanted differently this time.
pub fn resolve(
    config: &Config,
    library: &Library,
    vars: &Vars,
    definition: &ClusterDef,
    changes: &Changes,
) -> Result<Blueprint> {
    let templates = templates(config, library)?;
    changes.check(definition)?;
    let mut kinds: BTreeMap<&str, VmBlueprint> = BTreeMap::new();
    for part in &definition.parts {
        if !kinds.contains_key(part.template.as_str()) {
            let template = templates
                .get(&part.template)
                .ok_or_else(|| unknown_template(&part.template, &templates))?;
            let kind = changes
                .apply(template.clone())
                .and_then(|template| resolve_kind(config, library, vars, template))
                .while_doing(|| format!("resolving the template `{}`", part.template))?;
            kinds.insert(&part.template, kind);
        }
    }
    let (mut texts, common) = (BTreeMap::new(), Arc::new(vars.clone()));
    let vms: Vec<VmBlueprint> = (0..)
        .zip(definition.templates())
        .map(|(rank, name)| {
            let mut vm = VmBlueprint { rank, ..kinds[name].clone() };
            vm.vars = Vars::above(&common).with("vm_rank", rank.to_string());
            vm.user_data = user_data(&vm.template, &vm.vars, &mut texts)
                .while_doing(|| format!("resolving the template `{name}`"))?;
            if let Some(origin) = &vm.origin {
                origin.preview(&vm)?;
            }
            Ok(vm)
        })
        .collect::<Result<_>>()?;
    let mut networks = networks_of(config, &vms)?;
    extras::check_drives(&vms)?;
    extras::close_networks(config, &vms, &mut networks)?;
    Ok(Blueprint { definition: definition.clone(), vms, networks, known: None })
}

/// The networks any VM uses, once each, in the order of their first use.
fn networks_of(config: &Config, vms: &[VmBlueprint]) -> Result<Vec<(String, Network)>> {
    let mut networks: Vec<(String, Network)> = Vec::new();
    for name in vms.iter().flat_map(|vm| &vm.networks) {
        if networks.iter().any(|(known, _)| known == name) {
            continue;
        }
        let network = config.networks.get(name).ok_or_else(|| {
            Error::config(format!("the network `{name}` does not exist"))
                .help("`pavo config check` says where it is named")
        })?;
        if let Network::Unsupported { kind } = network {
            return Err(Error::config(format!(
                "network `{name}` has the type `{kind}`, which this version does not run"
            ))
            .help("use a resource set with Ethernet networks"));
        }
        networks.push((name.clone(), network.clone()));
    }
    Ok(networks)
}

fn resolve_kind(
    config: &Config,
    library: &Library,
    vars: &Vars,
    mut template: Template,
) -> Result<VmBlueprint> {
    let kernel = template.kernel.take();
    template.kernel = kernel.map(|path| expand(&path.to_string_lossy(), vars).into());
    template.qemu_bin = expand(&template.qemu_bin.to_string_lossy(), vars).into();
    extras::check(&template)?;
    let origin = snapshot(&template, vars)?;
    if let (None, Some(origin)) = (&template.image, &origin) {
        template.image.clone_from(&origin.vm.image);
    }
    let image = template.image.as_deref().map(|uri| library.resolve(&expand(uri, vars)));
    let image = image.transpose()?;
    if image.is_none() && template.kernel.is_none() {
        return Err(
            Error::config("it has neither an image nor a kernel").help("give it an `image:`")
        );
    }
    let Some(set) = config.resource_sets.get(&template.resource_set) else {
        return Err(Error::config(format!(
            "the resource set `{}` does not exist",
            template.resource_set
        ))
        .help("`pavo template check` says where it is named"));
    };
    template.nic_queues = Some(extras::nic_queues(config, &template, set)?);
    let networks = set.networks.clone();
    let vars = Vars::default();
    let image_cache = config.image_cache.clone();
    let user_data = None;
    Ok(VmBlueprint { rank: 0, template, image, user_data, networks, image_cache, vars, origin })
}

/// What VMs of a template begin from, if it is a snapshot.
fn snapshot(template: &Template, vars: &Vars) -> Result<Option<Arc<Origin>>> {
    let Some(path) = &template.snapshot else { return Ok(None) };
    let path = extras::absolute(template, "snapshot", &path.to_string_lossy(), vars)?;
    Origin::snapshot(&path).map(Arc::new).map(Some)
}

/// A VM's user-data; a file is read once, however many VMs use it.
fn user_data(
    template: &Template,
    vars: &Vars,
    read: &mut BTreeMap<PathBuf, String>,
) -> Result<Option<String>> {
    match &template.user_data {
        None => Ok(None),
        Some(UserData::Inline(text)) => Ok(Some(text.clone())),
        Some(UserData::File(path)) => {
            let path = PathBuf::from(expand(&path.to_string_lossy(), vars));
            if !read.contains_key(&path) {
                let text = read_bounded(&path)
                    .map_err(|error| error.help("name a file that you can read in `user-data:`"))?;
                read.insert(path.clone(), text);
            }
            Ok(read.get(&path).cloned())
        }
    }
}

fn read_bounded(path: &Path) -> Result<String> {
    let doing = || format!("reading the user-data `{}`", path.display());
    let data = std::fs::metadata(path).while_doing(doing)?;
    // A device or pipe may have no end, and says nothing of its size.
    if !data.is_file() {
        return Err(Error::config("it is not a file")).while_doing(doing);
    }
    if data.len() > MAX_USER_DATA {
        let error = format!("it has {} bytes; 1 MiB is the most", data.len());
        return Err(Error::config(error)).while_doing(doing);
    }
    std::fs::read_to_string(path).while_doing(doing)
}

/// What the job adds to a blueprint.
#[derive(Debug)]
pub struct Job<'a> {
    pub owner: Owner,
    pub dir: &'a Path,
    /// What `%clusterdir` is.
    pub cluster_dir: &'a Path,
    /// The first of the host's CPUs that is this VM's, where nobody allots them but us.
    pub first_cpu: Option<u32>,
    pub allocation: &'a Allocation,
    pub accel: Accel,
    /// The public key that may log in.
    pub authorized_key: &'a str,
    /// By rank.
    pub host_keys: &'a [HostKey],
    /// Makes instance ids of different clusters different.
    pub nonce: u64,
}

impl VmBlueprint {
    /// What will be known of it, but for addresses and ports.
    pub fn record(&self, allocation: &Allocation, host: &str) -> VmRecord {
        VmRecord {
            rank: self.rank,
            template: self.template.name.clone(),
            image: self.image.as_ref().map(|image| image.uri.clone()),
            cores: allocation.cores,
            memory_mib: allocation.memory_mib,
            host: host.to_owned(),
            addresses: Vec::new(),
            ports: Vec::new(),
            ssh_user: "root".into(),
            drives: extras::drive_records(self),
            control: None,
        }
    }

    /// The complete specification of this VM.
    ///
    /// # Errors
    /// When the template asks for what the job has not got.
    pub fn spec(&self, job: &Job<'_>, nics: Vec<Nic>) -> Result<VmSpec> {
        let spec = self.own_spec(job, nics)?;
        match &self.origin {
            Some(origin) => origin.go_on(spec),
            None => Ok(spec),
        }
    }

    /// The same, whatever it goes on from.
    pub(super) fn own_spec(&self, job: &Job<'_>, nics: Vec<Nic>) -> Result<VmSpec> {
        let template = &self.template;
        let extras = extras::extras(self, job)
            .while_doing(|| format!("resolving the template `{}`", template.name))?;
        let domain = nics.iter().find_map(|nic| Some(nic.ipv4.as_ref()?.domain.clone()));
        let instance_id = template
            .instance_id
            .clone()
            .unwrap_or_else(|| format!("pavo-{}-vm{}-{:016x}", job.owner, self.rank, job.nonce));
        Ok(VmSpec {
            owner: job.owner,
            rank: self.rank,
            template: template.name.clone(),
            dir: job.dir.join(format!("vm{}", self.rank)),
            cores: job.allocation.cores.saturating_sub(extras.cpus.emulator),
            memory_mib: job.allocation.memory_mib,
            accel: job.accel,
            qemu_bin: template.qemu_bin.clone(),
            machine_type: template.machine_type.clone(),
            cpu_model: template.cpu_model.clone(),
            disk: self.image.as_ref().map(|image| Disk {
                backing: image.path.clone(),
                backing_format: image.format,
                virtual_size: image.virtual_size,
                model: template.disk_model,
                cache: template.disk_cache,
            }),
            nics,
            seed: Some(Seed {
                instance_id,
                hostname: format!("vm{}", self.rank),
                domain,
                user_data: self.user_data.clone(),
                authorized_keys: vec![job.authorized_key.to_owned()],
                host_key: job.host_keys[self.rank as usize].clone(),
            }),
            kernel: template.kernel.as_ref().map(|path| Kernel {
                path: path.clone(),
                append: "console=ttyS0 root=/dev/vda1".into(),
            }),
            custom_args: template.custom_args.clone(),
            dial: None,
            paused: false,
            restore: None,
            extras,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn user_data_without_an_end_is_not_read() {
        let error = read_bounded(Path::new("/dev/zero")).unwrap_err();
        assert_eq!(error.kind(), Kind::Config);
        assert!(error.report().contains("because: it is not a file"), "{}", error.report());
    }
}
