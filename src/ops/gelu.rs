//! GELU in its exact form, x Φ(x) with the normal distribution function (Hendrycks & Gimpel 2016,
//! eq. 1).

use crate::device::Real;

#[inline(always)]
pub(crate) fn value<T: Real>(x: T) -> T {
    x * normal_cdf(x)
}

/// Φ(x) + x φ(x).
#[inline(always)]
pub(crate) fn derivative<T: Real>(x: T) -> T {
    let density = (x * x * T::of(-0.5 * std::f64::consts::LOG2_E)).exp2() * T::of(0.398_942_280_401_432_7);
    normal_cdf(x) + x * density
}

#[inline(always)]
fn normal_cdf<T: Real>(x: T) -> T {
    T::of(0.5) + T::of(0.5) * (x * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf()
}
