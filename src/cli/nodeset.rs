//! `pavo nodeset`

use std::io::IsTerminal;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::App;
use super::out::OutputArgs;
use crate::error::{Error, Result};
use crate::model::nodeset::NodeSet;
use crate::model::nodeset::fold::Style;
use crate::ops::nodesets::{self, Known};

/// Fold, expand, count and split sets of nodes
///
/// A set is made of names with brackets, and of others: `cn[43-45,47]`, `r[1-3]u[01-10]`,
/// `n[0-10/2]`, `@FILE`, `@slurm:PARTITION`, `@job:ID`; of the inventory
/// (`pavo node`) also `@GROUP`, `arch=x86_64`, `all`; joined by `,` or a blank (union),
/// `!` (without), `&` (in both), `^` (in one of both), read from left to right, and `(…)`.
/// Zeros in front belong to a name: `n[08-10]` is n08, n09, n10.
///
/// Several arguments are one set. Without any, sets are read from standard input, one a
/// line; `#` begins a comment. An empty set is an error.
#[derive(Debug, Args)]
pub struct Nodeset {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Fold(Fold),
    Expand(Expand),
    Count(Count),
    Split(Split),
}

/// Print a set as one short text
///
/// As Slurm reads it, too: brackets only where a name ends in one, and no range of more
/// than 65,536 names. Names are in order, and none is there twice.
#[derive(Debug, Args)]
struct Fold {
    #[command(flatten)]
    format: OutputArgs,

    /// As short as can be, though Slurm cannot read it: `n[1-2]-bmc`
    #[arg(long)]
    fold_all: bool,

    #[command(flatten)]
    sets: Sets,
}

/// Print the names of a set
#[derive(Debug, Args)]
struct Expand {
    #[command(flatten)]
    format: OutputArgs,

    /// What is between names, instead of line breaks
    #[arg(short = 'S', long, value_name = "TEXT", conflicts_with = "output")]
    separator: Option<String>,

    #[command(flatten)]
    sets: Sets,
}

/// Print how many nodes a set has
#[derive(Debug, Args)]
struct Count {
    #[command(flatten)]
    format: OutputArgs,

    #[command(flatten)]
    sets: Sets,
}

/// Print a set in parts of as equal sizes as can be, one a line
///
/// Neighbours stay together. A set of fewer nodes has fewer parts.
#[derive(Debug, Args)]
struct Split {
    #[command(flatten)]
    format: OutputArgs,

    /// As short as can be, though Slurm cannot read it: `n[1-2]-bmc`
    #[arg(long)]
    fold_all: bool,

    /// How many parts
    #[arg(value_name = "PARTS", value_parser = clap::value_parser!(u32).range(1..))]
    parts: u32,

    #[command(flatten)]
    sets: Sets,
}

#[derive(Debug, Args)]
struct Sets {
    /// Without these
    #[arg(short = 'x', long, value_name = "NODES")]
    exclude: Vec<String>,

    /// Sets of nodes; without any, standard input's
    #[arg(value_name = "NODES")]
    nodes: Vec<String>,
}

impl Sets {
    fn read(&self, app: &App) -> Result<NodeSet> {
        if self.nodes.is_empty() && std::io::stdin().is_terminal() {
            return Err(Error::usage("no nodes are given")
                .help("as arguments, or on standard input: `squeue -ho %N | pavo nodeset fold`"));
        }
        let known = Known::by(super::daemon::keeper(app)?);
        let set = app.block_on(async {
            let set = match self.nodes.as_slice() {
                [] => nodesets::from_standard_input(&known).await?,
                nodes => nodesets::union(nodes, &known).await?,
            };
            match self.exclude.as_slice() {
                [] => Ok(set),
                exclude => Ok(set.without(&nodesets::union(exclude, &known).await?)),
            }
        })?;
        if set.is_empty() {
            return Err(Error::usage("no node is left without those that are excluded"));
        }
        Ok(set)
    }
}

impl Nodeset {
    pub fn run(self, app: &App) -> Result<u8> {
        match self.verb {
            Verb::Fold(verb) => verb.run(app),
            Verb::Expand(verb) => verb.run(app),
            Verb::Count(verb) => verb.run(app),
            Verb::Split(verb) => verb.run(app),
        }?;
        Ok(0)
    }
}

/// A set, for programs.
#[derive(Debug, Serialize)]
struct View {
    nodes: String,
    count: usize,
}

impl View {
    fn new(set: &NodeSet, fold_all: bool) -> Self {
        let style = if fold_all { Style::Full } else { Style::Slurm };
        Self { nodes: set.fold(style), count: set.len() }
    }
}

impl Fold {
    fn run(self, app: &App) -> Result<()> {
        let view = View::new(&self.sets.read(app)?, self.fold_all);
        match self.format.output {
            None => app.out.data(&(view.nodes + "\n")),
            Some(_) => app.out.record(self.format, &view, &[]),
        }
    }
}

impl Expand {
    fn run(self, app: &App) -> Result<()> {
        let set = self.sets.read(app)?;
        if self.format.output.is_some() {
            return app.out.list(self.format, &set.names(), &[]);
        }
        let separator = self.separator.as_deref().unwrap_or("\n");
        let mut text = String::with_capacity(set.len() * 16);
        set.each(|name| {
            if !text.is_empty() {
                text.push_str(separator);
            }
            text.push_str(name);
        });
        app.out.data(&(text + "\n"))
    }
}

impl Count {
    fn run(self, app: &App) -> Result<()> {
        #[derive(Serialize)]
        struct Counted {
            count: usize,
        }
        let count = self.sets.read(app)?.len();
        match self.format.output {
            None => app.out.data(&format!("{count}\n")),
            Some(_) => app.out.record(self.format, &Counted { count }, &[]),
        }
    }
}

impl Split {
    fn run(self, app: &App) -> Result<()> {
        let parts = self.sets.read(app)?.split(self.parts as usize);
        let views: Vec<View> = parts.iter().map(|part| View::new(part, self.fold_all)).collect();
        match self.format.output {
            None => {
                app.out.data(&views.iter().map(|it| it.nodes.clone() + "\n").collect::<String>())
            }
            Some(_) => app.out.list(self.format, &views, &[]),
        }
    }
}
