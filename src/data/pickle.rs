//! A pickle machine that builds plain data and executes nothing: the opcodes that `torch.save` writes, and a fixed
//! list of callables which it recognises by name. Any other opcode or callable is an error that names it.
//!
//! Nodes live in one arena and refer to each other by index, so shared and cyclic objects need no recursion, and every
//! opcode adds at most one node: memory is bounded by the number of opcodes, which is bounded too.
//! Reference: CPython's `Lib/pickletools.py`.

use std::collections::HashMap;
use std::rc::Rc;

use super::tensor::DType;

/// More than a hundred times what a large model needs.
const MAX_OPCODES: usize = 1 << 21;
/// Torch allows 64; what is read here has four at most. It bounds the memory of many tensors sharing one huge size.
const MAX_RANK: usize = 8;

/// The index of a node in its pickle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id(u32);

#[derive(Debug)]
pub enum Node {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(Rc<str>),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Callable(Callable),
    StorageType(StorageType),
    /// A named blob of `elements` numbers; the container that holds the pickle knows where it lies.
    Storage {
        numbers: StorageType,
        key: Rc<str>,
        elements: usize,
    },
    /// A strided view (in elements) of a storage.
    Tensor {
        storage: Id,
        offset: usize,
        shape: Vec<usize>,
        strides: Vec<usize>,
    },
}

/// The callables that may be "called": each one only builds a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Callable {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
}

/// The numbers of a storage: floats, which are read, or others, of which only name and size (bytes) matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageType {
    Float(DType),
    Other { name: &'static str, size: usize },
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

/// The whole list of what a pickle may name.
fn global(module: &str, name: &str) -> Option<Node> {
    let storage = |numbers| Some(Node::StorageType(numbers));
    let other = |name, size| Some(Node::StorageType(StorageType::Other { name, size }));
    match (module, name) {
        ("collections", "OrderedDict") => Some(Node::Callable(Callable::OrderedDict)),
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Some(Node::Callable(Callable::RebuildTensor)),
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
            Some(Node::Callable(Callable::RebuildParameter))
        }
        ("torch", "FloatStorage") => storage(StorageType::Float(DType::F32)),
        ("torch", "DoubleStorage") => storage(StorageType::Float(DType::F64)),
        ("torch", "HalfStorage") => storage(StorageType::Float(DType::F16)),
        ("torch", "BFloat16Storage") => storage(StorageType::Float(DType::BF16)),
        ("torch", "LongStorage") => other("int64", 8),
        ("torch", "IntStorage") => other("int32", 4),
        ("torch", "ShortStorage") => other("int16", 2),
        ("torch", "CharStorage") => other("int8", 1),
        ("torch", "ByteStorage") => other("uint8", 1),
        ("torch", "BoolStorage") => other("bool", 1),
        _ => None,
    }
}

/// A pickle's objects.
#[derive(Debug)]
pub struct Pickle {
    nodes: Vec<Node>,
    pub root: Id,
}

impl Pickle {
    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[id.0 as usize]
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }
}

/// Runs the pickle at the start of `input`; returns its objects and its length in bytes. The error is a sentence's
/// end, to be put after the file's name.
pub fn load(input: &[u8]) -> Result<(Pickle, usize), String> {
    let mut machine =
        Machine { input, at: 0, nodes: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    for _ in 0..MAX_OPCODES {
        let start = machine.at;
        let done = machine.step().map_err(|e| format!("cannot be unpickled: {e} (at byte {start} of the pickle)"))?;
        if let Some(root) = done {
            return Ok((Pickle { nodes: machine.nodes, root }, machine.at));
        }
    }
    Err(format!("cannot be unpickled: it has more than {MAX_OPCODES} opcodes"))
}

struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<Id>,
    /// Heights of the stack at which a MARK was set.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl Machine<'_> {
    /// One opcode; the result once it was STOP.
    fn step(&mut self) -> Result<Option<Id>, String> {
        match self.byte()? {
            b'.' => return Ok(Some(self.pop()?)),
            0x80 => match self.byte()? {
                2..=5 => {}
                version => return Err(format!("pickle protocol {version} is not one of 2 to 5")),
            },
            0x95 => drop(self.take(8)?), // FRAME: only a hint for buffered reading

            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),

            b'N' => self.push(Node::None),
            0x88 => self.push(Node::Bool(true)),
            0x89 => self.push(Node::Bool(false)),
            b'K' => {
                let value = self.byte()?;
                self.push(Node::Int(value.into()));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.push(Node::Int(value.into()));
            }
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.push(Node::Int(value.into()));
            }
            0x8a => {
                let length = self.byte()?.into();
                let value = long(self.take(length)?)?;
                self.push(Node::Int(value));
            }
            b'G' => {
                let value = f64::from_be_bytes(self.array()?);
                self.push(Node::Float(value));
            }
            0x8c | b'U' => {
                let length = self.byte()?.into();
                self.text(length)?;
            }
            b'X' | b'T' => {
                let length = u32::from_le_bytes(self.array()?);
                self.text(length as usize)?;
            }

            b')' => self.push(Node::Tuple(Vec::new())),
            opcode @ 0x85..=0x87 => {
                let items = self.pop_last(usize::from(opcode - 0x84))?;
                self.push(Node::Tuple(items));
            }
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Node::Tuple(items));
            }
            b']' => self.push(Node::List(Vec::new())),
            b'a' => {
                let items = self.pop_last(1)?;
                self.append(items)?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }
            b'}' => self.push(Node::Dict(Vec::new())),
            b's' => {
                let items = self.pop_last(2)?;
                self.set_items(&items)?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }

            b'q' => {
                let slot = self.byte()?.into();
                self.memoize(slot)?;
            }
            b'r' => {
                let slot = u32::from_le_bytes(self.array()?);
                self.memoize(slot)?;
            }
            0x94 => self.memoize(self.memo.len() as u32)?,
            b'h' => {
                let slot = self.byte()?.into();
                self.recall(slot)?;
            }
            b'j' => {
                let slot = u32::from_le_bytes(self.array()?);
                self.recall(slot)?;
            }

            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(&module, &name)?;
            }
            0x93 => {
                let names = self.pop_last(2)?;
                let (Node::Text(module), Node::Text(name)) = (self.node(names[0]), self.node(names[1])) else {
                    return Err("a callable is named by something that is not text".into());
                };
                let (module, name) = (module.clone(), name.clone());
                self.global(&module, &name)?;
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id)?;
                self.push(storage);
            }
            b'R' => {
                let operands = self.pop_last(2)?;
                let result = self.reduce(operands[0], operands[1])?;
                self.stack.push(result);
            }
            b'b' => {
                // BUILD sets attributes; the only ones met are a state dict's `_metadata`, which nothing here needs.
                let operands = self.pop_last(2)?;
                if !matches!(self.node(operands[0]), Node::Dict(_)) {
                    return Err("it sets attributes of an object that is not a dict".into());
                }
                self.stack.push(operands[0]);
            }
            opcode => return Err(format!("opcode 0x{opcode:02x} ({:?}) is not allowed", char::from(opcode))),
        }
        Ok(None)
    }

    /// What calling `callable` would have built, of arguments that are checked one by one.
    fn reduce(&mut self, callable: Id, arguments: Id) -> Result<Id, String> {
        let Node::Callable(callable) = *self.node(callable) else {
            return Err("it calls something that is not a function".into());
        };
        let Node::Tuple(arguments) = self.node(arguments) else {
            return Err("it calls a function with something that is not a tuple".into());
        };
        let node = match (callable, arguments.as_slice()) {
            (Callable::OrderedDict, []) => Node::Dict(Vec::new()),
            (Callable::RebuildParameter, &[tensor, _, ..]) if matches!(self.node(tensor), Node::Tensor { .. }) => {
                return Ok(tensor);
            }
            (Callable::RebuildTensor, &[storage, offset, shape, strides, ..])
                if matches!(self.node(storage), Node::Storage { .. }) =>
            {
                let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
                Node::Tensor { storage, offset: self.size(offset)?, shape, strides }
            }
            _ => return Err(format!("{callable:?} is called with arguments that torch.save does not write")),
        };
        self.push(node);
        self.pop()
    }

    /// Torch's persistent id: `("storage", type, key, device, elements)`, and None in the legacy format.
    fn storage(&self, id: Id) -> Result<Node, String> {
        let error = || "a storage is described in a way that torch.save does not write".to_string();
        let Node::Tuple(items) = self.node(id) else { return Err(error()) };
        let (&[kind, numbers, key, _device, elements], rest) = items.split_first_chunk().ok_or_else(error)?;
        match (self.node(kind), self.node(numbers), self.node(key), rest) {
            (Node::Text(kind), &Node::StorageType(numbers), Node::Text(key), rest)
                if &**kind == "storage" && rest.iter().all(|&view| matches!(self.node(view), Node::None)) =>
            {
                Ok(Node::Storage { numbers, key: key.clone(), elements: self.size(elements)? })
            }
            _ => Err(error()),
        }
    }

    fn sizes(&self, id: Id) -> Result<Vec<usize>, String> {
        let Node::Tuple(items) = self.node(id) else { return Err("a tensor's size is not a tuple".into()) };
        if items.len() > MAX_RANK {
            return Err(format!("a tensor has {} dimensions, expected at most {MAX_RANK}", items.len()));
        }
        items.iter().map(|&item| self.size(item)).collect()
    }

    fn size(&self, id: Id) -> Result<usize, String> {
        let Node::Int(value) = *self.node(id) else { return Err("a tensor's size is not an integer".into()) };
        value.try_into().map_err(|_| format!("a tensor's size is {value}"))
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), String> {
        let node = global(module, name).ok_or_else(|| {
            let full: String = format!("{module}.{name}").chars().take(120).collect();
            format!("it refers to `{}`, which is not allowed", full.escape_debug())
        })?;
        self.push(node);
        Ok(())
    }

    fn append(&mut self, items: Vec<Id>) -> Result<(), String> {
        match self.top().map(|id| &mut self.nodes[id.0 as usize])? {
            Node::List(list) => list.extend(items),
            _ => return Err("it appends to something that is not a list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Result<(), String> {
        let (pairs, rest) = items.as_chunks::<2>();
        match self.top().map(|id| &mut self.nodes[id.0 as usize])? {
            Node::Dict(dict) if rest.is_empty() => dict.extend(pairs.iter().map(|&[key, value]| (key, value))),
            Node::Dict(_) => return Err("a dict has a key without a value".into()),
            _ => return Err("it sets items of something that is not a dict".into()),
        }
        Ok(())
    }

    fn memoize(&mut self, slot: u32) -> Result<(), String> {
        let id = self.top()?;
        self.memo.insert(slot, id);
        Ok(())
    }

    fn recall(&mut self, slot: u32) -> Result<(), String> {
        let id = *self.memo.get(&slot).ok_or_else(|| format!("it recalls object {slot}, which was never stored"))?;
        self.stack.push(id);
        Ok(())
    }

    fn node(&self, id: Id) -> &Node {
        &self.nodes[id.0 as usize]
    }

    fn push(&mut self, node: Node) {
        self.stack.push(Id(self.nodes.len() as u32)); // MAX_OPCODES keeps it far below u32::MAX
        self.nodes.push(node);
    }

    /// Items below the last mark are out of reach until it is taken.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn top(&self) -> Result<Id, String> {
        self.stack[self.floor()..].last().copied().ok_or_else(|| "its stack runs empty".into())
    }

    fn pop(&mut self) -> Result<Id, String> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_last(&mut self, count: usize) -> Result<Vec<Id>, String> {
        if self.stack.len() - self.floor() < count {
            return Err("its stack runs empty".into());
        }
        Ok(self.stack.split_off(self.stack.len() - count))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or("it has no mark where one is needed")?;
        Ok(self.stack.split_off(mark))
    }

    fn byte(&mut self) -> Result<u8, String> {
        self.array().map(|[byte]| byte)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (&bytes, _) = self.input[self.at..].split_first_chunk().ok_or("it ends too early")?;
        self.at += N;
        Ok(bytes)
    }

    fn take(&mut self, count: usize) -> Result<&[u8], String> {
        let bytes = self.input[self.at..].get(..count).ok_or("it ends too early")?;
        self.at += count;
        Ok(bytes)
    }

    fn text(&mut self, length: usize) -> Result<(), String> {
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| "a string is not UTF-8")?.into();
        self.push(Node::Text(text));
        Ok(())
    }

    /// A name that ends with a newline.
    fn line(&mut self) -> Result<String, String> {
        let rest = &self.input[self.at..];
        let end = rest.iter().take(256).position(|&byte| byte == b'\n').ok_or("a callable's name does not end")?;
        self.at += end + 1;
        Ok(String::from_utf8_lossy(&rest[..end]).into_owned())
    }
}

/// Little-endian two's complement of any length; longer than 16 bytes is nothing that torch writes.
fn long(bytes: &[u8]) -> Result<i128, String> {
    let negative = bytes.last().is_some_and(|&byte| byte >= 0x80);
    let mut wide = [if negative { 0xff } else { 0 }; 16];
    wide.get_mut(..bytes.len()).ok_or("an integer is longer than 16 bytes")?.copy_from_slice(bytes);
    Ok(i128::from_le_bytes(wide))
}
