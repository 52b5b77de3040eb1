//! Where tensors live and ops run.
//!
//! A [`Buffer`] owns memory of one device, a [`View`] names a matrix inside it, an [`Arena`] hands out the views of one
//! training step. Model code is written once over the ops and never asks which device it runs on.

mod arena;
pub mod cpu;
mod dry;
#[cfg(feature = "emulator")]
pub mod emulator;
mod fatbins;
mod launch;
mod view;

pub use arena::{Arena, Mark};
pub use cpu::{Cpu, Real};
pub use dry::Dry;
pub use fatbins::{NVCC, fatbins};
pub use launch::{Arg, Launch, Matrix, Storage, Stored};
pub use view::{Buffer, View};

use crate::{Error, Result};

/// A place where ops run.
pub enum Device {
    /// All cores of this machine, with the widest instruction set that it has.
    Cpu(Cpu),
    /// Nowhere: allocates addresses, counts floating-point operations, computes nothing. Plans are made with it.
    Dry(Dry),
}

impl Device {
    /// `auto` and `cpu` are the names that `--device` takes; `threads` = 0 means one for each core.
    pub fn from_name(name: &str, threads: usize) -> Result<Self> {
        match name {
            "auto" | "cpu" => Ok(Self::Cpu(Cpu::new(threads)?)),
            "cuda" => Err(Error::Device(
                "--device cuda: this build has no CUDA kernels yet; use --device cpu, or leave --device out".into(),
            )),
            other => Err(Error::Usage(format!("--device {other}: expected auto or cpu"))),
        }
    }

    pub fn dry() -> Self {
        Self::Dry(Dry::default())
    }

    /// Zeroed memory.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer> {
        match self {
            Self::Cpu(_) => Buffer::host(bytes),
            Self::Dry(_) => Ok(Buffer::imaginary(bytes)),
        }
    }

    /// Copies `data` to the device, row by row.
    pub fn upload<T: Real>(&self, data: &[T], to: View<T>) -> Result<()> {
        if data.len() != to.rows() * to.cols() {
            let (got, expected) = (vec![data.len()], vec![to.rows(), to.cols()]);
            return Err(Error::Shape { op: "upload", tensor: "data".into(), got, expected });
        }
        if let Self::Cpu(_) = self {
            for (i, row) in data.chunks_exact(to.cols().max(1)).enumerate() {
                // SAFETY: `to` lies in a live buffer of this device, and nothing else runs on it.
                unsafe { to.row_mut(i) }.copy_from_slice(row);
            }
        }
        Ok(())
    }

    /// Copies a view back, row by row; zeros on `Dry`.
    pub fn download<T: Real>(&self, from: View<T>) -> Vec<T> {
        match self {
            // SAFETY: as in `upload`.
            Self::Cpu(_) => (0..from.rows()).flat_map(|i| unsafe { from.row(i) }.iter().copied()).collect(),
            Self::Dry(_) => vec![T::ZERO; from.rows() * from.cols()],
        }
    }

    /// Runs `work` on this device's threads, so that the ops inside need not hand over one by one.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match self {
            Self::Cpu(cpu) => cpu.install(work),
            Self::Dry(_) => work(),
        }
    }
}
