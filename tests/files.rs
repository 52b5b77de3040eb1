//! Feature files and checkpoints as PyTorch, safetensors and h5py write them, broken ones, and malicious ones. The same bag is stored in every
//! layout; each folder has it: our fixtures (scripts/make-fixtures.py), and ../shared/data/files where that is there.

use std::path::{Path, PathBuf};

use crossfusion::{
    data::{
        features::FeatureFile,
        torch::{parse_state_dict, read_state_dict, write_pt},
    },
    device::Device,
    model::Config,
    train::step::Engine,
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/files")
}

/// A folder of the shared data, or a loud word that it is not there.
fn shared(test: &str, folder: &str) -> Option<PathBuf> {
    let data = match std::env::var_os("CROSSFUSION_DATA") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"),
    };
    let path = data.join(folder);
    if !path.is_dir() {
        eprintln!("SKIPPED {test}: {} not found", path.display());
        return None;
    }
    Some(path)
}

/// Files that hold the bag of `f32.pt`, with the rounding of their type: f16 keeps 11 bits, bf16 8.
const GOOD: [(&str, f32); 15] = [
    ("f64.pt", 0.0),
    ("legacy.pt", 0.0),
    ("f16.pt", 4.9e-4),
    ("bf16.pt", 3.95e-3),
    ("batch_of_one.pt", 0.0),
    ("parameter.pt", 0.0),
    ("dict.pt", 0.0),
    ("sliced_view.pt", 0.0),
    ("transposed_view.pt", 0.0),
    ("clam.h5", 0.0),
    ("trident.h5", 0.0),
    ("features.safetensors", 0.0),
    ("bf16.safetensors", 3.95e-3),
    ("stamp_f16.h5", 4.9e-4),
    ("lzf_latest.h5", 0.0),
];

const BAD: [(&str, &str); 9] = [
    ("empty.pt", "is an empty bag, of shape [0, "),
    ("nan.pt", "holds NaN at patch "),
    ("truncated.pt", "is truncated"),
    ("not_a_tensor.pt", "is not a file that torch.save wrote"),
    ("malicious.pt", "asks to call `posix.system`"),
    ("integers.pt", "holds I64 values, expected floating-point"),
    ("three_dimensions.pt", "holds a tensor of shape [2, 3, 4], expected [patches, features]"),
    ("list.pt", "holds neither a tensor nor a dict with `features`"),
    ("no_features.h5", "has none of the datasets features, feats, patch_embeddings; it has coords"),
];

fn check_folder(folder: &Path) {
    let truth = FeatureFile::open(&folder.join("f32.pt")).unwrap().read().unwrap();
    let mut checked = 0;
    for (name, tolerance) in GOOD {
        let path = folder.join(name);
        if !path.exists() {
            continue;
        }
        let file = FeatureFile::open(&path).unwrap();
        assert_eq!([file.patches(), file.features()], truth.shape(), "{name}");
        let bag = file.read().unwrap();
        for (got, expected) in bag.iter().zip(&truth) {
            assert!((got - expected).abs() <= tolerance * expected.abs(), "{name}: {got}, expected {expected}");
        }
        // a range of rows is the same rows
        let mut rows = vec![0.0; 2 * file.features()];
        file.read_rows(3..5, &mut rows).unwrap();
        assert_eq!(rows, bag.as_slice().unwrap()[3 * file.features()..5 * file.features()], "{name}");
        checked += 1;
    }
    for (name, expected) in BAD {
        let path = folder.join(name);
        if !path.exists() {
            continue;
        }
        let message = FeatureFile::open(&path).and_then(|file| file.read()).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains(name) && message.contains(expected), "{message}\nexpected: {expected}");
        checked += 1;
    }
    println!("{}: {checked} files behave", folder.display());
}

#[test]
fn fixtures_behave() {
    check_folder(&fixtures());
}

#[test]
fn a_nan_is_named_by_patch_and_column() {
    let message = FeatureFile::open(&fixtures().join("nan.pt")).unwrap().read().unwrap_err().to_string();
    assert!(message.ends_with("holds NaN at patch 7, column 4"), "{message}");
}

#[test]
fn shared_files_behave() {
    if let Some(folder) = shared("shared_files_behave", "files") {
        check_folder(&folder);
    }
}

#[test]
fn published_checkpoints_load() {
    let Some(folder) = shared("published_checkpoints_load", "files") else { return };
    let plain = read_state_dict(&folder.join("best_model.pt")).unwrap();
    assert_eq!(plain, read_state_dict(&folder.join("best_model_data_parallel.pt")).unwrap());
    let features = plain["c_lin_proj.0.weight"].0[1];
    let config = Config { dim: plain["final_ln.weight"].0[0], ..Config::new(features) };
    let mut engine = Engine::<f32>::new(Device::from_name("cpu", 1).unwrap(), &config, 0).unwrap();
    engine.load(&plain).unwrap();
}

#[test]
fn state_dicts_bare_nested_and_prefixed() {
    let plain = read_state_dict(&fixtures().join("state_dict.pt")).unwrap();
    assert_eq!(plain.keys().collect::<Vec<_>>(), ["a.bias", "a.weight"]);
    assert_eq!(plain["a.weight"].0, [11, 6]);
    assert_eq!(plain["a.bias"].1, plain["a.weight"].1[..6]);
    assert_eq!(plain, read_state_dict(&fixtures().join("data_parallel.pt")).unwrap());
}

#[test]
fn real_features_are_the_same_from_both_formats() {
    let Some(folder) = shared("real_features_are_the_same_from_both_formats", "features/efficientnet_lite0") else {
        return;
    };
    for magnification in ["x5", "x10", "x20"] {
        for slide in ["cmu-1-small-region", "tcga-cr-7395-01a-01-ts1"] {
            let open = |kind: &str, end: &str| {
                let path = folder.join(magnification).join(kind).join(format!("{slide}.{end}"));
                FeatureFile::open(&path).unwrap().read().unwrap()
            };
            let (pt, h5) = (open("pt_files", "pt"), open("h5_files", "h5"));
            assert_eq!((pt.ncols(), &pt), (1280, &h5), "{magnification} {slide}");
        }
    }
}

#[test]
fn written_bags_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bag.pt");
    let bag = ndarray::Array2::from_shape_fn((37, 5), |(i, j)| i as f32 - 0.25 * j as f32);
    write_pt(&path, bag.view()).unwrap();
    assert_eq!(FeatureFile::open(&path).unwrap().read().unwrap(), bag);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file was left");
    let missing = folder.path().join("no/such/folder.pt");
    assert!(write_pt(&missing, bag.view()).unwrap_err().to_string().contains("cannot be written"));
}

/// Whatever the bytes, a file is read or refused; nothing panics and nothing large is allocated. (libFuzzer does the same at length: fuzz/.)
#[test]
fn mutated_files_never_panic() {
    let mut state = 1u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    let mut paths: Vec<_> = std::fs::read_dir(fixtures()).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths.iter().filter(|path| path.extension().is_some_and(|e| e != "h5")) {
        let seed = std::fs::read(path).unwrap();
        for _ in 0..300 {
            let mut bytes = seed.clone();
            for _ in 0..=random(6) {
                let at = random(bytes.len());
                match random(4) {
                    0 => bytes[at] = random(256) as u8,
                    1 => bytes[at] ^= 1 << random(8),
                    2 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random(5)],
                    _ => bytes.truncate(at.max(1)),
                }
            }
            let _ = FeatureFile::from_bytes("mutated", bytes.clone()).and_then(|file| file.read());
            let _ = parse_state_dict(&bytes);
        }
    }
}
