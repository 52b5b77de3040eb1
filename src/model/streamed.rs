//! Cross-attention to contexts that come part by part, so that no tensor as long as x5 or x20 is ever held.
//!
//! Forward projects a part to tokens, keys and values, attends to it, and merges the result into that of the parts before
//! (`attention::merge`). Backward reads the parts again: with the whole context's output and log-sum-exp, the gradients of a part's keys
//! and values are final, and go down to the input projection at once; the queries' are summed. docs/giant-bags.md has the algebra.

use std::ops::Range;

use super::{
    Bag, Context, CrossFusion,
    crossfusion::{Input, Inputs},
    layer::{self, Forwarded, Layer, SavedLayer, scratch},
    policy::pieces,
};
use crate::{
    Result,
    device::{Element, View},
    ops::{
        attention::{self, Merge},
        elementwise, matmul,
    },
};

/// Contexts on their way.
#[derive(Clone, Copy)]
pub(super) struct Stream<'a, T: Element> {
    pub bags: [Bag<'a, T>; 2],
    /// At most so many at a time.
    pub patches: usize,
    /// What they are copied to, where they are.
    pub buffers: [Option<View<T>>; 2],
}

impl<'a, T: Element> Stream<'a, T> {
    pub fn new(ctx: &mut Context, bags: [Bag<'a, T>; 2], patches: usize) -> Result<Self> {
        let [x5, x20] = &bags;
        let buffers = [ctx.stream_buffer(x5, patches)?, ctx.stream_buffer(x20, patches)?];
        Ok(Self { bags, patches, buffers })
    }

    fn parts(&self) -> impl Iterator<Item = Range<usize>> + use<T> {
        let [x5, x20] = self.bags.map(|bag| bag.patches());
        pieces(x5.max(x20), Some(self.patches))
    }
}

/// One part of the contexts that reach so far.
struct Part<'a, T: Element> {
    inputs: Inputs<T>,
    layers: Vec<&'a Layer>,
    tokens: Vec<View<T>>,
    kv: Vec<View<T>>,
}

impl CrossFusion {
    /// As `layer::forward` with the contexts' tokens.
    pub(super) fn cross_streamed<T: Element>(
        &self,
        ctx: &mut Context,
        x: View<T>,
        stream: &Stream<'_, T>,
    ) -> Result<Forwarded<SavedLayer<T>, T>> {
        let start = ctx.arena.mark();
        let (n, d, heads) = (x.rows(), ctx.config.dim, ctx.config.heads);
        let (layers, x) = ([&self.cross[0], &self.cross[1]], [x; 2]);
        let (saved, outs) = layer::allocate(ctx, &x)?;
        let mark = ctx.arena.mark();
        let q = scratch(ctx, &x, d)?;
        layer::queries(ctx, &layers, &x, &q)?;
        let sums = [ctx.arena.scratch(n, d)?, ctx.arena.scratch(n, d)?];
        for range in stream.parts() {
            let mark = ctx.arena.mark();
            let part = self.part(ctx, stream, &range)?;
            let (mut attentions, mut merges) = (Vec::new(), Vec::new());
            for ((input, layer), &kv) in part.inputs.iter().zip(&part.layers).zip(&part.kv) {
                let g = input.scale;
                let (out, lse) = (ctx.arena.scratch(n, d)?, ctx.arena.scratch(heads, n)?);
                attentions.push(layer.attention(ctx, q[g], kv, (out, lse)));
                let first = range.start == 0;
                merges.push(Merge { part: out, part_lse: lse, out: sums[g], lse: saved[g].lse, first });
            }
            attention::forward(ctx.device, ctx.arena, &attentions)?;
            attention::merge(ctx.device, &merges)?;
            ctx.arena.release_scratch(mark);
        }
        for (sum, saved) in sums.into_iter().zip(&saved) {
            elementwise::round(ctx.device, sum, saved.attended)?;
        }
        ctx.arena.release_scratch(mark);
        layer::tail(ctx, &layers, &x, &saved, &outs)?;
        ctx.arena.release_scratch(start);
        Ok((saved, outs))
    }

    /// dx =; parameter gradients, the input projections' too, +=. `dbags` receives the bags' gradients.
    pub(super) fn cross_streamed_backward<T: Element>(
        &self,
        ctx: &mut Context,
        (saved, x): (&[SavedLayer<T>], View<T>),
        stream: &Stream<'_, T>,
        dout: &[View<T>],
        dx: &[View<T>],
        dbags: Option<[View<T>; 3]>,
    ) -> Result<()> {
        let start = ctx.arena.mark();
        let d = ctx.config.dim;
        let (layers, x) = ([&self.cross[0], &self.cross[1]], [x; 2]);
        let (du, dattended) = (scratch(ctx, &x, d)?, scratch(ctx, &x, d)?);
        layer::tail_backward(ctx, &layers, (saved, &x), dout, &du, &dattended)?;

        let q = scratch(ctx, &x, d)?;
        layer::queries(ctx, &layers, &x, &q)?;
        let biases = layer::bias_grads(ctx, &layers)?;
        let sums = [ctx.arena.scratch(x[0].rows(), d)?, ctx.arena.scratch(x[0].rows(), d)?];
        for sum in sums {
            elementwise::zero::<T::Sum>(ctx.device, sum)?;
        }
        for range in stream.parts() {
            let mark = ctx.arena.mark();
            let part = self.part(ctx, stream, &range)?;
            let dkv = scratch(ctx, &part.tokens, 2 * d)?;
            let after = ctx.arena.mark();
            let mut problems = Vec::new();
            for (i, input) in part.inputs.iter().enumerate() {
                let g = input.scale;
                let forward = part.layers[i].attention(ctx, q[g], part.kv[i], (saved[g].attended, saved[g].lse));
                let dq = ctx.arena.scratch(q[g].rows(), d)?;
                problems.push(layer::attention_grad(forward, dattended[g], (dq, dkv[i])));
            }
            attention::backward(ctx.device, ctx.arena, &problems)?;
            for (input, problem) in part.inputs.iter().zip(&problems) {
                elementwise::accumulate(ctx.device, problem.dq, sums[input.scale])?;
            }
            ctx.arena.release_scratch(after);

            let weights = part.inputs.iter().enumerate().map(|(i, input)| {
                layer::weight_grad(ctx, part.layers[i].kv, biases[input.scale][1], part.tokens[i], dkv[i])
            });
            let weights: Vec<_> = weights.collect();
            matmul::backward_weight(ctx.device, ctx.arena, &weights)?;
            let dtokens = scratch(ctx, &part.tokens, d)?;
            let inputs = layer::keys_values_backward(ctx, &part.layers, &dkv, &dtokens);
            matmul::backward_input(ctx.device, &inputs)?;
            let dbags = dbags.map(|dbags| {
                let of = |input: &Input<T>| {
                    let bag = dbags[input.scale];
                    bag.rows_range(range.start..bag.rows().min(range.end))
                };
                part.inputs.iter().map(of).collect::<Vec<_>>()
            });
            self.project_backward(ctx, &part.inputs, &dtokens, dbags.as_deref())?;
            ctx.arena.release_scratch(mark);
        }
        let dq = scratch(ctx, &x, d)?;
        for (sum, &dq) in sums.into_iter().zip(&dq) {
            elementwise::round(ctx.device, sum, dq)?;
        }
        let weights = (0..2).map(|g| layer::weight_grad(ctx, layers[g].q, biases[g][0], x[g], dq[g]));
        let weights: Vec<_> = weights.collect();
        matmul::backward_weight(ctx.device, ctx.arena, &weights)?;
        layer::fold_backward::<T>(ctx, &layers, &biases)?;
        matmul::backward_input(ctx.device, &layer::queries_backward(ctx, &layers, &dq, &du, dx, false))?;
        ctx.arena.release_scratch(start);
        Ok(())
    }

    /// Reads and projects patches `range` of the bags that have such.
    fn part<T: Element>(&self, ctx: &mut Context, stream: &Stream<'_, T>, range: &Range<usize>) -> Result<Part<'_, T>> {
        let mut staged = Vec::new();
        for (scale, (bag, &buffer)) in stream.bags.iter().zip(&stream.buffers).enumerate() {
            let rows = range.start..bag.patches().min(range.end);
            if rows.start < rows.end {
                staged.push((scale, ctx.stage_part(bag, rows, buffer)?));
            }
        }
        let inputs = self.project(ctx, &staged, false)?;
        let layers: Vec<_> = inputs.iter().map(|input| &self.cross[input.scale]).collect();
        let tokens: Vec<_> = inputs.iter().map(|input| input.tokens).collect();
        let kv = scratch(ctx, &tokens, 2 * ctx.config.dim)?;
        layer::keys_values(ctx, &layers, &tokens, &kv)?;
        Ok(Part { inputs, layers, tokens, kv })
    }
}
