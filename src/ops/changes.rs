//! What is wanted differently for one cluster than its templates say.

use std::path::PathBuf;

use crate::config::{MountPoint, Template, UserData};
use crate::error::{Error, Result};
use crate::model::cluster::ClusterDef;

/// Changes to templates, for one cluster.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// Folders by tag; one of a tag that a template has replaces it.
    pub mounts: Vec<(String, MountPoint)>,
    /// Images, of one template or of all. The last that fits counts, one of the template
    /// before one of all.
    pub images: Vec<(Option<String>, String)>,
    pub user_data: Option<PathBuf>,
    /// Whether the VMs go on from a checkpoint, and do not begin from anything.
    pub goes_on: bool,
}

impl Changes {
    /// # Errors
    /// When a template is named that the cluster does not have.
    pub fn check(&self, definition: &ClusterDef) -> Result<()> {
        let named = self.images.iter().filter_map(|(template, _)| template.as_ref());
        let known = |name: &String| definition.parts.iter().any(|part| part.template == *name);
        match named.into_iter().find(|name| !known(name)) {
            Some(name) => Err(Error::usage(format!(
                "template `{}` is not part of the cluster definition",
                name.escape_debug()
            ))
            .help(format!("`--image` changes templates of `{definition}`"))),
            None => Ok(()),
        }
    }

    /// The template as it is wanted.
    ///
    /// # Errors
    /// When it may not be changed so.
    pub fn apply(&self, mut template: Template) -> Result<Template> {
        let fits = |of: &Option<String>| of.as_ref().is_none_or(|of| *of == template.name);
        let images = self.images.iter().filter(|(of, _)| fits(of));
        // The last of the greatest: of the template, if there is one.
        if let Some((_, image)) = images.max_by_key(|(of, _)| of.is_some()) {
            template.image = Some(image.clone());
        }
        if self.goes_on {
            template.snapshot = None;
        }
        if let Some(path) = &self.user_data {
            template.user_data = Some(UserData::File(path.clone()));
        }
        for (tag, point) in &self.mounts {
            template.mount_points.insert(tag.clone(), point.clone());
            template.places.insert("mount-points".into(), "--mount".into());
        }
        Ok(template)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_of_a_template_comes_before_that_of_all() {
        let changed = |images: &[(Option<&str>, &str)]| {
            let image = |(of, image): &(Option<&str>, &str)| (of.map(Into::into), (*image).into());
            let changes =
                Changes { images: images.iter().map(image).collect(), ..Default::default() };
            changes.apply(Template::new("a", "")).unwrap().image.unwrap()
        };
        assert_eq!(changed(&[(None, "x"), (None, "y")]), "y");
        assert_eq!(changed(&[(Some("a"), "x"), (None, "y")]), "x");
        assert_eq!(changed(&[(Some("b"), "x"), (None, "y")]), "y");
    }
}
