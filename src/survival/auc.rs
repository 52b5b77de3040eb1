//! Cumulative/dynamic AUC.

use super::cohort::{check_cohort, check_column, order_by, short, undefined};
use super::concordance::RISK_TIE;
use super::ipcw::CensoringDistribution;
use super::kaplan_meier::{Limits, kaplan_meier};
use crate::Result;

const NAME: &str = "the dynamic AUC";

/// Cumulative/dynamic AUC at several times.
#[derive(Debug, Clone, PartialEq)]
pub struct DynamicAuc {
    /// In months, or whatever the times of the cohort are in.
    pub times: Vec<f64>,
    /// The AUC at each of them.
    pub auc: Vec<f64>,
    /// The AUCs weighted by the fall of the Kaplan-Meier curve up to each time (Lambert & Chevret
    /// 2016).
    pub mean: f64,
}

/// How well `risk` tells those who died by t (cases, weighted 1 / G(their time)) from those alive
/// after t (controls), at each of `times` (Uno et al., JASA 2007; Hung & Chiang 2010).
/// scikit-survival's `cumulative_dynamic_auc`, which joins a run of risks to one threshold when
/// each is within [`RISK_TIE`] of the next. O(n log n + n times).
///
/// `times` ascend strictly and lie in [min, max) of `time`. An error where nobody has died yet.
pub fn dynamic_auc(
    censoring: &CensoringDistribution,
    time: &[f64],
    event: &[bool],
    risk: &[f64],
    times: &[f64],
) -> Result<DynamicAuc> {
    check_cohort(NAME, time, event)?;
    check_column(NAME, "risk", risk, time.len())?;
    let last = check_times(NAME, time, times)?;

    let mut weight = vec![0.0; time.len()];
    for row in (0..time.len()).filter(|&row| event[row] && time[row] <= last) {
        weight[row] = censoring.weight(NAME, time[row])?;
    }
    let by_risk = order_by(risk);
    let auc = times.iter().map(|&t| auc_at(t, time, &weight, risk, &by_risk)).collect::<Result<Vec<f64>>>()?;

    let curve = kaplan_meier(time, event, Limits::Log, 0.95)?;
    let (mut before, mut weighted) = (1.0, 0.0);
    for (&t, auc) in times.iter().zip(&auc) {
        let survival = curve.survival_at(t).unwrap_or(before); // t < max(time), where the curve is known
        weighted += auc * (before - survival);
        before = survival;
    }
    let mean = if times.len() == 1 { auc[0] } else { (weighted / (1.0 - before)).min(1.0) };
    Ok(DynamicAuc { times: times.to_vec(), auc, mean })
}

/// The area under the ROC curve at t, by trapezoids from the highest risk down. `weight` is 0 where
/// there was no event.
fn auc_at(t: f64, time: &[f64], weight: &[f64], risk: &[f64], by_risk: &[usize]) -> Result<f64> {
    let (mut cases, mut controls, mut area) = (0.0, 0.0, 0.0);
    for tied in by_risk.chunk_by(|&a, &b| risk[b] - risk[a] <= RISK_TIE).rev() {
        let new_cases: f64 = tied.iter().filter(|&&row| time[row] <= t).map(|&row| weight[row]).sum();
        let new_controls = tied.iter().filter(|&&row| time[row] > t).count() as f64;
        area += new_controls * (cases + 0.5 * new_cases);
        cases += new_cases;
        controls += new_controls;
    }
    if cases == 0.0 {
        return Err(undefined(NAME, format!("nobody had an event by time {}", short(t))));
    }
    Ok((area / (cases * controls)).min(1.0)) // t < max(time), so there are controls; rounding may pass 1
}

/// At least one time, strictly ascending, within the follow-up; returns the last.
pub(super) fn check_times(statistic: &'static str, time: &[f64], times: &[f64]) -> Result<f64> {
    check_column(statistic, "times", times, times.len())?;
    let Some(&last) = times.last() else {
        return Err(undefined(statistic, "no times are given"));
    };
    if let Some(pair) = times.windows(2).find(|pair| pair[0] >= pair[1]) {
        return Err(undefined(
            statistic,
            format!("its times do not ascend: {} is followed by {}", short(pair[0]), short(pair[1])),
        ));
    }
    let (min, max) = time.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &t| (a.min(t), b.max(t)));
    match times.iter().find(|&&t| t < min || t >= max) {
        Some(&t) => {
            let [t, min, max] = [t, min, max].map(short);
            Err(undefined(statistic, format!("time {t} is outside the follow-up, from {min} to before {max}")))
        }
        None => Ok(last),
    }
}
