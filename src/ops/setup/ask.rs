//! What Slurm's plugin asks of root on one host: who, which step, which VMs.
//!
//! Lines of `key=value`. Everything in it but `node_list`, `vm` and `sealed` is Slurm's
//! own word; those three are the user's, and are checked or only shown.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::host::journal::LOCK_LIMIT;
use crate::model::cluster::{MAX_VMS, plain_name};
use crate::model::owner::{Manager, Owner};

/// The longest ask, in bytes: ten thousand ranks on one host.
pub const MAX_ASK: usize = 128 << 10;

/// The largest job id whose kernel names fit.
const MAX_JOB: u32 = 99_999_999;

/// One step's wish for VMs on this host, checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    pub job: u32,
    pub step: u32,
    /// How often Slurm has requeued the job.
    pub restart: u32,
    pub uid: u32,
    pub gid: u32,
    /// Slurm's name of this host.
    pub node: String,
    /// This host's place among the step's.
    pub node_id: u32,
    pub nodes: u32,
    /// The step's hosts, as far as is known: for messages only.
    pub node_list: String,
    /// How many VMs the cluster has.
    pub tasks: u32,
    /// The ranks of the VMs on this host, ascending.
    pub ranks: Vec<u32>,
    /// Resource sets and how many VMs of each, in the order of ranks.
    pub sets: Vec<(String, u32)>,
    /// The person's secret, sealed to the site.
    pub sealed: Option<String>,
    /// The process that lives as long as the step on this host.
    pub keeper: u32,
    /// The seconds after which the plugin ends a set-up.
    #[serde(default)]
    pub limit: Option<u32>,
}

impl Ask {
    /// How long to wait for other processes of pavo on this host: at most for half of what
    /// the plugin gives, so that there is time left to say what was waited for.
    pub fn patience(&self) -> Duration {
        let given = self.limit.map(|seconds| Duration::from_secs(seconds.into()) / 2);
        given.map_or(LOCK_LIMIT, |given| given.min(LOCK_LIMIT))
    }

    pub fn owner(&self) -> Owner {
        Owner { manager: Manager::Slurm, job: self.job }
    }

    /// The resource set of a VM.
    pub fn set_of(&self, rank: u32) -> Option<&str> {
        let mut first = 0;
        self.sets.iter().find_map(|(set, count)| {
            first += count;
            (rank < first).then_some(set.as_str())
        })
    }

    /// Reads and checks an ask.
    ///
    /// # Errors
    /// [`Kind::Usage`](crate::error::Kind::Usage): what the user wrote cannot be meant, or
    /// the plugin and this program do not fit.
    pub fn parse(text: &str) -> Result<Self> {
        let fields = Fields::parse(text)?;
        if fields.number("version")? != 1 {
            return Err(Error::usage("the plugin speaks another version of pavo")
                .help("install spank_pavo.so and pavo of the same release on this host"));
        }
        let ask = Self {
            job: fields.number("job")?,
            step: fields.number("step")?,
            restart: fields.optional_number("restart")?,
            uid: fields.number("uid")?,
            gid: fields.number("gid")?,
            node: fields.text("node")?.to_owned(),
            node_id: fields.number("node_id")?,
            nodes: fields.number("nodes")?,
            node_list: fields.get("node_list").unwrap_or_default().to_owned(),
            tasks: fields.number("tasks")?,
            ranks: numbers(fields.text("local_tasks")?)?,
            sets: parse_sets(fields.text("vm")?)?,
            sealed: fields.get("sealed").map(str::to_owned),
            keeper: fields.number("keeper")?,
            limit: fields.get("limit").map(|_| fields.number("limit")).transpose()?,
        };
        ask.check()?;
        Ok(ask)
    }

    fn check(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::usage(what));
        let count: u64 = self.sets.iter().map(|(_, count)| u64::from(*count)).sum();
        if self.uid == 0 {
            return Err(Error::usage("virtual machines do not run as root")
                .help("start the cluster as an ordinary user"));
        }
        if count != u64::from(self.tasks) {
            return Err(Error::usage(format!(
                "`--vm` names {count} VMs, and the step has {} tasks",
                self.tasks
            ))
            .help("one task runs one VM: make both numbers the same (`srun -n`)"));
        }
        if self.job == 0 || self.job > MAX_JOB {
            return wrong(format!("job ids up to {MAX_JOB} can be used, not {}", self.job));
        }
        let node_ok = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if self.node.is_empty() || self.node.len() > 255 || !self.node.bytes().all(node_ok) {
            return wrong(format!("`{}` is not the name of a host", self.node.escape_debug()));
        }
        let ascending = self.ranks.windows(2).all(|pair| pair[0] < pair[1]);
        if self.ranks.is_empty() || !ascending || self.ranks.iter().any(|r| *r >= self.tasks) {
            return wrong("the tasks on this host are not tasks of the step".into());
        }
        if self.nodes == 0 || self.node_id >= self.nodes {
            return wrong(format!("host {} of {} hosts", self.node_id, self.nodes));
        }
        Ok(())
    }
}

/// `SET:COUNT[,SET:COUNT]…`
fn parse_sets(text: &str) -> Result<Vec<(String, u32)>> {
    let wrong = |what: &str| {
        Error::usage(format!("`--vm={}`: {what}", text.escape_debug()))
            .help("write RESOURCESET:COUNT, more of them separated by commas")
    };
    let mut sets = Vec::new();
    for item in text.split(',') {
        let (set, count) = item.rsplit_once(':').ok_or_else(|| wrong("a count is missing"))?;
        let digits = !count.is_empty() && count.bytes().all(|byte| byte.is_ascii_digit());
        let count: u32 = count.parse().ok().filter(|_| digits).ok_or_else(|| wrong("no count"))?;
        if !plain_name(set) {
            return Err(wrong("no name of a resource set"));
        }
        if count == 0 || count > MAX_VMS {
            return Err(wrong("a count is 1 to 10000"));
        }
        sets.push((set.to_owned(), count));
    }
    if sets.len() > MAX_VMS as usize {
        return Err(wrong("too many resource sets"));
    }
    Ok(sets)
}

fn numbers(list: &str) -> Result<Vec<u32>> {
    let number = |text: &str| text.parse().map_err(|_| not_a_number("local_tasks", text));
    list.split(',').map(number).collect()
}

fn not_a_number(key: &str, value: &str) -> Error {
    Error::usage(format!("`{key}={}` is not a number", value.escape_debug()))
}

/// The lines, by key.
struct Fields<'a>(BTreeMap<&'a str, &'a str>);

impl<'a> Fields<'a> {
    fn parse(text: &'a str) -> Result<Self> {
        let split = |line: &'a str| {
            line.split_once('=').ok_or_else(|| {
                Error::usage(format!("`{}` is not `key=value`", line.escape_debug()))
            })
        };
        text.lines().map(split).collect::<Result<_>>().map(Self)
    }

    fn get(&self, key: &str) -> Option<&'a str> {
        self.0.get(key).copied().filter(|value| !value.is_empty())
    }

    fn text(&self, key: &str) -> Result<&'a str> {
        self.get(key).ok_or_else(|| Error::usage(format!("the plugin did not give `{key}`")))
    }

    fn number(&self, key: &str) -> Result<u32> {
        let value = self.text(key)?;
        value.parse().map_err(|_| not_a_number(key, value))
    }

    fn optional_number(&self, key: &str) -> Result<u32> {
        if self.get(key).is_some() { self.number(key) } else { Ok(0) }
    }
}

impl fmt::Display for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}.{}", self.job, self.step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "version=1\njob=42\nstep=0\nuid=2001\ngid=2001\nnode=n2\nnode_id=1\n\
        nodes=2\nnode_list=n[1-2]\ntasks=4\nlocal_tasks=2,3\nvm=eth:3,other:1\nkeeper=77\nnew=1\n";

    #[test]
    fn an_ask_says_which_vms_run_here_and_of_what_they_consist() {
        let ask = Ask::parse(GOOD).unwrap();
        assert_eq!(ask.ranks, [2, 3]);
        assert_eq!(
            (ask.set_of(2), ask.set_of(3), ask.set_of(4)),
            (Some("eth"), Some("other"), None)
        );
        assert_eq!(ask.owner().to_string(), "42");
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_reason() {
        for (from, to, why) in [
            ("version=1", "version=2", "another version"),
            ("uid=2001", "uid=0", "do not run as root"),
            ("vm=eth:3,other:1", "vm=eth:3", "3 VMs, and the step has 4 tasks"),
            ("vm=eth:3,other:1", "vm=../x:4", "no name of a resource set"),
            ("vm=eth:3,other:1", "vm=eth", "a count is missing"),
            ("vm=eth:3,other:1", "vm=eth:+4", "no count"),
            ("vm=eth:3,other:1", "vm=eth:4000000000", "a count is 1 to 10000"),
            ("vm=eth:3,other:1", "vm=", "did not give `vm`"),
            ("local_tasks=2,3", "local_tasks=3,2", "not tasks of the step"),
            ("local_tasks=2,3", "local_tasks=3,4", "not tasks of the step"),
            ("local_tasks=2,3", "local_tasks=x", "is not a number"),
            ("job=42", "job=0", "not 0"),
            ("job=42", "job=100000000", "not 100000000"),
            ("node=n2", "node=../n2", "not the name of a host"),
            ("node_id=1", "node_id=2", "host 2 of 2"),
            ("new=1", "new", "is not `key=value`"),
        ] {
            let text = GOOD.replace(from, to);
            assert_ne!(text, GOOD, "{from}");
            let report = Ask::parse(&text).unwrap_err().report();
            assert!(report.contains(why), "{to}: {report}");
        }
    }
}
