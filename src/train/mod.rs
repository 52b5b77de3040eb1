//! Training: one step, then epochs, checkpoints and runs around it.

pub mod step;
