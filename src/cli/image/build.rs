//! `pavo image build`

use std::path::PathBuf;

use clap::Args;

use super::super::{App, config};
use crate::config::Recipe;
use crate::error::Result;
use crate::image::library::Library;
use crate::image::{build, tiny};

/// Build an image from Debian packages
///
/// `tiny` is a kernel, busybox and an ssh server, for trying things: it needs no privilege
/// and boots in seconds. Other recipes are YAML files, and make a whole system that starts
/// with BIOS and with UEFI: `debian` comes with pavo (etc/recipes/debian.yaml shows and
/// explains all there is to set), the site's lie in /etc/pavo/recipes, your own in
/// ~/.pavo/recipes. They take root, or subordinate ids (/etc/subuid) and the packages
/// mmdebstrap and uidmap; what is built lies in memory until it is done.
#[derive(Debug, Args)]
pub struct Build {
    /// What to build: `tiny`, a recipe's name, or with a `/` its file
    #[arg(value_name = "RECIPE")]
    recipe: String,

    /// [REPO:]NAME of the new image
    #[arg(value_name = "NAME")]
    name: String,

    /// If the image exists, add a revision
    #[arg(long)]
    force: bool,

    /// Add pavo's agent, for `pavo run`, also if the recipe does not say so
    #[arg(long)]
    agent: bool,

    /// Where downloaded packages are kept [default: ~/.cache/pavo/packages]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
}

impl Build {
    pub fn run(self, app: &App, library: &Library) -> Result<()> {
        let cache = self.cache.unwrap_or_else(|| app.env.home.join(".cache/pavo/packages"));
        let progress = |text: &str| app.out.progress(text);
        let (name, user, cache, progress) = (&self.name, &app.env.user, &cache, &progress);
        let image = if self.recipe == "tiny" {
            library.create(name, user, self.force, |output, _| {
                tiny::build(tiny::Options { cache, output, progress })
            })?
        } else {
            let (mut recipe, warnings) = Recipe::load(&self.recipe, &config::sources(app))?;
            recipe.agent |= self.agent;
            warnings.iter().for_each(|warning| app.out.warn(&warning.to_string()));
            let recipe = &recipe;
            library.create(name, user, self.force, |output, scratch| {
                build::build(build::Options { recipe, name, cache, scratch, output, progress })
            })?
        };
        app.out.status(&format!("Built {} ({})", image.uri, self.recipe));
        Ok(())
    }
}
