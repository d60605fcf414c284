//! The ask: what the plugin tells `pavo internal setup` on its standard input.
//!
//! Lines `key=value`, the first is `version=1`; values hold neither newline nor NUL;
//! unknown keys are ignored. What the job's environment says (`node_list`, `sealed`)
//! is checked for its characters only and must not be trusted.

use std::fmt::{Display, Write};

/// Longest ask; it must fit into a pipe at once.
pub const MAX_LEN: usize = 48 * 1024;

/// The facts of a step on this host.
#[derive(Debug, Default)]
pub struct Facts {
    pub job: u32,
    pub step: u32,
    pub restart: u32,
    /// The array job and this task's index in it.
    pub array: Option<(u32, u32)>,
    pub uid: u32,
    pub gid: u32,
    pub node: String,
    pub node_id: u32,
    pub nodes: u32,
    pub node_list: Option<String>,
    pub tasks: u32,
    /// Global ids of the tasks on this host: the ranks of its VMs.
    pub local_tasks: Vec<u32>,
    pub vm: String,
    pub sealed: Option<String>,
    pub keeper: u32,
    /// Seconds that a set-up may take.
    pub limit: u64,
}

impl Facts {
    /// The text for pavo.
    pub fn ask(&self) -> Result<String, String> {
        let mut text = String::from("version=1\n");
        let mut line = |key: &str, value: &dyn Display| writeln!(text, "{key}={value}").is_ok();
        line("job", &self.job);
        line("step", &self.step);
        line("restart", &self.restart);
        if let Some((job, task)) = self.array {
            line("array", &format_args!("{job}_{task}"));
        }
        line("uid", &self.uid);
        line("gid", &self.gid);
        line("node", &self.node);
        line("node_id", &self.node_id);
        line("nodes", &self.nodes);
        if let Some(list) = &self.node_list {
            line("node_list", list);
        }
        line("tasks", &self.tasks);
        let ranks: Vec<String> = self.local_tasks.iter().map(u32::to_string).collect();
        line("local_tasks", &ranks.join(","));
        line("vm", &self.vm);
        if let Some(sealed) = &self.sealed {
            line("sealed", sealed);
        }
        line("keeper", &self.keeper);
        line("limit", &self.limit);
        if text.len() > MAX_LEN {
            return Err(format!("{} tasks on one host are too many", self.local_tasks.len()));
        }
        Ok(text)
    }
}

/// Slurm's hostlist grammar, as far as its characters go.
pub fn is_host_list(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"[],-._".contains(&b);
    !text.is_empty() && text.bytes().all(allowed)
}

/// A node's name.
pub fn is_node(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    (1..=255).contains(&text.len()) && text.bytes().all(allowed) && !text.starts_with(['.', '-'])
}

/// Longest sealed text, as pavo has it.
pub const MAX_SEALED: usize = 4096;

/// Base64 of at most [`MAX_SEALED`] characters.
pub fn is_sealed(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"+/=-_".contains(&b);
    (1..=MAX_SEALED).contains(&text.len()) && text.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            job: 42,
            step: 1,
            restart: 2,
            array: Some((40, 3)),
            uid: 2001,
            gid: 2001,
            node: "n1".into(),
            node_id: 0,
            nodes: 2,
            node_list: Some("n[1-2]".into()),
            tasks: 4,
            local_tasks: vec![0, 1],
            vm: "eth:4".into(),
            sealed: Some("QUJD".into()),
            keeper: 777,
            limit: 60,
        }
    }

    #[test]
    fn every_fact_is_a_line() {
        let expected = "version=1\njob=42\nstep=1\nrestart=2\narray=40_3\nuid=2001\ngid=2001\n\
            node=n1\nnode_id=0\nnodes=2\nnode_list=n[1-2]\ntasks=4\nlocal_tasks=0,1\nvm=eth:4\n\
            sealed=QUJD\nkeeper=777\nlimit=60\n";
        assert_eq!(facts().ask().unwrap(), expected);
    }

    #[test]
    fn what_is_not_known_has_no_line() {
        let facts = Facts { array: None, node_list: None, sealed: None, ..facts() };
        let ask = facts.ask().unwrap();
        for key in ["array", "node_list", "sealed"] {
            assert!(!ask.contains(key), "{ask}");
        }
    }

    #[test]
    fn an_ask_always_fits_into_the_pipe() {
        let facts = Facts { local_tasks: (0..100_000).collect(), ..facts() };
        assert_eq!(facts.ask().unwrap_err(), "100000 tasks on one host are too many");
    }

    #[test]
    fn what_the_environment_says_cannot_add_a_line() {
        assert!(is_host_list("n[1-3,7],gpu-a.b_c"));
        assert!(is_node("n1.example") && !is_node(".n1") && !is_node("n/1") && !is_node(""));
        assert!(is_sealed("QUJD+/==") && !is_sealed(&"A".repeat(MAX_SEALED + 1)));
        for hostile in ["", "n1\nuid=0", "n1 n2", "n1;rm", "n1\0"] {
            assert!(!is_host_list(hostile) && !is_node(hostile) && !is_sealed(hostile));
        }
    }
}
