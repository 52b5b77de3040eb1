//! Training: one step, then folds, checkpoints and runs around it.

pub mod checkpoint;
pub mod config;
pub mod cox;
pub mod fold;
mod progress;
pub mod protocol;
pub mod run;
pub mod step;
