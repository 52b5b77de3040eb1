//! Reads a bag's patches from its file in parts, without ever holding more of the file than a part.

use std::{ops::Range, path::PathBuf};

use super::features::FeatureFile;
use crate::{Error, Result, device::Element, model::ReadPatches};

/// Bytes of f32 that are read through one mapping of the file: its pages count as the process's
/// memory until it is unmapped.
const MAPPED: usize = 32 << 20;

/// A feature file that was looked at before: when it is read, it must still hold as much.
#[derive(Clone, Debug)]
pub struct PatchReader {
    /// The feature file, opened anew for every part.
    pub path: PathBuf,
    /// Patches that it held when it was looked at.
    pub patches: usize,
    /// Width of the patch features then.
    pub features: usize,
}

impl PatchReader {
    fn open(&self) -> Result<FeatureFile> {
        let file = FeatureFile::open(&self.path)?;
        if (file.patches(), file.features()) == (self.patches, self.features) {
            return Ok(file);
        }
        let message = format!(
            "has changed: it holds {} patches of {} features, and held {} of {}",
            file.patches(),
            file.features(),
            self.patches,
            self.features
        );
        Err(Error::file(&self.path, message))
    }
}

impl<T: Element<Sum = f32>> ReadPatches<T> for PatchReader {
    fn patches(&self) -> usize {
        self.patches
    }

    fn read(&self, patches: Range<usize>, out: &mut [T]) -> Result<()> {
        let file = self.open()?;
        if !file.is_mapped() {
            return file.read_rows(patches, out);
        }
        drop(file);
        let each = (MAPPED / size_of::<f32>() / self.features).max(1);
        for (i, out) in out.chunks_mut(each * self.features).enumerate() {
            let start = patches.start + i * each;
            self.open()?.read_rows(start..start + out.len() / self.features, out)?;
        }
        Ok(())
    }
}
