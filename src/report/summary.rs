//! The numbers of an evaluation.

use std::collections::{BTreeSet, HashMap};

use serde::Serialize;

use super::{
    accuracy::{Accuracy, Estimate, Horizon, Unit, by_patient},
    calibration::{CalibrationPoint, calibration},
    groups::{Grouping, LogRankResult},
    p_text, reason,
};
use crate::{
    Error, Result,
    survival::{Bootstrap, fold_mean},
};

/// A slide, its outcome and what the model said. A row of predictions.csv.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SlideResult {
    /// The patient's case, by which slides are put together.
    pub case_id: String,
    /// As in the clinical table; empty where a patient's slides are taken together.
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
    /// For each time bin, the probability of surviving it; empty where the model has one output.
    pub survival: Vec<f64>,
}

/// What is known of a fold besides its predictions.
#[derive(Clone, Debug, PartialEq)]
pub struct FoldFacts {
    /// Its number, by which predictions name it.
    pub fold: usize,
    /// None when a checkpoint is evaluated on a cohort that it was not trained in.
    pub train_slides: Option<usize>,
    /// The epoch whose weights were kept, from 0 as in metrics.jsonl; people are shown it from 1.
    pub best_epoch: Option<usize>,
    /// Where the model's time bins begin and end, in months; empty where it has none, or a
    /// checkpoint does not say.
    pub bin_edges: Vec<f64>,
}

/// A row of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FoldResult {
    /// The fold's number.
    pub fold: usize,
    /// As [`FoldFacts::train_slides`].
    pub train_slides: Option<usize>,
    /// Slides that the fold's model predicted.
    pub slides: usize,
    /// Patients of these slides.
    pub patients: usize,
    /// Slides whose patient had an event.
    pub events: usize,
    /// Patients that had an event.
    pub patient_events: usize,
    /// As [`FoldFacts::best_epoch`].
    pub best_epoch: Option<usize>,
    /// Harrell's C of the slides; None where it is undefined.
    pub c_index: Option<f64>,
    /// Why there is no C-index, or no interval of it.
    pub note: Option<String>,
}

/// How intervals and p-values were drawn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Resampling {
    /// Resampled cohorts, and permutations.
    pub replicates: usize,
    /// Of the draws: the same seed gives the same numbers.
    pub seed: u64,
    /// Of all intervals.
    pub level: f64,
}

/// summary.json; docs/outputs.md has its keys.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// In the order given.
    pub folds: Vec<FoldResult>,
    /// Over the folds that have a C-index.
    pub c_index_mean: Option<f64>,
    /// Population standard deviation (ddof 0) over the same folds; None of fewer than two.
    pub c_index_std: Option<f64>,
    /// Predicted slides, each once for every fold that predicted it.
    pub slides: usize,
    /// Patients of these slides, each once.
    pub patients: usize,
    /// Slides whose patient had an event.
    pub events: usize,
    /// Patients that had an event.
    pub patient_events: usize,
    /// How intervals and p-values were drawn.
    pub resampling: Resampling,
    /// Where every slide counts as one, as published.
    pub by_slide: Accuracy,
    /// None where every patient has one slide, which `by_slide` then is about.
    pub by_patient: Option<Accuracy>,
    /// Of all patients, whatever their fold.
    pub median_risk: f64,
    /// High risk against low risk, cut at `median_risk`. None where the test is undefined; `notes`
    /// says why.
    pub log_rank: Option<LogRankResult>,
    /// The ways to group patients, the leading one first: by rank within folds where there are
    /// several; at one cut over all; and at a learnt cut where there is one.
    pub risk_groups: Vec<Grouping>,
    /// Predicted against observed survival, empty where it is undefined.
    pub calibration: Vec<CalibrationPoint>,
    /// How each fold's epoch was chosen, in a sentence; empty where that is not known.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub protocol: String,
    /// Sentences without which these numbers would mislead.
    pub warnings: Vec<String>,
    /// Sentences that a reader of these numbers should know.
    pub notes: Vec<String>,
    /// What `risk_groups` and `calibration` are made of: a row a patient, or a slide where patients
    /// cannot be told.
    #[serde(skip)]
    pub rows: Vec<SlideResult>,
    /// What a row of `rows` is.
    #[serde(skip)]
    pub unit: Unit,
}

/// What the tool draws unless it is told otherwise.
pub const RESAMPLING: Bootstrap = Bootstrap { replicates: 1000, seed: 0, level: 0.95 };

impl Summary {
    /// A statistic that the cohort does not define becomes a note, not an error. An error if there
    /// is no prediction, or one is not finite.
    pub fn new(folds: &[FoldFacts], predictions: &[SlideResult], plan: Bootstrap) -> Result<Self> {
        if predictions.is_empty() {
            return Err(Error::Usage("there are no slides to evaluate".into()));
        }
        if let Some(bad) = predictions.iter().find(|p| !p.risk.is_finite() || !p.time.is_finite()) {
            let (slide, risk, time) = (&bad.slide_id, bad.risk, bad.time);
            return Err(Error::Usage(format!(
                "slide {slide}: risk {risk} after {time} months, expected finite numbers"
            )));
        }
        let mut notes = Vec::new();
        let (unit, rows) = match by_patient(predictions) {
            Ok(rows) => (Unit::Patient, rows),
            Err(e) => {
                notes.push(format!("Nothing is reported by patient: {e}."));
                (Unit::Slide, predictions.to_vec())
            }
        };
        let times = Horizon::new(&rows);
        let by_slide = Accuracy::new(Unit::Slide, predictions, folds, &times, plan)?;
        let results: Vec<FoldResult> = folds
            .iter()
            .zip(&by_slide.c_index_by_fold)
            .map(|(fold, c_index)| FoldResult::new(fold, c_index, predictions))
            .collect();
        let c: Vec<f64> = results.iter().filter_map(|fold| fold.c_index).collect();
        let of = |f: &FoldResult| {
            let lacks = if f.c_index.is_none() { "C-index" } else { "interval of its C-index" };
            f.note.as_ref().map(|note| format!("Fold {} has no {lacks}: {note}.", f.fold))
        };
        notes.extend(results.iter().filter_map(of));
        if !c.is_empty() && c.len() < folds.len() {
            notes.push(format!("The mean is over the {} of {} folds that have a C-index.", c.len(), folds.len()));
        }
        let patients = patients_of(predictions.iter());
        let several = rows.len() < predictions.len();
        let by_patient = several.then(|| Accuracy::new(Unit::Patient, &rows, folds, &times, plan)).transpose()?;
        if several {
            notes.push(format!(
                "{patients} patients have {} slides. By slide every slide counts as one, as published; by patient the \
                 risks of a patient's slides are averaged. Curves, risk groups and calibration are by patient.",
                predictions.len()
            ));
        } else if predictions.iter().map(|p| (&p.case_id, p.fold)).collect::<BTreeSet<_>>().len() > patients {
            notes.push("Some patients are validated in several folds and count once in each.".into());
        }
        let one_cut = Grouping::median(&rows);
        let (median_risk, log_rank) = (one_cut.cuts[0][0], one_cut.log_rank.clone());
        let mut risk_groups = match folds.len() {
            0 | 1 => vec![one_cut, Grouping::tertiles(&rows)],
            _ => vec![Grouping::fold_median(&rows, folds), Grouping::fold_tertiles(&rows, folds), one_cut],
        };
        match Grouping::learnt_cut(&rows, folds) {
            Ok(grouping) => risk_groups.push(grouping),
            Err(e) if folds.len() > 1 => notes.push(format!("There is no learnt cut: {}.", reason(&e))),
            Err(_) => {}
        }
        if let Some(why) = &risk_groups[0].note {
            notes.push(format!("There is no log-rank test: {why}."));
        }
        let main = by_patient.as_ref().unwrap_or(&by_slide);
        let warnings =
            [below_chance(&by_slide, by_patient.as_ref()), reversed_groups(&risk_groups[0]), worse_than_no_model(main)];
        let calibration = calibration(&rows, folds).unwrap_or_else(|why| {
            notes.push(format!("There is no calibration: {why}."));
            Vec::new()
        });
        Ok(Self {
            folds: results,
            c_index_mean: (!c.is_empty()).then(|| c.iter().sum::<f64>() / c.len() as f64),
            c_index_std: fold_mean(&c, 0, plan.level).ok().map(|mean| mean.sd),
            slides: predictions.len(),
            patients,
            events: predictions.iter().filter(|p| p.event).count(),
            patient_events: patients_of(predictions.iter().filter(|p| p.event)),
            resampling: Resampling { replicates: plan.replicates, seed: plan.seed, level: plan.level },
            by_slide,
            by_patient,
            median_risk,
            log_rank,
            risk_groups,
            calibration,
            protocol: String::new(),
            warnings: warnings.into_iter().flatten().collect(),
            notes,
            rows,
            unit,
        })
    }

    /// Which row of `rows` a slide belongs to: the patient and fold, or the slide itself where
    /// patients cannot be told.
    pub fn row_of<'a>(&self, slide: &'a SlideResult) -> (&'a str, &'a str, usize) {
        let id = if self.unit == Unit::Patient { "" } else { slide.slide_id.as_str() };
        (&slide.case_id, id, slide.fold)
    }

    /// The group of each row, by [`Self::row_of`], in the leading grouping.
    pub fn leading_groups(&self) -> HashMap<(&str, &str, usize), usize> {
        self.rows.iter().map(|row| self.row_of(row)).zip(self.risk_groups[0].group.iter().copied()).collect()
    }

    /// The statistics of patients, whatever they are called.
    pub fn of_patients(&self) -> &Accuracy {
        self.by_patient.as_ref().unwrap_or(&self.by_slide)
    }

    /// Mean and standard deviation, where there are folds to speak of.
    pub fn c_index_over_folds(&self) -> Option<(f64, f64)> {
        self.c_index_mean.zip(self.c_index_std)
    }
}

impl FoldResult {
    fn new(fold: &FoldFacts, c_index: &Estimate, predictions: &[SlideResult]) -> Self {
        let of_fold: Vec<&SlideResult> = predictions.iter().filter(|p| p.fold == fold.fold).collect();
        Self {
            fold: fold.fold,
            train_slides: fold.train_slides,
            slides: of_fold.len(),
            patients: patients_of(of_fold.iter().copied()),
            events: of_fold.iter().filter(|p| p.event).count(),
            patient_events: patients_of(of_fold.iter().copied().filter(|p| p.event)),
            best_epoch: fold.best_epoch,
            c_index: c_index.estimate,
            note: c_index.note.clone(),
        }
    }
}

/// That higher risks go with longer lives.
fn below_chance(by_slide: &Accuracy, by_patient: Option<&Accuracy>) -> Option<String> {
    let below = |accuracy: &Accuracy, unit: &str| {
        let folds = accuracy.c_index_by_fold.len();
        let estimates =
            [("mean of folds", &accuracy.c_index_fold_mean), ("all folds pooled", &accuracy.c_index_pooled)];
        let text = |(name, estimate): (&str, &Estimate)| {
            let c = estimate.estimate.filter(|&c| c < 0.5)?;
            let name = if folds > 1 { format!(", {name}") } else { String::new() };
            Some(format!("{c:.3} by {unit}{name}"))
        };
        estimates.into_iter().skip(usize::from(folds < 2)).filter_map(text).collect::<Vec<_>>()
    };
    let list = [below(by_slide, "slide"), by_patient.map_or(Vec::new(), |unit| below(unit, "patient"))].concat();
    (!list.is_empty()).then(|| {
        format!(
            "The C-index is below 0.5 ({}): those of higher predicted risk live longer, and chance would order them better.",
            list.join("; ")
        )
    })
}

/// That the predicted survival is further from what happened than one curve for everybody.
fn worse_than_no_model(accuracy: &Accuracy) -> Option<String> {
    let (model, nobody) = (accuracy.brier.integrated.estimate?, accuracy.brier.kaplan_meier?);
    (model > nobody).then(|| {
        format!(
            "The Brier score, {model:.4}, is worse than that of one Kaplan-Meier curve for everybody, {nobody:.4}: the \
             predicted probabilities of survival are off, and only the order of the risks is of use."
        )
    })
}

/// That the groups of higher risk live longer, in the leading grouping: one cut over all folds may
/// part folds and not patients.
fn reversed_groups(leading: &Grouping) -> Option<String> {
    let title = leading.title().to_lowercase();
    let evidence = match (leading.hazard_ratio.ratio, &leading.log_rank) {
        (None, Some(test)) => format!("log-rank {}", p_text(test.p_value)),
        _ => leading.hazard_ratio.text(),
    };
    leading.hazard_ratio.reversed.then(|| {
        format!("The high-risk group lives longer ({title}: {evidence}): the model is reversed on these patients.")
    })
}

fn patients_of<'a>(predictions: impl Iterator<Item = &'a SlideResult>) -> usize {
    predictions.map(|p| p.case_id.as_str()).collect::<BTreeSet<_>>().len()
}
