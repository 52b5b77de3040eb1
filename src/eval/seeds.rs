//! Runs that differ in their seed alone, in one folder: each is evaluated, and then all together.

use std::path::{Path, PathBuf};

use bytesize::ByteSize;

use super::{Moved, evaluate_run};
use crate::{
    Error, Result,
    device::Device,
    folder,
    report::seeds::{SeedResult, Seeds},
    survival::Bootstrap,
    train::{
        config::{Difference, RunConfig},
        fold::FoldTrainer,
    },
};

/// The runs in a folder of `cf-train --seeds`, by seed; none where it is not one.
pub fn runs(folder: &Path) -> Vec<(u64, PathBuf)> {
    let seed = |path: PathBuf| {
        let seed = path.file_name()?.to_str()?.strip_prefix("seed_")?.parse().ok()?;
        folder::config_path(&path).is_file().then_some((seed, path))
    };
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut runs: Vec<(u64, PathBuf)> = entries.filter_map(|entry| seed(entry.path())).collect();
    runs.sort();
    runs
}

/// Evaluates each run in `folder` that has a model as [`evaluate_run`] does, each on a device of
/// its own, and writes seeds.json and report.html over all of them. An error if the runs differ in
/// more than their seed, or one has another seed than its folder is named for.
pub fn evaluate(
    folder: &Path,
    moved: &Moved,
    device: &dyn Fn() -> Result<Device>,
    budget: Option<ByteSize>,
    plan: Bootstrap,
) -> Result<Seeds> {
    let runs = runs(folder);
    let config = |run: &Path| RunConfig::read(&folder::config_path(run));
    let mut trained = Vec::new();
    let (mut results, mut warnings) = (Vec::new(), Vec::new());
    for (seed, run) in &runs {
        let of_first = config(&runs[0].1)?;
        let of_run = config(run)?;
        if of_run.seed != *seed {
            let message = format!("its config.toml has seed = {}, expected that of the folder's name", of_run.seed);
            return Err(Error::file(run, message));
        }
        let of_run = RunConfig { seed: of_first.seed, ..of_run };
        if let Some(Difference { key, one, other }) = of_first.difference(&of_run) {
            let first = runs[0].1.display();
            return Err(Error::file(run, format!("has {key} = {other}, and {first} {one}: they are not seeds of one")));
        }
        let has_model = |fold| FoldTrainer::best_path(&folder::fold_folder(run, fold)).is_file();
        match of_run.fold_numbers().any(has_model) {
            true => trained.push((*seed, run)),
            false => warnings.push(format!("There is no model of seed {seed} yet.")),
        }
    }
    if trained.is_empty() {
        return Err(Error::Usage(format!("{}: no seed has a trained fold yet", folder.display())));
    }
    for (seed, run) in trained {
        let summary = evaluate_run(run, moved, device()?, budget, plan)?;
        warnings.extend(summary.warnings.iter().map(|warning| format!("Seed {seed}: {warning}")));
        results.push(SeedResult::new(seed, format!("seed_{seed}"), &summary));
    }
    let seeds = Seeds::new(results, warnings);
    seeds.write(folder)?;
    Ok(seeds)
}
