//! Patients grouped by predicted risk: at the median, in thirds, or at a cut learnt where the
//! patients are not. With several folds, whose models need not share a scale of risk, patients are
//! first of all cut at their rank within the fold.

use std::collections::{HashMap, HashSet};

use serde::Serialize;

use super::{SlideResult, accuracy::quantile, km::Group, reason};
use crate::{
    Error, Result,
    report::FoldFacts,
    survival::{Limits, LogRank, hazard_ratio, kaplan_meier, log_rank, number_at_risk},
};

/// Of limits of the hazard ratio and of survival.
const LEVEL: f64 = 0.95;
/// When survival is reported, in months.
const YEARS: [f64; 3] = [12.0, 36.0, 60.0];

/// A log-rank test.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LogRankResult {
    /// With one degree of freedom less than there are groups.
    pub chi_squared: f64,
    /// Probability of a statistic as large where all groups have one hazard.
    pub p_value: f64,
}

/// How the hazard rises from one group to the next: a Cox model whose one covariate is the group's
/// number.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct HazardRatioResult {
    /// None where it is undefined; `note` says why.
    pub ratio: Option<f64>,
    /// 95 %.
    pub interval: Option<[f64; 2]>,
    /// Whether the groups of higher risk live longer by more than chance: the interval lies below 1
    /// or, where there is none, the log-rank test is below 0.05.
    pub reversed: bool,
    /// Why there is no ratio, without a full stop; None where there is one.
    pub note: Option<String>,
}

impl HazardRatioResult {
    /// "HR 2.31 (95% CI 1.42 to 3.77)", "HR -" where there is none.
    pub fn text(&self) -> String {
        match (self.ratio, self.interval) {
            (Some(ratio), Some([lower, upper])) => {
                format!("HR {} (95% CI {} to {})", ratio_text(ratio), ratio_text(lower), ratio_text(upper))
            }
            _ => "HR -".into(),
        }
    }
}

/// Three digits of a ratio, whatever its size.
pub fn ratio_text(ratio: f64) -> String {
    match ratio {
        r if (0.01..100.0).contains(&r) => format!("{r:.2}"),
        r if (1e-4..0.01).contains(&r) => format!("{r:.4}"),
        r if (100.0..1e4).contains(&r) => format!("{r:.0}"),
        r => format!("{r:.0e}"),
    }
}

/// Kaplan-Meier's survival of a group at one time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SurvivalAt {
    /// Months.
    pub time: f64,
    /// Patients who are followed to this time or longer.
    pub at_risk: usize,
    /// None where the group was not followed so long.
    pub survival: Option<f64>,
    /// 95 %, on the log scale.
    pub interval: Option<[f64; 2]>,
}

/// One way to group patients.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Grouping {
    /// "fold_median" and "fold_tertiles" of several folds, cut within each; "median" and, of one
    /// fold, "tertiles", cut over all; "learnt_cut".
    pub name: &'static str,
    /// A patient belongs to a higher group from each cut on, the cut itself included: risks, one
    /// list for all folds; or a list a fold, of risks or, of "learnt_cut", of the share of the
    /// fold's patients that are below.
    pub cuts: Vec<Vec<f64>>,
    /// From low to high risk.
    pub patients: Vec<usize>,
    /// Those of the patients that had one.
    pub events: Vec<usize>,
    /// None where the test is undefined; `note` says why.
    pub log_rank: Option<LogRankResult>,
    /// Why there is no log-rank test, without a full stop; None where there is one.
    pub note: Option<String>,
    /// From one group to the next.
    pub hazard_ratio: HazardRatioResult,
    /// At 1, 3 and 5 years, group by group.
    pub survival: Vec<Vec<SurvivalAt>>,
    /// For each patient, the number of its group.
    #[serde(skip)]
    pub group: Vec<usize>,
}

/// Names of groups, from low to high risk.
pub const LABELS: [&[&str]; 4] = [&[], &["All"], &["Low risk", "High risk"], &["Low risk", "Middle risk", "High risk"]];
const TERTILES: [f64; 2] = [1.0 / 3.0, 2.0 / 3.0];
/// A learnt cut leaves at least this share of its patients on either side.
const LEAST_SHARE: f64 = 0.2;

impl Grouping {
    /// All patients are cut at one median, whatever their fold.
    pub fn median(rows: &[SlideResult]) -> Self {
        Self::quantiles("median", rows, &[0.5])
    }

    /// All patients are cut at the same tertiles, whatever their fold.
    pub fn tertiles(rows: &[SlideResult]) -> Self {
        Self::quantiles("tertiles", rows, &TERTILES)
    }

    /// Each fold's patients are cut at their own median.
    pub fn fold_median(rows: &[SlideResult], folds: &[FoldFacts]) -> Self {
        Self::fold_quantiles("fold_median", rows, folds, &[0.5])
    }

    /// Each fold's patients are cut at their own tertiles.
    pub fn fold_tertiles(rows: &[SlideResult], folds: &[FoldFacts]) -> Self {
        Self::fold_quantiles("fold_tertiles", rows, folds, &TERTILES)
    }

    fn quantiles(name: &'static str, rows: &[SlideResult], shares: &[f64]) -> Self {
        let risks: Vec<f64> = rows.iter().map(|row| row.risk).collect();
        let cuts: Vec<f64> = shares.iter().map(|&p| quantile(&risks, p)).collect();
        let group = risks.iter().map(|risk| cuts.iter().filter(|&cut| risk >= cut).count()).collect();
        Self::new(name, rows, shares.len() + 1, vec![cuts], group)
    }

    fn fold_quantiles(name: &'static str, rows: &[SlideResult], folds: &[FoldFacts], shares: &[f64]) -> Self {
        let mut group = vec![0; rows.len()];
        let cuts = folds.iter().map(|fold| {
            let of_fold: Vec<usize> = (0..rows.len()).filter(|&row| rows[row].fold == fold.fold).collect();
            let risks: Vec<f64> = of_fold.iter().map(|&row| rows[row].risk).collect();
            if risks.is_empty() {
                return Vec::new();
            }
            let cuts: Vec<f64> = shares.iter().map(|&p| quantile(&risks, p)).collect();
            for &row in &of_fold {
                group[row] = cuts.iter().filter(|&&cut| rows[row].risk >= cut).count();
            }
            cuts
        });
        let cuts = cuts.collect();
        Self::new(name, rows, shares.len() + 1, cuts, group)
    }

    /// Each fold's patients are cut at a rank among themselves: the one at which the log-rank
    /// statistic of the *other* folds' patients, ranked in their own folds, is greatest. Ranks, as
    /// the models of two folds need not share a scale of risk. No patient's outcome has a say in
    /// its own cut.
    pub fn learnt_cut(rows: &[SlideResult], folds: &[FoldFacts]) -> Result<Self> {
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
        Ok(Self::new("learnt_cut", rows, 2, cuts, group))
    }

    fn new(name: &'static str, rows: &[SlideResult], groups: usize, cuts: Vec<Vec<f64>>, group: Vec<usize>) -> Self {
        let count = |g: usize, events: bool| {
            group.iter().zip(rows).filter(|(other, row)| **other == g && (row.event || !events)).count()
        };
        let patients: Vec<usize> = (0..groups).map(|g| count(g, false)).collect();
        let events = (0..groups).map(|g| count(g, true)).collect();
        let test = match patients.iter().position(|&n| n == 0) {
            Some(empty) => {
                let label = LABELS[groups][empty].to_lowercase().replace(' ', "-");
                let reason = format!("the {label} group is empty, no predicted risk falls into it");
                Err(Error::Statistic { statistic: "the log-rank test", reason })
            }
            None => test(rows, &group),
        };
        let note = test.as_ref().err().map(reason);
        let hazard_ratio = ratio(rows, &group, test.as_ref().ok());
        let log_rank = test.ok().map(|LogRank { chi_squared, p_value, .. }| LogRankResult { chi_squared, p_value });
        let survival = (0..groups).map(|g| survival(rows, &group, g)).collect();
        Self { name, cuts, patients, events, log_rank, note, hazard_ratio, survival, group }
    }

    /// What a table or a sentence calls it.
    pub fn title(&self) -> &'static str {
        match self.name {
            "fold_median" => "Two groups, cut at each fold\u{2019}s median",
            "fold_tertiles" => "Three groups, cut at each fold\u{2019}s tertiles",
            "median" => "Two groups, cut at the median",
            "tertiles" => "Three groups, cut at the tertiles",
            _ => "Two groups, cut where the other folds part best",
        }
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

fn ratio(rows: &[SlideResult], group: &[usize], test: Option<&LogRank>) -> HazardRatioResult {
    let time: Vec<f64> = rows.iter().map(|row| row.time).collect();
    let event: Vec<bool> = rows.iter().map(|row| row.event).collect();
    let number: Vec<f64> = group.iter().map(|&g| g as f64).collect();
    match hazard_ratio(&time, &event, &number, LEVEL) {
        Ok(found) => HazardRatioResult {
            ratio: Some(found.ratio),
            interval: Some([found.lower, found.upper]),
            reversed: found.upper < 1.0,
            note: None,
        },
        // groups that are apart: who had fewer events than expected lives longer
        Err(e) => {
            let clear = test.filter(|test| test.p_value < 1.0 - LEVEL);
            let highest = clear.and_then(|test| Some((*test.observed.last()? as f64, *test.expected.last()?)));
            let reversed = highest.is_some_and(|(observed, expected)| observed < expected);
            HazardRatioResult { reversed, note: Some(reason(&e)), ..HazardRatioResult::default() }
        }
    }
}

fn survival(rows: &[SlideResult], group: &[usize], g: usize) -> Vec<SurvivalAt> {
    let of = || rows.iter().zip(group).filter(|(_, other)| **other == g).map(|(row, _)| row);
    let time: Vec<f64> = of().map(|row| row.time).collect();
    let event: Vec<bool> = of().map(|row| row.event).collect();
    let at_risk = number_at_risk(&time, &YEARS).unwrap_or(vec![0; YEARS.len()]);
    let curve = kaplan_meier(&time, &event, Limits::Log, LEVEL).ok(); // an empty group has none
    let at = |(&t, at_risk)| {
        let survival = curve.as_ref().and_then(|curve| curve.survival_at(t));
        let interval = survival.and_then(|_| curve.as_ref()?.limits_at(t)).map(|(lower, upper)| [lower, upper]);
        SurvivalAt { time: t, at_risk, survival, interval }
    };
    YEARS.iter().zip(at_risk).map(at).collect()
}

/// For each row, the share of its fold's rows of lower risk, half of those of equal risk (itself
/// included) counted.
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

/// The share at which the log-rank statistic of these rows is greatest (Lausen & Schumacher,
/// Biometrics 48:73, 1992), halfway between two of them; of equals the lowest.
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
