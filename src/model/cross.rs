//! Cross-attention of the x10 tokens to x5 and to x20: held whole, or to contexts that come part by
//! part, so that no tensor as long as x5 or x20 is ever held.
//!
//! Streamed, forward projects a part to tokens, keys and values, attends to it, and merges the
//! result into that of the parts before (`attention::merge`). Backward reads the parts again: with
//! the whole context's output and log-sum-exp, the gradients of a part's keys and values are final,
//! and go down to the input projection at once; the queries' are summed. docs/giant-bags.md has the
//! algebra.

use super::{
    Context,
    bags::BagGrad,
    layer::{self, Attended, Forwarded, Layer, LayerGrad, SavedLayer, TailGrad, scratch},
    projection::{Input, Projection, project, project_backward},
    stream::Stream,
};
use crate::{
    Result,
    device::{Element, Mark, View},
    ops::{
        attention::{self, Merge},
        elementwise,
        matmul::{self, Epilogue},
    },
};

/// The coarse and the fine context, x5 and x20.
const CONTEXTS: usize = 2;

/// The layers of both contexts, and the contexts' own projections.
pub(super) struct CrossAttention {
    pub projections: [Projection; CONTEXTS],
    pub layers: [Layer; CONTEXTS],
}

/// What backward needs, beside the tokens that query.
pub(super) struct SavedCross<'a, T: Element> {
    contexts: Contexts<'a, T>,
    layers: Vec<SavedLayer<T>>,
    /// The saved stack before the layers.
    before: Mark,
}

/// The contexts on their way in.
pub(super) enum Contexts<'a, T: Element> {
    Held(Vec<Input<T>>),
    Streamed(Stream<'a, T>),
}

/// The tokens that query, and both outputs' gradients.
pub(super) struct CrossGrad<'a, T: Element> {
    pub x: View<T>,
    pub dout: &'a [View<T>; CONTEXTS],
    /// Of x, by way of each context; overwritten.
    pub dx: &'a [View<T>],
    /// Receive the contexts' gradients, where these are wanted.
    pub dbags: Option<[BagGrad<T>; CONTEXTS]>,
}

/// The contexts that are held, and their tokens' gradients on the scratch stack; none where they
/// are streamed.
pub(super) struct HeldGrads<T: Element> {
    pub inputs: Vec<Input<T>>,
    pub dtokens: Vec<View<T>>,
}

/// A part's projections.
struct Part<'a, T: Element> {
    /// Which context each is of.
    places: Vec<usize>,
    projections: Vec<Projection>,
    inputs: Vec<Input<T>>,
    layers: Vec<&'a Layer>,
    tokens: Vec<View<T>>,
    kv: Vec<View<T>>,
}

impl CrossAttention {
    /// x `[n, d]` attends to each context; two outs `[n, d]` on the saved stack.
    pub fn forward<'a, T: Element>(
        &self,
        ctx: &mut Context,
        x: View<T>,
        contexts: Contexts<'a, T>,
    ) -> Result<(SavedCross<'a, T>, Vec<View<T>>)> {
        let before = ctx.arena.mark();
        let (layers, outs) = match &contexts {
            Contexts::Held(inputs) => {
                let tokens: Vec<_> = inputs.iter().map(|input| input.tokens).collect();
                layer::forward(ctx, &self.layers(), &[x; CONTEXTS], &tokens)?
            }
            Contexts::Streamed(stream) => self.forward_streamed(ctx, x, stream)?,
        };
        Ok((SavedCross { contexts, layers, before }, outs))
    }

    /// dx =; parameter gradients +=. The contexts that are held are for the caller to project back
    /// with its own tokens; streamed ones are done.
    pub fn backward<T: Element>(
        &self,
        ctx: &mut Context,
        saved: SavedCross<'_, T>,
        grad: &CrossGrad<T>,
    ) -> Result<HeldGrads<T>> {
        let SavedCross { contexts, layers, before } = saved;
        let held = match contexts {
            Contexts::Held(inputs) => {
                let tokens: Vec<_> = inputs.iter().map(|input| input.tokens).collect();
                let dtokens = scratch(ctx, &tokens, ctx.config.dim)?;
                let grads = (0..CONTEXTS).map(|g| LayerGrad {
                    x: grad.x,
                    context: tokens[g],
                    dout: grad.dout[g],
                    dx: grad.dx[g],
                    dcontext: dtokens[g],
                });
                layer::backward(ctx, &self.layers(), &layers, &grads.collect::<Vec<_>>(), false)?;
                HeldGrads { inputs, dtokens }
            }
            Contexts::Streamed(stream) => {
                self.backward_streamed(ctx, &layers, &stream, grad)?;
                HeldGrads { inputs: Vec::new(), dtokens: Vec::new() }
            }
        };
        ctx.arena.release_saved(before);
        Ok(held)
    }

    /// The attention that each patch of each context receives, where each of the tokens x that query
    /// gives so much.
    pub fn received<T: Element>(
        &self,
        ctx: &mut Context,
        saved: SavedCross<'_, T>,
        x: View<T>,
        weights: &[f64],
    ) -> Result<[Vec<f64>; CONTEXTS]> {
        let SavedCross { contexts, layers: saved, before } = saved;
        let mut received = [Vec::new(), Vec::new()];
        match contexts {
            Contexts::Held(inputs) => {
                for (g, layer) in self.layers.iter().enumerate() {
                    received[g] = layer::received_by_context(ctx, layer, &saved[g], x, inputs[g].tokens, weights)?;
                }
            }
            Contexts::Streamed(stream) => {
                let start = ctx.arena.mark();
                let q = scratch(ctx, &[x; CONTEXTS], ctx.config.dim)?;
                layer::queries(ctx, &self.layers(), &[x; CONTEXTS], &q)?;
                for staged in stream.parts(ctx.device) {
                    let mark = ctx.arena.mark();
                    let part = self.part(ctx, &staged?.bags)?;
                    for ((&g, layer), &kv) in part.places.iter().zip(&part.layers).zip(&part.kv) {
                        let attention = layer.attention(ctx, q[g], kv, saved[g].attended);
                        received[g].extend(layer::received(ctx, attention, weights)?);
                    }
                    ctx.arena.release_scratch(mark);
                }
                ctx.arena.release_scratch(start);
            }
        }
        ctx.arena.release_saved(before);
        Ok(received)
    }

    fn layers(&self) -> [&Layer; CONTEXTS] {
        self.layers.each_ref()
    }

    /// As `layer::forward` with the contexts' tokens.
    fn forward_streamed<T: Element>(
        &self,
        ctx: &mut Context,
        x: View<T>,
        stream: &Stream<'_, T>,
    ) -> Result<Forwarded<SavedLayer<T>, T>> {
        let start = ctx.arena.mark();
        let (n, d, heads) = (x.rows(), ctx.config.dim, ctx.config.heads);
        let (layers, x) = (self.layers(), [x; CONTEXTS]);
        let (saved, outs) = layer::allocate(ctx, &x)?;
        let mark = ctx.arena.mark();
        let q = scratch(ctx, &x, d)?;
        layer::queries(ctx, &layers, &x, &q)?;
        let sums = [ctx.arena.scratch(n, d)?, ctx.arena.scratch(n, d)?];
        for staged in stream.parts(ctx.device) {
            let staged = staged?;
            let mark = ctx.arena.mark();
            let part = self.part(ctx, &staged.bags)?;
            let (mut attentions, mut merges) = (Vec::new(), Vec::new());
            for ((&g, layer), &kv) in part.places.iter().zip(&part.layers).zip(&part.kv) {
                let part = Attended { out: ctx.arena.scratch(n, d)?, lse: ctx.arena.scratch(heads, n)? };
                attentions.push(layer.attention(ctx, q[g], kv, part));
                let (first, lse) = (staged.range.start == 0, saved[g].attended.lse);
                merges.push(Merge { part: part.out, part_lse: part.lse, out: sums[g], lse, first });
            }
            attention::forward(ctx.device, ctx.arena, &attentions)?;
            attention::merge(ctx.device, &merges)?;
            ctx.arena.release_scratch(mark);
        }
        for (sum, saved) in sums.into_iter().zip(&saved) {
            elementwise::round(ctx.device, sum, saved.attended.out)?;
        }
        ctx.arena.release_scratch(mark);
        layer::tail(ctx, &layers, &x, &saved, &outs)?;
        ctx.arena.release_scratch(start);
        Ok((saved, outs))
    }

    /// As [`Self::backward`], down to the contexts' bags.
    fn backward_streamed<T: Element>(
        &self,
        ctx: &mut Context,
        saved: &[SavedLayer<T>],
        stream: &Stream<'_, T>,
        grad: &CrossGrad<T>,
    ) -> Result<()> {
        let start = ctx.arena.mark();
        let d = ctx.config.dim;
        let (layers, x) = (self.layers(), [grad.x; CONTEXTS]);
        let (du, dattended) = (scratch(ctx, &x, d)?, scratch(ctx, &x, d)?);
        let tail = TailGrad { x: &x, dout: grad.dout, du: &du, dattended: &dattended };
        layer::tail_backward(ctx, &layers, saved, &tail)?;

        let q = scratch(ctx, &x, d)?;
        layer::queries(ctx, &layers, &x, &q)?;
        let biases = layer::bias_grads(ctx, &layers)?;
        let sums = [ctx.arena.scratch(x[0].rows(), d)?, ctx.arena.scratch(x[0].rows(), d)?];
        for sum in sums {
            elementwise::zero::<T::Sum>(ctx.device, sum)?;
        }
        for staged in stream.parts(ctx.device) {
            let staged = staged?;
            let mark = ctx.arena.mark();
            let part = self.part(ctx, &staged.bags)?;
            let dkv = scratch(ctx, &part.tokens, 2 * d)?;
            let after = ctx.arena.mark();
            let mut problems = Vec::new();
            for (i, &g) in part.places.iter().enumerate() {
                let forward = part.layers[i].attention(ctx, q[g], part.kv[i], saved[g].attended);
                let dq = ctx.arena.scratch(q[g].rows(), d)?;
                problems.push(layer::attention_grad(forward, dattended[g], dq, dkv[i]));
            }
            attention::backward(ctx.device, ctx.arena, &problems)?;
            for (&g, problem) in part.places.iter().zip(&problems) {
                elementwise::accumulate(ctx.device, problem.dq, sums[g])?;
            }
            ctx.arena.release_scratch(after);

            let weights = part
                .places
                .iter()
                .enumerate()
                .map(|(i, &g)| layer::weight_grad(ctx, part.layers[i].kv(), biases[g][1], part.tokens[i], dkv[i]));
            let weights: Vec<_> = weights.collect();
            matmul::backward_weight(ctx.device, ctx.arena, &weights)?;
            let dtokens = scratch(ctx, &part.tokens, d)?;
            let inputs = layer::input_grads(ctx, &part.layers, Layer::kv, &dkv, &dtokens, |_| Epilogue::default());
            matmul::backward_input(ctx.device, &inputs)?;
            let dbags = grad.dbags.map(|dbags| {
                let of = |(&g, input): (&usize, &Input<T>)| {
                    let rows = staged.range.start..staged.range.start + input.tokens.rows();
                    dbags[g].rows_range(rows)
                };
                part.places.iter().zip(&part.inputs).map(of).collect::<Vec<_>>()
            });
            project_backward(ctx, &part.projections, &part.inputs, &dtokens, dbags.as_deref())?;
            ctx.arena.release_scratch(mark);
        }
        let dq = scratch(ctx, &x, d)?;
        for (sum, &dq) in sums.into_iter().zip(&dq) {
            elementwise::round(ctx.device, sum, dq)?;
        }
        let weights = (0..CONTEXTS).map(|g| layer::weight_grad(ctx, layers[g].q(), biases[g][0], x[g], dq[g]));
        let weights: Vec<_> = weights.collect();
        matmul::backward_weight(ctx.device, ctx.arena, &weights)?;
        layer::fold_backward::<T>(ctx, &layers, &biases)?;
        let residual = |g: usize| Epilogue { residual: Some(du[g]), ..Default::default() };
        matmul::backward_input(ctx.device, &layer::input_grads(ctx, &layers, Layer::q, &dq, grad.dx, residual))?;
        ctx.arena.release_scratch(start);
        Ok(())
    }

    fn part<T: Element>(&self, ctx: &mut Context, bags: &[(usize, View<T>)]) -> Result<Part<'_, T>> {
        let (places, bags): (Vec<_>, Vec<_>) = bags.iter().copied().unzip();
        let projections: Vec<_> = places.iter().map(|&g| self.projections[g]).collect();
        let layers: Vec<_> = places.iter().map(|&g| &self.layers[g]).collect();
        let inputs = project(ctx, &projections, &bags, false)?;
        let tokens: Vec<_> = inputs.iter().map(|input| input.tokens).collect();
        let kv = scratch(ctx, &tokens, 2 * ctx.config.dim)?;
        layer::keys_values(ctx, &layers, &tokens, &kv)?;
        Ok(Part { places, projections, inputs, layers, tokens, kv })
    }
}
