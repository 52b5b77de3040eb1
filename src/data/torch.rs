//! The files of `torch.save` (zip archives, and the legacy format of before torch 1.6), safetensors, and a writer.
//! Layouts: torch/serialization.py; a pickle describes the objects, and raw little-endian storages lie beside it.

use std::collections::{BTreeMap, HashMap};
use std::io::{Cursor, Read, Write};
use std::path::Path;
use std::rc::Rc;

use bytes::Bytes;
use ndarray::ArrayView2;
use safetensors::{Dtype, SafeTensors};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use super::atomic::write_atomically;
use super::pickle::{self, Id, Node, Pickle, StorageType};
use super::tensor::{DType, Entry, StoredTensor, first_non_finite};
use crate::{Error, Result};

/// Deflate cannot expand by more than this (1032 : 1), so a larger claim is false.
pub(super) const MAX_EXPANSION: u64 = 1032;

/// The first object of a legacy file.
const LEGACY_MAGIC: i128 = 0x1950_a86a_20f9_469c_fc6c;

/// Objects that a published checkpoint wraps its parameters in.
const STATE_DICT_KEYS: [&str; 3] = ["state_dict", "model_state_dict", "model"];

/// One parameter of a checkpoint: its shape, and its numbers in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// A checkpoint's parameters by name.
pub type StateDict = BTreeMap<String, Parameter>;

/// Reads a checkpoint's float tensors by name, from `.safetensors` or from what `torch.save` wrote: a state dict, bare
/// or under `state_dict`, `model_state_dict` or `model`. A `module.` in front of every name (DataParallel) is taken off.
/// Other objects, such as integer buffers, are left out. Errors name the file and the tensor; a NaN or infinity is one.
pub fn read_state_dict(path: &Path) -> Result<StateDict> {
    let bytes = super::features::map_file(path)?;
    state_dict(bytes).map_err(|e| Error::file(path, e))
}

/// [`read_state_dict`] of a file that is already in memory; `name` stands for its path in errors.
pub fn state_dict_from_bytes(name: &Path, bytes: Vec<u8>) -> Result<StateDict> {
    state_dict(bytes.into()).map_err(|e| Error::file(name, e))
}

fn state_dict(bytes: Bytes) -> Result<StateDict, String> {
    let (mut entries, stored) = if is_safetensors(&bytes) {
        (safetensors_entries(&bytes)?, bytes.len())
    } else if is_torch(&bytes) {
        let archive = Archive::open(&bytes)?;
        let root = archive.state_dict().ok_or("holds no state dict")?;
        (archive.entries(root)?, archive.storages.values().map(Bytes::len).sum())
    } else {
        return Err("is not a checkpoint: its content is neither .safetensors nor .pt".into());
    };
    if entries.keys().all(|name| name.starts_with("module.")) {
        entries = entries.into_iter().map(|(name, entry)| (name["module.".len()..].to_string(), entry)).collect();
    }
    // Tensors may share numbers (tied weights), but hardly more than a few; a small file that claims gigabytes is an attack.
    let total = entries.values().fold(0usize, |sum, entry| match entry {
        Entry::Float(tensor) => sum.saturating_add(tensor.elements()),
        Entry::Other(_) => sum,
    });
    if total > stored.saturating_mul(8) {
        return Err(format!("claims {total} parameters in {stored} bytes of data"));
    }
    let mut parameters = BTreeMap::new();
    for (name, entry) in entries {
        let Entry::Float(tensor) = entry else { continue };
        let values = tensor.to_f32();
        if let Some(i) = first_non_finite(&values) {
            return Err(format!("tensor `{name}` holds {} at element {i}, expected finite numbers", values[i]));
        }
        parameters.insert(name, Parameter { shape: tensor.shape, values });
    }
    if parameters.is_empty() {
        return Err("holds no float tensors".into());
    }
    Ok(parameters)
}

/// Whether the bytes begin like a file of `torch.save`: a zip archive, or a pickle.
pub(super) fn is_torch(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04") || bytes.first() == Some(&0x80)
}

/// Whether the bytes begin like a safetensors file: a header's length that fits, and then JSON.
pub(super) fn is_safetensors(bytes: &[u8]) -> bool {
    let Some((&length, rest)) = bytes.split_first_chunk() else { return false };
    rest.first() == Some(&b'{') && u64::from_le_bytes(length) <= rest.len() as u64
}

/// All tensors of a safetensors file.
pub(super) fn safetensors_entries(bytes: &Bytes) -> Result<BTreeMap<String, Entry>, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| format!("is not a sound safetensors file: {e}"))?;
    let entry = |name: &str, view: safetensors::tensor::TensorView| {
        let dtype = match view.dtype() {
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::F32 => DType::F32,
            Dtype::F64 => DType::F64,
            other => return Ok(Entry::Other(format!("a tensor of {other:?}"))),
        };
        StoredTensor::contiguous(dtype, view.shape().to_vec(), bytes.slice_ref(view.data()))
            .map(Entry::Float)
            .map_err(|e| format!("tensor `{name}` {e}"))
    };
    file.iter().map(|(name, view)| Ok((name.to_string(), entry(name, view)?))).collect()
}

/// An opened torch file: its objects, and its storages by key.
pub(super) struct Archive {
    pickle: Pickle,
    storages: HashMap<Rc<str>, Bytes>,
}

impl Archive {
    /// Storages are views of `bytes`, except where a zip member is compressed.
    pub fn open(bytes: &Bytes) -> Result<Self, String> {
        if bytes.starts_with(b"PK\x03\x04") { Self::open_zip(bytes) } else { Self::open_legacy(bytes) }
    }

    fn open_zip(bytes: &Bytes) -> Result<Self, String> {
        let mut zip =
            ZipArchive::new(Cursor::new(&bytes[..])).map_err(|e| format!("is a truncated or damaged .pt file: {e}"))?;
        let names = zip.file_names().flatten();
        let pickle_name = names.into_iter().find(|name| *name == "data.pkl" || name.ends_with("/data.pkl"));
        let pickle_name = pickle_name.ok_or("is a zip archive without a data.pkl, so not a torch file")?.into_owned();
        let folder = pickle_name.trim_end_matches("data.pkl");

        let mut budget = MAX_EXPANSION.saturating_mul(bytes.len() as u64);
        let order = format!("{folder}byteorder");
        if zip.index_for_name(&order).is_some() && member(&mut zip, bytes, &order, &mut budget)?[..] != b"little"[..] {
            return Err("is not little-endian: load it with torch and save it on a little-endian machine".into());
        }
        let (pickle, _) = pickle::load(&member(&mut zip, bytes, &pickle_name, &mut budget)?)?;
        let mut storages = HashMap::new();
        for node in pickle.nodes() {
            if let Node::Storage { key, .. } = node
                && !storages.contains_key(key)
            {
                storages.insert(key.clone(), member(&mut zip, bytes, &format!("{folder}data/{key}"), &mut budget)?);
            }
        }
        Ok(Self { pickle, storages })
    }

    /// Five pickles (magic number, version, machine, objects, storage keys), then each storage: its count and its data.
    fn open_legacy(bytes: &Bytes) -> Result<Self, String> {
        let mut at = 0;
        let mut next = || -> Result<Pickle, String> {
            let (pickle, length) = pickle::load(&bytes[at..])?;
            at += length;
            Ok(pickle)
        };
        let magic = next()?;
        if !matches!(magic.node(magic.root), Node::Int(LEGACY_MAGIC)) {
            return Err("is a pickle, but not one that torch.save wrote".into());
        }
        let (_version, machine, objects, keys) = (next()?, next()?, next()?, next()?);
        if let Some(order) = lookup(&machine, machine.root, "little_endian")
            && !matches!(machine.node(order), Node::Bool(true))
        {
            return Err("is not little-endian: load it with torch and save it on a little-endian machine".into());
        }
        let Node::List(order) = keys.node(keys.root) else { return Err("has no list of storages".into()) };
        let sizes: HashMap<&Rc<str>, usize> = objects
            .nodes()
            .iter()
            .filter_map(|node| match node {
                Node::Storage { key, numbers, .. } => Some((key, numbers.size())),
                _ => None,
            })
            .collect();
        let mut storages = HashMap::new();
        for &id in order {
            let Node::Text(key) = keys.node(id) else {
                return Err("names a storage by something else than text".into());
            };
            let size = *sizes.get(key).ok_or_else(|| format!("has a storage {key:?} that nothing describes"))?;
            let (&count, rest) =
                bytes[at..].split_first_chunk().ok_or("is truncated: it ends before its last storage")?;
            let length = usize::try_from(u64::from_le_bytes(count)).ok().and_then(|count| count.checked_mul(size));
            let data = length.and_then(|length| rest.get(..length)).ok_or_else(|| {
                format!(
                    "is truncated: a storage of {} numbers needs more than the {} bytes left",
                    u64::from_le_bytes(count),
                    rest.len()
                )
            })?;
            at += 8 + data.len();
            storages.insert(key.clone(), bytes.slice_ref(data));
        }
        Ok(Self { pickle: objects, storages })
    }

    /// The whole file as one tensor, if that is what it is.
    pub fn root_tensor(&self) -> Result<Option<Entry>, String> {
        match self.pickle.node(self.pickle.root) {
            Node::Tensor { .. } => self.entry(self.pickle.root).map(Some),
            _ => Ok(None),
        }
    }

    /// The whole file as one dict, if that is what it is.
    pub fn root_dict(&self) -> Option<Id> {
        self.is_dict(self.pickle.root).then_some(self.pickle.root)
    }

    /// The dict of parameters: the root, or what is under the usual names in it.
    fn state_dict(&self) -> Option<Id> {
        let root = self.root_dict()?;
        let nested = STATE_DICT_KEYS.iter().filter_map(|key| lookup(&self.pickle, root, key));
        Some(nested.into_iter().find(|&id| self.is_dict(id)).unwrap_or(root))
    }

    fn is_dict(&self, id: Id) -> bool {
        matches!(self.pickle.node(id), Node::Dict(_))
    }

    /// The objects of one dict by name (of a name given twice the last, as in Python).
    pub fn entries(&self, dict: Id) -> Result<BTreeMap<String, Entry>, String> {
        let Node::Dict(pairs) = self.pickle.node(dict) else { return Ok(BTreeMap::new()) };
        let named: BTreeMap<&str, Id> = pairs
            .iter()
            .filter_map(|&(key, value)| match self.pickle.node(key) {
                Node::Text(name) => Some((&**name, value)),
                _ => None,
            })
            .collect();
        let entry = |(name, id)| match self.entry(id) {
            Ok(entry) => Ok((String::from(name), entry)),
            Err(e) => Err(format!("tensor `{name}` {e}")),
        };
        named.into_iter().map(entry).collect()
    }

    fn entry(&self, id: Id) -> Result<Entry, String> {
        let Node::Tensor { storage, offset, shape, strides } = self.pickle.node(id) else {
            return Ok(Entry::Other(kind(self.pickle.node(id)).into()));
        };
        let Node::Storage { numbers, key, elements } = self.pickle.node(*storage) else {
            return Err("has no storage".into()); // the pickle machine builds no such tensor
        };
        let dtype = match *numbers {
            StorageType::Float(dtype) => dtype,
            StorageType::Other { name, .. } => return Ok(Entry::Other(format!("a tensor of {name}"))),
        };
        let bytes = self.storages.get(key).ok_or_else(|| format!("has no data: storage {key:?} is missing"))?;
        let needed = elements.checked_mul(dtype.size());
        let bytes = needed.filter(|&needed| needed <= bytes.len()).map(|needed| bytes.slice(..needed));
        let bytes = bytes.ok_or_else(|| format!("has truncated data: its storage should hold {elements} numbers"))?;
        StoredTensor::new(dtype, shape.clone(), strides.clone(), *offset, bytes).map(Entry::Float)
    }
}

/// A dict's value, by name.
fn lookup(pickle: &Pickle, dict: Id, name: &str) -> Option<Id> {
    let Node::Dict(pairs) = pickle.node(dict) else { return None };
    let is_named = |key: Id| matches!(pickle.node(key), Node::Text(text) if **text == *name);
    pairs.iter().rev().find(|&&(key, _)| is_named(key)).map(|&(_, value)| value)
}

fn kind(node: &Node) -> &'static str {
    match node {
        Node::None => "None",
        Node::Bool(_) | Node::Int(_) | Node::Float(_) => "a single number",
        Node::Text(_) => "text",
        Node::Tuple(_) | Node::List(_) => "a list",
        Node::Dict(_) => "a dict",
        Node::Tensor { .. } => "a tensor",
        Node::Callable(_) | Node::StorageType(_) | Node::Storage { .. } => "not a tensor",
    }
}

/// A zip member's bytes: a view where it is stored, else decompressed, as long as `budget` (bytes) lasts.
fn member(zip: &mut ZipArchive<Cursor<&[u8]>>, bytes: &Bytes, name: &str, budget: &mut u64) -> Result<Bytes, String> {
    let mut file = zip.by_name(name).map_err(|e| format!("has no readable member `{}`: {e}", name.escape_debug()))?;
    let size = file.size();
    if file.compression() == CompressionMethod::Stored {
        let range = file.data_start().and_then(|start| Some(start..start.checked_add(size)?));
        let range = range.filter(|range| range.end <= bytes.len() as u64);
        let range = range.ok_or_else(|| format!("is truncated inside its member `{}`", name.escape_debug()))?;
        return Ok(bytes.slice(range.start as usize..range.end as usize));
    }
    *budget = budget.checked_sub(size).ok_or("claims to unpack to more than a zip archive of its size can")?;
    let mut data = Vec::new();
    (&mut file)
        .take(size)
        .read_to_end(&mut data)
        .map_err(|e| format!("cannot be unpacked at its member `{}`: {e}", name.escape_debug()))?;
    Ok(data.into())
}

/// Writes a bag as `torch.save(tensor, path)` does, so that `torch.load(path)` and the memory-mapped reader here both take it.
pub fn write_pt(path: &Path, features: ArrayView2<f32>) -> Result<()> {
    let shape = [features.nrows(), features.ncols()];
    write_pt_numbers(path, DType::F32, shape, |file| {
        features.rows().into_iter().try_for_each(|row| file.write_all(bytemuck::cast_slice(&row.to_vec())))
    })
}

/// The same for a bag that `numbers` writes, little-endian, `shape` = patches, features. They are stored 64-byte aligned.
pub fn write_pt_numbers(
    path: &Path,
    dtype: DType,
    shape: [usize; 2],
    numbers: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| Error::file(path, format!("cannot be written: {e}"));
    write_atomically(path, |file| {
        let mut zip = ZipWriter::new(file);
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .last_modified_time(zip::DateTime::default())
            .with_alignment(64)
            .large_file((shape[0] * shape[1] * dtype.size()) as u64 >= u32::MAX.into());
        let pickle = tensor_pickle(dtype, shape);
        for (name, content) in [("data.pkl", &pickle[..]), ("byteorder", b"little"), ("version", b"3\n")] {
            zip.start_file(format!("archive/{name}"), options).map_err(|e| failed(&e))?;
            zip.write_all(content).map_err(|e| failed(&e))?;
        }
        zip.start_file("archive/data/0", options).map_err(|e| failed(&e))?;
        numbers(&mut zip).map_err(|e| failed(&e))?;
        zip.finish().map_err(|e| failed(&e))?;
        Ok(())
    })
}

/// `_rebuild_tensor_v2(("storage", FloatStorage, "0", "cpu", rows * columns), 0, (rows, columns), (columns, 1), False,
/// OrderedDict())` in pickle protocol 2.
fn tensor_pickle(dtype: DType, [rows, columns]: [usize; 2]) -> Vec<u8> {
    fn text(out: &mut Vec<u8>, text: &str) {
        out.push(b'X');
        out.extend((text.len() as u32).to_le_bytes());
        out.extend(text.as_bytes());
    }
    fn integer(out: &mut Vec<u8>, value: usize) {
        match i32::try_from(value) {
            Ok(value) => {
                out.push(b'J');
                out.extend(value.to_le_bytes());
            }
            Err(_) => {
                out.extend([0x8a, 8]);
                out.extend((value as u64).to_le_bytes());
            }
        }
    }
    let mut out = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((".to_vec();
    text(&mut out, "storage");
    let storage = match dtype {
        DType::F16 => "HalfStorage",
        DType::BF16 => "BFloat16Storage",
        DType::F32 => "FloatStorage",
        DType::F64 => "DoubleStorage",
    };
    out.extend(format!("ctorch\n{storage}\n").as_bytes());
    text(&mut out, "0");
    text(&mut out, "cpu");
    integer(&mut out, rows * columns);
    out.extend(b"tQ");
    for value in [0, rows, columns] {
        integer(&mut out, value);
    }
    out.push(0x86);
    for value in [columns, 1] {
        integer(&mut out, value);
    }
    out.extend(b"\x86\x89ccollections\nOrderedDict\n)RtR.");
    out
}
