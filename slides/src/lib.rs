//! From whole-slide images to CrossFusion's feature bags: tissue and patches as CLAM finds them, at
//! three magnifications, and features by a backbone. docs/slides.md is the guide.

pub mod backbone;
pub mod coordinates;
pub mod embedding;
pub mod features;
pub mod files;
pub mod grid;
pub mod magnification;
pub mod patching;
pub mod picture;
mod progress;
pub mod python;
pub mod reading;
pub mod regions;
pub mod resize;
pub mod slide;
pub mod tissue;
