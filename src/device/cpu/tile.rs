//! The matrix kernel under `matmul` and `attention`: C[m, n] (+)= A[m, k] B[k, n] on tiles that fit
//! the caches.
//!
//! The inner loop keeps an `MR x 2 vectors` block of C in registers (Goto & van de Geijn 2008, fig.
//! 8). A is read element by element through two strides, so packed slivers, row-major tiles and
//! their transposes are all the same code; B is read by whole vectors from column panels of
//! [`Factor::width`] columns.

use pulp::Simd;

use super::{
    Real,
    factor::{Factor, Packs},
};
use crate::device::Element;

/// Rows of the register block where there are 32 vector registers; half of it otherwise.
const MR: usize = 12;
/// Tile heights are multiples of this, so that a tile's last row block may read past its rows.
pub const ROWS: usize = MR;
/// Columns of a panel never exceed this.
pub const MAX_PANEL: usize = 32;

/// A[i, p] is at `ptr + (i / ROWS) * sliver + (i % ROWS) * row + p * col`. Rows up to the next
/// multiple of [`ROWS`] are read. Strides that are constants at the call site end up as immediate
/// offsets.
#[derive(Clone, Copy)]
pub struct Lhs<T> {
    pub ptr: *const T,
    pub sliver: usize,
    pub row: usize,
    pub col: usize,
}

impl<T> Lhs<T> {
    /// A row-major tile of row stride `stride`.
    #[inline(always)]
    pub fn rows(ptr: *const T, stride: usize) -> Self {
        Self { ptr, sliver: ROWS * stride, row: stride, col: 1 }
    }

    /// The transpose of a row-major tile.
    #[inline(always)]
    pub fn columns(ptr: *const T, stride: usize) -> Self {
        Self { ptr, sliver: ROWS, row: 1, col: stride }
    }
}

/// B[p, j] is at `ptr + (j / width) * panel + p * row + j % width`; panels are read whole.
#[derive(Clone, Copy)]
pub struct Rhs<T> {
    pub ptr: *const T,
    pub panel: usize,
    pub row: usize,
}

impl<F: Factor> Rhs<F> {
    /// A row-major tile of row stride `stride` (a multiple of the panel width).
    #[inline(always)]
    pub fn rows<S: Simd>(ptr: *const F, stride: usize) -> Self {
        Self { ptr, panel: F::width::<S>(), row: stride }
    }

    /// Packed panels of `depth` rows.
    #[inline(always)]
    pub fn panels<S: Simd>(ptr: *const F, depth: usize) -> Self {
        Self { ptr, panel: depth * F::width::<S>(), row: F::width::<S>() }
    }
}

/// C[m, n] = A B, or += with `accumulate`; k counts factors, and C is row-major with stride `c_row`.
///
/// # Safety
/// The strides must describe live memory, of which C is not shared, and this CPU must have the
/// factors' instruction.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // three matrices and their sizes
pub unsafe fn multiply<F: Factor, S: Simd>(
    simd: S,
    (m, n, k): (usize, usize, usize),
    a: Lhs<F>,
    b: Rhs<F>,
    c: *mut F::Sum,
    c_row: usize,
    accumulate: bool,
) {
    let width = F::width::<S>();
    let mut edge = [F::Sum::ZERO; MR * MAX_PANEL];
    for j in (0..n).step_by(width) {
        // SAFETY: the caller's: b holds the panels of all n columns.
        let b_panel = unsafe { b.ptr.add(j / width * b.panel) };
        let cols = width.min(n - j);
        for i in (0..m).step_by(MR) {
            // SAFETY: the caller's: a holds the slivers of all m rows.
            let a_sliver = unsafe { a.ptr.add(i / MR * a.sliver) };
            let rows = MR.min(m - i);
            // SAFETY: the caller's: c holds m rows of n columns.
            let c_block = unsafe { c.add(i * c_row + j) };
            let inside = rows == MR && cols == width;
            let (target, stride, add) =
                if inside { (c_block, c_row, accumulate) } else { (edge.as_mut_ptr(), MAX_PANEL, false) };
            // SAFETY: the caller vouches for A, B and C; `edge` holds MR rows of MAX_PANEL.
            unsafe {
                if S::REGISTER_COUNT >= 32 {
                    F::block::<S, MR>(simd, k, a_sliver, a.row, a.col, b_panel, b.row, target, stride, add);
                } else {
                    for half in [0, MR / 2] {
                        let (a_half, c_half) = (a_sliver.add(half * a.row), target.add(half * stride));
                        F::block::<S, { MR / 2 }>(simd, k, a_half, a.row, a.col, b_panel, b.row, c_half, stride, add);
                    }
                }
                if !inside {
                    for r in 0..rows {
                        for col in 0..cols {
                            let target = c_block.add(r * c_row + col);
                            *target = edge[r * MAX_PANEL + col] + if accumulate { *target } else { F::Sum::ZERO };
                        }
                    }
                }
            }
        }
    }
}

/// Asks the caches for a row that is needed soon: a hint, where the machine takes one.
#[inline(always)]
pub fn prefetch<T>(row: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in row.chunks(64 / size_of::<T>()) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

/// Factors of which each takes [`Factor::DEPTH`] neighbours of a row: `rows` rows of `k` elements
/// become a row-major tile of row stride `to_stride`, whose last factor of a row is filled up with
/// zero.
///
/// # Safety
/// Both must be live and must not overlap.
#[inline(always)]
pub unsafe fn copy_along<T: Element, F: Packs<T>>(
    from: *const T,
    stride: usize,
    (rows, k): (usize, usize),
    to: *mut F,
    to_stride: usize,
) {
    let whole = k / F::DEPTH;
    for i in 0..rows {
        // SAFETY: the caller's: both matrices hold these rows.
        unsafe {
            let (from, to) = (from.add(i * stride), to.add(i * to_stride));
            for p in 0..whole {
                *to.add(p) = F::along(from.add(p * F::DEPTH));
            }
            if whole * F::DEPTH < k {
                *to.add(whole) = F::single(*from.add(whole * F::DEPTH));
            }
        }
    }
}

/// Factors of which each takes the elements of a column in [`Factor::DEPTH`] rows: `k` rows of `n`
/// elements become a row-major tile of row stride `to_stride`, whose last row is filled up with zero.
///
/// # Safety
/// As [`copy_along`].
#[inline(always)]
pub unsafe fn copy_across<T: Element, F: Packs<T>>(
    from: *const T,
    stride: usize,
    (k, n): (usize, usize),
    to: *mut F,
    to_stride: usize,
) {
    let whole = k / F::DEPTH;
    for p in 0..whole {
        // SAFETY: the caller's: from holds k rows of n columns, to a row for each factor.
        unsafe {
            let (from, to) = (from.add(p * F::DEPTH * stride), to.add(p * to_stride));
            for j in 0..n {
                *to.add(j) = F::across(from.add(j), stride);
            }
        }
    }
    if whole * F::DEPTH < k {
        // SAFETY: as above.
        unsafe {
            let (from, to) = (from.add(whole * F::DEPTH * stride), to.add(whole * to_stride));
            for j in 0..n {
                *to.add(j) = F::single(*from.add(j));
            }
        }
    }
}

/// Packs columns `j0 .. j0 + width` of a row-major `[k, n]` matrix into one panel; columns from `n`
/// on become zero.
///
/// # Safety
/// As [`copy_along`]; `to` holds a row of the panel width for each factor of k.
#[inline(always)]
pub unsafe fn pack_panel<T: Element, F: Packs<T>, S: Simd>(
    from: *const T,
    stride: usize,
    (k, n): (usize, usize),
    j0: usize,
    to: *mut F,
) {
    let width = F::width::<S>();
    let cols = width.min(n - j0);
    // SAFETY: the caller's: from holds k rows of n columns, to a panel of k's factors.
    unsafe {
        copy_across(from.add(j0), stride, (k, cols), to, width);
        for p in 0..k.div_ceil(F::DEPTH) {
            for j in cols..width {
                *to.add(p * width + j) = F::zeroed();
            }
        }
    }
}

/// Packs rows `j0 .. j0 + width` of a row-major `[n, k]` matrix into one panel of its transpose;
/// rows from `n` on become zero.
///
/// # Safety
/// As [`pack_panel`].
#[inline(always)]
pub unsafe fn pack_panel_transposed<T: Element, F: Packs<T>, S: Simd>(
    from: *const T,
    stride: usize,
    (n, k): (usize, usize),
    j0: usize,
    to: *mut F,
) {
    /// Blocks of 4 x 4 are loads, shuffles and stores of whole vectors; a loop over elements would
    /// be scatters.
    const SIDE: usize = 4;
    let width = F::width::<S>();
    let (rows, depth) = (width.min(n - j0), k / F::DEPTH);
    let (whole_rows, whole_depth) = (rows / SIDE * SIDE, depth / SIDE * SIDE);
    // SAFETY: the caller's: from holds n rows of k columns, to a panel of k's factors.
    let from = unsafe { from.add(j0 * stride) };
    // SAFETY: as above.
    let at = |j: usize, p: usize| unsafe { to.add(p * width + j) };
    for j in (0..whole_rows).step_by(SIDE) {
        for p in (0..whole_depth).step_by(SIDE) {
            let mut block = [[F::zeroed(); SIDE]; SIDE];
            // SAFETY: as above.
            unsafe {
                for (r, row) in block.iter_mut().enumerate() {
                    for (c, x) in row.iter_mut().enumerate() {
                        *x = F::along(from.add((j + r) * stride + (p + c) * F::DEPTH));
                    }
                }
                for c in 0..SIDE {
                    for (r, row) in block.iter().enumerate() {
                        *at(j + r, p + c) = row[c];
                    }
                }
            }
        }
    }
    let one = |j: usize, p: usize| {
        // SAFETY: as above.
        unsafe { *at(j, p) = if j < rows { F::along(from.add(j * stride + p * F::DEPTH)) } else { F::zeroed() } };
    };
    (0..whole_rows).for_each(|j| (whole_depth..depth).for_each(|p| one(j, p)));
    (whole_rows..width).for_each(|j| (0..depth).for_each(|p| one(j, p)));
    if depth * F::DEPTH < k {
        for j in 0..width {
            // SAFETY: as above.
            unsafe {
                *at(j, depth) = if j < rows { F::single(*from.add(j * stride + k - 1)) } else { F::zeroed() };
            }
        }
    }
}
