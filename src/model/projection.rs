//! The input projection: Linear and LayerNorm of a bag, from its features to tokens of the model's
//! width. A bag that is as wide as the model is its own tokens.

use super::{
    Context, LinearViews,
    bags::BagGrad,
    layer::{norm, norm_grad},
    params::{Layout, Linear, NormWeights},
    policy::pieces,
    stream::Stream,
};
use crate::{
    Result,
    device::{Device, Element, Real, View},
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
    dbags: Option<&[BagGrad<T>]>,
) -> Result<()> {
    let (mut norms, mut weights) = (Vec::new(), Vec::new());
    for ((projection, input), &dy) in projections.iter().zip(inputs).zip(dtokens) {
        let (Some((linear, layer_norm)), Some(projected)) = (projection.0, &input.projected) else { continue };
        let linear = ctx.linear::<T>(linear);
        norms.push(norm_grad(ctx, layer_norm, projected.x, projected.stats, dy, dy));
        weights.push(WeightGrad { dy, x: input.bag, dw: linear.dweight, db: linear.dbias });
    }
    layer_norm::backward(ctx.device, ctx.arena, &norms)?;
    matmul::backward_weight(ctx.device, ctx.arena, &weights)?;
    for (i, &dbag) in dbags.into_iter().flatten().enumerate() {
        bag_gradient(ctx, projections[i], &inputs[i], dtokens[i], dbag)?;
    }
    Ok(())
}

/// From the gradient before the norm, `dy` `[rows, dim]`, to what is asked of the bag's gradient.
fn bag_gradient<T: Element>(
    ctx: &mut Context,
    projection: Projection,
    input: &Input<T>,
    dy: View<T>,
    dbag: BagGrad<T>,
) -> Result<()> {
    let linear = projection.0.map(|(linear, _)| ctx.linear::<T>(linear));
    match dbag {
        BagGrad::Whole(dbag) => {
            // what kernels write is the device's memory
            let kernels = ctx.device.runs_kernels();
            let written = if kernels { ctx.arena.scratch(dbag.rows(), dbag.cols())? } else { dbag };
            match linear {
                None => elementwise::sum(ctx.device, &[dy], written)?,
                Some(linear) => {
                    let product = Matmul { a: dy, b: linear.weight, out: written, epilogue: Epilogue::default() };
                    matmul::backward_input(ctx.device, &[product])?;
                }
            }
            if kernels {
                // SAFETY: the bags' gradients borrow host memory for writing.
                unsafe { dbag.slice_mut() }.copy_from_slice(&ctx.device.download(written)?);
            }
            Ok(())
        }
        // With p = x W^T + b before the norm, (x - r) . dx = (x - r) . (dp W) = (p(x) - p(r)) . dp.
        BagGrad::Products { reference, out } => {
            // SAFETY: the bags' gradients borrow it.
            let reference = numbers(unsafe { reference.slice() });
            match (linear, input.projected) {
                (Some(linear), Some(projected)) => {
                    let reference = projection_of(ctx.device, linear, &reference)?;
                    products(ctx.device, projected.x, &reference, dy, out)
                }
                _ => products(ctx.device, input.bag, &reference, dy, out),
            }
        }
    }
}

fn numbers<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| x.to_sum().f64()).collect()
}

/// One row's p = x W^T + b, on the host.
fn projection_of<T: Element>(device: &Device, linear: LinearViews<T>, x: &[f64]) -> Result<Vec<f64>> {
    let LinearViews { weight, bias, .. } = linear;
    let weights = device.download(weight.reshape(1, weight.rows() * weight.cols()))?;
    let bias = device.download(bias)?;
    let dot = |row: &[T]| row.iter().zip(x).map(|(w, x)| w.to_sum().f64() * x).sum::<f64>();
    Ok(weights.chunks_exact(x.len()).zip(numbers(&bias)).map(|(row, bias)| dot(row) + bias).collect())
}

/// Rows that [`products`] brings to the host at a time.
const ROWS: usize = 4096;

/// out = the sum of (x - reference) * dy over each row; x and dy `[rows, columns]` without gaps. On
/// the host, which has done it long before the device has done the products of a step, and each row
/// in one order.
fn products<T: Element>(device: &Device, x: View<T>, reference: &[f64], dy: View<T>, out: View<f64>) -> Result<()> {
    let cols = x.cols();
    for rows in pieces(x.rows(), Some(ROWS)) {
        // as one row, which a GPU copies in one piece
        let flat = |of: View<T>| device.download(of.rows_range(rows.clone()).reshape(1, rows.len() * cols));
        let (x, dy) = (flat(x)?, flat(dy)?);
        // SAFETY: `out` borrows host memory for writing.
        let out = unsafe { out.rows_range(rows.clone()).slice_mut() };
        for ((out, x), dy) in out.iter_mut().zip(x.chunks_exact(cols)).zip(dy.chunks_exact(cols)) {
            let term = |((x, r), dy): ((&T, &f64), &T)| (x.to_sum().f64() - r) * dy.to_sum().f64();
            *out = x.iter().zip(reference).zip(dy).map(term).sum();
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
    dbag: Option<BagGrad<T>>,
) -> Result<()> {
    for part in stream.parts(ctx.device) {
        let part = part?;
        for (_, bag) in part.bags {
            let mark = ctx.arena.mark();
            let of = |view: View<T>| view.rows_range(part.range.clone());
            let dbag = dbag.map(|dbag| [dbag.rows_range(part.range.clone())]);
            let of_part = input.of_part(bag, &part.range);
            let dbags = dbag.as_ref().map(|dbag| &dbag[..]);
            project_backward(ctx, &[projection], &[of_part], &[of(dtokens)], dbags)?;
            ctx.arena.release_scratch(mark);
        }
    }
    Ok(())
}
