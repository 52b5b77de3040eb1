//! What a run trains and validates on: slides with outcomes, labels, feature files and folds, all checked before work starts.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use ndarray::Array2;

use super::{
    cohort::{BagFiles, Cohort, MAGNIFICATIONS, Missing, Slide, find_features},
    features::FeatureFile,
    folds,
    labels::Bins,
};
use crate::{Error, Result, device::Element, loss::Target, model::Bags, train::step::BagSizes};

/// Where a cohort lies on disk.
#[derive(Clone, Debug)]
pub struct Source<'a> {
    pub clinical: &'a Path,
    pub manifest: Option<&'a Path>,
    pub pt_dir: &'a Path,
    pub backbone: &'a str,
}

pub struct Dataset {
    /// Slides that have features at all three magnifications.
    pub slides: Vec<Slide>,
    pub sizes: Vec<BagSizes>,
    /// Width of the patch features.
    pub features: usize,
    pub cohort: Cohort,
    /// What was left out.
    pub missing: Missing,
    files: Vec<BagFiles>,
}

/// One fold's slides, as indices into the dataset.
#[derive(Clone, Debug, PartialEq)]
pub struct Fold {
    pub train: Vec<usize>,
    pub val: Vec<usize>,
    /// Cases that the fold names but whose outcome is not known.
    pub without_outcome: usize,
}

/// A slide's features, in memory.
pub struct Bag<T> {
    pub x5: Array2<T>,
    pub x10: Array2<T>,
    pub x20: Array2<T>,
}

impl<T: Element> Bag<T> {
    pub fn views(&self) -> Result<Bags<'_, T>> {
        let slices = [&self.x5, &self.x10, &self.x20].map(|x| x.as_slice().unwrap_or_default());
        Bags::new(slices, self.x10.ncols())
    }
}

impl Dataset {
    /// Reads the tables and the headers of all feature files.
    pub fn open(source: &Source) -> Result<Self> {
        let cohort = Cohort::read(source.clinical, source.manifest)?;
        let (found, missing) = find_features(cohort.slides.clone(), source.pt_dir, source.backbone)?;
        let mut dataset =
            Self { slides: Vec::new(), sizes: Vec::new(), features: 0, cohort, missing, files: Vec::new() };
        for (slide, files) in found {
            let mut patches = [0; 3];
            for (path, patches) in files.iter().zip(&mut patches) {
                let file = FeatureFile::open(path)?;
                *patches = file.patches();
                dataset.check_width(path, file.features())?;
            }
            let [x5, x10, x20] = patches;
            dataset.sizes.push(BagSizes { x5, x10, x20 });
            dataset.slides.push(slide);
            dataset.files.push(files);
        }
        Ok(dataset)
    }

    fn check_width(&mut self, path: &Path, features: usize) -> Result<()> {
        if self.features == 0 {
            self.features = features;
        }
        if self.features != features {
            let message = format!("has features of width {features}, expected {} as in the other files", self.features);
            return Err(Error::file(path, message));
        }
        Ok(())
    }

    /// A sentence about what was left out, if anything was.
    pub fn left_out(&self) -> Option<String> {
        let missing = &self.missing;
        (missing.slides > 0).then(|| {
            let counts: Vec<_> =
                MAGNIFICATIONS.iter().zip(missing.by_magnification).map(|(x, n)| format!("{n} at {x}")).collect();
            format!(
                "{} of {} slides left out, without features ({})",
                missing.slides,
                self.slides.len() + missing.slides,
                counts.join(", ")
            )
        })
    }

    /// The slides of fold `i`; each side has at least one.
    pub fn fold(&self, splits: &Path, i: usize) -> Result<Fold> {
        let path: PathBuf = folds::split_path(splits, i);
        let split = folds::read_split(&path, &self.cohort)?;
        let side = |name: &str, cases: &HashSet<String>| {
            let slides = folds::slides_of(cases, &self.slides);
            if slides.is_empty() {
                return Err(Error::file(
                    &path,
                    format!("has {} cases in `{name}`, but no slide of them has features", cases.len()),
                ));
            }
            Ok(slides)
        };
        Ok(Fold {
            train: side("train", &split.train)?,
            val: side("val", &split.val)?,
            without_outcome: split.without_outcome,
        })
    }

    pub fn target(&self, bins: &Bins, slide: usize) -> Target {
        let slide = &self.slides[slide];
        Target { label: bins.label(slide.months), censored: slide.censored }
    }

    /// Reads a slide's features, rounded to `T`.
    pub fn read<T: Element<Sum = f32>>(&self, slide: usize) -> Result<Bag<T>> {
        let [x5, x10, x20] = &self.files[slide];
        let sizes = self.sizes[slide];
        let read = |path: &PathBuf, patches: usize| {
            let file = FeatureFile::open(path)?;
            if (file.patches(), file.features()) != (patches, self.features) {
                let message = format!(
                    "has changed: it holds {} patches of {} features, and held {patches} of {}",
                    file.patches(),
                    file.features(),
                    self.features
                );
                return Err(Error::file(path, message));
            }
            Ok(file.read()?.mapv(T::from_sum))
        };
        Ok(Bag { x5: read(x5, sizes.x5)?, x10: read(x10, sizes.x10)?, x20: read(x20, sizes.x20)? })
    }

    /// Reads slides in order on a thread of its own, up to `ahead` of the one in use; `work` gets each in turn and ends the reading by
    /// returning false or an error.
    pub fn for_each<T: Element<Sum = f32>>(
        &self,
        order: &[usize],
        ahead: usize,
        mut work: impl FnMut(usize, Bag<T>) -> Result<bool>,
    ) -> Result<()> {
        std::thread::scope(|scope| {
            let (sender, receiver) = std::sync::mpsc::sync_channel(ahead.min(order.len()));
            scope.spawn(move || {
                for &slide in order {
                    // a closed channel means that nobody wants more
                    if sender.send((slide, self.read(slide))).is_err() {
                        break;
                    }
                }
            });
            for (slide, bag) in receiver {
                if !work(slide, bag?)? {
                    break;
                }
            }
            Ok(())
        })
    }
}
