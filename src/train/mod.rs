//! Training: one step, then folds, checkpoints and runs around it.

pub mod checkpoint;
pub mod config;
pub mod cox;
pub mod fold;
pub mod inputs;
pub mod plan;
mod progress;
pub mod protocol;
pub mod ranks;
pub mod run;
pub mod step;
pub mod tensorboard;
mod together;
