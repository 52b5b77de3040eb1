//! What an evaluation leaves on disk.

use std::{collections::HashMap, io::Write, path::Path};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    About, SlideResult, Summary,
    accuracy::Unit,
    card,
    groups::LABELS,
    html,
    plots::{Plot, Plots, table},
};
use crate::{
    Error, Result,
    data::{
        atomic::{MOST, read_bytes, write_atomically},
        digest::sha256,
    },
    folder::EpochMetrics,
};

/// Pixels of a PNG for one CSS pixel: 2562 across, 300 a printed inch at 22 cm.
const PNG_SCALE: f64 = 3.0;

const PREDICTIONS: &str = "predictions.csv";
const PATIENTS: &str = "predictions_patients.csv";
const SUMMARY: &str = "summary.json";

/// summary.json: the numbers, and the table that they were made from.
#[derive(Serialize)]
struct SummaryFile<'a> {
    #[serde(flatten)]
    summary: &'a Summary,
    predictions_sha256: String,
}

/// What is read back of it.
#[derive(Deserialize)]
struct Origin {
    /// None in a file of version 0.1.
    predictions_sha256: Option<String>,
    #[serde(default)]
    warnings: Vec<String>,
}

/// Plots, in the folder of a report.
pub const FIGURES: &str = "figures";

/// Writes predictions.csv, predictions_patients.csv, summary.json, report.html and the model card
/// README.md into `folder`, and every plot as SVG, PNG and CSV into its folder `figures`, each of
/// them whole or not at all.
pub fn write(
    folder: &Path,
    about: &About,
    summary: &Summary,
    slides: &[SlideResult],
    epochs: &[EpochMetrics],
) -> Result<()> {
    let plots = Plots::new(summary, epochs)?;
    let predictions = predictions_csv(slides)?;
    let file = SummaryFile { summary, predictions_sha256: sha256(&predictions) };
    let mut files = vec![
        (card_name(folder).into(), card::card(about, summary).into_bytes()),
        (SUMMARY.into(), serde_json::to_vec_pretty(&file).map_err(|e| Error::file(folder, e))?),
        (PREDICTIONS.into(), predictions),
        ("report.html".into(), html::page(about, summary, slides, &plots)?.into_bytes()),
    ];
    let by_patient = (summary.unit == Unit::Patient).then(|| predictions_patients_csv(summary, slides)).transpose()?;
    let without_patients = by_patient.is_none();
    files.extend(by_patient.map(|table| (PATIENTS.into(), table)));
    let drawn: Vec<&Plot> = plots.all().collect();
    files.par_extend(drawn.into_par_iter().map(files_of).collect::<Result<Vec<_>>>()?.into_par_iter().flatten());
    let figures = folder.join(FIGURES);
    std::fs::create_dir_all(&figures).map_err(|e| Error::file(&figures, format!("cannot be made: {e}")))?;
    save(folder, &files)?;
    if without_patients {
        let path = folder.join(PATIENTS);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::file(&path, format!("an earlier evaluation's cannot be removed: {e}")));
            }
            _ => {}
        }
    }
    remove_stale(&figures, &plots)
}

/// README.md, unless somebody else's stands there.
fn card_name(folder: &Path) -> &'static str {
    const NAME: &str = "README.md";
    match read_bytes(&folder.join(NAME), MOST) {
        Ok(text) if !text.starts_with(card::MARK.as_bytes()) => "MODEL_CARD.md",
        _ => NAME,
    }
}

/// Removes the plots that an earlier evaluation drew and this one could not.
fn remove_stale(figures: &Path, plots: &Plots) -> Result<()> {
    const NAMES: [&str; 8] =
        ["km", "km_tertiles", "km_one_cut", "km_learnt_cut", "c_index", "auc", "calibration", "risk"];
    let failed = |e| Error::file(figures, format!("cannot be tidied up: {e}"));
    for entry in std::fs::read_dir(figures).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let ours = NAMES.contains(&&*stem) || stem.starts_with("training_fold_");
        if ours && plots.all().all(|plot| plot.name != stem) {
            std::fs::remove_file(&path).map_err(failed)?;
        }
    }
    Ok(())
}

/// A plot's SVG, PNG and CSV.
pub fn files_of(plot: &Plot) -> Result<[(String, Vec<u8>); 3]> {
    let name = |extension: &str| format!("{FIGURES}/{}.{extension}", plot.name);
    Ok([
        (name("svg"), plot.figure.standalone().into_bytes()),
        (name("png"), plot.figure.png(PNG_SCALE)?),
        (name("csv"), plot.csv.clone()),
    ])
}

/// Writes files, by their names in `folder`.
pub fn save(folder: &Path, files: &[(String, Vec<u8>)]) -> Result<()> {
    files.iter().try_for_each(|(name, content)| {
        let path = folder.join(name);
        let failed = |e: std::io::Error| Error::file(&path, format!("cannot be written: {e}"));
        write_atomically(&path, |file| file.write_all(content).map_err(failed))
    })
}

/// A row a slide: case_id, slide_id, fold, time (months), event (1 = observed), risk, hazard_0..,
/// survival_0..; numbers in full.
pub fn predictions_csv(slides: &[SlideResult]) -> Result<Vec<u8>> {
    let bins = slides.iter().map(|slide| slide.hazards.len()).max().unwrap_or(0);
    let numbered = |name: &str| (0..bins).map(|bin| format!("{name}_{bin}")).collect::<Vec<_>>();
    let first = ["case_id", "slide_id", "fold", "time", "event", "risk"].map(String::from).to_vec();
    let mut table = csv::Writer::from_writer(Vec::new());
    let failed = |e: &dyn std::fmt::Display| Error::file("predictions.csv", e);
    table.write_record([first, numbered("hazard"), numbered("survival")].concat()).map_err(|e| failed(&e))?;
    for slide in slides {
        let event = u8::from(slide.event).to_string();
        let first = [&slide.case_id, &slide.slide_id, &slide.fold.to_string(), &slide.time.to_string(), &event];
        let numbers = std::iter::once(&slide.risk).chain(&slide.hazards).chain(&slide.survival);
        let row = first.into_iter().cloned().chain(numbers.map(f64::to_string));
        table.write_record(row).map_err(|e| failed(&e))?;
    }
    table.into_inner().map_err(|e| failed(&e))
}

/// A row a patient and fold: case_id, fold, slides, time (months), event (1 = observed), risk (the
/// mean of the slides'), a column for each grouping with the patient's group, survival_0.. (means,
/// too); numbers in full.
pub fn predictions_patients_csv(summary: &Summary, slides: &[SlideResult]) -> Result<Vec<u8>> {
    let mut counts: HashMap<_, usize> = HashMap::new();
    slides.iter().for_each(|slide| *counts.entry(summary.row_of(slide)).or_default() += 1);
    let bins = summary.rows.iter().map(|row| row.survival.len()).max().unwrap_or(0);
    let groups = summary.risk_groups.iter().map(|grouping| format!("group_{}", grouping.name));
    let survival = (0..bins).map(|bin| format!("survival_{bin}"));
    let first = ["case_id", "fold", "slides", "time", "event", "risk"].map(String::from);
    let heads: Vec<String> = first.into_iter().chain(groups).chain(survival).collect();
    let row = |(i, row): (usize, &SlideResult)| {
        let slides = counts.get(&summary.row_of(row)).copied().unwrap_or(0);
        let event = u8::from(row.event).to_string();
        let first = [row.case_id.clone(), row.fold.to_string(), slides.to_string(), row.time.to_string(), event];
        let groups = summary.risk_groups.iter().map(|grouping| {
            let label = LABELS[grouping.patients.len()][grouping.group[i]];
            label.split(' ').next().unwrap_or(label).to_lowercase()
        });
        let survival = row.survival.iter().map(f64::to_string);
        first.into_iter().chain([row.risk.to_string()]).chain(groups).chain(survival).collect()
    };
    let heads: Vec<&str> = heads.iter().map(String::as_str).collect();
    table(&heads, summary.rows.iter().enumerate().map(row).collect())
}

/// The predictions of an evaluation's folder, and the warnings that it gave. An error if they are
/// not those that its summary.json was made from.
pub fn read_evaluation(folder: &Path) -> Result<(Vec<SlideResult>, Vec<String>)> {
    let (path, summary) = (folder.join(PREDICTIONS), folder.join(SUMMARY));
    if !summary.exists() {
        let unknown = format!("There is no {SUMMARY}, so that nobody knows whether {PREDICTIONS} is as evaluated.");
        return Ok((read_predictions(&path)?, vec![unknown]));
    }
    let origin: Origin = serde_json::from_slice(&read_bytes(&summary, MOST)?)
        .map_err(|e| Error::file(&summary, format!("is damaged: {e}")))?;
    let bytes = read_bytes(&path, MOST)?;
    if origin.predictions_sha256.is_some_and(|before| before != sha256(&bytes)) {
        let message = "has changed since the evaluation wrote it and summary.json; evaluate again";
        return Err(Error::file(&path, message));
    }
    Ok((parse_predictions(&path, &bytes)?, origin.warnings))
}

/// A predictions.csv again; hazards and survival are read where it has them.
pub fn read_predictions(path: &Path) -> Result<Vec<SlideResult>> {
    parse_predictions(path, &read_bytes(path, MOST)?)
}

fn parse_predictions(path: &Path, bytes: &[u8]) -> Result<Vec<SlideResult>> {
    let mut table = csv::Reader::from_reader(bytes);
    let heads = table.headers().map_err(|e| Error::file(path, e))?.clone();
    let place = |name: &str| {
        let missing = || Error::file(path, format!("has no column `{name}`; it is no predictions.csv of cf-eval"));
        heads.iter().position(|head| head == name).ok_or_else(missing)
    };
    let first =
        [place("case_id")?, place("slide_id")?, place("fold")?, place("time")?, place("event")?, place("risk")?];
    let numbered = |name: &str| (0..).map_while(|bin| place(&format!("{name}_{bin}")).ok()).collect::<Vec<_>>();
    let (hazards, survival) = (numbered("hazard"), numbered("survival"));
    let (mut slides, mut rows) = (Vec::new(), HashMap::new());
    for (i, record) in table.records().enumerate() {
        let record = record.map_err(|e| Error::file(path, e))?;
        let cell = |place: usize| record.get(place).unwrap_or_default();
        let number = |place: usize| {
            let parsed = cell(place).parse::<f64>().ok().filter(|value| value.is_finite());
            let name = heads.get(place).unwrap_or_default();
            parsed.ok_or_else(|| Error::cell(path, i + 2, name, format!("`{}`, expected a number", cell(place))))
        };
        let [case, slide, fold, time, event, risk] = first;
        let whole = |name: &str| Error::cell(path, i + 2, name, format!("`{}`, expected a whole number", cell(fold)));
        for place in [case, slide] {
            if cell(place).trim().is_empty() {
                let name = heads.get(place).unwrap_or_default();
                return Err(Error::cell(path, i + 2, name, "the cell is empty, expected an identifier"));
            }
        }
        if let Some(first) = rows.insert((cell(slide).to_string(), cell(fold).to_string()), i + 2) {
            let message = format!("`{}` stands in row {first} of the same fold already", cell(slide));
            return Err(Error::cell(path, i + 2, "slide_id", message));
        }
        slides.push(SlideResult {
            case_id: cell(case).into(),
            slide_id: cell(slide).into(),
            fold: cell(fold).parse().map_err(|_| whole("fold"))?,
            time: number(time)?,
            event: match number(event)? {
                0.0 => false,
                1.0 => true,
                other => return Err(Error::cell(path, i + 2, "event", format!("`{other}`, expected 0 or 1"))),
            },
            risk: number(risk)?,
            hazards: hazards.iter().map(|&place| number(place)).collect::<Result<_>>()?,
            survival: survival.iter().map(|&place| number(place)).collect::<Result<_>>()?,
        });
    }
    Ok(slides)
}
