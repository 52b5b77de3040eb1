//! The ops of a training step: plain functions over views, forward and backward, checked for
//! shapes.
//!
//! Activation gradients overwrite, parameter gradients accumulate; an exception is in the
//! function's name or its docs.

pub mod adam;
pub(crate) mod attention;
pub(crate) mod conv_fusion;
pub mod cox;
mod depthwise;
pub(crate) mod dropout;
pub(crate) mod elementwise;
pub(crate) mod gelu;
pub mod head;
pub(crate) mod layer_norm;
pub(crate) mod matmul;
pub(crate) mod ppeg;
mod public;
pub(crate) mod scale_embedding;

pub use dropout::{Draw, Dropout, MOST_DROPOUT};
pub use public::*;

use crate::device::Cpu;

/// Numbers of the kernels that their launches must know, by source file; build.rs reads them there.
#[allow(dead_code)]
mod constants {
    include!(concat!(env!("OUT_DIR"), "/constants.rs"));
}

/// The version of the kernels' names, grids and parameters (docs/launching.md), for engines that
/// launch the fatbins on their own.
pub const KERNELS_VERSION: usize = constants::gpu::ABI_VERSION;

/// Multiprocessors of a large GPU (an H100), which launches should fill. Not of the GPU at hand:
/// sums are split by it, and have the same order everywhere.
const MULTIPROCESSORS: usize = 132;

/// Rows that one task of a row-wise op takes.
const ROWS_PER_TASK: usize = 64;

/// Runs `row(0) .. row(rows - 1)` on all threads; mark the closure `#[inline(always)]`, see
/// [`Cpu::parallel`].
#[inline(always)]
fn for_rows(cpu: &Cpu, rows: usize, row: impl Fn(usize) + Sync) {
    cpu.parallel(
        rows.div_ceil(ROWS_PER_TASK),
        #[inline(always)]
        |task| {
            for i in task * ROWS_PER_TASK..rows.min((task + 1) * ROWS_PER_TASK) {
                row(i);
            }
        },
    );
}
