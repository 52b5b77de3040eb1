//! Page-locked host memory: what copies to a GPU pass through, and what kernels write for the host.
//! NOT YET RUN ON A GPU.

use std::{slice, sync::Arc};

use cudarc::driver::{
    CudaContext, CudaEvent, CudaStream, DriverError,
    result::{free_host, malloc_host, memcpy_htod_async},
    sys,
};

/// Memory of the host that kernels and copies reach at the address that it has here.
pub(super) struct PageLocked {
    context: Arc<CudaContext>,
    memory: *mut u8,
    bytes: usize,
}

// SAFETY: the memory belongs to this alone and is not bound to a thread.
unsafe impl Send for PageLocked {}
// SAFETY: as above.
unsafe impl Sync for PageLocked {}

impl PageLocked {
    /// Zeroed.
    pub fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self, DriverError> {
        context.bind_to_thread()?;
        // SAFETY: page-locked memory, also for kernels, which the result owns from here on.
        let memory = unsafe { malloc_host(bytes, sys::CU_MEMHOSTALLOC_DEVICEMAP) }?.cast::<u8>();
        // SAFETY: so many bytes, which nobody else knows yet.
        unsafe { memory.write_bytes(0, bytes) };
        Ok(Self { context: context.clone(), memory, bytes })
    }

    pub fn address(&self) -> usize {
        self.memory as usize
    }
}

impl Drop for PageLocked {
    fn drop(&mut self) {
        // The process may be going down with a broken device: nothing can be done about an error
        // here.
        let _ = self.context.bind_to_thread();
        // A kernel may still write to it: only what is read is waited for elsewhere.
        let _ = self.context.synchronize();
        // SAFETY: from `malloc_host`; all work that knew of it has ended, or the device is lost.
        let _ = unsafe { free_host(self.memory.cast()) };
    }
}

/// Bytes of a half.
pub(super) const HALF: usize = 32 << 20;

/// What copies to a GPU pass through: while the GPU copies one half, the host fills the other, and
/// neither waits for the kernels before.
pub(super) struct Pinned {
    halves: [Half; 2],
    /// The half that is filled next.
    turn: usize,
}

struct Half {
    memory: PageLocked,
    /// The copy out of it that was started last.
    copied: Option<CudaEvent>,
}

impl Pinned {
    pub fn new(context: &Arc<CudaContext>) -> Result<Self, DriverError> {
        let half = || Ok(Half { memory: PageLocked::new(context, HALF)?, copied: None });
        Ok(Self { halves: [half()?, half()?], turn: 0 })
    }

    /// At most [`HALF`] bytes to fill, which the device no longer reads.
    pub fn space(&mut self, bytes: usize) -> Result<&mut [u8], DriverError> {
        let half = &mut self.halves[self.turn];
        assert!(bytes <= half.memory.bytes);
        if let Some(copied) = half.copied.take() {
            copied.synchronize()?;
        }
        // SAFETY: memory that the half owns, written to by nobody else while it is borrowed.
        Ok(unsafe { slice::from_raw_parts_mut(half.memory.memory, bytes) })
    }

    /// Starts the copy of what was filled in.
    ///
    /// # Safety
    /// `to` must be device memory of at least `bytes` bytes, alive until the stream gets there.
    pub unsafe fn copy(&mut self, bytes: usize, to: u64, stream: &CudaStream) -> Result<(), DriverError> {
        let half = &mut self.halves[self.turn];
        assert!(bytes <= half.memory.bytes);
        // SAFETY: as in `space`; nobody writes there before the event recorded below.
        unsafe { memcpy_htod_async(to, slice::from_raw_parts(half.memory.memory, bytes), stream.cu_stream()) }?;
        half.copied = Some(stream.record_event(None)?);
        self.turn = 1 - self.turn;
        Ok(())
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        let _ = self.copied.take().map(|copied| copied.synchronize());
    }
}
