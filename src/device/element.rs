//! What a tensor's elements may be.

use std::any::Any;

use bytemuck::Pod;
use half::bf16;

use super::{Real, Storage, Stored};
use crate::{Error, Result};

/// How activations and weights are stored. Statistics, gradients of parameters and master weights
/// are of type [`Element::Sum`].
pub trait Element: Pod + Default + Send + Sync + PartialEq + std::fmt::Debug {
    /// The type that sums are kept in: bf16's is f32, that of f32 and f64 the type itself.
    type Sum: Real;
    /// The kernels compiled for this type; f64 has none.
    const KERNELS: Option<Storage>;
    /// The nearest number of this type.
    fn from_sum(x: Self::Sum) -> Self;
    /// The same number, as sums are kept.
    fn to_sum(self) -> Self::Sum;
}

impl Element for f32 {
    type Sum = f32;
    const KERNELS: Option<Storage> = Some(<Self as Stored>::STORAGE);
    fn from_sum(x: f32) -> Self {
        x
    }
    fn to_sum(self) -> f32 {
        self
    }
}

impl Element for f64 {
    type Sum = f64;
    const KERNELS: Option<Storage> = None;
    fn from_sum(x: f64) -> Self {
        x
    }
    fn to_sum(self) -> f64 {
        self
    }
}

impl Element for bf16 {
    type Sum = f32;
    const KERNELS: Option<Storage> = Some(<Self as Stored>::STORAGE);
    fn from_sum(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn to_sum(self) -> f32 {
        self.to_f32()
    }
}

/// A list of problems over `T` as the same list over `T::Sum`, which is what the CPU computes in:
/// the two are one type, or it is an error.
pub(crate) fn on_cpu<P: Copy + 'static, Q: Copy + 'static>(problems: &[P]) -> Result<Vec<Q>> {
    let problems: Box<dyn Any> = Box::new(problems.to_vec());
    let same = problems.downcast::<Vec<Q>>();
    same.map(|problems| *problems)
        .map_err(|_| Error::Usage("bf16 is for the kernels of a GPU: the CPU computes in f32".into()))
}

/// The kernels for `T`.
pub(crate) fn storage<T: Element>() -> Result<Storage> {
    T::KERNELS.ok_or_else(|| Error::Usage("f64 is for the CPU: kernels store f32 or bf16".into()))
}
