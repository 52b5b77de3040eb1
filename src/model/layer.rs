//! The unit that the whole model is made of: attention, norm, feed-forward.
//!
//! ```text
//! u   = x + out_proj(attention(q_proj(x), k_proj(c), v_proj(c)))
//! y   = LayerNorm(u)
//! out = y + ffn(y)
//! ```
//!
//! A cross-attention block queries another bag's tokens c, with one scale embedding added to x and
//! c before the projections; a self-attention block ([`SelfLayer`]) first normalises its input, x =
//! c = LayerNorm(input). The residuals start from the NORMALISED values. Every function takes a
//! group of layers, which run in lockstep so that each op is one launch.

use std::ops::Range;

use super::{
    Context, LinearViews,
    params::{Layout, Linear, Norm, Param},
    policy::pieces,
};
use crate::{
    Result,
    device::{Device, Element, Mark, Real, View},
    ops::{
        Dropout,
        attention::{self, Attention, AttentionGrad},
        elementwise::{self, Map},
        layer_norm::{self, NormGrad},
        matmul::{self, Epilogue, Matmul, WeightGrad},
        scale_embedding::{self, Fold, FoldGrad},
    },
};

pub(super) struct Layer {
    /// Queries', keys' and values' projections side by side.
    qkv: Linear,
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
pub(super) type Forwarded<S, T> = (Vec<S>, Vec<View<T>>);

/// What backward needs of one layer.
pub(super) struct SavedLayer<T: Element> {
    pub attended: View<T>,
    pub lse: View<T::Sum>,
    /// None where backward computes it again.
    kept: Option<(Projected<T>, Tail<T>)>,
}

/// Queries, and keys and values side by side; or their gradients.
#[derive(Clone, Copy)]
struct Projected<T> {
    q: View<T>,
    kv: View<T>,
    /// Both side by side, where queries and context are the same rows: one product has them all.
    qkv: Option<View<T>>,
}

impl<T: Element> Projected<T> {
    /// `room` for each matrix of so many rows and columns.
    fn new(
        x: View<T>,
        context: View<T>,
        d: usize,
        mut room: impl FnMut(usize, usize) -> Result<View<T>>,
    ) -> Result<Self> {
        if (x.address(), x.rows()) == (context.address(), context.rows()) {
            let qkv = room(x.rows(), 3 * d)?;
            return Ok(Self { q: qkv.cols_range(0..d), kv: qkv.cols_range(d..3 * d), qkv: Some(qkv) });
        }
        Ok(Self { q: room(x.rows(), d)?, kv: room(context.rows(), 2 * d)?, qkv: None })
    }
}

/// What the part behind attention computes on its way, of all rows or of a piece.
#[derive(Clone, Copy)]
pub(super) struct Tail<T: Element> {
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
            qkv: layout.linears([&of("q_proj"), &of("k_proj"), &of("v_proj")], dim, dim),
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

    pub(super) fn q(&self) -> Linear {
        self.qkv.outputs(0..self.dim())
    }

    pub(super) fn kv(&self) -> Linear {
        self.qkv.outputs(self.dim()..3 * self.dim())
    }

    fn dim(&self) -> usize {
        self.qkv.bias.cols() / 3
    }

    pub(super) fn attention<T: Element>(
        &self,
        ctx: &Context,
        q: View<T>,
        kv: View<T>,
        (out, lse): (View<T>, View<T::Sum>),
    ) -> Attention<T> {
        let d = q.cols();
        let (k, v) = (kv.cols_range(0..d), kv.cols_range(d..2 * d));
        let dropout = ctx.dropout(self.site, self.attention_dropout);
        Attention { q, k, v, out, lse, heads: ctx.config.heads, dropout }
    }

    /// Of the rows from `row` on.
    fn ffn_dropout(&self, ctx: &Context, which: u32, row: usize) -> Option<Dropout> {
        let dropout = ctx.dropout(self.site + ctx.config.heads as u32 + which, ctx.config.ffn_dropout);
        dropout.map(|dropout| dropout.starting_at(row))
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

/// Each layer's x `[n, d]` and context `[m, d]`; returns what backward needs, and each out `[n, d]`
/// on the saved stack.
pub(super) fn forward<T: Element>(
    ctx: &mut Context,
    layers: &[&Layer],
    x: &[View<T>],
    context: &[View<T>],
) -> Result<Forwarded<SavedLayer<T>, T>> {
    let start = ctx.arena.mark();
    let (mut saved, outs) = allocate(ctx, x)?;
    let mark = ctx.arena.mark();
    let projected = project(ctx, layers, x, context)?;
    let attention = layers.iter().zip(&projected).zip(&saved);
    let attention = attention.map(|((layer, p), saved)| layer.attention(ctx, p.q, p.kv, (saved.attended, saved.lse)));
    let attention: Vec<_> = attention.collect();
    attention::forward(ctx.device, ctx.arena, &attention)?;
    ctx.arena.release_scratch(mark);
    let tails = tail(ctx, layers, x, &saved, &outs)?;
    if ctx.keeps_all() {
        for (saved, kept) in saved.iter_mut().zip(projected.into_iter().zip(tails)) {
            saved.kept = Some(kept);
        }
    }
    ctx.arena.release_scratch(start);
    Ok((saved, outs))
}

/// The outs, and room for attention's.
pub(super) fn allocate<T: Element>(ctx: &mut Context, x: &[View<T>]) -> Result<Forwarded<SavedLayer<T>, T>> {
    let (mut saved, mut outs) = (Vec::new(), Vec::new());
    for x in x {
        let (n, d) = (x.rows(), ctx.config.dim);
        outs.push(ctx.arena.save(n, d)?);
        saved.push(SavedLayer { attended: ctx.keep(n, d)?, lse: ctx.keep(ctx.config.heads, n)?, kept: None });
    }
    Ok((saved, outs))
}

/// All projections of each layer.
fn project<T: Element>(
    ctx: &mut Context,
    layers: &[&Layer],
    x: &[View<T>],
    context: &[View<T>],
) -> Result<Vec<Projected<T>>> {
    let d = ctx.config.dim;
    let (mut projected, mut projections) = (Vec::new(), Vec::new());
    for (g, layer) in layers.iter().enumerate() {
        let p = Projected::new(x[g], context[g], d, |rows, cols| ctx.keep_inner(rows, cols))?;
        match p.qkv {
            Some(qkv) => projections.push(Projection { layer, linear: layer.qkv, a: x[g], out: qkv }),
            None => {
                projections.push(Projection { layer, linear: layer.q(), a: x[g], out: p.q });
                projections.push(Projection { layer, linear: layer.kv(), a: context[g], out: p.kv });
            }
        }
        projected.push(p);
    }
    launch_projections(ctx, &projections)?;
    Ok(projected)
}

/// Queries alone; see [`keys_values`].
pub(super) fn queries<T: Element>(ctx: &mut Context, layers: &[&Layer], x: &[View<T>], q: &[View<T>]) -> Result<()> {
    let projections = layers.iter().zip(x).zip(q);
    let projections = projections.map(|((layer, &a), &out)| Projection { layer, linear: layer.q(), a, out });
    launch_projections(ctx, &projections.collect::<Vec<_>>())
}

/// Keys and values alone, of a part of a context.
pub(super) fn keys_values<T: Element>(
    ctx: &mut Context,
    layers: &[&Layer],
    context: &[View<T>],
    kv: &[View<T>],
) -> Result<()> {
    let projections = layers.iter().zip(context).zip(kv);
    let projections = projections.map(|((layer, &a), &out)| Projection { layer, linear: layer.kv(), a, out });
    launch_projections(ctx, &projections.collect::<Vec<_>>())
}

/// out = a W^T + b of one of a layer's linear maps.
struct Projection<'a, T> {
    layer: &'a Layer,
    linear: Linear,
    a: View<T>,
    out: View<T>,
}

/// As one launch. Scale embeddings are folded into biases, which stay on the scratch stack.
fn launch_projections<T: Element>(ctx: &mut Context, projections: &[Projection<T>]) -> Result<()> {
    let (mut folds, mut products) = (Vec::new(), Vec::new());
    for p in projections {
        let (weight, mut bias) = (p.linear.weight.of(ctx.params), p.linear.bias.of(ctx.params));
        if let Some(embedding) = p.layer.embedding {
            let folded = ctx.arena.scratch(1, bias.cols())?;
            folds.push(Fold { weight, bias, embedding: embedding.of(ctx.params), folded });
            bias = folded;
        }
        let epilogue = Epilogue { bias: Some(bias), ..Default::default() };
        products.push(Matmul { a: p.a, b: weight, out: p.out, epilogue });
    }
    scale_embedding::forward(ctx.device, &folds)?;
    matmul::forward(ctx.device, &products)
}

/// From attention's output to out. Where all is kept there is one piece, and this is what backward
/// needs of it.
pub(super) fn tail<T: Element>(
    ctx: &mut Context,
    layers: &[&Layer],
    x: &[View<T>],
    saved: &[SavedLayer<T>],
    outs: &[View<T>],
) -> Result<Vec<Tail<T>>> {
    let mut tails = Vec::new();
    for rows in pieces(x[0].rows(), ctx.policy.recompute) {
        let mark = ctx.arena.mark();
        let x: Vec<_> = x.iter().map(|x| x.rows_range(rows.clone())).collect();
        tails = residual_norm(ctx, layers, &x, saved, &rows)?;
        let y = scratch(ctx, &x, ctx.config.dim)?;
        norms(ctx, layers, &tails, &y, layer_norm::forward)?;
        let z = hidden(ctx, layers, &tails, &y, &rows)?;
        let products = layers.iter().enumerate().map(|(g, layer)| {
            let linear = ctx.linear::<T>(layer.ffn[1]);
            let (dropout, residual) = (layer.ffn_dropout(ctx, 1, rows.start), Some(y[g]));
            let epilogue = Epilogue { bias: Some(linear.bias), dropout, residual, ..Default::default() };
            Matmul { a: z[g], b: linear.weight, out: outs[g].rows_range(rows.clone()), epilogue }
        });
        matmul::forward(ctx.device, &products.collect::<Vec<_>>())?;
        ctx.arena.release_scratch(mark);
    }
    Ok(tails)
}

/// u = x + out_proj(attended) of some rows; room for the rest of the tail.
fn residual_norm<T: Element>(
    ctx: &mut Context,
    layers: &[&Layer],
    x: &[View<T>],
    saved: &[SavedLayer<T>],
    rows: &Range<usize>,
) -> Result<Vec<Tail<T>>> {
    let (n, d) = (rows.len(), ctx.config.dim);
    let mut tails = Vec::new();
    for _ in layers {
        let (u, stats) = (ctx.keep_inner(n, d)?, ctx.keep_inner(n, 2)?);
        tails.push(Tail { u, stats, hidden: ctx.keep_inner(n, 2 * d)? });
    }
    let products = layers.iter().enumerate().map(|(g, layer)| {
        let out = ctx.linear::<T>(layer.out);
        let epilogue = Epilogue { bias: Some(out.bias), residual: Some(x[g]), ..Default::default() };
        Matmul { a: saved[g].attended.rows_range(rows.clone()), b: out.weight, out: tails[g].u, epilogue }
    });
    matmul::forward(ctx.device, &products.collect::<Vec<_>>())?;
    Ok(tails)
}

/// y = LayerNorm(u), finding its statistics (`layer_norm::forward`) or by them
/// (`layer_norm::apply`).
fn norms<T: Element>(
    ctx: &Context,
    layers: &[&Layer],
    tails: &[Tail<T>],
    y: &[View<T>],
    op: impl FnOnce(&Device, &[layer_norm::Norm<T>]) -> Result<()>,
) -> Result<()> {
    let norms = (0..layers.len()).map(|g| norm(ctx, layers[g].norm, tails[g].u, tails[g].stats, y[g]));
    op(ctx.device, &norms.collect::<Vec<_>>())
}

/// z = dropout(GELU(hidden)), and hidden.
fn hidden<T: Element>(
    ctx: &mut Context,
    layers: &[&Layer],
    tails: &[Tail<T>],
    y: &[View<T>],
    rows: &Range<usize>,
) -> Result<Vec<View<T>>> {
    let z = scratch(ctx, y, 2 * ctx.config.dim)?;
    let products = layers.iter().enumerate().map(|(g, layer)| {
        let linear = ctx.linear::<T>(layer.ffn[0]);
        let (gelu, dropout) = (Some(tails[g].hidden), layer.ffn_dropout(ctx, 0, rows.start));
        let epilogue = Epilogue { bias: Some(linear.bias), gelu, dropout, ..Default::default() };
        Matmul { a: y[g], b: linear.weight, out: z[g], epilogue }
    });
    matmul::forward(ctx.device, &products.collect::<Vec<_>>())?;
    Ok(z)
}

/// A scratch matrix of `cols` columns for each of `like`.
pub(super) fn scratch<T: Element>(ctx: &mut Context, like: &[View<T>], cols: usize) -> Result<Vec<View<T>>> {
    like.iter().map(|x| ctx.arena.scratch(x.rows(), cols)).collect()
}

/// One layer's tensors in backward. In self-attention x is the context's first rows, and dx the
/// context's gradient's.
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
    let mark = ctx.arena.mark();
    let x: Vec<_> = grads.iter().map(|grad| grad.x).collect();
    let context: Vec<_> = grads.iter().map(|grad| grad.context).collect();
    let dout: Vec<_> = grads.iter().map(|grad| grad.dout).collect();
    let (du, dattended) = (scratch(ctx, &x, d)?, scratch(ctx, &x, d)?);
    tail_backward(ctx, layers, (saved, &x), &dout, &du, &dattended)?;

    let mut dprojected = Vec::new();
    for (&x, &context) in x.iter().zip(&context) {
        dprojected.push(Projected::new(x, context, d, |rows, cols| ctx.arena.scratch(rows, cols))?);
    }
    let projected = match saved.iter().map(|saved| saved.kept.map(|kept| kept.0)).collect::<Option<Vec<_>>>() {
        Some(kept) => kept,
        None => project(ctx, layers, &x, &context)?,
    };
    let problems = layers.iter().enumerate().map(|(g, layer)| {
        let forward = layer.attention(ctx, projected[g].q, projected[g].kv, (saved[g].attended, saved[g].lse));
        attention_grad(forward, dattended[g], (dprojected[g].q, dprojected[g].kv))
    });
    let problems: Vec<_> = problems.collect();
    attention::backward(ctx.device, ctx.arena, &problems)?;

    let biases = bias_grads(ctx, layers)?;
    let mut weights = Vec::new();
    for (g, layer) in layers.iter().enumerate() {
        let dy = &dprojected[g];
        match dy.qkv {
            Some(dqkv) => weights.push(weight_grad(ctx, layer.qkv, layer.qkv.bias.of(ctx.grads), x[g], dqkv)),
            None => {
                weights.push(weight_grad(ctx, layer.q(), biases[g][0], x[g], dy.q));
                weights.push(weight_grad(ctx, layer.kv(), biases[g][1], context[g], dy.kv));
            }
        }
    }
    matmul::backward_weight(ctx.device, ctx.arena, &weights)?;
    fold_backward::<T>(ctx, layers, &biases)?;

    let dx: Vec<_> = grads.iter().map(|grad| grad.dx).collect();
    let dcontext: Vec<_> = grads.iter().map(|grad| grad.dcontext).collect();
    if let Some(dqkv) = dprojected.iter().map(|dy| dy.qkv).collect::<Option<Vec<_>>>() {
        matmul::backward_input(ctx.device, &input_grads(ctx, layers, |l| l.qkv, &dqkv, &dx, (Some(&du), false)))?;
    } else {
        let (dq, dkv): (Vec<_>, Vec<_>) = dprojected.iter().map(|dy| (dy.q, dy.kv)).unzip();
        let mut products = input_grads(ctx, layers, Layer::kv, &dkv, &dcontext, (None, false));
        if self_attention {
            matmul::backward_input(ctx.device, &products)?; // queries add to it
            products.clear();
        }
        products.extend(input_grads(ctx, layers, Layer::q, &dq, &dx, (Some(&du), self_attention)));
        matmul::backward_input(ctx.device, &products)?;
    }
    ctx.arena.release_scratch(mark);
    Ok(())
}

pub(super) fn attention_grad<T: Element>(
    forward: Attention<T>,
    dout: View<T>,
    (dq, dkv): (View<T>, View<T>),
) -> AttentionGrad<T> {
    let d = dq.cols();
    AttentionGrad { forward, dout, dq, dk: dkv.cols_range(0..d), dv: dkv.cols_range(d..2 * d) }
}

/// Where the gradients of the projections' biases, queries' and keys' and values', are summed:
/// apart from the parameters' own where a scale embedding is folded in, see [`fold_backward`].
pub(super) fn bias_grads<T: Real>(ctx: &mut Context, layers: &[&Layer]) -> Result<Vec<[View<T>; 2]>> {
    let folded = layers.iter().filter(|layer| layer.embedding.is_some()).count();
    let mut columns = ctx.arena.scratch(1, folded * 3 * ctx.config.dim)?;
    elementwise::zero(ctx.device, columns)?;
    let mut biases = Vec::new();
    for layer in layers {
        let mut pair = [layer.q(), layer.kv()].map(|linear| linear.bias.of(ctx.grads));
        if layer.embedding.is_some() {
            for bias in &mut pair {
                let rest = columns.cols_range(bias.cols()..columns.cols());
                (*bias, columns) = (columns.cols_range(0..bias.cols()), rest);
            }
        }
        biases.push(pair);
    }
    Ok(biases)
}

/// From the gradients of folded biases to those of bias, weight and embedding.
pub(super) fn fold_backward<T: Element>(ctx: &Context, layers: &[&Layer], biases: &[[View<T::Sum>; 2]]) -> Result<()> {
    let mut folds = Vec::new();
    for (layer, biases) in layers.iter().zip(biases) {
        let Some(embedding) = layer.embedding else { continue };
        for (linear, &dfolded) in [layer.q(), layer.kv()].into_iter().zip(biases) {
            let LinearViews { weight, dweight, dbias, .. } = ctx.linear::<T>(linear);
            let (embedding, dembedding) = (embedding.of(ctx.params), embedding.of(ctx.grads));
            folds.push(FoldGrad { weight, embedding, dfolded, dweight, dbias, dembedding });
        }
    }
    scale_embedding::backward(ctx.device, &folds)
}

pub(super) fn weight_grad<T: Element>(
    ctx: &Context,
    linear: Linear,
    db: View<T::Sum>,
    x: View<T>,
    dy: View<T>,
) -> WeightGrad<T> {
    WeightGrad { dy, x, dw: linear.weight.of(ctx.grads), db }
}

/// dx = dy W + residual of one of each layer's linear maps, added to what dx held if `accumulate`.
pub(super) fn input_grads<T: Element>(
    ctx: &Context,
    layers: &[&Layer],
    linear: impl Fn(&Layer) -> Linear,
    dy: &[View<T>],
    dx: &[View<T>],
    (residual, accumulate): (Option<&[View<T>]>, bool),
) -> Vec<Matmul<T>> {
    let products = layers.iter().enumerate().map(|(g, layer)| {
        let epilogue = Epilogue { accumulate, residual: residual.map(|residual| residual[g]), ..Default::default() };
        Matmul { a: dy[g], b: linear(layer).weight.of(ctx.params), out: dx[g], epilogue }
    });
    products.collect()
}

/// From dout to du and dattended, through out = y + ffn(y), y = LayerNorm(u) and u = x +
/// out_proj(attended).
pub(super) fn tail_backward<T: Element>(
    ctx: &mut Context,
    layers: &[&Layer],
    (saved, x): (&[SavedLayer<T>], &[View<T>]),
    dout: &[View<T>],
    du: &[View<T>],
    dattended: &[View<T>],
) -> Result<()> {
    for rows in pieces(x[0].rows(), ctx.policy.recompute) {
        let mark = ctx.arena.mark();
        let of = |views: &[View<T>]| views.iter().map(|view| view.rows_range(rows.clone())).collect::<Vec<_>>();
        let (x, dout, du, dattended) = (of(x), of(dout), of(du), of(dattended));
        let mut weights = feed_forward_backward(ctx, layers, (saved, &x), &dout, &du, &rows)?;

        let linear: Vec<LinearViews<T>> = layers.iter().map(|layer| ctx.linear(layer.out)).collect();
        weights.extend(linear.iter().enumerate().map(|(g, linear)| {
            let attended = saved[g].attended.rows_range(rows.clone());
            WeightGrad { dy: du[g], x: attended, dw: linear.dweight, db: linear.dbias }
        }));
        matmul::backward_weight(ctx.device, ctx.arena, &weights)?;
        let inputs = linear.iter().enumerate();
        let inputs = inputs.map(|(g, linear)| Matmul {
            a: du[g],
            b: linear.weight,
            out: dattended[g],
            epilogue: Epilogue::default(),
        });
        matmul::backward_input(ctx.device, &inputs.collect::<Vec<_>>())?;
        ctx.arena.release_scratch(mark);
    }
    Ok(())
}

/// From dout to du of some rows. Returns the weight gradients that are still to be summed: the
/// tail's go as one launch, while their operands stay on the scratch stack.
fn feed_forward_backward<T: Element>(
    ctx: &mut Context,
    layers: &[&Layer],
    (saved, x): (&[SavedLayer<T>], &[View<T>]),
    dout: &[View<T>],
    du: &[View<T>],
    rows: &Range<usize>,
) -> Result<Vec<WeightGrad<T>>> {
    let d = ctx.config.dim;
    let y = scratch(ctx, du, d)?;
    let tails = match saved.iter().map(|saved| saved.kept.map(|kept| kept.1)).collect::<Option<Vec<_>>>() {
        Some(kept) => {
            norms(ctx, layers, &kept, &y, layer_norm::apply)?;
            kept
        }
        None => {
            let tails = residual_norm(ctx, layers, x, saved, rows)?;
            norms(ctx, layers, &tails, &y, layer_norm::forward)?;
            let products = layers.iter().enumerate().map(|(g, layer)| {
                let linear = ctx.linear::<T>(layer.ffn[0]);
                let epilogue = Epilogue { bias: Some(linear.bias), ..Default::default() };
                Matmul { a: y[g], b: linear.weight, out: tails[g].hidden, epilogue }
            });
            matmul::forward(ctx.device, &products.collect::<Vec<_>>())?;
            tails
        }
    };

    // z = dropout(GELU(hidden)) again, and dz, the gradient behind the second dropout
    let z = scratch(ctx, du, 2 * d)?;
    let (mut maps, mut dz) = (Vec::new(), dout.to_vec());
    for (g, layer) in layers.iter().enumerate() {
        let dropout = layer.ffn_dropout(ctx, 0, rows.start);
        maps.push(Map { x: tails[g].hidden, gelu: true, dropout, out: z[g] });
        let dropout = layer.ffn_dropout(ctx, 1, rows.start);
        if dropout.is_some() {
            dz[g] = ctx.arena.scratch(rows.len(), d)?;
            maps.push(Map { x: dout[g], gelu: false, dropout, out: dz[g] });
        }
    }
    elementwise::map(ctx.device, &maps)?;

    let dhidden = scratch(ctx, du, 2 * d)?;
    let inputs = layers.iter().enumerate().map(|(g, layer)| {
        let (gelu_grad, dropout) = (Some(tails[g].hidden), layer.ffn_dropout(ctx, 0, rows.start));
        let epilogue = Epilogue { gelu_grad, dropout, ..Default::default() };
        Matmul { a: dz[g], b: layer.ffn[1].weight.of(ctx.params), out: dhidden[g], epilogue }
    });
    matmul::backward_input(ctx.device, &inputs.collect::<Vec<_>>())?;
    let inputs = layers.iter().enumerate().map(|(g, layer)| {
        let epilogue = Epilogue { residual: Some(dout[g]), ..Default::default() };
        Matmul { a: dhidden[g], b: layer.ffn[0].weight.of(ctx.params), out: du[g], epilogue }
    });
    matmul::backward_input(ctx.device, &inputs.collect::<Vec<_>>())?;
    let norms = 0..layers.len();
    let norms = norms.map(|g| norm_grad(ctx, layers[g].norm, tails[g].u, tails[g].stats, du[g], du[g]));
    layer_norm::backward(ctx.device, ctx.arena, &norms.collect::<Vec<_>>())?;

    let weights = layers.iter().enumerate().flat_map(|(g, layer)| {
        let [first, second] = layer.ffn.map(|linear| ctx.linear::<T>(linear));
        [
            WeightGrad { dy: dz[g], x: z[g], dw: second.dweight, db: second.dbias },
            WeightGrad { dy: dhidden[g], x: y[g], dw: first.dweight, db: first.dbias },
        ]
    });
    Ok(weights.collect())
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
            let queries = 0..saved[g].layer.attended.rows();
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
}
