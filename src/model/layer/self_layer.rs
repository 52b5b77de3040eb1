//! A self-attention layer: a norm in front of a [`Layer`], whose queries are the context's own rows.

use super::{Forwarded, Layer, LayerGrad, Names, SavedLayer, backward, forward, norm, norm_grad, received_by_context};
use crate::{
    Result,
    device::{Element, Mark, View},
    model::{
        Context,
        params::{Layout, NormWeights},
    },
    ops::layer_norm,
};

/// A layer and the norm in front of it.
pub(in crate::model) struct SelfLayer {
    norm: NormWeights,
    layer: Layer,
}

pub(in crate::model) struct SavedSelf<T: Element> {
    x: View<T>,
    stats: View<T::Sum>,
    layer: SavedLayer<T>,
    /// The saved stack before the group of layers.
    pub mark: Mark,
}

impl SelfLayer {
    /// `name`: `.0` is the first norm, `.1` attention, `.2` the second norm, `.3` the feed-forward.
    pub fn new(layout: &mut Layout, name: &str, dim: usize, attention_dropout: f64, site: u32) -> Self {
        let of = |i: usize| format!("{name}.{i}");
        let norm = layout.norm(&of(0), dim);
        let names = Names { attention: &of(1), norm: &of(2), ffn: &of(3) };
        Self { norm, layer: Layer::new(layout, &names, dim, None, attention_dropout, site) }
    }

    /// Each x `[n0, d]`, padded to `rows` by repeating its first rows; out has the first `queries`
    /// rows only.
    pub fn forward<T: Element>(
        ctx: &mut Context,
        layers: &[&Self],
        x: &[View<T>],
        rows: usize,
        queries: usize,
    ) -> Result<Forwarded<SavedSelf<T>, T>> {
        let before = ctx.arena.mark();
        let d = ctx.config.dim;
        let (mut norms, mut stats) = (Vec::new(), Vec::new());
        for (g, layer) in layers.iter().enumerate() {
            stats.push(ctx.arena.save(x[g].rows(), 2)?);
            let y = ctx.arena.scratch(rows, d)?;
            norms.push(norm(ctx, layer.norm, x[g], stats[g], y));
        }
        layer_norm::forward(ctx.device, &norms)?;
        let inner: Vec<_> = layers.iter().map(|layer| &layer.layer).collect();
        let context: Vec<_> = norms.iter().map(|norm| norm.y).collect();
        let query: Vec<_> = context.iter().map(|y| y.rows_range(0..queries)).collect();
        let (saved, outs) = forward(ctx, &inner, &query, &context)?;
        ctx.arena.release_scratch(before);
        let saved =
            saved.into_iter().enumerate().map(|(g, layer)| SavedSelf { x: x[g], stats: stats[g], layer, mark: before });
        Ok((saved.collect(), outs))
    }

    /// dout is in the first rows, as many as forward's queries; `gradient` has dx in its first n0
    /// afterwards. They may be one.
    pub fn backward<T: Element>(
        ctx: &mut Context,
        layers: &[&Self],
        saved: Vec<SavedSelf<T>>,
        dout: &[View<T>],
        gradient: &[View<T>],
    ) -> Result<()> {
        let mark = ctx.arena.mark();
        let d = ctx.config.dim;
        let (mut norms, mut grads) = (Vec::new(), Vec::new());
        for (g, layer) in layers.iter().enumerate() {
            let rows = gradient[g].rows();
            let (y, dy) = (ctx.arena.scratch(rows, d)?, ctx.arena.scratch(rows, d)?);
            norms.push(norm(ctx, layer.norm, saved[g].x, saved[g].stats, y));
            let queries = 0..saved[g].layer.attended.out.rows();
            grads.push(LayerGrad {
                x: y.rows_range(queries.clone()),
                context: y,
                dout: dout[g].rows_range(queries.clone()),
                dx: dy.rows_range(queries),
                dcontext: dy,
            });
        }
        layer_norm::apply(ctx.device, &norms)?;
        let inner: Vec<_> = layers.iter().map(|layer| &layer.layer).collect();
        let (outer, inner_saved): (Vec<_>, Vec<_>) =
            saved.into_iter().map(|s| ((s.x, s.stats, s.mark), s.layer)).unzip();
        backward(ctx, &inner, &inner_saved, &grads, true)?;
        let norms = layers.iter().enumerate().map(|(g, layer)| {
            let (x, stats, _) = outer[g];
            norm_grad(ctx, layer.norm, x, stats, grads[g].dcontext, gradient[g].rows_range(0..x.rows()))
        });
        let norms: Vec<_> = norms.collect();
        layer_norm::backward(ctx.device, ctx.arena, &norms)?;
        ctx.arena.release_scratch(mark);
        if let Some((_, _, before)) = outer.first() {
            ctx.arena.release_saved(*before);
        }
        Ok(())
    }

    /// The attention that each row receives of the queries of forward, in equal shares.
    pub fn received<T: Element>(&self, ctx: &mut Context, saved: &SavedSelf<T>, rows: usize) -> Result<Vec<f64>> {
        let mark = ctx.arena.mark();
        let y = ctx.arena.scratch(rows, ctx.config.dim)?;
        layer_norm::apply(ctx.device, &[norm(ctx, self.norm, saved.x, saved.stats, y)])?;
        let queries = saved.layer.attended.out.rows();
        let weights = vec![1.0 / queries as f64; queries];
        let received = received_by_context(ctx, &self.layer, &saved.layer, y.rows_range(0..queries), y, &weights);
        ctx.arena.release_scratch(mark);
        received
    }
}
