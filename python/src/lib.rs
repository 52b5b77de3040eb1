//! What the Python package `crossfusion` is made of: its module `_crossfusion`. Names, shapes and
//! docs for users are in python/package/crossfusion; here are the calls.

mod data;
mod ops;
mod survival;

use std::sync::OnceLock;

use engine::{Error, Result, device::Cpu};
use pyo3::{exceptions::PyValueError, prelude::*};

/// The library's sentence as a ValueError; what a file or a device refuses as an OSError or a
/// RuntimeError.
fn raise(e: Error) -> PyErr {
    match e {
        Error::Device(text) => pyo3::exceptions::PyRuntimeError::new_err(text),
        Error::Usage(_) | Error::Shape { .. } | Error::Statistic { .. } => PyValueError::new_err(e.to_string()),
        _ => pyo3::exceptions::PyOSError::new_err(e.to_string()),
    }
}

/// Runs `work` without the interpreter's lock, on threads that a fork does not lose: rayon's own
/// pool would be waited for in vain in a DataLoader's workers.
fn compute<R: Send>(py: Python<'_>, work: impl FnOnce() -> Result<R> + Send) -> PyResult<R> {
    static CPU: OnceLock<Cpu> = OnceLock::new();
    let run = || {
        let cpu = match CPU.get() {
            Some(cpu) => cpu,
            None => {
                let made = Cpu::new(0)?;
                CPU.get_or_init(|| made)
            }
        };
        cpu.install(work)
    };
    py.detach(run).map_err(raise)
}

/// How many cores this process may use, a container's quota considered.
#[pyfunction]
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

#[pymodule]
fn _crossfusion(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(cores, module)?)?;
    ops::register(module)?;
    survival::register(module)?;
    data::register(module)
}
