//! A bag's features on disk: `.pt`, `.safetensors` or `.h5`, opened by content and read by rows.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use half::f16;
use ndarray::Array2;
use rust_hdf5::{H5Dataset, H5File, format::messages::datatype::DatatypeMessage};
use safetensors::SafeTensors;

use super::{
    pickle::{self, Element},
    torch::{Bytes, Located, TorchFile, safetensors_tensors, to_f32},
};
use crate::{Error, Result};

/// One bag, `[patches, features]`. Its header has been read and checked against the file's length; the features are read when asked for, from a
/// memory map where the format allows.
pub struct FeatureFile {
    path: PathBuf,
    patches: usize,
    features: usize,
    content: Content,
}

enum Content {
    /// A strided matrix in the file's bytes.
    Matrix { bytes: Bytes, matrix: Located },
    /// A dataset of an HDF5 file, read through the library, which opens the file again for each range of rows.
    Hdf5 { dataset: String, element: Element, batch: bool },
}

/// Names under which a feature matrix is stored: CLAM and TRIDENT, STAMP, older STAMP.
const NAMES: [&str; 3] = ["features", "feats", "patch_embeddings"];

impl FeatureFile {
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = Bytes::open(path)?;
        if bytes.starts_with(b"\x89HDF\r\n\x1a\n") {
            return Self::hdf5(path);
        }
        Self::matrix(path, bytes)
    }

    /// From bytes that are not HDF5; `name` is only for messages.
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self> {
        Self::matrix(Path::new(name), Bytes::Owned(bytes))
    }

    pub fn patches(&self) -> usize {
        self.patches
    }

    pub fn features(&self) -> usize {
        self.features
    }

    fn matrix(path: &Path, bytes: Bytes) -> Result<Self> {
        let located = locate(&bytes).map_err(|message| Error::file(path, message))?;
        let (patches, features) = check_shape(path, &located.shape, located.element)?;
        // a batch of one is a matrix, too
        let strides = located.strides[located.strides.len() - 2..].to_vec();
        let matrix = Located { shape: vec![patches, features], strides, ..located };
        Ok(Self { path: path.to_path_buf(), patches, features, content: Content::Matrix { bytes, matrix } })
    }

    fn hdf5(path: &Path) -> Result<Self> {
        let (shape, dataset, element) = with_dataset(path, None, |name, dataset| {
            let element = hdf5_element(&dataset.datatype().map_err(|e| e.to_string())?)?;
            Ok((dataset.shape(), name.to_string(), element))
        })?;
        let (patches, features) = check_shape(path, &shape, element)?;
        let content = Content::Hdf5 { dataset, element, batch: shape.len() == 3 };
        Ok(Self { path: path.to_path_buf(), patches, features, content })
    }

    /// The whole bag.
    pub fn read(&self) -> Result<Array2<f32>> {
        let mut values = vec![0.0; self.patches * self.features];
        self.read_rows(0..self.patches, &mut values)?;
        Array2::from_shape_vec((self.patches, self.features), values).map_err(|e| Error::file(&self.path, e))
    }

    /// Rows `rows` into `out` `[rows, features]`, as f32. A value that is not finite is an error naming its patch and column.
    pub fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        if rows.end > self.patches || out.len() != rows.len() * self.features {
            let (got, expected) = (vec![rows.end, out.len()], vec![self.patches, rows.len() * self.features]);
            return Err(Error::Shape { op: "read_rows", tensor: "rows and out".into(), got, expected });
        }
        match &self.content {
            Content::Matrix { bytes, matrix } => read_matrix(&bytes[matrix.storage.clone()], matrix, rows.clone(), out),
            Content::Hdf5 { dataset, element, batch } => {
                let (mut starts, mut counts) = (vec![rows.start, 0], vec![rows.len(), self.features]);
                if *batch {
                    starts.insert(0, 0);
                    counts.insert(0, 1);
                }
                with_dataset(&self.path, Some(dataset), |_, dataset| {
                    read_hdf5(dataset, *element, &starts, &counts, out)
                })?;
            }
        }
        self.check_finite(rows.start, out)
    }

    fn check_finite(&self, first: usize, values: &[f32]) -> Result<()> {
        // An exponent of all ones is an infinity or NaN. Whole blocks are looked at without a branch, so that this vectorizes.
        const EXPONENT: u32 = 0x7f80_0000;
        for (block, values) in values.chunks(4096).enumerate() {
            let bad = values.iter().fold(0, |bad, x| bad | u32::from(x.to_bits() & EXPONENT == EXPONENT));
            if bad != 0
                && let Some(i) = values.iter().position(|x| !x.is_finite())
            {
                let at = block * 4096 + i;
                let (patch, column) = (first + at / self.features, at % self.features);
                return Err(Error::file(&self.path, format!("holds {} at patch {patch}, column {column}", values[i])));
            }
        }
        Ok(())
    }
}

/// The features' place in a torch or safetensors file.
fn locate(bytes: &[u8]) -> pickle::Result<Located> {
    if bytes.is_empty() {
        return Err("is an empty file".into());
    }
    // a safetensors file starts with its header's length and a JSON object
    if bytes.get(8) != Some(&b'{') {
        return TorchFile::parse(bytes)?.features();
    }
    let file = SafeTensors::deserialize(bytes).map_err(|e| format!("is not a readable safetensors file: {e}"))?;
    let mut tensors = safetensors_tensors(bytes, &file)?;
    if let Some(name) = NAMES.iter().find(|name| tensors.contains_key(**name)) {
        return tensors.remove(*name).ok_or_else(String::new);
    }
    let mut matrices = tensors.into_values().filter(|tensor| tensor.shape.len() == 2);
    match (matrices.next(), matrices.next()) {
        (Some(matrix), None) => Ok(matrix),
        _ => Err("has no tensor `features`, and not exactly one matrix".into()),
    }
}

/// (patches, features) of `[N, F]` or `[1, N, F]`.
fn check_shape(path: &Path, shape: &[usize], element: Element) -> Result<(usize, usize)> {
    if !matches!(element, Element::F64 | Element::F32 | Element::F16 | Element::BF16) {
        return Err(Error::file(path, format!("holds {element:?} values, expected floating-point features")));
    }
    match *shape {
        [0, _] | [1, 0, _] => Err(Error::file(path, format!("is an empty bag, of shape {shape:?}"))),
        [_, 0] | [1, _, 0] => Err(Error::file(path, format!("has patches without features, shape {shape:?}"))),
        [patches, features] | [1, patches, features] => Ok((patches, features)),
        _ => Err(Error::file(path, format!("holds a tensor of shape {shape:?}, expected [patches, features]"))),
    }
}

fn read_matrix(storage: &[u8], matrix: &Located, rows: Range<usize>, out: &mut [f32]) {
    let (features, size) = (matrix.shape[1], matrix.element.bytes());
    let [row_stride, column_stride] = [matrix.strides[0], matrix.strides[1]];
    for (row, out) in rows.zip(out.chunks_exact_mut(features)) {
        let start = (matrix.offset + row * row_stride) * size;
        if column_stride == 1 || features == 1 {
            convert(matrix.element, &storage[start..start + features * size], out);
        } else {
            for (column, out) in out.iter_mut().enumerate() {
                *out = to_f32(matrix.element, &storage[start + column * column_stride * size..]).unwrap_or(f32::NAN);
            }
        }
    }
}

/// Little-endian elements to f32, a row at a time.
fn convert(element: Element, data: &[u8], out: &mut [f32]) {
    match element {
        #[cfg(target_endian = "little")]
        Element::F32 => bytemuck::cast_slice_mut(out).copy_from_slice(data),
        _ => {
            for (data, out) in data.chunks_exact(element.bytes()).zip(out) {
                *out = to_f32(element, data).unwrap_or(f32::NAN);
            }
        }
    }
}

/// Opens the file's feature dataset (or the one named) and hands it to `work`.
fn with_dataset<R>(
    path: &Path,
    name: Option<&str>,
    work: impl FnOnce(&str, &H5Dataset) -> pickle::Result<R>,
) -> Result<R> {
    let open = || {
        let file = H5File::open(path).map_err(|e| format!("is not a readable HDF5 file: {e}"))?;
        let names = file.dataset_names();
        let stored = |candidate: &&&str| names.iter().any(|name| name.trim_start_matches('/') == **candidate);
        let name = match name {
            Some(name) => name,
            None => NAMES
                .iter()
                .find(stored)
                .ok_or_else(|| format!("has none of the datasets {}; it has {}", NAMES.join(", "), names.join(", ")))?,
        };
        let dataset = file.dataset(name).map_err(|e| format!("dataset `{name}` cannot be opened: {e}"))?;
        work(name, &dataset)
    };
    // The library may panic on a damaged file; that is the file's fault, not the user's.
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(open));
    let result = result.unwrap_or_else(|_| Err("is a damaged HDF5 file".into()));
    result.map_err(|message| Error::file(path, message))
}

fn hdf5_element(datatype: &DatatypeMessage) -> pickle::Result<Element> {
    match datatype {
        DatatypeMessage::FloatingPoint { size: 8, .. } => Ok(Element::F64),
        DatatypeMessage::FloatingPoint { size: 4, .. } => Ok(Element::F32),
        DatatypeMessage::FloatingPoint { size: 2, exponent_size: 5, .. } => Ok(Element::F16),
        DatatypeMessage::FloatingPoint { size: 2, exponent_size: 8, .. } => Ok(Element::BF16),
        other => Err(format!("holds features of type {other:?}, expected floating-point")),
    }
}

fn read_hdf5(
    dataset: &H5Dataset,
    element: Element,
    starts: &[usize],
    counts: &[usize],
    out: &mut [f32],
) -> pickle::Result<()> {
    let failed = |e: rust_hdf5::Hdf5Error| format!("cannot be read: {e}");
    match element {
        Element::F32 => dataset.read_slice_into(out, starts, counts).map_err(failed)?,
        Element::F64 => {
            let values = dataset.read_slice::<f64>(starts, counts).map_err(failed)?;
            out.iter_mut().zip(values).for_each(|(out, x)| *out = x as f32);
        }
        _ => {
            let values = dataset.read_slice::<u16>(starts, counts).map_err(failed)?;
            let f16s = element == Element::F16;
            let wide =
                |bits: u16| if f16s { f16::from_bits(bits).to_f32() } else { half::bf16::from_bits(bits).to_f32() };
            out.iter_mut().zip(values).for_each(|(out, bits)| *out = wide(bits));
        }
    }
    Ok(())
}
