//! PyTorch's files: tensors and state dicts as `torch.save` writes them, zip or legacy, read without running anything; and bags written so that
//! `torch.load` and our own reader map them.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{Cursor, Write},
    ops::Range,
    path::Path,
    rc::Rc,
};

use half::{bf16, f16};
use memmap2::Mmap;
use ndarray::ArrayView2;
use safetensors::SafeTensors;

use super::{
    atomic::write_atomically,
    pickle::{self, Element, Pickle, Tensor, Value},
};
use crate::{Error, Result};

/// A file's bytes, mapped or in memory.
pub enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl Bytes {
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |e: std::io::Error| Error::file(path, format!("cannot be read: {e}"));
        let file = File::open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.len() == 0 {
            return Ok(Self::Owned(Vec::new()));
        }
        // SAFETY: feature files are not written while they are read; a file cut short meanwhile ends the program, as any mapping does.
        unsafe { Mmap::map(&file) }.map(Self::Mapped).map_err(failed)
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

/// A tensor's place in a file: bytes of its storage, and the view of it in elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Located {
    pub element: Element,
    /// Of the storage, in the file.
    pub storage: Range<usize>,
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

impl Located {
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Checks that every element lies in the storage.
    fn new(tensor: &Tensor, storage: Range<usize>) -> pickle::Result<Self> {
        let past = || {
            format!(
                "is truncated: a tensor of shape {:?} needs more than the {} bytes stored",
                tensor.shape,
                storage.len()
            )
        };
        let len = tensor.shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size)).ok_or_else(past)?;
        if len > 0 {
            let reach =
                |sum: usize, (&size, &stride): (&usize, &usize)| sum.checked_add((size - 1).checked_mul(stride)?);
            let last = tensor.shape.iter().zip(&tensor.strides).try_fold(tensor.offset, reach).ok_or_else(past)?;
            let end =
                last.checked_add(1).and_then(|n| n.checked_mul(tensor.storage.element.bytes())).ok_or_else(past)?;
            if end > storage.len() {
                return Err(past());
            }
        }
        let (offset, shape, strides) = (tensor.offset, tensor.shape.clone(), tensor.strides.clone());
        Ok(Self { element: tensor.storage.element, storage, offset, shape, strides })
    }

    /// All elements in row-major order, as f32.
    fn to_f32(&self, bytes: &[u8]) -> pickle::Result<Vec<f32>> {
        let data = &bytes[self.storage.clone()];
        // strides may repeat elements, so the number of them is bounded by nothing in the file
        if self.len() > data.len() {
            return Err(format!("holds a tensor of {} elements in {} bytes", self.len(), data.len()));
        }
        let mut values = Vec::with_capacity(self.len());
        let mut index = vec![0usize; self.shape.len()];
        for _ in 0..self.len() {
            let at = self.offset + index.iter().zip(&self.strides).map(|(i, stride)| i * stride).sum::<usize>();
            values.push(
                to_f32(self.element, &data[at * self.element.bytes()..])
                    .ok_or("holds a tensor that is not floating-point")?,
            );
            for (i, &size) in index.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < size {
                    break;
                }
                *i = 0;
            }
        }
        Ok(values)
    }
}

/// The first element of `data`; None unless it is floating-point.
pub fn to_f32(element: Element, data: &[u8]) -> Option<f32> {
    Some(match element {
        Element::F64 => f64::from_le_bytes(data[..8].try_into().ok()?) as f32,
        Element::F32 => f32::from_le_bytes(data[..4].try_into().ok()?),
        Element::F16 => f16::from_le_bytes([data[0], data[1]]).to_f32(),
        Element::BF16 => bf16::from_le_bytes([data[0], data[1]]).to_f32(),
        _ => return None,
    })
}

/// A torch file: its pickle, and where each storage lies.
pub struct TorchFile {
    pickle: Pickle,
    storages: HashMap<Rc<str>, Range<usize>>,
}

impl TorchFile {
    /// Zip or legacy. Messages do not name the file.
    pub fn parse(bytes: &[u8]) -> pickle::Result<Self> {
        if bytes.starts_with(b"PK\x03\x04") { Self::zip(bytes) } else { Self::legacy(bytes) }
    }

    /// A bare tensor, or a dict's tensor `features`.
    pub fn features(&self) -> pickle::Result<Located> {
        let tensor = match &self.pickle.value {
            Value::Tensor(tensor) => tensor,
            Value::Dict(dict) => match self.pickle.get(*dict, "features") {
                Some(Value::Tensor(tensor)) => tensor,
                _ => return Err("is a dict without a tensor `features`".into()),
            },
            _ => return Err("holds neither a tensor nor a dict with `features`".into()),
        };
        self.locate(tensor)
    }

    /// A state dict's tensors, also where it lies under a key of a larger checkpoint.
    pub fn state_dict(&self) -> pickle::Result<BTreeMap<String, Located>> {
        let Value::Dict(mut dict) = self.pickle.value else {
            return Err("holds no dict of tensors".into());
        };
        for key in ["state_dict", "model_state_dict", "model"] {
            if let Some(Value::Dict(inner)) = self.pickle.get(dict, key) {
                dict = *inner;
                break;
            }
        }
        let mut tensors = BTreeMap::new();
        for (name, value) in self.pickle.entries(dict) {
            if let Value::Tensor(tensor) = value {
                tensors.insert(name.to_string(), self.locate(tensor)?);
            }
        }
        if tensors.is_empty() { Err("holds no tensor".into()) } else { Ok(tensors) }
    }

    fn locate(&self, tensor: &Tensor) -> pickle::Result<Located> {
        let storage = self
            .storages
            .get(&tensor.storage.key)
            .ok_or_else(|| format!("lacks the storage `{}`", tensor.storage.key))?;
        Located::new(tensor, storage.clone())
    }

    /// `<name>/data.pkl`, `<name>/data/<key>`, all stored without compression.
    fn zip(bytes: &[u8]) -> pickle::Result<Self> {
        let broken = |e: zip::result::ZipError| format!("is truncated or not a zip: {e}");
        let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).map_err(broken)?;
        let mut members = HashMap::new();
        for i in 0..archive.len() {
            let member = archive.by_index(i).map_err(broken)?;
            let name = String::from_utf8_lossy(member.name_raw()).into_owned();
            let start = member.data_start().and_then(|start| usize::try_from(start).ok());
            let range = start
                .zip(usize::try_from(member.size()).ok())
                .and_then(|(start, size)| Some(start..start.checked_add(size)?));
            let range = range
                .filter(|range| range.end <= bytes.len())
                .ok_or_else(|| format!("is truncated in its member `{name}`"))?;
            members.insert(name, (range, member.compression() == zip::CompressionMethod::Stored));
        }
        let root = members
            .keys()
            .find_map(|name| name.strip_suffix("/data.pkl"))
            .ok_or("is a zip, but not one that torch wrote")?;
        let stored = |name: &str| match members.get(&format!("{root}/{name}")) {
            Some((range, true)) => Ok(Some(range.clone())),
            Some(_) => Err(format!("has a compressed member `{name}`, which torch never writes")),
            None => Ok(None),
        };
        if let Some(order) = stored("byteorder")?
            && &bytes[order.clone()] != b"little"
        {
            return Err("was written on a big-endian machine".into());
        }
        let pickle = stored("data.pkl")?.ok_or("lacks its pickle")?;
        let pickle = pickle::read(&bytes[pickle])?;
        let prefix = format!("{root}/data/");
        let mut storages = HashMap::new();
        for (name, (range, plain)) in &members {
            if let Some(key) = name.strip_prefix(&prefix).filter(|_| *plain) {
                storages.insert(Rc::from(key), range.clone());
            }
        }
        Ok(Self { pickle, storages })
    }

    /// Five pickles (magic number, protocol, system, object, storage keys), then each storage's length and data.
    fn legacy(bytes: &[u8]) -> pickle::Result<Self> {
        const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
        let mut at = 0;
        let next = |at: &mut usize| {
            let pickle = pickle::read(&bytes[*at..])?;
            *at += pickle.len;
            Ok::<_, String>(pickle)
        };
        let not_torch = "is not a file that torch.save wrote";
        if next(&mut at).map_err(|_| not_torch)?.value != Value::BigInt(MAGIC.as_slice().into()) {
            return Err(not_torch.into());
        }
        next(&mut at)?; // protocol
        next(&mut at)?; // system
        let pickle = next(&mut at)?;
        let keys = next(&mut at)?;
        let Value::List(keys_list) = keys.value else { return Err("lacks its list of storages".into()) };
        let tensors = pickle.containers.iter().flatten().chain([&pickle.value]);
        let storage = |value: &Value| match value {
            Value::Tensor(tensor) => Some((tensor.storage.key.clone(), tensor.storage.element)),
            _ => None,
        };
        let elements: HashMap<_, _> = tensors.filter_map(storage).collect();
        let mut storages = HashMap::new();
        for key in keys.items(keys_list) {
            let Value::Text(key) = key else { return Err("names a storage by something that is not text".into()) };
            let truncated = || format!("is truncated in its storage `{key}`");
            let header = bytes.get(at..at.checked_add(8).ok_or_else(truncated)?).ok_or_else(truncated)?;
            let len = u64::from_le_bytes(header.try_into().map_err(|_| truncated())?);
            let element = elements.get(key).copied().unwrap_or(Element::U8);
            let len = usize::try_from(len).ok().and_then(|n| n.checked_mul(element.bytes())).ok_or_else(truncated)?;
            let end = (at + 8).checked_add(len).filter(|&end| end <= bytes.len()).ok_or_else(truncated)?;
            storages.insert(key.clone(), at + 8..end);
            at = end;
        }
        Ok(Self { pickle, storages })
    }
}

/// A checkpoint's tensors by name, with shape and values.
pub type StateDict = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Reads a checkpoint: `.safetensors`, or a torch state dict, bare or under `state_dict`, `model_state_dict` or `model`. A prefix `module.` that all
/// names have (torch's DataParallel) is dropped.
pub fn read_state_dict(path: &Path) -> Result<StateDict> {
    parse_state_dict(&Bytes::open(path)?).map_err(|message| Error::file(path, message))
}

/// The same from bytes; messages do not name the file.
pub fn parse_state_dict(bytes: &[u8]) -> pickle::Result<StateDict> {
    let located = match SafeTensors::deserialize(bytes) {
        Ok(file) => safetensors_tensors(bytes, &file)?,
        Err(_) => TorchFile::parse(bytes)?.state_dict()?,
    };
    let prefixed = located.keys().all(|name| name.starts_with("module."));
    let mut tensors = StateDict::new();
    for (name, tensor) in located {
        let values = tensor.to_f32(bytes).map_err(|e| format!("{e} (`{name}`)"))?;
        let name = if prefixed { name["module.".len()..].to_string() } else { name };
        tensors.insert(name, (tensor.shape, values));
    }
    Ok(tensors)
}

/// Where the tensors of a safetensors file lie in it.
pub fn safetensors_tensors(bytes: &[u8], file: &SafeTensors) -> pickle::Result<BTreeMap<String, Located>> {
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        use safetensors::Dtype;
        let element = match view.dtype() {
            Dtype::F64 => Element::F64,
            Dtype::F32 => Element::F32,
            Dtype::F16 => Element::F16,
            Dtype::BF16 => Element::BF16,
            Dtype::I64 => Element::I64,
            Dtype::I32 => Element::I32,
            Dtype::I16 => Element::I16,
            Dtype::I8 => Element::I8,
            Dtype::U8 => Element::U8,
            Dtype::BOOL => Element::Bool,
            other => return Err(format!("holds tensor `{name}` of type {other:?}, expected floating-point")),
        };
        let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        let shape = view.shape().to_vec();
        let mut strides = vec![1; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i].max(1);
        }
        tensors.insert(name, Located { element, storage: start..start + view.data().len(), offset: 0, shape, strides });
    }
    Ok(tensors)
}

/// Data of a torch zip starts on multiples of this, as torch itself does it.
const ALIGNMENT: u16 = 64;

/// Writes a bag `[patches, features]` as torch would write a bare f32 tensor.
pub fn write_pt(path: &Path, bag: ArrayView2<f32>) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| Error::file(path, format!("cannot be written: {e}"));
    write_atomically(path, |file| {
        let mut zip = zip::ZipWriter::new(file);
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored)
            .with_alignment(ALIGNMENT)
            .large_file(false);
        let rows: Vec<u8> = bag.iter().flat_map(|x| x.to_le_bytes()).collect();
        let members: [(&str, &[u8]); 4] = [
            ("data.pkl", &tensor_pickle(bag.nrows(), bag.ncols())),
            ("byteorder", b"little"),
            ("data/0", &rows),
            ("version", b"3\n"),
        ];
        for (name, data) in members {
            let large = data.len() as u64 >= u64::from(u32::MAX);
            zip.start_file(format!("archive/{name}"), options.large_file(large)).map_err(|e| failed(&e))?;
            zip.write_all(data).map_err(|e| failed(&e))?;
        }
        zip.finish().map_err(|e| failed(&e))?;
        Ok(())
    })
}

/// `_rebuild_tensor_v2(FloatStorage '0', 0, (rows, cols), (cols, 1), False, OrderedDict())`, protocol 2.
fn tensor_pickle(rows: usize, cols: usize) -> Vec<u8> {
    let text = |s: &str| [b"X".as_slice(), &(s.len() as u32).to_le_bytes(), s.as_bytes()].concat();
    let int = |n: usize| match i32::try_from(n) {
        Ok(n) => [b"J".as_slice(), &n.to_le_bytes()].concat(),
        Err(_) => [b"\x8a\x08".as_slice(), &(n as u64).to_le_bytes()].concat(),
    };
    [
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
        text("storage"),
        b"ctorch\nFloatStorage\n".to_vec(),
        text("0"),
        text("cpu"),
        int(rows * cols),
        b"tQ".to_vec(),
        int(0),
        [int(rows), int(cols), b"\x86".to_vec()].concat(),
        [int(cols), int(1), b"\x86".to_vec()].concat(),
        b"\x89ccollections\nOrderedDict\n)RtR.".to_vec(),
    ]
    .concat()
}
