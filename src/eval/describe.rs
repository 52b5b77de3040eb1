//! What a report says about where its numbers come from.

use std::{
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use super::Checkpoint;
use crate::{
    Error, Result,
    data::dataset::{Fold, Source},
    folder::{EpochMetrics, metrics_path},
    model::{self, Fusion, ModelName},
    report::{About, VERSION},
    train::{config::RunConfig, protocol::Reported, step::Engine},
};

/// Of a run.
pub fn run(
    run: &Path,
    config: &RunConfig,
    reported: &Reported,
    engine: &Engine<f32>,
    metrics: &[EpochMetrics],
) -> Result<About> {
    let seconds: f64 = metrics.iter().map(|epoch| epoch.seconds).sum();
    let mut facts = model_facts(&config.backbone, engine);
    facts.push(fact(
        "Loss",
        clap::ValueEnum::to_possible_value(&config.loss_fn).map_or_else(String::new, |v| v.get_name().into()),
    ));
    facts.push(fact("Seed", config.seed));
    if reported.tested {
        facts.push(fact("Slides", "test parts of the folds"));
    }
    let modified = |fold| std::fs::metadata(metrics_path(run, fold)).and_then(|file| file.modified()).ok();
    if let Some(modified) = config.fold_numbers().filter_map(modified).max() {
        facts.push(fact("Trained", format!("{}, in {} of wall time", date(modified), duration(seconds))));
    }
    facts.extend(source_facts(&config.source(), engine));
    facts.push(fact("Folds", config.splits.display()));
    let folder = crate::quote(&run.display().to_string());
    Ok(About {
        title: cohort_name(&config.clinical),
        facts,
        protocol: config.protocol.sentence(reported),
        config: config.to_toml()?,
        commands: format!("cf-train --config {folder}/config.toml --out NEW_RUN\ncf-eval {folder}"),
    })
}

/// Of a checkpoint on a cohort, or on a `part` of it.
pub fn checkpoint(checkpoint: &Checkpoint, part: Option<&Fold>, engine: &Engine<f32>) -> Result<About> {
    let source = &checkpoint.source;
    let mut facts = model_facts(source.backbone, engine);
    facts.push(fact("Checkpoint", checkpoint.path.display()));
    facts.extend(source_facts(source, engine));
    let mut arguments = vec![("--checkpoint", checkpoint.path.display().to_string())];
    arguments.push(("--clinical", source.clinical.display().to_string()));
    if !source.columns.are_usual() {
        arguments.push(("--columns", source.columns.to_string()));
    }
    arguments.extend(source.manifest.map(|path| ("--manifest", path.display().to_string())));
    arguments.push(("--pt-dir", source.pt_dir.display().to_string()));
    arguments.push(("--backbone", source.backbone.to_string()));
    if let Some((splits, fold)) = checkpoint.split {
        let side = if part.is_some_and(|part| !part.test.is_empty()) { "test" } else { "validation" };
        facts.push(fact("Slides", format!("{side} part of fold {fold}")));
        arguments.extend([("--splits", splits.display().to_string()), ("--fold", fold.to_string())]);
    }
    arguments.push(("--num-heads", engine.model().config().heads.to_string()));
    let arguments: Vec<String> =
        arguments.iter().map(|(flag, value)| format!("{flag} {}", crate::quote(value))).collect();
    Ok(About {
        title: cohort_name(source.clinical),
        facts,
        protocol: String::new(),
        config: toml::to_string(&engine.model().config()).map_err(|e| Error::Usage(e.to_string()))?,
        commands: format!("cf-eval {}", arguments.join(" \\\n  ")),
    })
}

fn fact(name: &str, value: impl std::fmt::Display) -> (String, String) {
    (name.to_string(), value.to_string())
}

/// Where the data came from, and what it was evaluated on.
fn source_facts(source: &Source, engine: &Engine<f32>) -> Vec<(String, String)> {
    vec![
        fact("Evaluated on", engine.device().description()),
        fact("Clinical table", source.clinical.display()),
        fact("Manifest", source.manifest.map_or("none".to_string(), |path| path.display().to_string())),
        fact("Features", source.pt_dir.join(source.backbone).display()),
    ]
}

fn model_facts(backbone: &str, engine: &Engine<f32>) -> Vec<(String, String)> {
    let model::Config { model, fusion, features, .. } = engine.model().config();
    let fusion = match (model, fusion) {
        (ModelName::CrossFusionConcat, _) => "",
        (_, Fusion::Conv2d) => " conv2d",
        (_, Fusion::Conv1d) => " conv1d",
    };
    vec![
        fact("Backbone", format!("{backbone}, {features} features")),
        fact("Model", format!("{}{fusion}, {} parameters", title(*model), count(engine.model().layout().parameters()))),
        fact("Program", format!("CrossFusion {VERSION}")),
    ]
}

/// A model's name as papers write it.
fn title(model: ModelName) -> &'static str {
    match model {
        ModelName::CrossFusion => "CrossFusion",
        ModelName::CrossFusionConcat => "CrossFusionConcat (ablation)",
        ModelName::CrossFusionSingle => "CrossFusionSingle (ablation)",
    }
}

/// "9.3 M", or in full where that would say little.
fn count(parameters: usize) -> String {
    if parameters < 1_000_000 { parameters.to_string() } else { format!("{:.1} M", parameters as f64 / 1e6) }
}

/// The table's file name without its extensions.
fn cohort_name(clinical: &Path) -> String {
    let name = clinical.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let name = name.strip_suffix(".zip").unwrap_or(&name);
    name.strip_suffix(".csv").unwrap_or(name).to_string()
}

fn duration(seconds: f64) -> String {
    let minutes = (seconds / 60.0).round() as u64;
    match minutes {
        0 => format!("{seconds:.0} s"),
        1..60 => format!("{minutes} min"),
        _ => format!("{} h {} min", minutes / 60, minutes % 60),
    }
}

/// The day in UTC, as 2026-03-02 (Hinnant, "chrono-compatible low-level date algorithms": years
/// begin in March, 400 years are an era).
fn date(time: SystemTime) -> String {
    let days = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() / 86_400) + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153; // 0 = March
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    format!("{:04}-{month:02}-{day:02}", era * 400 + year + u64::from(month <= 2))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // seconds from `date -u -d DATE +%s`
        for (seconds, expected) in [
            (0, "1970-01-01"),
            (951_782_399, "2000-02-28"),
            (951_782_400, "2000-02-29"),
            (951_868_800, "2000-03-01"),
            (1_735_689_599, "2024-12-31"),
            (1_772_409_600, "2026-03-02"),
            (4_107_542_400, "2100-03-01"),
        ] {
            assert_eq!(date(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn durations_and_names_read_well() {
        assert_eq!([3.2, 59.0, 7_260.0].map(duration), ["3 s", "1 min", "2 h 1 min"]);
        assert_eq!(cohort_name(Path::new("data/tcga_blca_all_clean.csv.zip")), "tcga_blca_all_clean");
    }
}
