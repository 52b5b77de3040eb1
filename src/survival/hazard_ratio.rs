//! The hazard ratio of one covariate: a Cox model with a single coefficient.

use super::cohort::{check_cohort, check_column, check_level, order_by, undefined};
use super::distributions::normal_two_sided;
use crate::Result;

const NAME: &str = "the hazard ratio";

/// How much the hazard is multiplied by for each unit of the covariate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HazardRatio {
    /// exp of the coefficient.
    pub ratio: f64,
    /// Wald limits: exp(coefficient -+ z * standard error).
    pub lower: f64,
    /// The interval's upper end.
    pub upper: f64,
    /// The interval's level: 0.95, say.
    pub level: f64,
    /// log(ratio), and its standard error.
    pub coefficient: f64,
    /// Standard error of the coefficient.
    pub std_error: f64,
}

/// A Cox model (JRSS B 1972) with the one covariate, Efron's ties; R's `coxph(Surv(time, event) ~
/// covariate)`. O(n log n). For two groups the covariate is 0 in one and 1 in the other.
///
/// An error where the likelihood has no maximum: where nobody at risk at an event differs from the
/// others, or every event falls on the highest (the ratio is infinite), or on the lowest (it is
/// zero), of those at risk.
pub fn hazard_ratio(time: &[f64], event: &[bool], covariate: &[f64], level: f64) -> Result<HazardRatio> {
    check_cohort(NAME, time, event)?;
    check_column(NAME, "covariate", covariate, time.len())?;
    check_level(NAME, level)?;
    if !event.contains(&true) {
        return Err(undefined(NAME, format!("none of the {} patients had an event", time.len())));
    }
    let order = order_by(time);
    let tied: Vec<&[usize]> = order.chunk_by(|&a, &b| time[a] == time[b]).rev().collect();
    match separation(&tied, event, covariate) {
        (true, true) => return Err(undefined(NAME, "at no event did those at risk differ")),
        (true, false) => {
            return Err(undefined(NAME, "it is infinite: each event fell on the highest of those at risk"));
        }
        (false, true) => {
            return Err(undefined(NAME, "it is zero: each event fell on the lowest of those at risk"));
        }
        (false, false) => {}
    }
    // Newton's method on a concave function of one number, in units of the covariate's range; a
    // step that overshoots is halved.
    let (low, high) = covariate.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &z| (a.min(z), b.max(z)));
    let scale = high - low;
    let z: Vec<f64> = covariate.iter().map(|value| (value - low) / scale).collect();
    let mut beta = 0.0;
    let mut at = likelihood(&tied, event, &z, beta);
    for _ in 0..100 {
        let mut step = at.score / at.information;
        if !step.is_finite() {
            break;
        }
        let mut next = likelihood(&tied, event, &z, beta + step);
        while next.loglik < at.loglik && step.abs() > 1e-9 * beta.abs().max(1.0) {
            step *= 0.5;
            next = likelihood(&tied, event, &z, beta + step);
        }
        (beta, at) = (beta + step, next);
        if step.abs() <= 1e-12 * beta.abs().max(1.0) {
            let (coefficient, std_error) = (beta / scale, 1.0 / (at.information.sqrt() * scale));
            let margin = normal_two_sided(level) * std_error;
            let [ratio, lower, upper] = [coefficient, coefficient - margin, coefficient + margin].map(f64::exp);
            if [ratio, lower, upper].iter().all(|r| r.is_finite() && *r > 0.0) {
                return Ok(HazardRatio { ratio, lower, upper, level, coefficient, std_error });
            }
            break;
        }
    }
    Err(undefined(NAME, "its likelihood has no maximum that a double can hold"))
}

/// Whether every event is of the highest covariate at risk, and whether of the lowest: the
/// likelihood then grows without end. `tied` are rows of one time, the last time first.
fn separation(tied: &[&[usize]], event: &[bool], covariate: &[f64]) -> (bool, bool) {
    let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
    let (mut of_highest, mut of_lowest) = (true, true);
    for rows in tied {
        for &row in *rows {
            low = low.min(covariate[row]);
            high = high.max(covariate[row]);
        }
        for &row in rows.iter().filter(|&&row| event[row]) {
            of_highest &= covariate[row] == high;
            of_lowest &= covariate[row] == low;
        }
    }
    (of_highest, of_lowest)
}

/// The log partial likelihood at `beta`, its slope, and its curvature with the sign turned.
struct Likelihood {
    loglik: f64,
    score: f64,
    information: f64,
}

fn likelihood(tied: &[&[usize]], event: &[bool], z: &[f64], beta: f64) -> Likelihood {
    let mut at = Likelihood { loglik: 0.0, score: 0.0, information: 0.0 };
    // Sums of e, z e and z^2 e over the risk set, where e = exp(beta z - shift); z lies in 0..1.
    let shift = beta.max(0.0);
    let mut all = [0.0; 3];
    for rows in tied {
        let (mut count, mut of_events, mut sum_z) = (0usize, [0.0; 3], 0.0);
        for &row in *rows {
            let e = (beta * z[row] - shift).exp();
            let terms = [e, z[row] * e, z[row] * z[row] * e];
            (0..3).for_each(|k| all[k] += terms[k]);
            if event[row] {
                count += 1;
                sum_z += z[row];
                (0..3).for_each(|k| of_events[k] += terms[k]);
            }
        }
        at.loglik += beta * sum_z;
        at.score += sum_z;
        for l in 0..count {
            let share = l as f64 / count as f64;
            let [s0, s1, s2] = [0, 1, 2].map(|k: usize| all[k] - share * of_events[k]);
            let mean = s1 / s0;
            at.loglik -= s0.ln() + shift;
            at.score -= mean;
            at.information += s2 / s0 - mean * mean;
        }
    }
    at
}
