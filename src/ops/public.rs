//! The ops as other engines call them: operands are borrowed matrices ([`Mat`] to read, [`MatMut`]
//! to write), scratch is a [`Workspace`]'s. Each function takes a list of problems of any sizes,
//! which is one launch of its kernel where the kernels can, checks shapes, strides and devices, and
//! says by name what is wrong.
//!
//! Gradients of activations and outputs are overwritten, gradients of parameters are added to,
//! unless a field says otherwise.

use super::{
    Dropout,
    adam::{self, Adam, Arenas},
    attention::{self, Merge},
    conv_fusion::{self, Grid, Weights},
    elementwise::{self, Map},
    head::{self, SlideLoss},
    layer_norm::{self, Norm, NormGrad},
    matmul::{self, Epilogue, Matmul, WeightGrad},
    ppeg::{self, PpegGrad},
};
use crate::{
    Error, Result,
    device::{Element, Mat, MatMut, Operands, View, Workspace},
};

/// [`layer_norm()`]: y = LayerNorm(x) of each row (Ba et al. 2016), epsilon 1e-5.
pub struct LayerNorm<'a, T: Element> {
    /// `[n0, d]`
    pub x: Mat<'a, T>,
    /// `[1, d]`
    pub weight: Mat<'a, T>,
    /// `[1, d]`
    pub bias: Mat<'a, T>,
    /// `[n, d]` with n0 <= n <= 2 n0: rows from n0 on repeat the first ones.
    pub y: MatMut<'a, T>,
    /// `[n0, 2]`: mean and 1 / sqrt(variance + epsilon) of each row, for backward.
    pub stats: MatMut<'a, T::Sum>,
}

/// y and the statistics of each problem.
pub fn layer_norm<T: Element>(workspace: &mut Workspace, problems: &mut [LayerNorm<T>]) -> Result<()> {
    let on = workspace.operands("layer_norm");
    let view = |p: &LayerNorm<T>| {
        Ok(Norm {
            x: on.read("x", &p.x)?,
            stats: on.write("stats", &p.stats)?,
            weight: on.read("weight", &p.weight)?,
            bias: on.read("bias", &p.bias)?,
            y: on.write("y", &p.y)?,
        })
    };
    let problems = problems.iter().map(view).collect::<Result<Vec<_>>>()?;
    workspace.run(|device, _| layer_norm::forward(device, &problems))
}

/// [`layer_norm_backward`]
pub struct LayerNormBackward<'a, T: Element> {
    /// `[n0, d]`
    pub x: Mat<'a, T>,
    /// `[n0, 2]`, as [`layer_norm()`] wrote them.
    pub stats: Mat<'a, T::Sum>,
    /// `[1, d]`
    pub weight: Mat<'a, T>,
    /// `[n, d]`
    pub dy: Mat<'a, T>,
    /// `[n0, d]`
    pub dx: MatMut<'a, T>,
    /// `[1, d]`
    pub dweight: MatMut<'a, T::Sum>,
    /// `[1, d]`
    pub dbias: MatMut<'a, T::Sum>,
}

/// dx =, dweight and dbias += of each problem.
pub fn layer_norm_backward<T: Element>(workspace: &mut Workspace, problems: &mut [LayerNormBackward<T>]) -> Result<()> {
    let on = workspace.operands("layer_norm_backward");
    let view = |p: &LayerNormBackward<T>| {
        Ok(NormGrad {
            x: on.read("x", &p.x)?,
            stats: on.read("stats", &p.stats)?,
            weight: on.read("weight", &p.weight)?,
            dy: on.read("dy", &p.dy)?,
            dx: on.write("dx", &p.dx)?,
            dweight: on.write("dweight", &p.dweight)?,
            dbias: on.write("dbias", &p.dbias)?,
        })
    };
    let problems = problems.iter().map(view).collect::<Result<Vec<_>>>()?;
    workspace.run(|device, arena| layer_norm::backward(device, arena, &problems))
}

/// An op's dropout, with the seed and the step that hold now where they are read from memory.
fn drawn(on: &Operands, dropout: Option<Dropout>) -> Option<Dropout> {
    dropout.map(|dropout| dropout.for_device(&on.device))
}

/// [`linear`]: y = x Wᵀ + bias; then GELU (exact) where `gelu` is given, dropout, and + residual.
pub struct Linear<'a, T: Element> {
    /// `[m, in]`
    pub x: Mat<'a, T>,
    /// `[out, in]`, as PyTorch's `nn.Linear` has it.
    pub weight: Mat<'a, T>,
    /// `[1, out]`
    pub bias: Option<Mat<'a, T>>,
    /// `[m, out]`: takes what GELU is applied to, for backward.
    pub gelu: Option<MatMut<'a, T>>,
    /// Of `[m, out]`.
    pub dropout: Option<Dropout>,
    /// `[m, out]`
    pub residual: Option<Mat<'a, T>>,
    /// `[m, out]`
    pub y: MatMut<'a, T>,
}

/// y of each problem.
pub fn linear<T: Element>(workspace: &mut Workspace, problems: &mut [Linear<T>]) -> Result<()> {
    let on = workspace.operands("linear");
    let view = |p: &Linear<T>| {
        let epilogue = Epilogue {
            accumulate: false,
            bias: p.bias.as_ref().map(|bias| on.read("bias", bias)).transpose()?,
            gelu: p.gelu.as_ref().map(|gelu| on.write("gelu", gelu)).transpose()?,
            gelu_grad: None,
            dropout: drawn(&on, p.dropout),
            residual: p.residual.as_ref().map(|residual| on.read("residual", residual)).transpose()?,
        };
        let (a, b, out) = (on.read("x", &p.x)?, on.read("weight", &p.weight)?, on.write("y", &p.y)?);
        b.check("linear", "weight", &[out.cols(), a.cols()])?;
        out.check("linear", "y", &[a.rows(), b.rows()])?;
        Ok(Matmul { a, b, out, epilogue })
    };
    let problems = problems.iter().map(view).collect::<Result<Vec<_>>>()?;
    workspace.run(|device, _| matmul::forward(device, &problems))
}

/// [`linear_backward_input`]: dx = dy W; then times GELU's derivative where `gelu` is given (of the
/// layer before, whose output x is), dropout, and + residual.
pub struct LinearBackwardInput<'a, T: Element> {
    /// `[m, out]`
    pub dy: Mat<'a, T>,
    /// `[out, in]`
    pub weight: Mat<'a, T>,
    /// `[m, in]`: what the layer before gave to GELU.
    pub gelu: Option<Mat<'a, T>>,
    /// Of `[m, in]`: that of the layer before.
    pub dropout: Option<Dropout>,
    /// `[m, in]`
    pub residual: Option<Mat<'a, T>>,
    /// dx +=, not =.
    pub accumulate: bool,
    /// `[m, in]`
    pub dx: MatMut<'a, T>,
}

/// dx of each problem.
pub fn linear_backward_input<T: Element>(
    workspace: &mut Workspace,
    problems: &mut [LinearBackwardInput<T>],
) -> Result<()> {
    let on = workspace.operands("linear_backward_input");
    let view = |p: &LinearBackwardInput<T>| {
        let epilogue = Epilogue {
            accumulate: p.accumulate,
            bias: None,
            gelu: None,
            gelu_grad: p.gelu.as_ref().map(|gelu| on.read("gelu", gelu)).transpose()?,
            dropout: drawn(&on, p.dropout),
            residual: p.residual.as_ref().map(|residual| on.read("residual", residual)).transpose()?,
        };
        let (a, b, out) = (on.read("dy", &p.dy)?, on.read("weight", &p.weight)?, on.write("dx", &p.dx)?);
        b.check("linear_backward_input", "weight", &[a.cols(), out.cols()])?;
        out.check("linear_backward_input", "dx", &[a.rows(), b.cols()])?;
        Ok(Matmul { a, b, out, epilogue })
    };
    let problems = problems.iter().map(view).collect::<Result<Vec<_>>>()?;
    workspace.run(|device, _| matmul::backward_input(device, &problems))
}

/// [`linear_backward_weight`]
pub struct LinearBackwardWeight<'a, T: Element> {
    /// `[m, out]`
    pub dy: Mat<'a, T>,
    /// `[m, in]`
    pub x: Mat<'a, T>,
    /// `[out, in]`
    pub dweight: MatMut<'a, T::Sum>,
    /// `[1, out]`
    pub dbias: MatMut<'a, T::Sum>,
}

/// dweight += dyᵀ x and dbias += the column sums of dy, of each problem.
pub fn linear_backward_weight<T: Element>(
    workspace: &mut Workspace,
    problems: &mut [LinearBackwardWeight<T>],
) -> Result<()> {
    let on = workspace.operands("linear_backward_weight");
    let view = |p: &LinearBackwardWeight<T>| {
        let (dw, db) = (on.write("dweight", &p.dweight)?, on.write("dbias", &p.dbias)?);
        Ok(WeightGrad { dy: on.read("dy", &p.dy)?, x: on.read("x", &p.x)?, dw, db })
    };
    let problems = problems.iter().map(view).collect::<Result<Vec<_>>>()?;
    workspace.run(|device, arena| matmul::backward_weight(device, arena, &problems))
}

/// [`attention()`]: out = dropout(softmax(q kᵀ / sqrt(d / heads))) v of each head, and the scores'
/// log-sum-exp (FlashAttention-2, Dao 2023, algorithm 1). Head h owns columns `h * d / heads ..`.
pub struct Attention<'a, T: Element> {
    /// `[n, d]`
    pub q: Mat<'a, T>,
    /// `[m, d]`; no row gives out = 0.
    pub k: Mat<'a, T>,
    /// `[m, d]`
    pub v: Mat<'a, T>,
    /// Divides d, into at most 128 columns each.
    pub heads: usize,
    /// Of the probabilities `[n, m]`; head h draws at its site + h.
    pub dropout: Option<Dropout>,
    /// `[n, d]`
    pub out: MatMut<'a, T>,
    /// `[heads, n]`, natural logarithm.
    pub lse: MatMut<'a, T::Sum>,
}

/// out and lse of each problem.
pub fn attention<T: Element>(workspace: &mut Workspace, problems: &mut [Attention<T>]) -> Result<()> {
    let on = workspace.operands("attention");
    let view = |p: &Attention<T>| {
        Ok(attention::Attention {
            q: on.read("q", &p.q)?,
            k: on.read("k", &p.k)?,
            v: on.read("v", &p.v)?,
            out: on.write("out", &p.out)?,
            lse: on.write("lse", &p.lse)?,
            heads: p.heads,
            dropout: drawn(&on, p.dropout),
        })
    };
    let problems = problems.iter().map(view).collect::<Result<Vec<_>>>()?;
    workspace.run(|device, arena| attention::forward(device, arena, &problems))
}

/// [`attention_backward`] (FlashAttention-2, algorithm 2).
pub struct AttentionBackward<'a, T: Element> {
    /// `[n, d]`
    pub q: Mat<'a, T>,
    /// `[m, d]`
    pub k: Mat<'a, T>,
    /// `[m, d]`
    pub v: Mat<'a, T>,
    /// As in [`Attention`].
    pub heads: usize,
    /// As [`attention()`] was given it.
    pub dropout: Option<Dropout>,
    /// `[n, d]`, as [`attention()`] wrote it.
    pub out: Mat<'a, T>,
    /// `[heads, n]`, as [`attention()`] wrote it.
    pub lse: Mat<'a, T::Sum>,
    /// `[n, d]`
    pub dout: Mat<'a, T>,
    /// `[n, d]`
    pub dq: MatMut<'a, T>,
    /// `[m, d]`
    pub dk: MatMut<'a, T>,
    /// `[m, d]`
    pub dv: MatMut<'a, T>,
}

/// dq, dk and dv = of each problem.
pub fn attention_backward<T: Element>(workspace: &mut Workspace, problems: &mut [AttentionBackward<T>]) -> Result<()> {
    let on = workspace.operands("attention_backward");
    let view = |p: &AttentionBackward<T>| {
        let forward = attention::Attention {
            q: on.read("q", &p.q)?,
            k: on.read("k", &p.k)?,
            v: on.read("v", &p.v)?,
            out: on.read("out", &p.out)?,
            lse: on.read("lse", &p.lse)?,
            heads: p.heads,
            dropout: drawn(&on, p.dropout),
        };
        Ok(attention::AttentionGrad {
            forward,
            dout: on.read("dout", &p.dout)?,
            dq: on.write("dq", &p.dq)?,
            dk: on.write("dk", &p.dk)?,
            dv: on.write("dv", &p.dv)?,
        })
    };
    let problems = problems.iter().map(view).collect::<Result<Vec<_>>>()?;
    workspace.run(|device, arena| attention::backward(device, arena, &problems))
}

/// [`attention_merge`]: a context that comes in parts. With out_i and lse_i of part i alone, lse =
/// log(sum_i exp(lse_i)) and out = sum_i exp(lse_i - lse) out_i (FlashAttention-2, section 3.1).
pub struct AttentionMerge<'a, T: Element> {
    /// `[n, d]`, [`attention()`]'s of this part.
    pub part: Mat<'a, T>,
    /// `[heads, n]`, [`attention()`]'s of this part.
    pub part_lse: Mat<'a, T::Sum>,
    /// `[n, d]`, of all parts so far.
    pub out: MatMut<'a, T::Sum>,
    /// `[heads, n]`, of all parts so far.
    pub lse: MatMut<'a, T::Sum>,
    /// Nothing has been merged yet: out and lse may hold anything.
    pub first: bool,
}

/// out and lse = those of the parts before together with this one, of each problem.
pub fn attention_merge<T: Element>(workspace: &mut Workspace, problems: &mut [AttentionMerge<T>]) -> Result<()> {
    let on = workspace.operands("attention_merge");
    let view = |p: &AttentionMerge<T>| {
        Ok(Merge {
            part: on.read("part", &p.part)?,
            part_lse: on.read("part_lse", &p.part_lse)?,
            out: on.write("out", &p.out)?,
            lse: on.write("lse", &p.lse)?,
            first: p.first,
        })
    };
    let problems = problems.iter().map(view).collect::<Result<Vec<_>>>()?;
    workspace.run(|device, _| attention::merge(device, &problems))
}

/// How the tokens of a convolution lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenGrid {
    /// A square of this side, row by row; kernels are square.
    Square(usize),
    /// A sequence of this length; kernels have one row.
    Sequence(usize),
}

impl From<TokenGrid> for Grid {
    fn from(grid: TokenGrid) -> Self {
        match grid {
            TokenGrid::Square(side) => Self::square(side),
            TokenGrid::Sequence(tokens) => Self::sequence(tokens),
        }
    }
}

/// [`conv_fusion()`]: out = dropout(relu(sum of grouped 7-, 5-, 3- and 1-tap convolutions of the
/// streams' weighted sum)) (Soraki et al. 2026, the multi-scale fusion block).
pub struct ConvFusion<'a, T: Element> {
    /// Three streams `[n, d]` and their mix, or one without a mix.
    pub streams: &'a [Mat<'a, T>],
    /// Weight `[1, 3]` and bias `[1, 1]` of the streams' sum.
    pub mix: Option<[Mat<'a, T>; 2]>,
    /// `[d / 2, 2 taps]` of sides 7, 5, 3 and 1: PyTorch's `Conv2d(d, d / 2, side, groups = d / 2)`.
    pub kernels: [Mat<'a, T>; 4],
    /// `[1, d / 2]`
    pub biases: [Mat<'a, T>; 4],
    /// Of n tokens.
    pub grid: TokenGrid,
    /// Of whole channels, `[1, d / 2]`.
    pub dropout: Option<Dropout>,
    /// `[n, d / 2]`
    pub out: MatMut<'a, T>,
}

/// What backward reads of a forward pass.
fn conv_fusion_views<T: Element>(
    on: &Operands,
    streams: &[Mat<T>],
    mix: &Option<[Mat<T>; 2]>,
    kernels: &[Mat<T>; 4],
    biases: &[Mat<T>; 4],
) -> Result<([View<T>; 3], Weights<T>)> {
    let streams = streams.iter().map(|x| on.read("stream", x)).collect::<Result<Vec<_>>>()?;
    let streams = match (streams[..].try_into(), &streams[..], mix) {
        (Ok(three), _, Some(_)) => three,
        (_, &[one], None) => [one; 3],
        _ => {
            let (n, mix) = (streams.len(), if mix.is_some() { "a mix" } else { "no mix" });
            let message = format!("{}: {n} streams and {mix}: expected three and a mix, or one and none", on.op);
            return Err(Error::Usage(message));
        }
    };
    let mix = match mix {
        Some([weight, bias]) => Some((on.read("mix weight", weight)?, on.read("mix bias", bias)?)),
        None => None,
    };
    let [k7, k5, k3, k1] = kernels;
    let kernels =
        [on.read("kernel 7", k7)?, on.read("kernel 5", k5)?, on.read("kernel 3", k3)?, on.read("kernel 1", k1)?];
    let [b7, b5, b3, b1] = biases;
    let biases = [on.read("bias 7", b7)?, on.read("bias 5", b5)?, on.read("bias 3", b3)?, on.read("bias 1", b1)?];
    Ok((streams, Weights { mix, kernels, biases }))
}

/// out =.
pub fn conv_fusion<T: Element>(workspace: &mut Workspace, p: &mut ConvFusion<T>) -> Result<()> {
    let on = workspace.operands("conv_fusion");
    let (streams, weights) = conv_fusion_views(&on, p.streams, &p.mix, &p.kernels, &p.biases)?;
    let out = on.write("out", &p.out)?;
    let problem =
        conv_fusion::ConvFusion { streams, weights, grid: p.grid.into(), dropout: drawn(&on, p.dropout), out };
    workspace.run(|device, arena| conv_fusion::forward(device, arena, &problem))
}

/// [`conv_fusion_backward`]
pub struct ConvFusionBackward<'a, T: Element> {
    /// As in [`ConvFusion`].
    pub streams: &'a [Mat<'a, T>],
    /// As in [`ConvFusion`].
    pub mix: Option<[Mat<'a, T>; 2]>,
    /// As in [`ConvFusion`].
    pub kernels: [Mat<'a, T>; 4],
    /// As in [`ConvFusion`].
    pub biases: [Mat<'a, T>; 4],
    /// As in [`ConvFusion`].
    pub grid: TokenGrid,
    /// As [`conv_fusion()`] was given it.
    pub dropout: Option<Dropout>,
    /// `[n, d / 2]`, as [`conv_fusion()`] wrote it.
    pub out: Mat<'a, T>,
    /// `[n, d / 2]`
    pub dout: Mat<'a, T>,
    /// `[n, d]`, as many as there are streams.
    pub dstreams: Vec<MatMut<'a, T>>,
    /// Gradients of the mix, where there is one.
    pub dmix: Option<[MatMut<'a, T::Sum>; 2]>,
    /// Gradients of the kernels.
    pub dkernels: [MatMut<'a, T::Sum>; 4],
    /// Gradients of the biases.
    pub dbiases: [MatMut<'a, T::Sum>; 4],
}

/// dstreams =, dmix, dkernels and dbiases +=.
pub fn conv_fusion_backward<T: Element>(workspace: &mut Workspace, p: &mut ConvFusionBackward<T>) -> Result<()> {
    let on = workspace.operands("conv_fusion_backward");
    let (streams, weights) = conv_fusion_views(&on, p.streams, &p.mix, &p.kernels, &p.biases)?;
    let out = on.read("out", &p.out)?;
    let forward =
        conv_fusion::ConvFusion { streams, weights, grid: p.grid.into(), dropout: drawn(&on, p.dropout), out };
    let (got, expected) = (p.dstreams.len(), p.streams.len());
    if got != expected {
        return Err(Error::Usage(format!("{}: {got} dstreams of {expected} streams", on.op)));
    }
    let dstreams = p.dstreams.iter().map(|dx| on.write("dstream", dx)).collect::<Result<Vec<_>>>()?;
    let dstreams = [0, 1, 2].map(|i| dstreams[i.min(expected - 1)]);
    let mix = match (&p.mix, &p.dmix) {
        (Some(_), Some([weight, bias])) => Some((on.write("dmix weight", weight)?, on.write("dmix bias", bias)?)),
        (None, None) => None,
        _ => return Err(Error::Usage(format!("{}: a mix and no dmix, or a dmix and no mix", on.op))),
    };
    let [k7, k5, k3, k1] = &p.dkernels;
    let kernels = [
        on.write("dkernel 7", k7)?,
        on.write("dkernel 5", k5)?,
        on.write("dkernel 3", k3)?,
        on.write("dkernel 1", k1)?,
    ];
    let [b7, b5, b3, b1] = &p.dbiases;
    let biases =
        [on.write("dbias 7", b7)?, on.write("dbias 5", b5)?, on.write("dbias 3", b3)?, on.write("dbias 1", b1)?];
    let grads = Weights { mix, kernels, biases };
    let problem = conv_fusion::ConvFusionGrad { forward, dout: on.read("dout", &p.dout)?, dstreams, grads };
    workspace.run(|device, arena| conv_fusion::backward(device, arena, &problem))
}

/// [`ppeg()`]: y = x + conv7(x) + conv5(x) + conv3(x), depthwise on the tokens' square grid (TransMIL,
/// Shao et al. 2021, sec. 3.3).
pub struct Ppeg<'a, T: Element> {
    /// `[first + side^2, c]`; the first rows (a class token) pass through.
    pub x: Mat<'a, T>,
    /// Of the grid.
    pub side: usize,
    /// `[c, 49]`, `[c, 25]` and `[c, 9]`.
    pub kernels: [Mat<'a, T>; 3],
    /// `[1, c]`
    pub biases: [Mat<'a, T>; 3],
    /// As x.
    pub y: MatMut<'a, T>,
}

/// y = of each problem.
pub fn ppeg<T: Element>(workspace: &mut Workspace, problems: &mut [Ppeg<T>]) -> Result<()> {
    let on = workspace.operands("ppeg");
    let view = |p: &Ppeg<T>| {
        let [k7, k5, k3] = &p.kernels;
        let [b7, b5, b3] = &p.biases;
        Ok(ppeg::Ppeg {
            x: on.read("x", &p.x)?,
            y: on.write("y", &p.y)?,
            side: p.side,
            kernels: [on.read("kernel 7", k7)?, on.read("kernel 5", k5)?, on.read("kernel 3", k3)?],
            biases: [on.read("bias 7", b7)?, on.read("bias 5", b5)?, on.read("bias 3", b3)?],
        })
    };
    let problems = problems.iter().map(view).collect::<Result<Vec<_>>>()?;
    workspace.run(|device, arena| ppeg::forward(device, arena, &problems))
}

/// [`ppeg_backward`]
pub struct PpegBackward<'a, T: Element> {
    /// As in [`Ppeg`].
    pub x: Mat<'a, T>,
    /// As in [`Ppeg`].
    pub side: usize,
    /// As in [`Ppeg`].
    pub kernels: [Mat<'a, T>; 3],
    /// As x.
    pub dy: Mat<'a, T>,
    /// As x.
    pub dx: MatMut<'a, T>,
    /// Gradients of the kernels.
    pub dkernels: [MatMut<'a, T::Sum>; 3],
    /// Gradients of the biases.
    pub dbiases: [MatMut<'a, T::Sum>; 3],
}

/// dx =, dkernels and dbiases += of each problem.
pub fn ppeg_backward<T: Element>(workspace: &mut Workspace, problems: &mut [PpegBackward<T>]) -> Result<()> {
    let on = workspace.operands("ppeg_backward");
    let view = |p: &PpegBackward<T>| {
        let [k7, k5, k3] = &p.kernels;
        let [d7, d5, d3] = &p.dkernels;
        let [b7, b5, b3] = &p.dbiases;
        Ok(PpegGrad {
            x: on.read("x", &p.x)?,
            dy: on.read("dy", &p.dy)?,
            dx: on.write("dx", &p.dx)?,
            side: p.side,
            kernels: [on.read("kernel 7", k7)?, on.read("kernel 5", k5)?, on.read("kernel 3", k3)?],
            dkernels: [on.write("dkernel 7", d7)?, on.write("dkernel 5", d5)?, on.write("dkernel 3", d3)?],
            dbiases: [on.write("dbias 7", b7)?, on.write("dbias 5", b5)?, on.write("dbias 3", b3)?],
        })
    };
    let problems = problems.iter().map(view).collect::<Result<Vec<_>>>()?;
    workspace.run(|device, arena| ppeg::backward(device, arena, &problems))
}

/// [`head()`]: logits = W LayerNorm(x) + b of one row.
pub struct Head<'a, T: Element> {
    /// `[1, d]`
    pub x: Mat<'a, T>,
    /// `[1, d]`
    pub norm_weight: Mat<'a, T>,
    /// `[1, d]`
    pub norm_bias: Mat<'a, T>,
    /// `[classes, d]`, at most 32 classes on a GPU.
    pub weight: Mat<'a, T>,
    /// `[1, classes]`
    pub bias: Mat<'a, T>,
    /// `[1, 2]`, for backward.
    pub stats: MatMut<'a, T::Sum>,
    /// `[1, d]`, for backward.
    pub normed: MatMut<'a, T>,
    /// `[1, classes]`
    pub logits: MatMut<'a, T::Sum>,
}

/// logits =.
pub fn head<T: Element>(workspace: &mut Workspace, p: &mut Head<T>) -> Result<()> {
    let on = workspace.operands("head");
    let norm = Norm {
        x: on.read("x", &p.x)?,
        stats: on.write("stats", &p.stats)?,
        weight: on.read("norm_weight", &p.norm_weight)?,
        bias: on.read("norm_bias", &p.norm_bias)?,
        y: on.write("normed", &p.normed)?,
    };
    let (weight, bias) = (on.read("weight", &p.weight)?, on.read("bias", &p.bias)?);
    let problem = head::Head { norm, weight, bias, logits: on.write("logits", &p.logits)? };
    workspace.run(|device, _| head::forward(device, &problem))
}

/// [`head_backward`] and [`head_loss`].
pub struct HeadBackward<'a, T: Element> {
    /// What forward was given, and what it wrote. [`head_loss`] goes forward itself, and may leave
    /// stats, normed, logits and dlogits as they were: they are its scratch.
    pub forward: Head<'a, T>,
    /// `[1, classes]`
    pub dlogits: MatMut<'a, T::Sum>,
    /// `[1, d]`
    pub dx: MatMut<'a, T>,
    /// `[1, d]`
    pub dnorm_weight: MatMut<'a, T::Sum>,
    /// `[1, d]`
    pub dnorm_bias: MatMut<'a, T::Sum>,
    /// `[classes, d]`
    pub dweight: MatMut<'a, T::Sum>,
    /// `[1, classes]`
    pub dbias: MatMut<'a, T::Sum>,
}

impl<T: Element> HeadBackward<'_, T> {
    fn views(&self, on: &Operands) -> Result<head::HeadGrad<T>> {
        let p = &self.forward;
        let norm = Norm {
            x: on.read("x", &p.x)?,
            stats: on.write("stats", &p.stats)?,
            weight: on.read("norm_weight", &p.norm_weight)?,
            bias: on.read("norm_bias", &p.norm_bias)?,
            y: on.write("normed", &p.normed)?,
        };
        let (weight, bias) = (on.read("weight", &p.weight)?, on.read("bias", &p.bias)?);
        Ok(head::HeadGrad {
            forward: head::Head { norm, weight, bias, logits: on.write("logits", &p.logits)? },
            dlogits: on.write("dlogits", &self.dlogits)?,
            dx: on.write("dx", &self.dx)?,
            dnorm_weight: on.write("dnorm_weight", &self.dnorm_weight)?,
            dnorm_bias: on.write("dnorm_bias", &self.dnorm_bias)?,
            dweight: on.write("dweight", &self.dweight)?,
            dbias: on.write("dbias", &self.dbias)?,
        })
    }
}

/// From dlogits: dx =, parameters' gradients +=.
pub fn head_backward<T: Element>(workspace: &mut Workspace, p: &mut HeadBackward<T>) -> Result<()> {
    let grad = p.views(&workspace.operands("head_backward"))?;
    workspace.run(|device, _| head::backward(device, &grad))
}

/// From x to a survival loss of the logits and back, without the host between: dx =, parameters'
/// gradients +=, `result` `[1, 2]` = loss and risk in f64.
pub fn head_loss<T: Element>(
    workspace: &mut Workspace,
    p: &mut HeadBackward<T>,
    loss: &SlideLoss,
    result: &mut MatMut<f64>,
) -> Result<()> {
    let on = workspace.operands("head_loss");
    let (grad, result) = (p.views(&on)?, on.write("result", result)?);
    workspace.run(|device, _| head::train(device, &grad, loss, result))
}

/// [`gelu_dropout`]: out = dropout(GELU(x)), or dropout(x).
pub struct GeluDropout<'a, T: Element> {
    /// `[m, n]`
    pub x: Mat<'a, T>,
    /// Whether GELU (exact) comes before dropout.
    pub gelu: bool,
    /// Of `[m, n]`.
    pub dropout: Option<Dropout>,
    /// `[m, n]`
    pub out: MatMut<'a, T>,
}

/// out = of each problem.
pub fn gelu_dropout<T: Element>(workspace: &mut Workspace, problems: &mut [GeluDropout<T>]) -> Result<()> {
    let on = workspace.operands("gelu_dropout");
    let view = |p: &GeluDropout<T>| {
        Ok(Map { x: on.read("x", &p.x)?, gelu: p.gelu, dropout: drawn(&on, p.dropout), out: on.write("out", &p.out)? })
    };
    let problems = problems.iter().map(view).collect::<Result<Vec<_>>>()?;
    workspace.run(|device, _| elementwise::map(device, &problems))
}

/// What [`adam()`] updates, each `[1, n]`, n a multiple of 4 on a GPU.
pub struct AdamState<'a, T: Element> {
    /// What is trained.
    pub params: MatMut<'a, T::Sum>,
    /// The same rounded to `T`, written; None where `T` is what sums are kept in.
    pub weights: Option<MatMut<'a, T>>,
    /// Zeroed afterwards.
    pub grads: MatMut<'a, T::Sum>,
    /// The first moment.
    pub m: MatMut<'a, T::Sum>,
    /// The second moment.
    pub v: MatMut<'a, T::Sum>,
}

/// The `step`-th update (from 1).
pub fn adam<T: Element>(workspace: &mut Workspace, adam: &Adam, state: &mut AdamState<T>, step: u64) -> Result<()> {
    let on = workspace.operands("adam");
    let params = on.write("params", &state.params)?;
    let weights = match &state.weights {
        Some(weights) => Some(on.write("weights", weights)?),
        None => View::of_sums(params),
    };
    let weights = weights.ok_or_else(|| Error::Usage("adam: the rounded weights are missing".into()))?;
    let (grads, m, v) = (on.write("grads", &state.grads)?, on.write("m", &state.m)?, on.write("v", &state.v)?);
    let arenas = Arenas { params, weights, grads, m, v };
    workspace.run(|device, _| adam::step(device, adam, arenas, step))
}
