//! Reads patch features from a format of its own, part by part, so that a slide larger than memory
//! trains within a budget. The format here is raw f32, row by row; yours may be a database or a
//! network.
//!
//!     cargo run --release --example custom_reader

use std::{
    fs::File,
    io::Write,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crossfusion::{
    Error, Result,
    device::Device,
    loss::{Loss, Target},
    model::{BagSizes, Bags, Config, Features, ReadPatches},
    train::step::{Engine, Memory},
};

const FEATURES: usize = 64;

/// A file of `patches` rows of [`FEATURES`] f32.
struct RawFile {
    path: PathBuf,
    patches: usize,
}

impl ReadPatches<f32> for RawFile {
    fn patches(&self) -> usize {
        self.patches
    }

    /// Called from any thread, twice for each part in a training step.
    fn read(&self, patches: Range<usize>, out: &mut [f32]) -> Result<()> {
        let failed = |e: std::io::Error| Error::file(&self.path, format!("cannot be read: {e}"));
        let start = (patches.start * FEATURES * size_of::<f32>()) as u64;
        let file = File::open(&self.path).map_err(failed)?;
        file.read_exact_at(bytemuck::cast_slice_mut(out), start).map_err(failed)
    }
}

fn main() -> Result<()> {
    let folder = tempfile::tempdir().map_err(|e| Error::Device(e.to_string()))?;
    let (x5, x20) = (write(folder.path(), "x5", 2_000)?, write(folder.path(), "x20", 40_000)?);
    let x10 = vec![0.25f32; 100 * FEATURES]; // these tokens attend to each other, and are held

    let config = Config { dim: 32, heads: 4, ..Config::new(FEATURES) };
    let mut engine = Engine::<f32>::new(Device::from_name("cpu", 0)?, &config, 7)?;
    engine.set_memory(Memory::Budget(6 << 20));
    let plan = engine.plan(BagSizes::from([x5.patches, 100, x20.patches]), true)?;
    println!("{}: {} bytes at most", plan.policy, plan.peak_bytes());

    let bags = Bags::of([Features::Reader(&x5), Features::Memory(&x10), Features::Reader(&x20)], FEATURES)?;
    let target = Target { label: 1, censored: false };
    let logits = engine.accumulate(bags, None, None, |logits| Loss::NllSurv.evaluate(logits, target, 0.2).1)?;
    println!("logits {logits:.4?}");
    assert!(plan.policy.stream.is_some(), "20x does not fit 6 MiB whole");
    Ok(())
}

fn write(folder: &Path, name: &str, patches: usize) -> Result<RawFile> {
    let path = folder.join(name);
    let failed = |e: std::io::Error| Error::file(&path, format!("cannot be written: {e}"));
    let values: Vec<f32> = (0..patches * FEATURES).map(|j| (j as f32 * 0.01).sin()).collect();
    File::create(&path).and_then(|mut file| file.write_all(bytemuck::cast_slice(&values))).map_err(failed)?;
    Ok(RawFile { path, patches })
}
