//! `pavo daemon`, as commands and other programs meet it.

mod contract;
mod leading;
mod luck;
mod operations;
mod secrets;
#[path = "../etcd/server.rs"]
#[allow(dead_code, reason = "shared with tests/etcd")]
mod server;
mod sweep;
mod world;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::json;
use world::{World, ask};

#[test]
fn commands_find_the_daemon_and_read_from_its_memory() {
    let world = World::new();
    let error = world.refused("node list", 5);
    assert!(error.contains("nobody listens there") && error.contains("systemctl"), "{error}");
    let daemon = world.active();
    world.ok("node create node[1-9] arch=x86_64 control/bmc_address=10.0.0.{n} groups=rack1");
    assert_eq!(world.ok("node list @rack1").lines().count(), 9);
    world.ok("node update node[2-3] tags+=gpu");
    assert!(world.ok("node show node2 -o json").contains("gpu"));
    assert_eq!(world.ok("nodeset expand tags=gpu").split_whitespace().count(), 2);
    assert_eq!(world.ok("nodeset count @rack1").trim(), "9");
    let exported = world.ok("node export all --format yaml");
    assert!(exported.contains("node9"));
    // What one does here is not in an inventory of one's own.
    assert!(!world.path("own/store.db").exists());
    world.ok("node delete node[1-8]");
    assert_eq!(daemon.stop(), 0);
    assert!(!world.path("socket").exists());
    let _again = world.active();
    assert_eq!(world.ok("node list").trim(), "node9 (node)");
    let services = world.ok("service list -o json");
    assert!(services.contains("\"active\": true"), "{services}");
}

#[test]
fn secrets_are_sealed_and_shown_to_nobody() {
    let world = World::new();
    let _daemon = world.active();
    world.ok("node create n1 control/bmc_address=b1 control/bmc_password=hunter2");
    for line in ["node show n1 -o json", "node export all", "node list -o json", "op list -o json"]
    {
        assert!(!world.ok(line).contains("hunter2"), "{line}");
    }
    let (_, _, body) = ask(&world.path("socket"), "GET", "/v1/nodes", None);
    assert!(!body.contains("hunter2") && !body.contains("sealed:"), "{body}");
    for entry in fs::read_dir(world.path("state")).unwrap() {
        let bytes = fs::read(entry.unwrap().path()).unwrap();
        assert!(!bytes.windows(7).any(|it| it == b"hunter2"));
    }
    let mode = |name: &str| fs::metadata(world.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("state/inventory.key"), 0o600);
}

#[test]
fn who_is_not_an_administrator_looks_and_changes_nothing() {
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "only root can be somebody else");
        eprintln!("SKIPPED: only root can be somebody else");
        return;
    }
    let world = World::new();
    let daemon = world.active();
    world.ok("node create n1 control/bmc_password=hunter2");
    fs::set_permissions(world.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let body = r#"{"names": "n2"}"#;
    let ask_at = |path: &str, method: &str, body: Option<&str>| {
        let socket = world.path("socket");
        let mut command = std::process::Command::new("setpriv");
        command.args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "curl",
            "-s",
            "-w",
            "\n%{http_code}",
        ]);
        command.args(["-X", method, "--unix-socket"]).arg(socket).arg(format!("http://pavo{path}"));
        if let Some(body) = body {
            command.args(["-H", "content-type: application/json", "-d", body]);
        }
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    let ask = |method: &str, body: Option<&str>| ask_at("/v1/nodes", method, body);
    assert!(ask("GET", None).ends_with("\n200"));
    let refused = ask("POST", Some(body));
    assert!(refused.ends_with("\n403") && refused.contains("may look"), "{refused}");
    // Nor what others may not see.
    let secrets = ask_at("/v1/nodes/export", "POST", Some(r#"{"names": "all"}"#));
    assert!(secrets.ends_with("\n403") && !secrets.contains("hunter2"), "{secrets}");
    // An administrator's group: nobody's, here.
    daemon.stop();
    world.configure("admin-group: nogroup\n");
    let _daemon = world.active();
    let done = ask("POST", Some(body));
    assert!(done.ends_with("\n200"), "{done}");
}

#[test]
fn other_hosts_show_a_token_over_tls() {
    let world = World::new();
    world.certify();
    let listen = format!(
        "listen: 127.0.0.1:0\ncertificate: {0}/daemon.pem\nkey: {0}/daemon-key.pem\nca-cert: {0}/daemon.pem\n",
        world.dir.path().display()
    );
    world.configure(&listen);
    let mut daemon = world.start();
    daemon.says(" active ");
    let line = daemon.heard.lines().find(|line| line.contains("address=")).unwrap().to_owned();
    let port = line.rsplit(':').next().unwrap().trim_matches(|c: char| !c.is_ascii_digit());
    let token = world.ok("daemon token create laptop");
    let reader = world.ok("daemon token create --read-only screen");
    assert!(world.ok("daemon token list").contains("screen"));
    assert!(!fs::read_to_string(world.path("state/tokens")).unwrap().contains(token.trim()));
    fs::create_dir_all(world.path(".pavo")).unwrap();
    let use_token = |token: &str| {
        let file = world.path(".pavo/daemon-token");
        let _ = fs::remove_file(&file);
        fs::write(&file, token).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    };
    let run = |line: &str| {
        let mut command = world.command(line);
        let output =
            command.env("PAVO_DAEMON", format!("https://localhost:{port}")).output().unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        (output.status.code().unwrap(), text)
    };
    assert!(run("node list").1.contains("pavo daemon token create"));
    use_token(&token);
    assert_eq!(run("node create n1").0, 0);
    use_token(&reader);
    assert!(run("node list").1.contains("n1"));
    let (code, text) = run("node delete n1");
    assert!(code == 5 && text.contains("`screen` may look"), "{text}");
    fs::copy(world.path(".pavo/daemon-token"), world.path("phrase")).unwrap();
    let (code, text) = run("node export all --with-secrets --passphrase-file phrase");
    assert!(code == 5 && text.contains("`screen` may look"), "{text}");
    use_token("guess");
    let (code, text) = run("node list");
    assert!(code == 5 && text.contains("does not know you"), "{text}");
    use_token(&token);
    world.ok("daemon token delete laptop");
    assert!(run("node list").1.contains("does not know you"));
    // A daemon that is somebody else is told nothing.
    world.configure(&listen.replace("ca-cert: ", "#"));
    use_token(&reader);
    let (code, text) = run("node list");
    assert!(code == 5 && text.contains("does not prove to be the daemon"), "{text}");
}

#[test]
fn callers_that_go_away_or_dawdle_keep_nobody_waiting() {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    let world = World::new();
    let _daemon = world.active();
    let socket = world.path("socket");
    // Half a request, and none at all.
    let mut half: Vec<UnixStream> =
        (0..200).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    for stream in half.iter_mut().take(100) {
        stream.write_all(b"GET /v1/nodes HTTP/1.1\r\nhost:").unwrap();
    }
    // A change whose caller does not wait for its answer is made whole, or was never begun.
    let count = || -> u32 { world.run("nodeset count all").stdout.trim().parse().unwrap_or(0) };
    let mut made = 0;
    for round in 1..=20 {
        let body = format!(r#"{{"names": "n{round}x[1-3000]", "edits": ["arch=x86_64"]}}"#);
        let head = "POST /v1/nodes HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
        let request = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
        let mut gone = UnixStream::connect(&socket).unwrap();
        gone.write_all(request.as_bytes()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(10 * round));
        drop(gone);
        // This one is made after it.
        world.ok(&format!("node create last{round}"));
        made = count() - u32::try_from(round).unwrap();
        assert_eq!(made % 3000, 0, "one is half made");
        if made > 0 {
            break;
        }
    }
    assert!(made > 0, "none was begun");
}

#[test]
fn what_is_counted_is_open_metrics() {
    let world = World::new();
    let _daemon = world.active();
    world.ok("node create n[1-7]");
    let (status, head, text) = ask(&world.path("socket"), "GET", "/metrics", None);
    assert_eq!(status, 200);
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
    for line in ["pavo_nodes 7", "pavo_leading 1", "# EOF"] {
        assert!(text.lines().any(|it| it == line), "{line}\n{text}");
    }
    let asked = "pavo_requests_total{method=\"POST\",path=\"/v1/{kind}\",status=\"200\"} 1";
    assert!(text.contains(asked), "{text}");
}

#[test]
fn logs_are_structured_where_that_is_wanted() {
    let world = World::new();
    let mut command = world.command("daemon --log-format json");
    let mut child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
    loop {
        let line = lines.next().unwrap().unwrap();
        let read: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(read["level"], "INFO");
        if read["message"] == "active" {
            assert_eq!(read["nodes"], 0);
            break;
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn odd_requests_are_refused_with_reasons() {
    let world = World::new();
    let _daemon = world.active();
    let json = "application/json";
    for (method, path, body, status, why) in [
        ("GET", "/v1/nods", None, 404, "there are no such records"),
        ("GET", "/", None, 404, "nothing at this path"),
        ("PUT", "/v1/nodes", None, 405, "does not take this method"),
        ("GET", "/v1/nodes?nmes=x", None, 400, "nmes"),
        ("GET", "/v1/nodes?names=n[1-", None, 400, ""),
        ("GET", "/v1/nodes?names=n[1-10000000]", None, 400, ""),
        ("POST", "/v1/nodes", Some((json, "{")), 400, "not as it should be"),
        ("POST", "/v1/nodes", Some((json, r#"{"names": "n1", "nmes": 1}"#)), 400, "nmes"),
        ("POST", "/v1/nodes", Some(("text/plain", "{}")), 415, "application/json"),
        ("POST", "/v1/nodes", Some((json, r#"{"names": "../x"}"#)), 400, ""),
        ("POST", "/v1/nodes", Some((json, r#"{"names": "n1", "edits": ["arhc=x"]}"#)), 400, "arch"),
        ("POST", "/v1/nodes", Some((json, r#"{"names": "@/etc/passwd"}"#)), 400, ""),
        ("DELETE", "/v1/nodes", None, 400, "names"),
        ("GET", "/v1/ops/x", None, 404, ""),
        ("GET", "/v1/ops/7", None, 404, "no operation 7"),
        ("POST", "/v1/nodes/import?format=json", Some(("text/plain", "\u{1}")), 400, ""),
        ("POST", "/v1/nodes/import?format=doc", Some(("text/plain", "")), 400, "doc"),
    ] {
        let (found, answer) = world.ask(method, path, body);
        assert_eq!(found, status, "{method} {path}: {answer}");
        assert!(answer["kind"].is_string() && answer["because"].is_array(), "{answer}");
        assert!(answer.to_string().contains(why), "{method} {path}: {answer}");
    }
    let deep = format!("{{\"names\": {}1{}}}", "[".repeat(10_000), "]".repeat(10_000));
    assert_eq!(world.ask("POST", "/v1/nodes", Some((json, &deep))).0, 400);
    let long = format!("{{\"names\": \"{}\"}}", "x".repeat(2 << 20));
    assert_eq!(world.ask("POST", "/v1/nodes", Some((json, &long))).0, 413);
    assert_eq!(world.ask("GET", "/v1/nodes", None).1, json!({"rows": [], "missing": []}));
}
