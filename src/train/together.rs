//! A fold that several processes train together ([`super::ranks`]): the slides of an update are
//! shared out by their operations, and their gradients are summed in the order of the slides, as
//! one process sums them.

use std::ops::ControlFlow;

use super::{
    cox::{self, Unit},
    fold::{FoldTrainer, Observer, SlideDone},
    ranks::Ranks,
    step::{Engine, State},
};
use crate::{
    Result, data::dataset::SlideFeatures, device::Element, loss::Prediction, model::Bags, ops::head::SlideLoss,
};

/// Slides whose gradients are held until they are summed, over all ranks.
const HELD: usize = 32;

/// What a rank is to do with its slides, and where they stand.
struct Shared<'a> {
    ranks: &'a Ranks,
    slides: &'a [usize],
    /// Each slide's rank.
    of: Vec<usize>,
    /// Of the first slide, in the epoch's training or validation.
    position: usize,
    /// What the positions come to.
    total: usize,
    validating: bool,
}

impl<T: Element<Sum = f32>> FoldTrainer<'_, T> {
    /// [`FoldTrainer::train`]. A stop, asked of any rank, discards the slides since the last sum of
    /// gradients, which are done anew.
    pub(super) fn train_together(
        &mut self,
        ranks: &Ranks,
        order: &[usize],
        patches: &mut usize,
        observer: &mut dyn Observer,
    ) -> Result<ControlFlow<()>> {
        let (dataset, config, epoch) = (self.dataset, self.config, self.progress.epoch);
        let steps = config.grad_accum_steps;
        while self.progress.position < order.len() {
            let start = self.progress.position;
            let end = order.len().min(start + HELD).min((start / steps + 1) * steps);
            let slides = &order[start..end];
            let targets: Vec<_> = slides.iter().map(|&slide| dataset.target(&self.bins, slide)).collect();
            let draw = |i: usize| self.draw(epoch * order.len() + start + i);
            let draws: Vec<_> = (0..slides.len()).map(draw).collect();
            let pass = |engine: &mut Engine<T>, i: usize, bags: Bags<'_, T>| {
                let share = 1.0 / steps as f64;
                let loss = SlideLoss { loss: config.loss_fn, target: targets[i], alpha: config.alpha_surv, share };
                let pending = engine.accumulate_loss(bags, draws[i], &loss)?;
                let (loss, risk) = engine.finish(pending)?;
                Ok([loss, risk])
            };
            let of = self.share(ranks, slides, true)?;
            let shared = Shared { ranks, slides, of, position: start, total: order.len(), validating: false };
            let Some(results) = self.sum_gradients(&shared, observer, pass)? else {
                return Ok(ControlFlow::Break(()));
            };
            for (&slide, &[loss, risk]) in slides.iter().zip(results.as_chunks().0) {
                Self::check_finite(dataset, (self.fold, epoch), slide, risk)?;
                self.progress.loss_sum += loss;
                self.progress.risks.push(risk);
                *patches += dataset.sizes[slide].total();
            }
            self.progress.position = end;
            if end.is_multiple_of(steps) {
                self.engine.update(&config.adam(epoch))?;
                self.progress.updates = self.engine.updates;
            }
            if end / config.checkpoint_every > start / config.checkpoint_every {
                self.checkpoint()?;
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Logits of slides, without dropout, one slide's behind the other's; None if stopped.
    pub(super) fn predict_together(
        &mut self,
        ranks: &Ranks,
        slides: &[usize],
        observer: &mut dyn Observer,
    ) -> Result<Option<Vec<f64>>> {
        let of = self.share(ranks, slides, false)?;
        let shared = Shared { ranks, slides, of, position: 0, total: slides.len(), validating: true };
        self.logits(&shared, observer, |engine, _, bags| engine.evaluate(bags))
    }

    /// A batch in the Cox loss ([`cox::accumulate`]): its loss and the slides' risks; None if
    /// stopped, when the gradients are those of some of the slides.
    pub(super) fn accumulate_cox_together(
        &mut self,
        ranks: &Ranks,
        batch: &[Unit],
        (first, total): (usize, usize),
        patches: &mut usize,
        observer: &mut dyn Observer,
    ) -> Result<Option<(f64, Vec<f64>)>> {
        let (dataset, config, slides) = (self.dataset, self.config, batch.concat());
        let (fold, epoch) = (self.fold, self.progress.epoch);
        let draws: Vec<_> = (0..slides.len()).map(|i| self.draw(epoch * total + first + i)).collect();
        let of = self.share(ranks, &slides, false)?;
        let shared = Shared { ranks, slides: &slides, of, position: 2 * first, total: 2 * total, validating: false };
        let forward = |engine: &mut Engine<T>, i: usize, bags: Bags<'_, T>| engine.forward(bags, draws[i]);
        let Some(logits) = self.logits(&shared, observer, forward)? else { return Ok(None) };
        let classes = self.engine.model().config().n_classes;
        let predictions: Vec<_> = logits.chunks_exact(classes).map(Prediction::from_logits).collect();
        for (prediction, &slide) in predictions.iter().zip(&slides) {
            Self::check_finite(dataset, (fold, epoch), slide, prediction.risk)?;
            *patches += dataset.sizes[slide].total();
        }
        let risks: Vec<f64> = predictions.iter().map(|prediction| prediction.risk).collect();
        let cohort = cox::cohort(dataset, batch, config.cox_ties)?;
        if !cohort.is_comparable() {
            return Ok(Some((0.0, risks)));
        }
        let (loss, drisks) = cohort.evaluate(&risks)?;
        for start in (0..slides.len()).step_by(HELD) {
            let part = &slides[start..slides.len().min(start + HELD)];
            let pass = |engine: &mut Engine<T>, i: usize, bags: Bags<'_, T>| {
                let i = start + i;
                let gradient = predictions[i].risk_gradient();
                let dlogits: Vec<f64> = gradient.into_iter().map(|g| g * drisks[i]).collect();
                engine.accumulate_known(bags, draws[i], &dlogits)?;
                Ok([])
            };
            let of = self.share(ranks, part, true)?;
            let position = 2 * first + slides.len() + start;
            let shared = Shared { ranks, slides: part, of, position, total: 2 * total, validating: false };
            if self.sum_gradients(&shared, observer, pass)?.is_none() {
                return Ok(None);
            }
        }
        *patches += slides.iter().map(|&slide| dataset.sizes[slide].total()).sum::<usize>();
        Ok(Some((loss, risks)))
    }

    fn share(&self, ranks: &Ranks, slides: &[usize], training: bool) -> Result<Vec<usize>> {
        let cost = |&slide: &usize| {
            let plan = self.engine.plan(self.dataset.sizes[slide].only(self.engine.model().scales()), training)?;
            Ok(if training { plan.step_flop } else { plan.forward_flop })
        };
        Ok(ranks.share(&slides.iter().map(cost).collect::<Result<Vec<_>>>()?))
    }

    /// Adds the slides' gradients to those so far, in the order of the slides, on every rank; `pass`
    /// adds one slide's, by its number, and gives some values of it. Returns these of all slides,
    /// in order; None if stopped, when the gradients are what they were.
    fn sum_gradients<const N: usize>(
        &mut self,
        shared: &Shared<'_>,
        observer: &mut dyn Observer,
        mut pass: impl FnMut(&mut Engine<T>, usize, Bags<'_, T>) -> Result<[f64; N]>,
    ) -> Result<Option<Vec<f64>>> {
        let mut sums = self.engine.take_grads()?;
        let (mut gradients, mut values) = (Vec::new(), Vec::new());
        let stopped = self.each_of_mine(shared, observer, |engine, i, bags| {
            values.extend(pass(engine, i, bags)?);
            gradients.push(engine.take_grads()?);
            Ok(())
        })?;
        if !stopped {
            shared.ranks.add_in_order(&shared.of, &gradients, &mut sums);
        }
        self.engine.write_part(State::Grads, 0, &sums)?;
        Ok((!stopped).then(|| shared.ranks.in_order(&shared.of, &values, N)))
    }

    /// The logits that `pass` gives of each slide, one slide's behind the other's; None if stopped.
    fn logits(
        &mut self,
        shared: &Shared<'_>,
        observer: &mut dyn Observer,
        mut pass: impl FnMut(&mut Engine<T>, usize, Bags<'_, T>) -> Result<Vec<f64>>,
    ) -> Result<Option<Vec<f64>>> {
        let classes = self.engine.model().config().n_classes;
        let mut values = Vec::new();
        let stopped = self.each_of_mine(shared, observer, |engine, i, bags| {
            values.extend(pass(engine, i, bags)?);
            Ok(())
        })?;
        Ok((!stopped).then(|| shared.ranks.in_order(&shared.of, &values, classes)))
    }

    /// Gives this rank's slides to the work, by their numbers. Returns whether any rank's observer
    /// asked for a stop.
    fn each_of_mine(
        &mut self,
        shared: &Shared<'_>,
        observer: &mut dyn Observer,
        mut work: impl FnMut(&mut Engine<T>, usize, Bags<'_, T>) -> Result<()>,
    ) -> Result<bool> {
        let Shared { ranks, slides, ref of, position, total, validating } = *shared;
        let mine: Vec<usize> = (0..slides.len()).filter(|&i| of[i] == ranks.number()).collect();
        let order: Vec<usize> = mine.iter().map(|&i| slides[i]).collect();
        let (dataset, reading, loss) = (self.dataset, self.reading.clone(), self.train_loss());
        let (mut done, mut stopped) = (0, false);
        dataset.for_each(&order, &reading, |slide, bag: SlideFeatures<T>| {
            work(&mut self.engine, mine[done], bag.bags()?)?;
            done += 1;
            // about where all ranks are
            let position = position + slides.len() * done / mine.len();
            let (fold, epoch, patches) = (self.fold, self.progress.epoch, dataset.sizes[slide].total());
            let shown = SlideDone { fold, epoch, position, slides: total, validating, loss, patches };
            stopped = observer.slide(&shown).is_break();
            Ok(!stopped)
        })?;
        Ok(ranks.any(stopped))
    }
}
