//! The ops. Operands are DLPack's tensors: the first dimension is the rows, all others together the
//! columns, rows have no gaps; one dimension is one row. The op runs in the type of its first
//! operand (f32, bf16; f64 on a CPU); sums (statistics, log-sum-exps, parameters' gradients) are f32
//! for f32 and bf16, and f64 for f64. A list of problems, of any sizes, is one launch where the
//! kernels can.

use engine::{
    Error, Result,
    loss::{Loss, Target},
    ops::{self, Draw, Dropout, adam::Adam, head::SlideLoss},
};
use half::bf16;

use crate::{
    array, cf_status,
    context::cf_context,
    dlpack::{DLTensor, Dtype, optional, read, write},
    given, guard, usage,
};

/// Runs `$work` with `$T` as the type of a problem's first operand.
macro_rules! by_type {
    ($name:literal, $tensor:expr, $T:ident => $work:expr) => {
        match given($name, $tensor)?.dtype($name)? {
            Dtype::F32 => {
                type $T = f32;
                $work
            }
            Dtype::Bf16 => {
                type $T = bf16;
                $work
            }
            Dtype::F64 => {
                type $T = f64;
                $work
            }
        }
    };
}

/// One list of problems: none is nothing to do.
macro_rules! problems {
    ($context:ident, $problems:ident, $count:ident, $first:ident, $op:path, $T:ident, $p:ident, $on:ident => $view:expr) => {
        // SAFETY: the caller's.
        guard(|| unsafe {
            let context = given("context", $context)?;
            let problems = array("problems", $problems, $count)?;
            let Some(first) = problems.first() else { return Ok(()) };
            let $on = context.device();
            by_type!("the first operand", first.$first, $T => {
                let view = |$p: &_| -> Result<_> { Ok($view) };
                let mut views = problems.iter().map(view).collect::<Result<Vec<_>>>()?;
                $op(&mut context.workspace(), &mut views)
            })
        })
    };
}

/// Dropout of one tensor, by counter: an element's fate is a function of seed, step, site, row and
/// column alone (docs/embedding.md), so that backward draws it again and every device draws the same.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cf_dropout {
    /// 0 drops nothing; at most 0.95.
    pub rate: f64,
    pub seed: u64,
    /// A number that no two passes share.
    pub step: u32,
    /// Tells a pass' dropouts apart; attention takes as many sites as heads.
    pub site: u32,
    /// Null, or two numbers in the context's memory that are read when the op runs, in place of
    /// seed and step: a captured CUDA graph draws anew if they have been changed meanwhile.
    pub draw: *const u64,
}

impl cf_dropout {
    fn get(&self) -> Result<Option<Dropout>> {
        if !self.draw.is_aligned() {
            return Err(Error::Usage(format!("dropout: draw at {:?} is no address of two 64-bit numbers", self.draw)));
        }
        let dropout = Dropout::with_rate(Draw { seed: self.seed, step: self.step }, self.site, self.rate)?;
        // SAFETY: as `cf_dropout` says; the caller keeps the numbers as it keeps the tensors.
        Ok(dropout.map(|dropout| unsafe { dropout.with_draw_at(self.draw.cast()) }))
    }
}

/// y = LayerNorm(x) of each row (epsilon 1e-5).
#[repr(C)]
pub struct cf_layer_norm {
    /// [n0, d]
    pub x: *const DLTensor,
    /// [d]
    pub weight: *const DLTensor,
    /// [d]
    pub bias: *const DLTensor,
    /// [n, d], n0 <= n <= 2 n0: rows from n0 on repeat the first ones. Written.
    pub y: *const DLTensor,
    /// [n0, 2]: mean and 1 / sqrt(variance + epsilon), for backward. Written.
    pub stats: *const DLTensor,
}

/// # Safety
/// The context must be live, the problems and their tensors as DLPack says, and what is written
/// nobody else's meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_layer_norm_forward(
    context: *const cf_context,
    problems: *const cf_layer_norm,
    count: usize,
) -> cf_status {
    problems!(context, problems, count, x, ops::layer_norm, T, p, on => {
        let p: &cf_layer_norm = p;
        ops::LayerNorm::<T> {
            x: read(on, "x", p.x)?,
            weight: read(on, "weight", p.weight)?,
            bias: read(on, "bias", p.bias)?,
            y: write(on, "y", p.y)?,
            stats: write(on, "stats", p.stats)?,
        }
    })
}

/// Gradients of [`cf_layer_norm`].
#[repr(C)]
pub struct cf_layer_norm_grad {
    /// [n0, d]
    pub x: *const DLTensor,
    /// [n0, 2], as forward wrote them.
    pub stats: *const DLTensor,
    /// [d]
    pub weight: *const DLTensor,
    /// [n, d]
    pub dy: *const DLTensor,
    /// [n0, d], overwritten.
    pub dx: *const DLTensor,
    /// [d], added to.
    pub dweight: *const DLTensor,
    /// [d], added to.
    pub dbias: *const DLTensor,
}

/// # Safety
/// As [`cf_layer_norm_forward`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_layer_norm_backward(
    context: *const cf_context,
    problems: *const cf_layer_norm_grad,
    count: usize,
) -> cf_status {
    problems!(context, problems, count, x, ops::layer_norm_backward, T, p, on => {
        let p: &cf_layer_norm_grad = p;
        ops::LayerNormBackward::<T> {
            x: read(on, "x", p.x)?,
            stats: read(on, "stats", p.stats)?,
            weight: read(on, "weight", p.weight)?,
            dy: read(on, "dy", p.dy)?,
            dx: write(on, "dx", p.dx)?,
            dweight: write(on, "dweight", p.dweight)?,
            dbias: write(on, "dbias", p.dbias)?,
        }
    })
}

/// y = x W^T + bias; then GELU (exact) where `gelu` is given, dropout, and + residual.
#[repr(C)]
pub struct cf_linear {
    /// [m, in]
    pub x: *const DLTensor,
    /// [out, in]
    pub weight: *const DLTensor,
    /// [out], or null.
    pub bias: *const DLTensor,
    /// [m, out], or null: takes what GELU is applied to, for backward. Written.
    pub gelu: *const DLTensor,
    pub dropout: cf_dropout,
    /// [m, out], or null.
    pub residual: *const DLTensor,
    /// [m, out]. Written.
    pub y: *const DLTensor,
}

/// # Safety
/// As [`cf_layer_norm_forward`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_linear_forward(
    context: *const cf_context,
    problems: *const cf_linear,
    count: usize,
) -> cf_status {
    problems!(context, problems, count, x, ops::linear, T, p, on => {
        let p: &cf_linear = p;
        ops::Linear::<T> {
            x: read(on, "x", p.x)?,
            weight: read(on, "weight", p.weight)?,
            bias: optional(p.bias).map(|bias| read(on, "bias", bias)).transpose()?,
            gelu: optional(p.gelu).map(|gelu| write(on, "gelu", gelu)).transpose()?,
            dropout: p.dropout.get()?,
            residual: optional(p.residual).map(|residual| read(on, "residual", residual)).transpose()?,
            y: write(on, "y", p.y)?,
        }
    })
}

/// dx = dy W; then times GELU's derivative where `gelu` is given (of the layer before, whose output x
/// is), dropout (of the layer before), and + residual.
#[repr(C)]
pub struct cf_linear_input_grad {
    /// [m, out]
    pub dy: *const DLTensor,
    /// [out, in]
    pub weight: *const DLTensor,
    /// [m, in], or null: what the layer before gave to GELU.
    pub gelu: *const DLTensor,
    pub dropout: cf_dropout,
    /// [m, in], or null.
    pub residual: *const DLTensor,
    /// dx +=, not =.
    pub accumulate: bool,
    /// [m, in]. Written.
    pub dx: *const DLTensor,
}

/// # Safety
/// As [`cf_layer_norm_forward`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_linear_backward_input(
    context: *const cf_context,
    problems: *const cf_linear_input_grad,
    count: usize,
) -> cf_status {
    problems!(context, problems, count, dy, ops::linear_backward_input, T, p, on => {
        let p: &cf_linear_input_grad = p;
        ops::LinearBackwardInput::<T> {
            dy: read(on, "dy", p.dy)?,
            weight: read(on, "weight", p.weight)?,
            gelu: optional(p.gelu).map(|gelu| read(on, "gelu", gelu)).transpose()?,
            dropout: p.dropout.get()?,
            residual: optional(p.residual).map(|residual| read(on, "residual", residual)).transpose()?,
            accumulate: p.accumulate,
            dx: write(on, "dx", p.dx)?,
        }
    })
}

/// dweight += dy^T x, dbias += the column sums of dy.
#[repr(C)]
pub struct cf_linear_weight_grad {
    /// [m, out]
    pub dy: *const DLTensor,
    /// [m, in]
    pub x: *const DLTensor,
    /// [out, in], added to.
    pub dweight: *const DLTensor,
    /// [out], added to.
    pub dbias: *const DLTensor,
}

/// # Safety
/// As [`cf_layer_norm_forward`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_linear_backward_weight(
    context: *const cf_context,
    problems: *const cf_linear_weight_grad,
    count: usize,
) -> cf_status {
    problems!(context, problems, count, dy, ops::linear_backward_weight, T, p, on => {
        let p: &cf_linear_weight_grad = p;
        ops::LinearBackwardWeight::<T> {
            dy: read(on, "dy", p.dy)?,
            x: read(on, "x", p.x)?,
            dweight: write(on, "dweight", p.dweight)?,
            dbias: write(on, "dbias", p.dbias)?,
        }
    })
}

/// out = dropout(softmax(q k^T / sqrt(d / heads))) v of each head; head h owns columns h d / heads
/// and on. Problems are groups of any lengths.
#[repr(C)]
pub struct cf_attention {
    /// [n, d]
    pub q: *const DLTensor,
    /// [m, d]; no row gives out = 0.
    pub k: *const DLTensor,
    /// [m, d]
    pub v: *const DLTensor,
    /// Divides d, into at most 128 columns each.
    pub heads: u32,
    /// Of the probabilities; head h draws at site + h.
    pub dropout: cf_dropout,
    /// [n, d]. Written.
    pub out: *const DLTensor,
    /// [heads, n]: log-sum-exp of the scaled scores, natural logarithm. Written.
    pub lse: *const DLTensor,
}

/// # Safety
/// As [`cf_layer_norm_forward`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_attention_forward(
    context: *const cf_context,
    problems: *const cf_attention,
    count: usize,
) -> cf_status {
    problems!(context, problems, count, q, ops::attention, T, p, on => {
        let p: &cf_attention = p;
        ops::Attention::<T> {
            q: read(on, "q", p.q)?,
            k: read(on, "k", p.k)?,
            v: read(on, "v", p.v)?,
            heads: p.heads as usize,
            dropout: p.dropout.get()?,
            out: write(on, "out", p.out)?,
            lse: write(on, "lse", p.lse)?,
        }
    })
}

/// Gradients of [`cf_attention`].
#[repr(C)]
pub struct cf_attention_grad {
    /// What forward was given and what it wrote.
    pub forward: cf_attention,
    /// [n, d]
    pub dout: *const DLTensor,
    /// [n, d], overwritten.
    pub dq: *const DLTensor,
    /// [m, d], overwritten.
    pub dk: *const DLTensor,
    /// [m, d], overwritten.
    pub dv: *const DLTensor,
}

/// # Safety
/// As [`cf_layer_norm_forward`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_attention_backward(
    context: *const cf_context,
    problems: *const cf_attention_grad,
    count: usize,
) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let context = given("context", context)?;
        let problems = array("problems", problems, count)?;
        let Some(first) = problems.first() else { return Ok(()) };
        let on = context.device();
        by_type!("the first operand", first.forward.q, T => {
            let view = |p: &cf_attention_grad| -> Result<_> {
                let f = &p.forward;
                Ok(ops::AttentionBackward::<T> {
                    q: read(on, "q", f.q)?,
                    k: read(on, "k", f.k)?,
                    v: read(on, "v", f.v)?,
                    heads: f.heads as usize,
                    dropout: f.dropout.get()?,
                    out: read(on, "out", f.out)?,
                    lse: read(on, "lse", f.lse)?,
                    dout: read(on, "dout", p.dout)?,
                    dq: write(on, "dq", p.dq)?,
                    dk: write(on, "dk", p.dk)?,
                    dv: write(on, "dv", p.dv)?,
                })
            };
            let mut views = problems.iter().map(view).collect::<Result<Vec<_>>>()?;
            ops::attention_backward(&mut context.workspace(), &mut views)
        })
    })
}

/// A context that comes in parts: out, lse = those of the parts before together with this one.
#[repr(C)]
pub struct cf_attention_part {
    /// [n, d], of this part alone.
    pub part: *const DLTensor,
    /// [heads, n], of this part alone.
    pub part_lse: *const DLTensor,
    /// [n, d], of the type of sums. Written.
    pub out: *const DLTensor,
    /// [heads, n]. Written.
    pub lse: *const DLTensor,
    /// Nothing has been merged yet: out and lse may hold anything.
    pub first: bool,
}

/// # Safety
/// As [`cf_layer_norm_forward`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_attention_merge(
    context: *const cf_context,
    problems: *const cf_attention_part,
    count: usize,
) -> cf_status {
    problems!(context, problems, count, part, ops::attention_merge, T, p, on => {
        let p: &cf_attention_part = p;
        ops::AttentionMerge::<T> {
            part: read(on, "part", p.part)?,
            part_lse: read(on, "part_lse", p.part_lse)?,
            out: write(on, "out", p.out)?,
            lse: write(on, "lse", p.lse)?,
            first: p.first,
        }
    })
}

/// How the tokens of a convolution lie.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum cf_grid {
    /// A square, row by row: `extent` is its side.
    CF_SQUARE = 0,
    /// A sequence: `extent` is its length.
    CF_SEQUENCE = 1,
}

/// out = dropout(relu(the sum of grouped 7-, 5-, 3- and 1-tap convolutions of the mixed streams)).
#[repr(C)]
pub struct cf_conv_fusion {
    /// Three streams [n, d] and their mix, or one (the others null) and no mix.
    pub streams: [*const DLTensor; 3],
    /// [3] and [1], or null: weight and bias of the streams' sum.
    pub mix_weight: *const DLTensor,
    pub mix_bias: *const DLTensor,
    /// [d / 2, 2, side, side] of sides 7, 5, 3, 1; [d / 2, 2, side] for a sequence.
    pub kernels: [*const DLTensor; 4],
    /// [d / 2]
    pub biases: [*const DLTensor; 4],
    /// A `cf_grid`.
    pub grid: i32,
    pub extent: u32,
    /// Of whole channels.
    pub dropout: cf_dropout,
    /// [n, d / 2]. Written.
    pub out: *const DLTensor,
}

impl cf_conv_fusion {
    fn grid(&self) -> Result<ops::TokenGrid> {
        match self.grid {
            n if n == cf_grid::CF_SQUARE as i32 => Ok(ops::TokenGrid::Square(self.extent as usize)),
            n if n == cf_grid::CF_SEQUENCE as i32 => Ok(ops::TokenGrid::Sequence(self.extent as usize)),
            other => Err(usage(format!("grid = {other}: expected 0 (square) or 1 (sequence)"))),
        }
    }

    fn streams(&self) -> impl Iterator<Item = *const DLTensor> {
        self.streams.into_iter().filter(|stream| !stream.is_null())
    }
}

const SIDES: [&str; 4] = ["7", "5", "3", "1"];

/// Four, or three, operands of the same kind.
fn each<const N: usize, R>(
    what: &str,
    tensors: &[*const DLTensor; N],
    of: impl Fn(&str, *const DLTensor) -> Result<R>,
) -> Result<[R; N]> {
    let all = tensors.iter().zip(SIDES).map(|(&tensor, side)| of(&format!("{what} {side}"), tensor));
    let all = all.collect::<Result<Vec<_>>>()?;
    all.try_into().map_err(|_| usage(format!("{what}: expected {N}")))
}

/// # Safety
/// As [`cf_layer_norm_forward`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_conv_fusion_forward(
    context: *const cf_context,
    problem: *const cf_conv_fusion,
) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let (context, p) = (given("context", context)?, given("problem", problem)?);
        let on = context.device();
        by_type!("the first stream", p.streams[0], T => {
            let streams = p.streams().map(|x| read::<T>(on, "stream", x)).collect::<Result<Vec<_>>>()?;
            let mix = match optional(p.mix_weight) {
                Some(weight) => Some([read(on, "mix_weight", weight)?, read(on, "mix_bias", p.mix_bias)?]),
                None => None,
            };
            let mut problem = ops::ConvFusion {
                streams: &streams,
                mix,
                kernels: each("kernel", &p.kernels, |name, x| read(on, name, x))?,
                biases: each("bias", &p.biases, |name, x| read(on, name, x))?,
                grid: p.grid()?,
                dropout: p.dropout.get()?,
                out: write(on, "out", p.out)?,
            };
            ops::conv_fusion(&mut context.workspace(), &mut problem)
        })
    })
}

/// Gradients of [`cf_conv_fusion`].
#[repr(C)]
pub struct cf_conv_fusion_grad {
    /// What forward was given and what it wrote.
    pub forward: cf_conv_fusion,
    /// [n, d / 2]
    pub dout: *const DLTensor,
    /// [n, d], overwritten, as many as there are streams.
    pub dstreams: [*const DLTensor; 3],
    /// Added to, as all below; null where there is no mix.
    pub dmix_weight: *const DLTensor,
    pub dmix_bias: *const DLTensor,
    pub dkernels: [*const DLTensor; 4],
    pub dbiases: [*const DLTensor; 4],
}

/// # Safety
/// As [`cf_layer_norm_forward`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_conv_fusion_backward(
    context: *const cf_context,
    problem: *const cf_conv_fusion_grad,
) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let (context, grad) = (given("context", context)?, given("problem", problem)?);
        let (on, p) = (context.device(), &grad.forward);
        by_type!("the first stream", p.streams[0], T => {
            let streams = p.streams().map(|x| read::<T>(on, "stream", x)).collect::<Result<Vec<_>>>()?;
            let given = grad.dstreams.into_iter().filter(|x| !x.is_null());
            let dstreams = given.map(|x| write::<T>(on, "dstream", x)).collect::<Result<Vec<_>>>()?;
            let mix = match optional(p.mix_weight) {
                Some(weight) => Some([read(on, "mix_weight", weight)?, read(on, "mix_bias", p.mix_bias)?]),
                None => None,
            };
            let dmix = match optional(grad.dmix_weight) {
                Some(weight) => Some([write(on, "dmix_weight", weight)?, write(on, "dmix_bias", grad.dmix_bias)?]),
                None => None,
            };
            let mut problem = ops::ConvFusionBackward {
                streams: &streams,
                mix,
                kernels: each("kernel", &p.kernels, |name, x| read(on, name, x))?,
                biases: each("bias", &p.biases, |name, x| read(on, name, x))?,
                grid: p.grid()?,
                dropout: p.dropout.get()?,
                out: read(on, "out", p.out)?,
                dout: read(on, "dout", grad.dout)?,
                dstreams,
                dmix,
                dkernels: each("dkernel", &grad.dkernels, |name, x| write(on, name, x))?,
                dbiases: each("dbias", &grad.dbiases, |name, x| write(on, name, x))?,
            };
            ops::conv_fusion_backward(&mut context.workspace(), &mut problem)
        })
    })
}

/// y = x + conv7(x) + conv5(x) + conv3(x), depthwise on the tokens' square grid.
#[repr(C)]
pub struct cf_ppeg {
    /// [first + side^2, c]; the first rows pass through.
    pub x: *const DLTensor,
    pub side: u32,
    /// [c, 1, side, side] of sides 7, 5, 3.
    pub kernels: [*const DLTensor; 3],
    /// [c]
    pub biases: [*const DLTensor; 3],
    /// As x. Written.
    pub y: *const DLTensor,
}

/// # Safety
/// As [`cf_layer_norm_forward`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_ppeg_forward(
    context: *const cf_context,
    problems: *const cf_ppeg,
    count: usize,
) -> cf_status {
    problems!(context, problems, count, x, ops::ppeg, T, p, on => {
        let p: &cf_ppeg = p;
        ops::Ppeg::<T> {
            x: read(on, "x", p.x)?,
            side: p.side as usize,
            kernels: each("kernel", &p.kernels, |name, x| read(on, name, x))?,
            biases: each("bias", &p.biases, |name, x| read(on, name, x))?,
            y: write(on, "y", p.y)?,
        }
    })
}

/// Gradients of [`cf_ppeg`].
#[repr(C)]
pub struct cf_ppeg_grad {
    pub x: *const DLTensor,
    pub side: u32,
    pub kernels: [*const DLTensor; 3],
    /// As x.
    pub dy: *const DLTensor,
    /// As x, overwritten.
    pub dx: *const DLTensor,
    /// Added to.
    pub dkernels: [*const DLTensor; 3],
    /// Added to.
    pub dbiases: [*const DLTensor; 3],
}

/// # Safety
/// As [`cf_layer_norm_forward`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_ppeg_backward(
    context: *const cf_context,
    problems: *const cf_ppeg_grad,
    count: usize,
) -> cf_status {
    problems!(context, problems, count, x, ops::ppeg_backward, T, p, on => {
        let p: &cf_ppeg_grad = p;
        ops::PpegBackward::<T> {
            x: read(on, "x", p.x)?,
            side: p.side as usize,
            kernels: each("kernel", &p.kernels, |name, x| read(on, name, x))?,
            dy: read(on, "dy", p.dy)?,
            dx: write(on, "dx", p.dx)?,
            dkernels: each("dkernel", &p.dkernels, |name, x| write(on, name, x))?,
            dbiases: each("dbias", &p.dbiases, |name, x| write(on, name, x))?,
        }
    })
}

/// logits = W LayerNorm(x) + b of one row.
#[repr(C)]
pub struct cf_head {
    /// [d]
    pub x: *const DLTensor,
    /// [d]
    pub norm_weight: *const DLTensor,
    /// [d]
    pub norm_bias: *const DLTensor,
    /// [classes, d]; at most 32 classes on a GPU.
    pub weight: *const DLTensor,
    /// [classes]
    pub bias: *const DLTensor,
    /// [2], for backward. Written.
    pub stats: *const DLTensor,
    /// [d], for backward. Written.
    pub normed: *const DLTensor,
    /// [classes], of the type of sums. Written.
    pub logits: *const DLTensor,
}

/// # Safety
/// As [`cf_layer_norm_forward`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_head_forward(context: *const cf_context, problem: *const cf_head) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let (context, p) = (given("context", context)?, given("problem", problem)?);
        by_type!("x", p.x, T => {
            ops::head(&mut context.workspace(), &mut head::<T>(context, p)?)
        })
    })
}

/// # Safety
/// As [`cf_layer_norm_forward`].
unsafe fn head<'a, T: crate::dlpack::Stored<Sum: crate::dlpack::Stored>>(
    context: &'a cf_context,
    p: &cf_head,
) -> Result<ops::Head<'a, T>> {
    let on = context.device();
    // SAFETY: the caller's.
    unsafe {
        Ok(ops::Head {
            x: read(on, "x", p.x)?,
            norm_weight: read(on, "norm_weight", p.norm_weight)?,
            norm_bias: read(on, "norm_bias", p.norm_bias)?,
            weight: read(on, "weight", p.weight)?,
            bias: read(on, "bias", p.bias)?,
            stats: write(on, "stats", p.stats)?,
            normed: write(on, "normed", p.normed)?,
            logits: write(on, "logits", p.logits)?,
        })
    }
}

/// Gradients of [`cf_head`].
#[repr(C)]
pub struct cf_head_grad {
    /// What forward was given and what it wrote. `cf_head_loss` goes forward itself.
    pub forward: cf_head,
    /// [classes], of the type of sums.
    pub dlogits: *const DLTensor,
    /// [d], overwritten.
    pub dx: *const DLTensor,
    /// Added to, as all below.
    pub dnorm_weight: *const DLTensor,
    pub dnorm_bias: *const DLTensor,
    pub dweight: *const DLTensor,
    pub dbias: *const DLTensor,
}

/// # Safety
/// As [`cf_layer_norm_forward`].
unsafe fn head_grad<'a, T: crate::dlpack::Stored<Sum: crate::dlpack::Stored>>(
    context: &'a cf_context,
    p: &cf_head_grad,
) -> Result<ops::HeadBackward<'a, T>> {
    let on = context.device();
    // SAFETY: the caller's.
    unsafe {
        Ok(ops::HeadBackward {
            forward: head(context, &p.forward)?,
            dlogits: write(on, "dlogits", p.dlogits)?,
            dx: write(on, "dx", p.dx)?,
            dnorm_weight: write(on, "dnorm_weight", p.dnorm_weight)?,
            dnorm_bias: write(on, "dnorm_bias", p.dnorm_bias)?,
            dweight: write(on, "dweight", p.dweight)?,
            dbias: write(on, "dbias", p.dbias)?,
        })
    }
}

/// From dlogits.
///
/// # Safety
/// As [`cf_layer_norm_forward`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_head_backward(context: *const cf_context, problem: *const cf_head_grad) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let (context, p) = (given("context", context)?, given("problem", problem)?);
        by_type!("x", p.forward.x, T => {
            ops::head_backward(&mut context.workspace(), &mut head_grad::<T>(context, p)?)
        })
    })
}

/// The survival losses of time bins.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum cf_loss_kind {
    /// Negative log-likelihood of discrete hazards.
    CF_NLL_SURV = 0,
    /// Cross-entropy of the survival curve at the label's bin.
    CF_CE_SURV = 1,
}

/// A slide's loss.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cf_loss {
    /// A `cf_loss_kind`.
    pub kind: i32,
    /// The time bin of the event or of the last visit, from 0.
    pub label: u32,
    /// Whether no event was seen.
    pub censored: bool,
    /// Weighs the uncensored part up: 0.2 in published training, 0 in validation.
    pub alpha: f64,
    /// How much of the gradient is summed: 1 / the slides of an update.
    pub share: f64,
}

impl cf_loss {
    pub fn get(&self) -> Result<SlideLoss> {
        let loss = match self.kind {
            n if n == cf_loss_kind::CF_NLL_SURV as i32 => Loss::NllSurv,
            n if n == cf_loss_kind::CF_CE_SURV as i32 => Loss::CeSurv,
            other => return Err(usage(format!("loss kind {other}: expected 0 (nll_surv) or 1 (ce_surv)"))),
        };
        if !(0.0..=1.0).contains(&self.alpha) {
            return Err(usage(format!("alpha = {}: expected 0 to 1", self.alpha)));
        }
        if !(self.share as f32).is_finite() {
            return Err(usage(format!("share = {}: expected a number", self.share)));
        }
        let target = Target { label: self.label as usize, censored: self.censored };
        Ok(SlideLoss { loss, target, alpha: self.alpha, share: self.share })
    }
}

/// From x to a survival loss of the logits and back, on the device: `result` [2], f64, takes loss and
/// risk.
///
/// # Safety
/// As [`cf_layer_norm_forward`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_head_loss(
    context: *const cf_context,
    problem: *const cf_head_grad,
    loss: *const cf_loss,
    result: *const DLTensor,
) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let (context, p) = (given("context", context)?, given("problem", problem)?);
        let loss = given("loss", loss)?.get()?;
        by_type!("x", p.forward.x, T => {
            let mut result = write(context.device(), "result", result)?;
            ops::head_loss(&mut context.workspace(), &mut head_grad::<T>(context, p)?, &loss, &mut result)
        })
    })
}

/// A survival loss of logits in the host's memory, and its gradient in them.
///
/// # Safety
/// `logits` and `gradient` must be `classes` numbers; `gradient` may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_loss_evaluate(
    loss: *const cf_loss,
    logits: *const f64,
    classes: usize,
    value: *mut f64,
    gradient: *mut f64,
) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let loss = given("loss", loss)?.get()?;
        let logits = array("logits", logits, classes)?;
        if loss.target.label >= classes {
            return Err(usage(format!("label {} of {classes} classes", loss.target.label)));
        }
        let (found, slope) = loss.loss.evaluate(logits, loss.target, loss.alpha);
        *crate::given_mut("value", value)? = found;
        if !gradient.is_null() {
            for (i, slope) in slope.into_iter().enumerate() {
                *gradient.add(i) = slope * loss.share;
            }
        }
        Ok(())
    })
}

/// out = dropout(GELU(x)), or dropout(x).
#[repr(C)]
pub struct cf_gelu_dropout {
    /// [m, n]
    pub x: *const DLTensor,
    /// Whether GELU (exact) comes before dropout.
    pub gelu: bool,
    pub dropout: cf_dropout,
    /// [m, n]. Written.
    pub out: *const DLTensor,
}

/// # Safety
/// As [`cf_layer_norm_forward`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_gelu_dropout_forward(
    context: *const cf_context,
    problems: *const cf_gelu_dropout,
    count: usize,
) -> cf_status {
    problems!(context, problems, count, x, ops::gelu_dropout, T, p, on => {
        let p: &cf_gelu_dropout = p;
        let (gelu, dropout) = (p.gelu, p.dropout.get()?);
        ops::GeluDropout::<T> { x: read(on, "x", p.x)?, gelu, dropout, out: write(on, "out", p.out)? }
    })
}

/// Adam (Kingma & Ba 2015) with L2 weight decay.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cf_adam {
    pub learning_rate: f64,
    /// This share of a weight is added to its gradient.
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
}

impl cf_adam {
    pub fn get(&self) -> Adam {
        let Self { learning_rate, weight_decay, beta1, beta2, epsilon } = *self;
        Adam { learning_rate, weight_decay, beta1, beta2, epsilon }
    }
}

/// The `step`-th update (from 1) of parameters [n]. `weights` takes them rounded to bf16; null where
/// ops read the parameters themselves. The gradients are zero afterwards.
///
/// # Safety
/// As [`cf_layer_norm_forward`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_adam_step(
    context: *const cf_context,
    adam: *const cf_adam,
    step: u64,
    params: *const DLTensor,
    weights: *const DLTensor,
    grads: *const DLTensor,
    first_moment: *const DLTensor,
    second_moment: *const DLTensor,
) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let context = given("context", context)?;
        let adam = given("adam", adam)?.get();
        let on = context.device();
        let first = optional(weights).unwrap_or(params);
        by_type!("params", first, T => {
            let mut state = ops::AdamState::<T> {
                params: write(on, "params", params)?,
                weights: optional(weights).map(|weights| write(on, "weights", weights)).transpose()?,
                grads: write(on, "grads", grads)?,
                m: write(on, "first_moment", first_moment)?,
                v: write(on, "second_moment", second_moment)?,
            };
            ops::adam(&mut context.workspace(), &adam, &mut state, step)
        })
    })
}
