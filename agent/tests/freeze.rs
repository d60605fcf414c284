//! File systems that are brought to rest, on a disk of this test's own.

use std::process::Command;

/// In a namespace of its own. Only what lies in `mounts` is ever frozen.
const SCRIPT: &str = r#"
set -e
cd "$1"
truncate -s 8M img
mkfs.ext4 -q img
mkdir m
mount -o loop img m
trap 'exec 9>&-; sleep 0.2; umount -l m' EXIT
grep " $1/m " /proc/self/mountinfo > mounts
[ "$(wc -l < mounts)" = 1 ]
mkfifo hold

freeze() {
    rm -f count wrote
    "$AGENT" --freeze $1 mounts < hold > count &
    front=$!
    exec 9> hold
    until [ -s count ]; do sleep 0.02; done
    [ "$(cat count)" = 1 ]
    (echo x > m/file; echo > wrote) 9>&- &
}
written() { for n in $(seq 500); do [ -e wrote ] && return; sleep 0.02; done; false; }

echo held until it is let go
freeze 30
sleep 0.3
[ ! -e wrote ]
exec 9>&-
wait $front
written

echo killed
freeze 30
[ ! -e wrote ]
kill -9 $front
written
exec 9>&-

echo forgotten
freeze 1
written
exec 9>&-
code=0
wait $front || code=$?
[ $code = 3 ]
echo all well
"#;

#[test]
#[allow(clippy::print_stderr, reason = "a skip is never silent")]
fn file_systems_go_on_whoever_is_gone() {
    let can =
        nix::unistd::geteuid().is_root() && std::path::Path::new("/dev/loop-control").exists();
    if !can {
        assert!(std::env::var_os("CI").is_none(), "needs root and loop devices");
        eprintln!("skipped: needs root and loop devices");
        return;
    }
    let dir = std::env::temp_dir().join(format!("pavo-agent-freeze-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let mut shell = Command::new("unshare");
    shell.args(["--mount", "--propagation", "private", "sh", "-c", SCRIPT, "sh"]).arg(&dir);
    let output = shell.env("AGENT", env!("CARGO_BIN_EXE_pavo-agent")).output().unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    let said = format!("{output:?}");
    assert!(output.status.success() && said.contains("all well"), "{said}");
}
