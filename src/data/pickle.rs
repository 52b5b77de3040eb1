//! A pickle machine that builds plain data and executes nothing: the opcodes that `torch.save`
//! writes, and a fixed list of callables which it recognises by name. Any other opcode or callable
//! is an error that names it.
//!
//! Nodes live in one arena and refer to each other by index, so shared and cyclic objects need no
//! recursion, and every opcode adds at most one node: memory is bounded by the number of opcodes,
//! which is bounded too. Reference: CPython's `Lib/pickletools.py`.

mod machine;

use std::rc::Rc;

pub use machine::load;

use super::tensor::DType;

/// The index of a node in its pickle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id(u32);

/// An object that a pickle describes; it refers to others by their index.
#[derive(Debug)]
pub enum Node {
    /// Python's `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An `int` of at most 16 bytes.
    Int(i128),
    /// A `float`.
    Float(f64),
    /// A `str`.
    Text(Rc<str>),
    /// A `tuple` of these items.
    Tuple(Vec<Id>),
    /// A `list` of these items.
    List(Vec<Id>),
    /// A `dict`: keys and values in the order they were set, where a key may stand twice.
    Dict(Vec<(Id, Id)>),
    /// A function or class that may be called.
    Callable(Callable),
    /// `torch.FloatStorage` and the like.
    StorageType(StorageType),
    /// `torch.float32` and the like.
    NumberType(StorageType),
    /// A named blob of `elements` numbers; the container that holds the pickle knows where it lies.
    Storage {
        /// What it holds; bytes where it is untyped.
        numbers: StorageType,
        /// The blob's name in its container.
        key: Rc<str>,
        /// How many numbers it claims to hold.
        elements: usize,
    },
    /// A strided view (in elements) of a storage.
    Tensor {
        /// [`Node::Storage`]
        storage: Id,
        /// Set where the storage itself is untyped.
        numbers: Option<StorageType>,
        /// Of the first number in the storage.
        offset: usize,
        /// Outermost axis first; at most eight.
        shape: Vec<usize>,
        /// From one place on an axis to the next.
        strides: Vec<usize>,
        /// The numbers are the storage's with the other sign.
        negated: bool,
        /// The numbers are the storage's, conjugated.
        conjugated: bool,
    },
    /// `bytes` or `bytearray`.
    Bytes(Rc<[u8]>),
    /// Bytes written as text, each as the character of its number.
    Latin1(Rc<str>),
    /// `numpy.dtype`: its kind and size ("f4").
    ArrayType {
        /// Kind, and bytes of one number.
        code: Rc<str>,
        /// Whether a number's highest byte comes first.
        big_endian: bool,
    },
    /// A numpy array; None until its state has come.
    Array(Option<Array>),
    /// Something that is known, and of which nothing more is read, in words: "a sparse tensor".
    Opaque(&'static str),
}

/// The state of a numpy array. The machine has checked what the nodes are.
#[derive(Clone, Debug)]
pub struct Array {
    /// [`Node::ArrayType`]
    pub numbers: Id,
    /// Outermost axis first; at most eight.
    pub shape: Vec<usize>,
    /// Whether the first axis lies side by side, and not the last.
    pub column_major: bool,
    /// [`Node::Bytes`] or [`Node::Latin1`]; of arrays of objects a list.
    pub data: Id,
}

/// The callables that may be "called": each one only builds a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Callable {
    /// `collections.OrderedDict`, of no arguments.
    OrderedDict,
    /// A tensor of a storage that has a type: torch's `_rebuild_tensor` and `_rebuild_tensor_v2`.
    RebuildTensor,
    /// Of an untyped storage.
    RebuildTypedTensor,
    /// Torch's `_rebuild_parameter`, which gives the tensor that it is called with.
    RebuildParameter,
    /// A tensor with attributes of its own.
    RebuildFromType,
    /// Numpy's `_reconstruct`: an array whose state comes later.
    RebuildArray,
    /// Numpy's `_frombuffer`: an array with its state.
    ArrayFromBuffer,
    /// `numpy.dtype`.
    ArrayType,
    /// Python 2's way to write bytes.
    Encode,
    /// `torch.Size`, which gives the tuple that it is called with.
    Size,
    /// Gives [`Node::Opaque`], whatever it is called with.
    Opaque(&'static str),
}

/// The numbers of a storage: floats, which are read, or others, of which only name and size (bytes)
/// matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageType {
    /// Floats.
    Float(DType),
    /// Integers, booleans, complex and quantized numbers, untyped bytes.
    Other {
        /// As torch calls them; "bytes" of no type.
        name: &'static str,
        /// Bytes of one number.
        size: usize,
    },
}

impl StorageType {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            StorageType::Float(dtype) => dtype.size(),
            StorageType::Other { size, .. } => size,
        }
    }
}

/// The whole list of what a pickle may name. None of it is ever run: what stands here is known to
/// be harmless data, and is either understood or passed over.
fn global(module: &str, name: &str) -> Option<Node> {
    let call = |callable| Some(Node::Callable(callable));
    let opaque = |what| Some(Node::Callable(Callable::Opaque(what)));
    match (module, name) {
        ("collections", "OrderedDict") => call(Callable::OrderedDict),
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => call(Callable::RebuildTensor),
        ("torch._utils", "_rebuild_tensor_v3") => call(Callable::RebuildTypedTensor),
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => call(Callable::RebuildParameter),
        ("torch._tensor", "_rebuild_from_type_v2") => call(Callable::RebuildFromType),
        ("torch._utils", "_rebuild_qtensor") => opaque("a quantized tensor"),
        ("torch._utils", "_rebuild_sparse_tensor" | "_rebuild_sparse_csr_tensor") => opaque("a sparse tensor"),
        ("torch._utils", "_rebuild_nested_tensor") => opaque("a nested tensor"),
        ("torch._utils", "_rebuild_meta_tensor_no_storage") => opaque("a tensor without numbers (on device `meta`)"),
        ("torch.serialization", "_get_layout") => opaque("a layout"),
        ("torch", "per_tensor_affine" | "per_channel_affine" | "per_channel_affine_float_qparams") => {
            Some(Node::Opaque("a quantizer"))
        }
        ("torch", "device") => opaque("a device"),
        ("torch", "Size") => call(Callable::Size),
        ("torch", "Tensor") => Some(Node::Opaque("a type")),
        ("torch.storage", "UntypedStorage") => Some(Node::StorageType(StorageType::Other { name: "bytes", size: 1 })),
        ("torch", name) => {
            storage_type(name).map(Node::StorageType).or_else(|| number_type(name).map(Node::NumberType))
        }
        ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => call(Callable::RebuildArray),
        ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar") => opaque("a number"),
        ("numpy.core.numeric" | "numpy._core.numeric", "_frombuffer") => call(Callable::ArrayFromBuffer),
        ("numpy", "ndarray") => Some(Node::Opaque("a type")),
        ("numpy", "dtype") => call(Callable::ArrayType),
        ("_codecs", "encode") => call(Callable::Encode),
        (
            "pathlib" | "pathlib._local",
            "PosixPath" | "PurePosixPath" | "WindowsPath" | "PureWindowsPath" | "Path" | "PurePath",
        ) => opaque("a path"),
        ("builtins" | "__builtin__", "set" | "frozenset") => opaque("a set"),
        ("builtins" | "__builtin__", "complex") => opaque("a number"),
        _ => None,
    }
}

/// The storages of torch that have a type.
fn storage_type(name: &str) -> Option<StorageType> {
    number_type(match name {
        "FloatStorage" => "float32",
        "DoubleStorage" => "float64",
        "HalfStorage" => "float16",
        "BFloat16Storage" => "bfloat16",
        "LongStorage" => "int64",
        "IntStorage" => "int32",
        "ShortStorage" => "int16",
        "CharStorage" => "int8",
        "ByteStorage" => "uint8",
        "BoolStorage" => "bool",
        "ComplexFloatStorage" => "complex64",
        "ComplexDoubleStorage" => "complex128",
        "QUInt8Storage" => "quint8",
        "QInt8Storage" => "qint8",
        "QInt32Storage" => "qint32",
        _ => return None,
    })
}

/// The types of numbers that torch knows.
fn number_type(name: &str) -> Option<StorageType> {
    let other = |name, size| Some(StorageType::Other { name, size });
    match name {
        "float32" => Some(StorageType::Float(DType::F32)),
        "float64" => Some(StorageType::Float(DType::F64)),
        "float16" => Some(StorageType::Float(DType::F16)),
        "bfloat16" => Some(StorageType::Float(DType::BF16)),
        "int64" => other("int64", 8),
        "int32" => other("int32", 4),
        "int16" => other("int16", 2),
        "int8" => other("int8", 1),
        "uint8" => other("uint8", 1),
        "uint16" => other("uint16", 2),
        "uint32" => other("uint32", 4),
        "uint64" => other("uint64", 8),
        "bool" => other("bool", 1),
        "complex32" => other("complex32", 4),
        "complex64" => other("complex64", 8),
        "complex128" => other("complex128", 16),
        "quint8" => other("quint8", 1),
        "qint8" => other("qint8", 1),
        "qint32" => other("qint32", 4),
        "float8_e4m3fn" => other("float8_e4m3fn", 1),
        "float8_e4m3fnuz" => other("float8_e4m3fnuz", 1),
        "float8_e5m2" => other("float8_e5m2", 1),
        "float8_e5m2fnuz" => other("float8_e5m2fnuz", 1),
        "float8_e8m0fnu" => other("float8_e8m0fnu", 1),
        _ => None,
    }
}

/// A pickle's objects.
#[derive(Debug)]
pub struct Pickle {
    nodes: Vec<Node>,
    /// The object that the pickle was made of.
    pub root: Id,
}

impl Pickle {
    /// The object at an index, which must be of this pickle.
    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[id.0 as usize]
    }

    /// All objects, in the order they were made.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }
}
