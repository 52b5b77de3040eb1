//! Patches on tissue, as CLAM's `process_contour` lays them: a grid over the bounds of each area,
//! of which those patches are kept whose points lie in the area and whose middles lie in no hole.

use std::cmp::Ordering;

use crate::tissue::{Outline, Polygon};

/// Which points of a patch decide; CLAM's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ContourFn {
    /// One of four points, half way from the middle to the corners
    FourPt,
    /// All of these four
    FourPtHard,
    /// The middle
    Center,
    /// The upper left corner
    Basic,
}

/// A grid over a slide, in pixels of level 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Side of a patch.
    pub size: i64,
    /// From one patch to the next.
    pub step: i64,
    /// What makes a patch one of tissue.
    pub rule: ContourFn,
    /// Whether patches may reach beyond the slide's lower and right edge.
    pub use_padding: bool,
}

/// The upper left corners of the patches on areas of a slide of `width` x `height` pixels, area by
/// area, column by column.
pub fn patches(areas: &[Outline], grid: &Grid, [width, height]: [i64; 2]) -> Vec<[i64; 2]> {
    areas.iter().flat_map(|area| patches_of(area, grid, [width, height])).collect()
}

fn patches_of(area: &Outline, grid: &Grid, [width, height]: [i64; 2]) -> Vec<[i64; 2]> {
    let border = Polygon::new(&area.border);
    let holes: Vec<Polygon> = area.holes.iter().map(|hole| Polygon::new(hole)).collect();
    let [low, high] = border.bounds.map(|corner| [i64::from(corner.x), i64::from(corner.y)]);
    let stop = |high: i64, end: i64| if grid.use_padding { high + 1 } else { (high + 1).min(end - grid.size + 1) };
    let on_tissue = |&[x, y]: &[i64; 2]| {
        // twice the middle, so that it is whole for odd sizes too
        let middle = [2 * x + grid.size, 2 * y + grid.size];
        is_in(&border, grid, [x, y]) && !holes.iter().any(|hole| hole.side(middle) == Ordering::Greater)
    };
    let steps = |from: i64, to: i64| (from..to).step_by(grid.step as usize);
    steps(low[0], stop(high[0], width))
        .flat_map(|x| steps(low[1], stop(high[1], height)).map(move |y| [x, y]))
        .filter(on_tissue)
        .collect()
}

fn is_in(border: &Polygon, grid: &Grid, [x, y]: [i64; 2]) -> bool {
    let has = |[x, y]: [i64; 2]| border.side([2 * x, 2 * y]) != Ordering::Less;
    let (middle, shift) = ([x + grid.size / 2, y + grid.size / 2], grid.size / 4);
    let mut four =
        [[-1, -1], [1, 1], [1, -1], [-1, 1]].map(|[i, j]| [middle[0] + i * shift, middle[1] + j * shift]).into_iter();
    match grid.rule {
        ContourFn::FourPt => four.any(has),
        ContourFn::FourPtHard => four.all(has),
        ContourFn::Center => has(middle),
        ContourFn::Basic => has([x, y]),
    }
}
