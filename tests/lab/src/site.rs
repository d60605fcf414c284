//! What all hosts of a lab share: `/etc`, `/home`, programs, certificates.

use std::fs;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::Command;

use crate::Options;
use crate::error::{Context, Error, Result};
use crate::folder::Folder;
use crate::keeper::USERS;

/// Where things lie on the machine; each is mounted into the hosts.
#[derive(Debug)]
pub(crate) struct Site {
    /// On disk.
    pub dir: PathBuf,
    /// In memory.
    pub memory: PathBuf,
    pub pavo: Option<PathBuf>,
    pub plugin: Option<PathBuf>,
}

impl Site {
    pub fn make(folder: &Folder, options: &Options) -> Result<Self> {
        let absolute = |path: &Option<PathBuf>| match path {
            Some(path) => {
                let found = path.canonicalize();
                found.map(Some).while_doing(|| format!("looking for {}", path.display()))
            }
            None => Ok(None),
        };
        let pavo = absolute(&options.pavo)?;
        let plugin = absolute(&options.plugin)?;
        let site = Self { dir: folder.path.clone(), memory: folder.memory.clone(), pavo, plugin };
        site.copy_etc()?;
        site.add_users()?;
        site.make_munge_key()?;
        site.lay_out_usr()?;
        Ok(site)
    }

    pub fn etc(&self) -> PathBuf {
        self.memory.join("etc")
    }

    pub fn home(&self) -> PathBuf {
        self.dir.join("home")
    }

    /// Lies over the machine's `/usr`.
    pub fn usr(&self) -> PathBuf {
        self.memory.join("usr")
    }

    pub fn certs(&self) -> PathBuf {
        self.memory.join("certs")
    }

    /// The file in which a host finds its neighbours' addresses.
    pub fn write_hosts<'a>(
        &self,
        hosts: impl Iterator<Item = (&'a str, &'a str, Ipv4Addr)>,
    ) -> Result<()> {
        let mut text = "127.0.0.1 localhost\n".to_owned();
        for (name, short, address) in hosts {
            text += &format!("{address} {name} {short}\n");
        }
        Ok(fs::write(self.etc().join("hosts"), text)?)
    }

    /// All of it: single files bound into the hosts would vanish when a package's
    /// installation renames new ones over them.
    fn copy_etc(&self) -> Result<()> {
        let copied = Command::new("cp").arg("-a").arg("/etc").arg(self.etc()).output()?;
        if !self.etc().join("passwd").exists() {
            let why = String::from_utf8_lossy(&copied.stderr).into_owned();
            return Err(Error::new(format!("copying /etc: {why}")));
        }
        for dir in ["slurm", "pavo", "pavo/node"] {
            fs::create_dir_all(self.etc().join(dir))?;
        }
        // The machine's own site is not the lab's.
        for dir in ["slurm", "pavo"] {
            for entry in fs::read_dir(self.etc().join(dir))?.flatten() {
                if entry.file_type()?.is_file() {
                    fs::remove_file(entry.path())?;
                }
            }
        }
        let _ = fs::remove_file(self.etc().join("resolv.conf"));
        fs::write(self.etc().join("resolv.conf"), "# Nobody outside is asked.\n")?;
        let _ = fs::remove_file(self.etc().join("mtab"));
        let _ = fs::remove_file(self.etc().join("hostname"));
        Ok(())
    }

    fn add_users(&self) -> Result<()> {
        for user in USERS {
            let (name, id) = (user.name, user.id);
            let lines = [
                ("passwd", format!("{name}:x:{id}:{id}:{name}:/home/{name}:/bin/bash\n")),
                ("group", format!("{name}:x:{id}:\n")),
                ("shadow", format!("{name}:*:19000:0:99999:7:::\n")),
            ];
            for (file, line) in lines {
                let path = self.etc().join(file);
                let mut file = fs::OpenOptions::new().append(true).open(&path)?;
                file.write_all(line.as_bytes())?;
            }
            self.make_home(name, id)?;
        }
        // What root leaves behind in a test is not left to the machine's.
        self.make_home("root", 0)
    }

    fn make_home(&self, name: &str, id: u32) -> Result<()> {
        let home = self.home().join(name);
        fs::create_dir_all(&home)?;
        fs::set_permissions(&home, fs::Permissions::from_mode(0o700))?;
        Ok(chown(&home, Some(id), Some(id))?)
    }

    fn make_munge_key(&self) -> Result<()> {
        let mut key = [0; 1024];
        fs::File::open("/dev/urandom")?.read_exact(&mut key)?;
        let path = self.etc().join("munge/munge.key");
        let _ = fs::remove_file(&path);
        let doing = || "making the lab's munge key (is munge installed?)".to_owned();
        let owner = fs::metadata(self.etc().join("munge")).while_doing(doing)?;
        fs::write(&path, key)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400))?;
        use std::os::unix::fs::MetadataExt;
        chown(&path, Some(owner.uid()), Some(owner.gid()))?;
        Ok(())
    }

    /// Empty files to mount the programs on: `/usr` itself is not touched.
    fn lay_out_usr(&self) -> Result<()> {
        for dir in ["bin", "lib/pavo"] {
            fs::create_dir_all(self.usr().join(dir))?;
        }
        if self.pavo.is_some() {
            fs::write(self.usr().join("bin/pavo"), "")?;
        }
        if self.plugin.is_some() {
            fs::write(self.usr().join("lib/pavo/spank_pavo.so"), "")?;
        }
        Ok(())
    }
}
