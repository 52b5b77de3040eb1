//! The numbers of an evaluation.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::{
    Error, Result,
    report::{km::Group, p_text},
    survival::{concordance_index, log_rank},
};

/// A slide, its outcome and what the model said. A row of predictions.csv.
#[derive(Clone, Debug, PartialEq)]
pub struct SlideResult {
    pub case_id: String,
    pub slide_id: String,
    /// The fold whose model made the prediction; the slide is of its validation part.
    pub fold: usize,
    /// Months to the event or to censoring.
    pub time: f64,
    /// True when the event was observed.
    pub event: bool,
    /// -sum of the survival curve, or the model's one output; higher is worse.
    pub risk: f64,
    /// One for each time bin; empty where the model has one output.
    pub hazards: Vec<f64>,
    pub survival: Vec<f64>,
}

/// What is known of a fold besides its predictions.
#[derive(Clone, Debug, PartialEq)]
pub struct Fold {
    pub fold: usize,
    /// None when a checkpoint is evaluated on a cohort that it was not trained in.
    pub train_slides: Option<usize>,
    /// The epoch whose weights were kept, from 0 as in metrics.jsonl; people are shown it from 1.
    pub best_epoch: Option<usize>,
}

/// A row of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FoldResult {
    pub fold: usize,
    pub train_slides: Option<usize>,
    pub slides: usize,
    pub patients: usize,
    pub events: usize,
    pub best_epoch: Option<usize>,
    /// Harrell's C; None where it is undefined, and then `note` says why.
    pub c_index: Option<f64>,
    pub note: Option<String>,
}

/// High risk against low risk, cut at the median of the pooled risks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LogRankResult {
    pub chi_squared: f64,
    pub p_value: f64,
}

/// summary.json
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    pub folds: Vec<FoldResult>,
    /// Over the folds that have a C-index.
    pub c_index_mean: Option<f64>,
    /// Population standard deviation (ddof 0) over the same folds.
    pub c_index_std: Option<f64>,
    pub slides: usize,
    pub patients: usize,
    pub events: usize,
    /// A slide of this risk or more is of high risk.
    pub median_risk: f64,
    /// None where the test is undefined; `notes` says why.
    pub log_rank: Option<LogRankResult>,
    /// How each fold's epoch was chosen, in a sentence; empty where that is not known.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub protocol: String,
    /// Sentences that a reader of these numbers should know.
    pub notes: Vec<String>,
}

impl Summary {
    /// A statistic that the cohort does not define becomes a note, not an error. An error if there is no prediction, or
    /// one is not finite.
    pub fn new(folds: &[Fold], predictions: &[SlideResult]) -> Result<Self> {
        if predictions.is_empty() {
            return Err(Error::Usage("there are no slides to evaluate".into()));
        }
        if let Some(bad) = predictions.iter().find(|p| !p.risk.is_finite() || !p.time.is_finite()) {
            let (slide, risk, time) = (&bad.slide_id, bad.risk, bad.time);
            return Err(Error::Usage(format!(
                "slide {slide}: risk {risk} after {time} months, expected finite numbers"
            )));
        }
        let folds: Vec<FoldResult> = folds.iter().map(|fold| FoldResult::new(fold, predictions)).collect();
        let c: Vec<f64> = folds.iter().filter_map(|fold| fold.c_index).collect();
        let mean = (!c.is_empty()).then(|| c.iter().sum::<f64>() / c.len() as f64);
        let std = mean.map(|mean| (c.iter().map(|c| (c - mean).powi(2)).sum::<f64>() / c.len() as f64).sqrt());

        let mut notes = Vec::new();
        let of = |f: &FoldResult| f.note.as_ref().map(|note| format!("Fold {} has no C-index: {note}.", f.fold));
        notes.extend(folds.iter().filter_map(of));
        if !notes.is_empty() && !c.is_empty() {
            notes.push(format!("The mean is over the {} of {} folds that have a C-index.", c.len(), folds.len()));
        }
        let median_risk = median(predictions.iter().map(|p| p.risk).collect());
        let log_rank = pooled_log_rank(predictions, median_risk)
            .map_err(|e| notes.push(format!("There is no log-rank test: {}.", reason(&e))));
        let patients = patients(predictions.iter());
        if patients < predictions.len() {
            notes.push(format!(
                "Every slide counts as one: {patients} patients have {} slides, so some patients count more than once.",
                predictions.len()
            ));
        }
        Ok(Self {
            folds,
            c_index_mean: mean,
            c_index_std: std,
            slides: predictions.len(),
            patients,
            events: predictions.iter().filter(|p| p.event).count(),
            median_risk,
            log_rank: log_rank.ok(),
            protocol: String::new(),
            notes,
        })
    }

    /// The table that a terminal shows.
    pub fn table(&self) -> String {
        let number = |value: Option<usize>| value.map_or("-".into(), |value| value.to_string());
        let mut table = String::from(" fold   train  slides  patients  events  best epoch  C-index\n");
        for f in &self.folds {
            let (train, best) = (number(f.train_slides), number(f.best_epoch.map(|epoch| epoch + 1)));
            let c_index = f.c_index.map_or("-".into(), |c| format!("{c:.4}"));
            let FoldResult { fold, slides, patients, events, .. } = f;
            table +=
                &format!("{fold:>5}  {train:>6}  {slides:>6}  {patients:>8}  {events:>6}  {best:>10}  {c_index:>7}\n");
        }
        if let Some((mean, std)) = self.c_index_over_folds() {
            table += &format!("C-index {mean:.4} +- {std:.4} (mean and standard deviation over folds)\n");
        }
        if let Some(test) = &self.log_rank {
            table += &format!("log-rank {} (high against low risk, cut at the median)\n", p_text(test.p_value));
        }
        if !self.protocol.is_empty() {
            table += &format!("{}\n", self.protocol);
        }
        self.notes.iter().for_each(|note| table += &format!("note: {note}\n"));
        table
    }

    /// Mean and standard deviation, where there are folds to speak of.
    pub fn c_index_over_folds(&self) -> Option<(f64, f64)> {
        self.c_index_mean.zip(self.c_index_std).filter(|_| self.folds.len() > 1)
    }

    /// Low risk, then high risk; one may be empty.
    pub fn risk_groups(&self, predictions: &[SlideResult]) -> [Group; 2] {
        [("Low risk", false), ("High risk", true)].map(|(label, high)| {
            let of_group = || predictions.iter().filter(|p| (p.risk >= self.median_risk) == high);
            Group {
                label: label.into(),
                time: of_group().map(|p| p.time).collect(),
                event: of_group().map(|p| p.event).collect(),
            }
        })
    }
}

impl FoldResult {
    fn new(fold: &Fold, predictions: &[SlideResult]) -> Self {
        let of_fold: Vec<&SlideResult> = predictions.iter().filter(|p| p.fold == fold.fold).collect();
        let c_index = concordance_index(
            &of_fold.iter().map(|p| p.time).collect::<Vec<_>>(),
            &of_fold.iter().map(|p| p.event).collect::<Vec<_>>(),
            &of_fold.iter().map(|p| p.risk).collect::<Vec<_>>(),
        );
        Self {
            fold: fold.fold,
            train_slides: fold.train_slides,
            slides: of_fold.len(),
            patients: patients(of_fold.iter().copied()),
            events: of_fold.iter().filter(|p| p.event).count(),
            best_epoch: fold.best_epoch,
            note: c_index.as_ref().err().map(reason),
            c_index: c_index.ok().map(|c| c.index),
        }
    }
}

fn pooled_log_rank(predictions: &[SlideResult], median_risk: f64) -> Result<LogRankResult> {
    let time: Vec<f64> = predictions.iter().map(|p| p.time).collect();
    let event: Vec<bool> = predictions.iter().map(|p| p.event).collect();
    let high: Vec<usize> = predictions.iter().map(|p| usize::from(p.risk >= median_risk)).collect();
    if !high.contains(&0) {
        let reason = format!("no slide's risk is below the median {median_risk:.4}, so the low-risk group is empty");
        return Err(Error::Statistic { statistic: "the log-rank test", reason });
    }
    let test = log_rank(&time, &event, &high, None)?;
    Ok(LogRankResult { chi_squared: test.chi_squared, p_value: test.p_value })
}

fn patients<'a>(predictions: impl Iterator<Item = &'a SlideResult>) -> usize {
    predictions.map(|p| p.case_id.as_str()).collect::<BTreeSet<_>>().len()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let half = values.len() / 2;
    if values.len() % 2 == 1 { values[half] } else { 0.5 * (values[half - 1] + values[half]) }
}

/// What an error says besides the statistic's name.
fn reason(error: &Error) -> String {
    match error {
        Error::Statistic { reason, .. } => reason.clone(),
        other => other.to_string(),
    }
}
