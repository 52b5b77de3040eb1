//! Feature bags, cohort tables, labels, folds and sampling.

pub mod cohort;
pub mod folds;
pub mod labels;
pub mod sampler;
pub mod table;
