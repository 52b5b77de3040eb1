//! Matrices for users of the ops alone: owned on a device ([`Tensor`]), or borrowed to read
//! ([`Mat`]) or to write ([`MatMut`]). They keep what the crate's own views leave to the model's
//! care: memory outlives its use, an op's operands are on one device, and what is written is nobody
//! else's.
//!
//! ```
//! use std::sync::Arc;
//!
//! use crossfusion::{
//!     device::{Device, Tensor, Workspace},
//!     ops::{Linear, linear},
//! };
//!
//! # fn main() -> crossfusion::Result<()> {
//! // or "auto", which takes a GPU where there is one
//! let device = Arc::new(Device::from_name("cpu", 0)?);
//! let mut workspace = Workspace::new(&device)?;
//! let x = Tensor::from_slice(&device, &[1.0f32, 2.0, 3.0, 5.0], 2, 2)?;
//! let (weight, bias) = (Tensor::from_slice(&device, &[1.0, 0.0, 0.0, 1.0], 2, 2)?, Tensor::zeros(&device, 1, 2)?);
//! let mut y = Tensor::zeros(&device, 2, 2)?;
//! linear(
//!     &mut workspace,
//!     &mut [Linear {
//!         x: x.mat(),
//!         weight: weight.mat(),
//!         bias: Some(bias.mat()),
//!         gelu: None,
//!         dropout: None,
//!         residual: None,
//!         y: y.mat_mut(),
//!     }],
//! )?;
//! assert_eq!(y.to_vec()?, x.to_vec()?);
//! # Ok(())
//! # }
//! ```
//!
//! A matrix does not outlive the memory that it looks at:
//!
//! ```compile_fail,E0505
//! # use crossfusion::device::{Device, Tensor};
//! # let device = Device::from_name("cpu", 1).unwrap();
//! let tensor = Tensor::<f32>::zeros(&device, 2, 2).unwrap();
//! let matrix = tensor.mat();
//! drop(tensor);
//! assert_eq!(matrix.rows(), 2);
//! ```
//!
//! nor is it read while it is written:
//!
//! ```compile_fail,E0502
//! # use crossfusion::{device::{Device, Tensor, Workspace}, ops::{GeluDropout, gelu_dropout}};
//! # let device = std::sync::Arc::new(Device::from_name("cpu", 1).unwrap());
//! # let mut workspace = Workspace::new(&device).unwrap();
//! let mut x = Tensor::<f32>::zeros(&device, 2, 2).unwrap();
//! let mut problem = GeluDropout { x: x.mat(), gelu: true, dropout: None, out: x.mat_mut() };
//! gelu_dropout(&mut workspace, &mut [problem]).unwrap();
//! ```
//!
//! and nobody launches a kernel on an address:
//!
//! ```compile_fail,E0624
//! # use crossfusion::device::Device;
//! let device = Device::from_name("cpu", 1).unwrap();
//! let buffer = device.alloc(64).unwrap();
//! ```

use std::{marker::PhantomData, ops::Range, sync::Arc};

use super::{Arena, Buffer, Device, Element, View};
use crate::{Error, Result};

/// A row-major matrix `[rows, cols]` in a device's memory.
pub struct Tensor<'d, T: Element> {
    device: &'d Device,
    buffer: Buffer,
    rows: usize,
    cols: usize,
    element: PhantomData<T>,
}

impl<'d, T: Element> Tensor<'d, T> {
    /// Zeros.
    pub fn zeros(device: &'d Device, rows: usize, cols: usize) -> Result<Self> {
        let buffer = device.alloc(Arena::matrix_bytes::<T>(rows, cols)?)?;
        Ok(Self { device, buffer, rows, cols, element: PhantomData })
    }

    /// A copy of host memory, row by row; an error unless it has `rows * cols` values.
    pub fn from_slice(device: &'d Device, values: &[T], rows: usize, cols: usize) -> Result<Self> {
        let tensor = Self::zeros(device, rows, cols)?;
        device.upload(values, tensor.view())?;
        Ok(tensor)
    }

    /// A copy in host memory, row by row, after all work so far.
    pub fn to_vec(&self) -> Result<Vec<T>> {
        self.device.download(self.view())
    }

    /// Its rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Its columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Itself, to read.
    pub fn mat(&self) -> Mat<'_, T> {
        Mat { device: self.device, view: self.view(), owner: PhantomData }
    }

    /// Itself, to write.
    pub fn mat_mut(&mut self) -> MatMut<'_, T> {
        MatMut { device: self.device, view: self.view(), owner: PhantomData }
    }

    fn view(&self) -> View<T> {
        self.buffer.view(0, self.rows, self.cols)
    }
}

impl<T: Element> Drop for Tensor<'_, T> {
    fn drop(&mut self) {
        // Work that uses it may still wait to be run. A GPU frees in the order of its work, and an
        // error there is told by whatever is asked of it next.
        if !matches!(self.device, Device::Cuda(_)) {
            let _ = self.device.synchronize();
        }
    }
}

/// A matrix that is borrowed to read.
#[derive(Clone, Copy)]
pub struct Mat<'a, T> {
    device: &'a Device,
    view: View<T>,
    owner: PhantomData<&'a [T]>,
}

impl<'a, T: Element> Mat<'a, T> {
    /// Host memory, for a device whose memory is the host's; an error on another, or unless it has
    /// `rows * cols` values.
    pub fn of_slice(device: &'a Device, values: &'a [T], rows: usize, cols: usize) -> Result<Self> {
        check_host(device, values.len(), rows, cols)?;
        // SAFETY: `owner` keeps the slice borrowed as long as the view can be reached.
        let view = unsafe { View::of_slice(values, rows, cols) };
        Ok(Self { device, view, owner: PhantomData })
    }

    /// Memory of `device` that another library owns: rows of `cols` elements, `stride` elements from
    /// one to the next. An error where rows overlap, or the address is none of a `T`.
    ///
    /// # Safety
    /// The memory must be alive and of these numbers as long as the matrix is used, and written to by
    /// nobody else meanwhile; on a GPU, by no work that the device's stream does not wait for.
    pub unsafe fn from_raw(
        device: &'a Device,
        address: *const T,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> Result<Self> {
        Ok(Self { device, view: foreign(address as usize, rows, cols, stride)?, owner: PhantomData })
    }

    /// Its rows.
    pub fn rows(&self) -> usize {
        self.view.rows()
    }

    /// Its columns.
    pub fn cols(&self) -> usize {
        self.view.cols()
    }

    /// Some of its rows; an error past the end.
    pub fn rows_range(self, rows: Range<usize>) -> Result<Self> {
        check_range("rows", &rows, self.rows())?;
        Ok(Self { view: self.view.rows_range(rows), ..self })
    }

    /// Some of its columns; an error past the end.
    pub fn cols_range(self, cols: Range<usize>) -> Result<Self> {
        check_range("columns", &cols, self.cols())?;
        Ok(Self { view: self.view.cols_range(cols), ..self })
    }
}

/// A matrix that is borrowed to write.
pub struct MatMut<'a, T> {
    device: &'a Device,
    view: View<T>,
    owner: PhantomData<&'a mut [T]>,
}

impl<'a, T: Element> MatMut<'a, T> {
    /// As [`Mat::of_slice`].
    pub fn of_slice(device: &'a Device, values: &'a mut [T], rows: usize, cols: usize) -> Result<Self> {
        check_host(device, values.len(), rows, cols)?;
        // SAFETY: `owner` keeps the slice borrowed as long as the view can be reached.
        let view = unsafe { View::of_slice_mut(values, rows, cols) };
        Ok(Self { device, view, owner: PhantomData })
    }

    /// As [`Mat::from_raw`].
    ///
    /// # Safety
    /// As of [`Mat::from_raw`], and nobody else may read the memory meanwhile either.
    pub unsafe fn from_raw(
        device: &'a Device,
        address: *mut T,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> Result<Self> {
        Ok(Self { device, view: foreign(address as usize, rows, cols, stride)?, owner: PhantomData })
    }

    /// Its rows.
    pub fn rows(&self) -> usize {
        self.view.rows()
    }

    /// Its columns.
    pub fn cols(&self) -> usize {
        self.view.cols()
    }

    /// Two matrices: its first rows, and the others; an error past the end.
    pub fn split_rows(self, first: usize) -> Result<[Self; 2]> {
        check_range("rows", &(0..first), self.rows())?;
        let Self { device, view, owner } = self;
        let rows = view.rows();
        Ok([view.rows_range(0..first), view.rows_range(first..rows)].map(|view| Self { device, view, owner }))
    }

    /// For a shorter time.
    pub fn reborrow(&mut self) -> MatMut<'_, T> {
        MatMut { device: self.device, view: self.view, owner: PhantomData }
    }
}

fn foreign<T: Element>(address: usize, rows: usize, cols: usize, stride: usize) -> Result<View<T>> {
    if rows > 1 && stride < cols {
        let message = format!("rows of {cols} elements, {stride} apart, overlap");
        return Err(Error::Usage(message));
    }
    let bytes = rows.checked_mul(stride.max(cols)).and_then(|len| len.checked_mul(size_of::<T>()));
    let end = bytes.and_then(|bytes| address.checked_add(bytes));
    if end.is_none() || rows > u32::MAX as usize || cols > u32::MAX as usize {
        return Err(Error::Usage(format!("{rows} rows of {cols} elements, {stride} apart, are in no memory")));
    }
    if address == 0 && rows * cols > 0 || !address.is_multiple_of(align_of::<T>()) {
        return Err(Error::Usage(format!("there is no element of {} bytes at address {address:#x}", size_of::<T>())));
    }
    // a slice of no elements has an address, too
    let address = if address == 0 { align_of::<T>() } else { address };
    Ok(View::strided(address, rows, cols, stride))
}

fn check_host(device: &Device, len: usize, rows: usize, cols: usize) -> Result<()> {
    if !device.is_host() || device.runs_kernels() {
        let message = "host memory is for the CPU; a Tensor holds a copy on another device";
        return Err(Error::Usage(message.into()));
    }
    if rows.checked_mul(cols) != Some(len) {
        return Err(Error::Shape { op: "matrix", tensor: "values".into(), got: vec![len], expected: vec![rows, cols] });
    }
    Ok(())
}

fn check_range(what: &str, range: &Range<usize>, len: usize) -> Result<()> {
    if range.start <= range.end && range.end <= len {
        return Ok(());
    }
    Err(Error::Usage(format!("{what} {} to {} of {len}", range.start, range.end)))
}

/// Takes the operands of one call of an op.
pub(crate) struct Operands {
    pub op: &'static str,
    pub device: Arc<Device>,
}

impl Operands {
    pub(crate) fn read<T: Element>(&self, name: &str, matrix: &Mat<T>) -> Result<View<T>> {
        self.check(name, matrix.device)?;
        Ok(matrix.view)
    }

    pub(crate) fn write<T: Element>(&self, name: &str, matrix: &MatMut<T>) -> Result<View<T>> {
        self.check(name, matrix.device)?;
        Ok(matrix.view)
    }

    fn check(&self, name: &str, device: &Device) -> Result<()> {
        if std::ptr::eq(device, &*self.device) {
            return Ok(());
        }
        Err(Error::Usage(format!("{}: {name} is on another device than the workspace", self.op)))
    }
}

/// Scratch memory that ops take for themselves, kept from op to op.
pub struct Workspace {
    device: Arc<Device>,
    arena: Arena,
}

impl Workspace {
    /// Empty: it grows with what the ops need.
    pub fn new(device: &Arc<Device>) -> Result<Self> {
        Ok(Self { device: device.clone(), arena: Arena::new(device, 0)? })
    }

    /// What takes an op's operands, all of which must be on this device.
    pub(crate) fn operands(&self, op: &'static str) -> Operands {
        Operands { op, device: self.device.clone() }
    }

    /// Runs an op with as much scratch as it takes.
    pub(crate) fn run(&mut self, work: impl Fn(&Device, &mut Arena) -> Result<()>) -> Result<()> {
        let mut counted = Arena::unlimited();
        work(&self.device.dry(), &mut counted)?;
        if counted.peak() > self.arena.bytes() {
            // a GPU frees the old one in the order of its work
            if self.device.gpu().is_none() {
                self.device.synchronize()?;
            }
            self.arena = Arena::new(&self.device, counted.peak())?;
        }
        self.arena.reset();
        work(&self.device, &mut self.arena)
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        // as of a tensor
        if self.device.gpu().is_none() {
            let _ = self.device.synchronize();
        }
    }
}
