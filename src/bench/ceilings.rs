//! What a device can do at all, measured; and cublasLt, as the peer of our products. The CUDA half
//! has not yet run on a GPU.

use super::{
    cases::{Case, Operand, Product},
    cublaslt::CublasLt,
};
use crate::{
    Error, Result,
    device::{Cuda, Device, Element, Matrix, Storage},
};

/// More than any GPU's L2 cache.
const FLUSH: usize = 256 << 20;
/// A product large enough for a GPU's peak.
const LARGE: usize = 8192;

/// Operations a second that this device reaches: on a CPU products in registers, on a GPU a
/// large product by cublasLt, if that is installed.
pub fn peak<T: Element>(device: &Device) -> Result<Option<f64>> {
    match device {
        Device::Cpu(cpu) => Ok(Some(cpu.peak::<T>(3))),
        Device::Cuda(cuda) => product_rate::<T>(cuda),
        _ => Err(neither()),
    }
}

/// Bytes a second of a large copy, read plus written.
pub fn copy_rate(device: &Device) -> Result<f64> {
    match device {
        Device::Cpu(cpu) => Ok(cpu.copy_rate(3)),
        Device::Cuda(cuda) => cuda_copy_rate(cuda),
        _ => Err(neither()),
    }
}

fn neither() -> Error {
    Error::Usage("cf-bench measures cpu or cuda".into())
}

/// Fills the L2 cache with something else.
pub fn flush_l2(cuda: &Cuda) -> Result<()> {
    cuda.alloc(FLUSH).map(drop)
}

fn cuda_copy_rate(cuda: &Cuda) -> Result<f64> {
    let (from, mut to) = (cuda.alloc(4 * FLUSH)?, cuda.alloc(4 * FLUSH)?);
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        let copy =
            || cuda.stream().memcpy_dtod(&from, &mut to).map_err(|e| Error::Device(format!("a copy failed: {e:?}")));
        best = best.min(cuda.time(copy)?);
    }
    Ok((8 * FLUSH) as f64 / best)
}

fn product_rate<T: Element>(cuda: &Cuda) -> Result<Option<f64>> {
    let Some(library) = CublasLt::open(cuda)? else { return Ok(None) };
    let bytes = LARGE * LARGE * size_of::<T>();
    let (a, b, out) = (cuda.alloc(bytes)?, cuda.alloc(bytes)?, cuda.alloc(bytes)?);
    // not zeros, on which a GPU is faster: a pattern of small numbers of either sign
    let pattern: Vec<T> =
        (0..1 << 16).map(|i: u32| T::from_sum(crate::device::Real::of(f64::from(i % 127) / 64.0 - 1.0))).collect();
    let pattern: &[u8] = bytemuck::cast_slice(&pattern);
    let address = |slice| cudarc::driver::DevicePtr::device_ptr(slice, cuda.stream()).0;
    for matrix in [&a, &b] {
        for start in (0..bytes).step_by(pattern.len()) {
            cuda.upload(pattern, address(matrix) + start as u64)?;
        }
    }
    let operand = |slice| Operand::plain(Matrix::new(address(slice), LARGE, LARGE));
    let product = Product { a: operand(&a), b: operand(&b), out: operand(&out), depth: LARGE };
    let storage = crate::device::storage::<T>()?;
    let product = library.prepare(&product, storage, storage)?;
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        best = best.min(cuda.time(|| product.run())?);
    }
    Ok(Some(2.0 * (LARGE as f64).powi(3) / best))
}

/// Median seconds of cublasLt on the case's products, one call each; None without products, without
/// a GPU, or without cublasLt.
pub fn cublaslt(device: &Device, case: &Case, repeat: u32) -> Result<Option<f64>> {
    let Device::Cuda(cuda) = device else { return Ok(None) };
    let (false, Some(library)) = (case.products.is_empty(), CublasLt::open(cuda)?) else { return Ok(None) };
    let out = if case.op.ends_with("weight") { Storage::F32 } else { case.storage };
    let products = case.products.iter().map(|product| library.prepare(product, case.storage, out));
    let products = products.collect::<Result<Vec<_>>>()?;
    let mut times = Vec::new();
    for run in 0..=repeat {
        flush_l2(cuda)?;
        let seconds = cuda.time(|| products.iter().try_for_each(|product| product.run()))?;
        if run > 0 {
            times.push(seconds);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(Some(times[times.len() / 2]))
}
