//! The machine: opcodes on a stack, and what the callables make of their arguments.

use std::collections::HashMap;

use super::{Array, Callable, Id, Node, Pickle, global};

/// More than a hundred times what a large model needs.
const MAX_OPCODES: usize = 1 << 21;
/// Torch allows 64; what is read here has four at most. It bounds the memory of many tensors
/// sharing one huge size.
const MAX_RANK: usize = 8;

/// Runs the pickle at the start of `input`; returns its objects and its length in bytes. The error
/// is a sentence's end, to be put after the file's name.
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

            b'C' => {
                let length = self.byte()?.into();
                self.bytes(length)?;
            }
            b'B' => {
                let length = u32::from_le_bytes(self.array()?);
                self.bytes(length as usize)?;
            }
            0x8e | 0x96 => {
                let length = u64::from_le_bytes(self.array()?);
                self.bytes(usize::try_from(length).map_err(|_| "it ends too early")?)?;
            }
            0x8d => {
                let length = u64::from_le_bytes(self.array()?);
                self.text(usize::try_from(length).map_err(|_| "it ends too early")?)?;
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
                let operands = self.pop_last(2)?;
                self.build(operands[0], operands[1])?;
                self.stack.push(operands[0]);
            }
            opcode => return Err(format!("opcode 0x{opcode:02x} ({:?}) is not allowed", char::from(opcode))),
        }
        Ok(None)
    }

    /// BUILD sets an object's state: that of arrays and their types is read; of a dict (a state
    /// dict's `_metadata`), and of what is passed over, nothing is needed.
    fn build(&mut self, object: Id, state: Id) -> Result<(), String> {
        let state = match self.node(state) {
            Node::Tuple(items) => items.as_slice(),
            _ => &[],
        };
        let node = match (self.node(object), state) {
            (Node::Dict(_) | Node::Opaque(_), _) => return Ok(()),
            (Node::ArrayType { code, .. }, &[_version, order, ..]) if let Node::Text(order) = self.node(order) => {
                Node::ArrayType { code: code.clone(), big_endian: &**order == ">" }
            }
            (Node::Array(None), &[_version, shape, numbers, column_major, data])
                if let &Node::Bool(column_major) = self.node(column_major)
                    && matches!(self.node(numbers), Node::ArrayType { .. }) =>
            {
                Node::Array(Some(Array { numbers, shape: self.sizes(shape)?, column_major, data }))
            }
            (Node::Array(_) | Node::ArrayType { .. }, _) => {
                return Err("a numpy array is described in a way that numpy does not write".into());
            }
            _ => return Err("it sets attributes of an object that is not a dict".into()),
        };
        self.nodes[object.0 as usize] = node;
        Ok(())
    }

    /// What calling `callable` would have built, of arguments that are checked one by one.
    fn reduce(&mut self, callable: Id, arguments: Id) -> Result<Id, String> {
        let &Node::Callable(callable) = self.node(callable) else {
            return Err("it calls something that is not a function".into());
        };
        let Node::Tuple(arguments) = self.node(arguments) else {
            return Err("it calls a function with something that is not a tuple".into());
        };
        let node = match (callable, arguments.as_slice()) {
            (Callable::Opaque(what), _) => Node::Opaque(what),
            (Callable::OrderedDict, []) => Node::Dict(Vec::new()),
            (Callable::RebuildParameter, &[tensor, _, ..])
                if matches!(self.node(tensor), Node::Tensor { .. } | Node::Opaque(_)) =>
            {
                return Ok(tensor);
            }
            // of the plain tensor type alone, `torch.Tensor`: of others it is not known what they
            // mean by their numbers
            (Callable::RebuildFromType, &[function, kind, arguments, _state])
                if let &Node::Callable(
                    function @ (Callable::RebuildTensor | Callable::RebuildTypedTensor | Callable::Opaque(_)),
                ) = self.node(function)
                    && matches!(self.node(kind), Node::Opaque("a type"))
                    && let Node::Tuple(arguments) = self.node(arguments) =>
            {
                match function {
                    Callable::Opaque(what) => Node::Opaque(what),
                    _ => self.tensor(function, arguments)?,
                }
            }
            (Callable::RebuildTensor | Callable::RebuildTypedTensor, arguments) => self.tensor(callable, arguments)?,
            (Callable::RebuildArray, &[_kind, _shape, _code]) => Node::Array(None),
            (Callable::ArrayFromBuffer, &[data, numbers, shape, order])
                if let Node::Text(order) = self.node(order)
                    && matches!(self.node(numbers), Node::ArrayType { .. }) =>
            {
                let column_major = &**order == "F";
                Node::Array(Some(Array { numbers, shape: self.sizes(shape)?, column_major, data }))
            }
            (Callable::ArrayType, &[code, ..]) if let Node::Text(code) = self.node(code) => {
                Node::ArrayType { code: code.clone(), big_endian: false }
            }
            (Callable::Encode, &[text, coding])
                if let (Node::Text(text), Node::Text(coding)) = (self.node(text), self.node(coding))
                    && matches!(&**coding, "latin1" | "latin-1") =>
            {
                Node::Latin1(text.clone())
            }
            (Callable::Size, &[sizes]) if matches!(self.node(sizes), Node::Tuple(_)) => return Ok(sizes),
            _ => return Err(format!("{callable:?} is called with arguments that torch.save does not write")),
        };
        self.push(node);
        self.pop()
    }

    /// `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata)`, and
    /// with a type before the metadata `_v3`; what comes after the stride may be absent.
    fn tensor(&self, callable: Callable, arguments: &[Id]) -> Result<Node, String> {
        let error = || format!("{callable:?} is called with arguments that torch.save does not write");
        let (&[storage, offset, shape, strides], rest) = arguments.split_first_chunk().ok_or_else(error)?;
        if !matches!(self.node(storage), Node::Storage { .. }) {
            return Err(error());
        }
        let (numbers, metadata) = match (callable, rest) {
            (Callable::RebuildTensor, [] | [_] | [_, _]) => (None, None),
            (Callable::RebuildTensor, &[_, _, metadata]) => (None, Some(metadata)),
            (Callable::RebuildTypedTensor, &[_, _, numbers, ref metadata @ ..])
                if let &Node::NumberType(numbers) = self.node(numbers)
                    && metadata.len() <= 1 =>
            {
                (Some(numbers), metadata.first().copied())
            }
            _ => return Err(error()),
        };
        let (mut negated, mut conjugated) = (false, false);
        match metadata.map(|id| self.node(id)) {
            None | Some(Node::None) => {}
            Some(Node::Dict(pairs)) => {
                for &(key, value) in pairs {
                    match (self.node(key), self.node(value)) {
                        (Node::Text(key), &Node::Bool(value)) if &**key == "neg" => negated = value,
                        (Node::Text(key), &Node::Bool(value)) if &**key == "conj" => conjugated = value,
                        (Node::Text(key), _) => {
                            let key: String = key.chars().take(60).collect();
                            return Err(format!(
                                "a tensor has the property `{}`, which is not known",
                                key.escape_debug()
                            ));
                        }
                        _ => return Err(error()),
                    }
                }
            }
            Some(_) => return Err(error()),
        }
        let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
        Ok(Node::Tensor { storage, numbers, offset: self.size(offset)?, shape, strides, negated, conjugated })
    }

    /// Torch's persistent id: `("storage", type, key, device, elements)`, and None in the legacy
    /// format.
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

    fn bytes(&mut self, length: usize) -> Result<(), String> {
        let bytes = self.take(length)?.into();
        self.push(Node::Bytes(bytes));
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
