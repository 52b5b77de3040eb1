//! Predictions of slides whose outcome is not known, by one model or by the folds of a run
//! together.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use bytesize::ByteSize;
use serde::Serialize;

use super::{Network, load, of_card, overlap, predict_slides, wrong_width};
use crate::{
    Error, Result,
    data::{
        atomic::write_text,
        cohort::{LEFT_OUT, LeftOut, write_left_out},
        dataset::{Dataset, Which},
    },
    device::Device,
    folder,
    report::{
        FoldFacts, SlideResult,
        accuracy::{edge_times, survival_at},
        read_predictions,
    },
    train::{config::RunConfig, fold::FoldTrainer},
};

/// The predictions as a table, in their folder.
pub const CSV: &str = "predictions.csv";
/// The predictions as JSON, in their folder: [`Predictions`].
pub const JSON: &str = "predictions.json";

/// What to predict with, and which slides.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// A run's folder, whose folds' models are averaged, or a model file.
    pub model: &'a Path,
    /// As [`Checkpoint::heads`](super::Checkpoint::heads).
    pub heads: Option<usize>,
    /// Folder of the features, in one of the layouts of [`crate::data::layout`].
    pub pt_dir: &'a Path,
    /// Name of the feature extractor, as folders of features carry it.
    pub backbone: &'a str,
    /// Which of them.
    pub slides: Which<'a>,
}

/// predictions.json.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Predictions {
    /// The model files whose predictions are averaged.
    pub models: Vec<PathBuf>,
    /// Where the time bins begin and end, in months, one more than there are hazards. Empty where
    /// the model has none, or does not say. Folds that cut their own have the mean of theirs here.
    pub bin_edges: Vec<f64>,
    /// In the order of the table of slides; without one, sorted by id.
    pub slides: Vec<SlidePrediction>,
    /// Slides without a prediction, and why.
    pub left_out: Vec<LeftOut>,
    /// Sentences on slides that a model has met in training.
    pub notes: Vec<String>,
}

/// A slide's prediction: the mean over the models of their survival curves and of their risks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SlidePrediction {
    /// As in the table of slides; without one, the name of the slide's feature files.
    pub slide_id: String,
    /// Higher is worse. Of a model with time bins it is minus the sum of the survival curve.
    pub risk: f64,
    /// Each model's risk, in the order of the models.
    pub risk_by_model: Vec<f64>,
    /// The spread of these: their standard deviation, with n - 1. None of one model.
    pub risk_spread: Option<f64>,
    /// Percentage of the run's cohort whose risk is lower, each slide's as the model of its fold
    /// predicted it out of fold; the mean over the models, each beside its own fold. None where the
    /// model lies in no evaluated run.
    pub percentile: Option<f64>,
    /// Months at which half are expected to have died: where the survival curve, straight between
    /// the ends of the bins, falls to 1/2. None where it does not, or the ends are not known.
    pub median_months: Option<f64>,
    /// For each bin, the probability of the event in it given survival up to it.
    pub hazards: Vec<f64>,
    /// For each bin, the probability of surviving it.
    pub survival: Vec<f64>,
}

/// Predicts slides. Nothing is written; [`Predictions::write`] does that.
pub fn predict(request: &Request, device: Device, budget: Option<ByteSize>) -> Result<Predictions> {
    let models = models(request.model)?;
    let mut networks = models.iter().map(|path| Ok::<_, Error>((path, Network::read(path, request.heads)?)));
    let Some((path, first)) = networks.next().transpose()? else {
        return Err(Error::file(request.model, "has no model"));
    };
    let scales = first.config.model.scales();
    let (dataset, left_out) = Dataset::without_outcomes(request.pt_dir, request.backbone, scales, request.slides)?;
    let order: Vec<usize> = (0..dataset.slides.len()).collect();
    let (mut folds, mut rows, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    let cohort = cohort_risks(request.model, &first)?;
    let mut percentiles = vec![Vec::new(); dataset.slides.len()];
    first.check_width(path, &dataset, request.backbone)?;
    let mut engine = first.engine(path, device, budget)?;
    for (i, network) in std::iter::once(Ok((path, first))).chain(networks).enumerate() {
        let (path, network) = network?;
        if network.config != *engine.model().config() {
            return Err(Error::file(path, format!("is of other settings than {}", models[0].display())));
        }
        load(&mut engine, path, &network.tensors)?;
        if let Some(card) = &network.card {
            notes.extend(overlap(card, &dataset, &order).map(|what| format!("{}: {what}", path.display())));
        }
        rows.push(predict_slides(&mut engine, &dataset, &order, i)?);
        if let Some(risks) = network.card.as_ref().and_then(|card| cohort.get(&card.fold)) {
            for (percentiles, row) in percentiles.iter_mut().zip(&rows[i]) {
                percentiles.push(percentile(risks, row.risk));
            }
        }
        folds.push(FoldFacts { fold: i, ..of_card(network.card) });
    }
    let bin_edges = mean_edges(&folds);
    let slides = (0..order.len()).map(|slide| {
        let of_models: Vec<&SlideResult> = rows.iter().map(|rows| &rows[slide]).collect();
        let prediction = average(&of_models, &folds, &bin_edges)?;
        let of_slide = &percentiles[slide];
        let mean = || of_slide.iter().sum::<f64>() / of_slide.len() as f64;
        let percentile = (of_slide.len() == of_models.len()).then(mean);
        Ok(SlidePrediction { percentile, ..prediction })
    });
    Ok(Predictions { bin_edges: bin_edges.clone(), slides: slides.collect::<Result<_>>()?, models, left_out, notes })
}

/// By fold, the risks that the evaluation of the model's run has found out of fold; none where
/// there is no such evaluation. Those of a Cox model are centred there, and no measure for
/// another's.
fn cohort_risks(model: &Path, network: &Network) -> Result<BTreeMap<usize, Vec<f64>>> {
    let run = if model.is_dir() { Some(model) } else { model.parent().and_then(Path::parent) };
    let table = run.filter(|run| folder::config_path(run).is_file()).map(|run| run.join(CSV));
    let mut risks = BTreeMap::<_, Vec<f64>>::new();
    if let Some(table) = table.filter(|table| table.is_file() && network.config.n_classes > 1) {
        read_predictions(&table)?.into_iter().for_each(|row| risks.entry(row.fold).or_default().push(row.risk));
    }
    Ok(risks)
}

/// Of so many risks, the percentage below this one; one that is the same counts half.
fn percentile(risks: &[f64], risk: f64) -> f64 {
    let below = risks.iter().filter(|&&other| other < risk).count() as f64;
    let same = risks.iter().filter(|&&other| other == risk).count() as f64;
    100.0 * (below + same / 2.0) / risks.len() as f64
}

/// Refuses features of a width that the model does not take, and what is no model: for who makes
/// features first.
pub fn check_width(model: &Path, heads: Option<usize>, backbone: &str, features: usize) -> Result<()> {
    let models = models(model)?;
    let Some(path) = models.first() else { return Err(Error::file(model, "has no model")) };
    match Network::read(path, heads)?.config.features {
        takes if takes != features => Err(wrong_width(path, takes, backbone, features)),
        _ => Ok(()),
    }
}

/// The models of a run's folds that are trained to their end, or the one model.
pub(super) fn models(model: &Path) -> Result<Vec<PathBuf>> {
    let config = folder::config_path(model);
    if !config.is_file() {
        if model.is_dir() {
            let message = format!("{}: is neither a run folder, it has no config.toml, nor a model", model.display());
            return Err(Error::Usage(message));
        }
        return Ok(vec![model.to_path_buf()]);
    }
    let folds = RunConfig::read(&config)?.fold_numbers();
    folds
        .map(|fold| {
            let folder = folder::fold_folder(model, fold);
            if !FoldTrainer::progress(&folder)?.finished {
                let message = format!("is not finished: fold {fold} is not trained to its end");
                return Err(Error::file(model, message));
            }
            Ok(FoldTrainer::best_path(&folder))
        })
        .collect()
}

/// The models' common edges, or the mean of theirs; empty where one of them does not say, or they
/// have not the same number of bins.
fn mean_edges(folds: &[FoldFacts]) -> Vec<f64> {
    let Ok(inner) = edge_times(folds) else { return Vec::new() };
    let mean = |of: &dyn Fn(&FoldFacts) -> f64| folds.iter().map(of).sum::<f64>() / folds.len() as f64;
    let end = |edges: &[f64], last: bool| if last { edges.last() } else { edges.first() }.copied().unwrap_or_default();
    let outer = [false, true].map(|last| mean(&|fold| end(&fold.bin_edges, last)));
    [&outer[..1], &inner, &outer[1..]].concat()
}

/// One slide's predictions by all models in one.
fn average(rows: &[&SlideResult], folds: &[FoldFacts], bin_edges: &[f64]) -> Result<SlidePrediction> {
    let n = rows.len() as f64;
    let bins = rows[0].survival.len();
    let curves = if rows.len() > 1 && !bin_edges.is_empty() {
        // each curve at the common ends; where the models' bins are the same, these are its own
        // values
        let own: Vec<SlideResult> = rows.iter().map(|row| (*row).clone()).collect();
        survival_at(&own, folds, &bin_edges[1..]).map_err(Error::Usage)?
    } else {
        if let Some(other) = rows.iter().find(|row| row.survival.len() != bins) {
            let message = format!("the models have {bins} and {} time bins, expected as many", other.survival.len());
            return Err(Error::Usage(message));
        }
        rows.iter().flat_map(|row| row.survival.iter().copied()).collect()
    };
    let survival: Vec<f64> =
        (0..bins).map(|bin| (0..rows.len()).map(|row| curves[row * bins + bin]).sum::<f64>() / n).collect();
    let before = std::iter::once(1.0).chain(survival.iter().copied());
    let hazard = |(before, after): (f64, &f64)| if before > 0.0 { 1.0 - after / before } else { 1.0 };
    let hazards = if rows.len() == 1 { rows[0].hazards.clone() } else { before.zip(&survival).map(hazard).collect() };
    let risk = rows.iter().map(|row| row.risk).sum::<f64>() / n;
    let squares = rows.iter().map(|row| (row.risk - risk).powi(2)).sum::<f64>();
    Ok(SlidePrediction {
        slide_id: rows[0].slide_id.clone(),
        risk,
        risk_spread: (rows.len() > 1).then(|| (squares / (n - 1.0)).sqrt()),
        percentile: None,
        risk_by_model: rows.iter().map(|row| row.risk).collect(),
        median_months: median(&survival, bin_edges),
        hazards,
        survival,
    })
}

/// Where a curve that is straight between the ends of the bins falls to 1/2.
fn median(survival: &[f64], edges: &[f64]) -> Option<f64> {
    if edges.len() != survival.len() + 1 {
        return None;
    }
    let bin = survival.iter().position(|&s| s <= 0.5)?;
    let before = if bin == 0 { 1.0 } else { survival[bin - 1] };
    let share = (before - 0.5) / (before - survival[bin]);
    Some(edges[bin] + share * (edges[bin + 1] - edges[bin]))
}

impl Predictions {
    /// Writes `predictions.csv`, `predictions.json` and, where slides are left out, `left_out.csv`
    /// into a folder that has none yet.
    pub fn write(&self, folder: &Path) -> Result<()> {
        super::check_out(folder)?;
        std::fs::create_dir_all(folder).map_err(|e| Error::file(folder, format!("cannot be made: {e}")))?;
        let json = serde_json::to_string_pretty(self).map_err(|e| Error::file(folder, e))?;
        write_left_out(folder, &self.left_out)?;
        write_text(&folder.join(CSV), &self.csv()?)?;
        write_text(&folder.join(JSON), &json)
    }

    /// A row a slide: slide_id, risk, median_months, hazard_0.., survival_0.., of several models
    /// risk_model_0.. and risk_spread, and percentile.
    fn csv(&self) -> Result<String> {
        let failed = |e: &dyn std::fmt::Display| Error::file(CSV, e);
        let bins = self.slides.first().map_or(0, |slide| slide.survival.len());
        let models = if self.models.len() > 1 { self.models.len() } else { 0 };
        let numbered = |name: &str, n: usize| (0..n).map(|i| format!("{name}_{i}")).collect::<Vec<_>>();
        let head = [
            ["slide_id", "risk", "median_months"].map(String::from).to_vec(),
            numbered("hazard", bins),
            numbered("survival", bins),
            numbered("risk_model", models),
            if models > 0 { vec!["risk_spread".into()] } else { Vec::new() },
            vec!["percentile".into()],
        ];
        let mut table = csv::Writer::from_writer(Vec::new());
        table.write_record(head.concat()).map_err(|e| failed(&e))?;
        for slide in &self.slides {
            let or_empty = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
            let first = [slide.slide_id.clone(), slide.risk.to_string(), or_empty(slide.median_months)];
            let of_models = slide.risk_by_model[..models].iter().chain(&slide.risk_spread);
            let numbers = slide.hazards.iter().chain(&slide.survival).chain(of_models).map(f64::to_string);
            let row = first.into_iter().chain(numbers).chain([or_empty(slide.percentile)]);
            table.write_record(row).map_err(|e| failed(&e))?;
        }
        let bytes = table.into_inner().map_err(|e| failed(&e))?;
        String::from_utf8(bytes).map_err(|e| failed(&e))
    }

    /// What a terminal is told.
    pub fn sentences(&self) -> String {
        let models = self.models.len();
        let by = if models == 1 { "1 model".to_string() } else { format!("the mean of {models} models") };
        let slides = |n: usize| format!("{n} slide{}", if n == 1 { "" } else { "s" });
        let mut lines = vec![format!("{} predicted by {by}", slides(self.slides.len()))];
        if let Some(first) = self.left_out.first() {
            lines.push(format!(
                "{} left out, which {LEFT_OUT} lists; the first is `{}`: {}",
                slides(self.left_out.len()),
                first.slide_id,
                first.reason
            ));
        }
        if self.slides.iter().all(|slide| slide.survival.is_empty()) {
            lines.push("note: the model has no time bins: there are no hazards, survival curves or medians".into());
        }
        lines.extend(self.notes.iter().map(|note| format!("note: {note}")));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(fold: usize, survival: &[f64]) -> SlideResult {
        let risk = -survival.iter().sum::<f64>();
        SlideResult { fold, risk, survival: survival.to_vec(), ..SlideResult::default() }
    }

    fn fold(fold: usize, edges: &[f64]) -> FoldFacts {
        FoldFacts { fold, train_slides: None, best_epoch: None, bin_edges: edges.to_vec() }
    }

    #[test]
    fn the_median_is_where_the_curve_falls_to_a_half() {
        assert_eq!(median(&[0.9, 0.6, 0.4], &[0.0, 10.0, 20.0, 40.0]), Some(30.0));
        assert_eq!(median(&[0.25], &[0.0, 9.0]), Some(6.0));
        assert_eq!(median(&[0.9, 0.51], &[0.0, 10.0, 20.0]), None);
        assert_eq!(median(&[0.4], &[]), None);
    }

    #[test]
    fn percentiles_count_a_tie_half() {
        assert_eq!(percentile(&[-3.0, -2.0, -2.0, -1.0], -2.0), 50.0);
        assert_eq!(percentile(&[-3.0, -2.0], 0.0), 100.0);
    }

    #[test]
    fn an_ensemble_is_the_mean_of_its_curves() {
        let same = [fold(0, &[0.0, 10.0, 30.0]), fold(1, &[0.0, 10.0, 30.0])];
        let (a, b) = (row(0, &[0.9, 0.6]), row(1, &[0.7, 0.2]));
        let mean = average(&[&a, &b], &same, &mean_edges(&same)).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(mean_edges(&same), [0.0, 10.0, 30.0]);
        for (got, expected) in mean.survival.iter().zip([0.8, 0.4]) {
            approx::assert_abs_diff_eq!(*got, expected, epsilon = 1e-12);
        }
        approx::assert_abs_diff_eq!(mean.risk, -mean.survival.iter().sum::<f64>(), epsilon = 1e-12);
        approx::assert_abs_diff_eq!(mean.hazards[1], 0.5, epsilon = 1e-12);
        approx::assert_abs_diff_eq!(mean.median_months.unwrap_or_default(), 25.0, epsilon = 1e-12);

        // with bins of their own: at 12 months the first curve has come 2 of the 20 months from 0.9
        // to 0.6
        let own = [fold(0, &[0.0, 10.0, 30.0]), fold(1, &[0.0, 14.0, 30.0])];
        let mean = average(&[&a, &b], &own, &mean_edges(&own)).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(mean_edges(&own), [0.0, 12.0, 30.0]);
        let second = 1.0 - 0.3 * 12.0 / 14.0;
        approx::assert_abs_diff_eq!(mean.survival[0], (0.9 - 0.3 * 2.0 / 20.0 + second) / 2.0, epsilon = 1e-12);
    }
}
