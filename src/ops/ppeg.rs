//! PPEG, the positional encoding of TransMIL (Shao et al. 2021, sec. 3.3): y = x + conv7(x) +
//! conv5(x) + conv3(x), depthwise with zero padding on the tokens' square grid. Rows before the
//! grid (the class token, if there is one) pass through.
//!
//! Shapes: x, y `[first + side^2, c]`; kernels `[c, 49]`, `[c, 25]`, `[c, 9]`; biases `[1, c]`.
//! Saved: x.

pub(crate) mod kernel;

use super::{
    depthwise::{self, Grid},
    for_rows,
    matmul::column_sums,
};
use crate::{
    Result,
    device::{Arena, Cpu, Device, Element, Real, View, on_cpu},
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
        if device.runs_kernels() {
            p.x.check_for_kernels("ppeg forward", "x")?;
            p.y.check_for_kernels("ppeg forward", "y")?;
        }
        device.count(flop(p.side, p.x.cols()));
    }
    if device.runs_kernels() {
        return kernel::forward(device, problems);
    }
    let mark = arena.mark();
    for p in problems {
        let merged = arena.scratch(Grid::square(p.side).taps(), p.x.cols())?;
        if let Some(cpu) = device.cpu() {
            cpu_forward::<T::Sum>(cpu, on_cpu(&[*p])?[0], merged);
        }
        arena.release_scratch(mark);
    }
    Ok(())
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
        if device.runs_kernels() {
            p.x.check_for_kernels(OP, "x")?;
            p.dy.check_for_kernels(OP, "dy")?;
            p.dx.check_for_kernels(OP, "dx")?;
        }
        device.count(2.0 * flop(p.side, p.x.cols()));
    }
    if device.runs_kernels() {
        return kernel::backward(device, arena, problems);
    }
    let mark = arena.mark();
    for p in problems {
        let taps = Grid::square(p.side).taps();
        let merged = [arena.scratch(taps, p.x.cols())?, arena.scratch(taps, p.x.cols())?];
        if let Some(cpu) = device.cpu() {
            cpu_backward::<T::Sum>(cpu, on_cpu(&[*p])?[0], merged);
        }
        arena.release_scratch(mark);
    }
    Ok(())
}

/// `merged`: scratch for the merged kernel.
fn cpu_forward<T: Real>(cpu: &Cpu, p: Ppeg<T>, merged: View<T>) {
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
                depthwise::convolve(grid, tokens, merged, i - first, y);
                let [b0, b1, b2] = p.biases.map(|b| b.row(0));
                for j in 0..y.len() {
                    y[j] += b0[j] + b1[j] + b2[j];
                }
            }
        },
    );
}

/// Scratch: the merged kernel and its mirror image.
fn cpu_backward<T: Real>(cpu: &Cpu, p: PpegGrad<T>, [merged, flipped]: [View<T>; 2]) {
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
                    depthwise::convolve(grid, dy, flipped, i - first, dx);
                }
            }
        },
    );
    depthwise::kernel_gradient(cpu, grid, x, dy, merged);
    depthwise::unmerge(grid, merged, &sided(p.dkernels));
    column_sums(cpu, &p.dbiases.map(|db| (dy, db)));
}

fn sided<T: Real>(kernels: [View<T>; 3]) -> [(usize, View<T>); 3] {
    [0, 1, 2].map(|i| (SIDES[i], kernels[i]))
}
