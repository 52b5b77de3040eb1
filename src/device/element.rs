//! What a tensor's elements may be: the type that numbers are stored in, apart from the type that
//! arithmetic is done in.

use std::any::TypeId;

use bytemuck::Pod;
use half::bf16;

use super::{
    Real, Storage, Stored,
    cpu::factor::{Packs, Pair},
};
use crate::{Error, Result};

/// How activations and weights are stored. Statistics, gradients of parameters and master weights
/// are of type [`Element::Sum`].
pub trait Element: Pod + Default + Send + Sync + PartialEq + std::fmt::Debug {
    /// The type that sums are kept in: bf16's is f32, that of f32 and f64 the type itself.
    type Sum: Real + Packs<Self> + Packs<Self::Sum>;
    /// What a CPU with a dot instruction multiplies: pairs of bf16, or the numbers themselves.
    #[doc(hidden)]
    type Dot: Packs<Self> + Packs<Self::Sum>;
    /// The kernels compiled for this type; f64 has none.
    const KERNELS: Option<Storage>;
    /// The nearest number of this type.
    fn from_sum(x: Self::Sum) -> Self;
    /// The same number, as sums are kept.
    fn to_sum(self) -> Self::Sum;
}

impl Element for f32 {
    type Sum = f32;
    type Dot = f32;
    const KERNELS: Option<Storage> = Some(<Self as Stored>::STORAGE);
    #[inline(always)]
    fn from_sum(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn to_sum(self) -> f32 {
        self
    }
}

impl Element for f64 {
    type Sum = f64;
    type Dot = f64;
    const KERNELS: Option<Storage> = None;
    #[inline(always)]
    fn from_sum(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn to_sum(self) -> f64 {
        self
    }
}

impl Element for bf16 {
    type Sum = f32;
    type Dot = Pair;
    const KERNELS: Option<Storage> = Some(<Self as Stored>::STORAGE);
    /// To the nearest, to even between two. Without branches, so that loops over it vectorize.
    #[inline(always)]
    fn from_sum(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        Self::from_bits(if x.is_nan() { bits >> 16 | 0x40 } else { rounded } as u16)
    }
    #[inline(always)]
    fn to_sum(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// Whether a sum loses digits when it is stored as a `T`.
pub(crate) fn is_rounded<T: Element>() -> bool {
    TypeId::of::<T>() != TypeId::of::<T::Sum>()
}

/// Writes stored numbers as sums are kept.
#[inline(always)]
pub(crate) fn widen<T: Element>(from: &[T], to: &mut [T::Sum]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.to_sum();
    }
}

/// Stores sums.
#[inline(always)]
pub(crate) fn round<T: Element>(from: &[T::Sum], to: &mut [T]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = T::from_sum(from);
    }
}

/// The kernels for `T`.
pub(crate) fn storage<T: Element>() -> Result<Storage> {
    T::KERNELS.ok_or_else(|| Error::Usage("f64 is for the CPU: kernels store f32 or bf16".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_half_does() {
        let odd =
            [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x1_8000, 0x7f7f_8000, 0x7f80_0000, 0x7fc0_0001, 0x7f80_0001];
        let numbers = (0..1u32 << 16).map(|i| i << 16 | i.wrapping_mul(0x9E37) & 0xffff).chain(odd);
        for x in numbers.flat_map(|bits| [f32::from_bits(bits), -f32::from_bits(bits)]) {
            assert_eq!(bf16::from_sum(x).to_bits(), bf16::from_f32(x).to_bits(), "{x:e}");
            let stored = bf16::from_f32(x);
            assert!(stored.to_sum() == stored.to_f32() || x.is_nan() && stored.to_sum().is_nan());
        }
    }
}
