//! What the matrix kernel multiplies: numbers, or pairs of bf16 for AVX-512's dot instruction.

use bytemuck::{Pod, Zeroable};
use half::bf16;
use pulp::Simd;

use super::Real;
use crate::device::Element;

/// An operand of the matrix kernel: [`Factor::DEPTH`] neighbours along the summed dimension.
pub trait Factor: Pod + Send + Sync {
    /// What products are summed in.
    type Sum: Real;
    /// Numbers of the summed dimension in one factor.
    const DEPTH: usize;
    /// Columns of a panel of B: two vector registers of sums.
    fn width<S: Simd>() -> usize;
    /// Both numbers of a pair added up, or the number.
    fn total(self) -> Self::Sum;
    /// Makes factors of the first `len` sums of a row, which take its beginning; what is missing of
    /// the last is zero.
    fn from_sums(row: &mut [Self::Sum], len: usize);
    /// A register block: C[R, width] (+)= A B over k factors; strides as in [`super::tile`].
    ///
    /// # Safety
    /// a and b must hold k steps of the block, and c the block; the CPU must have the instruction.
    #[allow(clippy::too_many_arguments)] // three matrices and their sizes
    unsafe fn block<S: Simd, const R: usize>(
        simd: S,
        k: usize,
        a: *const Self,
        a_row: usize,
        a_col: usize,
        b: *const Self,
        b_row: usize,
        c: *mut Self::Sum,
        c_row: usize,
        accumulate: bool,
    );
}

/// How stored numbers become factors.
pub trait Packs<T: Element>: Factor<Sum = T::Sum> {
    /// Of [`Factor::DEPTH`] neighbours of a row.
    ///
    /// # Safety
    /// They must be live.
    unsafe fn along(row: *const T) -> Self;
    /// Of an element and those below it, `stride` apart.
    ///
    /// # Safety
    /// They must be live.
    unsafe fn across(column: *const T, stride: usize) -> Self;
    /// Of one element where no neighbour is left: zero stands for it.
    fn single(x: T) -> Self;
}

macro_rules! number {
    ($real:ty) => {
        impl Factor for $real {
            type Sum = Self;
            const DEPTH: usize = 1;
            #[inline(always)]
            fn width<S: Simd>() -> usize {
                2 * Self::lanes::<S>()
            }
            #[inline(always)]
            fn total(self) -> Self {
                self
            }
            #[inline(always)]
            fn from_sums(_: &mut [Self], _: usize) {}
            #[inline(always)]
            unsafe fn block<S: Simd, const R: usize>(
                simd: S,
                k: usize,
                a: *const Self,
                a_row: usize,
                a_col: usize,
                b: *const Self,
                b_row: usize,
                c: *mut Self,
                c_row: usize,
                accumulate: bool,
            ) {
                // SAFETY: the caller's.
                unsafe { block::<Self, S, R>(simd, k, a, a_row, a_col, b, b_row, c, c_row, accumulate) }
            }
        }

        impl<T: Element<Sum = $real>> Packs<T> for $real {
            #[inline(always)]
            unsafe fn along(row: *const T) -> Self {
                // SAFETY: the caller's.
                unsafe { *row }.to_sum()
            }
            #[inline(always)]
            unsafe fn across(column: *const T, _: usize) -> Self {
                // SAFETY: the caller's.
                unsafe { *column }.to_sum()
            }
            #[inline(always)]
            fn single(x: T) -> Self {
                x.to_sum()
            }
        }
    };
}

number!(f32);
number!(f64);

#[inline(always)]
#[allow(clippy::too_many_arguments)] // as `Factor::block`
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

/// Two bf16: the earlier in the low half, as AVX-512's dot instruction takes them.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Pair(u32);

/// Sums in a register of the dot instruction.
const LANES: usize = 16;

impl Pair {
    #[inline(always)]
    fn of(first: u16, second: u16) -> Self {
        Self(u32::from(first) | u32::from(second) << 16)
    }

    #[inline(always)]
    fn numbers(self) -> [f32; 2] {
        [f32::from_bits(self.0 << 16), f32::from_bits(self.0 & 0xffff_0000)]
    }
}

/// The bits of the nearest bf16.
#[inline(always)]
fn bits<T: Element<Sum = f32>>(x: T) -> u16 {
    // an element of two bytes is a bf16, whose bits need no rounding
    if size_of::<T>() == size_of::<u16>() { bytemuck::cast(x) } else { bf16::from_sum(x.to_sum()).to_bits() }
}

impl<T: Element<Sum = f32>> Packs<T> for Pair {
    #[inline(always)]
    unsafe fn along(row: *const T) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::of(bits(*row), bits(*row.add(1))) }
    }
    #[inline(always)]
    unsafe fn across(column: *const T, stride: usize) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::of(bits(*column), bits(*column.add(stride))) }
    }
    #[inline(always)]
    fn single(x: T) -> Self {
        Self::of(bits(x), 0)
    }
}

impl Factor for Pair {
    type Sum = f32;
    const DEPTH: usize = 2;
    #[inline(always)]
    fn width<S: Simd>() -> usize {
        2 * LANES
    }
    #[inline(always)]
    fn total(self) -> f32 {
        let [first, second] = self.numbers();
        first + second
    }
    #[inline(always)]
    fn from_sums(row: &mut [f32], len: usize) {
        /// Sums that are read before their pairs are written over the earlier ones.
        const PIECE: usize = 2 * LANES;
        row[len..].iter_mut().take(1).for_each(|beyond| *beyond = 0.0);
        for start in (0..len).step_by(PIECE) {
            let mut piece = [0f32; PIECE];
            let sums = &row[start..row.len().min(start + PIECE)];
            piece[..sums.len()].copy_from_slice(sums);
            let mut pairs = [0f32; LANES];
            for (pair, x) in pairs.iter_mut().zip(piece.chunks_exact(2)) {
                *pair = f32::from_bits(Self::of(bits(x[0]), bits(x[1])).0);
            }
            let to = &mut row[start / 2..];
            let count = to.len().min(LANES);
            to[..count].copy_from_slice(&pairs[..count]);
        }
    }
    #[inline(always)]
    unsafe fn block<S: Simd, const R: usize>(
        _: S,
        k: usize,
        a: *const Self,
        a_row: usize,
        a_col: usize,
        b: *const Self,
        b_row: usize,
        c: *mut f32,
        c_row: usize,
        accumulate: bool,
    ) {
        // SAFETY: the caller's; `Cpu::dots` gives pairs to AVX-512 only where it has the instruction.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if size_of::<S::f32s>() == size_of::<[f32; LANES]>() {
                return native::block::<R>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate);
            }
            emulated::<R>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod native {
    use std::arch::x86_64::*;

    use super::{LANES, Pair};

    /// [`super::Factor::block`].
    ///
    /// # Safety
    /// As there.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    #[allow(clippy::too_many_arguments)] // as there
    pub unsafe fn block<const R: usize>(
        k: usize,
        a: *const Pair,
        a_row: usize,
        a_col: usize,
        b: *const Pair,
        b_row: usize,
        c: *mut f32,
        c_row: usize,
        accumulate: bool,
    ) {
        let pairs = |x: __m512i| -> __m512bh {
            // SAFETY: both are 64 bytes.
            unsafe { std::mem::transmute(x) }
        };
        let mut sum = [[_mm512_setzero_ps(); 2]; R];
        // SAFETY: the caller's: a and b hold k steps of the block, and c the block.
        unsafe {
            for p in 0..k {
                let b = b.add(p * b_row);
                let b0 = pairs(_mm512_loadu_si512(b.cast()));
                let b1 = pairs(_mm512_loadu_si512(b.add(LANES).cast()));
                for (i, sum) in sum.iter_mut().enumerate() {
                    let x = pairs(_mm512_set1_epi32((*a.add(i * a_row + p * a_col)).0 as i32));
                    sum[0] = _mm512_dpbf16_ps(sum[0], x, b0);
                    sum[1] = _mm512_dpbf16_ps(sum[1], x, b1);
                }
            }
            for (i, sum) in sum.iter().enumerate() {
                for (v, &sum) in sum.iter().enumerate() {
                    let c = c.add(i * c_row + v * LANES);
                    _mm512_storeu_ps(c, if accumulate { _mm512_add_ps(_mm512_loadu_ps(c), sum) } else { sum });
                }
            }
        }
    }
}

/// [`Factor::block`] with the bits of the instruction, for tests of machines without it: the second
/// product is added first, each sum is rounded, and subnormal numbers are zero.
///
/// # Safety
/// As there.
#[allow(clippy::too_many_arguments)] // as there
unsafe fn emulated<const R: usize>(
    k: usize,
    a: *const Pair,
    a_row: usize,
    a_col: usize,
    b: *const Pair,
    b_row: usize,
    c: *mut f32,
    c_row: usize,
    accumulate: bool,
) {
    let flush = |x: f32| if x.abs() < f32::MIN_POSITIVE { 0f32.copysign(x) } else { x };
    for i in 0..R {
        for j in 0..2 * LANES {
            let mut sum = 0f32;
            for p in 0..k {
                // SAFETY: the caller's.
                let (x, y) = unsafe { (*a.add(i * a_row + p * a_col), *b.add(p * b_row + j)) };
                let ([x0, x1], [y0, y1]) = (x.numbers().map(flush), y.numbers().map(flush));
                sum = flush(x1.mul_add(y1, flush(sum)));
                sum = flush(x0.mul_add(y0, sum));
            }
            // SAFETY: the caller's.
            unsafe {
                let c = c.add(i * c_row + j);
                *c = if accumulate { *c + sum } else { sum };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::{Cpu, Kernel, tile};

    /// A product of bf16 matrices, A as rows or (`columns`) as the transpose of what lies in memory.
    struct Product<'a> {
        size: (usize, usize, usize),
        columns: bool,
        a: &'a [bf16],
        b: &'a [bf16],
        c: std::sync::Mutex<Vec<f32>>,
    }

    impl Kernel for Product<'_> {
        fn run<S: Simd>(&self, simd: S, _: usize) {
            let (m, n, k) = self.size;
            let (depth, tall) = (k.div_ceil(Pair::DEPTH), m.next_multiple_of(tile::ROWS));
            let width = <Pair as Factor>::width::<S>();
            let mut a = vec![Pair::zeroed(); depth * tall];
            let mut b = vec![Pair::zeroed(); depth * n.next_multiple_of(width)];
            let mut c = self.c.lock().unwrap();
            // SAFETY: the vectors hold their matrices, and `parallel_kernel` runs on this CPU's vectors.
            unsafe {
                let a = if self.columns {
                    tile::copy_across(self.a.as_ptr(), m, (k, m), a.as_mut_ptr(), tall);
                    tile::Lhs::columns(a.as_ptr(), tall)
                } else {
                    tile::copy_along(self.a.as_ptr(), k, (m, k), a.as_mut_ptr(), depth);
                    tile::Lhs::rows(a.as_ptr(), depth)
                };
                for j in (0..n).step_by(width) {
                    let panel = b.as_mut_ptr().add(j * depth);
                    if self.columns {
                        tile::pack_panel::<bf16, Pair, S>(self.b.as_ptr(), n, (k, n), j, panel);
                    } else {
                        tile::pack_panel_transposed::<bf16, Pair, S>(self.b.as_ptr(), k, (n, k), j, panel);
                    }
                }
                let b = tile::Rhs::panels::<S>(b.as_ptr(), depth);
                tile::multiply(simd, (m, n, depth), a, b, c.as_mut_ptr(), n, true);
            }
        }
    }

    fn number(i: usize) -> bf16 {
        let bits = (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        bf16::from_f32((bits >> 40) as f32 / (1 << 23) as f32 - 1.0)
    }

    /// Both layouts of ragged products, on top of what C holds: against f64, and the emulation's
    /// bits against the instruction's, where this machine has it.
    #[test]
    fn pairs_multiply_ragged_matrices() {
        let (native, emulated) = (Cpu::new(1).unwrap(), Cpu::with_emulated_dots(1).unwrap());
        if !native.has_dots() {
            println!("SKIPPED the instruction itself: this machine has no AVX512_BF16");
        }
        let sizes = [(1, 1, 1), (1, 5, 2), (12, 32, 64), (13, 33, 7), (24, 64, 1), (5, 40, 129), (97, 70, 31)];
        for (size @ (m, n, k), columns) in sizes.into_iter().flat_map(|size| [(size, false), (size, true)]) {
            let (a, b): (Vec<_>, Vec<_>) =
                ((0..m * k).map(number).collect(), (0..k * n).map(|i| number(i + 7919)).collect());
            let at = |x: &[bf16], row, col, rows, cols| {
                f64::from(if columns { x[col * rows + row] } else { x[row * cols + col] })
            };
            let run = |cpu: &Cpu| {
                // a row of blocks may be read past A's last row, which a tile's height allows for
                let c = std::sync::Mutex::new((0..m * n).map(|i| i as f32 / 16.0).collect());
                let product = Product { size, columns, a: &a, b: &b, c };
                cpu.parallel_kernel(1, &product);
                product.c.into_inner().unwrap()
            };
            let found = run(&emulated);
            for (i, &c) in found.iter().enumerate() {
                let truth: f64 = (0..k).map(|p| at(&a, i / n, p, m, k) * at(&b, i % n, p, n, k)).sum();
                let error = f64::from(c) - i as f64 / 16.0 - truth;
                assert!(error.abs() < 1e-6 * (k + i) as f64, "{size:?} {columns} at {i}: {error:e}");
            }
            if native.has_dots() {
                let same = run(&native).iter().zip(&found).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{size:?} {columns}");
            }
        }
    }

    /// What the instruction does at the ends of f32's range.
    #[test]
    fn subnormal_numbers_are_zero() {
        let tiny = 1e-39;
        let pairs = |x: f32, y: f32| Pair::of(bf16::from_f32(x).to_bits(), bf16::from_f32(y).to_bits());
        let cases = [
            (tiny, pairs(0.0, 0.0), pairs(0.0, 0.0), 0.0),
            (tiny, pairs(1.0, 0.0), pairs(1.0, 0.0), 1.0),
            (0.0, pairs(1e-39, 1.0), pairs(1.0, 2.0), 2.0),
            (0.0, pairs(1e-20, 0.0), pairs(1e-20, 0.0), 0.0),
            (1.0, pairs(f32::INFINITY, 0.0), pairs(-1.0, 0.0), f32::NEG_INFINITY),
        ];
        for (before, a, b, expected) in cases {
            let (a, b) = ([a; tile::ROWS], [b; 2 * LANES]);
            let run = |native: bool| {
                let mut c = [0f32; 2 * LANES * tile::ROWS];
                // the sum before is a product with one
                let (a, b) = (a.map(|x| [pairs(before, 0.0), x]), b.map(|x| [pairs(1.0, 0.0), x]));
                let (a, b) = (a.as_flattened(), [b.map(|b| b[0]), b.map(|b| b[1])]);
                // SAFETY: the arrays hold a block of two factors.
                unsafe {
                    #[cfg(target_arch = "x86_64")]
                    if native {
                        let b = b.as_flattened().as_ptr();
                        native::block::<{ tile::ROWS }>(
                            2,
                            a.as_ptr(),
                            2,
                            1,
                            b,
                            2 * LANES,
                            c.as_mut_ptr(),
                            2 * LANES,
                            false,
                        );
                        return c[0];
                    }
                    assert!(!native);
                    let b = b.as_flattened().as_ptr();
                    emulated::<{ tile::ROWS }>(2, a.as_ptr(), 2, 1, b, 2 * LANES, c.as_mut_ptr(), 2 * LANES, false);
                }
                c[0]
            };
            assert_eq!(run(false), expected);
            if Cpu::new(1).unwrap().has_dots() {
                assert_eq!(run(true), expected);
            }
        }
    }
}
