//! Cross-validation folds: one table a fold, `splits_<i>.csv`, numbered from 0 or from 1. A table
//! has one of three forms.
//!
//! ```text
//! ,train,val,test           ids in columns, blank where one is shorter; `test` may be absent
//! ,train,val,test           a row an id, in the first column, and True under its side (CLAM's splits_<i>_bool.csv)
//! case_id,split             a row an id, and the name of its side
//! ```
//!
//! Ids are those of cases, or of slides with or without the extension, as CLAM writes them.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    path::{Path, PathBuf},
};

use super::{
    cohort::{Cohort, Slide, known, stem},
    table::{Sheet, is_missing, shown},
};
use crate::{Error, Result};

/// What a fold does with a slide.
pub const SIDES: [&str; 3] = ["train", "val", "test"];

/// The slides of a fold, by id and by side, whether they have features or not.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Split {
    /// Slides to train on, at least one.
    pub train: HashSet<String>,
    /// Slides to validate on, at least one.
    pub val: HashSet<String>,
    /// Empty where the table has no such column.
    pub test: HashSet<String>,
    /// Cases of the study without an outcome, left out of all sides (the published LUAD folds name
    /// nine).
    pub without_outcome: Vec<String>,
}

/// The table of a fold; CLAM's boolean one where there is no other.
pub fn split_path(folder: &Path, fold: usize) -> PathBuf {
    let [path, boolean] = ["", "_bool"].map(|form| folder.join(format!("splits_{fold}{form}.csv")));
    if !path.exists() && boolean.exists() { boolean } else { path }
}

/// The numbers of the folds that a folder has tables of, in order.
fn numbers(folder: &Path) -> Result<Vec<usize>> {
    if !folder.is_dir() {
        return Err(Error::file(folder, "is not a folder; expected one with splits_0.csv, splits_1.csv, ..."));
    }
    let failed = |e| Error::file(folder, format!("cannot be read: {e}"));
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        let number = name.strip_prefix("splits_").and_then(|rest| rest.strip_suffix(".csv"));
        let number = number.map(|number| number.strip_suffix("_bool").unwrap_or(number));
        // a number with leading zeros is another name
        numbers.extend(number.and_then(|text| text.parse().ok().filter(|number: &usize| number.to_string() == text)));
    }
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

/// The folds to work on: `wanted` of them, or all that the folder holds, from the first. Without
/// `wanted`, a gap in the numbers is an error.
pub fn choose(folder: &Path, wanted: Option<usize>) -> Result<Range<usize>> {
    let numbers = numbers(folder)?;
    let Some(&first) = numbers.first() else {
        return Err(Error::file(folder, "holds no fold, expected splits_0.csv, splits_1.csv, ..."));
    };
    let gap = (first..).zip(&numbers).find(|(expected, number)| expected != *number).map(|(expected, _)| expected);
    match (first, gap, wanted) {
        (2.., ..) => {
            Err(Error::file(folder, format!("begins with splits_{first}.csv, expected splits_0.csv or splits_1.csv")))
        }
        (_, Some(gap), None) => {
            let last = numbers[numbers.len() - 1];
            let message = format!("has splits_{first}.csv to splits_{last}.csv, but no splits_{gap}.csv");
            Err(Error::file(folder, message))
        }
        (_, gap, _) => {
            let there = first..gap.unwrap_or(first + numbers.len());
            let wanted = wanted.unwrap_or(there.len());
            if wanted > there.len() {
                return Err(Error::Usage(format!("--folds {wanted}: {} {}", folder.display(), holds(&numbers))));
            }
            Ok(first..first + wanted)
        }
    }
}

/// "holds splits_0.csv to splits_4.csv"
fn holds(numbers: &[usize]) -> String {
    match numbers {
        [] => "holds no fold".into(),
        [one] => format!("holds splits_{one}.csv alone"),
        [first, .., last] if last - first + 1 == numbers.len() => {
            format!("holds splits_{first}.csv to splits_{last}.csv")
        }
        several => {
            let names: Vec<String> = several.iter().map(|number| format!("splits_{number}.csv")).collect();
            format!("holds {}", names.join(", "))
        }
    }
}

/// "fold 3", "folds 0, 1 and 4"
pub fn named(folds: &[usize]) -> String {
    let numbers: Vec<String> = folds.iter().map(usize::to_string).collect();
    match &numbers[..] {
        [] => "no fold".into(),
        [one] => format!("fold {one}"),
        [others @ .., last] => format!("folds {} and {last}", others.join(", ")),
    }
}

/// An error if a folder has no table of a fold, which says of which it has.
pub fn require(folder: &Path, fold: usize) -> Result<()> {
    let numbers = numbers(folder)?;
    if numbers.contains(&fold) {
        return Ok(());
    }
    Err(Error::Usage(format!("--fold {fold}: {} {}", folder.display(), holds(&numbers))))
}

/// Sentences about folds that a run of `chosen` leaves out.
pub fn notes(folder: &Path, chosen: &Range<usize>) -> Vec<String> {
    let others = numbers(folder).unwrap_or_default().into_iter().filter(|number| !chosen.contains(number)).count();
    match others {
        0 => Vec::new(),
        n => vec![format!("The folder of folds holds {}, of which --folds takes {}", chosen.len() + n, chosen.len())],
    }
}

/// Reads a fold. No case may be on two sides or twice on one. A case that is not in the clinical
/// table is left out if the manifest knows it, and is an error otherwise.
pub fn read_split(path: &Path, cohort: &Cohort) -> Result<Split> {
    split_of(&Sheet::open(path)?, cohort)
}

/// The same from bytes; `path` is only for messages.
pub fn parse_split(path: &Path, bytes: Vec<u8>, cohort: &Cohort) -> Result<Split> {
    split_of(&Sheet::parse(path, bytes)?, cohort)
}

/// An id in the table of a fold.
struct Entry {
    row: usize,
    /// For messages.
    column: String,
    id: String,
    /// Of [`SIDES`].
    side: usize,
}

/// What the table says, whatever its form.
fn entries(sheet: &Sheet) -> Result<Vec<Entry>> {
    let [train, val, test] = [sheet.find("train")?, sheet.find("val")?, sheet.find("test")?];
    if let (None, Some(split)) = (train, sheet.find("split")?) {
        return long(sheet, split);
    }
    let (train, val) = (train.ok_or_else(|| sheet.lacks("train"))?, val.ok_or_else(|| sheet.lacks("val"))?);
    let places: Vec<usize> = [train, val].into_iter().chain(test).collect();
    let table = sheet.table(&places)?;
    let full = || table.rows().flat_map(|(_, cells)| cells).filter(|cell| !is_missing(cell));
    if full().next().is_some() && full().all(|cell| truth(cell).is_some()) {
        return boolean(sheet, &places);
    }
    let mut entries = Vec::new();
    for (row, cells) in table.rows() {
        for (side, id) in cells.iter().enumerate().filter(|(_, id)| !is_missing(id)) {
            entries.push(Entry { row, column: SIDES[side].into(), id: id.clone(), side });
        }
    }
    Ok(entries)
}

fn truth(cell: &str) -> Option<bool> {
    match cell {
        "True" | "TRUE" | "true" => Some(true),
        "False" | "FALSE" | "false" => Some(false),
        _ => None,
    }
}

/// The column of ids in a table of a row an id: named so, or the first that is not among `others`.
fn id_column(sheet: &Sheet, others: &[usize]) -> Result<usize> {
    for name in ["slide_id", "case_id"] {
        if let Some(place) = sheet.find(name)? {
            return Ok(place);
        }
    }
    let first = (0..sheet.header().len()).find(|place| !others.contains(place));
    first.ok_or_else(|| Error::file(sheet.path(), "has no column of ids beside its sides"))
}

fn boolean(sheet: &Sheet, sides: &[usize]) -> Result<Vec<Entry>> {
    let ids = id_column(sheet, sides)?;
    let column = sheet.name(ids);
    let table = sheet.table(&[&[ids], sides].concat())?;
    let mut entries = Vec::new();
    for (row, cells) in table.rows() {
        let on: Vec<usize> = (0..sides.len()).filter(|side| truth(&cells[1 + side]) == Some(true)).collect();
        match on[..] {
            [] => {}
            _ if is_missing(&cells[0]) => return Err(table.error(row, 0, "the cell is empty, expected an identifier")),
            [side] => entries.push(Entry { row, column: column.clone(), id: cells[0].clone(), side }),
            [a, b, ..] => {
                let (id, a, b) = (shown(&cells[0]), SIDES[a], SIDES[b]);
                return Err(table.error(row, 0, format!("`{id}` is in `{a}` and in `{b}`")));
            }
        }
    }
    Ok(entries)
}

fn long(sheet: &Sheet, split: usize) -> Result<Vec<Entry>> {
    let ids = id_column(sheet, &[split])?;
    let column = sheet.name(ids);
    let table = sheet.table(&[ids, split])?;
    let mut entries = Vec::new();
    for (row, cells) in table.rows().filter(|(_, cells)| !is_missing(&cells[1])) {
        let side = match cells[1].to_ascii_lowercase().as_str() {
            "train" | "training" => 0,
            "val" | "valid" | "validation" => 1,
            "test" => 2,
            _ => return Err(table.error(row, 1, format!("`{}`, expected train, val or test", shown(&cells[1])))),
        };
        if is_missing(&cells[0]) {
            return Err(table.error(row, 0, "the cell is empty, expected an identifier"));
        }
        entries.push(Entry { row, column: column.clone(), id: cells[0].clone(), side });
    }
    Ok(entries)
}

/// The clinical table's slides by their ids with and without the extension; None where two share a
/// name.
fn slides_by_name(cohort: &Cohort) -> HashMap<String, Option<(&str, &str)>> {
    let mut names: HashMap<String, Option<(&str, &str)>> = HashMap::new();
    for (case, slides) in cohort.cases() {
        for id in slides {
            let this = Some((case, id.as_str()));
            for name in [id, stem(id)] {
                let first = *names.entry(name.to_string()).or_insert(this);
                if first != this {
                    names.insert(name.to_string(), None);
                }
            }
        }
    }
    names
}

fn split_of(sheet: &Sheet, cohort: &Cohort) -> Result<Split> {
    let entries = entries(sheet)?;
    let error = |entry: &Entry, message: String| Error::cell(sheet.path(), entry.row, &entry.column, message);
    // a table of slides names no case
    let names = match entries.iter().any(|entry| cohort.case(&entry.id).is_some()) {
        true => HashMap::new(),
        false => slides_by_name(cohort),
    };
    let by_slide = entries.iter().any(|entry| known(&entry.id, |id| names.contains_key(id)).is_some());
    // by case: the first entry, and by slide that entry's slide
    let mut seen: HashMap<&str, (&Entry, Option<&str>)> = HashMap::new();
    let mut split = Split::default();
    let mut sides: [HashSet<String>; 3] = Default::default();
    let mut listed = HashSet::new();
    for entry in &entries {
        let id = shown(&entry.id);
        let found = match by_slide {
            false => cohort.case(&entry.id).map(|case| (case, None)),
            true => match known(&entry.id, |id| names.contains_key(id)).map(|id| names[&id]) {
                Some(None) => return Err(error(entry, format!("two slides of the clinical table are called `{id}`"))),
                Some(Some((case, slide))) => Some((case, Some(slide))),
                None => None,
            },
        };
        let Some((case, slide)) = found else {
            if !cohort.in_manifest(&entry.id) {
                let what = if by_slide { "slide" } else { "case" };
                return Err(error(
                    entry,
                    match cohort.has_manifest() {
                        true => format!("{what} `{id}` is neither in the clinical table nor in the manifest"),
                        false => format!(
                            "{what} `{id}` is not in the clinical table; one whose outcome is not known is passed over if a \
                             --manifest lists it"
                        ),
                    },
                ));
            }
            split.without_outcome.push(entry.id.clone());
            continue;
        };
        let (first, first_slide) = *seen.entry(case).or_insert((entry, slide));
        let (first_row, first_side) = (first.row, SIDES[first.side]);
        match slide {
            None if !std::ptr::eq(first, entry) => {
                return Err(error(entry, format!("case `{id}` is in `{first_side}` in row {first_row} already")));
            }
            None => sides[entry.side].extend(cohort.slides_of(case).iter().cloned()),
            Some(_) if first.side != entry.side => {
                let first_slide = first_slide.unwrap_or_default();
                return Err(error(
                    entry,
                    format!(
                        "slide `{id}` is of case `{case}`, whose slide `{first_slide}` is in `{first_side}` in row {first_row}"
                    ),
                ));
            }
            Some(slide) => {
                if !listed.insert(slide) {
                    return Err(error(entry, format!("slide `{id}` is in `{first_side}` twice")));
                }
                sides[entry.side].insert(slide.to_string());
            }
        }
    }
    for (name, side) in SIDES.iter().zip(&sides).take(2) {
        if side.is_empty() {
            return Err(Error::file(sheet.path(), format!("has no case in its column `{name}`")));
        }
    }
    [split.train, split.val, split.test] = sides;
    Ok(split)
}

/// The slides of a side, as indices into `slides`.
pub fn slides_of(side: &HashSet<String>, slides: &[Slide]) -> Vec<usize> {
    (0..slides.len()).filter(|&i| side.contains(&slides[i].slide_id)).collect()
}
