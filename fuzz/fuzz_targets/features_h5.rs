#![no_main]

use crossfusion::data::features::FeatureFile;

libfuzzer_sys::fuzz_target!(
    init: {
        // libFuzzer's hook aborts at once; the reader turns panics of rust-hdf5 into errors, so it
        // must get to see them. A panic that leaves the reader still aborts.
        std::panic::set_hook(Box::new(|_| ()));
    },
    |data: &[u8]| {
        // one name for each process, since making a folder costs more than reading a file; TMPDIR
        // should be in memory
        let path = std::env::temp_dir().join(format!("crossfusion-fuzz-{}.h5", std::process::id()));
        std::fs::write(&path, data).expect("a temporary file");
        let _ = FeatureFile::open(&path).and_then(|file| (file.read(), file.coordinates()).0);
    }
);
