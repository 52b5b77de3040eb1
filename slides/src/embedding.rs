//! `cf-slide embed`: features of the patches that `cf-slide patch` found. Slides are read on all
//! cores, the network runs on what has been read, and a slide that is complete is written
//! meanwhile.
//!
//! ```text
//! OUT/BACKBONE/backbone.toml            recipe, and digests of network and patches
//! OUT/BACKBONE/slides.csv               a row a slide: status, reason
//! OUT/BACKBONE/x20/pt_files/SLIDE.pt    features, and so at x5 and x10
//! ```

use std::{
    collections::BTreeMap,
    path::Path,
    sync::mpsc::{SyncSender, sync_channel},
};

use crossfusion::{
    Error, Result,
    data::{
        atomic,
        digest::{self, sha256},
        features::FeatureFile,
    },
    model::Scale,
};
use serde::Serialize;

use crate::{
    backbone::{Backbone, weights_path},
    coordinates::Coordinates,
    features::{self, Format},
    patching::{self, Row, Status, TABLE, coordinates_path},
    progress::Progress,
    reading::{self, Event, Job, Recipe},
};

const SETTINGS: &str = "backbone.toml";

/// What is embedded, and where to.
pub struct Request<'a> {
    /// Folder of `cf-slide patch`.
    pub patches: &'a Path,
    /// Folder that the slides have moved to; None where they are as the table says.
    pub slides: Option<&'a Path>,
    /// The backbone's folder, `OUT/BACKBONE`.
    pub out: &'a Path,
    /// Of the files of features.
    pub format: Format,
    /// Patches that the network takes at once.
    pub batch: usize,
    /// Threads that read.
    pub threads: usize,
}

/// What was done.
pub struct Summary {
    /// Slides that were embedded now.
    pub embedded: usize,
    /// Slides whose features were there.
    pub skipped: usize,
    /// Slides of the table that have no patches.
    pub without_patches: usize,
    /// Slides that failed, and why.
    pub failed: BTreeMap<String, String>,
    /// Patches of the slides that were embedded now.
    pub patches: u64,
}

/// A row of the table of slides.
#[derive(Serialize)]
struct Outcome<'a> {
    slide_id: &'a str,
    status: &'a str,
    reason: &'a str,
}

/// The settings that features depend on.
#[derive(Serialize)]
struct Settings<'a> {
    onnx_sha256: String,
    /// Of the weights beside the ONNX file, where they are more than it holds (2 GiB).
    #[serde(skip_serializing_if = "Option::is_none")]
    weights_sample: Option<String>,
    patches: String,
    #[serde(flatten)]
    recipe: &'a Recipe,
}

/// Embeds all slides with patches, but for those whose features are there. Slides that fail are in
/// the summary; an error is of all of them.
pub fn embed(request: &Request, onnx: &Path, backbone: &mut Backbone) -> Result<Summary> {
    let table = patching::read_table(request.patches)?;
    prepare(request, onnx, backbone)?;
    let patched: Vec<(&String, &Row)> = table.iter().filter(|(_, row)| row.status == Status::Patched).collect();
    let (there, todo): (Vec<_>, Vec<_>) = patched.iter().partition(|(name, row)| is_done(request, name, row));
    let mut reasons: BTreeMap<&str, String> = BTreeMap::new();
    let mut jobs: Vec<(&str, Job)> = Vec::new();
    for (name, row) in todo {
        match job(request.patches, request.slides, name, row) {
            Ok(job) => jobs.push((name, job)),
            Err(error) => drop(reasons.insert(name, error.to_string())),
        }
    }
    let (names, jobs): (Vec<&str>, Vec<Job>) = jobs.into_iter().unzip();
    let all = jobs.iter().map(patches_of).sum::<usize>();
    let progress = Progress::new(all as u64, "patches");
    let failed = std::thread::scope(|scope| {
        // a slide that is written, and one that waits
        let (sender, receiver) = sync_channel::<Complete>(1);
        let (names, jobs) = (&names, &jobs);
        let writer = scope.spawn(move || receiver.into_iter().try_for_each(|slide| write(request, names, jobs, slide)));
        let recipe = backbone.recipe.clone();
        let mut network = Network::new(backbone, jobs, request.batch, &progress, sender);
        let read = reading::read(jobs, &recipe, request.threads, 2 * request.batch, |event| network.take(event));
        let failed = read.and_then(|()| network.end());
        let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // where the writer has failed, the network knows no more than that nobody listens
        written.and(failed)
    })?;
    progress.end();
    let patches = (all - failed.keys().map(|&job| patches_of(&jobs[job])).sum::<usize>()) as u64;
    reasons.extend(failed.into_iter().map(|(job, error)| (names[job], error.to_string())));
    write_table(request, &patched, &reasons)?;
    let embedded = patched.len() - there.len() - reasons.len();
    Ok(Summary {
        embedded,
        skipped: there.len(),
        without_patches: table.len() - patched.len(),
        failed: reasons.into_iter().map(|(name, reason)| (name.into(), reason)).collect(),
        patches,
    })
}

/// Makes the folders, and refuses those that hold features of another network or recipe.
fn prepare(request: &Request, onnx: &Path, backbone: &Backbone) -> Result<()> {
    let path = request.out.join(SETTINGS);
    let weights = weights_path(onnx);
    let sampled = digest::sample(&weights).map_err(|e| Error::file(&weights, format!("cannot be read: {e}")));
    let settings = Settings {
        weights_sample: if weights.exists() { Some(sampled?) } else { None },
        onnx_sha256: sha256(&atomic::read_bytes(onnx, u64::MAX - 1)?),
        patches: sha256(&atomic::read_bytes(&request.patches.join(patching::SETTINGS), atomic::MOST)?),
        recipe: &backbone.recipe,
    };
    let text = toml::to_string(&settings).map_err(|e| Error::file(&path, e))?;
    if path.exists() {
        if atomic::read_text(&path, atomic::MOST)? != text {
            let out = request.out.display();
            let message = format!(
                "{out}: holds features of another network, recipe or patches ({SETTINGS}); choose another --out or --name"
            );
            return Err(Error::Usage(message));
        }
        return Ok(());
    }
    std::fs::create_dir_all(request.out).map_err(|e| Error::file(request.out, format!("cannot be made: {e}")))?;
    atomic::write_text(&path, &text)
}

/// The scales at which a slide has patches.
fn scales(row: &Row) -> impl Iterator<Item = Scale> {
    Scale::ALL.into_iter().filter(|&scale| row.patches(scale).is_some_and(|patches| patches > 0))
}

/// Whether all files are there, with as many patches as the slide has. Files are written
/// atomically.
fn is_done(request: &Request, name: &str, row: &Row) -> bool {
    scales(row).all(|scale| {
        let file = FeatureFile::open(&features::path(request.out, scale, name, request.format));
        file.is_ok_and(|file| row.patches(scale) == Some(file.patches()))
    })
}

/// What is read of a slide in a folder of patches; `slides` is the folder that it has moved to.
pub fn job(patches: &Path, slides: Option<&Path>, name: &str, row: &Row) -> Result<Job> {
    let patch_size = patching::patch_size(patches)?;
    let path = slides.map_or(row.path.clone(), |folder| folder.join(&row.slide_id));
    let read = |scale| Ok((scale, Coordinates::read(&coordinates_path(patches, scale, name))?));
    Ok(Job { path, patch_size, patches: scales(row).map(read).collect::<Result<_>>()? })
}

fn patches_of(job: &Job) -> usize {
    job.patches.iter().map(|(_, coordinates)| coordinates.corners.len()).sum()
}

/// A slide all of whose patches have been through the network.
struct Complete {
    job: usize,
    /// In the order of the job's scales.
    features: Vec<Vec<f32>>,
}

fn write(request: &Request, names: &[&str], jobs: &[Job], slide: Complete) -> Result<()> {
    for ((scale, coordinates), features) in jobs[slide.job].patches.iter().zip(slide.features) {
        let path = features::path(request.out, *scale, names[slide.job], request.format);
        let folder = path.parent().unwrap_or(request.out);
        std::fs::create_dir_all(folder).map_err(|e| Error::file(folder, format!("cannot be made: {e}")))?;
        features::write(&path, request.format, &coordinates.corners, &features)?;
    }
    Ok(())
}

fn write_table(request: &Request, patched: &[(&String, &Row)], reasons: &BTreeMap<&str, String>) -> Result<()> {
    let path = request.out.join(TABLE);
    let mut table = csv::Writer::from_writer(Vec::new());
    for (name, row) in patched {
        let reason = reasons.get(name.as_str());
        let status = if reason.is_some() { "failed" } else { "embedded" };
        let reason = reason.map_or("", String::as_str);
        table.serialize(Outcome { slide_id: &row.slide_id, status, reason }).map_err(|e| Error::file(&path, e))?;
    }
    let text = table.into_inner().map_err(|e| Error::file(&path, e))?;
    atomic::write_text(&path, &String::from_utf8_lossy(&text))
}

/// Gathers patches to batches, runs them, and hands over slides that are complete.
struct Network<'a> {
    backbone: &'a mut Backbone,
    jobs: &'a [Job],
    batch: usize,
    progress: &'a Progress,
    writer: SyncSender<Complete>,
    /// The pixels of the patches that wait, and whose they are: job, scale's place in it, row.
    pixels: Vec<f32>,
    waiting: Vec<(usize, usize, usize)>,
    /// Slides of which patches have come, with how many are still to come.
    open: BTreeMap<usize, (usize, Vec<Vec<f32>>)>,
    failed: BTreeMap<usize, Error>,
}

impl<'a> Network<'a> {
    fn new(
        backbone: &'a mut Backbone,
        jobs: &'a [Job],
        batch: usize,
        progress: &'a Progress,
        writer: SyncSender<Complete>,
    ) -> Self {
        let (pixels, waiting) = (Vec::new(), Vec::new());
        let (open, failed) = (BTreeMap::new(), BTreeMap::new());
        Self { backbone, jobs, batch, progress, writer, pixels, waiting, open, failed }
    }

    fn take(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Failed { job, error } => {
                self.open.remove(&job);
                self.failed.entry(job).or_insert(error);
            }
            Event::Patch { job, scale, row, pixels } if !self.failed.contains_key(&job) => {
                let place = self.jobs[job].patches.iter().position(|(of, _)| *of == scale);
                self.waiting.push((job, place.unwrap_or_default(), row));
                self.pixels.extend(pixels);
                if self.waiting.len() == self.batch {
                    self.run()?;
                }
            }
            Event::Patch { .. } => {}
        }
        Ok(())
    }

    /// Runs what waits.
    fn run(&mut self) -> Result<()> {
        let features = self.backbone.features(&self.pixels)?;
        let width = self.backbone.recipe.features;
        self.progress.add(self.waiting.len() as u64);
        self.pixels.clear();
        for ((job, place, row), features) in self.waiting.drain(..).zip(features.chunks_exact(width)) {
            if self.failed.contains_key(&job) {
                continue;
            }
            let (left, slide) = self.open.entry(job).or_insert_with(|| {
                let patches = &self.jobs[job].patches;
                let empty = patches.iter().map(|(_, coordinates)| vec![0.0; coordinates.corners.len() * width]);
                (patches_of(&self.jobs[job]), empty.collect())
            });
            slide[place][row * width..][..width].copy_from_slice(features);
            *left -= 1;
            if *left == 0
                && let Some((_, features)) = self.open.remove(&job)
                && self.writer.send(Complete { job, features }).is_err()
            {
                return Err(Error::Data("features cannot be written".into()));
            }
        }
        Ok(())
    }

    /// Runs the last batch; the slides that failed.
    fn end(mut self) -> Result<BTreeMap<usize, Error>> {
        if !self.waiting.is_empty() {
            self.run()?;
        }
        Ok(self.failed)
    }
}
