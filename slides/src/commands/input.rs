//! What `predict` and `heatmap` are given: a slide, or features of one that are there already.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use bytesize::ByteSize;
use clap::Args;
use crossfusion::{
    Error, Result,
    data::cohort::{self, LeftOut},
    eval,
    model::Scale,
};
use crossfusion_slides::{
    backbone::{Backbone, Device},
    embedding,
    features::Format,
    files,
    grid::ContourFn,
    patching::{self, Settings, Status},
    slide,
};

use super::{patch::Tissue, start_threads};

/// Where features are, or come from.
#[derive(Args)]
#[command(next_help_heading = "Features")]
pub struct Source {
    /// Backbone as an ONNX file: slides are patched as `cf-slide patch` does and embedded, into
    /// --out
    #[arg(long, value_name = "F", conflicts_with = "pt_dir", required_unless_present = "pt_dir")]
    onnx: Option<PathBuf>,
    /// Folder of features that are there, as of cf-train
    #[arg(long, value_name = "DIR", requires = "backbone")]
    pt_dir: Option<PathBuf>,
    /// Name of the feature extractor, a folder in --pt-dir
    #[arg(long, value_name = "NAME", conflicts_with = "onnx")]
    backbone: Option<String>,
    /// With --onnx: power of the slides' objective, in place of what they say
    #[arg(long, value_name = "X", value_parser = super::patch::power, conflicts_with = "pt_dir")]
    power: Option<f64>,
    /// Attention heads of a model that does not say, as published ones [default: 4]
    #[arg(long, value_name = "N")]
    pub num_heads: Option<usize>,
    #[command(flatten)]
    tissue: Tissue,
}

/// What the model runs on.
#[derive(Args)]
#[command(next_help_heading = "Machine")]
pub struct Machine {
    /// Where to run: auto, cpu or cuda
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Most memory for a slide, on a GPU of the GPU's: 8GiB, say
    #[arg(long, value_name = "BYTES")]
    pub memory_budget: Option<ByteSize>,
    /// Threads; 0 is one for each core. Results do not depend on it
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
}

/// Features on the disk.
pub struct Features {
    pub pt_dir: PathBuf,
    pub backbone: String,
    /// Names of the slides.
    pub slides: Vec<String>,
    /// Folder of coordinates, where they were made here.
    pub patches: Option<PathBuf>,
    /// Slides of which they could not be made, and why.
    pub failed: Vec<LeftOut>,
}

/// The name of a slide's features: a file's name without extension.
pub fn slide_id(slide: &Path) -> String {
    match slide.file_stem() {
        Some(stem) if slide.is_file() => stem.to_string_lossy().into_owned(),
        _ => cohort::stem(&slide.to_string_lossy()).into(),
    }
}

impl Source {
    /// Finds the features, or makes them in `out` for a model that takes them.
    pub fn features(&self, slides: &[PathBuf], model: &Path, out: &Path, machine: &Machine) -> Result<Features> {
        let (pt_dir, backbone) = match (&self.onnx, &self.pt_dir, &self.backbone) {
            (Some(onnx), ..) => return self.make(onnx, slides, model, out, machine),
            (None, Some(pt_dir), Some(backbone)) => (pt_dir.clone(), backbone.clone()),
            _ => return Err(Error::Usage("expected --onnx, or --pt-dir and --backbone".into())),
        };
        if self.tissue != Tissue::default() {
            let message = "--preset and the other settings of tissue are for --onnx: there are features already";
            return Err(Error::Usage(message.into()));
        }
        let slides = slides.iter().map(|slide| slide_id(slide)).collect();
        Ok(Features { pt_dir, backbone, slides, patches: None, failed: Vec::new() })
    }

    fn make(&self, onnx: &Path, slides: &[PathBuf], model: &Path, out: &Path, machine: &Machine) -> Result<Features> {
        let threads = start_threads(machine.threads)?;
        slide::check_library()?;
        // a model on a GPU does not need an ONNX Runtime that has it
        let device = if machine.device == "cpu" { Device::Cpu } else { Device::Auto };
        let mut network = Backbone::load(onnx, None, device, threads)?;
        let backbone = onnx.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        eval::predict::check_width(model, self.num_heads, &backbone, network.recipe.features)?;
        let (patches, pt_dir) = (out.join("patches"), out.join("features"));
        let settings = Settings {
            patch_size: 256,
            step_size: 256,
            contour_fn: ContourFn::FourPt,
            use_padding: true,
            magnifications: Scale::ALL.to_vec(),
            power: self.power,
            segmentation: self.tissue.settings(),
        };
        let rows = patching::patch_all(&files::slides(slides)?, &settings, &patches)?;
        let why_not = |row: &patching::Row| match row.status {
            Status::Failed => row.reason.clone(),
            _ => format!(
                "{}: no tissue with these settings; try --preset bwh-biopsy, say, or a smaller --a-t",
                row.path.display()
            ),
        };
        let unpatched = rows.iter().filter(|(_, row)| row.status != Status::Patched);
        let mut failed: BTreeMap<String, String> = unpatched.map(|(name, row)| (name.clone(), why_not(row))).collect();
        if failed.len() < rows.len() {
            let request = embedding::Request {
                patches: &patches,
                slides: None,
                out: &pt_dir.join(&backbone),
                format: Format::Pt,
                batch: 32,
                threads,
            };
            failed.extend(embedding::embed(&request, onnx, &mut network)?.failed);
            // of slides that an earlier call has left in --out
            failed.retain(|name, _| rows.contains_key(name));
        }
        if failed.len() == rows.len() {
            return Err(Error::Data(failed.into_values().collect::<Vec<_>>().join("; ")));
        }
        failed.values().for_each(|reason| crossfusion::say(format!("failed: {reason}")));
        let slides = rows.keys().filter(|name| !failed.contains_key(*name)).cloned().collect();
        let left_out = |(slide_id, reason)| LeftOut { slide_id, case_id: String::new(), reason };
        let failed = failed.into_iter().map(left_out).collect();
        Ok(Features { pt_dir, backbone, slides, patches: Some(patches), failed })
    }
}
