//! The Cox loss of a batch of slides: the negative log partial likelihood, divided by the number of
//! events.

use crate::{
    Error, Result,
    survival::{CoxCohort, Ties, risk_sets},
};

/// The outcomes of a batch, sorted for the likelihood. Its units are slides, or patients, whose
/// risk is the mean of their slides' risks.
pub struct CoxBatch {
    /// Slides of each unit; a unit's slides stand side by side in the batch.
    slides: Vec<usize>,
    cohort: CoxCohort,
    ties: Ties,
    comparable: bool,
}

impl CoxBatch {
    /// One entry a unit: its number of slides (at least 1), its months, and whether its event was
    /// seen.
    pub fn new(slides: Vec<usize>, time: &[f64], event: &[bool], ties: Ties) -> Result<Self> {
        let comparable = risk_sets(time, event)?.iter().any(|set| set.events > 0 && set.at_risk > 1);
        Ok(Self { slides, cohort: CoxCohort::new(time, event, None, None)?, ties, comparable })
    }

    /// How many of the batch had an event.
    pub fn events(&self) -> usize {
        self.cohort.events()
    }

    /// Whether anybody else was at risk at the time of an event. Otherwise the loss is 0 whatever
    /// the risks.
    pub fn is_comparable(&self) -> bool {
        self.comparable
    }

    /// The loss and its derivative in each slide's risk. A batch without an event is an error.
    pub fn evaluate(&self, risks: &[f64]) -> Result<(f64, Vec<f64>)> {
        let undefined = |reason: String| Error::Statistic { statistic: "the Cox loss", reason };
        if self.events() == 0 {
            return Err(undefined("no slide has an event".into()));
        }
        if risks.len() != self.slides.iter().sum::<usize>() {
            return Err(undefined(format!("{} risks for {} slides", risks.len(), self.slides.iter().sum::<usize>())));
        }
        let mut rest = risks;
        let mean = |&n: &usize| {
            let own;
            (own, rest) = rest.split_at(n);
            own.iter().sum::<f64>() / n as f64
        };
        let of_units: Vec<f64> = self.slides.iter().map(mean).collect();
        let mut gradient = vec![0.0; of_units.len()];
        let loglik = self.cohort.loglik_and_gradient(&of_units, self.ties, &mut gradient)?;
        let scale = -1.0 / self.events() as f64;
        let share = |(g, &n): (&f64, &usize)| std::iter::repeat_n(scale * g / n as f64, n);
        Ok((scale * loglik, gradient.iter().zip(&self.slides).flat_map(share).collect()))
    }
}
