//! README.md: the model's card, for whoever finds the folder later. Its headings are those of
//! Mitchell et al. (Model Cards for Model Reporting, FAT* 2019) as Hugging Face's cards have them.

use std::fmt::Write;

use super::{About, Cell, StatisticRow, Summary, accuracy::Unit, p_text};

/// The first line, by which a card of ours is told from somebody's own README.
pub const MARK: &str = "<!-- Written by CrossFusion with the report, and replaced with it. -->\n";

pub fn card(about: &About, summary: &Summary) -> String {
    let mut card = format!("{MARK}\n# CrossFusion on {}\n\n", markdown(&about.title));
    card += "A survival model over whole-slide-image features at 5x, 10x and 20x, and how it did on the slides below. \
             [report.html](report.html) shows it in full.\n";

    card += "\n## Model details\n\n";
    for (name, value) in &about.facts {
        let _ = writeln!(card, "- {}: {}", markdown(name), markdown(value));
    }
    card += "- Paper: Soraki et al., CrossFusion, MIDL 2026, https://arxiv.org/abs/2503.02064\n\
             - Output: a hazard for each time bin (or, of a Cox model, one risk); higher risk means an earlier event is expected\n";

    card += "\n## Uses\n\nResearch on prognosis from histology: comparing models, features and cohorts.\n\n\
             **Out of scope:** clinical use. No number here may guide the care of a patient.\n";

    card += "\n## Data\n\n";
    let Summary { slides, patients, events, patient_events, .. } = summary;
    let _ = writeln!(
        card,
        "- Evaluated: {slides} slides ({events} with an event) of {patients} patients ({patient_events} with an event)"
    );
    for fold in &summary.folds {
        let train = fold.train_slides.map_or(String::new(), |n| format!("trained on {n} slides, "));
        let _ = writeln!(
            card,
            "- Fold {}: {train}evaluated on {} slides of {} patients, {} of whom had an event",
            fold.fold, fold.slides, fold.patients, fold.patient_events
        );
    }

    card += "\n## Evaluation\n\n### Protocol\n\n";
    let protocol = if about.protocol.is_empty() {
        "One checkpoint on the slides above. Whether it was trained on any of them, the notes say where that is known."
    } else {
        &about.protocol
    };
    let _ = writeln!(card, "{}", markdown(protocol));
    let _ = writeln!(
        card,
        "\nIntervals are of {:.0} %: percentiles of {} bootstrap cohorts of whole patients (seed {}); of the mean of folds, Student's \
         t on the logit scale.",
        100.0 * summary.resampling.level,
        summary.resampling.replicates,
        summary.resampling.seed
    );

    card += "\n### Results\n\n";
    let heads =
        if summary.by_patient.is_some() { "| by slide | by patient |\n|---|---|---|" } else { "| |\n|---|---|" };
    let _ = writeln!(card, "| Statistic {heads}");
    let mut notes = Vec::new();
    for StatisticRow { name, cells } in summary.statistics() {
        for note in cells.iter().filter_map(|cell| cell.note.as_ref()) {
            notes.push(format!("{name}: {note}."));
        }
        let cells: String = cells.iter().map(|Cell { text, .. }| format!(" {} |", markdown(text))).collect();
        let _ = writeln!(card, "| {} |{cells}", markdown(&name));
    }
    let who = if summary.unit == Unit::Patient { "patients" } else { "slides" };
    let _ = writeln!(card, "\n| Groups of {who} by risk | log-rank | hazard ratio |\n|---|---|---|");
    for grouping in &summary.risk_groups {
        let p = grouping.log_rank.as_ref().map_or("-".into(), |test| p_text(test.p_value));
        let _ = writeln!(card, "| {} | {} | {} |", grouping.title(), markdown(&p), grouping.hazard_ratio.text());
        notes.extend(grouping.hazard_ratio.note.iter().map(|note| format!("{}: {note}.", grouping.title())));
    }
    for warning in &summary.warnings {
        let _ = writeln!(card, "\n**Warning.** {}", markdown(warning));
    }

    card += "\n## Bias, risks and limitations\n\n";
    card += "- Not for clinical use.\n\
             - It was not tested on other hospitals, scanners, stains or feature extractors than this cohort's, nor prospectively.\n\
             - No part of the cohort was looked at by itself: sex, age, ancestry, stage and site may each fare worse.\n";
    if about.protocol.contains("optimistic") {
        card += "- The epoch was chosen on the slides that the result is of, so the result is optimistic.\n";
    }
    if summary.folds.len() > 1 {
        card += "- The folds are different models that share training patients: their spread is too narrow for new patients.\n";
    }
    notes.dedup(); // by slide and by patient there often is one reason
    for note in notes.iter().chain(&summary.notes) {
        let _ = writeln!(card, "- {}", markdown(note));
    }

    card += "\n## How to use it again\n\n";
    if !about.commands.is_empty() {
        // indented, as no fence is safe from what a path may hold
        about.commands.lines().for_each(|line| card += &format!("    {}\n", plain(line)));
    }
    card += "\n## Files\n\n\
             - `report.html`, `figures/`: the report, and its plots as SVG, PNG and CSV\n\
             - `summary.json`: every number of it\n\
             - `predictions.csv`: a row a slide";
    card += if summary.unit == Unit::Patient {
        "; `predictions_patients.csv`: a row a patient, with risk groups\n"
    } else {
        "\n"
    };
    card
}

/// Text without control characters, which would break lines or a terminal.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Text as it stands, whatever it means in Markdown.
fn markdown(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in plain(text).chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '&' => escaped.push_str("&amp;"),
            '\\' | '`' | '*' | '_' | '|' | '[' | ']' | '#' => {
                escaped.push('\\');
                escaped.push(c);
            }
            c => escaped.push(c),
        }
    }
    escaped
}
