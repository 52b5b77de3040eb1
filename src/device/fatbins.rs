//! The compiled CUDA kernels, embedded by build.rs where it found nvcc.

/// Name (`<op>_<storage>`) and fatbin of each source file; empty in a build without nvcc.
pub fn fatbins() -> &'static [(&'static str, &'static [u8])] {
    &[]
}
