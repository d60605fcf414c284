//! One case of the sweep: a moment, what happens at it, where.

use std::fs;

use pavo::host::crash;
use pavo_lab::{Host, Output};

use super::super::world::Site;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Switch {
    Linux,
    Ovs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Kill,
    Fail,
    Stop,
}

/// Whose moment it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    Launcher,
    Task,
    Root,
}

#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub switch: Switch,
    pub point: &'static str,
    pub action: Action,
    /// The host that is armed.
    pub host: &'static str,
}

impl Case {
    /// Every case, in the order in which a cluster comes by its moment. What is the same with
    /// each switch happens with one of them.
    pub fn all() -> Vec<Self> {
        let ovs = crash::ovs_points().into_iter().filter(|point| crash::is_of_the_switch(point));
        let linux = crash::linux_points().into_iter().map(|point| (Switch::Linux, point));
        let mut cases = Vec::new();
        for (at, (switch, point)) in linux.chain(ovs.map(|p| (Switch::Ovs, p))).enumerate() {
            for (turn, action) in [Action::Kill, Action::Fail, Action::Stop].into_iter().enumerate()
            {
                // What only the job's first host does.
                let first = ["setup.introduced", "fabric.keys"].contains(&point);
                let host = if first || (at + turn) % 2 == 0 { "n1" } else { "n2" };
                cases.push(Self { switch, point, action, host });
            }
        }
        cases
    }

    /// `linux:apply.taps=kill`
    pub fn name(&self) -> String {
        format!("{:?}:{}={:?}", self.switch, self.point, self.action).to_lowercase()
    }

    pub fn whose(&self) -> Whose {
        match self.point.split_once('.').map(|(group, _)| group) {
            Some("launch") => Whose::Launcher,
            Some("task") => Whose::Task,
            _ => Whose::Root,
        }
    }

    /// Whether it comes only when a cluster ends.
    pub fn at_the_end(&self) -> bool {
        let ends = ["delete.", "release.", "leave.", "undo.", "undone.", "journal.und"];
        let late = [
            "launch.end",
            "launch.stopped",
            "launch.removed",
            "task.end",
            "guard.end",
            "ovs.removed",
        ];
        ends.iter().any(|end| self.point.starts_with(end)) || late.contains(&self.point)
    }

    pub fn arm(&self, site: &Site) {
        let owner = if self.whose() == Whose::Root { "root" } else { "alice" };
        let action = format!("{:?}", self.action).to_lowercase();
        let (file, point) = (crash::CRASH_AT, self.point);
        // One that only comes after another failure.
        let before = if point == "setup.failed" { "setup.planned fail\\n" } else { "" };
        let script = format!(
            "mkdir -p /run/pavo; printf '{before}{point} {action}\\n' >{file}.new; \
             chmod 600 {file}.new; chown {owner} {file}.new; mv {file}.new {file}"
        );
        for host in self.places(site) {
            host.sh(&script).unwrap();
        }
    }

    pub fn has_come(&self, site: &Site) -> bool {
        let file = crash::CRASH_AT.trim_start_matches('/');
        let come = |host: &&Host| {
            let text = fs::read_to_string(host.root().unwrap().join(file)).unwrap_or_default();
            text.is_empty()
        };
        self.places(site).iter().any(come)
    }

    /// Whether the moment has come. Afterwards it cannot any more.
    pub fn disarm(&self, site: &Site) -> bool {
        let file = crash::CRASH_AT;
        let script = format!("test -s {file} && echo armed; rm -f {file}");
        let come = |host: &&Host| host.sh(&script).unwrap().is_empty();
        // All are disarmed.
        self.places(site).iter().filter(|host| come(host)).count() > 0
    }

    /// The hosts that are armed.
    pub fn places<'a>(&self, site: &'a Site) -> Vec<&'a Host> {
        match self.whose() {
            Whose::Launcher => vec![site.lab.login()],
            // The last one that leaves does it, whichever that is.
            _ if self.point == "leave.freed" => site.lab.computes().collect(),
            _ => vec![site.lab.host(self.host)],
        }
    }

    /// What is wrong with what the user has seen.
    pub fn judge(&self, site: &Site, output: &Output) -> Vec<String> {
        let mut wrong = Vec::new();
        let launcher = self.whose() == Whose::Launcher;
        // The cluster has done its work, or does it all the same.
        let goes_on = match self.whose() {
            Whose::Launcher => self.action == Action::Stop,
            _ => self.at_the_end() || self.point == "guard.told",
        };
        let killed = launcher && self.action == Action::Kill;
        let as_expected = match killed {
            true => output.status.code() == Some(137),
            false => goes_on == output.status.success(),
        };
        if !as_expected {
            wrong.push(format!("the exit code: {}", output.status));
        }
        // Once, by who outlives it.
        if killed && output.stderr.matches("was killed (signal: 9 (SIGKILL))").count() != 1 {
            wrong.push("that the launcher was killed is not there, or more than once".into());
        }
        if goes_on || killed {
            return wrong;
        }
        if !launcher && !output.stderr.contains(site.lab.host(self.host).name()) {
            wrong.push("the host's name is missing".into());
        }
        let why = format!("made to fail at `{}`", self.point);
        // Once: hosts that break off because of this one have nothing to add.
        if self.action == Action::Fail && output.stderr.matches(&why).count() != 1 {
            wrong.push("the reason is not there, or more than once".into());
        }
        wrong
    }
}

/// What the user has read, in one line.
pub fn read(site: &Site, output: &Output) -> String {
    let ours = |line: &&str| {
        let passing = ["salloc: ", "Configuring hosts...", "Terminating", "Waiting for ", "vm[0-"];
        !passing.iter().any(|other| line.starts_with(other))
    };
    let said: Vec<_> = output.stderr.lines().filter(ours).map(str::trim).collect();
    let said = said.join(" / ").replace(site.lab.prefix(), "");
    match output.status.code() {
        Some(0) => format!("0 {said}"),
        Some(code) => format!("{code} {said}"),
        None => format!("{} {said}", output.status),
    }
}
