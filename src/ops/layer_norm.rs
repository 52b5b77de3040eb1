//! Layer normalisation (Ba et al. 2016): y = (x - mean) / sqrt(var + 1e-5) * weight + bias over each row.
//!
//! `forward` takes x `[n0, d]` to y `[n, d]` with n0 <= n <= 2 n0: rows from n0 on repeat the first ones, which is the model's padding
//! to a square; `backward` folds them back, since the op is row by row and linear in dy. Saved: x and the statistics
//! `[n0, 2]` = (mean, 1 / sqrt(var + eps)); y is recomputed from them by [`apply`].

use super::{ROWS_PER_TASK, for_rows, matmul::column_sums};
use crate::{
    Result,
    device::{
        Cpu, Device, Real, View,
        cpu::{real::sum, with_workspace},
    },
};

pub const EPSILON: f64 = 1e-5;

#[derive(Clone, Copy)]
pub struct Norm<T> {
    pub x: View<T>,
    /// `[n0, 2]`, written by forward.
    pub stats: View<T>,
    /// `[1, d]`
    pub weight: View<T>,
    /// `[1, d]`
    pub bias: View<T>,
    pub y: View<T>,
}

#[derive(Clone, Copy)]
pub struct NormGrad<T> {
    pub x: View<T>,
    pub stats: View<T>,
    pub weight: View<T>,
    /// `[n, d]`
    pub dy: View<T>,
    /// `[n0, d]`, overwritten; may be `dy`'s first n0 rows.
    pub dx: View<T>,
    pub dweight: View<T>,
    pub dbias: View<T>,
}

/// Statistics and y.
pub fn forward<T: Real>(device: &Device, problems: &[Norm<T>]) -> Result<()> {
    check("layer_norm forward", problems)?;
    if let Device::Cpu(cpu) = device {
        for p in problems {
            for_rows(
                cpu,
                p.x.rows(),
                #[inline(always)]
                |i| {
                    // SAFETY: the views are live, and each row is one task's.
                    let (x, stats) = unsafe { (p.x.row(i), p.stats.row_mut(i)) };
                    let d = T::of(x.len() as f64);
                    let mean = sum(
                        x.len(),
                        #[inline(always)]
                        |j| x[j],
                    ) / d;
                    let var = sum(
                        x.len(),
                        #[inline(always)]
                        |j| (x[j] - mean) * (x[j] - mean),
                    ) / d;
                    stats.copy_from_slice(&[mean, T::ONE / (var + T::of(EPSILON)).sqrt()]);
                },
            );
        }
    }
    apply(device, problems)
}

/// y from x and its saved statistics.
pub fn apply<T: Real>(device: &Device, problems: &[Norm<T>]) -> Result<()> {
    check("layer_norm apply", problems)?;
    if let Device::Cpu(cpu) = device {
        for p in problems {
            for_rows(
                cpu,
                p.y.rows(),
                #[inline(always)]
                |i| {
                    let source = i % p.x.rows();
                    // SAFETY: the views are live, and each row of y is one task's.
                    unsafe {
                        let (x, stats) = (p.x.row(source), p.stats.row(source));
                        let (weight, bias) = (p.weight.row(0), p.bias.row(0));
                        let y = p.y.row_mut(i);
                        for j in 0..y.len() {
                            y[j] = (x[j] - stats[0]) * stats[1] * weight[j] + bias[j];
                        }
                    }
                },
            );
        }
    }
    Ok(())
}

/// dx = gradient of x, dweight += sum over rows of dy * x_hat, dbias += sum of dy.
pub fn backward<T: Real>(device: &Device, problems: &[NormGrad<T>]) -> Result<()> {
    const OP: &str = "layer_norm backward";
    for p in problems {
        let d = p.x.cols();
        p.stats.check(OP, "stats", &[p.x.rows(), 2])?;
        p.dy.check(OP, "dy", &[padded_rows(p.dy.rows(), p.x.rows()), d])?;
        p.dx.check(OP, "dx", &[p.x.rows(), d])?;
        for (name, row) in [("weight", p.weight), ("dweight", p.dweight), ("dbias", p.dbias)] {
            row.check(OP, name, &[1, d])?;
        }
    }
    if let Device::Cpu(cpu) = device {
        problems.iter().for_each(|p| cpu_backward(cpu, p));
    }
    Ok(())
}

fn check<T: Real>(op: &'static str, problems: &[Norm<T>]) -> Result<()> {
    for p in problems {
        let d = p.x.cols();
        p.stats.check(op, "stats", &[p.x.rows(), 2])?;
        p.weight.check(op, "weight", &[1, d])?;
        p.bias.check(op, "bias", &[1, d])?;
        p.y.check(op, "y", &[padded_rows(p.y.rows(), p.x.rows()), d])?;
    }
    Ok(())
}

/// The nearest number of rows to `n` that the padding allows.
fn padded_rows(n: usize, n0: usize) -> usize {
    n.clamp(n0, 2 * n0)
}

fn cpu_backward<T: Real>(cpu: &Cpu, p: &NormGrad<T>) {
    let (n0, n, d) = (p.x.rows(), p.dy.rows(), p.x.cols());
    let tasks = n0.div_ceil(ROWS_PER_TASK);
    // each task's share of dweight and dbias, summed in order afterwards
    cpu.with_panels(tasks * 2 * d, |partial: View<T>| {
        let partial = partial.reshape(tasks, 2 * d);
        cpu.parallel(
            tasks,
            #[inline(always)]
            |task| {
                // SAFETY: the views are live; rows of dx and of the partial sums are one task's.
                let sums = unsafe { partial.row_mut(task) };
                sums.fill(T::ZERO);
                let (dweight, dbias) = sums.split_at_mut(d);
                let weight = unsafe { p.weight.row(0) };
                with_workspace(d, |dy: &mut [T]| {
                    for i in task * ROWS_PER_TASK..n0.min((task + 1) * ROWS_PER_TASK) {
                        let (x, stats) = unsafe { (p.x.row(i), p.stats.row(i)) };
                        dy.copy_from_slice(unsafe { p.dy.row(i) });
                        if i + n0 < n {
                            let repeated = unsafe { p.dy.row(i + n0) };
                            for j in 0..d {
                                dy[j] += repeated[j];
                            }
                        }
                        let (mean, rstd) = (stats[0], stats[1]);
                        for j in 0..d {
                            dbias[j] += dy[j];
                            dweight[j] += dy[j] * ((x[j] - mean) * rstd);
                        }
                        let scale = T::ONE / T::of(d as f64);
                        let mean_g = sum(
                            d,
                            #[inline(always)]
                            |j| dy[j] * weight[j],
                        ) * scale;
                        let mean_gx = sum(
                            d,
                            #[inline(always)]
                            |j| dy[j] * weight[j] * ((x[j] - mean) * rstd),
                        ) * scale;
                        let dx = unsafe { p.dx.row_mut(i) };
                        for j in 0..d {
                            dx[j] = rstd * (dy[j] * weight[j] - mean_g - (x[j] - mean) * rstd * mean_gx);
                        }
                    }
                });
            },
        );
        column_sums(cpu, &[(partial.cols_range(0..d), p.dweight), (partial.cols_range(d..2 * d), p.dbias)]);
    });
}
