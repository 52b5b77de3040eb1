//! The element types of the CPU, f32 for work and f64 for checks, with the elementary functions
//! that the ops need.
//!
//! The f32 functions are branch-free polynomials, so that loops over them vectorize; the f64 ones
//! are libm's.

use pulp::Simd;

use super::factor::Factor;
use crate::device::Element;

/// A number that the CPU computes in: f32 or f64.
pub trait Real:
    Element<Sum = Self>
    + Factor<Sum = Self>
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::ops::MulAssign
{
    /// 0
    const ZERO: Self;
    /// 1
    const ONE: Self;
    /// The nearest number.
    fn of(x: f64) -> Self;
    /// The same number.
    fn f64(self) -> f64;
    /// The square root.
    fn sqrt(self) -> Self;
    /// 2^x; in f32, 0 where the result would be below 2^-126.5, and NaN of NaN.
    fn exp2(self) -> Self;
    /// The error function.
    fn erf(self) -> Self;

    /// A vector register of elements.
    type Vector<S: Simd>: Copy;
    /// A vector of one number.
    fn splat<S: Simd>(simd: S, x: Self) -> Self::Vector<S>;
    /// a + b of each lane.
    fn sum<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// a * b + c, fused where the machine can.
    fn mul_add<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>, c: Self::Vector<S>) -> Self::Vector<S>;
    /// Numbers in a vector register.
    #[inline(always)]
    fn lanes<S: Simd>() -> usize {
        size_of::<Self::Vector<S>>() / size_of::<Self>()
    }

    /// The larger of two.
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }

    /// Splits x into n + f with |f| <= 1/2 and takes the Taylor polynomial of 2^f; relative error
    /// below 2e-7.
    #[inline(always)]
    fn exp2(self) -> Self {
        const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
        // written so that NaN passes
        let x = if self < -127.0 { -127.0 } else { self };
        let x = if x > 127.0 { 127.0 } else { x };
        let shifted = x + ROUND;
        let f = x - (shifted - ROUND);
        let mut p = 1.540_353e-4; // ln2^k / k!
        p = p * f + 1.333_355_8e-3;
        p = p * f + 9.618_129e-3;
        p = p * f + 5.550_411e-2;
        p = p * f + 2.402_265e-1;
        p = p * f + 6.931_472e-1;
        p = p * f + 1.0;
        // the low bits of `shifted` are n; n = -127 gives a zero scale
        let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32).wrapping_add(127) << 23;
        p * f32::from_bits(exponent as u32)
    }

    /// Rational approximation x P(x^2) / Q(x^2) on |x| <= 4 (the one of Eigen and XLA); its own
    /// error is 7e-8, with f32 rounding 5e-7.
    #[inline(always)]
    fn erf(self) -> Self {
        let x = if self < -4.0 { -4.0 } else { self };
        let x = if x > 4.0 { 4.0 } else { x };
        let t = x * x;
        let mut p = -2.726_142_3e-10;
        p = p * t + 2.770_681_4e-8;
        p = p * t - 2.101_024e-6;
        p = p * t - 5.692_506_4e-5;
        p = p * t - 7.349_906_3e-4;
        p = p * t - 2.954_6e-3;
        p = p * t - 1.609_603_3e-2;
        let mut q = -1.456_607_2e-5;
        q = q * t - 2.133_740_6e-4;
        q = q * t - 1.682_827e-3;
        q = q * t - 7.373_329_2e-3;
        q = q * t - 1.426_473_9e-2;
        x * p / q
    }

    type Vector<S: Simd> = S::f32s;
    #[inline(always)]
    fn splat<S: Simd>(simd: S, x: Self) -> S::f32s {
        simd.splat_f32s(x)
    }
    #[inline(always)]
    fn sum<S: Simd>(simd: S, a: S::f32s, b: S::f32s) -> S::f32s {
        simd.add_f32s(a, b)
    }
    #[inline(always)]
    fn mul_add<S: Simd>(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
        // without a vector unit, a fused multiply-add may be a library call
        if S::IS_SCALAR { simd.add_f32s(simd.mul_f32s(a, b), c) } else { simd.mul_add_e_f32s(a, b, c) }
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn exp2(self) -> Self {
        libm::exp2(self)
    }
    #[inline(always)]
    fn erf(self) -> Self {
        libm::erf(self)
    }

    type Vector<S: Simd> = S::f64s;
    #[inline(always)]
    fn splat<S: Simd>(simd: S, x: Self) -> S::f64s {
        simd.splat_f64s(x)
    }
    #[inline(always)]
    fn sum<S: Simd>(simd: S, a: S::f64s, b: S::f64s) -> S::f64s {
        simd.add_f64s(a, b)
    }
    #[inline(always)]
    fn mul_add<S: Simd>(simd: S, a: S::f64s, b: S::f64s, c: S::f64s) -> S::f64s {
        if S::IS_SCALAR { simd.add_f64s(simd.mul_f64s(a, b), c) } else { simd.mul_add_e_f64s(a, b, c) }
    }
}

/// Sum with 16 running sums, added up pairwise: vectorizes, and has the same order on every
/// machine.
#[inline(always)]
pub fn sum<T: Real>(n: usize, term: impl Fn(usize) -> T) -> T {
    let mut lanes = [T::ZERO; 16];
    let whole = n / 16 * 16;
    for i in (0..whole).step_by(16) {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += term(i + l);
        }
    }
    for i in whole..n {
        lanes[i - whole] += term(i);
    }
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f32_functions_agree_with_libm() {
        for i in -400_000..400_000 {
            let x = i as f32 * 3e-4;
            let truth = libm::exp2(f64::from(x));
            assert!((Real::exp2(x).f64() - truth).abs() <= 3e-7 * truth, "exp2({x})");
            let x = i as f32 * 2e-5;
            assert!((Real::erf(x).f64() - libm::erf(f64::from(x))).abs() <= 5e-7, "erf({x})");
        }
        assert!(Real::exp2(f32::NAN).is_nan() && Real::erf(f32::NAN).is_nan());
        assert_eq!(Real::exp2(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp2(-1e30f32), 0.0);
    }

    #[test]
    fn sums_every_term_once() {
        for n in 0..70 {
            assert_eq!(sum(n, |i| i as f64), (n * n.saturating_sub(1) / 2) as f64);
        }
    }
}
