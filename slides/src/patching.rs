//! `cf-slide patch`: the patches of a cohort, slide by slide on all cores.
//!
//! ```text
//! OUT/patch.toml              the settings; a folder holds patches of one
//! OUT/slides.csv              a row a slide: status, reason, magnification, patches, path
//! OUT/x20/patches/SLIDE.h5    coordinates, and so at x5 and x10: each is CLAM's --data_h5_dir
//! OUT/masks/SLIDE.jpg         outlines of tissue and frames of the finest patches
//! ```

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crossfusion::{
    Error, Result,
    data::atomic::{self, write_text},
    model::Scale,
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    coordinates::Coordinates,
    files,
    grid::{self, ContourFn, Grid},
    magnification::Power,
    picture,
    progress::Progress,
    slide::Slide,
    tissue::{self, Segmentation},
};

/// The table of all slides.
pub const TABLE: &str = "slides.csv";
/// The settings of a folder of patches.
pub const SETTINGS: &str = "patch.toml";

/// The table is written at most so often, and at the end.
const BETWEEN_TABLES: Duration = Duration::from_secs(5);

/// What patches depend on, beside the slides.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Settings {
    /// Side of a patch, in pixels of its magnification.
    pub patch_size: usize,
    /// From one patch to the next, in the same.
    pub step_size: usize,
    /// What makes a patch one of tissue.
    pub contour_fn: ContourFn,
    /// Whether patches may reach beyond the slide's lower and right edge.
    pub use_padding: bool,
    /// From the lowest to the highest: 5, 10, 20.
    #[serde(serialize_with = "as_names")]
    pub magnifications: Vec<Scale>,
    /// The power of the slides at hand, in place of what they say.
    #[serde(skip)]
    pub power: Option<f64>,
    /// What is tissue.
    pub segmentation: Segmentation,
}

fn as_names<S: serde::Serializer>(scales: &[Scale], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(scales.iter().map(|scale| scale.name()))
}

/// What became of a slide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Its patches are written.
    Patched,
    /// It has no tissue that is large enough.
    NoTissue,
    /// The reason says why.
    Failed,
}

/// A row of [`TABLE`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The file's name.
    pub slide_id: String,
    /// What became of it.
    pub status: Status,
    /// Why it failed.
    pub reason: String,
    /// Of level 0.
    pub power: Option<f64>,
    /// `objective`, `microns`, `microns, not objective` or `flag`.
    pub power_from: String,
    /// Level that tissue was looked for in.
    pub seg_level: Option<usize>,
    /// Patches at 5x; None where they were not asked for.
    pub x5: Option<usize>,
    /// At 10x.
    pub x10: Option<usize>,
    /// At 20x.
    pub x20: Option<usize>,
    /// The slide itself.
    pub path: PathBuf,
}

impl Row {
    fn new(path: &Path, status: Status) -> Self {
        let slide_id = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let path = absolute(path);
        let (reason, power_from) = (String::new(), String::new());
        Self {
            slide_id,
            status,
            reason,
            power: None,
            power_from,
            seg_level: None,
            x5: None,
            x10: None,
            x20: None,
            path,
        }
    }

    /// Patches at a scale.
    pub fn patches(&self, scale: Scale) -> Option<usize> {
        [self.x5, self.x10, self.x20][scale as usize]
    }

    fn set_patches(&mut self, scale: Scale, patches: usize) {
        *[&mut self.x5, &mut self.x10, &mut self.x20][scale as usize] = Some(patches);
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or(path.to_path_buf())
}

/// Where the coordinates of a slide are.
pub fn coordinates_path(out: &Path, scale: Scale, name: &str) -> PathBuf {
    out.join(scale.name()).join("patches").join(format!("{name}.h5"))
}

/// The side of a folder's patches, in pixels of their magnification.
pub fn patch_size(out: &Path) -> Result<usize> {
    #[derive(Deserialize)]
    struct PatchSize {
        patch_size: usize,
    }
    let path = out.join(SETTINGS);
    let settings: PatchSize =
        toml::from_str(&atomic::read_text(&path, atomic::MOST)?).map_err(|e| Error::file(&path, e))?;
    Ok(settings.patch_size)
}

/// Reads the table of a folder of patches: rows by the slide's name.
pub fn read_table(out: &Path) -> Result<BTreeMap<String, Row>> {
    let path = out.join(TABLE);
    if !path.exists() {
        return Err(Error::file(out, format!("is no folder of `cf-slide patch`: it has no {TABLE}")));
    }
    let text = atomic::read_bytes(&path, atomic::MOST)?;
    let rows = csv::Reader::from_reader(&text[..]).into_deserialize().enumerate();
    rows.map(|(i, row)| {
        let row: Row = row.map_err(|e| Error::file(&path, format!("row {}: {e}", i + 2)))?;
        Ok((row.path.file_stem().unwrap_or_default().to_string_lossy().into_owned(), row))
    })
    .collect()
}

fn write_table(out: &Path, rows: &BTreeMap<String, Row>) -> Result<()> {
    let path = out.join(TABLE);
    let mut table = csv::Writer::from_writer(Vec::new());
    rows.values().try_for_each(|row| table.serialize(row)).map_err(|e| Error::file(&path, e))?;
    let text = table.into_inner().map_err(|e| Error::file(&path, e))?;
    write_text(&path, &String::from_utf8_lossy(&text))
}

/// Patches all slides into `out`, but for those that are there. Returns the table's rows, of slides
/// that failed too; an error is of `out` itself.
pub fn patch_all(slides: &BTreeMap<String, PathBuf>, settings: &Settings, out: &Path) -> Result<BTreeMap<String, Row>> {
    prepare(settings, out)?;
    let mut before = if out.join(TABLE).exists() { read_table(out)? } else { BTreeMap::new() };
    for (name, path) in slides {
        if let Some(row) = before.get_mut(name) {
            row.path = absolute(files::one_of_a_name(name, &row.path, path)?);
        }
    }
    let todo: Vec<_> = slides
        .iter()
        .filter(|(name, _)| !before.get(*name).is_some_and(|row| is_done(row, name, settings, out)))
        .collect();
    let skipped = slides.len() - todo.len();
    if skipped > 0 {
        crossfusion::say(format!("{skipped} of {} slides are there already", slides.len()));
    }
    let progress = Progress::new(todo.len() as u64, "slides");
    let table = Mutex::new((before, Instant::now()));
    todo.into_par_iter().try_for_each(|(name, path)| {
        let row = patch(path, settings, out).unwrap_or_else(|error| {
            let reason = error.to_string();
            Row { reason, ..Row::new(path, Status::Failed) }
        });
        let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
        let (rows, written) = &mut *table;
        rows.insert(name.clone(), row);
        if written.elapsed() >= BETWEEN_TABLES {
            write_table(out, rows)?;
            *written = Instant::now();
        }
        progress.add(1);
        Ok::<_, Error>(())
    })?;
    progress.end();
    let (rows, _) = table.into_inner().unwrap_or_else(PoisonError::into_inner);
    write_table(out, &rows)?;
    Ok(rows.into_iter().filter(|(name, _)| slides.contains_key(name)).collect())
}

/// Makes the folders, and refuses those that hold patches of other settings. Settings by which no
/// slide has any are forgotten, with their table.
fn prepare(settings: &Settings, out: &Path) -> Result<()> {
    let path = out.join(SETTINGS);
    let text = toml::to_string(settings).map_err(|e| Error::file(&path, e))?;
    if path.exists() {
        if atomic::read_text(&path, atomic::MOST)? == text {
            return Ok(());
        }
        let table = out.join(TABLE);
        if !table.exists() || read_table(out)?.values().any(|row| row.status == Status::Patched) {
            let message =
                format!("--out {}: holds patches of other settings ({SETTINGS}); choose another", out.display());
            return Err(Error::Usage(message));
        }
        std::fs::remove_file(&table).map_err(|e| Error::file(&table, format!("cannot be removed: {e}")))?;
    }
    let folders = settings.magnifications.iter().map(|scale| out.join(scale.name()).join("patches"));
    for folder in folders.chain([out.join("masks")]) {
        std::fs::create_dir_all(&folder).map_err(|e| Error::file(&folder, format!("cannot be made: {e}")))?;
    }
    write_text(&path, &text)
}

/// Whether nothing of a slide is left to do. Files are written atomically: those that are there are
/// complete.
fn is_done(row: &Row, name: &str, settings: &Settings, out: &Path) -> bool {
    let is_written =
        |scale: Scale| row.patches(scale).is_none_or(|n| n == 0 || coordinates_path(out, scale, name).exists());
    let is_of_power = settings.power.is_none() || settings.power == row.power;
    match row.status {
        _ if !is_of_power => false,
        Status::Patched => Scale::ALL.into_iter().all(is_written),
        Status::NoTissue => true,
        Status::Failed => false,
    }
}

/// Finds and writes the patches of one slide.
fn patch(path: &Path, settings: &Settings, out: &Path) -> Result<Row> {
    let slide = Slide::open(path)?;
    let power = Power::of(&slide, settings.power)?;
    let grids = settings.magnifications.iter().map(|&scale| Ok((scale, grid(&slide, power, scale, settings)?)));
    let grids = grids.collect::<Result<Vec<_>>>()?;
    let tissue = tissue::find(&slide, &settings.segmentation)?;
    let mut row = Row::new(path, Status::NoTissue);
    row.power = Some(power.value);
    row.power_from = power.source.to_string();
    row.seg_level = Some(tissue.level);
    let level_0 = slide.levels()[0];
    let mut finest = (Vec::new(), 0);
    for (scale, grid) in grids {
        let corners = grid::patches(&tissue.areas, &grid, [level_0.width as i64, level_0.height as i64]);
        row.set_patches(scale, corners.len());
        finest = (corners.clone(), grid.size);
        let file = coordinates_path(out, scale, &slide.name());
        if corners.is_empty() {
            // what another power may have left there
            let _ = std::fs::remove_file(file);
        } else {
            row.status = Status::Patched;
            let coordinates = Coordinates { corners, level: 0, size: grid.size as usize, slide: None };
            coordinates.write(&file, &slide.name(), level_0)?;
        }
    }
    let picture = picture::draw(&tissue, level_0, &finest.0, finest.1);
    picture::write_jpeg(&out.join("masks").join(format!("{}.jpg", slide.name())), &picture)?;
    Ok(row)
}

/// The grid of a magnification at level 0 of a slide.
fn grid(slide: &Slide, power: Power, scale: Scale, settings: &Settings) -> Result<Grid> {
    let at_level_0 = |pixels| {
        power.at_level_0(scale, pixels).ok_or_else(|| {
            let message = format!(
                "is of {}x, and patches at {scale} would be enlarged; --magnifications names those that are wanted",
                power.value
            );
            Error::file(slide.path(), message)
        })
    };
    let (size, step) = (at_level_0(settings.patch_size)?, at_level_0(settings.step_size)?);
    Ok(Grid { size, step, rule: settings.contour_fn, use_padding: settings.use_padding })
}
