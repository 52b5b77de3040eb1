//! The ops on memory of another library, given by address.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use engine::{
    Result,
    device::{Cpu, Device, Element, Mat, MatMut, Workspace},
    loss::{Loss, Target},
    ops::{self, Draw, Dropout, head::SlideLoss},
};
use half::bf16;
use pyo3::prelude::*;

use crate::raise;

/// A matrix of somebody else's: address, rows, columns, elements from row to row, and the type: 0 is
/// f32, 1 bf16, 2 f64.
#[derive(FromPyObject, Clone, Copy)]
struct Matrix(usize, usize, usize, usize, u8);

impl Matrix {
    /// # Safety
    /// The memory must be the caller's, alive, and of this type.
    unsafe fn read<'a, T: Element>(&self, device: &'a Device) -> Result<Mat<'a, T>> {
        // SAFETY: the caller's.
        unsafe { Mat::from_raw(device, self.0 as *const T, self.1, self.2, self.3) }
    }

    /// # Safety
    /// As [`Matrix::read`], and nobody else may look at it.
    unsafe fn write<'a, T: Element>(&self, device: &'a Device) -> Result<MatMut<'a, T>> {
        // SAFETY: the caller's.
        unsafe { MatMut::from_raw(device, self.0 as *mut T, self.1, self.2, self.3) }
    }

    /// Where an op adds a parameter's gradient: on a CPU zeroed here, since PyTorch's threads, once
    /// they have filled a tensor, spin for milliseconds on the cores that the op is to use.
    ///
    /// # Safety
    /// As [`Matrix::write`]; rows lie behind one another.
    unsafe fn sums<'a, T: Element>(&self, device: &'a Device) -> Result<MatMut<'a, T>> {
        // SAFETY: the caller's.
        let sums = unsafe { self.write(device) }?;
        if !device.runs_kernels() {
            // SAFETY: `write` has checked that it can be such memory; zeros are a number.
            unsafe { std::ptr::write_bytes(self.0 as *mut T, 0, self.1 * self.2) };
        }
        Ok(sums)
    }
}

/// A device, and the scratch memory of its ops.
struct Context {
    device: Arc<Device>,
    workspace: Mutex<Workspace>,
}

/// Where a call runs: a GPU's number and stream, or -1 and a number of threads (0: one for each core
/// that the process may use).
type Place = (i64, usize);

/// One context a place, as long as the process lives.
fn context(place: Place) -> Result<Arc<Context>> {
    static CONTEXTS: OnceLock<Mutex<HashMap<Place, Arc<Context>>>> = OnceLock::new();
    let mut contexts = CONTEXTS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(context) = contexts.get(&place) {
        return Ok(context.clone());
    }
    let device = match place {
        (-1, threads) => Device::Cpu(Cpu::new(threads)?),
        // SAFETY: a stream of PyTorch's, which are never destroyed.
        (gpu, stream) => unsafe { Device::on_stream(gpu as usize, stream as *mut std::ffi::c_void) }?,
    };
    let device = Arc::new(device);
    let made = Arc::new(Context { workspace: Mutex::new(Workspace::new(&device)?), device });
    contexts.insert(place, made.clone());
    Ok(made)
}

/// Runs `work` on a place without the interpreter's lock.
fn on(py: Python<'_>, place: Place, work: impl FnOnce(&Device, &mut Workspace) -> Result<()> + Send) -> PyResult<()> {
    let run = || {
        let context = context(place)?;
        let mut workspace = context.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        work(&context.device, &mut workspace)
    };
    py.detach(run).map_err(raise)
}

/// Seed, step, rate, and the address of a seed and a step that are read when the op runs, or 0.
type Draws = (u64, u32, f64, usize);

fn dropout((seed, step, rate, draw): Draws) -> Result<Option<Dropout>> {
    let dropout = Dropout::with_rate(Draw { seed, step }, 0, rate)?;
    // SAFETY: a tensor of two int64 on the op's device, which the caller holds.
    Ok(dropout.map(|dropout| unsafe { dropout.with_draw_at(draw as *const [u64; 2]) }))
}

/// Runs `$work` with `$T` as the type of a matrix.
macro_rules! by_type {
    ($matrix:expr, $T:ident => $work:expr) => {
        match $matrix.4 {
            1 => {
                type $T = bf16;
                $work
            }
            2 => {
                type $T = f64;
                $work
            }
            _ => {
                type $T = f32;
                $work
            }
        }
    };
}

/// q, k, v, out, lse of each group.
#[pyfunction]
fn attention_forward(
    py: Python<'_>,
    place: Place,
    groups: Vec<[Matrix; 5]>,
    heads: usize,
    drop: Draws,
) -> PyResult<()> {
    let Some(first) = groups.first().map(|group| group[0]) else { return Ok(()) };
    on(py, place, |device, workspace| {
        let (dropout, step) = (dropout(drop)?, heads as u32);
        // SAFETY: python/package/crossfusion/ops.py holds the tensors, and gives each its own type.
        by_type!(first, T => unsafe {
            let view = |(i, [q, k, v, out, lse]): (usize, &[Matrix; 5])| {
                Ok(ops::Attention::<T> {
                    q: q.read(device)?,
                    k: k.read(device)?,
                    v: v.read(device)?,
                    heads,
                    dropout: dropout.map(|dropout| dropout.at(i as u32 * step)),
                    out: out.write(device)?,
                    lse: lse.write(device)?,
                })
            };
            let mut problems = groups.iter().enumerate().map(view).collect::<Result<Vec<_>>>()?;
            ops::attention(workspace, &mut problems)
        })
    })
}

/// q, k, v, out, lse, dout, dq, dk, dv of each group.
#[pyfunction]
fn attention_backward(
    py: Python<'_>,
    place: Place,
    groups: Vec<[Matrix; 9]>,
    heads: usize,
    drop: Draws,
) -> PyResult<()> {
    let Some(first) = groups.first().map(|group| group[0]) else { return Ok(()) };
    on(py, place, |device, workspace| {
        let (dropout, step) = (dropout(drop)?, heads as u32);
        // SAFETY: as above.
        by_type!(first, T => unsafe {
            let view = |(i, [q, k, v, out, lse, dout, dq, dk, dv]): (usize, &[Matrix; 9])| {
                Ok(ops::AttentionBackward::<T> {
                    q: q.read(device)?,
                    k: k.read(device)?,
                    v: v.read(device)?,
                    heads,
                    dropout: dropout.map(|dropout| dropout.at(i as u32 * step)),
                    out: out.read(device)?,
                    lse: lse.read(device)?,
                    dout: dout.read(device)?,
                    dq: dq.write(device)?,
                    dk: dk.write(device)?,
                    dv: dv.write(device)?,
                })
            };
            let mut problems = groups.iter().enumerate().map(view).collect::<Result<Vec<_>>>()?;
            ops::attention_backward(workspace, &mut problems)
        })
    })
}

/// x, weight, bias, y, stats.
#[pyfunction]
fn layer_norm_forward(py: Python<'_>, place: Place, m: [Matrix; 5]) -> PyResult<()> {
    let [x, weight, bias, y, stats] = m;
    on(py, place, |device, workspace| {
        // SAFETY: as above.
        by_type!(x, T => unsafe {
            let (x, weight, bias) = (x.read::<T>(device)?, weight.read(device)?, bias.read(device)?);
            let (y, stats) = (y.write(device)?, stats.write(device)?);
            ops::layer_norm(workspace, &mut [ops::LayerNorm { x, weight, bias, y, stats }])
        })
    })
}

/// x, stats, weight, dy, dx, dweight, dbias.
#[pyfunction]
fn layer_norm_backward(py: Python<'_>, place: Place, m: [Matrix; 7]) -> PyResult<()> {
    let [x, stats, weight, dy, dx, dweight, dbias] = m;
    on(py, place, |device, workspace| {
        // SAFETY: as above.
        by_type!(x, T => unsafe {
            let (x, stats, weight, dy) =
                (x.read::<T>(device)?, stats.read(device)?, weight.read(device)?, dy.read(device)?);
            let (dx, dweight, dbias) = (dx.write(device)?, dweight.sums(device)?, dbias.sums(device)?);
            let problem = ops::LayerNormBackward { x, stats, weight, dy, dx, dweight, dbias };
            ops::layer_norm_backward(workspace, &mut [problem])
        })
    })
}

/// y = x Wᵀ + b, and + residual where there is one: x, weight, bias, y.
#[pyfunction]
fn linear_forward(py: Python<'_>, place: Place, m: [Matrix; 4], residual: Option<Matrix>) -> PyResult<()> {
    let [x, weight, bias, y] = m;
    on(py, place, |device, workspace| {
        // SAFETY: as above.
        by_type!(x, T => unsafe {
            let problem = ops::Linear::<T> {
                x: x.read(device)?,
                weight: weight.read(device)?,
                bias: Some(bias.read(device)?),
                gelu: None,
                dropout: None,
                residual: residual.map(|residual| residual.read(device)).transpose()?,
                y: y.write(device)?,
            };
            ops::linear(workspace, &mut [problem])
        })
    })
}

/// dy, x, weight, dx (or none), dweight, dbias.
#[pyfunction]
fn linear_backward(
    py: Python<'_>,
    place: Place,
    m: [Matrix; 3],
    dx: Option<Matrix>,
    grads: [Matrix; 2],
) -> PyResult<()> {
    let ([dy, x, weight], [dweight, dbias]) = (m, grads);
    on(py, place, |device, workspace| {
        // SAFETY: as above.
        by_type!(x, T => unsafe {
            if let Some(dx) = dx {
                let problem = ops::LinearBackwardInput::<T> {
                    dy: dy.read(device)?,
                    weight: weight.read(device)?,
                    gelu: None,
                    dropout: None,
                    residual: None,
                    accumulate: false,
                    dx: dx.write(device)?,
                };
                ops::linear_backward_input(workspace, &mut [problem])?;
            }
            let (dy, x) = (dy.read::<T>(device)?, x.read(device)?);
            let (dweight, dbias) = (dweight.sums(device)?, dbias.sums(device)?);
            ops::linear_backward_weight(workspace, &mut [ops::LinearBackwardWeight { dy, x, dweight, dbias }])
        })
    })
}

/// out = x + dropout(dropout(GELU(x W1ᵀ + b1)) W2ᵀ + b2): x, the weights and biases, then what is
/// written: before GELU, behind the first dropout (which backward computes again), out. The second
/// dropout draws at the site behind the first's.
#[pyfunction]
fn feed_forward_forward(py: Python<'_>, place: Place, m: [Matrix; 8], drop: Draws) -> PyResult<()> {
    let [x, w1, b1, w2, b2, hidden, z, out] = m;
    on(py, place, |device, workspace| {
        let dropout = dropout(drop)?;
        // SAFETY: as above.
        by_type!(x, T => unsafe {
            let first = ops::Linear::<T> {
                x: x.read(device)?,
                weight: w1.read(device)?,
                bias: Some(b1.read(device)?),
                gelu: Some(hidden.write(device)?),
                dropout,
                residual: None,
                y: z.write(device)?,
            };
            ops::linear(workspace, &mut [first])?;
            let second = ops::Linear::<T> {
                x: z.read(device)?,
                weight: w2.read(device)?,
                bias: Some(b2.read(device)?),
                gelu: None,
                dropout: dropout.map(|dropout| dropout.at(1)),
                residual: Some(x.read(device)?),
                y: out.write(device)?,
            };
            ops::linear(workspace, &mut [second])
        })
    })
}

/// dout, x, both weights, what forward gave to GELU; scratch for z, its gradient behind the second
/// dropout, and the gradient before GELU; dx; the weights' and biases' gradients.
#[pyfunction]
fn feed_forward_backward(
    py: Python<'_>,
    place: Place,
    m: [Matrix; 5],
    scratch: [Matrix; 3],
    dx: Matrix,
    grads: [Matrix; 4],
    drop: Draws,
) -> PyResult<()> {
    let ([dout, x, w1, w2, hidden], [z, dz, dhidden], [dw1, db1, dw2, db2]) = (m, scratch, grads);
    on(py, place, |device, workspace| {
        let first = dropout(drop)?;
        let second = first.map(|dropout| dropout.at(1));
        // SAFETY: as above.
        by_type!(x, T => unsafe {
            let again = ops::GeluDropout::<T> {
                x: hidden.read(device)?,
                gelu: true,
                dropout: first,
                out: z.write(device)?,
            };
            let behind =
                ops::GeluDropout { x: dout.read(device)?, gelu: false, dropout: second, out: dz.write(device)? };
            ops::gelu_dropout(workspace, &mut [again, behind])?;
            let to_hidden = ops::LinearBackwardInput::<T> {
                dy: dz.read(device)?,
                weight: w2.read(device)?,
                gelu: Some(hidden.read(device)?),
                dropout: first,
                residual: None,
                accumulate: false,
                dx: dhidden.write(device)?,
            };
            ops::linear_backward_input(workspace, &mut [to_hidden])?;
            let to_x = ops::LinearBackwardInput::<T> {
                dy: dhidden.read(device)?,
                weight: w1.read(device)?,
                gelu: None,
                dropout: None,
                residual: Some(dout.read(device)?),
                accumulate: false,
                dx: dx.write(device)?,
            };
            ops::linear_backward_input(workspace, &mut [to_x])?;
            let second = ops::LinearBackwardWeight::<T> {
                dy: dz.read(device)?,
                x: z.read(device)?,
                dweight: dw2.sums(device)?,
                dbias: db2.sums(device)?,
            };
            let first = ops::LinearBackwardWeight::<T> {
                dy: dhidden.read(device)?,
                x: x.read(device)?,
                dweight: dw1.sums(device)?,
                dbias: db1.sums(device)?,
            };
            ops::linear_backward_weight(workspace, &mut [second, first])
        })
    })
}

/// x, the three kernels, the three biases, y.
#[pyfunction]
fn ppeg_forward(py: Python<'_>, place: Place, m: [Matrix; 8], side: usize) -> PyResult<()> {
    let [x, k7, k5, k3, b7, b5, b3, y] = m;
    on(py, place, |device, workspace| {
        // SAFETY: as above.
        by_type!(x, T => unsafe {
            let problem = ops::Ppeg::<T> {
                x: x.read(device)?,
                side,
                kernels: [k7.read(device)?, k5.read(device)?, k3.read(device)?],
                biases: [b7.read(device)?, b5.read(device)?, b3.read(device)?],
                y: y.write(device)?,
            };
            ops::ppeg(workspace, &mut [problem])
        })
    })
}

/// x, the three kernels, dy, dx, the kernels' and the biases' gradients.
#[pyfunction]
fn ppeg_backward(py: Python<'_>, place: Place, m: [Matrix; 12], side: usize) -> PyResult<()> {
    let [x, k7, k5, k3, dy, dx, d7, d5, d3, b7, b5, b3] = m;
    on(py, place, |device, workspace| {
        // SAFETY: as above.
        by_type!(x, T => unsafe {
            let problem = ops::PpegBackward::<T> {
                x: x.read(device)?,
                side,
                kernels: [k7.read(device)?, k5.read(device)?, k3.read(device)?],
                dy: dy.read(device)?,
                dx: dx.write(device)?,
                dkernels: [d7.sums(device)?, d5.sums(device)?, d3.sums(device)?],
                dbiases: [b7.sums(device)?, b5.sums(device)?, b3.sums(device)?],
            };
            ops::ppeg_backward(workspace, &mut [problem])
        })
    })
}

/// A square of this side; without one, a sequence as long as `out`.
fn grid(side: Option<usize>, out: Matrix) -> ops::TokenGrid {
    side.map_or(ops::TokenGrid::Sequence(out.1), ops::TokenGrid::Square)
}

/// The streams (three, or one without a mix), the mix' weight and bias, four kernels, four biases, out.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // what the op is given
fn conv_fusion_forward(
    py: Python<'_>,
    place: Place,
    streams: Vec<Matrix>,
    mix: Option<[Matrix; 2]>,
    kernels: [Matrix; 4],
    biases: [Matrix; 4],
    out: Matrix,
    side: Option<usize>,
    drop: Draws,
) -> PyResult<()> {
    on(py, place, |device, workspace| {
        // SAFETY: as above.
        by_type!(out, T => unsafe {
            let streams = streams.iter().map(|x| x.read::<T>(device)).collect::<Result<Vec<_>>>()?;
            let mut problem = ops::ConvFusion {
                streams: &streams,
                mix: mix.map(|[weight, bias]| Ok([weight.read(device)?, bias.read(device)?])).transpose()?,
                kernels: four(kernels, |m| m.read(device))?,
                biases: four(biases, |m| m.read(device))?,
                grid: grid(side, out),
                dropout: dropout(drop)?,
                out: out.write(device)?,
            };
            ops::conv_fusion(workspace, &mut problem)
        })
    })
}

/// As forward, then dout, and the gradients of all that forward was given.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // what the op is given
fn conv_fusion_backward(
    py: Python<'_>,
    place: Place,
    streams: Vec<Matrix>,
    mix: Option<[Matrix; 2]>,
    kernels: [Matrix; 4],
    biases: [Matrix; 4],
    out: Matrix,
    side: Option<usize>,
    drop: Draws,
    dout: Matrix,
    dstreams: Vec<Matrix>,
    dmix: Option<[Matrix; 2]>,
    dkernels: [Matrix; 4],
    dbiases: [Matrix; 4],
) -> PyResult<()> {
    on(py, place, |device, workspace| {
        // SAFETY: as above.
        by_type!(out, T => unsafe {
            let streams = streams.iter().map(|x| x.read::<T>(device)).collect::<Result<Vec<_>>>()?;
            let mut problem = ops::ConvFusionBackward {
                streams: &streams,
                mix: mix.map(|[weight, bias]| Ok([weight.read(device)?, bias.read(device)?])).transpose()?,
                kernels: four(kernels, |m| m.read(device))?,
                biases: four(biases, |m| m.read(device))?,
                grid: grid(side, out),
                dropout: dropout(drop)?,
                out: out.read(device)?,
                dout: dout.read(device)?,
                dstreams: dstreams.iter().map(|x| x.write(device)).collect::<Result<Vec<_>>>()?,
                dmix: dmix.map(|[weight, bias]| Ok([weight.sums(device)?, bias.sums(device)?])).transpose()?,
                dkernels: four(dkernels, |m| m.sums(device))?,
                dbiases: four(dbiases, |m| m.sums(device))?,
            };
            ops::conv_fusion_backward(workspace, &mut problem)
        })
    })
}

fn four<R>([a, b, c, d]: [Matrix; 4], of: impl Fn(Matrix) -> Result<R>) -> Result<[R; 4]> {
    Ok([of(a)?, of(b)?, of(c)?, of(d)?])
}

/// From x to a survival loss of the logits and back: x, norm weight and bias, weight, bias; scratch
/// for the norm's statistics, its output, the logits and their gradient; the gradients of the first
/// five; and `result`, which takes loss and risk.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // what the op is given
fn head_loss(
    py: Python<'_>,
    place: Place,
    m: [Matrix; 5],
    scratch: [Matrix; 4],
    grads: [Matrix; 5],
    result: Matrix,
    cross_entropy: bool,
    label: usize,
    censored: bool,
    alpha: f64,
) -> PyResult<()> {
    let ([x, norm_weight, norm_bias, weight, bias], [stats, normed, logits, dlogits]) = (m, scratch);
    let [dx, dnorm_weight, dnorm_bias, dweight, dbias] = grads;
    let loss = if cross_entropy { Loss::CeSurv } else { Loss::NllSurv };
    let loss = SlideLoss { loss, target: Target { label, censored }, alpha, share: 1.0 };
    on(py, place, |device, workspace| {
        // SAFETY: as above.
        by_type!(x, T => unsafe {
            let forward = ops::Head::<T> {
                x: x.read(device)?,
                norm_weight: norm_weight.read(device)?,
                norm_bias: norm_bias.read(device)?,
                weight: weight.read(device)?,
                bias: bias.read(device)?,
                stats: stats.write(device)?,
                normed: normed.write(device)?,
                logits: logits.write(device)?,
            };
            let mut problem = ops::HeadBackward {
                forward,
                dlogits: dlogits.write(device)?,
                dx: dx.write(device)?,
                dnorm_weight: dnorm_weight.sums(device)?,
                dnorm_bias: dnorm_bias.sums(device)?,
                dweight: dweight.sums(device)?,
                dbias: dbias.sums(device)?,
            };
            ops::head_loss(workspace, &mut problem, &loss, &mut result.write(device)?)
        })
    })
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(attention_forward, module)?)?;
    module.add_function(wrap_pyfunction!(attention_backward, module)?)?;
    module.add_function(wrap_pyfunction!(layer_norm_forward, module)?)?;
    module.add_function(wrap_pyfunction!(layer_norm_backward, module)?)?;
    module.add_function(wrap_pyfunction!(linear_forward, module)?)?;
    module.add_function(wrap_pyfunction!(linear_backward, module)?)?;
    module.add_function(wrap_pyfunction!(feed_forward_forward, module)?)?;
    module.add_function(wrap_pyfunction!(feed_forward_backward, module)?)?;
    module.add_function(wrap_pyfunction!(ppeg_forward, module)?)?;
    module.add_function(wrap_pyfunction!(ppeg_backward, module)?)?;
    module.add_function(wrap_pyfunction!(conv_fusion_forward, module)?)?;
    module.add_function(wrap_pyfunction!(conv_fusion_backward, module)?)?;
    module.add_function(wrap_pyfunction!(head_loss, module)?)
}
