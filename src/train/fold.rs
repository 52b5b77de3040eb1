//! Training one fold, slide by slide, so that it can stop and go on anywhere.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Instant,
};

use serde::{Deserialize, Serialize};

use super::{
    checkpoint::{self, ModelCard, Origin, Seen},
    config::RunConfig,
    cox::{self, Unit},
    plan::{Planner, Plans},
    ranks::Ranks,
    step::{Engine, Pending, PendingLogits},
};
use crate::{
    Error, Result,
    data::{
        dataset::{Dataset, Fold, Reading, SlideFeatures},
        labels::Bins,
        sampler::Sampler,
    },
    device::{Device, Element},
    folder::{Best, EpochMetrics},
    loss::{CoxBatch, Loss, Prediction, Target},
    model::Bags,
    ops::{Draw, head::SlideLoss},
    survival::concordance_index,
};

/// What an interrupted fold needs besides the engine's arenas.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Progress {
    pub epoch: usize,
    /// Slides of this epoch that are done: whole batches of them with the Cox loss.
    pub position: usize,
    pub updates: u64,
    /// Sum of this epoch's losses so far (log-likelihoods with the Cox loss), and each slide's
    /// risk, in the order shown.
    pub loss_sum: f64,
    pub risks: Vec<f64>,
    /// With the Cox loss: events of the batches so far, and batches in which nobody could be
    /// compared.
    #[serde(default)]
    pub events: usize,
    #[serde(default)]
    pub batches_without_update: usize,
    best: Option<Best>,
    finished: bool,
}

/// What a checkpoint says beside its arenas.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    origin: Origin,
    progress: Progress,
}

/// How far a fold's checkpoint has come.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Done {
    /// Epochs that it has seen to their end.
    pub epochs: usize,
    /// Whether that was all.
    pub finished: bool,
    /// None where no epoch could be chosen, so far.
    pub best: Option<Best>,
}

/// What a slide's pass came to, for progress displays.
#[derive(Clone, Copy, Debug)]
pub struct SlideDone {
    /// The fold's number.
    pub fold: usize,
    /// Counted from 0.
    pub epoch: usize,
    /// Slides done in this epoch's training or validation, this one included. Training with the Cox
    /// loss goes twice over each and counts both.
    pub position: usize,
    /// What `position` comes to at the end.
    pub slides: usize,
    /// Whether the pass was one of validation.
    pub validating: bool,
    /// Mean loss of the epoch so far; absent where there is none yet.
    pub loss: Option<f64>,
    /// Of the slide, at all scales.
    pub patches: usize,
}

/// Is told what happens; may ask for a stop after any slide.
pub trait Observer {
    /// After a slide's pass, of training or validation; a break asks for a stop.
    fn slide(&mut self, _done: &SlideDone) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    /// After an epoch and before its checkpoint, with the best epoch so far; an error ends the
    /// training.
    fn epoch(&mut self, _metrics: &EpochMetrics, _best: Option<Best>) -> Result<()> {
        Ok(())
    }
}

/// Trains one fold; `T` is how activations and weights are stored.
pub struct FoldTrainer<'a, T: Element = f32> {
    pub(super) config: &'a RunConfig,
    pub(super) dataset: &'a Dataset,
    pub(super) fold: usize,
    /// The processes that train it together, if there are several.
    pub(super) ranks: Option<&'a Ranks>,
    slides: Fold,
    pub(super) bins: Bins,
    sampler: Sampler,
    /// With the Cox loss.
    cox: Option<Cox>,
    /// The fold's part of the run folder.
    folder: PathBuf,
    pub(super) engine: Engine<T>,
    pub(super) reading: Reading,
    origin: Origin,
    pub(super) progress: Progress,
}

/// Slides or patients to train on, and the validation slides as one cohort.
struct Cox {
    units: Vec<Unit>,
    validation: CoxBatch,
}

/// Whether a fold came to its end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// The fold is trained to its end: the last epoch, or early stopping.
    Finished,
    /// The observer asked for a stop; the fold goes on from its checkpoint.
    Stopped,
}

impl FoldTrainer<'_> {
    /// Where all that the fold needs to go on lies in its folder.
    pub fn checkpoint_path(folder: &Path) -> PathBuf {
        folder.join("checkpoint.safetensors")
    }

    /// Where the fold's model lies in its folder: of the best epoch, or of the last where none
    /// could be chosen.
    pub fn best_path(folder: &Path) -> PathBuf {
        folder.join("best.safetensors")
    }

    /// How far the fold in this folder has come; nothing is done where there is no checkpoint.
    pub fn progress(folder: &Path) -> Result<Done> {
        let record = checkpoint::read_state::<Record>(&Self::checkpoint_path(folder))?;
        Ok(record.map_or(Done::default(), |Record { progress, .. }| Done {
            epochs: progress.epoch,
            finished: progress.finished,
            best: progress.best,
        }))
    }

    /// An error if the fold's checkpoint, if any, was written by other settings than these.
    pub fn check_settings(config: &RunConfig, folder: &Path) -> Result<()> {
        let path = Self::checkpoint_path(folder);
        let record = checkpoint::read_state::<Record>(&path)?;
        record.map_or(Ok(()), |record| record.origin.check_settings(&path, config))
    }

    /// An error if the fold has chosen a model, or is trained to its end, and the model is gone or
    /// damaged.
    pub fn check_model(folder: &Path) -> Result<()> {
        let (path, progress) = (Self::best_path(folder), Self::progress(folder)?);
        if !progress.finished && progress.best.is_none() {
            return Ok(());
        }
        if path.is_file() {
            return checkpoint::read_card(&path).map(drop);
        }
        let message = "is gone, though its fold has chosen it; put it back, or remove the fold's folder and train it \
                       again with cf-train --resume";
        Err(Error::file(path, message))
    }

    /// An error if the fold's checkpoint, if any, was written with other settings or for other
    /// slides than these.
    pub fn check(config: &RunConfig, dataset: &Dataset, bins: &Bins, slides: &Fold, folder: &Path) -> Result<()> {
        let path = Self::checkpoint_path(folder);
        let record = checkpoint::read_state::<Record>(&path)?;
        let now = Origin::new(config, fingerprint(dataset, bins, slides));
        record.map_or(Ok(()), |record| record.origin.check(&path, &now))
    }
}

impl<'a, T: Element<Sum = f32>> FoldTrainer<'a, T> {
    /// A fold from its start, or from its checkpoint if there is one in `folder`.
    pub fn new(
        config: &'a RunConfig,
        dataset: &'a Dataset,
        bins: &Bins,
        slides: (usize, &Fold),
        folder: &Path,
    ) -> Result<Self> {
        Self::planned(config, dataset, bins, slides, folder, Plans::default(), None)
    }

    /// The same, with plans that the run's other folds have made, and by several processes.
    pub(super) fn planned(
        config: &'a RunConfig,
        dataset: &'a Dataset,
        bins: &Bins,
        (fold, slides): (usize, &Fold),
        folder: &Path,
        plans: Plans,
        ranks: Option<&'a Ranks>,
    ) -> Result<Self> {
        let device = Device::from_name(&config.device, config.threads)?;
        let mut engine =
            Engine::new(device, &config.model_config(dataset.features), config.seed.wrapping_add(fold as u64))?;
        let path = FoldTrainer::checkpoint_path(folder);
        let origin = Origin::new(config, fingerprint(dataset, bins, slides));
        let mut progress = Progress::default();
        if let Some(record) = checkpoint::read_state::<Record>(&path)? {
            record.origin.check(&path, &origin)?;
            progress = record.progress;
            if !progress.finished {
                checkpoint::load_state(&path, &mut engine)?;
            }
        }
        engine.updates = progress.updates;
        engine.set_memory_planned(config.memory(), plans);
        let reading = reading(engine.planner(), config, dataset, slides)?;
        engine.reserve(slides.train.iter().map(|&slide| dataset.sizes[slide]), true)?;
        engine.reserve(slides.val.iter().map(|&slide| dataset.sizes[slide]), false)?;
        let mut slides = slides.clone();
        let mut cox = None;
        if config.loss_fn == Loss::CoxSurv {
            cox::check(config, dataset, (fold, &slides))?;
            let [units, validation] =
                [&slides.train, &slides.val].map(|side| cox::units(config.cox_unit, dataset, side));
            let (units, validation) = (units?, validation?);
            slides.val = validation.concat(); // a patient's slides side by side
            cox = Some(Cox { units, validation: cox::cohort(dataset, &validation, config.cox_ties)? });
        }
        let strata: Vec<_> = slides.train.iter().map(|&i| bins.stratum(&dataset.slides[i])).collect();
        Ok(Self {
            config,
            dataset,
            fold,
            ranks,
            bins: bins.clone(),
            sampler: Sampler::new(&strata),
            slides,
            cox,
            folder: folder.to_path_buf(),
            engine,
            reading,
            origin,
            progress,
        })
    }

    /// Trains until early stopping, the last epoch, or the observer's word.
    pub fn run(&mut self, observer: &mut dyn Observer) -> Result<Outcome> {
        while !self.progress.finished {
            if self.epoch(observer)?.is_break() {
                return Ok(Outcome::Stopped);
            }
        }
        Ok(Outcome::Finished)
    }

    /// One epoch: training, validation, the best model, a line of metrics, a checkpoint.
    fn epoch(&mut self, observer: &mut dyn Observer) -> Result<ControlFlow<()>> {
        let start = Instant::now();
        let epoch = self.progress.epoch;
        let mut patches = 0;
        let (seed, fold) = (self.config.seed, self.fold);
        let (order, stopped) = if let Some(cox) = &self.cox {
            let batches = cox::batches(&cox.units, self.config.cox_batch, seed, fold, epoch);
            let order: Vec<usize> = batches.iter().flatten().flatten().copied().collect();
            (order, self.train_cox(&batches, &mut patches, observer)?)
        } else {
            let draws = self.sampler.epoch(seed, fold, epoch);
            let order: Vec<usize> = draws.into_iter().map(|i| self.slides.train[i]).collect();
            let stopped = self.train(&order, &mut patches, observer)?;
            (order, stopped)
        };
        if stopped.is_break() {
            self.checkpoint()?;
            return Ok(ControlFlow::Break(()));
        }
        let train_loss = self.train_loss().unwrap_or_default();
        let train_c_index = self.c_index(&order, &self.progress.risks);
        let Some((val_loss, val_c_index)) = self.validate(&mut patches, observer)? else {
            self.checkpoint()?;
            return Ok(ControlFlow::Break(()));
        };

        let better = |c: f64| self.progress.best.is_none_or(|best| c > best.c_index);
        let best = epoch >= self.config.warmup_epochs && val_c_index.is_some_and(better);
        if best {
            self.progress.best = val_c_index.map(|c_index| Best { epoch, c_index });
            self.save_model(epoch, val_c_index)?;
        }
        // patience begins with the first epoch that may be the best
        let since = self.progress.best.map_or(self.config.warmup_epochs, |best| best.epoch + 1);
        let without_better = (epoch + 1).saturating_sub(since);
        let last = epoch + 1 == self.config.num_epochs || without_better >= self.config.es_patience;
        if last && self.progress.best.is_none() {
            self.save_model(epoch, val_c_index)?; // too short a run, or no comparable pair: the last epoch's model
        }
        let seconds = start.elapsed().as_secs_f64();
        let metrics = EpochMetrics {
            fold: self.fold,
            epoch,
            learning_rate: self.config.adam(epoch).learning_rate,
            train_loss,
            train_c_index,
            val_loss,
            val_c_index,
            best,
            batches_without_update: self.progress.batches_without_update,
            seconds,
            patches_per_second: patches as f64 / seconds,
        };
        observer.epoch(&metrics, self.progress.best)?;
        let (best, updates) = (self.progress.best, self.progress.updates);
        self.progress = Progress { epoch: epoch + 1, updates, best, finished: last, ..Progress::default() };
        self.checkpoint()?;
        Ok(ControlFlow::Continue(()))
    }

    /// Mean loss of the epoch so far: over slides, or events with the Cox loss.
    pub(super) fn train_loss(&self) -> Option<f64> {
        let terms = if self.cox.is_some() { self.progress.events } else { self.progress.position };
        (terms > 0).then(|| self.progress.loss_sum / terms as f64)
    }

    /// The slides of an epoch that are not done yet.
    fn train(&mut self, order: &[usize], patches: &mut usize, observer: &mut dyn Observer) -> Result<ControlFlow<()>> {
        if let Some(ranks) = self.ranks {
            return self.train_together(ranks, order, patches, observer);
        }
        let (dataset, config, epoch) = (self.dataset, self.config, self.progress.epoch);
        let mut stopped = ControlFlow::Continue(());
        let (mut started, mut queue) = (self.progress.position, self.engine.queue());
        let reading = self.reading.clone();
        dataset.for_each(&order[started..], &reading, |slide, bag: SlideFeatures<T>| {
            let draw = self.draw(epoch * order.len() + started);
            let target = dataset.target(&self.bins, slide);
            let loss = train_slide(&mut self.engine, config, bag.bags()?, target, draw, epoch, started)?;
            started += 1;
            // a checkpoint is of slides that are done
            let saves = started.is_multiple_of(config.checkpoint_every);
            let mut ended = Vec::from_iter(queue.push((slide, loss)));
            if saves {
                ended.extend(queue.rest());
            }
            for (slide, loss) in ended {
                if self.done(slide, loss, order.len(), patches, observer)?.is_break() {
                    stopped = ControlFlow::Break(());
                }
            }
            if saves && stopped.is_continue() {
                self.checkpoint()?;
            }
            Ok(stopped.is_continue())
        })?;
        for (slide, loss) in queue.rest() {
            if self.done(slide, loss, order.len(), patches, observer)?.is_break() {
                stopped = ControlFlow::Break(());
            }
        }
        Ok(stopped)
    }

    /// The dropout of a fold's `step`-th slide, or of its batches' slides.
    pub(super) fn draw(&self, step: usize) -> Option<Draw> {
        Some(Draw { seed: self.config.seed ^ (self.fold as u64) << 32, step: step as u32 })
    }

    /// Waits for a slide's loss and takes it down.
    fn done(
        &mut self,
        slide: usize,
        loss: Pending,
        slides: usize,
        patches: &mut usize,
        observer: &mut dyn Observer,
    ) -> Result<ControlFlow<()>> {
        let (dataset, fold, epoch) = (self.dataset, self.fold, self.progress.epoch);
        let (loss, risk) = self.engine.finish(loss)?;
        Self::check_finite(dataset, (fold, epoch), slide, risk)?;
        self.progress.updates = self.engine.updates;
        self.progress.position += 1;
        self.progress.loss_sum += loss;
        self.progress.risks.push(risk);
        let done = SlideDone {
            fold,
            epoch,
            position: self.progress.position,
            slides,
            validating: false,
            loss: self.train_loss(),
            patches: dataset.sizes[slide].total(),
        };
        *patches += done.patches;
        Ok(observer.slide(&done))
    }

    /// Mean loss (alpha = 0; with the Cox loss, that of one cohort) and C-index of the fold's
    /// validation slides, without dropout. None if stopped; a resumed run validates anew.
    fn validate(&mut self, patches: &mut usize, observer: &mut dyn Observer) -> Result<Option<(f64, Option<f64>)>> {
        let (dataset, order) = (self.dataset, self.slides.val.clone());
        let mut together = None;
        if let Some(ranks) = self.ranks {
            together = self.predict_together(ranks, &order, observer)?;
            if together.is_none() {
                return Ok(None);
            }
        }
        let (mut loss_sum, mut risks) = (0.0, Vec::new());
        let (fold, epoch) = (self.fold, self.progress.epoch);
        let mut take = |slide: usize, logits: &[f64]| {
            loss_sum += self.config.loss_fn.evaluate(logits, dataset.target(&self.bins, slide), 0.0).0;
            let risk = Prediction::from_logits(logits).risk;
            Self::check_finite(dataset, (fold, epoch), slide, risk)?;
            risks.push(risk);
            let done = SlideDone {
                fold,
                epoch,
                position: risks.len(),
                slides: order.len(),
                validating: true,
                loss: self.cox.is_none().then_some(loss_sum / risks.len() as f64),
                patches: dataset.sizes[slide].total(),
            };
            *patches += done.patches;
            Ok::<_, Error>(done)
        };
        if let Some(logits) = together {
            let logits = logits.chunks_exact(self.config.n_classes);
            order.iter().zip(logits).try_for_each(|(&slide, logits)| take(slide, logits).map(drop))?;
        } else {
            let (mut queue, mut stopped) = (self.engine.queue(), ControlFlow::Continue(()));
            let mut finish = |engine: &Engine<T>, (slide, logits): (usize, PendingLogits)| {
                Ok::<_, Error>(observer.slide(&take(slide, &engine.finish_logits(logits)?)?))
            };
            dataset.for_each(&order, &self.reading, |slide, bag: SlideFeatures<T>| {
                if let Some(before) = queue.push((slide, self.engine.start(bag.bags()?, None)?)) {
                    stopped = finish(&self.engine, before)?;
                }
                Ok(stopped.is_continue())
            })?;
            for last in queue.rest() {
                if stopped.is_continue() {
                    stopped = finish(&self.engine, last)?;
                }
            }
            if stopped.is_break() {
                return Ok(None);
            }
        }
        let loss = match &self.cox {
            Some(cox) => cox.validation.evaluate(&risks)?.0,
            None => loss_sum / order.len() as f64,
        };
        Ok(Some((loss, self.c_index(&order, &risks))))
    }

    /// Training that has diverged ends here: the loss, which is clamped, would not show it.
    pub(super) fn check_finite(
        dataset: &Dataset,
        (fold, epoch): (usize, usize),
        slide: usize,
        risk: f64,
    ) -> Result<()> {
        if risk.is_finite() {
            return Ok(());
        }
        let (epoch, slide) = (epoch + 1, &dataset.slides[slide].slide_id);
        let reason = format!(
            "it is {risk} for slide `{slide}` in epoch {epoch} of fold {fold}; a lower --learning-rate may help"
        );
        Err(Error::Statistic { statistic: "the risk", reason })
    }

    fn c_index(&self, order: &[usize], risks: &[f64]) -> Option<f64> {
        let slides = order.iter().map(|&i| &self.dataset.slides[i]);
        let (time, event): (Vec<_>, Vec<_>) = slides.map(|slide| (slide.months, !slide.censored)).unzip();
        concordance_index(&time, &event, risks).ok().map(|c| c.index)
    }

    /// Of several processes the first writes, for all.
    fn writes(&self) -> bool {
        self.ranks.is_none_or(|ranks| ranks.number() == 0)
    }

    fn save_model(&self, epoch: usize, c_index: Option<f64>) -> Result<()> {
        if !self.writes() {
            return Ok(());
        }
        let card = ModelCard {
            model: self.engine.model().config().clone(),
            fold: self.fold,
            epoch,
            c_index,
            bin_edges: self.bins.edges.clone(),
            trained_on: self.seen(&self.slides.train),
            chosen_on: self.seen(&self.slides.val),
        };
        checkpoint::save_model(&FoldTrainer::best_path(&self.folder), &self.engine, &card)
    }

    fn seen(&self, slides: &[usize]) -> Seen {
        Seen::new(slides.iter().map(|&slide| &self.dataset.slides[slide]))
    }

    pub(super) fn checkpoint(&self) -> Result<()> {
        if !self.writes() {
            return Ok(());
        }
        let engine = (!self.progress.finished).then_some(&self.engine);
        let record = Record { origin: self.origin.clone(), progress: self.progress.clone() };
        checkpoint::save_state(&FoldTrainer::checkpoint_path(&self.folder), engine, &record)
    }
}

/// One slide of training: forward, loss, backward, and an update after every `grad_accum_steps`-th
/// slide of the epoch. Gradients left at an epoch's end carry into the next epoch's first update,
/// as published.
pub fn train_slide<T: Element<Sum = f32>>(
    engine: &mut Engine<T>,
    config: &RunConfig,
    bags: Bags<'_, T>,
    target: Target,
    draw: Option<Draw>,
    epoch: usize,
    position: usize,
) -> Result<Pending> {
    let share = 1.0 / config.grad_accum_steps as f64;
    let loss = SlideLoss { loss: config.loss_fn, target, alpha: config.alpha_surv, share };
    let loss = engine.accumulate_loss(bags, draw, &loss)?;
    if (position + 1).is_multiple_of(config.grad_accum_steps) {
        engine.update(&config.adam(epoch))?;
    }
    Ok(loss)
}

/// FNV-1a (64 bit) of what a fold shows: its slides in order, their outcomes and patches, and the
/// bins.
fn fingerprint(dataset: &Dataset, bins: &Bins, fold: &Fold) -> u64 {
    let mut text = format!("{} {} {:?}", dataset.features, fold.train.len(), bins.edges);
    for &i in fold.train.iter().chain(&fold.val) {
        let (slide, sizes) = (&dataset.slides[i], dataset.sizes[i]);
        let outcome = (slide.months.to_bits(), slide.censored);
        text += &format!("\n{} {outcome:?}", slide.slide_id);
        sizes.values().for_each(|patches| text += &format!(" {patches}"));
    }
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3))
}

/// How the slides of a fold are read; an error if one of them does not fit the memory budget.
pub(super) fn reading<T: Element<Sum = f32>>(
    planner: &Planner<T>,
    config: &RunConfig,
    dataset: &Dataset,
    fold: &Fold,
) -> Result<Reading> {
    let slides = fold.train.iter().map(|&slide| (slide, true)).chain(fold.val.iter().map(|&slide| (slide, false)));
    planner.reading(dataset, &slides.collect::<Vec<_>>(), config.prefetch_factor)
}
