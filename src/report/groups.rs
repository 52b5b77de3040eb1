//! Patients grouped by predicted risk: at the median, in thirds, or at a cut learnt where the patients are not.

use std::collections::{HashMap, HashSet};

use serde::Serialize;

use super::{SlideResult, accuracy::quantile, km::Group, reason};
use crate::{
    Error, Result,
    report::Fold,
    survival::{LogRank, log_rank},
};

/// A log-rank test.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LogRankResult {
    pub chi_squared: f64,
    pub p_value: f64,
}

/// One way to group patients.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Grouping {
    /// "median", "tertiles" or "learnt_cut".
    pub name: &'static str,
    /// A patient belongs to a higher group from each cut on, the cut itself included: risks, one list for all folds, or, of
    /// "learnt_cut", a list a fold with the share of the fold's patients that are below.
    pub cuts: Vec<Vec<f64>>,
    /// From low to high risk.
    pub patients: Vec<usize>,
    /// None where the test is undefined; `note` says why.
    pub log_rank: Option<LogRankResult>,
    pub note: Option<String>,
    /// For each patient, the number of its group.
    #[serde(skip)]
    pub group: Vec<usize>,
}

/// Names of groups, from low to high risk.
pub const LABELS: [&[&str]; 4] = [&[], &["All"], &["Low risk", "High risk"], &["Low risk", "Middle risk", "High risk"]];
/// A learnt cut leaves at least this share of its patients on either side.
const LEAST_SHARE: f64 = 0.2;

impl Grouping {
    pub fn median(rows: &[SlideResult]) -> Self {
        Self::quantiles("median", rows, &[0.5])
    }

    pub fn tertiles(rows: &[SlideResult]) -> Self {
        Self::quantiles("tertiles", rows, &[1.0 / 3.0, 2.0 / 3.0])
    }

    fn quantiles(name: &'static str, rows: &[SlideResult], shares: &[f64]) -> Self {
        let risks: Vec<f64> = rows.iter().map(|row| row.risk).collect();
        let cuts: Vec<f64> = shares.iter().map(|&p| quantile(&risks, p)).collect();
        let group = risks.iter().map(|risk| cuts.iter().filter(|&cut| risk >= cut).count()).collect();
        Self::new(name, rows, vec![cuts], group)
    }

    /// Each fold's patients are cut at a rank among themselves: the one at which the log-rank statistic of the *other* folds'
    /// patients, ranked in their own folds, is greatest. Ranks, as the models of two folds need not share a scale of
    /// risk. No patient's outcome has a say in its own cut.
    pub fn learnt_cut(rows: &[SlideResult], folds: &[Fold]) -> Result<Self> {
        let undefined = |reason: String| Error::Statistic { statistic: "the learnt cut", reason };
        if folds.len() < 2 {
            return Err(undefined("a cut is learnt on other folds, and there is one fold".into()));
        }
        let share = shares_below(rows);
        let mut cuts = Vec::new();
        let mut group = vec![0; rows.len()];
        for fold in folds {
            let own: HashSet<&str> =
                rows.iter().filter(|row| row.fold == fold.fold).map(|row| row.case_id.as_str()).collect();
            let other = |row: &usize| rows[*row].fold != fold.fold && !own.contains(rows[*row].case_id.as_str());
            let others: Vec<usize> = (0..rows.len()).filter(other).collect();
            let cut = best_cut(rows, &share, &others).ok_or_else(|| {
                undefined(format!("the other folds' patients define no log-rank test for fold {}", fold.fold))
            })?;
            for row in (0..rows.len()).filter(|&row| rows[row].fold == fold.fold) {
                group[row] = usize::from(share[row] >= cut);
            }
            cuts.push(vec![cut]);
        }
        Ok(Self::new("learnt_cut", rows, cuts, group))
    }

    fn new(name: &'static str, rows: &[SlideResult], cuts: Vec<Vec<f64>>, group: Vec<usize>) -> Self {
        let groups = cuts.first().map_or(1, |cuts| cuts.len() + 1);
        let patients: Vec<usize> = (0..groups).map(|g| group.iter().filter(|&&other| other == g).count()).collect();
        let test = match patients.iter().position(|&n| n == 0) {
            Some(empty) => {
                let label = LABELS[groups][empty].to_lowercase().replace(' ', "-");
                let reason = format!("the {label} group is empty, no predicted risk falls into it");
                Err(Error::Statistic { statistic: "the log-rank test", reason })
            }
            None => test(rows, &group),
        };
        let note = test.as_ref().err().map(reason);
        let log_rank = test.ok().map(|LogRank { chi_squared, p_value, .. }| LogRankResult { chi_squared, p_value });
        Self { name, cuts, patients, log_rank, note, group }
    }

    /// The curves' cohorts, from low to high risk; some may be empty.
    pub fn groups(&self, rows: &[SlideResult]) -> Vec<Group> {
        let labels = LABELS[self.patients.len()];
        let of = |g: usize| rows.iter().zip(&self.group).filter(move |(_, group)| **group == g).map(|(row, _)| row);
        let group = |(g, label): (usize, &&str)| Group {
            label: label.to_string(),
            time: of(g).map(|row| row.time).collect(),
            event: of(g).map(|row| row.event).collect(),
        };
        labels.iter().enumerate().map(group).collect()
    }
}

fn test(rows: &[SlideResult], group: &[usize]) -> Result<LogRank> {
    let time: Vec<f64> = rows.iter().map(|row| row.time).collect();
    let event: Vec<bool> = rows.iter().map(|row| row.event).collect();
    log_rank(&time, &event, group, None)
}

/// For each row, the share of its fold's rows of lower risk, half of those of equal risk (itself included) counted.
fn shares_below(rows: &[SlideResult]) -> Vec<f64> {
    let mut risks: HashMap<usize, Vec<f64>> = HashMap::new();
    rows.iter().for_each(|row| risks.entry(row.fold).or_default().push(row.risk));
    risks.values_mut().for_each(|risks| risks.sort_unstable_by(f64::total_cmp));
    let share = |row: &SlideResult| {
        let risks = &risks[&row.fold];
        let below = risks.partition_point(|&risk| risk < row.risk);
        let not_above = risks.partition_point(|&risk| risk <= row.risk);
        0.5 * (below + not_above) as f64 / risks.len() as f64
    };
    rows.iter().map(share).collect()
}

/// The share at which the log-rank statistic of these rows is greatest (Lausen & Schumacher, Biometrics 48:73, 1992), halfway
/// between two of them; of equals the lowest.
fn best_cut(rows: &[SlideResult], share: &[f64], of: &[usize]) -> Option<f64> {
    let time: Vec<f64> = of.iter().map(|&row| rows[row].time).collect();
    let event: Vec<bool> = of.iter().map(|&row| rows[row].event).collect();
    let share: Vec<f64> = of.iter().map(|&row| share[row]).collect();
    let mut sorted = share.clone();
    sorted.sort_unstable_by(f64::total_cmp);
    let least = ((LEAST_SHARE * of.len() as f64).ceil() as usize).max(1);
    let mut best: Option<(f64, f64)> = None;
    for place in least..(of.len() + 1).saturating_sub(least) {
        let (below, above) = (sorted[place - 1], sorted[place]);
        if below == above {
            continue;
        }
        let high: Vec<usize> = share.iter().map(|&share| usize::from(share >= above)).collect();
        let Ok(test) = log_rank(&time, &event, &high, None) else { continue };
        if best.is_none_or(|(greatest, _)| test.chi_squared > greatest) {
            best = Some((test.chi_squared, 0.5 * (below + above)));
        }
    }
    best.map(|(_, cut)| cut)
}
