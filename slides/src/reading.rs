//! Reads the patches of many slides on all cores, as a backbone wants them.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{SyncSender, sync_channel},
    },
};

use crossfusion::{Error, Result, model::Scale};
use serde::{Deserialize, Serialize};

use crate::{
    coordinates::Coordinates,
    regions::{Patch, Region, regions},
    resize::{Filter, resize},
    slide::{Image, Slide},
};

/// How patches become what a network takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Side of the network's input, in pixels.
    pub input: usize,
    /// A patch is resized to this side first, and its middle is taken; `input` if it is not said.
    pub resize: Option<usize>,
    /// How it is resized.
    pub interpolation: Filter,
    /// Of red, green and blue, where white is 1; subtracted.
    pub mean: [f32; 3],
    /// Of red, green and blue; divided by.
    pub std: [f32; 3],
    /// Numbers that the network gives for a patch.
    pub features: usize,
}

/// A slide and its patches.
pub struct Job {
    /// The slide's file.
    pub path: PathBuf,
    /// Side of its patches, in pixels of their magnification.
    pub patch_size: usize,
    /// Where its patches are.
    pub patches: Vec<(Scale, Coordinates)>,
}

/// What reading brings, in any order.
pub enum Event {
    /// A patch as the network takes it.
    Patch {
        /// The number of its job.
        job: usize,
        /// Its magnification.
        scale: Scale,
        /// Its number in the coordinates.
        row: usize,
        /// `[3, input, input]`, normalised.
        pixels: Vec<f32>,
    },
    /// A slide that cannot be read; no more of its patches are, and some may have come.
    Failed {
        /// The number of its job.
        job: usize,
        /// Why.
        error: Error,
    },
}

/// Reads all patches on so many threads and hands them to `take`, on the thread that calls. No more
/// than `ahead` patches wait for it. An error of `take` ends the reading.
pub fn read(
    jobs: &[Job],
    recipe: &Recipe,
    threads: usize,
    ahead: usize,
    mut take: impl FnMut(Event) -> Result<()>,
) -> Result<()> {
    let queue = Mutex::new(Queue { jobs, next: 0, current: None });
    let (sender, receiver) = sync_channel(ahead);
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            let (queue, sender) = (&queue, sender.clone());
            scope.spawn(move || work(jobs, queue, recipe, &sender));
        }
        drop(sender);
        // dropping the receiver, here at the latest, is what ends the threads after an error
        receiver.into_iter().try_for_each(&mut take)
    })
}

/// The regions that are still to be read.
struct Queue<'a> {
    jobs: &'a [Job],
    next: usize,
    current: Option<Current>,
}

/// The slide that regions are handed out of.
struct Current {
    job: usize,
    slide: Arc<Slide>,
    regions: std::vec::IntoIter<Region>,
}

type Task = (usize, Result<(Arc<Slide>, Region)>);

impl Queue<'_> {
    /// The next region, with its job and slide; slides are opened as they are reached.
    fn pop(&mut self) -> Option<Task> {
        loop {
            if let Some(current) = &mut self.current
                && let Some(region) = current.regions.next()
            {
                return Some((current.job, Ok((current.slide.clone(), region))));
            }
            let (job, Job { path, patches, .. }) = (self.next, self.jobs.get(self.next)?);
            self.next += 1;
            let checked = |slide: &Slide| patches.iter().try_for_each(|(_, patches)| patches.check(slide));
            match Slide::open(path).and_then(|slide| checked(&slide).map(|()| slide)) {
                Ok(slide) => {
                    let (slide, regions) = (Arc::new(slide), regions(patches).into_iter());
                    self.current = Some(Current { job, slide, regions });
                }
                Err(error) => return Some((job, Err(error))),
            }
        }
    }

    /// Leaves out what is left of a job.
    fn drop_job(&mut self, job: usize) {
        self.current.take_if(|current| current.job == job);
    }
}

/// A thread's work; it ends where there is nothing left, or nobody to take it.
fn work(jobs: &[Job], queue: &Mutex<Queue>, recipe: &Recipe, sender: &SyncSender<Event>) {
    let queue = || queue.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let Some((job, task)) = queue().pop() else { return };
        let image = task.and_then(|(slide, region)| {
            let Region { corner: [x, y], level, size, patches } = region;
            Ok((slide.read_region(x, y, level, size, size)?, patches))
        });
        let sent = match image {
            Ok((image, patches)) => patches.into_iter().try_for_each(|patch| {
                let pixels = prepare(&image, &patch, jobs[job].patch_size, recipe);
                sender.send(Event::Patch { job, scale: patch.scale, row: patch.row, pixels })
            }),
            Err(error) => {
                queue().drop_job(job);
                sender.send(Event::Failed { job, error })
            }
        };
        if sent.is_err() {
            return;
        }
    }
}

/// A patch of a region as the network takes it: Pillow's default filter brings it to its
/// magnification, where it has `patch_size` pixels a side; then what the recipe says is done.
fn prepare(region: &Image, patch: &Patch, patch_size: usize, recipe: &Recipe) -> Vec<f32> {
    let image = crop(region, patch.offset, patch.size);
    let image = resize(image, patch_size, patch_size, Filter::Bicubic);
    let side = recipe.resize.unwrap_or(recipe.input);
    let image = resize(image, side, side, recipe.interpolation);
    // rounded as torchvision's CenterCrop does
    let margin = ((side - recipe.input) as f64 / 2.0).round_ties_even() as usize;
    let image = crop(&image, [margin; 2], recipe.input);
    let mut planes = vec![0.0; image.pixels.len()];
    for (c, plane) in planes.chunks_exact_mut(recipe.input * recipe.input).enumerate() {
        // in the order of torchvision's ToTensor and Normalize
        let table: Vec<f32> = (0..=255u8).map(|x| (f32::from(x) / 255.0 - recipe.mean[c]) / recipe.std[c]).collect();
        for (out, pixel) in plane.iter_mut().zip(image.pixels.as_chunks::<3>().0) {
            *out = table[usize::from(pixel[c])];
        }
    }
    planes
}

/// A square of an image.
fn crop(image: &Image, [x, y]: [usize; 2], size: usize) -> Image {
    if [image.width, image.height] == [size; 2] {
        return image.clone();
    }
    let mut pixels = Vec::with_capacity(3 * size * size);
    for row in image.pixels.chunks_exact(3 * image.width).skip(y).take(size) {
        pixels.extend_from_slice(&row[3 * x..][..3 * size]);
    }
    Image { width: size, height: size, pixels }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_goes_through_the_size_of_its_magnification() {
        let pixels = (0..3 * 64 * 64u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let region = Image { width: 64, height: 64, pixels };
        let patch = Patch { scale: Scale::X20, row: 0, offset: [0, 0], size: 64 };
        let (mean, std) = ([0.0; 3], [1.0 / 255.0; 3]);
        let recipe = Recipe { input: 8, resize: Some(16), interpolation: Filter::Bilinear, mean, std, features: 1 };
        for patch_size in [64, 32] {
            let image = resize(region.clone(), patch_size, patch_size, Filter::Bicubic);
            let image = resize(image, 16, 16, Filter::Bilinear);
            let found = prepare(&region, &patch, patch_size, &recipe);
            for (at, found) in found.iter().enumerate() {
                let (c, y, x) = (at / 64, at / 8 % 8, at % 8);
                let expected = image.pixels[3 * (16 * (y + 4) + x + 4) + c];
                assert!((found - f32::from(expected)).abs() < 1e-3, "{patch_size}: {found} and {expected}");
            }
        }
        assert_ne!(prepare(&region, &patch, 64, &recipe), prepare(&region, &patch, 32, &recipe));
    }
}
