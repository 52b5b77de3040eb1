//! Files that are either the old or the new version, never a half-written one, also after a power
//! cut.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use crate::{Error, Result};

/// Writes `path` through a temporary file beside it: written, synced, renamed, and the folder
/// synced. When anything fails, `path` stays as it was and the temporary file is removed.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let failed = |e: io::Error| Error::file(path, format!("cannot be written: {e}"));
    place_atomically(path, |temporary| {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(temporary).map_err(failed)?);
        write(&mut file)?;
        file.flush().map_err(failed)
    })
}

/// The same for a writer that opens its file itself, under the name that it is given.
pub fn place_atomically(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let failed = |e: io::Error| Error::file(path, format!("cannot be written: {e}"));
    let temporary = temporary_beside(path)?;
    let _registered = Registered::new(&temporary);
    let written = write(&temporary).and_then(|()| {
        let synced = File::open(&temporary).and_then(|file| file.sync_all());
        synced.and_then(|()| fs::rename(&temporary, path)).and_then(|()| sync_folder(path)).map_err(failed)
    });
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Temporary files that this process is writing.
static TEMPORARIES: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// An entry of [`TEMPORARIES`], until it is dropped.
struct Registered<'a>(&'a Path);

impl<'a> Registered<'a> {
    fn new(temporary: &'a Path) -> Self {
        lock().insert(temporary.to_path_buf());
        Self(temporary)
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        lock().remove(self.0);
    }
}

fn lock() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    TEMPORARIES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes the temporary files that this process is writing, for a program that a signal ends. No
/// file is begun or renamed any more: the process must end after this.
pub fn remove_temporaries() {
    let temporaries = lock();
    for temporary in &*temporaries {
        let _ = fs::remove_file(temporary);
    }
    std::mem::forget(temporaries);
}

/// Removes the temporary files that killed processes left in a folder, but for those of the files
/// in `others`, which another process may be writing.
pub fn remove_leftovers(folder: &Path, others: &[&str]) -> Result<()> {
    let failed = |e: io::Error| Error::file(folder, format!("cannot be tidied: {e}"));
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let target = name.strip_prefix('.').and_then(|name| name.strip_suffix(".tmp"));
        let Some((target, _process)) = target.and_then(|target| target.rsplit_once('.')) else { continue };
        if !others.contains(&target) {
            fs::remove_file(entry.path()).map_err(failed)?;
        }
    }
    Ok(())
}

/// In the same folder, since a rename is atomic only within one file system; named by the process
/// and a number that it has drawn, so that two programs writing one file do not write into each
/// other's temporary, on two machines neither.
fn temporary_beside(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| Error::file(path, "is not the name of a file to write"))?;
    static DRAWN: LazyLock<u64> = LazyLock::new(|| RandomState::new().build_hasher().finish());
    let process = format!("{}-{:016x}", std::process::id(), *DRAWN);
    Ok(path.with_file_name(format!(".{}.{process}.tmp", name.to_string_lossy())))
}

/// A rename is durable only once its folder is synced. Other systems than Unix cannot open a folder
/// for that.
fn sync_folder(path: &Path) -> io::Result<()> {
    if cfg!(unix) {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// The most bytes of a file that these programs wrote, and read again.
pub const MOST: u64 = 1 << 30;

/// The content of a file of at most so many bytes. It may come through a pipe, but not from a
/// device without an end.
pub fn read_bytes(path: &Path, most: u64) -> Result<Vec<u8>> {
    let failed = |e: io::Error| Error::file(path, format!("cannot be read: {e}"));
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(most + 1).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > most {
        return Err(Error::file(path, format!("is larger than {}, the most that is read", bytesize::ByteSize(most))));
    }
    Ok(bytes)
}

/// [`read_bytes`] of text.
pub fn read_text(path: &Path, most: u64) -> Result<String> {
    String::from_utf8(read_bytes(path, most)?).map_err(|e| Error::file(path, format!("is not UTF-8 text: {e}")))
}

/// [`write_atomically`] for text.
pub fn write_text(path: &Path, text: &str) -> Result<()> {
    write_atomically(path, |file| file.write_all(text.as_bytes()).map_err(|e| Error::file(path, e)))
}
