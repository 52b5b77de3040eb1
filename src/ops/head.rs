//! The head: logits = W LayerNorm(x) + b of the class token's row.
//!
//! Shapes: x `[1, d]`, norm weight and bias `[1, d]`, weight `[classes, d]`, bias and logits `[1, classes]`. Saved: x, the norm's statistics
//! `[1, 2]` and its output `[1, d]`.

use super::{layer_norm, matmul};
use crate::{
    Result,
    device::{Device, Real, View},
};

#[derive(Clone, Copy)]
pub struct Head<T> {
    /// x to normed.
    pub norm: layer_norm::Norm<T>,
    pub weight: View<T>,
    pub bias: View<T>,
    pub logits: View<T>,
}

#[derive(Clone, Copy)]
pub struct HeadGrad<T> {
    pub dlogits: View<T>,
    /// `[1, d]`, overwritten.
    pub dx: View<T>,
    pub dnorm_weight: View<T>,
    pub dnorm_bias: View<T>,
    pub dweight: View<T>,
    pub dbias: View<T>,
}

pub fn forward<T: Real>(device: &Device, head: &Head<T>) -> Result<()> {
    layer_norm::forward(device, &[head.norm])?;
    let epilogue = matmul::Epilogue { bias: Some(head.bias), ..Default::default() };
    matmul::forward(device, &[matmul::Matmul { a: head.norm.y, b: head.weight, out: head.logits, epilogue }])
}

pub fn backward<T: Real>(device: &Device, head: &Head<T>, grad: &HeadGrad<T>) -> Result<()> {
    let Head { norm, weight, .. } = *head;
    let weight_grad = matmul::WeightGrad { dy: grad.dlogits, x: norm.y, dw: grad.dweight, db: Some(grad.dbias) };
    matmul::backward_weight(device, &[weight_grad])?;
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
    layer_norm::backward(device, &[norm])
}
