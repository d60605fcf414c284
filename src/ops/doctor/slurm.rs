//! Slurm, its plugin, and munge.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::{Outcome, Patient, elf, ok, run, warn};
use crate::error::{Context, Error};

/// Commands that pavo runs.
const COMMANDS: [&str; 5] = ["salloc", "sbatch", "srun", "squeue", "scancel"];

/// A clock that is off by more is worth a word. Slurm's credentials of jobs expire at 120 s
/// (`cred_expire`), munge refuses everything at 300 s.
const SKEW: u64 = 5;
const EXPIRED: u64 = 120;
const SET_CLOCKS: &str = "let chrony or ntpd set the clocks of all hosts: `chronyc makestep`";

pub(super) fn checks<'a>(_: &'a Patient) -> Vec<(&'static str, BoxFuture<'a, Outcome>)> {
    vec![
        ("slurm", commands().boxed()),
        ("slurmctld", controller().boxed()),
        ("plugin", loaded().boxed()),
        ("plugstack", plugstack().boxed()),
        ("clock", clock().boxed()),
        ("munge", munge().boxed()),
    ]
}

/// As `22.05.8`.
async fn version() -> Result<String, Error> {
    let text = run("srun", &["--version"], b"").await;
    let text = text.map_err(|error| {
        error.help("install Slurm's commands (package slurm-client), or add them to PATH")
    })?;
    // `slurm 22.05.8`, or as a distribution calls it.
    Ok(text.split_whitespace().last().unwrap_or_default().to_owned())
}

async fn commands() -> Outcome {
    let version = version().await?;
    for command in COMMANDS {
        run(command, &["--version"], b"").await?;
    }
    ok(format!("commands of version {version}"))
}

async fn controller() -> Outcome {
    let text = run("scontrol", &["ping"], b"").await.map_err(|error| {
        error.help(
            "start slurmctld on its host: `systemctl start slurmctld`; if it runs, see `clock`",
        )
    })?;
    ok(text.trim().lines().next().unwrap_or_default().to_owned())
}

/// Whether srun knows `--vm`.
async fn loaded() -> Outcome {
    if run("srun", &["--help"], b"").await?.contains("--vm") {
        return ok("srun knows `--vm`");
    }
    Err(Error::system("srun does not know `--vm`: Slurm has not loaded the plugin")
        .help("see `plugstack` below; `srun -vv --help` says more"))
}

/// The line of the plugin, and whether that was built for this Slurm.
async fn plugstack() -> Outcome {
    let text = run("scontrol", &["show", "config"], b"").await.unwrap_or_default();
    let value = |key: &str| {
        let lines = text.lines().filter_map(|line| line.split_once('='));
        let mut found = lines.filter(|(name, _)| name.trim() == key);
        found.next().map(|(_, value)| value.trim().to_owned())
    };
    let conf = value("PlugStackConfig").unwrap_or_else(|| "/etc/slurm/plugstack.conf".into());
    let mut lines = Vec::new();
    read(Path::new(&conf), 0, &mut lines);
    let plugin = lines.iter().find_map(|line| {
        let path = line.split_whitespace().nth(1)?;
        path.ends_with("spank_pavo.so").then(|| path.to_owned())
    });
    let Some(plugin) = plugin else {
        return Err(Error::config(format!("`{conf}` has no line for spank_pavo.so")).help(format!(
            "add to it on all hosts: `required /usr/lib/pavo/spank_pavo.so` (package pavo-slurm); \
             lines read: {}",
            lines.len()
        )));
    };
    // Without a slash it is in Slurm's own folder.
    let dirs = value("PluginDir").unwrap_or_default();
    let places: Vec<PathBuf> = dirs.split(':').map(|dir| Path::new(dir).join(&plugin)).collect();
    let file = places.iter().find(|path| path.exists()).cloned().unwrap_or(plugin.into());
    let built_for = built_for(&file)?;
    let version = version().await?;
    compare(&file, built_for, &version)
}

/// Reads plugstack.conf and what it includes.
fn read(file: &Path, depth: u32, lines: &mut Vec<String>) {
    let text = fs::read_to_string(file).unwrap_or_default();
    for line in text.lines().map(|line| line.split('#').next().unwrap_or_default().trim()) {
        match line.split_once(char::is_whitespace) {
            Some(("include", pattern)) if depth < 8 => {
                let base = file.parent().unwrap_or(Path::new("/"));
                for path in matching(&base.join(pattern.trim())) {
                    read(&path, depth + 1, lines);
                }
            }
            // Files that include each other have an end.
            Some(("include", _)) | None => {}
            Some(_) => lines.push(line.to_owned()),
        }
    }
}

/// Files of a name in which one `*` may stand for anything.
fn matching(pattern: &Path) -> Vec<PathBuf> {
    let (Some(dir), Some(name)) = (pattern.parent(), pattern.file_name()) else {
        return Vec::new();
    };
    let name = name.to_string_lossy();
    let Some((start, end)) = name.split_once('*') else { return vec![pattern.to_owned()] };
    let fits = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
    };
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(fits).collect();
    found.sort();
    found
}

fn built_for(plugin: &Path) -> Result<u32, Error> {
    let name = plugin.display();
    let bytes = fs::read(plugin).while_doing(|| format!("reading `{name}`"));
    let bytes = bytes.map_err(|error| error.help("install pavo-slurm on this host"))?;
    elf::exported_u32(&bytes, "plugin_version")
        .ok_or_else(|| Error::system(format!("`{name}` is no plugin of Slurm")))
}

/// Slurm loads a plugin whose first two numbers are its own.
fn compare(plugin: &Path, built_for: u32, version: &str) -> Outcome {
    let [_, major, minor, _] = built_for.to_be_bytes();
    let built_for = format!("{major:02}.{minor:02}");
    let name = plugin.display();
    if version.starts_with(&format!("{built_for}.")) {
        return ok(format!("{name}, for Slurm {built_for}"));
    }
    Err(Error::system(format!("{name} is for Slurm {built_for}, and here is {version}"))
        .help(format!("install the pavo-slurm that was built for Slurm {version}")))
}

/// This host's clock, against the controller's.
async fn clock() -> Outcome {
    let text = run("sdiag", &[], b"").await.map_err(refused)?;
    // `sdiag output at Sat Nov 21 12:00:00 2026 (1795262400)`
    let line = text.lines().find(|line| line.contains("output at")).unwrap_or_default();
    let there = line.rsplit_once('(').and_then(|(_, rest)| rest.split(')').next()?.parse().ok());
    let Some(there): Option<u64> = there else {
        return warn("sdiag does not say what time it is", "compare `date` on all hosts");
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let skew = now.as_secs().abs_diff(there);
    match skew {
        0..=SKEW => ok(format!("{skew} s from slurmctld's")),
        _ if skew < EXPIRED => warn(format!("{skew} s from slurmctld's"), SET_CLOCKS),
        _ => Err(Error::system(format!("{skew} s from slurmctld's: Slurm refuses its jobs"))
            .help(SET_CLOCKS)),
    }
}

/// slurmctld hangs up on whom munge does not believe there: it is up, and its clock unknown.
fn refused(error: Error) -> Error {
    if !error.report().contains("Zero Bytes were transmitted") {
        return error;
    }
    error.help(format!(
        "slurmctld refuses this host if their clocks differ by 5 minutes: compare `date`\n  \
         help: {SET_CLOCKS}\n  help: or if /etc/munge/munge.key is not the same on both"
    ))
}

async fn munge() -> Outcome {
    let help = "start it: `systemctl start munge`; /etc/munge/munge.key is the same on all hosts";
    let credential = run("munge", &["-n"], b"").await.map_err(|error| error.help(help))?;
    let said =
        run("unmunge", &[], credential.as_bytes()).await.map_err(|error| error.help(help))?;
    let status = said.lines().find_map(|line| line.strip_prefix("STATUS:")).unwrap_or(&said);
    ok(status.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plugstack_is_read_with_what_it_includes() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        fs::create_dir(dir.path().join("conf.d")).unwrap();
        write("plugstack.conf", "# no\noptional other.so\ninclude conf.d/*.conf\n");
        write("conf.d/pavo.conf", "required /usr/lib/pavo/spank_pavo.so limit=9 # yes\n");
        write("conf.d/pavo.conf.old", "required old.so\n");
        write("conf.d/loop.conf", "include loop.conf\n");
        let mut lines = Vec::new();
        read(&dir.path().join("plugstack.conf"), 0, &mut lines);
        assert_eq!(lines, ["optional other.so", "required /usr/lib/pavo/spank_pavo.so limit=9"]);
    }

    #[test]
    fn a_plugin_is_for_one_release() {
        let plugin = Path::new("/x.so");
        assert!(compare(plugin, 0x160508, "22.05.11").is_ok());
        for version in ["22.05", "23.02.1", "2.2.05", ""] {
            let error = compare(plugin, 0x160508, version).err().unwrap().report();
            assert!(error.contains("for Slurm 22.05, and here is"), "{error}");
        }
    }
}
