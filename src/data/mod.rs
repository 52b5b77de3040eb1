//! Feature bags, cohort tables, labels, folds and sampling.

pub mod atomic;
pub mod cohort;
pub mod dataset;
pub mod demo;
pub mod features;
pub mod folds;
pub mod labels;
pub mod pickle;
pub mod sampler;
pub mod table;
pub mod torch;
