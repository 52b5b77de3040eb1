//! What the Python package `crossfusion` is made of: its module `_crossfusion`. Names, shapes and
//! docs for users are in python/package/crossfusion; here are the calls.

mod data;
mod ops;
mod survival;

use engine::Error;
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

#[pymodule]
fn _crossfusion(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    ops::register(module)?;
    survival::register(module)?;
    data::register(module)
}
