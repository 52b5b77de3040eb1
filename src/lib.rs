//! CrossFusion: cancer-survival prediction from whole-slide-image feature bags at 5x, 10x and 20x.
//!
//! A slide's three bags flow through one list of ops, forward and then backward in reverse. There is no autograd: each op is a plain
//! function with an explicit backward, and a training step is one readable path through them ([`train::step`]).
//!
//! | room | what is in it |
//! |---|---|
//! | [`data`] | feature files, cohort tables, labels, folds, sampling |
//! | [`device`] | where tensors live and ops run: `Cpu`, and `Dry`, which only counts |
//! | [`ops`] | the ops: checked API, CPU kernels, forward and backward |
//! | [`model`] | parameters, and CrossFusion put together from the ops |
//! | [`loss`] | survival losses with their gradients |
//! | [`train`] | the step, folds, checkpoints, runs |
//! | [`eval`], [`report`] | predictions of a run or a checkpoint, plots, the report page |
//! | [`survival`] | C-index, Kaplan-Meier, log-rank, Cox and more, usable alone |
//!
//! One training step on a slide of 5, 20 and 80 patches:
//!
//! ```
//! use crossfusion::{
//!     device::Device,
//!     loss::{Loss, Prediction, Target},
//!     model::{Bags, Config},
//!     ops::{Draw, adam::Adam},
//!     train::step::Engine,
//! };
//!
//! # fn main() -> crossfusion::Result<()> {
//! let config = Config { dim: 32, ..Config::new(16) }; // 16 features a patch
//! let mut engine = Engine::<f32>::new(Device::from_name("cpu", 0)?, &config, 7)?;
//!
//! let patches = [5, 20, 80].map(|n| vec![0.5f32; n * 16]);
//! let bags = Bags::new(patches.each_ref().map(Vec::as_slice), 16)?;
//!
//! // forward with dropout, the loss and its gradient, backward, Adam
//! let target = Target { label: 1, censored: false };
//! let dropout = Some(Draw { seed: 7, step: 0 });
//! engine.accumulate(bags, dropout, None, |logits| Loss::NllSurv.evaluate(logits, target, 0.2).1)?;
//! engine.update(&Adam { learning_rate: 1e-4, weight_decay: 4e-6, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 })?;
//!
//! let prediction = Prediction::from_logits(&engine.evaluate(bags)?);
//! assert!(prediction.risk < 0.0 && prediction.survival.len() == 4);
//! # Ok(())
//! # }
//! ```

// Without the models, what they alone use is unused.
#![cfg_attr(not(feature = "programs"), allow(dead_code, unused_imports))]

#[cfg(feature = "programs")]
pub mod bench;
#[cfg(feature = "programs")]
pub mod cli;
#[cfg(feature = "programs")]
pub mod data;
pub mod device;
pub mod error;
#[cfg(feature = "programs")]
pub mod eval;
pub mod loss;
#[cfg(feature = "programs")]
pub mod model;
pub mod ops;
#[cfg(feature = "programs")]
pub mod report;
pub mod survival;
#[cfg(feature = "programs")]
pub mod train;

pub use error::{Error, Result};

use std::{
    fmt::Display,
    io::{ErrorKind, Write},
    sync::OnceLock,
};

/// Why a line that was said is lost.
static LOST: OnceLock<String> = OnceLock::new();

/// Prints lines for a person. A closed pipe or a full disk behind it must not end a run; [`said`] tells
/// of the latter when it is over.
pub fn say(lines: impl Display) {
    say_bytes(format!("{}\n", printable(&lines.to_string())).as_bytes());
}

/// Prints bytes as they are, as [`say`] does.
fn say_bytes(bytes: &[u8]) {
    let mut output = std::io::stdout();
    if let Err(e) = output.write_all(bytes).and_then(|()| output.flush())
        && e.kind() != ErrorKind::BrokenPipe
    {
        LOST.get_or_init(|| e.to_string());
    }
}

/// An error if something that was said could not be written. A closed pipe is its reader's choice.
pub fn said() -> Result<()> {
    LOST.get().map_or(Ok(()), |e| Err(Error::Device(format!("standard output: cannot be written: {e}"))))
}

/// Prints a program's error as one line on standard error.
pub fn complain(program: &str, error: &Error) {
    let line = printable(&error.to_string()).replace('\n', "\\n");
    let _ = writeln!(std::io::stderr(), "{program}: {line}");
}

/// Text with its control characters escaped, but for ends of lines: what a file holds must not steer
/// the terminal that it is shown on.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        // the directional ones make text read as other than it is
        if (c.is_control() && c != '\n') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

// Tests that need more of the crate than is public, from the folder of tests.
#[cfg(test)]
extern crate self as crossfusion;
#[cfg(all(test, feature = "emulator"))]
#[path = "../tests/emulator/mod.rs"]
mod emulator_tests;

#[cfg(test)]
mod tests {
    #[test]
    fn control_characters_are_shown_and_not_sent() {
        assert_eq!(super::printable("a\u{1b}]0;title\u{7}b\nc\r\td"), "a\\u{1b}]0;title\\u{7}b\nc\\r\\td");
        assert_eq!(super::printable("\u{202e}é\u{9b}"), "\\u{202e}é\\u{9b}");
    }
}
