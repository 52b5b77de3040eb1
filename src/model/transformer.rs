//! The pad-transformer: self-attention layers, the positional encoding PPEG on a square grid,
//! self-attention layers.

use super::{
    Config, Context,
    layer::{SavedSelf, SelfLayer, sites},
    params::{Layout, Param},
};
use crate::{
    Result,
    device::{Element, Mark, View},
    ops::ppeg::{self, Ppeg, PpegGrad},
};

pub(super) struct PadTransformer {
    pre: Vec<SelfLayer>,
    post: Vec<SelfLayer>,
    kernels: [Param; 3],
    biases: [Param; 3],
}

/// The rows of a transformer: tokens on a square grid, and in front of them those that are not on it.
#[derive(Clone, Copy)]
pub(super) struct TokenGrid {
    /// side^2, or one more with a class token.
    pub rows: usize,
    pub side: usize,
}

pub(super) struct SavedTransformer<T: Element> {
    /// A group of layers each.
    pre: Vec<Vec<SavedSelf<T>>>,
    post: Vec<Vec<SavedSelf<T>>>,
    /// PPEG's inputs.
    x: Vec<View<T>>,
    before_ppeg: Mark,
}

/// Dropout sites of a transformer.
pub(super) fn transformer_sites(config: &Config) -> u32 {
    2 * config.layers as u32 * sites(config.heads)
}

impl PadTransformer {
    pub fn new(layout: &mut Layout, name: &str, config: &Config, site: u32) -> Self {
        let layers = |layout: &mut Layout, part: &str, first: usize| {
            let layer = |i| {
                let name = format!("{name}.{part}_layers.layers.{i}");
                SelfLayer::new(
                    layout,
                    &name,
                    config.dim,
                    config.attention_dropout,
                    site + (first + i) as u32 * sites(config.heads),
                )
            };
            (0..config.layers).map(layer).collect()
        };
        let pre = layers(layout, "pre", 0);
        let parts = ["proj", "proj1", "proj2"];
        let convolutions = [0, 1, 2].map(|i| {
            let side = ppeg::SIDES[i];
            layout.convolution(&format!("{name}.ppeg.{}", parts[i]), config.dim, 1, &[side, side])
        });
        let post = layers(layout, "post", config.layers);
        Self { pre, post, kernels: convolutions.map(|c| c.0), biases: convolutions.map(|c| c.1) }
    }

    /// Each x `[n0, d]`, padded to the grid's rows. out has the first `queries` rows: all, or the
    /// class token's alone, which is all that the head looks at.
    pub fn forward<T: Element>(
        ctx: &mut Context,
        group: &[&Self],
        x: &[View<T>],
        TokenGrid { rows, side }: TokenGrid,
        queries: usize,
    ) -> Result<(SavedTransformer<T>, Vec<View<T>>)> {
        let depth = ctx.config.layers;
        let (mut pre, mut post) = (Vec::new(), Vec::new());
        let mut x = x.to_vec();
        for i in 0..depth {
            let layers: Vec<_> = group.iter().map(|t| &t.pre[i]).collect();
            let (saved, outs) = SelfLayer::forward(ctx, &layers, &x, rows, rows)?;
            pre.push(saved);
            x = outs;
        }
        let before_ppeg = ctx.arena.mark();
        let mut encoded = Vec::new();
        for (g, transformer) in group.iter().enumerate() {
            let y = ctx.arena.save(rows, ctx.config.dim)?;
            let (kernels, biases) =
                (transformer.kernels.map(|p| p.of(ctx.params)), transformer.biases.map(|p| p.of(ctx.params)));
            encoded.push(Ppeg { x: x[g], y, side, kernels, biases });
        }
        ppeg::forward(ctx.device, ctx.arena, &encoded)?;
        let ppeg_x = std::mem::replace(&mut x, encoded.iter().map(|p| p.y).collect());
        for i in 0..depth {
            let layers: Vec<_> = group.iter().map(|t| &t.post[i]).collect();
            let (saved, outs) =
                SelfLayer::forward(ctx, &layers, &x, rows, if i + 1 == depth { queries } else { rows })?;
            post.push(saved);
            x = outs;
        }
        Ok((SavedTransformer { pre, post, x: ppeg_x, before_ppeg }, x))
    }

    /// From dout `[queries, d]`. `gradient` `[rows, d]` is overwritten, and may hold dout in its
    /// first rows. Returns dx in the first n0 rows of matrices `[rows, d]` that this takes from the
    /// scratch stack: the caller releases them.
    pub fn backward<T: Element>(
        ctx: &mut Context,
        group: &[&Self],
        saved: SavedTransformer<T>,
        side: usize,
        dout: &[View<T>],
        gradient: &[View<T>],
    ) -> Result<Vec<View<T>>> {
        let last = saved.post.len() - 1;
        for (i, saved) in saved.post.into_iter().enumerate().rev() {
            let layers: Vec<_> = group.iter().map(|t| &t.post[i]).collect();
            SelfLayer::backward(ctx, &layers, saved, if i == last { dout } else { gradient }, gradient)?;
        }
        let mut problems = Vec::new();
        for (g, transformer) in group.iter().enumerate() {
            problems.push(PpegGrad {
                x: saved.x[g],
                dy: gradient[g],
                dx: ctx.arena.scratch(gradient[g].rows(), ctx.config.dim)?,
                side,
                kernels: transformer.kernels.map(|p| p.of(ctx.params)),
                dkernels: transformer.kernels.map(|p| p.of(ctx.grads)),
                dbiases: transformer.biases.map(|p| p.of(ctx.grads)),
            });
        }
        ppeg::backward(ctx.device, ctx.arena, &problems)?;
        ctx.arena.release_saved(saved.before_ppeg);
        let gradient: Vec<_> = problems.iter().map(|p| p.dx).collect();
        for (i, saved) in saved.pre.into_iter().enumerate().rev() {
            let layers: Vec<_> = group.iter().map(|t| &t.pre[i]).collect();
            SelfLayer::backward(ctx, &layers, saved, &gradient, &gradient)?;
        }
        Ok(gradient)
    }

    /// The attention that each of the grid's rows receives in the last layer, of the rows that are
    /// its out.
    pub fn received<T: Element>(
        &self,
        ctx: &mut Context,
        saved: &SavedTransformer<T>,
        rows: usize,
    ) -> Result<Vec<f64>> {
        let last = self.post.len() - 1;
        self.post[last].received(ctx, &saved.post[last][0], rows)
    }
}

impl<T: Element> SavedTransformer<T> {
    /// The saved stack before it.
    pub fn before(&self) -> Mark {
        self.pre[0][0].mark
    }
}
