//! What an evaluation leaves on disk.

use std::{io::Write, path::Path};

use super::{About, SlideResult, Summary, html, km};
use crate::{Error, Result, data::atomic::write_atomically, train::fold::EpochMetrics};

/// Pixels of km.png for one CSS pixel: 2562 across, 300 a printed inch at 22 cm.
const PNG_SCALE: f64 = 3.0;

/// Writes predictions.csv, summary.json, km.svg, km.png and report.html into `folder`, each of them whole or not at all.
pub fn write(
    folder: &Path,
    about: &About,
    summary: &Summary,
    slides: &[SlideResult],
    epochs: &[EpochMetrics],
) -> Result<()> {
    let curves = km::figure(&summary.risk_groups(slides), summary.log_rank.as_ref().map(|test| test.p_value))?;
    let files = [
        ("predictions.csv", predictions_csv(slides)?),
        ("summary.json", serde_json::to_vec_pretty(summary).map_err(|e| Error::file(folder, e))?),
        ("km.svg", curves.standalone().into_bytes()),
        ("km.png", curves.png(PNG_SCALE)?),
        ("report.html", html::page(about, summary, slides, epochs)?.into_bytes()),
    ];
    std::fs::create_dir_all(folder).map_err(|e| Error::file(folder, format!("cannot be made: {e}")))?;
    files.iter().try_for_each(|(name, content)| {
        let path = folder.join(name);
        let failed = |e: std::io::Error| Error::file(&path, format!("cannot be written: {e}"));
        write_atomically(&path, |file| file.write_all(content).map_err(failed))
    })
}

/// A row a slide: case_id, slide_id, fold, time (months), event (1 = observed), risk, hazard_0.., survival_0..; numbers in full.
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
