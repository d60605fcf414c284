//! Secrets that leave the daemon: with its administrators alone, and sealed where they are kept.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::world::World;

#[test]
fn an_administrator_exports_secrets_sealed_to_a_passphrase() {
    let world = World::new();
    let mut daemon = world.active();
    world.ok("node create n[1-3] control/bmc_address=b{n} control/bmc_password=hunter2");
    world.ok("passwd create root password=swordfish");
    let private = |name: &str, text: &str| {
        fs::write(world.path(name), text).unwrap();
        fs::set_permissions(world.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    };
    private("phrase", "correct horse\n");
    private("other", "battery staple\n");
    for (noun, file) in [("node", "nodes.json"), ("passwd", "passwds.yaml")] {
        let line = format!("{noun} export all --with-secrets --passphrase-file phrase -o {file}");
        world.ok(&line);
        let text = fs::read_to_string(world.path(file)).unwrap();
        assert!(text.contains("locked:"), "{text}");
        assert!(!text.contains("hunter2") && !text.contains("swordfish"), "{text}");
        assert!(!text.contains("sealed:"), "{text}");
    }
    daemon.says("secrets were given away");
    assert!(!daemon.heard.contains("hunter2"));
    // Without the passphrase it is worth nothing; with it, it is what it was.
    daemon.stop();
    fs::remove_dir_all(world.path("state")).unwrap();
    let _daemon = world.active();
    assert_ne!(world.run("node import nodes.json --passphrase-file other").code, 0);
    world.ok("node import nodes.json --passphrase-file phrase");
    world.ok("passwd import passwds.yaml --passphrase-file phrase");
    let body = Some(("application/json", r#"{"names": "all"}"#));
    let (status, answer) = world.ask("POST", "/v1/nodes/export", body);
    assert_eq!((status, answer.to_string().matches("hunter2").count()), (200, 3), "{answer}");
    let (_, answer) = world.ask("POST", "/v1/passwds/export", body);
    assert!(answer.to_string().contains("swordfish"), "{answer}");
    // No read gives them away.
    let (status, answer) = world.ask("GET", "/v1/nodes/export?names=all&format=json", None);
    assert!(status == 200 && !answer.to_string().contains("hunter2"), "{answer}");
}
