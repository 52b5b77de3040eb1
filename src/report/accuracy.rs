//! How well predictions order and time the events: every statistic of an evaluation with its
//! interval.
//!
//! A statistic that the cohort does not define has no number but a sentence that says why.

use std::collections::HashMap;

use serde::Serialize;

use super::{FoldFacts, SlideResult, reason};
use crate::{
    Error, Result,
    survival::{
        Bootstrap, CensoringDistribution, Limits, Patients, bootstrap, brier_score, concordance_index,
        concordance_index_ipcw, concordance_permutation_test, dynamic_auc, fold_mean_in_unit, kaplan_meier, short,
    },
};

/// A statistic and its interval.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Estimate {
    /// None where the statistic is undefined; `note` says why.
    pub estimate: Option<f64>,
    /// Lower and upper end; None where it is undefined, and `note` says why.
    pub interval: Option<[f64; 2]>,
    /// Why there is no number or no interval, without a full stop.
    pub note: Option<String>,
}

impl Estimate {
    fn undefined(why: impl Into<String>) -> Self {
        Self { note: Some(why.into()), ..Self::default() }
    }

    /// A statistic of `rows`, and its percentile interval over resampled patients.
    pub fn resampled<S>(patients: &Patients, rows: usize, plan: Bootstrap, statistic: S) -> Self
    where
        S: Fn(&[usize]) -> Result<f64> + Sync,
    {
        match statistic(&(0..rows).collect::<Vec<_>>()) {
            Err(e) => Self::undefined(reason(&e)),
            Ok(estimate) => match bootstrap(patients, plan, statistic) {
                Ok(i) => Self { estimate: Some(estimate), interval: Some([i.lower, i.upper]), note: None },
                Err(e) => Self { estimate: Some(estimate), interval: None, note: Some(reason(&e)) },
            },
        }
    }

    /// The interval cut to where the statistic lies: weights for censoring can carry a resampled
    /// Brier score past 1.
    fn within(mut self, low: f64, high: f64) -> Self {
        self.interval = self.interval.map(|ends| ends.map(|end| end.clamp(low, high)));
        self
    }

    /// "0.8425 (0.7801 to 0.8912)", or what there is of it; "-" where there is nothing.
    pub fn text(&self) -> String {
        match (self.estimate, self.interval) {
            (Some(estimate), Some([lower, upper])) => format!("{estimate:.4} ({lower:.4} to {upper:.4})"),
            (Some(estimate), None) => format!("{estimate:.4}"),
            _ => "-".into(),
        }
    }
}

/// What a row of the statistics stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Every slide counts as one.
    Slide,
    /// A patient's slides taken together: the mean of their risks and of their survival curves.
    Patient,
}

/// Cumulative/dynamic AUC over time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AucCurve {
    /// Months; empty where the curve is undefined.
    pub times: Vec<f64>,
    /// For each of the times, with a pointwise interval.
    pub auc: Vec<Estimate>,
    /// Over the times, weighted by the fall of the Kaplan-Meier curve.
    pub mean: Estimate,
}

/// Brier scores of the predicted survival curves at the edges between time bins.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Brier {
    /// Months; empty where the score is undefined.
    pub times: Vec<f64>,
    /// For each of the times; lower is better.
    pub score: Vec<f64>,
    /// Mean over the span of the times.
    pub integrated: Estimate,
    /// The integrated score of one Kaplan-Meier curve for everybody, which a model should undercut.
    pub kaplan_meier: Option<f64>,
}

/// The statistics of slides, or of patients.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Accuracy {
    /// What a row is.
    pub unit: Unit,
    /// Slides, or patients, each once for every fold that predicted it.
    pub rows: usize,
    /// Rows that had an event.
    pub events: usize,
    /// Harrell's C of each fold, in the order of the folds.
    pub c_index_by_fold: Vec<Estimate>,
    /// Mean over the folds that have a C-index, with Student's t interval over folds on the logit
    /// scale; none of two folds.
    pub c_index_fold_mean: Estimate,
    /// Harrell's C of all rows, pairs across folds included.
    pub c_index_pooled: Estimate,
    /// One-sided p of the pooled C-index: risks dealt anew within folds. No interval.
    pub c_index_permutation_p: Estimate,
    /// The last time that Uno's C and the AUC look at: a tenth of the patients are followed longer.
    /// Months.
    pub horizon: f64,
    /// Events before the horizon.
    pub uno_c: Estimate,
    /// Of the risk, up to the horizon.
    pub auc: AucCurve,
    /// Of the survival curves; undefined where the model has no time bins.
    pub brier: Brier,
}

/// Points of the AUC's curve.
const AUC_TIMES: usize = 16;
/// The AUC's curve begins when this many events are seen: with fewer, too many resampled cohorts
/// have none.
const FIRST_EVENTS: usize = 5;

/// The times that statistics look at, chosen once for slides and patients.
pub struct Horizon {
    /// A tenth of the rows are followed longer.
    last: f64,
    /// The AUC's, or why there are none.
    auc: Result<Vec<f64>, String>,
}

impl Horizon {
    /// There is at least one row.
    pub fn new(rows: &[SlideResult]) -> Self {
        let last = quantile(&rows.iter().map(|row| row.time).collect::<Vec<_>>(), 0.9);
        Self { last, auc: auc_times(rows, last) }
    }
}

impl Accuracy {
    /// `rows` are slides, or patients of [`by_patient`].
    pub fn new(
        unit: Unit,
        rows: &[SlideResult],
        folds: &[FoldFacts],
        times: &Horizon,
        plan: Bootstrap,
    ) -> Result<Self> {
        let cohort = Columns::new(rows);
        let patients = draws(rows)?;
        let all = rows.len();
        let c_index_by_fold: Vec<Estimate> = folds.iter().map(|fold| fold_c_index(rows, fold.fold, plan)).collect();
        let c: Vec<f64> = c_index_by_fold.iter().filter_map(|c| c.estimate).collect();
        let horizon = times.last;
        let uno = |rows: &[usize]| {
            let drawn = cohort.pick(rows);
            concordance_index_ipcw(&drawn.censoring()?, &drawn.time, &drawn.event, &drawn.risk, Some(horizon))
        };
        Ok(Self {
            unit,
            rows: all,
            events: cohort.event.iter().filter(|&&event| event).count(),
            c_index_by_fold,
            c_index_fold_mean: mean_over_folds(&c, plan.level),
            c_index_pooled: Estimate::resampled(&patients, all, plan, |rows| cohort.pick(rows).c_index()),
            c_index_permutation_p: permutation(rows, &cohort, plan),
            horizon,
            uno_c: Estimate::resampled(&patients, all, plan, uno),
            auc: auc_curve(&cohort, &patients, &times.auc, plan),
            brier: brier(rows, &cohort, folds, &patients, plan),
        })
    }
}

/// One row a patient and fold: the mean of the risks and survival curves of its slides. An error if
/// slides of a patient have different outcomes.
pub fn by_patient(slides: &[SlideResult]) -> Result<Vec<SlideResult>> {
    let mut places: HashMap<(&str, usize), usize> = HashMap::new();
    let mut rows: Vec<(SlideResult, f64)> = Vec::new();
    for slide in slides {
        let place = *places.entry((&slide.case_id, slide.fold)).or_insert(rows.len());
        let Some((row, count)) = rows.get_mut(place) else {
            rows.push((SlideResult { slide_id: String::new(), hazards: Vec::new(), ..slide.clone() }, 1.0));
            continue;
        };
        if (row.time, row.event) != (slide.time, slide.event) || row.survival.len() != slide.survival.len() {
            return Err(Error::Usage(format!("the slides of patient {} have different outcomes", slide.case_id)));
        }
        row.risk += slide.risk;
        row.survival.iter_mut().zip(&slide.survival).for_each(|(sum, s)| *sum += s);
        *count += 1.0;
    }
    let mean = |(mut row, count): (SlideResult, f64)| {
        row.risk /= count;
        row.survival.iter_mut().for_each(|s| *s /= count);
        row
    };
    Ok(rows.into_iter().map(mean).collect())
}

/// Columns of a cohort.
#[derive(Clone, Debug, Default)]
pub(crate) struct Columns {
    pub time: Vec<f64>,
    pub event: Vec<bool>,
    pub risk: Vec<f64>,
}

impl Columns {
    pub fn new<'a>(rows: impl IntoIterator<Item = &'a SlideResult>) -> Self {
        let mut columns = Self::default();
        for row in rows {
            columns.time.push(row.time);
            columns.event.push(row.event);
            columns.risk.push(row.risk);
        }
        columns
    }

    pub fn pick(&self, rows: &[usize]) -> Self {
        Self {
            time: rows.iter().map(|&row| self.time[row]).collect(),
            event: rows.iter().map(|&row| self.event[row]).collect(),
            risk: rows.iter().map(|&row| self.risk[row]).collect(),
        }
    }

    pub fn c_index(&self) -> Result<f64> {
        Ok(concordance_index(&self.time, &self.event, &self.risk)?.index)
    }

    fn censoring(&self) -> Result<CensoringDistribution> {
        CensoringDistribution::fit(&self.time, &self.event)
    }
}

/// What the bootstrap draws: patients with all their rows, within folds. A patient that several
/// folds validate on is drawn with all of its rows, and then folds are not kept apart.
pub fn draws(rows: &[SlideResult]) -> Result<Patients> {
    let mut numbers = HashMap::new();
    let mut homes = Vec::new();
    let mut patient = Vec::new();
    for row in rows {
        let number = *numbers.entry(row.case_id.as_str()).or_insert(homes.len());
        if number == homes.len() {
            homes.push(row.fold);
        }
        patient.push(number);
    }
    let fold: Vec<usize> = rows.iter().map(|row| row.fold).collect();
    let one_home = patient.iter().zip(&fold).all(|(&patient, &fold)| homes[patient] == fold);
    Patients::new(&patient, one_home.then_some(&fold))
}

fn fold_c_index(rows: &[SlideResult], fold: usize, plan: Bootstrap) -> Estimate {
    let rows: Vec<SlideResult> = rows.iter().filter(|row| row.fold == fold).cloned().collect();
    let cohort = Columns::new(&rows);
    match draws(&rows) {
        Ok(patients) => Estimate::resampled(&patients, rows.len(), plan, |rows| cohort.pick(rows).c_index()),
        Err(e) => Estimate::undefined(reason(&e)),
    }
}

fn mean_over_folds(c: &[f64], level: f64) -> Estimate {
    match c {
        [] => Estimate::undefined("no fold has a C-index"),
        [c] => {
            let note = "one fold has no spread".to_string();
            Estimate { estimate: Some(*c), interval: None, note: Some(note) }
        }
        [a, b] => {
            let note = "two folds are too few for an interval over folds, which has one degree of freedom".to_string();
            Estimate { estimate: Some(0.5 * (a + b)), interval: None, note: Some(note) }
        }
        _ => match fold_mean_in_unit(c, 1, level) {
            Ok(mean) => Estimate { estimate: Some(mean.mean), interval: Some([mean.lower, mean.upper]), note: None },
            Err(e) => Estimate::undefined(reason(&e)),
        },
    }
}

/// As many permutations as the bootstrap has replicates.
fn permutation(rows: &[SlideResult], cohort: &Columns, plan: Bootstrap) -> Estimate {
    let mut cases: Vec<&str> = rows.iter().map(|row| row.case_id.as_str()).collect();
    cases.sort_unstable();
    if cases.windows(2).any(|pair| pair[0] == pair[1]) {
        return Estimate::undefined("a patient with several rows cannot be exchanged for one with a single row");
    }
    let fold: Vec<usize> = rows.iter().map(|row| row.fold).collect();
    let Columns { time, event, risk } = cohort;
    match concordance_permutation_test(time, event, risk, Some(&fold), plan.replicates, plan.seed) {
        Ok(test) => Estimate { estimate: Some(test.p_value), ..Estimate::default() },
        Err(e) => Estimate::undefined(reason(&e)),
    }
}

fn auc_curve(cohort: &Columns, patients: &Patients, times: &Result<Vec<f64>, String>, plan: Bootstrap) -> AucCurve {
    let times = match times {
        Ok(times) => times,
        Err(why) => return AucCurve { times: Vec::new(), auc: Vec::new(), mean: Estimate::undefined(why) },
    };
    let at = |times: &[f64], rows: &[usize]| {
        let drawn = cohort.pick(rows);
        dynamic_auc(&drawn.censoring()?, &drawn.time, &drawn.event, &drawn.risk, times)
    };
    let all = cohort.time.len();
    let point = |&t: &f64| Estimate::resampled(patients, all, plan, |rows| Ok(at(&[t], rows)?.mean));
    let auc = times.iter().map(point).collect();
    let mean = Estimate::resampled(patients, all, plan, |rows| Ok(at(times, rows)?.mean));
    AucCurve { times: times.clone(), auc, mean }
}

/// Even steps from when a tenth of the events, and five, are seen, up to the horizon.
fn auc_times(rows: &[SlideResult], horizon: f64) -> Result<Vec<f64>, String> {
    let mut events: Vec<f64> = rows.iter().filter(|row| row.event).map(|row| row.time).collect();
    events.sort_unstable_by(f64::total_cmp);
    let Some(&fifth) = events.get(FIRST_EVENTS - 1) else {
        return Err(format!("its curve needs {FIRST_EVENTS} events, and there are {}", events.len()));
    };
    let start = quantile(&events, 0.1).max(fifth);
    if start >= horizon {
        let [start, horizon] = [start, horizon].map(short);
        return Err(format!("its curve begins after {start} months, and a tenth are followed beyond {horizon}"));
    }
    let step = (horizon - start) / (AUC_TIMES - 1) as f64;
    Ok((0..AUC_TIMES).map(|i| start + i as f64 * step).collect())
}

fn brier(rows: &[SlideResult], cohort: &Columns, folds: &[FoldFacts], patients: &Patients, plan: Bootstrap) -> Brier {
    let scored = || -> Result<Brier, String> {
        let mut times = edge_times(folds)?;
        let (first, last) = cohort.time.iter().fold((f64::MAX, f64::MIN), |(a, b), &t| (a.min(t), b.max(t)));
        times.retain(|&t| first <= t && t < last); // elsewhere a score is not defined
        if times.len() < 2 {
            let [first, last] = [first, last].map(short);
            return Err(format!("fewer than two ends of time bins lie in follow-up, from {first} to {last} months"));
        }
        let predicted = survival_at(rows, folds, &times)?;
        let width = times.len();
        let score = |rows: &[usize]| {
            let drawn = cohort.pick(rows);
            let survival: Vec<f64> = rows.iter().flat_map(|&row| &predicted[row * width..][..width]).copied().collect();
            brier_score(&drawn.censoring()?, &drawn.time, &drawn.event, &survival, &times)
        };
        let all = cohort.time.len();
        let whole = score(&(0..all).collect::<Vec<_>>()).map_err(|e| reason(&e))?;
        let integrated = Estimate::resampled(patients, all, plan, |rows| score(rows)?.integrated()).within(0.0, 1.0);
        let kaplan_meier = brier_of_kaplan_meier(cohort, &times).ok();
        Ok(Brier { times: times.clone(), score: whole.score, integrated, kaplan_meier })
    };
    scored().unwrap_or_else(|why| Brier {
        times: Vec::new(),
        score: Vec::new(),
        integrated: Estimate::undefined(why),
        kaplan_meier: None,
    })
}

fn brier_of_kaplan_meier(cohort: &Columns, times: &[f64]) -> Result<f64> {
    let Columns { time, event, .. } = cohort;
    let curve = kaplan_meier(time, event, Limits::Log, 0.95)?;
    let survival: Vec<f64> = times.iter().filter_map(|&t| curve.survival_at(t)).collect();
    brier_score(&cohort.censoring()?, time, event, &survival.repeat(time.len()), times)?.integrated()
}

/// The inner edges of the time bins, in months: those of the folds' models, averaged where folds
/// cut their own.
pub fn edge_times(folds: &[FoldFacts]) -> Result<Vec<f64>, String> {
    let edges: Vec<&[f64]> = folds.iter().map(|fold| fold.bin_edges.as_slice()).collect();
    let bins = edges.first().map_or(0, |edges| edges.len());
    if bins == 0 || edges.iter().any(|edges| edges.len() != bins) {
        return Err("the model has no time bins, or does not say where they end".into());
    }
    Ok((1..bins - 1).map(|i| edges.iter().map(|edges| edges[i]).sum::<f64>() / edges.len() as f64).collect())
}

/// Predicted survival at `times`, row by row: at the end of bin k it is survival\[k\], and runs
/// straight between the ends.
pub fn survival_at(rows: &[SlideResult], folds: &[FoldFacts], times: &[f64]) -> Result<Vec<f64>, String> {
    let mut all = Vec::with_capacity(rows.len() * times.len());
    for row in rows {
        let edges = folds.iter().find(|fold| fold.fold == row.fold).map_or(&[][..], |fold| &fold.bin_edges);
        if edges.len() != row.survival.len() + 1 || edges.is_empty() {
            return Err("the predictions hold no survival curve over the model's time bins".into());
        }
        all.extend(times.iter().map(|&t| {
            let bin = edges[1..].partition_point(|&edge| edge < t).min(row.survival.len() - 1);
            let before = if bin == 0 { 1.0 } else { row.survival[bin - 1] };
            let share = ((t - edges[bin]) / (edges[bin + 1] - edges[bin])).clamp(0.0, 1.0);
            before * (1.0 - share) + row.survival[bin] * share
        }));
    }
    Ok(all)
}

/// R's default quantile (type 7).
pub fn quantile(values: &[f64], p: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let place = p * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    low + (high - low) * place.fract()
}
