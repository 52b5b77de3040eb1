//! A tensor as it lies in a file: a strided view of stored floats, converted to f32 when it is
//! read.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// The float types that feature files and checkpoints are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// IEEE 754's binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
    /// IEEE 754's binary32.
    F32,
    /// IEEE 754's binary64, rounded to f32 when it is read.
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

/// As PyTorch names them.
impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            DType::F32 => "float32",
            DType::F64 => "float64",
        })
    }
}

/// What a container holds under one name.
pub enum Entry {
    Float(StoredTensor),
    /// Anything that is not a float tensor, in words: "int64 [13, 2]".
    Other(String),
}

/// The bytes of a zip member that is stored as it is, and the checksum that the archive gives of
/// them.
pub struct Seal {
    pub bytes: Bytes,
    pub crc: u32,
    /// The member's name.
    pub name: String,
}

impl Seal {
    /// That `crc` is the one that the archive gives.
    pub fn check(&self, crc: u32) -> Result<(), String> {
        if crc == self.crc {
            return Ok(());
        }
        Err(format!(
            "is damaged: its member `{}` fails its checksum (CRC-32 {crc:08x}, expected {:08x})",
            self.name.escape_debug(),
            self.crc
        ))
    }
}

/// Little-endian floats behind a shape and strides (in elements, outermost first). The constructor
/// has checked that every element lies inside `bytes`, and that there are no more elements than
/// stored numbers.
#[derive(Clone)]
pub struct StoredTensor {
    pub dtype: DType,
    pub shape: Vec<usize>,
    strides: Vec<usize>,
    bytes: Bytes,
    /// The values are the numbers with the other sign: PyTorch's negative bit.
    pub negated: bool,
    /// What says whether the bytes are sound, where something does.
    pub seal: Option<Arc<Seal>>,
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
        Ok(Self { dtype, shape, strides, bytes, negated: false, seal: None })
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

    /// `[1, N, F]` and `[N, 1, F]` become `[N, F]`.
    pub fn without_batch_of_one(mut self) -> Self {
        if let Some(axis) = batch_axis(&self.shape) {
            self.shape.remove(axis);
            self.strides.remove(axis);
        }
        self
    }

    /// Whether a tensor whose lines lie side by side has all bytes of its seal, so that who reads
    /// all lines in order has read these.
    pub fn fills(&self, seal: &Seal) -> bool {
        self.is_contiguous()
            && self.bytes.as_ptr() == seal.bytes.as_ptr()
            && self.elements() * self.dtype.size() == seal.bytes.len()
    }

    /// All numbers in row-major order.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.elements()];
        let width = self.shape.last().copied().unwrap_or(1);
        self.read(0..out.len().checked_div(width).unwrap_or(0), &mut out);
        out
    }

    /// Converts lines `lines` into `out`, where a line is the last axis and lines are counted over
    /// all other axes (for a bag `[N, F]`: patches). `out` holds exactly these lines.
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
            return self.convert(self.numbers(lines.start * width, out.len()), out);
        }
        for (line, out) in lines.zip(out.chunks_exact_mut(width)) {
            let start = self.line_offset(line);
            if step == 1 {
                self.convert(self.numbers(start, width), out);
            } else {
                let span = (width - 1) * step + 1;
                gather(self.dtype, self.numbers(start, span), step, out);
                self.sign(out);
            }
        }
    }

    /// Which bytes of `whole` hold these lines, if they lie there side by side.
    pub fn place(&self, lines: &Range<usize>, whole: &[u8]) -> Option<Range<usize>> {
        let first = place_in(&self.bytes, whole)?.start;
        let line = self.shape.last()? * self.dtype.size();
        let range = first + lines.start * line..first + lines.end * line;
        (self.is_contiguous() && range.end <= whole.len()).then_some(range)
    }

    /// Converts lines that were read from their [`StoredTensor::place`].
    pub fn convert(&self, stored: &[u8], out: &mut [f32]) {
        convert(self.dtype, stored, out);
        self.sign(out);
    }

    fn sign(&self, out: &mut [f32]) {
        if self.negated {
            out.iter_mut().for_each(|x| *x = -*x);
        }
    }

    pub fn is_contiguous(&self) -> bool {
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

/// The axis of length 1 that a bag of three axes has too many: `[1, N, F]` or `[N, 1, F]`.
pub fn batch_axis(shape: &[usize]) -> Option<usize> {
    match shape {
        [1, _, _] => Some(0),
        [_, 1, _] => Some(1),
        _ => None,
    }
}

/// Where `part` lies in `whole`, if it does.
pub fn place_in(part: &[u8], whole: &[u8]) -> Option<Range<usize>> {
    let first = (part.as_ptr() as usize).checked_sub(whole.as_ptr() as usize)?;
    let range = first..first.checked_add(part.len())?;
    (range.end <= whole.len()).then_some(range)
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
pub fn convert(dtype: DType, bytes: &[u8], out: &mut [f32]) {
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

/// The first NaN or infinity. Whole blocks are tested first with a loop that vectorises; only a bad
/// one is searched.
pub fn first_non_finite(values: &[f32]) -> Option<usize> {
    const BLOCK: usize = 1024;
    const EXPONENT: u32 = 0x7f80_0000;
    let bad = values
        .chunks(BLOCK)
        .position(|block| block.iter().fold(false, |bad, x| bad | (x.to_bits() & EXPONENT == EXPONENT)))?;
    let start = bad * BLOCK;
    values[start..].iter().position(|x| !x.is_finite()).map(|i| start + i)
}
