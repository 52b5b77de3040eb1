//! All plots of an evaluation, each with its numbers and a caption: on the page, and as SVG, PNG
//! and CSV files.

use super::{
    Summary,
    accuracy::{Accuracy, Estimate, Unit},
    auc, calibration,
    figure::{Figure, Screen},
    forest::{self, Forest},
    groups::Grouping,
    history, km, risk,
};
use crate::{Error, Result, folder::EpochMetrics, survival::short};

/// A figure with its files' name, its numbers and what is said of it.
pub struct Plot {
    /// Of its files, without an extension.
    pub name: String,
    /// Above the plot where its section holds several.
    pub title: &'static str,
    /// For the page and the files.
    pub figure: Figure,
    /// The same for a narrow screen; None where the figure is narrow enough.
    pub phone: Option<Figure>,
    /// The numbers that are drawn.
    pub csv: Vec<u8>,
    /// Sentences below the figure; empty where none are needed.
    pub caption: String,
}

/// What is undefined is absent; the summary's notes say why.
pub struct Plots {
    /// C-index by fold, of slides and of patients, with intervals.
    pub c_index: Plot,
    /// Kaplan-Meier curves, one for each grouping of the summary.
    pub survival: Vec<Plot>,
    /// AUC over time.
    pub auc: Option<Plot>,
    /// Predicted against observed survival.
    pub calibration: Option<Plot>,
    /// A histogram of the predicted risks by outcome.
    pub risk: Option<Plot>,
    /// One a fold.
    pub training: Vec<Plot>,
}

impl Plots {
    /// From the numbers and the run's epochs (none for a lone checkpoint).
    pub fn new(summary: &Summary, epochs: &[EpochMetrics]) -> Result<Self> {
        let survival = summary.risk_groups.iter().map(|grouping| survival(summary, grouping)).collect::<Result<_>>()?;
        let whose = match summary.unit {
            Unit::Patient => "Patients",
            Unit::Slide => "Slides",
        };
        let risk = risk::Histogram::new(&summary.rows, summary.median_risk).map(|histogram| {
            Ok(Plot {
                name: "risk".into(),
                title: "",
                figure: risk::figure(&histogram, whose, Screen::Page),
                phone: Some(risk::figure(&histogram, whose, Screen::Phone)),
                csv: histogram.csv()?,
                caption: format!("{whose} by predicted risk and outcome; the cut is the median of all."),
            })
        });
        let training =
            epochs.chunk_by(|a, b| a.fold == b.fold).zip(history::figures(epochs)).map(|(epochs, figure)| {
                Ok(Plot {
                    name: format!("training_fold_{}", epochs[0].fold),
                    title: "",
                    figure,
                    phone: None,
                    csv: history::csv(epochs)?,
                    caption: String::new(),
                })
            });
        Ok(Self {
            c_index: c_index(summary)?,
            survival,
            auc: auc_plot(summary)?,
            calibration: calibration_plot(summary)?,
            risk: risk.transpose()?,
            training: training.collect::<Result<_>>()?,
        })
    }

    /// All that there are, the C-index first.
    pub fn all(&self) -> impl Iterator<Item = &Plot> {
        let some = self.auc.iter().chain(&self.calibration).chain(&self.risk);
        std::iter::once(&self.c_index).chain(&self.survival).chain(some).chain(&self.training)
    }
}

fn c_index(summary: &Summary) -> Result<Plot> {
    let units: Vec<&Accuracy> = std::iter::once(&summary.by_slide).chain(&summary.by_patient).collect();
    let row = |label: String, total: bool, of: &dyn Fn(&Accuracy) -> Estimate| forest::Row {
        label,
        estimates: units.iter().map(|unit| of(unit)).collect(),
        total,
    };
    let fold = |(i, fold): (usize, &super::FoldResult)| {
        row(format!("Fold {}", fold.fold), false, &|unit| unit.c_index_by_fold[i].clone())
    };
    let mut rows: Vec<forest::Row> = summary.folds.iter().enumerate().map(fold).collect();
    if let [only] = &mut rows[..] {
        only.label = "C-index".into();
    } else {
        rows.push(row("Mean of folds".into(), true, &|unit| unit.c_index_fold_mean.clone()));
        rows.push(row("All folds pooled".into(), true, &|unit| unit.c_index_pooled.clone()));
    }
    let series = ["slide", "patient"];
    let forest = Forest {
        label: "C-index by fold, with intervals",
        axis: "C-index",
        series: &["by slide", "by patient"][..units.len()],
        reference: 0.5,
        bounds: (0.0, 1.0),
        signed: false,
    };
    let cells = rows.iter().flat_map(|row| {
        let cells = |(unit, e): (&str, &Estimate)| {
            vec![row.label.clone(), unit.to_string()].into_iter().chain(e.cells()).collect()
        };
        series.into_iter().zip(&row.estimates).map(cells).collect::<Vec<Vec<String>>>()
    });
    let (percent, n) = (100.0 * summary.resampling.level, summary.resampling.replicates);
    let mut caption = format!(
        "Harrell\u{2019}s C with {percent:.0}% intervals: percentiles of {n} bootstrap cohorts, in which whole patients are drawn, within folds."
    );
    if summary.folds.len() > 1 {
        caption += " The mean\u{2019}s is Student\u{2019}s t interval over folds on the logit scale, which says how folds vary and is too \
                    narrow for new patients, as folds share training patients. Pooled, patients of different folds are \
                    compared too. The dotted line is chance.";
    }
    Ok(Plot {
        name: "c_index".into(),
        title: "",
        csv: table(&["row", "unit", "estimate", "lower", "upper", "note"], cells.collect())?,
        figure: forest::figure(&forest, &rows, Screen::Page),
        phone: Some(forest::figure(&forest, &rows, Screen::Phone)),
        caption,
    })
}

fn survival(summary: &Summary, grouping: &Grouping) -> Result<Plot> {
    let groups = grouping.groups(&summary.rows);
    let who = who(summary);
    let which =
        if summary.folds.len() > 1 { format!("evaluated {who}s of all folds") } else { format!("evaluated {who}s") };
    let cuts = |cuts: &[f64]| {
        cuts.iter().map(|cut| format!("{cut:.3}")).collect::<Vec<_>>().join(" and ").replace('-', "\u{2212}")
    };
    let by_fold = |cut: &dyn Fn(&[f64]) -> String| {
        let known = summary.folds.iter().zip(&grouping.cuts).filter(|(_, cuts)| !cuts.is_empty());
        known.map(|(fold, cuts)| format!("{} in fold {}", cut(cuts), fold.fold)).collect::<Vec<_>>().join(", ")
    };
    let how = match grouping.name {
        "fold_median" => format!(
            "A {who} is of high risk when its predicted risk is at or above the median of its fold: {}. The folds\u{2019} models \
             need not share a scale of risk, so each fold is cut by itself.",
            by_fold(&cuts)
        ),
        "fold_tertiles" => {
            format!("Thirds of each fold\u{2019}s predicted risks; a {who} on a cut belongs above it.")
        }
        "median" => {
            let apart = if summary.folds.len() > 1 {
                " This is one cut for all folds, whose models need not share a scale of risk: where they do not, it parts folds \
                 and not patients."
            } else {
                ""
            };
            format!(
                "A {who} is of high risk when its predicted risk is at or above the median, {}.{apart}",
                cuts(&grouping.cuts[0])
            )
        }
        "tertiles" => {
            format!(
                "Thirds of the predicted risks, cut at {}; a {who} on a cut belongs above it.",
                cuts(&grouping.cuts[0])
            )
        }
        _ => {
            let share = |cut: &[f64]| cut.iter().map(|cut| format!("{:.0}%", 100.0 * cut)).collect::<String>();
            format!(
                "Each fold is cut at a rank that the other folds teach: the share of low risk at which the log-rank statistic of \
                 their {who}s, each ranked by risk in validation within its own fold, is greatest, with a fifth of them or \
                 more on either side. That makes the low-risk share {}. No outcome of a fold has a say in its cut; the other folds\u{2019} \
                 models were trained on its {who}s.",
                by_fold(&share)
            )
        }
    };
    let times: Vec<f64> = summary.rows.iter().map(|row| row.time).collect();
    let (end, last) = (km::last_time(&times), times.iter().copied().fold(0.0, f64::max));
    let axis = if end < last {
        format!(
            " The time axis ends at {} months, beyond which fewer than {} are at risk, and a group\u{2019}s curve is pale where \
             it has fewer; the CSV has all.",
            short(end),
            km::LEAST_AT_RISK
        )
    } else {
        String::new()
    };
    // What is true of every grouping stands below the first.
    let said_once = if grouping.name == summary.risk_groups[0].name {
        format!(
            " Kaplan-Meier curves of the {which}, with 95% confidence bands; small strokes mark censored {who}s.{axis} The \
             hazard ratio (HR) is of a Cox model whose one covariate is the number of the group."
        )
    } else {
        String::new()
    };
    let tests = km::Tests {
        p: grouping.log_rank.as_ref().map(|test| test.p_value),
        hazard_ratio: Some(grouping.hazard_ratio.clone()),
    };
    let why = [("log-rank test", &grouping.note), ("hazard ratio", &grouping.hazard_ratio.note)];
    let why: String =
        why.iter().filter_map(|(what, note)| Some(format!(" There is no {what}: {}.", note.as_ref()?))).collect();
    Ok(Plot {
        name: match grouping.name {
            name if name == summary.risk_groups[0].name => "km".into(),
            "fold_tertiles" => "km_tertiles".into(),
            "median" => "km_one_cut".into(),
            name => format!("km_{name}"),
        },
        title: grouping.title(),
        figure: km::figure(&groups, &tests, Screen::Page)?,
        phone: Some(km::figure(&groups, &tests, Screen::Phone)?),
        csv: km::csv(&groups)?,
        caption: how + &said_once + &why,
    })
}

/// What a row of the groups, the calibration and the histogram is.
fn who(summary: &Summary) -> &'static str {
    match summary.unit {
        Unit::Patient => "patient",
        Unit::Slide => "slide",
    }
}

fn auc_plot(summary: &Summary) -> Result<Option<Plot>> {
    let accuracy = summary.of_patients();
    let Some(figure) = auc::figure(&accuracy.auc, Screen::Page) else { return Ok(None) };
    let row = |(t, auc): (&f64, &Estimate)| std::iter::once(t.to_string()).chain(auc.cells()).collect();
    let rows = accuracy.auc.times.iter().zip(&accuracy.auc.auc).map(row).collect();
    Ok(Some(Plot {
        name: "auc".into(),
        title: "",
        figure,
        phone: auc::figure(&accuracy.auc, Screen::Phone),
        csv: table(&["time", "auc", "lower", "upper", "note"], rows)?,
        caption: format!(
            "Cumulative/dynamic AUC by {}: how well the risk tells who has had an event by then from who has not, weighted for \
             censoring, with pointwise {:.0}% bootstrap intervals; up to {:.1} months, beyond which a tenth are followed. \
             The dotted line is chance.",
            who(summary),
            100.0 * summary.resampling.level,
            accuracy.horizon
        ),
    }))
}

fn calibration_plot(summary: &Summary) -> Result<Option<Plot>> {
    let Some(figure) = calibration::figure(&summary.calibration, Screen::Page) else { return Ok(None) };
    let rows = summary.calibration.iter().map(|point| {
        let counts =
            [point.time.to_string(), point.group.to_string(), point.patients.to_string(), point.events.to_string()];
        let (lower, upper) = point.interval.map(|[lower, upper]| (lower, upper)).unzip();
        let numbers = [Some(point.predicted), point.observed, lower, upper].map(cell);
        counts.into_iter().chain(numbers).collect()
    });
    let heads = ["time", "group", "patients", "events", "predicted", "observed", "lower", "upper"];
    Ok(Some(Plot {
        name: "calibration".into(),
        title: "",
        figure,
        phone: calibration::figure(&summary.calibration, Screen::Phone),
        csv: table(&heads, rows.collect())?,
        caption: format!(
            "Calibration at the ends of time bins: {}s in groups of equal size by predicted survival; the mean \
             prediction of each against its Kaplan-Meier survival, with 95% limits. On the dotted line both agree. \
             A group that was not followed so long is left out. The axes show the range of the points.",
            who(summary)
        ),
    }))
}

impl Estimate {
    /// Estimate, lower, upper, note of a CSV; blank where there is none.
    pub fn cells(&self) -> Vec<String> {
        let (lower, upper) = self.interval.map(|[lower, upper]| (lower, upper)).unzip();
        vec![cell(self.estimate), cell(lower), cell(upper), self.note.clone().unwrap_or_default()]
    }
}

/// A number in full, or a blank.
pub fn cell(number: Option<f64>) -> String {
    number.map_or(String::new(), |number| number.to_string())
}

/// A CSV.
pub fn table(heads: &[&str], rows: Vec<Vec<String>>) -> Result<Vec<u8>> {
    let failed = |e: &dyn std::fmt::Display| Error::Usage(format!("the table of {} cannot be written: {e}", heads[0]));
    let mut table = csv::Writer::from_writer(Vec::new());
    table.write_record(heads).map_err(|e| failed(&e))?;
    rows.iter().try_for_each(|row| table.write_record(row)).map_err(|e| failed(&e))?;
    table.into_inner().map_err(|e| failed(&e))
}
