//! The recipe, as scripts for the shell of the new system: the first line of each says, in
//! a comment, what is done.

use base64ct::{Base64, Encoding};

use crate::config::{Content, Recipe, RecipeFile, RecipeUser};
use crate::error::{Context, Error, Result};
use crate::model::agent;

/// What every image needs to start, beside the kernel.
const PACKAGES: &[&str] = &[
    "systemd-sysv",
    "udev",
    "dbus",
    "libpam-systemd",
    "initramfs-tools",
    "kmod",
    "zstd",
    // Grows and checks the root file system.
    "e2fsprogs",
];

/// What leads to the root file system, on any disk that a VM may have. The rest is loaded
/// from there.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_scsi",
    "sd_mod",
    "ahci",
    "ata_piix",
    "ext4",
    // ext4 asks for these in a way that is not seen.
    "crc32c_generic",
    "crc32c_intel",
];

/// The largest file of a recipe, in bytes: larger ones belong in a package.
const MAX_FILE: u64 = 64 << 20;

/// All that is installed.
pub(super) fn packages(recipe: &Recipe) -> impl Iterator<Item = &str> {
    let ours = PACKAGES.iter().copied().chain([recipe.kernel.as_str()]);
    ours.chain(recipe.packages.iter().map(String::as_str))
}

/// Names and texts of the scripts: `early` ones run before packages are installed.
pub(super) fn scripts(recipe: &Recipe, root: &str) -> Result<Vec<(String, String)>> {
    let mut late = vec![boot(recipe, root)];
    if recipe.agent {
        late.push(agent());
    }
    late.extend(recipe.users.iter().map(user));
    for wanted in &recipe.files {
        late.push(file(wanted)?);
    }
    late.extend(recipe.commands.iter().map(|command| self::command(command)));
    let number = |(index, script)| (format!("late-{index:04}"), script);
    let late = late.into_iter().enumerate().map(number);
    Ok([("early-0000".to_owned(), initramfs())].into_iter().chain(late).collect())
}

/// The initramfs is made once, when the kernel is installed: it must know before.
fn initramfs() -> String {
    let modules = MODULES.join("\n");
    format!(
        "# Choosing what the initramfs holds\n\
         mkdir -p /etc/initramfs-tools/conf.d /usr/share/initramfs-tools/modules.d\n\
         cat >/etc/initramfs-tools/conf.d/pavo <<'END'\n\
         MODULES=list\nCOMPRESS=zstd\nFSTYPE=ext4\nRESUME=none\nEND\n\
         cat >/usr/share/initramfs-tools/modules.d/pavo <<'END'\n{modules}\nEND\n"
    )
}

/// How it starts.
fn boot(recipe: &Recipe, root: &str) -> String {
    let arguments = format!("root=UUID={root} rw console=ttyS0,115200 {}", recipe.kernel_args);
    let arguments = arguments.trim();
    format!(
        "# Configuring the boot loader\n\
         for link in vmlinuz initrd.img; do\n\
         \x20 [ -e /$link ] || ln -s \"boot/$(ls /boot | grep \"^$link-\" | sort -V | tail -n 1)\" /$link\n\
         \x20 [ -e /$link ] || {{ echo \"there is no /$link: the kernel is not installed\"; exit 1; }}\n\
         done\n\
         rm -f /vmlinuz.old /initrd.img.old\n\
         mkdir -p /boot/grub\n\
         cat >/boot/grub/grub.cfg <<'END'\n\
         # Nothing writes this file again: it may be changed.\n\
         set arguments='{arguments}'\n\
         serial --unit=0 --speed=115200\n\
         terminal_output serial\n\
         # The older protocol copies less, which is felt where there is no KVM.\n\
         if [ $grub_platform = pc ]; then\n\
         \x20 linux16 /vmlinuz $arguments\n\
         \x20 initrd16 /initrd.img\n\
         else\n\
         \x20 linux /vmlinuz $arguments\n\
         \x20 initrd /initrd.img\n\
         fi\n\
         boot\n\
         END\n\
         echo 'UUID={root} / ext4 defaults,noatime 0 0' >/etc/fstab\n\
         [ -e /etc/hosts ] && grep -q localhost /etc/hosts ||\n\
         \x20 printf '127.0.0.1 localhost\\n::1 localhost ip6-localhost\\n' >/etc/hosts\n"
    )
}

/// An account.
fn user(user: &RecipeUser) -> String {
    let name = &user.name;
    let mut script = format!("# Adding the account {name}\nuseradd --create-home");
    script += &format!(" --shell {}", quoted(user.shell.as_deref().unwrap_or("/bin/bash")));
    if !user.groups.is_empty() {
        script += &format!(" --groups {}", quoted(&user.groups.join(",")));
    }
    if let Some(hash) = &user.password {
        script += &format!(" --password {}", quoted(hash));
    }
    script += &format!(" {name}\n");
    if !user.ssh_keys.is_empty() {
        let keys = quoted(&user.ssh_keys.join("\n"));
        script += &format!(
            "home=$(getent passwd {name} | cut -d: -f6)\n\
             mkdir -m 700 \"$home/.ssh\"\n\
             printf '%s\\n' {keys} >\"$home/.ssh/authorized_keys\"\n\
             chmod 600 \"$home/.ssh/authorized_keys\"\n\
             chown -R {name}: \"$home/.ssh\"\n"
        );
    }
    if user.sudo {
        script += &format!(
            "mkdir -p /etc/sudoers.d\n\
             echo '{name} ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/{name}\n\
             chmod 440 /etc/sudoers.d/{name}\n"
        );
    }
    script
}

/// Our agent, and what starts it.
fn agent() -> String {
    let mut script = String::from("# Adding pavo's agent\n");
    script += &written(agent::PATH, agent::PROGRAM);
    script += &written(agent::UNIT_PATH, agent::UNIT.as_bytes());
    script + &format!("chmod 755 {}\nsystemctl --quiet enable pavo-agent\n", agent::PATH)
}

/// A file. Written from inside, so that no link of the image leads to a file of this machine.
fn file(file: &RecipeFile) -> Result<String> {
    let bytes = match &file.content {
        Content::Text(text) => text.clone().into_bytes(),
        Content::File(path) => {
            let doing = || format!("reading `{}` for `{}`", path.display(), file.path);
            let size = path.metadata().while_doing(doing)?.len();
            if size > MAX_FILE {
                return Err(Error::config(format!("`{}` has {size} bytes", path.display()))
                    .help("a file of a recipe has 64 MiB at most: copy larger ones by a command"));
            }
            std::fs::read(path).while_doing(doing)?
        }
    };
    let path = quoted(&file.path);
    let mut script = format!("# Writing {}\n", file.path) + &written(&file.path, &bytes);
    script += &format!("chmod {:o} {path}\nchown {} {path}\n", file.mode, quoted(&file.owner));
    // After: a change of the owner takes set-user-id away.
    script += &format!("chmod {:o} {path}\n", file.mode);
    Ok(script)
}

/// Writes these bytes.
fn written(path: &str, bytes: &[u8]) -> String {
    let path = quoted(path);
    let mut script = format!("mkdir -p \"$(dirname {path})\"\nbase64 -d >{path} <<'END'\n");
    for line in Base64::encode_string(bytes).as_bytes().chunks(76) {
        script += std::str::from_utf8(line).expect("base64 is ASCII");
        script.push('\n');
    }
    script + "END\n"
}

fn command(command: &str) -> String {
    let first = command.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
    let mut shown: String = first.chars().filter(|letter| !letter.is_control()).take(60).collect();
    if shown.len() < command.trim().len() {
        shown.push('…');
    }
    format!("# Running {shown}\n{command}\n")
}

/// One word of the shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Runs a script here, with `/` before paths replaced by a folder.
    fn run(script: &str) -> String {
        let output = Command::new("sh").args(["-euc", script]).output().unwrap();
        assert!(output.status.success(), "{script}\n{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn every_script_is_one_that_the_shell_takes() {
        let recipe = Recipe {
            users: vec![RecipeUser {
                name: "ada".into(),
                groups: vec!["sudo".into(), "adm".into()],
                ssh_keys: vec!["ssh-ed25519 AAAA it's me".into()],
                password: Some("$6$salt$hash".into()),
                sudo: true,
                ..RecipeUser::default()
            }],
            commands: vec!["echo hi\necho ho".into()],
            ..Recipe::default()
        };
        let scripts = scripts(&recipe, "uuid").unwrap();
        assert_eq!(scripts.len(), 4);
        for (name, script) in &scripts {
            assert!(script.starts_with("# "), "{name}");
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), script).unwrap();
            let checked = Command::new("sh").arg("-n").arg(file.path()).output().unwrap();
            assert!(checked.status.success(), "{script}\n{checked:?}");
        }
        let user = &scripts[2].1;
        assert!(user.contains("--groups 'sudo,adm' --password '$6$salt$hash' ada"), "{user}");
        assert!(user.contains(r"'ssh-ed25519 AAAA it'\''s me'"), "{user}");
        assert!(scripts[3].1.starts_with("# Running echo hi…\n"), "{}", scripts[3].1);
    }

    #[test]
    fn a_file_arrives_byte_by_byte_with_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        let bytes: Vec<u8> = (0..=255).cycle().take(1000).collect();
        std::fs::write(&source, &bytes).unwrap();
        let target = dir.path().join("it's/here");
        let me = run("echo $(id -u):$(id -g)");
        let script = file(&RecipeFile {
            path: target.to_str().unwrap().into(),
            content: Content::File(source),
            mode: 0o4750,
            owner: me.trim().into(),
        });
        run(&script.unwrap());
        assert_eq!(std::fs::read(&target).unwrap(), bytes);
        let mode = std::os::unix::fs::MetadataExt::mode(&target.metadata().unwrap());
        assert_eq!(mode & 0o7777, 0o4750);
    }
}
