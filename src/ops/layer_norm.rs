//! Layer normalisation (Ba et al. 2016): y = (x - mean) / sqrt(var + 1e-5) * weight + bias over
//! each row.
//!
//! `forward` takes x `[n0, d]` to y `[n, d]` with n0 <= n <= 2 n0: rows from n0 on repeat the first
//! ones, which is the model's padding to a square; `backward` folds them back, since the op is row
//! by row and linear in dy. Saved: x and the statistics `[n0, 2]` = (mean, 1 / sqrt(var + eps)); y
//! is recomputed from them by [`apply`].

use bytemuck::{Pod, Zeroable};

use super::{ROWS_PER_TASK, for_rows, matmul::column_sums};
use crate::{
    Result,
    device::{
        Arena, Arg, Cpu, Device, Element, Launch, Matrix, Real, Storage, View,
        cpu::{real::sum, with_workspace},
        storage, widen,
    },
};

pub(crate) const EPSILON: f64 = 1e-5;

#[derive(Clone, Copy)]
pub(crate) struct Norm<T: Element> {
    pub x: View<T>,
    /// `[n0, 2]`, written by forward.
    pub stats: View<T::Sum>,
    /// `[1, d]`
    pub weight: View<T>,
    /// `[1, d]`
    pub bias: View<T>,
    pub y: View<T>,
}

#[derive(Clone, Copy)]
pub(crate) struct NormGrad<T: Element> {
    pub x: View<T>,
    pub stats: View<T::Sum>,
    pub weight: View<T>,
    /// `[n, d]`
    pub dy: View<T>,
    /// `[n0, d]`, overwritten; may be `dy`'s first n0 rows.
    pub dx: View<T>,
    pub dweight: View<T::Sum>,
    pub dbias: View<T::Sum>,
}

/// Statistics and y.
pub(crate) fn forward<T: Element>(device: &Device, problems: &[Norm<T>]) -> Result<()> {
    check("layer_norm forward", problems)?;
    device.run(
        |cpu| problems.iter().for_each(|p| cpu_forward(cpu, p)),
        || Ok(forward_launches(storage::<T>()?, &kernel_norms(problems))),
    )
}

/// y from x and its saved statistics.
pub(crate) fn apply<T: Element>(device: &Device, problems: &[Norm<T>]) -> Result<()> {
    check("layer_norm apply", problems)?;
    device.run(
        |cpu| problems.iter().for_each(|p| cpu_apply(cpu, p)),
        || Ok(apply_launches(storage::<T>()?, &kernel_norms(problems))),
    )
}

/// dx = gradient of x, dweight += sum over rows of dy * x_hat, dbias += sum of dy.
pub(crate) fn backward<T: Element>(device: &Device, arena: &mut Arena, problems: &[NormGrad<T>]) -> Result<()> {
    const OP: &str = "layer_norm backward";
    for p in problems {
        let d = p.x.cols();
        p.stats.check(OP, "stats", &[p.x.rows(), 2])?;
        p.dy.check(OP, "dy", &[padded_rows(p.dy.rows(), p.x.rows()), d])?;
        p.dx.check(OP, "dx", &[p.x.rows(), d])?;
        p.weight.check(OP, "weight", &[1, d])?;
        p.dweight.check(OP, "dweight", &[1, d])?;
        p.dbias.check(OP, "dbias", &[1, d])?;
    }
    device.run_with_scratch(
        arena,
        |_| Ok(|cpu: &Cpu| problems.iter().for_each(|p| cpu_backward(cpu, p))),
        |arena| {
            let kernel = |p: &NormGrad<T>| {
                let partial = arena.scratch::<f32>(1, partial_len(p.x.rows(), p.x.cols()))?;
                Ok(KernelNormGrad { partial: partial.address(), ..p.into() })
            };
            let problems = problems.iter().map(kernel).collect::<Result<Vec<_>>>()?;
            Ok(backward_launches(storage::<T>()?, &problems))
        },
    )
}

fn check<T: Element>(op: &'static str, problems: &[Norm<T>]) -> Result<()> {
    for p in problems {
        let d = p.x.cols();
        p.stats.check(op, "stats", &[p.x.rows(), 2])?;
        p.weight.check(op, "weight", &[1, d])?;
        p.bias.check(op, "bias", &[1, d])?;
        p.y.check(op, "y", &[padded_rows(p.y.rows(), p.x.rows()), d])?;
    }
    Ok(())
}

pub(super) fn cpu_forward<T: Element>(cpu: &Cpu, p: &Norm<T>) {
    cpu_statistics(cpu, p);
    cpu_apply(cpu, p);
}

fn cpu_statistics<T: Element>(cpu: &Cpu, p: &Norm<T>) {
    for_rows(
        cpu,
        p.x.rows(),
        #[inline(always)]
        |i| {
            // SAFETY: the views are live, and each row is one task's.
            let (x, stats) = unsafe { (p.x.row(i), p.stats.row_mut(i)) };
            let d = T::Sum::of(x.len() as f64);
            let mean = sum(
                x.len(),
                #[inline(always)]
                |j| x[j].to_sum(),
            ) / d;
            let var = sum(
                x.len(),
                #[inline(always)]
                |j| (x[j].to_sum() - mean) * (x[j].to_sum() - mean),
            ) / d;
            stats.copy_from_slice(&[mean, T::Sum::ONE / (var + T::Sum::of(EPSILON)).sqrt()]);
        },
    );
}

fn cpu_apply<T: Element>(cpu: &Cpu, p: &Norm<T>) {
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
                    let normed = (x[j].to_sum() - stats[0]) * stats[1];
                    y[j] = T::from_sum(normed * weight[j].to_sum() + bias[j].to_sum());
                }
            }
        },
    );
}

/// The nearest number of rows to `n` that the padding allows.
fn padded_rows(n: usize, n0: usize) -> usize {
    n.clamp(n0, 2 * n0)
}

pub(super) fn cpu_backward<T: Element>(cpu: &Cpu, p: &NormGrad<T>) {
    let (n0, n, d) = (p.x.rows(), p.dy.rows(), p.x.cols());
    let tasks = n0.div_ceil(ROWS_PER_TASK);
    // each task's share of dweight and dbias, summed in order afterwards
    cpu.with_panels(tasks * 2 * d, |partial: View<T::Sum>| {
        let partial = partial.reshape(tasks, 2 * d);
        cpu.parallel(
            tasks,
            #[inline(always)]
            |task| {
                // SAFETY: the views are live; rows of dx and of the partial sums are one task's.
                let sums = unsafe { partial.row_mut(task) };
                sums.fill(T::Sum::ZERO);
                let (dweight, dbias) = sums.split_at_mut(d);
                // SAFETY: the views are live, and nobody writes the weight.
                let weight = unsafe { p.weight.row(0) };
                with_workspace(
                    d,
                    #[inline(always)]
                    |dy: &mut [T::Sum]| {
                        for i in task * ROWS_PER_TASK..n0.min((task + 1) * ROWS_PER_TASK) {
                            // SAFETY: the views are live, and nobody writes x, stats or dy.
                            let (x, stats) = unsafe { (p.x.row(i), p.stats.row(i)) };
                            // SAFETY: as above.
                            widen(unsafe { p.dy.row(i) }, dy);
                            if i + n0 < n {
                                // SAFETY: as above.
                                let repeated = unsafe { p.dy.row(i + n0) };
                                for j in 0..d {
                                    dy[j] += repeated[j].to_sum();
                                }
                            }
                            let (mean, rstd) = (stats[0], stats[1]);
                            for j in 0..d {
                                dbias[j] += dy[j];
                                dweight[j] += dy[j] * ((x[j].to_sum() - mean) * rstd);
                            }
                            let scale = T::Sum::ONE / T::Sum::of(d as f64);
                            let mean_g = sum(
                                d,
                                #[inline(always)]
                                |j| dy[j] * weight[j].to_sum(),
                            ) * scale;
                            let mean_gx = sum(
                                d,
                                #[inline(always)]
                                |j| dy[j] * weight[j].to_sum() * ((x[j].to_sum() - mean) * rstd),
                            ) * scale;
                            // SAFETY: as above, and the row of dx is this task's.
                            let dx = unsafe { p.dx.row_mut(i) };
                            for j in 0..d {
                                let normed = (x[j].to_sum() - mean) * rstd;
                                dx[j] = T::from_sum(rstd * (dy[j] * weight[j].to_sum() - mean_g - normed * mean_gx));
                            }
                        }
                    },
                );
            },
        );
        column_sums(cpu, &[(partial.cols_range(0..d), p.dweight), (partial.cols_range(d..2 * d), p.dbias)]);
    });
}

// ---- kernels/layer_norm.cu: a warp for a row ---------------------------------------------------------------------

use super::constants::layer_norm::{PROBLEMS, ROWS_PER_BLOCK, WARPS};

/// A problem of forward or apply as the kernel takes it; the addresses are contiguous, stats in
/// f32.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct KernelNorm {
    pub x: Matrix,
    pub y: Matrix,
    pub stats: u64,
    pub weight: u64,
    pub bias: u64,
}

/// A problem of backward; stats, partial and the parameters' gradients are f32.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct KernelNormGrad {
    pub x: Matrix,
    pub dy: Matrix,
    pub dx: Matrix,
    pub stats: u64,
    pub weight: u64,
    /// Scratch of [`partial_len`] elements.
    pub partial: u64,
    pub dweight: u64,
    pub dbias: u64,
}

impl<T: Element> From<&Norm<T>> for KernelNorm {
    fn from(p: &Norm<T>) -> Self {
        let (stats, weight, bias) = (p.stats.address(), p.weight.address(), p.bias.address());
        Self { x: p.x.into(), y: p.y.into(), stats, weight, bias }
    }
}

fn kernel_norms<T: Element>(problems: &[Norm<T>]) -> Vec<KernelNorm> {
    problems.iter().map(KernelNorm::from).collect()
}

impl<T: Element> From<&NormGrad<T>> for KernelNormGrad {
    /// Without its scratch.
    fn from(p: &NormGrad<T>) -> Self {
        Self {
            x: p.x.into(),
            dy: p.dy.into(),
            dx: p.dx.into(),
            stats: p.stats.address(),
            weight: p.weight.address(),
            partial: 0,
            dweight: p.dweight.address(),
            dbias: p.dbias.address(),
        }
    }
}

/// Elements of a backward problem's scratch.
pub(crate) fn partial_len(rows: usize, cols: usize) -> usize {
    rows.div_ceil(ROWS_PER_BLOCK) * 2 * cols
}

pub(crate) fn forward_launches(storage: Storage, problems: &[KernelNorm]) -> Vec<Launch> {
    let launch = |problems| norm_launch(["layer_norm_forward", "layer_norm_forward_scalar"], storage, problems);
    problems.chunks(PROBLEMS).map(launch).collect()
}

pub(crate) fn apply_launches(storage: Storage, problems: &[KernelNorm]) -> Vec<Launch> {
    let launch = |problems| norm_launch(["layer_norm_apply", "layer_norm_apply_scalar"], storage, problems);
    problems.chunks(PROBLEMS).map(launch).collect()
}

fn norm_launch([packed, scalar]: [&'static str; 2], storage: Storage, problems: &[KernelNorm]) -> Launch {
    let rows = problems.iter().map(|p| p.x.rows as usize).max().unwrap_or(0);
    let packs =
        problems.iter().all(|p| [p.x, p.y].iter().all(|m| m.splits_into(16, storage)) && aligned(&[p.weight, p.bias]));
    Launch {
        kernel: if packs { packed } else { scalar },
        storage,
        grid: [rows.div_ceil(WARPS).max(1) as u32, problems.len() as u32, 1],
        block: [32 * WARPS as u32, 1, 1],
        shared_bytes: 0,
        args: vec![Arg::new(table(problems))],
    }
}

/// Of every [`PROBLEMS`] problems: dx and the partial sums, then the sum of those.
pub(crate) fn backward_launches(storage: Storage, problems: &[KernelNormGrad]) -> Vec<Launch> {
    problems.chunks(PROBLEMS).flat_map(|problems| backward_pair(storage, problems)).collect()
}

fn backward_pair(storage: Storage, problems: &[KernelNormGrad]) -> [Launch; 2] {
    let blocks = problems.iter().map(|p| (p.x.rows as usize).div_ceil(ROWS_PER_BLOCK)).max().unwrap_or(0);
    let cols = problems.iter().map(|p| p.x.cols as usize).max().unwrap_or(0);
    let packs =
        problems.iter().all(|p| [p.x, p.dy, p.dx].iter().all(|m| m.splits_into(16, storage)) && aligned(&[p.weight]));
    let args = vec![Arg::new(table(problems))];
    let launch = |kernel, blocks: usize| Launch {
        kernel,
        storage,
        grid: [blocks.max(1) as u32, problems.len() as u32, 1],
        block: [32 * WARPS as u32, 1, 1],
        shared_bytes: 0,
        args: args.clone(),
    };
    let backward = if packs { "layer_norm_backward" } else { "layer_norm_backward_scalar" };
    [launch(backward, blocks), launch("layer_norm_reduce", (2 * cols).div_ceil(32))]
}

fn aligned(addresses: &[u64]) -> bool {
    addresses.iter().all(|a| a.is_multiple_of(16))
}

/// The problems as the kernel's table; the grid ends before the empty places.
fn table<P: Pod>(problems: &[P]) -> [P; PROBLEMS] {
    let mut table = [P::zeroed(); PROBLEMS];
    table[..problems.len()].copy_from_slice(problems);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_cover_the_largest_problem() {
        let norm = |rows, cols| KernelNorm {
            x: Matrix::new(0, rows, cols),
            y: Matrix::new(0, rows, cols),
            stats: 0,
            weight: 0,
            bias: 0,
        };
        let launches = forward_launches(Storage::Bf16, &[norm(9, 512), norm(17, 512), norm(0, 512)]);
        assert_eq!((launches[0].symbol().as_str(), launches[0].grid), ("layer_norm_forward_bf16", [3, 3, 1]));
        assert_eq!(forward_launches(Storage::F32, &[norm(9, 512); 9]).len(), 3);
        assert!(forward_launches(Storage::F32, &[]).is_empty());
        let kernel = |storage| forward_launches(storage, &[norm(9, 12)])[0].kernel;
        assert_eq!(kernel(Storage::Bf16), "layer_norm_forward_scalar", "rows of 24 bytes");
        assert_eq!(kernel(Storage::F32), "layer_norm_forward");
    }
}
