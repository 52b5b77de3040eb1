//! The machine's fused-multiply-add ceiling, measured: what every CPU figure is a fraction of.

use std::{hint::black_box, time::Instant};

use pulp::Simd;

use super::{Cpu, Kernel, Real};

const CHAINS: usize = 12;
const STEPS: usize = 1 << 16;

/// Larger than any cache: 256 MiB read, 256 MiB written.
const COPY: usize = 32 << 20;

/// Independent chains of multiply-adds that live in registers.
struct Chains<T>(std::marker::PhantomData<T>);

impl<T: Real> Kernel for Chains<T> {
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, _: usize) {
        let (a, b) = (T::splat(simd, black_box(T::of(0.999))), T::splat(simd, black_box(T::of(0.001))));
        let mut sums = [b; CHAINS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = T::mul_add(simd, a, *sum, b);
            }
        }
        black_box(sums);
    }
}

impl Cpu {
    /// Floating-point operations a second of all threads together, the best of `repeats` short
    /// runs.
    pub fn fma_peak<T: Real>(&self, repeats: usize) -> f64 {
        let tasks = 16 * self.threads();
        let flop = (2 * tasks * STEPS * CHAINS * (self.panel_width::<T>() / 2)) as f64;
        let run = |_| {
            let start = Instant::now();
            self.parallel_kernel(tasks, &Chains::<T>(std::marker::PhantomData));
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
