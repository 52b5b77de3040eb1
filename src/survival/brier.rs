//! Brier score of predicted survival, over time.

use super::auc::check_times;
use super::cohort::{check_cohort, short, undefined};
use super::ipcw::CensoringDistribution;
use crate::Result;

const NAME: &str = "the Brier score";

/// The Brier score at several times.
#[derive(Debug, Clone, PartialEq)]
pub struct BrierScore {
    /// In months, or whatever the times of the cohort are in.
    pub times: Vec<f64>,
    /// 0 is perfect; 0.25 is what S = 1/2 for everyone scores without censoring.
    pub score: Vec<f64>,
}

/// The mean squared error of the predicted survival at each of `times`, weighted for censoring by 1
/// / G (Graf et al., Statistics in Medicine 1999). scikit-survival's `brier_score`. O(n times).
///
/// `survival` is \[patients, times\], patient by patient: the predicted S(t). `times` ascend
/// strictly and lie in [min, max) of `time`.
pub fn brier_score(
    censoring: &CensoringDistribution,
    time: &[f64],
    event: &[bool],
    survival: &[f64],
    times: &[f64],
) -> Result<BrierScore> {
    check_cohort(NAME, time, event)?;
    let last = check_times(NAME, time, times)?;
    if survival.len() != time.len() * times.len() {
        let (got, patients, times) = (survival.len(), time.len(), times.len());
        return Err(undefined(
            NAME,
            format!("`survival` has {got} entries, expected {patients} patients x {times} times"),
        ));
    }
    if let Some(i) = survival.iter().position(|s| !(0.0..=1.0).contains(s)) {
        let (row, t) = (i / times.len(), times[i % times.len()]);
        return Err(undefined(
            NAME,
            format!("patient {row} survives time {} with probability {}", short(t), survival[i]),
        ));
    }

    let mut weight = vec![0.0; time.len()];
    for row in (0..time.len()).filter(|&row| event[row] && time[row] <= last) {
        weight[row] = censoring.weight(NAME, time[row])?;
    }
    let mut score = Vec::with_capacity(times.len());
    for (column, &t) in times.iter().enumerate() {
        let weight_of_alive = censoring.weight(NAME, t)?;
        let sum: f64 = survival
            .iter()
            .skip(column)
            .step_by(times.len())
            .zip(time.iter().zip(&weight))
            .map(|(&s, (&time, &weight))| if time > t { (1.0 - s).powi(2) * weight_of_alive } else { s * s * weight })
            .sum();
        score.push(sum / time.len() as f64);
    }
    Ok(BrierScore { times: times.to_vec(), score })
}

impl BrierScore {
    /// The score's mean over the span of its times, by trapezoids; scikit-survival's
    /// `integrated_brier_score`.
    pub fn integrated(&self) -> Result<f64> {
        let [first, .., last] = self.times[..] else {
            return Err(undefined("the integrated Brier score", "it needs at least two times"));
        };
        let area: f64 = (1..self.times.len())
            .map(|i| 0.5 * (self.score[i - 1] + self.score[i]) * (self.times[i] - self.times[i - 1]))
            .sum();
        Ok(area / (last - first))
    }
}
