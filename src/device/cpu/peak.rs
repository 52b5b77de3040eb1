//! The machine's multiply-add ceiling, measured: what every CPU figure is a fraction of.

use std::{hint::black_box, marker::PhantomData, time::Instant};

use pulp::Simd;

use super::{
    Cpu, Kernel, Real,
    factor::Factor,
    tile::{self, Lhs, Rhs},
};
use crate::device::Element;

const STEPS: usize = 1 << 16;

/// Larger than any cache: 256 MiB read, 256 MiB written.
const COPY: usize = 32 << 20;

/// The register block of the matrix kernel over one factor of A and one row of B, again and again: its
/// sums live in registers, and its loads come from the nearest cache.
struct Block<F>(PhantomData<F>);

impl<F: Factor> Kernel for Block<F> {
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, _: usize) {
        let (a, b) = (black_box([F::zeroed()]), black_box([F::zeroed(); tile::MAX_PANEL]));
        let mut c = [F::Sum::ZERO; tile::ROWS * tile::MAX_PANEL];
        let (m, n) = (tile::ROWS, F::width::<S>());
        let a = Lhs { ptr: a.as_ptr(), sliver: 0, row: 0, col: 0 };
        let b = Rhs { ptr: b.as_ptr(), panel: 0, row: 0 };
        // SAFETY: every step reads the one factor and the one row, and c holds a block.
        unsafe { tile::multiply(simd, (m, n, STEPS), a, b, c.as_mut_ptr(), tile::MAX_PANEL, false) };
        black_box(c);
    }
}

impl Cpu {
    /// Operations a second of all threads together, multiplying what is stored as `T`: the best of
    /// `repeats` short runs.
    pub fn peak<T: Element>(&self, repeats: usize) -> f64 {
        if self.has_dots() { self.peak_of::<T::Dot>(repeats) } else { self.peak_of::<T::Sum>(repeats) }
    }

    fn peak_of<F: Factor>(&self, repeats: usize) -> f64 {
        let tasks = 16 * self.threads();
        let flop = (2 * tasks * STEPS * F::DEPTH * tile::ROWS * self.panel_width::<F>()) as f64;
        let run = |_| {
            let start = Instant::now();
            self.parallel_kernel(tasks, &Block::<F>(PhantomData));
            flop / start.elapsed().as_secs_f64()
        };
        (0..repeats).map(run).fold(0.0, f64::max)
    }

    /// Bytes a second of a large copy by all threads, read plus written, the best of `repeats`
    /// after one that takes the pages.
    pub fn copy_rate(&self, repeats: usize) -> f64 {
        let (from, mut to) = (vec![1u64; COPY], vec![0u64; COPY]);
        let part = COPY.div_ceil(4 * self.threads());
        let mut run = || {
            let start = Instant::now();
            self.install(|| {
                use rayon::prelude::*;
                to.par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(to, from)| to.copy_from_slice(from));
            });
            black_box(&to);
            (2 * COPY * size_of::<u64>()) as f64 / start.elapsed().as_secs_f64()
        };
        run();
        (0..repeats).map(|_| run()).fold(0.0, f64::max)
    }
}
