//! The unit that the whole model is made of: attention, norm, feed-forward.
//!
//!   u = x + out_proj(attention(q_proj(x), k_proj(c), v_proj(c))),   y = LayerNorm(u),   out = y + ffn(y)
//! A cross-attention block queries another bag's tokens c, with one scale embedding added to x and c before the projections; a
//! self-attention block ([`SelfLayer`]) first normalises its input, x = c = LayerNorm(input). The residuals start from the NORMALISED
//! values. Every function takes a group of layers, which run in lockstep so that each op is one launch.

use super::{
    Context, LinearViews,
    params::{Layout, Linear, Norm, Param},
};
use crate::{
    Result,
    device::{Element, Mark, View},
    ops::{
        attention::{self, Attention, AttentionGrad},
        elementwise, gelu,
        layer_norm::{self, NormGrad},
        matmul::{self, Epilogue, Matmul, WeightGrad},
        scale_embedding::{self, Fold, FoldGrad},
    },
};

pub(super) struct Layer {
    q: Linear,
    /// Keys' and values' projections side by side.
    kv: Linear,
    out: Linear,
    embedding: Option<Param>,
    norm: Norm,
    ffn: [Linear; 2],
    attention_dropout: f64,
    /// First of this layer's dropout sites: attention's heads, then the two of the feed-forward.
    site: u32,
}

/// Names of a layer's parts in a checkpoint.
pub(super) struct Names<'a> {
    pub attention: &'a str,
    pub norm: &'a str,
    pub ffn: &'a str,
}

/// Dropout sites that a layer of `heads` uses.
pub(super) fn sites(heads: usize) -> u32 {
    heads as u32 + 2
}

/// What backward needs of each layer of a group, and each out.
type Forwarded<S, T> = (Vec<S>, Vec<View<T>>);

/// What backward needs of one layer.
pub(super) struct SavedLayer<T: Element> {
    q: View<T>,
    kv: View<T>,
    attended: View<T>,
    lse: View<T::Sum>,
    u: View<T>,
    stats: View<T::Sum>,
    /// Before GELU.
    hidden: View<T>,
}

impl Layer {
    /// `embedding_std`: a scale embedding's, in a cross-attention layer.
    pub fn new(
        layout: &mut Layout,
        names: &Names,
        dim: usize,
        embedding_std: Option<f64>,
        attention_dropout: f64,
        site: u32,
    ) -> Self {
        let of = |part: &str| format!("{}.{part}", names.attention);
        Self {
            q: layout.linear(&of("q_proj"), dim, dim),
            kv: layout.linear_pair([&of("k_proj"), &of("v_proj")], dim, dim),
            out: layout.linear(&of("out_proj"), dim, dim),
            embedding: embedding_std.map(|std| layout.token(&of("scale_embeddings"), dim, std)),
            norm: layout.norm(names.norm, dim),
            ffn: [
                layout.linear(&format!("{}.net.0", names.ffn), 2 * dim, dim),
                layout.linear(&format!("{}.net.3", names.ffn), dim, 2 * dim),
            ],
            attention_dropout,
            site,
        }
    }

    fn attention<T: Element>(&self, ctx: &Context, saved: &SavedLayer<T>) -> Attention<T> {
        let d = saved.q.cols();
        Attention {
            q: saved.q,
            k: saved.kv.cols_range(0..d),
            v: saved.kv.cols_range(d..2 * d),
            out: saved.attended,
            lse: saved.lse,
            heads: ctx.config.heads,
            dropout: ctx.dropout(self.site, self.attention_dropout),
        }
    }

    fn norm<T: Element>(&self, ctx: &Context, saved: &SavedLayer<T>, y: View<T>) -> layer_norm::Norm<T> {
        norm(ctx, self.norm, saved.u, saved.stats, y)
    }

    fn ffn_dropout(&self, ctx: &Context, which: u32) -> Option<crate::ops::Dropout> {
        ctx.dropout(self.site + ctx.config.heads as u32 + which, ctx.config.ffn_dropout)
    }
}

pub(super) fn norm<T: Element>(
    ctx: &Context,
    norm: Norm,
    x: View<T>,
    stats: View<T::Sum>,
    y: View<T>,
) -> layer_norm::Norm<T> {
    layer_norm::Norm { x, stats, weight: norm.weight.of(ctx.params), bias: norm.bias.of(ctx.params), y }
}

pub(super) fn norm_grad<T: Element>(
    ctx: &Context,
    norm: Norm,
    x: View<T>,
    stats: View<T::Sum>,
    dy: View<T>,
    dx: View<T>,
) -> NormGrad<T> {
    let (dweight, dbias) = (norm.weight.of(ctx.grads), norm.bias.of(ctx.grads));
    NormGrad { x, stats, weight: norm.weight.of(ctx.params), dy, dx, dweight, dbias }
}

/// Each layer's x `[n, d]` and context `[m, d]`; returns what backward needs, and each out `[n, d]` on the saved stack.
pub(super) fn forward<T: Element>(
    ctx: &mut Context,
    layers: &[&Layer],
    x: &[View<T>],
    context: &[View<T>],
) -> Result<Forwarded<SavedLayer<T>, T>> {
    let d = ctx.config.dim;
    let (mut saved, mut outs) = (Vec::new(), Vec::new());
    for g in 0..layers.len() {
        let (n, m) = (x[g].rows(), context[g].rows());
        saved.push(SavedLayer {
            q: ctx.arena.save(n, d)?,
            kv: ctx.arena.save(m, 2 * d)?,
            attended: ctx.arena.save(n, d)?,
            lse: ctx.arena.save(ctx.config.heads, n)?,
            u: ctx.arena.save(n, d)?,
            stats: ctx.arena.save(n, 2)?,
            hidden: ctx.arena.save(n, 2 * d)?,
        });
        outs.push(ctx.arena.save(n, d)?);
    }
    let mark = ctx.arena.mark();

    let mut projections = Vec::new();
    for (g, layer) in layers.iter().enumerate() {
        let mut biases = [layer.q, layer.kv].map(|linear| linear.bias.of(ctx.params));
        if let Some(embedding) = layer.embedding {
            for (linear, bias) in [layer.q, layer.kv].into_iter().zip(&mut biases) {
                let (weight, folded) = (linear.weight.of(ctx.params), ctx.arena.scratch(1, bias.cols())?);
                let embedding = embedding.of(ctx.params);
                scale_embedding::forward(ctx.device, &[Fold { weight, bias: *bias, embedding, folded }])?;
                *bias = folded;
            }
        }
        for ((linear, bias), (a, out)) in
            [layer.q, layer.kv].into_iter().zip(biases).zip([(x[g], saved[g].q), (context[g], saved[g].kv)])
        {
            let epilogue = Epilogue { bias: Some(bias), ..Default::default() };
            projections.push(Matmul { a, b: linear.weight.of(ctx.params), out, epilogue });
        }
    }
    matmul::forward(ctx.device, &projections)?;

    let problems: Vec<_> = layers.iter().zip(&saved).map(|(layer, saved)| layer.attention(ctx, saved)).collect();
    attention::forward(ctx.device, ctx.arena, &problems)?;

    let products = layers.iter().enumerate().map(|(g, layer)| {
        let out = ctx.linear::<T>(layer.out);
        let epilogue = Epilogue { bias: Some(out.bias), residual: Some(x[g]), ..Default::default() };
        Matmul { a: saved[g].attended, b: out.weight, out: saved[g].u, epilogue }
    });
    matmul::forward(ctx.device, &products.collect::<Vec<_>>())?;

    let y = scratch(ctx, x, d)?;
    let norms: Vec<_> = (0..layers.len()).map(|g| layers[g].norm(ctx, &saved[g], y[g])).collect();
    layer_norm::forward(ctx.device, &norms)?;

    let z = scratch(ctx, x, 2 * d)?;
    let products = layers.iter().enumerate().map(|(g, layer)| {
        let linear = ctx.linear::<T>(layer.ffn[0]);
        let (gelu, dropout) = (Some(saved[g].hidden), layer.ffn_dropout(ctx, 0));
        Matmul {
            a: y[g],
            b: linear.weight,
            out: z[g],
            epilogue: Epilogue { bias: Some(linear.bias), gelu, dropout, ..Default::default() },
        }
    });
    matmul::forward(ctx.device, &products.collect::<Vec<_>>())?;
    let products = layers.iter().enumerate().map(|(g, layer)| {
        let linear = ctx.linear::<T>(layer.ffn[1]);
        let (dropout, residual) = (layer.ffn_dropout(ctx, 1), Some(y[g]));
        Matmul {
            a: z[g],
            b: linear.weight,
            out: outs[g],
            epilogue: Epilogue { bias: Some(linear.bias), dropout, residual, ..Default::default() },
        }
    });
    matmul::forward(ctx.device, &products.collect::<Vec<_>>())?;
    ctx.arena.release_scratch(mark);
    Ok((saved, outs))
}

/// A scratch matrix of `cols` columns for each of `like`.
fn scratch<T: Element>(ctx: &mut Context, like: &[View<T>], cols: usize) -> Result<Vec<View<T>>> {
    like.iter().map(|x| ctx.arena.scratch(x.rows(), cols)).collect()
}

/// One layer's tensors in backward. In self-attention x is the context's first rows, and dx the context's gradient's.
pub(super) struct LayerGrad<T> {
    pub x: View<T>,
    pub context: View<T>,
    pub dout: View<T>,
    pub dx: View<T>,
    pub dcontext: View<T>,
}

/// dcontext =; dx = or, where dx lies in dcontext (`self_attention`), +=; parameter gradients +=.
pub(super) fn backward<T: Element>(
    ctx: &mut Context,
    layers: &[&Layer],
    saved: &[SavedLayer<T>],
    grads: &[LayerGrad<T>],
    self_attention: bool,
) -> Result<()> {
    let d = ctx.config.dim;
    let all = 0..layers.len();
    let mark = ctx.arena.mark();
    let x: Vec<_> = grads.iter().map(|grad| grad.x).collect();
    let du = scratch(ctx, &x, d)?;
    feed_forward_backward(ctx, layers, saved, grads, &du)?;

    // u = x + out_proj(attended)
    let dattended = scratch(ctx, &x, d)?;
    let linear: Vec<LinearViews<T>> = layers.iter().map(|layer| ctx.linear(layer.out)).collect();
    let weights = all.clone().map(|g| WeightGrad {
        dy: du[g],
        x: saved[g].attended,
        dw: linear[g].dweight,
        db: Some(linear[g].dbias),
    });
    let weights: Vec<_> = weights.collect();
    matmul::backward_weight(ctx.device, ctx.arena, &weights)?;
    let inputs =
        all.clone().map(|g| Matmul { a: du[g], b: linear[g].weight, out: dattended[g], epilogue: Epilogue::default() });
    matmul::backward_input(ctx.device, &inputs.collect::<Vec<_>>())?;

    let dq = scratch(ctx, &x, d)?;
    let context: Vec<_> = grads.iter().map(|grad| grad.context).collect();
    let dkv = scratch(ctx, &context, 2 * d)?;
    let problems = all.clone().map(|g| AttentionGrad {
        forward: layers[g].attention(ctx, &saved[g]),
        dout: dattended[g],
        dq: dq[g],
        dk: dkv[g].cols_range(0..d),
        dv: dkv[g].cols_range(d..2 * d),
    });
    let problems: Vec<_> = problems.collect();
    attention::backward(ctx.device, ctx.arena, &problems)?;

    let mut weights = Vec::new();
    let mut folds = Vec::new();
    for (g, layer) in layers.iter().enumerate() {
        let linear: [LinearViews<T>; 2] = [ctx.linear(layer.q), ctx.linear(layer.kv)];
        let mut biases = linear.map(|linear| linear.dbias);
        if let Some(param) = layer.embedding {
            let (embedding, dembedding) = (param.of(ctx.params), param.of(ctx.grads));
            for (part, bias) in linear.iter().zip(&mut biases) {
                let dfolded = ctx.arena.scratch(1, bias.cols())?;
                elementwise::zero(ctx.device, dfolded)?;
                let (weight, dweight, dbias) = (part.weight, part.dweight, part.dbias);
                folds.push(FoldGrad { weight, embedding, dfolded, dweight, dbias, dembedding });
                *bias = dfolded;
            }
        }
        weights.push(WeightGrad { dy: dq[g], x: grads[g].x, dw: linear[0].dweight, db: Some(biases[0]) });
        weights.push(WeightGrad { dy: dkv[g], x: grads[g].context, dw: linear[1].dweight, db: Some(biases[1]) });
    }
    matmul::backward_weight(ctx.device, ctx.arena, &weights)?;
    scale_embedding::backward(ctx.device, &folds)?;

    let inputs = all.clone().map(|g| {
        let weight = layers[g].kv.weight.of(ctx.params);
        Matmul { a: dkv[g], b: weight, out: grads[g].dcontext, epilogue: Epilogue::default() }
    });
    matmul::backward_input(ctx.device, &inputs.collect::<Vec<_>>())?;
    let inputs = all.map(|g| {
        let epilogue = Epilogue { accumulate: self_attention, residual: Some(du[g]), ..Default::default() };
        Matmul { a: dq[g], b: layers[g].q.weight.of(ctx.params), out: grads[g].dx, epilogue }
    });
    matmul::backward_input(ctx.device, &inputs.collect::<Vec<_>>())?;
    ctx.arena.release_scratch(mark);
    Ok(())
}

/// From dout to du, through out = y + ffn(y) and y = LayerNorm(u).
fn feed_forward_backward<T: Element>(
    ctx: &mut Context,
    layers: &[&Layer],
    saved: &[SavedLayer<T>],
    grads: &[LayerGrad<T>],
    du: &[View<T>],
) -> Result<()> {
    let d = ctx.config.dim;
    let all = 0..layers.len();
    let mark = ctx.arena.mark();
    let y = scratch(ctx, du, d)?;
    let norms: Vec<_> = all.clone().map(|g| layers[g].norm(ctx, &saved[g], y[g])).collect();
    layer_norm::apply(ctx.device, &norms)?;
    let dhidden = scratch(ctx, du, 2 * d)?;

    let second = ctx.arena.mark();
    let z = scratch(ctx, du, 2 * d)?;
    let hidden = all.clone().map(|g| gelu::Recompute {
        pre: saved[g].hidden,
        dropout: layers[g].ffn_dropout(ctx, 0),
        out: z[g],
    });
    gelu::recompute(ctx.device, &hidden.collect::<Vec<_>>())?;
    // the gradient behind the second dropout
    let mut dz = Vec::new();
    for g in all.clone() {
        dz.push(grads[g].dout);
        if let Some(dropout) = layers[g].ffn_dropout(ctx, 1) {
            dz[g] = ctx.arena.scratch(du[g].rows(), d)?;
            elementwise::dropout(ctx.device, grads[g].dout, dropout, dz[g])?;
        }
    }
    let linear: Vec<LinearViews<T>> = layers.iter().map(|layer| ctx.linear(layer.ffn[1])).collect();
    let weights =
        all.clone().map(|g| WeightGrad { dy: dz[g], x: z[g], dw: linear[g].dweight, db: Some(linear[g].dbias) });
    let weights: Vec<_> = weights.collect();
    matmul::backward_weight(ctx.device, ctx.arena, &weights)?;
    let inputs = all.clone().map(|g| {
        let epilogue =
            Epilogue { gelu_grad: Some(saved[g].hidden), dropout: layers[g].ffn_dropout(ctx, 0), ..Default::default() };
        Matmul { a: dz[g], b: linear[g].weight, out: dhidden[g], epilogue }
    });
    matmul::backward_input(ctx.device, &inputs.collect::<Vec<_>>())?;
    ctx.arena.release_scratch(second);

    let linear: Vec<LinearViews<T>> = layers.iter().map(|layer| ctx.linear(layer.ffn[0])).collect();
    let weights =
        all.clone().map(|g| WeightGrad { dy: dhidden[g], x: y[g], dw: linear[g].dweight, db: Some(linear[g].dbias) });
    let weights: Vec<_> = weights.collect();
    matmul::backward_weight(ctx.device, ctx.arena, &weights)?;
    let inputs = all.clone().map(|g| {
        let epilogue = Epilogue { residual: Some(grads[g].dout), ..Default::default() };
        Matmul { a: dhidden[g], b: linear[g].weight, out: du[g], epilogue }
    });
    matmul::backward_input(ctx.device, &inputs.collect::<Vec<_>>())?;
    let norms = all.map(|g| norm_grad(ctx, layers[g].norm, saved[g].u, saved[g].stats, du[g], du[g]));
    let norms: Vec<_> = norms.collect();
    layer_norm::backward(ctx.device, ctx.arena, &norms)?;
    ctx.arena.release_scratch(mark);
    Ok(())
}

/// A self-attention layer: a norm in front.
pub(super) struct SelfLayer {
    norm: Norm,
    layer: Layer,
}

pub(super) struct SavedSelf<T: Element> {
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

    /// Each x `[n0, d]`, padded to `rows` by repeating its first rows; out has the first `queries` rows only.
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

    /// `gradient` holds dout in its first rows (as many as forward's queries) and afterwards dx in its first n0.
    pub fn backward<T: Element>(
        ctx: &mut Context,
        layers: &[&Self],
        saved: Vec<SavedSelf<T>>,
        gradient: &[View<T>],
    ) -> Result<()> {
        let mark = ctx.arena.mark();
        let d = ctx.config.dim;
        let (mut norms, mut grads) = (Vec::new(), Vec::new());
        for (g, layer) in layers.iter().enumerate() {
            let rows = gradient[g].rows();
            let (y, dy) = (ctx.arena.scratch(rows, d)?, ctx.arena.scratch(rows, d)?);
            norms.push(norm(ctx, layer.norm, saved[g].x, saved[g].stats, y));
            let queries = 0..saved[g].layer.q.rows();
            grads.push(LayerGrad {
                x: y.rows_range(queries.clone()),
                context: y,
                dout: gradient[g].rows_range(queries.clone()),
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
}
