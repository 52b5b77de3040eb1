//! A check of a cohort before any training: every table, and every value of every feature file.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use rayon::prelude::*;

use super::{cohort::Cohort, dataset::Source, features::FeatureFile, layout::find_features};
use crate::Result;

/// What a check has read, and what is wrong with it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checked {
    /// Slides that have feature files at all scales, bad ones included.
    pub slides: usize,
    /// Their feature files.
    pub files: usize,
    /// Bytes of these files.
    pub bytes: u64,
    /// In the order of the slides.
    pub problems: Vec<Problem>,
}

/// A feature file that cannot be trained on.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// Whose feature file it is, as in the clinical table.
    pub slide_id: String,
    /// The feature file; [`Checked::table`] shows the part of it within the folder of features.
    pub path: PathBuf,
    /// The end of a sentence that begins with the path.
    pub what: String,
}

/// Reads the tables and all values of the feature files, on all threads. `each` is told the bytes
/// of each file that is done. An error where the tables or folders are wrong; what is wrong with a
/// feature file is one of the problems.
pub fn check(source: &Source, each: impl Fn(u64) + Sync) -> Result<Checked> {
    let mut cohort = Cohort::read(source.clinical, source.columns, source.manifest)?;
    cohort.leave_out(source.skip)?;
    let (found, _) = find_features(cohort.slides.clone(), &cohort.rows, source.pt_dir, source.backbone, source.scales)?;
    let files: Vec<(&str, &Path)> = found
        .iter()
        .flat_map(|(slide, files)| files.values().map(|file| (slide.slide_id.as_str(), file.as_path())))
        .collect();
    let read: Vec<(u64, Result<usize>)> = files
        .par_iter()
        .map(|(_, path)| {
            let bytes = std::fs::metadata(path).map_or(0, |file| file.len());
            let width = FeatureFile::open(path).and_then(|file| file.verify().map(|()| file.features()));
            each(bytes);
            (bytes, width)
        })
        .collect();
    // the width of most files is the cohort's, of two that are as frequent the smaller
    let mut widths: BTreeMap<usize, usize> = BTreeMap::new();
    read.iter().filter_map(|(_, width)| width.as_ref().ok()).for_each(|&width| *widths.entry(width).or_default() += 1);
    let expected = widths.iter().max_by_key(|&(&width, &count)| (count, std::cmp::Reverse(width)));
    let expected = expected.map_or(0, |(&width, _)| width);
    let problem = |(&(slide, path), (_, width)): (&(&str, &Path), &(u64, Result<usize>))| {
        let what = match width {
            Ok(width) if *width == expected => return None,
            Ok(width) => format!("has features of width {width}, expected {expected} as in most files"),
            Err(error) => {
                let text = error.to_string();
                text.strip_prefix(&format!("{}: ", path.display())).map_or(text.clone(), String::from)
            }
        };
        Some(Problem { slide_id: slide.to_string(), path: path.to_path_buf(), what })
    };
    Ok(Checked {
        slides: found.len(),
        files: files.len(),
        bytes: read.iter().map(|(bytes, _)| bytes).sum(),
        problems: files.iter().zip(&read).filter_map(problem).collect(),
    })
}

impl Checked {
    /// The slides that cannot be trained on, each with the reason.
    pub fn bad_slides(&self) -> HashMap<String, String> {
        let mut reasons: HashMap<String, String> = HashMap::new();
        for Problem { slide_id, path, what } in &self.problems {
            let reason = format!("{} {what}", path.display());
            reasons.entry(slide_id.clone()).and_modify(|all| *all += &format!("; {reason}")).or_insert(reason);
        }
        reasons
    }

    /// A table of what is wrong, with paths within `pt_dir`.
    pub fn table(&self, pt_dir: &Path) -> String {
        let size = bytesize::ByteSize(self.bytes);
        let read = format!("{} slides, {} feature files, {size} read", self.slides, self.files);
        if self.problems.is_empty() {
            return format!("{read}: nothing is wrong with them");
        }
        let name = |problem: &Problem| problem.path.strip_prefix(pt_dir).unwrap_or(&problem.path).display().to_string();
        let wide = self.problems.iter().map(|problem| name(problem).chars().count()).max().unwrap_or(0);
        let rows = self.problems.iter().map(|problem| format!("{:<wide$}  {}", name(problem), problem.what));
        let head = format!("{:<wide$}  what is wrong", "file");
        let last = format!("{read}: {} slides cannot be trained on", self.bad_slides().len());
        [head].into_iter().chain(rows).chain([last]).collect::<Vec<_>>().join("\n")
    }
}
