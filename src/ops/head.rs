//! The head: logits = W LayerNorm(x) + b of the class token's row.
//!
//! Shapes: x `[1, d]`, norm weight and bias `[1, d]`, weight `[classes, d]`, bias and logits `[1, classes]`. Saved: x, the norm's statistics
//! `[1, 2]` and its output `[1, d]`.

use bytemuck::{Pod, Zeroable};

use super::{layer_norm, matmul};
use crate::{
    Result,
    device::{Arena, Arg, Buffer, Device, Element, Launch, Matrix, Storage, View, on_cpu, storage},
    loss::{Loss, Target},
};

#[derive(Clone, Copy)]
pub struct Head<T: Element> {
    /// x to normed.
    pub norm: layer_norm::Norm<T>,
    pub weight: View<T>,
    pub bias: View<T>,
    pub logits: View<T::Sum>,
}

#[derive(Clone, Copy)]
pub struct HeadGrad<T: Element> {
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

pub fn forward<T: Element>(device: &Device, head: &Head<T>) -> Result<()> {
    check("head forward", head)?;
    if device.cpu().is_some() {
        let head = on_cpu::<_, Head<T::Sum>>(&[*head])?[0];
        layer_norm::forward(device, &[head.norm])?;
        let epilogue = matmul::Epilogue { bias: Some(head.bias), ..Default::default() };
        matmul::forward(device, &[matmul::Matmul { a: head.norm.y, b: head.weight, out: head.logits, epilogue }])?;
    }
    if device.runs_kernels() {
        device.launch([launch("head_forward", storage::<T>()?, THREADS, KernelHead::from(head))])?;
    }
    Ok(())
}

/// dx =, parameter gradients +=.
pub fn backward<T: Element>(device: &Device, arena: &mut Arena, grad: &HeadGrad<T>) -> Result<()> {
    check("head backward", &grad.forward)?;
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
        device.launch([launch("head_backward", storage::<T>()?, THREADS, KernelHeadGrad::from(grad))])?;
    }
    Ok(())
}

fn check<T: Element>(op: &'static str, head: &Head<T>) -> Result<()> {
    let (d, classes) = (head.norm.x.cols(), head.weight.rows());
    head.norm.x.check(op, "x", &[1, d])?;
    head.weight.check(op, "weight", &[classes, d])?;
    head.bias.check(op, "bias", &[1, classes])?;
    head.logits.check(op, "logits", &[1, classes])
}

/// A slide's loss by a kernel: writes the gradient of `share * loss` in the logits, and (loss, risk) as f64 to `result`.
pub fn loss(
    device: &Device,
    logits: View<f32>,
    dlogits: View<f32>,
    result: &Buffer,
    (loss, target, alpha, share): (Loss, Target, f64, f64),
) -> Result<()> {
    dlogits.check("head loss", "dlogits", &[1, logits.cols()])?;
    let kernel = KernelLoss {
        logits: logits.address(),
        dlogits: dlogits.address(),
        result: result.address(),
        alpha,
        share,
        classes: logits.cols() as i32,
        label: target.label as i32,
        censored: target.censored.into(),
        cross_entropy: (loss == Loss::CeSurv).into(),
    };
    device.launch([launch("head_loss", Storage::F32, 32, kernel)])
}

// ---- kernels/head.cu ---------------------------------------------------------------------------------------------

const THREADS: u32 = 256;

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
    logits: u64,
    dlogits: u64,
    result: u64,
    alpha: f64,
    share: f64,
    classes: i32,
    label: i32,
    censored: i32,
    cross_entropy: i32,
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
fn launch<A: Pod>(kernel: &'static str, storage: Storage, threads: u32, argument: A) -> Launch {
    Launch { kernel, storage, grid: [1; 3], block: [threads, 1, 1], shared_bytes: 0, args: vec![Arg::new(argument)] }
}
