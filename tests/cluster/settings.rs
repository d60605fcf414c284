//! What templates and the options that change them ask for, as running guests see it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::probe;
use super::world::{NOBODY, World, skip, world};

/// The words after `mark` in what a guest said.
fn after<'s>(said: &'s str, mark: &str) -> &'s str {
    let line = said.lines().find_map(|line| line.strip_prefix(mark));
    line.unwrap_or_else(|| panic!("no `{mark}` in:\n{said}")).trim()
}

/// A cluster that must not start: its error.
fn refused(world: &World, args: &[&str], code: i32) -> String {
    let mut all = vec!["--mem", "128", "-E", "true"];
    all.extend(args);
    let output = world.alloc(&all).finish();
    assert_eq!(output.code, Some(code), "{output}");
    assert!(output.stderr.contains("help: "), "{output}");
    output.stderr
}

#[test]
fn folders_of_the_host_are_mounted_and_read_only_is_held() {
    world(|world| {
        for name in ["home/data-0", "home/kept", "home/more"] {
            fs::write(world.folder(name).join("hello"), format!("of {name}")).unwrap();
        }
        let settings = "  mount-points:
    data: \"%homedir/data-%{vm_rank}\"
    kept: {path: ~/kept, readonly: yes}
";
        let script = "for tag in data kept more,x; do
	mkdir -p /mnt/$tag
	mount -t 9p -o trans=virtio,version=9p2000.L ${tag%,*} /mnt/$tag || echo cannot mount $tag
done
echo data: $(cat /mnt/data/hello)
echo guest >/mnt/data/new
mount -o remount,rw /mnt/kept
echo kept: $(cat /mnt/kept/hello) $(rm /mnt/kept/hello && echo removed) \
	$(echo x >/mnt/kept/new && echo written) $(echo x >/mnt/kept/hello && echo changed)
echo more: $(cat /mnt/more,x/hello)";
        probe::template(world, settings, script);
        let more = format!("more={}", world.path("home/more").display());
        let (alloc, said) = probe::says(world, &["--mount", &more]);
        assert_eq!(after(&said, "data: "), "of home/data-0");
        assert_eq!(after(&said, "kept: "), "of home/kept", "{said}");
        assert_eq!(after(&said, "more: "), "of home/more");
        assert_eq!(fs::read_to_string(world.path("home/kept/hello")).unwrap(), "of home/kept");
        let new = world.path("home/data-0/new");
        assert_eq!(fs::read_to_string(&new).unwrap(), "guest\n");
        if nix::unistd::geteuid().is_root() {
            assert_eq!(fs::metadata(&new).unwrap().uid(), NOBODY, "root of the guest is the user");
        }
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

#[test]
fn a_folder_is_shown_by_virtiofsd_where_that_is_installed() {
    world(|world| {
        fs::write(world.folder("home/shown").join("hello"), "of the host").unwrap();
        let script = "mount -t virtiofs shown /mnt && echo \"shown: $(cat /mnt/hello)\"
echo guest >/mnt/new
mount | grep /mnt";
        let settings = "  mount-points: {shown: {path: ~/shown, type: virtio-fs}}\n";
        probe::template(world, settings, script);
        let found = ["/usr/bin", "/usr/local/bin", "/usr/libexec", "/usr/lib"]
            .iter()
            .any(|folder| fs::exists(format!("{folder}/virtiofsd")).unwrap());
        if !found {
            // Debian 12 has none that an ordinary user can run.
            let error = refused(world, &["probe"], 5);
            assert!(error.contains("carrying out `mount-points` of template `probe`"), "{error}");
            assert!(error.contains("`virtiofsd` is not installed on this host"), "{error}");
            return;
        }
        let (alloc, said) = probe::says(world, &[]);
        assert_eq!(after(&said, "shown: "), "of the host");
        assert_eq!(fs::read_to_string(world.path("home/shown/new")).unwrap(), "guest\n");
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

#[test]
fn what_cannot_be_mounted_is_refused_with_its_place() {
    world(|world| {
        let file = world.write("file", "");
        let text = format!(
            "absent: {{image: tiny, mount-points: {{a: /no/folder}}}}\n\
             file: {{image: tiny,\n  mount-points: {{a: {}}}}}\n\
             relative: {{image: tiny, mount-points: {{a: folder}}}}\n\
             kernel: {{image: tiny, kernel: /no/kernel}}\n\
             fs: {{image: tiny, mount-points: {{a: {{path: /tmp, type: virtio-fs, readonly: yes}}}}}}\n",
            file.display()
        );
        world.write("conf/templates.yaml", &text);
        let error = refused(world, &["absent"], 3);
        assert!(error.contains("sharing the folder `/no/folder`"), "{error}");
        let error = refused(world, &["file"], 3);
        assert!(error.contains("templates.yaml:3)\n"), "{error}");
        assert!(error.contains("it is no folder"), "{error}");
        let error = refused(world, &["kernel"], 3);
        assert!(error.contains("opening the kernel `/no/kernel`"), "{error}");
        assert!(refused(world, &["relative"], 3).contains("`folder` is no absolute path"));
        assert!(refused(world, &["fs"], 3).contains("`mount-points` ("));
        assert!(refused(world, &["tiny", "--mount", "a"], 2).contains("names no folder"));
        // What the user may not read is not shown to the guest.
        if nix::unistd::geteuid().is_root() {
            let secret = world.path("secret");
            fs::create_dir(&secret).unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
            fs::set_permissions(&secret, mode).unwrap();
            let option = format!("a={}", secret.display());
            let error = refused(world, &["--mount", &option, "tiny"], 3);
            assert!(error.contains("`mount-points` (--mount)"), "{error}");
            assert!(error.contains("name a folder that you can read"), "{error}");
        }
    });
}

#[test]
fn options_change_image_and_user_data_for_one_cluster() {
    world(|world| {
        world.write("home/script", "#!/bin/sh\necho it is $(hostname)\n");
        world.template("other", "instance-id: mine");
        let text = fs::read_to_string(world.path("conf/templates.yaml")).unwrap();
        let text = text.replace("image: tiny", "image: absent");
        world.write("conf/templates.yaml", &text);
        let error = refused(world, &["other", "--image", "nobody=tiny"], 2);
        assert!(error.contains("template `nobody` is not part of the cluster definition"));
        assert!(refused(world, &["other"], 4).contains("absent not found"));
        let args = ["--user-data", "script", "--image", "other=user:tiny", "other:1"];
        let alloc = world.alloc(&[&["--mem", "128", "-E", "sleep 600"], &args[..]].concat());
        alloc.wait_for("vm0 runs\n");
        let log = || world.pavo(&["console", "-l", "vm0"]).stdout;
        world.until("the script has run", || log().contains("it is vm0"));
        let seed = fs::read(world.job_dir().join("vm0/seed.img")).unwrap();
        assert!(holds(&seed, "instance-id: mine") || holds(&seed, "\"mine\""));
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

fn holds(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

#[test]
fn a_persistent_drive_keeps_what_the_guest_wrote_and_is_one_clusters() {
    world(|world| {
        let raw = world.write("home/disk.raw", &"x".repeat(1 << 20));
        let qcow2 = world.path("home/more.qcow2");
        let mut make = world.command("qemu-img");
        make.args(["create", "-q", "-f", "qcow2"]).arg(&qcow2).arg("1M");
        assert_eq!(world.run(make).code, Some(0));
        let settings = "  persistent-drives:
    - ~/disk.raw
    - \"%homedir/more.qcow2\": {cache: writethrough}
    - ~/free.raw: {mmp: no}
";
        // It is in the guest's memory only, until somebody asks for its end.
        let script = "echo \"drives: $(cat /sys/block/vd[abc]/serial)\"
echo \"before: $(head -c 8 /dev/vdb)\"
echo written >/dev/vda
echo written >/dev/vdb";
        probe::template(world, settings, script);
        let error = refused(world, &["probe"], 5);
        assert!(error.contains("make it: `qemu-img create -f raw '"), "{error}");
        world.write("home/free.raw", &"x".repeat(1 << 20));
        let (alloc, said) = probe::says(world, &[]);
        assert_eq!(after(&said, "drives: "), "drive1drive2drive3");
        drives_are_taken(world);
        world.ok(&["cancel"]);
        // One that is pushed has not written.
        let output = alloc.finish();
        assert!(output.stderr.contains("may shut down first, for 30 s at most\n"), "{output}");
        assert!(fs::read_to_string(raw).unwrap().starts_with("written\nxx"));
        world.nothing_is_left();
        let (alloc, said) = probe::says(world, &[]);
        assert_eq!(after(&said, "before: "), "written");
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

/// A second cluster does not get the drives, whoever's it is.
fn drives_are_taken(world: &World) {
    let args = ["--mem", "128", "-E", "true", "probe"];
    let second = world.alloc(&args).finish();
    assert_eq!(second.code, Some(5), "{second}");
    let raw = world.path("home/disk.raw");
    let taking = format!("error: taking the persistent drive `{}`\n", raw.display());
    assert!(second.stderr.contains(&taking), "{second}");
    assert!(second.stderr.contains("in use by job 1 of "), "{second}");
    let mut command = world.pavo_command(&["alloc"]);
    command.args(args).env("PAVO_STATE_DIR", world.folder("home/other-state"));
    let foreign = world.run(command);
    assert_eq!(foreign.code, Some(5), "{foreign}");
    assert!(foreign.stderr.contains("by somebody else's cluster on this machine"), "{foreign}");
}

#[test]
fn drives_that_would_not_be_whole_are_refused() {
    world(|world| {
        world.write("home/a.qcow2", "no qcow2");
        world.write("home/b.raw", "QFI\u{fb}");
        fs::write(world.path("home/b.raw"), b"QFI\xfb and more").unwrap();
        world.write(
            "conf/templates.yaml",
            "none: {image: tiny, persistent-drives: [~/a.qcow2]}\n\
             image: {image: tiny, persistent-drives: [~/b.raw]}\n\
             both: {image: tiny, persistent-drives: [/data/x]}\n",
        );
        assert!(refused(world, &["none"], 3).contains("it is qcow2 by its name, and is none"));
        assert!(refused(world, &["image"], 3).contains("it is raw by its name, and has begun as"));
        let error = refused(world, &["both:2"], 3);
        assert!(error.contains("both vm0 and vm1 would write to `/data/x`"), "{error}");
        assert!(error.contains("templates.yaml:3)"), "{error}");
    });
}

/// The threads of a process and where each may run.
fn threads(pid: i32) -> Vec<String> {
    let tasks = fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task")).unwrap();
    let allowed = |task: std::io::Result<fs::DirEntry>| {
        let status = fs::read_to_string(task.ok()?.path().join("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        Some(line.trim().to_owned())
    };
    tasks.filter_map(allowed).collect()
}

#[test]
fn the_guests_cpus_are_bound_and_the_emulator_has_its_own() {
    world(|world| {
        if std::thread::available_parallelism().unwrap().get() < 2 {
            return skip("one CPU leaves nothing to choose");
        }
        world.template("bound", "bind-vcpus: yes\n  emulator-cores: 1");
        let error = refused(world, &["bound"], 3);
        assert!(error.contains("templates.yaml:4) leaves nothing of 1 core"), "{error}");
        let error = refused(world, &["bound:9", "-c", "100"], 3);
        assert!(error.contains("needs the CPUs"), "{error}");
        let alloc = world.idle(&["bound:1", "-c", "2"]);
        let qemu = world.process("qemu-system").unwrap();
        assert!(qemu.command.contains("cpus=1,"), "{}", qemu.command);
        let mut allowed = threads(qemu.pid);
        allowed.sort();
        let all = allowed.clone();
        allowed.dedup();
        assert!(
            allowed.len() == 2 && allowed.iter().all(|list| !list.contains(['-', ','])),
            "{all:?}"
        );
        let alone = |list: &&String| all.iter().filter(|it| it == list).count() == 1;
        assert_eq!(allowed.iter().filter(alone).count(), 1, "one CPU of the guest: {all:?}");
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

#[test]
fn a_full_node_is_all_cpus_of_the_machine() {
    world(|world| {
        world.template("full", "full-node: yes");
        let alloc = world.idle(&["full:1"]);
        let qemu = world.process("qemu-system").unwrap();
        let online = fs::read_to_string("/proc/cpuinfo").unwrap().matches("processor\t").count();
        assert!(qemu.command.contains(&format!("cpus={online},")), "{}", qemu.command);
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

const LOOK: &str = r#"echo "cpu: $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"
echo "pci: $(cat /sys/bus/pci/devices/*/device | tr "\n" " ")"
echo "disks: $(ls /sys/block | tr "\n" " ")"
echo "efi: $(ls -d /sys/firmware/efi)"
echo "tpm: $(cat /sys/class/tpm/tpm0/tpm_version_major)"
echo "options: $(cat /proc/cmdline)""#;

#[test]
fn interfaces_have_the_queues_of_template_or_resource_set() {
    world(|world| {
        world.write(
            "conf/templates.yaml",
            "wide:\n  image: tiny\n  nic-queues: 2\nset:\n  image: tiny\n  \
            resource-set: wide\nold:\n  inherits: wide\n  nic-model: e1000\n",
        );
        world.write(
            "site/resources.yaml",
            "default: {networks: [nat], default: yes}\n\
            wide: {networks: [nat], nic-queues: 2}\n",
        );
        let error = refused(world, &["old"], 3);
        assert!(error.contains("`nic-queues`") && error.contains("virtio-net only"), "{error}");
        let words = ["-c", "2", "--mem", "128", "--wait", "ssh", "-E", "sleep 600", "wide,set"];
        let alloc = world.alloc(&words);
        alloc.wait_for("vm[0-1] answer ssh\n");
        for vm in ["vm0", "vm1"] {
            let queues = world.ok(&["ssh", vm, "ls /sys/class/net/eth0/queues"]);
            let queues: Vec<&str> = queues.split_whitespace().collect();
            assert_eq!(queues, ["rx-0", "rx-1", "tx-0", "tx-1"], "{vm}");
        }
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

#[test]
fn the_guest_has_the_hardware_that_its_template_names() {
    world(|world| {
        let qemu = world.write("home/qemu", "#!/bin/sh\n>$0.ran\nexec qemu-system-x86_64 \"$@\"\n");
        fs::set_permissions(&qemu, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let settings = "  image: tiny
  machine-type: pc
  cpu-model: qemu64
  disk-model: virtio-scsi
  disk-cache: writeback
  nic-model: e1000
  iothreads: 1
  qemu-bin: \"%homedir/qemu\"
";
        probe::template(world, settings, LOOK);
        let (alloc, said) = probe::says(world, &[]);
        assert!(after(&said, "cpu: ").starts_with("QEMU Virtual CPU"), "{said}");
        let pci = after(&said, "pci: ");
        for (id, what) in [("0x1237", "the chipset of `pc`"), ("0x100e", "e1000")] {
            assert!(pci.contains(id), "{what}: {said}");
        }
        assert!(after(&said, "disks: ").contains("sda"), "{said}");
        assert_eq!(after(&said, "options: "), "console=ttyS0 root=/dev/vda1");
        assert_eq!(after(&said, "efi: "), "", "it has a BIOS: {said}");
        assert!(fs::exists(world.path("home/qemu.ran")).unwrap());
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

#[test]
fn a_guest_starts_by_uefi_and_has_a_tpm() {
    world(|world| {
        for (file, package) in
            [("/usr/share/OVMF/OVMF_CODE_4M.fd", "ovmf"), ("/usr/bin/swtpm", "swtpm")]
        {
            if !Path::new(file).exists() {
                return skip(&format!("needs the package {package}"));
            }
        }
        let settings = "  image: tiny\n  firmware: uefi\n  tpm: yes\n  iothreads: 2\n";
        probe::template(world, settings, LOOK);
        let (alloc, said) = probe::says(world, &[]);
        assert_eq!(after(&said, "efi: "), "/sys/firmware/efi", "{said}");
        assert_eq!(after(&said, "tpm: "), "2", "{said}");
        let threads = world.ok(&["monitor-cmd", "vm0", "info", "iothreads"]);
        assert!(threads.contains("io0:") && threads.contains("io1:"), "{threads}");
        assert!(world.process("swtpm").is_some());
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

#[test]
fn huge_pages_are_the_hosts_to_give() {
    world(|world| {
        let pages = "/sys/kernel/mm/hugepages/hugepages-2048kB/";
        let number = |file: &str| -> u64 {
            let text = fs::read_to_string(Path::new(pages).join(file)).unwrap_or_default();
            text.trim().parse().unwrap_or(0)
        };
        world.template("huge", "huge-pages: yes");
        if number("free_hugepages") + number("nr_overcommit_hugepages") < 64 {
            let error = refused(world, &["huge"], 5);
            assert!(error.contains("`huge-pages` of template `huge` ("), "{error}");
            assert!(error.contains("needs 64 huge pages of 2 MiB"), "{error}");
            assert!(error.contains("sysctl vm.nr_hugepages=64"), "{error}");
        } else {
            world.ok(&["alloc", "--mem", "128", "-E", "true", "huge"]);
        }
    });
}

#[test]
fn a_sensitive_vm_is_closed_or_not_at_all() {
    world(|world| {
        world.write(
            "conf/templates.yaml",
            "closed: {image: tiny, sensitive: yes}\n\
             open: {image: tiny, sensitive: yes, custom-args: [-no-reboot]}\n",
        );
        let error = refused(world, &["open"], 3);
        assert!(error.contains("templates.yaml:2) opens the VM to its host"), "{error}");
        let error = refused(world, &["--mount", "a=/tmp", "closed"], 3);
        assert!(error.contains("`mount-points` (--mount) opens the VM to its host"), "{error}");
        let output = world.alloc(&["--mem", "128", "-E", "true", "closed"]).finish();
        if output.stderr.contains("VMs are emulated") {
            assert_eq!(output.code, Some(5), "{output}");
            assert!(output.stderr.contains("is for KVM only"), "{output}");
            assert!(!output.stderr.contains("Granted"), "{output}");
        } else {
            assert_eq!(output.code, Some(0), "{output}");
        }
    });
}
