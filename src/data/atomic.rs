//! Files that are there whole or not at all.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use crate::{Error, Result};

/// Writes a file under a temporary name beside it, syncs it, and renames it into place: after a crash at any moment the old file or the new
/// one is there. On an error nothing is left behind.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let failed = |e: std::io::Error| Error::file(path, format!("cannot be written: {e}"));
    let name = path.file_name().ok_or_else(|| Error::file(path, "is not a file name"))?;
    let temporary = path.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
    let result = (|| {
        let mut writer = BufWriter::new(File::create(&temporary).map_err(failed)?);
        write(&mut writer)?;
        writer.flush().map_err(failed)?;
        writer.get_ref().sync_all().map_err(failed)?;
        std::fs::rename(&temporary, path).map_err(failed)
    })();
    if result.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    // The rename itself must reach the disk; not every system lets a folder be opened, and then it syncs by itself.
    if let Some(Ok(folder)) = path.parent().map(File::open) {
        let _ = folder.sync_all();
    }
    result
}

/// [`write_atomically`] for text.
pub fn write_text(path: &Path, text: &str) -> Result<()> {
    write_atomically(path, |file| file.write_all(text.as_bytes()).map_err(|e| Error::file(path, e)))
}
