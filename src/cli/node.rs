//! `pavo node`

use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

use super::App;
use super::daemon::keeper;
use super::out::OutputArgs;
use crate::error::{Context, Error, Kind, Result};
use crate::model::node::Tree;
use crate::model::node::request::{self, Noun, Outcome, Request};
use crate::model::nodeset::NodeSet;
use crate::ops::nodesets::{self, Known};

/// More lines than this are folded on a terminal.
const FOLDED: usize = 20;

/// The longest file that is imported.
const MAX_FILE: u64 = 512 << 20;

/// Keep an inventory of the machines below the clusters
///
/// Nodes are named by sets: `node[1-25]`, `@rack1!node7`, `arch=x86_64`, `all`; see `pavo
/// nodeset`. For now the inventory is yours and on this machine, beside what runs here.
#[derive(Debug, Args)]
pub struct Node {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(Create),
    Import(Import),
    Export(Export),
    List(List),
    Show(Show),
    Update(Update),
    Delete(Delete),
}

/// Add nodes
///
/// `pavo node create node[1-250] arch=x86_64 control/bmc_address={node}-bmc
/// nics/eth0/ip=10.1.0.{n}` gives each its own: `n` is the last number in a node's name,
/// `{n%250+1}` a sum, `{n:03d}` with zeros in front. If one cannot be, none is added.
#[derive(Debug, Args)]
struct Create {
    /// How its power is controlled, as `mgt=…`
    #[arg(long, value_name = "DRIVER")]
    mgt: Option<String>,

    /// How it boots from the network, as `netboot=…`
    #[arg(long, value_name = "METHOD")]
    netboot: Option<String>,

    /// Its processor, as `arch=…`
    #[arg(long)]
    arch: Option<String>,

    /// Its type, as `type=…`
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,

    /// Settings of its control, `bmc_address=…,bmc_username=…`
    #[arg(short, long, value_name = "KEY=VALUE,…")]
    control: Vec<String>,

    /// An interface, `mac=…,ip=…,name=eth0`; more than once for several
    #[arg(short = 'i', long, value_name = "KEY=VALUE,…")]
    nic: Vec<String>,

    /// The nodes
    #[arg(value_name = "NODES")]
    nodes: String,

    /// Settings, `path=value`
    #[arg(value_name = "PATH=VALUE")]
    edits: Vec<String>,
}

/// Add the nodes of a file
///
/// All of them, or, if anything is wrong in the file, none: every mistake is told with its
/// line. Nodes that are there as the file has them are no mistake.
#[derive(Debug, Args)]
struct Import {
    /// What the file is; its name's ending says it otherwise
    #[arg(long, value_name = "FORMAT")]
    format: Option<FileFormat>,

    /// The file; `-` is standard input
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Write nodes to a file
///
/// What is written can be imported; passwords and keys are left out.
#[derive(Debug, Args)]
struct Export {
    /// What the file is to be; its name's ending says it otherwise, or it is JSON
    #[arg(long, value_name = "FORMAT")]
    format: Option<FileFormat>,

    /// The file, instead of standard output
    #[arg(short, long = "output", value_name = "FILE")]
    output: Option<PathBuf>,

    /// The nodes
    #[arg(value_name = "NODES")]
    nodes: String,
}

/// A file of nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FileFormat {
    /// `{"nodes": [{"name": …}]}`, xcat3's
    Json,
    /// `nodes: {node1: …}`
    Yaml,
    /// A line for each node, a column for each setting
    Csv,
    /// ClusterShell's groups, `rack1: node[1-4]`: who is in which
    Groups,
}

/// List nodes
#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    format: OutputArgs,

    /// These; without any, all there are
    #[arg(value_name = "NODES")]
    nodes: Option<String>,
}

/// Show what is known of nodes
///
/// What they inherit included, but for passwords and keys.
#[derive(Debug, Args)]
struct Show {
    #[command(flatten)]
    format: OutputArgs,

    /// Only these settings, `mgt,nics,control/bmc_address`
    #[arg(short = 'i', long, value_name = "PATHS", value_delimiter = ',')]
    fields: Vec<String>,

    /// Only what is their own
    #[arg(long)]
    own: bool,

    /// The nodes
    #[arg(value_name = "NODES")]
    nodes: String,
}

/// Change settings of nodes
///
/// `path=value` sets, `path=` removes, `path+=value` and `path-=value` add to a list and take
/// from it: `arch=x86_64`, `control/bmc_username=admin`, `nics/eth0/ip=10.1.0.{n}`, `tags+=gpu`.
/// A value that is JSON is taken as such. If one node cannot be changed so, none is.
#[derive(Debug, Args)]
struct Update {
    /// The nodes
    #[arg(value_name = "NODES")]
    nodes: String,

    /// The changes
    #[arg(value_name = "PATH=VALUE", required = true)]
    edits: Vec<String>,
}

/// Remove nodes
#[derive(Debug, Args)]
struct Delete {
    /// The nodes
    #[arg(value_name = "NODES")]
    nodes: String,
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

impl Node {
    pub fn run(self, app: &App) -> Result<u8> {
        match self.verb {
            Verb::Create(verb) => verb.run(app),
            Verb::Import(verb) => verb.run(app),
            Verb::Export(verb) => verb.run(app),
            Verb::List(verb) => verb.run(app),
            Verb::Show(verb) => verb.run(app),
            Verb::Update(verb) => verb.run(app),
            Verb::Delete(verb) => verb.run(app),
        }
    }
}

/// The text of a set for the inventory, with what files and Slurm say in it.
async fn filled(app: &App, text: &str) -> Result<String> {
    nodesets::fill_in(text, Some(&Known::by(keeper(app)?))).await
}

/// Changes the inventory, and says what came of it.
fn change(app: &App, verb: request::Verb) -> Result<u8> {
    let mut request = Request { noun: Noun::Node, verb, dry_run: false };
    let outcomes = app.block_on(async {
        use request::Verb::{Create, Delete, Update};
        if let Create { names, .. } | Update { names, .. } | Delete { names } = &mut request.verb {
            *names = filled(app, names).await?;
        }
        keeper(app)?.apply(request).await
    })?;
    report(app, &outcomes)
}

/// A line for each node, and how many have succeeded.
fn report(app: &App, outcomes: &[Outcome]) -> Result<u8> {
    let success = outcomes.iter().filter(|outcome| outcome.ok).count();
    let mut text = String::new();
    if app.out.stdout_is_terminal() && outcomes.len() > FOLDED {
        let mut texts: Vec<&str> = outcomes.iter().map(|outcome| outcome.text.as_str()).collect();
        texts.sort_unstable();
        texts.dedup();
        for one in texts {
            let alike = outcomes.iter().filter(|outcome| outcome.text == one);
            let nodes: NodeSet = alike.map(|outcome| &outcome.name).collect();
            text += &format!("{nodes} ({}): {one}\n", nodes.len());
        }
    } else {
        for outcome in outcomes {
            text += &format!("{}: {}\n", outcome.name, outcome.text);
        }
    }
    text += &format!("\nSuccess: {success}  Total: {}\n", outcomes.len());
    app.out.data(&text)?;
    Ok(if success == outcomes.len() { 0 } else { Kind::Partial.exit_code() })
}

impl Create {
    fn run(self, app: &App) -> Result<u8> {
        let mut edits = Vec::new();
        for (path, value) in [
            ("mgt", &self.mgt),
            ("netboot", &self.netboot),
            ("arch", &self.arch),
            ("type", &self.kind),
        ] {
            edits.extend(value.as_ref().map(|value| format!("{path}={value}")));
        }
        edits.extend(
            self.control.iter().flat_map(|it| it.split(',')).map(|it| format!("control/{it}")),
        );
        for (index, nic) in self.nic.iter().enumerate() {
            let pairs: Vec<&str> = nic.split(',').collect();
            let name = pairs.iter().find_map(|pair| pair.strip_prefix("name="));
            let name = name.map_or_else(|| format!("eth{index}"), str::to_owned);
            let others = pairs.iter().filter(|pair| !pair.starts_with("name="));
            edits.extend(others.map(|pair| format!("nics/{name}/{pair}")));
        }
        edits.extend(self.edits);
        change(app, request::Verb::Create { names: self.nodes, edits })
    }
}

impl Update {
    fn run(self, app: &App) -> Result<u8> {
        change(app, request::Verb::Update { names: self.nodes, edits: self.edits })
    }
}

impl Delete {
    fn run(self, app: &App) -> Result<u8> {
        change(app, request::Verb::Delete { names: self.nodes })
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
    fn run(self, app: &App) -> Result<u8> {
        let format = format_of(self.format, &self.file).ok_or_else(|| {
            Error::usage(format!("what is `{}`?", self.file.display()))
                .help("say it: `--format json`, `yaml`, `csv` or `groups`")
        })?;
        let (text, what) = self.read()?;
        change(app, request::Verb::Import { format: format.into(), text, what })
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
        let mut text = String::new();
        let mut read = || match is_stdin {
            true => std::io::stdin().lock().take(MAX_FILE).read_to_string(&mut text),
            false => std::fs::File::open(&self.file)?.take(MAX_FILE).read_to_string(&mut text),
        };
        let length = read().while_doing(|| format!("reading {what}"))?;
        if length as u64 == MAX_FILE {
            return Err(Error::usage(format!("{what} has {} MiB or more", MAX_FILE >> 20)));
        }
        Ok((text, what))
    }
}

/// Says which nodes were not there.
fn complain(app: &App, missing: &[Outcome]) -> u8 {
    missing.iter().for_each(|it| app.out.status(&format!("{}: {}", it.name, it.text)));
    if missing.is_empty() { 0 } else { Kind::Partial.exit_code() }
}

impl Export {
    fn run(self, app: &App) -> Result<u8> {
        let said = self.output.as_deref().map_or(self.format, |file| format_of(self.format, file));
        let format = said.unwrap_or(FileFormat::Json).into();
        let (text, missing, count) = app.block_on(async {
            let names = filled(app, &self.nodes).await?;
            keeper(app)?.export(Noun::Node, &names, format).await
        })?;
        let code = complain(app, &missing);
        match &self.output {
            None => app.out.data(&text)?,
            Some(file) => {
                write(file, &text).while_doing(|| format!("writing `{}`", file.display()))?;
                app.out.status(&format!("Exported {count} nodes."));
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

/// What is known of nodes, and which are not there.
fn look(
    app: &App,
    nodes: Option<&str>,
    fields: &[String],
    own: bool,
) -> Result<(Vec<(String, Tree)>, Vec<Outcome>)> {
    app.block_on(async {
        let names = match nodes {
            Some(nodes) => Some(filled(app, nodes).await?),
            None => None,
        };
        keeper(app)?.rows(Noun::Node, names.as_deref(), fields, own).await
    })
}

impl List {
    fn run(self, app: &App) -> Result<u8> {
        let (rows, missing) = look(app, self.nodes.as_deref(), &["name".into()], true)?;
        match self.format.output {
            Some(_) => {
                let rows: Vec<Tree> = rows.into_iter().map(|(_, tree)| tree).collect();
                app.out.list(self.format, &rows, &[])?;
            }
            None => {
                let lines = rows.iter().map(|(name, _)| format!("{name} (node)\n"));
                app.out.data(&lines.collect::<String>())?;
            }
        }
        Ok(complain(app, &missing))
    }
}

impl Show {
    fn run(self, app: &App) -> Result<u8> {
        #[derive(Serialize)]
        struct Row {
            node: String,
            attr: Tree,
        }
        let (rows, missing) = look(app, Some(&self.nodes), &self.fields, self.own)?;
        let rows: Vec<Row> = rows.into_iter().map(|(node, attr)| Row { node, attr }).collect();
        let format =
            OutputArgs { output: Some(self.format.output.unwrap_or(super::out::Format::Json)) };
        app.out.list(format, &rows, &[])?;
        Ok(complain(app, &missing))
    }
}
