//! The cohort: a clinical table, joined with a GDC manifest if there is one.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use super::{
    atomic::write_text,
    clinical::{Clinical, Columns},
    table::Table,
};
use crate::{Error, Result};

/// One slide's outcome. A patient (case) may have several slides.
#[derive(Clone, Debug, PartialEq)]
pub struct Slide {
    /// The patient's entry in the clinical table.
    pub case_id: String,
    /// As in the table, with its extension.
    pub slide_id: String,
    /// Months from diagnosis to death or last contact.
    pub months: f64,
    /// True when the patient was alive at last contact.
    pub censored: bool,
}

/// Extensions of slide files, which CLAM, TRIDENT and STAMP leave out of a feature file's name.
const SLIDE_FILES: [&str; 20] = [
    "svs", "ndpi", "tif", "tiff", "mrxs", "scn", "czi", "bif", "isyntax", "vms", "vmu", "dcm", "svslide", "qptiff",
    "sdpc", "kfb", "zvi", "jpg", "jpeg", "png",
];

impl Slide {
    /// The name that feature files carry: the slide's without the extension of a slide file, in
    /// upper or lower case.
    pub fn name(&self) -> &str {
        stem(&self.slide_id)
    }

    /// The patient: the case, or what its id says if it is the barcode of a slide or of another
    /// part of a patient. TCGA's patients have three fields (TCGA-AA-3488), CPTAC's two
    /// (C3L-00017).
    pub fn patient(&self) -> &str {
        let case = self.case_id.as_str();
        let fields: Vec<&str> = case.splitn(4, '-').collect();
        let length = match fields[..] {
            ["TCGA", site, patient, _] if (site.len(), patient.len()) == (2, 4) => 4 + 1 + 2 + 1 + 4,
            ["C3L" | "C3N", patient, ..] if patient.len() == 5 => 3 + 1 + 5,
            _ => case.len(),
        };
        &case[..length]
    }
}

/// A slide's id without the extension of a slide file.
pub fn stem(slide_id: &str) -> &str {
    let is_slide_file = |extension: &str| SLIDE_FILES.iter().any(|known| extension.eq_ignore_ascii_case(known));
    match slide_id.rsplit_once('.') {
        Some((name, extension)) if !name.is_empty() && is_slide_file(extension) => name,
        _ => slide_id,
    }
}

/// A slide that a run does not use.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct LeftOut {
    /// Empty where a case is known and none of its slides.
    pub slide_id: String,
    /// Empty where nothing is known of the slide's case.
    pub case_id: String,
    /// In a few words: "not in the manifest".
    pub reason: String,
}

/// The table of the slides left out, in the folder of a run or of an evaluation.
pub const LEFT_OUT: &str = "left_out.csv";

/// Writes [`LEFT_OUT`] into a folder; there is none where nothing is left out.
pub fn write_left_out(folder: &Path, left_out: &[LeftOut]) -> Result<()> {
    let path = folder.join(LEFT_OUT);
    if !left_out.is_empty() {
        return write_text(&path, &left_out_csv(left_out)?);
    }
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::file(&path, format!("an earlier one cannot be removed: {e}")))
        }
        _ => Ok(()),
    }
}

/// Slides left out, as a table: case_id, slide_id, reason.
fn left_out_csv(left_out: &[LeftOut]) -> Result<String> {
    let failed = |e: &dyn std::fmt::Display| Error::Usage(format!("the slides left out cannot be listed: {e}"));
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(["case_id", "slide_id", "reason"]).map_err(|e| failed(&e))?;
    for LeftOut { slide_id, case_id, reason } in left_out {
        writer.write_record([case_id, slide_id, reason]).map_err(|e| failed(&e))?;
    }
    let bytes = writer.into_inner().map_err(|e| failed(&e))?;
    String::from_utf8(bytes).map_err(|e| failed(&e))
}

/// The slides of a study, and who else is known to it.
#[derive(Clone, Debug, Default)]
pub struct Cohort {
    /// The clinical table's rows, joined with the manifest if there is one.
    pub slides: Vec<Slide>,
    /// The row of each slide in the clinical table, by its id.
    pub rows: HashMap<String, usize>,
    /// Slides of the clinical table that the manifest does not list.
    pub unlisted: Vec<LeftOut>,
    /// Slides that the run's settings leave out.
    pub skipped: Vec<LeftOut>,
    /// Sentences about the table that a user should know before training.
    pub notes: Vec<String>,
    /// The clinical table's slides by case, joined or not.
    cases: BTreeMap<String, Vec<String>>,
    /// File names of the manifest, sorted.
    manifest: Vec<String>,
}

impl Cohort {
    /// Reads a clinical table. With a GDC manifest, slides whose `filename` it does not list are
    /// left out, and a slide that it lists twice comes twice, as pandas' inner merge does it (TCGA
    /// COAD has one such slide).
    pub fn read(clinical: &Path, columns: &Columns, manifest: Option<&Path>) -> Result<Self> {
        let table = Clinical::read(clinical, columns)?;
        let manifest = manifest.map(|path| Table::read(path, &["filename"])).transpose()?;
        let joined = manifest.is_some();
        let cohort = Self::new(table, manifest.as_ref());
        if cohort.slides.is_empty() {
            return Err(Error::file(
                clinical,
                if joined { "has no slide in common with the manifest" } else { "has no slide" },
            ));
        }
        Ok(cohort)
    }

    /// From a clinical table and a manifest's column `filename`.
    pub fn new(clinical: Clinical, manifest: Option<&Table>) -> Self {
        let Clinical { slides, rows, note } = clinical;
        let mut cohort = Self { rows, notes: note.into_iter().collect(), ..Self::default() };
        for Slide { case_id, slide_id, .. } in &slides {
            cohort.cases.entry(case_id.clone()).or_default().push(slide_id.clone());
        }
        match manifest {
            Some(manifest) => cohort.join(slides, manifest),
            None => cohort.slides = slides,
        }
        cohort.notes.extend(cohort.two_outcomes());
        cohort.notes.extend(cohort.barcodes());
        cohort
    }

    fn join(&mut self, slides: Vec<Slide>, manifest: &Table) {
        let mut names: Vec<String> = manifest.rows().map(|(_, cells)| cells[0].clone()).collect();
        names.sort();
        let times = |id: &str| {
            names.partition_point(|name| name.as_str() <= id) - names.partition_point(|name| name.as_str() < id)
        };
        let total = slides.len();
        let mut repeated = Vec::new();
        for slide in slides {
            let times = times(&slide.slide_id);
            if times == 0 {
                let (slide_id, case_id) = (slide.slide_id, slide.case_id);
                self.unlisted.push(LeftOut { slide_id, case_id, reason: "not in the manifest".into() });
                continue;
            }
            if times > 1 {
                repeated.push(slide.slide_id.clone());
            }
            self.slides.extend(std::iter::repeat_n(slide, times));
        }
        if let Some(first) = self.unlisted.first() {
            let (n, first) = (self.unlisted.len(), &first.slide_id);
            self.notes.push(format!("{n} of {total} slides left out, not in the manifest; the first is `{first}`"));
        }
        if let Some(first) = repeated.first() {
            let n = repeated.len();
            self.notes.push(format!(
                "Slides that the manifest lists twice are shown twice, as by pandas\u{2019} merge: {n}, the first is `{first}`"
            ));
        }
        self.manifest = names;
    }

    /// Which case has rows with different outcomes, if one has.
    fn two_outcomes(&self) -> Option<String> {
        let mut first: HashMap<&str, &Slide> = HashMap::new();
        let (mut pair, mut cases) = (None, std::collections::HashSet::new());
        for slide in &self.slides {
            let before = *first.entry(&slide.case_id).or_insert(slide);
            if (before.months, before.censored) != (slide.months, slide.censored) {
                pair = pair.or(Some((before, slide)));
                cases.insert(&slide.case_id);
            }
        }
        let (a, b) = pair?;
        let [first, second] = [a, b].map(|slide| {
            let row = self.rows.get(&slide.slide_id).map_or(String::new(), |row| format!("row {row}, "));
            let outcome = if slide.censored { "censored" } else { "an event" };
            format!("{} months and {outcome} ({row}slide `{}`)", slide.months, slide.slide_id)
        });
        let (case, also) = (
            &a.case_id,
            match cases.len() {
                1 => String::new(),
                n => format!("; {n} cases have such rows"),
            },
        );
        Some(format!("Case `{case}` has two outcomes, {first} and {second}{also}; that is nearly always a wrong join"))
    }

    /// Whether case ids are barcodes of slides, so that one patient has several.
    fn barcodes(&self) -> Option<String> {
        let mut cases: BTreeMap<&str, &str> = BTreeMap::new();
        let mut pair = None;
        for slide in &self.slides {
            let case = *cases.entry(slide.patient()).or_insert(&slide.case_id);
            if case != slide.case_id {
                pair = pair.or(Some((case, &slide.case_id)));
            }
        }
        let (a, b) = pair?;
        let number = self.slides.iter().map(|slide| &slide.case_id).collect::<std::collections::HashSet<_>>().len();
        Some(format!(
            "Some case ids are of one patient, `{a}` and `{b}` for example: {number} cases are counted as patients, and are {}; \
             case_id should name the patient",
            cases.len()
        ))
    }

    /// The case that a table means by `id`: pandas writes whole numbers as 101.0 where a column has
    /// blanks.
    pub fn case(&self, id: &str) -> Option<&str> {
        let key = known(id, |id| self.cases.contains_key(id))?;
        self.cases.get_key_value(&key).map(|(case, _)| case.as_str())
    }

    /// The clinical table's slides of a case.
    pub fn slides_of(&self, case: &str) -> &[String] {
        self.cases.get(case).map_or(&[], Vec::as_slice)
    }

    /// The clinical table's cases with their slides.
    pub fn cases(&self) -> impl Iterator<Item = (&str, &[String])> {
        self.cases.iter().map(|(case, slides)| (case.as_str(), slides.as_slice()))
    }

    /// Slides alone, without a clinical table.
    pub fn of_slides(slides: Vec<Slide>) -> Self {
        Self { slides, ..Self::default() }
    }

    /// Leaves out the slides with these ids, all of which must be there.
    pub fn leave_out(&mut self, ids: &[String]) -> Result<()> {
        for id in ids {
            let (skipped, slides): (Vec<Slide>, _) =
                std::mem::take(&mut self.slides).into_iter().partition(|slide| slide.slide_id == *id);
            self.slides = slides;
            let Some(slide) = skipped.into_iter().next() else {
                return Err(Error::Usage(format!("skip_slides: there is no slide `{}`", id.escape_debug())));
            };
            let reason = "in the setting skip_slides".into();
            self.skipped.push(LeftOut { slide_id: slide.slide_id, case_id: slide.case_id, reason });
        }
        if let Some(first) = ids.first() {
            let total = self.rows.len();
            self.notes.push(format!("{} of {total} slides left out by skip_slides; the first is `{first}`", ids.len()));
        }
        Ok(())
    }

    /// Whether the clinical table was joined with a manifest.
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

/// `id` as it is known: as it stands, or as pandas writes the same whole number.
pub(super) fn known(id: &str, is_known: impl Fn(&str) -> bool) -> Option<String> {
    let is_whole = |id: &str| !id.is_empty() && id.bytes().all(|b| b.is_ascii_digit());
    let other = match id.strip_suffix(".0") {
        Some(whole) if is_whole(whole) => whole.to_string(),
        None if is_whole(id) => format!("{id}.0"),
        _ => String::new(),
    };
    [id.to_string(), other].into_iter().find(|id| is_known(id))
}
