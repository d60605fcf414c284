//! What a request would change, decided before anything is.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::Book;
use crate::error::{Error, Result};
use crate::model::node::edit::Edit;
use crate::model::node::inventory::Problem;
use crate::model::node::records::{Record, check_name};
use crate::model::node::request::{Format, Noun, Outcome, Request, Verb};
use crate::model::node::{Tree, schema};
use crate::node::{self, Mistake, groups};

/// How many problems are told; the rest are counted.
const TOLD: usize = 20;

/// How much of a text is told in an operation's.
const SHOWN: usize = 100;

/// What is to be done.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub outcomes: Vec<Outcome>,
    /// Each record as it is to be; without one, it is to be deleted.
    pub changes: Vec<(String, Option<Record>)>,
}

impl Plan {
    fn of(outcomes: Vec<Outcome>, new: BTreeMap<String, Record>) -> Self {
        let changes = new.into_iter().map(|(name, record)| (name, Some(record))).collect();
        Self { outcomes, changes }
    }
}

/// The kind of records that a request changes.
pub(super) fn changed(request: &Request) -> Noun {
    match (&request.verb, request.noun) {
        // Who is in which group is said of nodes.
        (Verb::Import { format: Format::Groups, .. }, Noun::Group) => Noun::Node,
        (_, noun) => noun,
    }
}

/// A request in words, without values: they may be secret.
pub(super) fn words(request: &Request) -> String {
    let cut = |text: &str| {
        let dots = if text.chars().nth(SHOWN).is_some() { "…" } else { "" };
        let shown: String = text.chars().take(SHOWN).collect();
        format!("{shown}{dots}")
    };
    let (noun, verb) = (request.noun.as_str(), request.verb.as_str());
    match &request.verb {
        Verb::Create { names, .. } | Verb::Delete { names } => {
            format!("{noun} {verb} {}", cut(names))
        }
        Verb::Update { names, edits } => {
            let path = |edit: &String| {
                let path = edit.split('=').next().unwrap_or_default();
                path.trim_end_matches(['+', '-']).to_owned()
            };
            let paths: Vec<String> = edits.iter().map(path).collect();
            format!("{noun} {verb} {}: {}", cut(names), cut(&paths.join(", ")))
        }
        Verb::Import { what, .. } => format!("{noun} {verb} {}", cut(what)),
    }
}

impl Book {
    /// What a request would change.
    ///
    /// # Errors
    /// When it cannot be done; then nothing of it is.
    pub(super) fn plan(&self, request: &Request) -> Result<Plan> {
        let noun = request.noun;
        match &request.verb {
            Verb::Create { names, edits } => {
                self.plan_create(noun, names, &self.edits(noun, edits)?)
            }
            Verb::Update { names, edits } => {
                self.plan_update(noun, names, &self.edits(noun, edits)?)
            }
            Verb::Delete { names } => self.plan_delete(noun, names),
            Verb::Import { format: Format::Groups, text, what } => match noun {
                Noun::Node | Noun::Group => self.plan_join(text, what),
                _ => Err(Error::usage("only nodes are in groups")),
            },
            Verb::Import { format, text, what } => self.plan_import(noun, *format, text, what),
        }
    }

    /// Changes as they are written, what is secret sealed.
    fn edits(&self, noun: Noun, texts: &[String]) -> Result<Vec<Edit>> {
        let edit = |text: &String| {
            let mut edit = Edit::parse(noun, text)?;
            edit.seal(&mut |secret| self.vault.seal(secret))?;
            Ok(edit)
        };
        texts.iter().map(edit).collect()
    }

    fn plan_create(&self, noun: Noun, names: &str, edits: &[Edit]) -> Result<Plan> {
        let (mut outcomes, mut new) = (Vec::new(), BTreeMap::new());
        for name in self.inventory.names(noun, names)? {
            check_name(noun, &name)?;
            let record = edited(noun, &name, Tree::new(), edits)?;
            let stored = self.inventory.is_stored(noun, &name);
            match self.inventory.get(noun, &name).filter(|_| stored) {
                None => {
                    new.insert(name.clone(), record);
                    outcomes.push(Outcome::ok(name, "ok"));
                }
                // Who was interrupted, and asks again, finds it as it was to be.
                Some(old) if self.same(noun, &old, &record) && !edits.is_empty() => {
                    outcomes.push(Outcome::ok(name, "ok"));
                }
                Some(_) => outcomes.push(Outcome::failed(name, "Error: duplicate name")),
            }
        }
        self.refuse_problems(noun, &new)?;
        Ok(Plan::of(outcomes, new))
    }

    fn plan_update(&self, noun: Noun, names: &str, edits: &[Edit]) -> Result<Plan> {
        let (mut outcomes, mut new) = (Vec::new(), BTreeMap::new());
        for name in self.inventory.names(noun, names)? {
            let Some(record) = self.inventory.get(noun, &name) else {
                outcomes.push(Outcome::missing(name));
                continue;
            };
            let changed = edited(noun, &name, record.tree()?, edits)?;
            if changed != record {
                new.insert(name.clone(), changed);
            }
            outcomes.push(Outcome::ok(name, "updated"));
        }
        self.refuse_problems(noun, &new)?;
        Ok(Plan::of(outcomes, new))
    }

    fn plan_delete(&self, noun: Noun, names: &str) -> Result<Plan> {
        let users = match noun {
            Noun::Node => HashMap::new(),
            _ => self.inventory.users(noun),
        };
        let mut plan = Plan::default();
        for name in self.inventory.names(noun, names)? {
            plan.outcomes.push(match users.get(name.as_str()) {
                Some(users) => Outcome::failed(&name, format!("is used by {users}")),
                None if !self.inventory.is_stored(noun, &name) => Outcome::missing(&name),
                None => {
                    plan.changes.push((name.clone(), None));
                    Outcome::ok(&name, "deleted")
                }
            });
        }
        Ok(plan)
    }

    /// The records of a file, called `what`. One that is there already, as it is in the file,
    /// is taken, too: an import that was interrupted is finished by the same command.
    fn plan_import(&self, noun: Noun, format: Format, text: &str, what: &str) -> Result<Plan> {
        let (mut outcomes, mut new) = (Vec::new(), BTreeMap::new());
        let mut others = Vec::new();
        let mut keep = |name: String, record: Record| {
            outcomes.push(Outcome::ok(&name, "ok"));
            match self.inventory.get(noun, &name).filter(|_| self.inventory.is_stored(noun, &name))
            {
                Some(old) if self.same(noun, &old, &record) => {}
                Some(_) => others.push(name),
                None => drop(new.insert(name, record)),
            }
        };
        let mut seal = |secret: &str| self.vault.seal(secret);
        let mut read = node::take(noun, format, text, &mut seal, &mut keep)
            .map_err(|error| Error::usage(format!("{what} cannot be read")).because(error))?;
        let line = |name: &str| read.lines.get(name).copied().unwrap_or(0);
        let mut mistakes: Vec<Mistake> = others
            .iter()
            .map(|name| Mistake {
                line: line(name),
                what: format!("`{name}` is there already, and differs"),
            })
            .collect();
        mistakes.append(&mut read.mistakes);
        if mistakes.is_empty() {
            let mistake = |it: Problem| Mistake {
                line: line(&it.name),
                what: format!("`{}`: {}", it.name, it.what),
            };
            mistakes = self.inventory.problems(noun, &new).into_iter().map(mistake).collect();
        }
        if mistakes.is_empty() {
            return Ok(Plan::of(outcomes, new));
        }
        let (verb, error) = (noun.as_str(), node::told(&mut mistakes, what));
        Err(match others.is_empty() {
            true => error,
            false => {
                error.help(format!("`pavo {verb} update` changes, `pavo {verb} delete` makes room"))
            }
        })
    }

    /// Nodes that a file of groups, called `what`, says are in groups.
    fn plan_join(&self, text: &str, what: &str) -> Result<Plan> {
        let mut joined: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (group, nodes) in groups::read(text, what, &self.inventory)? {
            nodes.each(|name| match joined.get_mut(name) {
                Some(groups) => groups.push(group.clone()),
                None => drop(joined.insert(name.to_owned(), vec![group.clone()])),
            });
        }
        let (mut outcomes, mut new) = (Vec::new(), BTreeMap::new());
        for (name, groups) in joined {
            let Some(old) = self.inventory.nodes.get(name.as_str()) else { continue };
            outcomes.push(Outcome::ok(&name, "updated"));
            let mut settings = old.open();
            let count = settings.groups.len();
            for group in groups {
                if !settings.groups.contains(&group) {
                    settings.groups.push(group);
                }
            }
            if settings.groups.len() > count {
                new.insert(name, Record::from(&settings));
            }
        }
        Ok(Plan::of(outcomes, new))
    }

    /// Whether a record of a file is the one that is there. Sealed texts of one secret differ,
    /// and a file may have none: what is exported has not.
    fn same(&self, noun: Noun, old: &Record, new: &Record) -> bool {
        let open = |record: &Record| -> Result<(Tree, HashSet<(String, String)>)> {
            let (mut tree, mut secrets) = (record.tree()?, HashSet::new());
            schema::secrets(noun, &mut tree, &mut |path, sealed| {
                secrets.insert((path.to_owned(), self.vault.unseal(sealed)?.expose().to_owned()));
                Ok::<_, Error>(None)
            })?;
            node::hide(noun, &mut tree);
            Ok((tree, secrets))
        };
        if old == new {
            return true;
        }
        match (open(old), open(new)) {
            (Ok(old), Ok(new)) => old.0 == new.0 && new.1.is_subset(&old.1),
            _ => false,
        }
    }

    fn refuse_problems(&self, noun: Noun, new: &BTreeMap<String, Record>) -> Result<()> {
        let problems = self.inventory.problems(noun, new);
        if problems.is_empty() {
            return Ok(());
        }
        let line = |it: &Problem| format!("{}: {}", it.name, it.what);
        let mut texts: Vec<String> = problems.iter().take(TOLD).map(line).collect();
        if problems.len() > TOLD {
            texts.push(format!("and {} more", problems.len() - TOLD));
        }
        let what = format!("{} cannot be so; nothing was changed", noun.plural());
        Err(Error::usage(what).because(texts.join("\n")))
    }
}

/// A record after these changes.
fn edited(noun: Noun, name: &str, mut tree: Tree, edits: &[Edit]) -> Result<Record> {
    edits.iter().try_for_each(|edit| edit.apply(name, &mut tree))?;
    match schema::check(noun, tree) {
        Ok(tree) => Record::from_tree(noun, tree),
        Err(wrong) => {
            let texts: Vec<String> =
                wrong.iter().map(|(path, it)| format!("{path}: {it}")).collect();
            Err(Error::usage(format!("`{name}` cannot be so")).because(texts.join("\n")))
        }
    }
}
