#![no_main]

use crossfusion::data::pickle;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = pickle::load(data);
});
