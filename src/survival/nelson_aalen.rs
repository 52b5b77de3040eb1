//! Cumulative hazards: Nelson-Aalen of a cohort, and the baseline of a Cox model.

use super::cohort::{check_cohort, check_column, order_by, risk_sets, undefined};
use super::cox::Ties;
use crate::Result;

/// A cumulative hazard H, a step function: `hazard[i]` from `time[i]` on, 0 before. One entry a
/// distinct time.
#[derive(Debug, Clone, PartialEq)]
pub struct CumulativeHazard {
    /// Times of events, in order.
    pub time: Vec<f64>,
    /// The cumulative hazard after each.
    pub hazard: Vec<f64>,
}

impl CumulativeHazard {
    /// H(t). `None` after the last time, where nobody was followed.
    pub fn hazard_at(&self, t: f64) -> Option<f64> {
        if t.is_nan() || self.time.last().is_none_or(|&last| t > last) {
            return None;
        }
        match self.time.partition_point(|&time| time <= t) {
            0 => Some(0.0),
            i => Some(self.hazard[i - 1]),
        }
    }
}

/// The Nelson-Aalen estimate sum(d / n), and its standard errors sqrt(sum(d / n^2)) (Nelson 1972,
/// Aalen 1978); `cumhaz` and `std.chaz` of R's `survfit`. O(n log n).
pub fn nelson_aalen(time: &[f64], event: &[bool]) -> Result<(CumulativeHazard, Vec<f64>)> {
    check_cohort("the Nelson-Aalen estimate", time, event)?;
    let (mut total, mut variance) = (0.0, 0.0);
    let (mut times, mut hazard, mut std_error) = (Vec::new(), Vec::new(), Vec::new());
    for set in risk_sets(time, event)? {
        let (events, at_risk) = (set.events as f64, set.at_risk as f64);
        total += events / at_risk;
        variance += events / (at_risk * at_risk);
        times.push(set.time);
        hazard.push(total);
        std_error.push(variance.sqrt());
    }
    Ok((CumulativeHazard { time: times, hazard }, std_error))
}

/// The baseline hazard of a Cox model whose `risk` is the log hazard ratio: that of a patient of
/// risk 0, so that S(t | risk) = exp(-H0(t) e^risk). Breslow 1972: sum(d / R), R = the sum of
/// e^risk over the risk set; with [`Ties::Efron`] sum over l < d of 1 / (R - l/d E), E = that of
/// the events. R's `basehaz(centered = FALSE)`. O(n log n).
///
/// An error if H0 does not fit a double, for risks of several hundred: subtract their mean first.
pub fn baseline_hazard(time: &[f64], event: &[bool], risk: &[f64], ties: Ties) -> Result<CumulativeHazard> {
    const NAME: &str = "the baseline hazard";
    check_cohort(NAME, time, event)?;
    check_column(NAME, "risk", risk, time.len())?;
    // From the last time to the first: (time, increment). The sum over the risk set is `sum *
    // e^shift`, shift its largest risk, so that nothing overflows and no risk set vanishes.
    let mut increments = Vec::new();
    let (mut shift, mut sum) = (f64::NEG_INFINITY, 0.0);
    for tied in order_by(time).chunk_by(|&a, &b| time[a] == time[b]).rev() {
        let highest = tied.iter().fold(shift, |max, &row| max.max(risk[row]));
        if highest > shift {
            sum *= (shift - highest).exp();
            shift = highest;
        }
        let (mut events, mut of_events) = (0usize, 0.0);
        for &row in tied {
            let e = (risk[row] - shift).exp();
            sum += e;
            if event[row] {
                events += 1;
                of_events += e;
            }
        }
        let d = events as f64;
        let increment: f64 = match ties {
            Ties::Breslow => d / sum,
            Ties::Efron => (0..events).map(|l| 1.0 / (sum - l as f64 / d * of_events)).sum(),
        };
        increments.push((time[tied[0]], if events == 0 { 0.0 } else { (increment.ln() - shift).exp() }));
    }
    let some_events = event.contains(&true);
    let mut total = 0.0;
    let (time, hazard): (Vec<f64>, Vec<f64>) = increments
        .into_iter()
        .rev()
        .map(|(time, increment)| {
            total += increment;
            (time, total)
        })
        .unzip();
    if !total.is_finite() || some_events && total == 0.0 {
        return Err(undefined(NAME, "it does not fit a double; subtract the mean from the risks first"));
    }
    Ok(CumulativeHazard { time, hazard })
}
