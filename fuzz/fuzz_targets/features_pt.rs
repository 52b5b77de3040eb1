#![no_main]

use std::path::Path;

use crossfusion::data::features::FeatureFile;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = FeatureFile::from_bytes(Path::new("bag.pt"), data.to_vec()).and_then(|file| file.read());
});
