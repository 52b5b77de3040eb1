//! What a device can do at all, measured; and cuBLAS, as the peer of our products. The CUDA half has not yet run on a GPU.

use cudarc::cublas::{
    CudaBlas,
    result::gemm_ex,
    sys::{self as blas, cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType_t},
};

use super::cases::{Case, Operand, Product};
use crate::{
    Error, Result,
    device::{Cuda, Device, Element, Matrix, Storage},
};

/// More than any GPU's L2 cache.
const FLUSH: usize = 256 << 20;
/// A product large enough for a GPU's peak.
const LARGE: usize = 8192;

/// Operations a second that this device reaches: on a CPU multiply-adds in registers, on a GPU a large product by cuBLAS.
pub fn peak<T: Element>(device: &Device) -> Result<f64> {
    match device {
        Device::Cpu(cpu) => Ok(cpu.fma_peak::<f32>(3)),
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

fn product_rate<T: Element>(cuda: &Cuda) -> Result<f64> {
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
    let operand = |slice| Operand { matrix: Matrix::new(address(slice), LARGE, LARGE), transposed: false };
    let product = Product { a: operand(&a), b: operand(&b), out: operand(&out), depth: LARGE };
    let storage = crate::device::storage::<T>()?;
    let Some(blas) = open(cuda)? else {
        return Err(Error::Device(
            "cf-bench op on a GPU measures its peak by cuBLAS, which was not found (libcublas)".into(),
        ));
    };
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        best = best.min(cuda.time(|| multiply(&blas, storage, storage, &product))?);
    }
    Ok(2.0 * (LARGE as f64).powi(3) / best)
}

/// Median seconds of cuBLAS on the case's products, one call each; None without products, without a GPU, or without cuBLAS.
pub fn cublas(device: &Device, case: &Case, repeat: u32) -> Result<Option<f64>> {
    let Device::Cuda(cuda) = device else { return Ok(None) };
    let (false, Some(blas)) = (case.products.is_empty(), open(cuda)?) else { return Ok(None) };
    let mut times = Vec::new();
    for run in 0..=repeat {
        flush_l2(cuda)?;
        let all = || {
            case.products.iter().try_for_each(|product| {
                multiply(
                    &blas,
                    case.storage,
                    if case.op.ends_with("weight") { Storage::F32 } else { case.storage },
                    product,
                )
            })
        };
        let seconds = cuda.time(all)?;
        if run > 0 {
            times.push(seconds);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(Some(times[times.len() / 2]))
}

fn open(cuda: &Cuda) -> Result<Option<CudaBlas>> {
    // SAFETY: looks for the library; every other call panics without it.
    if !unsafe { blas::is_culib_present() } {
        return Ok(None);
    }
    CudaBlas::new(cuda.stream().clone()).map(Some).map_err(|e| Error::Device(format!("cuBLAS does not start: {e:?}")))
}

/// cuBLAS is column-major: it computes outᵀ = bᵀ aᵀ of the same memory.
fn multiply(handle: &CudaBlas, storage: Storage, out: Storage, p: &Product) -> Result<()> {
    let kind = |storage| match storage {
        Storage::F32 => cudaDataType_t::CUDA_R_32F,
        Storage::Bf16 => cudaDataType_t::CUDA_R_16BF,
    };
    let operation = |operand: Operand| match operand.transposed {
        true => cublasOperation_t::CUBLAS_OP_T,
        false => cublasOperation_t::CUBLAS_OP_N,
    };
    let (one, zero) = (1f32, 0f32);
    let stride = |operand: Operand| operand.matrix.stride as i32;
    // SAFETY: the matrices are live device memory of these shapes; the scalars outlive the call.
    let status = unsafe {
        gemm_ex(
            *handle.handle(),
            operation(p.b),
            operation(p.a),
            p.out.matrix.cols as i32,
            p.out.matrix.rows as i32,
            p.depth as i32,
            (&raw const one).cast(),
            p.b.matrix.address as *const _,
            kind(storage),
            stride(p.b),
            p.a.matrix.address as *const _,
            kind(storage),
            stride(p.a),
            (&raw const zero).cast(),
            p.out.matrix.address as *mut _,
            kind(out),
            stride(p.out),
            cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    };
    status.map_err(|e| Error::Device(format!("a cuBLAS product failed: {e:?}")))
}
