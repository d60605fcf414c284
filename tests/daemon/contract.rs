//! The daemon does what its contract says, whoever asks.

use std::path::Path;
use std::process::Command;

use crate::world::World;

#[test]
fn the_contract_is_served() {
    let world = World::new();
    let _daemon = world.active();
    let (status, contract) = world.ask("GET", "/v1/openapi.json", None);
    assert_eq!(status, 200);
    assert_eq!(contract["openapi"], "3.1.0");
    let paths = contract["paths"].as_object().unwrap();
    for path in paths.keys() {
        let path = path.replace("{kind}", "nodes").replace("{id}", "1");
        let (status, answer) = world.ask("PUT", &path, None);
        assert_eq!(status, 405, "{path}: {answer}");
    }
}

/// Schemathesis asks what the contract allows, and much that it does not.
#[test]
fn no_request_gets_an_answer_that_the_contract_does_not_have() {
    let program = Path::new("target/schemathesis/bin/schemathesis");
    if !program.exists() {
        assert!(std::env::var_os("CI").is_none(), "`make target/schemathesis` first");
        eprintln!("SKIPPED: no schemathesis: `make target/schemathesis`");
        return;
    }
    let world = World::new();
    // It wants a port.
    world.certify();
    world.configure(&format!(
        "listen: 127.0.0.1:0\ncertificate: {0}/daemon.pem\nkey: {0}/daemon-key.pem\n",
        world.dir.path().display()
    ));
    let daemon = world.active();
    let line = daemon.heard.lines().find(|line| line.contains("address=")).unwrap();
    let port = line.rsplit(':').next().unwrap().trim_matches(|c: char| !c.is_ascii_digit());
    world.ok("node create n[1-5] arch=x86_64");
    world.ok("node create n9 mgt=ipmi control/bmc_address=127.0.0.1 control/bmc_port=9");
    let token = world.ok("daemon token create schemathesis");
    let mut command = Command::new(program.canonicalize().unwrap());
    command.current_dir(world.dir.path()).env_clear().env("HOME", world.dir.path());
    command.env("PATH", std::env::var_os("PATH").unwrap());
    // Names have a grammar that a schema cannot say: what fits the schema may be no set.
    command.args([
        "run",
        "--exclude-checks",
        "positive_data_acceptance",
        "--tls-verify",
        "false",
        "--no-color",
    ]);
    command.args(["--max-examples", "25", "--seed", "7", "--request-timeout", "60"]);
    command.args([
        "--suppress-health-check",
        "all",
        "--phases",
        "examples,coverage,fuzzing,stateful",
    ]);
    command.args(["-H", &format!("Authorization: Bearer {}", token.trim())]);
    command.arg(format!("https://localhost:{port}/v1/openapi.json"));
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
}
