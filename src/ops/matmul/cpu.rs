//! Products on the CPU. B is packed whole into column panels that all threads share (a weight: at
//! most a few MiB); then each task computes a block of rows, so that the epilogue finds it in cache.

use pulp::Simd;

use super::{Epilogue, Matmul, WeightGrad};
use crate::{
    device::{
        Element, Real, View,
        cpu::{
            Cpu, Kernel,
            factor::{Factor, Packs},
            tile, with_workspace,
        },
        round, widen,
    },
    ops::gelu,
};

const ROW_BLOCK: usize = 96;
/// Factors of a block's depth: the tiles of A and of B's panels then lie in a core's L2 cache, and
/// what is read and written of C is little beside the products.
const DEPTH: usize = 512;

/// Every (problem, start) with `start` in steps of `step` below `len(problem)`.
fn tasks<P>(problems: &[P], step: usize, len: impl Fn(&P) -> usize) -> Vec<(usize, usize)> {
    let starts = |(i, p)| (0..len(p)).step_by(step).map(move |start| (i, start));
    problems.iter().enumerate().flat_map(starts).collect()
}

/// Where each problem's panels begin in the shared workspace, and its total length.
fn panel_offsets<P>(problems: &[P], width: usize, size: impl Fn(&P) -> (usize, usize)) -> (Vec<usize>, usize) {
    let mut total = 0;
    let offset = |p| {
        let (k, n) = size(p);
        let at = total;
        total += k * n.next_multiple_of(width);
        at
    };
    (problems.iter().map(offset).collect(), total)
}

/// [`super::forward`] where `transposed`, else [`super::backward_input`].
pub(super) fn run<T: Element>(cpu: &Cpu, problems: &[Matmul<T>], transposed: bool) {
    if cpu.has_dots() {
        run_by::<T, T::Dot>(cpu, problems, transposed);
    } else {
        run_by::<T, T::Sum>(cpu, problems, transposed);
    }
}

fn run_by<T: Element, F: Packs<T>>(cpu: &Cpu, problems: &[Matmul<T>], transposed: bool) {
    let width = cpu.panel_width::<F>();
    let (offsets, len) = panel_offsets(problems, width, |p: &Matmul<T>| (p.a.cols().div_ceil(F::DEPTH), p.out.cols()));
    cpu.with_panels(len, |panels: View<F>| {
        let pack = tasks(problems, width, |p| p.out.cols());
        cpu.parallel_kernel(pack.len(), &Pack { problems, transposed, offsets: &offsets, panels, tasks: &pack });
        let blocks = tasks(problems, ROW_BLOCK, |p| p.out.rows());
        cpu.parallel_kernel(blocks.len(), &Product { problems, offsets: &offsets, panels, tasks: &blocks });
    });
}

struct Pack<'a, T: Element, F> {
    problems: &'a [Matmul<T>],
    transposed: bool,
    offsets: &'a [usize],
    panels: View<F>,
    tasks: &'a [(usize, usize)],
}

impl<T: Element, F: Packs<T>> Kernel for Pack<'_, T, F> {
    #[inline(always)]
    fn run<S: Simd>(&self, _: S, task: usize) {
        let (i, j0) = self.tasks[task];
        let p = &self.problems[i];
        let (k, n) = (p.a.cols(), p.out.cols());
        // SAFETY: the views are live, and each task writes its own panel.
        unsafe {
            let to = self.panels.ptr().add(self.offsets[i] + j0 * k.div_ceil(F::DEPTH));
            if self.transposed {
                tile::pack_panel_transposed::<T, F, S>(p.b.ptr(), p.b.stride(), (n, k), j0, to);
            } else {
                tile::pack_panel::<T, F, S>(p.b.ptr(), p.b.stride(), (k, n), j0, to);
            }
        }
    }
}

struct Product<'a, T: Element, F> {
    problems: &'a [Matmul<T>],
    offsets: &'a [usize],
    panels: View<F>,
    tasks: &'a [(usize, usize)],
}

impl<T: Element, F: Packs<T>> Kernel for Product<'_, T, F> {
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, task: usize) {
        let (i, row) = self.tasks[task];
        let p = &self.problems[i];
        let (n, k) = (p.out.cols(), p.a.cols());
        let rows = ROW_BLOCK.min(p.out.rows() - row);
        let (width, panel_rows) = (F::width::<S>(), k.div_ceil(F::DEPTH));
        let out = p.out.rows_range(row..row + rows);
        let in_place = out.as_sums();
        let sums_len = if in_place.is_some() { 0 } else { rows * n };
        with_workspace(
            ROW_BLOCK * DEPTH + sums_len,
            #[inline(always)]
            |space: &mut [T::Sum]| {
                let (block, sums) = space.split_at_mut(ROW_BLOCK * DEPTH);
                let block: &mut [F] = bytemuck::cast_slice_mut(block);
                // SAFETY: the workspace is this task's.
                let sums = in_place.unwrap_or_else(|| unsafe { View::of_slice_mut(sums, rows, n) });
                // SAFETY: the views are live, and each task writes its own rows of `out`.
                unsafe {
                    let a = p.a.ptr().add(row * p.a.stride());
                    if k == 0 && !p.epilogue.accumulate {
                        (0..rows).for_each(|i| sums.row_mut(i).fill(T::Sum::ZERO));
                    }
                    if in_place.is_none() && p.epilogue.accumulate {
                        (0..rows).for_each(|i| widen(out.row(i), sums.row_mut(i)));
                    }
                    for p0 in (0..panel_rows).step_by(DEPTH) {
                        let (k0, depth) = (p0 * F::DEPTH, DEPTH.min(panel_rows - p0));
                        let size = (rows, (k - k0).min(DEPTH * F::DEPTH));
                        tile::copy_along(a.add(k0), p.a.stride(), size, block.as_mut_ptr(), DEPTH);
                        let b = tile::Rhs {
                            ptr: self.panels.ptr().add(self.offsets[i] + p0 * width),
                            panel: panel_rows * width,
                            row: width,
                        };
                        let a = tile::Lhs::rows(block.as_ptr(), DEPTH);
                        let accumulate = p.epilogue.accumulate || p0 > 0;
                        tile::multiply(simd, (rows, n, depth), a, b, sums.ptr(), sums.stride(), accumulate);
                    }
                    for i in 0..rows {
                        let sums = sums.row_mut(i);
                        apply(&p.epilogue, row + i, sums);
                        if in_place.is_none() {
                            round(sums, out.row_mut(i));
                        }
                    }
                }
            },
        );
    }
}

/// The epilogue on one row's sums.
///
/// # Safety
/// Its views must be live, and the pre-activation's row not shared.
#[inline(always)]
unsafe fn apply<T: Element>(epilogue: &Epilogue<T>, i: usize, out: &mut [T::Sum]) {
    // SAFETY: the caller's: the epilogue's views are live, and row i of them is this task's.
    unsafe {
        if let Some(bias) = epilogue.bias {
            add(out, bias.row(0));
        }
        if let Some(pre) = epilogue.gelu {
            for (v, pre) in out.iter_mut().zip(pre.row_mut(i)) {
                *pre = T::from_sum(*v);
                *v = gelu::value(*v);
            }
        }
        if let Some(pre) = epilogue.gelu_grad {
            for (v, &pre) in out.iter_mut().zip(pre.row(i)) {
                *v *= gelu::derivative(pre.to_sum());
            }
        }
        if let Some(dropout) = epilogue.dropout {
            dropout.apply(i, out);
        }
        if let Some(residual) = epilogue.residual {
            add(out, residual.row(i));
        }
    }
}

#[inline(always)]
fn add<T: Element>(to: &mut [T::Sum], x: &[T]) {
    for (to, x) in to.iter_mut().zip(x) {
        *to += x.to_sum();
    }
}

/// Rows of x and dy that are packed and summed at a time, and problems: x's panels stay in the
/// last-level cache.
const CHUNK: usize = 1024;
const GROUP: usize = 3;
/// Rows that a task packs into all panels: few enough that memory is read row by row.
const PACK_ROWS: usize = 16;
const WEIGHT_ROWS: usize = 96;
const WEIGHT_COLS: usize = 512;

pub(super) fn backward_weight<T: Element>(cpu: &Cpu, problems: &[WeightGrad<T>]) {
    for problems in problems.chunks(GROUP) {
        if cpu.has_dots() {
            backward_weight_group::<T, T::Dot>(cpu, problems);
        } else {
            backward_weight_group::<T, T::Sum>(cpu, problems);
        }
    }
}

fn backward_weight_group<T: Element, F: Packs<T>>(cpu: &Cpu, problems: &[WeightGrad<T>]) {
    let width = cpu.panel_width::<F>();
    let panel = |p: &WeightGrad<T>| (CHUNK.min(p.x.rows()).div_ceil(F::DEPTH), p.x.cols());
    let (offsets, len) = panel_offsets(problems, width, panel);
    let rows = problems.iter().map(|p| p.x.rows()).max().unwrap_or(0);
    cpu.with_panels(len, |panels: View<F>| {
        for start in (0..rows).step_by(CHUNK) {
            let chunk = |p: &WeightGrad<T>| p.x.rows().saturating_sub(start).min(CHUNK);
            let pack = tasks(problems, PACK_ROWS, chunk);
            cpu.parallel_kernel(pack.len(), &PackChunk { problems, start, offsets: &offsets, panels, tasks: &pack });
            let cols = |p: &WeightGrad<T>| p.x.cols().div_ceil(WEIGHT_COLS);
            let blocks =
                tasks(problems, 1, |p| if chunk(p) > 0 { p.dy.cols().div_ceil(WEIGHT_ROWS) * cols(p) } else { 0 });
            cpu.parallel_kernel(
                blocks.len(),
                &Accumulate { problems, start, offsets: &offsets, panels, tasks: &blocks },
            );
        }
    });
}

struct PackChunk<'a, T: Element, F> {
    problems: &'a [WeightGrad<T>],
    start: usize,
    offsets: &'a [usize],
    panels: View<F>,
    tasks: &'a [(usize, usize)],
}

impl<T: Element, F: Packs<T>> Kernel for PackChunk<'_, T, F> {
    #[inline(always)]
    fn run<S: Simd>(&self, _: S, task: usize) {
        let (i, first) = self.tasks[task];
        let p = &self.problems[i];
        let x = p.x.rows_range(self.start..p.x.rows().min(self.start + CHUNK));
        let rows = x.rows_range(first..x.rows().min(first + PACK_ROWS));
        let width = F::width::<S>();
        for j0 in (0..x.cols()).step_by(width) {
            // SAFETY: the views are live, and each task writes its own rows of all panels.
            unsafe {
                let (panel_rows, above) = (x.rows().div_ceil(F::DEPTH), first / F::DEPTH);
                let to = self.panels.ptr().add(self.offsets[i] + j0 * panel_rows + above * width);
                tile::pack_panel::<T, F, S>(rows.ptr(), rows.stride(), (rows.rows(), rows.cols()), j0, to);
            }
        }
    }
}

struct Accumulate<'a, T: Element, F> {
    problems: &'a [WeightGrad<T>],
    start: usize,
    offsets: &'a [usize],
    panels: View<F>,
    tasks: &'a [(usize, usize)],
}

impl<T: Element, F: Packs<T>> Kernel for Accumulate<'_, T, F> {
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, task: usize) {
        let (i, block) = self.tasks[task];
        let p = &self.problems[i];
        let chunk = self.start..p.x.rows().min(self.start + CHUNK);
        let (dy, k) = (p.dy.rows_range(chunk.clone()), chunk.len());
        let col_blocks = p.x.cols().div_ceil(WEIGHT_COLS);
        let (row, col) = (block / col_blocks * WEIGHT_ROWS, block % col_blocks * WEIGHT_COLS);
        let (rows, cols) = (WEIGHT_ROWS.min(dy.cols() - row), WEIGHT_COLS.min(p.x.cols() - col));
        let (width, panel_rows) = (F::width::<S>(), k.div_ceil(F::DEPTH));
        with_workspace(
            WEIGHT_ROWS * DEPTH,
            #[inline(always)]
            |tile_: &mut [F]| {
                // SAFETY: the views are live, and each task writes its own block of `dw`.
                unsafe {
                    for p0 in (0..panel_rows).step_by(DEPTH) {
                        let (k0, depth) = (p0 * F::DEPTH, DEPTH.min(panel_rows - p0));
                        let from = dy.ptr().add(k0 * dy.stride() + row);
                        let size = ((k - k0).min(DEPTH * F::DEPTH), rows);
                        tile::copy_across(from, dy.stride(), size, tile_.as_mut_ptr(), WEIGHT_ROWS);
                        if col == 0 {
                            let db = p.db.cols_range(row..row + rows).row_mut(0);
                            tile_[..depth * WEIGHT_ROWS].chunks(64 * WEIGHT_ROWS).for_each(|rows| add_rows(rows, db));
                        }
                        let a = tile::Lhs::columns(tile_.as_ptr(), WEIGHT_ROWS);
                        let panels = self.panels.ptr().add(self.offsets[i] + col * panel_rows + p0 * width);
                        let b = tile::Rhs { ptr: panels, panel: panel_rows * width, row: width };
                        let dw = p.dw.ptr().add(row * p.dw.stride() + col);
                        tile::multiply(simd, (rows, cols, depth), a, b, dw, p.dw.stride(), true);
                    }
                }
            },
        );
    }
}

/// sums += the column sums of some rows of [`WEIGHT_ROWS`] elements, of which those beyond `sums`
/// are not asked for.
#[inline(always)]
fn add_rows<F: Factor>(rows: &[F], sums: &mut [F::Sum]) {
    let mut block = [F::Sum::ZERO; WEIGHT_ROWS];
    for row in rows.chunks_exact(WEIGHT_ROWS) {
        for (sum, &x) in block.iter_mut().zip(row) {
            *sum += x.total();
        }
    }
    for (to, &sum) in sums.iter_mut().zip(&block) {
        *to += sum;
    }
}

/// Each (x, sums): sums `[1, n]` += the column sums of x `[m, n]`, summed in blocks of 64 rows.
pub(in crate::ops) fn column_sums<T: Element>(cpu: &Cpu, problems: &[(View<T>, View<T::Sum>)]) {
    const COLS: usize = 128;
    let blocks = tasks(problems, COLS, |(x, _)| x.cols());
    cpu.parallel(
        blocks.len(),
        #[inline(always)]
        |task| {
            let (i, col) = blocks[task];
            let (x, sums) = problems[i];
            let cols = COLS.min(x.cols() - col);
            // SAFETY: the views are live, and each task writes its own columns of `sums`.
            let sums = unsafe { sums.cols_range(col..col + cols).row_mut(0) };
            for start in (0..x.rows()).step_by(64) {
                let mut block = [T::Sum::ZERO; COLS];
                for r in start..x.rows().min(start + 64) {
                    // SAFETY: the views are live, and nobody writes x.
                    add(&mut block, unsafe { &x.row(r)[col..col + cols] });
                }
                add::<T::Sum>(sums, &block);
            }
        },
    );
}
