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
//! all of which overwrite. An empty context gives out = 0. The kernels write dS down on its way from
//! dk to dq, some heads at a time: these are five products of n x m x head_dim, and the same bits on
//! every run, where FlashAttention-2 adds dq up by atomics.
//!
//! A context may come in parts ([`merge`]): with out_i and lse_i of part i alone,
//! lse = log(sum_i exp(lse_i)) and out = sum_i exp(lse_i - lse) out_i (FlashAttention-2, section
//! 3.1). Backward of a part is [`backward`] with the whole context's out and lse: its dk and dv are
//! final, its dq is a term of a sum.

mod cpu;
pub(crate) mod kernel;

use std::ops::Range;

use kernel::{KernelAttention, KernelAttentionGrad, KernelMerge, Kernels};

use super::Dropout;
use crate::{
    Error, Result,
    device::{Arena, Cpu, Device, Element, Storage, View, storage},
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

impl<T: Element> AttentionGrad<T> {
    /// Some of the heads alone.
    fn heads(&self, heads: Range<usize>) -> Self {
        let p = &self.forward;
        let columns = heads.start * p.head_dim()..heads.end * p.head_dim();
        let of = |view: View<T>| view.cols_range(columns.clone());
        let forward = Attention {
            q: of(p.q),
            k: of(p.k),
            v: of(p.v),
            out: of(p.out),
            lse: p.lse.rows_range(heads.clone()),
            heads: heads.len(),
            dropout: p.dropout.map(|dropout| dropout.at(heads.start as u32)),
        };
        Self { forward, dout: of(self.dout), dq: of(self.dq), dk: of(self.dk), dv: of(self.dv) }
    }
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
    forward_by(device, arena, problems, Kernels::Wgmma)
}

/// [`forward`] by these kernels, where the device, `T` and the heads have them: Hopper's are for
/// bf16 and heads wider than 64 columns.
pub(crate) fn forward_by<T: Element>(
    device: &Device,
    arena: &mut Arena,
    problems: &[Attention<T>],
    by: Kernels,
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
            let kernels = Kernels::of(device, storage::<T>()?, by, table.iter().map(|p| (p.q, p.heads)));
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

/// The same bits on every run. Takes scratch from the arena: on a GPU up to [`MOST_DS`] bytes.
pub(crate) fn backward<T: Element>(device: &Device, arena: &mut Arena, problems: &[AttentionGrad<T>]) -> Result<()> {
    backward_by(device, arena, problems, MOST_DS, Kernels::Wgmma)
}

/// [`backward`] with so many bytes of scratch for dS, with none by seven products; and by these
/// kernels, where the device, `T` and the heads have them.
pub(crate) fn backward_by<T: Element>(
    device: &Device,
    arena: &mut Arena,
    problems: &[AttentionGrad<T>],
    most_ds: usize,
    by: Kernels,
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
            let (partial, deltas) = (cpu::partial_dq(arena, problems)?, cpu::deltas(arena, problems)?);
            Ok(move |cpu: &Cpu| cpu::backward(cpu, problems, &partial, &deltas))
        },
        |arena| {
            for p in problems {
                p.forward.check_for_kernels(OP)?;
                for (name, tensor) in [("dout", p.dout), ("dq", p.dq), ("dk", p.dk), ("dv", p.dv)] {
                    tensor.check_for_kernels(OP, name)?;
                }
            }
            let storage = storage::<T>()?;
            let heads = |p: &AttentionGrad<T>| (p.forward.q.into(), p.forward.heads as i32);
            let by = Kernels::of(device, storage, by, problems.iter().map(heads));
            let (groups, without) = groups(problems, most_ds / storage.bytes());
            let len = |group: &Group<T>| group.iter().map(|(_, ds)| ds).sum::<usize>();
            let scratch = arena.scratch::<T>(1, groups.iter().map(len).max().unwrap_or(0))?;
            let mut with_delta = |p: &AttentionGrad<T>| -> Result<KernelAttentionGrad> {
                let mut kernel = KernelAttentionGrad::from(p);
                kernel.delta = arena.scratch::<f32>(p.forward.heads, p.forward.q.rows())?.address();
                Ok(kernel)
            };
            let kernels = without.iter().map(&mut with_delta).collect::<Result<Vec<_>>>()?;
            let mut launches = kernel::backward_launches_without_ds(by, storage, &kernels);
            for group in &groups {
                let (mut kernels, mut first) = (Vec::new(), 0);
                for (p, len) in group {
                    let mut kernel = with_delta(p)?;
                    kernel.ds = scratch.cols_range(first..first + len).address();
                    first += len;
                    kernels.push(kernel);
                }
                launches.extend(kernel::backward_launches(by, storage, &kernels));
            }
            Ok(launches)
        },
    )
}

/// Most bytes of dS that the kernels write down at a time: one head of 16,384 queries and as many
/// keys in bf16. A head with more is computed by seven products instead of five, without dS.
pub(crate) const MOST_DS: usize = 512 << 20;

/// Problems of some heads that share launches, and how many elements of dS each of them takes.
type Group<T> = Vec<(AttentionGrad<T>, usize)>;

/// All heads of all problems in order, so many at a time that at most `most` elements of dS are
/// there at once; and the problems whose heads are too large for that.
fn groups<T: Element>(problems: &[AttentionGrad<T>], most: usize) -> (Vec<Group<T>>, Vec<AttentionGrad<T>>) {
    let (mut groups, mut group, mut left) = (Vec::new(), Vec::new(), most);
    let mut without = Vec::new();
    for p in problems {
        let (n, m, heads) = (p.forward.q.rows(), p.forward.k.rows(), p.forward.heads);
        let one = kernel::ds_len(T::KERNELS.unwrap_or(Storage::F32), 1, n, m);
        if most == 0 || one > most {
            without.push(*p);
            continue;
        }
        let mut first = 0;
        while first < heads {
            let fit = left.checked_div(one).unwrap_or(heads).min(heads - first);
            if fit == 0 {
                groups.push(std::mem::take(&mut group));
                left = most;
                continue;
            }
            group.push((p.heads(first..first + fit), fit * one));
            (first, left) = (first + fit, left - fit * one);
        }
    }
    groups.push(group);
    (groups, without)
}
