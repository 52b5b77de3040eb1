//! Evaluation: of a run's folds, each on its validation slides, or of one checkpoint on any cohort.
//!
//!   model files + cohort -> a prediction a slide -> [`Summary`] -> predictions.csv, summary.json, report.html, figures/
//!
//! [`compare`] sets two runs side by side that predicted the same patients.

pub mod compare;
mod describe;
pub mod infer;

pub use describe::quote;

use std::{collections::BTreeMap, path::Path};

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    Error, Result,
    data::{
        self,
        dataset::{Dataset, Reading, Source},
        torch::{StateDict, read_state_dict},
    },
    device::Device,
    loss::{Loss, Prediction},
    report::{self, Fold, SlideResult, Summary, accuracy::quantile},
    survival::Bootstrap,
    train::{
        checkpoint::{ModelCard, read_card, read_state},
        config::RunConfig,
        fold::FoldTrainer,
        protocol::{self, Protocol},
        run,
        step::{Engine, Memory},
    },
};

/// Bags read ahead.
const AHEAD: usize = 3;

/// One checkpoint and the cohort to evaluate it on.
#[derive(Clone, Debug)]
pub struct Checkpoint<'a> {
    /// `best.safetensors` of a run, or a published `best_model.pt`.
    pub path: &'a Path,
    pub source: Source<'a>,
    /// Folder of splits and a fold's number: its validation slides alone. None evaluates all slides.
    pub split: Option<(&'a Path, usize)>,
    /// For a checkpoint that does not say its number of attention heads.
    pub heads: usize,
}

/// Evaluates every fold of a run that has a model, on its validation slides, and writes the files into the run's folder.
/// Paths in the run's settings are as `cf-train` was given them.
/// `budget` replaces the run's own memory budget.
pub fn evaluate_run(run: &Path, device: Device, budget: Option<ByteSize>, plan: Bootstrap) -> Result<Summary> {
    let path = run::config_path(run);
    if !path.is_file() {
        return Err(Error::Usage(format!("{}: is not a run folder, it has no config.toml", run.display())));
    }
    let config = RunConfig::read(&path)?;
    let dataset = Dataset::open(&config.source())?;
    let metrics = run::read_metrics(run)?;
    let mut engine = Engine::new(device, &config.model(dataset.features), config.seed)?;
    engine.set_memory(Memory::new(budget.or(config.memory_budget)));
    let (mut folds, mut slides, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    for fold in 0..config.folds {
        let folder = run::fold_folder(run, fold);
        let path = FoldTrainer::best_path(&folder);
        if !path.is_file() {
            notes.push(format!("Fold {fold} has no model yet and is left out."));
            continue;
        }
        let part = dataset.fold(&config.splits, fold)?;
        load(&mut engine, &path, read_state_dict(&path)?)?;
        slides.extend(predict(&mut engine, &dataset, &part.val, fold)?);
        let trained = match config.protocol {
            Protocol::Published => Some(part.train.len()),
            Protocol::Nested => protocol::prepare(&config, &dataset, (fold, &part)).ok().map(|p| p.slides.train.len()),
        };
        folds.push(Fold { fold, train_slides: trained, ..of_card(read_card(&path)?) });
        if let Err(change) = unchanged(&config, &dataset, (fold, &part), &folder) {
            notes.push(format!("Fold {fold} is evaluated on other than it was trained for: {change}."));
        }
        if part.without_outcome > 0 {
            notes.push(format!("Fold {fold} names {} cases whose outcome is not known.", part.without_outcome));
        }
        if !FoldTrainer::epochs_done(&folder)?.1 {
            notes.push(format!("Fold {fold} is not trained to its end; this is its best model so far."));
        } else if !metrics.iter().any(|epoch| epoch.fold == fold && epoch.best) {
            notes
                .push(format!("No epoch of fold {fold} could be chosen by its C-index; the last one's model is used."));
        }
    }
    notes.extend(report::best_epoch_note(&metrics, config.warmup_epochs, config.num_epochs));
    if folds.is_empty() {
        return Err(Error::Usage(format!("{}: has no trained fold yet", run.display())));
    }
    if folds.len() > 1 && config.loss_fn == Loss::CoxSurv {
        centre(&mut slides);
        notes.push(
            "A Cox model's risks have no zero of their own: each fold's are shifted so that their median is 0 before folds are put together."
                .into(),
        );
    }
    let mut summary = Summary::new(&folds, &slides, plan)?;
    summary.notes.extend(notes);
    summary.notes.extend(dataset.left_out().map(|sentence| sentence + "."));
    let about = describe::run(run, &config, &engine, &metrics)?;
    summary.protocol.clone_from(&about.protocol);
    report::write(run, &about, &summary, &slides, &metrics)?;
    Ok(summary)
}

/// Evaluates one checkpoint and writes the files into `out`.
pub fn evaluate_checkpoint(
    checkpoint: &Checkpoint,
    out: &Path,
    device: Device,
    budget: Option<ByteSize>,
    plan: Bootstrap,
) -> Result<Summary> {
    let path = checkpoint.path;
    if run::config_path(out).exists() {
        let message =
            format!("{} is a run's folder, whose own results would be replaced; choose another --out", out.display());
        return Err(Error::Usage(message));
    }
    let ours = path.extension().is_some_and(|extension| extension == "safetensors");
    if ours {
        refuse_state(path)?;
    }
    let tensors = read_state_dict(path)?;
    let card = if ours { read_card(path)? } else { None };
    let model = match &card {
        Some(card) => card.model.clone(),
        None => infer::config(&tensors, checkpoint.heads).map_err(|e| Error::file(path, e))?,
    };
    let dataset = Dataset::open(&checkpoint.source)?;
    if dataset.features != model.features {
        let backbone = checkpoint.source.backbone;
        let message = format!("takes features of width {}, but {backbone}'s are {}", model.features, dataset.features);
        return Err(Error::file(path, message));
    }
    let (fold, order) = match checkpoint.split {
        Some((splits, fold)) => (fold, dataset.fold(splits, fold)?.val),
        None => (0, (0..dataset.slides.len()).collect()),
    };
    let mut engine = Engine::new(device, &model, 0)?;
    engine.set_memory(Memory::new(budget));
    load(&mut engine, path, tensors)?;
    let slides = predict(&mut engine, &dataset, &order, fold)?;
    let mut summary = Summary::new(&[Fold { fold, ..of_card(card) }], &slides, plan)?;
    summary.notes.extend(dataset.left_out().map(|sentence| sentence + "."));
    report::write(out, &describe::checkpoint(checkpoint, &engine)?, &summary, &slides, &[])?;
    Ok(summary)
}

/// What a model file says of its fold.
fn of_card(card: Option<ModelCard>) -> Fold {
    let (fold, best_epoch) = card.as_ref().map_or((0, None), |card| (card.fold, Some(card.epoch)));
    Fold { fold, train_slides: None, best_epoch, bin_edges: card.map(|card| card.bin_edges).unwrap_or_default() }
}

/// A fold's saved state, which is told by its progress, is no model.
/// Shifts the risks of each fold so that their median is 0.
fn centre(slides: &mut [SlideResult]) {
    let mut folds: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    for slide in &*slides {
        folds.entry(slide.fold).or_default().push(slide.risk);
    }
    for slide in slides {
        slide.risk -= quantile(&folds[&slide.fold], 0.5);
    }
}

fn refuse_state(path: &Path) -> Result<()> {
    let state: Option<serde_json::Value> = read_state(path).unwrap_or_default();
    if state.is_none_or(|state| state.get("progress").is_none()) {
        return Ok(());
    }
    let message = "is a fold's state, from which cf-train --resume goes on, not a model; the fold's model is the file \
                   best.safetensors beside it";
    Err(Error::file(path, message))
}

/// An error that says what has changed since the fold was trained. A fold without a state to compare with passes.
fn unchanged(config: &RunConfig, dataset: &Dataset, fold: (usize, &data::dataset::Fold), folder: &Path) -> Result<()> {
    let seen = protocol::prepare(config, dataset, fold)?;
    FoldTrainer::check(config, dataset, &seen.bins, &seen.slides, folder)
}

fn load(engine: &mut Engine<f32>, path: &Path, tensors: StateDict) -> Result<()> {
    engine.load(&tensors).map_err(|e| Error::file(path, e))
}

/// A prediction for each slide of `order`, without dropout.
fn predict(engine: &mut Engine<f32>, dataset: &Dataset, order: &[usize], fold: usize) -> Result<Vec<SlideResult>> {
    let slides: Vec<_> = order.iter().map(|&slide| (slide, false)).collect();
    let reading = Reading::plan(engine, dataset, &slides, AHEAD)?;
    engine.reserve(order.iter().map(|&slide| dataset.sizes[slide]), false)?;
    let style = ProgressStyle::with_template("evaluating fold {msg} {wide_bar:.cyan/blue} {pos}/{len} {elapsed}<{eta}");
    let bar = ProgressBar::new(order.len() as u64).with_message(fold.to_string()); // hidden where output is piped
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let mut slides = Vec::new();
    dataset.for_each(order, &reading, |i, bag: data::dataset::Bag<f32>| {
        let slide = &dataset.slides[i];
        let Prediction { hazards, survival, risk } = Prediction::from_logits(&engine.evaluate(bag.views()?)?);
        slides.push(SlideResult {
            case_id: slide.case_id.clone(),
            slide_id: slide.slide_id.clone(),
            fold,
            time: slide.months,
            event: !slide.censored,
            risk,
            hazards,
            survival,
        });
        bar.inc(1);
        Ok(true)
    })?;
    bar.finish_and_clear();
    Ok(slides)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_risks_of_each_fold_are_centred_on_their_median() {
        let slide = |fold: usize, risk: f64| SlideResult { fold, risk, ..SlideResult::default() };
        let mut slides = vec![slide(0, 5.0), slide(1, -1.0), slide(0, 7.0), slide(0, 6.5), slide(1, -2.0)];
        centre(&mut slides);
        assert_eq!(slides.iter().map(|slide| slide.risk).collect::<Vec<_>>(), [-1.5, 0.5, 0.5, 0.0, -0.5]);
    }
}
