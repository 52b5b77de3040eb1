//! The clinical table: which of its columns say what, and its rows as slides with outcomes.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::{Display, Formatter},
    path::Path,
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use super::{
    cohort::Slide,
    table::{Sheet, Table, is_missing, shown},
};
use crate::{Error, Result};

/// Nobody was followed for longer: larger numbers are days, or none.
const MOST_MONTHS: f64 = 1200.0;

/// The unit of the column of times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Days,
    Months,
    Years,
}

impl Unit {
    const ALL: [(&str, Self); 3] = [("days", Self::Days), ("months", Self::Months), ("years", Self::Years)];

    /// The unit that a column's name speaks of; months if it names none.
    fn of_column(name: &str) -> Self {
        let name = plain(name);
        let named = |(unit, _): &&(&str, Self)| name.split('_').any(|word| word == *unit);
        Self::ALL.iter().find(named).map_or(Self::Months, |(_, unit)| *unit)
    }

    fn in_months(self, time: f64) -> f64 {
        match self {
            Self::Days => time / (365.25 / 12.0),
            Self::Months => time,
            Self::Years => time * 12.0,
        }
    }
}

impl Display for Unit {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let name = Self::ALL.iter().find(|(_, unit)| unit == self).map_or("", |(name, _)| name);
        f.write_str(name)
    }
}

/// What a 1 in the column of outcomes means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Censored,
    Event,
}

/// The keys of `--columns`, each with the column that it is read from without it, and other names
/// that tools give to that.
const KEYS: [(&str, &str, &[&str]); 5] = [
    ("case_id", "case_id", &["patient_id", "patient", "bcr_patient_barcode", "case_submitter_id"]),
    ("slide_id", "slide_id", &["filename", "file_name", "slide"]),
    ("censorship", "censorship", &["censored"]),
    ("event", "event", &["os_status", "overall_survival_status", "vital_status"]),
    (
        "time",
        "survival_months",
        &["os_months", "overall_survival_months", "time_months", "survival_days", "os_days", "time_days"],
    ),
];

/// Which columns hold what, as `--columns` says it:
/// `case_id=PATIENT_ID,time=OS_DAYS:days,event=OS_STATUS`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Columns {
    /// By key.
    names: BTreeMap<&'static str, String>,
    unit: Option<Unit>,
}

impl Columns {
    /// Whether none is named, and the usual ones are read.
    pub fn are_usual(&self) -> bool {
        self.names.is_empty()
    }
}

impl FromStr for Columns {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut columns = Self::default();
        if text.is_empty() {
            return Ok(columns);
        }
        for part in text.split(',') {
            let (key, name) = part.split_once('=').ok_or(format!("`{part}`, expected KEY=COLUMN"))?;
            let (key, name) = (key.trim(), name.trim());
            let key = if key == "survival_months" { "time" } else { key };
            let Some((key, ..)) = KEYS.iter().find(|(known, ..)| *known == key) else {
                return Err(format!("`{key}`, expected case_id, slide_id, time, censorship or event"));
            };
            let mut name = name.to_string();
            if *key == "time"
                && let Some((column, unit)) = name.rsplit_once(':')
                && unit.bytes().all(|b| b.is_ascii_alphabetic())
            {
                let Some((_, unit)) = Unit::ALL.iter().find(|(known, _)| *known == unit) else {
                    return Err(format!("`{unit}` in `{part}`, expected the unit days, months or years"));
                };
                (columns.unit, name) = (Some(*unit), column.to_string());
            }
            if name.is_empty() {
                return Err(format!("`{key}` names no column"));
            }
            if columns.names.insert(key, name).is_some() {
                return Err(format!("`{key}` is given twice"));
            }
        }
        if columns.names.contains_key("censorship") && columns.names.contains_key("event") {
            return Err("censorship and event are both given, and are the same column turned round".into());
        }
        Ok(columns)
    }
}

impl Display for Columns {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let part = |(key, name): (&&str, &String)| match self.unit {
            Some(unit) if *key == "time" => format!("{key}={name}:{unit}"),
            _ => format!("{key}={name}"),
        };
        f.write_str(&self.names.iter().map(part).collect::<Vec<_>>().join(","))
    }
}

impl TryFrom<String> for Columns {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse().map_err(|e| format!("columns: {e}"))
    }
}

impl From<Columns> for String {
    fn from(columns: Columns) -> Self {
        columns.to_string()
    }
}

/// A column's name in lower case with `_` between its words.
fn plain(name: &str) -> String {
    let words = name.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect::<Vec<_>>().join("_")
}

/// The columns of one table.
struct Places {
    places: [usize; 4],
    outcome: Outcome,
    unit: Unit,
    /// What is read from columns with other names than the usual ones.
    renamed: Vec<String>,
}

/// Finds the column of each key: the one that was named, else the one of the usual name, else the
/// only one with another known name.
fn find(sheet: &Sheet, columns: &Columns) -> Result<Places> {
    let find = |key: &'static str| -> Result<Option<usize>> {
        if let Some(name) = columns.names.get(key) {
            return sheet.find(name)?.ok_or_else(|| sheet.lacks(name)).map(Some);
        }
        let Some((_, usual, others)) = KEYS.iter().find(|(known, ..)| *known == key) else { return Ok(None) };
        if let Some(place) = sheet.find(usual)? {
            return Ok(Some(place));
        }
        let known = |name: &String| plain(name) == *usual || others.contains(&plain(name).as_str());
        let found: Vec<usize> = (0..sheet.header().len()).filter(|&i| known(&sheet.header()[i])).collect();
        if let [first, second, ..] = found[..] {
            let [first, second] = [first, second].map(|i| shown(&sheet.header()[i]));
            let message = format!(
                "has no column `{usual}`, and both `{first}` and `{second}` may stand for it; choose by --columns {key}={first}"
            );
            return Err(Error::file(sheet.path(), message));
        }
        Ok(found.first().copied())
    };
    let needed = |key, usual| find(key)?.ok_or_else(|| sheet.lacks(usual));
    let (case_id, slide_id) = (needed("case_id", "case_id")?, needed("slide_id", "slide_id")?);
    let given = |key| columns.names.contains_key(key);
    // the usual name is censorship; event comes second
    let censorship = if given("event") { None } else { find("censorship")? };
    let (outcome, status) = match censorship {
        Some(place) => (Outcome::Censored, place),
        None => (Outcome::Event, find("event")?.ok_or_else(|| sheet.lacks("censorship"))?),
    };
    let time = needed("time", "survival_months")?;
    let name = |place: usize| &sheet.header()[place];
    let unit = columns.unit.unwrap_or_else(|| Unit::of_column(name(time)));
    let mut renamed = Vec::new();
    let roles = [
        ("case_id", case_id, ""),
        ("slide_id", slide_id, ""),
        ("censorship", status, if outcome == Outcome::Event { ", in which 1 is the event" } else { "" }),
        ("survival_months", time, ""),
    ];
    for (usual, place, more) in roles {
        if name(place) != usual {
            let unit = if usual == "survival_months" { format!(", in {unit}") } else { String::new() };
            renamed.push(format!("{usual} from `{}`{more}{unit}", shown(name(place))));
        }
    }
    Ok(Places { places: [case_id, slide_id, status, time], outcome, unit, renamed })
}

/// A clinical table's rows.
#[derive(Clone, Debug, Default)]
pub struct Clinical {
    /// In the table's order. A slide may stand there once.
    pub slides: Vec<Slide>,
    /// The row of each slide, by its id.
    pub rows: HashMap<String, usize>,
    /// A sentence about columns that have other names than the usual ones.
    pub note: Option<String>,
}

impl Clinical {
    /// Reads case_id, slide_id, censorship and survival_months, or what `columns` names instead.
    pub fn read(path: &Path, columns: &Columns) -> Result<Self> {
        Self::of(&Sheet::open(path)?, columns)
    }

    /// The same from bytes; `path` is only for messages.
    pub fn parse(path: &Path, bytes: Vec<u8>, columns: &Columns) -> Result<Self> {
        Self::of(&Sheet::parse(path, bytes)?, columns)
    }

    fn of(sheet: &Sheet, columns: &Columns) -> Result<Self> {
        let Places { places, outcome, unit, renamed } = find(sheet, columns)?;
        let table = sheet.table(&places)?;
        let mut clinical = Self::default();
        for (row, cells) in table.rows() {
            let [case_id, slide_id, status, time] = cells else { continue };
            for (column, id) in [(0, case_id), (1, slide_id)] {
                check_id(&table, row, column, id)?;
            }
            let Some(one) = flag(status, outcome) else {
                let expected = match outcome {
                    Outcome::Censored => "1 (censored) or 0 (the event was seen)",
                    Outcome::Event => {
                        "1 (the event was seen) or 0 (censored), also as True, False, 1:DECEASED, 0:LIVING"
                    }
                };
                return Err(table.error(row, 2, format!("`{}`{}, expected {expected}", shown(status), why(status))));
            };
            let months = months(time, unit).map_err(|message| table.error(row, 3, message))?;
            if let Some(first) = clinical.rows.insert(slide_id.clone(), row) {
                return Err(table.error(row, 1, format!("slide `{slide_id}` stands in row {first} already")));
            }
            let censored = one == (outcome == Outcome::Censored);
            clinical.slides.push(Slide { case_id: case_id.clone(), slide_id: slide_id.clone(), months, censored });
        }
        if !renamed.is_empty() {
            clinical.note = Some(format!("The clinical table is read by other columns: {}", renamed.join("; ")));
        }
        Ok(clinical)
    }
}

/// An identifier names something, and can be shown.
fn check_id(table: &Table, row: usize, column: usize, id: &str) -> Result<()> {
    let expected = match id {
        "" => "the cell is empty".into(),
        id if is_missing(id) => format!("`{id}`{}", why(id)),
        id if id.contains(char::is_control) => format!("`{}` holds a control character", shown(id)),
        _ => return Ok(()),
    };
    Err(table.error(row, column, format!("{expected}, expected an identifier")))
}

/// What a message says of a missing value.
fn why(cell: &str) -> &'static str {
    if !cell.is_empty() && is_missing(cell) { " is a missing value" } else { "" }
}

/// 1 or 0, True or False; for events also cBioPortal's `1:DECEASED` and `0:LIVING`, or these words
/// alone.
fn flag(cell: &str, outcome: Outcome) -> Option<bool> {
    match cell.parse::<f64>() {
        Ok(0.0) => return Some(false),
        Ok(1.0) => return Some(true),
        Ok(_) => return None,
        Err(_) => {}
    }
    match (cell.to_ascii_lowercase().as_str(), outcome) {
        ("true", _) => Some(true),
        ("false", _) => Some(false),
        ("deceased" | "dead", Outcome::Event) => Some(true),
        ("living" | "alive", Outcome::Event) => Some(false),
        (word, Outcome::Event) if word.starts_with("1:") => Some(true),
        (word, Outcome::Event) if word.starts_with("0:") => Some(false),
        _ => None,
    }
}

/// A time in months, or what is wrong with it.
fn months(cell: &str, unit: Unit) -> std::result::Result<f64, String> {
    let expected = format!("expected a number of {unit}");
    let (quoted, why) = (shown(cell), why(cell));
    let time: f64 = match cell.parse() {
        Ok(time) if f64::is_finite(time) && time >= 0.0 => time,
        _ if cell.contains(',') => return Err(format!("`{quoted}`, {expected} with a point for its decimals")),
        _ => return Err(format!("`{quoted}`{why}, {expected}")),
    };
    let months = unit.in_months(time);
    if months > MOST_MONTHS {
        let days = if unit == Unit::Months { "; days are read by --columns time=COLUMN:days" } else { "" };
        return Err(format!("`{quoted}`, {expected}, at most a century{days}"));
    }
    Ok(months)
}
