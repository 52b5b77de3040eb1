//! Tissue, as CLAM's `segmentTissue` finds it (Lu et al. 2021, wsi_core/WholeSlideImage.py): pixels
//! that are saturated enough, closed to areas, without those that are too small.

mod outline;
mod plane;
mod polygon;

use crossfusion::{Error, Result};

use crate::slide::{Image, Slide};

pub use outline::{Outline, outlines};
pub use plane::{Plane, above, close, median, otsu, saturation};
pub use polygon::{Point, Polygon, twice_area};

/// How tissue is told from glass; the fields have CLAM's names.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Segmentation {
    /// Level that is looked at; None is the one nearest 64 times below level 0.
    pub seg_level: Option<usize>,
    /// Saturation above which a pixel is tissue, of 255.
    pub sthresh: u8,
    /// Side of the median filter, in pixels; odd.
    pub mthresh: usize,
    /// Side of the square that closes gaps, in pixels; 0 closes none.
    pub close: usize,
    /// Let Otsu's method choose the threshold.
    pub use_otsu: bool,
    /// Tissue must be larger than so many squares of 512 pixels at level 0.
    pub a_t: u64,
    /// A hole must be larger than so many of these squares.
    pub a_h: u64,
    /// Holes that an area of tissue may have; the largest are kept.
    pub max_n_holes: usize,
}

impl Segmentation {
    /// What CLAM does without a preset.
    pub const CLAM: Self =
        Self { seg_level: None, sthresh: 8, mthresh: 7, close: 4, use_otsu: false, a_t: 100, a_h: 16, max_n_holes: 8 };
    /// CLAM's presets/tcga.csv.
    pub const TCGA: Self = Self { a_t: 16, a_h: 4, ..Self::CLAM };
    /// CLAM's presets/bwh_biopsy.csv.
    pub const BWH_BIOPSY: Self =
        Self { sthresh: 15, mthresh: 11, close: 2, a_t: 1, a_h: 1, max_n_holes: 2, ..Self::CLAM };
    /// CLAM's presets/bwh_resection.csv.
    pub const BWH_RESECTION: Self = Self { sthresh: 15, mthresh: 11, ..Self::CLAM };
}

/// Pixels of a level beyond which CLAM looks for no tissue either.
const MOST_PIXELS: u64 = 100_000_000;

/// The side in pixels of the square that areas are counted in.
const REFERENCE: f64 = 512.0;

/// What was found on a slide.
pub struct Tissue {
    /// In pixels of level 0.
    pub areas: Vec<Outline>,
    /// The level that was looked at.
    pub level: usize,
    /// Its pixels.
    pub image: Image,
}

/// Finds a slide's tissue. An error where the slide cannot be read, or the level is too large.
pub fn find(slide: &Slide, how: &Segmentation) -> Result<Tissue> {
    let levels = slide.levels();
    let level = how.seg_level.unwrap_or_else(|| slide.best_level_for_downsample(64.0));
    let Some(&at) = levels.get(level) else {
        let message = format!("has levels 0 to {}, and --seg-level is {level}", levels.len() - 1);
        return Err(Error::file(slide.path(), message));
    };
    if at.width * at.height > MOST_PIXELS {
        let message = format!(
            "has {} x {} pixels at level {level}, the smallest that tissue can be looked for in; at most {MOST_PIXELS} \
             are (it may lack a pyramid)",
            at.width, at.height
        );
        return Err(Error::file(slide.path(), message));
    }
    let image = slide.read_region(0, 0, level, at.width as usize, at.height as usize)?;
    let scale = [levels[0].width as f64 / at.width as f64, levels[0].height as f64 / at.height as f64];
    let reference = (REFERENCE * REFERENCE / (scale[0] * scale[1])) as u64;
    let mut areas = outlines(&mask(&image, how));
    areas.retain(|area| is_large(area, how.a_t * reference));
    for area in &mut areas {
        area.holes.sort_by_key(|hole| std::cmp::Reverse(twice_area(hole)));
        area.holes.truncate(how.max_n_holes);
        area.holes.retain(|hole| twice_area(hole) > 2 * (how.a_h * reference) as i64);
        for points in area.holes.iter_mut().chain([&mut area.border]) {
            let scaled = |x: i32, scale: f64| (f64::from(x) * scale) as i32;
            points.iter_mut().for_each(|p| *p = Point { x: scaled(p.x, scale[0]), y: scaled(p.y, scale[1]) });
        }
    }
    Ok(Tissue { areas, level, image })
}

/// White where there is tissue, before areas are looked at.
pub fn mask(image: &Image, how: &Segmentation) -> Plane {
    let smooth = median(&saturation(image), how.mthresh);
    let threshold = if how.use_otsu { otsu(&smooth) } else { how.sthresh };
    let mask = above(&smooth, threshold);
    if how.close > 0 { close(&mask, how.close) } else { mask }
}

/// Whether an area without its holes is larger than so many pixels.
fn is_large(area: &Outline, pixels: u64) -> bool {
    let twice = twice_area(&area.border) - area.holes.iter().map(|hole| twice_area(hole)).sum::<i64>();
    twice != 0 && twice > 2 * pixels as i64
}
