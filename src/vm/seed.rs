//! What a guest is told at first boot: a small FAT volume labelled `CIDATA`.
//!
//! Images with cloud-init read its NoCloud files (`meta-data`, `user-data`,
//! `network-config`); the demo image, which has none, reads plain files below
//! `pavo/`. Both say the same.
//!
//! `user-data` is a MIME message of two parts, so that no text is ever glued into
//! another's: the user's own, unchanged, and then ours. Ours comes last and says
//! how it is merged: `no_replace` (a value that the user gave stays) with lists
//! appended. Whatever merge rules the user's part has thus concern that part only.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{Cursor, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use base64ct::{Base64, Encoding};
use fatfs::{Dir, FatType, FileSystem, FormatVolumeOptions, FsOptions};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};
use crate::model::agent;
use crate::model::prefix::Prefix64;
use crate::model::vm::{HostKey, Nic, Seed};

/// The longest user-data, in bytes. cloud-init has no limit of its own; this
/// keeps a slip (an image for a file) from reaching every guest.
pub const MAX_USER_DATA: usize = 1 << 20;

/// The smallest volume, in bytes; files are added to it.
const VOLUME: usize = 256 << 10;

/// Writes the seed of one VM to `path`, 0600, if wished with our agent and what brings it into
/// a guest that has cloud-init. The same seed gives the same bytes.
///
/// # Errors
/// When `path` exists or cannot be written, or the seed holds what a guest
/// cannot be told (see [`check`]).
pub fn write(path: &Path, seed: &Seed, nics: &[Nic], agent: bool) -> Result<()> {
    write_at_least(0, path, seed, nics, agent)
}

/// The same, for a guest that knows a volume of so many bytes.
pub(super) fn write_at_least(
    least: u64,
    path: &Path,
    seed: &Seed,
    nics: &[Nic],
    agent: bool,
) -> Result<()> {
    check(seed)?;
    let files = files(seed, nics, agent)?;
    let volume = volume(&files, &seed.instance_id).while_doing(|| "making the seed".into())?;
    let length = least.max(volume.len() as u64);
    let write = || {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.set_len(length)?;
        // Blocks of zeros stay holes.
        for (index, block) in volume.chunks(4096).enumerate() {
            if block.iter().any(|byte| *byte != 0) {
                file.write_all_at(block, index as u64 * 4096)?;
            }
        }
        Ok::<_, std::io::Error>(())
    };
    write().while_doing(|| format!("writing the seed `{}`", path.display()))
}

/// Checks what a launcher should refuse before it starts anything.
///
/// # Errors
/// When user-data is too long or of no kind that cloud-init knows, or a name or
/// key would not stay on its line.
pub fn check(seed: &Seed) -> Result<()> {
    let names = [Some(&seed.hostname), seed.domain.as_ref()];
    for name in names.into_iter().flatten() {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
        if name.is_empty() || !name.chars().all(plain) {
            return Err(Error::config(format!("`{}` is not a host name", name.escape_debug())));
        }
    }
    let keys = seed.authorized_keys.iter().chain([&seed.instance_id]);
    for line in keys.chain([&seed.host_key.openssh_public]) {
        if line.chars().any(char::is_control) {
            return Err(Error::config(format!("`{}` is not one line", line.escape_debug())));
        }
    }
    match &seed.user_data {
        Some(text) => UserData::of(text).map(drop),
        None => Ok(()),
    }
}

/// What the user's text is, by its first line, as cloud-init decides it.
enum UserData {
    Nothing,
    /// To be a part of this content type.
    Part(&'static str),
    /// A MIME message already, its headers included.
    Message,
}

/// Content types by first characters; longer beginnings come first.
const TYPES: &[(&str, &str)] = &[
    ("#cloud-config-archive", "text/cloud-config-archive"),
    ("#cloud-config-jsonp", "text/cloud-config-jsonp"),
    ("#cloud-config", "text/cloud-config"),
    ("#cloud-boothook", "text/cloud-boothook"),
    ("#include-once", "text/x-include-once-url"),
    ("#include", "text/x-include-url"),
    ("#part-handler", "text/part-handler"),
    ("## template: jinja", "text/jinja2"),
    ("#!", "text/x-shellscript"),
];

impl UserData {
    fn of(text: &str) -> Result<Self> {
        if text.len() > MAX_USER_DATA {
            return Err(Error::config(format!("user-data has {} bytes", text.len()))
                .help(format!("give at most {MAX_USER_DATA}, or `#include` a URL")));
        }
        if text.trim().is_empty() {
            return Ok(Self::Nothing);
        }
        if let Some((_, kind)) = TYPES.iter().find(|(start, _)| text.starts_with(start)) {
            return Ok(Self::Part(kind));
        }
        let first = text.lines().next().unwrap_or_default();
        let header = first.split(':').next().unwrap_or_default().to_ascii_lowercase();
        if ["content-type", "mime-version"].contains(&header.as_str()) {
            return Ok(Self::Message);
        }
        let shown: String = first.chars().take(40).collect();
        Err(Error::config(format!("user-data starts with `{}`", shown.escape_debug()))
            .help("start it with `#cloud-config`, `#!` or another line that cloud-init knows"))
    }
}

/// Path and content of each file of the volume.
fn files(seed: &Seed, nics: &[Nic], agent: bool) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let lines = |lines: &[String]| lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    let mut files = vec![
        ("meta-data", yaml(&meta_data(seed))),
        ("user-data", user_data(seed, agent)?.into_bytes()),
        ("network-config", yaml(&network_config(nics))),
        ("pavo/hostname", format!("{}\n", seed.hostname).into_bytes()),
        ("pavo/authorized_keys", lines(&seed.authorized_keys).into_bytes()),
        ("pavo/dropbear_ed25519_host_key", dropbear_key(&seed.host_key)?),
    ];
    if let Some(domain) = &seed.domain {
        files.push(("pavo/domain", format!("{domain}\n").into_bytes()));
    }
    let addresses6 = nics.iter().filter_map(|nic| {
        let ipv6 = nic.ipv6?;
        Some(format!("{} {}/{}", nic.mac, ipv6.address, Prefix64::BITS))
    });
    let addresses6: Vec<String> = addresses6.collect();
    if !addresses6.is_empty() {
        files.push(("pavo/addresses6", lines(&addresses6).into_bytes()));
    }
    if let Some(script) = seed.user_data.as_ref().filter(|text| text.starts_with("#!")) {
        files.push(("pavo/user-script", script.clone().into_bytes()));
    }
    if agent {
        files.push(("pavo/agent", agent::PROGRAM.to_vec()));
        files.push(("pavo/agent.service", agent::UNIT.as_bytes().to_vec()));
    }
    Ok(files)
}

/// Takes the agent from this volume, and starts it: at each start of the guest, so that it is
/// always that of the pavo that runs the VM.
fn install_agent() -> String {
    let (path, unit) = (agent::PATH, agent::UNIT_PATH);
    format!(
        "from=$(mktemp -d)\n\
         mount -o ro LABEL=CIDATA $from || exit\n\
         mkdir -p $(dirname {path})\n\
         cp $from/pavo/agent {path}.new && chmod 755 {path}.new && mv {path}.new {path}\n\
         if [ -d /run/systemd/system ]; then\n\
         \x20 cp $from/pavo/agent.service {unit}\n\
         \x20 systemctl daemon-reload\n\
         \x20 systemctl --quiet enable pavo-agent\n\
         \x20 systemctl --no-block restart pavo-agent\n\
         else\n\
         \x20 (while :; do {path}; sleep 1; done) </dev/null >/dev/null 2>&1 &\n\
         fi\n\
         umount $from\n\
         rmdir $from\n"
    )
}

/// JSON is YAML, and leaves nothing to quote by hand.
fn yaml(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

fn full_name(seed: &Seed) -> String {
    match &seed.domain {
        Some(domain) => format!("{}.{domain}", seed.hostname),
        None => seed.hostname.clone(),
    }
}

fn meta_data(seed: &Seed) -> Value {
    json!({ "instance-id": seed.instance_id, "local-hostname": full_name(seed) })
}

/// Netplan's format, version 2. Interfaces are known by their MAC, whatever the
/// guest calls them, but cloud-init renders the overrides for systemd-networkd only where it
/// calls them so, too. Where nobody answers DHCP, booting does not wait for them.
fn network_config(nics: &[Nic]) -> Value {
    let interface = |nic: &Nic| {
        let mut settings = json!({
            "match": { "macaddress": nic.mac.to_string() },
            "dhcp4": nic.ipv4.is_some(),
        });
        if let Some(ipv6) = nic.ipv6 {
            // Told here, it needs no client for DHCPv6, and boots need not wait for one. An
            // advertisement would only start such a client, which has the same to say.
            settings["addresses"] = json!([format!("{}/{}", ipv6.address, Prefix64::BITS)]);
            settings["accept-ra"] = false.into();
        }
        if nic.ipv4.is_some() {
            settings["dhcp-identifier"] = "mac".into();
            // systemd-networkd takes no domain of a DHCP server unless it is told to.
            settings["dhcp4-overrides"] = json!({ "use-domains": true });
        } else {
            settings["optional"] = true.into();
            settings["mtu"] = nic.mtu.into();
        }
        settings
    };
    let named = nics.iter().enumerate().map(|(index, nic)| (format!("eth{index}"), interface(nic)));
    json!({ "version": 2, "ethernets": named.collect::<serde_json::Map<_, _>>() })
}

/// Our cloud-config: who may log in, as whom the guest shows itself.
fn cloud_config(seed: &Seed, agent: bool) -> Value {
    let mut config = json!({
        "hostname": seed.hostname,
        "fqdn": full_name(seed),
        // Of the default user; and root's too, unless root is disabled.
        "ssh_authorized_keys": seed.authorized_keys,
        "disable_root": false,
        // Host keys that lie in the image are not this VM's: cloud-init deletes
        // them, and with this one given it makes no others.
        "ssh_deletekeys": true,
        "ssh_keys": {
            "ed25519_private": seed.host_key.openssh_private,
            "ed25519_public": seed.host_key.openssh_public,
        },
    });
    if agent {
        config["bootcmd"] = json!([["sh", "-c", install_agent()]]);
    }
    config
}

/// The MIME message (RFC 2046) that joins the user's part and ours.
fn user_data(seed: &Seed, agent: bool) -> Result<String> {
    let text = seed.user_data.as_deref().unwrap_or_default();
    let theirs = match UserData::of(text)? {
        UserData::Nothing => None,
        UserData::Part(kind) => Some(part(kind, "", text)),
        // Its headers become those of the part.
        UserData::Message => Some(format!("{}\n", text.trim_end_matches('\n'))),
    };
    let merge = "Merge-Type: list(append)+dict(no_replace,recurse_list)+str()\n";
    let config = format!("#cloud-config\n{:#}\n", cloud_config(seed, agent));
    let ours = part("text/cloud-config", merge, &config);
    let parts: Vec<String> = theirs.into_iter().chain([ours]).collect();

    let boundary = boundary(&parts);
    let mut message =
        format!("Content-Type: multipart/mixed; boundary=\"{boundary}\"\nMIME-Version: 1.0\n");
    for part in &parts {
        write!(message, "\n--{boundary}\n{part}").expect("a string takes it");
    }
    Ok(message + &format!("\n--{boundary}--\n"))
}

/// One part, its text in base64: exactly these bytes arrive, in any language.
fn part(content_type: &str, headers: &str, text: &str) -> String {
    let mut part = format!(
        "Content-Type: {content_type}; charset=\"utf-8\"\nMIME-Version: 1.0\n\
         Content-Transfer-Encoding: base64\n{headers}\n"
    );
    let encoded = Base64::encode_string(text.as_bytes());
    for line in encoded.as_bytes().chunks(76) {
        part += std::str::from_utf8(line).expect("base64 is ASCII");
        part.push('\n');
    }
    part
}

/// A line that no part contains: their hash, hashed again until it is so.
fn boundary(parts: &[String]) -> String {
    let mut digest =
        parts.iter().fold(Sha256::new(), |hash, part| hash.chain_update(part)).finalize();
    loop {
        let name: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        let boundary = format!("pavo-{name}");
        if !parts.iter().any(|part| part.contains(&boundary)) {
            return boundary;
        }
        digest = Sha256::digest(digest);
    }
}

/// dropbear's own form of a host key: the name of the algorithm and the 64 bytes
/// of seed and public key, each after its length as a big-endian word.
pub(super) fn dropbear_key(key: &HostKey) -> Result<Vec<u8>> {
    const NAME: &[u8] = b"ssh-ed25519";
    let secret = hex32(&key.seed)?;
    let public = hex32(&key.public)?;
    let mut bytes = (NAME.len() as u32).to_be_bytes().to_vec();
    bytes.extend(NAME);
    bytes.extend(64_u32.to_be_bytes());
    bytes.extend(secret);
    bytes.extend(public);
    Ok(bytes)
}

/// 32 bytes from 64 digits. The text may be secret: it is in no error.
fn hex32(text: &str) -> Result<[u8; 32]> {
    let mut bytes = [0; 32];
    let digits = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !digits {
        return Err(Error::bug("a host key is not 64 hexadecimal digits"));
    }
    for (byte, index) in bytes.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&text[index..index + 2], 16).expect("two digits");
    }
    Ok(bytes)
}

/// A FAT12 volume with these files.
fn volume(files: &[(&str, Vec<u8>)], id: &str) -> std::io::Result<Vec<u8>> {
    let content: usize = files.iter().map(|(_, bytes)| bytes.len().next_multiple_of(4096)).sum();
    let size = (VOLUME + content).next_multiple_of(64 << 10);
    let mut volume = vec![0; size];
    let serial = Sha256::digest(id);
    let options = FormatVolumeOptions::new()
        .fat_type(FatType::Fat12)
        .bytes_per_cluster(2048)
        .max_root_dir_entries(64)
        .total_sectors(u32::try_from(size / 512).expect("a few MiB"))
        .volume_id(u32::from_be_bytes([serial[0], serial[1], serial[2], serial[3]]))
        .volume_label(*b"CIDATA     ");
    fatfs::format_volume(Cursor::new(&mut volume[..]), options)?;
    let system = FileSystem::new(Cursor::new(&mut volume[..]), FsOptions::new())?;
    let root = system.root_dir();
    let pavo = root.create_dir("pavo")?;
    for (path, bytes) in files {
        match path.strip_prefix("pavo/") {
            Some(name) => add(&pavo, name, bytes)?,
            None => add(&root, path, bytes)?,
        }
    }
    drop((pavo, root));
    system.unmount()?;
    Ok(volume)
}

fn add<T: fatfs::ReadWriteSeek>(dir: &Dir<'_, T>, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    dir.create_file(name)?.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::address::Mac;
    use crate::model::vm::NicIpv4;
    use std::collections::BTreeMap;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    fn seed(user_data: Option<&str>) -> Seed {
        Seed {
            instance_id: "pavo-l3-0".into(),
            hostname: "vm0".into(),
            domain: Some("pavo.internal".into()),
            user_data: user_data.map(Into::into),
            authorized_keys: vec!["ssh-ed25519 AAAA1 me".into(), "ssh-ed25519 AAAA2 you".into()],
            host_key: HostKey {
                seed: "01".repeat(32),
                public: "fe".repeat(32),
                openssh_private: "-----BEGIN\nkey\n-----END\n".into(),
                openssh_public: "ssh-ed25519 AAAAhost".into(),
            },
        }
    }

    fn nics() -> Vec<Nic> {
        let nic = |last, ipv4| Nic {
            network: "net".into(),
            tap: "ptl3-0".into(),
            mac: Mac([0x52, 0x54, 0, 0, 0, last]),
            model: "virtio-net".into(),
            queues: 1,
            mtu: 1450,
            ipv4,
            ipv6: None,
            offloads: true,
        };
        let ipv4 = NicIpv4 {
            address: [10, 200, 0, 1].into(),
            subnet: "10.200.0.0/16".parse().unwrap(),
            gateway: [10, 200, 255, 254].into(),
            domain: "pavo.internal".into(),
        };
        vec![nic(0, Some(ipv4)), nic(1, None)]
    }

    /// Writes a seed and reads its files back.
    fn written(seed: &Seed) -> BTreeMap<String, Vec<u8>> {
        written_with(seed, false)
    }

    fn written_with(seed: &Seed, agent: bool) -> BTreeMap<String, Vec<u8>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed");
        write(&path, seed, &nics(), agent).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let volume = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let system = FileSystem::new(volume, FsOptions::new()).unwrap();
        assert_eq!(system.volume_label(), "CIDATA");
        let mut files = BTreeMap::new();
        for (dir, prefix) in
            [(system.root_dir(), ""), (system.root_dir().open_dir("pavo").unwrap(), "pavo/")]
        {
            for entry in dir.iter().map(Result::unwrap).filter(|entry| entry.is_file()) {
                let mut bytes = Vec::new();
                entry.to_file().read_to_end(&mut bytes).unwrap();
                files.insert(format!("{prefix}{}", entry.file_name()), bytes);
            }
        }
        files
    }

    /// Headers and decoded bodies of a message's parts.
    fn parts(message: &[u8]) -> Vec<(String, String)> {
        let text = std::str::from_utf8(message).unwrap();
        let boundary = text.split('"').nth(1).unwrap();
        let (all, end) = text.rsplit_once(&format!("\n--{boundary}--\n")).unwrap();
        assert_eq!(end, "");
        let decode = |part: &str| {
            let (headers, body) = part.split_once("\n\n").unwrap();
            let body = match headers.contains("base64") {
                true => {
                    let body: String = body.split_whitespace().collect();
                    String::from_utf8(Base64::decode_vec(&body).unwrap()).unwrap()
                }
                false => body.to_owned(),
            };
            (headers.to_owned(), body)
        };
        all.split(&format!("\n--{boundary}\n")).skip(1).map(decode).collect()
    }

    fn config_of(part: &(String, String)) -> Value {
        serde_json::from_str(part.1.strip_prefix("#cloud-config\n").unwrap()).unwrap()
    }

    #[test]
    fn cloud_init_and_the_demo_image_are_told_the_same() {
        let files = written(&seed(None));
        let meta: Value = serde_json::from_slice(&files["meta-data"]).unwrap();
        assert_eq!(meta["local-hostname"], "vm0.pavo.internal");
        assert_eq!(files["pavo/hostname"], b"vm0\n");
        assert_eq!(files["pavo/domain"], b"pavo.internal\n");
        assert_eq!(files["pavo/authorized_keys"], b"ssh-ed25519 AAAA1 me\nssh-ed25519 AAAA2 you\n");
        assert!(!files.contains_key("pavo/user-script"));
        let [ours] = parts(&files["user-data"]).try_into().unwrap();
        let config = config_of(&ours);
        assert_eq!(config["ssh_authorized_keys"][1], "ssh-ed25519 AAAA2 you");
        assert_eq!(config["ssh_keys"]["ed25519_public"], "ssh-ed25519 AAAAhost");
        assert_eq!(config["hostname"], "vm0");
    }

    #[test]
    fn an_agent_that_is_injected_comes_as_a_file_and_is_taken_by_a_script_of_the_shell() {
        let files = written_with(&seed(Some("#cloud-config\nbootcmd: [id]\n")), true);
        assert!(files["pavo/agent"] == agent::PROGRAM);
        let unit = std::str::from_utf8(&files["pavo/agent.service"]).unwrap();
        assert!(unit.contains(&format!("ExecStart={}\n", agent::PATH)));
        let [_, ours] = parts(&files["user-data"]).try_into().unwrap();
        assert!(ours.0.contains("list(append)"), "the user's own commands stay");
        let script = config_of(&ours)["bootcmd"][0][2].as_str().unwrap().to_owned();
        let checked = std::process::Command::new("sh").args(["-nc", &script]).output().unwrap();
        assert!(checked.status.success(), "{script}\n{checked:?}");
        // It is small beside what a guest's disk is.
        assert!(!written(&seed(None)).contains_key("pavo/agent"));
    }

    #[test]
    fn interfaces_are_matched_by_mac_and_ask_dhcp_only_where_it_answers() {
        let config: Value =
            serde_json::from_slice(&written(&seed(None))["network-config"]).unwrap();
        let nics = &config["ethernets"];
        assert_eq!(nics["eth0"]["match"]["macaddress"], "52:54:00:00:00:00");
        assert_eq!(nics["eth0"]["dhcp4"], true);
        assert_eq!(nics["eth1"]["dhcp4"], false);
        assert_eq!(nics["eth1"]["mtu"], 1450);
    }

    #[test]
    fn addresses_of_ipv6_are_told_to_whoever_asks_nobody() {
        let mut nics = nics();
        let prefix: Prefix64 = "fd12:3456:789a:1::/64".parse().unwrap();
        let address = prefix.guest(0).unwrap();
        nics[0].ipv6 = Some(crate::model::vm::NicIpv6 { address, prefix });
        let files: BTreeMap<_, _> = files(&seed(None), &nics, false).unwrap().into_iter().collect();
        let config: Value = serde_json::from_slice(&files["network-config"]).unwrap();
        let of = |mac: &str| {
            let mut all = config["ethernets"].as_object().unwrap().values();
            all.find(|nic| nic["match"]["macaddress"] == mac).unwrap()
        };
        let nic = of("52:54:00:00:00:00");
        assert_eq!(nic["addresses"], json!(["fd12:3456:789a:1::1/64"]));
        assert_eq!((&nic["accept-ra"], &nic["dhcp4"]), (&false.into(), &true.into()));
        assert!(of("52:54:00:00:00:01")["addresses"].is_null());
        assert_eq!(files["pavo/addresses6"], b"52:54:00:00:00:00 fd12:3456:789a:1::1/64\n");
        // Without it, nothing is said of it.
        let files = written(&seed(None));
        assert!(!files.contains_key("pavo/addresses6"));
        assert!(!String::from_utf8_lossy(&files["network-config"]).contains("accept-ra"));
    }

    #[test]
    fn the_users_part_arrives_unchanged_and_ours_yields_to_it() {
        let texts = [
            ("#cloud-config\npackages: [gcc]\n# é, --pavo-\n", "text/cloud-config;"),
            ("#!/bin/sh\r\necho hi", "text/x-shellscript;"),
            ("#cloud-boothook\nid\n", "text/cloud-boothook;"),
            ("#include\nhttp://example.org/\n", "text/x-include-url;"),
            ("#include-once\nhttp://example.org/\n", "text/x-include-once-url;"),
            ("#cloud-config-archive\n[]\n", "text/cloud-config-archive;"),
            ("## template: jinja\n#cloud-config\n{}\n", "text/jinja2;"),
        ];
        for (text, kind) in texts {
            let files = written(&seed(Some(text)));
            let [theirs, ours] = parts(&files["user-data"]).try_into().unwrap();
            assert!(theirs.0.starts_with(&format!("Content-Type: {kind}")), "{}", theirs.0);
            assert_eq!(theirs.1, text);
            // In force where ours is merged into theirs: later, and not replacing.
            assert!(ours.0.contains("Merge-Type: list(append)+dict(no_replace,recurse_list)"));
            assert!(!theirs.0.contains("Merge-Type"));
            let script = files.get("pavo/user-script").map(Vec::as_slice);
            assert_eq!(script, text.starts_with("#!").then_some(text.as_bytes()));
        }
    }

    #[test]
    fn a_mime_message_becomes_a_part_with_its_own_headers() {
        let text = "Content-Type: multipart/mixed; boundary=\"b\"\nMIME-Version: 1.0\n\n\
                    --b\nContent-Type: text/x-shellscript\n\n#!/bin/sh\n--b--\n";
        let [theirs, _] = parts(&written(&seed(Some(text)))["user-data"]).try_into().unwrap();
        assert_eq!(format!("{}\n\n{}", theirs.0, theirs.1), text);
    }

    #[test]
    fn what_cloud_init_would_silently_ignore_is_refused() {
        for wrong in ["packages: [gcc]", "\u{feff}#cloud-config\n", " #cloud-config", "hello"] {
            assert!(check(&seed(Some(wrong))).is_err(), "{wrong}");
        }
        assert!(check(&seed(Some(&format!("#!{}", " ".repeat(MAX_USER_DATA))))).is_err());
        for nothing in ["", " \n"] {
            assert_eq!(parts(&written(&seed(Some(nothing)))["user-data"]).len(), 1);
        }
        let mut name = seed(None);
        name.hostname = "vm0\nruncmd: [x]".into();
        assert!(check(&name).is_err());
        let mut key = seed(None);
        key.authorized_keys = vec!["ssh-ed25519 A\nssh-ed25519 B".into()];
        assert!(check(&key).is_err());
    }

    #[test]
    fn the_largest_user_data_fits_and_the_same_seed_gives_the_same_bytes() {
        let text = format!("#!{}", "x".repeat(MAX_USER_DATA - 2));
        assert_eq!(written(&seed(Some(&text)))["pavo/user-script"].len(), MAX_USER_DATA);
        let bytes = || volume(&files(&seed(None), &nics(), false).unwrap(), "id").unwrap();
        assert_eq!(bytes(), bytes());
    }

    #[test]
    fn dropbear_reads_its_own_form() {
        let key = &written(&seed(None))["pavo/dropbear_ed25519_host_key"];
        assert_eq!(key[..15], *b"\0\0\0\x0bssh-ed25519");
        assert_eq!(key[15..19], [0, 0, 0, 64]);
        assert_eq!(key[19..51], [1; 32]);
        assert_eq!(key[51..], [0xfe; 32]);
    }
}
