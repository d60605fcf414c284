//! `pavo template`

use std::collections::BTreeMap;
use std::path::Path;

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::Value;

use super::App;
use super::config::{Findings, load, sources};
use super::out::{Column, OutputArgs};
use crate::config::{self, UserData, nearest};
use crate::error::{Context, Error, Result};
use crate::model::vm::{DiskCache, DiskFormat, DiskModel, Firmware, RemoteDisplay};
use crate::ops::resolve::{templates, unknown_template};

/// Look at the kinds of VM that a cluster may be made of
#[derive(Debug, Args)]
pub struct Template {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    List(List),
    Show(Show),
    Check(Check),
}

/// List templates
#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    format: OutputArgs,
}

/// Show a template's settings, what it inherits included
///
/// Settings that have their default value are left out.
#[derive(Debug, Args)]
struct Show {
    #[command(flatten)]
    format: OutputArgs,

    /// Show the settings that have their default value too
    #[arg(short, long)]
    all: bool,

    /// The template
    #[arg(value_name = "TEMPLATE")]
    name: String,
}

/// Report everything that is wrong in templates
///
/// As `pavo config check`, of templates only.
#[derive(Debug, Args)]
struct Check {
    #[command(flatten)]
    format: OutputArgs,

    /// Templates to check, instead of all
    #[arg(value_name = "TEMPLATE")]
    names: Vec<String>,
}

impl Template {
    pub fn run(self, app: &App) -> Result<u8> {
        match self.verb {
            Verb::List(verb) => verb.run(app),
            Verb::Show(verb) => verb.run(app),
            Verb::Check(verb) => verb.run(app),
        }
    }
}

/// A template with its settings as they are written in files.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct View<'a> {
    name: &'a str,
    /// The file it is defined in.
    origin: &'a str,
    image: Option<&'a str>,
    resource_set: &'a str,
    inherits: Option<&'a str>,
    description: &'a str,
    /// A path, or the text itself.
    user_data: Option<String>,
    instance_id: Option<&'a str>,
    mount_points: BTreeMap<&'a str, MountView<'a>>,
    persistent_drives: Vec<DriveView<'a>>,
    custom_args: &'a [String],
    qemu_bin: String,
    nic_model: &'a str,
    nic_queues: Option<u32>,
    machine_type: &'a str,
    cpu_model: Option<&'a str>,
    disk_model: DiskModel,
    disk_cache: DiskCache,
    emulator_cores: u32,
    bind_vcpus: Option<bool>,
    full_node: bool,
    remote_display: Option<RemoteDisplay>,
    kernel: Option<String>,
    firmware: Firmware,
    iothreads: u32,
    huge_pages: bool,
    tpm: bool,
    agent: &'static str,
    sensitive: bool,
    snapshot: Option<String>,
}

#[derive(Debug, Serialize)]
struct MountView<'a> {
    path: &'a str,
    readonly: bool,
    r#type: &'static str,
}

#[derive(Debug, Serialize)]
struct DriveView<'a> {
    path: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<DiskFormat>,
    mmp: config::Mmp,
    cache: DiskCache,
    backup: Option<&'a str>,
}

impl<'a> From<&'a config::Template> for View<'a> {
    fn from(t: &'a config::Template) -> Self {
        let mount = |(tag, point): (&'a String, &'a config::MountPoint)| {
            let view = MountView {
                path: &point.path,
                readonly: point.readonly,
                r#type: point.kind.as_str(),
            };
            (tag.as_str(), view)
        };
        let drive = |drive: &'a config::PersistentDrive| DriveView {
            path: &drive.path,
            format: drive.format,
            mmp: drive.mmp,
            cache: drive.cache,
            backup: drive.backup.as_deref(),
        };
        Self {
            name: &t.name,
            origin: &t.origin,
            image: t.image.as_deref(),
            resource_set: &t.resource_set,
            inherits: t.inherits.as_deref(),
            description: &t.description,
            user_data: t.user_data.as_ref().map(|data| match data {
                UserData::File(path) => path.display().to_string(),
                UserData::Inline(text) => text.clone(),
            }),
            instance_id: t.instance_id.as_deref(),
            mount_points: t.mount_points.iter().map(mount).collect(),
            persistent_drives: t.persistent_drives.iter().map(drive).collect(),
            custom_args: &t.custom_args,
            qemu_bin: t.qemu_bin.display().to_string(),
            nic_model: &t.nic_model,
            nic_queues: t.nic_queues,
            machine_type: &t.machine_type,
            cpu_model: t.cpu_model.as_deref(),
            disk_model: t.disk_model,
            disk_cache: t.disk_cache,
            emulator_cores: t.emulator_cores,
            bind_vcpus: t.bind_vcpus,
            full_node: t.full_node,
            remote_display: t.remote_display,
            kernel: t.kernel.as_ref().map(|path| path.display().to_string()),
            firmware: t.firmware,
            iothreads: t.iothreads,
            huge_pages: t.huge_pages,
            tpm: t.tpm,
            agent: if t.inject_agent { "inject" } else { "image" },
            sensitive: t.sensitive,
            snapshot: t.snapshot.as_ref().map(|path| path.display().to_string()),
        }
    }
}

impl View<'_> {
    /// The settings by name, as plain values.
    fn settings(&self) -> Result<serde_json::Map<String, Value>> {
        match serde_json::to_value(self).while_doing(|| "showing a template".into())? {
            Value::Object(settings) => Ok(settings),
            _ => Err(Error::bug("a template is no record")),
        }
    }
}

/// Every template, those that images are included.
fn all(app: &App) -> Result<BTreeMap<String, config::Template>> {
    let config = load(app)?;
    let library = app.library(&config);
    let templates = templates(&config, &library)?;
    app.warn_of(&library);
    Ok(templates)
}

impl List {
    fn run(self, app: &App) -> Result<u8> {
        let templates = all(app)?;
        let rows: Vec<View> = templates.values().map(View::from).collect();
        app.out.list(
            self.format,
            &rows,
            &[
                Column { title: "name", text: |row| row.name.into() },
                Column { title: "image", text: |row| row.image.unwrap_or("").into() },
                Column { title: "resource-set", text: |row| row.resource_set.into() },
                Column { title: "inherits", text: |row| row.inherits.unwrap_or("").into() },
                Column { title: "description", text: |row| row.description.into() },
            ],
        )?;
        Ok(0)
    }
}

impl Show {
    fn run(self, app: &App) -> Result<u8> {
        let templates = all(app)?;
        let template =
            templates.get(&self.name).ok_or_else(|| unknown_template(&self.name, &templates))?;
        let view = View::from(template);
        let default = config::Template::new(&*template.name, &*template.origin);
        let default = View::from(&default).settings()?;
        let mut settings = view.settings()?;
        // What says which template this is comes first, whatever its value.
        let first = ["name", "origin", "image", "resource-set"];
        let first = first.map(|key| (key.to_owned(), settings.remove(key).unwrap_or_default()));
        let rest = settings.into_iter().filter(|(key, value)| self.all || default[key] != *value);
        let lines: Vec<(String, String)> =
            first.into_iter().chain(rest).map(|(key, value)| (key, shown(&value))).collect();
        let lines: Vec<(&str, String)> =
            lines.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        app.out.record(self.format, &view, &lines)?;
        Ok(0)
    }
}

/// A value for people: text as it is, further lines indented.
fn shown(value: &Value) -> String {
    let text = match value {
        Value::Null => String::new(),
        Value::String(text) => text.trim_end().to_owned(),
        other => other.to_string(),
    };
    let safe = |letter: char| match letter {
        '\n' => "\n    ".to_owned(),
        letter if letter.is_control() => letter.escape_default().to_string(),
        letter => letter.to_string(),
    };
    text.chars().map(safe).collect()
}

impl Check {
    fn run(self, app: &App) -> Result<u8> {
        let sources = sources(app);
        let loaded = config::load(&sources);
        // A file that is no YAML may hold any template.
        let in_broken_file = |problem: &config::Problem| problem.key.is_empty();
        let all_read = !loaded.problems.iter().filter(|p| in_templates(p)).any(in_broken_file);
        let known = loaded.config.templates.keys();
        let unknown = |name: &&String| all_read && !known.clone().any(|known| known == *name);
        if let Some(unknown) = self.names.iter().find(unknown) {
            return Err(not_found(unknown, known.map(String::as_str)));
        }
        let about = |problem: &config::Problem| {
            let named = |name: &String| {
                let rest = problem.key.strip_prefix(name.as_str());
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
            };
            let wanted = self.names.is_empty() || self.names.iter().any(named);
            in_templates(problem) && (wanted || in_broken_file(problem))
        };
        let files = loaded.check_named_files(&sources);
        let problems = files.into_iter().chain(loaded.problems).filter(about);
        let warnings = loaded.warnings.into_iter().filter(about).collect();
        Findings::new(problems, warnings).report(app, self.format, "templates are correct")
    }
}

/// Whether the problem is in a file of templates.
fn in_templates(problem: &config::Problem) -> bool {
    let folder = problem.file.parent().and_then(Path::file_name);
    problem.file.ends_with("templates.yaml") || folder.is_some_and(|name| name == "templates.d")
}

fn not_found<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Error {
    let error = Error::not_found(format!("Template not found: {}", name.escape_debug()));
    match nearest(name, names) {
        Some(near) => error.help(format!("did you mean `{near}`?")),
        None => error.help("see `pavo template list`"),
    }
}
