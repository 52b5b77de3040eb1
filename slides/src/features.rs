//! Files of features that cf-train, CLAM and TRIDENT read.

use std::path::{Path, PathBuf};

use crossfusion::{
    Error, Result,
    data::{
        atomic::{place_atomically, write_atomically},
        features::DType,
        torch::write_pt_numbers,
    },
    model::Scale,
};
use rust_hdf5::H5File;
use safetensors::{Dtype, tensor::TensorView};

/// How features are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// pt_files/SLIDE.pt, as torch.save writes it: features alone
    Pt,
    /// pt_files/SLIDE.safetensors: features and coords
    Safetensors,
    /// h5_files/SLIDE.h5, as CLAM and TRIDENT have it: features and coords
    H5,
}

/// Where a slide's features are, of a backbone's folder.
pub fn path(folder: &Path, scale: Scale, name: &str, format: Format) -> PathBuf {
    let (kind, extension) = match format {
        Format::Pt => ("pt_files", "pt"),
        Format::Safetensors => ("pt_files", "safetensors"),
        Format::H5 => ("h5_files", "h5"),
    };
    folder.join(scale.name()).join(kind).join(format!("{name}.{extension}"))
}

/// Writes the features `[patches, width]` of the patches at `corners`.
pub fn write(path: &Path, format: Format, corners: &[[i64; 2]], features: &[f32]) -> Result<()> {
    let shape = [corners.len(), features.len() / corners.len().max(1)];
    let failed = |e: &dyn std::fmt::Display| Error::file(path, format!("cannot be written: {e}"));
    let (numbers, coords) = (little_endian(features, f32::to_le_bytes), corners.as_flattened());
    match format {
        Format::Pt => write_pt_numbers(path, DType::F32, shape, |file| file.write_all(&numbers)),
        Format::Safetensors => {
            let coords = little_endian(coords, i64::to_le_bytes);
            let tensors =
                [(Dtype::F32, shape, "features", &numbers), (Dtype::I64, [corners.len(), 2], "coords", &coords)]
                    .map(|(dtype, shape, name, bytes)| Ok((name, TensorView::new(dtype, shape.to_vec(), bytes)?)));
            let tensors = tensors.into_iter().collect::<Result<Vec<_>, safetensors::SafeTensorError>>();
            let bytes = tensors.and_then(|tensors| safetensors::serialize(tensors, None)).map_err(|e| failed(&e))?;
            write_atomically(path, |file| std::io::Write::write_all(file, &bytes).map_err(|e| failed(&e)))
        }
        Format::H5 => {
            let write = |temporary: &Path| -> rust_hdf5::Result<()> {
                let file = H5File::create(temporary)?;
                file.new_dataset::<f32>().shape(shape).create("features")?.write_raw(features)?;
                file.new_dataset::<i64>().shape([corners.len(), 2]).create("coords")?.write_raw(coords)?;
                file.close()
            };
            place_atomically(path, |temporary| write(temporary).map_err(|e| failed(&e)))
        }
    }
}

fn little_endian<T: Copy, const N: usize>(numbers: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    numbers.iter().flat_map(|&x| bytes(x)).collect()
}
