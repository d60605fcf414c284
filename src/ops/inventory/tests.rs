//! What a book is to be, over a store that fails when it is told to.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::*;
use crate::model::node::Tree;
use crate::model::node::operation::State;
use crate::model::node::request::{Format, Verb};
use crate::store::{LeaseId, Page, Watch};

/// A store whose commits fail from a certain one on; perhaps after they were done.
#[derive(Debug)]
struct Fickle {
    store: Arc<dyn Store>,
    commits: AtomicUsize,
    /// From which one on, how many.
    fails: AtomicUsize,
    times: AtomicUsize,
    /// 1: it is done nevertheless.
    done: AtomicUsize,
}

impl Fickle {
    fn fail(&self, after: usize, times: usize, done: bool) {
        self.fails.store(self.commits.load(SeqCst) + after, SeqCst);
        self.times.store(times, SeqCst);
        self.done.store(done.into(), SeqCst);
    }
}

impl Store for Fickle {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>>> {
        self.store.get(key)
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Page>> {
        self.store.list(prefix, after, limit)
    }

    fn commit<'a>(
        &'a self,
        checks: &'a [Check],
        changes: &'a [Change],
    ) -> BoxFuture<'a, Result<Commit>> {
        async move {
            let index = self.commits.fetch_add(1, SeqCst);
            let from = self.fails.load(SeqCst);
            if !(from..from + self.times.load(SeqCst)).contains(&index) {
                return self.store.commit(checks, changes).await;
            }
            if self.done.load(SeqCst) == 1 {
                let _ = self.store.commit(checks, changes).await?;
            }
            Err(Error::system("the store has no room"))
        }
        .boxed()
    }

    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> BoxFuture<'a, Result<Watch>> {
        self.store.watch(prefix, after)
    }

    fn lease(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId>> {
        self.store.lease(ttl)
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<bool>> {
        self.store.keep_alive(lease)
    }

    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<()>> {
        self.store.revoke(lease)
    }
}

struct World {
    dir: tempfile::TempDir,
    store: Arc<Fickle>,
    book: Book,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Fickle {
            store: Arc::new(embedded::open(dir.path()).await.unwrap()),
            commits: AtomicUsize::new(0),
            fails: AtomicUsize::new(0),
            times: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
        });
        let vault = Vault::open(dir.path()).unwrap();
        let book = Book::over(store.clone(), vault, None).await.unwrap();
        Self { dir, store, book }
    }

    /// What the store has, is what memory has.
    async fn is_true(&self) {
        let (stored, latest) = load(&*self.store.store).await.unwrap();
        assert_eq!(stored, self.book.inventory);
        assert_eq!(latest, self.book.latest);
        let ops = journal::load(&*self.store.store).await.unwrap();
        assert_eq!(ops, self.book.ops);
    }

    async fn ask(&mut self, noun: Noun, verb: Verb) -> Result<Vec<Outcome>> {
        let result = self.book.apply(&Request { noun, verb, dry_run: false }).await;
        self.is_true().await;
        result
    }

    async fn texts(&mut self, noun: Noun, verb: Verb) -> Vec<String> {
        let outcomes = self.ask(noun, verb).await.unwrap_or_else(|it| panic!("{}", it.report()));
        outcomes.iter().map(|it| format!("{}: {}", it.name, it.text)).collect()
    }

    async fn wrong(&mut self, noun: Noun, verb: Verb) -> String {
        self.ask(noun, verb).await.unwrap_err().report()
    }
}

fn create(names: &str, edits: &[&str]) -> Verb {
    Verb::Create { names: names.into(), edits: edits.iter().map(|it| (*it).into()).collect() }
}

fn update(names: &str, edits: &[&str]) -> Verb {
    Verb::Update { names: names.into(), edits: edits.iter().map(|it| (*it).into()).collect() }
}

fn delete(names: &str) -> Verb {
    Verb::Delete { names: names.into() }
}

fn import(format: Format, text: &str) -> Verb {
    Verb::Import { format, text: text.into(), what: "`it`".into() }
}

#[tokio::test]
async fn what_records_name_is_there_and_stays() {
    let mut world = World::new().await;
    let wrong = world.wrong(Noun::Node, create("n1", &["profiles=base"])).await;
    assert!(wrong.contains("n1: there is no profile `base`"), "{wrong}");
    for (noun, verb) in [
        (Noun::Passwd, create("bmc", &["username=admin", "password=hunter2"])),
        (Noun::Net, create("lan", &["subnet=10.1.0.0", "netmask=255.255.0.0"])),
        (Noun::Profile, create("base", &["mgt=ipmi", "control/passwd=bmc"])),
        (Noun::Project, create("alice", &["members=ada,bob", "networks=lan", "quota/nodes=4"])),
        (Noun::Group, create("rack1", &["profiles=base"])),
        (
            Noun::Node,
            create(
                "n[1-4]",
                &["groups=rack1", "project=alice", "nics/e/ip=10.1.0.{n}", "nics/e/network=lan"],
            ),
        ),
    ] {
        assert!(world.texts(noun, verb).await.iter().all(|it| it.ends_with(": ok")));
    }
    for (noun, name, users) in [
        (Noun::Passwd, "bmc", "1 profile: base"),
        (Noun::Net, "lan", "4 nodes: n[1-4] and 1 project: alice"),
        (Noun::Profile, "base", "1 group: rack1"),
        (Noun::Project, "alice", "4 nodes: n[1-4]"),
        (Noun::Group, "rack1", "4 nodes: n[1-4]"),
    ] {
        assert_eq!(world.texts(noun, delete(name)).await, [format!("{name}: is used by {users}")]);
    }
    for (noun, verb, why) in [
        (Noun::Node, create("n5", &["project=alice"]), "it would have 5 nodes, and may have 4"),
        (Noun::Project, update("alice", &["quota/nodes=3"]), "it would have 4 nodes"),
        (Noun::Node, update("n1", &["nics/e/ip=10.2.0.1"]), "is not in the network `lan`"),
        (Noun::Net, update("lan", &["subnet=10.2.0.0"]), "addresses of 4 nodes: n[1-4] would be"),
        (
            Noun::Net,
            update("lan", &["dynamic_range=10.1.0.3-10.1.0.9"]),
            "addresses of 2 nodes: n[3-4] would be in its dynamic range",
        ),
        (Noun::Node, update("n1", &["control/passwd=bcm"]), "did you mean `bmc`?"),
        (Noun::Group, update("rack1", &["nics/e/ip=10.1.0.1"]), "it is a node's alone"),
        (Noun::Profile, update("base", &["profiles=base"]), "it is a node's alone"),
        (Noun::Profile, update("base", &["groups=rack1"]), "it is a node's alone"),
    ] {
        let wrong = world.wrong(noun, verb).await;
        assert!(wrong.contains(why), "{wrong}");
    }
    assert_eq!(world.texts(Noun::Node, delete("all")).await.len(), 4);
    assert_eq!(world.texts(Noun::Project, delete("all")).await, ["alice: deleted"]);
    let gone = world.texts(Noun::Net, delete("lan,wan")).await;
    assert_eq!(gone, ["lan: deleted", "wan: Could not be found."]);
}

#[tokio::test]
async fn networks_are_what_they_say() {
    let mut world = World::new().await;
    let lan = ["subnet=10.1.0.0", "netmask=255.255.0.0"];
    for (more, why) in [
        (&["gateway=10.2.0.1"][..], "the gateway 10.2.0.1 is not in 10.1.0.0/16"),
        (&["dynamic_range=10.1.0.9-10.2.0.1"], "is not all in 10.1.0.0/16"),
        (&["dynamic_range=10.1.0.9-10.1.0.1"], "is not a range of addresses"),
        (&["dynamic_range=10.1.0.9-fe80::1"], "is not a range of addresses"),
        (&["netmask=255.0.255.0"], "is not a netmask"),
        (&["netmask=ffff::"], "is no mask of"),
        (&["netmask="], "`subnet` without `netmask`"),
        (&["subnet=10.1.2.0"], "is not where a subnet of"),
        (&["vlan=4095"], "is not a VLAN"),
        (&["nameservers=10.1.0.2,x"], "`x` is not an IP address"),
        (&["subnetz=1"], "did you mean `subnet`?"),
    ] {
        let edits: Vec<&str> = lan.iter().chain(more).copied().collect();
        let wrong = world.wrong(Noun::Net, create("lan", &edits)).await;
        assert!(wrong.contains(why), "{more:?}: {wrong}");
    }
    // There is no number in this one's name but 6.
    let v6 = ["subnet=fd00::", "netmask=ffff:ffff::", "gateway=fd00::1", "vlan={n}"];
    assert_eq!(world.texts(Noun::Net, create("v6", &v6)).await, ["v6: ok"]);
    assert_eq!(world.book.inventory.networks["v6"].vlan, Some(6));
    let text = r#"{"networks": [{"name": "c920", "subnet": "10.0.0.0", "netmask": "255.0.0.0",
        "nameservers": "10.0.0.1,10.0.0.2", "created_at": "2017"}]}"#;
    assert_eq!(world.texts(Noun::Net, import(Format::Json, text)).await, ["c920: ok"]);
    let (text, _) = export(&world.book.inventory, Noun::Net, "all", Format::Yaml).unwrap();
    assert_eq!(world.texts(Noun::Net, import(Format::Yaml, &text)).await, ["c920: ok", "v6: ok"]);
}

#[tokio::test]
async fn secrets_are_compared_and_never_told() {
    let mut world = World::new().await;
    let text = r#"{"passwds": [{"key": "system", "username": "root", "password": "hunter2-zq"}]}"#;
    assert_eq!(world.texts(Noun::Passwd, import(Format::Json, text)).await, ["system: ok"]);
    assert_eq!(world.texts(Noun::Passwd, import(Format::Json, text)).await, ["system: ok"]);
    let sealed = world.book.inventory.passwords["system"].password.clone().unwrap();
    assert!(sealed.starts_with("sealed:") && !sealed.contains("hunter2"));
    let other = text.replace("zq", "other");
    let wrong = world.wrong(Noun::Passwd, import(Format::Json, &other)).await;
    assert!(wrong.contains("differs") && !wrong.contains("hunter2"), "{wrong}");
    for format in [Format::Json, Format::Yaml, Format::Csv] {
        let (text, _) = export(&world.book.inventory, Noun::Passwd, "all", format).unwrap();
        assert!(!text.contains("sealed") && !text.contains("hunter2"), "{text}");
        // It has no password, which is no other one.
        assert_eq!(world.texts(Noun::Passwd, import(format, &text)).await, ["system: ok"]);
    }
    let rows = rows(&world.book.inventory, Noun::Passwd, None, &["password".into()], false);
    assert_eq!(rows.unwrap().0[0].1, Tree::new());
    let text = text.replace("\"password\"", "\"passwort\"");
    let wrong = world.wrong(Noun::Passwd, import(Format::Json, &text)).await;
    assert!(wrong.contains("did you mean `password`?") && !wrong.contains("hunter2"), "{wrong}");
    let text = r#"{"nodes": [{"name": "n1", "control_info": "{\"bmc_password\":\"hunter2\"}"}]}"#;
    let wrong = world.wrong(Noun::Node, import(Format::Json, text)).await;
    assert!(wrong.contains("n1") && !wrong.contains("hunter2"), "{wrong}");
    // Sealed to a passphrase, they leave and come back.
    let book = &world.book;
    let (text, _) = export_locked(book, Noun::Passwd, "all", Format::Json, "horse").unwrap();
    assert!(text.contains("locked:") && !text.contains("hunter2"), "{text}");
    let wrong = world.wrong(Noun::Passwd, import(Format::Json, &text)).await;
    assert!(wrong.contains("password: it is sealed to a passphrase"), "{wrong}");
}

#[tokio::test]
async fn a_change_that_breaks_in_the_middle_says_how_far_it_is() {
    let mut world = World::new().await;
    let all = create("n[1-300]", &["nics/e/ip=10.0.{n/200}.{n%200}"]);
    // The first of its commits: nothing is done, and there is nothing to tell.
    world.store.fail(0, 1, false);
    let wrong = world.wrong(Noun::Node, all.clone()).await;
    assert!(wrong.contains("the store has no room"), "{wrong}");
    assert_eq!((world.book.inventory.nodes.len(), world.book.ops().count()), (0, 0));
    // The second: it is told, in the third.
    world.store.fail(1, 1, false);
    let wrong = world.wrong(Noun::Node, all.clone()).await;
    assert!(wrong.contains("the same command does the rest"), "{wrong}");
    let op = world.book.ops().next_back().unwrap().clone();
    let stored = world.book.inventory.nodes.len();
    assert!(stored > 100 && stored < 200, "{stored}");
    assert_eq!((op.total, op.done, op.state), (300, stored, State::Failed));
    assert_eq!(op.what, "node create n[1-300]");
    assert!(op.reason.unwrap().contains("the store has no room"));
    // The same command does the rest.
    let outcomes = world.texts(Noun::Node, all.clone()).await;
    assert!(outcomes.len() == 300 && outcomes.iter().all(|it| it.ends_with(": ok")));
    // The second, which is done nevertheless.
    world.store.fail(1, 1, true);
    world.wrong(Noun::Node, update("all", &["arch=ppc64le"])).await;
    let new = |it: &&crate::model::node::Packed| it.open().arch.as_deref() == Some("ppc64le");
    let changed = world.book.inventory.nodes.values().filter(new).count();
    let op = world.book.ops().next_back().unwrap();
    assert_eq!((op.state, op.done), (State::Failed, changed));
    assert!(changed > 200 && changed < 300, "{changed}");
    world.texts(Noun::Node, update("all", &["notes=x"])).await;
    let op = world.book.ops().next_back().unwrap();
    assert_eq!((op.state, op.done), (State::Done, 300));
    // Nothing tells of it any more, until somebody can.
    world.store.fail(1, 2, false);
    world.wrong(Noun::Node, update("all", &["arch=x86_64"])).await;
    let op = world.book.ops().next_back().unwrap();
    assert_eq!(op.state, State::Running);
    let id = op.id;
    world.texts(Noun::Node, update("n1", &["notes=x"])).await;
    let op = world.book.ops().find(|op| op.id == id).unwrap();
    assert_eq!((op.state, op.total), (State::Interrupted, 300));
}

#[tokio::test]
async fn who_is_gone_has_interrupted_what_he_did() {
    let mut world = World::new().await;
    world.store.fail(1, 2, false);
    world.wrong(Noun::Node, create("n[1-300]", &[])).await;
    let mut op = world.book.ops().next_back().unwrap().clone();
    assert_eq!(op.state, State::Running);
    // Of another process, that lives: pid 1 does.
    let process = crate::host::process::identify(1).unwrap();
    op.writer.as_mut().unwrap().process = process;
    let put = Change::put_json(keys::op(op.id), &op).unwrap();
    assert!(matches!(world.store.store.commit(&[], &[put]).await.unwrap(), Commit::Done(_)));
    let open = || async { Book::open(world.dir.path()).await.unwrap() };
    assert_eq!(open().await.ops().next_back().unwrap().state, State::Running);
    // Who has a fence is alone.
    let (store, key) = (world.store.store.clone(), keys::inventory_counter());
    let vault = Vault::open(world.dir.path()).unwrap();
    let alone = Book::over(store, vault, Some(Check::Exists(key))).await.unwrap();
    let op = alone.ops().next_back().unwrap();
    assert_eq!((op.state, op.done), (State::Interrupted, alone.inventory.nodes.len()));
    assert_eq!(open().await.ops().next_back().unwrap(), op);
}

#[tokio::test]
async fn a_hundred_operations_are_remembered() {
    let mut world = World::new().await;
    world.texts(Noun::Node, create("n[1-130]", &[])).await;
    for round in 0..103 {
        world.texts(Noun::Node, update("all", &[&format!("notes={round}")])).await;
    }
    let ids: Vec<u64> = world.book.ops().map(|op| op.id).collect();
    assert_eq!(ids, (5..=104).collect::<Vec<u64>>());
}

#[tokio::test]
async fn another_writer_is_seen_and_a_lost_fence_ends_it() {
    let mut world = World::new().await;
    world.texts(Noun::Node, create("n1", &["nics/e/ip=10.0.0.1"])).await;
    let mut other = Book::open(world.dir.path()).await.unwrap();
    let request = |verb| Request { noun: Noun::Node, verb, dry_run: false };
    other.apply(&request(create("n2", &["nics/e/ip=10.0.0.2"]))).await.unwrap();
    // Decided anew, on what is there.
    let wrong = world.wrong(Noun::Node, create("n3", &["nics/e/ip=10.0.0.2"])).await;
    assert!(wrong.contains("the address 10.0.0.2 is `n2`'s, too"), "{wrong}");
    let outcomes = other.apply(&request(delete("all"))).await.unwrap();
    assert_eq!(outcomes.len(), 2);
    let outcomes = world.texts(Noun::Node, create("n3", &["nics/e/ip=10.0.0.2"])).await;
    assert_eq!(outcomes, ["n3: ok"]);
    let fence = Check::Absent(keys::record(Noun::Node, "n3"));
    let vault = Vault::open(world.dir.path()).unwrap();
    let mut stale = Book::over(world.store.clone(), vault, Some(fence)).await.unwrap();
    let wrong = stale.apply(&request(create("n4", &[]))).await.unwrap_err().report();
    assert!(wrong.contains("somebody else is to change the inventory now"), "{wrong}");
    assert_eq!(world.book.inventory, stale.inventory);
}

#[tokio::test]
async fn a_dry_run_does_everything_but() {
    let mut world = World::new().await;
    let ask = |verb| Request { noun: Noun::Node, verb, dry_run: true };
    let before = world.store.commits.load(SeqCst);
    let outcomes = world.book.apply(&ask(create("n[1-500]", &["arch=x86_64"]))).await.unwrap();
    assert!(outcomes.len() == 500 && outcomes.iter().all(|it| it.ok));
    assert!(world.book.apply(&ask(create("n1", &["arhc=x86_64"]))).await.is_err());
    assert_eq!(world.store.commits.load(SeqCst), before);
    world.is_true().await;
}

#[tokio::test]
async fn what_cannot_be_read_can_be_deleted() {
    let mut world = World::new().await;
    world.texts(Noun::Node, create("n[1-2]", &["arch=x86_64"])).await;
    let mut deep = "[".repeat(126) + &"]".repeat(126);
    let edit = format!("nics/e/extra/a={deep}");
    let wrong = world.wrong(Noun::Node, update("n1", &[&edit])).await;
    assert!(wrong.contains("it is too deep"), "{wrong}");
    let path = format!("nics/e/extra/{}=1", "a/".repeat(40) + "b");
    assert!(world.wrong(Noun::Node, update("n1", &[&path])).await.contains("too deep"));
    let csv = format!("name,nics/e/extra\nn3,{{\"a\": {deep}}}\n").replace('"', "\"\"");
    let csv = csv.replace("{\"\"a", "\"{\"\"a").replace("}\n", "}\"\n");
    let wrong = world.wrong(Noun::Node, import(Format::Csv, &csv)).await;
    assert!(wrong.contains("line 2: `n3`: nics/e/extra: it is too deep"), "{wrong}");
    let long = format!("notes={}", "x".repeat(70_000));
    assert!(world.wrong(Noun::Node, update("n1", &[&long])).await.contains("so short as"));
    let many = format!("tags={}", (0..9000).map(|n| format!("tag{n},")).collect::<String>());
    let wrong = world.wrong(Noun::Node, update("n1", &[&many])).await;
    assert!(wrong.contains("bytes, and 65536 are the most"), "{wrong}");
    // Whoever has written it.
    deep = format!("{{\"nics\":{{\"e\":{{\"extra\":{{\"a\":{deep}}}}}}}}}");
    let put = Change::Put { key: keys::record(Noun::Node, "n1"), value: deep.into(), lease: None };
    let put = [put, Change::put_json(keys::inventory_counter(), &()).unwrap()];
    assert!(matches!(world.store.store.commit(&[], &put).await.unwrap(), Commit::Done(_)));
    let mut book = Book::open(world.dir.path()).await.unwrap();
    let notes = book.inventory.nodes["n1"].open().notes.unwrap();
    assert!(notes.contains("cannot be read") && notes.contains("recursion limit"), "{notes}");
    let request = Request { noun: Noun::Node, verb: delete("n1"), dry_run: false };
    assert_eq!(book.apply(&request).await.unwrap()[0].text, "deleted");
}

#[tokio::test]
async fn no_set_is_everybody_by_a_slip() {
    let mut world = World::new().await;
    world.texts(Noun::Node, create("n[1-3]", &["mgt=ipmi", "groups=rack1"])).await;
    for (names, why) in [
        ("mgt!=", "nothing behind the `!=`"),
        ("mgt!=impi", "did you mean `ipmi`?"),
        ("control!=x", "several settings"),
        ("nics!=eth0", "several settings"),
        ("nics/e/extra!=x", "several settings"),
        ("control/bmc_port!=abc", "is not a port"),
        ("control/bmc_password!=x", "it is a secret"),
        ("control~=sealed", "several settings"),
        ("all!@typo", "there is no group `typo`"),
        ("@slurm:debug", "is not for the inventory to know"),
        ("@./list", "is not for the inventory to know"),
        ("n[1-", "is not closed"),
        ("", "the text is empty"),
        ("all!@rack1", "a set without any node"),
    ] {
        let wrong = world.wrong(Noun::Node, update(names, &["notes=x"])).await;
        assert!(wrong.contains(why), "{names}: {wrong}");
    }
    let wrong = world.wrong(Noun::Node, import(Format::Groups, "rest: all!@rakc1\n")).await;
    assert!(wrong.contains("line 1: ") && wrong.contains("there is no group `rakc1`"), "{wrong}");
    let later = "rest: all!@rack2\nrack2: n1\n";
    let wrong = world.wrong(Noun::Node, import(Format::Groups, later)).await;
    assert!(wrong.contains("there is no group `rack2` above"), "{wrong}");
    for name in ["rack.1", "a:b", "-"] {
        assert!(world.wrong(Noun::Group, create(name, &[])).await.contains("cannot be"), "{name}");
        let edit = format!("groups={name}");
        let wrong = world.wrong(Noun::Node, update("n1", &[&edit])).await;
        assert!(wrong.contains("is not a group's name"), "{wrong}");
    }
}

#[tokio::test]
async fn one_machine_has_one_controller() {
    let mut world = World::new().await;
    let bmc = |address: &str| format!("control/bmc_address={address}");
    world.texts(Noun::Node, create("n1", &[&bmc("10.0.0.1")])).await;
    world.texts(Noun::Node, create("n2", &[&bmc("FE80:0:0::1")])).await;
    world.texts(Noun::Node, create("n3", &[&bmc("chassis"), "control/bmc_system=1"])).await;
    for edits in [
        &[&*bmc("10.0.0.1"), "control/bmc_port=623"][..],
        &[&bmc("10.0.0.1"), "control/bmc_port=443"],
        &["nics/e/ip=10.0.0.1"],
        &[&bmc("fe80::1")],
        &[&bmc("Chassis"), "control/bmc_system=1"],
    ] {
        let wrong = world.wrong(Noun::Node, create("n9", edits)).await;
        assert!(wrong.contains("'s, too"), "{edits:?}: {wrong}");
    }
    world.texts(Noun::Node, create("n4", &[&bmc("10.0.0.1"), "control/bmc_port=6230"])).await;
    world.texts(Noun::Node, create("n5", &[&bmc("chassis"), "control/bmc_system=2"])).await;
}
