//! From a step's start to the moment when all its VMs run.
//!
//! Guests do not boot: their firmware is a halt instruction. The peer is `srun` of QEMU
//! itself with the arguments that pavo gave it (guests stay paused by `-S`; TAP devices,
//! sockets and disks, which pavo makes, replaced by nothing) until the last QMP greets.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::world::Site;
use super::{median, row, say};

const ROUNDS: usize = 5;

/// Writes a program or file that all hosts see.
fn put(site: &Site, name: &str, bytes: &[u8]) -> String {
    let path = site.lab.home("alice").parent().unwrap().join("images").join(name);
    fs::write(&path, bytes).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    format!("/home/images/{name}")
}

/// The reset vector is 16 bytes before the end: `cli; hlt; jmp` back to `hlt`.
fn firmware() -> Vec<u8> {
    let mut rom = vec![0xf4; 64 << 10];
    let reset = rom.len() - 16;
    rom[reset..reset + 4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
    rom
}

/// A template whose guests do nothing.
fn template(site: &Site, more: &str) {
    let text = format!("halt:\n  image: tiny\n  resource-set: default\n{more}");
    site.write("templates.yaml", &text);
}

pub fn bench() {
    let site = Site::up(4);
    let rom = put(&site, "halt.rom", &firmware());
    template(&site, &format!("  custom-args: ['-bios', '{rom}']\n"));
    let before = site.snapshot();
    put(&site, "peer", PEER.as_bytes());
    let turns = format!(
        "for i in $(seq {ROUNDS}); do
             a=$EPOCHREALTIME
             b=$(pavo internal launcher -E 'bash now' halt:16) || exit 1
             c=$EPOCHREALTIME
             d=$(/home/images/peer 16) || exit 1
             echo $a $b $c $d
         done"
    );
    fs::write(site.lab.home("alice").join("now"), "echo $EPOCHREALTIME\n").unwrap();
    let words = ["salloc", "-Q", "-N4", "-n16", "-c1", "bash", "-c", &turns];
    let arguments = arguments(&site);
    fs::write(site.lab.home("alice").join("arguments"), arguments).unwrap();
    let output = site.run("alice", &words);
    assert!(output.status.success(), "{output:?}");
    let (mut ours, mut theirs, mut more) = (Vec::new(), Vec::new(), Vec::new());
    for line in output.stdout.lines() {
        let at: Vec<f64> = line.split_whitespace().map(|time| time.parse().unwrap()).collect();
        ours.push(at[1] - at[0]);
        theirs.push(at[3] - at[2]);
        more.push(ours.last().unwrap() - theirs.last().unwrap());
    }
    say(&format!("4 hosts with 4 VMs each, median of {ROUNDS}          pavo       srun  ratio"));
    row("step start to all running (s)", median(&mut ours), median(&mut theirs), "");
    say(&format!("  more than srun of plain QEMU: {:.2} s    0.5 s at most", median(&mut more)));
    site.nothing_left(&before);
}

/// Starts so many QEMUs as one step and prints the time when the last of them has greeted.
const PEER: &str = r#"#!/bin/bash
mapfile -t args <arguments
exec 3< <(exec srun -n "$1" qemu-system-x86_64 "${args[@]}" 2>/dev/null </dev/null & echo $!; wait)
read -r pid <&3
for ((left = $1; left; left--)); do
    while read -r line <&3 && [[ $line != *QMP* ]]; do :; done
done
echo $EPOCHREALTIME
kill -TERM "$pid"
cat <&3 >/dev/null
"#;

/// The arguments of a VM of pavo's, one a line, that work without pavo.
fn arguments(site: &Site) -> String {
    let script = "for p in /proc/[0-9]*; do case $(tr '\\0' ' ' <$p/cmdline 2>/dev/null) in
                  *nodefaults*) tr '\\0' '\\n' <$p/cmdline; break;; esac; done";
    fs::write(site.lab.home("alice").join("look"), format!("#!/bin/sh\n{script}\n")).unwrap();
    let words = [
        "salloc",
        "-Q",
        "-N1",
        "-n1",
        "-c1",
        "pavo",
        "internal",
        "launcher",
        "-E",
        "srun --overlap -n1 sh look",
        "halt:1",
    ];
    let output = site.run("alice", &words);
    assert!(output.status.success() && output.stdout.contains("-S"), "{output:?}");
    let mut arguments = String::new();
    for word in output.stdout.lines().skip(1) {
        let plain = match word {
            word if word.starts_with("socket,id=qmp") => "stdio,id=qmp",
            word if word.starts_with("socket,id=console") => "null,id=console",
            word if word.starts_with("socket,id=agent") => "null,id=agent",
            word if word.contains(r#""node-name":"disk""#) => {
                r#"{"driver":"null-co","node-name":"disk"}"#
            }
            word if word.contains(r#""node-name":"seed""#) => {
                r#"{"driver":"null-co","node-name":"seed","read-only":true}"#
            }
            word if word.contains(r#""type":"tap""#) => {
                r#"{"type":"hubport","id":"net0","hubid":0}"#
            }
            word => word,
        };
        arguments += plain;
        arguments.push('\n');
    }
    arguments
}
