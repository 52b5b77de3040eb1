//! Inverse probability of censoring weights.

use super::cohort::{risk_sets, short, undefined};
use crate::Result;

/// G(t) = P(a patient is still uncensored after t), the Kaplan-Meier estimate with the roles of
/// event and censoring exchanged; at a tied time the events come first and leave the risk set.
/// scikit-survival's `CensoringDistributionEstimator`.
#[derive(Debug, Clone)]
pub struct CensoringDistribution {
    time: Vec<f64>,
    /// G from `time[i]` on.
    uncensored: Vec<f64>,
}

impl CensoringDistribution {
    /// Fits G, usually to the training patients. With no censoring G = 1.
    pub fn fit(time: &[f64], event: &[bool]) -> Result<Self> {
        let mut g = 1.0;
        let (time, uncensored) = risk_sets(time, event)?
            .iter()
            .map(|set| {
                if set.censored > 0 {
                    g *= 1.0 - set.censored as f64 / (set.at_risk - set.events) as f64;
                }
                (set.time, g)
            })
            .unzip();
        Ok(Self { time, uncensored })
    }

    /// G(t), a step function continuous from the right. `None` after the last time unless G is zero
    /// there.
    pub fn uncensored_at(&self, t: f64) -> Option<f64> {
        let last = self.uncensored.len() - 1; // a fitted cohort is not empty
        if t > self.time[last] && self.uncensored[last] > 0.0 || t.is_nan() {
            return None;
        }
        match self.time.partition_point(|&time| time <= t) {
            0 => Some(1.0),
            i => Some(self.uncensored[i - 1]),
        }
    }

    /// 1 / G(t), or why `statistic` cannot have it.
    pub(super) fn weight(&self, statistic: &'static str, t: f64) -> Result<f64> {
        match self.uncensored_at(t) {
            Some(g) if g > 0.0 => Ok(1.0 / g),
            Some(_) => Err(undefined(
                statistic,
                format!("everyone was censored by time {}, so its weight is infinite", short(t)),
            )),
            None => Err(undefined(
                statistic,
                format!(
                    "time {} lies beyond {}, the last time of the patients that the censoring distribution was fitted to",
                    short(t),
                    short(self.time[self.time.len() - 1])
                ),
            )),
        }
    }
}
