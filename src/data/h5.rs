//! Feature bags in HDF5, as CLAM, TRIDENT and STAMP write them.
//!
//! Every call into rust-hdf5 is guarded: a panic on a malformed file becomes an error, as any other damage is.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use half::f16;
use half::slice::HalfFloatSliceExt;
use ndarray::Array2;
use rust_hdf5::format::messages::datatype::IeeeFormat;
use rust_hdf5::{DatatypeMessage, H5Dataset, H5File, H5Type, LinkClass, StorageLayout};

use super::features::{FEATURE_NAMES, wrong_shape};
use super::tensor::{DType, product};
use super::torch::MAX_EXPANSION;

/// Read at least this much at once (bytes).
const READ: usize = 4 << 20;

/// The features of an open file: a dataset `[N, F]`, or `[1, N, F]`.
pub struct H5Bag {
    file: H5File,
    dataset: H5Dataset,
    batched: bool,
    patches: usize,
    features: usize,
    dtype: DType,
    chunk_rows: usize,
    file_size: u64,
}

impl H5Bag {
    /// `file_size` in bytes bounds what the header may claim.
    pub fn open(path: &Path, file_size: u64) -> Result<Self, String> {
        guarded(|| {
            // Without a lock, so that a file on a read-only or network file system opens too.
            let file = H5File::options().no_locking().open(path).map_err(damaged)?;
            let names = file.root_group().link_names().map_err(damaged)?;
            let name = FEATURE_NAMES.into_iter().find(|&name| names.iter().any(|n| n == name));
            let name =
                name.ok_or_else(|| format!("holds no dataset `features`, only {:?}", &names[..names.len().min(5)]))?;
            let dataset = own_dataset(&file, name, file_size)?;
            let dtype = match dataset.datatype().map_err(damaged)? {
                ref float @ DatatypeMessage::FloatingPoint { .. } => match float.ieee_format() {
                    Some(IeeeFormat::Binary16) => DType::F16,
                    Some(IeeeFormat::Binary32) => DType::F32,
                    Some(IeeeFormat::Binary64) => DType::F64,
                    None => return Err(format!("holds `{name}` as {float}, expected IEEE floats")),
                },
                other => return Err(format!("holds `{name}` as {other}, expected floats")),
            };
            let shape = dataset.shape();
            let (batched, patches, features) = match shape[..] {
                [patches, features] => (false, patches, features),
                [1, patches, features] => (true, patches, features),
                _ => return Err(wrong_shape(&shape)),
            };
            let chunk_rows =
                dataset.chunk_dims().map_or(1, |chunk| chunk[usize::from(batched)]).clamp(1, patches.max(1));
            Ok(Self { file, dataset, batched, patches, features, dtype, chunk_rows, file_size })
        })
    }

    pub fn shape(&self) -> (usize, usize) {
        (self.patches, self.features)
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// A multiple of the chunk, so that in a sequence of reads no chunk is unpacked twice.
    pub fn rows_per_read(&self) -> usize {
        let chunk = self.chunk_rows * self.features * self.dtype.size();
        self.chunk_rows * READ.div_ceil(chunk)
    }

    /// Patches `rows` into `out`, which holds exactly these.
    pub fn read(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), String> {
        match self.dtype {
            DType::F32 => self.read_as(rows, out),
            DType::F64 => {
                let mut stored = vec![0f64; out.len()];
                self.read_as(rows, &mut stored)?;
                out.iter_mut().zip(stored).for_each(|(out, x)| *out = x as f32);
                Ok(())
            }
            _ => {
                let mut stored = vec![0u16; out.len()];
                self.read_as(rows, &mut stored)?;
                bytemuck::cast_slice::<u16, f16>(&stored).convert_to_f32_slice(out);
                Ok(())
            }
        }
    }

    fn read_as<T: H5Type>(&self, rows: Range<usize>, out: &mut [T]) -> Result<(), String> {
        let (starts, counts) = ([0, rows.start, 0], [1, rows.len(), self.features]);
        let axes = usize::from(!self.batched)..;
        guarded(|| self.dataset.read_slice_into(out, &starts[axes.clone()], &counts[axes]).map_err(damaged))
    }

    /// See [`super::features::FeatureFile::coordinates`].
    pub fn coordinates(&self) -> Result<Option<Array2<i64>>, String> {
        guarded(|| {
            if !self.file.root_group().link_names().map_err(damaged)?.iter().any(|name| name == "coords") {
                return Ok(None);
            }
            let dataset = own_dataset(&self.file, "coords", self.file_size)?;
            if !matches!(dataset.datatype(), Ok(DatatypeMessage::FixedPoint { .. })) {
                return Ok(None);
            }
            let shape = dataset.shape();
            if ![&[self.patches, 2][..], &[1, self.patches, 2]].contains(&&shape[..]) {
                return Err(format!("holds `coords` of shape {shape:?}, expected [{}, 2]", self.patches));
            }
            let values = dataset.read_numeric_as().map_err(damaged)?;
            Array2::from_shape_vec((self.patches, 2), values).map(Some).map_err(damaged)
        })
    }
}

/// A dataset of this file itself, of a size that the file can hold. Links and layouts that lead to other files are
/// refused: a feature file must not decide what else is opened.
fn own_dataset(file: &H5File, name: &str, file_size: u64) -> Result<H5Dataset, String> {
    if file.root_group().link_class(name).map_err(damaged)? != LinkClass::Hard {
        return Err(format!("holds `{name}` as a link to somewhere else, expected a dataset"));
    }
    let dataset = file.dataset(name).map_err(damaged)?;
    let layout = dataset.storage_layout().map_err(damaged)?;
    if layout == StorageLayout::Virtual || !dataset.external_files().map_err(damaged)?.is_empty() {
        return Err(format!("keeps `{name}` in other files, expected it in this one"));
    }
    let expansion = if dataset.filters().map_err(damaged)?.is_empty() { 1 } else { MAX_EXPANSION };
    let limit = file_size.saturating_mul(expansion);
    for extent in [Some(dataset.shape()), dataset.chunk_dims()].into_iter().flatten() {
        let bytes = product(&extent).and_then(|elements| elements.checked_mul(dataset.element_size()));
        if bytes.is_none_or(|bytes| bytes as u64 > limit) {
            let message = format!("claims `{name}` of {extent:?}, more than a file of {file_size} bytes can hold");
            return Err(message + " (it may be truncated)");
        }
    }
    Ok(dataset)
}

/// Turns a panic inside rust-hdf5 into an error. What it was working on is only read, and never used again after one.
fn guarded<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err("is a damaged .h5 file".into()))
}

fn damaged(error: impl std::fmt::Display) -> String {
    format!("is a damaged .h5 file: {error}")
}
