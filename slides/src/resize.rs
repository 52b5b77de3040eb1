//! Antialiased resizing as Pillow does it, bit for bit: `Image.resize((size, size), filter)` of
//! images of three bytes a pixel (tests/pil.rs). The filter is stretched over the pixels that one
//! pixel of the result covers; rows come first, then columns, each in fixed point and rounded to
//! bytes.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use serde::{Deserialize, Serialize};

use crate::slide::Image;

/// Which pixels count how much.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Filter {
    /// A triangle.
    Bilinear,
    /// Keys' cubic with a = -0.5.
    Bicubic,
}

/// Bits behind the point of a weight: a byte, its sign and a sum's carry leave 22 of 32.
const PRECISION: u32 = 22;

impl Filter {
    /// How far the filter reaches, in pixels.
    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, at: f64) -> f64 {
        let x = at.abs();
        match self {
            Self::Bilinear if x < 1.0 => 1.0 - x,
            Self::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
            _ => 0.0,
        }
    }
}

/// The pixels that make one pixel of the result, and their weights.
struct Taps {
    from: Range<usize>,
    weights: Vec<i32>,
}

fn taps(from: usize, to: usize, filter: Filter) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let of_pixel = |pixel: usize| {
        let centre = (pixel as f64 + 0.5) * scale;
        // truncated, and the lower end not below 0
        let start = (centre - support + 0.5).max(0.0) as usize;
        let end = ((centre + support + 0.5) as usize).min(from);
        let weights: Vec<f64> =
            (start..end).map(|x| filter.weight((x as f64 - centre + 0.5) * (1.0 / stretch))).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |weight: &f64| {
            let weight = weight / sum * f64::from(1 << PRECISION);
            (if weight < 0.0 { weight - 0.5 } else { weight + 0.5 }) as i32
        };
        Taps { from: start..end, weights: weights.iter().map(fixed).collect() }
    };
    (0..to).map(of_pixel).collect()
}

/// The image in another size; itself where that is its own.
pub fn resize(mut image: Image, width: usize, height: usize, filter: Filter) -> Image {
    let arch = pulp::Arch::new();
    if image.width != width {
        let taps = taps(image.width, width, filter);
        image = transpose(&arch.dispatch(Columns { image: &transpose(&image), taps: &taps }));
    }
    if image.height != height {
        let taps = taps(image.height, height, filter);
        image = arch.dispatch(Columns { image: &image, taps: &taps });
    }
    image
}

/// The pass along columns, which works on whole rows; along rows it is run on the transposed image,
/// since vectors across a row's few taps would be half empty. It is compiled for the widest vectors
/// that the CPU has.
struct Columns<'a> {
    image: &'a Image,
    taps: &'a [Taps],
}

impl WithSimd for Columns<'_> {
    type Output = Image;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Image {
        let line = 3 * self.image.width;
        let mut pixels = vec![0; line * self.taps.len()];
        let mut sums = vec![0i32; line];
        for (Taps { from, weights }, out) in self.taps.iter().zip(pixels.chunks_exact_mut(line)) {
            sums.fill(1 << (PRECISION - 1));
            let rows = self.image.pixels[line * from.start..line * from.end].chunks_exact(line);
            for (row, &weight) in rows.zip(weights) {
                for (sum, &x) in sums.iter_mut().zip(row) {
                    *sum += i32::from(x) * weight;
                }
            }
            for (out, &sum) in out.iter_mut().zip(&sums) {
                *out = (sum >> PRECISION).clamp(0, 255) as u8;
            }
        }
        Image { width: self.image.width, height: self.taps.len(), pixels }
    }
}

/// Side of the squares that are transposed at once, so that what is read and written stays in
/// cache.
const SQUARE: usize = 32;

fn transpose(image: &Image) -> Image {
    let (width, height) = (image.width, image.height);
    let from = image.pixels.as_chunks::<3>().0;
    let mut pixels = vec![0; image.pixels.len()];
    let to = pixels.as_chunks_mut::<3>().0;
    for top in (0..height).step_by(SQUARE) {
        for left in (0..width).step_by(SQUARE) {
            for x in left..(left + SQUARE).min(width) {
                for y in top..(top + SQUARE).min(height) {
                    to[x * height + y] = from[y * width + x];
                }
            }
        }
    }
    Image { width: height, height: width, pixels }
}
