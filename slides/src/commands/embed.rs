//! `cf-slide embed`: features of patches by a backbone.

use std::path::PathBuf;

use clap::Args;
use crossfusion::{Error, Result};
use crossfusion_slides::{
    backbone::{Backbone, Device},
    embedding::{self, Request},
    features::Format,
    patching::TABLE,
    slide,
};

/// Computes features of the patches that `cf-slide patch` found, by a network in an ONNX file
#[derive(Args)]
pub struct Arguments {
    /// Folder that `cf-slide patch` wrote
    patches: PathBuf,
    /// The network: an ONNX file, beside which a .toml says how patches are prepared;
    /// scripts/export-backbone.py writes both
    #[arg(long, value_name = "F")]
    backbone: PathBuf,
    /// Folder for features, cf-train's --pt-dir; what is there already is not done again
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Name of the folder in --out, cf-train's --backbone [default: the ONNX file's]
    #[arg(long)]
    name: Option<String>,
    /// How features are stored
    #[arg(long, default_value = "pt")]
    format: Format,
    /// Folder that the slides have moved to since they were patched
    #[arg(long, value_name = "DIR")]
    slides: Option<PathBuf>,
    /// Patches that the network takes at once
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch_size: u16,
    /// Where the network runs
    #[arg(long, default_value = "auto")]
    device: Device,
    /// Threads that read, and as many that the network runs on; 0 is one for each core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// ONNX Runtime's shared library [default: $ORT_DYLIB_PATH, or the system's, or that of the
    /// Python package onnxruntime]
    #[arg(long, value_name = "F")]
    onnxruntime: Option<PathBuf>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let threads = super::start_threads(arguments.threads)?;
    let onnx = &arguments.backbone;
    let name = arguments.name.clone().unwrap_or_else(|| onnx.file_stem().unwrap_or_default().to_string_lossy().into());
    slide::check_library()?;
    let mut backbone = Backbone::load(onnx, arguments.onnxruntime.as_deref(), arguments.device, threads)?;
    let request = Request {
        patches: &arguments.patches,
        slides: arguments.slides.as_deref(),
        out: &arguments.out.join(&name),
        format: arguments.format,
        batch: arguments.batch_size.into(),
        threads,
    };
    let summary = embedding::embed(&request, onnx, &mut backbone)?;
    summary.failed.values().for_each(|reason| crossfusion::say(format!("failed: {reason}")));
    crossfusion::say(format!(
        "{} slides embedded ({} patches), {} were there already, {} failed",
        summary.embedded,
        summary.patches,
        summary.skipped,
        summary.failed.len()
    ));
    if summary.without_patches > 0 {
        crossfusion::say(format!(
            "{} slides have no patches ({TABLE} of {})",
            summary.without_patches,
            arguments.patches.display()
        ));
    }
    crossfusion::say(format!("features {}", request.out.display()));
    match summary.failed.len() {
        0 => Ok(()),
        n => Err(Error::Data(format!("{n} slides failed, for the reasons above; run again to try them again"))),
    }
}
