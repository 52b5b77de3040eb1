//! Scores of patches, drawn over their slide: as a picture, as QuPath's objects, as a table, and as
//! the layers of a page ([`crate::viewer`]).

use std::{collections::BTreeSet, fmt::Write as _, io::Write as _, path::Path};

use crossfusion::{
    Error, Result,
    data::atomic::{write_atomically, write_text},
    model::Scale,
};
use serde_json::json;

use crate::{
    resize::{Filter, resize},
    slide::{Image, Slide},
};

/// The patches of one scale, and what each scores.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Their magnification.
    pub scale: Scale,
    /// Side of a patch, in pixels of level 0.
    pub side: i64,
    /// Upper left corners, in pixels of level 0.
    pub corners: Vec<[i64; 2]>,
    /// A score a patch.
    pub scores: Vec<f64>,
}

impl Layer {
    /// The score that gets the strongest colour: the 99th percentile of the absolute scores, so
    /// that one patch does not pale all others.
    pub fn strongest(&self) -> f64 {
        strongest(&mut self.scores.iter().map(|score| score.abs()).collect())
    }
}

fn strongest(sizes: &mut Vec<f64>) -> f64 {
    sizes.retain(|size| *size > 0.0);
    sizes.sort_by(f64::total_cmp);
    sizes.get((sizes.len() * 99 / 100).min(sizes.len().saturating_sub(1))).copied().unwrap_or(1.0)
}

/// Side of the patches whose corners these are, where no file says: the smallest distance along an
/// axis between patches of one row or column. None of fewer than two patches.
pub fn side_of_grid(corners: &[[i64; 2]]) -> Option<i64> {
    let gap = |axis: usize| {
        let sorted: BTreeSet<[i64; 2]> = corners.iter().map(|corner| [corner[1 - axis], corner[axis]]).collect();
        let sorted: Vec<_> = sorted.into_iter().collect();
        sorted.windows(2).filter(|pair| pair[0][0] == pair[1][0]).map(|pair| pair[1][1] - pair[0][1]).min()
    };
    [gap(0), gap(1)].into_iter().flatten().min()
}

/// Where patches lie: the slide's pixels, or white paper.
pub struct Ground<'a> {
    slide: Option<&'a Slide>,
    /// Width and height, in pixels of level 0.
    pub size: [i64; 2],
}

impl<'a> Ground<'a> {
    /// The slide, or without one paper as large as the patches.
    pub fn new(slide: Option<&'a Slide>, layers: &[Layer]) -> Self {
        let size = match slide {
            Some(slide) => [slide.levels()[0].width as i64, slide.levels()[0].height as i64],
            None => [0, 1].map(|axis| {
                let ends = layers.iter().flat_map(|layer| layer.corners.iter().map(|corner| corner[axis] + layer.side));
                ends.max().unwrap_or(1)
            }),
        };
        Self { slide, size }
    }

    /// Whether there is a slide.
    pub fn has_pixels(&self) -> bool {
        self.slide.is_some()
    }

    /// A picture of `width` x `height` pixels from (x, y) of level 0, each `downsample` pixels of
    /// level 0 wide; white outside of the slide.
    pub fn picture(&self, [x, y]: [i64; 2], width: usize, height: usize, downsample: f64) -> Result<Image> {
        /// The side of what is read of a slide at once.
        const TILE: usize = 512;
        let mut picture = Image { width, height, pixels: vec![255; 3 * width * height] };
        let Some(slide) = self.slide else { return Ok(picture) };
        let level = slide.best_level_for_downsample(downsample * 1.01);
        let of_level = downsample / slide.levels()[level].downsample;
        for top in (0..height).step_by(TILE) {
            for left in (0..width).step_by(TILE) {
                let corner = [x + (left as f64 * downsample) as i64, y + (top as f64 * downsample) as i64];
                let inside = |axis: usize, most: usize| {
                    let left = (self.size[axis] - corner[axis]) as f64 / downsample;
                    (left.ceil().max(0.0) as usize).min(most).min(TILE)
                };
                let (w, h) = (inside(0, width - left), inside(1, height - top));
                if w == 0 || h == 0 {
                    continue;
                }
                let read = |pixels: usize| ((pixels as f64 * of_level).round() as usize).max(1);
                let image = slide.read_on_white(corner[0], corner[1], level, read(w), read(h))?;
                let tile = resize(image, w, h, Filter::Bilinear);
                for (row, line) in tile.pixels.chunks_exact(3 * w).enumerate() {
                    picture.pixels[3 * ((top + row) * width + left)..][..3 * w].copy_from_slice(line);
                }
            }
        }
        Ok(picture)
    }
}

/// The longer side of a picture.
const MOST: f64 = 2000.0;

/// Blue below zero, red above, and nothing at zero; of attention, which has no sign, from nothing
/// to red. Colour and opacity of `score / strongest`.
fn colour(share: f64) -> ([f64; 3], f64) {
    let hue = if share < 0.0 { [33.0, 102.0, 172.0] } else { [202.0, 0.0, 32.0] };
    (hue, 0.75 * share.abs().min(1.0))
}

/// The slide in grey with layers over it, as a PNG: each point has the sum of their scores for its
/// area, so that a patch of 5x weighs as much as its sixteen of 20x would together.
pub fn write_png(path: &Path, ground: &Ground, layers: &[&Layer]) -> Result<()> {
    let downsample = (ground.size[0].max(ground.size[1]) as f64 / MOST).max(1.0);
    let [width, height] = ground.size.map(|size| ((size as f64 / downsample).round() as usize).max(1));
    let mut picture = ground.picture([0, 0], width, height, downsample)?;
    let mut density = vec![0.0; width * height];
    for layer in layers {
        let area = (layer.side * layer.side) as f64;
        for (corner, score) in layer.corners.iter().zip(&layer.scores) {
            let place = |x: i64, most: usize| ((x as f64 / downsample).round().max(0.0) as usize).min(most);
            let [left, top] = [place(corner[0], width), place(corner[1], height)];
            let [right, bottom] = [place(corner[0] + layer.side, width), place(corner[1] + layer.side, height)];
            for row in top..bottom {
                density[row * width + left..row * width + right].iter_mut().for_each(|x| *x += score / area);
            }
        }
    }
    let strongest = strongest(&mut density.iter().map(|x| f64::abs(*x)).collect());
    for (pixel, x) in picture.pixels.as_chunks_mut::<3>().0.iter_mut().zip(&density) {
        let (colour, opacity) = colour(x / strongest);
        // stained tissue is red and blue itself, so that colours are told from it on grey alone
        let grey = 0.299 * f64::from(pixel[0]) + 0.587 * f64::from(pixel[1]) + 0.114 * f64::from(pixel[2]);
        *pixel = colour.map(|new| (grey * (1.0 - opacity) + new * opacity).round() as u8);
    }
    write_atomically(path, |file| {
        let failed = |e: png::EncodingError| Error::file(path, format!("cannot be written: {e}"));
        let mut encoder = png::Encoder::new(file, width as u32, height as u32);
        encoder.set_color(png::ColorType::Rgb);
        let mut writer = encoder.write_header().map_err(failed)?;
        writer.write_image_data(&picture.pixels).map_err(failed)?;
        writer.finish().map_err(failed)
    })
}

/// A row a patch: patch (its number in the file of features, from 0), scale, x, y and side in
/// pixels of level 0, score.
pub fn write_csv(path: &Path, layers: &[Layer]) -> Result<()> {
    let mut table = String::from("patch,scale,x,y,side,score\n");
    for layer in layers {
        for (i, ([x, y], score)) in layer.corners.iter().zip(&layer.scores).enumerate() {
            // a String takes whatever is written
            let _ = writeln!(table, "{i},{},{x},{y},{},{score}", layer.scale, layer.side);
        }
    }
    write_text(path, &table)
}

/// QuPath's objects: a FeatureCollection of tiles, each with a measurement `name`, and a class of
/// its scale (qupath.lib.io.QuPathTypeAdapters reads `objectType`, `classification`,
/// `measurements`).
pub fn write_geojson(path: &Path, layers: &[Layer], name: &str) -> Result<()> {
    let tile = |layer: &Layer, [x, y]: [i64; 2], score: f64| {
        let (right, bottom) = (x + layer.side, y + layer.side);
        let colour = [[26, 152, 80], [84, 39, 136], [217, 95, 2]][layer.scale as usize];
        json!({
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]]},
            "properties": {
                "objectType": "tile",
                "classification": {"name": layer.scale.name(), "color": colour},
                "measurements": {name: score},
            },
        })
    };
    let tiles = layers.iter().flat_map(|layer| {
        layer.corners.iter().zip(&layer.scores).map(move |(&corner, &score)| tile(layer, corner, score))
    });
    // a tile has some 300 bytes, and a slide may have a million
    write_atomically(path, |file| {
        let mut between = "{\"type\": \"FeatureCollection\", \"features\": [\n";
        let write = || -> std::io::Result<()> {
            for tile in tiles {
                write!(file, "{between}{tile}")?;
                between = ",\n";
            }
            file.write_all(b"\n]}\n")
        };
        write().map_err(|e| Error::file(path, format!("cannot be written: {e}")))
    })
}

/// Squares of the slide, at most so many, whose patches of all scales are taken out together: each
/// has a side of a whole number of the largest patches. A patch belongs to the square that its
/// centre is in; the numbers are those of its layer's patches, in the order of the layers.
pub fn squares(layers: &[Layer], most: usize) -> Vec<Vec<Vec<usize>>> {
    let largest = layers.iter().map(|layer| layer.side).max().unwrap_or(1);
    let square = |layer: &Layer, corner: &[i64; 2], side: i64| corner.map(|x| (x + layer.side / 2).div_euclid(side));
    let found = |side: i64| -> BTreeSet<[i64; 2]> {
        let of = |layer| layer_corners(layer).map(move |corner| square(layer, corner, side));
        layers.iter().flat_map(of).collect()
    };
    let side = (1..).map(|n| n * largest).find(|&side| found(side).len() <= most.max(1)).unwrap_or(largest);
    let in_square = |place: &[i64; 2]| {
        let of = |layer: &Layer| {
            let inside = layer_corners(layer).enumerate().filter(|(_, corner)| square(layer, corner, side) == *place);
            inside.map(|(i, _)| i).collect()
        };
        layers.iter().map(of).collect()
    };
    found(side).iter().map(in_square).collect()
}

fn layer_corners(layer: &Layer) -> impl Iterator<Item = &[i64; 2]> {
    layer.corners.iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(scale: Scale, side: i64, across: i64) -> Layer {
        let corners: Vec<_> = (0..across * across).map(|i| [i % across * side, i / across * side]).collect();
        Layer { scale, side, scores: vec![1.0; corners.len()], corners }
    }

    #[test]
    fn squares_hold_every_patch_once() {
        let layers = [layer(Scale::X5, 1024, 5), layer(Scale::X20, 256, 20)];
        for most in [1, 4, 9, 25, 1000] {
            let squares = squares(&layers, most);
            assert!(squares.len() <= most);
            for (i, layer) in layers.iter().enumerate() {
                let mut all: Vec<_> = squares.iter().flat_map(|square| square[i].clone()).collect();
                all.sort_unstable();
                assert_eq!(all, (0..layer.corners.len()).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn the_side_of_a_grid_is_its_smallest_step() {
        assert_eq!(side_of_grid(&[[0, 0], [512, 0], [0, 256], [300, 7]]), Some(256));
        assert_eq!(side_of_grid(&[[0, 0]]), None);
    }
}
