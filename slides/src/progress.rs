//! How far a run is: a bar on a terminal, a line now and then elsewhere.

use std::{
    io::IsTerminal,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// Where output is piped, a run says this often that it is alive.
const SIGN_OF_LIFE: Duration = Duration::from_secs(30);

/// Counts things done, from any thread.
pub struct Progress {
    bar: Option<ProgressBar>,
    unit: &'static str,
    total: u64,
    done: AtomicU64,
    last_line: Mutex<Instant>,
}

impl Progress {
    /// `unit` is the plural of what is counted.
    pub fn new(total: u64, unit: &'static str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total);
            let template = format!("{{wide_bar}} {{pos}} of {{len}} {unit}, {{per_sec}}, {{eta}} left");
            // the template is one of indicatif's own keys, so that it parses
            ProgressStyle::with_template(&template).into_iter().for_each(|style| bar.set_style(style));
            bar
        });
        Self { bar, unit, total, done: AtomicU64::new(0), last_line: Mutex::new(Instant::now()) }
    }

    /// Some more are done.
    pub fn add(&self, more: u64) {
        let done = self.done.fetch_add(more, Ordering::Relaxed) + more;
        if let Some(bar) = &self.bar {
            bar.inc(more);
            return;
        }
        let mut last = self.last_line.lock().unwrap_or_else(PoisonError::into_inner);
        if last.elapsed() >= SIGN_OF_LIFE {
            *last = Instant::now();
            crossfusion::say(format!("{done} of {} {}", self.total, self.unit));
        }
    }

    /// Takes the bar off the terminal.
    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
