//! The cohort: a clinical table, joined with a GDC manifest if there is one, and the slides' feature files.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
};

use super::table::Table;
use crate::{Error, Result};

/// One slide's outcome. A patient (case) may have several slides.
#[derive(Clone, Debug, PartialEq)]
pub struct Slide {
    pub case_id: String,
    /// As in the table, with its extension.
    pub slide_id: String,
    /// Months from diagnosis to death or last contact.
    pub months: f64,
    /// True when the patient was alive at last contact.
    pub censored: bool,
}

impl Slide {
    /// The name that feature files carry.
    pub fn name(&self) -> &str {
        self.slide_id.strip_suffix(".svs").unwrap_or(&self.slide_id)
    }
}

/// The slides of a study, and who else is known to it.
#[derive(Clone, Debug, Default)]
pub struct Cohort {
    /// The clinical table's rows, joined with the manifest if there is one.
    pub slides: Vec<Slide>,
    /// Cases of the clinical table, joined or not.
    cases: HashSet<String>,
    /// File names of the manifest, sorted.
    manifest: Vec<String>,
}

impl Cohort {
    /// Reads `case_id, slide_id, censorship, survival_months` from a CSV or a zip of one. With a GDC manifest (tab-separated), slides whose
    /// `filename` it does not list are left out, and a slide that it lists twice comes twice, as pandas' inner merge does it (TCGA COAD has
    /// one such slide).
    pub fn read(clinical: &Path, manifest: Option<&Path>) -> Result<Self> {
        let slides = clinical_slides(&Table::read(clinical, b',', &CLINICAL)?)?;
        let manifest = manifest.map(|path| Table::read(path, b'\t', &["filename"])).transpose()?;
        let joined = manifest.is_some();
        let cohort = Self::new(slides, manifest.as_ref());
        if cohort.slides.is_empty() {
            return Err(Error::file(
                clinical,
                if joined { "has no slide in common with the manifest" } else { "has no slide" },
            ));
        }
        Ok(cohort)
    }

    /// From a clinical table's slides and a manifest's column `filename`.
    pub fn new(slides: Vec<Slide>, manifest: Option<&Table>) -> Self {
        let cases = slides.iter().map(|slide| slide.case_id.clone()).collect();
        let Some(manifest) = manifest else {
            return Self { slides, cases, manifest: Vec::new() };
        };
        let mut names: Vec<String> = manifest.rows().map(|(_, cells)| cells[0].clone()).collect();
        names.sort();
        let times = |id: &str| {
            names.partition_point(|name| name.as_str() <= id) - names.partition_point(|name| name.as_str() < id)
        };
        let slides = slides.into_iter().flat_map(|slide| vec![slide.clone(); times(&slide.slide_id)]).collect();
        Self { slides, cases, manifest: names }
    }

    pub fn has_outcome(&self, case: &str) -> bool {
        self.cases.contains(case)
    }

    pub fn has_manifest(&self) -> bool {
        !self.manifest.is_empty()
    }

    /// Whether the manifest lists a file of this case; TCGA's file names start with the case.
    pub fn in_manifest(&self, case: &str) -> bool {
        // a case without its last letters is a typing error, not a case
        let of_case =
            |name: &String| name.strip_prefix(case).is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '.']));
        let from = self.manifest.partition_point(|name| name.as_str() < case);
        self.manifest[from..].iter().take_while(|name| name.starts_with(case)).any(of_case)
    }
}

/// The clinical columns that are read.
pub const CLINICAL: [&str; 4] = ["case_id", "slide_id", "censorship", "survival_months"];

/// The rows of a clinical table, in its order. A slide may stand there once.
pub fn clinical_slides(table: &Table) -> Result<Vec<Slide>> {
    let mut slides: Vec<Slide> = Vec::new();
    let mut seen: HashMap<String, usize> = HashMap::new();
    for (row, cells) in table.rows() {
        let [case_id, slide_id, censorship, months] = cells else { continue };
        for (column, id) in [(0, case_id), (1, slide_id)] {
            if id.is_empty() {
                return Err(table.error(row, column, "the cell is empty, expected an identifier"));
            }
        }
        let censored = match censorship.parse::<f64>() {
            Ok(0.0) => false,
            Ok(1.0) => true,
            _ => {
                return Err(table.error(
                    row,
                    2,
                    format!("`{censorship}`, expected 1 (censored) or 0 (the event was seen)"),
                ));
            }
        };
        let months: f64 = match months.parse() {
            Ok(value) if f64::is_finite(value) && value >= 0.0 => value,
            _ => return Err(table.error(row, 3, format!("`{months}`, expected a number of months"))),
        };
        if let Some(first) = seen.insert(slide_id.clone(), row) {
            return Err(table.error(row, 1, format!("slide `{slide_id}` stands in row {first} already")));
        }
        slides.push(Slide { case_id: case_id.clone(), slide_id: slide_id.clone(), months, censored });
    }
    Ok(slides)
}

/// The magnifications, and the folders that hold their features.
pub const MAGNIFICATIONS: [&str; 3] = ["x5", "x10", "x20"];

/// Where features may lie below `<pt_dir>/<backbone>/<magnification>`, in the order searched.
const PLACES: [(&str, &str); 3] = [("pt_files", "pt"), ("pt_files", "safetensors"), ("h5_files", "h5")];

/// A slide's feature files at 5x, 10x and 20x.
pub type BagFiles = [PathBuf; 3];

/// Slides left out because a magnification has no file, by magnification; a slide may lack several.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Missing {
    pub slides: usize,
    pub by_magnification: [usize; 3],
}

/// Pairs each slide with its files and leaves out those that lack one.
pub fn find_features(slides: Vec<Slide>, pt_dir: &Path, backbone: &str) -> Result<(Vec<(Slide, BagFiles)>, Missing)> {
    let folder = pt_dir.join(backbone);
    if !folder.is_dir() {
        return Err(Error::file(
            &folder,
            "is not a folder; features are looked for in <pt-dir>/<backbone>/x{5,10,20}/pt_files",
        ));
    }
    let find = |magnification: &str, name: &str| {
        let place = |(kind, extension): &(&str, &str)| {
            folder.join(magnification).join(kind).join(format!("{name}.{extension}"))
        };
        PLACES.iter().map(place).find(|path| path.is_file())
    };
    let (mut found, mut missing) = (Vec::new(), Missing::default());
    let (total, first) = (slides.len(), slides.first().map(|slide| slide.name().to_string()).unwrap_or_default());
    for slide in slides {
        match MAGNIFICATIONS.map(|magnification| find(magnification, slide.name())) {
            [Some(x5), Some(x10), Some(x20)] => found.push((slide, [x5, x10, x20])),
            files => {
                missing.slides += 1;
                for (count, file) in missing.by_magnification.iter_mut().zip(&files) {
                    *count += usize::from(file.is_none());
                }
            }
        }
    }
    if found.is_empty() {
        let [x5, x10, x20] = missing.by_magnification;
        let message = format!(
            "has features at all three magnifications of none of the {total} slides ({x5} lack x5, {x10} x10, {x20} x20); \
             looked for the likes of {}",
            folder.join("x20/pt_files").join(format!("{first}.pt")).display()
        );
        return Err(Error::file(&folder, message));
    }
    Ok((found, missing))
}

#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct LeftOut {
    pub slide_id: String,
    pub case_id: String,
    pub reason: String,
}
