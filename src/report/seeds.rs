//! Runs that differ in their seed alone, side by side: seeds.json, a table, and a page.

use std::{fmt::Write, path::Path};

use serde::Serialize;

use super::{
    Summary,
    accuracy::{Accuracy, Unit},
    figure::escape,
    files::save,
    html,
};
use crate::{Error, Result};

/// What is set side by side, as the tables head it.
const HEADS: [&str; 5] = ["C, mean of folds", "C, pooled", "Uno's C", "mean AUC", "Brier"];

/// The statistics of an evaluation, or what they come to over several; None where one is undefined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Statistics {
    /// Harrell's C, the mean of folds.
    pub c_index_fold_mean: Option<f64>,
    /// Harrell's C of all rows, pairs across folds included.
    pub c_index_pooled: Option<f64>,
    /// Uno's C.
    pub uno_c: Option<f64>,
    /// Mean of the AUC over time.
    pub auc: Option<f64>,
    /// Integrated Brier score.
    pub brier: Option<f64>,
}

impl Statistics {
    fn of(accuracy: &Accuracy) -> Self {
        Self::from_values([
            accuracy.c_index_fold_mean.estimate,
            accuracy.c_index_pooled.estimate,
            accuracy.uno_c.estimate,
            accuracy.auc.mean.estimate,
            accuracy.brier.integrated.estimate,
        ])
    }

    /// In the order of [`HEADS`].
    fn values(&self) -> [Option<f64>; 5] {
        [self.c_index_fold_mean, self.c_index_pooled, self.uno_c, self.auc, self.brier]
    }

    fn from_values([c_index_fold_mean, c_index_pooled, uno_c, auc, brier]: [Option<f64>; 5]) -> Self {
        Self { c_index_fold_mean, c_index_pooled, uno_c, auc, brier }
    }
}

/// The run of one seed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SeedResult {
    /// Of weights, sampling and dropout.
    pub seed: u64,
    /// The run's folder, within that of all.
    pub folder: String,
    /// The folds that its numbers are of.
    pub folds: Vec<usize>,
    /// Where every slide counts as one.
    pub by_slide: Statistics,
    /// None where every patient has one slide.
    pub by_patient: Option<Statistics>,
}

impl SeedResult {
    /// The numbers of a run's evaluation.
    pub fn new(seed: u64, folder: String, summary: &Summary) -> Self {
        Self {
            seed,
            folder,
            folds: summary.folds.iter().map(|fold| fold.fold).collect(),
            by_slide: Statistics::of(&summary.by_slide),
            by_patient: summary.by_patient.as_ref().map(Statistics::of),
        }
    }
}

/// The seeds' results by slide, or by patient.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OverSeeds {
    /// What the statistics are of.
    pub unit: Unit,
    /// Over the seeds that have the statistic.
    pub mean: Statistics,
    /// Standard deviation over the same seeds (ddof 1); None of fewer than two.
    pub sd: Statistics,
    /// The statistics of each seed.
    #[serde(skip)]
    rows: Vec<Statistics>,
}

impl OverSeeds {
    fn new(unit: Unit, rows: Vec<Statistics>) -> Self {
        let (mut mean, mut sd) = ([None; 5], [None; 5]);
        for i in 0..HEADS.len() {
            let values: Vec<f64> = rows.iter().filter_map(|row| row.values()[i]).collect();
            let n = values.len() as f64;
            let centre = values.iter().sum::<f64>() / n;
            let squares: f64 = values.iter().map(|value| (value - centre).powi(2)).sum();
            mean[i] = (n > 0.0).then_some(centre);
            sd[i] = (n > 1.0).then(|| (squares / (n - 1.0)).sqrt());
        }
        Self { unit, mean: Statistics::from_values(mean), sd: Statistics::from_values(sd), rows }
    }

    fn title(&self) -> &'static str {
        if self.unit == Unit::Slide { "By slide" } else { "By patient" }
    }
}

/// seeds.json; docs/outputs.md has its keys.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Seeds {
    /// In the order of their seeds.
    pub seeds: Vec<SeedResult>,
    /// By slide, and by patient where some patient has several slides.
    pub over_seeds: Vec<OverSeeds>,
    /// Sentences without which these numbers would mislead.
    pub warnings: Vec<String>,
}

impl Seeds {
    /// Puts the seeds' results together.
    pub fn new(seeds: Vec<SeedResult>, mut warnings: Vec<String>) -> Self {
        let mut over_seeds = vec![OverSeeds::new(Unit::Slide, seeds.iter().map(|seed| seed.by_slide).collect())];
        let by_patient: Option<Vec<Statistics>> = seeds.iter().map(|seed| seed.by_patient).collect();
        over_seeds.extend(by_patient.map(|rows| OverSeeds::new(Unit::Patient, rows)));
        if seeds.iter().any(|seed| seed.folds != seeds[0].folds) {
            warnings.push("The seeds are not evaluated on the same folds: their numbers cannot be compared.".into());
        }
        Self { seeds, over_seeds, warnings }
    }

    /// The rows of a table: its seeds' and folds' numbers, then the means and standard deviations.
    fn rows(&self, over: &OverSeeds) -> Vec<[String; 7]> {
        let text = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.4}"));
        let row = |first: [String; 2], statistics: &Statistics| {
            let [seed, folds] = first;
            let [a, b, c, d, e] = statistics.values().map(text);
            [seed, folds, a, b, c, d, e]
        };
        let of_seed = |(seed, statistics): (&SeedResult, &Statistics)| {
            row([seed.seed.to_string(), seed.folds.len().to_string()], statistics)
        };
        let mut rows: Vec<[String; 7]> = self.seeds.iter().zip(&over.rows).map(of_seed).collect();
        rows.push(row(["mean".into(), String::new()], &over.mean));
        rows.push(row(["sd".into(), String::new()], &over.sd));
        rows
    }

    /// The table that a terminal shows.
    pub fn table(&self) -> String {
        let mut text = String::new();
        for over in &self.over_seeds {
            let [a, b, c, d, e] = HEADS;
            let _ = writeln!(text, "{}\n{:>8}{:>7}{a:>18}{b:>11}{c:>9}{d:>10}{e:>8}", over.title(), "seed", "folds");
            for [seed, folds, a, b, c, d, e] in self.rows(over) {
                let _ = writeln!(text, "{seed:>8}{folds:>7}{a:>18}{b:>11}{c:>9}{d:>10}{e:>8}");
            }
        }
        for warning in &self.warnings {
            let _ = writeln!(text, "WARNING: {warning}");
        }
        text
    }

    /// Writes seeds.json and report.html.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let json = serde_json::to_vec_pretty(self).map_err(|e| Error::file(folder, e))?;
        save(folder, &[("seeds.json".into(), json), ("report.html".into(), self.page().into_bytes())])
    }

    fn page(&self) -> String {
        let title = format!("{} seeds", self.seeds.len());
        let mut page = html::head(&title);
        let _ =
            write!(page, "<header>\n<p class=\"kind\">CrossFusion survival report</p>\n<h1>{title}</h1>\n</header>\n");
        html::list(&mut page, "warnings", &self.warnings);
        for over in &self.over_seeds {
            let heads = ["folds"].iter().chain(&HEADS).map(|head| format!("<th>{}</th>", escape(head)));
            let (title, heads) = (over.title(), heads.collect::<String>());
            let _ = write!(
                page,
                "<section>\n<h2>{title}</h2>\n<table>\n<thead><tr><th class=\"word\">Seed</th>{heads}</tr></thead>\n<tbody>\n"
            );
            for (i, [seed, others @ ..]) in self.rows(over).into_iter().enumerate() {
                let cells: String = others.iter().map(|cell| format!("<td>{cell}</td>")).collect();
                // each seed's own report; the last two rows are over all
                let seed = self.seeds.get(i).map_or(seed.clone(), |result| {
                    format!("<a href=\"{}/report.html\">{seed}</a>", escape(&result.folder))
                });
                let _ = writeln!(page, "<tr><td class=\"word\">{seed}</td>{cells}</tr>");
            }
            page.push_str("</tbody>\n</table>\n</section>\n");
        }
        page.push_str(
            "<p class=\"caption\">Runs of the same settings but for the seed, of weights, sampling and dropout. The mean and \
             the standard deviation (ddof 1) are over seeds: how the training varies on these patients, and nothing of other \
             patients, which the intervals of each seed\u{2019}s report are about.</p>\n",
        );
        html::foot(&mut page);
        page
    }
}
