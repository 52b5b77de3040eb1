//! Feature bags in HDF5, as CLAM, TRIDENT and STAMP write them.
//!
//! Every call into rust-hdf5 is guarded: a panic on a malformed file becomes an error, as any other
//! damage is. The crate checks the checksums of headers and indices, and deflate checks its own;
//! what it does not look at is checked here, chunk by chunk.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use half::f16;
use half::slice::HalfFloatSliceExt;
use ndarray::Array2;
use rust_hdf5::dataset::FillValue;
use rust_hdf5::format::messages::datatype::IeeeFormat;
use rust_hdf5::format::messages::filter::{
    FILTER_DEFLATE, FILTER_FLETCHER32, FILTER_LZF, FILTER_SHUFFLE, apply_filters, reverse_filters_masked_bounded,
};
use rust_hdf5::{
    ByteOrder, DatatypeMessage, Filter, FilterPipeline, H5Dataset, H5File, H5Group, H5Type, LinkClass, StorageLayout,
};

use super::features::{Held, choose, plain};
use super::tensor::{DType, batch_axis, convert, product};
use super::{container::hdf5_start, torch::MAX_EXPANSION};

/// Read at least this much at once (bytes).
const READ: usize = 4 << 20;

/// The features of an open file: a dataset `[N, F]`, `[1, N, F]` or `[N, 1, F]`.
pub struct H5Bag {
    file: H5File,
    dataset: H5Dataset,
    name: &'static str,
    dtype: DType,
    /// Patches, features.
    shape: (usize, usize),
    /// The axis of length 1 that the dataset has beside these two.
    batch_axis: Option<usize>,
    /// A chunk's patches and features; None where the dataset has no chunks.
    chunk: Option<[usize; 2]>,
    /// What an absent chunk is read as.
    fill: f32,
    filters: Vec<Filter>,
    file_size: u64,
}

impl H5Bag {
    /// `content` is the file at `path`: it is measured here, and read by rust-hdf5 through its own
    /// handle.
    pub fn open(path: &Path, content: &[u8]) -> Result<Self, String> {
        let file_size = content.len() as u64;
        if let Some(end) = stored_end(content)
            && end > file_size
        {
            return Err(format!("is truncated: {file_size} bytes of {end}"));
        }
        guarded(|| {
            // Without a lock, so that a file on a read-only or network file system opens too.
            let file = H5File::options().no_locking().open(path).map_err(damaged)?;
            let root = file.root_group();
            let names = root.link_names().map_err(damaged)?;
            let held = names.iter().map(|name| held(&file, &root, name)).collect::<Result<Vec<_>, _>>()?;
            let name = choose(&held, "dataset")?;
            let dataset = own_dataset(&file, name, file_size)?;
            let Type::Float(dtype) = number_type(&dataset.datatype().map_err(damaged)?) else {
                return Err(format!("holds no floats as `{name}`")); // `choose` takes floats alone
            };
            let filters = dataset.filters().map_err(damaged)?;
            if let Some(filter) = filters.iter().find(|filter| !READ_FILTERS.contains(&filter.id)) {
                let filter = filter_name(filter.id);
                return Err(format!(
                    "`{name}` is compressed with {filter}, which is not read; rewrite it with gzip or lzf"
                ));
            }
            let extent = dataset.shape();
            let batch_axis = batch_axis(&extent);
            let without_batch = |mut extent: Vec<usize>| -> Result<[usize; 2], String> {
                if let Some(axis) = batch_axis {
                    extent.remove(axis);
                }
                extent.try_into().map_err(|_| "is a damaged .h5 file: its chunks have other axes".into())
            };
            let chunk = dataset.chunk_dims().map(without_batch).transpose()?;
            if chunk.is_some_and(|chunk| chunk.contains(&0)) {
                return Err("is a damaged .h5 file: its chunks are empty".into());
            }
            let [patches, features] = without_batch(extent)?;
            let fill = match dataset.fill_value().map_err(damaged)? {
                FillValue::UserDefined(bytes) => fill_value(&bytes, dtype, &dataset.datatype().map_err(damaged)?),
                _ => 0.0,
            };
            let shape = (patches, features);
            Ok(Self { file, dataset, name, dtype, shape, batch_axis, chunk, fill, filters, file_size })
        })
    }

    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// A multiple of the chunk, so that in a sequence of reads no chunk is unpacked twice.
    pub fn rows_per_read(&self) -> usize {
        let (patches, features) = self.shape;
        let rows = self.chunk.map_or(1, |[rows, _]| rows).clamp(1, patches.max(1));
        rows * READ.div_ceil(rows * features * self.dtype.size())
    }

    /// Patches `rows` into `out`, which holds exactly these.
    pub fn read(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), String> {
        if self.filters.iter().any(|filter| filter.id == FILTER_FLETCHER32) {
            self.chunks(&rows).try_for_each(|(chunk, _)| self.check_chunk(chunk))?;
        }
        match self.dtype {
            DType::F32 => self.read_as(rows.clone(), out)?,
            DType::F64 => {
                let mut stored = vec![0f64; out.len()];
                self.read_as(rows.clone(), &mut stored)?;
                out.iter_mut().zip(stored).for_each(|(out, x)| *out = x as f32);
            }
            _ => {
                let mut stored = vec![0u16; out.len()];
                self.read_as(rows.clone(), &mut stored)?;
                bytemuck::cast_slice::<u16, f16>(&stored).convert_to_f32_slice(out);
            }
        }
        self.check_written(&rows, out)
    }

    /// The chunks that hold something of patches `rows`, and which rows and columns of them.
    fn chunks(&self, rows: &Range<usize>) -> impl Iterator<Item = ([usize; 2], [Range<usize>; 2])> {
        let (rows, features) = (rows.clone(), self.shape.1);
        let chunk = if rows.is_empty() { None } else { self.chunk };
        chunk.into_iter().flat_map(move |[height, width]| {
            let rows = rows.clone();
            (rows.start / height..rows.end.div_ceil(height)).flat_map(move |i| {
                let rows = rows.start.max(i * height)..rows.end.min((i + 1).saturating_mul(height));
                (0..features.div_ceil(width)).map(move |j| {
                    let columns = j * width..features.min((j + 1).saturating_mul(width));
                    ([i, j], [rows.clone(), columns])
                })
            })
        })
    }

    /// A chunk that was never written reads as the fill value; of one that holds nothing else it is
    /// asked whether it is there.
    fn check_written(&self, rows: &Range<usize>, out: &[f32]) -> Result<(), String> {
        let features = self.shape.1;
        let is_fill = |x: &f32| x.to_bits() == self.fill.to_bits();
        for (chunk, [of, columns]) in self.chunks(rows) {
            let line = |row: usize| &out[(row - rows.start) * features..][columns.clone()];
            if of.into_iter().all(|row| line(row).iter().all(is_fill)) {
                self.stored_chunk(chunk).map_err(|_| {
                    format!("chunk {} of `{}` was never written (is the file complete?)", self.number(chunk), self.name)
                })?;
            }
        }
        Ok(())
    }

    /// Compares a chunk with its Fletcher-32 checksum.
    fn check_chunk(&self, chunk: [usize; 2]) -> Result<(), String> {
        let name = self.name;
        // one that is not there has none; whether that is right is seen where its values are
        let Ok((mut stored, mask)) = self.stored_chunk(chunk) else { return Ok(()) };
        let failed = || format!("is damaged: chunk {} of `{name}` fails its checksum", self.number(chunk));
        let limit =
            self.chunk.map_or(0, |[rows, columns]| rows.saturating_mul(columns).saturating_mul(self.dtype.size()));
        for (i, filter) in self.filters.iter().enumerate().rev() {
            if i < 32 && mask & (1 << i) != 0 {
                match filter.id {
                    FILTER_FLETCHER32 => return Err(failed()), // libhdf5 never skips it
                    _ => continue,
                }
            }
            let one = FilterPipeline { filters: vec![filter.clone()] };
            if filter.id == FILTER_FLETCHER32 {
                let (data, sum) = stored.split_last_chunk::<4>().ok_or_else(failed)?;
                let computed = guarded(|| apply_filters(&one, data).map_err(damaged))?;
                let &[a, b, c, d] = computed.last_chunk().ok_or_else(failed)?;
                // HDF5 before 1.6.3 wrote the bytes of each half the other way round, and libhdf5
                // takes both
                if ![[a, b, c, d], [b, a, d, c]].contains(sum) {
                    return Err(failed());
                }
                stored.truncate(stored.len() - 4);
            } else {
                stored = guarded(|| {
                    let limit = limit.saturating_mul(5).saturating_add(1 << 16);
                    reverse_filters_masked_bounded(&one, &stored, 0, limit).map_err(damaged)
                })?;
            }
        }
        Ok(())
    }

    /// A chunk as it is stored, and which filters it skips.
    fn stored_chunk(&self, [i, j]: [usize; 2]) -> Result<(Vec<u8>, u32), String> {
        let mut place = vec![i, j];
        if let Some(axis) = self.batch_axis {
            place.insert(axis, 0);
        }
        guarded(|| self.dataset.read_chunk_raw_at(&place).map_err(damaged))
    }

    /// Chunks are counted from 0, row by row.
    fn number(&self, [i, j]: [usize; 2]) -> usize {
        i * self.chunk.map_or(1, |[_, width]| self.shape.1.div_ceil(width)) + j
    }

    fn read_as<T: H5Type>(&self, rows: Range<usize>, out: &mut [T]) -> Result<(), String> {
        let (mut starts, mut counts) = (vec![rows.start, 0], vec![rows.len(), self.shape.1]);
        if let Some(axis) = self.batch_axis {
            starts.insert(axis, 0);
            counts.insert(axis, 1);
        }
        guarded(|| self.dataset.read_slice_into(out, &starts, &counts).map_err(damaged))
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
            let (shape, patches) = (dataset.shape(), self.shape.0);
            if ![&[patches, 2][..], &[1, patches, 2]].contains(&&shape[..]) {
                return Err(format!("holds `coords` of shape {shape:?}, expected [{}, 2]", patches));
            }
            let values = dataset.read_numeric_as().map_err(damaged)?;
            Array2::from_shape_vec((patches, 2), values).map(Some).map_err(damaged)
        })
    }
}

/// Where the file ends according to its superblock, as libhdf5 checks too: without that, chunks
/// whose index was cut off would read as zeros. Layout: HDF5 File Format Specification 3.0, section
/// II.A, with the usual 8-byte addresses.
fn stored_end(content: &[u8]) -> Option<u64> {
    let content = content.get(hdf5_start(content)?..)?;
    let (size_of_addresses, end) = match content.get(8)? {
        0 => (13, 40),
        1 => (13, 44),
        _ => (9, 28),
    };
    let end = content.get(end..)?.first_chunk().map(|&bytes| u64::from_le_bytes(bytes));
    end.filter(|_| content[size_of_addresses] == 8)
}

/// A dataset of this file itself, of a size that the file can hold. Links and layouts that lead to
/// other files are refused: a feature file must not decide what else is opened.
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

/// What the file holds under a name, without looking into other files.
fn held(file: &H5File, root: &H5Group, name: &str) -> Result<Held, String> {
    if root.link_class(name).map_err(damaged)? != LinkClass::Hard {
        return Ok(Held::other(name, "a link to somewhere else".into()));
    }
    if root.group_names().map_err(damaged)?.iter().any(|group| group == name) {
        let inside = root.group(name).and_then(|group| group.link_names()).map_err(damaged)?;
        let shown =
            inside.iter().take(5).map(|name| format!("`{}`", name.escape_debug())).collect::<Vec<_>>().join(", ");
        let more = if inside.len() > 5 { ", ..." } else { "" };
        return Ok(Held::other(name, format!("a group of [{shown}{more}]")));
    }
    let Ok(dataset) = file.dataset(name) else {
        return Ok(Held::other(name, "something that is no dataset".into()));
    };
    let shape = dataset.shape();
    Ok(match number_type(&dataset.datatype().map_err(damaged)?) {
        Type::Float(dtype) => Held::tensor(name, dtype, &shape),
        Type::Other(dtype) => Held::numbers(name, &dtype, &shape),
    })
}

/// The filters that are read: gzip, shuffle, Fletcher-32 and lzf. Each has its fixture from h5py.
const READ_FILTERS: [u16; 4] = [FILTER_DEFLATE, FILTER_SHUFFLE, FILTER_FLETCHER32, FILTER_LZF];

/// The names that HDF5 and its registry give to filters.
fn filter_name(id: u16) -> String {
    let name = match id {
        4 => "szip",
        5 => "N-bit",
        6 => "scale-offset",
        305 => "LZO",
        307 => "bzip2",
        32001 => "Blosc",
        32004 => "LZ4",
        32008 => "bitshuffle",
        32013 => "ZFP",
        32015 => "Zstandard",
        32017 => "SZ",
        32019 => "JPEG",
        32024 => "SZ3",
        32026 => "Blosc2",
        _ => return format!("filter {id}"),
    };
    format!("{name} (filter {id})")
}

enum Type {
    Float(DType),
    /// In words: "int64".
    Other(String),
}

fn number_type(datatype: &DatatypeMessage) -> Type {
    let other = |name: String| Type::Other(name);
    match datatype {
        &DatatypeMessage::FixedPoint { size, signed, .. } => {
            other(format!("{}int{}", if signed { "" } else { "u" }, u64::from(size) * 8))
        }
        &DatatypeMessage::FloatingPoint {
            size,
            sign_location,
            exponent_location,
            exponent_size,
            mantissa_location,
            mantissa_size,
            exponent_bias,
            ..
        } => match datatype.ieee_format() {
            Some(IeeeFormat::Binary16) => Type::Float(DType::F16),
            Some(IeeeFormat::Binary32) => Type::Float(DType::F32),
            Some(IeeeFormat::Binary64) => Type::Float(DType::F64),
            None => {
                let places = (sign_location, exponent_location, exponent_size, mantissa_location, mantissa_size);
                let bits = u64::from(size) * 8;
                let is_bfloat16 = (size, exponent_bias, places) == (2, 127, (15, 7, 8, 0, 7));
                // rust-hdf5 reads IEEE's types alone
                other(match is_bfloat16 {
                    true => "bfloat16 (of .h5 files float16, float32 and float64 are read)".into(),
                    false => {
                        format!("a float of {bits} bits ({exponent_size} of exponent, {mantissa_size} of mantissa)")
                    }
                })
            }
        },
        DatatypeMessage::Enum { .. } => other("enumeration".into()),
        DatatypeMessage::FixedString { .. } | DatatypeMessage::VarLenString { .. } => other("text".into()),
        DatatypeMessage::Compound { members, .. } => {
            let names = members.iter().map(|member| member.name.as_str()).collect::<Vec<_>>();
            other(if names == ["r", "i"] { "complex".into() } else { "compound".into() })
        }
        DatatypeMessage::BitField { .. } => other("bits".into()),
        DatatypeMessage::Opaque { .. } => other("opaque".into()),
        DatatypeMessage::VarLenSequence { .. } => other("sequence".into()),
        DatatypeMessage::Array { .. } => other("array".into()),
        DatatypeMessage::Reference { .. } => other("reference".into()),
    }
}

/// A fill value as a number; 0 where it is not one.
fn fill_value(bytes: &[u8], dtype: DType, datatype: &DatatypeMessage) -> f32 {
    let mut bytes = bytes.to_vec();
    if datatype.scalar_byte_order() == Some(ByteOrder::BigEndian) {
        bytes.reverse();
    }
    let mut value = [0.0];
    if bytes.len() == dtype.size() {
        convert(dtype, &bytes, &mut value);
    }
    value[0]
}

/// Turns a panic inside rust-hdf5 into an error. What it was working on is only read, and never
/// used again after one.
fn guarded<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err("is a damaged .h5 file".into()))
}

fn damaged(error: impl std::fmt::Display) -> String {
    format!("is a damaged .h5 file: {}", plain(error))
}
