//! What a run trains and validates on: slides with outcomes, labels, feature files and folds, all
//! checked before work starts.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    ops::Range,
    path::{Path, PathBuf},
};

use super::{
    clinical::Columns,
    cohort::{Cohort, LeftOut, Slide},
    features::FeatureFile,
    folds,
    labels::Bins,
    layout::{Missing, find_features, slides_with_features},
    patches::PatchReader,
    table::{Sheet, is_missing},
};
use crate::{
    Error, Result,
    device::Element,
    loss::Target,
    model::{BagSizes, Bags, Features, ReadPatches, Scale, Scales},
};

/// Where a cohort lies on disk.
#[derive(Clone, Debug)]
pub struct Source<'a> {
    /// The clinical table: text, or a zip of one.
    pub clinical: &'a Path,
    /// Which of its columns hold what.
    pub columns: &'a Columns,
    /// A GDC manifest; slides that it does not list are left out.
    pub manifest: Option<&'a Path>,
    /// Folder of the features, in one of the layouts of [`super::layout`].
    pub pt_dir: &'a Path,
    /// Name of the feature extractor, as folders of features carry it.
    pub backbone: &'a str,
    /// What the model reads.
    pub scales: &'a [Scale],
    /// Ids of slides to leave out.
    pub skip: &'a [String],
}

/// A cohort whose tables and headers of feature files have been read, and fit together.
pub struct Dataset {
    /// Slides that have features at all scales that are read.
    pub slides: Vec<Slide>,
    /// Patches of each slide at the scales that are read, in the order of `slides`.
    pub sizes: Vec<BagSizes>,
    /// Width of the patch features.
    pub features: usize,
    /// What the tables say, also of slides that have no features.
    pub cohort: Cohort,
    /// Slides without features.
    pub missing: Missing,
    readers: Vec<Scales<PatchReader>>,
}

/// One fold's slides, as indices into the dataset.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fold {
    /// Those that the weights are fitted to.
    pub train: Vec<usize>,
    /// Those that the epoch is chosen by.
    pub val: Vec<usize>,
    /// Empty where the fold has no such side.
    pub test: Vec<usize>,
    /// Cases that the fold names but whose outcome is not known.
    pub without_outcome: Vec<String>,
    /// Sentences that a reader of the fold's results should know.
    pub notes: Vec<String>,
}

impl Fold {
    /// The slides that the fold's result is of: the test slides where it has some, else the
    /// validation slides.
    pub fn reported(&self) -> &[usize] {
        if self.test.is_empty() { &self.val } else { &self.test }
    }
}

/// A slide's features, in memory or still in their files.
pub struct SlideFeatures<T> {
    bags: Scales<Stored<T>>,
    /// Width.
    features: usize,
}

enum Stored<T> {
    Memory(Vec<T>),
    File(PatchReader),
}

impl<T: Element<Sum = f32>> Stored<T> {
    fn features(&self) -> Features<'_, T> {
        match self {
            Self::Memory(values) => Features::Memory(values),
            Self::File(reader) => Features::Reader(reader),
        }
    }
}

impl<T: Element<Sum = f32>> SlideFeatures<T> {
    /// Reads the bags, rounded to `T`, but for those of the scales that are `streamed`, which stay
    /// in their files.
    pub fn read(readers: &Scales<PatchReader>, streamed: &[Scale]) -> Result<Self> {
        let features = readers.values().next().map_or(0, |reader| reader.features);
        let bags = readers.as_ref().try_map(|scale, reader| {
            if streamed.contains(&scale) {
                return Ok(Stored::File(reader.clone()));
            }
            let mut values = vec![T::default(); reader.patches * reader.features];
            reader.read(0..reader.patches, &mut values)?;
            Ok::<_, Error>(Stored::Memory(values))
        })?;
        Ok(Self { bags, features })
    }

    /// The bags as a model takes them: borrowed from memory, or to be read from their files.
    pub fn bags(&self) -> Result<Bags<'_, T>> {
        Bags::of(self.bags.as_ref().map(|_, bag| bag.features()), self.features)
    }
}

impl Dataset {
    /// Reads the tables and the headers of all feature files.
    pub fn open(source: &Source) -> Result<Self> {
        let cohort = Cohort::read(source.clinical, source.columns, source.manifest)?;
        Self::of_cohort(cohort, source.pt_dir, source.backbone, source.scales, source.skip)
    }

    /// Finds the slides' features and reads their headers, but for the slides of `skip`.
    fn of_cohort(mut cohort: Cohort, pt_dir: &Path, backbone: &str, scales: &[Scale], skip: &[String]) -> Result<Self> {
        cohort.leave_out(skip)?;
        let (found, missing) = find_features(cohort.slides.clone(), &cohort.rows, pt_dir, backbone, scales)?;
        let mut dataset =
            Self { slides: Vec::new(), sizes: Vec::new(), features: 0, cohort, missing, readers: Vec::new() };
        for (slide, files) in found {
            let reader = |_, path: PathBuf| {
                let file = FeatureFile::open(&path)?;
                dataset.check_width(&path, file.features())?;
                Ok::<_, Error>(PatchReader { path, patches: file.patches(), features: file.features() })
            };
            let readers = files.try_map(reader)?;
            dataset.sizes.push(readers.as_ref().map(|_, reader| reader.patches));
            dataset.slides.push(slide);
            dataset.readers.push(readers);
        }
        Ok(dataset)
    }

    /// Slides whose outcome is not known. Nothing is to be made of their `months` and `censored`.
    /// Says which were left out.
    pub fn without_outcomes(
        pt_dir: &Path,
        backbone: &str,
        scales: &[Scale],
        which: Which<'_>,
    ) -> Result<(Self, Vec<LeftOut>)> {
        let names: Vec<String> = match which {
            Which::Table(path) => {
                let sheet = Sheet::open(path)?;
                let place = sheet.find("slide_id")?.ok_or_else(|| sheet.lacks("slide_id"))?;
                let table = sheet.table(&[place])?;
                let id = |(row, cells): (usize, &[String])| match is_missing(&cells[0]) {
                    true => Err(table.error(row, 0, "the cell is empty, expected an identifier")),
                    false => Ok(cells[0].clone()),
                };
                table.rows().map(id).collect::<Result<_>>()?
            }
            Which::Named(names) => names.to_vec(),
            Which::All => slides_with_features(pt_dir, backbone, scales)?,
        };
        if let (Which::Table(path), true) = (which, names.is_empty()) {
            return Err(Error::file(path, "has no row, expected a slide in each"));
        }
        let mut seen = HashSet::new();
        let mut slides = Vec::new();
        for slide_id in names {
            if seen.insert(slide_id.clone()) {
                slides.push(Slide { case_id: slide_id.clone(), slide_id, months: 0.0, censored: true });
            }
        }
        let dataset = Self::of_cohort(Cohort::of_slides(slides), pt_dir, backbone, scales, &[])?;
        // nothing is known of their cases
        let left_out = dataset.missing.slides.iter().cloned();
        let left_out = left_out.map(|slide| LeftOut { case_id: String::new(), ..slide }).collect();
        Ok((dataset, left_out))
    }

    /// The feature files of all slides.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.readers.iter().flat_map(Scales::values).map(|reader| reader.path.as_path())
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

    /// Sentences about the cohort that a user should know before training: columns, outcomes, and
    /// what was left out.
    pub fn notes(&self) -> Vec<String> {
        let Missing { slides, by_scale, first } = &self.missing;
        let counts: Vec<_> = by_scale.iter().map(|(scale, n)| format!("{n} at {scale}")).collect();
        let without_features = slides.first().map(|slide| {
            format!(
                "{} of {} slides left out, without features ({}); the first is `{}`, looked for as {}",
                slides.len(),
                self.cohort.rows.len(),
                counts.join(", "),
                slide.slide_id,
                first.display()
            )
        });
        self.cohort.notes.iter().cloned().chain(without_features).collect()
    }

    /// Every slide of the study that cannot be used, with the reason.
    pub fn unusable(&self) -> Vec<LeftOut> {
        [&self.cohort.unlisted[..], &self.cohort.skipped, &self.missing.slides].concat()
    }

    /// Every slide of the study that a run of these folds does not use, with the reason.
    pub fn left_out<'a>(&self, folds: impl Iterator<Item = &'a Fold>) -> Vec<LeftOut> {
        let mut left_out = self.unusable();
        let (mut used, mut without_outcome) = (HashSet::new(), BTreeSet::new());
        for fold in folds {
            [&fold.train, &fold.val, &fold.test].into_iter().flatten().for_each(|&slide| _ = used.insert(slide));
            without_outcome.extend(&fold.without_outcome);
        }
        let unused = (0..self.slides.len()).filter(|slide| !used.contains(slide)).map(|slide| &self.slides[slide]);
        left_out.extend(unused.map(|slide| LeftOut {
            slide_id: slide.slide_id.clone(),
            case_id: slide.case_id.clone(),
            reason: "in no fold".into(),
        }));
        left_out.extend(without_outcome.into_iter().map(|case| LeftOut {
            slide_id: String::new(),
            case_id: case.clone(),
            reason: "named in the folds, but without an outcome in the clinical table".into(),
        }));
        left_out
    }

    /// The folds of these numbers. An error if some have test slides and others not, whose results
    /// would be of different kinds.
    pub fn folds(&self, splits: &Path, numbers: Range<usize>) -> Result<Vec<(usize, Fold)>> {
        let folds = numbers.map(|i| Ok((i, self.fold(splits, i)?))).collect::<Result<Vec<_>>>()?;
        let with = |tested: bool| folds.iter().find(|(_, fold)| fold.test.is_empty() != tested);
        if let (Some((with, _)), Some((without, _))) = (with(true), with(false)) {
            let message =
                format!("has test slides in fold {with} and none in fold {without}, expected all folds alike");
            return Err(Error::file(splits, message));
        }
        Ok(folds)
    }

    /// The slides of fold `i`; training and validation have at least one.
    pub fn fold(&self, splits: &Path, i: usize) -> Result<Fold> {
        let path: PathBuf = folds::split_path(splits, i);
        let split = folds::read_split(&path, &self.cohort)?;
        let side = |(name, slides): (&str, &HashSet<String>)| {
            let found = folds::slides_of(slides, &self.slides);
            if found.is_empty() && !slides.is_empty() {
                let message = format!("names {} slides in `{name}`, but none of them has features", slides.len());
                return Err(Error::file(&path, message));
            }
            Ok(found)
        };
        let [train, val, test] = [("train", &split.train), ("val", &split.val), ("test", &split.test)].map(side);
        let mut fold =
            Fold { train: train?, val: val?, test: test?, without_outcome: split.without_outcome, notes: vec![] };
        fold.notes.extend(self.leak(i, &fold));
        Ok(fold)
    }

    /// Whether a patient is on two sides of a fold, under two case ids.
    fn leak(&self, i: usize, fold: &Fold) -> Option<String> {
        let mut first: HashMap<&str, (&str, &str)> = HashMap::new();
        let (mut pair, mut patients) = (None, BTreeSet::new());
        for (name, side) in folds::SIDES.into_iter().zip([&fold.train, &fold.val, &fold.test]) {
            for slide in side.iter().map(|&slide| &self.slides[slide]) {
                let this = (slide.case_id.as_str(), name);
                let before = *first.entry(slide.patient()).or_insert(this);
                if before.1 != name {
                    pair = pair.or(Some((before, this)));
                    patients.insert(slide.patient());
                }
            }
        }
        let ((a, side_a), (b, side_b)) = pair?;
        let (n, are) = (patients.len(), if patients.len() == 1 { "patient is" } else { "patients are" });
        Some(format!(
            "Fold {i} leaks: {n} {are} on two of its sides under several case ids, such as `{a}` in {side_a} and `{b}` in {side_b}; \
             its result is optimistic"
        ))
    }

    /// What the loss is told of a slide, by its index: its bin, and whether it is censored.
    pub fn target(&self, bins: &Bins, slide: usize) -> Target {
        let slide = &self.slides[slide];
        Target { label: bins.label(slide.months), censored: slide.censored }
    }

    /// Reads slides in order; `work` gets each in turn and ends the reading by returning false or
    /// an error.
    pub fn for_each<T: Element<Sum = f32>>(
        &self,
        order: &[usize],
        reading: &Reading,
        mut work: impl FnMut(usize, SlideFeatures<T>) -> Result<bool>,
    ) -> Result<()> {
        let read = |slide: usize| {
            let streamed = if reading.streamed.contains(&slide) { reading.scales } else { &[] };
            SlideFeatures::read(&self.readers[slide], streamed)
        };
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

/// Which slides, of those whose outcome is not known.
#[derive(Clone, Copy, Debug)]
pub enum Which<'a> {
    /// Those that have features.
    All,
    /// Those of a table's column `slide_id`.
    Table(&'a Path),
    /// Those of these ids.
    Named(&'a [String]),
}

/// How slides are read.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// Slides that a thread of its own reads ahead of the one in use; 0 reads each when it is
    /// wanted.
    pub ahead: usize,
    /// Slides some of whose bags stay in their files: those of `scales`.
    pub streamed: HashSet<usize>,
    /// Those at which the bags of `streamed` stay in their files.
    pub scales: &'static [Scale],
}
