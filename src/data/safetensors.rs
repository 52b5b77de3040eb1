//! The start of a safetensors file, for writers that hold only a piece of their numbers at a time;
//! the crate `safetensors` reads, and writes what is in memory as a whole.
//! <https://huggingface.co/docs/safetensors/index#format>

use serde_json::{Map, Value, json};

use super::tensor::DType;

/// A tensor that will stand in a file.
pub(crate) struct Entry<'a> {
    pub name: &'a str,
    pub dtype: DType,
    pub shape: &'a [usize],
}

/// All that stands before the numbers, which follow in the order of `tensors`, without gaps:
/// the JSON's length as a little-endian u64, and the JSON, padded so that they begin at a multiple
/// of 8 bytes. `metadata` is text by name.
pub(crate) fn header(metadata: &[(&str, &str)], tensors: &[Entry]) -> Vec<u8> {
    let mut header = Map::new();
    let metadata: Map<String, Value> = metadata.iter().map(|&(key, text)| (key.into(), json!(text))).collect();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), metadata.into());
    }
    let mut end = 0;
    for Entry { name, dtype, shape } in tensors {
        let start = end;
        end += shape.iter().product::<usize>() * dtype.size();
        let entry = json!({ "dtype": abbreviation(*dtype), "shape": shape, "data_offsets": [start, end] });
        header.insert(name.to_string(), entry);
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    [&(text.len() as u64).to_le_bytes()[..], &text].concat()
}

fn abbreviation(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::F32 => "F32",
        DType::F64 => "F64",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crate_safetensors_reads_what_follows_a_header() {
        let tensors = [
            Entry { name: "a", dtype: DType::F32, shape: &[2, 3] },
            Entry { name: "b", dtype: DType::BF16, shape: &[5] },
        ];
        let mut file = header(&[("quoted", "a \"b\"\n")], &tensors);
        assert!(file.len().is_multiple_of(8));
        let numbers: Vec<u8> = (0..6 * 4 + 5 * 2).collect();
        file.extend(&numbers);

        let read = ::safetensors::SafeTensors::deserialize(&file).unwrap();
        let [a, b] = ["a", "b"].map(|name| read.tensor(name).unwrap());
        assert_eq!((a.dtype(), a.shape(), a.data()), (::safetensors::Dtype::F32, &[2, 3][..], &numbers[..24]));
        assert_eq!((b.dtype(), b.shape(), b.data()), (::safetensors::Dtype::BF16, &[5][..], &numbers[24..]));
        let (_, metadata) = ::safetensors::SafeTensors::read_metadata(&file).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["quoted"], "a \"b\"\n");
    }
}
