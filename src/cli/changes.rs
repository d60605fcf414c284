//! Options that change templates for one cluster: `--mount`, `--image`, `--user-data`.

use std::path::{Path, PathBuf, absolute};
use std::str::FromStr;

use clap::Args;

use crate::config::MountPoint;
use crate::error::{Context, Error, Result};
use crate::model::vm::MountKind;
use crate::ops::changes::Changes;
use crate::ops::restart::Checkpoint;

const MOUNT_FORM: &str = "write `TAG=FOLDER[,type=virtio-9p|virtio-fs][,readonly=true|false]`";
/// As long as the longest tag of virtio-9p.
const MAX_TAG: usize = 31;

/// As they are given, and handed on to the process that starts the cluster.
#[derive(Clone, Debug, Default, Args)]
pub struct ChangeArgs {
    /// Let the guests mount a folder of their host, by this tag; may be given again. More:
    /// `TAG=FOLDER,type=virtio-fs`, `TAG=FOLDER,readonly=true`
    #[arg(long = "mount", value_name = "TAG=FOLDER")]
    mounts: Vec<Mount>,

    /// Start this image instead of that of the templates, or of one; may be given again
    #[arg(long = "image", value_name = "[TEMPLATE=]IMAGE")]
    images: Vec<Image>,

    /// What cloud-init does, instead of what the templates say
    #[arg(long, value_name = "FILE")]
    user_data: Option<PathBuf>,

    /// Go on from this checkpoint, which `pavo ckpt` has written; where there are no options of
    /// the scheduler, CLUSTER may be left away
    #[arg(short = 'r', long = "restart-ckpt", value_name = "DIR")]
    #[arg(conflicts_with_all = ["images", "user_data"])]
    pub restart: Option<PathBuf>,
}

impl ChangeArgs {
    /// As changes; relative paths are those of this process.
    pub fn changes(&self) -> Result<Changes> {
        let mount = |mount: &Mount| {
            let path = whole(Path::new(&mount.point.path))?.to_string_lossy().into_owned();
            Ok((mount.tag.clone(), MountPoint { path, ..mount.point.clone() }))
        };
        Ok(Changes {
            mounts: self.mounts.iter().map(mount).collect::<Result<_>>()?,
            images: self
                .images
                .iter()
                .map(|Image(of, image)| (of.clone(), image.clone()))
                .collect(),
            user_data: self.user_data.as_deref().map(whole).transpose()?,
            goes_on: self.restart.is_some(),
        })
    }

    /// The checkpoint, if the cluster is to go on from one.
    pub fn checkpoint(&self) -> Result<Option<Checkpoint>> {
        self.restart.as_deref().map(Checkpoint::open).transpose()
    }

    /// As arguments again, for a process in another folder.
    pub fn arguments(&self) -> Result<Vec<String>> {
        let mut arguments = Vec::new();
        for Mount { tag, point } in &self.mounts {
            let path = whole(Path::new(&point.path))?;
            if path.as_os_str().as_encoded_bytes().contains(&b',') {
                let error =
                    format!("`{}` has a comma, which a mount's path cannot", path.display());
                return Err(Error::usage(error).help("name it by a symbolic link"));
            }
            let (kind, readonly) = (point.kind.as_str(), point.readonly);
            let path = path.display();
            arguments.push(format!("--mount={tag}={path},type={kind},readonly={readonly}"));
        }
        for Image(of, image) in &self.images {
            let of = of.as_ref().map(|of| format!("{of}=")).unwrap_or_default();
            arguments.push(format!("--image={of}{image}"));
        }
        if let Some(path) = &self.user_data {
            arguments.push(format!("--user-data={}", whole(path)?.display()));
        }
        if let Some(path) = &self.restart {
            let path = absolute(path).while_doing(|| "finding the current folder".into())?;
            arguments.push(format!("--restart-ckpt={}", path.display()));
        }
        Ok(arguments)
    }
}

/// The path from the root on. Variables in it, as in a template's, are left to be expanded.
fn whole(path: &Path) -> Result<PathBuf> {
    if path.to_str().is_some_and(|path| path.starts_with(['~', '%'])) {
        return Ok(path.into());
    }
    absolute(path).while_doing(|| format!("finding `{}`", path.display()))
}

/// One `--mount`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    tag: String,
    point: MountPoint,
}

impl FromStr for Mount {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |why: String| Error::usage(why).help(MOUNT_FORM);
        let (tag, rest) = text
            .split_once('=')
            .ok_or_else(|| wrong(format!("`{}` names no folder", text.escape_debug())))?;
        if tag.is_empty() || tag.len() > MAX_TAG {
            return Err(wrong(format!("a tag has 1 to {MAX_TAG} letters")));
        }
        let mut parts = rest.split(',');
        let path = parts.next().unwrap_or_default();
        if path.is_empty() {
            return Err(wrong(format!("`{tag}=` names no folder")));
        }
        let mut point =
            MountPoint { path: path.into(), readonly: false, kind: MountKind::default() };
        for part in parts {
            match part {
                "type=virtio-9p" => point.kind = MountKind::Virtio9p,
                "type=virtio-fs" => point.kind = MountKind::VirtioFs,
                "readonly=true" => point.readonly = true,
                "readonly=false" => point.readonly = false,
                _ => return Err(wrong(format!("`{}` is not known", part.escape_debug()))),
            }
        }
        Ok(Self { tag: tag.into(), point })
    }
}

/// One `--image`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Image(Option<String>, String);

impl FromStr for Image {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (of, image) = match text.split_once('=') {
            Some((of, image)) => (Some(of), image),
            None => (None, text),
        };
        if image.is_empty() || of == Some("") {
            return Err(Error::usage(format!("`{}` names no image", text.escape_debug()))
                .help("write `IMAGE`, or `TEMPLATE=IMAGE`"));
        }
        Ok(Self(of.map(Into::into), image.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_as_pcocc_reads_them() {
        let mount = |text: &str| text.parse::<Mount>().map_err(|error| error.to_string());
        let point = |path: &str, readonly, kind| MountPoint { path: path.into(), readonly, kind };
        let (p9, fs) = (MountKind::Virtio9p, MountKind::VirtioFs);
        assert_eq!(mount("d=/a=b").unwrap().point, point("/a=b", false, p9));
        let both = mount("d=x,type=virtio-fs,readonly=true").unwrap();
        assert_eq!((&*both.tag, both.point), ("d", point("x", true, fs)));
        for wrong in ["d", "=x", "d=", "d=x,ro", "d=x,type=nfs", &format!("{}=x", "d".repeat(32))] {
            assert!(mount(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_handed_on_means_the_same_elsewhere() {
        let given = ChangeArgs {
            mounts: vec!["d=x%user,readonly=true".parse().unwrap()],
            images: vec!["a=user:b@1".parse().unwrap(), "c".parse().unwrap()],
            user_data: Some("y".into()),
            restart: Some("z".into()),
        };
        let here = std::env::current_dir().unwrap().display().to_string();
        assert_eq!(
            given.arguments().unwrap(),
            [
                &format!("--mount=d={here}/x%user,type=virtio-9p,readonly=true"),
                "--image=a=user:b@1",
                "--image=c",
                &format!("--user-data={here}/y"),
                &format!("--restart-ckpt={here}/z"),
            ]
        );
        let changes = given.changes().unwrap();
        assert_eq!(changes.mounts[0].1.path, format!("{here}/x%user"));
        assert_eq!(whole(Path::new("~/x")).unwrap(), Path::new("~/x"));
    }
}
