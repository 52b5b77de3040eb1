//! Where feature files lie: in the published folders, or in those that TRIDENT and STAMP make.
//!
//! ```text
//! PT_DIR/BACKBONE/x20/pt_files/SLIDE.pt, .../h5_files/SLIDE.h5     the published layout, and CLAM's
//! PT_DIR/20x_256px_0px_overlap/features_BACKBONE/SLIDE.h5          TRIDENT's job folder
//! PT_DIR/x20/BACKBONE-<hash>/SLIDE.h5                              STAMP, one output folder a magnification
//! ```

use std::{
    collections::{BTreeSet, HashMap},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::cohort::{LeftOut, Slide, stem};
use crate::{
    Error, Result,
    model::{Scale, Scales},
};

/// Where features may lie in the folder of a magnification, in the order searched.
const PLACES: [(&str, &str); 6] =
    [("pt_files", "pt"), ("pt_files", "safetensors"), ("h5_files", "h5"), ("", "h5"), ("", "pt"), ("", "safetensors")];

/// A slide's feature files, by scale.
pub type BagFiles = Scales<PathBuf>;

/// Slides left out because a scale has no file; a slide may lack several.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Missing {
    /// The slides, each with the scales that it lacks as the reason.
    pub slides: Vec<LeftOut>,
    /// How many of them lack each scale that was looked for.
    pub by_scale: Scales<usize>,
    /// The file that was looked for in vain for the first of them.
    pub first: PathBuf,
}

/// Pairs each slide with its files at these scales and leaves out those that lack one. `rows` are
/// the slides' rows in the clinical table, for messages.
pub fn find_features(
    slides: Vec<Slide>,
    rows: &HashMap<String, usize>,
    pt_dir: &Path,
    backbone: &str,
    scales: &[Scale],
) -> Result<(Vec<(Slide, BagFiles)>, Missing)> {
    let published = pt_dir.join(backbone);
    let folders = scales.iter().map(|&scale| Ok((scale, folder(pt_dir, backbone, scale)?)));
    let folders = folders.collect::<Result<Vec<_>>>()?;
    if folders.iter().all(|(_, folder)| folder.is_none()) && !published.is_dir() {
        let message = "is not a folder; features are looked for in <pt-dir>/<backbone>/x{5,10,20}/pt_files, in TRIDENT's \
                       <pt-dir>/{5,10,20}x_*px_*px_overlap/features_<backbone> and in STAMP's <pt-dir>/x{5,10,20}/<backbone>";
        return Err(Error::file(&published, message));
    }
    let by_scale = scales.iter().map(|&scale| (scale, 0)).collect();
    let (mut found, mut missing) = (Vec::new(), Missing { by_scale, ..Missing::default() });
    let total = slides.len();
    for slide in slides {
        let file = |folder: &Option<PathBuf>| folder.as_ref().and_then(|folder| file_in(folder, &slide.slide_id));
        let lacking: Vec<_> = folders.iter().filter(|(_, folder)| file(folder).is_none()).collect();
        let Some((first, folder)) = lacking.first() else {
            let files = folders.iter().filter_map(|(scale, folder)| Some((*scale, file(folder)?))).collect();
            found.push((slide, files));
            continue;
        };
        for (scale, _) in &lacking {
            let before = missing.by_scale.get(*scale).copied().unwrap_or(0);
            missing.by_scale.insert(*scale, before + 1);
        }
        let names: Vec<&str> = lacking.iter().map(|(scale, _)| scale.name()).collect();
        let likely = match folder {
            Some(folder) if !folder.join("pt_files").is_dir() => folder.join(format!("{}.h5", slide.name())),
            Some(folder) => folder.join(format!("pt_files/{}.pt", slide.name())),
            None => published.join(format!("{first}/pt_files/{}.pt", slide.name())),
        };
        let reason = format!("no features at {}, looked for the likes of {}", names.join(", "), likely.display());
        if missing.slides.is_empty() {
            missing.first = likely;
        }
        missing.slides.push(LeftOut { slide_id: slide.slide_id, case_id: slide.case_id, reason });
    }
    if found.is_empty() {
        let lack: Vec<String> = missing.by_scale.iter().map(|(scale, n)| format!("{n} lack {scale}")).collect();
        let names: Vec<&str> = scales.iter().map(|scale| scale.name()).collect();
        let message = format!(
            "has features at {} of none of the {total} slides ({}); looked for the likes of {}",
            and(&names),
            lack.join(", "),
            missing.first.display()
        );
        return Err(Error::file(if published.is_dir() { &published } else { pt_dir }, message));
    }
    refuse_shared(&found, rows)?;
    Ok((found, missing))
}

/// "x5, x10 and x20"
fn and(names: &[&str]) -> String {
    match names {
        [first @ .., last] if !first.is_empty() => format!("{} and {last}", first.join(", ")),
        all => all.concat(),
    }
}

/// A slide's feature file at one scale; None where there is none. An error where several folders
/// could be meant.
pub fn feature_file(pt_dir: &Path, backbone: &str, scale: Scale, slide_id: &str) -> Result<Option<PathBuf>> {
    Ok(folder(pt_dir, backbone, scale)?.and_then(|folder| file_in(&folder, slide_id)))
}

/// The names of all slides that have a feature file at one of these scales, sorted.
pub fn slides_with_features(pt_dir: &Path, backbone: &str, scales: &[Scale]) -> Result<Vec<String>> {
    let mut names = BTreeSet::new();
    for &scale in scales {
        let Some(folder) = folder(pt_dir, backbone, scale)? else { continue };
        for (kind, extension) in PLACES {
            for entry in std::fs::read_dir(folder.join(kind)).into_iter().flatten().flatten() {
                let path = entry.path();
                let stem = path.file_stem().and_then(|stem| stem.to_str());
                let of_place = path.extension().is_some_and(|found| found == extension);
                names.extend(stem.filter(|_| of_place).map(String::from));
            }
        }
    }
    Ok(names.into_iter().collect())
}

/// The folder of a scale's features; an error where several could be meant.
fn folder(pt_dir: &Path, backbone: &str, scale: Scale) -> Result<Option<PathBuf>> {
    let x = scale.name();
    let names_in = |folder: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    };
    let mut folders = vec![pt_dir.join(backbone).join(x)];
    let trident = names_in(pt_dir).into_iter().filter(|name| is_trident(name, x));
    folders.extend(trident.map(|name| pt_dir.join(name).join(format!("features_{backbone}"))));
    let stamp = names_in(&pt_dir.join(x)).into_iter().filter(|name| is_stamp(name, backbone));
    folders.extend(stamp.map(|name| pt_dir.join(x).join(name)));
    folders.retain(|folder| folder.is_dir());
    if let [first, second, ..] = &folders[..] {
        let [first, second] = [first, second].map(|folder| folder.strip_prefix(pt_dir).unwrap_or(folder).display());
        let message = format!(
            "has features of `{backbone}` at {x} in both {first} and {second}; expected one, move the other away"
        );
        return Err(Error::file(pt_dir, message));
    }
    Ok(folders.pop())
}

/// `20x_256px_0px_overlap` for x20.
fn is_trident(name: &str, x: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let parts: Vec<&str> = name.split('_').collect();
    let [magnification, size, overlap, "overlap"] = parts[..] else { return false };
    magnification.strip_suffix('x') == x.strip_prefix('x')
        && [size, overlap].iter().all(|part| part.strip_suffix("px").is_some_and(number))
}

/// The extractor's name, alone or with the hash of STAMP's code behind it.
fn is_stamp(name: &str, backbone: &str) -> bool {
    let is_hash = |text: &str| text.len() >= 8 && text.bytes().all(|b| b.is_ascii_hexdigit());
    name.strip_prefix(backbone).is_some_and(|rest| rest.is_empty() || rest.strip_prefix('-').is_some_and(is_hash))
}

/// The slide's file in the folder of a magnification, named by the whole slide id or by its stem.
/// What has its name but is no file is found too, and refused by whoever opens it.
fn file_in(folder: &Path, slide_id: &str) -> Option<PathBuf> {
    let names = [slide_id, stem(slide_id)];
    let path = |name: &str, (kind, extension): &(&str, &str)| folder.join(kind).join(format!("{name}.{extension}"));
    names
        .iter()
        .flat_map(|name| PLACES.iter().map(move |place| path(name, place)))
        .find(|path| path.symlink_metadata().is_ok())
}

/// An error if two slides have one file, by the same name, through links or as hard links.
fn refuse_shared(found: &[(Slide, BagFiles)], rows: &HashMap<String, usize>) -> Result<()> {
    #[derive(PartialEq, Eq, Hash)]
    enum Identity {
        Path(PathBuf),
        Inode(u64, u64),
    }
    let mut owners: HashMap<Identity, &str> = HashMap::new();
    for (slide, files) in found {
        for file in files.values() {
            // one that cannot be found is for its reader to refuse
            let (Ok(path), Ok(about)) = (file.canonicalize(), file.metadata()) else { continue };
            // some file systems invent inode numbers, but not for files that have no second name
            let inode = (about.nlink() > 1).then(|| Identity::Inode(about.dev(), about.ino()));
            for identity in inode.into_iter().chain([Identity::Path(path)]) {
                let owner = *owners.entry(identity).or_insert(&slide.slide_id);
                if owner != slide.slide_id {
                    let [a, b] = [owner, &slide.slide_id].map(|id| {
                        let row =
                            rows.get(id).map_or(String::new(), |row| format!(" (row {row} of the clinical table)"));
                        format!("`{id}`{row}")
                    });
                    let message = format!("is the feature file of two slides, {a} and {b}");
                    return Err(Error::file(file, message));
                }
            }
        }
    }
    Ok(())
}
