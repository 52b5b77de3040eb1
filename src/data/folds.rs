//! Cross-validation folds: `splits_<i>.csv` with the columns `train` and `val` of case ids, blank where one is shorter.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
};

use super::{
    cohort::{Cohort, Slide},
    table::Table,
};
use crate::{Error, Result};

/// Cases of the two sides of a fold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Split {
    pub train: HashSet<String>,
    pub val: HashSet<String>,
    /// Cases of the study without an outcome, left out of both sides (the published LUAD folds name nine).
    pub without_outcome: usize,
}

pub fn split_path(folder: &Path, fold: usize) -> PathBuf {
    folder.join(format!("splits_{fold}.csv"))
}

/// Reads a fold. No case may be on both sides or twice on one. A case that is not in the clinical table is left out if the manifest knows
/// it, and is an error otherwise.
pub fn read_split(path: &Path, cohort: &Cohort) -> Result<Split> {
    parse_split(&Table::read(path, b',', &["train", "val"])?, path, cohort)
}

/// The same from a table; `path` is only for messages.
pub fn parse_split(table: &Table, path: &Path, cohort: &Cohort) -> Result<Split> {
    let names = ["train", "val"];
    let mut seen: HashMap<&str, (usize, usize)> = HashMap::new();
    let mut split = Split::default();
    for (row, cells) in table.rows() {
        for (column, case) in cells.iter().enumerate().filter(|(_, case)| !case.is_empty()) {
            if !cohort.has_outcome(case) {
                if !cohort.in_manifest(case) {
                    let message = match cohort.has_manifest() {
                        true => format!("case `{case}` is neither in the clinical table nor in the manifest"),
                        false => format!(
                            "case `{case}` is not in the clinical table (with --manifest, cases that it lists are left out)"
                        ),
                    };
                    return Err(table.error(row, column, message));
                }
                split.without_outcome += 1;
                continue;
            }
            if let Some((first_row, first)) = seen.insert(case, (row, column)) {
                let message = format!("case `{case}` is in `{}` in row {first_row} already", names[first]);
                return Err(table.error(row, column, message));
            }
            let side = if column == 0 { &mut split.train } else { &mut split.val };
            side.insert(case.clone());
        }
    }
    for (name, side) in names.iter().zip([&split.train, &split.val]) {
        if side.is_empty() {
            return Err(Error::file(path, format!("has no case in its column `{name}`")));
        }
    }
    Ok(split)
}

/// The slides of a side, as indices into `slides`.
pub fn slides_of(side: &HashSet<String>, slides: &[Slide]) -> Vec<usize> {
    (0..slides.len()).filter(|&i| side.contains(&slides[i].case_id)).collect()
}
