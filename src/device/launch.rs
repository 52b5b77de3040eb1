//! A kernel launch as plain data: an op makes it as a pure function of its shapes, the emulator or
//! a GPU runs it.

use bytemuck::{Pod, Zeroable};

use super::{Element, View};

/// How a kernel's activations and weights are stored; its arithmetic is f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Storage {
    /// f32, 4 bytes.
    F32,
    /// bfloat16, 2 bytes.
    Bf16,
}

impl Storage {
    /// Of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// What the names of its kernels end in.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

/// An element type that kernels are compiled for.
pub(crate) trait Stored: Element {
    const STORAGE: Storage;
}

impl Stored for f32 {
    const STORAGE: Storage = Storage::F32;
}

impl Stored for half::bf16 {
    const STORAGE: Storage = Storage::Bf16;
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Launch {
    /// As the source file spells it; [`Launch::symbol`] adds the storage type.
    pub kernel: &'static str,
    pub storage: Storage,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    pub args: Vec<Arg>,
}

impl Launch {
    /// The name of the compiled kernel.
    pub(crate) fn symbol(&self) -> String {
        format!("{}_{}", self.kernel, self.storage.suffix())
    }
}

/// One argument of a kernel, by value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Arg {
    words: Vec<u64>,
    bytes: usize,
}

impl Arg {
    /// `value` has the layout of the kernel's parameter; device memory goes by address.
    pub(crate) fn new<T: Pod>(value: T) -> Self {
        const { assert!(align_of::<T>() <= align_of::<u64>()) };
        let bytes = size_of::<T>();
        let mut words = vec![0u64; bytes.div_ceil(8)];
        bytemuck::cast_slice_mut(&mut words)[..bytes].copy_from_slice(bytemuck::bytes_of(&value));
        Self { words, bytes }
    }

    pub(crate) fn as_ptr(&self) -> *const u64 {
        self.words.as_ptr()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.bytes]
    }
}

/// A row-major matrix in device memory, as kernels take it (`Matrix` of kernels/gpu.cuh).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub(crate) struct Matrix {
    pub address: u64,
    /// Elements from one row to the next.
    pub stride: u64,
    pub rows: u32,
    pub cols: u32,
}

impl Matrix {
    /// A contiguous one.
    pub(crate) fn new(address: u64, rows: usize, cols: usize) -> Self {
        Self { address, stride: cols as u64, rows: rows as u32, cols: cols as u32 }
    }

    /// Whether every row starts at a multiple of `bytes` and holds a whole number of such pieces.
    pub(crate) fn splits_into(&self, bytes: usize, storage: Storage) -> bool {
        let size = storage.bytes() as u64;
        let row_ends_well = self.rows <= 1 || (self.stride * size).is_multiple_of(bytes as u64);
        self.address.is_multiple_of(bytes as u64)
            && row_ends_well
            && (u64::from(self.cols) * size).is_multiple_of(bytes as u64)
    }
}

impl<T: Element> From<View<T>> for Matrix {
    fn from(view: View<T>) -> Self {
        let (rows, cols) = (view.rows() as u32, view.cols() as u32);
        Self { address: view.address(), stride: view.stride() as u64, rows, cols }
    }
}
