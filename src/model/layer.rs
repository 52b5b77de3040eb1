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

mod self_layer;
mod tail;

pub(super) use self_layer::{SavedSelf, SelfLayer};
pub(super) use tail::{Tail, TailGrad, tail, tail_backward};

use super::{
    Context, LinearViews,
    params::{Layout, Linear, NormWeights, Param},
    policy::pieces,
};
use crate::{
    Result,
    device::{Element, Real, View},
    ops::{
        attention::{self, Attention, AttentionGrad},
        elementwise,
        layer_norm::{self, NormGrad},
        matmul::{self, Epilogue, Matmul, WeightGrad},
        scale_embedding::{self, FoldEmbedding, FoldEmbeddingGrad},
    },
};

pub(super) struct Layer {
    /// Queries', keys' and values' projections side by side.
    qkv: Linear,
    out: Linear,
    embedding: Option<Param>,
    norm: NormWeights,
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

/// What attention writes.
#[derive(Clone, Copy)]
pub(super) struct Attended<T: Element> {
    /// `[n, d]`
    pub out: View<T>,
    /// `[heads, n]`
    pub lse: View<T::Sum>,
}

/// What backward needs of one layer.
pub(super) struct SavedLayer<T: Element> {
    pub attended: Attended<T>,
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
    /// `matrix` gives memory for so many rows and columns.
    fn new(
        x: View<T>,
        context: View<T>,
        d: usize,
        mut matrix: impl FnMut(usize, usize) -> Result<View<T>>,
    ) -> Result<Self> {
        if (x.address(), x.rows()) == (context.address(), context.rows()) {
            let qkv = matrix(x.rows(), 3 * d)?;
            return Ok(Self { q: qkv.cols_range(0..d), kv: qkv.cols_range(d..3 * d), qkv: Some(qkv) });
        }
        Ok(Self { q: matrix(x.rows(), d)?, kv: matrix(context.rows(), 2 * d)?, qkv: None })
    }
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
        Attended { out, lse }: Attended<T>,
    ) -> Attention<T> {
        let d = q.cols();
        let (k, v) = (kv.cols_range(0..d), kv.cols_range(d..2 * d));
        let dropout = ctx.dropout(self.site, self.attention_dropout);
        Attention { q, k, v, out, lse, heads: ctx.config.heads, dropout }
    }
}

pub(super) fn norm<T: Element>(
    ctx: &Context,
    norm: NormWeights,
    x: View<T>,
    stats: View<T::Sum>,
    y: View<T>,
) -> layer_norm::Norm<T> {
    layer_norm::Norm { x, stats, weight: norm.weight.of(ctx.params), bias: norm.bias.of(ctx.params), y }
}

pub(super) fn norm_grad<T: Element>(
    ctx: &Context,
    norm: NormWeights,
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
    let attention = attention.map(|((layer, p), saved)| layer.attention(ctx, p.q, p.kv, saved.attended));
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

/// Memory for the outs, and for attention's.
pub(super) fn allocate<T: Element>(ctx: &mut Context, x: &[View<T>]) -> Result<Forwarded<SavedLayer<T>, T>> {
    let (mut saved, mut outs) = (Vec::new(), Vec::new());
    for x in x {
        let (n, d) = (x.rows(), ctx.config.dim);
        outs.push(ctx.arena.save(n, d)?);
        let attended = Attended { out: ctx.keep(n, d)?, lse: ctx.keep(ctx.config.heads, n)? };
        saved.push(SavedLayer { attended, kept: None });
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
            folds.push(FoldEmbedding { weight, bias, embedding: embedding.of(ctx.params), folded });
            bias = folded;
        }
        let epilogue = Epilogue { bias: Some(bias), ..Default::default() };
        products.push(Matmul { a: p.a, b: weight, out: p.out, epilogue });
    }
    scale_embedding::forward(ctx.device, &folds)?;
    matmul::forward(ctx.device, &products)
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
    tail_backward(ctx, layers, saved, &TailGrad { x: &x, dout: &dout, du: &du, dattended: &dattended })?;

    let mut dprojected = Vec::new();
    for (&x, &context) in x.iter().zip(&context) {
        dprojected.push(Projected::new(x, context, d, |rows, cols| ctx.arena.scratch(rows, cols))?);
    }
    let projected = projected(ctx, layers, saved, &x, &context)?;
    let problems = layers.iter().enumerate().map(|(g, layer)| {
        let forward = layer.attention(ctx, projected[g].q, projected[g].kv, saved[g].attended);
        attention_grad(forward, dattended[g], dprojected[g].q, dprojected[g].kv)
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
    let residual = |accumulate| {
        let du = &du;
        move |g: usize| Epilogue { accumulate, residual: Some(du[g]), ..Default::default() }
    };
    if let Some(dqkv) = dprojected.iter().map(|dy| dy.qkv).collect::<Option<Vec<_>>>() {
        matmul::backward_input(ctx.device, &input_grads(ctx, layers, |l| l.qkv, &dqkv, &dx, residual(false)))?;
    } else {
        let (dq, dkv): (Vec<_>, Vec<_>) = dprojected.iter().map(|dy| (dy.q, dy.kv)).unzip();
        let mut products = input_grads(ctx, layers, Layer::kv, &dkv, &dcontext, |_| Epilogue::default());
        if self_attention {
            matmul::backward_input(ctx.device, &products)?; // queries add to it
            products.clear();
        }
        products.extend(input_grads(ctx, layers, Layer::q, &dq, &dx, residual(self_attention)));
        matmul::backward_input(ctx.device, &products)?;
    }
    ctx.arena.release_scratch(mark);
    Ok(())
}

/// Each layer's projections, kept by forward or computed again.
fn projected<T: Element>(
    ctx: &mut Context,
    layers: &[&Layer],
    saved: &[SavedLayer<T>],
    x: &[View<T>],
    context: &[View<T>],
) -> Result<Vec<Projected<T>>> {
    match saved.iter().map(|saved| saved.kept.map(|kept| kept.0)).collect() {
        Some(kept) => Ok(kept),
        None => project(ctx, layers, x, context),
    }
}

/// [`received`] of one layer, which forward was given x and context.
pub(super) fn received_by_context<T: Element>(
    ctx: &mut Context,
    layer: &Layer,
    saved: &SavedLayer<T>,
    x: View<T>,
    context: View<T>,
    weights: &[f64],
) -> Result<Vec<f64>> {
    let mark = ctx.arena.mark();
    let Projected { q, kv, .. } = projected(ctx, &[layer], std::slice::from_ref(saved), &[x], &[context])?[0];
    let attention = layer.attention(ctx, q, kv, saved.attended);
    let received = received(ctx, attention, weights);
    ctx.arena.release_scratch(mark);
    received
}

/// Rows that go between the host and the device at a time.
const ROWS: usize = 4096;

/// The attention that each of a context's rows receives: with P the probabilities, the sum over the
/// queries i of `weights[i] P[i, j]`, averaged over the heads.
///
/// Attention's backward pass has it: dv = Pᵀ dout is that sum, in every column of a head, where
/// dout is `weights[i]` all along its row i. So P is found again from q, k and the log-sum-exp,
/// tile by tile, whether or not these are of a whole context.
pub(super) fn received<T: Element>(ctx: &mut Context, forward: Attention<T>, weights: &[f64]) -> Result<Vec<f64>> {
    let mark = ctx.arena.mark();
    let (n, m, d) = (forward.q.rows(), forward.k.rows(), forward.q.cols());
    let (dout, dq, dkv) = (ctx.arena.scratch(n, d)?, ctx.arena.scratch(n, d)?, ctx.arena.scratch(m, 2 * d)?);
    for rows in pieces(n, Some(ROWS)) {
        let of_row = |&weight: &f64| std::iter::repeat_n(T::from_sum(T::Sum::of(weight)), d);
        let values: Vec<T> = weights[rows.clone()].iter().flat_map(of_row).collect();
        ctx.device.upload(&values, dout.rows_range(rows))?;
    }
    let gradient = attention_grad(forward, dout, dq, dkv);
    attention::backward(ctx.device, ctx.arena, &[gradient])?;
    let mut received = Vec::with_capacity(m);
    for rows in pieces(m, Some(ROWS)) {
        let mean = |row: &[T]| row.iter().map(|x| x.to_sum().f64()).sum::<f64>() / d as f64;
        received.extend(ctx.device.download(gradient.dv.rows_range(rows))?.chunks_exact(d).map(mean));
    }
    ctx.arena.release_scratch(mark);
    Ok(received)
}

pub(super) fn attention_grad<T: Element>(
    forward: Attention<T>,
    dout: View<T>,
    dq: View<T>,
    dkv: View<T>,
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
            folds.push(FoldEmbeddingGrad { weight, embedding, dfolded, dweight, dbias, dembedding });
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

/// dx = epilogue(dy W) of one of each layer's linear maps.
pub(super) fn input_grads<T: Element>(
    ctx: &Context,
    layers: &[&Layer],
    linear: impl Fn(&Layer) -> Linear,
    dy: &[View<T>],
    dx: &[View<T>],
    epilogue: impl Fn(usize) -> Epilogue<T>,
) -> Vec<Matmul<T>> {
    let products = layers.iter().enumerate().map(|(g, layer)| {
        let b = linear(layer).weight.of(ctx.params);
        Matmul { a: dy[g], b, out: dx[g], epilogue: epilogue(g) }
    });
    products.collect()
}
