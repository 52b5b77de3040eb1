//! GELU in its exact form, x Φ(x) with the normal distribution function (Hendrycks & Gimpel 2016, eq. 1), and its recomputation.

use super::Dropout;
use crate::{
    Result,
    device::{Device, Element, Real, View, on_cpu},
};

#[inline(always)]
pub fn value<T: Real>(x: T) -> T {
    x * normal_cdf(x)
}

/// Φ(x) + x φ(x).
#[inline(always)]
pub fn derivative<T: Real>(x: T) -> T {
    let density = (x * x * T::of(-0.5 * std::f64::consts::LOG2_E)).exp2() * T::of(0.398_942_280_401_432_7);
    normal_cdf(x) + x * density
}

#[inline(always)]
fn normal_cdf<T: Real>(x: T) -> T {
    T::of(0.5) + T::of(0.5) * (x * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf()
}

/// out = dropout(gelu(pre)), both `[m, n]`: what the forward product's epilogue made of the pre-activation that it stored.
#[derive(Clone, Copy)]
pub struct Recompute<T> {
    pub pre: View<T>,
    pub dropout: Option<Dropout>,
    pub out: View<T>,
}

pub fn recompute<T: Element>(device: &Device, problems: &[Recompute<T>]) -> Result<()> {
    for p in problems {
        p.out.check("gelu recompute", "out", &[p.pre.rows(), p.pre.cols()])?;
    }
    if let Some(cpu) = device.cpu() {
        for Recompute { pre, dropout, out } in on_cpu::<_, Recompute<T::Sum>>(problems)? {
            super::for_rows(
                cpu,
                pre.rows(),
                #[inline(always)]
                |i| {
                    // SAFETY: the views are live, and each row is one task's.
                    let (pre, out) = unsafe { (pre.row(i), out.row_mut(i)) };
                    for (o, &x) in out.iter_mut().zip(pre) {
                        *o = value(x);
                    }
                    if let Some(dropout) = dropout {
                        dropout.apply(i, out);
                    }
                },
            );
        }
    }
    Ok(())
}
