//! What the tests of slides share.
#![allow(dead_code)] // each test uses its part

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// A folder of `../shared/data`, or of $CROSSFUSION_DATA; says so loudly where there is none.
pub fn shared(test: &str, folder: &str) -> Option<PathBuf> {
    let root = std::env::var_os("CROSSFUSION_DATA")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"), PathBuf::from);
    let folder = root.join(folder);
    if !folder.is_dir() {
        eprintln!("SKIPPED {test}: {} not found", folder.display());
        return None;
    }
    Some(folder)
}

/// Runs `cf-slide`.
pub fn cf_slide(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cf-slide")).args(arguments).output().unwrap()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
