//! What a run trains and validates on: slides with outcomes, labels, feature files and folds, all checked before work starts.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use super::{
    cohort::{Cohort, MAGNIFICATIONS, Missing, Slide, find_features},
    features::FeatureFile,
    folds,
    labels::Bins,
    patches::PatchReader,
};
use crate::{
    Error, Result,
    device::Element,
    loss::Target,
    model::{Bags, ReadPatches},
    train::step::{BagSizes, Engine},
};

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
    /// x5, x10, x20.
    readers: Vec<[PatchReader; 3]>,
}

/// One fold's slides, as indices into the dataset.
#[derive(Clone, Debug, PartialEq)]
pub struct Fold {
    pub train: Vec<usize>,
    pub val: Vec<usize>,
    /// Cases that the fold names but whose outcome is not known.
    pub without_outcome: usize,
}

/// A slide's features: x10 in memory, x5 and x20 too or still in their files.
pub struct Bag<T> {
    x5: Features<T>,
    x10: Vec<T>,
    x20: Features<T>,
    features: usize,
}

enum Features<T> {
    Memory(Vec<T>),
    File(PatchReader),
}

impl<T: Element<Sum = f32>> Bag<T> {
    /// Reads x5, x10 and x20, rounded to `T`; `streamed` leaves x5 and x20 in their files.
    pub fn read(readers: &[PatchReader; 3], streamed: bool) -> Result<Self> {
        let whole = |reader: &PatchReader| {
            let mut values = vec![T::default(); reader.patches * reader.features];
            reader.read(0..reader.patches, &mut values)?;
            Ok::<_, Error>(values)
        };
        let context = |reader: &PatchReader| {
            Ok::<_, Error>(if streamed { Features::File(reader.clone()) } else { Features::Memory(whole(reader)?) })
        };
        let [x5, x10, x20] = readers;
        Ok(Self { x5: context(x5)?, x10: whole(x10)?, x20: context(x20)?, features: x10.features })
    }

    pub fn views(&self) -> Result<Bags<'_, T>> {
        match (&self.x5, &self.x20) {
            (Features::File(x5), Features::File(x20)) => Bags::streamed(x5, &self.x10, x20, self.features),
            (Features::Memory(x5), Features::Memory(x20)) => Bags::new([x5, &self.x10, x20], self.features),
            _ => Err(Error::Usage("a slide is held whole, or its x5 and x20 both stay in their files".into())),
        }
    }
}

impl Dataset {
    /// Reads the tables and the headers of all feature files.
    pub fn open(source: &Source) -> Result<Self> {
        let cohort = Cohort::read(source.clinical, source.manifest)?;
        let (found, missing) = find_features(cohort.slides.clone(), source.pt_dir, source.backbone)?;
        let mut dataset =
            Self { slides: Vec::new(), sizes: Vec::new(), features: 0, cohort, missing, readers: Vec::new() };
        for (slide, files) in found {
            let mut reader = |path: PathBuf| {
                let file = FeatureFile::open(&path)?;
                dataset.check_width(&path, file.features())?;
                Ok::<_, Error>(PatchReader { path, patches: file.patches(), features: file.features() })
            };
            let [x5, x10, x20] = files;
            let readers = [reader(x5)?, reader(x10)?, reader(x20)?];
            let [x5, x10, x20] = readers.each_ref().map(|reader| reader.patches);
            dataset.sizes.push(BagSizes { x5, x10, x20 });
            dataset.slides.push(slide);
            dataset.readers.push(readers);
        }
        Ok(dataset)
    }

    pub fn without_outcomes(_: &Path, _: &str, _: Option<&Path>) -> Result<(Self, Vec<super::cohort::LeftOut>)> {
        Err(Error::Usage("interim".into()))
    }

    /// The feature files of all slides, each slide's x5, x10 and x20.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.readers.iter().flatten().map(|reader| reader.path.as_path())
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

    /// Reads slides in order; `work` gets each in turn and ends the reading by returning false or an error.
    pub fn for_each<T: Element<Sum = f32>>(
        &self,
        order: &[usize],
        reading: &Reading,
        mut work: impl FnMut(usize, Bag<T>) -> Result<bool>,
    ) -> Result<()> {
        let read = |slide: usize| Bag::read(&self.readers[slide], reading.streamed.contains(&slide));
        if reading.ahead == 0 {
            for &slide in order {
                if !work(slide, read(slide)?)? {
                    break;
                }
            }
            return Ok(());
        }
        std::thread::scope(|scope| {
            let (sender, receiver) = std::sync::mpsc::sync_channel(reading.ahead.min(order.len()));
            scope.spawn(move || {
                for &slide in order {
                    // a closed channel means that nobody wants more
                    if sender.send((slide, read(slide))).is_err() {
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

/// How slides are read.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// Slides that a thread of its own reads ahead of the one in use; 0 reads each when it is wanted.
    pub ahead: usize,
    /// Slides whose x5 and x20 stay in their files.
    pub streamed: HashSet<usize>,
}

impl Reading {
    /// As an engine's plans for these slides want it. Where bags lie in the memory that a budget is for, none is read ahead.
    pub fn plan<T: Element<Sum = f32>>(
        engine: &mut Engine<T>,
        dataset: &Dataset,
        slides: &[(usize, bool)],
        ahead: usize,
    ) -> Result<Self> {
        let mut reading = Self { ahead, streamed: HashSet::new() };
        for &(slide, training) in slides {
            let Ok(plan) = engine.plan(dataset.sizes[slide], training) else {
                return Err(refusal(engine, dataset, slides));
            };
            if plan.policy.stream.is_some() {
                reading.streamed.insert(slide);
            }
        }
        if engine.has_budget() && engine.device.is_host() {
            reading.ahead = 0;
        }
        Ok(reading)
    }
}

/// Names the slide that needs the largest budget, which then is enough for all.
fn refusal<T: Element<Sum = f32>>(engine: &mut Engine<T>, dataset: &Dataset, slides: &[(usize, bool)]) -> Error {
    let least = |&&(slide, training): &&(usize, bool)| engine.least_budget(dataset.sizes[slide], training).unwrap_or(0);
    let Some(&(slide, training)) = slides.iter().max_by_key(least) else { return Error::Usage("no slides".into()) };
    let e = engine.plan(dataset.sizes[slide], training).err().map_or(String::new(), |e| e.to_string());
    Error::Usage(format!("--memory-budget: slide {}: {e}", dataset.slides[slide].slide_id))
}
