//! CrossFusion: cancer-survival prediction from whole-slide-image feature bags at 5x, 10x and 20x.

pub mod bench;
pub mod data;
pub mod device;
pub mod error;
pub mod eval;
pub mod loss;
pub mod model;
pub mod ops;
pub mod report;
pub mod survival;
pub mod train;

pub use error::{Error, Result};
