//! From whole-slide images to CrossFusion's feature bags: tissue and patches as CLAM finds them, at
//! three magnifications, and features by a backbone. docs/slides.md is the guide.

pub mod python;
pub mod slide;
