//! Delimited text with a header, plain or as the single member of a zip, reduced to the columns that are asked for.

use std::{
    io::{Cursor, Read},
    path::{Path, PathBuf},
};

use crate::{Error, Result};

/// A zip member may unpack to no more than this (the largest TCGA table is 40 MB).
const MAX_UNPACKED: u64 = 1 << 30;

/// Some columns of a table. Cells are trimmed; row numbers are those of the file, the header being row 1.
pub struct Table {
    path: PathBuf,
    columns: Vec<String>,
    rows: Vec<(usize, Vec<String>)>,
}

impl Table {
    /// Reads the columns named `columns`, all of which must be there.
    pub fn read(path: &Path, delimiter: u8, columns: &[&str]) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
        Self::parse(path, bytes, delimiter, columns)
    }

    /// The same from bytes; `path` is only for messages.
    pub fn parse(path: &Path, bytes: Vec<u8>, delimiter: u8, columns: &[&str]) -> Result<Self> {
        let bytes = if bytes.starts_with(b"PK\x03\x04") { unzip(path, bytes)? } else { bytes };
        let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
        let mut reader =
            csv::ReaderBuilder::new().delimiter(delimiter).flexible(true).trim(csv::Trim::All).from_reader(text);
        let header = reader.headers().map_err(|e| Error::file(path, format!("has no readable header: {e}")))?.clone();
        let mut places = Vec::new();
        for column in columns {
            let mut found = header.iter().enumerate().filter(|(_, name)| name == column).map(|(i, _)| i);
            match (found.next(), found.next()) {
                (Some(i), None) => places.push(i),
                (Some(_), Some(_)) => return Err(Error::file(path, format!("has two columns named `{column}`"))),
                (None, _) => {
                    let start: String =
                        header.iter().take(8).collect::<Vec<_>>().join(", ").chars().take(120).collect();
                    let message = format!("lacks the column `{column}`; its header starts with `{start}`");
                    return Err(Error::file(path, message));
                }
            }
        }
        let mut rows = Vec::new();
        let (mut row, mut counted) = (1, 0);
        for record in reader.records() {
            let record = record.map_err(|e| Error::file(path, format!("is not a table: {e}")))?;
            // The reader's own line number is off after empty lines and with \r\n; count the lines up to the record's first character.
            let start = record.position().map_or(0, |p| p.byte() as usize);
            let start = start + text[start..].iter().take_while(|&&b| b == b'\r' || b == b'\n').count();
            row += text[counted..start].iter().filter(|&&b| b == b'\n').count();
            counted = start;
            if record.len() != header.len() {
                let message = format!("the row has {} cells, expected {} as in the header", record.len(), header.len());
                return Err(Error::cell(path, row, columns.first().unwrap_or(&""), message));
            }
            let cells = places.iter().map(|&place| record[place].to_string()).collect();
            rows.push((row, cells));
        }
        let columns = columns.iter().map(|c| c.to_string()).collect();
        Ok(Self { path: path.to_path_buf(), columns, rows })
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

/// The single table in a zip; other systems' metadata members are not counted. Nothing is ever written by a member's name.
fn unzip(path: &Path, bytes: Vec<u8>) -> Result<Vec<u8>> {
    let broken = |e: &dyn std::fmt::Display| Error::file(path, format!("is not a readable zip: {e}"));
    let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).map_err(|e| broken(&e))?;
    let mut members = Vec::new();
    for i in 0..archive.len() {
        let member = archive.by_index(i).map_err(|e| broken(&e))?;
        if member.is_file() && !member.name_raw().starts_with(b"__MACOSX/") {
            members.push(i);
        }
    }
    let &[member] = members.as_slice() else {
        return Err(Error::file(path, format!("holds {} files, expected one table", members.len())));
    };
    let member = archive.by_index(member).map_err(|e| broken(&e))?;
    let mut table = Vec::new();
    member.take(MAX_UNPACKED + 1).read_to_end(&mut table).map_err(|e| broken(&e))?;
    if table.len() as u64 > MAX_UNPACKED {
        return Err(Error::file(path, "unpacks to more than 1 GiB"));
    }
    Ok(table)
}
