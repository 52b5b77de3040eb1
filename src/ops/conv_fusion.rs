//! Conv fusion (Soraki et al. 2026, the multi-scale fusion block): the streams are mixed, convolved
//! on the tokens' grid, and rectified.
//!
//! ```text
//! mixed[t, c] = sum_s w_s x_s[t, c] + w_0            (one weight a stream and one bias)
//! out[t, j]   = F_j relu(b_j + sum over channels 2j, 2j + 1 and taps of K * mixed)
//! ```
//!
//! with K the sum of grouped 7-, 5-, 3- and 1-tap kernels (two inputs a group, d -> d / 2), zero
//! padding, and F_j the factor of channel dropout (Dropout2d: a whole channel lives or dies). On a
//! sequence grid the kernels have one row. A single stream is its own mix.
//!
//! Shapes: x_s `[n, d]`; kernels `[d / 2, 2 taps]`; biases `[1, d / 2]`; mix weight `[1, 3]`, mix
//! bias `[1, 1]`; out `[n, d / 2]`. Saved: the streams and out (which is positive exactly where a
//! gradient passes).

pub(crate) mod kernel;

use kernel::KernelFusionGrad;

use super::{
    Dropout,
    depthwise::{self, Grid as TokenGrid},
    for_rows,
    matmul::column_sums,
};
pub(crate) use depthwise::Grid;

use crate::{
    Error, Result,
    device::{Arena, Cpu, Device, Element, Real, View, cpu::real::sum, round, storage, widen},
};

/// Kernel sides, in the checkpoint's order proj, proj1, proj2, x_proj.
pub(crate) const SIDES: [usize; 4] = [7, 5, 3, 1];

/// The op's parameters, or their gradients.
#[derive(Clone, Copy)]
pub(crate) struct Weights<T> {
    /// Weight `[1, 3]` and bias `[1, 1]`; None of a single stream.
    pub mix: Option<(View<T>, View<T>)>,
    pub kernels: [View<T>; 4],
    pub biases: [View<T>; 4],
}

#[derive(Clone, Copy)]
pub(crate) struct ConvFusion<T> {
    /// Without a mix there is one, and it stands thrice.
    pub streams: [View<T>; 3],
    pub weights: Weights<T>,
    pub grid: TokenGrid,
    pub dropout: Option<Dropout>,
    pub out: View<T>,
}

#[derive(Clone, Copy)]
pub(crate) struct ConvFusionGrad<T: Element> {
    /// What forward was given and what it wrote.
    pub forward: ConvFusion<T>,
    pub dout: View<T>,
    pub dstreams: [View<T>; 3],
    pub grads: Weights<T::Sum>,
}

fn check_for_kernels<T: Element>(op: &'static str, p: &ConvFusion<T>) -> Result<()> {
    p.out.check_for_kernels(op, "out")?;
    p.streams.iter().try_for_each(|x| x.check_for_kernels(op, "stream"))
}

fn check<T: Element, P: Element>(op: &'static str, p: &ConvFusion<T>, weights: &Weights<P>) -> Result<()> {
    p.grid.check(op)?;
    let (n, d) = (p.grid.tokens(), p.streams[0].cols());
    if d % 2 != 0 {
        return Err(Error::Usage(format!("{op}: streams of width {d}: expected an even width")));
    }
    for x in p.streams {
        x.check(op, "stream", &[n, d])?;
    }
    p.out.check(op, "out", &[n, d / 2])?;
    if let Some((weight, bias)) = weights.mix {
        weight.check(op, "mix weight", &[1, 3])?;
        bias.check(op, "mix bias", &[1, 1])?;
    }
    for (i, &side) in SIDES.iter().enumerate() {
        weights.kernels[i].check(op, "kernel", &[d / 2, 2 * p.grid.taps_of(side)])?;
        weights.biases[i].check(op, "bias", &[1, d / 2])?;
    }
    Ok(())
}

/// `[d / 2, 2 taps]` is `[d, taps]`: the two inputs of output j are channels 2j and 2j + 1.
fn sided<T: Element>(grid: Grid, kernels: [View<T>; 4]) -> [(usize, View<T>); 4] {
    [0, 1, 2, 3].map(|i| (SIDES[i], kernels[i].reshape(2 * kernels[i].rows(), grid.taps_of(SIDES[i]))))
}

fn flop<T: Element>(p: &ConvFusion<T>) -> f64 {
    2.0 * (p.grid.taps() * p.grid.tokens()) as f64 * p.streams[0].cols() as f64
}

pub(crate) fn forward<T: Element>(device: &Device, arena: &mut Arena, p: &ConvFusion<T>) -> Result<()> {
    const OP: &str = "conv_fusion forward";
    check(OP, p, &p.weights)?;
    device.count(flop(p));
    device.run_with_scratch(
        arena,
        |arena| {
            let d = p.streams[0].cols();
            let merged = arena.scratch(p.grid.taps(), d)?;
            let mixed = arena.scratch(p.grid.tokens(), d)?;
            Ok(move |cpu: &Cpu| cpu_forward(cpu, p, merged, mixed))
        },
        |_| {
            check_for_kernels(OP, p)?;
            Ok([kernel::forward_launch(storage::<T>()?, p.grid, &p.into())])
        },
    )
}

/// From dout `[n, d / 2]`: dstreams =, parameter gradients +=.
pub(crate) fn backward<T: Element>(device: &Device, arena: &mut Arena, p: &ConvFusionGrad<T>) -> Result<()> {
    const OP: &str = "conv_fusion backward";
    let forward = &p.forward;
    check(OP, forward, &forward.weights)?;
    check(OP, forward, &p.grads)?;
    let (n, d) = (forward.grid.tokens(), forward.streams[0].cols());
    p.dout.check(OP, "dout", &[n, d / 2])?;
    for dx in p.dstreams {
        dx.check(OP, "dstream", &[n, d])?;
    }
    device.count(2.0 * flop(forward));
    device.run_with_scratch(
        arena,
        |arena| {
            let taps = forward.grid.taps();
            let scratch = Scratch {
                merged: arena.scratch(taps, d)?,
                flipped: arena.scratch(taps, d)?,
                mixed: arena.scratch(n, d)?,
                dconv: arena.scratch(n, d)?,
                dsum: arena.scratch(n, d / 2)?,
            };
            Ok(move |cpu: &Cpu| cpu_backward(cpu, p, scratch))
        },
        |arena| {
            check_for_kernels(OP, forward)?;
            let [partial, mix] = kernel::partial_lens(forward.grid, d);
            let partial = arena.scratch::<f32>(1, partial)?.address();
            let mix_partial = arena.scratch::<f32>(1, mix)?.address();
            let kernel = KernelFusionGrad { partial, mix_partial, ..p.into() };
            Ok(kernel::backward_launches(storage::<T>()?, forward.grid, &kernel))
        },
    )
}

fn cpu_forward<T: Element>(cpu: &Cpu, p: &ConvFusion<T>, merged: View<T::Sum>, mixed: View<T::Sum>) {
    depthwise::merge(p.grid, &sided(p.grid, p.weights.kernels), false, merged);
    mix(cpu, p, mixed);
    let factors: Vec<T::Sum> = channel_factors(p.dropout, mixed.cols() / 2);
    for_rows(
        cpu,
        p.grid.tokens(),
        #[inline(always)]
        |t| {
            // SAFETY: the views are live, and each row of out is one task's.
            unsafe {
                let biases = p.weights.biases.map(|b| b.row(0));
                let out = p.out.row_mut(t);
                depthwise::convolve(
                    p.grid,
                    mixed,
                    merged,
                    t,
                    #[inline(always)]
                    |c, products| {
                        for (j, pair) in (c / 2..).zip(products.chunks_exact(2)) {
                            let [b0, b1, b2, b3] = biases.map(|b| b[j].to_sum());
                            let sum = pair[0] + pair[1] + (b0 + b1 + b2 + b3);
                            // written so that NaN passes
                            let value = if sum < T::Sum::ZERO { T::Sum::ZERO } else { sum * factors[j] };
                            out[j] = T::from_sum(value);
                        }
                    },
                );
            }
        },
    );
}

/// Backward's scratch on the CPU.
#[derive(Clone, Copy)]
struct Scratch<T> {
    merged: View<T>,
    flipped: View<T>,
    mixed: View<T>,
    /// Gradient of each channel's product, `[n, d]`, and of their pairs' sums, `[n, d / 2]`.
    dconv: View<T>,
    dsum: View<T>,
}

fn cpu_backward<T: Element>(cpu: &Cpu, p: &ConvFusionGrad<T>, scratch: Scratch<T::Sum>) {
    let ConvFusionGrad { forward, dout, dstreams, grads } = p;
    let Scratch { merged, flipped, mixed, dconv, dsum } = scratch;
    let (grid, n, d) = (forward.grid, forward.grid.tokens(), mixed.cols());
    depthwise::merge(grid, &sided(grid, forward.weights.kernels), false, merged);
    depthwise::flip(merged, flipped);
    mix(cpu, forward, mixed);
    let factors: Vec<T::Sum> = channel_factors(forward.dropout, d / 2);
    for_rows(
        cpu,
        n,
        #[inline(always)]
        |t| {
            // SAFETY: the views are live, and each row is one task's.
            unsafe {
                let (out, dout) = (forward.out.row(t), dout.row(t));
                let (dsum, dconv) = (dsum.row_mut(t), dconv.row_mut(t));
                for j in 0..d / 2 {
                    let passes = out[j].to_sum() > T::Sum::ZERO;
                    dsum[j] = if passes { dout[j].to_sum() * factors[j] } else { T::Sum::ZERO };
                    (dconv[2 * j], dconv[2 * j + 1]) = (dsum[j], dsum[j]);
                }
            }
        },
    );
    column_sums(cpu, &grads.biases.map(|db| (dsum, db)));
    depthwise::kernel_gradient(cpu, grid, mixed, dconv, merged);
    depthwise::unmerge(grid, merged, &sided(grid, grads.kernels));
    // mixed is not needed any more and takes its own gradient
    let dmixed = mixed;
    for_rows(
        cpu,
        n,
        #[inline(always)]
        |t| {
            // SAFETY: the views are live, and each row of dmixed is one task's.
            unsafe {
                let to = dmixed.row_mut(t);
                depthwise::convolve(
                    grid,
                    dconv,
                    flipped,
                    t,
                    #[inline(always)]
                    |c, sums| to[c..c + sums.len()].copy_from_slice(sums),
                );
            }
        },
    );
    unmix(cpu, forward, dmixed, dstreams, grads);
}

fn channel_factors<T: Real>(dropout: Option<Dropout>, channels: usize) -> Vec<T> {
    let mut factors = vec![T::ONE; channels];
    if let Some(dropout) = dropout {
        dropout.apply(0, &mut factors);
    }
    factors
}

/// mixed = the weighted sum of the streams.
fn mix<T: Element>(cpu: &Cpu, p: &ConvFusion<T>, mixed: View<T::Sum>) {
    for_rows(
        cpu,
        mixed.rows(),
        #[inline(always)]
        |t| {
            // SAFETY: the views are live, and each row of `mixed` is one task's.
            unsafe {
                let to = mixed.row_mut(t);
                let Some((weight, bias)) = p.weights.mix else {
                    widen(p.streams[0].row(t), to);
                    return;
                };
                to.fill(bias.row(0)[0].to_sum());
                for (x, &w) in p.streams.iter().zip(weight.row(0)) {
                    let w = w.to_sum();
                    for (to, x) in to.iter_mut().zip(x.row(t)) {
                        *to += w * x.to_sum();
                    }
                }
            }
        },
    );
}

/// The streams' gradients, and += the mix's.
fn unmix<T: Element>(
    cpu: &Cpu,
    p: &ConvFusion<T>,
    dmixed: View<T::Sum>,
    dstreams: &[View<T>],
    grads: &Weights<T::Sum>,
) {
    const STREAMS: usize = 3;
    let n = dmixed.rows();
    let (Some((weight, _)), Some((dweight, dbias))) = (p.weights.mix, grads.mix) else {
        return for_rows(
            cpu,
            n,
            #[inline(always)]
            // SAFETY: the views are live, and each row is one task's.
            |t| unsafe { round(dmixed.row(t), dstreams[0].row_mut(t)) },
        );
    };
    cpu.with_panels(n * (STREAMS + 1), |sums: View<T::Sum>| {
        let sums = sums.reshape(n, STREAMS + 1);
        for_rows(
            cpu,
            n,
            #[inline(always)]
            |t| {
                // SAFETY: the views are live, and each row is one task's.
                unsafe {
                    let (g, sums) = (dmixed.row(t), sums.row_mut(t));
                    for s in 0..STREAMS {
                        let w = weight.row(0)[s].to_sum();
                        let x = p.streams[s].row(t);
                        let dx = dstreams[s].row_mut(t);
                        for j in 0..g.len() {
                            dx[j] = T::from_sum(w * g[j]);
                        }
                        sums[s] = sum(
                            g.len(),
                            #[inline(always)]
                            |j| g[j] * x[j].to_sum(),
                        );
                    }
                    sums[STREAMS] = sum(
                        g.len(),
                        #[inline(always)]
                        |j| g[j],
                    );
                }
            },
        );
        column_sums(cpu, &[(sums.cols_range(0..STREAMS), dweight), (sums.cols_range(STREAMS..STREAMS + 1), dbias)]);
    });
}
