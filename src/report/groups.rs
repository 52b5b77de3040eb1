//! Patients grouped by predicted risk: at the median, in thirds, or at a cut learnt where the patients are not.

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
    /// A patient belongs to a higher group from each cut on, the cut itself included. One list for all folds, or one a fold.
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

    /// Each fold's patients are cut where the log-rank statistic of the *other* folds' patients is greatest, by the risks that
    /// those had out of fold; no patient's outcome has a say in its own cut.
    pub fn learnt_cut(rows: &[SlideResult], folds: &[Fold]) -> Result<Self> {
        let undefined = |reason: String| Error::Statistic { statistic: "the learnt cut", reason };
        if folds.len() < 2 {
            return Err(undefined("a cut is learnt on other folds, and there is one fold".into()));
        }
        let mut cuts = Vec::new();
        let mut group = vec![0; rows.len()];
        for fold in folds {
            let own = |row: &SlideResult| rows.iter().any(|r| r.fold == fold.fold && r.case_id == row.case_id);
            let others: Vec<&SlideResult> = rows.iter().filter(|row| row.fold != fold.fold && !own(row)).collect();
            let cut = best_cut(&others).ok_or_else(|| {
                undefined(format!("the other folds' patients define no log-rank test for fold {}", fold.fold))
            })?;
            for (row, group) in rows.iter().zip(&mut group).filter(|(row, _)| row.fold == fold.fold) {
                *group = usize::from(row.risk >= cut);
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
                let reason = format!("no predicted risk falls into the {label} group, so it is empty");
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

/// The risk at which the log-rank statistic is greatest (Lausen & Schumacher, Biometrics 48:73, 1992); of equals the lowest.
fn best_cut(rows: &[&SlideResult]) -> Option<f64> {
    let time: Vec<f64> = rows.iter().map(|row| row.time).collect();
    let event: Vec<bool> = rows.iter().map(|row| row.event).collect();
    let mut risks: Vec<f64> = rows.iter().map(|row| row.risk).collect();
    risks.sort_unstable_by(f64::total_cmp);
    let n = risks.len();
    let least = ((LEAST_SHARE * n as f64).ceil() as usize).max(1);
    let mut best: Option<(f64, f64)> = None;
    for place in least..(n + 1).saturating_sub(least) {
        let (below, cut) = (risks[place - 1], risks[place.min(n - 1)]);
        if below == cut {
            continue;
        }
        let high: Vec<usize> = rows.iter().map(|row| usize::from(row.risk >= cut)).collect();
        let Ok(test) = log_rank(&time, &event, &high, None) else { continue };
        if best.is_none_or(|(greatest, _)| test.chi_squared > greatest) {
            // halfway, so that it favours neither side
            best = Some((test.chi_squared, below + 0.5 * (cut - below)));
        }
    }
    best.map(|(_, cut)| cut)
}
