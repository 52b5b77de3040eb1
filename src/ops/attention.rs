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

pub(crate) mod kernel;

use kernel::{KernelAttention, KernelAttentionGrad, KernelMerge, Kernels};
use pulp::Simd;

use super::{Dropout, dropout, elementwise, for_rows};
use crate::{
    Error, Result,
    device::{
        Arena, Device, Element, Launch, Mat, MatMut, Real, Storage, View, Workspace,
        cpu::{
            Cpu, Kernel,
            real::sum,
            tile::{self, Lhs, Rhs},
            with_workspace,
        },
        round, storage,
    },
};

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
        if self.heads == 0 || d % self.heads != 0 || self.head_dim() > HEAD {
            let message = format!(
                "{op}: {d} columns in {} heads: heads must divide the columns into at most {HEAD} each",
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

/// Multi-head attention: out = dropout(softmax(q kᵀ / sqrt(head_dim))) v of each head, and the
/// scores' log-sum-exp.
///
/// Shapes: q and out `[n, d]`, k and v `[m, d]` (n and m may differ), lse `[heads, n]`; `heads`
/// divides d. Source: FlashAttention-2 (Dao 2023, algorithm 1).
#[derive(Clone, Copy)]
pub struct AttentionInput<'a, T: Element> {
    /// `[n, d]`
    pub q: Mat<'a, T>,
    /// `[m, d]`
    pub k: Mat<'a, T>,
    /// `[m, d]`
    pub v: Mat<'a, T>,
    /// Divides d.
    pub heads: usize,
    /// Of the probabilities; head h draws at its site + h.
    pub dropout: Option<Dropout>,
}

impl<'a, T: Element> AttentionInput<'a, T> {
    fn problem(&self, out: View<T>, lse: View<T::Sum>) -> Attention<T> {
        let Self { q, k, v, heads, dropout } = *self;
        Attention { q: q.view(), k: k.view(), v: v.view(), out, lse, heads, dropout }
    }

    fn devices(&self) -> Vec<&'a Device> {
        vec![self.q.device(), self.k.device(), self.v.device()]
    }
}

/// See [`AttentionInput`].
pub fn attention<T: Element>(
    workspace: &mut Workspace,
    input: &AttentionInput<T>,
    out: MatMut<T>,
    lse: MatMut<T::Sum>,
) -> Result<()> {
    let on = [input.devices(), vec![out.device(), lse.device()]].concat();
    let problem = input.problem(out.view(), lse.view());
    workspace.run("attention", &on, |device, arena| forward(device, arena, &[problem]))
}

/// dq `[n, d]`, dk and dv `[m, d]` =, from dout `[n, d]` and what [`attention`] wrote. Source:
/// FlashAttention-2, algorithm 2.
pub fn attention_backward<T: Element>(
    workspace: &mut Workspace,
    input: &AttentionInput<T>,
    (out, lse, dout): (Mat<T>, Mat<T::Sum>, Mat<T>),
    (dq, dk, dv): (MatMut<T>, MatMut<T>, MatMut<T>),
) -> Result<()> {
    let others = [out.device(), lse.device(), dout.device(), dq.device(), dk.device(), dv.device()];
    let on = [input.devices(), others.to_vec()].concat();
    let forward = input.problem(out.view(), lse.view());
    let problem = AttentionGrad { forward, dout: dout.view(), dq: dq.view(), dk: dk.view(), dv: dv.view() };
    workspace.run("attention backward", &on, |device, arena| backward(device, arena, &[problem]))
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
        |_| Ok(|cpu: &Cpu| cpu_forward(cpu, problems)),
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
        |cpu| problems.iter().for_each(|p| cpu_merge(cpu, p)),
        || {
            let kernels: Vec<_> = problems.iter().map(KernelMerge::from).collect();
            Ok(kernel::merge_launches(storage::<T>()?, &kernels))
        },
    )
}

fn cpu_merge<T: Element>(cpu: &Cpu, p: &Merge<T>) {
    let no_keys = T::Sum::of(f64::NEG_INFINITY);
    let (heads, head_dim) = (p.lse.rows(), p.part.cols() / p.lse.rows());
    for_rows(
        cpu,
        p.part.rows(),
        #[inline(always)]
        |i| {
            // SAFETY: the views are live, and each row, and each column of lse, is one task's.
            let (part, out) = unsafe { (p.part.row(i), p.out.row_mut(i)) };
            for head in 0..heads {
                // SAFETY: the views are live, and a query's log-sum-exps are one task's.
                let (lse, part_lse) = unsafe { (p.lse.ptr().add(head * p.lse.stride() + i), p.part_lse.row(head)[i]) };
                // SAFETY: as above.
                let before = if p.first { no_keys } else { unsafe { *lse } };
                let highest = before.max(part_lse);
                let columns = head * head_dim..(head + 1) * head_dim;
                let (out, part) = (&mut out[columns.clone()], &part[columns]);
                // SAFETY: as above.
                unsafe { *lse = highest };
                if highest == no_keys {
                    out.fill(T::Sum::ZERO);
                    continue;
                }
                let (a, b) = ((before - highest).f64().exp(), (part_lse - highest).f64().exp());
                // SAFETY: as above.
                unsafe { *lse = highest + T::Sum::of((a + b).ln()) };
                let (a, b) = (T::Sum::of(a / (a + b)), T::Sum::of(b / (a + b)));
                for (out, part) in out.iter_mut().zip(part) {
                    *out = b * part.to_sum() + if a == T::Sum::ZERO { T::Sum::ZERO } else { a * *out };
                }
            }
        },
    );
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
            let partial = partial_dq(arena, problems)?;
            Ok(move |cpu: &Cpu| cpu_backward(cpu, problems, &partial))
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

// ---- CPU ----------------------------------------------------------------------------------------------------------
// All tiles of a task lie in the 1 MiB L2 cache of a core.

/// Row stride of every tile, and so the widest head and the most keys of a tile.
const HEAD: usize = 128;
const KEYS: usize = dropout::BLOCK;
/// Queries of a tile.
const ROWS: usize = 8 * tile::ROWS;
/// Queries of a forward task: they share the packing of the keys.
const QUERIES: usize = 4 * ROWS;
/// A backward task takes all queries and a segment of a head's keys. Segments are few, because each
/// costs a dq of its own.
const MOST_SEGMENTS: usize = 4;
const BACKWARD_TASKS: usize = 16;

/// Segments of a head's keys in backward: a function of the shapes alone, so that sums have the
/// same order on every machine.
fn segments(heads: usize, keys: usize) -> usize {
    (BACKWARD_TASKS / heads.max(1)).clamp(1, MOST_SEGMENTS).min(keys.div_ceil(KEYS).max(1))
}

/// Every (problem, head, part).
fn tasks(problems: impl Iterator<Item = (usize, usize)>) -> Vec<(usize, usize, usize)> {
    problems
        .enumerate()
        .flat_map(|(i, (heads, parts))| (0..heads).flat_map(move |head| (0..parts).map(move |part| (i, head, part))))
        .collect()
}

fn cpu_forward<T: Element>(cpu: &Cpu, problems: &[Attention<T>]) {
    let tasks = tasks(problems.iter().map(|p| (p.heads, p.q.rows().div_ceil(QUERIES))));
    cpu.parallel_kernel(tasks.len(), &Forward { problems, tasks: &tasks });
}

struct Forward<'a, T: Element> {
    problems: &'a [Attention<T>],
    tasks: &'a [(usize, usize, usize)],
}

/// Packs the transpose of `keys` rows of a head into panels.
///
/// # Safety
/// As [`tile::pack_panel_transposed`].
#[inline(always)]
unsafe fn pack_transposed<T: Element, S: Simd>(from: View<T>, to: *mut T::Sum) {
    for j in (0..from.rows()).step_by(tile::panel_width::<T::Sum, S>()) {
        // SAFETY: the caller's: to holds panels of all rows of from.
        unsafe {
            tile::pack_panel_transposed::<T, S>(
                from.ptr(),
                from.stride(),
                (from.rows(), from.cols()),
                j,
                to.add(j * from.cols()),
            );
        }
    }
}

#[inline(always)]
unsafe fn copy<T: Element>(from: View<T>, to: *mut T::Sum) {
    // SAFETY: the caller's: to holds all rows of from, HEAD apart.
    unsafe { tile::copy_rows(from.ptr(), from.stride(), (from.rows(), from.cols()), to, HEAD) };
}

impl<T: Element> Kernel for Forward<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, task: usize) {
        let (i, head, block) = self.tasks[task];
        let p = &self.problems[i];
        let d = p.head_dim();
        let columns = head * d..(head + 1) * d;
        let (q, k, v) =
            (p.q.cols_range(columns.clone()), p.k.cols_range(columns.clone()), p.v.cols_range(columns.clone()));
        let rows = block * QUERIES..q.rows().min((block + 1) * QUERIES);
        let (n, m) = (rows.len(), k.rows());
        let dropout = p.dropout.map(|dropout| dropout.at(head as u32));
        let scale2 = T::Sum::of(p.scale() * std::f64::consts::LOG2_E);
        const SIZE: usize = 2 * QUERIES * HEAD + 2 * KEYS * HEAD + (ROWS + 1) * KEYS + 2 * QUERIES;
        with_workspace(
            SIZE,
            #[inline(always)]
            |space: &mut [T::Sum]| {
                let (queries, space) = space.split_at_mut(QUERIES * HEAD);
                let (out, space) = space.split_at_mut(QUERIES * HEAD);
                let (keys, space) = space.split_at_mut(KEYS * HEAD);
                let (values, space) = space.split_at_mut(KEYS * HEAD);
                let (max, space) = space.split_at_mut(QUERIES);
                let (total, scores) = space.split_at_mut(QUERIES);
                out.fill(T::Sum::ZERO);
                max.fill(T::Sum::of(f64::NEG_INFINITY));
                total.fill(T::Sum::ZERO);
                // SAFETY: the views are live, and each task writes its own rows and columns of out and
                // lse.
                unsafe { copy(q.rows_range(rows.clone()), queries.as_mut_ptr()) };
                for key in (0..m).step_by(KEYS) {
                    let keys_here = KEYS.min(m - key);
                    // SAFETY: the workspace holds a tile of keys and one of values.
                    unsafe {
                        pack_transposed::<T, S>(k.rows_range(key..key + keys_here), keys.as_mut_ptr());
                        copy(v.rows_range(key..key + keys_here), values.as_mut_ptr());
                    }
                    for start in (0..n).step_by(ROWS) {
                        let rows_here = ROWS.min(n - start);
                        let (a, b) =
                            (Lhs::rows(queries[start * HEAD..].as_ptr(), HEAD), Rhs::panels::<S>(keys.as_ptr(), d));
                        // SAFETY: the workspace holds the queries, the packed keys and the scores of a
                        // tile.
                        unsafe {
                            tile::multiply(simd, (rows_here, keys_here, d), a, b, scores.as_mut_ptr(), KEYS, false)
                        };
                        for r in 0..rows_here {
                            let row = &mut scores[r * KEYS..r * KEYS + keys_here];
                            let at = start + r;
                            let new_max = max[at].max(maximum(row) * scale2);
                            let shrink = (max[at] - new_max).exp2();
                            for s in row.iter_mut() {
                                *s = (*s * scale2 - new_max).exp2();
                            }
                            total[at] = total[at] * shrink
                                + sum(
                                    keys_here,
                                    #[inline(always)]
                                    |j| row[j],
                                );
                            max[at] = new_max;
                            if shrink != T::Sum::ONE {
                                for o in &mut out[at * HEAD..at * HEAD + d] {
                                    *o *= shrink;
                                }
                            }
                            if let Some(dropout) = dropout {
                                let mut factors = [T::Sum::ZERO; KEYS];
                                dropout.factors(rows.start + at, key / KEYS, &mut factors);
                                for (s, &f) in row.iter_mut().zip(&factors) {
                                    *s *= f;
                                }
                            }
                        }
                        let (a, b) = (Lhs::rows(scores.as_ptr(), KEYS), Rhs::rows::<S>(values.as_ptr(), HEAD));
                        // SAFETY: the workspace holds the scores, the values and the sums of a tile.
                        unsafe {
                            tile::multiply(
                                simd,
                                (rows_here, d, keys_here),
                                a,
                                b,
                                out[start * HEAD..].as_mut_ptr(),
                                HEAD,
                                true,
                            )
                        };
                    }
                }
                for r in 0..n {
                    let inverse = if m > 0 { T::Sum::ONE / total[r] } else { T::Sum::ZERO };
                    // SAFETY: the views are live, and these queries' outputs are this task's.
                    unsafe {
                        let to = p.out.cols_range(columns.clone()).row_mut(rows.start + r);
                        for (to, &o) in to.iter_mut().zip(&out[r * HEAD..]) {
                            *to = T::from_sum(o * inverse);
                        }
                        let log_sum = max[r].f64() * std::f64::consts::LN_2 + total[r].f64().ln();
                        let at = rows.start + r;
                        p.lse.cols_range(at..at + 1).row_mut(head)[0] = T::Sum::of(log_sum);
                    }
                }
            },
        );
    }
}

/// The largest element, 16 at a time.
#[inline(always)]
fn maximum<T: Real>(row: &[T]) -> T {
    let mut lanes = [T::of(f64::NEG_INFINITY); 16];
    let chunks = row.chunks_exact(16);
    for &x in chunks.remainder() {
        lanes[0] = lanes[0].max(x);
    }
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = lane.max(x);
        }
    }
    lanes.into_iter().reduce(T::max).unwrap_or(lanes[0])
}

/// Each problem's dq of each segment of its keys: scratch, but for the first where sums may be kept
/// in dq itself.
fn partial_dq<T: Element>(arena: &mut Arena, problems: &[AttentionGrad<T>]) -> Result<Vec<Vec<View<T::Sum>>>> {
    let heads: usize = problems.iter().map(|p| p.forward.heads).sum();
    let of_problem = |p: &AttentionGrad<T>| {
        let in_place = p.dq.as_sums();
        let segments = segments(heads, p.forward.k.rows());
        let scratch = (in_place.iter().len()..segments).map(|_| arena.scratch(p.dq.rows(), p.dq.cols()));
        in_place.into_iter().map(Ok).chain(scratch).collect()
    };
    problems.iter().map(of_problem).collect()
}

fn cpu_backward<T: Element>(cpu: &Cpu, problems: &[AttentionGrad<T>], partial: &[Vec<View<T::Sum>>]) {
    let tasks = tasks(problems.iter().zip(partial).map(|(p, parts)| (p.forward.heads, parts.len())));
    cpu.parallel_kernel(tasks.len(), &Backward { problems, partial, tasks: &tasks });
    for (p, parts) in problems.iter().zip(partial) {
        if parts.len() > 1 || p.dq.as_sums().is_none() {
            elementwise::cpu_sum(cpu, parts, p.dq);
        }
    }
}

struct Backward<'a, T: Element> {
    problems: &'a [AttentionGrad<T>],
    /// For each problem the dq of each segment of keys.
    partial: &'a [Vec<View<T::Sum>>],
    tasks: &'a [(usize, usize, usize)],
}

impl<T: Element> Kernel for Backward<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, task: usize) {
        let (i, head, segment) = self.tasks[task];
        let (grad, p) = (&self.problems[i], &self.problems[i].forward);
        let d = p.head_dim();
        let columns = head * d..(head + 1) * d;
        let of_head = |tensor: View<T>| tensor.cols_range(columns.clone());
        let (q, k, v, out, dout) = (of_head(p.q), of_head(p.k), of_head(p.v), of_head(p.out), of_head(grad.dout));
        let dq = self.partial[i][segment].cols_range(columns.clone());
        let (dk, dv) = (of_head(grad.dk), of_head(grad.dv));
        let (n, m) = (q.rows(), k.rows());
        let per_segment = m.div_ceil(KEYS).div_ceil(self.partial[i].len()) * KEYS;
        let segment = m.min(segment * per_segment)..m.min((segment + 1) * per_segment);
        let dropout = p.dropout.map(|dropout| dropout.at(head as u32));
        let (scale, scale2) = (T::Sum::of(p.scale()), T::Sum::of(p.scale() * std::f64::consts::LOG2_E));
        if segment.is_empty() || n == 0 {
            // SAFETY: as below.
            (0..n).for_each(|i| unsafe { dq.row_mut(i) }.fill(T::Sum::ZERO));
            // SAFETY: the views are live; dq is this segment's own, and dk and dv hold its keys.
            segment.for_each(|i| unsafe {
                dk.row_mut(i).fill(T::default());
                dv.row_mut(i).fill(T::default());
            });
            return;
        }
        const SIZE: usize = 5 * KEYS * HEAD + 2 * ROWS * HEAD + 2 * (ROWS + 1) * KEYS;
        with_workspace(
            SIZE,
            #[inline(always)]
            |space: &mut [T::Sum]| {
                let (keys_t, space) = space.split_at_mut(KEYS * HEAD);
                let (values_t, space) = space.split_at_mut(KEYS * HEAD);
                let (keys, space) = space.split_at_mut(KEYS * HEAD);
                let (dkeys, space) = space.split_at_mut(KEYS * HEAD);
                let (dvalues, space) = space.split_at_mut(KEYS * HEAD);
                let (queries, space) = space.split_at_mut(ROWS * HEAD);
                let (douts, space) = space.split_at_mut(ROWS * HEAD);
                // one row more than the tile: a transposed tile's last register block reads past its
                // columns
                let (probs, dscores) = space.split_at_mut((ROWS + 1) * KEYS);
                for key in segment.clone().step_by(KEYS) {
                    let here = key..segment.end.min(key + KEYS);
                    let keys_here = here.len();
                    // SAFETY: the views are live; each task writes its own rows and columns of dk, dv
                    // and its own dq.
                    unsafe {
                        pack_transposed::<T, S>(k.rows_range(here.clone()), keys_t.as_mut_ptr());
                        pack_transposed::<T, S>(v.rows_range(here.clone()), values_t.as_mut_ptr());
                        copy(k.rows_range(here.clone()), keys.as_mut_ptr());
                    }
                    for start in (0..n).step_by(ROWS) {
                        let rows = start..n.min(start + ROWS);
                        let rows_here = rows.len();
                        // SAFETY: the workspace holds a tile of queries and one of dout.
                        unsafe {
                            copy(q.rows_range(rows.clone()), queries.as_mut_ptr());
                            copy(dout.rows_range(rows.clone()), douts.as_mut_ptr());
                            let size = (rows_here, keys_here, d);
                            let (a, b) = (Lhs::rows(queries.as_ptr(), HEAD), Rhs::panels::<S>(keys_t.as_ptr(), d));
                            tile::multiply(simd, size, a, b, probs.as_mut_ptr(), KEYS, false);
                            let (a, b) = (Lhs::rows(douts.as_ptr(), HEAD), Rhs::panels::<S>(values_t.as_ptr(), d));
                            tile::multiply(simd, size, a, b, dscores.as_mut_ptr(), KEYS, false);
                        }
                        for r in 0..rows_here {
                            // SAFETY: the views are live, and nobody writes them.
                            let (o, lse) = unsafe { (out.row(start + r), p.lse.row(head)[start + r]) };
                            let lse2 = lse * T::Sum::of(std::f64::consts::LOG2_E);
                            let delta = sum(
                                d,
                                #[inline(always)]
                                |j| o[j].to_sum() * douts[r * HEAD + j],
                            );
                            let prob = &mut probs[r * KEYS..r * KEYS + keys_here];
                            let dscore = &mut dscores[r * KEYS..r * KEYS + keys_here];
                            if let Some(dropout) = dropout {
                                let mut factors = [T::Sum::ZERO; KEYS];
                                dropout.factors(start + r, key / KEYS, &mut factors);
                                for j in 0..keys_here {
                                    let x = (prob[j] * scale2 - lse2).exp2();
                                    prob[j] = x * factors[j];
                                    dscore[j] = x * (dscore[j] * factors[j] - delta) * scale;
                                }
                            } else {
                                for j in 0..keys_here {
                                    prob[j] = (prob[j] * scale2 - lse2).exp2();
                                    dscore[j] = prob[j] * (dscore[j] - delta) * scale;
                                }
                            }
                        }
                        // SAFETY: the workspace holds all tiles of this step.
                        unsafe {
                            let (dout, q, k) = (douts.as_ptr(), queries.as_ptr(), keys.as_ptr());
                            let (size, later) = ((keys_here, d, rows_here), start > 0);
                            let probs_t = Lhs::columns(probs.as_ptr(), KEYS);
                            tile::multiply(
                                simd,
                                size,
                                probs_t,
                                Rhs::rows::<S>(dout, HEAD),
                                dvalues.as_mut_ptr(),
                                HEAD,
                                later,
                            );
                            let dscores_t = Lhs::columns(dscores.as_ptr(), KEYS);
                            tile::multiply(
                                simd,
                                size,
                                dscores_t,
                                Rhs::rows::<S>(q, HEAD),
                                dkeys.as_mut_ptr(),
                                HEAD,
                                later,
                            );
                            let dq_block = dq.ptr().add(start * dq.stride());
                            let (a, later) = (Lhs::rows(dscores.as_ptr(), KEYS), key > segment.start);
                            tile::multiply(
                                simd,
                                (rows_here, d, keys_here),
                                a,
                                Rhs::rows::<S>(k, HEAD),
                                dq_block,
                                dq.stride(),
                                later,
                            );
                        }
                    }
                    for (r, row) in here.enumerate() {
                        // SAFETY: the views are live, and these keys' gradients are this task's.
                        unsafe {
                            round(&dkeys[r * HEAD..r * HEAD + d], dk.row_mut(row));
                            round(&dvalues[r * HEAD..r * HEAD + d], dv.row_mut(row));
                        }
                    }
                }
            },
        );
    }
}
