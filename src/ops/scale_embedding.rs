//! A scale embedding e, added to the input of a projection, is a change of its bias: W (x + e) + b = W x + (b + W e).
//!
//! Shapes: weight `[out, d]`, bias and folded `[1, out]`, embedding `[1, d]`.

use crate::{
    Result,
    device::{Device, Real, View, cpu::real::sum},
};

#[derive(Clone, Copy)]
pub struct Fold<T> {
    pub weight: View<T>,
    pub bias: View<T>,
    pub embedding: View<T>,
    pub folded: View<T>,
}

#[derive(Clone, Copy)]
pub struct FoldGrad<T> {
    pub weight: View<T>,
    pub embedding: View<T>,
    /// Gradient of the folded bias: the column sums of the projection's gradient.
    pub dfolded: View<T>,
    pub dweight: View<T>,
    pub dbias: View<T>,
    pub dembedding: View<T>,
}

/// folded = bias + W e
pub fn forward<T: Real>(device: &Device, problems: &[Fold<T>]) -> Result<()> {
    const OP: &str = "scale_embedding forward";
    for p in problems {
        let (out, d) = (p.weight.rows(), p.weight.cols());
        p.bias.check(OP, "bias", &[1, out])?;
        p.folded.check(OP, "folded", &[1, out])?;
        p.embedding.check(OP, "embedding", &[1, d])?;
        if let Device::Cpu(cpu) = device {
            cpu.parallel(
                1,
                #[inline(always)]
                |_| {
                    // SAFETY: the views are live, and this is one task.
                    unsafe {
                        let (e, bias, folded) = (p.embedding.row(0), p.bias.row(0), p.folded.row_mut(0));
                        for i in 0..out {
                            let w = p.weight.row(i);
                            folded[i] = bias[i]
                                + sum(
                                    d,
                                    #[inline(always)]
                                    |j| w[j] * e[j],
                                );
                        }
                    }
                },
            );
        }
    }
    Ok(())
}

/// dbias += dfolded; dweight += dfoldedᵀ e (what the projection's own gradient, taken at x, leaves out); dembedding += dfolded W
pub fn backward<T: Real>(device: &Device, problems: &[FoldGrad<T>]) -> Result<()> {
    const OP: &str = "scale_embedding backward";
    for p in problems {
        let (out, d) = (p.weight.rows(), p.weight.cols());
        p.dweight.check(OP, "dweight", &[out, d])?;
        p.dbias.check(OP, "dbias", &[1, out])?;
        p.dfolded.check(OP, "dfolded", &[1, out])?;
        p.embedding.check(OP, "embedding", &[1, d])?;
        p.dembedding.check(OP, "dembedding", &[1, d])?;
        if let Device::Cpu(cpu) = device {
            cpu.parallel(
                1,
                #[inline(always)]
                |_| {
                    // SAFETY: the views are live, and this is one task.
                    unsafe {
                        let (e, de, dfolded, dbias) =
                            (p.embedding.row(0), p.dembedding.row_mut(0), p.dfolded.row(0), p.dbias.row_mut(0));
                        for i in 0..out {
                            let (g, w, dw) = (dfolded[i], p.weight.row(i), p.dweight.row_mut(i));
                            dbias[i] += g;
                            for j in 0..d {
                                dw[j] += g * e[j];
                                de[j] += g * w[j];
                            }
                        }
                    }
                },
            );
        }
    }
    Ok(())
}
