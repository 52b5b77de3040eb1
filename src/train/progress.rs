//! What a run shows: a bar on a terminal, plain lines elsewhere, and a row an epoch. No line is
//! wider than 80 columns.

use std::{
    io::IsTerminal,
    path::Path,
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use super::{config::RunConfig, cox, fold::SlideDone, protocol::Part};
use crate::{Result, data::dataset::Dataset, folder::EpochMetrics, loss::Loss, survival::concordance_index};

/// Where output is piped, a long epoch says this often that it is alive.
const SIGN_OF_LIFE: Duration = Duration::from_secs(30);

/// The columns of an epoch's row.
const HEAD: &str = "fold    epoch  train loss     C  val loss     C       time  fold left  run left";

pub struct Display<'a> {
    pub interrupted: &'a AtomicBool,
    epochs: usize,
    /// One more than the last fold's number.
    end_fold: usize,
    /// None where output is piped.
    bar: Option<ProgressBar>,
    /// Fold, epoch, and whether it validates.
    phase: Option<(usize, usize, bool)>,
    /// Patches and the time since this phase began.
    patches: usize,
    start: Instant,
    last_line: Instant,
    /// The fold whose rows stand under the last head.
    headed: Option<usize>,
    /// Epochs that this process has seen to their end, and their seconds.
    seen: (usize, f64),
}

impl<'a> Display<'a> {
    /// Says what the run works on, and the notes about it.
    pub fn new(
        run: &Path,
        config: &RunConfig,
        dataset: &Dataset,
        parts: &[Part],
        notes: &[String],
        interrupted: &'a AtomicBool,
    ) -> Result<Self> {
        crate::say(format!("run folder {}", run.display()));
        let events = dataset.slides.iter().filter(|slide| !slide.censored).count();
        crate::say(format!(
            "{} slides with features of width {}, {events} with an event",
            dataset.slides.len(),
            dataset.features
        ));
        notes.iter().for_each(|note| crate::say(format!("note: {note}")));
        for part in parts {
            crate::say(describe(config, dataset, part)?);
        }
        let first = config.warmup_epochs + 1;
        if config.warmup_epochs + config.es_patience >= config.num_epochs {
            crate::say(format!(
                "no fold ends early: warm-up ({}) and patience ({}) reach to epoch {}, its last",
                config.warmup_epochs, config.es_patience, config.num_epochs
            ));
        }
        if parts.iter().any(|part| can_choose(dataset, part)) {
            crate::say(format!("* the best validation C-index so far, from epoch {first} on; its weights are kept."));
        }
        crate::say(format!(
            "Times left are the most it can be: a fold ends {} epochs after its best one.",
            config.es_patience
        ));
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{msg} {wide_bar:.cyan/blue} {pos}/{len} {eta}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        let now = Instant::now();
        Ok(Self {
            interrupted,
            epochs: config.num_epochs,
            end_fold: parts.last().map_or(0, |part| part.fold + 1),
            bar,
            phase: None,
            patches: 0,
            start: now,
            last_line: now,
            headed: None,
            seen: (0, 0.0),
        })
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
        let what = if done.validating { "val" } else { "train" };
        let loss = done.loss.map_or(String::new(), |loss| format!(" loss {loss:.3}"));
        let state = format!("fold {} epoch {}/{} {what}{loss}", done.fold, done.epoch + 1, self.epochs);
        if let Some(bar) = &self.bar {
            bar.set_message(state);
            bar.set_position(done.position as u64);
        } else if self.last_line.elapsed() >= SIGN_OF_LIFE {
            // the first slide started the clock
            let rate = match self.patches {
                0 => String::new(),
                patches => format!(", {:.0} patches/s", patches as f64 / self.start.elapsed().as_secs_f64()),
            };
            crate::say(format!("{state}, slide {} of {}{rate}", done.position, done.slides));
            self.last_line = Instant::now();
        }
    }

    pub fn epoch(&mut self, metrics: &EpochMetrics) {
        self.last_line = Instant::now();
        self.seen = (self.seen.0 + 1, self.seen.1 + metrics.seconds);
        let mean = self.seen.1 / self.seen.0 as f64;
        let of_fold = self.epochs - metrics.epoch - 1;
        let of_run = of_fold + (self.end_fold - metrics.fold - 1) * self.epochs;
        let c_index = |c: Option<f64>| c.map_or("-".into(), |c| format!("{c:.3}"));
        let row = format!(
            "{:>4} {:>8}  {:>10.3} {:>5}  {:>8.3} {:>5}{}{:>9}  {:>9} {:>9}",
            metrics.fold,
            format!("{}/{}", metrics.epoch + 1, self.epochs),
            metrics.train_loss,
            c_index(metrics.train_c_index),
            metrics.val_loss,
            c_index(metrics.val_c_index),
            if metrics.best { " *" } else { "  " },
            left(metrics.seconds),
            left(mean * of_fold as f64),
            left(mean * of_run as f64),
        );
        let mut lines = vec![row];
        if self.headed != Some(metrics.fold) {
            self.headed = Some(metrics.fold);
            lines.insert(0, HEAD.into());
        }
        lines.extend(match metrics.batches_without_update {
            0 => None,
            1 => Some("     1 batch without an event to compare gave no update".into()),
            n => Some(format!("     {n} batches without an event to compare gave no update")),
        });
        let lines = lines.join("\n");
        match &self.bar {
            Some(bar) => bar.suspend(|| crate::say(&lines)),
            None => crate::say(&lines),
        }
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Whether the slides that choose a fold's epoch have a C-index.
pub fn can_choose(dataset: &Dataset, part: &Part) -> bool {
    let slides = || part.slides.val.iter().map(|&slide| &dataset.slides[slide]);
    let (time, event): (Vec<f64>, Vec<bool>) = slides().map(|slide| (slide.months, !slide.censored)).unzip();
    concordance_index(&time, &event, &vec![0.0; time.len()]).is_ok()
}

/// What a fold trains on and is judged by.
fn describe(config: &RunConfig, dataset: &Dataset, part: &Part) -> Result<String> {
    let i = part.fold;
    let (train, val) = (&part.slides.train, part.slides.val.len());
    let updates = if config.loss_fn == Loss::CoxSurv {
        let units = cox::units(config.cox_unit, dataset, train)?;
        cox::batches(&units, config.cox_batch, config.seed, i, 0).len()
    } else {
        train.len() / config.grad_accum_steps
    };
    let updates = format!("{updates} update{} an epoch", if updates == 1 { "" } else { "s" });
    let mut text = format!("fold {i}: {} slides to train, {updates}; ", train.len());
    text += &match part.held_out {
        0 => format!("{val} to validate"),
        n => format!("{val} to choose the epoch by;\n        {n} to evaluate at the end"),
    };
    if !can_choose(dataset, part) {
        text += "\n        no two of those that choose the epoch can be compared: the last epoch is kept";
    }
    if !part.slides.without_outcome.is_empty() {
        text += &format!("\n        {} cases without an outcome left out", part.slides.without_outcome.len());
    }
    Ok(text)
}

/// A time to wait, to two units: "48 s", "12 min", "3 h 20 min", "2 d 4 h".
fn left(seconds: f64) -> String {
    let minutes = (seconds / 60.0).round() as u64;
    match (minutes, minutes / 60) {
        _ if seconds < 10.0 => format!("{seconds:.1} s"),
        _ if seconds < 90.0 => format!("{seconds:.0} s"),
        (0..120, _) => format!("{minutes} min"),
        (_, hours @ 0..48) => format!("{hours} h {} min", minutes % 60),
        (_, hours) => format!("{} d {} h", hours / 24, hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_left_read_well() {
        let texts = [0.0, 89.4, 90.0, 7_000.0, 12_000.0, 200_000.0].map(left);
        assert_eq!(texts, ["0.0 s", "89 s", "2 min", "117 min", "3 h 20 min", "2 d 7 h"]);
    }
}
