//! The subcommands of `cf-slide`.

pub mod embed;
pub mod heatmap;
mod input;
pub mod patch;
pub mod predict;

use crossfusion::{Error, Result};

/// Lets rayon work on so many threads, 0 for one each core, and says how many that is.
fn start_threads(threads: usize) -> Result<usize> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.build_global().map_err(|e| Error::Device(format!("cannot start threads: {e}")))?;
    Ok(rayon::current_num_threads())
}
