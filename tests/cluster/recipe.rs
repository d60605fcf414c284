//! `pavo image build` where it cannot come to a good end: nothing is left of it.

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::running::Output;
use super::tutorial::give_ids;
use super::world::{World, prepared_world};

/// A repository without images, and what is in it that is no part of one.
fn empty(world: &World) -> impl Fn() -> Vec<PathBuf> + use<> {
    let images = world.folder("own");
    let repos = format!("repos:\n  - name: user\n    path: {}\n", images.display());
    world.write("conf/repos.yaml", &repos);
    move || {
        let entries = fs::read_dir(images.join(".tmp")).into_iter().flatten();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

/// Builds what a recipe of these lines says.
fn build(world: &World, recipe: &str) -> Output {
    world.pavo(&words(world, recipe).each_ref().map(String::as_str))
}

fn words(world: &World, recipe: &str) -> [String; 6] {
    let file = world.write("recipe.yaml", recipe);
    let cache = world.path("home/cache");
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    ["image".into(), "build".into(), path(&file), "new".into(), "--cache".into(), path(&cache)]
}

#[test]
fn who_may_not_build_is_told_so_before_anything_is_done() {
    prepared_world(|world| {
        let left = empty(world);
        let output = build(world, "packages: [less]\n");
        assert_eq!(output.code, Some(5), "{output}");
        for part in ["`/etc/subuid` has none for you", "--add-subgids 100000-165535 nobody`"] {
            assert!(output.stderr.contains(part), "{output}");
        }
        let output = build(world, "packges: [less]\n");
        assert_eq!(output.code, Some(3), "{output}");
        assert!(output.stderr.contains("did you mean `packages`?"), "{output}");
        assert_eq!(world.pavo(&["image", "build", "debain", "new"]).code, Some(4));
        assert_eq!(left(), Vec::<PathBuf>::new());
    });
}

#[test]
fn a_build_without_packages_says_why_and_leaves_nothing() {
    prepared_world(|world| {
        let left = empty(world);
        give_ids(world);
        // Nobody listens there.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let recipe = format!("suite: bookworm\nmirror: http://127.0.0.1:{port}/debian\n");
        let output = build(world, &recipe);
        assert_eq!(output.code, Some(5), "{output}");
        assert!(output.stderr.contains("Downloading packages of bookworm"), "{output}");
        assert!(output.stderr.contains("Connection refused"), "{output}");
        assert_eq!(left(), Vec::<PathBuf>::new());
        assert!(!world.ok(&["image", "list"]).contains("new"));
    });
}

#[test]
fn of_a_build_that_is_killed_nothing_runs_on_and_the_next_one_clears_up() {
    prepared_world(|world| {
        let left = empty(world);
        give_ids(world);
        let mirror = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = mirror.local_addr().unwrap();
        let recipe = format!("suite: bookworm\nmirror: http://{address}/debian\n");
        let words = words(world, &recipe);
        let build = world.start(world.pavo_command(&words.each_ref().map(String::as_str)));
        // It asks, and is never answered.
        let (mut apt, _) = mirror.accept().unwrap();
        apt.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        assert!(apt.read(&mut [0; 64]).unwrap() > 0);
        build.signal(Signal::SIGKILL);
        assert_eq!(build.finish().signal, Some(9));
        world.nothing_runs();
        let [dead] = &left()[..] else { panic!("{:?}", left()) };
        assert!(dead.join("build/tree").read_dir().unwrap().next().is_none());
        world.ok(&["image", "repo", "gc", "user"]);
        assert_eq!(left(), Vec::<PathBuf>::new());
    });
}
