//! The input projection: Linear and LayerNorm of a bag, from its features to tokens of the model's
//! width. A bag that is as wide as the model is its own tokens.

use super::{
    Context,
    layer::{norm, norm_grad},
    params::{Layout, Linear, NormWeights},
    stream::Stream,
};
use crate::{
    Result,
    device::{Element, View},
    ops::{
        elementwise, layer_norm,
        matmul::{self, Epilogue, Matmul, WeightGrad},
    },
};

/// One scale's; None where features are as wide as the model.
#[derive(Clone, Copy)]
pub(super) struct Projection(Option<(Linear, NormWeights)>);

/// A bag, or a part of one, on its way into the model.
#[derive(Clone, Copy)]
pub(super) struct Input<T: Element> {
    /// `[rows, features]`
    bag: View<T>,
    /// None where the bag is its own tokens.
    projected: Option<Projected<T>>,
    /// `[rows, dim]`
    pub tokens: View<T>,
}

#[derive(Clone, Copy)]
struct Projected<T: Element> {
    /// Before the norm, `[rows, dim]`.
    x: View<T>,
    /// `[rows, 2]`
    stats: View<T::Sum>,
}

impl Projection {
    /// `{name}.0` is the linear layer, `{name}.1` the norm.
    pub fn new(layout: &mut Layout, name: &str, dim: usize, features: usize) -> Self {
        Self(
            (features != dim)
                .then(|| (layout.linear(&format!("{name}.0"), dim, features), layout.norm(&format!("{name}.1"), dim))),
        )
    }
}

/// Each bag's tokens, on the saved stack if `save`, else on the scratch stack. All bags are one
/// launch.
pub(super) fn project<T: Element>(
    ctx: &mut Context,
    projections: &[Projection],
    bags: &[View<T>],
    save: bool,
) -> Result<Vec<Input<T>>> {
    let mut inputs = Vec::new();
    for (projection, &bag) in projections.iter().zip(bags) {
        let (rows, dim) = (bag.rows(), ctx.config.dim);
        inputs.push(match projection.0 {
            None => Input { bag, projected: None, tokens: bag },
            Some(_) => {
                let projected = Projected { x: ctx.matrix(save, rows, dim)?, stats: ctx.matrix(save, rows, 2)? };
                Input { bag, projected: Some(projected), tokens: ctx.matrix(save, rows, dim)? }
            }
        });
    }
    run(ctx, projections, &inputs)?;
    Ok(inputs)
}

/// From the inputs' bags to their tokens.
fn run<T: Element>(ctx: &Context, projections: &[Projection], inputs: &[Input<T>]) -> Result<()> {
    let (mut products, mut norms) = (Vec::new(), Vec::new());
    for (projection, input) in projections.iter().zip(inputs) {
        let (Some((linear, layer_norm)), Some(Projected { x, stats })) = (projection.0, input.projected) else {
            continue;
        };
        let linear = ctx.linear::<T>(linear);
        let epilogue = Epilogue { bias: Some(linear.bias), ..Default::default() };
        products.push(Matmul { a: input.bag, b: linear.weight, out: x, epilogue });
        norms.push(norm(ctx, layer_norm, x, stats, input.tokens));
    }
    matmul::forward(ctx.device, &products)?;
    layer_norm::forward(ctx.device, &norms)
}

/// The parameters' gradients +=. `dtokens` are overwritten; `dbags` receives the bags' gradients.
pub(super) fn project_backward<T: Element>(
    ctx: &mut Context,
    projections: &[Projection],
    inputs: &[Input<T>],
    dtokens: &[View<T>],
    dbags: Option<&[View<T>]>,
) -> Result<()> {
    // where the ops write dbags: not the host's memory, if they are kernels
    let mut written = dbags.map(<[_]>::to_vec);
    if let (Some(written), true) = (&mut written, ctx.device.runs_kernels()) {
        for x in written {
            *x = ctx.arena.scratch(x.rows(), x.cols())?;
        }
    }
    let (mut norms, mut weights, mut products) = (Vec::new(), Vec::new(), Vec::new());
    for (i, input) in inputs.iter().enumerate() {
        let (dy, dx) = (dtokens[i], written.as_ref().map(|written| written[i]));
        let (Some((linear, layer_norm)), Some(projected)) = (projections[i].0, &input.projected) else {
            if let Some(dx) = dx {
                elementwise::sum(ctx.device, &[dy], dx)?;
            }
            continue;
        };
        let linear = ctx.linear::<T>(linear);
        norms.push(norm_grad(ctx, layer_norm, projected.x, projected.stats, dy, dy));
        weights.push(WeightGrad { dy, x: input.bag, dw: linear.dweight, db: linear.dbias });
        if let Some(dx) = dx {
            products.push(Matmul { a: dy, b: linear.weight, out: dx, epilogue: Epilogue::default() });
        }
    }
    layer_norm::backward(ctx.device, ctx.arena, &norms)?;
    matmul::backward_weight(ctx.device, ctx.arena, &weights)?;
    matmul::backward_input(ctx.device, &products)?;
    if let (Some(dbags), Some(written), true) = (dbags, written, ctx.device.runs_kernels()) {
        for (dbag, written) in dbags.iter().zip(written) {
            // SAFETY: the bags' gradients borrow host memory for writing.
            unsafe { dbag.slice_mut() }.copy_from_slice(&ctx.device.download(written)?);
        }
    }
    Ok(())
}

/// All tokens of a bag that comes part by part, on the saved stack.
pub(super) fn project_streamed<T: Element>(
    ctx: &mut Context,
    projection: Projection,
    stream: &Stream<'_, T>,
) -> Result<StreamedInput<T>> {
    let (rows, dim) = (stream.longest(), ctx.config.dim);
    let projected = match projection.0 {
        None => None,
        Some(_) => Some(Projected { x: ctx.arena.save(rows, dim)?, stats: ctx.arena.save(rows, 2)? }),
    };
    let input = StreamedInput { projected, tokens: ctx.arena.save(rows, dim)? };
    for part in stream.parts(ctx.device) {
        let part = part?;
        for (_, bag) in part.bags {
            let of_part = input.of_part(bag, &part.range);
            run(ctx, &[projection], &[of_part])?;
            if of_part.projected.is_none() {
                elementwise::sum(ctx.device, &[bag], of_part.tokens)?;
            }
        }
    }
    Ok(input)
}

/// [`Input`] of a bag that is nowhere whole.
#[derive(Clone, Copy)]
pub(super) struct StreamedInput<T: Element> {
    projected: Option<Projected<T>>,
    pub tokens: View<T>,
}

impl<T: Element> StreamedInput<T> {
    fn of_part(&self, bag: View<T>, rows: &std::ops::Range<usize>) -> Input<T> {
        let of = |Projected { x, stats }| Projected {
            x: x.rows_range(rows.clone()),
            stats: View::rows_range(stats, rows.clone()),
        };
        Input { bag, projected: self.projected.map(of), tokens: self.tokens.rows_range(rows.clone()) }
    }
}

/// [`project_backward`] of what [`project_streamed`] found; the parts are read again.
pub(super) fn project_streamed_backward<T: Element>(
    ctx: &mut Context,
    projection: Projection,
    stream: &Stream<'_, T>,
    input: &StreamedInput<T>,
    dtokens: View<T>,
    dbag: Option<View<T>>,
) -> Result<()> {
    for part in stream.parts(ctx.device) {
        let part = part?;
        for (_, bag) in part.bags {
            let mark = ctx.arena.mark();
            let of = |view: View<T>| view.rows_range(part.range.clone());
            let dbag = dbag.map(|dbag| [of(dbag)]);
            let of_part = input.of_part(bag, &part.range);
            let dbags = dbag.as_ref().map(|dbag| &dbag[..]);
            project_backward(ctx, &[projection], &[of_part], &[of(dtokens)], dbags)?;
            ctx.arena.release_scratch(mark);
        }
    }
    Ok(())
}
