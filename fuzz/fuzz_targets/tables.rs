#![no_main]

use std::path::Path;

use crossfusion::data::{
    cohort::{self, Cohort},
    folds,
    labels::Bins,
    table::Table,
};

// A clinical table (plain or zipped), a manifest and a fold, from the same bytes.
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let path = Path::new("fuzzed");
    let manifest = Table::parse(path, data.to_vec(), b'\t', &["filename"]).ok();
    let slides = Table::parse(path, data.to_vec(), b',', &cohort::CLINICAL).and_then(|t| cohort::clinical_slides(&t));
    let cohort = Cohort::new(slides.unwrap_or_default(), manifest.as_ref());
    let _ = Bins::cut(&cohort.slides, 4);
    let _ = Table::parse(path, data.to_vec(), b',', &["train", "val"]).and_then(|t| folds::parse_split(&t, path, &cohort));
});
