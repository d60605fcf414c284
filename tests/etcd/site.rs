//! Who may do what: the preparation of a site's etcd, and its persons.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use pavo::error::Kind;
use pavo::model::owner::Owner;
use pavo::ops::site_store::{Persons, ensure_person, prepare, remove_person};
use pavo::store::etcd::{Access, Certificate, Etcd, Grant, Login, Right, person};
use pavo::store::pool::Pool;
use pavo::store::secret::Secret;
use pavo::store::{Change, Check, Commit, Event, Seen, Store, get_json, keys, put_json};

use crate::certificates::Authority;
use crate::helpers::next;
use crate::server::{Cluster, Setup};
use crate::{changes, plain, put, run};

/// An etcd that asks each client for a certificate, prepared by `root`'s.
pub struct Site {
    pub authority: Authority,
    pub cluster: Cluster,
}

impl Site {
    fn new(args: &[&str]) -> Self {
        let authority = Authority::new();
        let mut args: Vec<String> = args.iter().map(|arg| (*arg).into()).collect();
        args.push("--client-cert-auth".into());
        let setup = Setup { members: 1, args, tls: Some(authority.dir().to_owned()) };
        Self { cluster: Cluster::start(setup), authority }
    }

    fn access(&self, login: Login) -> Access {
        Access {
            endpoints: self.cluster.endpoints(),
            ca: self.authority.ca(),
            // What all login nodes of a site show: its name is no user's.
            certificate: Some(self.authority.client("pavo-login")),
            login,
        }
    }

    fn certificate(&self, name: &str) -> Access {
        let Certificate { cert, key } = self.authority.client(name);
        self.access(Login::Certificate { cert, key })
    }

    async fn prepared(persons: Persons) -> Self {
        let site = Self::new(&[]);
        let root = site.certificate("root");
        let report = prepare(&root, persons, |_| panic!("no password"));
        assert!(!report.await.unwrap().done.is_empty());
        site
    }

    async fn person(&self, name: &str, secret: &Secret) -> Etcd {
        Etcd::connect(&self.access(Login::person(name, secret))).await.unwrap()
    }
}

async fn report<T>(outcome: impl Future<Output = pavo::error::Result<T>>) -> String {
    match outcome.await {
        Ok(_) => panic!("it was done"),
        Err(error) => error.report(),
    }
}

async fn denied<T>(outcome: impl Future<Output = pavo::error::Result<T>>) {
    let report = report(outcome).await;
    assert!(report.contains("etcd does not permit this"), "{report}");
}

#[test]
fn a_site_is_prepared_by_certificate_and_may_be_again() {
    run(async {
        let site = Site::new(&[]);
        let root = site.certificate("root");
        let first = prepare(&root, Persons::MadeByNodes, |_| panic!("no password")).await.unwrap();
        assert!(first.done.iter().any(|what| what == "enabled authentication"), "{first:?}");
        let again = prepare(&root, Persons::MadeByNodes, |_| panic!("no password")).await.unwrap();
        assert_eq!(again.done, [""; 0]);
        let other = prepare(&root, Persons::MadeByAdministrator, |_| panic!()).await.unwrap();
        assert_eq!(other.done, ["no longer let nodes make the users of persons"]);

        // From now on only root may.
        let nobody = site.access(Login::None);
        let refused = prepare(&nobody, Persons::MadeByNodes, |_| panic!());
        let report = self::report(refused).await;
        assert!(report.contains("logging in to etcd as `root`"), "{report}");
        let mallory = site.certificate("mallory");
        assert!(prepare(&mallory, Persons::MadeByNodes, |_| panic!()).await.is_err());
        // root has no password that anybody could know.
        let login = Login::Password { user: "root".into(), password: Secret::random().unwrap() };
        let report = self::report(Etcd::connect(&site.access(login))).await;
        assert!(report.contains("etcd refused the log-in of `root`"), "{report}");
    });
}

#[test]
fn a_certificate_that_is_not_roots_does_not_lock_the_site_out() {
    run(async {
        let site = Site::new(&[]);
        let toor = site.certificate("toor");
        let wrong = prepare(&toor, Persons::MadeByNodes, |_| panic!());
        let report = report(wrong).await;
        assert!(report.contains("its common name has to be `root`"), "{report}");
        prepare(&site.certificate("root"), Persons::MadeByNodes, |_| panic!()).await.unwrap();
    });
}

#[test]
fn a_site_is_prepared_by_password_and_by_one_that_is_made() {
    run(async {
        let cluster = Cluster::single();
        let kept = RefCell::new(None);
        // Interrupted when the password was to be kept: nothing is locked.
        let failing = |_: &Secret| Err(pavo::error::Error::system("the disk is full"));
        let nobody = plain(&cluster, Login::None);
        let interrupted = prepare(&nobody, Persons::MadeByNodes, failing);
        assert!(report(interrupted).await.contains("the disk is full"));
        let keep = |secret: &Secret| {
            *kept.borrow_mut() = Some(secret.clone());
            Ok(())
        };
        prepare(&plain(&cluster, Login::None), Persons::MadeByNodes, keep).await.unwrap();
        let password = kept.take().unwrap();
        let root = plain(&cluster, Login::Password { user: "root".into(), password });
        let again = prepare(&root, Persons::MadeByNodes, |_| panic!()).await.unwrap();
        assert_eq!(again.done, [""; 0]);

        // With a password that its file held before etcd knew it.
        let cluster = Cluster::single();
        let root = Access { endpoints: cluster.endpoints(), ..root };
        let report = report(Etcd::connect(&root)).await;
        assert!(report.contains("pavo internal setup store"), "{report}");
        prepare(&root, Persons::MadeByNodes, |_| panic!()).await.unwrap();
        let store = Etcd::connect(&root).await.unwrap();
        assert!(get_json::<serde_json::Value>(&store, &keys::schema()).await.unwrap().is_some());
    });
}

#[test]
fn a_person_reads_and_writes_what_is_theirs_and_nothing_else() {
    run(async {
        let site = Site::prepared(Persons::MadeByNodes).await;
        let node = Etcd::connect(&site.certificate("pavo-node")).await.unwrap();
        let (ada, bob) = (Secret::random().unwrap(), Secret::random().unwrap());
        assert!(ensure_person(&node, "ada", &ada).await.unwrap());
        assert!(ensure_person(&node, "bob", &bob).await.unwrap());
        assert!(!ensure_person(&node, "ada", &ada).await.unwrap(), "all is there");

        let (a, b) = (site.person("ada", &ada).await, site.person("bob", &bob).await);
        let job = Owner { manager: pavo::model::owner::Manager::Slurm, job: 42 };
        put_json(&a, &keys::job_record("ada", job), "mine").await.unwrap();
        put_json(&a, &(keys::drives("ada") + "x"), "mine").await.unwrap();
        put_json(&node, &keys::host_record("ada", job, 0, 0), "here").await.unwrap();
        let read = get_json::<String>(&a, &keys::host_record("ada", job, 0, 0)).await.unwrap();
        assert_eq!(read.unwrap().0, "here");
        assert!(a.get(&keys::schema()).await.unwrap().is_some());
        assert_eq!(a.list(&keys::jobs("ada"), None, 10).await.unwrap().entries.len(), 1);

        denied(put_json(&a, &keys::host_record("ada", job, 0, 0), "forged")).await;
        denied(put_json(&a, &keys::schema(), "forged")).await;
        denied(put_json(&a, &keys::pool_id("vni", 1), &job)).await;
        denied(a.get(&keys::pool_id("vni", 1))).await;
        for foreign in [keys::jobs("ada"), keys::hosts("ada"), keys::drives("ada")] {
            // That a drive is in use everybody may know.
            if foreign != keys::drives("ada") {
                denied(b.list(&foreign, None, 1)).await;
                denied(b.get(&format!("{foreign}42/record"))).await;
                denied(b.watch(&foreign, 0)).await;
            }
            denied(b.commit(&[], &[put(&format!("{foreign}42/record"), "")])).await;
            denied(b.commit(&[], &[Change::DeletePrefix { prefix: foreign }])).await;
        }
        assert_eq!(b.list(&keys::all_drives(), None, 9).await.unwrap().entries.len(), 1);
        denied(b.list("/pavo/v1/", None, 1)).await;
        denied(b.list("/", None, 1)).await;
        denied(b.commit(&[Check::Exists(keys::job_record("ada", job))], &[])).await;
        // Managing users is not theirs either.
        denied(b.ensure_user("mallory", Some(&bob), &["root"])).await;
        denied(b.set_password(&person("ada"), &bob)).await;
        denied(b.ensure_role("wide", &[Grant::new(Right::ReadWrite, "/".into())])).await;
        denied(ensure_person(&b, "ada", &bob)).await;
        let mut client = site.client("bob", &bob).await;
        assert!(client.user_list().await.unwrap_err().to_string().contains("permission denied"));
    });
}

impl Site {
    /// etcd's own client, logged in as a person.
    async fn client(&self, name: &str, secret: &Secret) -> etcd_client::Client {
        let access = self.access(Login::person(name, secret));
        let read = |path: &std::path::Path| std::fs::read(path).unwrap();
        let own = access.certificate.unwrap();
        let tls = etcd_client::TlsOptions::new()
            .ca_certificate(etcd_client::Certificate::from_pem(read(&access.ca.unwrap())))
            .identity(etcd_client::Identity::from_pem(read(&own.cert), read(&own.key)));
        let options = etcd_client::ConnectOptions::new()
            .with_user(person(name), secret.expose())
            .with_tls(tls);
        etcd_client::Client::connect(access.endpoints, Some(options)).await.unwrap()
    }
}

#[test]
fn nobody_passes_for_a_node_or_for_root() {
    run(async {
        let site = Site::prepared(Persons::MadeByNodes).await;
        let node = Etcd::connect(&site.certificate("pavo-node")).await.unwrap();
        let secret = Secret::random().unwrap();
        // People whose names are those of etcd's users, or of their roles.
        for name in ["root", "node", "pavo-node", "a/b", "user-ada", "%"] {
            assert!(ensure_person(&node, name, &secret).await.unwrap());
            let store = site.person(name, &secret).await;
            put_json(&store, &keys::job_record(name, Owner::local(1)), "x").await.unwrap();
            denied(put_json(&store, &keys::pool_id("vni", 1), "x")).await;
            denied(store.ensure_user("mallory", Some(&secret), &[])).await;
        }
        // A node has no password: not the empty one, and not a person's.
        for password in [serde_json::from_str("\"\"").unwrap(), secret.clone()] {
            for user in ["pavo-node", "root"] {
                let login =
                    Login::Password { user: user.into(), password: Secret::clone(&password) };
                let error = Etcd::connect(&site.access(login)).await.unwrap_err();
                assert_eq!(error.kind(), Kind::System);
            }
        }
        // The certificate that everybody shows is nobody's log-in.
        denied_or_unknown(Etcd::connect(&site.access(Login::None))).await;
        // Nor is one that another authority signed.
        let forged = Authority::new().client("pavo-node");
        let Certificate { cert, key } = forged;
        let forged = site.access(Login::Certificate { cert, key });
        assert!(Etcd::connect(&forged).await.is_err());
    });
}

async fn denied_or_unknown<T>(outcome: impl Future<Output = pavo::error::Result<T>>) {
    let report = report(outcome).await;
    assert!(report.contains("permit") || report.contains("log-in"), "{report}");
}

#[test]
fn watches_begin_while_the_site_learns_of_people() {
    run(async {
        let site = Site::prepared(Persons::MadeByNodes).await;
        let node = Etcd::connect(&site.certificate("pavo-node")).await.unwrap();
        let root = Etcd::connect(&site.certificate("root")).await.unwrap();
        let secret = Secret::random().unwrap();
        ensure_person(&node, "ada", &secret).await.unwrap();
        let ada = site.person("ada", &secret).await;
        let over = Cell::new(false);
        let learn = async {
            for number in 0..300 {
                root.ensure_user(&format!("new-{number}"), None, &[]).await.unwrap();
            }
            over.set(true);
        };
        let watch = async |store: &Etcd, prefix: &str| {
            while !over.get() {
                drop(store.watch(prefix, 0).await.unwrap());
            }
        };
        let (hosts, own) = (keys::all_hosts(), keys::hosts("ada"));
        let (of_node, of_ada) = (|| watch(&node, &hosts), || watch(&ada, &own));
        tokio::join!(learn, of_node(), of_node(), of_node(), of_node(), of_ada(), of_ada());
    });
}

#[test]
fn a_members_certificate_is_checked() {
    run(async {
        let site = Site::prepared(Persons::MadeByNodes).await;
        let other = Authority::new();
        let access = Access { ca: other.ca(), ..site.certificate("root") };
        let report = report(Etcd::connect(&access)).await;
        assert!(report.contains("UnknownIssuer") || report.contains("certificate"), "{report}");
        let access = Access { ca: None, ..site.certificate("root") };
        assert_eq!(Etcd::connect(&access).await.unwrap_err().kind(), Kind::Config);
    });
}

#[test]
fn nodes_without_the_right_to_manage_users_read_no_jobs() {
    run(async {
        let site = Site::prepared(Persons::MadeByAdministrator).await;
        let node = Etcd::connect(&site.certificate("pavo-node")).await.unwrap();
        let root = Etcd::connect(&site.certificate("root")).await.unwrap();
        let secret = Secret::random().unwrap();
        denied(ensure_person(&node, "ada", &secret)).await;
        ensure_person(&root, "ada", &secret).await.unwrap();
        let ada = site.person("ada", &secret).await;
        let job = Owner::local(1);
        put_json(&ada, &keys::job_secrets("ada", job), "a key").await.unwrap();
        denied(node.get(&keys::job_secrets("ada", job))).await;
        denied(node.watch(&keys::jobs("ada"), 0)).await;

        // What a node has to do: ids, hosts, and what is left of jobs.
        let pool = Pool::new(&node, "vni", 1..=100);
        assert_eq!(pool.take(job, 2).await.unwrap(), [1, 2]);
        put_json(&node, &keys::host_record("ada", job, 0, 0), "here").await.unwrap();
        let clear = [
            Change::DeletePrefix { prefix: keys::step_hosts("ada", job, 0) },
            Change::DeletePrefix { prefix: keys::job("ada", job) },
        ];
        assert!(matches!(node.commit(&[], &clear).await.unwrap(), Commit::Done(_)));
        assert_eq!(pool.free_all(job).await.unwrap(), 2);
        assert!(ada.get(&keys::job_secrets("ada", job)).await.unwrap().is_none());
    });
}

#[test]
fn a_person_may_have_a_new_secret() {
    run(async {
        let site = Site::prepared(Persons::MadeByNodes).await;
        let node = Etcd::connect(&site.certificate("pavo-node")).await.unwrap();
        let (old, new) = (Secret::random().unwrap(), Secret::random().unwrap());
        ensure_person(&node, "ada", &old).await.unwrap();
        let store = site.person("ada", &old).await;
        assert!(ensure_person(&node, "ada", &new).await.unwrap());
        let report = report(Etcd::connect(&site.access(Login::person("ada", &old)))).await;
        assert!(report.contains("etcd refused the log-in of `pavo-user-ada`"), "{report}");
        assert!(!report.contains(old.expose()));
        site.person("ada", &new).await.get(&keys::schema()).await.unwrap();
        // Who was logged in with the old one is not any more.
        let schema = keys::schema();
        let late = self::report(store.get(&schema)).await;
        assert!(late.contains("etcd refused the log-in"), "{late}");

        assert!(remove_person(&node, "ada").await.unwrap());
        assert!(!remove_person(&node, "ada").await.unwrap());
        assert!(Etcd::connect(&site.access(Login::person("ada", &new))).await.is_err());
        assert!(ensure_person(&node, "ada", &new).await.unwrap());
    });
}

#[test]
fn several_first_hosts_make_a_person_at_once() {
    run(async {
        let site = Site::prepared(Persons::MadeByNodes).await;
        let secret = Secret::random().unwrap();
        let make = async || {
            let node = Etcd::connect(&site.certificate("pavo-node")).await.unwrap();
            ensure_person(&node, "ada", &secret).await.unwrap()
        };
        let made = futures_util::future::join_all((0..8).map(|_| make())).await;
        assert!(made.contains(&true));
        let store = site.person("ada", &secret).await;
        put_json(&store, &keys::job_record("ada", Owner::local(1)), "x").await.unwrap();
    });
}

/// With tokens that end soon, and others that every change of users ends.
#[test]
fn a_log_in_that_ends_is_renewed_and_watches_go_on() {
    let key = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(key.path(), "a key of this test, and of no site").unwrap();
    let jwt =
        format!("--auth-token=jwt,sign-method=HS256,ttl=2s,priv-key={}", key.path().display());
    for args in [vec!["--auth-token-ttl=1"], vec![jwt.as_str()]] {
        run(async {
            let site = Site::new(&args);
            let password = Secret::random().unwrap();
            let root = site.access(Login::Password { user: "root".into(), password });
            prepare(&root, Persons::MadeByNodes, |_| panic!()).await.unwrap();
            let root = Etcd::connect(&root).await.unwrap();
            let secret = Secret::random().unwrap();
            ensure_person(&root, "ada", &secret).await.unwrap();
            let ada = site.person("ada", &secret).await;
            let prefix = keys::jobs("ada");
            let mut watch = ada.watch(&prefix, 0).await.unwrap();
            for round in 0..3 {
                // Other people come and go, and the tokens of all grow old.
                ensure_person(&root, &format!("other{round}"), &secret).await.unwrap();
                tokio::time::sleep(Duration::from_millis(1200)).await;
                let key = keys::job_record("ada", Owner::local(round));
                put_json(&ada, &key, &round).await.unwrap();
                let (_, seen) = changes(&mut watch).await;
                assert_eq!(seen, [format!("{key}={round}")]);
                drop(ada.watch(&prefix, 0).await.unwrap());
                let lease = ada.lease(Duration::from_secs(60)).await.unwrap();
                assert!(ada.keep_alive(lease).await.unwrap());
            }
        });
    }
}

#[test]
fn a_removed_person_is_logged_out() {
    run(async {
        let site = Site::prepared(Persons::MadeByNodes).await;
        let node = Etcd::connect(&site.certificate("pavo-node")).await.unwrap();
        let secret = Secret::random().unwrap();
        ensure_person(&node, "ada", &secret).await.unwrap();
        let ada = site.person("ada", &secret).await;
        remove_person(&node, "ada").await.unwrap();
        assert!(ada.watch(&keys::jobs("ada"), 0).await.is_err());
        let error = ada.get(&keys::schema()).await.unwrap_err();
        assert_eq!(error.kind(), Kind::System);
    });
}

#[test]
fn a_node_watches_the_hosts_of_a_job() {
    run(async {
        let site = Site::prepared(Persons::MadeByAdministrator).await;
        let first = Etcd::connect(&site.certificate("pavo-node")).await.unwrap();
        let second = Etcd::connect(&site.certificate("pavo-node")).await.unwrap();
        let job = Owner::local(1);
        let mut watch = first.watch(&keys::step_hosts("ada", job, 0), 0).await.unwrap();
        put_json(&second, &keys::host_record("ada", job, 0, 1), "there").await.unwrap();
        let seen = next(&mut watch).await;
        let Seen::Changes { events, .. } = seen else { panic!("{seen:?}") };
        let [Event::Put(entry)] = &events[..] else { panic!("{events:?}") };
        let record = keys::HostKey::Record { node_id: 1 };
        assert_eq!(keys::parse_host_key(&entry.key), Some((job, record)));
    });
}
