//! Page-locked host memory that copies to a GPU pass through: while the GPU copies one half, the host fills the other, and neither waits
//! for the kernels before. NOT YET RUN ON A GPU.

use std::{slice, sync::Arc};

use cudarc::driver::{
    CudaContext, CudaEvent, CudaStream, DriverError,
    result::{free_host, malloc_host, memcpy_htod_async},
};

/// Bytes of a half.
pub(super) const HALF: usize = 32 << 20;

pub(super) struct Pinned {
    halves: [Half; 2],
    /// The half that is filled next.
    turn: usize,
}

struct Half {
    context: Arc<CudaContext>,
    memory: *mut u8,
    /// The copy out of it that was started last.
    copied: Option<CudaEvent>,
}

// SAFETY: the memory belongs to the half alone and is not bound to a thread.
unsafe impl Send for Half {}

impl Pinned {
    pub fn new(context: &Arc<CudaContext>) -> Result<Self, DriverError> {
        let half = || {
            context.bind_to_thread()?;
            // SAFETY: flags 0 ask for plain page-locked memory, which `Half` owns from here on.
            let memory = unsafe { malloc_host(HALF, 0) }?.cast();
            Ok(Half { context: context.clone(), memory, copied: None })
        };
        Ok(Self { halves: [half()?, half()?], turn: 0 })
    }

    /// At most [`HALF`] bytes to fill, which the device no longer reads.
    pub fn room(&mut self, bytes: usize) -> Result<&mut [u8], DriverError> {
        assert!(bytes <= HALF);
        let half = &mut self.halves[self.turn];
        if let Some(copied) = half.copied.take() {
            copied.synchronize()?;
        }
        // SAFETY: HALF bytes that the half owns, written to by nobody else while it is borrowed.
        Ok(unsafe { slice::from_raw_parts_mut(half.memory, bytes) })
    }

    /// Starts the copy of what was filled in.
    ///
    /// # Safety
    /// `to` must be device memory of at least `bytes` bytes, alive until the stream gets there.
    pub unsafe fn copy(&mut self, bytes: usize, to: u64, stream: &CudaStream) -> Result<(), DriverError> {
        assert!(bytes <= HALF);
        let half = &mut self.halves[self.turn];
        // SAFETY: as in `room`; nobody writes there before the event recorded below.
        unsafe { memcpy_htod_async(to, slice::from_raw_parts(half.memory, bytes), stream.cu_stream()) }?;
        half.copied = Some(stream.record_event(None)?);
        self.turn = 1 - self.turn;
        Ok(())
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        // The process may be going down with a broken device: nothing can be done about an error here.
        let _ = self.copied.take().map(|copied| copied.synchronize());
        let _ = self.context.bind_to_thread();
        // SAFETY: from `malloc_host`, and no copy reads it any more.
        let _ = unsafe { free_host(self.memory.cast()) };
    }
}
