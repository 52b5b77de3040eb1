//! A page that shows a slide and the scores over it, without a network: the slide as tiles in a
//! folder beside the page, the scores as layers that can be switched and faded.

use std::path::Path;

use crossfusion::{Error, Result, data::atomic::write_text};
use serde::Serialize;

use crate::{
    heatmap::{Ground, Layer},
    picture::write_jpeg,
    progress::Progress,
};

const PAGE: &str = include_str!("viewer.html");
/// Side of a tile, in pixels.
const TILE: usize = 512;
/// The longer side of the finest level: a larger slide's is a half, a quarter, ... of its level 0,
/// which keeps the tiles to about a thousand.
const FINEST: i64 = 16384;

/// What the page's script reads.
#[derive(Serialize)]
struct Data<'a> {
    title: &'a str,
    about: &'a str,
    width: i64,
    height: i64,
    tile: usize,
    /// By how much each level is smaller than level 0; none without a slide.
    levels: Vec<i64>,
    folder: String,
    signed: bool,
    layers: Vec<DataLayer<'a>>,
}

#[derive(Serialize)]
struct DataLayer<'a> {
    name: &'static str,
    side: i64,
    /// The score that gets the strongest colour.
    strongest: f64,
    x: Vec<i64>,
    y: Vec<i64>,
    score: &'a [f64],
}

/// Writes the page, and the slide's tiles to a folder of the page's name beside it. `signed`:
/// whether scores go below zero.
pub fn write(page: &Path, ground: &Ground, layers: &[Layer], [title, about]: [&str; 2], signed: bool) -> Result<()> {
    let name = format!("{}_tiles", page.file_stem().unwrap_or_default().to_string_lossy());
    let levels = if ground.has_pixels() { levels(ground.size) } else { Vec::new() };
    write_tiles(&page.with_file_name(&name), ground, &levels)?;
    // a colour means the same at every scale: so much for its area
    let area = |layer: &Layer| (layer.side * layer.side) as f64;
    let strongest = layers.iter().map(|layer| layer.strongest() / area(layer)).fold(0.0, f64::max);
    let layers = layers.iter().map(|layer| DataLayer {
        name: layer.scale.name(),
        side: layer.side,
        strongest: strongest * area(layer),
        x: layer.corners.iter().map(|corner| corner[0]).collect(),
        y: layer.corners.iter().map(|corner| corner[1]).collect(),
        score: &layer.scores,
    });
    let [width, height] = ground.size;
    let layers = layers.collect();
    let data = Data { title, about, width, height, tile: TILE, levels, folder: name, signed, layers };
    // within a script, `<` could end it
    let data = serde_json::to_string(&data).map_err(|e| Error::file(page, e))?.replace('<', "\\u003c");
    let escaped = title.replace('&', "&amp;").replace('<', "&lt;");
    write_text(page, &PAGE.replacen("TITLE", &escaped, 1).replacen("DATA", &data, 1))
}

/// From the finest level to one that fits a tile, each half of the one before.
fn levels(size: [i64; 2]) -> Vec<i64> {
    let longer = size[0].max(size[1]);
    let finest = (0..).map(|k| 1 << k).find(|k| longer / k <= FINEST).unwrap_or(1);
    let mut levels = vec![finest];
    while let Some(&last) = levels.last().filter(|&&last| longer / last > TILE as i64) {
        levels.push(2 * last);
    }
    levels
}

fn write_tiles(folder: &Path, ground: &Ground, levels: &[i64]) -> Result<()> {
    let count = |downsample: i64| ground.size.map(|size| (size as u64).div_ceil(downsample as u64 * TILE as u64));
    let total = levels.iter().map(|&level| count(level).iter().product::<u64>()).sum();
    let progress = Progress::new(total, "tiles");
    for (number, &downsample) in levels.iter().enumerate() {
        let folder = folder.join(number.to_string());
        std::fs::create_dir_all(&folder).map_err(|e| Error::file(&folder, format!("cannot be made: {e}")))?;
        let [columns, rows] = count(downsample);
        for (column, row) in (0..columns as i64).flat_map(|column| (0..rows as i64).map(move |row| (column, row))) {
            let corner = [column, row].map(|i| i * TILE as i64 * downsample);
            let side = |axis: usize| {
                (((ground.size[axis] - corner[axis]) as u64).div_ceil(downsample as u64) as usize).min(TILE)
            };
            let image = ground.picture(corner, side(0), side(1), downsample as f64)?;
            write_jpeg(&folder.join(format!("{column}_{row}.jpg")), &image)?;
            progress.add(1);
        }
    }
    progress.end();
    Ok(())
}
