//! CrossFusion: cancer-survival prediction from whole-slide-image feature bags at 5x, 10x and 20x.
//!
//! A slide's three bags flow through one list of ops, forward and then backward in reverse. There
//! is no autograd: each op is a plain function with an explicit backward, and a training step is
//! one readable path through them ([`train::step`]).
//!
//! | module | what is in it |
//! |---|---|
//! | [`data`] | feature files, cohort tables, labels, folds, sampling |
//! | [`device`] | where tensors live and ops run: a CPU, a GPU, an emulated one, or `Dry`, which only counts |
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

#![deny(missing_docs)]
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
#[cfg(feature = "programs")]
pub mod folder;
pub mod loss;
#[cfg(feature = "programs")]
pub mod model;
pub mod ops;
#[cfg(feature = "programs")]
pub mod report;
pub mod survival;
mod text;
#[cfg(feature = "programs")]
pub mod train;

pub use error::{Error, Result};
pub use text::{complain, printable, quote, said, say};

// The README's Rust runs as it stands.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}

// Tests that need more of the crate than is public, from the folder of tests.
#[cfg(test)]
extern crate self as crossfusion;
#[cfg(all(test, feature = "emulator"))]
#[path = "../tests/emulator/mod.rs"]
mod emulator_tests;

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    /// The modules of docs/architecture.md, each above those that may import it.
    const MODULES: [&str; 14] = [
        "error", "text", "survival", "loss", "device", "ops", "model", "data", "folder", "train", "report", "eval",
        "bench", "cli",
    ];

    /// The modules that a source names: `crate::MODULE::`, or MODULE at the top of `use crate::{...}`.
    fn imports(source: &str) -> Vec<&str> {
        let name = |text: &str| text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
        let mut found: Vec<&str> = source.split("crate::").skip(1).map(|rest| &rest[..name(rest)]).collect();
        for list in source.split("crate::{").skip(1) {
            let mut depth = 0;
            let mut begins = true;
            for (at, c) in list.char_indices() {
                match c {
                    '}' if depth == 0 => break,
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    ',' if depth == 0 => begins = true,
                    c if begins && depth == 0 && c.is_alphabetic() => {
                        found.push(&list[at..at + name(&list[at..])]);
                        begins = false;
                    }
                    _ => {}
                }
            }
        }
        found
    }

    fn sources(folder: &Path, found: &mut Vec<std::path::PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }

    #[test]
    fn modules_import_only_what_stands_above_them() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut files = Vec::new();
        sources(&folder, &mut files);
        let floor = |module: &str| MODULES.iter().position(|known| *known == module);
        let mut seen = 0;
        for path in files {
            let relative = path.strip_prefix(&folder).unwrap();
            let module = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
            let Some(own) = floor(module) else { continue };
            let text = fs::read_to_string(&path).unwrap();
            let source = text.split("#[cfg(test)]").next().unwrap();
            for import in imports(source) {
                if let Some(other) = floor(import) {
                    assert!(other <= own, "{} imports {import}, which stands below {module}", relative.display());
                    seen += 1;
                }
            }
        }
        assert!(seen > 150, "only {seen} imports were found");
    }
}
