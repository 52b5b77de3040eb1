//! The files of `torch.save` (zip archives, and the legacy format of before torch 1.6), and
//! safetensors. Layouts: torch/serialization.py; a pickle describes the objects, and
//! raw little-endian storages lie beside it.

mod writer;

use std::collections::{BTreeMap, HashMap};
use std::io::{Cursor, Read};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use safetensors::{Dtype, SafeTensors};
pub use writer::{write_pt, write_pt_numbers};
use zip::{CompressionMethod, ZipArchive};

use super::container::{Container, ZIP_END, ZIP_MAGIC, container};
use super::features::{Held, choose, choose_of_pair, plain};
use super::pickle::{self, Array, Id, Node, Pickle, StorageType};
use super::tensor::{DType, Entry, Seal, StoredTensor, first_non_finite, product};
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
    /// Outermost axis first, as in the file.
    pub shape: Vec<usize>,
    /// As many as the shape says, converted to f32; all are finite.
    pub values: Vec<f32>,
}

/// A checkpoint's parameters by name.
pub type StateDict = BTreeMap<String, Parameter>;

/// Reads a checkpoint's float tensors by name, from `.safetensors` or from what `torch.save` wrote:
/// a state dict, bare or under `state_dict`, `model_state_dict` or `model`. What stands in front of
/// every name (`module.` of DataParallel, `_orig_mod.` of torch.compile, `model.` of Lightning, and
/// several of these) is taken off. Other objects, such as integer buffers, are left out. Errors
/// name the file and the tensor; a NaN or infinity is one.
pub fn read_state_dict(path: &Path) -> Result<StateDict> {
    let bytes = super::features::map_file(path)?;
    state_dict(bytes).map_err(|e| Error::file(path, e))
}

/// Whether a file's content is safetensors, whatever its name.
pub fn is_safetensors(path: &Path) -> Result<bool> {
    let bytes = super::features::map_file(path)?;
    container(&bytes).map(|kind| kind == Some(Container::Safetensors)).map_err(|e| Error::file(path, e))
}

/// [`read_state_dict`] of a file that is already in memory; `name` stands for its path in errors.
pub fn state_dict_from_bytes(name: &Path, bytes: Vec<u8>) -> Result<StateDict> {
    state_dict(bytes.into()).map_err(|e| Error::file(name, e))
}

fn state_dict(bytes: Bytes) -> Result<StateDict, String> {
    let (mut entries, stored) = match container(&bytes)? {
        Some(Container::Safetensors) => (safetensors_entries(&bytes)?, bytes.len()),
        Some(Container::Torch) => {
            let archive = Archive::open(&bytes)?;
            let root = archive.state_dict().ok_or("holds no state dict")?;
            for seal in archive.storages.values().filter_map(|storage| storage.seal.as_ref()) {
                seal.check(crc32fast::hash(&seal.bytes))?;
            }
            (archive.entries(root)?, archive.storages.values().map(|storage| storage.bytes.len()).sum())
        }
        Some(Container::Hdf5) | None => {
            return Err("is not a checkpoint: its content is neither .safetensors nor .pt".into());
        }
    };
    entries.retain(|_, entry| matches!(entry, Entry::Float(_)));
    while let Some(prefix) = shared_prefix(&entries) {
        entries = entries.into_iter().map(|(name, entry)| (name[prefix..].to_string(), entry)).collect();
    }
    // Tensors may share numbers (tied weights), but hardly more than a few; a small file that
    // claims gigabytes is an attack.
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
            let name = name.escape_debug();
            return Err(format!("tensor `{name}` holds {} at element {i}, expected finite numbers", values[i]));
        }
        parameters.insert(name, Parameter { shape: tensor.shape, values });
    }
    if parameters.is_empty() {
        return Err("holds no float tensors".into());
    }
    Ok(parameters)
}

/// The length of `part.`, if all names begin with it and go on. Of one name alone nothing can be
/// said.
fn shared_prefix<T>(entries: &BTreeMap<String, T>) -> Option<usize> {
    let (first, last) = (entries.first_key_value()?.0, entries.last_key_value()?.0);
    let prefix = &first[..=first.find('.')?];
    // in a sorted map, what first and last begin with all begin with
    (first != last && first.len() > prefix.len() && last.starts_with(prefix)).then_some(prefix.len())
}

/// Whether nothing but a zip's end follows the list of its members: 22 bytes, and 76 more in large
/// archives. A comment is more.
fn ends_with_directory(zip: &ZipArchive<Cursor<&[u8]>>, bytes: &[u8]) -> bool {
    let last = (0..zip.len()).filter_map(|i| Some(zip.by_index_data(i).ok()?.central_header_start() as usize)).max();
    let length = |at: usize| Some(usize::from(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?)));
    // an entry: 46 bytes, of which three fields say how long name, extra field and comment behind
    // it are
    let end = last.and_then(|at| Some(at + 46 + length(at + 28)? + length(at + 30)? + length(at + 32)?));
    let rest = end.and_then(|end| bytes.len().checked_sub(end));
    rest.is_some_and(|rest| rest == ZIP_END || rest == 76 + ZIP_END)
}

/// All tensors of a safetensors file.
pub(super) fn safetensors_entries(bytes: &Bytes) -> Result<BTreeMap<String, Entry>, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| format!("is not a sound safetensors file: {}", plain(e)))?;
    let entry = |name: &str, view: safetensors::tensor::TensorView| {
        let dtype = match view.dtype() {
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::F32 => DType::F32,
            Dtype::F64 => DType::F64,
            other => return Ok(Entry::Other(format!("{} {:?}", number_name(other), view.shape()))),
        };
        StoredTensor::contiguous(dtype, view.shape().to_vec(), bytes.slice_ref(view.data()))
            .map(Entry::Float)
            .map_err(|e| format!("tensor `{}` {e}", name.escape_debug()))
    };
    file.iter().map(|(name, view)| Ok((name.to_string(), entry(name, view)?))).collect()
}

/// As PyTorch names it.
fn number_name(dtype: Dtype) -> String {
    let name = format!("{dtype:?}");
    let kinds = [("BOOL", "bool"), ("BF", "bfloat"), ("F", "float"), ("I", "int"), ("U", "uint"), ("C", "complex")];
    match kinds.iter().find_map(|(short, long)| Some((long, name.strip_prefix(short)?))) {
        Some((long, rest)) => format!("{long}{}", rest.to_ascii_lowercase()),
        None => name,
    }
}

/// An opened torch file: its objects, and its storages by key.
pub(super) struct Archive {
    pickle: Pickle,
    storages: HashMap<Rc<str>, Storage>,
}

/// A storage's bytes; a seal where the container gives a checksum that was not checked yet.
struct Storage {
    bytes: Bytes,
    seal: Option<Arc<Seal>>,
}

impl Storage {
    /// The bytes, checked.
    fn sound(self) -> Result<Bytes, String> {
        if let Some(seal) = &self.seal {
            seal.check(crc32fast::hash(&seal.bytes))?;
        }
        Ok(self.bytes)
    }
}

impl Archive {
    /// Storages are views of `bytes`, except where a zip member is compressed.
    pub fn open(bytes: &Bytes) -> Result<Self, String> {
        if bytes.starts_with(ZIP_MAGIC) { Self::open_zip(bytes) } else { Self::open_legacy(bytes) }
    }

    fn open_zip(bytes: &Bytes) -> Result<Self, String> {
        let mut zip = ZipArchive::new(Cursor::new(&bytes[..]))
            .map_err(|e| format!("is a truncated or damaged .pt file: {}", plain(e)))?;
        // Both of a zip's lists of members must tell the same: else it holds one thing for us, and
        // another for torch.
        zip.validate_header_consistency().map_err(|e| format!("is a truncated or damaged .pt file: {}", plain(e)))?;
        if zip.offset() != 0 || !ends_with_directory(&zip, bytes) {
            return Err("is a zip archive with something in front of it or behind it, so it is not read".into());
        }
        let names = zip.file_names().flatten();
        let pickle_name = names.into_iter().find(|name| *name == "data.pkl" || name.ends_with("/data.pkl"));
        let pickle_name = pickle_name.ok_or("is a zip archive without a data.pkl, so not a torch file")?.into_owned();
        let folder = pickle_name.trim_end_matches("data.pkl");

        let mut budget = MAX_EXPANSION.saturating_mul(bytes.len() as u64);
        let order = format!("{folder}byteorder");
        if zip.index_for_name(&order).is_some()
            && member(&mut zip, bytes, &order, &mut budget)?.sound()?[..] != b"little"[..]
        {
            return Err("is not little-endian: load it with torch and save it on a little-endian machine".into());
        }
        let (pickle, _) = pickle::load(&member(&mut zip, bytes, &pickle_name, &mut budget)?.sound()?)?;
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

    /// Five pickles (magic number, version, machine, objects, storage keys), then each storage: its
    /// count and its data.
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
            storages.insert(key.clone(), Storage { bytes: bytes.slice_ref(data), seal: None });
        }
        if at < bytes.len() {
            return Err(format!("has {} bytes behind its last storage, so it is not read", bytes.len() - at));
        }
        Ok(Self { pickle: objects, storages })
    }

    /// The features: the root itself, what a dict holds under one of the usual names, or the one of
    /// a pair that is no coordinates.
    pub fn features(&self) -> Result<StoredTensor, String> {
        let root = self.pickle.root;
        match self.pickle.node(root) {
            Node::Dict(_) => {
                let named = self.named(root);
                let held = named.iter().map(|(name, &id)| self.held(name, id)).collect::<Vec<_>>();
                let name = choose(&held, "tensor")?;
                self.floats(named[name]).map_err(|e| format!("tensor `{name}` {e}"))
            }
            Node::Tuple(items) | Node::List(items) => {
                let held = items.iter().map(|&id| self.held("", id)).collect::<Vec<_>>();
                self.floats(items[choose_of_pair(&held)?])
            }
            Node::Tensor { .. } | Node::Array(_) => self.floats(root),
            node => Err(format!("holds {}, expected a tensor of floats or a dict with `features`", kind(node))),
        }
    }

    /// What is there.
    fn held(&self, name: &str, id: Id) -> Held {
        match self.pickle.node(id) {
            node @ Node::Tensor { shape, conjugated, .. } => match self.numbers(node) {
                StorageType::Float(dtype) if !conjugated => Held::tensor(name, dtype, shape),
                StorageType::Float(dtype) => Held::numbers(name, &format!("conjugate {dtype}"), shape),
                StorageType::Other { name: dtype, .. } => Held::numbers(name, dtype, shape),
            },
            Node::Array(Some(array)) => match self.array_type(array) {
                Ok((dtype, _)) => Held::tensor(name, dtype, &array.shape),
                Err(dtype) => Held::numbers(name, &dtype, &array.shape),
            },
            node => Held::other(name, kind(node).into()),
        }
    }

    /// The type of a tensor's numbers.
    fn numbers(&self, tensor: &Node) -> StorageType {
        match tensor {
            &Node::Tensor { numbers: Some(numbers), .. } => numbers,
            Node::Tensor { storage, .. } => match *self.pickle.node(*storage) {
                Node::Storage { numbers, .. } => numbers,
                _ => StorageType::Other { name: "nothing", size: 1 }, // the pickle machine builds no such tensor
            },
            _ => StorageType::Other { name: "nothing", size: 1 },
        }
    }

    /// The float type of a numpy array and whether it is big-endian; else its type's name.
    fn array_type(&self, array: &Array) -> Result<(DType, bool), String> {
        let Node::ArrayType { code, big_endian } = self.pickle.node(array.numbers) else {
            return Err("numpy's".into());
        };
        let named = |kind: &str, bytes: &str| match bytes.parse::<u16>() {
            Ok(bytes) => format!("{kind}{}", 8 * u32::from(bytes)),
            Err(_) => format!("numpy's {}", code.chars().take(20).collect::<String>().escape_debug()),
        };
        match &**code {
            "f2" => Ok((DType::F16, *big_endian)),
            "f4" => Ok((DType::F32, *big_endian)),
            "f8" => Ok((DType::F64, *big_endian)),
            code => Err(match code.split_at_checked(1) {
                Some(("i", bytes)) => named("int", bytes),
                Some(("u", bytes)) => named("uint", bytes),
                Some(("f", bytes)) => named("float", bytes),
                Some(("c", bytes)) => named("complex", bytes),
                Some(("b", "1")) => "bool".into(),
                Some(("U" | "S", _)) => "text".into(),
                Some(("O", _)) => "objects".into(),
                _ => named("", "?"),
            }),
        }
    }

    /// A tensor or an array of floats.
    fn floats(&self, id: Id) -> Result<StoredTensor, String> {
        if let Node::Array(Some(array)) = self.pickle.node(id) {
            return self.array(array);
        }
        match self.entry(id)? {
            Entry::Float(tensor) => Ok(tensor),
            Entry::Other(what) => Err(format!("holds {what}, expected floats")),
        }
    }

    fn array(&self, array: &Array) -> Result<StoredTensor, String> {
        let (dtype, big_endian) =
            self.array_type(array).map_err(|what| format!("holds {what} {:?}, expected floats", array.shape))?;
        let mut bytes = match self.pickle.node(array.data) {
            Node::Bytes(bytes) => bytes.to_vec(),
            Node::Latin1(text) => {
                let bytes: Option<Vec<u8>> = text.chars().map(|c| u8::try_from(c).ok()).collect();
                bytes.ok_or("has numbers that are not bytes")?
            }
            _ => return Err("has no numbers".into()),
        };
        if big_endian {
            bytes.chunks_exact_mut(dtype.size()).for_each(<[u8]>::reverse);
        }
        let elements = product(&array.shape).and_then(|elements| elements.checked_mul(dtype.size()));
        if elements != Some(bytes.len()) {
            return Err(format!("has shape {:?}, but {} bytes of numbers", array.shape, bytes.len()));
        }
        if !array.column_major {
            return StoredTensor::contiguous(dtype, array.shape.clone(), bytes.into());
        }
        let mut strides = vec![1usize; array.shape.len()];
        for axis in 1..array.shape.len() {
            strides[axis] = strides[axis - 1].saturating_mul(array.shape[axis - 1]);
        }
        StoredTensor::new(dtype, array.shape.clone(), strides, 0, bytes.into())
    }

    /// The whole file as one dict, if that is what it is.
    fn root_dict(&self) -> Option<Id> {
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
    fn named(&self, dict: Id) -> BTreeMap<&str, Id> {
        let Node::Dict(pairs) = self.pickle.node(dict) else { return BTreeMap::new() };
        let named = pairs.iter().filter_map(|&(key, value)| match self.pickle.node(key) {
            Node::Text(name) => Some((&**name, value)),
            _ => None,
        });
        named.collect()
    }

    fn entries(&self, dict: Id) -> Result<BTreeMap<String, Entry>, String> {
        let entry = |(name, id): (&str, Id)| match self.entry(id) {
            Ok(entry) => Ok((String::from(name), entry)),
            Err(e) => Err(format!("tensor `{}` {e}", name.escape_debug())),
        };
        self.named(dict).into_iter().map(entry).collect()
    }

    /// A tensor. Numpy's arrays are no parameters.
    fn entry(&self, id: Id) -> Result<Entry, String> {
        let node = self.pickle.node(id);
        let &Node::Tensor { storage, offset, ref shape, ref strides, negated, conjugated, .. } = node else {
            return Ok(Entry::Other(kind(node).into()));
        };
        let Node::Storage { numbers, key, elements } = self.pickle.node(storage) else {
            return Err("has no storage".into()); // the pickle machine builds no such tensor
        };
        let dtype = match self.numbers(node) {
            StorageType::Float(dtype) => dtype,
            StorageType::Other { name, .. } => return Ok(Entry::Other(format!("{name} {shape:?}"))),
        };
        if conjugated {
            return Err("has its conjugate bit set, and is not complex".into());
        }
        let stored = self.storages.get(key).ok_or_else(|| format!("has no data: storage {key:?} is missing"))?;
        let needed = elements.checked_mul(numbers.size());
        let bytes = needed.filter(|&needed| needed <= stored.bytes.len()).map(|needed| stored.bytes.slice(..needed));
        let bytes = bytes.ok_or_else(|| format!("has truncated data: its storage should hold {elements} numbers"))?;
        let mut tensor = StoredTensor::new(dtype, shape.clone(), strides.clone(), offset, bytes)?;
        tensor.negated = negated;
        tensor.seal = stored.seal.clone();
        Ok(Entry::Float(tensor))
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
        Node::Bool(_) | Node::Int(_) | Node::Float(_) => "a number",
        Node::Text(_) => "text",
        Node::Bytes(_) | Node::Latin1(_) => "bytes",
        Node::Tuple(_) => "a tuple",
        Node::List(_) => "a list",
        Node::Dict(_) => "a dict",
        Node::Tensor { .. } => "a tensor",
        Node::Array(_) => "a numpy array",
        Node::ArrayType { .. } | Node::NumberType(_) => "a type",
        Node::Opaque(what) => what,
        Node::Callable(_) | Node::StorageType(_) | Node::Storage { .. } => "not a tensor",
    }
}

/// A zip member's bytes: a view where it is stored, which is not checked yet; else decompressed, as
/// long as `budget` (bytes) lasts.
fn member(zip: &mut ZipArchive<Cursor<&[u8]>>, bytes: &Bytes, name: &str, budget: &mut u64) -> Result<Storage, String> {
    let mut file =
        zip.by_name(name).map_err(|e| format!("has no readable member `{}`: {}", name.escape_debug(), plain(e)))?;
    let (size, crc) = (file.size(), file.crc32());
    if file.compression() == CompressionMethod::Stored {
        let range = file.data_start().and_then(|start| Some(start..start.checked_add(size)?));
        let range = range.filter(|range| range.end <= bytes.len() as u64 && file.compressed_size() == size);
        let range = range.ok_or_else(|| format!("is truncated inside its member `{}`", name.escape_debug()))?;
        let bytes = bytes.slice(range.start as usize..range.end as usize);
        let seal = Seal { bytes: bytes.clone(), crc, name: name.into() };
        return Ok(Storage { bytes, seal: Some(Arc::new(seal)) });
    }
    *budget = budget.checked_sub(size).ok_or("claims to unpack to more than a zip archive of its size can")?;
    let mut data = Vec::new();
    (&mut file)
        .take(size)
        .read_to_end(&mut data)
        .map_err(|e| format!("cannot be unpacked at its member `{}`: {e}", name.escape_debug()))?;
    let seal = Seal { bytes: data.into(), crc, name: name.into() };
    seal.check(crc32fast::hash(&seal.bytes))?;
    Ok(Storage { bytes: seal.bytes, seal: None })
}
