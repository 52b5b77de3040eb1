//! The ops of a training step: plain functions over views, forward and backward, checked for shapes.
//!
//! Activation gradients overwrite, parameter gradients accumulate; an exception is in the function's name or its docs.

pub mod adam;
pub mod attention;
pub mod conv_fusion;
pub mod cox;
mod depthwise;
pub mod dropout;
pub mod elementwise;
pub mod gelu;
pub mod head;
pub mod layer_norm;
pub mod matmul;
pub mod ppeg;
pub mod scale_embedding;

pub use dropout::{Draw, Dropout};

use crate::device::Cpu;

/// Rows that one task of a row-wise op takes.
const ROWS_PER_TASK: usize = 64;

/// Runs `row(0) .. row(rows - 1)` on all threads; mark the closure `#[inline(always)]`, see [`Cpu::parallel`].
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
