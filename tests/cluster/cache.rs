//! Copies of images on the VMs' host.

use std::fs;
use std::path::PathBuf;

use nix::mount::{MsFlags, mount};
use serde_json::Value;

use super::world::{NOBODY, World, prepared_world};

/// Another file system than that of the images, of this size.
fn disk(world: &World, name: &str, kib: u32) -> PathBuf {
    let path = world.folder(name);
    let options = format!("size={kib}k,uid={NOBODY},gid={NOBODY},mode=700");
    let none = MsFlags::empty();
    mount(Some("none"), &path, Some("tmpfs"), none, Some(&*options)).unwrap();
    path
}

fn copies(world: &World) -> Vec<Value> {
    let said = world.ok(&["image", "cache", "list", "-o", "json"]);
    serde_json::from_str(&said).unwrap()
}

/// The disks that lie below those of the VMs, as QEMU says.
fn used(world: &World) -> Vec<String> {
    let said: Value =
        serde_json::from_str(&world.ok(&["qmp", "all", "query-named-block-nodes"])).unwrap();
    let vms = said.as_object().unwrap().values();
    let disk = |vm: &Value| {
        let nodes = vm.as_array().unwrap().iter();
        let disk = nodes.clone().find(|node| node["node-name"] == "disk").unwrap();
        disk["image"]["backing-image"]["filename"].as_str().unwrap().to_owned()
    };
    vms.map(disk).collect()
}

#[test]
fn vms_of_a_host_share_one_checked_copy_and_what_is_in_use_stays() {
    prepared_world(|world| {
        let base = disk(world, "near", 1 << 20);
        let none = world.pavo(&["image", "cache", "list"]);
        assert_eq!(none.code, Some(3), "{none}");
        let repos = fs::read_to_string(world.path("conf/repos.yaml")).unwrap();
        let cache = format!("{repos}cache:\n  path: {}\n  size: 1G\n", base.display());
        world.write("conf/repos.yaml", &cache);
        assert!(copies(world).is_empty());

        let alloc = world.idle(&["tiny:2"]);
        let used = used(world);
        assert_eq!(used.len(), 2);
        for disk in &used {
            assert!(disk.starts_with(&*base.to_string_lossy()), "{disk}");
        }
        let all = copies(world);
        assert_eq!((all.len(), &all[0]["in_use"]), (1, &Value::from(true)));
        assert!(all[0]["images"][0].as_str().unwrap().ends_with(":tiny@0"), "{all:?}");
        let said = world.pavo(&["image", "cache", "gc", "--clear"]);
        assert!(said.stderr.contains("Removed the copies of 0 layers"), "{said}");
        world.ok(&["cancel"]);
        alloc.finish();
        world.until("nobody uses it", || copies(world)[0]["in_use"] == false);
        world.ok(&["image", "cache", "delete", "tiny"]);
        assert!(copies(world).is_empty());

        let said = world.pavo(&["image", "cache", "fetch", "tiny"]);
        assert!(said.stderr.contains("tiny is on this host ("), "{said}");
        let hash = copies(world)[0]["hash"].as_str().unwrap().to_owned();
        let folder = fs::read_dir(&base).unwrap().map(|it| it.unwrap().path()).next().unwrap();
        let copy: PathBuf = folder.join("data").join(&hash[..2]).join(&hash);
        assert!(copy.is_file());
        world.ok(&["image", "cache", "gc", "-b", "1K"]);
        assert!(!copy.exists());
    });
}

#[test]
fn without_room_or_a_folder_images_are_used_where_they_are() {
    prepared_world(|world| {
        let full = disk(world, "full", 8 << 10);
        let repos = fs::read_to_string(world.path("conf/repos.yaml")).unwrap();
        for base in [&world.path("absent/absent"), &full] {
            let cache = format!("{repos}cache:\n  path: {}\n  size: 1G\n", base.display());
            world.write("conf/repos.yaml", &cache);
            let alloc = world.idle(&["tiny:2"]);
            for disk in used(world) {
                assert!(!disk.starts_with(&*base.to_string_lossy()), "{disk}");
            }
            world.ok(&["cancel"]);
            alloc.finish();
        }
        let own = fs::read_dir(&full).unwrap().next().unwrap().unwrap().path();
        assert!(fs::read_dir(own.join("part")).unwrap().next().is_none());
        let fetch = world.pavo(&["image", "cache", "fetch", "tiny"]);
        assert_eq!(fetch.code, Some(5), "{fetch}");
    });
}
