//! A scale embedding e, added to the input of a projection, is a change of its bias: W (x + e) + b = W x + (b + W e).
//!
//! Shapes: weight `[out, d]`, bias and folded `[1, out]`, embedding `[1, d]`.

use crate::{
    Result,
    device::{Cpu, Device, Element, Real, View, cpu::real::sum, on_cpu},
};

#[derive(Clone, Copy)]
pub struct Fold<T> {
    pub weight: View<T>,
    pub bias: View<T>,
    pub embedding: View<T>,
    pub folded: View<T>,
}

#[derive(Clone, Copy)]
pub struct FoldGrad<T: Element> {
    pub weight: View<T>,
    pub embedding: View<T>,
    /// Gradient of the folded bias: the column sums of the projection's gradient.
    pub dfolded: View<T::Sum>,
    pub dweight: View<T::Sum>,
    pub dbias: View<T::Sum>,
    pub dembedding: View<T::Sum>,
}

/// folded = bias + W e
pub fn forward<T: Element>(device: &Device, problems: &[Fold<T>]) -> Result<()> {
    const OP: &str = "scale_embedding forward";
    for p in problems {
        let (out, d) = (p.weight.rows(), p.weight.cols());
        p.bias.check(OP, "bias", &[1, out])?;
        p.folded.check(OP, "folded", &[1, out])?;
        p.embedding.check(OP, "embedding", &[1, d])?;
    }
    if let Some(cpu) = device.cpu() {
        on_cpu::<_, Fold<T::Sum>>(problems)?.iter().for_each(|p| cpu_forward(cpu, p));
    }
    Ok(())
}

fn cpu_forward<T: Real>(cpu: &Cpu, p: &Fold<T>) {
    cpu.parallel(
        1,
        #[inline(always)]
        |_| {
            // SAFETY: the views are live, and this is one task.
            unsafe {
                let (e, bias, folded) = (p.embedding.row(0), p.bias.row(0), p.folded.row_mut(0));
                for i in 0..folded.len() {
                    let w = p.weight.row(i);
                    folded[i] = bias[i]
                        + sum(
                            e.len(),
                            #[inline(always)]
                            |j| w[j] * e[j],
                        );
                }
            }
        },
    );
}

/// dbias += dfolded; dweight += dfoldedᵀ e (what the projection's own gradient, taken at x, leaves out); dembedding += dfolded W
pub fn backward<T: Element>(device: &Device, problems: &[FoldGrad<T>]) -> Result<()> {
    const OP: &str = "scale_embedding backward";
    for p in problems {
        let (out, d) = (p.weight.rows(), p.weight.cols());
        p.dweight.check(OP, "dweight", &[out, d])?;
        p.dbias.check(OP, "dbias", &[1, out])?;
        p.dfolded.check(OP, "dfolded", &[1, out])?;
        p.embedding.check(OP, "embedding", &[1, d])?;
        p.dembedding.check(OP, "dembedding", &[1, d])?;
    }
    if let Some(cpu) = device.cpu() {
        on_cpu::<_, FoldGrad<T::Sum>>(problems)?.iter().for_each(|p| cpu_backward(cpu, p));
    }
    Ok(())
}

fn cpu_backward<T: Real>(cpu: &Cpu, p: &FoldGrad<T>) {
    cpu.parallel(
        1,
        #[inline(always)]
        |_| {
            // SAFETY: the views are live, and this is one task.
            unsafe {
                let (e, de, dfolded, dbias) =
                    (p.embedding.row(0), p.dembedding.row_mut(0), p.dfolded.row(0), p.dbias.row_mut(0));
                for i in 0..dfolded.len() {
                    let (g, w, dw) = (dfolded[i], p.weight.row(i), p.dweight.row_mut(i));
                    dbias[i] += g;
                    for j in 0..e.len() {
                        dw[j] += g * e[j];
                        de[j] += g * w[j];
                    }
                }
            }
        },
    );
}
