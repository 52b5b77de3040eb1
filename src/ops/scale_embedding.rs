//! A scale embedding e, added to the input of a projection, is a change of its bias:
//! W (x + e) + b = W x + (b + W e).
//!
//! Shapes: weight `[out, d]`, bias and folded `[1, out]`, embedding `[1, d]`.

use bytemuck::{Pod, Zeroable};

use crate::{
    Result,
    device::{Arg, Cpu, Device, Element, Launch, Matrix, Storage, View, cpu::real::sum, storage},
};

#[derive(Clone, Copy)]
pub(crate) struct FoldEmbedding<T> {
    pub weight: View<T>,
    pub bias: View<T>,
    pub embedding: View<T>,
    pub folded: View<T>,
}

#[derive(Clone, Copy)]
pub(crate) struct FoldEmbeddingGrad<T: Element> {
    pub weight: View<T>,
    pub embedding: View<T>,
    /// Gradient of the folded bias: the column sums of the projection's gradient.
    pub dfolded: View<T::Sum>,
    pub dweight: View<T::Sum>,
    pub dbias: View<T::Sum>,
    pub dembedding: View<T::Sum>,
}

/// folded = bias + W e
pub(crate) fn forward<T: Element>(device: &Device, problems: &[FoldEmbedding<T>]) -> Result<()> {
    const OP: &str = "scale_embedding forward";
    for p in problems {
        let (out, d) = (p.weight.rows(), p.weight.cols());
        p.bias.check(OP, "bias", &[1, out])?;
        p.folded.check(OP, "folded", &[1, out])?;
        p.embedding.check(OP, "embedding", &[1, d])?;
    }
    device.run(
        |cpu| problems.iter().for_each(|p| cpu_forward(cpu, p)),
        || Ok(forward_launches(storage::<T>()?, problems)),
    )
}

fn cpu_forward<T: Element>(cpu: &Cpu, p: &FoldEmbedding<T>) {
    cpu.parallel(
        1,
        #[inline(always)]
        |_| {
            // SAFETY: the views are live, and this is one task.
            unsafe {
                let (e, bias, folded) = (p.embedding.row(0), p.bias.row(0), p.folded.row_mut(0));
                for i in 0..folded.len() {
                    let w = p.weight.row(i);
                    let product = sum(
                        e.len(),
                        #[inline(always)]
                        |j| w[j].to_sum() * e[j].to_sum(),
                    );
                    folded[i] = T::from_sum(bias[i].to_sum() + product);
                }
            }
        },
    );
}

/// dbias += dfolded; dweight += dfoldedᵀ e (what the projection's own gradient, taken at x, leaves
/// out); dembedding += dfolded W
pub(crate) fn backward<T: Element>(device: &Device, problems: &[FoldEmbeddingGrad<T>]) -> Result<()> {
    const OP: &str = "scale_embedding backward";
    for p in problems {
        let (out, d) = (p.weight.rows(), p.weight.cols());
        p.dweight.check(OP, "dweight", &[out, d])?;
        p.dbias.check(OP, "dbias", &[1, out])?;
        p.dfolded.check(OP, "dfolded", &[1, out])?;
        p.embedding.check(OP, "embedding", &[1, d])?;
        p.dembedding.check(OP, "dembedding", &[1, d])?;
    }
    device.run(
        |cpu| problems.iter().for_each(|p| cpu_backward(cpu, p)),
        || Ok(backward_launches(storage::<T>()?, problems)),
    )
}

fn cpu_backward<T: Element>(cpu: &Cpu, p: &FoldEmbeddingGrad<T>) {
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
                        dw[j] += g * e[j].to_sum();
                        de[j] += g * w[j].to_sum();
                    }
                }
            }
        },
    );
}

// ---- kernels/scale_embedding.cu ----------------------------------------------------------------------------------

use super::constants::scale_embedding::{PROBLEMS, WARPS};

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct KernelFold {
    weight: Matrix,
    bias: u64,
    embedding: u64,
    folded: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct KernelFoldGrad {
    weight: Matrix,
    embedding: u64,
    dfolded: u64,
    dweight: Matrix,
    dbias: u64,
    dembedding: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct GradTable {
    problem: [KernelFoldGrad; PROBLEMS],
    count: i32,
    padding: i32,
}

fn forward_launches<T: Element>(storage: Storage, problems: &[FoldEmbedding<T>]) -> Vec<Launch> {
    let launch = |problems: &[FoldEmbedding<T>]| {
        let mut table = [KernelFold::zeroed(); PROBLEMS];
        for (place, p) in table.iter_mut().zip(problems) {
            let (bias, embedding, folded) = (p.bias.address(), p.embedding.address(), p.folded.address());
            *place = KernelFold { weight: p.weight.into(), bias, embedding, folded };
        }
        let rows = problems.iter().map(|p| p.weight.rows()).max().unwrap_or(0);
        let grid = [rows.div_ceil(WARPS) as u32, problems.len() as u32, 1];
        let args = vec![Arg::new(table)];
        Launch {
            kernel: "scale_embedding_forward",
            storage,
            grid,
            block: [32 * WARPS as u32, 1, 1],
            shared_bytes: 0,
            args,
        }
    };
    problems.chunks(PROBLEMS).map(launch).collect()
}

fn backward_launches<T: Element>(storage: Storage, problems: &[FoldEmbeddingGrad<T>]) -> Vec<Launch> {
    let launch = |problems: &[FoldEmbeddingGrad<T>]| {
        let mut table =
            GradTable { problem: [KernelFoldGrad::zeroed(); PROBLEMS], count: problems.len() as i32, padding: 0 };
        for (place, p) in table.problem.iter_mut().zip(problems) {
            *place = KernelFoldGrad {
                weight: p.weight.into(),
                embedding: p.embedding.address(),
                dfolded: p.dfolded.address(),
                dweight: p.dweight.into(),
                dbias: p.dbias.address(),
                dembedding: p.dembedding.address(),
            };
        }
        let cols = problems.iter().map(|p| p.weight.cols()).max().unwrap_or(0);
        let grid = [cols.div_ceil(32) as u32, 1, 1];
        let args = vec![Arg::new(table)];
        Launch {
            kernel: "scale_embedding_backward",
            storage,
            grid,
            block: [32 * WARPS as u32, 1, 1],
            shared_bytes: 0,
            args,
        }
    };
    problems.chunks(PROBLEMS).map(launch).collect()
}
