//! A tensor as it lies in a file: a strided view of stored floats, converted to f32 when it is read.

use std::ops::Range;

use bytes::Bytes;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// The float types that feature files and checkpoints are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    F16,
    BF16,
    F32,
    F64,
}

impl DType {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            DType::F16 | DType::BF16 => 2,
            DType::F32 => 4,
            DType::F64 => 8,
        }
    }
}

/// What a container holds under one name.
pub enum Entry {
    Float(StoredTensor),
    /// Anything that is not a float tensor, in words: "an int64 tensor".
    Other(String),
}

/// Little-endian floats behind a shape and strides (in elements, outermost first). The constructor has checked that
/// every element lies inside `bytes`, and that there are no more elements than stored numbers.
#[derive(Clone)]
pub struct StoredTensor {
    pub dtype: DType,
    pub shape: Vec<usize>,
    strides: Vec<usize>,
    bytes: Bytes,
}

impl StoredTensor {
    /// The view of `storage` that starts at element `offset`.
    pub fn new(
        dtype: DType,
        shape: Vec<usize>,
        strides: Vec<usize>,
        offset: usize,
        storage: Bytes,
    ) -> Result<Self, String> {
        if shape.len() != strides.len() {
            return Err(format!("has shape {shape:?} but strides {strides:?}"));
        }
        let stored = storage.len() / dtype.size();
        let elements = product(&shape).ok_or_else(|| format!("has the impossible shape {shape:?}"))?;
        // A view that repeats elements (torch's expand) could claim any size from a few bytes.
        let end = if elements == 0 { Some(offset) } else { last_element(&shape, &strides, offset) };
        if end.is_none_or(|end| end > stored) || elements > stored {
            return Err(format!(
                "has shape {shape:?}, strides {strides:?} and offset {offset}, but its storage holds {stored} numbers"
            ));
        }
        let bytes = storage.slice(offset * dtype.size()..);
        Ok(Self { dtype, shape, strides, bytes })
    }

    /// Row-major numbers that fill `storage` exactly.
    pub fn contiguous(dtype: DType, shape: Vec<usize>, storage: Bytes) -> Result<Self, String> {
        let mut strides = vec![1usize; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis].saturating_mul(shape[axis]);
        }
        Self::new(dtype, shape, strides, 0, storage)
    }

    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// `[1, N, F]` becomes `[N, F]`.
    pub fn without_batch_of_one(mut self) -> Self {
        if self.shape.len() == 3 && self.shape[0] == 1 {
            self.shape.remove(0);
            self.strides.remove(0);
        }
        self
    }

    /// All numbers in row-major order.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.elements()];
        let width = self.shape.last().copied().unwrap_or(1);
        self.read(0..out.len().checked_div(width).unwrap_or(0), &mut out);
        out
    }

    /// Converts lines `lines` into `out`, where a line is the last axis and lines are counted over all other axes
    /// (for a bag `[N, F]`: patches). `out` holds exactly these lines.
    pub fn read(&self, lines: Range<usize>, out: &mut [f32]) {
        let (width, step) = match (self.shape.last(), self.strides.last()) {
            (Some(&width), Some(&step)) => (width, step),
            _ => (1, 1),
        };
        assert_eq!(out.len(), lines.len() * width);
        if width == 0 || lines.is_empty() {
            return;
        }
        if self.is_contiguous() {
            return convert(self.dtype, self.numbers(lines.start * width, out.len()), out);
        }
        for (line, out) in lines.zip(out.chunks_exact_mut(width)) {
            let start = self.line_offset(line);
            if step == 1 {
                convert(self.dtype, self.numbers(start, width), out);
            } else {
                let span = (width - 1) * step + 1;
                gather(self.dtype, self.numbers(start, span), step, out);
            }
        }
    }

    /// Which bytes of `whole` hold these lines, if they lie there side by side.
    pub fn place(&self, lines: &Range<usize>, whole: &[u8]) -> Option<Range<usize>> {
        let first = (self.bytes.as_ptr() as usize).checked_sub(whole.as_ptr() as usize)?;
        let line = self.shape.last()? * self.dtype.size();
        let range = first + lines.start * line..first + lines.end * line;
        (self.is_contiguous() && range.end <= whole.len()).then_some(range)
    }

    /// Converts lines that were read from their [`StoredTensor::place`].
    pub fn convert(&self, stored: &[u8], out: &mut [f32]) {
        convert(self.dtype, stored, out);
    }

    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.shape.iter().zip(&self.strides).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == expected;
            expected *= size;
            fits
        })
    }

    /// Where a line starts, in elements.
    fn line_offset(&self, mut line: usize) -> usize {
        let outer = self.shape.len().saturating_sub(1);
        let mut offset = 0;
        for axis in (0..outer).rev() {
            offset += line % self.shape[axis] * self.strides[axis];
            line /= self.shape[axis];
        }
        offset
    }

    fn numbers(&self, start: usize, count: usize) -> &[u8] {
        let size = self.dtype.size();
        &self.bytes[start * size..(start + count) * size]
    }
}

/// The number of elements, unless it overflows.
pub fn product(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size))
}

/// One past the highest element that a non-empty view touches.
fn last_element(shape: &[usize], strides: &[usize], offset: usize) -> Option<usize> {
    let last = shape
        .iter()
        .zip(strides)
        .try_fold(offset, |sum, (&size, &stride)| sum.checked_add((size - 1).checked_mul(stride)?))?;
    last.checked_add(1)
}

/// Adjacent numbers. The bytes need no alignment: the loops compile to unaligned vector loads.
fn convert(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::F32 => numbers(bytes, f32::from_le_bytes).zip(out).for_each(|(x, out)| *out = x),
        DType::F64 => numbers(bytes, f64::from_le_bytes).zip(out).for_each(|(x, out)| *out = x as f32),
        DType::BF16 => numbers(bytes, bf16::from_le_bytes).zip(out).for_each(|(x, out)| *out = x.to_f32()),
        DType::F16 => {
            // In blocks, since `half` converts whole aligned slices with the CPU's own instruction.
            let mut block = [f16::ZERO; 512];
            for (bytes, out) in bytes.chunks(2 * block.len()).zip(out.chunks_mut(block.len())) {
                let block = &mut block[..out.len()];
                numbers(bytes, f16::from_le_bytes).zip(block.iter_mut()).for_each(|(x, slot)| *slot = x);
                block.convert_to_f32_slice(out);
            }
        }
    }
}

/// Every `step`-th number.
fn gather(dtype: DType, bytes: &[u8], step: usize, out: &mut [f32]) {
    fn every<const SIZE: usize>(bytes: &[u8], step: usize, out: &mut [f32], value: impl Fn([u8; SIZE]) -> f32) {
        let (numbers, _) = bytes.as_chunks::<SIZE>();
        for (i, out) in out.iter_mut().enumerate() {
            *out = value(numbers[i * step]);
        }
    }
    match dtype {
        DType::F32 => every(bytes, step, out, f32::from_le_bytes),
        DType::F64 => every(bytes, step, out, |b| f64::from_le_bytes(b) as f32),
        DType::BF16 => every(bytes, step, out, |b| bf16::from_le_bytes(b).to_f32()),
        DType::F16 => every(bytes, step, out, |b| f16::from_le_bytes(b).to_f32()),
    }
}

fn numbers<const SIZE: usize, T>(bytes: &[u8], value: impl Fn([u8; SIZE]) -> T) -> impl Iterator<Item = T> {
    bytes.as_chunks::<SIZE>().0.iter().map(move |&b| value(b))
}

/// The first NaN or infinity. Whole blocks are tested first with a loop that vectorises; only a bad one is searched.
pub fn first_non_finite(values: &[f32]) -> Option<usize> {
    const BLOCK: usize = 1024;
    const EXPONENT: u32 = 0x7f80_0000;
    let bad = values
        .chunks(BLOCK)
        .position(|block| block.iter().fold(false, |bad, x| bad | (x.to_bits() & EXPONENT == EXPONENT)))?;
    let start = bad * BLOCK;
    values[start..].iter().position(|x| !x.is_finite()).map(|i| start + i)
}
