//! DLPack's tensors (dlpack.h of DLPack 1.x, whose layout this is), and the matrices that ops take
//! of them.

use std::ffi::c_void;

use engine::{
    Error, Result,
    device::{Device, Element, Mat, MatMut},
};
use half::bf16;

use crate::{given, usage};

/// Where a tensor's memory is.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DLDevice {
    /// 1: the CPU; 2: CUDA; 3: page-locked memory of the host; 13: CUDA's managed memory.
    pub device_type: i32,
    pub device_id: i32,
}

/// What a tensor's elements are.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DLDataType {
    /// 2: IEEE floating point; 4: bfloat.
    pub code: u8,
    pub bits: u8,
    pub lanes: u16,
}

/// A tensor that somebody else owns.
#[repr(C)]
pub struct DLTensor {
    pub data: *mut c_void,
    pub device: DLDevice,
    pub ndim: i32,
    pub dtype: DLDataType,
    pub shape: *mut i64,
    /// In elements; null of a tensor without gaps.
    pub strides: *mut i64,
    pub byte_offset: u64,
}

/// No operand has more than four; a number that was never set is larger.
const MOST_DIMENSIONS: usize = 64;

const CPU: i32 = 1;
const CUDA: i32 = 2;
const CUDA_HOST: i32 = 3;
const CUDA_MANAGED: i32 = 13;

/// The types that ops store.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Dtype {
    F32,
    Bf16,
    F64,
}

impl DLTensor {
    /// The type that an op is to run in: that of its first operand.
    pub fn dtype(&self, name: &str) -> Result<Dtype> {
        match self.dtype {
            DLDataType { code: 2, bits: 32, lanes: 1 } => Ok(Dtype::F32),
            DLDataType { code: 2, bits: 64, lanes: 1 } => Ok(Dtype::F64),
            DLDataType { code: 4, bits: 16, lanes: 1 } => Ok(Dtype::Bf16),
            other => {
                Err(usage(format!("{name} is of {}: expected float32, bfloat16, or float64 on a CPU", spell(other))))
            }
        }
    }

    /// # Safety
    /// `shape` and `strides` must be as DLPack says.
    unsafe fn sizes(&self, name: &str) -> Result<(Vec<i64>, Vec<i64>)> {
        let rank = usize::try_from(self.ndim).ok().filter(|&rank| rank <= MOST_DIMENSIONS);
        let rank = rank
            .ok_or_else(|| usage(format!("{name} has {} dimensions, expected at most {MOST_DIMENSIONS}", self.ndim)))?;
        // SAFETY: the caller's.
        let shape = unsafe { crate::array(&format!("{name}'s shape"), self.shape, rank) }?.to_vec();
        if shape.iter().any(|&size| size < 0) {
            return Err(usage(format!("{name} has shape {shape:?}")));
        }
        if self.strides.is_null() {
            let mut strides = vec![1i64; rank];
            for i in (1..rank).rev() {
                strides[i - 1] = strides[i].saturating_mul(shape[i].max(1));
            }
            return Ok((shape, strides));
        }
        // SAFETY: the caller's.
        let strides = unsafe { crate::array(&format!("{name}'s strides"), self.strides, rank) }?.to_vec();
        Ok((shape, strides))
    }

    /// Rows, columns and the elements from row to row: the first dimension is the rows, all others
    /// together are the columns, which have no gaps. One dimension, or none, is one row.
    ///
    /// # Safety
    /// As [`DLTensor::sizes`].
    unsafe fn matrix(&self, name: &str) -> Result<(usize, usize, usize)> {
        // SAFETY: the caller's.
        let (shape, strides) = unsafe { self.sizes(name) }?;
        let (rows, inner, inner_strides) = match shape.len() {
            0 | 1 => (1, &shape[..], &strides[..]),
            _ => (shape[0], &shape[1..], &strides[1..]),
        };
        let cols = inner.iter().try_fold(1i64, |cols, &size| cols.checked_mul(size));
        let fits = |cols: &i64| cols.checked_mul(rows).is_some_and(|count| count as u64 <= crate::MOST_ELEMENTS as u64);
        let cols = cols.filter(fits);
        let cols = cols.ok_or_else(|| usage(format!("{name} has shape {shape:?}, which is in no memory")))?;
        let mut expected = 1;
        for (&size, &stride) in inner.iter().zip(inner_strides).rev() {
            if size > 1 && stride != expected && rows * cols > 0 {
                return Err(usage(format!(
                    "{name} has shape {shape:?} and strides {strides:?}: expected rows without gaps (make it contiguous)"
                )));
            }
            expected = i64::saturating_mul(expected, size.max(1));
        }
        let stride = if shape.len() > 1 && rows > 1 { strides[0] } else { cols };
        let stride = usize::try_from(stride)
            .ok()
            .filter(|&stride| stride >= cols as usize)
            .ok_or_else(|| usage(format!("{name} has shape {shape:?} and strides {strides:?}: its rows overlap")))?;
        Ok((rows as usize, cols as usize, stride))
    }

    fn check_place(&self, name: &str, device: &Device) -> Result<()> {
        let DLDevice { device_type, device_id } = self.device;
        let here = match device.gpu() {
            None => matches!(device_type, CPU | CUDA_HOST),
            Some(gpu) => device_type == CUDA_MANAGED || (device_type, device_id) == (CUDA, gpu as i32),
        };
        if here {
            return Ok(());
        }
        let wanted = device.gpu().map_or("the CPU".into(), |gpu| format!("GPU {gpu}"));
        let got = match device_type {
            CPU | CUDA_HOST => "the CPU".into(),
            CUDA => format!("GPU {device_id}"),
            other => format!("device type {other}"),
        };
        Err(usage(format!("{name} is on {got}, the context on {wanted}")))
    }
}

fn spell(DLDataType { code, bits, lanes }: DLDataType) -> String {
    let kind = match code {
        0 => "int",
        1 => "uint",
        2 => "float",
        4 => "bfloat",
        _ => "type code ",
    };
    let code = if matches!(code, 0 | 1 | 2 | 4) { String::new() } else { code.to_string() };
    let lanes = if lanes == 1 { String::new() } else { format!(" x {lanes}") };
    format!("{kind}{code}{bits}{lanes}")
}

/// An element as DLPack spells it.
pub trait Stored: Element {
    const DTYPE: DLDataType;
}

impl Stored for f32 {
    const DTYPE: DLDataType = DLDataType { code: 2, bits: 32, lanes: 1 };
}

impl Stored for f64 {
    const DTYPE: DLDataType = DLDataType { code: 2, bits: 64, lanes: 1 };
}

impl Stored for bf16 {
    const DTYPE: DLDataType = DLDataType { code: 4, bits: 16, lanes: 1 };
}

/// Where the rows of a tensor are.
pub struct Place<T> {
    pub address: *mut T,
    pub rows: usize,
    pub cols: usize,
    /// Elements from row to row.
    pub stride: usize,
}

/// A tensor that holds `T`.
///
/// # Safety
/// It must keep DLPack's promises.
unsafe fn place<T: Stored>(name: &str, tensor: &DLTensor) -> Result<Place<T>> {
    if tensor.dtype != T::DTYPE {
        return Err(usage(format!("{name} is of {}, expected {}", spell(tensor.dtype), spell(T::DTYPE))));
    }
    // SAFETY: the caller's.
    let (rows, cols, stride) = unsafe { tensor.matrix(name) }?;
    if tensor.data.is_null() && rows * cols > 0 {
        return Err(usage(format!("{name} is null: there is no element of {} bytes", size_of::<T>())));
    }
    let address = usize::try_from(tensor.byte_offset).ok().and_then(|offset| tensor.data.addr().checked_add(offset));
    let address = address.ok_or_else(|| usage(format!("{name} has byte_offset {}", tensor.byte_offset)))?;
    let address = tensor.data.with_addr(address).cast::<T>();
    if !address.is_aligned() {
        return Err(usage(format!("{name} is at {address:?}, where no {} can be", spell(T::DTYPE))));
    }
    Ok(Place { address, rows, cols, stride })
}

/// A tensor in the host's memory.
///
/// # Safety
/// The pointer must be null or to a DLTensor that keeps DLPack's promises.
pub unsafe fn host_rows<T: Stored>(name: &str, tensor: *const DLTensor) -> Result<Place<T>> {
    // SAFETY: the caller's.
    let tensor = unsafe { given(name, tensor) }?;
    if !matches!(tensor.device.device_type, CPU | CUDA_HOST) {
        return Err(usage(format!("{name} is not in the host's memory")));
    }
    // SAFETY: the caller's.
    unsafe { place(name, tensor) }
}

/// # Safety
/// As [`host_rows`]; the tensor's memory must be alive, and its numbers' owner must let them be.
pub unsafe fn read<'a, T: Stored>(device: &'a Device, name: &str, tensor: *const DLTensor) -> Result<Mat<'a, T>> {
    // SAFETY: the caller's.
    unsafe {
        let tensor = given(name, tensor)?;
        tensor.check_place(name, device)?;
        let Place { address, rows, cols, stride } = place::<T>(name, tensor)?;
        Mat::from_raw(device, address, rows, cols, stride).map_err(|e| named(name, e))
    }
}

/// # Safety
/// As [`read`], and nobody else may look at the memory.
pub unsafe fn write<'a, T: Stored>(device: &'a Device, name: &str, tensor: *const DLTensor) -> Result<MatMut<'a, T>> {
    // SAFETY: the caller's.
    unsafe {
        let tensor = given(name, tensor)?;
        tensor.check_place(name, device)?;
        let Place { address, rows, cols, stride } = place::<T>(name, tensor)?;
        MatMut::from_raw(device, address, rows, cols, stride).map_err(|e| named(name, e))
    }
}

fn named(name: &str, e: Error) -> Error {
    usage(format!("{name}: {e}"))
}

/// An operand that may be absent.
pub fn optional(tensor: *const DLTensor) -> Option<*const DLTensor> {
    (!tensor.is_null()).then_some(tensor)
}
