//! The CPU: a thread pool and the widest vector unit it has, chosen at run time.
//!
//! Work is cut into tasks by the shape alone, never by the number of threads, and every sum is
//! taken inside one task in a fixed order: the same inputs give the same bits with any number of
//! threads.

pub(crate) mod factor;
mod fork;
mod peak;
pub mod real;
pub(crate) mod tile;

use std::{
    cell::RefCell,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicPtr, Ordering},
    },
};

use bytemuck::Pod;
use factor::Factor;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
pub use real::Real;

use super::View;
use crate::{Error, Result};

/// More threads than this are a slip of the pen, and would only take memory.
const MOST_THREADS: usize = 1024;

/// All cores of this machine, with the widest instruction set that it has.
pub struct Cpu {
    /// From a box; replaced in a process that has forked off, to which no thread of it comes along.
    workers: AtomicPtr<Workers>,
    threads: usize,
    arch: Arch,
    /// Whether bf16 is multiplied in pairs, by AVX-512's dot instruction.
    dots: bool,
}

struct Workers {
    pool: rayon::ThreadPool,
    /// Memory that the tasks of one op share, kept from op to op. u64 for its alignment.
    shared: Mutex<Vec<u64>>,
    /// Of the process that they were started in, see [`fork::generation`].
    generation: usize,
}

impl Workers {
    fn start(threads: usize) -> Result<*mut Self> {
        let generation = fork::generation();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("cpu-{i}"))
            .build()
            .map_err(|e| Error::Device(format!("cannot start {threads} threads: {e}")))?;
        Ok(Box::into_raw(Box::new(Self { pool, shared: Mutex::default(), generation })))
    }
}

/// A kernel that needs the vector types by name; plain loops use [`Cpu::parallel`] and are
/// vectorized by the compiler.
pub(crate) trait Kernel: Sync {
    fn run<S: Simd>(&self, simd: S, task: usize);
}

impl Cpu {
    /// `threads` = 0 means one for each core.
    pub fn new(threads: usize) -> Result<Self> {
        Self::with_arch(threads, Arch::new())
    }

    /// With a given instruction set, for tests of the narrower ones.
    pub fn with_arch(threads: usize, arch: Arch) -> Result<Self> {
        if threads > MOST_THREADS {
            return Err(Error::Usage(format!("{threads} threads: expected at most {MOST_THREADS}")));
        }
        let workers = Workers::start(threads)?;
        // SAFETY: just made.
        let threads = unsafe { &*workers }.pool.current_num_threads();
        Ok(Self { workers: AtomicPtr::new(workers), threads, arch, dots: has_dots(arch) })
    }

    /// Without AVX-512 and with its dot instruction emulated: for tests that look at its numbers on
    /// machines without it, and slow.
    pub fn with_emulated_dots(threads: usize) -> Result<Self> {
        let mut cpu = Self::with_arch(threads, Arch::Scalar)?;
        cpu.dots = true;
        Ok(cpu)
    }

    /// Whether bf16 is multiplied by AVX-512's dot instruction; else it is widened to f32 first.
    pub fn has_dots(&self) -> bool {
        self.dots
    }

    /// How many threads work.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// The threads of this process.
    fn workers(&self) -> &Workers {
        let current = self.workers.load(Ordering::Acquire);
        // SAFETY: from a box that nobody frees but `drop`; what a fork leaves behind is never freed.
        let workers = unsafe { &*current };
        if workers.generation == fork::generation() {
            return workers;
        }
        // one thread finds the same bits; a process that cannot start even that is at its end
        let fresh = Workers::start(self.threads).or_else(|_| Workers::start(1));
        let fresh = fresh.unwrap_or_else(|e| panic!("after a fork: {e}"));
        let found = self.workers.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire);
        // SAFETY: as above; of two threads that come here at once, one frees what nobody has seen.
        unsafe {
            match found {
                Ok(_) => &*fresh,
                Err(theirs) => {
                    drop(Box::from_raw(fresh));
                    &*theirs
                }
            }
        }
    }

    /// The instruction set in use, for reports.
    pub fn instruction_set(&self) -> &'static str {
        match format!("{:?}", self.arch) {
            name if name.starts_with("V4") => "AVX-512",
            name if name.starts_with("V3") => "AVX2",
            name if name.starts_with("Neon") => "NEON",
            _ => "scalar",
        }
    }

    /// Runs `work` on the threads of this device.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.workers().pool.install(work)
    }

    /// Runs `task(0) .. task(tasks - 1)` on all threads. Mark the closure `#[inline(always)]`: only
    /// what is inlined is compiled for the wide vector unit.
    #[inline(always)]
    pub(crate) fn parallel(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        let run = |i| {
            self.arch.dispatch(
                #[inline(always)]
                || task(i),
            )
        };
        match tasks {
            0 => {}
            1 => run(0),
            _ => self.workers().pool.install(|| (0..tasks).into_par_iter().with_max_len(1).for_each(run)),
        }
    }

    /// [`Cpu::parallel`] for a kernel that names its vector types.
    pub(crate) fn parallel_kernel<K: Kernel>(&self, tasks: usize, kernel: &K) {
        let run = |task| self.arch.dispatch(Task { kernel, task });
        match tasks {
            0 => {}
            1 => run(0),
            _ => self.workers().pool.install(|| (0..tasks).into_par_iter().with_max_len(1).for_each(run)),
        }
    }

    /// Hands `work` one row of `len` elements of arbitrary content that all its tasks may use.
    pub(crate) fn with_panels<T: Pod>(&self, len: usize, work: impl FnOnce(View<T>)) {
        // Taken out while in use: a thread that waits inside `work` may start another op on this
        // device.
        let shared = &self.workers().shared;
        let take = |pages: &mut Vec<u64>| std::mem::take(pages);
        let mut pages = take(&mut shared.lock().unwrap_or_else(PoisonError::into_inner));
        let words = (len * size_of::<T>()).div_ceil(8);
        if pages.len() < words {
            pages.resize(words, 0);
        }
        work(View::new(pages.as_mut_ptr() as usize, 1, len));
        *shared.lock().unwrap_or_else(PoisonError::into_inner) = pages;
    }

    /// Columns of a panel of `F`.
    pub(crate) fn panel_width<F: Factor>(&self) -> usize {
        struct Width<F>(std::marker::PhantomData<F>);
        impl<F: Factor> WithSimd for Width<F> {
            type Output = usize;
            fn with_simd<S: Simd>(self, _: S) -> usize {
                F::width::<S>()
            }
        }
        self.arch.dispatch(Width::<F>(std::marker::PhantomData))
    }
}

/// Whether these vectors are AVX-512's, on a machine that has its dot instruction for bf16.
fn has_dots(arch: Arch) -> bool {
    #[cfg(target_arch = "x86_64")]
    return matches!(arch, Arch::V4(_)) && std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

impl Drop for Cpu {
    fn drop(&mut self) {
        let workers = *self.workers.get_mut();
        // SAFETY: from a box, and no op runs any more. Threads of the process before a fork cannot be
        // waited for.
        unsafe {
            if (*workers).generation == fork::generation() {
                drop(Box::from_raw(workers));
            }
        }
    }
}

struct Task<'a, K> {
    kernel: &'a K,
    task: usize,
}

impl<K: Kernel> WithSimd for Task<'_, K> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.kernel.run(simd, self.task);
    }
}

thread_local! {
    /// Pages for a task's private tiles, kept from task to task. u64 for its alignment.
    static WORKSPACE: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// Hands `work` a private slice of `len` elements of arbitrary content.
#[inline(always)]
pub(crate) fn with_workspace<T: Pod, R>(len: usize, work: impl FnOnce(&mut [T]) -> R) -> R {
    // Taken out of the cell while in use, so that a nested task on the same thread gets its own.
    let mut pages = WORKSPACE.take();
    let words = (len * size_of::<T>()).div_ceil(8);
    if pages.len() < words {
        pages.resize(words, 0);
    }
    let result = work(&mut bytemuck::cast_slice_mut(&mut pages)[..len]);
    WORKSPACE.set(pages);
    result
}
