//! From whole-slide images to CrossFusion's feature bags: tissue and patches as CLAM finds them, at
//! three magnifications, and features by a backbone. docs/slides.md is the guide.
//!
//! ```text
//! slide, python, files      OpenSlide, where libraries are found, slides on the disk
//! tissue                    masks and outlines as OpenCV has them; which are tissue as CLAM has it
//! magnification, grid       how large patches are, and where
//! coordinates, picture      what `patching` leaves of a slide; `patching` is `cf-slide patch`
//! regions, resize, reading  from a slide to what a network takes, on all cores
//! backbone, features        ONNX Runtime, and files of features
//! embedding                 `cf-slide embed`
//! ```

pub mod backbone;
pub mod coordinates;
pub mod embedding;
pub mod features;
pub mod files;
pub mod grid;
pub mod heatmap;
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
pub mod viewer;
