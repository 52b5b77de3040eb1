//! The part of a layer behind attention: u = x + out_proj(attended), y = LayerNorm(u) and
//! out = y + ffn(y). It goes by rows, and so in pieces where a policy recomputes.

use std::ops::Range;

use super::{Layer, SavedLayer, norm, norm_grad, scratch};
use crate::{
    Result,
    device::{Device, Element, View},
    model::{Context, LinearViews, policy::pieces},
    ops::{
        Dropout,
        elementwise::{self, Map},
        layer_norm,
        matmul::{self, Epilogue, Matmul, WeightGrad},
    },
};

/// What the part behind attention computes on its way, of all rows or of a piece.
#[derive(Clone, Copy)]
pub(in crate::model) struct Tail<T: Element> {
    u: View<T>,
    stats: View<T::Sum>,
    /// Before GELU.
    hidden: View<T>,
}

/// From attention's output to out. Where all is kept there is one piece, and this is what backward
/// needs of it.
pub(in crate::model) fn tail<T: Element>(
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

impl Layer {
    /// Of the rows from `row` on.
    fn ffn_dropout(&self, ctx: &Context, which: u32, row: usize) -> Option<Dropout> {
        let dropout = ctx.dropout(self.site + ctx.config.heads as u32 + which, ctx.config.ffn_dropout);
        dropout.map(|dropout| dropout.starting_at(row))
    }
}

/// u = x + out_proj(attended) of some rows; memory for the rest of the tail.
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
        Matmul { a: saved[g].attended.out.rows_range(rows.clone()), b: out.weight, out: tails[g].u, epilogue }
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

/// The tail's tensors in backward, `[n, d]` of each layer.
#[derive(Clone, Copy)]
pub(in crate::model) struct TailGrad<'a, T> {
    pub x: &'a [View<T>],
    pub dout: &'a [View<T>],
    /// Overwritten.
    pub du: &'a [View<T>],
    /// The gradient of attention's output; overwritten.
    pub dattended: &'a [View<T>],
}

/// From dout to du and dattended.
pub(in crate::model) fn tail_backward<T: Element>(
    ctx: &mut Context,
    layers: &[&Layer],
    saved: &[SavedLayer<T>],
    grad: &TailGrad<T>,
) -> Result<()> {
    for rows in pieces(grad.x[0].rows(), ctx.policy.recompute) {
        let mark = ctx.arena.mark();
        let of = |views: &[View<T>]| views.iter().map(|view| view.rows_range(rows.clone())).collect::<Vec<_>>();
        let (x, dout, du, dattended) = (of(grad.x), of(grad.dout), of(grad.du), of(grad.dattended));
        let piece = TailGrad { x: &x, dout: &dout, du: &du, dattended: &dattended };
        let mut weights = feed_forward_backward(ctx, layers, saved, &piece, &rows)?;

        let linear: Vec<LinearViews<T>> = layers.iter().map(|layer| ctx.linear(layer.out)).collect();
        weights.extend(linear.iter().enumerate().map(|(g, linear)| {
            let attended = saved[g].attended.out.rows_range(rows.clone());
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

/// From dout to du of the piece `grad`, which begins at a row of the whole. Returns the weight gradients that are still to be summed: the
/// tail's go as one launch, while their operands stay on the scratch stack.
fn feed_forward_backward<T: Element>(
    ctx: &mut Context,
    layers: &[&Layer],
    saved: &[SavedLayer<T>],
    grad: &TailGrad<T>,
    rows: &Range<usize>,
) -> Result<Vec<WeightGrad<T>>> {
    let (d, TailGrad { x, dout, du, .. }) = (ctx.config.dim, *grad);
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
