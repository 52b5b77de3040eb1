//! `cf-slide predict`: from slides to hazards, survival curves, medians and risks.

use std::path::PathBuf;

use clap::Args;
use crossfusion::{
    Error, Result,
    data::dataset::Which,
    device::Device,
    eval::{self, predict},
    folder,
};

use super::input::{Machine, Source};

/// Predicts slides: hazards, survival curve, median survival, risk, and its percentile in the
/// cohort that the run was trained on
#[derive(Args)]
pub struct Arguments {
    /// Run folder, whose folds' models are averaged, or one model: best.safetensors, a published
    /// best_model.pt
    model: PathBuf,
    /// Slides, or folders of them; of features that are there, their names will do
    #[arg(required = true)]
    slides: Vec<PathBuf>,
    /// Folder for predictions.csv and predictions.json [default: runs/predict-NUMBER]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    source: Source,
    #[command(flatten)]
    machine: Machine,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let Arguments { model, slides, source, machine, .. } = arguments;
    let device = Device::from_name(&machine.device, machine.threads)?;
    let out = arguments.out.clone().unwrap_or_else(|| folder::fresh_folder("predict"));
    eval::check_out(&out)?;
    let features = source.features(slides, model, &out, machine)?;
    let request = predict::Request {
        model,
        heads: source.num_heads,
        pt_dir: &features.pt_dir,
        backbone: &features.backbone,
        slides: Which::Named(&features.slides),
    };
    let mut predictions = predict::predict(&request, device, machine.memory_budget)?;
    let failed = features.failed.len();
    predictions.left_out.extend(features.failed);
    predictions.write(&out)?;
    crossfusion::say(predictions.sentences());
    for slide in &predictions.slides {
        let or = |value: Option<f64>, unit: &str| value.map_or("not known".into(), |value| format!("{value:.1}{unit}"));
        let spread = slide.risk_spread.map_or(String::new(), |spread| format!(" (spread of the models {spread:.3})"));
        crossfusion::say(format!(
            "{}: risk {:.3}{spread}, percentile {}, median survival {}",
            slide.slide_id,
            slide.risk,
            or(slide.percentile, ""),
            or(slide.median_months, " months"),
        ));
    }
    crossfusion::say(format!("predictions {}", out.join(predict::CSV).display()));
    match failed {
        0 => Ok(()),
        n => Err(Error::Data(format!("{n} of {} slides failed, for the reasons above", n + features.slides.len()))),
    }
}
