//! Evaluation: of a run's folds, each on its validation slides, or of one checkpoint on any cohort.
//!
//! ```text
//! model files + cohort -> a prediction a slide -> Summary
//!                      -> predictions.csv, summary.json, report.html, figures/
//! ```
//!
//! [`compare`] sets two runs side by side that predicted the same patients.

pub mod attribution;
pub mod compare;
mod describe;
pub mod infer;
pub mod predict;
pub mod seeds;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    Error, Result,
    data::{
        self,
        atomic::remove_leftovers,
        cohort::{Slide, write_left_out},
        dataset::{Dataset, SlideFeatures, Source},
        torch::{StateDict, is_safetensors, read_state_dict},
    },
    device::Device,
    folder::{self, EpochMetrics},
    loss::{Loss, Prediction},
    model::{self, Model},
    report::{self, FoldFacts, FoldResult, SlideResult, Summary, accuracy::quantile},
    survival::Bootstrap,
    train::{
        checkpoint::{ModelCard, read_card, read_state},
        config::RunConfig,
        fold::{Done, FoldTrainer},
        inputs::Inputs,
        protocol::{self, Protocol, Reported},
        step::{Engine, Memory, PendingLogits, check_tensors},
    },
};

/// Bags read ahead.
const AHEAD: usize = 3;

/// One checkpoint and the cohort to evaluate it on.
#[derive(Clone, Debug)]
pub struct Checkpoint<'a> {
    /// `best.safetensors` of a run, or a published `best_model.pt`.
    pub path: &'a Path,
    /// Its scales are taken from the model.
    pub source: Source<'a>,
    /// Folder of splits and a fold's number: its test slides alone, or its validation slides where
    /// it has none. None evaluates all slides.
    pub split: Option<(&'a Path, usize)>,
    /// Attention heads, which a published checkpoint does not say; None takes the published 4
    /// there. An error if the model's own card says another number.
    pub heads: Option<usize>,
}

/// Heads of the published models.
const PUBLISHED_HEADS: usize = 4;

/// Where a run's data lies now, as far as it has moved since training.
#[derive(Clone, Debug, Default)]
pub struct Moved {
    /// The clinical table.
    pub clinical: Option<PathBuf>,
    /// The GDC manifest, also of a run that had none.
    pub manifest: Option<PathBuf>,
    /// The folder of the folds' tables.
    pub splits: Option<PathBuf>,
    /// The folder of the features.
    pub pt_dir: Option<PathBuf>,
}

impl Moved {
    fn apply(&self, config: &mut RunConfig) {
        let paths = [
            (&mut config.clinical, &self.clinical),
            (&mut config.splits, &self.splits),
            (&mut config.pt_dir, &self.pt_dir),
        ];
        paths.into_iter().filter_map(|(path, moved)| Some((path, moved.clone()?))).for_each(|(path, new)| *path = new);
        if self.manifest.is_some() {
            config.manifest.clone_from(&self.manifest);
        }
    }
}

/// Evaluates every fold of a run that has a model, on its test slides or else on its validation
/// slides, and writes the files into the run's folder. Paths in the run's settings are as
/// `cf-train` was given them, unless the data has `moved`. `budget` replaces the run's own memory
/// budget.
pub fn evaluate_run(
    run: &Path,
    moved: &Moved,
    device: Device,
    budget: Option<ByteSize>,
    plan: Bootstrap,
) -> Result<Summary> {
    let path = folder::config_path(run);
    if !path.is_file() {
        return Err(Error::Usage(format!("{}: is not a run folder, it has no config.toml", run.display())));
    }
    let mut config = RunConfig::read(&path)?;
    moved.apply(&mut config);
    for fold in config.fold_numbers() {
        let folder = folder::fold_folder(run, fold);
        FoldTrainer::check_settings(&config, &folder)?;
        FoldTrainer::check_model(&folder)?;
    }
    let dataset = Dataset::open(&config.source())?;
    // training may be at work, and writes a fold's model and metrics before its progress
    let progress = |fold| FoldTrainer::progress(&folder::fold_folder(run, fold));
    let progress = config.fold_numbers().map(progress).collect::<Result<Vec<_>>>()?;
    let metrics = folder::read_metrics(run, config.fold_numbers())?;
    let mut engine = Engine::new(device, &config.model_config(dataset.features), config.seed)?;
    engine.set_memory(Memory::new(budget.or(config.memory_budget)));
    let (mut folds, mut slides, mut notes, mut warnings) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut recorded = BTreeMap::new();
    if let Some(before) = Inputs::load(run)?
        && let Some(what) = before.changes(&Inputs::read(&config, &dataset)?).sentence()
    {
        warnings.push(format!("The inputs are not those of the training: {what}."));
    }
    let (mut tested, mut unchosen, mut missing) = (false, Vec::new(), Vec::new());
    for (fold, done) in config.fold_numbers().zip(progress) {
        let folder = folder::fold_folder(run, fold);
        let path = FoldTrainer::best_path(&folder);
        if !path.is_file() {
            missing.push(fold);
            continue;
        }
        let part = dataset.fold(&config.splits, fold)?;
        let card = read_card(&path)?;
        let epoch = card.as_ref().map(|card| card.epoch);
        if let Some(card) = card.as_ref().filter(|card| card.model.features != dataset.features) {
            return Err(wrong_width(&path, card.model.features, &config.backbone, dataset.features));
        }
        load(&mut engine, &path, &read_state_dict(&path)?)?;
        if let Some(card) = &card {
            if card.model != *engine.model().config() {
                return Err(Error::file(&path, "is of another model than config.toml describes"));
            }
            warnings.extend(overlap(card, &dataset, part.reported()).map(|what| format!("Fold {fold}: {what}")));
            if part.reported() == part.val && config.protocol == Protocol::Published {
                recorded.insert(fold, card.c_index);
            }
        }
        slides.extend(predict_slides(&mut engine, &dataset, part.reported(), fold)?);
        tested |= !part.test.is_empty();
        let trained = match config.protocol {
            Protocol::Published => Some(part.train.len()),
            Protocol::Nested => protocol::prepare(&config, &dataset, (fold, &part)).ok().map(|p| p.slides.train.len()),
        };
        folds.push(FoldFacts { fold, train_slides: trained, ..of_card(card) });
        if let Err(change) = unchanged(&config, &dataset, (fold, &part), &folder) {
            warnings.push(format!("Fold {fold} is evaluated on other than it was trained for: {change}."));
        }
        if !part.without_outcome.is_empty() {
            notes.push(format!("Fold {fold} names {} cases whose outcome is not known.", part.without_outcome.len()));
        }
        notes.extend(part.notes.into_iter().map(|note| note + "."));
        let epochs: Vec<&EpochMetrics> = metrics.iter().filter(|epoch| epoch.fold == fold).collect();
        if done.finished {
            warnings.extend(unlike_checkpoint(fold, &done, &epochs, epoch));
            unchosen.extend(done.best.is_none().then_some(fold));
        } else {
            notes.push(format!("Fold {fold} is not trained to its end; this is its best model so far."));
        }
    }
    notes.extend(report::best_epoch_note(&metrics, config.warmup_epochs, config.num_epochs));
    if folds.is_empty() {
        return Err(Error::Usage(format!("{}: has no trained fold yet", run.display())));
    }
    if !missing.is_empty() {
        let of: Vec<usize> = folds.iter().map(|fold| fold.fold).collect();
        let [missing, of] = [missing, of].map(|folds| data::folds::named(&folds));
        warnings.push(format!("There is no model of {missing} yet: these figures are of {of} alone."));
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
    warnings.extend(unlike_training(&summary, &recorded));
    summary.warnings.extend(warnings);
    let of_folds = data::folds::notes(&config.splits, &config.fold_numbers());
    summary.notes.extend(of_folds.into_iter().chain(dataset.notes()).map(|sentence| sentence + "."));
    let reported = Reported { loss: config.loss_fn, tested, folds: folds.len(), unchosen: &unchosen };
    let about = describe::run(run, &config, &reported, &engine, &metrics)?;
    summary.protocol.clone_from(&about.protocol);
    tidy(run)?;
    report::write(run, &about, &summary, &slides, &metrics)?;
    Ok(summary)
}

/// An error if a folder holds a run or results, which others would replace.
pub fn check_out(out: &Path) -> Result<()> {
    let results = ["config.toml", predict::CSV, predict::JSON, compare::FILE];
    let taken = results.map(|name| out.join(name)).into_iter().find(|path| path.exists());
    taken.map_or(Ok(()), |path| {
        Err(Error::Usage(format!("--out {}: holds {} already; choose another", out.display(), path.display())))
    })
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
    if folder::config_path(out).exists() {
        let message =
            format!("{} is a run's folder, whose own results would be replaced; choose another --out", out.display());
        return Err(Error::Usage(message));
    }
    let network = Network::read(path, checkpoint.heads)?;
    let dataset = Dataset::open(&Source { scales: network.config.model.scales(), ..checkpoint.source.clone() })?;
    network.check_width(path, &dataset, checkpoint.source.backbone)?;
    let fold_of = |(splits, fold)| data::folds::require(splits, fold).and_then(|()| dataset.fold(splits, fold));
    let part = checkpoint.split.map(fold_of).transpose()?;
    let fold = checkpoint.split.map_or(0, |(_, fold)| fold);
    let order = part.as_ref().map_or_else(|| (0..dataset.slides.len()).collect(), |part| part.reported().to_vec());
    let mut engine = network.engine(path, device, budget)?;
    let slides = predict_slides(&mut engine, &dataset, &order, fold)?;
    let seen = network.card.as_ref().map(|card| overlap(card, &dataset, &order));
    let mut summary = Summary::new(&[FoldFacts { fold, ..of_card(network.card) }], &slides, plan)?;
    match seen {
        Some(seen) => summary.warnings.extend(seen),
        None => summary.notes.push(
            "The model file does not say which slides it was trained on: some of these may be among them.".into(),
        ),
    }
    summary.notes.extend(dataset.notes().into_iter().map(|sentence| sentence + "."));
    tidy(out)?;
    report::write(out, &describe::checkpoint(checkpoint, part.as_ref(), &engine)?, &summary, &slides, &[])?;
    let left_out = part.map_or_else(|| dataset.unusable(), |part| dataset.left_out(std::iter::once(&part)));
    write_left_out(out, &left_out)?;
    Ok(summary)
}

/// A model file: its parameters, and what they are the parameters of.
pub struct Network {
    /// None where another program wrote the file.
    pub card: Option<ModelCard>,
    /// The card's; without one it is inferred from the tensors, with the published dropout rates.
    pub config: model::Config,
    /// The parameters by their published names.
    pub tensors: StateDict,
}

impl Network {
    /// Reads `best.safetensors` of a run, whose checksum is checked, or a published checkpoint, in
    /// whose tensors `heads` leaves no trace (None: the published 4). An error names the file.
    pub fn read(path: &Path, heads: Option<usize>) -> Result<Self> {
        let may_have_a_card = is_safetensors(path)?;
        if may_have_a_card {
            refuse_state(path)?;
        }
        let card = if may_have_a_card { read_card(path)? } else { None };
        let tensors = read_state_dict(path)?;
        let config = match (&card, heads) {
            (Some(card), Some(heads)) if card.model.heads != heads => {
                let message = format!("{} has {} attention heads, not {heads}", path.display(), card.model.heads);
                return Err(Error::Usage(message));
            }
            (Some(card), _) => card.model.clone(),
            (None, heads) => {
                infer::config(&tensors, heads.unwrap_or(PUBLISHED_HEADS)).map_err(|e| Error::file(path, e))?
            }
        };
        let model = Model::new(&config).map_err(|e| Error::file(path, e))?;
        check_tensors(&model, &tensors).map_err(|e| Error::file(path, e))?;
        Ok(Self { card, config, tensors })
    }

    fn check_width(&self, path: &Path, dataset: &Dataset, backbone: &str) -> Result<()> {
        if dataset.features == self.config.features {
            return Ok(());
        }
        Err(wrong_width(path, self.config.features, backbone, dataset.features))
    }

    /// An engine with these parameters.
    fn engine(&self, path: &Path, device: Device, budget: Option<ByteSize>) -> Result<Engine<f32>> {
        let mut engine = Engine::new(device, &self.config, 0)?;
        engine.set_memory(Memory::new(budget));
        load(&mut engine, path, &self.tensors)?;
        Ok(engine)
    }
}

fn wrong_width(model: &Path, takes: usize, backbone: &str, has: usize) -> Error {
    Error::file(model, format!("takes features of width {takes}, but {backbone}'s are {has}"))
}

/// What a model file says of its fold.
fn of_card(card: Option<ModelCard>) -> FoldFacts {
    let (fold, best_epoch) = card.as_ref().map_or((0, None), |card| (card.fold, Some(card.epoch)));
    FoldFacts { fold, train_slides: None, best_epoch, bin_edges: card.map(|card| card.bin_edges).unwrap_or_default() }
}

/// A sentence on the slides of `order` that a model has seen before; None if it has seen none.
fn overlap(card: &ModelCard, dataset: &Dataset, order: &[usize]) -> Option<String> {
    let slides = || order.iter().map(|&slide| &dataset.slides[slide]);
    let all = order.len();
    let trained = slides().filter(|slide| card.trained_on.has_slide(slide)).count();
    let others = slides().filter(|slide| !card.trained_on.has_slide(slide));
    let patients: BTreeSet<&str> =
        others.filter(|slide| card.trained_on.has_patient(slide)).map(|slide| slide.patient()).collect();
    let chosen = slides().filter(|slide| card.chosen_on.has_slide(slide)).count();
    let mut parts = Vec::new();
    if trained > 0 {
        parts.push(format!("The model was trained on {trained} of these {all} slides"));
    }
    if !patients.is_empty() {
        let subject = if parts.is_empty() { "The model" } else { "it" };
        parts.push(format!("{subject} was trained on other slides of {} of these patients", patients.len()));
    }
    if parts.is_empty() {
        return None; // that an epoch was chosen by these slides is the protocol's to say
    }
    if chosen > 0 {
        parts.push(format!("its epoch was chosen by {chosen} of them"));
    }
    let what = parts.join(", and ");
    Some(format!("{what}: these figures say nothing of its accuracy on new patients."))
}

/// A C-index may differ by this much between machines, whose instruction sets round differently.
const SAME_C_INDEX: f64 = 1e-3;

/// Sentences on the folds whose C-index is not the one that was recorded when their model was
/// chosen.
fn unlike_training(summary: &Summary, recorded: &BTreeMap<usize, Option<f64>>) -> Vec<String> {
    let differs = |fold: &FoldResult| {
        let (now, before) = (fold.c_index?, (*recorded.get(&fold.fold)?)?);
        ((now - before).abs() > SAME_C_INDEX).then(|| {
            format!(
                "Fold {} has a C-index of {now:.4}, but {before:.4} was recorded when its model was chosen: the \
                 model, the features or the tables are not the same.",
                fold.fold
            )
        })
    };
    summary.folds.iter().filter_map(differs).collect()
}

/// A sentence on what metrics.jsonl, or the epoch of the model's card, says otherwise than the
/// fold's checkpoint.
fn unlike_checkpoint(fold: usize, done: &Done, epochs: &[&EpochMetrics], of_model: Option<usize>) -> Option<String> {
    let chosen = |best: Option<usize>| best.map_or("none".into(), |epoch| format!("epoch {}", epoch + 1));
    let best = done.best.map(|best| best.epoch);
    let in_metrics = epochs.iter().rfind(|epoch| epoch.best).map(|epoch| epoch.epoch);
    let kept = best.unwrap_or(done.epochs.saturating_sub(1));
    let what = if epochs.len() != done.epochs {
        format!("metrics.jsonl has {} epochs of it, its checkpoint {}", epochs.len(), done.epochs)
    } else if in_metrics != best {
        format!("metrics.jsonl has {} as the best, its checkpoint {}", chosen(in_metrics), chosen(best))
    } else if of_model.is_some_and(|epoch| epoch != kept) {
        format!("its model is of {}, its checkpoint kept {}", chosen(of_model), chosen(Some(kept)))
    } else {
        return None;
    };
    Some(format!("The files of fold {fold} do not belong together: {what}."))
}

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

/// Removes what a killed evaluation left half-written in the folder of its results.
fn tidy(folder: &Path) -> Result<()> {
    // training may be at work in a run's folder
    const OF_TRAINING: [&str; 3] = ["config.toml", "inputs.json", "left_out.csv"];
    for folder in [folder.to_path_buf(), folder.join(report::FIGURES)] {
        if folder.is_dir() {
            remove_leftovers(&folder, &OF_TRAINING)?;
        }
    }
    Ok(())
}

/// A fold's saved state, which is told by its progress, is no model.
fn refuse_state(path: &Path) -> Result<()> {
    let state: Option<serde_json::Value> = read_state(path).unwrap_or_default();
    if state.is_none_or(|state| state.get("progress").is_none()) {
        return Ok(());
    }
    let message = "is a fold's state, from which cf-train --resume goes on, not a model; the fold's model is the file \
                   best.safetensors beside it";
    Err(Error::file(path, message))
}

/// An error that says what has changed since the fold was trained. A fold without a state to
/// compare with passes.
fn unchanged(config: &RunConfig, dataset: &Dataset, fold: (usize, &data::dataset::Fold), folder: &Path) -> Result<()> {
    let seen = protocol::prepare(config, dataset, fold)?;
    FoldTrainer::check(config, dataset, &seen.bins, &seen.slides, folder)
}

fn load(engine: &mut Engine<f32>, path: &Path, tensors: &StateDict) -> Result<()> {
    engine.load(tensors).map_err(|e| Error::file(path, e))
}

/// A prediction for each slide of `order`, without dropout.
fn predict_slides(
    engine: &mut Engine<f32>,
    dataset: &Dataset,
    order: &[usize],
    fold: usize,
) -> Result<Vec<SlideResult>> {
    let slides: Vec<_> = order.iter().map(|&slide| (slide, false)).collect();
    let reading = engine.planner().reading(dataset, &slides, AHEAD)?;
    engine.reserve(order.iter().map(|&slide| dataset.sizes[slide]), false)?;
    let style = ProgressStyle::with_template("evaluating fold {msg} {wide_bar:.cyan/blue} {pos}/{len} {elapsed}<{eta}");
    let bar = ProgressBar::new(order.len() as u64).with_message(fold.to_string()); // hidden where output is piped
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let (mut slides, mut queue) = (Vec::new(), engine.queue());
    let mut finish = |engine: &Engine<f32>, i: usize, logits: PendingLogits| {
        let slide: &Slide = &dataset.slides[i];
        let Prediction { hazards, survival, risk } = Prediction::from_logits(&engine.finish_logits(logits)?);
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
        Ok::<_, Error>(())
    };
    dataset.for_each(order, &reading, |i, bag: SlideFeatures<f32>| {
        if let Some((i, logits)) = queue.push((i, engine.start(bag.bags()?, None)?)) {
            finish(engine, i, logits)?;
        }
        Ok(true)
    })?;
    for (i, logits) in queue.rest() {
        finish(engine, i, logits)?;
    }
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
