//! Runs the CUDA kernels' own sources on the CPU: every thread a fiber, with real barriers and warp
//! instructions.
//!
//! Two builds of kernels/ by build.rs: *plain* is fast; *race* also reports data races, accesses
//! out of bounds, reads of memory that nobody wrote, misalignment and undefined behaviour, each
//! with file and line. The folder that holds the two libraries can be named by
//! CROSSFUSION_EMULATOR.

use std::{
    collections::VecDeque,
    ffi::{CStr, CString, c_char, c_int, c_void},
    io::Write,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use super::Launch;
use crate::{Error, Result};

/// Which thread of a block runs next, whenever one waits.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(u32)]
pub enum Schedule {
    /// The lowest warp that can, and its lowest lane.
    Ordered,
    /// Any that can, by chance.
    Random,
    /// One warp as far ahead as it can get: finds missing barriers that `Random` does not.
    Skewed,
}

/// How kernels are run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Who runs next.
    pub schedule: Schedule,
    /// Of the chance.
    pub seed: u64,
    /// Check every access; some twenty times slower.
    pub race: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { schedule: Schedule::Skewed, seed: 1, race: false }
    }
}

/// A device that starts kernels as late as a GPU may: when somebody waits for them.
pub struct Emulator {
    options: Options,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Launch>,
    /// Launches that have ended.
    ended: usize,
}

impl Emulator {
    /// With nothing to do yet.
    pub fn new(options: Options) -> Self {
        Self { options, queue: Mutex::default() }
    }

    pub(super) fn race(&self) -> bool {
        self.options.race
    }

    pub(super) fn launch(&self, launch: Launch) {
        self.queue().waiting.push_back(launch);
    }

    /// Launches so far.
    pub(super) fn launched(&self) -> usize {
        let queue = self.queue();
        queue.ended + queue.waiting.len()
    }

    /// Runs the first `launches` of all to their end, or all.
    pub(super) fn finish(&self, launches: Option<usize>) -> Result<()> {
        let mut queue = self.queue();
        while launches.is_none_or(|launches| queue.ended < launches) {
            let Some(next) = queue.waiting.pop_front() else { break };
            queue.ended += 1;
            launch(&next, self.options)?;
        }
        Ok(())
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How often things happened in a launch, over all its blocks (`SimtStats` of
/// kernels/emulator/runtime.hpp).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Stats {
    pub barriers: u64,
    pub collectives: u64,
    pub switches: u64,
    pub atomics: u64,
    pub copies: u64,
    pub mma: u64,
    pub ldmatrix: u64,
    /// Extra cycles that ldmatrix lost to bank conflicts; it takes 4 without.
    pub ldmatrix_conflicts: u64,
    /// Cycles that other accesses to shared memory would take without conflicts (race mode counts
    /// them), and the extra ones.
    pub shared_accesses: u64,
    pub shared_conflicts: u64,
}

/// Runs a kernel to its end. The error is the first thing that went wrong: kernel, block, thread,
/// what and where.
///
/// The launch's addresses must be memory of this process, such as [`Guarded`]; in plain mode nothing
/// checks them.
pub(crate) fn launch(launch: &Launch, options: Options) -> Result<Stats> {
    let library = Library::get(options.race)?;
    let symbol = CString::new(launch.symbol()).map_err(|e| Error::Device(format!("emulator: {e}")))?;
    let args: Vec<*const u64> = launch.args.iter().map(|a| a.as_ptr()).collect();
    let arg_bytes: Vec<usize> = launch.args.iter().map(|a| a.bytes().len()).collect();
    let call = Call {
        kernel: symbol.as_ptr(),
        args: args.as_ptr(),
        arg_bytes: arg_bytes.as_ptr(),
        arg_count: args.len(),
        seed: options.seed,
        grid: launch.grid,
        block: launch.block,
        shared_bytes: launch.shared_bytes,
        schedule: options.schedule as u32,
    };
    let (mut stats, mut error) = (Stats::default(), [0u8; 2048]);
    // SAFETY: the structs mirror runtime.hpp's, and the pointers outlive the call, which copies
    // what it keeps.
    let status = unsafe { (library.launch)(&call, &mut stats, error.as_mut_ptr().cast(), error.len()) };
    if status == 0 {
        record(launch, &stats)?;
        return Ok(stats);
    }
    let text = CStr::from_bytes_until_nul(&error).unwrap_or_default().to_string_lossy();
    Err(Error::Device(format!("emulator: {text}")))
}

/// Adds a line to the file that CROSSFUSION_EMULATOR_STATS names, if any: kernel, bytes of
/// dynamic shared memory, cycles of shared memory, extra ones by conflicts.
fn record(launch: &Launch, stats: &Stats) -> Result<()> {
    let Some(path) = std::env::var_os("CROSSFUSION_EMULATOR_STATS") else { return Ok(()) };
    let (cycles, conflicts) =
        (4 * stats.ldmatrix + stats.shared_accesses, stats.ldmatrix_conflicts + stats.shared_conflicts);
    let line = format!("{} {} {cycles} {conflicts}\n", launch.symbol(), launch.shared_bytes);
    let file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
    file.and_then(|mut file| file.write_all(line.as_bytes())).map_err(|e| Error::file(Path::new(&path), e))
}

/// A range of addresses that race mode lets kernels touch, as long as this lives.
pub(super) struct Registered(*const c_void);

// SAFETY: an address that nobody reads through.
unsafe impl Send for Registered {}
// SAFETY: as above.
unsafe impl Sync for Registered {}

impl Registered {
    pub(crate) fn new(start: *const c_void, bytes: usize) -> Result<Self> {
        // SAFETY: registers an address range, which Drop removes.
        unsafe { (Library::get(true)?.register)(start, bytes) };
        Ok(Self(start))
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Ok(library) = Library::get(true) {
            // SAFETY: removes what `new` registered.
            unsafe { (library.unregister)(self.0) };
        }
    }
}

/// `SimtLaunch` of kernels/emulator/runtime.hpp.
#[repr(C)]
struct Call {
    kernel: *const c_char,
    args: *const *const u64,
    arg_bytes: *const usize,
    arg_count: usize,
    seed: u64,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    schedule: u32,
}

/// One of the two builds, loaded for good.
struct Library {
    launch: unsafe extern "C" fn(*const Call, *mut Stats, *mut c_char, usize) -> c_int,
    register: unsafe extern "C" fn(*const c_void, usize),
    unregister: unsafe extern "C" fn(*const c_void),
    #[cfg(test)]
    kernel: unsafe extern "C" fn(usize) -> *const c_char,
}

impl Library {
    fn get(race: bool) -> Result<&'static Self> {
        static PLAIN: OnceLock<Result<Library, String>> = OnceLock::new();
        static RACE: OnceLock<Result<Library, String>> = OnceLock::new();
        let (loaded, name) = if race { (&RACE, "emulator-race.so") } else { (&PLAIN, "emulator-plain.so") };
        loaded.get_or_init(|| Self::load(name)).as_ref().map_err(|e| Error::Device(e.clone()))
    }

    fn load(name: &str) -> Result<Self, String> {
        let folder = std::env::var_os("CROSSFUSION_EMULATOR").unwrap_or(env!("CROSSFUSION_EMULATOR_BUILT").into());
        let path = PathBuf::from(folder).join(name);
        let failed = |e| format!("{}: the emulator cannot be loaded: {e}", path.display());
        // SAFETY: our own library, whose initialisers fill a table; the types are runtime.hpp's.
        unsafe {
            let library = libloading::Library::new(&path).map_err(failed)?;
            let loaded = Self {
                launch: *library.get(c"simt_launch").map_err(failed)?,
                register: *library.get(c"simt_register").map_err(failed)?,
                unregister: *library.get(c"simt_unregister").map_err(failed)?,
                #[cfg(test)]
                kernel: *library.get(c"simt_kernel").map_err(failed)?,
            };
            std::mem::forget(library);
            Ok(loaded)
        }
    }
}

#[cfg(test)]
pub(crate) use testing::{Guarded, kernels};

/// What the tests of single kernels need.
#[cfg(test)]
mod testing {
    use std::{cell::UnsafeCell, ffi::CStr, marker::PhantomData};

    use bytemuck::{Pod, Zeroable};

    use super::{Library, Registered};
    use crate::{Error, Result};

    /// The names of all kernels, storage type included, in alphabetical order.
    pub(crate) fn kernels() -> Result<Vec<String>> {
        let library = Library::get(false)?;
        // SAFETY: the names are static strings of a library that is never unloaded.
        let name = |i| unsafe {
            let name = (library.kernel)(i);
            (!name.is_null()).then(|| CStr::from_ptr(name).to_string_lossy().into_owned())
        };
        Ok((0..).map_while(name).collect())
    }

    /// Memory that kernels may touch, to the byte: race mode reports an access outside,
    /// [`Guarded::read`] a stray write.
    pub(crate) struct Guarded<T> {
        /// The first line and all after the last element are guards. Kernels write through their
        /// own pointers.
        lines: Box<[UnsafeCell<Line>]>,
        len: usize,
        _range: Registered,
        element: PhantomData<T>,
    }

    /// As aligned as memory of a GPU.
    #[repr(C, align(256))]
    #[derive(Clone, Copy, Pod, Zeroable)]
    struct Line([u8; 256]);

    impl<T: Pod> Guarded<T> {
        pub(crate) fn new(data: &[T]) -> Result<Self> {
            let bytes = size_of_val(data);
            let lines: Box<[_]> = (0..bytes.div_ceil(256) + 2).map(|_| UnsafeCell::new(Line([0xff; 256]))).collect();
            let range = Registered::new(lines.as_ptr().wrapping_add(1).cast(), bytes)?;
            let memory = Self { lines, len: data.len(), _range: range, element: PhantomData };
            // SAFETY: lines 1.. hold these elements and nobody else knows them yet.
            unsafe { memory.ptr().copy_from_nonoverlapping(data.as_ptr(), data.len()) };
            Ok(memory)
        }

        pub(crate) fn address(&self) -> u64 {
            self.ptr() as u64
        }

        /// The elements, unless something was written around them.
        pub(crate) fn read(&self) -> Result<Vec<T>> {
            // SAFETY: no kernel runs: a launch returns when all threads have ended.
            let lines: Vec<Line> = self.lines.iter().map(|line| unsafe { *line.get() }).collect();
            let bytes: &[u8] = bytemuck::cast_slice(&lines);
            let (guard, rest) = bytes.split_at(256);
            let (data, end) = rest.split_at(self.len * size_of::<T>());
            if guard.iter().chain(end).any(|&byte| byte != 0xff) {
                return Err(Error::Device(format!(
                    "emulator: a kernel wrote outside a buffer of {} elements",
                    self.len
                )));
            }
            Ok(data.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect())
        }

        fn ptr(&self) -> *mut T {
            UnsafeCell::raw_get(self.lines.as_ptr().wrapping_add(1)).cast()
        }
    }
}
