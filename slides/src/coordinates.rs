//! Files of patch coordinates, as CLAM's `create_patches_fp.py` writes them: a dataset `coords`
//! `[patches, 2]` of int64, x and y of the upper left corner at level 0, with attributes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crossfusion::{Error, Result, data::atomic::place_atomically};
use rust_hdf5::{H5File, H5Type, VarLenUnicode};

use crate::slide::{Level, Slide};

/// The largest patch that is read, in pixels a side.
const MOST: usize = 1 << 14;

/// The patches of a slide at one magnification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Coordinates {
    /// Upper left corners, in pixels of level 0.
    pub corners: Vec<[i64; 2]>,
    /// The level that patches are read from.
    pub level: usize,
    /// Side of a patch, in pixels of that level.
    pub size: usize,
    /// Width and height of that level of the slide, where a file was read that says.
    pub slide: Option<[u64; 2]>,
}

impl Coordinates {
    /// Writes the patches of level 0 of a slide, with CLAM's attributes.
    pub fn write(&self, path: &Path, slide: &str, level: Level) -> Result<()> {
        let folder = path.parent().unwrap_or(Path::new("")).to_string_lossy().into_owned();
        let size = [level.width as i64, level.height as i64];
        let write = |temporary: &Path| -> rust_hdf5::Result<()> {
            let file = H5File::create(temporary)?;
            let dataset = file.new_dataset::<i64>().shape([self.corners.len(), 2]).create("coords")?;
            dataset.write_raw(self.corners.as_flattened())?;
            let number = |name: &str, value: usize| {
                dataset.new_attr::<i64>().shape(()).create(name)?.write_numeric(&(value as i64))
            };
            number("patch_size", self.size)?;
            number("patch_level", self.level)?;
            pair(&dataset, "downsample", [level.downsample; 2])?;
            pair(&dataset, "downsampled_level_dim", size)?;
            pair(&dataset, "level_dim", size)?;
            for (name, text) in [("name", slide), ("save_path", &folder)] {
                dataset.new_attr::<VarLenUnicode>().shape(()).create(name)?.write_string(text)?;
            }
            file.close()
        };
        place_atomically(path, |temporary| {
            write(temporary).map_err(|e| Error::file(path, format!("cannot be written: {e}")))
        })
    }

    /// Refuses a slide that these cannot be the patches of.
    pub fn check(&self, slide: &Slide) -> Result<()> {
        let level = slide.levels().get(self.level).map(|level| [level.width, level.height]);
        match (self.slide, level) {
            (_, None) => {
                let message = format!("has no level {}, which its patches are of", self.level);
                Err(Error::file(slide.path(), message))
            }
            (Some([w, h]), Some([width, height])) if [w, h] != [width, height] => {
                let message = format!("has {width} x {height} pixels, but its patches are of a slide of {w} x {h}");
                Err(Error::file(slide.path(), message))
            }
            _ => Ok(()),
        }
    }

    /// Reads what [`Self::write`] or CLAM wrote.
    pub fn read(path: &Path) -> Result<Self> {
        std::fs::File::open(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
        let read = || -> Result<Self, String> {
            let text = |e: rust_hdf5::Hdf5Error| format!("is no .h5 file of coordinates: {e}");
            let file = H5File::options().no_locking().open(path).map_err(text)?;
            let dataset = file.dataset("coords").map_err(text)?;
            let [_, 2] = dataset.shape()[..] else {
                return Err(format!("holds `coords` of shape {:?}, expected [patches, 2]", dataset.shape()));
            };
            let numbers = dataset.read_numeric_as::<i64>().map_err(text)?;
            let attribute = |name: &str| {
                let value =
                    dataset.attr(name).and_then(|attribute| attribute.read_numeric_as::<i64>()).map_err(text)?;
                let value = value.first().and_then(|&value| usize::try_from(value).ok());
                value.ok_or_else(|| format!("holds no number as the attribute `{name}` of `coords`"))
            };
            let (level, size) = (attribute("patch_level")?, attribute("patch_size")?);
            if !(1..=MOST).contains(&size) {
                return Err(format!("holds patches of {size} pixels, expected 1 to {MOST}"));
            }
            let slide = dataset.attr("level_dim").and_then(|attribute| attribute.read_numeric_as::<i64>());
            let slide = slide.ok().and_then(|sides| match sides[..] {
                [w, h] => Some([u64::try_from(w).ok()?, u64::try_from(h).ok()?]),
                _ => None,
            });
            Ok(Self { corners: numbers.as_chunks().0.to_vec(), level, size, slide })
        };
        // a panic of the reader on a damaged file becomes an error, as any other damage is
        catch_unwind(AssertUnwindSafe(read))
            .unwrap_or_else(|_| Err("is a damaged .h5 file".into()))
            .map_err(|message| Error::file(path, message))
    }
}

fn pair<T: H5Type>(dataset: &rust_hdf5::H5Dataset, name: &str, values: [T; 2]) -> rust_hdf5::Result<()> {
    dataset.new_attr::<T>().shape([2]).create(name)?.write_array(&values)
}
