//! Whether this process has forked off another: threads do not come along with `fork`, so that a
//! pool of before would be waited for in vain (DataLoader's workers, Python's multiprocessing).

#[cfg(unix)]
mod counted {
    use std::sync::{
        Once,
        atomic::{AtomicUsize, Ordering},
    };

    static FORKS: AtomicUsize = AtomicUsize::new(0);
    static WATCH: Once = Once::new();

    extern "C" fn in_child() {
        FORKS.fetch_add(1, Ordering::Relaxed);
    }

    pub fn generation() -> usize {
        WATCH.call_once(|| {
            // SAFETY: the handler does nothing but count, which is allowed after a fork. Where it
            // cannot be registered, memory is at an end, and so is this process.
            unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        });
        FORKS.load(Ordering::Relaxed)
    }
}

/// The number of forks between the first process and this one.
#[cfg(unix)]
pub fn generation() -> usize {
    counted::generation()
}

/// There is no fork.
#[cfg(not(unix))]
pub fn generation() -> usize {
    0
}
