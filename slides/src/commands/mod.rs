//! The subcommands of `cf-slide`.

pub mod embed;
pub mod patch;
