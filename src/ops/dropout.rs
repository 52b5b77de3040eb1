//! Dropout by counter: an element's fate is a pure function of (seed, step, site, row, column), so
//! that no mask is stored, the backward pass draws it again, and every device draws the same one.
//!
//! Generator: Philox4x32 with 7 rounds (Salmon et al., Parallel random numbers: as easy as 1, 2, 3,
//! SC 2011; 7 rounds pass BigCrush, table 2). Counter (call, row, site, step), key = seed. One call
//! gives eight 16-bit draws. The columns of a row are drawn in blocks of 32: call `4 * (col / 32) +
//! col / 2 % 4`, word `col / 8 % 4`, half `col % 2`. That is the order in which one thread of a
//! tensor-core fragment holds a row's columns, so that a GPU thread uses all that it draws.
//!
//! An element is dropped when its draw is below `rate * 65536` (rounded); the rest are divided by
//! the exact keep probability.

use crate::{
    Error, Result,
    device::{Device, Real},
};

/// Highest rate of dropout.
pub const MOST_DROPOUT: f64 = 0.95;

const ROUNDS: u32 = 7;
/// Columns drawn at a time on the CPU: 16 calls side by side, one in each lane of a vector
/// register.
pub(crate) const BLOCK: usize = 128;

/// Which draws a forward pass makes: the run's seed and a number that no two slides of a run share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// The run's seed.
    pub seed: u64,
    /// A number that no two slides of a run share.
    pub step: u32,
}

/// Dropout of one tensor.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// The pass's draws.
    pub draw: Draw,
    /// Tells the model's dropouts (and attention's heads) apart.
    pub site: u32,
    threshold: u32,
    /// Row of the whole tensor that row 0 of the tensor at hand is.
    first_row: u32,
    /// Where a kernel reads a seed and a step that hold instead of `draw`'s; 0: nowhere.
    draw_at: u64,
}

impl Dropout {
    /// Dropout at a rate from 0 to 0.95, None where nothing is dropped. `site` tells an engine's
    /// dropouts apart; attention's heads take as many sites as there are heads.
    pub fn with_rate(draw: Draw, site: u32, rate: f64) -> Result<Option<Self>> {
        if !(0.0..=MOST_DROPOUT).contains(&rate) {
            return Err(Error::Usage(format!("dropout at a rate of {rate}: expected one from 0 to {MOST_DROPOUT}")));
        }
        Ok(Self::new(Some(draw), site, rate))
    }

    /// None where nothing is dropped. `rate` is in [0, 1).
    pub(crate) fn new(draw: Option<Draw>, site: u32, rate: f64) -> Option<Self> {
        let threshold = (rate * 65536.0).round() as u32;
        draw.filter(|_| threshold > 0).map(|draw| Self { draw, site, threshold, first_row: 0, draw_at: 0 })
    }

    /// The same tensor's dropout at another site, for attention's heads; sites wrap at 2^32.
    pub fn at(self, offset: u32) -> Self {
        Self { site: self.site.wrapping_add(offset), ..self }
    }

    /// The same dropout, of a seed and a step (below 2^32) that are read when the op runs from
    /// memory of its device. A captured CUDA graph that is launched again draws anew if they have
    /// been changed meanwhile; seed and step as numbers would be the capture's for ever.
    ///
    /// # Safety
    /// `address` is a multiple of 8, of two numbers of the device that live until the work is done.
    pub unsafe fn with_draw_at(self, address: *const [u64; 2]) -> Self {
        Self { draw_at: address as u64, ..self }
    }

    /// What the op at hand takes: on a CPU the seed and the step as they are now.
    pub(crate) fn for_device(self, device: &Device) -> Self {
        if self.draw_at == 0 || device.runs_kernels() {
            return self;
        }
        // SAFETY: `with_draw_at` has the caller's word.
        let [seed, step] = unsafe { *(self.draw_at as *const [u64; 2]) };
        Self { draw: Draw { seed, step: step as u32 }, draw_at: 0, ..self }
    }

    /// The dropout of the rows from `row` on, where they stand as a tensor of their own.
    pub(crate) fn starting_at(self, row: usize) -> Self {
        Self { first_row: self.first_row + row as u32, ..self }
    }

    /// 1 / (probability of being kept).
    pub(crate) fn scale(self) -> f64 {
        65536.0 / f64::from(65536 - self.threshold)
    }

    /// The factors, 0 or [`Dropout::scale`], of columns `block * 128 ..` of a row.
    #[inline(always)]
    pub(crate) fn factors<T: Real>(self, row: usize, block: usize, out: &mut [T; BLOCK]) {
        let scale = T::of(self.scale());
        let words = philox_x16(self.draw, self.site, self.first_row + row as u32, (block * 16) as u32);
        // Lane c of word w holds columns 32 (c / 4) + 8 w + 2 (c % 4) and the next.
        for (w, word) in words.iter().enumerate() {
            for (c, &bits) in word.iter().enumerate() {
                let col = c / 4 * 32 + w * 8 + c % 4 * 2;
                out[col] = if bits & 0xffff >= self.threshold { scale } else { T::ZERO };
                out[col + 1] = if bits >> 16 >= self.threshold { scale } else { T::ZERO };
            }
        }
    }

    /// Multiplies row `row` of a tensor by its factors.
    #[inline(always)]
    pub(crate) fn apply<T: Real>(self, row: usize, values: &mut [T]) {
        for (block, values) in values.chunks_mut(BLOCK).enumerate() {
            self.apply_block(row, block, values);
        }
    }

    /// Multiplies columns `block * 128 ..` of a row by their factors, at most 128 of them.
    #[inline(always)]
    pub(crate) fn apply_block<T: Real>(self, row: usize, block: usize, values: &mut [T]) {
        let mut factors = [T::ZERO; BLOCK];
        self.factors(row, block, &mut factors);
        for (v, &f) in values.iter_mut().zip(&factors) {
            *v *= f;
        }
    }
}

/// Sixteen calls with consecutive call numbers; `[word][call]`.
#[inline(always)]
fn philox_x16(draw: Draw, site: u32, row: u32, call: u32) -> [[u32; 16]; 4] {
    let mut c = [[0u32; 16], [row; 16], [site; 16], [draw.step; 16]];
    for (lane, c0) in c[0].iter_mut().enumerate() {
        *c0 = call + lane as u32;
    }
    rounds(c, [draw.seed as u32, (draw.seed >> 32) as u32], ROUNDS)
}

#[inline(always)]
fn rounds(mut c: [[u32; 16]; 4], mut key: [u32; 2], rounds: u32) -> [[u32; 16]; 4] {
    for _ in 0..rounds {
        let old = c;
        for l in 0..16 {
            let (p0, p1) = (u64::from(old[0][l]) * 0xD251_1F53, u64::from(old[2][l]) * 0xCD9E_8D57);
            c[0][l] = (p1 >> 32) as u32 ^ old[1][l] ^ key[0];
            c[1][l] = p1 as u32;
            c[2][l] = (p0 >> 32) as u32 ^ old[3][l] ^ key[1];
            c[3][l] = p0 as u32;
        }
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// A [`Dropout`] as kernels take it (`Dropout` of kernels/dropout.cuh); a threshold of 0 drops
/// nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct KernelDropout {
    pub seed: u64,
    pub step: u32,
    pub site: u32,
    pub threshold: u32,
    pub scale: f32,
    pub first_row: u32,
    padding: u32,
    draw: u64,
}

impl From<Option<Dropout>> for KernelDropout {
    fn from(dropout: Option<Dropout>) -> Self {
        dropout.map_or(bytemuck::Zeroable::zeroed(), |d| Self {
            seed: d.draw.seed,
            step: d.draw.step,
            site: d.site,
            threshold: d.threshold,
            scale: d.scale() as f32,
            first_row: d.first_row,
            padding: 0,
            draw: d.draw_at,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers of Random123's kat_vectors file.
    #[test]
    fn philox_known_answers() {
        let zero = rounds([[0; 16]; 4], [0, 0], 10);
        assert_eq!(zero.map(|w| w[7]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        let ones = rounds([[!0; 16]; 4], [!0, !0], 10);
        assert_eq!(ones.map(|w| w[3]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        let seven = rounds([[0; 16]; 4], [0, 0], 7);
        assert_eq!(seven.map(|w| w[0]), [0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48]);
    }

    #[test]
    fn keeps_the_stated_share_and_scales_it() {
        let dropout = Dropout::new(Some(Draw { seed: 1, step: 2 }), 3, 0.3).unwrap();
        let (mut kept, mut row) = (0.0, vec![0.0; 512]);
        for i in 0..1000 {
            row.fill(1.0f64);
            dropout.apply(i, &mut row);
            kept += row.iter().sum::<f64>();
            assert!(row.iter().all(|&v| v == 0.0 || v == dropout.scale()));
        }
        // mean 1, standard deviation sqrt(0.3 / 0.7 / 512000) = 0.0009
        assert!((kept / 512_000.0 - 1.0).abs() < 0.004, "{kept}");
    }

    #[test]
    fn a_part_of_the_rows_draws_the_same() {
        let dropout = Dropout::new(Some(Draw { seed: 3, step: 1 }), 2, 0.5).unwrap();
        let (mut whole, mut part) = (vec![1.0f32; 64], vec![1.0f32; 64]);
        dropout.apply(105, &mut whole);
        dropout.starting_at(60).starting_at(40).apply(5, &mut part);
        assert_eq!(whole, part);
    }

    #[test]
    fn a_shorter_row_draws_the_same() {
        let dropout = Dropout::new(Some(Draw { seed: 9, step: 0 }), 0, 0.5).unwrap();
        let (mut long, mut short) = (vec![1.0f32; 300], vec![1.0f32; 137]);
        dropout.apply(5, &mut long);
        dropout.apply(5, &mut short);
        assert_eq!(long[..137], short[..]);
        assert!(Dropout::new(None, 0, 0.5).is_none());
    }
}
