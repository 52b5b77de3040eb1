//! Feature bags, cohort tables, labels, folds and sampling.

pub mod atomic;
pub mod features;
mod h5;
pub mod pickle;
mod tensor;
pub mod torch;
