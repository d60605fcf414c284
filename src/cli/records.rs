//! What commands on records of all kinds have in common; `pavo group`, `profile`, `net`, `passwd`
//! and `project` are nothing else.

use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};

use super::App;
use super::inventory;
use super::out::OutputArgs;
use super::secrets;
use crate::error::{Context, Error, Result};
use crate::model::node::request::{self, Noun, Request};

/// The longest file that is imported.
const MAX_FILE: u64 = 512 << 20;

#[derive(Debug, Subcommand)]
pub enum Verb {
    Create(Create),
    Import(Import),
    Export(Export),
    List(List),
    Show(Show),
    Update(Update),
    Delete(Delete),
}

impl Verb {
    pub fn run(self, app: &App, noun: Noun) -> Result<u8> {
        match self {
            Self::Create(verb) => verb.run(app, noun),
            Self::Import(verb) => verb.run(app, noun),
            Self::Export(verb) => verb.run(app, noun),
            Self::List(verb) => verb.run(app, noun),
            Self::Show(verb) => verb.run(app, noun),
            Self::Update(verb) => verb.run(app, noun),
            Self::Delete(verb) => verb.run(app, noun),
        }
    }
}

/// A command on records of one kind.
macro_rules! command {
    ($(#[$help:meta])* $name:ident, $noun:ident) => {
        $(#[$help])*
        #[derive(Debug, Args)]
        pub struct $name {
            #[command(subcommand)]
            verb: Verb,
        }

        impl $name {
            pub fn run(self, app: &App) -> Result<u8> {
                self.verb.run(app, Noun::$noun)
            }
        }
    };
}

command! {
    /// Keep what nodes of a group have in common
    ///
    /// A node inherits what it does not say itself from its groups, in their order, and then from
    /// its profiles and theirs: `pavo group update rack1 mgt=ipmi profiles+=base`. Nodes join by
    /// `pavo node update NODES groups+=rack1`; `show` tells the members.
    Group, Group
}

command! {
    /// Keep profiles that nodes and groups inherit from
    ///
    /// `pavo profile create base netboot=pxe control/bmc_username=admin`, then
    /// `pavo node update all profiles+=base`. What is one node's alone (MAC addresses, addresses,
    /// BMCs) cannot be inherited.
    Profile, Profile
}

command! {
    /// Keep the networks of nodes
    ///
    /// `pavo net create c920 subnet=10.0.0.0 netmask=255.255.0.0 gateway=10.0.0.1
    /// dynamic_range=10.0.200.1-10.0.200.99 nameservers=10.0.0.2 domain=cluster.example`; also
    /// dhcpserver, ntpservers, vlan, notes. Nodes name them: `nics/eth0/network=c920`; then their
    /// addresses are in it, and not in its dynamic range.
    Net, Net
}

command! {
    /// Keep accounts and their passwords for BMCs and nodes
    ///
    /// `pavo passwd create bmc username=admin password=@-`, then `pavo node update all
    /// control/passwd=bmc`. `system` is the root of nodes. `password=@FILE` reads a file, `@-`
    /// asks on the terminal: what is on a command line, others may read. Passwords are kept
    /// sealed and never shown. Also crypt_method (md5, sha256, sha512, yescrypt), notes.
    Passwd, Passwd
}

command! {
    /// Keep projects, whose nodes may be
    ///
    /// `pavo project create alice members=ada,bob networks=c920 quota/nodes=16`, then
    /// `pavo node update node[1-4] project=alice`. Also admin, notes.
    Project, Project
}

/// Add records
///
/// If one cannot be, none is added. `n` in a value is the last number in a name: `vlan={n}`.
#[derive(Debug, Args)]
pub struct Create {
    /// The name, or a set of them: `rack[1-4]`
    #[arg(value_name = "NAMES")]
    names: String,

    /// Settings, `path=value`
    #[arg(value_name = "PATH=VALUE")]
    edits: Vec<String>,

    #[command(flatten)]
    how: How,
}

/// How a change is made, and told.
#[derive(Clone, Copy, Debug, Args)]
pub struct How {
    /// Only say what would come of it
    #[arg(long)]
    pub dry_run: bool,

    #[command(flatten)]
    pub format: OutputArgs,
}

/// Add those of a file
///
/// All of them, or, if anything is wrong in the file, none: every mistake is told with its
/// line. What is there already as the file has it is no mistake.
#[derive(Debug, Args)]
pub struct Import {
    /// What the file is; its name's ending says it otherwise
    #[arg(long = "format", value_name = "FORMAT")]
    said: Option<FileFormat>,

    /// A file with the passphrase of `export --with-secrets`; else it is asked for
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,

    #[command(flatten)]
    how: How,

    /// The file; `-` is standard input
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Write them to a file
///
/// What is written can be imported; passwords and keys are left out.
#[derive(Debug, Args)]
pub struct Export {
    /// What the file is to be; its name's ending says it otherwise, or it is JSON
    #[arg(long, value_name = "FORMAT")]
    format: Option<FileFormat>,

    /// The file, instead of standard output
    #[arg(short, long = "output", value_name = "FILE")]
    output: Option<PathBuf>,

    /// With passwords and keys, sealed to a passphrase
    #[arg(long)]
    with_secrets: bool,

    /// A file with that passphrase; else it is asked for
    #[arg(long, value_name = "FILE", requires = "with_secrets")]
    passphrase_file: Option<PathBuf>,

    /// Which, as a set; `all`
    #[arg(value_name = "NAMES")]
    names: String,
}

/// A file of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FileFormat {
    /// `{"nodes": [{"name": …}]}`, xcat3's
    Json,
    /// `nodes: {node1: …}`
    Yaml,
    /// A line for each record, a column for each setting
    Csv,
    /// ClusterShell's groups, `rack1: node[1-4]`: which nodes are in which
    Groups,
}

impl From<FileFormat> for request::Format {
    fn from(format: FileFormat) -> Self {
        match format {
            FileFormat::Json => Self::Json,
            FileFormat::Yaml => Self::Yaml,
            FileFormat::Csv => Self::Csv,
            FileFormat::Groups => Self::Groups,
        }
    }
}

/// List them
#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    format: OutputArgs,

    /// With these settings, inherited ones too: `mgt,control/bmc_address`
    #[arg(short = 'i', long, value_name = "PATHS", value_delimiter = ',')]
    fields: Vec<String>,

    /// Only what is their own
    #[arg(long)]
    own: bool,

    /// Which, as a set; without, all there are
    #[arg(value_name = "NAMES")]
    names: Option<String>,
}

/// Show what is known of them
///
/// What nodes inherit included, but for passwords and keys.
#[derive(Debug, Args)]
pub struct Show {
    #[command(flatten)]
    format: OutputArgs,

    /// Only these settings, `mgt,nics,control/bmc_address`
    #[arg(short = 'i', long, value_name = "PATHS", value_delimiter = ',')]
    fields: Vec<String>,

    /// Only what is their own
    #[arg(long)]
    own: bool,

    /// Which, as a set; `all`
    #[arg(value_name = "NAMES")]
    names: String,
}

/// Change settings
///
/// `path=value` sets, `path=` removes, `path+=value` and `path-=value` add to a list and take
/// from it: `arch=x86_64`, `control/bmc_username=admin`, `nics/eth0/ip=10.1.0.{n}`, `tags+=gpu`.
/// A value that is JSON is taken as such. Of a password, `=@FILE` reads a file and `=@-` asks.
/// If one cannot be changed so, none is.
#[derive(Debug, Args)]
pub struct Update {
    /// Which, as a set; `all`
    #[arg(value_name = "NAMES")]
    names: String,

    /// The changes
    #[arg(value_name = "PATH=VALUE", required = true)]
    edits: Vec<String>,

    #[command(flatten)]
    how: How,
}

/// Remove them
///
/// What others name is left: their names are told.
#[derive(Debug, Args)]
pub struct Delete {
    /// Which, as a set; `all`
    #[arg(value_name = "NAMES")]
    names: String,

    #[command(flatten)]
    how: How,
}

impl Create {
    fn run(self, app: &App, noun: Noun) -> Result<u8> {
        create(app, noun, self.names, self.edits, self.how)
    }
}

/// Adds records.
pub fn create(app: &App, noun: Noun, names: String, edits: Vec<String>, how: How) -> Result<u8> {
    let edits = secrets::from_files(noun, edits)?;
    let verb = request::Verb::Create { names, edits };
    inventory::change(app, how.format, Request { noun, verb, dry_run: how.dry_run })
}

impl Update {
    pub fn run(self, app: &App, noun: Noun) -> Result<u8> {
        let edits = secrets::from_files(noun, self.edits)?;
        let verb = request::Verb::Update { names: self.names, edits };
        let request = Request { noun, verb, dry_run: self.how.dry_run };
        inventory::change(app, self.how.format, request)
    }
}

impl Delete {
    pub fn run(self, app: &App, noun: Noun) -> Result<u8> {
        let verb = request::Verb::Delete { names: self.names };
        let request = Request { noun, verb, dry_run: self.how.dry_run };
        inventory::change(app, self.how.format, request)
    }
}

/// What a file is, as it was said or as its name ends.
fn format_of(said: Option<FileFormat>, file: &Path) -> Option<FileFormat> {
    let ending = file.extension().and_then(|it| it.to_str()).unwrap_or_default();
    said.or(match ending {
        "json" => Some(FileFormat::Json),
        "yaml" | "yml" => Some(FileFormat::Yaml),
        "csv" => Some(FileFormat::Csv),
        "groups" => Some(FileFormat::Groups),
        _ => None,
    })
}

impl Import {
    pub fn run(self, app: &App, noun: Noun) -> Result<u8> {
        let format = format_of(self.said, &self.file).ok_or_else(|| {
            Error::usage(format!("what is `{}`?", self.file.display()))
                .help("say it: `--format json`, `yaml`, `csv` or `groups`")
        })?;
        let (text, what) = self.read()?;
        let text = secrets::unlock(format.into(), text, self.passphrase_file.as_deref())
            .while_doing(|| format!("opening the secrets of {what}"))?;
        let verb = request::Verb::Import { format: format.into(), text, what };
        let request = Request { noun, verb, dry_run: self.how.dry_run };
        inventory::change(app, self.how.format, request)
    }

    /// The text, and what to call it.
    fn read(&self) -> Result<(String, String)> {
        let is_stdin = self.file.as_os_str() == "-";
        let what = match is_stdin {
            true => "standard input".to_owned(),
            false => format!("`{}`", self.file.display()),
        };
        if is_stdin && std::io::stdin().is_terminal() {
            return Err(Error::usage("standard input is a terminal"));
        }
        let too_long = || Error::usage(format!("{what} has {} MiB or more", MAX_FILE >> 20));
        let mut text = String::new();
        let mut read = || match is_stdin {
            true => std::io::stdin().lock().take(MAX_FILE).read_to_string(&mut text),
            false => {
                let file = std::fs::File::open(&self.file)?;
                // Not all of it, to find out in the end.
                if file.metadata()?.len() >= MAX_FILE {
                    return Ok(MAX_FILE as usize);
                }
                file.take(MAX_FILE).read_to_string(&mut text)
            }
        };
        let length = read().while_doing(|| format!("reading {what}"))?;
        if length as u64 >= MAX_FILE {
            return Err(too_long());
        }
        Ok((text, what))
    }
}

impl Export {
    pub fn run(self, app: &App, noun: Noun) -> Result<u8> {
        let said = self.output.as_deref().map_or(self.format, |file| format_of(self.format, file));
        let format = said.unwrap_or(FileFormat::Json);
        let (text, missing) = match self.with_secrets {
            false => app.block_on(inventory::export(app, noun, &self.names, format.into()))?,
            true => {
                if !matches!(format, FileFormat::Json | FileFormat::Yaml) {
                    return Err(Error::usage("secrets are in files of JSON or YAML only"));
                }
                let passphrase = secrets::passphrase(self.passphrase_file.as_deref(), true)?;
                let locked = inventory::export_locked(
                    app,
                    noun,
                    &self.names,
                    format.into(),
                    passphrase.expose(),
                );
                app.block_on(locked)?
            }
        };
        let code = inventory::complain(app, &missing);
        match &self.output {
            None => app.out.data(&text)?,
            Some(file) => {
                write(file, &text).while_doing(|| format!("writing `{}`", file.display()))?;
                app.out.status(&format!("Exported to `{}`.", file.display()));
            }
        }
        Ok(code)
    }
}

/// Writes a file that appears once it is whole.
fn write(file: &Path, text: &str) -> Result<()> {
    let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty());
    let mut aside = tempfile::NamedTempFile::new_in(dir.unwrap_or(Path::new(".")))
        .while_doing(|| "creating a file beside it".into())?;
    aside.write_all(text.as_bytes()).while_doing(|| "filling a file beside it".into())?;
    aside.persist(file).while_doing(|| "moving it to its place".into())?;
    Ok(())
}

impl List {
    pub fn run(self, app: &App, noun: Noun) -> Result<u8> {
        let only = ["name".to_owned()];
        let fields = if self.fields.is_empty() { &only[..] } else { &self.fields };
        let names = self.names.as_deref();
        let (rows, missing) = app.block_on(inventory::rows(app, noun, names, fields, self.own))?;
        if self.format.output.is_none() && self.fields.is_empty() {
            let kind = if noun == Noun::Net { "network" } else { noun.as_str() };
            let lines = rows.iter().map(|(name, _)| format!("{name} ({kind})\n"));
            app.out.data(&lines.collect::<String>())?;
        } else {
            inventory::print_fields(app, self.format, &self.fields, rows)?;
        }
        Ok(inventory::complain(app, &missing))
    }
}

impl Show {
    pub fn run(self, app: &App, noun: Noun) -> Result<u8> {
        let names = Some(self.names.as_str());
        let (rows, missing) =
            app.block_on(inventory::rows(app, noun, names, &self.fields, self.own))?;
        inventory::print_rows(app, self.format, noun.as_str(), rows)?;
        Ok(inventory::complain(app, &missing))
    }
}
