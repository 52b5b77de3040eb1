//! A run: its folds one after the other, or each in a process of its own, and what is shown
//! meanwhile. Its folder is [`crate::folder`]'s.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{File, TryLockError},
    io::Write,
    ops::{ControlFlow, Range},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use half::bf16;

use super::{
    config::{Difference, RunConfig},
    fold::{self, FoldTrainer, Observer, Outcome, SlideDone},
    inputs::{self, Inputs},
    plan::{Planner, Plans},
    progress::{self, Display},
    protocol::{self, Part, Protocol},
    ranks::Ranks,
    tensorboard::Events,
};
use crate::{
    Error, Result,
    data::{
        atomic::{remove_leftovers, write_text},
        cohort::{LeftOut, write_left_out},
        dataset::{Dataset, Fold},
        folds,
    },
    device::{Device, Element, Facts, Storage},
    folder::{self, Best, EpochMetrics},
    loss::Loss,
    model::Model,
};

/// The demo's cohort, in its run's folder.
pub const DEMO_DATA: &str = "cohort";

/// The folds of a run that are not trained to their end.
pub fn unfinished(run: &Path, folds: Range<usize>) -> Result<Vec<usize>> {
    let mut unfinished = Vec::new();
    for fold in folds {
        if !FoldTrainer::progress(&folder::fold_folder(run, fold))?.finished {
            unfinished.push(fold);
        }
    }
    Ok(unfinished)
}

/// Whether all folds of a run are trained, and its report is of all of them: it is younger than
/// they are.
pub fn is_finished(run: &Path, folds: Range<usize>) -> Result<bool> {
    let modified = |path: PathBuf| std::fs::metadata(path).and_then(|file| file.modified()).ok();
    let report = modified(run.join("report.html"));
    let older = |fold| modified(FoldTrainer::checkpoint_path(&folder::fold_folder(run, fold))) <= report;
    Ok(!folds.is_empty()
        && report.is_some()
        && unfinished(run, folds.clone())?.is_empty()
        && folds.into_iter().all(older))
}

/// The file in a run's folder, or in a fold's, that the operating system locks for a process until
/// it closes it or ends, killed or not.
fn lock_file(folder: &Path) -> Result<File> {
    let path = folder.join(".lock");
    File::create(&path).map_err(|e| Error::file(&path, format!("cannot be made: {e}")))
}

/// Keeps a second process from training a fold.
fn lock_fold(folder: &Path) -> Result<File> {
    let file = lock_file(folder)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(Error::file(folder, "another cf-train is at work on this fold")),
        // as on some network file systems: train all the same
        Err(TryLockError::Error(e)) => crate::say(format!(
            "note: {}: the file system has no locks ({e}): see to it that no second cf-train trains this fold",
            folder.display()
        )),
    }
    Ok(file)
}

/// Waits for other processes that write what the folds share, which is soon done; an earlier
/// version's process holds the lock for as long as it trains. None where the file system has no
/// locks: equal processes then write equal files, each at once.
fn lock_run(folder: &Path) -> Result<Option<File>> {
    let file = lock_file(folder)?;
    match file.try_lock() {
        Ok(()) => return Ok(Some(file)),
        Err(TryLockError::Error(_)) => return Ok(None),
        Err(TryLockError::WouldBlock) => {}
    }
    crate::say(format!("waiting for another cf-train that is at work in {}", folder.display()));
    Ok(file.lock().is_ok().then_some(file))
}

/// Drops the lines of epochs that no checkpoint has seen to their end, which will be run again.
fn trim_metrics(run: &Path, fold: usize) -> Result<()> {
    let done = FoldTrainer::progress(&folder::fold_folder(run, fold))?.epochs;
    let mut epochs = folder::read_metrics(run, fold..fold + 1)?;
    epochs.retain(|metrics| metrics.epoch < done);
    write_text(&folder::metrics_path(run, fold), &epochs.iter().map(line).collect::<String>())
}

fn line(metrics: &EpochMetrics) -> String {
    serde_json::to_string(metrics).unwrap_or_default() + "\n"
}

/// A run's settings and data, checked before anything is written.
pub struct Run {
    config: RunConfig,
    dataset: Dataset,
    /// Of the folds that this process trains.
    parts: Vec<Part>,
    /// The one fold that it trains, while others may train the others.
    fold: Option<usize>,
    left_out: Vec<LeftOut>,
    /// Of activations and weights.
    storage: Storage,
    /// Made once for all folds.
    plans: Plans,
    memory: Option<String>,
}

impl Run {
    /// Reads the tables, all folds, and the headers of all feature files.
    pub fn open(mut config: RunConfig) -> Result<Self> {
        let dataset = Dataset::open(&config.source())?;
        if let Some(width) = config.backbone_dim.filter(|&width| width != dataset.features) {
            let message =
                format!("--backbone-dim {width}: the features of {} have width {}", config.backbone, dataset.features);
            return Err(Error::Usage(message));
        }
        let numbers = folds::choose(&config.splits, config.folds)?;
        (config.first_fold, config.folds) = (numbers.start, Some(numbers.len()));
        let folds = dataset.folds(&config.splits, numbers)?;
        let part = |(i, fold): &(usize, Fold)| protocol::prepare(&config, &dataset, (*i, fold));
        let parts = folds.iter().map(part).collect::<Result<Vec<_>>>()?;
        for part in &parts {
            check_updates(&config, part.fold, part.slides.train.len())?;
            if config.protocol == Protocol::Nested && !progress::can_choose(&dataset, part) {
                let (fold, n) = (part.fold, part.slides.val.len());
                return Err(Error::Usage(format!(
                    "--protocol nested: no two of the {n} slides that would choose the epoch of fold {fold} can be compared"
                )));
            }
        }
        let left_out = dataset.left_out(folds.iter().map(|(_, fold)| fold));
        let device = Device::from_name(&config.device, config.threads)?;
        let storage = config.precision.storage(&device);
        let plans = Plans::default();
        let mut run = Self { config, dataset, parts, fold: None, left_out, storage, plans, memory: None };
        if let Some(budget) = run.config.memory_budget {
            let policies = match storage {
                Storage::F32 => run.policies::<f32>(device.facts())?,
                Storage::Bf16 => run.policies::<bf16>(device.facts())?,
            };
            let counts: Vec<_> = policies.iter().map(|(policy, slides)| format!("{slides} slides {policy}")).collect();
            run.memory = Some(format!("memory budget {budget}: {}", counts.join(", ")));
        }
        Ok(run)
    }

    /// Trains no other fold than this.
    pub fn keep_fold(&mut self, fold: usize) -> Result<()> {
        let numbers = self.config.fold_numbers();
        if !numbers.contains(&fold) {
            let message = format!("--fold {fold}: the run has {}", folds::named(&Vec::from_iter(numbers)));
            return Err(Error::Usage(message));
        }
        self.parts.retain(|part| part.fold == fold);
        self.fold = Some(fold);
        Ok(())
    }

    /// The device that its settings name.
    pub fn device(&self) -> Result<Device> {
        Device::from_name(&self.config.device, self.config.threads)
    }

    /// Sentences on folds and cohort that a user should know before training.
    pub fn notes(&self) -> Vec<String> {
        let of_folds = folds::notes(&self.config.splits, &self.config.fold_numbers());
        let mut notes: Vec<String> = of_folds.into_iter().chain(self.dataset.notes()).collect();
        notes.extend(self.parts.iter().flat_map(|part| part.slides.notes.iter().cloned()));
        if !self.left_out.is_empty() {
            let n = self.left_out.len();
            notes.push(format!("{n} slides or cases are not used, for reasons that the left_out.csv of a run lists"));
        }
        notes
    }

    /// Says more exactly why slides are left out: reasons by slide id.
    pub fn explain(&mut self, reasons: &HashMap<String, String>) {
        for left_out in &mut self.left_out {
            if let Some(reason) = reasons.get(&left_out.slide_id) {
                left_out.reason.clone_from(reason);
            }
        }
    }

    /// A sentence about the memory budget, if there is one.
    pub fn memory(&self) -> Option<&str> {
        self.memory.as_deref()
    }

    /// How many training slides are computed by each policy; an error naming a slide that does not
    /// fit.
    fn policies<T: Element<Sum = f32>>(&self, facts: Facts) -> Result<BTreeMap<String, usize>> {
        let config = self.config.model_config(self.dataset.features);
        if facts.runs_kernels {
            config.check_for_kernels()?;
        }
        let planner = Planner::<T>::new(facts, Model::new(&config)?, self.config.memory(), self.plans.clone());
        let mut slides = BTreeMap::new();
        for part in &self.parts {
            fold::reading(&planner, &self.config, &self.dataset, &part.slides)?;
            for &slide in &part.slides.train {
                slides.insert(slide, planner.plan(self.dataset.sizes[slide], true)?.policy.to_string());
            }
        }
        let mut counts = BTreeMap::new();
        slides.into_values().for_each(|policy| *counts.entry(policy).or_default() += 1);
        Ok(counts)
    }

    /// Its settings, all of them.
    pub fn config(&self) -> &RunConfig {
        &self.config
    }

    /// Writes the settings, the inputs' fingerprints and which slides are left out into the run's
    /// folder; from then on it can be resumed.
    pub fn save_config(&self, folder: &Path) -> Result<()> {
        Inputs::read(&self.config, &self.dataset)?.save(folder)?;
        write_left_out(folder, &self.left_out)?;
        write_text(&folder::config_path(folder), &self.config.to_toml()?)
    }

    /// [`Self::save_config`] where several processes may begin the run at once: the first does, and
    /// the others make sure that they have its settings and inputs.
    pub fn share(&self, folder: &Path) -> Result<()> {
        let lock = lock_run(folder)?;
        let path = folder::config_path(folder);
        if !path.exists() {
            if lock.is_some() {
                remove_leftovers(folder, &[])?;
            }
            return self.save_config(folder);
        }
        drop(lock);
        if let Some(Difference { key, one, other }) = RunConfig::read(&path)?.difference(&self.config) {
            let folder = folder.display();
            let message =
                format!("--out {folder}: the run was begun with {key} = {one}, not {other}; choose another --out");
            return Err(Error::Usage(message));
        }
        self.check_inputs(folder)
    }

    /// Takes down where the data of an earlier run lies now, if it has moved.
    pub fn moved(&self, folder: &Path) -> Result<()> {
        let _lock = lock_run(folder)?;
        let path = folder::config_path(folder);
        let before = RunConfig::read(&path)?;
        let moved = RunConfig {
            clinical: self.config.clinical.clone(),
            manifest: self.config.manifest.clone(),
            splits: self.config.splits.clone(),
            pt_dir: self.config.pt_dir.clone(),
            ..before.clone()
        };
        if moved == before { Ok(()) } else { write_text(&path, &moved.to_toml()?) }
    }

    /// An error if the inputs are no longer those that the run in `folder` was begun with. Files
    /// that were merely written again, or mended, are taken down as they are now.
    fn check_inputs(&self, folder: &Path) -> Result<()> {
        let Some(before) = Inputs::load(folder)? else { return Ok(()) };
        let now = Inputs::read(&self.config, &self.dataset)?;
        let changes = before.changes(&now);
        if let Some(what) = changes.sentence() {
            let message = format!("the run was begun with other inputs: {what}; put them back, or begin another run");
            return Err(Error::file(inputs::path(folder), message));
        }
        if let Some(first) = changes.written_again.first() {
            crate::say(format!(
                "note: {} input files were written again since the run began, and look the same: {}, ...",
                changes.written_again.len(),
                first.display()
            ));
        }
        if now == before { Ok(()) } else { now.save(folder) }
    }

    /// Trains the folds as one of several processes that do so together, of which the first calls
    /// [`Run::train`].
    pub fn follow(&self, folder: &Path, interrupted: &AtomicBool, ranks: &Ranks) -> Result<()> {
        for part in &self.parts {
            let files = folder::fold_folder(folder, part.fold);
            let mut observer = Interruptible(interrupted);
            if ranks.tell("")? == DONE {
                continue;
            }
            let outcome = match self.storage {
                Storage::F32 => self.train_fold::<f32>(part, &files, &mut observer, Some(ranks)),
                Storage::Bf16 => self.train_fold::<bf16>(part, &files, &mut observer, Some(ranks)),
            };
            if outcome? == Outcome::Stopped {
                return Err(Error::Interrupted("stopped".into()));
            }
        }
        Ok(())
    }

    /// Trains the folds, from the beginning or from where the folder's checkpoints are.
    /// `interrupted` asks for a stop after the slide in hand; `ranks` are the processes that train
    /// together, of which this is the first.
    pub fn train(&self, folder: &Path, interrupted: &AtomicBool, ranks: Option<&Ranks>) -> Result<()> {
        let begun = |fold| FoldTrainer::checkpoint_path(&folder::fold_folder(folder, fold)).exists();
        let begun = self.config.fold_numbers().any(begun);
        let mut locks = Vec::new();
        for part in &self.parts {
            let files = folder::fold_folder(folder, part.fold);
            std::fs::create_dir_all(&files).map_err(|e| Error::file(&files, format!("cannot be made: {e}")))?;
            locks.push(lock_fold(&files)?);
            remove_leftovers(&files, &[])?;
            FoldTrainer::check(&self.config, &self.dataset, &part.bins, &part.slides, &files)?;
            FoldTrainer::check_model(&files)?;
        }
        if begun {
            self.check_inputs(folder)?;
        }
        for part in &self.parts {
            trim_metrics(folder, part.fold)?;
        }
        let notes = self.notes();
        let mut display = Display::new(folder, &self.config, &self.dataset, &self.parts, &notes, interrupted)?;
        for part in &self.parts {
            let files = folder::fold_folder(folder, part.fold);
            let done = FoldTrainer::progress(&files)?.finished;
            if let Some(ranks) = ranks {
                ranks.tell(if done { DONE } else { "" })?;
            }
            if done {
                continue;
            }
            let events = match self.config.tensorboard {
                true => Some(Events::begin(folder, part.fold, FoldTrainer::progress(&files)?.epochs)?),
                false => None,
            };
            let mut log = Log { path: folder::metrics_path(folder, part.fold), events, display: &mut display };
            let outcome = match self.storage {
                Storage::F32 => self.train_fold::<f32>(part, &files, &mut log, ranks),
                Storage::Bf16 => self.train_fold::<bf16>(part, &files, &mut log, ranks),
            };
            let outcome = outcome.inspect_err(|error| allow_mending(folder, error));
            if outcome? == Outcome::Stopped {
                display.finish();
                let fold = self.fold.map_or(String::new(), |fold| format!(" --fold {fold}"));
                return Err(Error::Interrupted(format!(
                    "stopped; go on with: cf-train --resume {}{fold}",
                    crate::quote(&folder.display().to_string())
                )));
            }
        }
        display.finish();
        Ok(())
    }

    fn train_fold<T: Element<Sum = f32>>(
        &self,
        part: &Part,
        files: &Path,
        observer: &mut dyn Observer,
        ranks: Option<&Ranks>,
    ) -> Result<Outcome> {
        let (config, slides, plans) = (&self.config, (part.fold, &part.slides), self.plans.clone());
        let mut trainer = FoldTrainer::<T>::planned(config, &self.dataset, &part.bins, slides, files, plans, ranks)?;
        if let Some(ranks) = ranks {
            ranks.wait(); // all have read the checkpoint that the first is about to replace
        }
        trainer.run(observer)
    }
}

/// An error if no epoch of fold `i` would update the weights: the published rule updates them after
/// every `grad_accum_steps`-th slide of an epoch.
fn check_updates(config: &RunConfig, i: usize, slides: usize) -> Result<()> {
    let steps = config.grad_accum_steps;
    if config.loss_fn == Loss::CoxSurv || steps <= slides {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "--grad-accum-steps {steps}: fold {i} trains on {slides} slides, so that no epoch would update the weights; \
         expected at most {slides}"
    )))
}

/// After a feature file could not be read, another version of it may take its place.
fn allow_mending(run: &Path, error: &Error) {
    let Error::File { path, .. } = error else { return };
    let _lock = lock_run(run);
    if let Ok(Some(mut inputs)) = Inputs::load(run)
        && inputs.may_be_mended(path)
    {
        // a run whose folder cannot be written has said so already
        let _ = inputs.save(run);
    }
}

/// A fold that needs no training any more, as the first rank tells the others.
const DONE: &str = "done";

/// Asks for a stop when the process is interrupted.
struct Interruptible<'a>(&'a AtomicBool);

impl Observer for Interruptible<'_> {
    fn slide(&mut self, _: &SlideDone) -> ControlFlow<()> {
        if self.0.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// Appends each epoch to the fold's `metrics.jsonl` and the event file, if there is one, and passes on to the
/// display.
struct Log<'a, 'b> {
    path: PathBuf,
    events: Option<Events>,
    display: &'a mut Display<'b>,
}

impl Observer for Log<'_, '_> {
    fn slide(&mut self, done: &SlideDone) -> ControlFlow<()> {
        self.display.slide(done);
        Interruptible(self.display.interrupted).slide(done)
    }

    fn epoch(&mut self, metrics: &EpochMetrics, best: Option<Best>) -> Result<()> {
        let failed = |e: std::io::Error| Error::file(&self.path, format!("cannot be written: {e}"));
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(&self.path).map_err(failed)?;
        file.write_all(line(metrics).as_bytes()).and_then(|()| file.sync_data()).map_err(failed)?;
        if let Some(events) = &mut self.events {
            events.epoch(metrics, best)?;
        }
        self.display.epoch(metrics);
        Ok(())
    }
}
