//! cublasLt: the peer of our products, and the measure of what a GPU's tensor cores reach. NOT YET
//! RUN ON A GPU.

use std::ffi::c_void;

use cudarc::{
    cublaslt::{
        result::{self as lt, CublasError},
        sys::{
            self, cublasComputeType_t, cublasLtMatmulAlgo_t, cublasLtMatmulDescAttributes_t as Attribute,
            cublasLtMatmulPreferenceAttributes_t as Preference, cudaDataType_t,
        },
    },
    driver::{CudaSlice, DevicePtr},
};

use super::cases::{Operand, Product};
use crate::{
    Error, Result,
    device::{Cuda, Storage, library_is_present},
};

/// What its algorithms may use: NVIDIA's recommendation for Hopper.
const WORKSPACE: usize = 32 << 20;

pub struct CublasLt<'a> {
    cuda: &'a Cuda,
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
}

/// A product with the algorithm that cublasLt's heuristic takes first.
pub struct Prepared<'a> {
    library: &'a CublasLt<'a>,
    product: Product,
    description: sys::cublasLtMatmulDesc_t,
    /// Of a, b and out as cublasLt names them.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: cublasLtMatmulAlgo_t,
}

fn failed(e: CublasError) -> Error {
    Error::Device(format!("cublasLt failed: {:?}", e.0))
}

/// Rows, columns and leading dimension of a row-major matrix as a column-major one: its transpose.
fn column_major(operand: Operand) -> (u64, u64, i64) {
    (operand.cols as u64, operand.rows as u64, operand.stride as i64)
}

impl<'a> CublasLt<'a> {
    /// None where the library is not installed.
    pub fn open(cuda: &'a Cuda) -> Result<Option<Self>> {
        const NAMES: &[&str] = if cfg!(windows) {
            &["cublasLt64_13.dll"]
        } else {
            &["libcublasLt.so", "libcublasLt.so.13", "libcublasLt.so.12"]
        };
        if !library_is_present(NAMES) {
            return Ok(None);
        }
        let workspace = cuda.alloc(WORKSPACE)?;
        Ok(Some(Self { cuda, handle: lt::create_handle().map_err(failed)?, workspace }))
    }

    /// `storage` of the operands, `out` of the result. cublasLt is column-major: it computes outᵀ =
    /// bᵀ aᵀ of the same memory.
    pub fn prepare(&'a self, product: &Product, storage: Storage, out: Storage) -> Result<Prepared<'a>> {
        let kind = |storage| match storage {
            Storage::F32 => cudaDataType_t::CUDA_R_32F,
            Storage::Bf16 => cudaDataType_t::CUDA_R_16BF,
        };
        let description = lt::create_matmul_desc(cublasComputeType_t::CUBLAS_COMPUTE_32F, cudaDataType_t::CUDA_R_32F)
            .map_err(failed)?;
        for (attribute, operand) in
            [(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, product.b), (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, product.a)]
        {
            let transposed = i32::from(operand.transposed); // CUBLAS_OP_N, CUBLAS_OP_T
            // SAFETY: a live description, an attribute of this size.
            unsafe { lt::set_matmul_desc_attribute(description, attribute, (&raw const transposed).cast(), 4) }
                .map_err(failed)?;
        }
        let layout = |storage, operand| {
            let (rows, cols, stride) = column_major(operand);
            lt::create_matrix_layout(kind(storage), rows, cols, stride).map_err(failed)
        };
        let layouts = [layout(storage, product.b)?, layout(storage, product.a)?, layout(out, product.out)?];
        let (preference, workspace) = (lt::create_matmul_pref().map_err(failed)?, WORKSPACE);
        let [a, b, d] = layouts;
        // SAFETY: live descriptions, an attribute of this size.
        let found = unsafe {
            let attribute = Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            let found = lt::set_matmul_pref_attribute(preference, attribute, (&raw const workspace).cast(), 8)
                .and_then(|()| lt::get_matmul_algo_heuristic(self.handle, description, a, b, d, d, preference));
            lt::destroy_matmul_pref(preference).map_err(failed)?;
            found.map_err(failed)?
        };
        Ok(Prepared { library: self, product: *product, description, layouts, algorithm: found.algo })
    }
}

impl Prepared<'_> {
    /// Starts it.
    pub fn run(&self) -> Result<()> {
        let (one, zero) = (1f32, 0f32);
        let Self { library, product, description, layouts: [a, b, d], algorithm } = self;
        let address = |operand: Operand| operand.address as *mut c_void;
        let stream = library.cuda.stream();
        // SAFETY: the matrices are live device memory of these shapes; the scalars are read before
        // the call returns.
        let status = unsafe {
            lt::matmul(
                library.handle,
                *description,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                address(product.b),
                *a,
                address(product.a),
                *b,
                address(product.out),
                *d,
                address(product.out),
                *d,
                algorithm,
                library.workspace.device_ptr(stream).0 as *mut c_void,
                WORKSPACE,
                stream.cu_stream().cast(),
            )
        };
        status.map_err(failed)
    }
}

impl Drop for Prepared<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `prepare`, and used by nobody else. Nothing can be done about an error
        // here.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.description);
            self.layouts.map(|layout| lt::destroy_matrix_layout(layout)).into_iter().for_each(drop);
        }
    }
}

impl Drop for CublasLt<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `open`, and used by nobody else.
        let _ = unsafe { lt::destroy_handle(self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Matrix;

    /// x Wᵀ of x [5, 8] (rows 16 apart) and W [3, 8]: outᵀ [3, 5] = W xᵀ, whose memory column-major
    /// is W [8, 3] transposed, x [8, 5] as it is.
    #[test]
    fn row_major_products_are_column_major_ones_of_the_transposes() {
        let x = Operand { stride: 16, ..Operand::plain(Matrix::new(0, 5, 8)) };
        let w = Operand::plain(Matrix::new(0, 3, 8)).transposed();
        let out = Operand::plain(Matrix::new(0, 5, 3));
        assert_eq!((column_major(w), w.transposed), ((8, 3, 8), true));
        assert_eq!((column_major(x), x.transposed), ((8, 5, 16), false));
        assert_eq!(column_major(out), (3, 5, 3));
    }
}
