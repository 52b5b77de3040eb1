//! Pictures that show at a glance what was taken for tissue, and where the patches are.

use std::path::Path;

use crossfusion::{Error, Result, data::atomic::write_atomically};
use jpeg_encoder::{ColorType, Encoder};

use crate::{
    slide::{Image, Level},
    tissue::Tissue,
};

/// The longer side is at most so many pixels.
const MOST: usize = 1600;

/// Outlines of tissue are green, those of holes are blue, as CLAM draws them; patches have thin
/// black frames.
const TISSUE: [u8; 3] = [0, 200, 0];
const HOLE: [u8; 3] = [0, 0, 255];
const PATCH: [u8; 3] = [0, 0, 0];

/// The slide with the outlines of its tissue and the frames of its patches, whose corners and side
/// are in pixels of level 0.
pub fn draw(tissue: &Tissue, level_0: Level, patches: &[[i64; 2]], size: i64) -> Image {
    let factor = tissue.image.width.max(tissue.image.height).div_ceil(MOST);
    let mut picture = shrink(&tissue.image, factor);
    let to_picture = [picture.width as f64 / level_0.width as f64, picture.height as f64 / level_0.height as f64];
    let place = |x: i64, y: i64| [(x as f64 * to_picture[0]) as i64, (y as f64 * to_picture[1]) as i64];
    for &[x, y] in patches {
        let ([left, top], [right, bottom]) = (place(x, y), place(x + size, y + size));
        (left..=right).for_each(|x| [top, bottom].into_iter().for_each(|y| mix(&mut picture, x, y, PATCH, 0.5)));
        (top + 1..bottom).for_each(|y| [left, right].into_iter().for_each(|x| mix(&mut picture, x, y, PATCH, 0.5)));
    }
    let holes = tissue.areas.iter().flat_map(|area| &area.holes).map(|points| (points, HOLE));
    for (points, colour) in tissue.areas.iter().map(|area| (&area.border, TISSUE)).chain(holes) {
        for point in points {
            let [x, y] = place(point.x.into(), point.y.into());
            for [i, j] in [[0, 0], [1, 0], [0, 1], [1, 1]] {
                mix(&mut picture, x + i, y + j, colour, 1.0);
            }
        }
    }
    picture
}

/// Writes an image as JPEG.
pub fn write_jpeg(path: &Path, image: &Image) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| Error::file(path, format!("cannot be written: {e}"));
    let side = |pixels: usize| u16::try_from(pixels).map_err(|e| failed(&e));
    write_atomically(path, |file| {
        let encoder = Encoder::new(file, 85);
        encoder.encode(&image.pixels, side(image.width)?, side(image.height)?, ColorType::Rgb).map_err(|e| failed(&e))
    })
}

/// The image smaller by a whole factor: means of squares.
fn shrink(image: &Image, factor: usize) -> Image {
    let (width, height) = ((image.width / factor).max(1), (image.height / factor).max(1));
    let mut pixels = Vec::with_capacity(3 * width * height);
    let (across, down) = (factor.min(image.width), factor.min(image.height));
    for y in 0..height {
        for x in 0..width {
            for c in 0..3 {
                let square = (0..down).flat_map(|j| (0..across).map(move |i| [x * factor + i, y * factor + j]));
                let sum: usize = square.map(|[x, y]| usize::from(image.pixels[3 * (y * image.width + x) + c])).sum();
                pixels.push((sum / (across * down)) as u8);
            }
        }
    }
    Image { width, height, pixels }
}

/// Paints a pixel; what lies outside of the image is left out.
fn mix(image: &mut Image, x: i64, y: i64, colour: [u8; 3], opacity: f64) {
    let (Ok(x), Ok(y)) = (usize::try_from(x), usize::try_from(y)) else { return };
    if x < image.width && y < image.height {
        let pixel = &mut image.pixels[3 * (y * image.width + x)..][..3];
        for (old, new) in pixel.iter_mut().zip(colour) {
            *old = (f64::from(*old) * (1.0 - opacity) + f64::from(new) * opacity) as u8;
        }
    }
}
