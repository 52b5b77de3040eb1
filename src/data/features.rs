//! Feature bags: one type that opens every kind of feature file and reads it by ranges of patches,
//! so that a bag larger than memory can be streamed.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use crc32fast::Hasher;
use memmap2::Mmap;
use ndarray::Array2;
use rayon::prelude::*;

use super::container::{Container, container};
use super::h5::H5Bag;
pub use super::tensor::DType;
use super::tensor::{Entry, Seal, StoredTensor, batch_axis, first_non_finite, place_in};
use super::torch::{Archive, safetensors_entries};
use crate::{Error, Result, device::Element};

/// The names under which tools store features, in all formats: CLAM, TRIDENT and Prov-GigaPath;
/// STAMP; and what else is met. A tensor of another name is never taken for them.
pub(super) const FEATURE_NAMES: [&str; 6] = ["features", "feats", "embeddings", "patch_embeddings", "tile_embeds", "x"];

/// Bytes that are read for a checksum at once.
const CHECKED: usize = 1 << 20;
/// Bytes of f32 that [`FeatureFile::verify`] holds.
const VERIFIED: usize = 32 << 20;

/// A feature file whose header has been read and checked, and whose numbers are read on demand.
///
/// Formats, told apart by content: `.pt` of `torch.save` (zip or legacy; a tensor or numpy array
/// `[N, F]`, `[1, N, F]` or `[N, 1, F]`, a Parameter, a dict that holds one under a usual name, a
/// pair of features and coordinates), `.safetensors`, and the `.h5` of CLAM, TRIDENT and STAMP. The
/// headers of `.pt` and `.safetensors` are read through a memory map; compressed members of a `.pt`
/// are unpacked into memory on opening. Numbers are read from the file, strided ones through the
/// map: such a file must not be shortened while it is open (the operating system ends the program
/// on a read past the end).
///
/// Checksums that a format carries are checked: of a `.pt` by whoever reads the whole bag while it
/// is read, else before the first part is; of an `.h5` chunk by chunk; of headers on opening.
pub struct FeatureFile {
    path: PathBuf,
    patches: usize,
    features: usize,
    dtype: DType,
    numbers: Numbers,
    /// The file and all of its bytes; None where it is only in memory.
    on_disk: Option<(File, Bytes)>,
    /// Whether the numbers' checksum was once found right.
    sound: AtomicBool,
}

enum Numbers {
    Tensor(StoredTensor),
    H5(H5Bag),
}

/// A member of a file, as long as nobody writes to the file: device, inode, size, time of the last
/// change, first byte of the member.
type Member = (u64, u64, u64, i64, i64, usize);

/// The members that this process has read and found sound: a file that is streamed is opened again
/// for every part.
static SOUND: Mutex<BTreeSet<Member>> = Mutex::new(BTreeSet::new());

impl FeatureFile {
    /// Opens a file and checks everything but its numbers. Errors name the file and say what it
    /// holds instead of a bag.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = map_file(path)?;
        if container(&bytes).map_err(|e| Error::file(path, e))? != Some(Container::Hdf5) {
            let file = File::open(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
            return Ok(Self { on_disk: Some((file, bytes.clone())), ..Self::from_mapped(path, bytes)? });
        }
        let bag = H5Bag::open(path, &bytes).map_err(|e| Error::file(path, e))?;
        let (patches, features) = bag.shape();
        Self::checked(path, patches, features, bag.dtype(), Numbers::H5(bag))
    }

    /// A `.pt` or `.safetensors` file that is already in memory; `name` stands for its path in
    /// errors.
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
        Ok(Self {
            path: path.to_path_buf(),
            patches,
            features,
            dtype,
            numbers,
            on_disk: None,
            sound: AtomicBool::new(false),
        })
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

    /// Reads patches `rows` into `out` (row-major, `rows.len() * features()` numbers), converted to
    /// f32 and rounded to `T`, on all threads (`.h5` on one). A NaN or an infinity is an error that
    /// names its patch and its feature, both counted from 0.
    pub fn read_rows<T: Element<Sum = f32>>(&self, rows: Range<usize>, out: &mut [T]) -> Result<()> {
        if rows.start > rows.end || rows.end > self.patches || out.len() != rows.len() * self.features {
            let message = format!(
                "was asked for patches {rows:?} of {} into memory for {} numbers of {} a patch",
                self.patches,
                out.len(),
                self.features
            );
            return Err(Error::file(&self.path, message));
        }
        let whole = rows == (0..self.patches);
        match self.seal() {
            Some(seal) if !(whole && self.reads_seal(seal)) => self.check_seal(seal)?,
            _ => {}
        }
        let crc = self.read_blocks(rows, out)?;
        match self.seal() {
            Some(seal) if whole && self.reads_seal(seal) => self.found(seal, crc.finalize()),
            _ => Ok(()),
        }
    }

    /// Reads every number of the file, in bounded memory, and says what is wrong with the first
    /// that is: a checksum, a NaN, an infinity.
    pub fn verify(&self) -> Result<()> {
        let seal = self.seal();
        if let Some(seal) = seal.filter(|seal| !self.reads_seal(seal)) {
            self.check_seal(seal)?;
        }
        let block = match &self.numbers {
            Numbers::Tensor(_) => (VERIFIED / size_of::<f32>() / self.features).max(1),
            Numbers::H5(bag) => bag.rows_per_read(),
        };
        let mut values = vec![0f32; block.min(self.patches) * self.features];
        let mut crc = Hasher::new();
        for start in (0..self.patches).step_by(block) {
            let rows = start..self.patches.min(start + block);
            let len = rows.len() * self.features;
            crc.combine(&self.read_blocks(rows, &mut values[..len])?);
        }
        match seal {
            Some(seal) if self.reads_seal(seal) => self.found(seal, crc.finalize()),
            _ => Ok(()),
        }
    }

    fn seal(&self) -> Option<&Seal> {
        match &self.numbers {
            Numbers::Tensor(tensor) => tensor.seal.as_deref(),
            Numbers::H5(_) => None,
        }
    }

    /// Whether reading all patches reads exactly the sealed bytes.
    fn reads_seal(&self, seal: &Seal) -> bool {
        match &self.numbers {
            Numbers::Tensor(tensor) => !self.is_mapped() && self.on_disk.is_some() && tensor.fills(seal),
            Numbers::H5(_) => false,
        }
    }

    /// Whether numbers are read through the memory map, whose pages count as the process's memory
    /// until the file is closed.
    pub(super) fn is_mapped(&self) -> bool {
        matches!(&self.numbers, Numbers::Tensor(tensor) if !tensor.is_contiguous())
    }

    /// Reads the sealed bytes for their checksum alone, unless this process has done so before.
    fn check_seal(&self, seal: &Seal) -> Result<()> {
        if self.sound.load(Ordering::Relaxed) {
            return Ok(());
        }
        let place = self.on_disk.as_ref().and_then(|(file, whole)| Some((file, place_in(&seal.bytes, whole)?)));
        let Some((file, place)) = place else { return self.found(seal, crc32fast::hash(&seal.bytes)) };
        let member =
            file.metadata().ok().map(|of| (of.dev(), of.ino(), of.size(), of.mtime(), of.mtime_nsec(), place.start));
        // the set is whole even where a thread ended while it held the lock
        let sound = || SOUND.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if member.is_some_and(|member| sound().contains(&member)) {
            self.sound.store(true, Ordering::Relaxed);
            return Ok(());
        }
        let starts = place.clone().into_par_iter().step_by(CHECKED);
        let blocks = starts.map(|start| {
            let mut stored = vec![0; CHECKED.min(place.end - start)];
            self.read_exact(file, &mut stored, start)?;
            let mut crc = Hasher::new();
            crc.update(&stored);
            Ok(crc)
        });
        self.found(seal, in_order(blocks.collect())?.finalize())?;
        if let Some(member) = member {
            sound().insert(member);
        }
        Ok(())
    }

    fn found(&self, seal: &Seal, crc: u32) -> Result<()> {
        seal.check(crc).map_err(|e| Error::file(&self.path, e))?;
        self.sound.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Reads patches that are known to be there, and checks that they are finite. What comes back
    /// is the checksum of the bytes that were read, where they were read from the file in their
    /// order.
    fn read_blocks<T: Element<Sum = f32>>(&self, rows: Range<usize>, out: &mut [T]) -> Result<Hasher> {
        let read = |block: usize, i: usize, out: &mut [T]| {
            let start = rows.start + i * block;
            self.read_block(start..start + out.len() / self.features, out)
        };
        match &self.numbers {
            Numbers::Tensor(_) => {
                // small enough that the check for NaN finds the converted block in the cache
                let block = (16 * 1024 / self.features).max(1);
                let blocks = out.par_chunks_mut(block * self.features).enumerate();
                in_order(blocks.map(|(i, out)| read(block, i, out)).collect())
            }
            Numbers::H5(bag) => {
                let block = bag.rows_per_read();
                let mut blocks = out.chunks_mut(block * self.features).enumerate();
                blocks.try_for_each(|(i, out)| read(block, i, out).map(drop))?;
                Ok(Hasher::new())
            }
        }
    }

    fn read_block<T: Element<Sum = f32>>(&self, rows: Range<usize>, out: &mut [T]) -> Result<Hasher> {
        if size_of::<T>() == size_of::<f32>() {
            return self.read_f32(rows, bytemuck::cast_slice_mut(out));
        }
        let mut block = vec![0.0; out.len()];
        let crc = self.read_f32(rows, &mut block)?;
        out.iter_mut().zip(&block).for_each(|(out, &x)| *out = T::from_sum(x));
        Ok(crc)
    }

    fn read_f32(&self, rows: Range<usize>, out: &mut [f32]) -> Result<Hasher> {
        let start = rows.start;
        let mut crc = Hasher::new();
        match &self.numbers {
            Numbers::Tensor(tensor) => {
                let on_disk = self.on_disk.as_ref();
                match on_disk.and_then(|(file, whole)| Some((file, tensor.place(&rows, whole)?))) {
                    // read, and not through the map: of a disk that fails, or a file cut short, the
                    // system then tells
                    Some((file, place)) => {
                        let mut stored = vec![0; place.len()];
                        self.read_exact(file, &mut stored, place.start)?;
                        if tensor.seal.is_some() {
                            crc.update(&stored);
                        }
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
        Ok(crc)
    }

    fn read_exact(&self, file: &File, out: &mut [u8], start: usize) -> Result<()> {
        let read = file.read_exact_at(out, start as u64);
        read.map_err(|e| Error::file(&self.path, format!("cannot be read at byte {start}: {e}")))
    }

    /// The whole bag, `[N, F]`.
    pub fn read(&self) -> Result<Array2<f32>> {
        let mut bag = Array2::zeros((self.patches, self.features));
        if let Some(out) = bag.as_slice_mut() {
            self.read_rows(0..self.patches, out)?;
        }
        Ok(bag)
    }

    /// The patches' x and y, `[N, 2]`, in the unit of the tool that wrote the file (CLAM and
    /// TRIDENT: pixels at level 0). `None` where the file has no integer `coords`; only `.h5` files
    /// are looked at.
    pub fn coordinates(&self) -> Result<Option<Array2<i64>>> {
        match &self.numbers {
            Numbers::Tensor(_) => Ok(None),
            Numbers::H5(bag) => bag.coordinates().map_err(|e| Error::file(&self.path, e)),
        }
    }
}

/// The checksum of blocks that follow each other; of several errors the first.
fn in_order(blocks: Vec<Result<Hasher>>) -> Result<Hasher> {
    let mut whole = Hasher::new();
    for block in blocks {
        whole.combine(&block?);
    }
    Ok(whole)
}

pub(super) fn wrong_shape(shape: &[usize]) -> String {
    format!("holds a tensor of shape {shape:?}, expected [patches, features]")
}

/// Maps a whole file into memory. Only regular files: the content of a pipe or a device has no end
/// to be checked.
pub(super) fn map_file(path: &Path) -> Result<Bytes> {
    let unreadable = |e| Error::file(path, format!("cannot be read: {e}"));
    // looked at before it is opened, since opening a pipe waits for its other end
    let kind = std::fs::metadata(path).map_err(unreadable)?;
    if kind.is_dir() {
        return Err(Error::file(path, "is a folder, expected a file"));
    }
    if !kind.is_file() {
        return Err(Error::file(path, "is a device or a pipe, expected a file"));
    }
    if kind.len() == 0 {
        return Err(Error::file(path, "is an empty file (0 bytes)"));
    }
    let file = File::open(path).map_err(unreadable)?;
    // SAFETY: the map is read-only and outlives every view of it (`Bytes` counts references).
    // Another program that rewrites the file may change the numbers under us, which is no worse
    // than reading them later; FeatureFile's documentation says what happens when the file is
    // shortened.
    let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
    Ok(Bytes::from_owner(map))
}

fn tensor_of(bytes: &Bytes) -> Result<StoredTensor, String> {
    match container(bytes)? {
        Some(Container::Safetensors) => {
            let mut entries = safetensors_entries(bytes)?;
            let held = entries.iter().map(|(name, entry)| match entry {
                Entry::Float(tensor) => Held::tensor(name, tensor.dtype, &tensor.shape),
                Entry::Other(what) => Held::other(name, what.clone()),
            });
            match entries.remove(choose(&held.collect::<Vec<_>>(), "tensor")?) {
                Some(Entry::Float(tensor)) => Ok(tensor),
                _ => Err("holds no features".into()), // `choose` takes floats alone
            }
        }
        Some(Container::Torch) => Archive::open(bytes)?.features(),
        Some(Container::Hdf5) => Err("is an .h5 file, which is not read from memory".into()),
        None => Err("is not a feature file: its content is neither .pt, .safetensors nor .h5".into()),
    }
}

/// What a file holds under one name.
pub(super) struct Held {
    name: String,
    /// In words: "int64 [13, 2]".
    what: String,
    /// Of a tensor its shape.
    shape: Vec<usize>,
    /// Whether it is a tensor of floats that are read.
    floats: bool,
}

impl Held {
    pub fn tensor(name: &str, dtype: DType, shape: &[usize]) -> Self {
        Self { name: name.into(), what: format!("{dtype} {shape:?}"), shape: shape.into(), floats: true }
    }

    /// A tensor of numbers that are no floats.
    pub fn numbers(name: &str, dtype: &str, shape: &[usize]) -> Self {
        Self { name: name.into(), what: format!("{dtype} {shape:?}"), shape: shape.into(), floats: false }
    }

    pub fn other(name: &str, what: String) -> Self {
        Self { name: name.into(), what, shape: Vec::new(), floats: false }
    }

    /// Patches and features, of what has the shape of a bag.
    fn bag(&self) -> Option<[usize; 2]> {
        let mut shape = self.shape.clone();
        if let Some(axis) = batch_axis(&shape) {
            shape.remove(axis);
        }
        shape.try_into().ok().filter(|_| self.floats)
    }
}

/// Which of them are the features. Of the usual names the first one that is there must be a bag of
/// floats, and the only one. `noun` is what the format calls a tensor.
pub(super) fn choose(held: &[Held], noun: &str) -> Result<&'static str, String> {
    let find = |name: &str| held.iter().find(|held| held.name == name);
    let is_abscissa = |name: &str| name == "x" && find("y").is_some();
    let mut usual = FEATURE_NAMES.into_iter().filter(|name| !is_abscissa(name)).filter_map(|n| Some((n, find(n)?)));
    let Some((name, first)) = usual.next() else {
        let [features, others @ ..] = FEATURE_NAMES;
        let others = others.map(|name| format!("`{name}`")).join(", ");
        return Err(format!("holds no {noun} `{features}` (or {others}): {}", listed(held)));
    };
    if !first.floats {
        return Err(format!("holds `{name}` as {}, expected a {noun} of floats", first.what));
    }
    if first.bag().is_none() {
        return Err(wrong_shape(&first.shape));
    }
    match usual.find(|(_, other)| other.bag().is_some()) {
        Some((other, and)) => {
            Err(format!("holds `{name}` {} and `{other}` {}, expected one of them", first.what, and.what))
        }
        None => Ok(name),
    }
}

/// Which of two things without names are the features: the bag that lies beside the coordinates
/// `[N, 2]` of its patches.
pub(super) fn choose_of_pair(held: &[Held]) -> Result<usize, String> {
    let is_bag = |a: &Held, b: &Held| a.bag().is_some_and(|[n, features]| features != 2 && b.shape == [n, 2]);
    match held {
        [a, b] if is_bag(a, b) => Ok(0),
        [a, b] if is_bag(b, a) => Ok(1),
        _ => {
            let expected = "expected a tensor or a dict with `features`";
            Err(format!("holds a list without names, {expected}: {}", listed(held)))
        }
    }
}

/// A library's message, which may quote the file, without what would disturb a terminal.
pub(super) fn plain(message: impl std::fmt::Display) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.into() };
    message.to_string().chars().map(escape).collect()
}

/// The first few, with names that cannot disturb a terminal.
fn listed(held: &[Held]) -> String {
    const SHOWN: usize = 8;
    let show = |held: &Held| match &*held.name {
        "" => held.what.clone(),
        name => format!("`{}` {}", name.chars().take(60).collect::<String>().escape_debug(), held.what),
    };
    let mut shown = held.iter().take(SHOWN).map(show).collect::<Vec<_>>();
    match held.len() {
        0 => return "it is empty".into(),
        n if n > SHOWN => shown.push(format!("and {} more", n - SHOWN)),
        _ => {}
    }
    shown.join(", ")
}
