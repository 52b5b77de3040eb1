//! The device that only counts.

use std::sync::{Mutex, PoisonError};

/// All that a plan asks of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Whether the ops are kernel launches: their scratch differs from the CPU's, and bags are
    /// copied to the device.
    pub runs_kernels: bool,
    /// Whether kernels of Hopper's own instructions run there.
    pub has_wgmma: bool,
}

/// Sums what the ops report; see [`crate::device::Device::dry`].
pub struct Dry {
    facts: Facts,
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
    /// For a device of which this is known.
    pub fn new(facts: Facts) -> Self {
        Self { facts, counts: Mutex::default() }
    }

    pub(crate) fn facts(&self) -> Facts {
        self.facts
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
