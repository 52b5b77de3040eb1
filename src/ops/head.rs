//! The head: logits = W LayerNorm(x) + b of the class token's row.
//!
//! Shapes: x `[1, d]`, norm weight and bias `[1, d]`, weight `[classes, d]`, bias and logits `[1,
//! classes]`. Saved: x, the norm's statistics `[1, 2]` and its output `[1, d]`. `train` goes from x
//! to all gradients at once, a survival loss of the logits between.

use bytemuck::{Pod, Zeroable};

use super::{layer_norm, matmul};
use crate::{
    Error, Result,
    device::{Arena, Arg, Buffer, Device, Element, Launch, Matrix, Real, Storage, View, on_cpu, storage},
    loss::{Loss, Prediction, Target},
};

#[derive(Clone, Copy)]
pub(crate) struct Head<T: Element> {
    /// x to normed.
    pub norm: layer_norm::Norm<T>,
    pub weight: View<T>,
    pub bias: View<T>,
    pub logits: View<T::Sum>,
}

#[derive(Clone, Copy)]
pub(crate) struct HeadGrad<T: Element> {
    /// What forward was given and what it wrote.
    pub forward: Head<T>,
    pub dlogits: View<T::Sum>,
    /// `[1, d]`, overwritten.
    pub dx: View<T>,
    pub dnorm_weight: View<T::Sum>,
    pub dnorm_bias: View<T::Sum>,
    pub dweight: View<T::Sum>,
    pub dbias: View<T::Sum>,
}

/// A slide's loss, of its time bins.
#[derive(Clone, Copy, Debug)]
pub struct SlideLoss {
    /// Which loss.
    pub loss: Loss,
    /// The slide's outcome.
    pub target: Target,
    /// Weighs the uncensored part up (`Loss::evaluate`).
    pub alpha: f64,
    /// How much of the gradient is summed: 1 / the slides of an update.
    pub share: f64,
}

pub(crate) fn forward<T: Element>(device: &Device, head: &Head<T>) -> Result<()> {
    check("head forward", device, head)?;
    if device.cpu().is_some() {
        let head = on_cpu::<_, Head<T::Sum>>(&[*head])?[0];
        layer_norm::forward(device, &[head.norm])?;
        let epilogue = matmul::Epilogue { bias: Some(head.bias), ..Default::default() };
        matmul::forward(device, &[matmul::Matmul { a: head.norm.y, b: head.weight, out: head.logits, epilogue }])?;
    }
    if device.runs_kernels() {
        device.launch([launch("head_forward", storage::<T>()?, vec![Arg::new(KernelHead::from(head))])])?;
    }
    Ok(())
}

/// dx =, parameter gradients +=.
pub(crate) fn backward<T: Element>(device: &Device, arena: &mut Arena, grad: &HeadGrad<T>) -> Result<()> {
    check("head backward", device, &grad.forward)?;
    if device.cpu().is_some() {
        let grad = on_cpu::<_, HeadGrad<T::Sum>>(&[*grad])?[0];
        let Head { norm, weight, .. } = grad.forward;
        let weight_grad = matmul::WeightGrad { dy: grad.dlogits, x: norm.y, dw: grad.dweight, db: grad.dbias };
        matmul::backward_weight(device, arena, &[weight_grad])?;
        let product = matmul::Matmul { a: grad.dlogits, b: weight, out: grad.dx, epilogue: Default::default() };
        matmul::backward_input(device, &[product])?;
        let norm = layer_norm::NormGrad {
            x: norm.x,
            stats: norm.stats,
            weight: norm.weight,
            dy: grad.dx,
            dx: grad.dx,
            dweight: grad.dnorm_weight,
            dbias: grad.dnorm_bias,
        };
        layer_norm::backward(device, arena, &[norm])?;
    }
    if device.runs_kernels() {
        device.launch([launch("head_backward", storage::<T>()?, vec![Arg::new(KernelHeadGrad::from(grad))])])?;
    }
    Ok(())
}

/// From x to loss, risk (`[1, 2]` f64 in `result`) and all gradients, which are as in [`backward`].
/// A kernel writes nothing else.
pub(crate) fn train<T: Element>(
    device: &Device,
    arena: &mut Arena,
    grad: &HeadGrad<T>,
    loss: &SlideLoss,
    result: &Buffer,
) -> Result<()> {
    check("head train", device, &grad.forward)?;
    let classes = grad.forward.logits.cols();
    if loss.target.label >= classes {
        return Err(Error::Usage(format!("head train: label {} of {classes} classes", loss.target.label)));
    }
    if device.cpu().is_some() {
        forward(device, &grad.forward)?;
        let logits: Vec<f64> = device.download(grad.forward.logits)?.into_iter().map(Real::f64).collect();
        let (value, dlogits) = loss.loss.evaluate(&logits, loss.target, loss.alpha);
        let dlogits: Vec<T::Sum> = dlogits.into_iter().map(|g| T::Sum::of(g * loss.share)).collect();
        device.upload(&dlogits, grad.dlogits)?;
        device.write(bytemuck::bytes_of(&[value, Prediction::from_logits(&logits).risk]), result)?;
        backward(device, arena, grad)?;
    }
    if device.runs_kernels() {
        let args = vec![Arg::new(KernelHeadGrad::from(grad)), Arg::new(KernelLoss::new(loss, result))];
        device.launch([launch("head_train", storage::<T>()?, args)])?;
    }
    Ok(())
}

fn check<T: Element>(op: &'static str, device: &Device, head: &Head<T>) -> Result<()> {
    let (d, classes) = (head.norm.x.cols(), head.weight.rows());
    if device.runs_kernels() && classes > MOST_CLASSES {
        return Err(Error::Usage(format!("{op}: {classes} classes: a kernel takes at most {MOST_CLASSES}")));
    }
    head.norm.x.check(op, "x", &[1, d])?;
    head.weight.check(op, "weight", &[classes, d])?;
    head.bias.check(op, "bias", &[1, classes])?;
    head.logits.check(op, "logits", &[1, classes])
}

// ---- kernels/head.cu ---------------------------------------------------------------------------------------------

const THREADS: u32 = 256;
/// Logits that a block holds in shared memory.
pub(crate) const MOST_CLASSES: usize = 32;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct KernelHead {
    x: u64,
    norm_weight: u64,
    norm_bias: u64,
    stats: u64,
    normed: u64,
    weight: Matrix,
    bias: u64,
    logits: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct KernelHeadGrad {
    head: KernelHead,
    dlogits: u64,
    dx: u64,
    dnorm_weight: u64,
    dnorm_bias: u64,
    dweight: Matrix,
    dbias: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct KernelLoss {
    result: u64,
    alpha: f64,
    share: f64,
    label: i32,
    censored: i32,
    cross_entropy: i32,
    padding: i32,
}

impl KernelLoss {
    fn new(p: &SlideLoss, result: &Buffer) -> Self {
        Self {
            result: result.address(),
            alpha: p.alpha,
            share: p.share,
            label: p.target.label as i32,
            censored: p.target.censored.into(),
            cross_entropy: (p.loss == Loss::CeSurv).into(),
            padding: 0,
        }
    }
}

impl<T: Element> From<&Head<T>> for KernelHead {
    fn from(p: &Head<T>) -> Self {
        Self {
            x: p.norm.x.address(),
            norm_weight: p.norm.weight.address(),
            norm_bias: p.norm.bias.address(),
            stats: p.norm.stats.address(),
            normed: p.norm.y.address(),
            weight: p.weight.into(),
            bias: p.bias.address(),
            logits: p.logits.address(),
        }
    }
}

impl<T: Element> From<&HeadGrad<T>> for KernelHeadGrad {
    fn from(p: &HeadGrad<T>) -> Self {
        Self {
            head: (&p.forward).into(),
            dlogits: p.dlogits.address(),
            dx: p.dx.address(),
            dnorm_weight: p.dnorm_weight.address(),
            dnorm_bias: p.dnorm_bias.address(),
            dweight: p.dweight.into(),
            dbias: p.dbias.address(),
        }
    }
}

/// One block.
fn launch(kernel: &'static str, storage: Storage, args: Vec<Arg>) -> Launch {
    Launch { kernel, storage, grid: [1; 3], block: [THREADS, 1, 1], shared_bytes: 0, args }
}
