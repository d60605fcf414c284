//! The inventory in a store: read whole, changed in commits that each require that nobody
//! else has changed it since.
//!
//! A change is checked as a whole before its first commit. It may be larger than a commit:
//! who is interrupted has written some nodes and not others, and the same command finishes.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use crate::error::{Context, Error, Result};
use crate::model::node::edit::Edit;
use crate::model::node::inventory::{Inventory, Problem};
use crate::model::node::{Settings, Tree, schema};
use crate::model::nodeset::NodeSet;
use crate::node::{self, Drafts, Mistake};
use crate::store::embedded;
use crate::store::secret::vault::Vault;
use crate::store::{
    Change, Check, Commit, MAX_COMMIT_BYTES, MAX_OPERATIONS, Revision, Store, keys, list_all,
};

/// How many problems are told; the rest are counted.
const TOLD: usize = 20;

/// What came of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub node: String,
    pub ok: bool,
    pub text: String,
}

impl Outcome {
    fn ok(node: &str, text: &str) -> Self {
        Self { node: node.into(), ok: true, text: text.into() }
    }

    fn failed(node: &str, text: &str) -> Self {
        Self { node: node.into(), ok: false, text: text.into() }
    }

    /// A node that is not there.
    pub fn missing(node: &str) -> Self {
        Self::failed(node, "Could not be found.")
    }
}

/// What the store in `dir` knows of nodes; without a store, nothing.
///
/// # Errors
/// When the store cannot be read.
pub async fn read(dir: &Path) -> Result<Inventory> {
    match embedded::open_existing(dir).await? {
        Some(store) => load(&store).await,
        None => Ok(Inventory::default()),
    }
}

async fn load(store: &dyn Store) -> Result<Inventory> {
    let mut inventory = Inventory::default();
    for entry in list_all(store, &keys::nodes()).await?.0 {
        if let Some(name) = keys::parse_node(&entry.key) {
            inventory.put(&name, Arc::new(entry.json()?));
        }
    }
    Ok(inventory)
}

/// The inventory, to be changed.
#[derive(Debug)]
pub struct Book {
    store: Arc<dyn Store>,
    vault: Vault,
    /// What must hold besides, so that the change is ours to make.
    fence: Option<Check>,
    /// The latest change, when the rest was read, or ours.
    latest: Option<Revision>,
    pub inventory: Inventory,
}

impl Book {
    /// Opens the inventory of the store in `dir`; makes both.
    ///
    /// # Errors
    /// When the store cannot be opened or read.
    pub async fn open(dir: &Path) -> Result<Self> {
        Self::over(Arc::new(embedded::open(dir).await?), Vault::open(dir)?, None).await
    }

    /// The inventory of a store; its changes are made only while `fence` holds.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn over(store: Arc<dyn Store>, vault: Vault, fence: Option<Check>) -> Result<Self> {
        // Before the rest: whoever changes that meanwhile has changed this, too.
        let latest = store.get(&keys::inventory_counter()).await?.map(|entry| entry.revision);
        let inventory = load(&*store).await.while_doing(|| "reading the inventory".into())?;
        Ok(Self { store, vault, fence, latest, inventory })
    }

    /// Seals what is secret in changes.
    ///
    /// # Errors
    /// When it cannot be sealed.
    pub fn seal(&self, edits: &mut [Edit]) -> Result<()> {
        edits.iter_mut().try_for_each(|edit| edit.seal(&mut |secret| self.vault.seal(secret)))
    }

    /// Makes nodes that are not there yet.
    ///
    /// # Errors
    /// When one of them cannot be; then none is made.
    pub async fn create(&mut self, nodes: &NodeSet, edits: &[Edit]) -> Result<Vec<Outcome>> {
        let (mut outcomes, mut new) = (Vec::new(), BTreeMap::new());
        for name in nodes.names() {
            if self.inventory.nodes.contains_key(&name) {
                outcomes.push(Outcome::failed(&name, "Error: duplicate name"));
                continue;
            }
            outcomes.push(Outcome::ok(&name, "ok"));
            new.insert(name.clone(), Arc::new(edited(&name, Tree::new(), edits)?));
        }
        self.put(new).await?;
        Ok(outcomes)
    }

    /// Changes settings of nodes.
    ///
    /// # Errors
    /// When one of them cannot be changed so; then none is.
    pub async fn update(&mut self, nodes: &NodeSet, edits: &[Edit]) -> Result<Vec<Outcome>> {
        let (mut outcomes, mut new) = (Vec::new(), BTreeMap::new());
        for name in nodes.names() {
            let Some(settings) = self.inventory.nodes.get(&name) else {
                outcomes.push(Outcome::missing(&name));
                continue;
            };
            let changed = edited(&name, settings.tree()?, edits)?;
            if changed != **settings {
                new.insert(name.clone(), Arc::new(changed));
            }
            outcomes.push(Outcome::ok(&name, "updated"));
        }
        self.put(new).await?;
        Ok(outcomes)
    }

    /// Deletes nodes.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub async fn delete(&mut self, nodes: &NodeSet) -> Result<Vec<Outcome>> {
        let (mut outcomes, mut changes) = (Vec::new(), Vec::new());
        for name in nodes.names() {
            if self.inventory.nodes.contains_key(&name) {
                changes.push(Change::delete(keys::node(&name)));
                outcomes.push(Outcome::ok(&name, "deleted"));
            } else {
                outcomes.push(Outcome::missing(&name));
            }
        }
        self.commit(changes).await?;
        for outcome in &outcomes {
            self.inventory.remove(&outcome.node);
        }
        Ok(outcomes)
    }

    /// Takes the nodes of a file, called `what`. One that is there already, as it is in the
    /// file, is taken, too: an import that was interrupted is finished by the same command.
    ///
    /// # Errors
    /// All that is wrong in the file, with its lines; then nothing of it is taken.
    pub async fn import(&mut self, drafts: Drafts, what: &str) -> Result<Vec<Outcome>> {
        let taken = node::take(drafts, what, &mut |secret| self.vault.seal(secret))?;
        let (mut mistakes, mut outcomes, mut new) = (Vec::new(), Vec::new(), BTreeMap::new());
        let mut lines: HashMap<String, usize> = HashMap::new();
        for (name, (line, settings)) in taken {
            match self.inventory.nodes.get(&name) {
                Some(old) if self.same(old, &settings)? => {}
                Some(_) => {
                    let what = format!("`{name}` is there already, and differs");
                    mistakes.push(Mistake { line, what });
                }
                None => drop(new.insert(name.clone(), Arc::new(settings))),
            }
            outcomes.push(Outcome::ok(&name, "ok"));
            lines.insert(name, line);
        }
        if mistakes.is_empty() {
            let mistake = |it: Problem| Mistake {
                line: lines.get(&it.node).copied().unwrap_or(0),
                what: format!("`{}`: {}", it.node, it.what),
            };
            mistakes = self.inventory.problems(&new).into_iter().map(mistake).collect();
        }
        if !mistakes.is_empty() {
            return Err(node::told(&mut mistakes, what)
                .help("`pavo node update` changes nodes, `pavo node delete` makes room"));
        }
        self.put(new).await?;
        Ok(outcomes)
    }

    /// Adds nodes to groups.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub async fn join(&mut self, groups: &BTreeMap<String, NodeSet>) -> Result<Vec<Outcome>> {
        let mut new: BTreeMap<String, Arc<Settings>> = BTreeMap::new();
        for (group, nodes) in groups {
            for name in nodes.names() {
                let Some(old) = self.inventory.nodes.get(&name) else { continue };
                let settings = Arc::make_mut(new.entry(name).or_insert_with(|| old.clone()));
                if !settings.groups.contains(group) {
                    settings.groups.push(group.clone());
                }
            }
        }
        let outcomes = new.keys().map(|name| Outcome::ok(name, "updated")).collect();
        self.put(new).await?;
        Ok(outcomes)
    }

    /// Whether two settings are the same. Sealed texts of one secret differ.
    fn same(&self, one: &Settings, other: &Settings) -> Result<bool> {
        let open = |settings: &Settings| -> Result<Tree> {
            let mut tree = settings.tree()?;
            schema::secrets(&mut tree, &mut |sealed| {
                Ok::<_, Error>(Some(self.vault.unseal(sealed)?.expose().to_owned()))
            })?;
            Ok(tree)
        };
        Ok(one == other || open(one)? == open(other)?)
    }

    /// Stores nodes, if nothing is wrong with all there are then.
    async fn put(&mut self, new: BTreeMap<String, Arc<Settings>>) -> Result<()> {
        if new.is_empty() {
            return Ok(());
        }
        let problems = self.inventory.problems(&new);
        if !problems.is_empty() {
            let line = |it: &Problem| format!("{}: {}", it.node, it.what);
            let mut texts: Vec<String> = problems.iter().take(TOLD).map(line).collect();
            if problems.len() > TOLD {
                texts.push(format!("and {} more", problems.len() - TOLD));
            }
            return Err(
                Error::usage("nodes cannot be so; nothing was changed").because(texts.join("\n"))
            );
        }
        let put = |(name, settings): (&String, &Arc<Settings>)| {
            Change::put_json(keys::node(name), &**settings)
        };
        self.commit(new.iter().map(put).collect::<Result<_>>()?).await?;
        for (name, settings) in new {
            self.inventory.put(&name, settings);
        }
        Ok(())
    }

    /// Makes changes, as many at once as a store takes.
    async fn commit(&mut self, changes: Vec<Change>) -> Result<()> {
        let doing = || "changing the inventory".to_owned();
        let size = |change: &Change| match change {
            Change::Put { key, value, .. } => 2 * key.len() + value.len(),
            Change::Delete { key } | Change::DeletePrefix { prefix: key } => 2 * key.len(),
        };
        let mut rest = changes.into_iter().peekable();
        while rest.peek().is_some() {
            let key = keys::inventory_counter();
            let check = match self.latest {
                Some(revision) => Check::Revision(key.clone(), revision),
                None => Check::Absent(key.clone()),
            };
            let checks: Vec<Check> = self.fence.iter().cloned().chain([check]).collect();
            let mut batch = vec![Change::put_json(&key, &())?];
            let mut bytes = 1024;
            while let Some(change) = rest.next_if(|next| {
                batch.len() < MAX_OPERATIONS && bytes + size(next) < MAX_COMMIT_BYTES
            }) {
                bytes += size(&change);
                batch.push(change);
            }
            if batch.len() == 1 {
                return Err(Error::usage("a node's settings are too large")).while_doing(doing);
            }
            match self.store.commit(&checks, &batch).await.while_doing(doing)? {
                Commit::Done(revision) => self.latest = Some(revision),
                Commit::Conflict(_) => {
                    let error = Error::system("somebody else has changed it at the same time");
                    return Err(error.help("run the command again")).while_doing(doing);
                }
            }
        }
        Ok(())
    }
}

/// The settings of a node after these changes.
fn edited(name: &str, mut tree: Tree, edits: &[Edit]) -> Result<Settings> {
    edits.iter().try_for_each(|edit| edit.apply(name, &mut tree))?;
    match schema::check(tree) {
        Ok(tree) => Settings::from_tree(tree),
        Err(wrong) => {
            let texts: Vec<String> =
                wrong.iter().map(|(path, it)| format!("{path}: {it}")).collect();
            Err(Error::usage(format!("`{name}` cannot be so")).because(texts.join("\n")))
        }
    }
}
