//! Feature bags, cohort tables, labels, folds and sampling.

pub mod atomic;
pub mod check;
pub mod clinical;
pub mod cohort;
mod container;
pub mod dataset;
pub mod demo;
pub mod digest;
pub mod features;
pub mod folds;
mod h5;
pub mod labels;
pub mod layout;
pub mod patches;
pub mod pickle;
pub(crate) mod safetensors;
pub mod sampler;
pub mod table;
mod tensor;
pub mod torch;
