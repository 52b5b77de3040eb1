#![no_main]

use std::path::Path;

use crossfusion::data::torch::state_dict_from_bytes;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = state_dict_from_bytes(Path::new("best_model.pt"), data.to_vec());
});
