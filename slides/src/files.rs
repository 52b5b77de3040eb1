//! Slides on the disk.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    path::{Path, PathBuf},
};

use crossfusion::{Error, Result};

/// Endings of the files that OpenSlide opens. A DICOM slide is a folder of `.dcm` files, of which
/// any one opens it: it is named itself.
const ENDINGS: [&str; 11] = ["svs", "tif", "tiff", "ndpi", "mrxs", "scn", "vms", "vmu", "svslide", "bif", "czi"];

/// The slides among these files and, however deep, in these folders, by name. An error where two
/// have one name or one has none that a table can hold, or there is no slide.
pub fn slides(paths: &[PathBuf]) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = Vec::new();
    for path in paths {
        match path.metadata() {
            Ok(metadata) if metadata.is_dir() => in_folder(path, &mut found)?,
            Ok(_) => found.push(path.clone()),
            Err(e) => return Err(Error::file(path, format!("cannot be read: {e}"))),
        }
    }
    let mut slides: BTreeMap<String, PathBuf> = BTreeMap::new();
    for path in &found {
        let (Some(name), Some(_)) = (path.file_stem().and_then(OsStr::to_str), path.to_str()) else {
            return Err(Error::file(path, "has a name that is not UTF-8, which the tables are; rename it"));
        };
        if let Some(other) = slides.insert(name.into(), path.clone()) {
            one_of_a_name(name, &other, path)?;
        }
    }
    if slides.is_empty() {
        let names: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
        return Err(Error::Usage(format!("{}: holds no slides (.{})", names.join(", "), ENDINGS.join(", ."))));
    }
    Ok(slides)
}

/// The later path of a slide that is called `name`; an error where the earlier is another file.
pub fn one_of_a_name<'a>(name: &str, earlier: &Path, later: &'a Path) -> Result<&'a Path> {
    let is_other = earlier != later && earlier.exists() && earlier.canonicalize().ok() != later.canonicalize().ok();
    if is_other {
        let message = format!("and {} are both called `{name}`; their patches would be one file", later.display());
        return Err(Error::file(earlier, message));
    }
    Ok(later)
}

fn in_folder(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let failed = |e: std::io::Error| Error::file(folder, format!("cannot be listed: {e}"));
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let ending = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        if path.is_dir() {
            in_folder(&path, found)?;
        } else if ENDINGS.contains(&ending.as_str()) {
            found.push(path);
        }
    }
    Ok(())
}
