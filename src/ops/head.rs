//! The head: logits = W LayerNorm(x) + b of the class token's row.
//!
//! Shapes: x `[1, d]`, norm weight and bias `[1, d]`, weight `[classes, d]`, bias and logits `[1, classes]`. Saved: x, the norm's statistics
//! `[1, 2]` and its output `[1, d]`.

use super::{layer_norm, matmul};
use crate::{
    Result,
    device::{Arena, Device, Element, View, on_cpu},
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
    Ok(())
}

/// dx =, parameter gradients +=.
pub fn backward<T: Element>(device: &Device, arena: &mut Arena, grad: &HeadGrad<T>) -> Result<()> {
    check("head backward", &grad.forward)?;
    if device.cpu().is_some() {
        let grad = on_cpu::<_, HeadGrad<T::Sum>>(&[*grad])?[0];
        let Head { norm, weight, .. } = grad.forward;
        let weight_grad = matmul::WeightGrad { dy: grad.dlogits, x: norm.y, dw: grad.dweight, db: Some(grad.dbias) };
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
    Ok(())
}

fn check<T: Element>(op: &'static str, head: &Head<T>) -> Result<()> {
    let (d, classes) = (head.norm.x.cols(), head.weight.rows());
    head.norm.x.check(op, "x", &[1, d])?;
    head.weight.check(op, "weight", &[classes, d])?;
    head.bias.check(op, "bias", &[1, classes])?;
    head.logits.check(op, "logits", &[1, classes])
}
