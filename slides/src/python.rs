//! Shared libraries that Python packages bring along.

use std::path::PathBuf;
use std::process::Command;

/// The folder of a Python package, as the `python3` on the path finds it (so of the environment
/// that is active, be it venv's or conda's); None where there is no Python or no such package. The
/// package is not imported.
pub fn package_folder(package: &str) -> Option<PathBuf> {
    const FIND: &str =
        "import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]).submodule_search_locations[0])";
    let output = Command::new("python3").args(["-c", FIND, package]).output().ok()?;
    let folder = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| PathBuf::from(folder.trim_end()))
}
