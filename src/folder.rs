//! The folder of a run: what lies where, and the metrics of its epochs.
//!
//! ```text
//! RUN/config.toml            the resolved settings; `cf-train --config` repeats the run
//! RUN/inputs.json            fingerprints of the tables and feature files
//! RUN/left_out.csv           the slides that the run does not use, and why; absent where it uses all
//! RUN/fold_<i>/              best.safetensors, checkpoint.safetensors, metrics.jsonl (a line an epoch)
//! RUN/report.html, ...       what an evaluation leaves, once all folds are trained
//! ```

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    data::atomic::{MOST, read_text},
};

/// Where the resolved settings lie in a run's folder.
pub fn config_path(run: &Path) -> PathBuf {
    run.join("config.toml")
}

/// The part of a run's folder that is one fold's, by its number.
pub fn fold_folder(run: &Path, fold: usize) -> PathBuf {
    run.join(format!("fold_{fold}"))
}

const METRICS: &str = "metrics.jsonl";

/// Where a fold's metrics lie in a run's folder: an [`EpochMetrics`] a line. Each fold has a file
/// of its own, since processes on several machines cannot append to one.
pub fn metrics_path(run: &Path, fold: usize) -> PathBuf {
    fold_folder(run, fold).join(METRICS)
}

/// The first of `runs/<name>-1`, `runs/<name>-2`, ... that is not there yet.
pub fn fresh_folder(name: &str) -> PathBuf {
    let name = name.replace(['/', '\\'], "_");
    let folder = |i: usize| Path::new("runs").join(format!("{name}-{i}"));
    (1..).map(folder).find(|folder| !folder.exists()).unwrap_or_else(|| folder(0))
}

/// Makes a new run's folder: `out`, which may be there if it is empty, or a fresh one that no other
/// process has taken.
pub fn make_folder(out: Option<PathBuf>, name: &str) -> Result<PathBuf> {
    let failed = |folder: &Path, e: std::io::Error| Error::file(folder, format!("cannot be made: {e}"));
    if let Some(out) = out {
        if out.exists() && !out.is_dir() {
            return Err(Error::Usage(format!("--out {}: is a file, expected a folder", out.display())));
        }
        std::fs::create_dir_all(&out).map_err(|e| failed(&out, e))?;
        if std::fs::read_dir(&out).map_err(|e| failed(&out, e))?.next().is_some() {
            let resume = match config_path(&out).is_file() {
                true => format!(", or go on with --resume {}", out.display()),
                false => String::new(),
            };
            return Err(Error::Usage(format!("{} is not empty; choose another --out{resume}", out.display())));
        }
        return Ok(out);
    }
    loop {
        let folder = fresh_folder(name);
        if let Some(runs) = folder.parent() {
            std::fs::create_dir_all(runs).map_err(|e| failed(runs, e))?;
        }
        match std::fs::create_dir(&folder) {
            Ok(()) => return Ok(folder),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {} // another process was faster
            Err(e) => return Err(failed(&folder, e)),
        }
    }
}

/// Makes the folder of a run that several processes train, or finds it there. An error if it holds
/// files and is neither a run nor what a process leaves that is killed while it begins one.
pub fn make_shared_folder(out: &Path) -> Result<()> {
    if out.exists() && !out.is_dir() {
        return Err(Error::Usage(format!("--out {}: is a file, expected a folder", out.display())));
    }
    std::fs::create_dir_all(out).map_err(|e| Error::file(out, format!("cannot be made: {e}")))?;
    let entries = std::fs::read_dir(out).map_err(|e| Error::file(out, format!("cannot be read: {e}")))?;
    let name = |entry: std::fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    let begins = |name: &String| name.starts_with('.') || ["inputs.json", "left_out.csv"].contains(&name.as_str());
    let other = entries.filter_map(|entry| entry.ok().map(name)).find(|name| !begins(name));
    // looked for last: another process may be beginning the run meanwhile
    match other {
        Some(other) if !config_path(out).is_file() => {
            let message = format!("--out {}: holds {other} and is no run; choose another", out.display());
            Err(Error::Usage(message))
        }
        _ => Ok(()),
    }
}

/// The best epoch so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Counted from 0.
    pub epoch: usize,
    /// Harrell's C of the slides that the epoch is chosen by.
    pub c_index: f64,
}

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochMetrics {
    /// The fold's number.
    pub fold: usize,
    /// Counted from 0.
    pub epoch: usize,
    /// Of all updates of the epoch.
    pub learning_rate: f64,
    /// Mean over the slides shown; with the Cox loss, over the events of its batches.
    pub train_loss: f64,
    /// C-indices are absent where no pair of slides can be compared.
    pub train_c_index: Option<f64>,
    /// Mean over the slides that the epoch is chosen by, at alpha 0; with the Cox loss, that of
    /// them as one cohort.
    pub val_loss: f64,
    /// Of the slides that the epoch is chosen by.
    pub val_c_index: Option<f64>,
    /// Whether this epoch gave the best model so far.
    pub best: bool,
    /// Cox batches in which nobody could be compared.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub batches_without_update: usize,
    /// Of training and validation; where an epoch was resumed, since then.
    pub seconds: f64,
    /// Patches of all slides shown in these seconds, in training and validation, over the seconds.
    pub patches_per_second: f64,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// The epochs so far of these folds of a run, in order.
pub fn read_metrics(run: &Path, folds: Range<usize>) -> Result<Vec<EpochMetrics>> {
    let mut epochs = Vec::new();
    for fold in folds {
        let path = metrics_path(run, fold);
        // earlier versions wrote the lines of all folds into one file
        let path = if path.exists() { path } else { run.join(METRICS) };
        if path.exists() {
            epochs.extend(read_lines(&path)?.into_iter().filter(|epoch| epoch.fold == fold));
        }
    }
    Ok(epochs)
}

fn read_lines(path: &Path) -> Result<Vec<EpochMetrics>> {
    let text = read_text(path, MOST)?;
    // a last line without an end was cut off by a crash
    let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let parse = |(i, line)| serde_json::from_str(line).map_err(|e| Error::file(path, format!("line {}: {e}", i + 1)));
    whole.enumerate().map(parse).collect()
}
