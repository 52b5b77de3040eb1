//! PyTorch on the same work, by benches/peer/peer.py in a process of its own.

use std::{path::Path, process::Command};

use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// What the script prints for these arguments. `python` has torch; the script is looked for here,
/// then where this was built.
pub fn run<R: DeserializeOwned>(python: &str, arguments: &[String]) -> Result<R> {
    let here = Path::new("benches/peer/peer.py");
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join(here);
    let script = if here.exists() { here } else { &built };
    let failed = |e: &dyn std::fmt::Display| Error::Device(format!("--peer {python}: {}: {e}", script.display()));
    let output = Command::new(python).arg(script).args(arguments).output().map_err(|e| failed(&e))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(failed(&text.lines().last().unwrap_or("failed without a word")));
    }
    serde_json::from_slice(&output.stdout).map_err(|e| failed(&e))
}
