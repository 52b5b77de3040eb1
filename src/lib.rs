//! CrossFusion: cancer-survival prediction from whole-slide-image feature bags at 5x, 10x and 20x.
//!
//! A slide's three bags flow through one list of ops, forward and then backward in reverse. There
//! is no autograd: each op is a plain function with an explicit backward, and a training step is
//! one readable path through them ([`train::step`]).
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

// Tests that need more of the crate than is public, from the folder of tests.
#[cfg(test)]
extern crate self as crossfusion;
#[cfg(all(test, feature = "emulator"))]
#[path = "../tests/emulator/mod.rs"]
mod emulator_tests;
