//! PPEG, the positional encoding of TransMIL (Shao et al. 2021, sec. 3.3): y = x + conv7(x) +
//! conv5(x) + conv3(x), depthwise with zero padding on the tokens' square grid. Rows before the
//! grid (the class token, if there is one) pass through.
//!
//! Shapes: x, y `[first + side^2, c]`; kernels `[c, 49]`, `[c, 25]`, `[c, 9]`; biases `[1, c]`.
//! Saved: x.

pub(crate) mod kernel;

use kernel::{KernelPpeg, KernelPpegGrad};

use super::{
    depthwise::{self, Grid},
    for_rows,
    matmul::column_sums,
};
use crate::{
    Result,
    device::{Arena, Cpu, Device, Element, View, round, storage},
};

/// Kernel sides, in the checkpoint's order proj, proj1, proj2.
pub(crate) const SIDES: [usize; 3] = [7, 5, 3];

#[derive(Clone, Copy)]
pub(crate) struct Ppeg<T> {
    pub x: View<T>,
    pub y: View<T>,
    pub side: usize,
    pub kernels: [View<T>; 3],
    pub biases: [View<T>; 3],
}

#[derive(Clone, Copy)]
pub(crate) struct PpegGrad<T: Element> {
    pub x: View<T>,
    pub dy: View<T>,
    pub dx: View<T>,
    pub side: usize,
    pub kernels: [View<T>; 3],
    pub dkernels: [View<T::Sum>; 3],
    pub dbiases: [View<T::Sum>; 3],
}

fn check<T: Element, P: Element>(
    op: &'static str,
    (x, y): (View<T>, View<T>),
    side: usize,
    kernels: &[View<P>; 3],
    biases: &[View<P>; 3],
) -> Result<()> {
    let c = x.cols();
    Grid::square(side).check(op)?;
    y.check(op, "y", &[x.rows(), c])?;
    x.check(op, "x", &[x.rows().max(side * side), c])?;
    for i in 0..3 {
        kernels[i].check(op, "kernel", &[c, SIDES[i] * SIDES[i]])?;
        biases[i].check(op, "bias", &[1, c])?;
    }
    Ok(())
}

fn flop(side: usize, c: usize) -> f64 {
    2.0 * 49.0 * (side * side * c) as f64
}

pub(crate) fn forward<T: Element>(device: &Device, arena: &mut Arena, problems: &[Ppeg<T>]) -> Result<()> {
    for p in problems {
        check("ppeg forward", (p.x, p.y), p.side, &p.kernels, &p.biases)?;
        device.count(flop(p.side, p.x.cols()));
    }
    device.run_with_scratch(
        arena,
        |arena| {
            let merged = scratch::<T>(arena, problems.iter().map(|p| p.x))?;
            Ok(move |cpu: &Cpu| problems.iter().for_each(|p| cpu_forward(cpu, p, merged.cols_range(0..p.x.cols()))))
        },
        |_| {
            for p in problems {
                p.x.check_for_kernels("ppeg forward", "x")?;
                p.y.check_for_kernels("ppeg forward", "y")?;
            }
            let kernels: Vec<_> = problems.iter().map(KernelPpeg::from).collect();
            Ok(kernel::forward_launches(storage::<T>()?, &kernels))
        },
    )
}

/// dx =, kernel and bias gradients +=.
pub(crate) fn backward<T: Element>(device: &Device, arena: &mut Arena, problems: &[PpegGrad<T>]) -> Result<()> {
    const OP: &str = "ppeg backward";
    for p in problems {
        check(OP, (p.x, p.dx), p.side, &p.dkernels, &p.dbiases)?;
        p.dy.check(OP, "dy", &[p.x.rows(), p.x.cols()])?;
        for (kernel, side) in p.kernels.iter().zip(SIDES) {
            kernel.check(OP, "kernel", &[p.x.cols(), side * side])?;
        }
        device.count(2.0 * flop(p.side, p.x.cols()));
    }
    device.run_with_scratch(
        arena,
        |arena| {
            let merged = scratch::<T>(arena, problems.iter().map(|p| p.x))?;
            let flipped = scratch::<T>(arena, problems.iter().map(|p| p.x))?;
            let of = |kernel: View<T::Sum>, p: &PpegGrad<T>| kernel.cols_range(0..p.x.cols());
            Ok(move |cpu: &Cpu| problems.iter().for_each(|p| cpu_backward(cpu, p, of(merged, p), of(flipped, p))))
        },
        |arena| {
            let kernel = |p: &PpegGrad<T>| {
                p.x.check_for_kernels(OP, "x")?;
                p.dy.check_for_kernels(OP, "dy")?;
                p.dx.check_for_kernels(OP, "dx")?;
                let partial = arena.scratch::<f32>(1, kernel::partial_len(p.side, p.x.cols()))?;
                Ok(KernelPpegGrad { partial: partial.address(), ..p.into() })
            };
            let kernels = problems.iter().map(kernel).collect::<Result<Vec<_>>>()?;
            Ok(kernel::backward_launches(storage::<T>()?, &kernels))
        },
    )
}

/// A merged kernel `[49, c]`, for the most channels of any problem.
fn scratch<T: Element>(arena: &mut Arena, problems: impl Iterator<Item = View<T>>) -> Result<View<T::Sum>> {
    arena.scratch(Grid::square(0).taps(), problems.map(View::cols).max().unwrap_or(0))
}

/// `merged`: scratch for the merged kernel.
fn cpu_forward<T: Element>(cpu: &Cpu, p: &Ppeg<T>, merged: View<T::Sum>) {
    let (grid, first) = (Grid::square(p.side), p.x.rows() - p.side * p.side);
    depthwise::merge(grid, &sided(p.kernels), true, merged);
    let tokens = p.x.rows_range(first..p.x.rows());
    for_rows(
        cpu,
        p.x.rows(),
        #[inline(always)]
        |i| {
            // SAFETY: the views are live, and each row of y is one task's.
            unsafe {
                let y = p.y.row_mut(i);
                if i < first {
                    y.copy_from_slice(p.x.row(i));
                    return;
                }
                let [b0, b1, b2] = p.biases.map(|b| b.row(0));
                depthwise::convolve(
                    grid,
                    tokens,
                    merged,
                    i - first,
                    #[inline(always)]
                    |c, sums| {
                        for (j, &sum) in (c..).zip(sums) {
                            y[j] = T::from_sum(sum + (b0[j].to_sum() + b1[j].to_sum() + b2[j].to_sum()));
                        }
                    },
                );
            }
        },
    );
}

/// Scratch: the merged kernel and its mirror image.
fn cpu_backward<T: Element>(cpu: &Cpu, p: &PpegGrad<T>, merged: View<T::Sum>, flipped: View<T::Sum>) {
    let (grid, first) = (Grid::square(p.side), p.x.rows() - p.side * p.side);
    depthwise::merge(grid, &sided(p.kernels), true, merged);
    depthwise::flip(merged, flipped);
    let (x, dy) = (p.x.rows_range(first..p.x.rows()), p.dy.rows_range(first..p.dy.rows()));
    for_rows(
        cpu,
        p.x.rows(),
        #[inline(always)]
        |i| {
            // SAFETY: the views are live, and each row of dx is one task's.
            unsafe {
                let dx = p.dx.row_mut(i);
                if i < first {
                    dx.copy_from_slice(p.dy.row(i));
                } else {
                    depthwise::convolve(
                        grid,
                        dy,
                        flipped,
                        i - first,
                        #[inline(always)]
                        |c, sums| round(sums, &mut dx[c..c + sums.len()]),
                    );
                }
            }
        },
    );
    depthwise::kernel_gradient(cpu, grid, x, dy, merged);
    depthwise::unmerge(grid, merged, &sided(p.dkernels));
    column_sums(cpu, &p.dbiases.map(|db| (dy, db)));
}

fn sided<T: Element>(kernels: [View<T>; 3]) -> [(usize, View<T>); 3] {
    [0, 1, 2].map(|i| (SIDES[i], kernels[i]))
}
