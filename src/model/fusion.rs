//! What makes one stream of several: their norms, then a convolution over their mix, or a linear
//! map of all side by side.

use super::{
    Config, Context, Fusion,
    layer::{norm, norm_grad},
    params::{Layout, Linear, NormWeights, Param},
};
use crate::{
    Result,
    device::{Buffer, Element, View},
    ops::{
        conv_fusion::{self, ConvFusion, ConvFusionGrad, Grid, Weights},
        layer_norm,
        matmul::{self, Epilogue, Matmul, WeightGrad},
    },
};

/// Inputs and statistics of the streams' norms.
pub(super) type SavedNorms<T, S> = Vec<(View<T>, View<S>)>;

/// y = LayerNorm(x) of each stream, into `ys`.
pub(super) fn norms<T: Element>(
    ctx: &mut Context,
    norms: &[NormWeights],
    streams: &[View<T>],
    ys: &[View<T>],
) -> Result<SavedNorms<T, T::Sum>> {
    let mut problems = Vec::new();
    for ((&layer_norm, &x), &y) in norms.iter().zip(streams).zip(ys) {
        let stats = ctx.arena.save(x.rows(), 2)?;
        problems.push(norm(ctx, layer_norm, x, stats, y));
    }
    layer_norm::forward(ctx.device, &problems)?;
    Ok(problems.iter().map(|p| (p.x, p.stats)).collect())
}

/// dx = from dy; the norms' parameters' gradients +=. dx may be dy.
pub(super) fn norms_backward<T: Element>(
    ctx: &mut Context,
    norms: &[NormWeights],
    saved: &SavedNorms<T, T::Sum>,
    dys: &[View<T>],
    dxs: &[View<T>],
) -> Result<()> {
    let problems = norms.iter().zip(saved).enumerate();
    let problems = problems.map(|(i, (&norm, &(x, stats)))| norm_grad(ctx, norm, x, stats, dys[i], dxs[i]));
    layer_norm::backward(ctx.device, ctx.arena, &problems.collect::<Vec<_>>())
}

/// Linear and LayerNorm, into rows of a matrix that the caller has.
pub(super) struct LinearNorm {
    linear: Linear,
    norm: NormWeights,
}

#[derive(Clone, Copy)]
pub(super) struct SavedLinearNorm<T: Element> {
    x: View<T>,
    /// Before the norm.
    projected: View<T>,
    stats: View<T::Sum>,
}

impl LinearNorm {
    /// `{name}.0` is the linear layer, `{name}.1` the norm.
    pub fn new(layout: &mut Layout, name: &str, dim: usize, input: usize) -> Self {
        Self { linear: layout.linear(&format!("{name}.0"), dim, input), norm: layout.norm(&format!("{name}.1"), dim) }
    }

    pub fn forward<T: Element>(&self, ctx: &mut Context, x: View<T>, y: View<T>) -> Result<SavedLinearNorm<T>> {
        let (projected, stats) = (ctx.arena.save(y.rows(), y.cols())?, ctx.arena.save(y.rows(), 2)?);
        let linear = ctx.linear::<T>(self.linear);
        let epilogue = Epilogue { bias: Some(linear.bias), ..Default::default() };
        matmul::forward(ctx.device, &[Matmul { a: x, b: linear.weight, out: projected, epilogue }])?;
        layer_norm::forward(ctx.device, &[norm(ctx, self.norm, projected, stats, y)])?;
        Ok(SavedLinearNorm { x, projected, stats })
    }

    /// dx = from dy, which is overwritten; parameter gradients +=.
    pub fn backward<T: Element>(
        &self,
        ctx: &mut Context,
        saved: SavedLinearNorm<T>,
        dy: View<T>,
        dx: View<T>,
    ) -> Result<()> {
        let SavedLinearNorm { x, projected, stats } = saved;
        let problem = norm_grad(ctx, self.norm, projected, stats, dy, dy);
        layer_norm::backward(ctx.device, ctx.arena, &[problem])?;
        let linear = ctx.linear::<T>(self.linear);
        matmul::backward_weight(ctx.device, ctx.arena, &[WeightGrad { dy, x, dw: linear.dweight, db: linear.dbias }])?;
        let product = Matmul { a: dy, b: linear.weight, out: dx, epilogue: Epilogue::default() };
        matmul::backward_input(ctx.device, &[product])
    }
}

/// Spec, step 4: the streams are mixed, convolved on the tokens' grid and projected back to the
/// model's width.
pub(super) struct ConvFuse {
    /// None of a single stream.
    mix: Option<(Param, Param)>,
    convolutions: [(Param, Param); 4],
    linear: LinearNorm,
    /// Dropout site.
    site: u32,
}

pub(super) struct SavedConvFuse<T: Element> {
    streams: [View<T>; 3],
    convolved: View<T>,
    linear: SavedLinearNorm<T>,
}

impl ConvFuse {
    pub fn new(layout: &mut Layout, config: &Config, streams: usize, site: u32) -> Self {
        let mix = (streams > 1).then(|| layout.convolution("conv_processor.conv3d", 1, streams, &[1, 1, 1]));
        let parts = ["proj", "proj1", "proj2", "x_proj"];
        let convolutions = [0, 1, 2, 3].map(|i| {
            let side = conv_fusion::SIDES[i];
            let taps: &[usize] = if config.fusion == Fusion::Conv2d { &[side, side] } else { &[side] };
            layout.convolution(&format!("conv_processor.conv_block.0.{}", parts[i]), config.dim / 2, 2, taps)
        });
        let linear = LinearNorm::new(layout, "conv_processor.linear", config.dim, config.dim / 2);
        Self { mix, convolutions, linear, site }
    }

    fn weights<T: Element>(&self, arena: &Buffer) -> Weights<T> {
        Weights {
            mix: self.mix.map(|(weight, bias)| (weight.of(arena), bias.of(arena))),
            kernels: self.convolutions.map(|c| c.0.of(arena)),
            biases: self.convolutions.map(|c| c.1.of(arena)),
        }
    }

    fn problem<T: Element>(&self, ctx: &Context, streams: [View<T>; 3], side: usize, out: View<T>) -> ConvFusion<T> {
        let grid = match ctx.config.fusion {
            Fusion::Conv2d => Grid::square(side),
            Fusion::Conv1d => Grid::sequence(side * side),
        };
        let dropout = ctx.dropout(self.site, ctx.config.fusion_dropout);
        ConvFusion { streams, weights: self.weights(ctx.params), grid, dropout, out }
    }

    /// Streams `[side^2, dim]`, in the mix's order, to `out` of that shape. A single stream stands
    /// thrice.
    pub fn forward<T: Element>(
        &self,
        ctx: &mut Context,
        streams: [View<T>; 3],
        side: usize,
        out: View<T>,
    ) -> Result<SavedConvFuse<T>> {
        let convolved = ctx.arena.save(side * side, ctx.config.dim / 2)?;
        let problem = self.problem(ctx, streams, side, convolved);
        conv_fusion::forward(ctx.device, ctx.arena, &problem)?;
        let linear = self.linear.forward(ctx, convolved, out)?;
        Ok(SavedConvFuse { streams, convolved, linear })
    }

    /// dstreams = from dout, which is overwritten; parameter gradients +=.
    pub fn backward<T: Element>(
        &self,
        ctx: &mut Context,
        saved: &SavedConvFuse<T>,
        side: usize,
        dout: View<T>,
        dstreams: [View<T>; 3],
    ) -> Result<()> {
        let dconvolved = ctx.arena.scratch(dout.rows(), ctx.config.dim / 2)?;
        self.linear.backward(ctx, saved.linear, dout, dconvolved)?;
        let forward = self.problem(ctx, saved.streams, side, saved.convolved);
        let grads = self.weights(ctx.grads);
        let problem = ConvFusionGrad { forward, dout: dconvolved, dstreams, grads };
        conv_fusion::backward(ctx.device, ctx.arena, &problem)
    }
}
