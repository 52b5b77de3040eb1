//! Cross-attention to contexts that come part by part, so that no tensor as long as x5 or x20 is ever held.
//!
//! Forward projects a part to tokens, keys and values, attends to it, and merges the result into that of the parts before
//! (`attention::merge`). Backward reads the parts again: with the whole context's output and log-sum-exp, the gradients of a part's keys
//! and values are final, and go down to the input projection at once; the queries' are summed. docs/giant-bags.md has the algebra.

use std::ops::Range;

use super::{
    Bag, Context, CrossFusion,
    bags::copy,
    crossfusion::{Input, Inputs},
    layer::{self, Forwarded, Layer, SavedLayer, scratch},
    policy::pieces,
};
use crate::{
    Result,
    device::{Device, Element, View},
    ops::{
        attention::{self, Merge},
        elementwise, matmul,
    },
};

/// Parts of a bag that are on a GPU at a time: one is copied while the one before is worked on.
pub(crate) const STREAM_BUFFERS: usize = 2;

/// Contexts on their way.
pub(super) struct Stream<'a, T: Element> {
    bags: [Bag<'a, T>; 2],
    /// At most so many at a time.
    patches: usize,
    /// What each bag's parts are copied to in turn; none where its memory serves as it is.
    buffers: [Vec<View<T>>; 2],
}

impl<'a, T: Element> Stream<'a, T> {
    pub fn new(ctx: &mut Context, bags: [Bag<'a, T>; 2], patches: usize) -> Result<Self> {
        let mut buffers = [Vec::new(), Vec::new()];
        for (bag, buffers) in bags.iter().zip(&mut buffers) {
            let count = match bag {
                _ if ctx.device.runs_kernels() => STREAM_BUFFERS,
                Bag::Memory(_) => 0,
                Bag::Reader(_) => 1,
            };
            for _ in 0..count {
                buffers.push(ctx.arena.save(bag.patches().min(patches), ctx.config.features)?);
            }
        }
        Ok(Self { bags, patches, buffers })
    }

    /// The bags' parts, each copied while the device works on the one before.
    fn parts<'s>(&'s self, device: &'s Device) -> impl Iterator<Item = Result<Staged<T>>> + 's {
        let [x5, x20] = self.bags.map(|bag| bag.patches());
        let mut before = device.fence();
        pieces(x5.max(x20), Some(self.patches)).enumerate().map(move |(turn, range)| {
            // where this part goes was last read by the last but one, whose work was all started before the last one's
            let free = std::mem::replace(&mut before, device.fence())?;
            let mut bags = Vec::new();
            for (scale, (bag, buffers)) in self.bags.iter().zip(&self.buffers).enumerate() {
                let rows = range.start..bag.patches().min(range.end);
                if rows.start >= rows.end {
                    continue;
                }
                let view = match bag {
                    Bag::Memory(bag) if buffers.is_empty() => bag.rows_range(rows),
                    bag => {
                        let staged = buffers[turn % buffers.len()].rows_range(0..rows.len());
                        copy(device, bag, rows.start, staged, &free)?;
                        staged
                    }
                };
                bags.push((scale, view));
            }
            Ok(Staged { range, bags })
        })
    }
}

/// A part of each context that reaches so far, where the device finds it.
struct Staged<T: Element> {
    /// Of patches.
    range: Range<usize>,
    /// By scale.
    bags: Vec<(usize, View<T>)>,
}

/// A part's projections.
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
        for staged in stream.parts(ctx.device) {
            let Staged { range, bags } = staged?;
            let mark = ctx.arena.mark();
            let part = self.part(ctx, &bags)?;
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
        for staged in stream.parts(ctx.device) {
            let Staged { range, bags } = staged?;
            let mark = ctx.arena.mark();
            let part = self.part(ctx, &bags)?;
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
                layer::weight_grad(ctx, part.layers[i].kv(), biases[input.scale][1], part.tokens[i], dkv[i])
            });
            let weights: Vec<_> = weights.collect();
            matmul::backward_weight(ctx.device, ctx.arena, &weights)?;
            let dtokens = scratch(ctx, &part.tokens, d)?;
            let inputs = layer::input_grads(ctx, &part.layers, Layer::kv, &dkv, &dtokens, (None, false));
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
        let weights = (0..2).map(|g| layer::weight_grad(ctx, layers[g].q(), biases[g][0], x[g], dq[g]));
        let weights: Vec<_> = weights.collect();
        matmul::backward_weight(ctx.device, ctx.arena, &weights)?;
        layer::fold_backward::<T>(ctx, &layers, &biases)?;
        matmul::backward_input(ctx.device, &layer::input_grads(ctx, &layers, Layer::q, &dq, dx, (Some(&du), false)))?;
        ctx.arena.release_scratch(start);
        Ok(())
    }

    fn part<T: Element>(&self, ctx: &mut Context, bags: &[(usize, View<T>)]) -> Result<Part<'_, T>> {
        let inputs = self.project(ctx, bags, false)?;
        let layers: Vec<_> = inputs.iter().map(|input| &self.cross[input.scale]).collect();
        let tokens: Vec<_> = inputs.iter().map(|input| input.tokens).collect();
        let kv = scratch(ctx, &tokens, 2 * ctx.config.dim)?;
        layer::keys_values(ctx, &layers, &tokens, &kv)?;
        Ok(Part { inputs, layers, tokens, kv })
    }
}
