//! The device that only counts.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Launch;

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
    /// Every launch, where they are kept.
    launches: Option<Mutex<Vec<Launch>>>,
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
        Self { facts, counts: Mutex::default(), launches: None }
    }

    /// One that keeps the launches too.
    pub(crate) fn keeping_launches(facts: Facts) -> Self {
        Self { launches: Some(Mutex::default()), ..Self::new(facts) }
    }

    pub(crate) fn facts(&self) -> Facts {
        self.facts
    }

    pub(crate) fn count(&self, flop: f64) {
        lock(&self.counts).flop += flop;
    }

    pub(crate) fn launch(&self, launch: Launch) {
        lock(&self.counts).launches += 1;
        if let Some(launches) = &self.launches {
            lock(launches).push(launch);
        }
    }

    /// All so far.
    pub(crate) fn counts(&self) -> Counts {
        *lock(&self.counts)
    }

    /// Those that were kept.
    pub(crate) fn launches(&self) -> Vec<Launch> {
        self.launches.as_ref().map_or_else(Vec::new, |launches| lock(launches).clone())
    }
}

fn lock<T>(counts: &Mutex<T>) -> MutexGuard<'_, T> {
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}
