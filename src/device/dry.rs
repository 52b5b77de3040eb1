//! The device that only counts.

use std::sync::{Mutex, PoisonError};

/// Sums what the ops report; see [`crate::device::Device::dry`].
pub struct Dry {
    kernels: bool,
    counts: Mutex<Counts>,
}

/// What a pass took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// Floating-point operations (a multiply-add is two).
    pub flop: f64,
    pub launches: usize,
}

impl Dry {
    /// `kernels`: plan for a device that runs kernels.
    pub fn new(kernels: bool) -> Self {
        Self { kernels, counts: Mutex::default() }
    }

    pub(crate) fn plans_kernels(&self) -> bool {
        self.kernels
    }

    pub(crate) fn count(&self, flop: f64) {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).flop += flop;
    }

    pub(crate) fn count_launch(&self) {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).launches += 1;
    }

    /// All so far.
    pub(crate) fn counts(&self) -> Counts {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
