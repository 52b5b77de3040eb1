//! Attention on the CPU. All tiles of a task lie in the 1 MiB L2 cache of a core.

use std::marker::PhantomData;

use pulp::Simd;

use super::{Attention, AttentionGrad, MOST_HEAD, Merge};
use crate::{
    Result,
    device::{
        Arena, Element, Real, View,
        cpu::{
            Cpu, Kernel,
            factor::Packs,
            real::sum,
            tile::{self, Lhs, Rhs},
            with_workspace,
        },
        round,
    },
    ops::{dropout, elementwise, for_rows},
};

/// Row stride of every tile, and so the most keys of a tile.
const HEAD: usize = MOST_HEAD;
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

pub(super) fn forward<T: Element>(cpu: &Cpu, problems: &[Attention<T>]) {
    let tasks = tasks(problems.iter().map(|p| (p.heads, p.q.rows().div_ceil(QUERIES))));
    if cpu.has_dots() {
        let factors = PhantomData::<T::Dot>;
        cpu.parallel_kernel(tasks.len(), &Forward { problems, tasks: &tasks, factors });
    } else {
        let factors = PhantomData::<T::Sum>;
        cpu.parallel_kernel(tasks.len(), &Forward { problems, tasks: &tasks, factors });
    }
}

struct Forward<'a, T: Element, F> {
    problems: &'a [Attention<T>],
    tasks: &'a [(usize, usize, usize)],
    /// What is multiplied.
    factors: PhantomData<F>,
}

/// Packs rows of a matrix as the columns of panels. They are copied into `rows`, [`HEAD`] apart,
/// first: columns of them would be read from memory piece by piece.
///
/// # Safety
/// The view must be live, of at most [`KEYS`] rows and [`HEAD`] columns; `to` holds panels of them.
#[inline(always)]
unsafe fn pack_transposed<T: Element, F: Packs<T>, S: Simd>(from: View<T>, rows: &mut [F], to: &mut [F]) {
    let rows: &mut [T] = bytemuck::cast_slice_mut(rows);
    let size = (from.rows(), from.cols());
    for i in 0..from.rows() {
        // SAFETY: the caller's.
        rows[i * HEAD..][..from.cols()].copy_from_slice(unsafe { from.row(i) });
    }
    for j in (0..from.rows()).step_by(F::width::<S>()) {
        let panel = to[j * from.cols().div_ceil(F::DEPTH)..].as_mut_ptr();
        // SAFETY: `rows` holds all rows, and `to` panels of them.
        unsafe { tile::pack_panel_transposed::<T, F, S>(rows.as_ptr(), HEAD, size, j, panel) };
    }
}

/// Rows as the left side of a product along them, `HEAD / F::DEPTH` factors apart.
///
/// # Safety
/// The view must be live, and `to` hold its rows.
#[inline(always)]
unsafe fn copy_along<T: Element, F: Packs<T>>(from: View<T>, to: &mut [F]) {
    // SAFETY: the caller's.
    unsafe {
        tile::copy_along(from.ptr(), from.stride(), (from.rows(), from.cols()), to.as_mut_ptr(), HEAD / F::DEPTH);
    }
}

/// Rows as the right side of a product across them, [`HEAD`] factors apart.
///
/// # Safety
/// As [`copy_along`].
#[inline(always)]
unsafe fn copy_across<T: Element, F: Packs<T>>(from: View<T>, to: &mut [F]) {
    // SAFETY: the caller's.
    unsafe { tile::copy_across(from.ptr(), from.stride(), (from.rows(), from.cols()), to.as_mut_ptr(), HEAD) };
}

impl<T: Element, F: Packs<T>> Kernel for Forward<'_, T, F> {
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
                let queries: &mut [F] = bytemuck::cast_slice_mut(queries);
                let [keys, values]: [&mut [F]; 2] = [keys, values].map(bytemuck::cast_slice_mut);
                // SAFETY: the views are live, and each task writes its own rows and columns of out and
                // lse.
                unsafe { copy_along(q.rows_range(rows.clone()), queries) };
                let depth = d.div_ceil(F::DEPTH);
                for key in (0..m).step_by(KEYS) {
                    let keys_here = KEYS.min(m - key);
                    // SAFETY: the workspace holds a tile of keys and one of values.
                    unsafe {
                        pack_transposed::<T, F, S>(k.rows_range(key..key + keys_here), values, keys);
                        copy_across(v.rows_range(key..key + keys_here), values);
                    }
                    for start in (0..n).step_by(ROWS) {
                        let rows_here = ROWS.min(n - start);
                        let stride = HEAD / F::DEPTH;
                        let a = Lhs::rows(queries[start * stride..].as_ptr(), stride);
                        let (b, size) = (Rhs::panels::<S>(keys.as_ptr(), depth), (rows_here, keys_here, depth));
                        // SAFETY: the workspace holds the queries, the packed keys and the scores of a
                        // tile.
                        unsafe { tile::multiply(simd, size, a, b, scores.as_mut_ptr(), KEYS, false) };
                        for r in 0..rows_here {
                            if key + KEYS + start + r < m && start + r < KEYS {
                                // SAFETY: the views are live, and nobody writes them.
                                unsafe {
                                    tile::prefetch(k.row(key + KEYS + start + r));
                                    tile::prefetch(v.row(key + KEYS + start + r));
                                }
                            }
                            let row = &mut scores[r * KEYS..r * KEYS + keys_here];
                            let at = start + r;
                            let new_max = max[at].max(maximum(row) * scale2);
                            let shrink = (max[at] - new_max).exp2();
                            let mut factors = [T::Sum::ONE; KEYS];
                            if let Some(dropout) = dropout {
                                dropout.factors(rows.start + at, key / KEYS, &mut factors);
                            }
                            total[at] = total[at] * shrink + weigh(row, scale2, new_max, &factors);
                            F::from_sums(&mut scores[r * KEYS..(r + 1) * KEYS], keys_here);
                            max[at] = new_max;
                            if shrink != T::Sum::ONE {
                                for o in &mut out[at * HEAD..at * HEAD + d] {
                                    *o *= shrink;
                                }
                            }
                        }
                        let a = Lhs::rows(scores.as_ptr().cast::<F>(), KEYS);
                        let b = Rhs::rows::<S>(values.as_ptr(), HEAD);
                        let size = (rows_here, d, keys_here.div_ceil(F::DEPTH));
                        // SAFETY: the workspace holds the scores, the values and the sums of a tile.
                        unsafe { tile::multiply(simd, size, a, b, out[start * HEAD..].as_mut_ptr(), HEAD, true) };
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

/// Scores become weights, 2^(scale2 s - max) times their factors; the sum of them without these.
#[inline(always)]
fn weigh<T: Real>(row: &mut [T], scale2: T, max: T, factors: &[T; KEYS]) -> T {
    let mut lanes = [T::ZERO; 16];
    for (row, factors) in row.chunks_mut(16).zip(factors.chunks_exact(16)) {
        for ((s, lane), &factor) in row.iter_mut().zip(&mut lanes).zip(factors) {
            let weight = (*s * scale2 - max).exp2();
            *lane += weight;
            *s = weight * factor;
        }
    }
    sum(
        16,
        #[inline(always)]
        |i| lanes[i],
    )
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
pub(super) fn partial_dq<T: Element>(
    arena: &mut Arena,
    problems: &[AttentionGrad<T>],
) -> Result<Vec<Vec<View<T::Sum>>>> {
    let heads: usize = problems.iter().map(|p| p.forward.heads).sum();
    let of_problem = |p: &AttentionGrad<T>| {
        let in_place = p.dq.as_sums();
        let segments = segments(heads, p.forward.k.rows());
        let scratch = (in_place.iter().len()..segments).map(|_| arena.scratch(p.dq.rows(), p.dq.cols()));
        in_place.into_iter().map(Ok).chain(scratch).collect()
    };
    problems.iter().map(of_problem).collect()
}

/// Each problem's delta, `[n, heads]`.
pub(super) fn deltas<T: Element>(arena: &mut Arena, problems: &[AttentionGrad<T>]) -> Result<Vec<View<T::Sum>>> {
    problems.iter().map(|p| arena.scratch(p.dq.rows(), p.forward.heads)).collect()
}

/// delta = rowsum(out * dout) of each head.
fn delta<T: Element>(cpu: &Cpu, p: &AttentionGrad<T>, delta: View<T::Sum>) {
    let head_dim = p.forward.head_dim();
    for_rows(
        cpu,
        p.dq.rows(),
        #[inline(always)]
        |i| {
            // SAFETY: the views are live, nobody writes out and dout, and each row is one task's.
            let (out, dout, delta) = unsafe { (p.forward.out.row(i), p.dout.row(i), delta.row_mut(i)) };
            for ((delta, out), dout) in
                delta.iter_mut().zip(out.chunks_exact(head_dim)).zip(dout.chunks_exact(head_dim))
            {
                *delta = dot(out, dout);
            }
        },
    );
}

/// The sum of products, with 16 running sums.
#[inline(always)]
fn dot<T: Element>(a: &[T], b: &[T]) -> T::Sum {
    let (whole_a, whole_b) = (a.chunks_exact(16), b.chunks_exact(16));
    let mut lanes = [T::Sum::ZERO; 16];
    for ((lane, a), b) in lanes.iter_mut().zip(whole_a.remainder()).zip(whole_b.remainder()) {
        *lane = a.to_sum() * b.to_sum();
    }
    for (a, b) in whole_a.zip(whole_b) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a.to_sum() * b.to_sum();
        }
    }
    sum(
        16,
        #[inline(always)]
        |i| lanes[i],
    )
}

pub(super) fn backward<T: Element>(
    cpu: &Cpu,
    problems: &[AttentionGrad<T>],
    partial: &[Vec<View<T::Sum>>],
    deltas: &[View<T::Sum>],
) {
    problems.iter().zip(deltas).for_each(|(p, &of)| delta(cpu, p, of));
    let tasks = tasks(problems.iter().zip(partial).map(|(p, parts)| (p.forward.heads, parts.len())));
    if cpu.has_dots() {
        let factors = PhantomData::<T::Dot>;
        cpu.parallel_kernel(tasks.len(), &Backward { problems, partial, deltas, tasks: &tasks, factors });
    } else {
        let factors = PhantomData::<T::Sum>;
        cpu.parallel_kernel(tasks.len(), &Backward { problems, partial, deltas, tasks: &tasks, factors });
    }
    for (p, parts) in problems.iter().zip(partial) {
        if parts.len() > 1 || p.dq.as_sums().is_none() {
            elementwise::cpu_sum(cpu, parts, p.dq);
        }
    }
}

struct Backward<'a, T: Element, F> {
    problems: &'a [AttentionGrad<T>],
    /// For each problem the dq of each segment of keys.
    partial: &'a [Vec<View<T::Sum>>],
    deltas: &'a [View<T::Sum>],
    tasks: &'a [(usize, usize, usize)],
    /// What is multiplied.
    factors: PhantomData<F>,
}

impl<T: Element, F: Packs<T> + Packs<T::Sum>> Kernel for Backward<'_, T, F> {
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, task: usize) {
        let (i, head, segment) = self.tasks[task];
        let (grad, p) = (&self.problems[i], &self.problems[i].forward);
        let d = p.head_dim();
        let columns = head * d..(head + 1) * d;
        let of_head = |tensor: View<T>| tensor.cols_range(columns.clone());
        let (q, k, v, dout) = (of_head(p.q), of_head(p.k), of_head(p.v), of_head(grad.dout));
        let delta = self.deltas[i];
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
        const SIZE: usize = 5 * KEYS * HEAD + 4 * ROWS * HEAD + 4 * (ROWS + 1) * KEYS;
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
                let (probs, space) = space.split_at_mut((ROWS + 1) * KEYS);
                let (dscores, space) = space.split_at_mut((ROWS + 1) * KEYS);
                // pairs of rows, where pairs are multiplied
                let (queries_across, space) = space.split_at_mut(ROWS * HEAD);
                let (douts_across, space) = space.split_at_mut(ROWS * HEAD);
                let (probs_across, dscores_across) = space.split_at_mut((ROWS + 1) * KEYS);
                let of_factors = |tile| bytemuck::cast_slice_mut::<T::Sum, F>(tile);
                let [keys_t, values_t, keys] = [keys_t, values_t, keys].map(of_factors);
                let [queries, douts] = [queries, douts].map(of_factors);
                let [queries_across, douts_across] = [queries_across, douts_across].map(of_factors);
                let [probs_across, dscores_across] = [probs_across, dscores_across].map(of_factors);
                let depth = d.div_ceil(F::DEPTH);
                for key in segment.clone().step_by(KEYS) {
                    let here = key..segment.end.min(key + KEYS);
                    let keys_here = here.len();
                    // SAFETY: the views are live; each task writes its own rows and columns of dk, dv
                    // and its own dq.
                    unsafe {
                        pack_transposed::<T, F, S>(v.rows_range(here.clone()), keys, values_t);
                        pack_transposed::<T, F, S>(k.rows_range(here.clone()), keys, keys_t);
                        copy_across(k.rows_range(here.clone()), keys);
                    }
                    for start in (0..n).step_by(ROWS) {
                        let rows = start..n.min(start + ROWS);
                        let rows_here = rows.len();
                        // SAFETY: the workspace holds a tile of queries and one of dout.
                        unsafe {
                            copy_along(q.rows_range(rows.clone()), queries);
                            copy_along(dout.rows_range(rows.clone()), douts);
                            if F::DEPTH > 1 {
                                copy_across(q.rows_range(rows.clone()), queries_across);
                                copy_across(dout.rows_range(rows.clone()), douts_across);
                            }
                            let (size, stride) = ((rows_here, keys_here, depth), HEAD / F::DEPTH);
                            let a = Lhs::rows(queries.as_ptr(), stride);
                            let b = Rhs::panels::<S>(keys_t.as_ptr(), depth);
                            tile::multiply(simd, size, a, b, probs.as_mut_ptr(), KEYS, false);
                            let a = Lhs::rows(douts.as_ptr(), stride);
                            let b = Rhs::panels::<S>(values_t.as_ptr(), depth);
                            tile::multiply(simd, size, a, b, dscores.as_mut_ptr(), KEYS, false);
                        }
                        for r in 0..rows_here {
                            // SAFETY: the views are live, and nobody else writes this task's dq.
                            unsafe {
                                tile::prefetch(dq.row(start + r));
                                if start + ROWS + r < n {
                                    tile::prefetch(q.row(start + ROWS + r));
                                    tile::prefetch(dout.row(start + ROWS + r));
                                }
                            }
                            // SAFETY: the views are live, and nobody writes them.
                            let (lse, delta) = unsafe { (p.lse.row(head)[start + r], delta.row(start + r)[head]) };
                            let lse2 = lse * T::Sum::of(std::f64::consts::LOG2_E);
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
                            let (dout, q) = if F::DEPTH == 1 {
                                (douts.as_ptr(), queries.as_ptr())
                            } else {
                                (douts_across.as_ptr(), queries_across.as_ptr())
                            };
                            let (probs_t, dscores_t) = if F::DEPTH == 1 {
                                (probs.as_ptr().cast::<F>(), dscores.as_ptr().cast::<F>())
                            } else {
                                let size = (rows_here, keys_here);
                                tile::copy_across(probs.as_ptr(), KEYS, size, probs_across.as_mut_ptr(), KEYS);
                                tile::copy_across(dscores.as_ptr(), KEYS, size, dscores_across.as_mut_ptr(), KEYS);
                                for dscore in dscores.chunks_exact_mut(KEYS).take(rows_here) {
                                    F::from_sums(dscore, keys_here);
                                }
                                (probs_across.as_ptr(), dscores_across.as_ptr())
                            };
                            let (size, later) = ((keys_here, d, rows_here.div_ceil(F::DEPTH)), start > 0);
                            let (a, b) = (Lhs::columns(probs_t, KEYS), Rhs::rows::<S>(dout, HEAD));
                            tile::multiply(simd, size, a, b, dvalues.as_mut_ptr(), HEAD, later);
                            let (a, b) = (Lhs::columns(dscores_t, KEYS), Rhs::rows::<S>(q, HEAD));
                            tile::multiply(simd, size, a, b, dkeys.as_mut_ptr(), HEAD, later);
                            let (dq_block, later) = (dq.ptr().add(start * dq.stride()), key > segment.start);
                            let a = Lhs::rows(dscores.as_ptr().cast::<F>(), KEYS);
                            let (b, size) =
                                (Rhs::rows::<S>(keys.as_ptr(), HEAD), (rows_here, d, keys_here.div_ceil(F::DEPTH)));
                            tile::multiply(simd, size, a, b, dq_block, dq.stride(), later);
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

/// [`super::merge`] of one problem.
pub(super) fn merge<T: Element>(cpu: &Cpu, p: &Merge<T>) {
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
