//! The Kaplan-Meier curve, its limits and its median.

use super::cohort::{check_cohort, check_level, risk_sets, undefined};
use super::distributions::normal_two_sided;
use crate::Result;

/// The scale on which S +- z * standard error is taken (Kalbfleisch & Prentice 2002, section 1.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limits {
    /// log S, the default of R's `survfit`; the upper limit is cut at 1.
    Log,
    /// log(-log S): stays within 0..1, better in small cohorts.
    LogLog,
}

/// The curve at one distinct time, valid from this time to the next.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// When.
    pub time: f64,
    /// Patients at risk just before `time`.
    pub at_risk: usize,
    /// Events at this time.
    pub events: usize,
    /// Censored at this time.
    pub censored: usize,
    /// The estimate after this time.
    pub survival: f64,
    /// Pointwise (lower, upper). `None` where S = 0, and on the log-log scale where S = 1: there is
    /// no estimate of the variance (R prints NA).
    pub limits: Option<(f64, f64)>,
}

/// The estimate of Kaplan and Meier (1958).
#[derive(Debug, Clone, PartialEq)]
pub struct KaplanMeier {
    /// One for each time at which something happened, in order.
    pub steps: Vec<Step>,
    /// Confidence level of the limits.
    pub level: f64,
}

/// A time at which the curve falls to a given survival; `None` where it, or its limit, does not
/// fall so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quantile {
    /// None where the curve does not fall so far.
    pub estimate: Option<f64>,
    /// The interval's lower end; None where its curve does not fall so far.
    pub lower: Option<f64>,
    /// The interval's upper end; None where its curve does not fall so far.
    pub upper: Option<f64>,
}

/// The Kaplan-Meier estimate (JASA 1958) with Greenwood's variance; R's `survfit`. O(n log n).
/// A cohort without events is a valid one: the curve stays at 1.
pub fn kaplan_meier(time: &[f64], event: &[bool], limits: Limits, level: f64) -> Result<KaplanMeier> {
    const NAME: &str = "the Kaplan-Meier curve";
    check_cohort(NAME, time, event)?;
    check_level(NAME, level)?;
    let z = normal_two_sided(level);
    let (mut survival, mut greenwood) = (1.0, 0.0);
    let steps = risk_sets(time, event)?
        .iter()
        .map(|set| {
            let (events, at_risk) = (set.events as f64, set.at_risk as f64);
            survival *= 1.0 - events / at_risk;
            if set.events < set.at_risk {
                greenwood += events / (at_risk * (at_risk - events));
            }
            Step {
                time: set.time,
                at_risk: set.at_risk,
                events: set.events,
                censored: set.censored,
                survival,
                limits: pointwise_limits(survival, z * f64::sqrt(greenwood), limits),
            }
        })
        .collect();
    Ok(KaplanMeier { steps, level })
}

/// `margin` = z * the standard error of log S.
fn pointwise_limits(survival: f64, margin: f64, limits: Limits) -> Option<(f64, f64)> {
    if survival == 0.0 {
        return None;
    }
    match limits {
        Limits::Log => Some((survival * (-margin).exp(), (survival * margin.exp()).min(1.0))),
        Limits::LogLog if survival == 1.0 => None,
        Limits::LogLog => {
            let factor = (margin / survival.ln()).exp(); // below 1, for log S < 0
            Some((survival.powf(1.0 / factor), survival.powf(factor)))
        }
    }
}

impl KaplanMeier {
    /// S(t), continuous from the right. `None` after the last time unless everyone has died by
    /// then.
    pub fn survival_at(&self, t: f64) -> Option<f64> {
        let last = self.steps.last()?;
        if t > last.time && last.survival > 0.0 || t.is_nan() {
            return None;
        }
        match self.steps.partition_point(|step| step.time <= t) {
            0 => Some(1.0),
            i => Some(self.steps[i - 1].survival),
        }
    }

    /// The limits of S(t), which are those of the last step until then; (1, 1) before the first.
    pub fn limits_at(&self, t: f64) -> Option<(f64, f64)> {
        self.survival_at(t)?;
        match self.steps.partition_point(|step| step.time <= t) {
            0 => Some((1.0, 1.0)),
            i => self.steps[i - 1].limits,
        }
    }

    /// Median survival with limits, as R prints it (Brookmeyer & Crowley, Biometrics 1982): where
    /// the curve and its two limits cross 1/2.
    pub fn median(&self) -> Quantile {
        self.crossing(0.5)
    }

    /// The time at which the curve falls to `1 - p`, 0 < p < 1: `quantile(0.25)` is the time by
    /// which a quarter has died.
    pub fn quantile(&self, p: f64) -> Result<Quantile> {
        if p > 0.0 && p < 1.0 {
            return Ok(self.crossing(1.0 - p));
        }
        Err(undefined("the survival quantile", format!("its probability is {p}, not between 0 and 1")))
    }

    fn crossing(&self, survival: f64) -> Quantile {
        let crossing = |curve: fn(&Step) -> Option<f64>| {
            first_crossing(self.steps.iter().filter_map(|step| Some((step.time, curve(step)?))), survival)
        };
        Quantile {
            estimate: crossing(|step| Some(step.survival)),
            lower: crossing(|step| Some(step.limits?.0)),
            upper: crossing(|step| Some(step.limits?.1)),
        }
    }
}

/// The first time at which a falling curve is at or below `level`; where it runs along `level`, the
/// middle of that run. Equality is to the square root of the machine precision, as in R.
fn first_crossing(mut curve: impl Iterator<Item = (f64, f64)>, level: f64) -> Option<f64> {
    let tolerance = f64::EPSILON.sqrt();
    let (start, height) = curve.find(|&(_, y)| y < level + tolerance)?;
    if (height - level).abs() >= tolerance {
        return Some(start);
    }
    let end = curve.find(|&(_, y)| y < height).map_or(start, |(time, _)| time);
    Some(0.5 * (start + end))
}
