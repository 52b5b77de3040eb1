//! What a run shows: a bar on a terminal, plain lines elsewhere.

use std::{
    io::IsTerminal,
    path::Path,
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use super::{
    config::RunConfig,
    fold::{Best, EpochMetrics, SlideDone},
    protocol::Part,
};
use crate::data::{dataset::Dataset, folds};

/// Where output is piped, a long epoch says this often that it is alive.
const SIGN_OF_LIFE: Duration = Duration::from_secs(60);

pub struct Display<'a> {
    pub interrupted: &'a AtomicBool,
    epochs: usize,
    /// None where output is piped.
    bar: Option<ProgressBar>,
    /// Fold, epoch, and whether it validates.
    phase: Option<(usize, usize, bool)>,
    /// Patches and the time since this phase began.
    patches: usize,
    start: Instant,
    last_line: Instant,
    /// The last epoch's validation C-index.
    c_index: Option<f64>,
}

impl<'a> Display<'a> {
    /// Says what the run works on, and how many slides it leaves out.
    pub fn new(
        run: &Path,
        config: &RunConfig,
        dataset: &Dataset,
        (parts, left_out): (&[Part], usize),
        interrupted: &'a AtomicBool,
    ) -> Self {
        crate::say(format!("run folder {}", run.display()));
        let events = dataset.slides.iter().filter(|slide| !slide.censored).count();
        crate::say(format!(
            "{} slides with features of width {}, {events} events",
            dataset.slides.len(),
            dataset.features
        ));
        let of_folds = parts.iter().flat_map(|part| part.slides.notes.iter().cloned());
        let notes = folds::notes(&config.splits, &config.fold_numbers()).into_iter().chain(dataset.notes());
        notes.chain(of_folds).for_each(|note| crate::say(format!("note: {note}")));
        if left_out > 0 {
            crate::say(format!("note: {left_out} slides or cases are not used, for reasons that left_out.csv lists"));
        }
        for part in parts {
            let i = part.fold;
            let without = match part.slides.without_outcome.len() {
                0 => String::new(),
                n => format!(" ({n} cases without an outcome left out)"),
            };
            let (train, val) = (part.slides.train.len(), part.slides.val.len());
            crate::say(match part.held_out {
                0 => format!("fold {i}: {train} slides to train, {val} to validate{without}"),
                n => format!(
                    "fold {i}: {train} slides to train, {val} to choose the epoch by, {n} to evaluate at the end{without}"
                ),
            });
        }
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{msg} {wide_bar:.cyan/blue} {pos}/{len} {elapsed}<{eta}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        let now = Instant::now();
        let epochs = config.num_epochs;
        Self { interrupted, epochs, bar, phase: None, patches: 0, start: now, last_line: now, c_index: None }
    }

    pub fn slide(&mut self, done: &SlideDone) {
        // a resumed epoch begins in its middle
        let phase = Some((done.fold, done.epoch, done.validating));
        if self.phase != phase {
            (self.phase, self.patches, self.start) = (phase, 0, Instant::now());
            if let Some(bar) = &self.bar {
                bar.reset();
                bar.set_length(done.slides as u64);
                bar.set_position(done.position as u64);
                bar.reset_eta();
            }
        } else {
            self.patches += done.patches;
        }
        // the first slide starts the clock
        let rate = match self.patches {
            0 => String::new(),
            patches => format!(" {:.0} patches/s", patches as f64 / self.start.elapsed().as_secs_f64()),
        };
        let what = if done.validating { "val" } else { "train" };
        let c_index = self.c_index.map_or(String::new(), |c| format!(" C {c:.3}"));
        let loss = done.loss.map_or(String::new(), |loss| format!(" loss {loss:.3}"));
        let epoch = done.epoch + 1;
        let state = format!("fold {} epoch {epoch}/{} {what}{loss}{c_index}{rate}", done.fold, self.epochs);
        if let Some(bar) = &self.bar {
            bar.set_message(state);
            bar.set_position(done.position as u64);
        } else if self.last_line.elapsed() >= SIGN_OF_LIFE {
            crate::say(format!("{state} slide {}/{}", done.position, done.slides));
            self.last_line = Instant::now();
        }
    }

    pub fn epoch(&mut self, metrics: &EpochMetrics, best: Option<Best>) {
        (self.c_index, self.last_line) = (metrics.val_c_index, Instant::now());
        let c_index = |c: Option<f64>| c.map_or("-".into(), |c| format!("{c:.3}"));
        let best = match best {
            _ if metrics.best => " *".into(),
            Some(best) => format!(" (best {:.3} in epoch {})", best.c_index, best.epoch + 1),
            None => String::new(),
        };
        let skipped = match metrics.batches_without_update {
            0 => String::new(),
            1 => ", 1 batch without an event to compare gave no update".into(),
            n => format!(", {n} batches without an event to compare gave no update"),
        };
        let line = format!(
            "fold {} epoch {:>3}/{} lr {:.1e} | train loss {:.3} C {} | val loss {:.3} C {}{best} | {:.1} s, {:.0} patches/s{skipped}",
            metrics.fold,
            metrics.epoch + 1,
            self.epochs,
            metrics.learning_rate,
            metrics.train_loss,
            c_index(metrics.train_c_index),
            metrics.val_loss,
            c_index(metrics.val_c_index),
            metrics.seconds,
            metrics.patches_per_second,
        );
        match &self.bar {
            Some(bar) => bar.suspend(|| crate::say(&line)),
            None => crate::say(&line),
        }
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
