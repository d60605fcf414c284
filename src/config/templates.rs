//! `templates.yaml` and `templates.d/*.yaml`: kinds of VM, which may inherit from
//! one another.

use std::collections::{BTreeMap, HashMap};

use super::read::{Fields, Item};
use super::resources::Resources;
use super::types::{Mmp, MountPoint, PersistentDrive, Template, UserData};
use crate::model::cluster::plain_name;
use crate::model::nearest::nearest;
use crate::model::vm::{DiskCache, DiskFormat, DiskModel, Firmware, MountKind, RemoteDisplay};

pub const SETTINGS: &[&str] = &[
    "image",
    "resource-set",
    "inherits",
    "description",
    "user-data",
    "instance-id",
    "mount-points",
    "persistent-drives",
    "custom-args",
    "qemu-bin",
    "nic-model",
    "nic-queues",
    "machine-type",
    "cpu-model",
    "disk-model",
    "disk-cache",
    "emulator-cores",
    "bind-vcpus",
    "full-node",
    "remote-display",
    "kernel",
    "firmware",
    "iothreads",
    "huge-pages",
    "tpm",
    "sensitive",
    "agent",
    "snapshot",
];
pub const MOUNT_POINT: &[&str] = &["path", "readonly", "type"];
pub const PERSISTENT_DRIVE: &[&str] = &["format", "mmp", "cache", "backup"];

/// How many queues an interface may have: more than any guest here has CPUs is no use.
pub const NIC_QUEUES: std::ops::RangeInclusive<u32> = 1..=64;

const DISK_CACHES: &[(&str, DiskCache)] = &[
    ("writeback", DiskCache::Writeback),
    ("none", DiskCache::None),
    ("unsafe", DiskCache::Unsafe),
    ("writethrough", DiskCache::Writethrough),
    ("directsync", DiskCache::Directsync),
];

const MOUNT_KINDS: &[(&str, MountKind)] =
    &[("virtio-9p", MountKind::Virtio9p), ("virtio-fs", MountKind::VirtioFs)];

/// As long as the longest tag of virtio-9p.
const MAX_TAG: usize = 31;

/// Who wrote a file of templates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Author {
    Site,
    User,
}

/// A template as it is written.
struct Definition<'a> {
    fields: Fields<'a>,
    author: Author,
    parent: Option<String>,
}

/// Reads the files, the site's first. `resources` are those that exist, when that
/// could be read.
pub fn read(files: &[(Author, Item)], resources: Option<&Resources>) -> BTreeMap<String, Template> {
    let mut definitions = BTreeMap::new();
    for (author, file) in files {
        for (name, item) in file.entries() {
            define(&mut definitions, name, &item, *author);
        }
    }
    check_parents(&mut definitions);
    let (_, default) = resources.cloned().unwrap_or_default();
    let templates = resolve(&definitions, default.as_deref().unwrap_or(""));
    if let Some((sets, _)) = resources {
        check_resource_sets(&definitions, &templates, &sets.keys().collect::<Vec<_>>());
    }
    templates
}

fn define<'a>(
    definitions: &mut BTreeMap<String, Definition<'a>>,
    name: &str,
    item: &Item<'a>,
    author: Author,
) {
    if name.starts_with('_') {
        item.problem("template names starting with `_` are restricted");
    } else if !plain_name(name) {
        item.problem(
            "a template's name is letters, digits and `_-.:/@+`, and no part begins with `.`",
        );
    }
    if let Some(first) = definitions.get(name) {
        item.problem(format!(
            "template name '{name}' is already in use (defined in {} and {})",
            first.fields.owner.file.display(),
            item.file.display()
        ));
        return;
    }
    let fields = item.fields(SETTINGS);
    let parent = fields.get("inherits").and_then(Item::text);
    definitions.insert(name.into(), Definition { fields, author, parent });
}

/// Reports parents that are not there, and forgets them.
fn check_parents(definitions: &mut BTreeMap<String, Definition>) {
    let authors: BTreeMap<String, Author> =
        definitions.iter().map(|(name, definition)| (name.clone(), definition.author)).collect();
    for definition in definitions.values_mut() {
        let (Some(parent), Some(item)) = (&definition.parent, definition.fields.get("inherits"))
        else {
            continue;
        };
        let visible = |author: Author| definition.author == Author::User || author == Author::Site;
        match authors.get(parent) {
            Some(author) if visible(*author) => continue,
            Some(_) => item.problem(format!(
                "inherits from invalid template `{parent}`: the site's templates only inherit \
                 from the site's"
            )),
            None => {
                let names = authors.iter().filter(|(_, author)| visible(**author));
                let near = nearest(parent, names.map(|(name, _)| name.as_str()));
                item.suggest(format!("inherits from invalid template `{parent}`"), near);
            }
        }
        definition.parent = None;
    }
}

/// Fills in what templates inherit. Each is read once, its parent before it.
fn resolve(
    definitions: &BTreeMap<String, Definition>,
    default_resource_set: &str,
) -> BTreeMap<String, Template> {
    let mut templates: BTreeMap<String, Template> = BTreeMap::new();
    for name in definitions.keys() {
        let mut line: Vec<&String> = Vec::new();
        let mut place: HashMap<&String, usize> = HashMap::new();
        let mut next = Some(name);
        while let Some(name) = next.filter(|name| !templates.contains_key(*name)) {
            if let Some(&start) = place.get(name) {
                report_cycle(definitions, &line[start..]);
                break;
            }
            place.insert(name, line.len());
            line.push(name);
            next = definitions[name].parent.as_ref();
        }
        for name in line.into_iter().rev() {
            let definition = &definitions[name];
            let parent = definition.parent.as_ref().and_then(|parent| templates.get(parent));
            let template = build(name, definition, parent, default_resource_set);
            templates.insert(name.clone(), template);
        }
    }
    templates
}

fn report_cycle(definitions: &BTreeMap<String, Definition>, cycle: &[&String]) {
    let around: Vec<&str> = cycle.iter().chain(&cycle[..1]).map(|name| name.as_str()).collect();
    if let Some(item) = definitions[cycle[0]].fields.get("inherits") {
        item.problem(format!("the template inherits from itself: {}", around.join(" -> ")));
    }
}

/// The template: what its parent has, then what it says itself. A null is the
/// default, whatever the parent has.
fn build(
    name: &str,
    definition: &Definition,
    parent: Option<&Template>,
    default_resource_set: &str,
) -> Template {
    let fields = &definition.fields;
    let origin = fields.owner.file.display().to_string();
    let mut default = Template::new(name, origin.clone());
    default.resource_set = default_resource_set.into();
    let mut template = parent.unwrap_or(&default).clone();
    template.name = name.into();
    template.origin = origin;
    template.inherits.clone_from(&definition.parent);
    template.description.clear();
    for key in SETTINGS {
        if let Some(item) = fields.given(key) {
            template.places.insert((*key).into(), item.place());
        }
    }
    read_guest(fields, &mut template, &default);
    read_machine(fields, &mut template, &default);
    read_extras(fields, &mut template);
    template
}

/// Sets a field to what is given, or with a null to its default.
fn set<'a, T>(
    fields: &Fields<'a>,
    key: &str,
    field: &mut T,
    default: T,
    read: fn(&Item<'a>) -> Option<T>,
) {
    if let Some(item) = fields.given(key) {
        *field = if item.is_null() { None } else { read(item) }.unwrap_or(default);
    }
}

/// What the guest is made of.
fn read_guest(fields: &Fields, template: &mut Template, default: &Template) {
    let some_text = |item: &Item| item.text().map(Some);
    set(fields, "image", &mut template.image, None, image);
    let resource_set = default.resource_set.clone();
    set(fields, "resource-set", &mut template.resource_set, resource_set, Item::text);
    set(fields, "description", &mut template.description, String::new(), Item::any_text);
    set(fields, "user-data", &mut template.user_data, None, user_data);
    set(fields, "instance-id", &mut template.instance_id, None, some_text);
    set(fields, "mount-points", &mut template.mount_points, BTreeMap::new(), mount_points);
    set(fields, "persistent-drives", &mut template.persistent_drives, Vec::new(), drives);
    set(fields, "kernel", &mut template.kernel, None, |item| item.text().map(|t| Some(t.into())));
}

/// How it is run.
fn read_machine(fields: &Fields, template: &mut Template, default: &Template) {
    let some_text = |item: &Item| item.text().map(Some);
    let t = template;
    set(fields, "custom-args", &mut t.custom_args, Vec::new(), |item| {
        Some(item.list().iter().filter_map(Item::any_text).collect())
    });
    let qemu_bin = default.qemu_bin.clone();
    set(fields, "qemu-bin", &mut t.qemu_bin, qemu_bin, |item| item.text().map(Into::into));
    set(fields, "nic-model", &mut t.nic_model, default.nic_model.clone(), Item::text);
    set(fields, "nic-queues", &mut t.nic_queues, None, |item| item.integer(NIC_QUEUES).map(Some));
    set(fields, "machine-type", &mut t.machine_type, default.machine_type.clone(), Item::text);
    set(fields, "cpu-model", &mut t.cpu_model, None, some_text);
    set(fields, "disk-model", &mut t.disk_model, default.disk_model, |item| {
        item.word(&[
            ("virtio", DiskModel::Virtio),
            ("virtio-scsi", DiskModel::VirtioScsi),
            ("ide", DiskModel::Ide),
        ])
    });
    set(fields, "disk-cache", &mut t.disk_cache, default.disk_cache, |item| item.word(DISK_CACHES));
    set(fields, "emulator-cores", &mut t.emulator_cores, 0, |item| item.integer(0..=1024));
    set(fields, "bind-vcpus", &mut t.bind_vcpus, None, |item| item.boolean().map(Some));
    set(fields, "full-node", &mut t.full_node, default.full_node, Item::boolean);
    set(fields, "remote-display", &mut t.remote_display, None, |item| {
        item.word(&[("spice", RemoteDisplay::Spice), ("vnc", RemoteDisplay::Vnc)]).map(Some)
    });
}

/// What pcocc does not have.
fn read_extras(fields: &Fields, t: &mut Template) {
    set(fields, "firmware", &mut t.firmware, Firmware::Bios, |item| {
        item.word(&[("bios", Firmware::Bios), ("uefi", Firmware::Uefi)])
    });
    set(fields, "iothreads", &mut t.iothreads, 0, |item| item.integer(0..=16));
    set(fields, "huge-pages", &mut t.huge_pages, false, Item::boolean);
    set(fields, "tpm", &mut t.tpm, false, Item::boolean);
    set(fields, "sensitive", &mut t.sensitive, false, Item::boolean);
    set(fields, "snapshot", &mut t.snapshot, None, |item| item.text().map(|t| Some(t.into())));
    set(fields, "agent", &mut t.inject_agent, false, |item| {
        item.word(&[("image", false), ("inject", true)])
    });
}

/// `image: false` is none.
fn image(item: &Item) -> Option<Option<String>> {
    match item.node().as_scalar().and_then(|scalar| scalar.as_bool()) {
        Some(false) => Some(None),
        _ => item.text().map(Some),
    }
}

fn user_data(item: &Item) -> Option<Option<UserData>> {
    if item.is_mapping() {
        return Some(Some(UserData::Inline(format!("#cloud-config\n{}", item.node().to_yaml()))));
    }
    let path = item.text()?;
    item.names_file(&path);
    Some(Some(UserData::File(path.into())))
}

fn mount_points(item: &Item) -> Option<BTreeMap<String, MountPoint>> {
    let one = |(tag, item): (&str, Item)| {
        if tag.is_empty() || tag.len() > MAX_TAG {
            item.problem(format!("a tag has 1 to {MAX_TAG} letters"));
        }
        let mut point =
            MountPoint { path: String::new(), readonly: false, kind: MountKind::default() };
        if item.is_mapping() {
            let fields = item.fields(MOUNT_POINT);
            point.path = fields.required("path").and_then(Item::text)?;
            fields.read("readonly", &mut point.readonly, Item::boolean);
            fields.read("type", &mut point.kind, |item| item.word(MOUNT_KINDS));
        } else {
            point.path = item.text()?;
        }
        Some((tag.to_owned(), point))
    };
    Some(item.entries().into_iter().filter_map(one).collect())
}

/// A list of paths, or of a path with its settings.
fn drives(item: &Item) -> Option<Vec<PersistentDrive>> {
    let mut drives = Vec::new();
    for item in item.list() {
        if !item.is_mapping() {
            drives.extend(item.text().map(|path| drive(path, None)));
            continue;
        }
        let with_settings =
            |(path, item): (&str, Item)| drive(path.into(), Some(&item.fields(PERSISTENT_DRIVE)));
        drives.extend(item.entries().into_iter().map(with_settings));
    }
    Some(drives)
}

fn drive(path: String, fields: Option<&Fields>) -> PersistentDrive {
    let mut drive = PersistentDrive {
        path,
        format: None,
        mmp: Mmp::Yes,
        cache: DiskCache::Writeback,
        backup: None,
    };
    if let Some(fields) = fields {
        fields.read("format", &mut drive.format, |item| {
            item.word(&[("raw", DiskFormat::Raw), ("qcow2", DiskFormat::Qcow2)]).map(Some)
        });
        fields.read("mmp", &mut drive.mmp, |item| {
            // `yes` without quotes is a boolean, `"yes"` a word.
            let switch = item.node().as_scalar().and_then(|scalar| scalar.as_bool());
            let words = [("yes", Mmp::Yes), ("cluster", Mmp::Cluster), ("no", Mmp::No)];
            switch.map(|on| if on { Mmp::Yes } else { Mmp::No }).or_else(|| item.word(&words))
        });
        fields.read("cache", &mut drive.cache, |item| item.word(DISK_CACHES));
        fields.read("backup", &mut drive.backup, |item| item.text().map(Some));
    }
    drive
}

/// Reports resource sets that do not exist, where they are named.
fn check_resource_sets(
    definitions: &BTreeMap<String, Definition>,
    templates: &BTreeMap<String, Template>,
    sets: &[&String],
) {
    for (name, definition) in definitions {
        if let Some(item) = definition.fields.get("resource-set") {
            item.known("invalid resource set", sets.iter().copied());
        } else if templates.get(name).is_some_and(|template| template.resource_set.is_empty()) {
            definition.fields.owner.problem(
                "the setting `resource-set` is missing, and no resource set is the default",
            );
        }
    }
}
