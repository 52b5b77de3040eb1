//! From the fused tokens to the head's one row: a class token in front, a last transformer, and the
//! head's norm and linear map.

use super::{
    Config, Context,
    layer::norm,
    params::{Layout, Linear, NormWeights, Param},
    transformer::{PadTransformer, SavedTransformer, TokenGrid},
};
use crate::{
    Result,
    device::{Element, View},
    ops::{
        elementwise,
        head::{Head, HeadGrad},
    },
};

pub(super) struct Readout {
    class_token: Param,
    last: PadTransformer,
    norm: NormWeights,
    head: Linear,
}

pub(super) struct SavedReadout<T: Element> {
    last: SavedTransformer<T>,
    head: HeadGrad<T>,
}

impl Readout {
    /// `class_token` is made first of all, since it comes first in a checkpoint.
    pub fn new(layout: &mut Layout, class_token: Param, config: &Config, next_site: u32) -> Self {
        Self {
            class_token,
            last: PadTransformer::new(layout, "final_transformer", config, next_site),
            norm: layout.norm("final_ln", config.dim),
            head: layout.linear("mlp_head.0", config.n_classes, config.dim),
        }
    }

    pub fn class_token(layout: &mut Layout, config: &Config) -> Param {
        layout.token("cls_token", config.dim, 1e-6)
    }

    /// Memory for the fused tokens `[side^2 + 1, dim]`, on the saved stack, with the class token in
    /// the first row.
    pub fn fused<T: Element>(&self, ctx: &mut Context, side: usize) -> Result<View<T>> {
        let fused = ctx.arena.save(side * side + 1, ctx.config.dim)?;
        elementwise::sum(ctx.device, &[self.class_token.of(ctx.params)], fused.rows_range(0..1))?;
        Ok(fused)
    }

    pub fn forward<T: Element>(&self, ctx: &mut Context, fused: View<T>, side: usize) -> Result<SavedReadout<T>> {
        let (dim, classes) = (ctx.config.dim, ctx.config.n_classes);
        let grid = TokenGrid { rows: side * side + 1, side };
        let (last, out) = PadTransformer::forward(ctx, &[&self.last], &[fused], grid, 1)?;
        let linear = ctx.linear::<T>(self.head);
        let (stats, normed) = (ctx.arena.save(1, 2)?, ctx.arena.save(1, dim)?);
        let (logits, dlogits) = (ctx.arena.save(1, classes)?, ctx.arena.save(1, classes)?);
        let forward = Head {
            norm: norm(ctx, self.norm, out[0], stats, normed),
            weight: linear.weight,
            bias: linear.bias,
            logits,
        };
        let head = HeadGrad {
            forward,
            dlogits,
            dx: ctx.arena.save(1, dim)?,
            dnorm_weight: self.norm.weight.of(ctx.grads),
            dnorm_bias: self.norm.bias.of(ctx.grads),
            dweight: linear.dweight,
            dbias: linear.dbias,
        };
        Ok(SavedReadout { last, head })
    }

    /// From the head's dx: the gradient of the fused tokens, on the scratch stack and the caller's
    /// to overwrite. The class token's own is summed.
    pub fn backward<T: Element>(&self, ctx: &mut Context, saved: SavedReadout<T>, side: usize) -> Result<View<T>> {
        let n = side * side;
        let gradient = ctx.arena.scratch(n + 1, ctx.config.dim)?;
        let dx = saved.head.dx;
        let dfused = PadTransformer::backward(ctx, &[&self.last], saved.last, side, &[dx], &[gradient])?[0];
        elementwise::accumulate(ctx.device, dfused.rows_range(0..1), self.class_token.of(ctx.grads))?;
        Ok(dfused.rows_range(1..n + 1))
    }

    /// The share of the class token's attention, in the last layer, that each of so many tokens
    /// receives. Those that pad the grid are copies of the first ones, and count for them; what the
    /// class token gives to itself is left out.
    pub fn received<T: Element>(
        &self,
        ctx: &mut Context,
        saved: &SavedReadout<T>,
        side: usize,
        tokens: usize,
    ) -> Result<Vec<f64>> {
        let all = self.last.received(ctx, &saved.last, side * side + 1)?;
        let mut received = vec![0.0; tokens];
        all[1..].iter().enumerate().for_each(|(i, share)| received[i % tokens] += share);
        Ok(received)
    }
}

impl<T: Element> SavedReadout<T> {
    pub fn head(&self) -> HeadGrad<T> {
        self.head
    }
}
