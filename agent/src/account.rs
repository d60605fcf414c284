//! Who commands run as: the guest's own files, read here, since a static program cannot load
//! what the C library would ask; and `getent` where an account is in none of them.

use std::fs;
use std::path::Path;
use std::process::Command;

/// An account of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    /// The other groups it is in.
    pub groups: Vec<u32>,
    pub home: String,
    pub shell: String,
}

impl Account {
    /// The account of this name, or with this number.
    pub fn find(name: &str) -> Option<Self> {
        Self::find_in(Path::new("/etc"), name).or_else(|| Self::ask(name))
    }

    /// Of the user who runs this program.
    pub fn own() -> Self {
        let uid = nix::unistd::geteuid().as_raw();
        Self::find(&uid.to_string()).unwrap_or_else(|| Self {
            name: if uid == 0 { "root".into() } else { uid.to_string() },
            uid,
            gid: nix::unistd::getegid().as_raw(),
            groups: Vec::new(),
            home: if uid == 0 { "/root".into() } else { "/".into() },
            shell: "/bin/sh".into(),
        })
    }

    fn find_in(etc: &Path, name: &str) -> Option<Self> {
        let passwd = fs::read(etc.join("passwd")).ok()?;
        let mut account = String::from_utf8_lossy(&passwd).lines().find_map(|line| {
            let account = Self::parse(line)?;
            (account.name == name || account.uid.to_string() == name).then_some(account)
        })?;
        let group = fs::read(etc.join("group")).unwrap_or_default();
        account.groups = String::from_utf8_lossy(&group)
            .lines()
            .filter_map(|line| {
                let fields: Vec<&str> = line.split(':').collect();
                let [_, _, gid, members] = *fields else { return None };
                members.split(',').any(|member| member == account.name).then(|| gid.parse().ok())?
            })
            .collect();
        Some(account)
    }

    /// A line of `passwd`.
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, shell] = *fields else { return None };
        let or = |text: &str, default: &str| {
            if text.is_empty() { default.to_owned() } else { text.to_owned() }
        };
        Some(Self {
            name: name.into(),
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            groups: Vec::new(),
            home: or(home, "/"),
            shell: or(shell, "/bin/sh"),
        })
    }

    /// Asks the guest's own programs: the account may be in a directory service.
    fn ask(name: &str) -> Option<Self> {
        let said = |program: &str, words: &[&str]| {
            let output = Command::new(program).args(words).output().ok()?;
            let text = String::from_utf8(output.stdout).ok()?;
            output.status.success().then_some(text)
        };
        let mut account = Self::parse(said("getent", &["passwd", "--", name])?.trim_end())?;
        let groups = said("id", &["-G", "--", &account.name]).unwrap_or_default();
        account.groups = groups.split_whitespace().filter_map(|group| group.parse().ok()).collect();
        Some(account)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_found_by_name_and_number_with_their_groups() {
        let etc = std::env::temp_dir().join(format!("pavo-agent-etc-{}", std::process::id()));
        fs::create_dir(&etc).unwrap();
        let passwd = "root:x:0:0:root:/root:/bin/bash\nbroken\nada:x:1000:100::/home/ada:\n";
        fs::write(etc.join("passwd"), passwd).unwrap();
        fs::write(etc.join("group"), "users:x:100:\nwheel:x:10:bob,ada\nx:x:11:adam\n").unwrap();
        let ada = Account::find_in(&etc, "ada").unwrap();
        assert_eq!((ada.uid, ada.gid, &*ada.groups), (1000, 100, &[10][..]));
        assert_eq!((&*ada.home, &*ada.shell), ("/home/ada", "/bin/sh"));
        assert_eq!(Account::find_in(&etc, "1000"), Some(ada));
        assert_eq!(Account::find_in(&etc, "0").unwrap().shell, "/bin/bash");
        assert_eq!(Account::find_in(&etc, "nobody-here"), None);
        fs::remove_dir_all(&etc).unwrap();
    }
}
