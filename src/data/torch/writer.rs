//! A writer of what `torch.save` writes.

use std::io::Write;
use std::path::Path;

use ndarray::ArrayView2;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::data::{atomic::write_atomically, tensor::DType};
use crate::{Error, Result};

/// Writes a bag as `torch.save(tensor, path)` does, so that `torch.load(path)` and the
/// memory-mapped reader here both take it.
pub fn write_pt(path: &Path, features: ArrayView2<f32>) -> Result<()> {
    let shape = [features.nrows(), features.ncols()];
    write_pt_numbers(path, DType::F32, shape, |file| {
        features.rows().into_iter().try_for_each(|row| file.write_all(bytemuck::cast_slice(&row.to_vec())))
    })
}

/// The same for a bag that `numbers` writes, little-endian, `shape` = patches, features. They are
/// stored 64-byte aligned.
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

/// `_rebuild_tensor_v2(("storage", FloatStorage, "0", "cpu", rows * columns), 0, (rows, columns),
/// (columns, 1), False, OrderedDict())` in pickle protocol 2.
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
