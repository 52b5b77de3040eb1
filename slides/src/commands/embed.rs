//! `cf-slide embed`: features of patches by a backbone.

use std::path::PathBuf;

use clap::Args;
use crossfusion::{Error, Result};

/// Computes features of the patches that `cf-slide patch` found
#[derive(Args)]
pub struct Arguments {
    /// Folder that `cf-slide patch` wrote
    patches: PathBuf,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    Err(Error::file(&arguments.patches, "cannot be embedded yet"))
}
