//! Antialiased resizing as Pillow does it, bit for bit: `Image.resize((size, size), filter)` of images
//! of three bytes a pixel (tests/pil.rs). The filter is stretched over the pixels that one pixel of
//! the result covers; rows come first, then columns, each in fixed point and rounded to bytes.

use std::ops::Range;

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
    // each pass is compiled for the widest vectors that this CPU has
    let arch = pulp::Arch::new();
    if image.width != width {
        let taps = taps(image.width, width, filter);
        image = arch.dispatch(|| rows(&image, &taps));
    }
    if image.height != height {
        let taps = taps(image.height, height, filter);
        image = arch.dispatch(|| columns(&image, &taps));
    }
    image
}

#[inline(always)]
fn rows(image: &Image, taps: &[Taps]) -> Image {
    let mut pixels = vec![0; 3 * taps.len() * image.height];
    let mut wide = vec![[0i32; 4]; image.width];
    for (row, out) in image.pixels.chunks_exact(3 * image.width).zip(pixels.chunks_exact_mut(3 * taps.len())) {
        for (pixel, wide) in row.as_chunks::<3>().0.iter().zip(&mut wide) {
            *wide = [pixel[0].into(), pixel[1].into(), pixel[2].into(), 0];
        }
        for (Taps { from, weights }, out) in taps.iter().zip(out.as_chunks_mut::<3>().0) {
            let mut sum = [1 << (PRECISION - 1); 4];
            for (pixel, &weight) in wide[from.clone()].iter().zip(weights) {
                for (sum, &x) in sum.iter_mut().zip(pixel) {
                    *sum += x * weight;
                }
            }
            *out = [byte(sum[0]), byte(sum[1]), byte(sum[2])];
        }
    }
    Image { width: taps.len(), height: image.height, pixels }
}

#[inline(always)]
fn columns(image: &Image, taps: &[Taps]) -> Image {
    let line = 3 * image.width;
    let mut pixels = vec![0; line * taps.len()];
    let mut sums = vec![0i32; line];
    for (Taps { from, weights }, out) in taps.iter().zip(pixels.chunks_exact_mut(line)) {
        sums.fill(1 << (PRECISION - 1));
        for (row, &weight) in image.pixels[line * from.start..line * from.end].chunks_exact(line).zip(weights) {
            for (sum, &x) in sums.iter_mut().zip(row) {
                *sum += i32::from(x) * weight;
            }
        }
        for (out, &sum) in out.iter_mut().zip(&sums) {
            *out = byte(sum);
        }
    }
    Image { width: image.width, height: taps.len(), pixels }
}

#[inline(always)]
fn byte(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}
