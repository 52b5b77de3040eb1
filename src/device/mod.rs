//! Where tensors live and ops run.
//!
//! A [`Tensor`] owns a matrix on a device, and the ops' public functions take such matrices,
//! borrowed. The model's own code works on views, which have no lifetimes: `Buffer` owns memory,
//! `View` names a matrix inside it, `Arena` hands out the views of one training step. It is written
//! once over the ops; where it asks what a device is, it asks whether that runs kernels, since bags
//! are then copied to it.

mod arena;
pub mod cpu;
mod cuda;
mod dry;
mod element;
#[cfg(feature = "emulator")]
pub mod emulator;
mod fatbins;
mod graph;
mod launch;
mod pinned;
mod tensor;
mod view;

pub(crate) use arena::ALIGNMENT;
pub(crate) use arena::{Arena, Mark};
pub use cpu::{Cpu, Real};
pub use cuda::Cuda;
pub(crate) use cuda::{copy_by_all_threads, library_is_present};
pub use dry::{Dry, Facts};
pub use element::Element;
pub(crate) use element::{is_rounded, round, storage, widen};
pub use fatbins::{NVCC, fatbins};
pub use launch::Storage;
pub(crate) use launch::{Arg, Launch, Matrix, Stored};
pub(crate) use tensor::Operands;
pub use tensor::{Mat, MatMut, Tensor, Workspace};
pub(crate) use view::{Buffer, View};

use std::ops::Range;

use cudarc::driver::CudaEvent;

use crate::{Error, Result};

/// A place where ops run.
pub enum Device {
    /// All cores of this machine, with the widest instruction set that it has.
    Cpu(Cpu),
    /// An NVIDIA GPU.
    Cuda(Box<Cuda>),
    /// The CUDA kernels, run on the CPU thread by thread: for tests.
    #[cfg(feature = "emulator")]
    Emulator(emulator::Emulator),
    /// Nowhere: allocates addresses, counts floating-point operations, computes nothing. Plans are
    /// made with it.
    Dry(Dry),
}

/// A moment in a device's work.
pub(crate) enum Fence {
    /// Everything before has ended.
    Done,
    Cuda(CudaEvent),
    /// Launches before.
    #[cfg(feature = "emulator")]
    Emulator(usize),
}

impl Device {
    /// `auto` and `cpu` are the names that `--device` takes; `threads` = 0 means one for each core.
    pub fn from_name(name: &str, threads: usize) -> Result<Self> {
        match name {
            "auto" => Self::cuda().or_else(|_| Ok(Self::Cpu(Cpu::new(threads)?))),
            "cpu" => Ok(Self::Cpu(Cpu::new(threads)?)),
            "cuda" => Self::cuda(),
            #[cfg(feature = "emulator")]
            "emulator" => Ok(Self::Emulator(emulator::Emulator::new(Default::default()))),
            other => Err(Error::Usage(format!("--device {other}: expected auto, cpu or cuda"))),
        }
    }

    fn cuda() -> Result<Self> {
        Ok(Self::Cuda(Box::new(Cuda::new()?)))
    }

    /// A GPU by its number, in its primary context, all of whose work goes to `stream` (a `CUstream`
    /// or `cudaStream_t`; null is the default stream) in the order of the calls. Nothing waits for
    /// it but what says so.
    ///
    /// # Safety
    /// The stream must be one of that GPU's, and alive as long as this device.
    pub unsafe fn on_stream(ordinal: usize, stream: *mut std::ffi::c_void) -> Result<Self> {
        // SAFETY: the caller's.
        Ok(Self::Cuda(Box::new(unsafe { Cuda::on_stream(ordinal, stream.cast()) }?)))
    }

    /// The number of the GPU; None of another device.
    pub fn gpu(&self) -> Option<usize> {
        if let Self::Cuda(cuda) = self { Some(cuda.ordinal()) } else { None }
    }

    /// What reports call it: "cpu, AVX-512", or a GPU's name.
    pub fn description(&self) -> String {
        match self {
            Self::Cpu(cpu) => format!("cpu, {}, {} threads", cpu.instruction_set(), cpu.threads()),
            Self::Cuda(cuda) => cuda.name().into(),
            #[cfg(feature = "emulator")]
            Self::Emulator(_) => "emulator".into(),
            Self::Dry(_) => "plan".into(),
        }
    }

    /// What plans for this device depend on.
    pub fn facts(&self) -> Facts {
        Facts { runs_kernels: self.runs_kernels(), has_wgmma: self.has_wgmma() }
    }

    /// A device that plans what this one will do.
    pub fn dry(&self) -> Self {
        Self::Dry(Dry::new(self.facts()))
    }

    /// Whether the ops are kernel launches here: their scratch differs from the CPU's, and bags are
    /// copied to the device.
    pub fn runs_kernels(&self) -> bool {
        match self {
            Self::Cpu(_) => false,
            Self::Cuda(_) => true,
            #[cfg(feature = "emulator")]
            Self::Emulator(_) => true,
            Self::Dry(dry) => dry.facts().runs_kernels,
        }
    }

    /// Whether kernels of Hopper's own instructions run here.
    pub fn has_wgmma(&self) -> bool {
        match self {
            Self::Cuda(cuda) => cuda.capability() == (9, 0),
            #[cfg(feature = "emulator")]
            Self::Emulator(_) => true,
            Self::Dry(dry) => dry.facts().has_wgmma,
            Self::Cpu(_) => false,
        }
    }

    /// Whether its memory is the host's.
    pub(crate) fn is_host(&self) -> bool {
        !matches!(self, Self::Cuda(_) | Self::Dry(_))
    }

    pub(crate) fn is_dry(&self) -> bool {
        matches!(self, Self::Dry(_))
    }

    pub(crate) fn cpu(&self) -> Option<&Cpu> {
        if let Self::Cpu(cpu) = self { Some(cpu) } else { None }
    }

    /// Counts an op's floating-point operations in a plan.
    pub(crate) fn count(&self, flop: f64) {
        if let Self::Dry(dry) = self {
            dry.count(flop);
        }
    }

    /// Runs an op where the ops of this device run: `cpu`, or the launches of `kernels`, which a
    /// plan counts. Their memory must be this device's.
    pub(crate) fn run<L: IntoIterator<Item = Launch>>(
        &self,
        cpu: impl FnOnce(&Cpu),
        kernels: impl FnOnce() -> Result<L>,
    ) -> Result<()> {
        if self.runs_kernels() {
            return self.launch(kernels()?);
        }
        if let Some(device) = self.cpu() {
            cpu(device);
        }
        Ok(())
    }

    /// [`Device::run`] for an op that takes scratch from the arena. Each way takes its own, in a
    /// plan too, and answers with its work; the scratch is given back when that has been started.
    pub(crate) fn run_with_scratch<W: FnOnce(&Cpu), L: IntoIterator<Item = Launch>>(
        &self,
        arena: &mut Arena,
        cpu: impl FnOnce(&mut Arena) -> Result<W>,
        kernels: impl FnOnce(&mut Arena) -> Result<L>,
    ) -> Result<()> {
        let mark = arena.mark();
        if self.runs_kernels() {
            self.launch(kernels(arena)?)?;
        } else {
            let work = cpu(arena)?;
            if let Some(device) = self.cpu() {
                work(device);
            }
        }
        arena.release_scratch(mark);
        Ok(())
    }

    /// Runs kernels one after another. The launches' addresses must be this device's memory.
    pub(crate) fn launch(&self, launches: impl IntoIterator<Item = Launch>) -> Result<()> {
        for launch in launches {
            match self {
                Self::Cpu(_) => {
                    return Err(Error::Device(format!("{}: kernels do not run on the CPU", launch.symbol())));
                }
                Self::Cuda(cuda) => cuda.launch(launch)?,
                #[cfg(feature = "emulator")]
                Self::Emulator(emulator) => emulator.launch(launch),
                Self::Dry(dry) => dry.launch(launch),
            }
        }
        Ok(())
    }

    /// Starts the kernels that `work` launches together, where the device can.
    pub(crate) fn together<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        if let Self::Cuda(cuda) = self { cuda.together(work)? } else { work() }
    }

    /// Zeroed memory.
    pub(crate) fn alloc(&self, bytes: usize) -> Result<Buffer> {
        self.finish_emulated()?;
        match self {
            Self::Cpu(_) => Buffer::host(bytes),
            Self::Cuda(cuda) => Buffer::cuda(cuda, bytes),
            #[cfg(feature = "emulator")]
            Self::Emulator(emulator) => Buffer::emulator(bytes, emulator.race()),
            Self::Dry(_) => Ok(Buffer::imaginary(bytes)),
        }
    }

    /// Zeroed memory, small, that kernels write and the host reads without a copy, by
    /// [`Device::peek`].
    pub(crate) fn alloc_shared(&self, bytes: usize) -> Result<Buffer> {
        if let Self::Cuda(cuda) = self { Buffer::cuda_shared(cuda, bytes) } else { self.alloc(bytes) }
    }

    /// What a buffer of [`Device::alloc_shared`] holds. Whoever writes it must have been waited
    /// for.
    pub(crate) fn peek(&self, from: &Buffer) -> Result<Vec<u8>> {
        from.peek().ok_or_else(|| Error::Device("peek: this is memory of the GPU".into()))
    }

    /// Fills a row of a buffer of [`Device::alloc_shared`]. Whoever reads it must have been waited
    /// for.
    pub(crate) fn poke<T: Element>(&self, values: &[T], buffer: &Buffer, to: View<T>) -> Result<()> {
        buffer.poke(values, to).ok_or_else(|| Error::Device("poke: this is memory of the GPU".into()))
    }

    /// Waits until all launches so far have ended.
    pub fn synchronize(&self) -> Result<()> {
        self.finish_emulated()?;
        if let Self::Cuda(cuda) = self { cuda.synchronize() } else { Ok(()) }
    }

    /// The emulator's launches come first wherever the host looks at its memory, or frees some.
    fn finish_emulated(&self) -> Result<()> {
        #[cfg(feature = "emulator")]
        if let Self::Emulator(emulator) = self {
            return emulator.finish(None);
        }
        Ok(())
    }

    /// All work started so far.
    pub(crate) fn fence(&self) -> Result<Fence> {
        Ok(match self {
            Self::Cuda(cuda) => Fence::Cuda(cuda.fence()?),
            #[cfg(feature = "emulator")]
            Self::Emulator(emulator) => Fence::Emulator(emulator.launched()),
            Self::Cpu(_) | Self::Dry(_) => Fence::Done,
        })
    }

    /// Waits until the work before a fence has ended.
    pub(crate) fn wait(&self, fence: &Fence) -> Result<()> {
        match (self, fence) {
            (Self::Cuda(cuda), Fence::Cuda(event)) => cuda.wait(event),
            #[cfg(feature = "emulator")]
            (Self::Emulator(emulator), Fence::Emulator(launches)) => emulator.finish(Some(*launches)),
            _ => Ok(()),
        }
    }

    /// Fills a whole buffer.
    pub(crate) fn write(&self, bytes: &[u8], to: &Buffer) -> Result<()> {
        assert_eq!(bytes.len(), to.bytes());
        self.finish_emulated()?;
        match self {
            Self::Cuda(cuda) => cuda.upload(bytes, to.address())?,
            Self::Dry(_) => {}
            // SAFETY: a buffer of the host, of this length, which no op uses now.
            _ => unsafe { (to.address() as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) },
        }
        Ok(())
    }

    /// A whole buffer's bytes; zeros on `Dry`.
    pub(crate) fn read(&self, from: &Buffer) -> Result<Vec<u8>> {
        self.finish_emulated()?;
        let mut bytes = vec![0; from.bytes()];
        match self {
            Self::Cuda(cuda) => cuda.download(from.address(), &mut bytes)?,
            Self::Dry(_) => {}
            // SAFETY: as above.
            _ => unsafe { (from.address() as *const u8).copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) },
        }
        Ok(bytes)
    }

    /// Copies `data` to the device, row by row.
    pub(crate) fn upload<T: Element>(&self, data: &[T], to: View<T>) -> Result<()> {
        if data.len() != to.rows() * to.cols() {
            let (got, expected) = (vec![data.len()], vec![to.rows(), to.cols()]);
            return Err(Error::Shape { op: "upload", tensor: "data".into(), got, expected });
        }
        self.finish_emulated()?;
        let rows = data.chunks_exact(to.cols().max(1)).enumerate();
        if let Self::Cuda(cuda) = self {
            if to.stride() == to.cols() {
                return cuda.upload(bytemuck::cast_slice(data), to.address());
            }
            for (i, row) in rows {
                cuda.upload(bytemuck::cast_slice(row), to.rows_range(i..i + 1).address())?;
            }
        } else if !self.is_dry() {
            for (i, row) in rows {
                // SAFETY: `to` lies in a live buffer of this device, and nothing else runs on it.
                unsafe { to.row_mut(i) }.copy_from_slice(row);
            }
        }
        Ok(())
    }

    /// Fills a matrix without gaps between its rows by `write`, which gets some rows' range and
    /// memory for them at a time. Work started later finds it filled; it is written to as soon as
    /// the work before `after` has ended, while later work may still run.
    pub(crate) fn fill<T: Element>(
        &self,
        to: View<T>,
        after: &Fence,
        mut write: impl FnMut(Range<usize>, &mut [T]) -> Result<()>,
    ) -> Result<()> {
        let row = to.cols() * size_of::<T>();
        match (self, after) {
            (Self::Cuda(cuda), Fence::Cuda(after)) => {
                cuda.fill(to.address(), to.rows() * row, row, after, |bytes, out| {
                    write(bytes.start / row..bytes.end / row, bytemuck::cast_slice_mut(out))
                })
            }
            (Self::Dry(_), _) => Ok(()),
            _ => {
                self.wait(after)?;
                // SAFETY: `to` lies in a live buffer of this device, and nothing else runs on it.
                write(0..to.rows(), unsafe { to.slice_mut() })
            }
        }
    }

    /// Copies a view back, row by row; zeros on `Dry`.
    pub(crate) fn download<T: Element>(&self, from: View<T>) -> Result<Vec<T>> {
        self.finish_emulated()?;
        Ok(match self {
            Self::Dry(_) => vec![T::default(); from.rows() * from.cols()],
            Self::Cuda(cuda) => {
                let mut data = vec![T::default(); from.rows() * from.cols()];
                for (i, row) in data.chunks_exact_mut(from.cols().max(1)).enumerate() {
                    cuda.download(from.rows_range(i..i + 1).address(), bytemuck::cast_slice_mut(row))?;
                }
                data
            }
            // SAFETY: as in `upload`.
            _ => (0..from.rows()).flat_map(|i| unsafe { from.row(i) }.iter().copied()).collect(),
        })
    }

    /// Runs `work` on this device's threads, so that the ops inside need not hand over one by one.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match self.cpu() {
            Some(cpu) => cpu.install(work),
            None => work(),
        }
    }
}
