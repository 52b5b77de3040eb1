//! The head: logits = W LayerNorm(x) + b of the class token's row.
//!
//! Shapes: x `[1, d]`, norm weight and bias `[1, d]`, weight `[classes, d]`, bias and logits `[1,
//! classes]`. Saved: x, the norm's statistics `[1, 2]` and its output `[1, d]`. `train` goes from x
//! to all gradients at once, a survival loss of the logits between.

use bytemuck::{Pod, Zeroable};

use super::layer_norm;
use crate::{
    Error, Result,
    device::{Arg, Cpu, Device, Element, Launch, Matrix, Real, Storage, View, cpu::real::sum, round, storage},
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
    device.run(
        |cpu| cpu_forward(cpu, head),
        || Ok([launch("head_forward", storage::<T>()?, vec![Arg::new(KernelHead::from(head))])]),
    )
}

/// dx =, parameter gradients +=.
pub(crate) fn backward<T: Element>(device: &Device, grad: &HeadGrad<T>) -> Result<()> {
    check_grad("head backward", device, grad)?;
    device.run(
        |cpu| cpu_backward(cpu, grad),
        || Ok([launch("head_backward", storage::<T>()?, vec![Arg::new(KernelHeadGrad::from(grad))])]),
    )
}

/// From x to loss, risk (`[1, 2]` f64 in `result`) and all gradients, which are as in [`backward`].
/// A kernel writes nothing else.
pub(crate) fn train<T: Element>(
    device: &Device,
    grad: &HeadGrad<T>,
    loss: &SlideLoss,
    result: View<f64>,
) -> Result<()> {
    check_grad("head_loss", device, grad)?;
    result.check("head_loss", "result", &[1, 2])?;
    let classes = grad.forward.logits.cols();
    if loss.target.label >= classes {
        return Err(Error::Usage(format!("head_loss: label {} of {classes} classes", loss.target.label)));
    }
    device.run(
        |cpu| cpu_train(cpu, grad, loss, result),
        || {
            let args = vec![Arg::new(KernelHeadGrad::from(grad)), Arg::new(KernelLoss::new(loss, result))];
            Ok([launch("head_train", storage::<T>()?, args)])
        },
    )
}

fn cpu_forward<T: Element>(cpu: &Cpu, head: &Head<T>) {
    layer_norm::cpu_forward(cpu, &head.norm);
    // SAFETY: the views are live, and this is one thread.
    unsafe {
        let (x, bias) = (normed(&head.norm), head.bias.row(0));
        for (class, logit) in head.logits.row_mut(0).iter_mut().enumerate() {
            let weight = head.weight.row(class);
            *logit = sum(x.len(), |j| weight[j].to_sum() * x[j]) + bias[class].to_sum();
        }
    }
}

/// The norm's output, before it is rounded.
///
/// # Safety
/// The views must be live.
unsafe fn normed<T: Element>(norm: &layer_norm::Norm<T>) -> Vec<T::Sum> {
    // SAFETY: the caller's.
    let (x, stats, weight, bias) = unsafe { (norm.x.row(0), norm.stats.row(0), norm.weight.row(0), norm.bias.row(0)) };
    let of = |j: usize| (x[j].to_sum() - stats[0]) * stats[1] * weight[j].to_sum() + bias[j].to_sum();
    (0..x.len()).map(of).collect()
}

fn cpu_backward<T: Element>(cpu: &Cpu, grad: &HeadGrad<T>) {
    let Head { norm, weight, .. } = grad.forward;
    // SAFETY: the views are live, and this is one thread; the norm's are of vectors that outlive it.
    unsafe {
        let (x, dlogits, dbias) = (normed(&norm), grad.dlogits.row(0), grad.dbias.row_mut(0));
        for (class, &g) in dlogits.iter().enumerate() {
            dbias[class] += g;
            for (dw, &x) in grad.dweight.row_mut(class).iter_mut().zip(&x) {
                *dw += g * x;
            }
        }
        // as sums are kept, up to dx
        let d = x.len();
        let mut dx: Vec<_> =
            (0..d).map(|j| sum(dlogits.len(), |class| dlogits[class] * weight.row(class)[j].to_sum())).collect();
        let widened = |row: View<T>| row.row(0).iter().map(|x| x.to_sum()).collect::<Vec<_>>();
        let (x, weight) = (widened(norm.x), widened(norm.weight));
        let in_place = View::of_slice_mut(&mut dx, 1, d);
        let norm = layer_norm::NormGrad::<T::Sum> {
            x: View::of_slice(&x, 1, d),
            stats: norm.stats,
            weight: View::of_slice(&weight, 1, d),
            dy: in_place,
            dx: in_place,
            dweight: grad.dnorm_weight,
            dbias: grad.dnorm_bias,
        };
        layer_norm::cpu_backward(cpu, &norm);
        round(&dx, grad.dx.row_mut(0));
    }
}

fn cpu_train<T: Element>(cpu: &Cpu, grad: &HeadGrad<T>, loss: &SlideLoss, result: View<f64>) {
    cpu_forward(cpu, &grad.forward);
    // SAFETY: the views are live, and this is one thread.
    let (logits, dlogits) = unsafe { (grad.forward.logits.row(0), grad.dlogits.row_mut(0)) };
    let logits: Vec<f64> = logits.iter().map(|x| x.f64()).collect();
    let (value, gradient) = loss.loss.evaluate(&logits, loss.target, loss.alpha);
    for (to, gradient) in dlogits.iter_mut().zip(gradient) {
        *to = T::Sum::of(gradient * loss.share);
    }
    let risk = Prediction::from_logits(&logits).risk;
    // SAFETY: the view is live host memory, and nobody reads it now.
    unsafe { result.row_mut(0) }.copy_from_slice(&[value, risk]);
    cpu_backward(cpu, grad);
}

fn check<T: Element>(op: &'static str, device: &Device, head: &Head<T>) -> Result<()> {
    let (d, classes) = (head.norm.x.cols(), head.weight.rows());
    if device.runs_kernels() && classes > MOST_CLASSES {
        return Err(Error::Usage(format!("{op}: {classes} classes: a kernel takes at most {MOST_CLASSES}")));
    }
    head.norm.x.check(op, "x", &[1, d])?;
    head.norm.stats.check(op, "stats", &[1, 2])?;
    head.norm.weight.check(op, "norm_weight", &[1, d])?;
    head.norm.bias.check(op, "norm_bias", &[1, d])?;
    head.norm.y.check(op, "normed", &[1, d])?;
    head.weight.check(op, "weight", &[classes, d])?;
    head.bias.check(op, "bias", &[1, classes])?;
    head.logits.check(op, "logits", &[1, classes])
}

fn check_grad<T: Element>(op: &'static str, device: &Device, grad: &HeadGrad<T>) -> Result<()> {
    check(op, device, &grad.forward)?;
    let (d, classes) = (grad.forward.norm.x.cols(), grad.forward.weight.rows());
    grad.dlogits.check(op, "dlogits", &[1, classes])?;
    grad.dx.check(op, "dx", &[1, d])?;
    grad.dnorm_weight.check(op, "dnorm_weight", &[1, d])?;
    grad.dnorm_bias.check(op, "dnorm_bias", &[1, d])?;
    grad.dweight.check(op, "dweight", &[classes, d])?;
    grad.dbias.check(op, "dbias", &[1, classes])
}

// ---- kernels/head.cu ---------------------------------------------------------------------------------------------

/// Logits that a block holds in shared memory.
pub(crate) use super::constants::head::MOST_CLASSES;
use super::constants::head::THREADS;

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
    fn new(p: &SlideLoss, result: View<f64>) -> Self {
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
    Launch { kernel, storage, grid: [1; 3], block: [THREADS as u32, 1, 1], shared_bytes: 0, args }
}
