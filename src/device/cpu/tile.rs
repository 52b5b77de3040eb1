//! The matrix kernel under `matmul` and `attention`: C[m, n] (+)= A[m, k] B[k, n] on tiles that fit
//! the caches.
//!
//! The inner loop keeps an `MR x 2 vectors` block of C in registers (Goto & van de Geijn 2008, fig.
//! 8). A is read element by element through two strides, so packed slivers, row-major tiles and
//! their transposes are all the same code; B is read by whole vectors from column panels of
//! [`panel_width`] columns.

use pulp::Simd;

use super::Real;
use crate::device::{Element, widen};

/// Rows of the register block where there are 32 vector registers; half of it otherwise.
const MR: usize = 12;
/// Tile heights are multiples of this, so that a tile's last row block may read past its rows.
pub const ROWS: usize = MR;
/// Columns of a panel never exceed this.
pub const MAX_PANEL: usize = 32;

/// Columns of a panel of B: two vector registers.
#[inline(always)]
pub fn panel_width<T: Real, S: Simd>() -> usize {
    2 * T::lanes::<S>()
}

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

impl<T: Real> Rhs<T> {
    /// A row-major tile of row stride `stride` (a multiple of the panel width).
    #[inline(always)]
    pub fn rows<S: Simd>(ptr: *const T, stride: usize) -> Self {
        Self { ptr, panel: panel_width::<T, S>(), row: stride }
    }

    /// Packed panels of `depth` rows.
    #[inline(always)]
    pub fn panels<S: Simd>(ptr: *const T, depth: usize) -> Self {
        Self { ptr, panel: depth * panel_width::<T, S>(), row: panel_width::<T, S>() }
    }
}

/// C[m, n] = A B, or += with `accumulate`; C is row-major with stride `c_row`.
///
/// # Safety
/// The strides must describe live memory, of which C is not shared.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // three matrices and their sizes
pub unsafe fn multiply<T: Real, S: Simd>(
    simd: S,
    (m, n, k): (usize, usize, usize),
    a: Lhs<T>,
    b: Rhs<T>,
    c: *mut T,
    c_row: usize,
    accumulate: bool,
) {
    let width = panel_width::<T, S>();
    let mut edge = [T::ZERO; MR * MAX_PANEL];
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
                    block::<T, S, MR>(simd, k, a_sliver, a.row, a.col, b_panel, b.row, target, stride, add);
                } else {
                    for half in [0, MR / 2] {
                        let (a_half, c_half) = (a_sliver.add(half * a.row), target.add(half * stride));
                        block::<T, S, { MR / 2 }>(simd, k, a_half, a.row, a.col, b_panel, b.row, c_half, stride, add);
                    }
                }
                if !inside {
                    for r in 0..rows {
                        for col in 0..cols {
                            let target = c_block.add(r * c_row + col);
                            *target = edge[r * MAX_PANEL + col] + if accumulate { *target } else { T::ZERO };
                        }
                    }
                }
            }
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)] // as `multiply`
unsafe fn block<T: Real, S: Simd, const R: usize>(
    simd: S,
    k: usize,
    a: *const T,
    a_row: usize,
    a_col: usize,
    b: *const T,
    b_row: usize,
    c: *mut T,
    c_row: usize,
    accumulate: bool,
) {
    let lanes = T::lanes::<S>();
    let mut sum = [[T::splat(simd, T::ZERO); 2]; R];
    // SAFETY: the caller's: a and b hold k steps of the block, and c the block.
    unsafe {
        for p in 0..k {
            let b = b.add(p * b_row).cast::<T::Vector<S>>();
            let (b0, b1) = (b.read_unaligned(), b.add(1).read_unaligned());
            for (i, sum) in sum.iter_mut().enumerate() {
                let x = T::splat(simd, *a.add(i * a_row + p * a_col));
                sum[0] = T::mul_add(simd, x, b0, sum[0]);
                sum[1] = T::mul_add(simd, x, b1, sum[1]);
            }
        }
        for (i, sum) in sum.iter().enumerate() {
            for (v, &sum) in sum.iter().enumerate() {
                let c = c.add(i * c_row + v * lanes).cast::<T::Vector<S>>();
                c.write_unaligned(if accumulate { T::sum(simd, c.read_unaligned(), sum) } else { sum });
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

/// Copies `rows` rows of `cols` elements into a row-major tile of row stride `to_stride`, as sums are
/// kept.
///
/// # Safety
/// Both must be live and must not overlap.
#[inline(always)]
pub unsafe fn copy_rows<T: Element>(
    from: *const T,
    stride: usize,
    (rows, cols): (usize, usize),
    to: *mut T::Sum,
    to_stride: usize,
) {
    for i in 0..rows {
        // SAFETY: the caller's: both matrices hold these rows.
        unsafe { copy(from.add(i * stride), to.add(i * to_stride), cols) };
    }
}

/// # Safety
/// Both must hold `len` elements and must not overlap.
#[inline(always)]
unsafe fn copy<T: Element>(from: *const T, to: *mut T::Sum, len: usize) {
    // SAFETY: the caller's.
    let (from, to) = unsafe { (std::slice::from_raw_parts(from, len), std::slice::from_raw_parts_mut(to, len)) };
    widen(from, to);
}

/// Packs columns `j0 .. j0 + width` of a row-major `[k, n]` matrix into one panel; columns from `n`
/// on become zero.
///
/// # Safety
/// As [`copy_rows`]; `to` holds k rows of the panel width.
#[inline(always)]
pub unsafe fn pack_panel<T: Element, S: Simd>(
    from: *const T,
    stride: usize,
    (k, n): (usize, usize),
    j0: usize,
    to: *mut T::Sum,
) {
    let width = panel_width::<T::Sum, S>();
    let cols = width.min(n - j0);
    for p in 0..k {
        // SAFETY: the caller's: from holds k rows of n columns, to a panel of k rows.
        unsafe {
            copy(from.add(p * stride + j0), to.add(p * width), cols);
            for j in cols..width {
                *to.add(p * width + j) = T::Sum::ZERO;
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
pub unsafe fn pack_panel_transposed<T: Element, S: Simd>(
    from: *const T,
    stride: usize,
    (n, k): (usize, usize),
    j0: usize,
    to: *mut T::Sum,
) {
    /// Blocks of 4 x 4 are loads, shuffles and stores of whole vectors; a loop over elements would
    /// be scatters.
    const SIDE: usize = 4;
    let width = panel_width::<T::Sum, S>();
    let rows = width.min(n - j0);
    let (whole_rows, whole_k) = (rows / SIDE * SIDE, k / SIDE * SIDE);
    // SAFETY: the caller's: from holds n rows of k columns, to a panel of k rows.
    let from = unsafe { from.add(j0 * stride) };
    // SAFETY: as above.
    let at = |j: usize, p: usize| unsafe { to.add(p * width + j) };
    for j in (0..whole_rows).step_by(SIDE) {
        for p in (0..whole_k).step_by(SIDE) {
            let mut block = [[T::Sum::ZERO; SIDE]; SIDE];
            // SAFETY: as above.
            unsafe {
                for (r, row) in block.iter_mut().enumerate() {
                    for (c, x) in row.iter_mut().enumerate() {
                        *x = (*from.add((j + r) * stride + p + c)).to_sum();
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
        unsafe { *at(j, p) = if j < rows { (*from.add(j * stride + p)).to_sum() } else { T::Sum::ZERO } };
    };
    (0..whole_rows).for_each(|j| (whole_k..k).for_each(|p| one(j, p)));
    (whole_rows..width).for_each(|j| (0..k).for_each(|p| one(j, p)));
}
