//! Delimited text with a header, plain or as the single member of a zip, reduced to the columns
//! that are asked for.

use std::{
    fs::File,
    io::{Cursor, Read},
    path::{Path, PathBuf},
};

use crate::{Error, Result};

/// A table holds no more bytes than this, plain or unpacked (the largest TCGA table has 40 MB).
const MAX_BYTES: u64 = 1 << 30;

/// What separates cells. The one that cuts the header into the most cells is a table's own.
const DELIMITERS: [u8; 3] = [b',', b'\t', b';'];

/// What pandas reads as a missing value besides an empty cell (`read_csv` of pandas 2.3,
/// `keep_default_na`).
const MISSING: [&str; 18] = [
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
    "NaN", "None", "n/a", "nan", "null",
];

/// Whether pandas reads the cell as missing.
pub fn is_missing(cell: &str) -> bool {
    cell.is_empty() || MISSING.contains(&cell)
}

/// A table whose header has been read.
pub struct Sheet {
    path: PathBuf,
    bytes: Vec<u8>,
    /// Where the header begins.
    start: usize,
    delimiter: u8,
    header: Vec<String>,
}

impl Sheet {
    /// Reads a file: text separated by commas, semicolons or tabs, or a zip of one such text.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(path, read_file(path)?)
    }

    /// The same from bytes; `path` is only for messages.
    pub fn parse(path: &Path, bytes: Vec<u8>) -> Result<Self> {
        // a member, none, or a part of an archive; a header may begin with the letters alone
        let zipped = [b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08"].iter().any(|magic| bytes.starts_with(*magic));
        let bytes = if zipped { unzip(path, bytes)? } else { bytes };
        if let Some((_, what)) = OTHER_FORMATS.iter().find(|(magic, _)| bytes.starts_with(magic)) {
            return Err(Error::file(path, format!("is {what}, expected a table as text in UTF-8")));
        }
        let start = if bytes.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
        let start = start + comments(&bytes[start..]);
        let mut widest = (DELIMITERS[0], csv::StringRecord::new());
        for delimiter in DELIMITERS {
            let mut reader = reader(&bytes[start..], delimiter);
            let header = reader.headers().map_err(|e| Error::file(path, format!("has no readable header: {e}")))?;
            if header.len() > widest.1.len() {
                widest = (delimiter, header.clone());
            }
        }
        let (delimiter, header) = widest;
        let header = header.iter().map(String::from).collect();
        Ok(Self { path: path.to_path_buf(), bytes, start, delimiter, header })
    }

    /// The file that it was read from, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all columns, trimmed.
    pub fn header(&self) -> &[String] {
        &self.header
    }

    /// A column's name as messages show it; pandas leaves that of its index empty.
    pub fn name(&self, place: usize) -> String {
        if self.header[place].is_empty() { "(unnamed)".into() } else { shown(&self.header[place]) }
    }

    /// Where the column called `name` stands; an error if two are called so.
    pub fn find(&self, name: &str) -> Result<Option<usize>> {
        let mut found = (0..self.header.len()).filter(|&i| self.header[i] == name);
        match (found.next(), found.next()) {
            (_, Some(_)) => Err(Error::file(&self.path, format!("has two columns named `{}`", shown(name)))),
            (found, None) => Ok(found),
        }
    }

    /// An error that says that there is no column `name`.
    pub fn lacks(&self, name: &str) -> Error {
        let start: String = self.header.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
        let start = shown(&start);
        Error::file(&self.path, format!("lacks the column `{}`; its header starts with `{start}`", shown(name)))
    }

    /// The rows' cells in these columns.
    pub fn table(&self, places: &[usize]) -> Result<Table> {
        let columns: Vec<String> = places.iter().map(|&place| self.name(place)).collect();
        let text = &self.bytes[self.start..];
        let lines = |text: &[u8]| text.iter().filter(|&&b| b == b'\n').count();
        let (mut row, mut counted) = (1 + lines(&self.bytes[..self.start]), 0);
        let mut rows = Vec::new();
        for record in reader(text, self.delimiter).records() {
            let record = record.map_err(|e| Error::file(&self.path, format!("is not a table: {e}")))?;
            // The reader's own line number is off after empty lines and with \r\n; count the lines
            // up to the record's first character.
            let start = record.position().map_or(0, |p| p.byte() as usize);
            let start = start + text[start..].iter().take_while(|&&b| b == b'\r' || b == b'\n').count();
            self.check_quotes(row, &text[counted..start])?;
            row += lines(&text[counted..start]);
            counted = start;
            if record.len() != self.header.len() {
                let (cells, expected) = (record.len(), self.header.len());
                let message = format!("the row has {cells} cells, expected {expected} as in the header");
                return Err(Error::cell(&self.path, row, columns.first().map_or("", String::as_str), message));
            }
            let cells = places.iter().map(|&place| record[place].to_string()).collect();
            rows.push((row, cells));
        }
        self.check_quotes(row, &text[counted..])?;
        Ok(Table { path: self.path.clone(), columns, rows })
    }

    /// An error if a quote that is not closed has swallowed the lines that follow.
    fn check_quotes(&self, row: usize, record: &[u8]) -> Result<()> {
        let quotes = || record.iter().filter(|&&b| b == b'"').count();
        if record.trim_ascii().contains(&b'\n') && quotes() % 2 == 1 {
            return Err(Error::file(&self.path, format!("row {row} has a quote that is not closed")));
        }
        Ok(())
    }
}

fn reader(text: &[u8], delimiter: u8) -> csv::Reader<&[u8]> {
    csv::ReaderBuilder::new().delimiter(delimiter).flexible(true).trim(csv::Trim::All).from_reader(text)
}

/// The length of the comments that stand before the header in cBioPortal's tables: lines of a `#`
/// and a word.
fn comments(text: &[u8]) -> usize {
    let is_comment = |line: &&[u8]| line.len() > 1 && line[0] == b'#' && line[1].is_ascii_alphanumeric();
    text.split_inclusive(|&b| b == b'\n').take_while(is_comment).map(<[u8]>::len).sum()
}

/// Some columns of a table. Cells are trimmed; row numbers are those of the file, the header being
/// row 1.
pub struct Table {
    path: PathBuf,
    columns: Vec<String>,
    rows: Vec<(usize, Vec<String>)>,
}

impl Table {
    /// Reads the columns named `columns`, all of which must be there.
    pub fn read(path: &Path, columns: &[&str]) -> Result<Self> {
        Self::of(&Sheet::open(path)?, columns)
    }

    /// The same from bytes; `path` is only for messages.
    pub fn parse(path: &Path, bytes: Vec<u8>, columns: &[&str]) -> Result<Self> {
        Self::of(&Sheet::parse(path, bytes)?, columns)
    }

    fn of(sheet: &Sheet, columns: &[&str]) -> Result<Self> {
        let place = |name: &&str| sheet.find(name)?.ok_or_else(|| sheet.lacks(name));
        sheet.table(&columns.iter().map(place).collect::<Result<Vec<_>>>()?)
    }

    /// (row number, cells in the order asked for)
    pub fn rows(&self) -> impl Iterator<Item = (usize, &[String])> {
        self.rows.iter().map(|(row, cells)| (*row, cells.as_slice()))
    }

    /// An error about the cell of `row` in the `column`-th of the columns asked for.
    pub fn error(&self, row: usize, column: usize, message: impl std::fmt::Display) -> Error {
        Error::cell(&self.path, row, &self.columns[column], message)
    }
}

/// A file's text as messages show it: characters that would drive a terminal, or that nobody sees,
/// are escaped, and long text is cut.
pub fn shown(text: &str) -> String {
    const LONGEST: usize = 120;
    let unseen = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    let mut shown = String::new();
    for (i, c) in text.chars().enumerate() {
        match c {
            _ if i == LONGEST => return shown + "...",
            c if unseen(c) => shown.extend(c.escape_default()),
            c => shown.push(c),
        }
    }
    shown
}

/// What other files begin with that are taken for tables.
const OTHER_FORMATS: [(&[u8], &str); 6] = [
    (b"\x1f\x8b", "compressed by gzip"),
    (b"\xff\xfe", "text in UTF-16"),
    (b"\xfe\xff", "text in UTF-16"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook"),
    (b"PAR1", "a Parquet file"),
    (b"\x89HDF", "an HDF5 file"),
];

/// The bytes of a regular file of no more than [`MAX_BYTES`]: devices and pipes need not have an
/// end.
fn read_file(path: &Path) -> Result<Vec<u8>> {
    let failed = |e: std::io::Error| Error::file(path, format!("cannot be read: {e}"));
    let kind = std::fs::metadata(path).map_err(failed)?;
    if !kind.is_file() {
        let what = if kind.is_dir() { "folder" } else { "pipe or device" };
        return Err(Error::file(path, format!("is a {what}, expected a file with a table")));
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Error::file(path, "is larger than 1 GiB, expected a table"));
    }
    Ok(bytes)
}

/// The single table in a zip; other systems' metadata members are not counted. Nothing is ever
/// written by a member's name.
fn unzip(path: &Path, bytes: Vec<u8>) -> Result<Vec<u8>> {
    let broken = |e: &dyn std::fmt::Display| Error::file(path, format!("is not a readable zip: {e}"));
    let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).map_err(|e| broken(&e))?;
    let mut members = Vec::new();
    for i in 0..archive.len() {
        let member = archive.by_index(i).map_err(|e| broken(&e))?;
        if member.name_raw() == b"xl/workbook.xml" {
            return Err(Error::file(path, "is an Excel workbook, expected a table as text in UTF-8"));
        }
        if member.is_file() && !member.name_raw().starts_with(b"__MACOSX/") {
            members.push(i);
        }
    }
    let &[member] = members.as_slice() else {
        return Err(Error::file(path, format!("holds {} files, expected one table", members.len())));
    };
    let member = archive.by_index(member).map_err(|e| broken(&e))?;
    let mut table = Vec::new();
    member.take(MAX_BYTES + 1).read_to_end(&mut table).map_err(|e| broken(&e))?;
    if table.len() as u64 > MAX_BYTES {
        return Err(Error::file(path, "unpacks to more than 1 GiB"));
    }
    Ok(table)
}
