//! An NVIDIA GPU through cudarc: one stream for kernels, one for copies to the device, kernels
//! looked up once, no allocation but [`Cuda::alloc`].
//!
//! NOT YET RUN ON A GPU. The kernels are proven on the emulator, this file under a driver whose GPU
//! is the emulator (tests/cuda.rs).

use std::{
    collections::HashMap,
    ffi::CStr,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, ThreadId},
};

use cudarc::{
    driver::{
        CudaContext, CudaEvent, CudaFunction, CudaModule, CudaSlice, CudaStream, DriverError, result,
        sys::{self, CUfunction_attribute_enum, CUresult},
    },
    nvrtc::Ptx,
};
use rayon::prelude::*;

use super::{
    Launch, Storage,
    fatbins::fatbins,
    graph::{Graphs, arguments},
    pinned::{HALF, PageLocked, Pinned},
};
use crate::{Error, Result};

/// The oldest that the kernels run on (Ampere: cp.async, bf16 and TF32 tensor cores).
const OLDEST: (i32, i32) = (8, 0);

/// Elements that one thread copies at a time.
const COPIED: usize = 1 << 19;

/// An NVIDIA GPU.
pub struct Cuda {
    /// Made by the first copy to the device.
    pinned: Mutex<Option<Pinned>>,
    /// Gone before the modules, whose kernels they hold.
    graphs: Mutex<Graphs>,
    context: Arc<CudaContext>,
    /// Kernels, and copies to the host.
    stream: Arc<CudaStream>,
    /// Copies to the device.
    copies: Arc<CudaStream>,
    modules: Vec<Arc<CudaModule>>,
    functions: Mutex<HashMap<(&'static str, Storage), CudaFunction>>,
    /// Of the threads that are inside [`Cuda::together`], what they launched.
    held: Mutex<HashMap<ThreadId, Vec<Launch>>>,
    /// What was launched last, for the message when the device reports an error later.
    last: Mutex<Option<Launch>>,
    name: String,
    capability: (i32, i32),
}

impl Cuda {
    /// Of the GPUs that the driver shows (CUDA_VISIBLE_DEVICES chooses) the first, or that of this
    /// process's number on its machine, with a stream of its own.
    pub(crate) fn new() -> Result<Self> {
        let number = local_rank(|name| std::env::var(name).ok());
        Self::open(|devices| number % devices, |context| context.new_stream())
    }

    /// A GPU by its number, for work on a stream of somebody else's: of the GPU's primary context;
    /// null is the default stream.
    ///
    /// # Safety
    /// The stream must be alive as long as this device.
    pub(crate) unsafe fn on_stream(ordinal: usize, stream: sys::CUstream) -> Result<Self> {
        // SAFETY: the caller's.
        Self::open(|_| ordinal, |context| Ok(unsafe { context.wrap_borrowed_stream(stream) }))
    }

    fn open(
        ordinal: impl FnOnce(usize) -> usize,
        stream: impl FnOnce(&Arc<CudaContext>) -> Result<Arc<CudaStream>, DriverError>,
    ) -> Result<Self> {
        if fatbins().is_empty() {
            return Err(Error::Device(
                "--device cuda: this program was built without CUDA kernels: run scripts/cuda-toolchain.sh (or set CUDA_HOME to a \
                 CUDA 13 toolkit), build again, or use --device cpu"
                    .into(),
            ));
        }
        if !library_is_present(if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so", "libcuda.so.1"] }) {
            return Err(Error::Device(
                "--device cuda: there is no NVIDIA driver on this machine (libcuda was not found); use --device cpu"
                    .into(),
            ));
        }
        let failed = |what: &str, e: DriverError| Error::Device(format!("--device cuda: {what}: {}", reason(e)));
        let devices = CudaContext::device_count().map_err(|e| failed("the NVIDIA driver does not start", e))?;
        let devices = devices.max(0) as usize;
        if devices == 0 {
            return Err(Error::Device("--device cuda: the NVIDIA driver shows no GPU; use --device cpu".into()));
        }
        let ordinal = ordinal(devices);
        if ordinal >= devices {
            return Err(Error::Device(format!("GPU {ordinal}: the NVIDIA driver shows {devices}, numbered from 0")));
        }
        let context = CudaContext::new(ordinal).map_err(|e| failed("the GPU cannot be opened", e))?;
        let name = context.name().map_err(|e| failed("the GPU has no name", e))?;
        let capability = context.compute_capability().map_err(|e| failed("the GPU has no compute capability", e))?;
        if capability < OLDEST {
            let message = format!(
                "--device cuda: {name} has compute capability {}.{}, the kernels need {}.{} (Ampere) or newer; use --device cpu",
                capability.0, capability.1, OLDEST.0, OLDEST.1
            );
            return Err(Error::Device(message));
        }
        // SAFETY: nothing has been allocated yet; `fill` orders the two streams.
        unsafe { context.disable_event_tracking() };
        let stream = stream(&context).map_err(|e| failed("no stream", e))?;
        let copies = context.new_stream().map_err(|e| failed("no stream", e))?;
        let load = |(file, fatbin): &(&str, &[u8])| {
            let module = context.load_module(Ptx::from_binary(fatbin.to_vec()));
            module.map_err(|e| failed(&format!("the kernels of {file} do not load on {name}"), e))
        };
        let modules = fatbins().iter().map(load).collect::<Result<_>>()?;
        let (pinned, functions, held, graphs, last) = Default::default();
        Ok(Self { pinned, graphs, context, stream, copies, modules, functions, held, last, name, capability })
    }

    /// The GPU's name, as the driver tells it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Its compute capability.
    pub(crate) fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// The number of the GPU, as the driver counts.
    pub(crate) fn ordinal(&self) -> usize {
        self.context.ordinal()
    }

    /// Zeroed device memory. What is made inside [`Cuda::together`] may be gone before its end, and
    /// so nothing is held back any more.
    pub(crate) fn alloc(&self, bytes: usize) -> Result<CudaSlice<u8>> {
        self.start_held()?;
        self.held().remove(&thread::current().id());
        self.stream.alloc_zeros(bytes.max(1)).map_err(|e| {
            if e.0 != CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return self.failed("allocating memory", e);
            }
            let (free, total) = self.context.mem_get_info().unwrap_or_default();
            let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
            Error::Device(format!(
                "{}: {:.2} GiB are needed, {:.2} of {:.2} GiB are free; a smaller --memory-budget, or --device cpu, may do",
                self.name,
                gib(bytes),
                gib(free),
                gib(total)
            ))
        })
    }

    /// Page-locked memory of the host, zeroed, which kernels reach at the same address.
    pub(super) fn alloc_page_locked(&self, bytes: usize) -> Result<PageLocked> {
        PageLocked::new(&self.context, bytes.max(1)).map_err(|e| self.failed("allocating page-locked memory", e))
    }

    /// Starts a kernel, or holds it back for the graph that this thread is putting together.
    pub(crate) fn launch(&self, launch: Launch) -> Result<()> {
        if let Some(held) = self.held().get_mut(&thread::current().id()) {
            held.push(launch);
            return Ok(());
        }
        self.start(launch)
    }

    fn start(&self, launch: Launch) -> Result<()> {
        let function = self.function(&launch)?;
        self.bind()?;
        let [grid, block] = [launch.grid, launch.block].map(|[x, y, z]| (x, y, z));
        // SAFETY: the arguments outlive the call, which copies them; that they fit the kernel is
        // checked by the emulator's tests.
        let launched = unsafe {
            result::launch_kernel(
                function.cu_function(),
                grid,
                block,
                launch.shared_bytes,
                self.stream.cu_stream(),
                &mut arguments(&launch),
            )
        };
        launched.map_err(|e| Error::Device(format!("{}: {} failed: {}", self.name, describe(&launch), reason(e))))?;
        *self.last() = Some(launch);
        Ok(())
    }

    /// Starts the kernels that `work` launches as one graph, at its end or where it looks at the
    /// device. With CUDA_LAUNCH_BLOCKING=1 each kernel is started, and waited for, by itself.
    pub(crate) fn together<R>(&self, work: impl FnOnce() -> R) -> Result<R> {
        struct Ended<'a>(&'a Cuda);
        impl Drop for Ended<'_> {
            fn drop(&mut self) {
                self.0.held().remove(&thread::current().id());
            }
        }
        if std::env::var_os("CUDA_LAUNCH_BLOCKING").is_some_and(|value| value == "1") {
            return Ok(work());
        }
        self.held().insert(thread::current().id(), Vec::new());
        let ended = Ended(self); // by a panic too
        let result = work();
        self.start_held()?;
        drop(ended);
        Ok(result)
    }

    /// What comes after this call comes after all launches of this thread.
    fn start_held(&self) -> Result<()> {
        let launches = self.held().get_mut(&thread::current().id()).map(std::mem::take).unwrap_or_default();
        let Some(last) = launches.last().cloned() else { return Ok(()) };
        let functions = launches.iter().map(|launch| self.function(launch)).collect::<Result<Vec<_>>>()?;
        self.bind()?;
        let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: that the arguments fit the kernels is checked by the emulator's tests.
        let started = unsafe { graphs.start(&self.context, self.stream.cu_stream(), launches, &functions) };
        started.map_err(|e| self.failed(&format!("starting {} kernels as a graph", functions.len()), e))?;
        *self.last() = Some(last);
        Ok(())
    }

    fn held(&self) -> MutexGuard<'_, HashMap<ThreadId, Vec<Launch>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn last(&self) -> MutexGuard<'_, Option<Launch>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kernel, from whichever module has it.
    fn function(&self, launch: &Launch) -> Result<CudaFunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (launch.kernel, launch.storage);
        if let Some(function) = functions.get(&key) {
            return Ok(function.clone());
        }
        let symbol = launch.symbol();
        let mut found = None;
        for module in &self.modules {
            match module.load_function(&symbol) {
                Ok(function) => found = Some(function),
                Err(e) if e.0 == CUresult::CUDA_ERROR_NOT_FOUND => continue,
                Err(e) => return Err(self.failed(&format!("looking for kernel {symbol}"), e)),
            }
            break;
        }
        let function = found.ok_or_else(|| Error::Device(format!("this build has no kernel `{symbol}`")))?;
        // what a block may take beyond 48 KiB has to be asked for
        let attribute = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let fixed = function.shared_size_bytes().unwrap_or(0);
        let limit = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let limit = self.context.attribute(limit).map_err(|e| self.failed("asking for the GPU's shared memory", e))?;
        function.set_attribute(attribute, limit - fixed).map_err(|e| self.failed(&symbol, e))?;
        functions.insert(key, function.clone());
        Ok(function)
    }

    /// Copies to the device, after all work so far; does not wait for it.
    pub(crate) fn upload(&self, from: &[u8], to: u64) -> Result<()> {
        self.fill(to, from.len(), 1, &self.fence()?, |range, out| {
            copy_by_all_threads(&from[range], out);
            Ok(())
        })
    }

    /// The work started so far.
    pub(crate) fn fence(&self) -> Result<CudaEvent> {
        self.start_held()?;
        self.stream.record_event(None).map_err(|e| self.failed("recording an event", e))
    }

    /// Waits for the work before.
    pub(crate) fn wait(&self, fence: &CudaEvent) -> Result<()> {
        fence.synchronize().map_err(|e| self.failed("waiting for the GPU", e))
    }

    /// Copies to the device from wherever `write` takes it: called for ranges of whole `unit`s that
    /// follow one another, with host memory to write them to. The copies wait for the work before
    /// `after` alone; work started later waits for them.
    pub(crate) fn fill(
        &self,
        to: u64,
        bytes: usize,
        unit: usize,
        after: &CudaEvent,
        mut write: impl FnMut(Range<usize>, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        if unit == 0 || unit > HALF {
            return Err(Error::Device(format!("rows of {unit} bytes: a copy to the GPU takes 1 to {HALF}")));
        }
        let failed = |e| self.failed("copying to the GPU", e);
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        let pinned = match &mut *pinned {
            Some(pinned) => pinned,
            none => none.insert(Pinned::new(&self.context).map_err(failed)?),
        };
        self.copies.wait(after).map_err(failed)?;
        let piece = HALF / unit * unit;
        let filled = (0..bytes).step_by(piece).try_for_each(|start| {
            let range = start..bytes.min(start + piece);
            write(range.clone(), pinned.space(range.len()).map_err(failed)?)?;
            // SAFETY: `to` lies in a live buffer of this device that is large enough (the caller's
            // view).
            unsafe { pinned.copy(range.len(), to + start as u64, &self.copies) }.map_err(failed)
        });
        // what was copied before an error is still on its way
        self.stream.join(&self.copies).map_err(failed)?;
        filled
    }

    /// Copies from the device, after all work so far.
    pub(crate) fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.start_held()?;
        self.bind()?;
        // SAFETY: as above; the copy has ended when this returns.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream.cu_stream()) }
            .and_then(|()| self.stream.synchronize())
            .map_err(|e| self.failed("copying from the GPU", e))
    }

    /// Waits for all work so far, copies included.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.start_held()?;
        self.stream.synchronize().map_err(|e| self.failed("waiting for the GPU", e))
    }

    /// Seconds that the device takes for what `work` launches, by its own clock.
    pub(crate) fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let event = || self.stream.record_event(flags).map_err(|e| self.failed("recording an event", e));
        let start = event()?;
        work()?;
        let end = event()?;
        end.synchronize().map_err(|e| self.failed("waiting for the GPU", e))?;
        let milliseconds = start.elapsed_ms(&end).map_err(|e| self.failed("reading the GPU's clock", e))?;
        Ok(f64::from(milliseconds) * 1e-3)
    }

    /// The kernels' stream, for other libraries' calls.
    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| self.failed("using the GPU", e))
    }

    /// An error that the device reports after the fact belongs to some launch before.
    fn failed(&self, what: &str, e: DriverError) -> Error {
        let last = self.last();
        let after = last.as_ref().map_or(String::new(), |launch| {
            format!(
                "; the last kernel started was {} (CUDA_LAUNCH_BLOCKING=1 names the one that failed)",
                describe(launch)
            )
        });
        Error::Device(format!("{}: {what} failed: {}{after}", self.name, reason(e)))
    }
}

/// The number of this process on its machine, where mpirun (Open MPI's, MPICH's), torchrun or srun
/// has started several; 0 where nobody says. `variable` is the environment.
fn local_rank(variable: impl Fn(&str) -> Option<String>) -> usize {
    let names = ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "LOCAL_RANK", "SLURM_LOCALID"];
    names.iter().find_map(|name| variable(name)?.parse().ok()).unwrap_or(0)
}

/// Whether the system finds one of NVIDIA's libraries, all of whose functions panic without it. cudarc
/// tells it too, but not in a program another crate of which has cudarc link them (candle does).
pub(crate) fn library_is_present(names: &[&str]) -> bool {
    // SAFETY: loading them does what it does in any program that uses CUDA.
    names.iter().any(|name| unsafe { libloading::Library::new(*name) }.is_ok())
}

/// A copy within the host, at the speed of its memory.
pub(crate) fn copy_by_all_threads<T: Copy + Send + Sync>(from: &[T], to: &mut [T]) {
    let pieces = to.par_chunks_mut(COPIED).zip(from.par_chunks(COPIED));
    pieces.for_each(|(to, from)| to.copy_from_slice(from));
}

fn describe(launch: &Launch) -> String {
    let Launch { grid: [gx, gy, gz], block: [bx, by, bz], shared_bytes, .. } = launch;
    format!(
        "kernel {} (grid {gx} x {gy} x {gz}, block {bx} x {by} x {bz}, {shared_bytes} bytes of shared memory)",
        launch.symbol()
    )
}

/// The driver's name for an error and its own words.
fn reason(e: DriverError) -> String {
    let text =
        |text: Result<&CStr, DriverError>| text.map_or(String::new(), |text| text.to_string_lossy().into_owned());
    format!("{} ({})", text(e.error_name()), text(e.error_string()))
}

#[cfg(test)]
mod tests {
    use super::local_rank;

    #[test]
    fn a_launcher_tells_which_gpu() {
        let under = |pairs: &[(&str, &str)]| {
            local_rank(|name| pairs.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string()))
        };
        assert_eq!(under(&[]), 0);
        assert_eq!(under(&[("OMPI_COMM_WORLD_LOCAL_RANK", "3"), ("SLURM_LOCALID", "0")]), 3);
        assert_eq!(under(&[("SLURM_LOCALID", "1")]), 1);
        assert_eq!(under(&[("LOCAL_RANK", "two")]), 0);
    }
}
