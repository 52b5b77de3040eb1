//! Images of one byte a pixel, and what CLAM does with them before it looks for outlines. Each
//! function gives what the OpenCV function named in its description gives, bit for bit
//! (tests/opencv.rs).

use crate::slide::Image;

/// An image of one byte a pixel, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plane {
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// `width * height` bytes.
    pub pixels: Vec<u8>,
}

/// Bits behind the point in OpenCV's table of reciprocals.
const SHIFT: u32 = 12;

/// The saturation of each pixel in the cone of hue, saturation and value: `cv2.cvtColor(image,
/// cv2.COLOR_RGB2HSV)[:, :, 1]`.
pub fn saturation(image: &Image) -> Plane {
    let reciprocals: Vec<u32> = (0..256u32)
        .map(|value| match value {
            0 => 0,
            _ => (f64::from(255 << SHIFT) / f64::from(value)).round_ties_even() as u32,
        })
        .collect();
    let of_pixel = |pixel: &[u8]| {
        let (low, high) = (pixel[0].min(pixel[1]).min(pixel[2]), pixel[0].max(pixel[1]).max(pixel[2]));
        ((u32::from(high - low) * reciprocals[usize::from(high)] + (1 << (SHIFT - 1))) >> SHIFT) as u8
    };
    let pixels = image.pixels.chunks_exact(3).map(of_pixel).collect();
    Plane { width: image.width, height: image.height, pixels }
}

/// The median of the square of side `size` around each pixel, the image's edge continued outwards:
/// `cv2.medianBlur(plane, size)`, for odd sizes.
///
/// The window slides along a row with a histogram of what it holds, whose median moves a little at
/// a time (Huang, Yang and Tang 1979).
pub fn median(plane: &Plane, size: usize) -> Plane {
    assert!(size % 2 == 1, "a median of {size} x {size} pixels has no middle");
    let (width, height, radius) = (plane.width, plane.height, size / 2);
    let mut pixels = Vec::with_capacity(plane.pixels.len());
    for y in 0..height {
        let rows: Vec<&[u8]> = (y..=y + 2 * radius)
            .map(|row| &plane.pixels[row.saturating_sub(radius).min(height - 1) * width..][..width])
            .collect();
        let mut window = Window::new(size * size / 2);
        for x in 0..size {
            rows.iter().for_each(|row| window.add(row[x.saturating_sub(radius).min(width - 1)]));
        }
        for x in 0..width {
            if x > 0 {
                let (left, right) = ((x - 1).saturating_sub(radius), (x + radius).min(width - 1));
                for row in &rows {
                    window.remove(row[left]);
                    window.add(row[right]);
                }
            }
            pixels.push(window.median());
        }
    }
    Plane { width, height, pixels }
}

/// A histogram that knows how many of its values lie below a guess of the median.
struct Window {
    counts: [u32; 256],
    guess: u8,
    below: u32,
    /// How many values lie before the median once they are sorted.
    rank: u32,
}

impl Window {
    fn new(rank: usize) -> Self {
        Self { counts: [0; 256], guess: 0, below: 0, rank: rank as u32 }
    }

    fn add(&mut self, value: u8) {
        self.counts[usize::from(value)] += 1;
        self.below += u32::from(value < self.guess);
    }

    fn remove(&mut self, value: u8) {
        self.counts[usize::from(value)] -= 1;
        self.below -= u32::from(value < self.guess);
    }

    fn median(&mut self) -> u8 {
        while self.below > self.rank {
            self.guess -= 1;
            self.below -= self.counts[usize::from(self.guess)];
        }
        while self.below + self.counts[usize::from(self.guess)] <= self.rank {
            self.below += self.counts[usize::from(self.guess)];
            self.guess += 1;
        }
        self.guess
    }
}

/// 255 where a pixel is above the threshold, else 0: `cv2.threshold(plane, threshold, 255,
/// cv2.THRESH_BINARY)`.
pub fn above(plane: &Plane, threshold: u8) -> Plane {
    let pixels = plane.pixels.iter().map(|&pixel| if pixel > threshold { 255 } else { 0 }).collect();
    Plane { pixels, ..*plane }
}

/// The threshold that parts the pixels into two classes of the largest variance between them (Otsu
/// 1979): what `cv2.threshold(plane, 0, 255, cv2.THRESH_OTSU)` chooses.
pub fn otsu(plane: &Plane) -> u8 {
    let mut counts = [0u32; 256];
    plane.pixels.iter().for_each(|&pixel| counts[usize::from(pixel)] += 1);
    let scale = 1.0 / plane.pixels.len() as f64;
    let mean = (0..256).map(|value| value as f64 * f64::from(counts[value])).sum::<f64>() * scale;
    // share and mean of the pixels at or below a value
    let (mut share, mut mean_below) = (0.0, 0.0);
    let (mut best, mut threshold) = (0.0, 0);
    for (value, count) in (0u8..=255).zip(counts) {
        let p = f64::from(count) * scale;
        mean_below *= share;
        share += p;
        let rest = 1.0 - share;
        if share.min(rest) < f64::from(f32::EPSILON) || share.max(rest) > 1.0 - f64::from(f32::EPSILON) {
            continue;
        }
        mean_below = (mean_below + f64::from(value) * p) / share;
        let mean_above = (mean - share * mean_below) / rest;
        let variance = share * rest * (mean_below - mean_above) * (mean_below - mean_above);
        if variance > best {
            (best, threshold) = (variance, value);
        }
    }
    threshold
}

/// Fills gaps narrower than a square of side `size`: `cv2.morphologyEx(plane, cv2.MORPH_CLOSE,
/// np.ones((size, size), np.uint8))`, whose square reaches from `size / 2` before a pixel to `(size
/// - 1) / 2` behind it. What lies outside of the image does not count.
pub fn close(plane: &Plane, size: usize) -> Plane {
    extreme(&extreme(plane, size, u8::max), size, u8::min)
}

/// The largest or smallest pixel of the square around each.
fn extreme(plane: &Plane, size: usize, choose: impl Fn(u8, u8) -> u8) -> Plane {
    let (width, height) = (plane.width, plane.height);
    let around = |at: usize, end: usize| at.saturating_sub(size / 2)..(at + size.div_ceil(2)).min(end);
    let mut along_rows = plane.clone();
    for (row, out) in plane.pixels.chunks_exact(width).zip(along_rows.pixels.chunks_exact_mut(width)) {
        for (x, out) in out.iter_mut().enumerate() {
            *out = row[around(x, width)].iter().fold(row[x], |a, &b| choose(a, b));
        }
    }
    let mut pixels = along_rows.pixels.clone();
    for (y, out) in pixels.chunks_exact_mut(width).enumerate() {
        for row in around(y, height) {
            let row = &along_rows.pixels[row * width..][..width];
            out.iter_mut().zip(row).for_each(|(a, &b)| *a = choose(*a, b));
        }
    }
    Plane { width, height, pixels }
}
