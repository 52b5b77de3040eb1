//! Two runs side by side, on the patients that both predicted out of fold.
//!
//! ```text
//! predictions.csv of both -> patients in common -> Comparison
//!                         -> compare.json, figures/compare.{svg,png,csv}
//! ```

use std::{collections::HashMap, path::Path};

use serde::Serialize;

use crate::{
    Error, Result, folder,
    report::{
        self, Resampling, SlideResult,
        accuracy::{Columns, Estimate, by_patient, draws},
        figure::Screen,
        forest::{self, Forest},
        p_text,
        plots::{Plot, table},
    },
    survival::{Bootstrap, Patients, bootstrap_difference},
    train::{config::RunConfig, fold::FoldTrainer},
};

/// The comparison's JSON in its folder.
pub const FILE: &str = "compare.json";

/// compare.json; docs/outputs.md has its keys.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Folder of the run that is called A, as it was given.
    pub run_a: String,
    /// Folder of the run that is called B, as it was given.
    pub run_b: String,
    /// Patients that both predicted.
    pub patients: usize,
    /// Those of them that had an event.
    pub events: usize,
    /// Patients that A alone predicted, who are left out.
    pub only_a: usize,
    /// Patients that B alone predicted, who are left out.
    pub only_b: usize,
    /// How intervals and p-values were drawn.
    pub resampling: Resampling,
    /// A row a fold, then the mean of folds, then all folds pooled. Where the runs split patients
    /// differently, the last alone.
    pub rows: Vec<Difference>,
    /// What the evaluations warned of, each with the run's letter.
    pub warnings: Vec<String>,
    /// Sentences on what could not be compared: patients left out, folds that differ.
    pub notes: Vec<String>,
}

/// Harrell's C of both runs, and what lies between them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// "fold 0", ..., "mean of folds", "pooled"
    pub name: String,
    /// Patients that the row is of.
    pub patients: usize,
    /// Those of them that had an event.
    pub events: usize,
    /// Run A's C, with an interval of its own.
    pub a: Estimate,
    /// Run B's C, with an interval of its own.
    pub b: Estimate,
    /// a - b, with the interval of the difference on the same resampled cohorts.
    pub difference: Estimate,
    /// Two-sided; None where the difference has no interval.
    pub p_value: Option<f64>,
}

/// A patient of both runs: the one outcome, two risks.
type Pair = (SlideResult, SlideResult);

/// Compares the evaluations of two runs and writes the comparison into `out`.
pub fn compare_runs(run_a: &Path, run_b: &Path, out: &Path, plan: Bootstrap) -> Result<Comparison> {
    let [(a, of_a), (b, of_b)] = [read_run(run_a)?, read_run(run_b)?];
    let mut comparison = compare((run_a, &a), (run_b, &b), plan)?;
    let named = |run: &'static str| move |warning: String| format!("{run}: {warning}");
    comparison.warnings = of_a.into_iter().map(named("A")).chain(of_b.into_iter().map(named("B"))).collect();
    let plot = plot(&comparison)?;
    let mut files = vec![(FILE.into(), serde_json::to_vec_pretty(&comparison).map_err(|e| Error::file(out, e))?)];
    files.extend(report::files_of(&plot)?);
    let figures = out.join(report::FIGURES);
    std::fs::create_dir_all(&figures).map_err(|e| Error::file(&figures, format!("cannot be made: {e}")))?;
    report::save(out, &files)?;
    Ok(comparison)
}

/// The patients of an evaluated run, or of a checkpoint's evaluation. An error if the run is not
/// finished.
fn read_run(folder: &Path) -> Result<(Vec<SlideResult>, Vec<String>)> {
    let config = folder::config_path(folder);
    let path = folder.join("predictions.csv");
    let command = format!("cf-eval {}", crate::quote(&folder.display().to_string()));
    if config.is_file() {
        let numbers = RunConfig::read(&config)?.fold_numbers();
        let folds = numbers.len();
        for fold in numbers.clone() {
            if !FoldTrainer::progress(&folder::fold_folder(folder, fold))?.finished {
                let message = format!(
                    "is not finished, fold {fold} of {folds} is not trained to its end; go on with cf-train --resume {}",
                    crate::quote(&folder.display().to_string())
                );
                return Err(Error::file(folder, message));
            }
        }
        if !path.is_file() {
            return Err(Error::file(folder, format!("has no predictions.csv yet; run {command}")));
        }
        let (slides, warnings) = report::read_evaluation(folder)?;
        if let Some(fold) = numbers.clone().find(|&fold| slides.iter().all(|slide| slide.fold != fold)) {
            let message = format!("has no prediction of fold {fold}, which was trained after it; run {command}");
            return Err(Error::file(&path, message));
        }
        return Ok((by_patient(&slides).map_err(|e| Error::file(&path, e))?, warnings));
    }
    if !path.is_file() {
        return Err(Error::file(folder, "is neither a run nor an evaluation, it has no predictions.csv"));
    }
    let (slides, warnings) = report::read_evaluation(folder)?;
    Ok((by_patient(&slides).map_err(|e| Error::file(&path, e))?, warnings))
}

/// The comparison of two runs' patients, each with the folder that it is named by.
pub fn compare(
    (run_a, a): (&Path, &[SlideResult]),
    (run_b, b): (&Path, &[SlideResult]),
    plan: Bootstrap,
) -> Result<Comparison> {
    let name = |run: &Path| run.display().to_string();
    let same_folds = a.iter().all(|p| b.iter().all(|q| p.case_id != q.case_id || p.fold == q.fold));
    let [a, b] = [(run_a, a), (run_b, b)].map(|(run, rows)| one_row_each(run, rows));
    let (a, b) = (a?, b?);
    let in_b: HashMap<&str, &SlideResult> = b.iter().map(|row| (row.case_id.as_str(), row)).collect();
    let pairs: Vec<Pair> =
        a.iter().filter_map(|row| Some((row.clone(), (*in_b.get(row.case_id.as_str())?).clone()))).collect();
    if pairs.is_empty() {
        let message = format!("{} and {} have no patient in common", name(run_a), name(run_b));
        return Err(Error::Usage(message));
    }
    if let Some((p, q)) = pairs.iter().find(|(p, q)| (p.time, p.event) != (q.time, q.event)) {
        let outcome = |p: &SlideResult| format!("{} months, {}", p.time, if p.event { "event" } else { "censored" });
        let message = format!(
            "{} and {} are of different cohorts: patient {} has {} in one and {} in the other",
            name(run_a),
            name(run_b),
            p.case_id,
            outcome(p),
            outcome(q)
        );
        return Err(Error::Usage(message));
    }
    let (only_a, only_b) = (a.len() - pairs.len(), b.len() - pairs.len());
    let mut notes = Vec::new();
    if only_a + only_b > 0 {
        notes.push(format!("{only_a} patients of A alone and {only_b} of B alone are left out."));
    }
    if pairs.iter().all(|(p, q)| p.risk == q.risk) {
        notes.push(
            "Both predicted the same risks: they are one run twice, or two of the same settings and seed.".into(),
        );
    }
    let mut rows = Vec::new();
    let mut folds: Vec<usize> = pairs.iter().map(|(p, _)| p.fold).collect();
    folds.sort_unstable();
    folds.dedup();
    if !same_folds {
        notes.push("The runs split the patients into folds differently, so there is no comparison by fold.".into());
    } else if folds.len() > 1 {
        for &fold in &folds {
            let of_fold: Vec<Pair> = pairs.iter().filter(|(p, _)| p.fold == fold).cloned().collect();
            rows.push(difference(format!("fold {fold}"), &of_fold, true, plan, |columns, _| columns.c_index())?);
        }
        rows.push(difference("mean of folds".into(), &pairs, true, plan, |columns, fold| {
            let c = folds.iter().map(|wanted| {
                let rows: Vec<usize> = (0..fold.len()).filter(|&row| fold[row] == *wanted).collect();
                columns.pick(&rows).c_index()
            });
            Ok(c.sum::<Result<f64>>()? / folds.len() as f64)
        })?);
    }
    rows.push(difference("pooled".into(), &pairs, same_folds, plan, |columns, _| columns.c_index())?);
    Ok(Comparison {
        run_a: name(run_a),
        run_b: name(run_b),
        patients: pairs.len(),
        events: pairs.iter().filter(|(p, _)| p.event).count(),
        only_a,
        only_b,
        resampling: Resampling { replicates: plan.replicates, seed: plan.seed, level: plan.level },
        rows,
        warnings: Vec::new(),
        notes,
    })
}

/// A patient that several folds validate on has several predictions, and no one of them is the
/// patient's.
fn one_row_each(run: &Path, rows: &[SlideResult]) -> Result<Vec<SlideResult>> {
    let mut seen = HashMap::new();
    for row in rows {
        if let Some(fold) = seen.insert(row.case_id.as_str(), row.fold) {
            let message =
                format!("validates patient {} in the folds {fold} and {}, expected one", row.case_id, row.fold);
            return Err(Error::file(run, message));
        }
    }
    Ok(rows.to_vec())
}

/// One row: the statistic (of columns and the fold of each) in both runs, on the same draws.
fn difference(
    name: String,
    pairs: &[Pair],
    by_fold: bool,
    plan: Bootstrap,
    statistic: impl Fn(&Columns, &[usize]) -> Result<f64> + Sync,
) -> Result<Difference> {
    let a: Vec<SlideResult> = pairs.iter().map(|(p, _)| p.clone()).collect();
    let columns = [Columns::new(&a), Columns::new(pairs.iter().map(|(_, q)| q))];
    let folds: Vec<usize> = a.iter().map(|row| row.fold).collect();
    let of = |run: usize| {
        let (columns, folds, statistic) = (&columns[run], &folds, &statistic);
        move |rows: &[usize]| {
            let folds: Vec<usize> = rows.iter().map(|&row| folds[row]).collect();
            statistic(&columns.pick(rows), &folds)
        }
    };
    let patients = if by_fold { draws(&a)? } else { Patients::one_row_each(a.len())? };
    let comparison = bootstrap_difference(&patients, plan, of(0), of(1));
    let estimate = |run: usize| Estimate::resampled(&patients, a.len(), plan, of(run));
    let (estimate_a, estimate_b) = (estimate(0), estimate(1));
    Ok(Difference {
        name,
        patients: a.len(),
        events: a.iter().filter(|p| p.event).count(),
        difference: match &comparison {
            Ok(c) => Estimate {
                estimate: Some(c.difference.estimate),
                interval: Some([c.difference.lower, c.difference.upper]),
                note: None,
            },
            Err(e) => Estimate {
                estimate: estimate_a.estimate.zip(estimate_b.estimate).map(|(a, b)| a - b),
                interval: None,
                note: Some(report::reason(e)),
            },
        },
        p_value: comparison.ok().map(|c| c.p_value),
        a: estimate_a,
        b: estimate_b,
    })
}

impl Comparison {
    /// The table that a terminal shows.
    pub fn table(&self) -> String {
        let mut table = format!(
            "A {}\nB {}\n{} patients in both, {} events\n\n{:<14}  {:>8}  {:<26}{:<26}A - B\n",
            self.run_a, self.run_b, self.patients, self.events, "C-index", "patients", "A", "B"
        );
        for row in &self.rows {
            let p = row.p_value.map_or("-".to_string(), p_text);
            let (a, b, difference) = (row.a.text(), row.b.text(), signed(&row.difference));
            table += &format!("{:<14}  {:>8}  {a:<26}{b:<26}{difference:<30}{p}\n", row.name, row.patients);
        }
        for row in &self.rows {
            let note = |(what, estimate): (&str, &Estimate)| {
                estimate.note.as_ref().map(|note| format!("note: {}, {what}: {note}.\n", row.name))
            };
            table.extend([("A", &row.a), ("B", &row.b), ("A - B", &row.difference)].into_iter().filter_map(note));
        }
        let percent = 100.0 * self.resampling.level;
        table += &format!(
            "{percent:.0} % intervals and two-sided p from {} bootstrap cohorts (seed {}), the same for both runs\n",
            self.resampling.replicates, self.resampling.seed
        );
        self.warnings.iter().for_each(|warning| table += &format!("WARNING: {warning}\n"));
        self.notes.iter().for_each(|note| table += &format!("note: {note}\n"));
        table
    }
}

fn signed(estimate: &Estimate) -> String {
    match (estimate.estimate, estimate.interval) {
        (Some(estimate), Some([lower, upper])) => format!("{estimate:+.4} ({lower:+.4} to {upper:+.4})"),
        (Some(estimate), None) => format!("{estimate:+.4}"),
        _ => "-".into(),
    }
}

fn plot(comparison: &Comparison) -> Result<Plot> {
    let row = |row: &Difference| {
        let mut name = row.name.clone();
        name[..1].make_ascii_uppercase();
        forest::Row { label: name, estimates: vec![row.difference.clone()], total: !row.name.starts_with("fold") }
    };
    let rows: Vec<forest::Row> = comparison.rows.iter().map(row).collect();
    let names =
        [&comparison.run_a, &comparison.run_b].map(|run| Path::new(run).file_name().map(|name| name.to_string_lossy()));
    let axis = match &names {
        [Some(a), Some(b)] if a != b => format!("C-index of {a} \u{2212} C-index of {b}"),
        _ => "C-index of A \u{2212} C-index of B".into(),
    };
    let forest = Forest {
        label: "Difference of the C-indices of two runs",
        axis: &axis,
        series: &["difference"],
        reference: 0.0,
        bounds: (-1.0, 1.0),
        signed: true,
    };
    let cells = |row: &Difference| {
        let counts = [row.name.clone(), row.patients.to_string(), row.events.to_string()];
        let numbers = [&row.a, &row.b, &row.difference].into_iter().flat_map(|e| e.cells().into_iter().take(3));
        counts.into_iter().chain(numbers).chain([report::plots::cell(row.p_value)]).collect()
    };
    let heads = [
        "row",
        "patients",
        "events",
        "a",
        "a_lower",
        "a_upper",
        "b",
        "b_lower",
        "b_upper",
        "difference",
        "lower",
        "upper",
        "p_value",
    ];
    Ok(Plot {
        name: "compare".into(),
        title: "",
        figure: forest::figure(&forest, &rows, Screen::Page),
        phone: None,
        csv: table(&heads, comparison.rows.iter().map(cells).collect())?,
        caption: String::new(),
    })
}
