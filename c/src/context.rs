//! A context: a device with the scratch memory of its ops.

use std::{
    ffi::c_void,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use engine::{
    Result,
    device::{Cpu, Device, Workspace},
};

use crate::{cf_status, given, given_mut, guard};

/// Where ops run: a CPU with so many threads, or a GPU and a stream of the caller's. Calls on one
/// context run one after another, from any thread; contexts know nothing of each other.
pub struct cf_context {
    workspace: Mutex<Workspace>,
    device: Arc<Device>,
}

impl cf_context {
    fn new(device: Device) -> Result<Self> {
        let device = Arc::new(device);
        Ok(Self { workspace: Mutex::new(Workspace::new(&device)?), device })
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn shared_device(&self) -> Arc<Device> {
        self.device.clone()
    }

    pub fn workspace(&self) -> MutexGuard<'_, Workspace> {
        self.workspace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// # Safety
/// `out` must be null or a place for a pointer.
unsafe fn hand_out(out: *mut *mut cf_context, device: impl FnOnce() -> Result<Device>) -> cf_status {
    guard(|| {
        // SAFETY: the caller's.
        let out = unsafe { given_mut("out", out) }?;
        *out = std::ptr::null_mut();
        *out = Box::into_raw(Box::new(cf_context::new(device()?)?));
        Ok(())
    })
}

/// A context on this machine's CPU. `threads` = 0 takes one for each core that the process may use,
/// a container's quota considered. A process may fork while no thread is inside a call on it, and
/// go on using it on both sides.
///
/// # Safety
/// `out` must be null or a place for a pointer, which [`cf_context_free`] takes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_context_cpu(threads: u32, out: *mut *mut cf_context) -> cf_status {
    // SAFETY: the caller's.
    unsafe { hand_out(out, || Ok(Device::Cpu(Cpu::new(threads as usize)?))) }
}

/// A context on a GPU, in its primary context: all work goes to `stream` (a `cudaStream_t` or
/// `CUstream` of that GPU; null is the default stream) in the order of the calls, and no call waits
/// for it but those that say so.
///
/// # Safety
/// As [`cf_context_cpu`]; the stream must be the GPU's, and outlive the context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_context_cuda(ordinal: u32, stream: *mut c_void, out: *mut *mut cf_context) -> cf_status {
    // SAFETY: the caller's.
    unsafe { hand_out(out, || Device::on_stream(ordinal as usize, stream)) }
}

/// Waits for all work of the context so far.
///
/// # Safety
/// `context` must be null or a live context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_context_synchronize(context: *const cf_context) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe { given("context", context) }?.device().synchronize())
}

/// Ends a context; null does nothing. Models that were made on it live on.
///
/// # Safety
/// `context` must be null or a context that no call uses now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_context_free(context: *mut cf_context) {
    if !context.is_null() {
        guard(|| {
            // SAFETY: the caller's; it is from `Box::into_raw`.
            drop(unsafe { Box::from_raw(context) });
            Ok(())
        });
    }
}
