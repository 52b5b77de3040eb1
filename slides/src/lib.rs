//! From whole-slide images to CrossFusion's feature bags: tissue and patches as CLAM finds them, at
//! three magnifications, and features by a backbone. docs/slides.md is the guide.

pub mod coordinates;
pub mod files;
pub mod grid;
pub mod magnification;
pub mod patching;
pub mod picture;
mod progress;
pub mod python;
pub mod slide;
pub mod tissue;
