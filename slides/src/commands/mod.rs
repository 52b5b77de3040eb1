//! The subcommands of `cf-slide`.

pub mod embed;
pub mod heatmap;
mod input;
pub mod patch;
pub mod predict;
