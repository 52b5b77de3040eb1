#![no_main]

use std::path::Path;

use crossfusion::data::{
    clinical::{Clinical, Columns},
    cohort::Cohort,
    folds,
    labels::Bins,
    table::Table,
};

// A clinical table (plain or zipped), a manifest and a fold, from the same bytes.
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let path = Path::new("fuzzed");
    let manifest = Table::parse(path, data.to_vec(), &["filename"]).ok();
    let clinical = Clinical::parse(path, data.to_vec(), &Columns::default()).unwrap_or_default();
    let cohort = Cohort::new(clinical, manifest.as_ref());
    let _ = Bins::cut(&cohort.slides, 4);
    let _ = folds::parse_split(path, data.to_vec(), &cohort);
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = text.parse::<Columns>();
    }
});
