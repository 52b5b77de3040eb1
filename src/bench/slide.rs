//! Slides of any size, for measuring: features are uniform on [-1, 1) in bf16, written as fast as
//! the disk takes them.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use half::bf16;

use super::parse_bags;
use crate::{
    Error, Result,
    data::{
        atomic::write_atomically,
        features::DType,
        patches::PatchReader,
        safetensors::{Entry, header},
        torch::write_pt_numbers,
    },
    model::{BagSizes, Scales},
};

/// The flags of `cf-bench slide`: how large a slide to write, in which format, and where.
#[derive(Args)]
pub struct SlideArguments {
    /// Patches at 5x, 10x and 20x
    #[arg(long, default_value = "800,3000,12000", value_parser = parse_bags)]
    bags: BagSizes,
    /// Width of the patch features
    #[arg(long, default_value_t = 2048, value_parser = super::parse_features)]
    features: usize,
    /// How the files are stored
    #[arg(long, value_enum, default_value_t = Format::Pt)]
    format: Format,
    /// Folder for x5, x10 and x20
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Format {
    Pt,
    Safetensors,
}

/// `cf-bench slide`.
pub fn slide(arguments: &SlideArguments) -> Result<()> {
    let out = &arguments.out;
    std::fs::create_dir_all(out).map_err(|e| Error::file(out, format!("cannot be made: {e}")))?;
    for reader in write(out, arguments.bags, arguments.features, arguments.format)?.values() {
        crate::say(format!("{}: {} patches of {} features", reader.path.display(), reader.patches, reader.features));
    }
    Ok(())
}

/// Writes a file a scale into a folder.
pub fn write(folder: &Path, sizes: BagSizes, features: usize, format: Format) -> Result<Scales<PatchReader>> {
    sizes.try_map(|name, patches| {
        let shape = [patches, features];
        let extension = if matches!(format, Format::Pt) { "pt" } else { "safetensors" };
        let path = folder.join(format!("{name}.{extension}"));
        match format {
            Format::Pt => write_pt_numbers(&path, DType::BF16, shape, |file| numbers(patches * features, file))?,
            Format::Safetensors => write_safetensors(&path, shape)?,
        }
        Ok(PatchReader { path, patches, features })
    })
}

/// One tensor `features`.
fn write_safetensors(path: &Path, [patches, features]: [usize; 2]) -> Result<()> {
    let header = header(&[], &[Entry { name: "features", dtype: DType::BF16, shape: &[patches, features] }]);
    write_atomically(path, |file| {
        file.write_all(&header)
            .and_then(|()| numbers(patches * features, file))
            .map_err(|e| Error::file(path, format!("cannot be written: {e}")))
    })
}

/// Uniform on [-1, 1), always the same: the high bits of a linear congruential generator.
fn numbers(count: usize, out: &mut dyn Write) -> io::Result<()> {
    let mut state = 1u64;
    let mut block = vec![bf16::ZERO; 1 << 16];
    let mut left = count;
    while left > 0 {
        let block = &mut block[..left.min(1 << 16)];
        for x in block.iter_mut() {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            *x = bf16::from_f32(i32::from((state >> 56) as u8 as i8) as f32 / 128.0); // exact in bf16
        }
        out.write_all(bytemuck::cast_slice(block))?;
        left -= block.len();
    }
    Ok(())
}
