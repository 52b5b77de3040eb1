//! What a run has read: a fingerprint of every table and feature file, in `inputs.json`. A resumed
//! run refuses inputs that have changed since it began, and an evaluation names them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::config::RunConfig;
use crate::{
    Error, Result,
    data::{
        atomic::{MOST, read_bytes, write_text},
        dataset::Dataset,
        digest, folds,
    },
};

/// The fingerprints of a run's inputs, by name: the role of a table, and a feature file's path
/// within `--pt-dir`, so that a cohort that has moved as a whole is still the same.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Inputs {
    tables: BTreeMap<String, Fingerprint>,
    features: BTreeMap<String, Fingerprint>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Fingerprint {
    path: PathBuf,
    bytes: u64,
    /// Seconds since 1970.
    modified: u64,
    /// Of a table's content, or of a feature file's sample ([`digest::sample`]); None of a feature
    /// file that could not be read, which may be mended.
    sha256: Option<String>,
}

impl Fingerprint {
    fn of(path: &Path, sha256: impl Fn(&Path) -> std::io::Result<String>) -> Result<Self> {
        let read = || {
            let metadata = std::fs::metadata(path)?;
            let modified = metadata.modified()?.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            Ok(Self { path: path.to_path_buf(), bytes: metadata.len(), modified, sha256: Some(sha256(path)?) })
        };
        read().map_err(|e: std::io::Error| Error::file(path, format!("cannot be read: {e}")))
    }

    fn same_content(&self, other: &Self) -> bool {
        self.sha256.is_none() || (self.bytes, &self.sha256) == (other.bytes, &other.sha256)
    }
}

/// How inputs differ from those of before.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Changes {
    /// A sentence an input whose content is another, without its end.
    pub contents: Vec<String>,
    /// Files that were written again since, and look the same in size and sample.
    pub written_again: Vec<PathBuf>,
}

/// Where the fingerprints lie in a run's folder.
pub fn path(run: &Path) -> PathBuf {
    run.join("inputs.json")
}

impl Inputs {
    /// The inputs as they are now. Feature files are read in parallel, about 100 KB of each.
    pub fn read(config: &RunConfig, dataset: &Dataset) -> Result<Self> {
        // of tables that have been read before, so that they have an end
        let table = |path: &Path| std::fs::read(path).map(|bytes| digest::sha256(&bytes));
        let mut tables = BTreeMap::new();
        let roles = [("clinical", Some(&config.clinical)), ("manifest", config.manifest.as_ref())];
        for (role, path) in roles.into_iter().filter_map(|(role, path)| Some((role, path?))) {
            tables.insert(role.into(), Fingerprint::of(path, table)?);
        }
        for fold in config.fold_numbers() {
            let path = folds::split_path(&config.splits, fold);
            tables.insert(format!("fold {fold}"), Fingerprint::of(&path, table)?);
        }
        let files: Vec<&Path> = dataset.files().collect();
        let features = files.par_iter().map(|path| {
            let name = path.strip_prefix(&config.pt_dir).unwrap_or(path);
            Ok((name.to_string_lossy().into_owned(), Fingerprint::of(path, digest::sample)?))
        });
        Ok(Self { tables, features: features.collect::<Result<_>>()? })
    }

    /// Writes `inputs.json` into a run's folder.
    pub fn save(&self, run: &Path) -> Result<()> {
        let path = path(run);
        let json = serde_json::to_string_pretty(self).map_err(|e| Error::file(&path, e))?;
        write_text(&path, &json)
    }

    /// Those that a run was begun with; None where it has no `inputs.json`.
    pub fn load(run: &Path) -> Result<Option<Self>> {
        let path = path(run);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = read_bytes(&path, MOST)?;
        serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::file(&path, format!("is damaged: {e}")))
    }

    /// What has changed between `self` and `now`.
    pub fn changes(&self, now: &Self) -> Changes {
        let mut changes = Changes::default();
        for (before, now) in [(&self.tables, &now.tables), (&self.features, &now.features)] {
            for (name, before) in before {
                match now.get(name) {
                    None => changes.contents.push(format!("{} is no longer read", before.path.display())),
                    Some(now) if !before.same_content(now) => {
                        changes.contents.push(format!("{} has another content", now.path.display()));
                    }
                    Some(now) if before.modified != now.modified => changes.written_again.push(now.path.clone()),
                    Some(_) => {}
                }
            }
            let new = now.iter().filter(|(name, _)| !before.contains_key(*name));
            changes.contents.extend(new.map(|(_, now)| format!("{} was not there", now.path.display())));
        }
        changes
    }

    /// Lets a feature file be mended that could not be read, if it is still as it was when the run
    /// began. Says whether it is.
    pub fn may_be_mended(&mut self, file: &Path) -> bool {
        let Some(before) = self.features.values_mut().find(|before| before.path == file) else { return false };
        let unchanged = Fingerprint::of(file, digest::sample).is_ok_and(|now| before.same_content(&now));
        if unchanged {
            before.sha256 = None;
        }
        unchanged
    }
}

impl Changes {
    /// All of them in a sentence's end, the first few by name; None if there are none.
    pub fn sentence(&self) -> Option<String> {
        const NAMED: usize = 3;
        let named = self.contents.iter().take(NAMED).cloned().collect::<Vec<_>>().join("; ");
        match self.contents.len() {
            0 => None,
            1..=NAMED => Some(named),
            n => Some(format!("{named}; and {} more", n - NAMED)),
        }
    }
}
