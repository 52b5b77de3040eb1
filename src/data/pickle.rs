//! Just enough of Python's pickle to read what `torch.save` writes, and nothing that could run.
//!
//! A pickle is a program for a stack machine that may call any function that it names. This machine calls none: the few names
//! that tensors need build plain values, and any other name, or any opcode beyond those below, is an error that says it.
//! (Opcodes: Python's `Lib/pickletools.py`.)

use std::{collections::HashMap, rc::Rc};

/// A message without the file's name; the caller adds it.
pub type Result<T> = std::result::Result<T, String>;

/// A value; containers are indices into [`Pickle::containers`], so that deep nesting costs no stack.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    None,
    Bool(bool),
    Int(i64),
    /// An integer of more than 64 bits, little-endian.
    BigInt(Rc<[u8]>),
    Float(f64),
    Text(Rc<str>),
    Bytes,
    Tuple(usize),
    List(usize),
    /// Keys and values alternate.
    Dict(usize),
    Global(Global),
    Storage(Rc<Storage>),
    Tensor(Rc<Tensor>),
}

/// The names that may be mentioned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Global {
    RebuildTensor,
    RebuildParameter,
    OrderedDict,
    Size,
    Storage(Element),
}

/// Element types of torch's storages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl Element {
    pub fn bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }
}

/// Memory that a tensor views, stored under a key.
#[derive(Clone, Debug, PartialEq)]
pub struct Storage {
    pub element: Element,
    pub key: Rc<str>,
    pub len: usize,
}

/// A tensor: a strided view of a storage, all in elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub storage: Rc<Storage>,
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

/// A pickle that was read: its value, and the containers that it holds.
pub struct Pickle {
    pub value: Value,
    pub containers: Vec<Vec<Value>>,
    /// Bytes that the pickle took.
    pub len: usize,
}

impl Pickle {
    pub fn items(&self, container: usize) -> &[Value] {
        &self.containers[container]
    }

    /// The value of a text key.
    pub fn get(&self, dict: usize, key: &str) -> Option<&Value> {
        self.entries(dict).find(|(k, _)| *k == key).map(|(_, value)| value)
    }

    /// The entries with text keys.
    pub fn entries(&self, dict: usize) -> impl Iterator<Item = (&str, &Value)> {
        self.items(dict).chunks_exact(2).filter_map(|pair| match &pair[0] {
            Value::Text(key) => Some((key.as_ref(), &pair[1])),
            _ => None,
        })
    }
}

/// Reads the pickle at the start of `bytes`.
pub fn read(bytes: &[u8]) -> Result<Pickle> {
    let mut machine =
        Machine { bytes, at: 0, stack: Vec::new(), marks: Vec::new(), memo: HashMap::new(), containers: Vec::new() };
    let value = machine.run()?;
    Ok(Pickle { value, containers: machine.containers, len: machine.at })
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<usize, Value>,
    containers: Vec<Vec<Value>>,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Value> {
        loop {
            let opcode = self.take(1)?[0];
            match opcode {
                0x80 => drop(self.take(1)?),               // PROTO
                0x95 => drop(self.take(8)?),               // FRAME
                b'.' => return self.pop(),                 // STOP
                b'(' => self.marks.push(self.stack.len()), // MARK
                b'0' => drop(self.pop()?),                 // POP
                b'1' => drop(self.pop_mark()?),            // POP_MARK
                b'2' => {
                    let top = self.stack.last().cloned().ok_or("takes from an empty stack")?; // DUP
                    self.stack.push(top);
                }
                b'N' => self.stack.push(Value::None),
                0x88 => self.stack.push(Value::Bool(true)),
                0x89 => self.stack.push(Value::Bool(false)),
                b'J' => {
                    let value = i32::from_le_bytes(self.array()?); // BININT
                    self.stack.push(Value::Int(value.into()));
                }
                b'K' => {
                    let value = self.take(1)?[0]; // BININT1
                    self.stack.push(Value::Int(value.into()));
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.array()?); // BININT2
                    self.stack.push(Value::Int(value.into()));
                }
                0x8a => {
                    let len = self.take(1)?[0].into(); // LONG1
                    let value = long(self.take(len)?);
                    self.stack.push(value);
                }
                b'G' => {
                    let value = f64::from_be_bytes(self.array()?); // BINFLOAT
                    self.stack.push(Value::Float(value));
                }
                b'X' => self.text(4)?, // BINUNICODE
                0x8c => self.text(1)?, // SHORT_BINUNICODE
                0x8d => self.text(8)?, // BINUNICODE8
                b'U' => self.text(1)?, // SHORT_BINSTRING
                b'T' => self.text(4)?, // BINSTRING
                b'B' | b'C' => {
                    let len = self.length(if opcode == b'B' { 4 } else { 1 })?; // BINBYTES, SHORT_BINBYTES
                    self.take(len)?;
                    self.stack.push(Value::Bytes);
                }
                b')' => self.push_container(Vec::new(), Value::Tuple), // EMPTY_TUPLE
                b']' => self.push_container(Vec::new(), Value::List),  // EMPTY_LIST
                b'}' => self.push_container(Vec::new(), Value::Dict),  // EMPTY_DICT
                b't' => {
                    let items = self.pop_mark()?; // TUPLE
                    self.push_container(items, Value::Tuple);
                }
                0x85..=0x87 => {
                    let count = usize::from(opcode - 0x84); // TUPLE1, TUPLE2, TUPLE3
                    let from = self.stack.len().checked_sub(count).ok_or("takes from an empty stack")?;
                    let items = self.stack.split_off(from);
                    self.push_container(items, Value::Tuple);
                }
                b'a' => {
                    let item = self.pop()?; // APPEND
                    self.extend(vec![item])?;
                }
                b'e' | b'u' => {
                    let items = self.pop_mark()?; // APPENDS, SETITEMS
                    self.extend(items)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?); // SETITEM
                    self.extend(vec![key, value])?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?); // GLOBAL
                    self.stack.push(Value::Global(global(&module, &name)?));
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?); // STACK_GLOBAL
                    let (Value::Text(module), Value::Text(name)) = (module, name) else {
                        return Err("names a global by something that is not text".into());
                    };
                    self.stack.push(Value::Global(global(&module, &name)?));
                }
                b'R' => {
                    let (arguments, callable) = (self.pop()?, self.pop()?); // REDUCE
                    let value = self.reduce(callable, arguments)?;
                    self.stack.push(value);
                }
                b'b' => drop(self.pop()?), // BUILD: attributes, which no value here has
                b'Q' => {
                    let id = self.pop()?; // BINPERSID
                    let storage = self.storage(id)?;
                    self.stack.push(storage);
                }
                b'q' => {
                    let key = self.length(1)?; // BINPUT
                    self.put(key)?;
                }
                b'r' => {
                    let key = self.length(4)?; // LONG_BINPUT
                    self.put(key)?;
                }
                0x94 => self.put(self.memo.len())?, // MEMOIZE
                b'h' => {
                    let key = self.length(1)?; // BINGET
                    self.get(key)?;
                }
                b'j' => {
                    let key = self.length(4)?; // LONG_BINGET
                    self.get(key)?;
                }
                other => return Err(format!("uses pickle opcode 0x{other:02x}, which no tensor needs")),
            }
        }
    }

    fn take(&mut self, len: usize) -> Result<&[u8]> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.bytes.len()).ok_or("ends inside its pickle")?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    /// A little-endian length of 1, 4 or 8 bytes.
    fn length(&mut self, bytes: usize) -> Result<usize> {
        let mut length = [0; 8];
        length[..bytes].copy_from_slice(self.take(bytes)?);
        usize::try_from(u64::from_le_bytes(length)).map_err(|_| "holds an impossible length".into())
    }

    fn text(&mut self, bytes: usize) -> Result<()> {
        let len = self.length(bytes)?;
        let text = String::from_utf8_lossy(self.take(len)?).into();
        self.stack.push(Value::Text(text));
        Ok(())
    }

    fn line(&mut self) -> Result<String> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().position(|&b| b == b'\n').ok_or("ends inside its pickle")?;
        let line = String::from_utf8_lossy(&rest[..len]).into_owned();
        self.at += len + 1;
        Ok(line)
    }

    fn pop(&mut self) -> Result<Value> {
        self.stack.pop().ok_or_else(|| "takes from an empty stack".into())
    }

    fn pop_mark(&mut self) -> Result<Vec<Value>> {
        let mark =
            self.marks.pop().filter(|&mark| mark <= self.stack.len()).ok_or("closes a group that it never opened")?;
        Ok(self.stack.split_off(mark))
    }

    fn push_container(&mut self, items: Vec<Value>, kind: fn(usize) -> Value) {
        self.containers.push(items);
        self.stack.push(kind(self.containers.len() - 1));
    }

    /// Appends to the list or dict on top of the stack.
    fn extend(&mut self, items: Vec<Value>) -> Result<()> {
        match self.stack.last() {
            Some(&(Value::List(i) | Value::Dict(i))) => self.containers[i].extend(items),
            _ => return Err("appends to something that is no list or dict".into()),
        }
        Ok(())
    }

    fn put(&mut self, key: usize) -> Result<()> {
        let top = self.stack.last().cloned().ok_or("remembers from an empty stack")?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn get(&mut self, key: usize) -> Result<()> {
        let value = self.memo.get(&key).cloned().ok_or("recalls what it never remembered")?;
        self.stack.push(value);
        Ok(())
    }

    fn tuple(&self, value: &Value) -> Option<&[Value]> {
        if let Value::Tuple(i) = value { Some(&self.containers[*i]) } else { None }
    }

    fn reduce(&mut self, callable: Value, arguments: Value) -> Result<Value> {
        let arguments = self.tuple(&arguments).ok_or("calls something without a tuple of arguments")?.to_vec();
        match (&callable, arguments.as_slice()) {
            (Value::Global(Global::OrderedDict), []) => {
                self.containers.push(Vec::new());
                Ok(Value::Dict(self.containers.len() - 1))
            }
            (Value::Global(Global::Size), [sizes]) => Ok(sizes.clone()),
            (Value::Global(Global::RebuildParameter), [tensor @ Value::Tensor(_), ..]) => Ok(tensor.clone()),
            (Value::Global(Global::RebuildTensor), [Value::Storage(storage), offset, shape, strides, ..]) => {
                let (offset, shape, strides) = (size(offset)?, self.sizes(shape)?, self.sizes(strides)?);
                if shape.len() != strides.len() {
                    return Err(format!("holds a tensor with {} sizes and {} strides", shape.len(), strides.len()));
                }
                Ok(Value::Tensor(Rc::new(Tensor { storage: storage.clone(), offset, shape, strides })))
            }
            _ => Err("calls a tensor function with arguments that it does not take".into()),
        }
    }

    fn sizes(&self, value: &Value) -> Result<Vec<usize>> {
        self.tuple(value).ok_or("holds a tensor whose shape is no tuple")?.iter().map(size).collect()
    }

    /// ('storage', type, key, location, number of elements); older files add a view, which must be None.
    fn storage(&self, id: Value) -> Result<Value> {
        match self.tuple(&id) {
            Some([Value::Text(kind), Value::Global(Global::Storage(element)), Value::Text(key), _, len, rest @ ..])
                if &**kind == "storage" && rest.iter().all(|view| *view == Value::None) =>
            {
                Ok(Value::Storage(Rc::new(Storage { element: *element, key: key.clone(), len: size(len)? })))
            }
            _ => Err("refers to something that is no tensor storage".into()),
        }
    }
}

fn size(value: &Value) -> Result<usize> {
    match value {
        Value::Int(i) => usize::try_from(*i).map_err(|_| format!("holds the negative size {i}")),
        _ => Err("holds a size that is no integer".into()),
    }
}

/// Two's complement, little-endian.
fn long(bytes: &[u8]) -> Value {
    if bytes.len() > 8 {
        return Value::BigInt(bytes.into());
    }
    let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
    let mut wide = [if negative { 0xff } else { 0 }; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(wide))
}

fn global(module: &str, name: &str) -> Result<Global> {
    Ok(match (module, name) {
        ("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor") => Global::RebuildTensor,
        ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
        ("collections", "OrderedDict") => Global::OrderedDict,
        ("torch", "Size") => Global::Size,
        ("torch", "DoubleStorage") => Global::Storage(Element::F64),
        ("torch", "FloatStorage") => Global::Storage(Element::F32),
        ("torch", "HalfStorage") => Global::Storage(Element::F16),
        ("torch", "BFloat16Storage") => Global::Storage(Element::BF16),
        ("torch", "LongStorage") => Global::Storage(Element::I64),
        ("torch", "IntStorage") => Global::Storage(Element::I32),
        ("torch", "ShortStorage") => Global::Storage(Element::I16),
        ("torch", "CharStorage") => Global::Storage(Element::I8),
        ("torch", "ByteStorage") => Global::Storage(Element::U8),
        ("torch", "BoolStorage") => Global::Storage(Element::Bool),
        _ => return Err(format!("asks to call `{module}.{name}`, which is not allowed in a tensor file")),
    })
}
