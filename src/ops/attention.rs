//! Fused multi-head attention: out = dropout(softmax(q kᵀ / sqrt(head_dim))) v for each head, never
//! holding an n x m matrix.
//!
//! Shapes: q, out `[n, d]`; k, v `[m, d]`; head h owns columns `h * d / heads ..`. Saved for
//! backward: the log-sum-exp of each row's scaled scores, lse `[heads, n]`. A list of problems of
//! any lengths runs as one launch: the coarse and the fine context of a cross-attention, or the
//! three streams' self-attention.
//!
//! Forward is the online softmax of FlashAttention-2 (Dao 2023, algorithm 1), backward its
//! algorithm 2: with P = exp(scale q kᵀ - lse), F dropout's factors and delta = rowsum(dout * out),
//!
//! ```text
//! dv = (P F)ᵀ dout,   dS = P * (F * (dout vᵀ) - delta) * scale,   dq = dS k,   dk = dSᵀ q
//! ```
//!
//! all of which overwrite. An empty context gives out = 0.
//!
//! A context may come in parts ([`merge`]): with out_i and lse_i of part i alone,
//! lse = log(sum_i exp(lse_i)) and out = sum_i exp(lse_i - lse) out_i (FlashAttention-2, section
//! 3.1). Backward of a part is [`backward`] with the whole context's out and lse: its dk and dv are
//! final, its dq is a term of a sum.

mod cpu;
pub(crate) mod kernel;

use kernel::{KernelAttention, KernelAttentionGrad, KernelMerge, Kernels};

use super::Dropout;
use crate::{
    Error, Result,
    device::{Arena, Cpu, Device, Element, Launch, Storage, View, storage},
};

/// Most columns of a head.
const MOST_HEAD: usize = 128;

#[derive(Clone, Copy)]
pub(crate) struct Attention<T: Element> {
    pub q: View<T>,
    pub k: View<T>,
    pub v: View<T>,
    pub out: View<T>,
    /// `[heads, n]`, natural logarithm.
    pub lse: View<T::Sum>,
    pub heads: usize,
    /// Head h draws at site + h.
    pub dropout: Option<Dropout>,
}

#[derive(Clone, Copy)]
pub(crate) struct AttentionGrad<T: Element> {
    /// What forward was given and what it wrote.
    pub forward: Attention<T>,
    pub dout: View<T>,
    pub dq: View<T>,
    pub dk: View<T>,
    pub dv: View<T>,
}

impl<T: Element> Attention<T> {
    fn head_dim(&self) -> usize {
        self.q.cols() / self.heads
    }

    fn check(&self, op: &'static str) -> Result<()> {
        let (n, m, d) = (self.q.rows(), self.k.rows(), self.q.cols());
        if self.heads == 0 || d % self.heads != 0 || self.head_dim() > MOST_HEAD {
            let message = format!(
                "{op}: {d} columns in {} heads: heads must divide the columns into at most {MOST_HEAD} each",
                self.heads
            );
            return Err(Error::Usage(message));
        }
        self.k.check(op, "k", &[m, d])?;
        self.v.check(op, "v", &[m, d])?;
        self.out.check(op, "out", &[n, d])?;
        self.lse.check(op, "lse", &[self.heads, n])
    }

    /// Heads are moved 16 bytes at a time.
    fn check_for_kernels(&self, op: &'static str) -> Result<()> {
        if !(self.head_dim() * size_of::<T>()).is_multiple_of(16) {
            let (of, head) = (16 / size_of::<T>(), self.head_dim());
            return Err(Error::Usage(format!("{op}: heads of {head} columns: kernels take multiples of {of}")));
        }
        for (name, tensor) in [("q", self.q), ("k", self.k), ("v", self.v), ("out", self.out)] {
            tensor.check_for_kernels(op, name)?;
        }
        Ok(())
    }

    fn flop(&self) -> f64 {
        4.0 * (self.q.rows() * self.k.rows()) as f64 * self.q.cols() as f64
    }

    /// 1 / sqrt(head_dim).
    fn scale(&self) -> f64 {
        1.0 / (self.head_dim() as f64).sqrt()
    }
}

pub(crate) fn forward<T: Element>(device: &Device, arena: &mut Arena, problems: &[Attention<T>]) -> Result<()> {
    forward_with(device, arena, problems, Kernels::Mma)
}

/// [`forward`] by Hopper's wgmma, where the device and `T` have it (an H100 and bf16) and heads are
/// wider than 64; elsewhere the same. NOT YET RUN ON A GPU: training does not take it before it has
/// been measured.
pub(crate) fn forward_wgmma<T: Element>(device: &Device, arena: &mut Arena, problems: &[Attention<T>]) -> Result<()> {
    let at_hand = device.has_wgmma() && T::KERNELS == Some(Storage::Bf16);
    forward_with(device, arena, problems, if at_hand { Kernels::Wgmma } else { Kernels::Mma })
}

fn forward_with<T: Element>(
    device: &Device,
    arena: &mut Arena,
    problems: &[Attention<T>],
    wanted: Kernels,
) -> Result<()> {
    const OP: &str = "attention forward";
    problems.iter().try_for_each(|p| p.check(OP))?;
    problems.iter().for_each(|p| device.count(p.flop()));
    device.run_with_scratch(
        arena,
        |_| Ok(|cpu: &Cpu| cpu::forward(cpu, problems)),
        |arena| {
            problems.iter().try_for_each(|p| p.check_for_kernels(OP))?;
            let mut table: Vec<_> = problems.iter().map(KernelAttention::from).collect();
            let kernels = Kernels::of(wanted, &table);
            let splits = kernel::splits(kernels, &table);
            for ((p, entry), splits) in problems.iter().zip(&mut table).zip(splits) {
                let (n, d) = (p.q.rows(), p.q.cols());
                entry.splits = splits as i32;
                entry.parts = arena.scratch::<f32>(1, kernel::parts_len(splits, n, d))?.address();
                entry.part_lse = arena.scratch::<f32>(1, kernel::part_lse_len(splits, n, p.heads))?.address();
            }
            Ok(kernel::forward_launches(kernels, storage::<T>()?, &table))
        },
    )
}

/// Adds the attention to a part of a context to that to the parts before.
#[derive(Clone, Copy)]
pub(crate) struct Merge<T: Element> {
    /// `[n, d]`, of the part alone.
    pub part: View<T>,
    /// `[heads, n]`
    pub part_lse: View<T::Sum>,
    /// `[n, d]`, of all parts so far.
    pub out: View<T::Sum>,
    /// `[heads, n]`
    pub lse: View<T::Sum>,
    /// Nothing has been merged yet: out and lse may hold anything.
    pub first: bool,
}

/// out, lse = those of the parts before together with this one.
pub(crate) fn merge<T: Element>(device: &Device, problems: &[Merge<T>]) -> Result<()> {
    const OP: &str = "attention merge";
    for p in problems {
        let (n, d, heads) = (p.part.rows(), p.part.cols(), p.lse.rows());
        if heads == 0 || d % heads != 0 {
            return Err(Error::Usage(format!("{OP}: {d} columns in {heads} heads: heads must divide the columns")));
        }
        p.out.check(OP, "out", &[n, d])?;
        p.lse.check(OP, "lse", &[heads, n])?;
        p.part_lse.check(OP, "part_lse", &[heads, n])?;
    }
    device.run(
        |cpu| problems.iter().for_each(|p| cpu::merge(cpu, p)),
        || {
            let kernels: Vec<_> = problems.iter().map(KernelMerge::from).collect();
            Ok(kernel::merge_launches(storage::<T>()?, &kernels))
        },
    )
}

/// The same bits on every run. Takes scratch from the arena.
pub(crate) fn backward<T: Element>(device: &Device, arena: &mut Arena, problems: &[AttentionGrad<T>]) -> Result<()> {
    backward_with(device, arena, problems, kernel::backward_launches, |_| 0)
}

/// [`backward`] with five products instead of the kernels' seven: dq is summed by atomics, over the
/// keys' blocks in another order on every run. Takes n x d f32 of scratch more for each problem. On
/// a CPU the same as [`backward`].
pub(crate) fn backward_atomic<T: Element>(
    device: &Device,
    arena: &mut Arena,
    problems: &[AttentionGrad<T>],
) -> Result<()> {
    backward_with(device, arena, problems, kernel::backward_atomic_launches, |p| p.dq.rows() * p.dq.cols())
}

fn backward_with<T: Element>(
    device: &Device,
    arena: &mut Arena,
    problems: &[AttentionGrad<T>],
    launches: fn(Storage, &[KernelAttentionGrad]) -> Vec<Launch>,
    sums_len: fn(&AttentionGrad<T>) -> usize,
) -> Result<()> {
    const OP: &str = "attention backward";
    for p in problems {
        p.forward.check(OP)?;
        let (n, m, d) = (p.forward.q.rows(), p.forward.k.rows(), p.forward.q.cols());
        for (name, tensor, rows) in [("dout", p.dout, n), ("dq", p.dq, n), ("dk", p.dk, m), ("dv", p.dv, m)] {
            tensor.check(OP, name, &[rows, d])?;
        }
    }
    problems.iter().for_each(|p| device.count(2.5 * p.forward.flop()));
    device.run_with_scratch(
        arena,
        |arena| {
            let partial = cpu::partial_dq(arena, problems)?;
            Ok(move |cpu: &Cpu| cpu::backward(cpu, problems, &partial))
        },
        |arena| {
            let mut kernels: Vec<_> = problems.iter().map(KernelAttentionGrad::from).collect();
            for (p, kernel) in problems.iter().zip(&mut kernels) {
                p.forward.check_for_kernels(OP)?;
                for (name, tensor) in [("dout", p.dout), ("dq", p.dq), ("dk", p.dk), ("dv", p.dv)] {
                    tensor.check_for_kernels(OP, name)?;
                }
                kernel.delta = arena.scratch::<f32>(p.forward.heads, p.forward.q.rows())?.address();
                kernel.sums = arena.scratch::<f32>(1, sums_len(p))?.address();
            }
            Ok(launches(storage::<T>()?, &kernels))
        },
    )
}
