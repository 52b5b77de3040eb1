//! CrossFusion: cancer-survival prediction from whole-slide-image feature bags at 5x, 10x and 20x.

pub mod data;
pub mod error;
pub mod report;
pub mod survival;

pub use error::{Error, Result};
