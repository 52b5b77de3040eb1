//! One step's memory: a buffer used as two stacks.
//!
//! `saved` grows up from the bottom during forward and is popped during backward; `scratch` grows
//! down from the top and is released by the op or block that took it. A step takes no activation
//! from anywhere else. (The CPU keeps some packed panels besides, a few MiB a thread, from op to
//! op.)

use super::{Buffer, Device, Element, View};
use crate::{Error, Result};

/// Every view starts on a boundary of this many bytes (a GPU's widest access, and a multiple of a
/// cache line).
pub(crate) const ALIGNMENT: usize = 256;

pub(crate) struct Arena {
    buffer: Buffer,
    saved: usize,
    scratch: usize,
    peak: usize,
    saved_at_peak: usize,
}

/// A height of both stacks, to go back to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark {
    saved: usize,
    scratch: usize,
}

impl Arena {
    pub(crate) fn new(device: &Device, bytes: usize) -> Result<Self> {
        let bytes = bytes.next_multiple_of(ALIGNMENT);
        Ok(Self { buffer: device.alloc(bytes)?, saved: 0, scratch: bytes, peak: 0, saved_at_peak: 0 })
    }

    /// As large as anything could ask for; only for [`Device::Dry`], which backs it with nothing.
    pub(crate) fn unlimited() -> Self {
        Self { buffer: Buffer::imaginary(1 << 56), saved: 0, scratch: 1 << 56, peak: 0, saved_at_peak: 0 }
    }

    /// What a matrix takes.
    pub(crate) fn matrix_bytes<T>(rows: usize, cols: usize) -> Result<usize> {
        bytes::<T>(rows, cols)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.buffer.bytes()
    }

    /// The largest sum of both stacks so far, in bytes: what an arena must hold for the same step.
    pub(crate) fn peak(&self) -> usize {
        self.peak
    }

    /// The saved stack's share of [`Arena::peak`].
    pub(crate) fn saved_at_peak(&self) -> usize {
        self.saved_at_peak
    }

    /// A matrix that lives until its mark is released in backward. Its content is whatever was
    /// there before.
    pub(crate) fn save<T: Element>(&mut self, rows: usize, cols: usize) -> Result<View<T>> {
        let bytes = bytes::<T>(rows, cols)?;
        let at = self.saved;
        self.saved += bytes;
        self.grown(bytes)?;
        Ok(View::new(self.buffer.address() as usize + at, rows, cols))
    }

    /// A matrix that lives until the op or block that took it releases its mark.
    pub(crate) fn scratch<T: Element>(&mut self, rows: usize, cols: usize) -> Result<View<T>> {
        let bytes = bytes::<T>(rows, cols)?;
        self.scratch = self.scratch.wrapping_sub(bytes);
        self.grown(bytes)?;
        Ok(View::new(self.buffer.address() as usize + self.scratch, rows, cols))
    }

    fn grown(&mut self, bytes: usize) -> Result<()> {
        let total = self.buffer.bytes();
        if self.scratch > total || self.saved > self.scratch {
            return Err(Error::Device(format!(
                "the step's arena of {total} bytes is too small for another {bytes} bytes; please report this as a bug in the memory plan"
            )));
        }
        let now = self.saved + total - self.scratch;
        if now > self.peak {
            (self.peak, self.saved_at_peak) = (now, self.saved);
        }
        Ok(())
    }

    pub(crate) fn mark(&self) -> Mark {
        Mark { saved: self.saved, scratch: self.scratch }
    }

    /// Pops the scratch stack back to the mark; saved matrices stay.
    pub(crate) fn release_scratch(&mut self, mark: Mark) {
        debug_assert!(self.scratch <= mark.scratch);
        self.scratch = mark.scratch;
    }

    /// Pops the saved stack back to the mark.
    pub(crate) fn release_saved(&mut self, mark: Mark) {
        debug_assert!(self.saved >= mark.saved);
        self.saved = mark.saved;
    }

    /// Empties both stacks.
    pub(crate) fn reset(&mut self) {
        (self.saved, self.scratch) = (0, self.buffer.bytes());
    }
}

/// Bytes of a matrix, rounded up to the alignment.
fn bytes<T>(rows: usize, cols: usize) -> Result<usize> {
    let bytes = rows.checked_mul(cols).and_then(|len| len.checked_mul(size_of::<T>()));
    let bytes = bytes.and_then(|bytes| bytes.checked_next_multiple_of(ALIGNMENT));
    bytes.ok_or_else(|| Error::Device(format!("a matrix of {rows} x {cols} does not fit any memory")))
}
