//! What every statistic begins with: checked columns, their order in time, and the risk sets.

use crate::{Error, Result};

/// One distinct time of a cohort, and what happened at it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RiskSet {
    /// When.
    pub time: f64,
    /// Patients whose time is not earlier, those of this time included.
    pub at_risk: usize,
    /// Events at this time.
    pub events: usize,
    /// Censored at this time.
    pub censored: usize,
}

/// The distinct times of a cohort in ascending order, with the counts at each. Times are tied when
/// they are equal.
pub fn risk_sets(time: &[f64], event: &[bool]) -> Result<Vec<RiskSet>> {
    check_cohort("the table of risk sets", time, event)?;
    let mut sets: Vec<RiskSet> = Vec::new();
    let mut at_risk = time.len();
    for tied in order_by(time).chunk_by(|&a, &b| time[a] == time[b]) {
        let events = tied.iter().filter(|&&row| event[row]).count();
        sets.push(RiskSet { time: time[tied[0]], at_risk, events, censored: tied.len() - events });
        at_risk -= tied.len();
    }
    Ok(sets)
}

/// For each of `at`, the number of patients whose `time` is not earlier: the row under a
/// Kaplan-Meier plot.
pub fn number_at_risk(time: &[f64], at: &[f64]) -> Result<Vec<usize>> {
    const NAME: &str = "the number at risk";
    check_column(NAME, "time", time, time.len())?;
    check_column(NAME, "at", at, at.len())?;
    let mut sorted = time.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    Ok(at.iter().map(|&t| time.len() - sorted.partition_point(|&other| other < t)).collect())
}

/// A number for a sentence: six digits that count, without the noise of binary fractions or
/// hundreds of zeros.
pub(crate) fn short(value: f64) -> String {
    let rounded: f64 = format!("{value:.5e}").parse().unwrap_or(value);
    if rounded == 0.0 || (1e-4..1e9).contains(&rounded.abs()) || !rounded.is_finite() {
        rounded.to_string()
    } else {
        format!("{rounded:e}")
    }
}

pub(super) fn undefined(statistic: &'static str, reason: impl Into<String>) -> Error {
    Error::Statistic { statistic, reason: reason.into() }
}

/// At least one patient, equal lengths, finite times.
pub(super) fn check_cohort(statistic: &'static str, time: &[f64], event: &[bool]) -> Result<()> {
    if time.is_empty() {
        return Err(undefined(statistic, "the cohort has no patients"));
    }
    check_length(statistic, "event", event.len(), time.len())?;
    check_column(statistic, "time", time, time.len())
}

pub(super) fn check_column(statistic: &'static str, name: &str, values: &[f64], patients: usize) -> Result<()> {
    check_length(statistic, name, values.len(), patients)?;
    match values.iter().position(|v| !v.is_finite()) {
        Some(row) => {
            Err(undefined(statistic, format!("entry {row} of `{name}` is {}, not a finite number", values[row])))
        }
        None => Ok(()),
    }
}

pub(super) fn check_length(statistic: &'static str, name: &str, length: usize, patients: usize) -> Result<()> {
    if length == patients {
        return Ok(());
    }
    Err(undefined(statistic, format!("`{name}` has {length} entries for {patients} patients")))
}

pub(super) fn check_level(statistic: &'static str, level: f64) -> Result<()> {
    if level > 0.0 && level < 1.0 {
        return Ok(());
    }
    Err(undefined(statistic, format!("the confidence level is {level}, not between 0 and 1")))
}

/// Row numbers in ascending order of `values`; equal values keep their order.
pub(super) fn order_by(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    order
}
