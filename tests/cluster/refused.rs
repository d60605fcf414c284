//! What cannot be done is refused: one error with its cause and a way out, the documented
//! exit code, and nothing left.
//!
//! The messages are in `tests/golden/refused.txt`. After an intended change:
//! `PAVO_UPDATE_GOLDEN=1 cargo test --test cluster refused`, and read the difference.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::running::Output;
use super::world::{World, prepared_world, world};

const QEMUS: &str = "\
no-qemu: {image: tiny, qemu-bin: /no/qemu}
bad-qemu: {image: tiny, custom-args: [-garbage]}
";

/// An error must be one, with a way out.
fn check(output: &Output, code: i32) {
    assert_eq!(output.code, Some(code), "{output}");
    let errors = output.stderr.lines().filter(|line| line.starts_with("error:")).count();
    assert_eq!(errors, 1, "{output}");
    assert!(output.stderr.contains("help: "), "{output}");
}

/// The error alone, with what differs from run to run replaced.
fn error(world: &World, output: &Output) -> String {
    let at = output.stderr.find("error:").unwrap();
    output.stderr[at..]
        .replace(world.path("").to_str().unwrap(), "$DIR/")
        .replace("$DIR//", "$DIR/")
}

#[test]
fn what_cannot_be_meant_is_refused_before_there_is_a_job() {
    world(|world| {
        let secret = world.write("secret", "#cloud-config\n");
        fs::set_permissions(&secret, PermissionsExt::from_mode(0o000)).unwrap();
        let templates = "no-image: {image: absent}\nno-access: {image: tiny, user-data: SECRET}\n";
        let templates = templates.replace("SECRET", secret.to_str().unwrap());
        world.write("conf/templates.yaml", &templates);
        let refused: &[(i32, &[&str])] = &[
            (4, &["absent:1"]),
            (4, &["tinny"]),
            (2, &["tiny:0"]),
            (2, &["tiny:1000000000"]),
            (2, &["../tiny"]),
            (2, &["tiny\nevil"]),
            (2, &["tiny,"]),
            (2, &["tiny", "-J", "a,b"]),
            (2, &["tiny", "-J", "../a"]),
            (2, &["tiny", "-c", "0"]),
            (2, &["tiny", "--mem", "much"]),
            (2, &["tiny", "-t", "soon"]),
            (4, &["no-image"]),
            (5, &["no-access"]),
            (5, &["tiny", "--mem", "99T"]),
        ];
        let mut messages = String::new();
        for (code, args) in refused {
            let output = world.alloc(args).finish();
            check(&output, *code);
            assert!(!output.stderr.contains("Granted"), "{args:?}: {output}");
            // The sum of what this machine has is its own.
            if !args.contains(&"99T") {
                messages += &format!("$ pavo alloc {args:?}\n{}\n", error(world, &output));
            }
        }
        golden("tests/golden/refused.txt", &messages);
    });
}

#[test]
fn a_configuration_with_mistakes_starts_nothing() {
    world(|world| {
        let faulty = [
            ("templates.yaml", "a: {image: tiny, inherits: b}\nb: {inherits: a}\n"),
            ("templates.yaml", "a: {image: tiny, resource-set: nowhere}\n"),
            ("templates.yaml", "a: {image: tiny, imagine: that}\n"),
        ];
        for (file, text) in faulty {
            let path = world.write(&format!("conf/{file}"), text);
            let output = world.alloc(&["a:1", "--mem", "128", "-E", "true"]).finish();
            check(&output, 3);
            fs::remove_file(path).unwrap();
        }
        let networks = "default:\n  networks: [nowhere]\n  default: true\n";
        world.write("site/resources.yaml", networks);
        check(&world.alloc(&["tiny", "-E", "true"]).finish(), 3);
    });
}

#[test]
fn a_qemu_that_is_missing_or_dies_says_why() {
    world(|world| {
        world.write("conf/templates.yaml", QEMUS);
        let missing = world.alloc(&["no-qemu", "--mem", "128", "-E", "true"]).finish();
        check(&missing, 5);
        assert!(missing.stderr.contains("`/no/qemu` does not start"), "{missing}");
        world.nothing_is_left();
        let dies = world.alloc(&["bad-qemu", "--mem", "128", "-E", "true"]).finish();
        check(&dies, 5);
        assert!(dies.stderr.contains("-garbage: invalid option"), "{dies}");
    });
}

#[test]
fn without_the_tun_device_there_is_an_error_that_names_it() {
    prepared_world(|world| {
        world.allow_tun(0o600);
        let output = world.alloc(&["tiny", "--mem", "128", "-E", "true"]).finish();
        check(&output, 5);
        assert!(output.stderr.contains("/dev/net/tun"), "{output}");
    });
}

#[test]
fn without_pasta_there_is_an_error_that_names_its_package() {
    world(|world| {
        let programs = world.folder("programs");
        for program in ["qemu-system-x86_64", "nft", "sh"] {
            let found = ["/usr/bin", "/usr/sbin"].map(|dir| format!("{dir}/{program}"));
            let found = found.iter().find(|path| fs::exists(path).unwrap()).unwrap();
            symlink(found, programs.join(program)).unwrap();
        }
        // `env` is found by the one PATH, and sets the other.
        let mut command = world.command("env");
        command.arg(format!("PATH={}", programs.display())).arg(world.program());
        command.args(["alloc", "tiny", "--mem", "128", "-E", "true"]);
        let output = world.run(command);
        check(&output, 5);
        assert!(output.stderr.contains("`pasta` is not installed"), "{output}");
    });
}

#[test]
fn without_user_namespaces_there_is_an_error_that_says_who_decides() {
    world(|world| {
        // Within a namespace that allows no other: as where the administrator said so.
        let mut command = world.command("unshare");
        command.args(["--user", "--map-current-user", "--keep-caps", "sh", "-c"]);
        command.arg(
            "echo 0 >/proc/sys/user/max_user_namespaces && \
             exec \"$PAVO\" alloc tiny --mem 128 -E true",
        );
        let output = world.run(command);
        check(&output, 5);
        assert!(output.stderr.contains("user namespaces are off here"), "{output}");
    });
}

#[test]
fn a_full_disk_is_said_to_be_full() {
    prepared_world(|world| {
        for kib in [4, 8, 16, 24, 32] {
            world.shrink_tmp(kib);
            let output = world.alloc(&["tiny", "--mem", "128", "-E", "true"]).finish();
            check(&output, 5);
            assert!(output.stderr.contains("No space left on device"), "{kib} KiB: {output}");
            world.nothing_is_left();
        }
    });
}

/// Compares with a file, or writes it where that is asked for.
fn golden(path: &str, text: &str) {
    if std::env::var_os("PAVO_UPDATE_GOLDEN").is_some() {
        fs::write(path, text).unwrap();
    }
    let expected = fs::read_to_string(path).unwrap_or_default();
    assert!(text == expected, "{path} differs; now:\n{text}");
}
