//! Conv fusion (Soraki et al. 2026, the multi-scale fusion block): the streams are mixed, convolved on the tokens' grid, and rectified.
//!
//!   mixed[t, c] = sum_s w_s x_s[t, c] + w_0            (one weight a stream and one bias)
//!   out[t, j]   = F_j relu(b_j + sum over channels 2j, 2j + 1 and taps of K * mixed)
//! with K the sum of grouped 7-, 5-, 3- and 1-tap kernels (two inputs a group, d -> d / 2), zero padding, and F_j the factor of
//! channel dropout (Dropout2d: a whole channel lives or dies). On a sequence grid the kernels have one row.
//!
//! Shapes: x_s `[n, d]`; kernels `[d / 2, 2 taps]`; biases `[1, d / 2]`; mix weight `[1, streams]`, mix bias `[1, 1]`; out `[n, d / 2]`.
//! Saved: the streams and out (which is positive exactly where a gradient passes).

use super::{
    Dropout,
    depthwise::{self, Grid as TokenGrid},
    for_rows,
    matmul::column_sums,
};
pub use depthwise::Grid;

use crate::{
    Error, Result,
    device::{Arena, Cpu, Device, Real, View, cpu::with_workspace},
};

/// Kernel sides, in the checkpoint's order proj, proj1, proj2, x_proj.
pub const SIDES: [usize; 4] = [7, 5, 3, 1];

/// The op's parameters, or their gradients.
#[derive(Clone, Copy)]
pub struct Weights<T> {
    /// Weight `[1, streams]` and bias `[1, 1]`; a single stream has none.
    pub mix: Option<(View<T>, View<T>)>,
    pub kernels: [View<T>; 4],
    pub biases: [View<T>; 4],
}

pub struct ConvFusion<'a, T> {
    pub streams: &'a [View<T>],
    pub weights: Weights<T>,
    pub grid: TokenGrid,
    pub dropout: Option<Dropout>,
    pub out: View<T>,
}

fn check<T: Real>(op: &'static str, p: &ConvFusion<T>, weights: &Weights<T>) -> Result<()> {
    let (n, d) = (p.grid.tokens(), p.streams.first().map_or(0, |x| x.cols()));
    if p.streams.is_empty()
        || d % 2 != 0
        || weights.mix.is_some() != p.weights.mix.is_some()
        || (weights.mix.is_none() && p.streams.len() > 1)
    {
        let message = format!(
            "{op}: {} streams of width {d}: expected an even width, and a mix for several streams",
            p.streams.len()
        );
        return Err(Error::Usage(message));
    }
    for x in p.streams {
        x.check(op, "stream", &[n, d])?;
    }
    p.out.check(op, "out", &[n, d / 2])?;
    if let Some((weight, bias)) = weights.mix {
        weight.check(op, "mix weight", &[1, p.streams.len()])?;
        bias.check(op, "mix bias", &[1, 1])?;
    }
    for (i, &side) in SIDES.iter().enumerate() {
        weights.kernels[i].check(op, "kernel", &[d / 2, 2 * p.grid.taps_of(side)])?;
        weights.biases[i].check(op, "bias", &[1, d / 2])?;
    }
    Ok(())
}

/// `[d / 2, 2 taps]` is `[d, taps]`: the two inputs of output j are channels 2j and 2j + 1.
fn sided<T: Real>(grid: Grid, kernels: [View<T>; 4]) -> [(usize, View<T>); 4] {
    [0, 1, 2, 3].map(|i| (SIDES[i], kernels[i].reshape(2 * kernels[i].rows(), grid.taps_of(SIDES[i]))))
}

fn flop<T: Real>(p: &ConvFusion<T>) -> f64 {
    2.0 * (p.grid.taps() * p.grid.tokens()) as f64 * p.streams[0].cols() as f64
}

pub fn forward<T: Real>(device: &Device, arena: &mut Arena, p: &ConvFusion<T>) -> Result<()> {
    check("conv_fusion forward", p, &p.weights)?;
    let d = p.streams[0].cols();
    let mark = arena.mark();
    let merged = arena.scratch(p.grid.taps(), d)?;
    let mixed = arena.scratch(p.grid.tokens(), d)?;
    match device {
        Device::Cpu(cpu) => {
            depthwise::merge(p.grid, &sided(p.grid, p.weights.kernels), false, merged);
            mix(cpu, p, mixed);
            let factors = channel_factors(p.dropout, d / 2);
            for_rows(
                cpu,
                p.grid.tokens(),
                #[inline(always)]
                |t| {
                    with_workspace(d, |products: &mut [T]| {
                        // SAFETY: the views are live, and each row of out is one task's.
                        unsafe {
                            depthwise::convolve(p.grid, mixed, merged, t, products);
                            let [b0, b1, b2, b3] = p.weights.biases.map(|b| b.row(0));
                            let out = p.out.row_mut(t);
                            for j in 0..d / 2 {
                                let sum = products[2 * j] + products[2 * j + 1] + (b0[j] + b1[j] + b2[j] + b3[j]);
                                // written so that NaN passes
                                out[j] = if sum < T::ZERO { T::ZERO } else { sum * factors[j] };
                            }
                        }
                    });
                },
            );
        }
        Device::Dry(dry) => dry.count(flop(p)),
    }
    arena.release_scratch(mark);
    Ok(())
}

/// From dout `[n, d / 2]`: dstreams =, parameter gradients +=.
pub fn backward<T: Real>(
    device: &Device,
    arena: &mut Arena,
    p: &ConvFusion<T>,
    dout: View<T>,
    dstreams: &[View<T>],
    grads: &Weights<T>,
) -> Result<()> {
    const OP: &str = "conv_fusion backward";
    check(OP, p, &p.weights)?;
    check(OP, p, grads)?;
    if dstreams.len() != p.streams.len() {
        return Err(Error::Usage(format!("{OP}: {} gradients for {} streams", dstreams.len(), p.streams.len())));
    }
    let (n, d) = (p.grid.tokens(), p.streams[0].cols());
    dout.check(OP, "dout", &[n, d / 2])?;
    for dx in dstreams {
        dx.check(OP, "dstream", &[n, d])?;
    }
    let mark = arena.mark();
    let (merged, flipped) = (arena.scratch(p.grid.taps(), d)?, arena.scratch(p.grid.taps(), d)?);
    let (mixed, dconv) = (arena.scratch(n, d)?, arena.scratch(n, d)?);
    let dsum = arena.scratch(n, d / 2)?;
    match device {
        Device::Cpu(cpu) => {
            depthwise::merge(p.grid, &sided(p.grid, p.weights.kernels), false, merged);
            depthwise::flip(merged, flipped);
            mix(cpu, p, mixed);
            let factors = channel_factors::<T>(p.dropout, d / 2);
            for_rows(
                cpu,
                n,
                #[inline(always)]
                |t| {
                    // SAFETY: the views are live, and each row is one task's.
                    unsafe {
                        let (out, dout) = (p.out.row(t), dout.row(t));
                        let (dsum, dconv) = (dsum.row_mut(t), dconv.row_mut(t));
                        for j in 0..d / 2 {
                            dsum[j] = if out[j] > T::ZERO { dout[j] * factors[j] } else { T::ZERO };
                            (dconv[2 * j], dconv[2 * j + 1]) = (dsum[j], dsum[j]);
                        }
                    }
                },
            );
            column_sums(cpu, &grads.biases.map(|db| (dsum, db)));
            depthwise::kernel_gradient(cpu, p.grid, mixed, dconv, merged);
            depthwise::unmerge(p.grid, merged, &sided(p.grid, grads.kernels));
            // mixed is not needed any more and takes its own gradient
            let dmixed = mixed;
            for_rows(
                cpu,
                n,
                #[inline(always)]
                |t| unsafe { depthwise::convolve(p.grid, dconv, flipped, t, dmixed.row_mut(t)) },
            );
            unmix(cpu, p, dmixed, dstreams, grads);
        }
        Device::Dry(dry) => dry.count(2.0 * flop(p)),
    }
    arena.release_scratch(mark);
    Ok(())
}

fn channel_factors<T: Real>(dropout: Option<Dropout>, channels: usize) -> Vec<T> {
    let mut factors = vec![T::ONE; channels];
    if let Some(dropout) = dropout {
        dropout.apply(0, &mut factors);
    }
    factors
}

/// mixed = the weighted sum of the streams.
fn mix<T: Real>(cpu: &Cpu, p: &ConvFusion<T>, mixed: View<T>) {
    for_rows(
        cpu,
        mixed.rows(),
        #[inline(always)]
        |t| {
            // SAFETY: the views are live, and each row of `mixed` is one task's.
            unsafe {
                let to = mixed.row_mut(t);
                let Some((weight, bias)) = p.weights.mix else {
                    return to.copy_from_slice(p.streams[0].row(t));
                };
                to.fill(bias.row(0)[0]);
                for (x, &w) in p.streams.iter().zip(weight.row(0)) {
                    for (to, &x) in to.iter_mut().zip(x.row(t)) {
                        *to += w * x;
                    }
                }
            }
        },
    );
}

/// The streams' gradients, and += the mix's.
fn unmix<T: Real>(cpu: &Cpu, p: &ConvFusion<T>, dmixed: View<T>, dstreams: &[View<T>], grads: &Weights<T>) {
    let (n, streams) = (dmixed.rows(), p.streams.len());
    cpu.with_panels(n * (streams + 1), |sums: View<T>| {
        let sums = sums.reshape(n, streams + 1);
        for_rows(
            cpu,
            n,
            #[inline(always)]
            |t| {
                // SAFETY: the views are live, and each row is one task's.
                unsafe {
                    let (g, sums) = (dmixed.row(t), sums.row_mut(t));
                    for s in 0..streams {
                        let w = p.weights.mix.map_or(T::ONE, |(weight, _)| weight.row(0)[s]);
                        let x = p.streams[s].row(t);
                        let dx = dstreams[s].row_mut(t);
                        for j in 0..g.len() {
                            dx[j] = w * g[j];
                        }
                        sums[s] = crate::device::cpu::real::sum(
                            g.len(),
                            #[inline(always)]
                            |j| g[j] * x[j],
                        );
                    }
                    sums[streams] = crate::device::cpu::real::sum(
                        g.len(),
                        #[inline(always)]
                        |j| g[j],
                    );
                }
            },
        );
        if let Some((dweight, dbias)) = grads.mix {
            column_sums(cpu, &[(sums.cols_range(0..streams), dweight), (sums.cols_range(streams..streams + 1), dbias)]);
        }
    });
}
