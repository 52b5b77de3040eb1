//! The device that only counts.

use std::sync::Mutex;

/// Sums the floating-point operations that the ops report; see [`crate::device::Device::Dry`].
#[derive(Default)]
pub struct Dry {
    flop: Mutex<f64>,
}

impl Dry {
    pub fn count(&self, flop: f64) {
        if let Ok(mut sum) = self.flop.lock() {
            *sum += flop;
        }
    }

    /// Floating-point operations counted so far (a multiply-add is two).
    pub fn flop(&self) -> f64 {
        self.flop.lock().map_or(0.0, |sum| *sum)
    }
}
