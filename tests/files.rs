//! Feature files and checkpoints as other tools write them, and broken and malicious ones.
//!
//! `tests/fixtures/files` is made by scripts/make-fixtures.py with PyTorch, h5py and safetensors.
//! Further real files are looked for under `../shared/data`, or under the environment variable
//! CROSSFUSION_DATA.
#![cfg(feature = "programs")]

#[path = "files/damaged.rs"]
mod damaged;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crossfusion::data::atomic::write_atomically;
use crossfusion::data::features::{DType, FeatureFile};
use crossfusion::data::patches::PatchReader;
use crossfusion::data::pickle;
use crossfusion::data::torch::{Parameter, read_state_dict, write_pt};
use crossfusion::model::ReadPatches;
use half::{bf16, f16};
use ndarray::{Array2, s};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/files")
}

fn shared(test: &str, folder: &str) -> Option<PathBuf> {
    let root = std::env::var_os("CROSSFUSION_DATA")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"), PathBuf::from);
    let folder = root.join(folder);
    if !folder.is_dir() {
        eprintln!("SKIPPED {test}: {} not found", folder.display());
        return None;
    }
    Some(folder)
}

fn read(path: &Path) -> Array2<f32> {
    FeatureFile::open(path).and_then(|file| file.read()).unwrap_or_else(|e| panic!("{e}"))
}

/// The whole message, of opening or of reading. It must begin with the file's name and be one line.
fn refusal(path: &Path) -> String {
    let error = FeatureFile::open(path).and_then(|file| file.read()).expect_err(&path.display().to_string());
    message_about(path, error)
}

fn message_about(path: &Path, error: crossfusion::Error) -> String {
    let message = error.to_string();
    let rest = message.strip_prefix(&format!("{}: ", path.display())).unwrap_or_else(|| panic!("{message}"));
    assert!(!rest.contains('\n'), "{message}");
    rest.to_string()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// What scripts/make-fixtures.py stores; exact in every float type.
fn value(patch: usize, feature: usize) -> f32 {
    (((patch * 6 + feature) * 7 % 201) as f32 - 100.0) / 64.0
}

#[test]
fn every_good_fixture_holds_the_same_bag() {
    let expected = Array2::from_shape_fn((13, 6), |(i, j)| value(i, j));
    let folder = fixtures().join("good");
    let names = names(&folder);
    assert_eq!(names.len(), 51);
    for name in names {
        let file = FeatureFile::open(&folder.join(&name)).unwrap();
        assert_eq!((file.patches(), file.features()), (13, 6), "{name}");
        assert_eq!(file.read().unwrap(), expected, "{name}");
        // By ranges too, in an order that no reader expects.
        for rows in [9..13, 0..9, 4..4, 5..6] {
            let mut out = vec![f32::NAN; rows.len() * 6];
            file.read_rows(rows.clone(), &mut out).unwrap();
            assert_eq!(out, expected.slice(s![rows, ..]).iter().copied().collect::<Vec<_>>(), "{name}");
        }
    }
}

/// As a giant bag is streamed: from any kind of file, into f32 or rounded to bf16.
#[test]
fn every_good_fixture_streams() {
    let folder = fixtures().join("good");
    for name in names(&folder) {
        let mut reader = PatchReader { path: folder.join(&name), patches: 13, features: 6 };
        for rows in [0..5, 5..10, 10..13, 0..13] {
            let expected: Vec<f32> = rows.clone().flat_map(|i| (0..6).map(move |j| value(i, j))).collect();
            let (mut whole, mut rounded) = (vec![f32::NAN; expected.len()], vec![bf16::NAN; expected.len()]);
            reader.read(rows.clone(), &mut whole).unwrap();
            reader.read(rows, &mut rounded).unwrap();
            assert_eq!(whole, expected, "{name}");
            assert_eq!(rounded, expected.into_iter().map(bf16::from_f32).collect::<Vec<_>>(), "{name}");
        }
        reader.patches = 12;
        let error = reader.read(0..1, &mut [0f32; 6]).unwrap_err().to_string();
        assert!(error.ends_with("has changed: it holds 13 patches of 6 features, and held 12 of 6"), "{error}");
    }
}

#[test]
fn dtypes_are_those_stored() {
    for (name, dtype) in [
        ("f16.pt", DType::F16),
        ("bf16.pt", DType::BF16),
        ("legacy.pt", DType::F32),
        ("f64.pt", DType::F64),
        ("bf16.safetensors", DType::BF16),
        ("stamp.h5", DType::F16),
        ("big_endian_f64.h5", DType::F64),
    ] {
        assert_eq!(FeatureFile::open(&fixtures().join("good").join(name)).unwrap().dtype(), dtype, "{name}");
    }
}

#[test]
fn coordinates_of_h5() {
    let coordinates = |name| FeatureFile::open(&fixtures().join("good").join(name)).unwrap().coordinates().unwrap();
    let expected = Array2::from_shape_fn((13, 2), |(i, xy)| [256, 512][xy] * i as i64);
    assert_eq!(coordinates("clam.h5"), Some(expected.clone()));
    assert_eq!(coordinates("trident.h5"), Some(expected));
    assert_eq!(coordinates("stamp.h5"), None, "in micrometres, not integers");
    assert_eq!(coordinates("latest_lzf.h5"), None);
    assert_eq!(coordinates("f32.pt"), None);
}

#[test]
fn every_bad_fixture_is_refused_with_its_reason() {
    let reasons = [
        (
            "another_name.safetensors",
            "holds no tensor `features` (or `feats`, `embeddings`, `patch_embeddings`, `tile_embeds`, `x`): `slide_mean` float32 [6], `tiles` float16 [1, 13, 6]",
        ),
        ("batch_of_two.pt", "shape [2, 13, 6], expected [patches, features]"),
        ("bfloat16.h5", "holds `features` as bfloat16 (of .h5 files float16, float32 and float64 are read) [13, 6]"),
        ("big_endian.pt", "not little-endian"),
        (
            "bitshuffle.h5",
            "`features` is compressed with bitshuffle (filter 32008), which is not read; rewrite it with gzip or lzf",
        ),
        (
            "blosc.h5",
            "`features` is compressed with Blosc (filter 32001), which is not read; rewrite it with gzip or lzf",
        ),
        ("bool.pt", "holds `features` as bool [13, 6], expected"),
        ("chunk_never_written.h5", "chunk 2 of `features` was never written"),
        ("chunk_never_written_latest.h5", "chunk 2 of `features` was never written"),
        ("complex.pt", "holds complex64 [13, 6], expected floats"),
        ("conjugate.pt", "holds `features` as complex64 [13, 6], expected"),
        (
            "coordinates_alone.pt",
            "holds no tensor `features` (or `feats`, `embeddings`, `patch_embeddings`, `tile_embeds`, `x`): `coords` float32 [13, 2], `feature` int8 [13, 6]",
        ),
        (
            "coordinates_alone.safetensors",
            "holds no tensor `features` (or `feats`, `embeddings`, `patch_embeddings`, `tile_embeds`, `x`): `coords` float32 [13, 2], `patch_level` int64 [13, 2]",
        ),
        (
            "dict_of_another_name.pt",
            "holds no tensor `features` (or `feats`, `embeddings`, `patch_embeddings`, `tile_embeds`, `x`): `coords` int64 [13, 2], `embedding` float32 [13, 6]",
        ),
        ("empty.h5", "empty bag: 0 patches"),
        ("empty.pt", "empty bag: 0 patches"),
        ("expanded.pt", "its storage holds 78 numbers"),
        ("external.h5", "keeps `features` in other files"),
        ("external_link.h5", "holds `features` as a link to somewhere else"),
        ("features_are_text.pt", "holds `features` as text"),
        ("flipped.pt", "is damaged: its member `f32/data/0` fails its checksum"),
        ("flipped_beside_the_view.pt", "is damaged: its member `sliced_view/data/0` fails its checksum"),
        ("flipped_fletcher32.h5", "is damaged: chunk 1 of `features` fails its checksum"),
        ("float8.h5", "holds `features` as a float of 8 bits (4 of exponent, 3 of mantissa) [13, 6]"),
        ("float8.pt", "holds `features` as float8_e4m3fn [13, 6], expected"),
        ("group.h5", "holds `features` as a group of [`uni`], expected a dataset"),
        ("hole.safetensors", "not a sound safetensors file"),
        ("infinite.safetensors", "patch 4, feature 2 is -inf"),
        ("int64.h5", "holds `features` as int64 [13, 2], expected"),
        ("int64.pt", "holds int64 [13, 2], expected floats"),
        ("int64.safetensors", "holds `features` as int64 [13, 2], expected"),
        ("int8_and_x.pt", "holds `features` as int8 [13, 6], expected"),
        ("junk_before.pt", "is a zip archive with something in front of it"),
        ("junk_behind.safetensors", "not a sound safetensors file"),
        ("junk_behind_legacy.pt", "has 4 bytes behind its last storage"),
        ("list.pt", "holds a list without names, expected a tensor or a dict with `features`: float32 [13, 6]"),
        ("lz4.h5", "`features` is compressed with LZ4 (filter 32004)"),
        ("malicious.pt", "`posix.system`, which is not allowed"),
        ("malicious_plain_pickle.pt", "`posix.system`, which is not allowed"),
        ("member_twice.pt", "duplicate file names"),
        ("meta.pt", "holds `features` as a tensor without numbers (on device `meta`)"),
        ("nan.h5", "patch 9, feature 0 is NaN"),
        ("nan.pt", "patch 4, feature 2 is NaN"),
        ("nested.pt", "holds `features` as a nested tensor"),
        ("never_written.h5", "more than a file of 1400 bytes can hold"),
        ("no_bytes.pt", "empty file (0 bytes)"),
        (
            "no_features.h5",
            "holds no dataset `features` (or `feats`, `embeddings`, `patch_embeddings`, `tile_embeds`, `x`): `coords` int64 [13, 2]",
        ),
        ("not_a_tensor.pt", "not a feature file"),
        ("numpy_int64.pt", "holds `features` as int64 [13, 2], expected"),
        ("numpy_text.pt", "holds `features` as text [1, 1], expected"),
        ("one_dimension.pt", "shape [6], expected [patches, features]"),
        ("overlap.safetensors", "not a sound safetensors file"),
        (
            "pair_of_bags.pt",
            "holds a list without names, expected a tensor or a dict with `features`: float32 [13, 6], float32 [13, 6]",
        ),
        ("quantized.pt", "holds `features` as a quantized tensor"),
        ("scaleoffset.h5", "`features` is compressed with scale-offset (filter 6)"),
        ("short_storage.pt", "its storage should hold 78 numbers"),
        ("sparse.pt", "holds a sparse tensor"),
        ("sparse_csr.pt", "holds `features` as a sparse tensor"),
        ("too_large_for_f32.pt", "patch 12, feature 5 is inf"),
        ("truncated.h5", "is truncated: 1206 bytes of 2412"),
        ("truncated.pt", "truncated or damaged .pt file"),
        ("truncated.safetensors", "not a sound safetensors file"),
        ("truncated_legacy.pt", "is truncated: a storage of 78 numbers"),
        (
            "two_matrices.safetensors",
            "holds no tensor `features` (or `feats`, `embeddings`, `patch_embeddings`, `tile_embeds`, `x`): `a` float32 [13, 6], `b` float32 [13, 6]",
        ),
        ("two_names.pt", "holds `features` float32 [13, 6] and `embeddings` float32 [13, 3], expected one of them"),
        ("uint16.pt", "holds `features` as uint16 [13, 2], expected"),
        ("virtual.h5", "keeps `features` in other files"),
        ("with_comment.pt", "something in front of it or behind it"),
        (
            "x_and_y.pt",
            "holds no tensor `features` (or `feats`, `embeddings`, `patch_embeddings`, `tile_embeds`, `x`): `x` float32 [13, 1], `y` float32 [13, 1]",
        ),
        ("zip_before.pt", "something in front of it or behind it"),
        ("zip_behind.h5", "is a zip archive and an HDF5 file at once"),
        ("zip_behind_legacy.pt", "is a zip archive and a pickle at once"),
        ("zip_in_user_block.h5", "is a zip archive and an HDF5 file at once"),
        ("zip_inside.safetensors", "is a zip archive and a safetensors file at once"),
        ("zstd.h5", "`features` is compressed with Zstandard (filter 32015)"),
    ];
    let folder = fixtures().join("bad");
    assert_eq!(names(&folder), reasons.map(|(name, _)| name));
    for (name, reason) in reasons {
        let message = refusal(&folder.join(name));
        assert!(message.contains(reason), "{name}: {message}");
    }
    assert!(!Path::new("crossfusion_pickle_ran").exists());
    assert!(refusal(&folder.join("absent.pt")).starts_with("cannot be read: "));
}

#[test]
fn what_is_quoted_cannot_disturb_a_terminal() {
    let header = br#"{"\u001b]0;title\u0007":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}"#;
    for length in [header.len(), header.len() - 1] {
        let bytes = [&(length as u64).to_le_bytes(), &header[..], &[0; 4]].concat();
        let error = FeatureFile::from_bytes(Path::new("bag"), bytes).err().unwrap().to_string();
        assert!(!error.contains(char::is_control), "{error:?}");
    }
}

#[test]
fn pickles_are_never_trusted() {
    let deep = [b"\x80\x02".as_slice(), &b"(".repeat(3_000_000)].concat();
    let wide_tensor = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n\
        X\x01\0\0\x000X\x03\0\0\0cpuK\x01tQK\0(KKKKKKKKKKKKKKKKKKt(K\x01ttR.";
    for (pickle, reason) in [
        (&b"\x80\x02cos\nsystem\n."[..], "it refers to `os.system`, which is not allowed (at byte 2 of the pickle)"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "it refers to `builtins.eval`"),
        (b"\x80\x02(S'ls'\nios\nsystem\n.", "opcode 0x53 ('S') is not allowed"),
        (b"\x80\x02)\x81.", "opcode 0x81"),
        (b"\x80\x02\x82\x01.", "opcode 0x82"),
        (b"\x80\x09N.", "protocol 9"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "it calls something that is not a function"),
        (b"\x80\x02ccollections\nOrderedDict\nNR.", "with something that is not a tuple"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "RebuildTensor is called with arguments"),
        (b"\x80\x02NNb.", "sets attributes"),
        (b"\x80\x02)Q.", "a storage is described"),
        (b"\x80\x02N(0.", "its stack runs empty"),
        (b"\x80\x02t.", "no mark"),
        (b"\x80\x02h\x07.", "it recalls object 7"),
        (b"\x80\x02}(Nu.", "a key without a value"),
        (b"\x80\x02X\xff\xff\xff\xffabc", "it ends too early"),
        (b"\x80\x02X\x01\0\0\0\xff.", "not UTF-8"),
        (b"\x80\x02\x8a\x1100000000000000000.", "longer than 16 bytes"),
        (b"", "it ends too early"),
        (wide_tensor, "9 dimensions, expected at most 8"),
        (&deep, "more than 2097152 opcodes"),
    ] {
        let message = pickle::load(pickle).expect_err(reason);
        assert!(message.contains(reason), "{message}");
    }
    // A list that holds itself is data like any other.
    assert_eq!(pickle::load(b"\x80\x02]q\x00h\x00a.rest").unwrap().1, 9);
}

#[test]
fn bags_are_rounded_to_the_type_that_is_asked_for() {
    let file = FeatureFile::open(&fixtures().join("good/f32.pt")).unwrap();
    let len = file.patches() * file.features();
    let (mut exact, mut rounded) = (vec![0f32; len], vec![half::bf16::ZERO; len]);
    file.read_rows(0..file.patches(), &mut exact).unwrap();
    file.read_rows(0..file.patches(), &mut rounded).unwrap();
    assert_eq!(rounded, exact.iter().map(|&x| half::bf16::from_f32(x)).collect::<Vec<_>>());
}

#[test]
fn a_bag_can_be_read_by_several_threads() {
    let file = FeatureFile::open(&fixtures().join("good/clam.h5")).unwrap();
    std::thread::scope(|scope| {
        for patch in 0..13 {
            let file = &file;
            scope.spawn(move || {
                let mut out = [0f32; 6];
                file.read_rows(patch..patch + 1, &mut out).unwrap();
                assert_eq!(out, std::array::from_fn(|feature| value(patch, feature)));
            });
        }
    });
}

#[test]
fn checkpoints_agree_in_every_wrapping() {
    let folder = fixtures().join("checkpoints");
    let bare = read_state_dict(&folder.join("bare.pt")).unwrap();
    let names: Vec<&str> = bare.keys().map(String::as_str).collect();
    assert_eq!(names, ["0.bias", "0.weight", "1.bias", "1.running_mean", "1.running_var", "1.weight"]);
    assert_eq!(bare["0.weight"], Parameter { shape: vec![2, 3], values: vec![0.0, 0.25, 0.5, 0.75, 1.0, 1.25] });
    assert_eq!(bare["1.running_var"], Parameter { shape: vec![2], values: vec![1.0, 1.0] });
    for name in [
        "data_parallel.pt",
        "nested.pt",
        "legacy.pt",
        "bare.safetensors",
        "compiled.pt",
        "lightning.pt",
        "stacked.pt",
        "two_prefixes.safetensors",
    ] {
        assert_eq!(read_state_dict(&folder.join(name)).unwrap(), bare, "{name}");
    }
}

#[test]
fn what_is_no_checkpoint_is_refused() {
    let reason = |path: PathBuf| message_about(&path, read_state_dict(&path).expect_err("a refusal"));
    assert!(reason(fixtures().join("checkpoints/nan.pt")).contains("tensor `0.bias` holds NaN at element 1"));
    assert!(reason(fixtures().join("bad/malicious.pt")).contains("`posix.system`"));
    let flipped = reason(fixtures().join("checkpoints/flipped.pt"));
    assert!(flipped.contains("member `bare/data/0` fails its checksum"), "{flipped}");
    assert!(reason(fixtures().join("bad/zip_inside.safetensors")).contains("at once"));
    assert_eq!(reason(fixtures()), "is a folder, expected a file");
    assert!(reason(fixtures().join("bad/list.pt")).contains("holds no state dict"));
    assert!(reason(fixtures().join("bad/truncated.pt")).contains("truncated or damaged"));
    assert!(reason(fixtures().join("bad/not_a_tensor.pt")).contains("not a checkpoint"));
    assert!(reason(fixtures().join("bad/int64.safetensors")).contains("holds no float tensors"));
    assert!(reason(fixtures().join("good/clam.h5")).contains("not a checkpoint"));
}

#[test]
fn written_bags_read_back_and_are_aligned() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bag.pt");
    let bag = Array2::from_shape_fn((37, 24), |(i, j)| (i as f32 + 1.0).sin() / (j as f32 + 0.3));
    for view in [bag.view(), bag.t(), bag.slice(s![3..9, ..;5])] {
        write_pt(&path, view).unwrap();
        assert_eq!(read(&path), view);
        let stored = std::fs::read(&path).unwrap();
        let first: Vec<u8> = view.rows().into_iter().next().unwrap().iter().flat_map(|x| x.to_le_bytes()).collect();
        let at = stored.windows(first.len()).position(|bytes| bytes == first).unwrap();
        assert_eq!(at % 64, 0);
    }
    assert_eq!(names(folder.path()), ["bag.pt"], "no temporary file stays");
}

#[test]
fn a_failed_write_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, "old").unwrap();
    let failed = write_atomically(&path, |file| {
        std::io::Write::write_all(file, b"half of the new").unwrap();
        Err(crossfusion::Error::file("elsewhere", "failed"))
    });
    assert_eq!(failed.unwrap_err().to_string(), "elsewhere: failed");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
    assert_eq!(names(folder.path()), ["file"]);

    let absent = folder.path().join("absent/file");
    let error = write_atomically(&absent, |_| Ok(())).unwrap_err();
    assert!(message_about(&absent, error).starts_with("cannot be written: "));
}

// Real files, which a clone does not have.

#[test]
fn shared_files_hold_one_tensor() {
    let Some(folder) = shared("shared_files_hold_one_tensor", "files") else { return };
    let bag = read(&folder.join("f32.pt"));
    assert_eq!(bag.dim(), (37, 24));
    let same =
        "batch_of_one.pt clam.h5 dict.pt f64.pt legacy.pt parameter.pt sliced_view.pt transposed_view.pt trident.h5";
    for name in same.split(' ') {
        assert_eq!(read(&folder.join(name)), bag, "{name}");
    }
    assert_eq!(read(&folder.join("f16.pt")), bag.mapv(|x| f16::from_f32(x).to_f32()));
    assert_eq!(read(&folder.join("bf16.pt")), bag.mapv(|x| bf16::from_f32(x).to_f32()));
}

#[test]
fn shared_bad_files_are_refused() {
    let Some(folder) = shared("shared_bad_files_are_refused", "files") else { return };
    for (name, reason) in [
        ("empty.pt", "empty bag: 0 patches"),
        ("malicious.pt", "`posix.system`"),
        ("nan.pt", "patch 3, feature 5 is NaN"),
        ("not_a_tensor.pt", "not a feature file"),
        ("truncated.pt", "truncated or damaged .pt file"),
        ("best_model.pt", "holds no tensor `features`"),
    ] {
        let message = refusal(&folder.join(name));
        assert!(message.contains(reason), "{name}: {message}");
    }
}

#[test]
fn shared_checkpoints_agree() {
    let Some(folder) = shared("shared_checkpoints_agree", "files") else { return };
    let parameters: BTreeMap<String, Parameter> = read_state_dict(&folder.join("best_model.pt")).unwrap();
    assert_eq!(parameters, read_state_dict(&folder.join("best_model_data_parallel.pt")).unwrap());
    assert_eq!(parameters["cls_token"].shape, [1, 1, 32]);
    assert_eq!(parameters["c_lin_proj.0.weight"].shape, [32, 48]);
    for (name, Parameter { shape, values }) in &parameters {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
    }
}

#[test]
fn real_slides_agree_between_pt_and_h5() {
    let Some(folder) = shared("real_slides_agree_between_pt_and_h5", "features/efficientnet_lite0") else { return };
    for scale in ["x5", "x10", "x20"] {
        let pt_files = folder.join(scale).join("pt_files");
        let slides = names(&pt_files);
        assert!(!slides.is_empty());
        for slide in slides {
            let h5 = folder.join(scale).join("h5_files").join(&slide).with_extension("h5");
            let bag = read(&pt_files.join(&slide));
            assert_eq!(bag.ncols(), 1280);
            assert_eq!(read(&h5), bag, "{scale}/{slide}");
            let coordinates = FeatureFile::open(&h5).unwrap().coordinates().unwrap().unwrap();
            assert_eq!(coordinates.nrows(), bag.nrows());
        }
    }
}
