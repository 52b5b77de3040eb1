//! What a run shows: a bar on a terminal, plain lines elsewhere.

use std::{io::IsTerminal, path::Path, sync::atomic::AtomicBool, time::Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::{
    config::RunConfig,
    fold::{Best, EpochMetrics, SlideDone},
};
use crate::data::dataset::{Dataset, Fold};

pub struct Display<'a> {
    pub interrupted: &'a AtomicBool,
    epochs: usize,
    /// None where output is piped.
    bar: Option<ProgressBar>,
    /// Patches and the time since the epoch began.
    patches: usize,
    start: Instant,
    /// The last epoch's validation C-index.
    c_index: Option<f64>,
}

impl<'a> Display<'a> {
    /// Says what the run works on.
    pub fn new(run: &Path, config: &RunConfig, dataset: &Dataset, folds: &[Fold], interrupted: &'a AtomicBool) -> Self {
        println!("run folder {}", run.display());
        let events = dataset.slides.iter().filter(|slide| !slide.censored).count();
        println!("{} slides with features of width {}, {events} events", dataset.slides.len(), dataset.features);
        if let Some(sentence) = dataset.left_out() {
            println!("{sentence}");
        }
        for (i, fold) in folds.iter().enumerate() {
            let without = match fold.without_outcome {
                0 => String::new(),
                n => format!(" ({n} cases without an outcome left out)"),
            };
            println!("fold {i}: {} slides to train, {} to validate{without}", fold.train.len(), fold.val.len());
        }
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{msg} {wide_bar:.cyan/blue} {pos}/{len} {elapsed}<{eta}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { interrupted, epochs: config.num_epochs, bar, patches: 0, start: Instant::now(), c_index: None }
    }

    pub fn slide(&mut self, done: &SlideDone) {
        let Some(bar) = &self.bar else { return };
        if done.position == 1 {
            bar.reset();
            bar.set_length(done.slides as u64);
            if !done.validating {
                (self.patches, self.start) = (0, Instant::now());
            }
        }
        self.patches += done.patches;
        let rate = self.patches as f64 / self.start.elapsed().as_secs_f64();
        let what = if done.validating { "val" } else { "train" };
        let c_index = self.c_index.map_or(String::new(), |c| format!(" C {c:.3}"));
        let epoch = done.epoch + 1;
        bar.set_message(format!(
            "fold {} epoch {epoch}/{} {what} loss {:.3}{c_index} {rate:.0} patches/s",
            done.fold, self.epochs, done.loss
        ));
        bar.set_position(done.position as u64);
    }

    pub fn epoch(&mut self, metrics: &EpochMetrics, best: Option<Best>) {
        self.c_index = metrics.val_c_index;
        let c_index = |c: Option<f64>| c.map_or("-".into(), |c| format!("{c:.3}"));
        let best = match best {
            _ if metrics.best => " *".into(),
            Some(best) => format!(" (best {:.3} in epoch {})", best.c_index, best.epoch + 1),
            None => String::new(),
        };
        let line = format!(
            "fold {} epoch {:>3}/{} lr {:.1e} | train loss {:.3} C {} | val loss {:.3} C {}{best} | {:.1} s, {:.0} patches/s",
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
            Some(bar) => bar.suspend(|| println!("{line}")),
            None => println!("{line}"),
        }
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
