//! Cox training. The loss compares slides, so a batch's gradient needs the risks of all of them
//! before the first slide's backward pass. In the memory of one slide: each slide forward, keeping
//! its logits; the loss and its derivative in each risk; each slide forward again with the same
//! dropout, and backward with its own derivative. By the chain rule the sum is the batch's
//! gradient, exactly.

use std::{
    fmt::{Display, Formatter},
    ops::ControlFlow,
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use super::{
    config::RunConfig,
    fold::{FoldTrainer, Observer, SlideDone},
    step::Engine,
};
use crate::{
    Error, Result,
    data::{
        dataset::{Dataset, Fold, SlideFeatures},
        sampler::shuffled,
    },
    device::Element,
    loss::{CoxBatch, Prediction},
    model::Bags,
    ops::Draw,
    survival::Ties,
};

/// Whose risks are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CoxUnit {
    /// Every slide counts as one.
    Slide,
    /// A patient's risk is the mean of the slides' risks.
    Patient,
}

/// Slides, or patients, of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub enum BatchSize {
    /// All of a fold's, in one batch an epoch.
    All,
    /// So many at most; 2 or more.
    AtMost(usize),
}

/// In a file of settings: `cox_batch = "all"`, `cox_batch = 64`.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Number(usize),
    Word(String),
}

impl TryFrom<Written> for BatchSize {
    type Error = String;

    fn try_from(written: Written) -> std::result::Result<Self, String> {
        match written {
            Written::Number(n) => Ok(Self::AtMost(n)),
            Written::Word(word) => word.parse(),
        }
    }
}

impl From<BatchSize> for Written {
    fn from(size: BatchSize) -> Self {
        match size {
            BatchSize::All => Self::Word("all".into()),
            BatchSize::AtMost(n) => Self::Number(n),
        }
    }
}

impl FromStr for BatchSize {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "all" => Ok(Self::All),
            number => number.parse().map(Self::AtMost).map_err(|_| format!("`{number}`, expected a number or `all`")),
        }
    }
}

impl Display for BatchSize {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::AtMost(n) => n.fmt(f),
        }
    }
}

/// A slide, or a patient's slides, as indices into the dataset.
pub type Unit = Vec<usize>;

/// The units of these slides, in the order of their first slides. A patient whose slides differ in
/// outcome is an error.
pub fn units(unit: CoxUnit, dataset: &Dataset, slides: &[usize]) -> Result<Vec<Unit>> {
    if unit == CoxUnit::Slide {
        return Ok(slides.iter().map(|&slide| vec![slide]).collect());
    }
    let mut units: Vec<Unit> = Vec::new();
    let mut of_case = std::collections::HashMap::new();
    for &slide in slides {
        let this = &dataset.slides[slide];
        let unit = *of_case.entry(&this.case_id).or_insert(units.len());
        match units.get_mut(unit) {
            None => units.push(vec![slide]),
            Some(unit) => {
                let first = &dataset.slides[unit[0]];
                if (first.months, first.censored) != (this.months, this.censored) {
                    let (case, a, b) = (&this.case_id, &first.slide_id, &this.slide_id);
                    return Err(Error::Usage(format!(
                        "--cox-unit patient: case `{case}` has one outcome at slide `{a}` and another at slide `{b}`"
                    )));
                }
                unit.push(slide);
            }
        }
    }
    Ok(units)
}

/// Their outcomes, as the loss takes them.
pub fn cohort(dataset: &Dataset, units: &[Unit], ties: Ties) -> Result<CoxBatch> {
    let first = units.iter().map(|unit| &dataset.slides[unit[0]]);
    let (time, event): (Vec<f64>, Vec<bool>) = first.map(|slide| (slide.months, !slide.censored)).unzip();
    CoxBatch::new(units.iter().map(Vec::len).collect(), &time, &event, ties)
}

/// The batches of an epoch: every unit once, in an order of the epoch's, in as few batches as the
/// size allows, which are equally large but for one unit.
pub fn batches(units: &[Unit], size: BatchSize, seed: u64, fold: usize, epoch: usize) -> Vec<Vec<Unit>> {
    let n = units.len();
    let count = match size {
        BatchSize::All => 1,
        BatchSize::AtMost(most) => n.div_ceil(most),
    };
    let order = shuffled(n, seed, fold, epoch);
    let batch = |i: usize| order[i * n / count..(i + 1) * n / count].iter().map(|&unit| units[unit].clone()).collect();
    (0..count).map(batch).collect()
}

/// An error if there is nobody to compare in fold `i`'s slides, on either side, or in any batch of
/// an epoch, which then would not update the weights.
pub fn check(config: &RunConfig, dataset: &Dataset, (i, fold): (usize, &Fold)) -> Result<()> {
    for (side, slides) in [("training", &fold.train), ("validation", &fold.val)] {
        let units = units(config.cox_unit, dataset, slides)?;
        if !cohort(dataset, &units, config.cox_ties)?.is_comparable() {
            let reason = format!(
                "none of the {} {side} slides of fold {i} has an event at which another is still at risk",
                slides.len()
            );
            return Err(Error::Statistic { statistic: "the Cox loss", reason });
        }
    }
    let units = units(config.cox_unit, dataset, &fold.train)?;
    for epoch in 0..config.num_epochs {
        let batches = batches(&units, config.cox_batch, config.seed, i, epoch);
        let comparable = |batch: &Vec<Unit>| Ok(cohort(dataset, batch, config.cox_ties)?.is_comparable());
        if !batches.iter().map(comparable).collect::<Result<Vec<_>>>()?.contains(&true) {
            let reason = format!(
                "no batch of epoch {} of fold {i} has an event at which another is still at risk; --cox-batch {} is too \
                 small",
                epoch + 1,
                config.cox_batch
            );
            return Err(Error::Statistic { statistic: "the Cox loss", reason });
        }
    }
    Ok(())
}

/// Takes the `i`-th slide of a batch.
pub type Work<'a, T> = dyn FnMut(usize, Bags<'_, T>) -> Result<()> + 'a;

/// Adds the gradient of a batch's loss, and returns the loss and the slides' risks; None if `show`
/// stopped, when the gradients are those of some of the slides. `show` hands each slide of the
/// batch to the work, in order, and is called twice; once where nobody can be compared, the loss is
/// 0 and there is no gradient. `draw` is each slide's dropout, and `check` an error unless its risk
/// will do.
pub fn accumulate<T: Element>(
    engine: &mut Engine<T>,
    batch: &CoxBatch,
    draw: impl Fn(usize) -> Option<Draw>,
    check: impl Fn(usize, f64) -> Result<()>,
    mut show: impl FnMut(&mut Work<'_, T>) -> Result<ControlFlow<()>>,
) -> Result<Option<(f64, Vec<f64>)>> {
    let (mut predictions, mut queue) = (Vec::new(), engine.queue());
    let mut predicted = |engine: &Engine<T>, (i, logits)| {
        let prediction = Prediction::from_logits(&engine.finish_logits(logits)?);
        check(i, prediction.risk)?;
        predictions.push(prediction);
        Ok::<_, Error>(())
    };
    let stopped = show(&mut |i, bags| match queue.push((i, engine.start(bags, draw(i))?)) {
        Some(before) => predicted(engine, before),
        None => Ok(()),
    })?;
    if stopped.is_break() {
        return Ok(None);
    }
    queue.rest().try_for_each(|last| predicted(engine, last))?;
    let risks: Vec<f64> = predictions.iter().map(|prediction| prediction.risk).collect();
    if !batch.is_comparable() {
        return Ok(Some((0.0, risks)));
    }
    let (loss, drisks) = batch.evaluate(&risks)?;
    // the same draw gives the same logits, and so their gradients are known
    let stopped = show(&mut |i, bags| {
        let dlogits: Vec<f64> = predictions[i].risk_gradient().into_iter().map(|g| g * drisks[i]).collect();
        engine.accumulate_known(bags, draw(i), &dlogits)
    })?;
    Ok(stopped.is_continue().then_some((loss, risks)))
}

impl<T: Element<Sum = f32>> FoldTrainer<'_, T> {
    /// The batches of an epoch that are not done yet, each with an update. A stop discards the
    /// batch in hand, which is done anew.
    pub(super) fn train_cox(
        &mut self,
        batches: &[Vec<Unit>],
        patches: &mut usize,
        observer: &mut dyn Observer,
    ) -> Result<ControlFlow<()>> {
        let (dataset, config, epoch) = (self.dataset, self.config, self.progress.epoch);
        let total: usize = batches.iter().flatten().map(Vec::len).sum();
        let mut start = 0;
        for batch in batches {
            let (first, end) = (start, start + batch.iter().map(Vec::len).sum::<usize>());
            start = end;
            if first < self.progress.position {
                continue;
            }
            let cohort = cohort(dataset, batch, config.cox_ties)?;
            let accumulated = match self.ranks {
                Some(ranks) => self.accumulate_cox_together(ranks, batch, (first, total), patches, observer)?,
                None => self.accumulate_cox(batch, &cohort, (first, total), patches, observer)?,
            };
            let Some((loss, risks)) = accumulated else {
                self.engine.take_grads()?;
                return Ok(ControlFlow::Break(()));
            };
            if cohort.is_comparable() {
                self.engine.update(&config.adam(epoch))?;
                self.progress.updates = self.engine.updates;
                self.progress.loss_sum += loss * cohort.events() as f64;
                self.progress.events += cohort.events();
            } else {
                self.progress.batches_without_update += 1;
            }
            self.progress.position = end;
            self.progress.risks.extend(risks);
            if end / config.checkpoint_every > first / config.checkpoint_every {
                self.checkpoint()?;
            }
        }
        Ok(ControlFlow::Continue(()))
    }
    /// The batch whose first slide is the `first` of the epoch's `total`.
    fn accumulate_cox(
        &mut self,
        batch: &[Unit],
        cohort: &CoxBatch,
        (first, total): (usize, usize),
        patches: &mut usize,
        observer: &mut dyn Observer,
    ) -> Result<Option<(f64, Vec<f64>)>> {
        let (dataset, fold, epoch, loss) = (self.dataset, self.fold, self.progress.epoch, self.train_loss());
        let slides = batch.concat();
        let draws: Vec<_> = (0..slides.len()).map(|i| self.draw(epoch * total + first + i)).collect();
        let mut shown = 0;
        let reading = self.reading.clone();
        let show = |work: &mut Work<'_, T>| {
            let (mut i, mut stopped) = (0, ControlFlow::Continue(()));
            dataset.for_each(&slides, &reading, |slide, bag: SlideFeatures<T>| {
                work(i, bag.bags()?)?;
                i += 1;
                shown += 1;
                let done = SlideDone {
                    fold,
                    epoch,
                    position: 2 * first + shown,
                    slides: 2 * total,
                    validating: false,
                    loss,
                    patches: dataset.sizes[slide].total(),
                };
                *patches += done.patches;
                stopped = observer.slide(&done);
                Ok(stopped.is_continue())
            })?;
            Ok(stopped)
        };
        let check = |i: usize, risk| Self::check_finite(dataset, (fold, epoch), slides[i], risk);
        accumulate(&mut self.engine, cohort, |i| draws[i], check, show)
    }
}
