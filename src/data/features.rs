//! Feature bags: one type that opens every kind of feature file and reads it by ranges of patches, so that a bag
//! larger than memory can be streamed.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use memmap2::Mmap;
use ndarray::Array2;
use rayon::prelude::*;

use super::h5::H5Bag;
pub use super::tensor::DType;
use super::tensor::{Entry, StoredTensor, first_non_finite};
use super::torch::{Archive, is_safetensors, is_torch, safetensors_entries};
use crate::{Error, Result, device::Element};

/// The names under which tools store features: CLAM and TRIDENT, STAMP, older STAMP.
pub(super) const FEATURE_NAMES: [&str; 3] = ["features", "feats", "patch_embeddings"];

const HDF5_MAGIC: &[u8] = b"\x89HDF\r\n\x1a\n";

/// A feature file whose header has been read and checked, and whose numbers are read on demand.
///
/// Formats, told apart by content: `.pt` of `torch.save` (zip or legacy; a tensor `[N, F]` or `[1, N, F]`, a Parameter,
/// or a dict holding one under `features`), `.safetensors`, and the `.h5` of CLAM, TRIDENT and STAMP.
/// The headers of `.pt` and `.safetensors` are read through a memory map; compressed members of a `.pt` are unpacked into memory on opening.
/// Numbers are read from the file, strided ones through the map: such a file must not be shortened while it is open (the operating system
/// ends the program on a read past the end).
pub struct FeatureFile {
    path: PathBuf,
    patches: usize,
    features: usize,
    dtype: DType,
    numbers: Numbers,
    /// The file and all of its bytes; None where it is only in memory.
    on_disk: Option<(File, Bytes)>,
}

enum Numbers {
    Tensor(StoredTensor),
    H5(H5Bag),
}

impl FeatureFile {
    /// Opens a file and checks everything but its numbers. Errors name the file and say what it holds instead of a bag.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = map_file(path)?;
        if !bytes.starts_with(HDF5_MAGIC) {
            let file = File::open(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
            return Ok(Self { on_disk: Some((file, bytes.clone())), ..Self::from_mapped(path, bytes)? });
        }
        let bag = H5Bag::open(path, &bytes).map_err(|e| Error::file(path, e))?;
        let (patches, features) = bag.shape();
        Self::checked(path, patches, features, bag.dtype(), Numbers::H5(bag))
    }

    /// A `.pt` or `.safetensors` file that is already in memory; `name` stands for its path in errors.
    pub fn from_bytes(name: &Path, bytes: Vec<u8>) -> Result<Self> {
        Self::from_mapped(name, bytes.into())
    }

    fn from_mapped(path: &Path, bytes: Bytes) -> Result<Self> {
        let tensor = tensor_of(&bytes).map_err(|e| Error::file(path, e))?.without_batch_of_one();
        let &[patches, features] = &tensor.shape[..] else {
            return Err(Error::file(path, wrong_shape(&tensor.shape)));
        };
        Self::checked(path, patches, features, tensor.dtype, Numbers::Tensor(tensor))
    }

    fn checked(path: &Path, patches: usize, features: usize, dtype: DType, numbers: Numbers) -> Result<Self> {
        if patches == 0 || features == 0 {
            let message = format!("is an empty bag: {patches} patches of {features} features, expected at least one");
            return Err(Error::file(path, message));
        }
        Ok(Self { path: path.to_path_buf(), patches, features, dtype, numbers, on_disk: None })
    }

    /// Patches in the bag (N), at least 1.
    pub fn patches(&self) -> usize {
        self.patches
    }

    /// Features of a patch (F), at least 1.
    pub fn features(&self) -> usize {
        self.features
    }

    /// The type that the numbers are stored in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Reads patches `rows` into `out` (row-major, `rows.len() * features()` numbers), converted to f32 and rounded to `T`, on all threads
    /// (`.h5` on one). A NaN or an infinity is an error that names its patch and its feature, both counted from 0.
    pub fn read_rows<T: Element<Sum = f32>>(&self, rows: Range<usize>, out: &mut [T]) -> Result<()> {
        if rows.start > rows.end || rows.end > self.patches || out.len() != rows.len() * self.features {
            let message = format!(
                "was asked for patches {rows:?} of {} into room for {} numbers of {} a patch",
                self.patches,
                out.len(),
                self.features
            );
            return Err(Error::file(&self.path, message));
        }
        let read = |block: usize, i: usize, out: &mut [T]| {
            let start = rows.start + i * block;
            self.read_block(start..start + out.len() / self.features, out)
        };
        match &self.numbers {
            Numbers::Tensor(_) => {
                // small enough that the check for NaN finds the converted block in the cache
                let block = (16 * 1024 / self.features).max(1);
                let blocks = out.par_chunks_mut(block * self.features).enumerate();
                // of several errors the first in the file
                blocks.map(|(i, out)| read(block, i, out)).find_first(Result::is_err).unwrap_or(Ok(()))
            }
            Numbers::H5(bag) => {
                let block = bag.rows_per_read();
                out.chunks_mut(block * self.features).enumerate().try_for_each(|(i, out)| read(block, i, out))
            }
        }
    }

    fn read_block<T: Element<Sum = f32>>(&self, rows: Range<usize>, out: &mut [T]) -> Result<()> {
        if size_of::<T>() == size_of::<f32>() {
            return self.read_f32(rows, bytemuck::cast_slice_mut(out));
        }
        let mut block = vec![0.0; out.len()];
        self.read_f32(rows, &mut block)?;
        out.iter_mut().zip(&block).for_each(|(out, &x)| *out = T::from_sum(x));
        Ok(())
    }

    fn read_f32(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let start = rows.start;
        match &self.numbers {
            Numbers::Tensor(tensor) => {
                let on_disk = self.on_disk.as_ref();
                match on_disk.and_then(|(file, whole)| Some((file, tensor.place(&rows, whole)?))) {
                    // read, and not through the map: of a disk that fails, or a file cut short, the system then tells
                    Some((file, place)) => {
                        let mut stored = vec![0; place.len()];
                        let read = file.read_exact_at(&mut stored, place.start as u64);
                        let failed =
                            |e| Error::file(&self.path, format!("cannot be read at byte {}: {e}", place.start));
                        read.map_err(failed)?;
                        tensor.convert(&stored, out);
                    }
                    None => tensor.read(rows, out),
                }
            }
            Numbers::H5(bag) => bag.read(rows, out).map_err(|e| Error::file(&self.path, e))?,
        }
        if let Some(bad) = first_non_finite(out) {
            let (patch, feature) = (start + bad / self.features, bad % self.features);
            let message = format!("patch {patch}, feature {feature} is {}, expected a finite number", out[bad]);
            return Err(Error::file(&self.path, message));
        }
        Ok(())
    }

    /// The whole bag, `[N, F]`.
    pub fn read(&self) -> Result<Array2<f32>> {
        let mut bag = Array2::zeros((self.patches, self.features));
        if let Some(out) = bag.as_slice_mut() {
            self.read_rows(0..self.patches, out)?;
        }
        Ok(bag)
    }

    /// The patches' x and y, `[N, 2]`, in the unit of the tool that wrote the file (CLAM and TRIDENT: pixels at level
    /// 0). `None` where the file has no integer `coords`; only `.h5` files are looked at.
    pub fn coordinates(&self) -> Result<Option<Array2<i64>>> {
        match &self.numbers {
            Numbers::Tensor(_) => Ok(None),
            Numbers::H5(bag) => bag.coordinates().map_err(|e| Error::file(&self.path, e)),
        }
    }
}

pub(super) fn wrong_shape(shape: &[usize]) -> String {
    format!("holds a tensor of shape {shape:?}, expected [patches, features]")
}

/// Maps a whole file into memory.
pub(super) fn map_file(path: &Path) -> Result<Bytes> {
    let unreadable = |e| Error::file(path, format!("cannot be read: {e}"));
    let file = File::open(path).map_err(unreadable)?;
    if file.metadata().map_err(unreadable)?.len() == 0 {
        return Err(Error::file(path, "is an empty file (0 bytes)"));
    }
    // SAFETY: the map is read-only and outlives every view of it (`Bytes` counts references). Another program that
    // rewrites the file may change the numbers under us, which is no worse than reading them later; FeatureFile's
    // documentation says what happens when the file is shortened.
    let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
    Ok(Bytes::from_owner(map))
}

fn tensor_of(bytes: &Bytes) -> Result<StoredTensor, String> {
    if is_safetensors(bytes) {
        return features_among(safetensors_entries(bytes)?);
    }
    if !is_torch(bytes) {
        return Err("is not a feature file: its content is neither .pt, .safetensors nor .h5".into());
    }
    let archive = Archive::open(bytes)?;
    match (archive.root_tensor()?, archive.root_dict()) {
        (Some(Entry::Float(tensor)), _) => Ok(tensor),
        (Some(Entry::Other(what)), _) => Err(format!("holds {what}, expected floats")),
        (None, Some(dict)) => features_among(archive.entries(dict)?),
        (None, None) => Err("holds neither a tensor nor a dict with `features`".into()),
    }
}

/// The tensor under one of the usual names, or else the only one that has a bag's shape.
fn features_among(mut entries: BTreeMap<String, Entry>) -> Result<StoredTensor, String> {
    for name in FEATURE_NAMES {
        match entries.remove(name) {
            Some(Entry::Float(tensor)) => return Ok(tensor),
            Some(Entry::Other(what)) => return Err(format!("holds {what} as `{name}`, expected a tensor of floats")),
            None => {}
        }
    }
    let names = entries.keys().take(5).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let mut bags = entries.into_values().filter_map(|entry| match entry {
        Entry::Float(tensor) => Some(tensor.without_batch_of_one()).filter(|tensor| tensor.shape.len() == 2),
        Entry::Other(_) => None,
    });
    match (bags.next(), bags.next()) {
        (Some(bag), None) => Ok(bag),
        (Some(_), Some(_)) => Err(format!("holds several tensors ({names}, ...), and none is named `features`")),
        (None, _) if names.is_empty() => Err("holds nothing, expected a tensor `features`".into()),
        (None, _) => Err(format!("holds no tensor `features` of [patches, features], only {names}")),
    }
}
