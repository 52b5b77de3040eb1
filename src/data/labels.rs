//! Discrete survival labels: months cut into bins at the quantiles of the uncensored slides (Zadeh
//! & Schmid 2020, sec. 3).

use super::cohort::Slide;
use crate::{Error, Result};

/// Added to both ends so that every slide falls inside.
const MARGIN: f64 = 1e-6;

/// Bin edges, `bins + 1` of them; bin i is [edge i, edge i + 1). By default there are none, for a
/// loss that needs no labels.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bins {
    /// In months, rising; empty where there are no bins.
    pub edges: Vec<f64>,
}

impl Bins {
    /// Cuts at the quantiles of the uncensored slides (linear interpolation, as `pandas.qcut`); the
    /// outer edges are moved to the ends of all slides.
    pub fn cut(slides: &[Slide], bins: usize) -> Result<Self> {
        let undefined = |reason: String| Error::Statistic { statistic: "the set of survival bins", reason };
        let mut events: Vec<f64> = slides.iter().filter(|s| !s.censored).map(|s| s.months).collect();
        events.sort_by(f64::total_cmp);
        if events.is_empty() {
            return Err(undefined(format!("all {} slides are censored", slides.len())));
        }
        let quantile = |i: usize| {
            let position = (events.len() - 1) as f64 * i as f64 / bins as f64;
            let low = events[position as usize];
            low + (events[position.ceil() as usize] - low) * position.fract()
        };
        let mut edges: Vec<f64> = (0..=bins).map(quantile).collect();
        if let Some(tie) = edges.windows(2).find(|pair| pair[0] >= pair[1]) {
            let reason = format!(
                "{bins} bins need distinct quantiles, but two of them are {} months; use fewer --n-classes",
                tie[0]
            );
            return Err(undefined(reason));
        }
        let months = slides.iter().map(|s| s.months);
        edges[0] = months.clone().fold(f64::INFINITY, f64::min) - MARGIN;
        edges[bins] = months.fold(f64::NEG_INFINITY, f64::max) + MARGIN;
        Ok(Self { edges })
    }

    /// The number of bins, one less than there are edges.
    pub fn len(&self) -> usize {
        self.edges.len().saturating_sub(1)
    }

    /// Whether there are no bins, as for the Cox loss.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bin that holds `months`; what lies outside belongs to the nearest.
    pub fn label(&self, months: f64) -> usize {
        self.edges[1.min(self.len())..self.len()].iter().filter(|&&edge| months >= edge).count()
    }

    /// What sampling balances: 2 * bin + censorship.
    pub fn stratum(&self, slide: &Slide) -> usize {
        2 * self.label(slide.months) + usize::from(slide.censored)
    }
}
