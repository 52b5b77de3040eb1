//! Files that are damaged, cut short, or no files.

use super::*;

/// Cut anywhere, a file gives an error, or the same bag where only padding is gone; spoiled
/// anywhere, it never panics.
#[test]
fn damaged_files_are_errors_not_panics() {
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &Path, bytes: &[u8]| {
        if name.extension().unwrap() != "h5" {
            return FeatureFile::from_bytes(name, bytes.to_vec()).and_then(|file| file.read());
        }
        let path = folder.path().join("bag.h5");
        std::fs::write(&path, bytes).unwrap();
        let bag = FeatureFile::open(&path).and_then(|file| file.read());
        std::fs::remove_file(&path).unwrap(); // writing over it would wait for the disk
        bag
    };
    let expected = Array2::from_shape_fn((13, 6), |(i, j)| value(i, j));
    let mut random = 1u64;
    let mut below = |limit: usize| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407); // Knuth's MMIX
        (random >> 33) as usize % limit
    };
    let good = fixtures().join("good");
    for name in names(&good) {
        let path = good.join(&name);
        let bytes = std::fs::read(&path).unwrap();
        for length in (0..bytes.len()).step_by(3) {
            if let Ok(bag) = read(&path, &bytes[..length]) {
                assert_eq!(bag, expected, "{name} cut to {length} bytes");
            }
        }
        for _ in 0..300 {
            let mut spoiled = bytes.clone();
            for _ in 0..1 + below(3) {
                spoiled[below(bytes.len())] = [0, 1, 0x7f, 0x80, 0xff, below(256) as u8][below(6)];
            }
            let _ = read(&path, &spoiled);
        }
    }
}

/// Checked by value and by checksum alone, as `cf-train --check` does.
#[test]
fn verify_says_what_reading_says() {
    for folder in ["good", "bad"] {
        let folder = fixtures().join(folder);
        for name in names(&folder) {
            let Ok(file) = FeatureFile::open(&folder.join(&name)) else { continue };
            let message = |result: crossfusion::Result<()>| result.err().map(|e| e.to_string());
            assert_eq!(message(file.verify()), message(file.read().map(drop)), "{name}");
        }
    }
}

/// What only parts are read of is checked as a whole before the first, and by every new file that
/// comes under the name.
#[test]
fn parts_of_a_damaged_file_are_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bag.pt");
    let mut part = [0f32; 6];
    for (bytes, sound) in [("good/f32.pt", true), ("bad/flipped.pt", false), ("good/f32.pt", true)] {
        std::fs::copy(fixtures().join(bytes), folder.path().join("new")).unwrap();
        std::fs::rename(folder.path().join("new"), &path).unwrap();
        let file = FeatureFile::open(&path).unwrap();
        for _ in 0..2 {
            let read = file.read_rows(12..13, &mut part);
            assert_eq!(read.is_ok(), sound, "{bytes}");
        }
        let streamed = PatchReader { path: path.clone(), patches: 13, features: 6 };
        assert_eq!(streamed.read(12..13, &mut part).is_ok(), sound, "{bytes}");
        let memory = FeatureFile::from_bytes(&path, std::fs::read(&path).unwrap()).unwrap();
        assert_eq!((memory.read_rows(3..4, &mut part).is_ok(), memory.read().is_ok()), (sound, sound), "{bytes}");
    }
}

/// A checksum that blocks on many threads make together is the one of the whole.
#[test]
fn a_flipped_bit_is_found_wherever_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bag.pt");
    write_pt(&path, Array2::from_shape_fn((3000, 17), |(i, j)| (i * 17 + j) as f32).view()).unwrap();
    let sound = std::fs::read(&path).unwrap();
    let first: Vec<u8> = (0..17u8).flat_map(|i| f32::from(i).to_le_bytes()).collect();
    let start = sound.windows(first.len()).position(|bytes| bytes == first).unwrap();
    for at in [0, 65_535, 65_536, 100_001, 3000 * 17 * 4 - 1].map(|at| start + at) {
        let mut flipped = sound.clone();
        flipped[at] ^= 1;
        std::fs::write(&path, flipped).unwrap();
        let message = refusal(&path);
        assert!(message.starts_with("is damaged: its member `archive/data/0` fails its checksum"), "{message}");
    }
    std::fs::write(&path, &sound).unwrap();
    read(&path);
}

#[cfg(unix)]
#[test]
fn folders_pipes_and_devices_are_refused() {
    assert_eq!(refusal(&fixtures()), "is a folder, expected a file");
    assert_eq!(refusal(Path::new("/dev/zero")), "is a device or a pipe, expected a file");
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("bag.pt");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert_eq!(refusal(&pipe), "is a device or a pipe, expected a file");
    let error = read_state_dict(&pipe).unwrap_err();
    assert_eq!(message_about(&pipe, error), "is a device or a pipe, expected a file");
}

/// One bit of each byte is flipped in every kind of file whose format marks all or some of its
/// bytes: no flip gives other numbers in silence, except where the format has no mark
/// (docs/fuzzing.md counts them). Torch's zips mark everything, HDF5 since 1.8 its headers, and
/// with Fletcher-32 its chunks too.
#[test]
fn a_flipped_bit_gives_an_error_or_the_same_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let expected = Array2::from_shape_fn((13, 6), |(i, j)| value(i, j));
    let good = fixtures().join("good");
    // the first chunk is behind 2048 bytes of headers
    let unmarked = |name: &str, bytes: &[u8]| match name {
        "fletcher32_latest.h5" => Some(bytes.len()),
        "fixed_array.h5" | "btree2.h5" | "latest_lzf.h5" => Some(2048),
        _ => bytes.starts_with(b"PK").then_some(bytes.len()),
    };
    let mut files = 0;
    for name in names(&good) {
        let sound = std::fs::read(good.join(&name)).unwrap();
        let Some(marked) = unmarked(&name, &sound) else { continue };
        files += 1;
        for at in 0..marked {
            let mut flipped = sound.clone();
            flipped[at] ^= 1 << (at % 8);
            let path = folder.path().join(format!("{at}-{name}"));
            let bag = if name.ends_with(".h5") {
                std::fs::write(&path, &flipped).unwrap();
                let bag = FeatureFile::open(&path).and_then(|file| file.read());
                std::fs::remove_file(&path).unwrap();
                bag
            } else {
                FeatureFile::from_bytes(&path, flipped).and_then(|file| file.read())
            };
            assert!(bag.is_err() || bag.is_ok_and(|bag| bag == expected), "{name}: bit {} of byte {at}", at % 8);
        }
    }
    assert_eq!(files, 32);
}

/// Counts what becomes of every bit of every good fixture: the table of docs/fuzzing.md.
#[test]
#[ignore = "takes about seven minutes; the test above holds one bit of each marked byte"]
fn every_flipped_bit_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let expected = Array2::from_shape_fn((13, 6), |(i, j)| value(i, j));
    let good = fixtures().join("good");
    // files, flips, noticed, harmless, silent
    let mut counts: BTreeMap<String, [usize; 5]> = BTreeMap::new();
    for name in names(&good) {
        let sound = std::fs::read(good.join(&name)).unwrap();
        let kind = match name.rsplit('.').next() {
            Some("pt") if sound.starts_with(b"PK") => ".pt, zip".into(),
            Some("pt") => ".pt, legacy".into(),
            Some("safetensors") => ".safetensors".into(),
            _ => name.clone(),
        };
        let count = counts.entry(kind).or_default();
        count[0] += 1;
        for bit in 0..8 * sound.len() {
            let mut flipped = sound.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let path = folder.path().join(format!("{bit}-{name}"));
            let bag = if name.ends_with(".h5") {
                std::fs::write(&path, &flipped).unwrap();
                let bag = FeatureFile::open(&path).and_then(|file| file.read());
                std::fs::remove_file(&path).unwrap();
                bag
            } else {
                FeatureFile::from_bytes(&path, flipped).and_then(|file| file.read())
            };
            count[1] += 1;
            count[bag.map_or(2, |bag| if bag == expected { 3 } else { 4 })] += 1;
        }
    }
    for (kind, [files, flips, noticed, harmless, silent]) in &counts {
        println!("| {kind} | {files} | {flips} | {noticed} | {harmless} | {silent} |");
    }
    assert_eq!((counts[".pt, zip"][4], counts["fletcher32_latest.h5"][4]), (0, 0));
}

#[test]
fn memory_of_another_size_is_an_error() {
    let path = fixtures().join("good/f32.pt");
    let file = FeatureFile::open(&path).unwrap();
    for (rows, len) in [(0..14, 84), (0..2, 11), (13..14, 6)] {
        let error = file.read_rows(rows, &mut vec![0f32; len]).unwrap_err();
        assert!(message_about(&path, error).starts_with("was asked for patches"));
    }
}

/// A file that is cut short while it is open: a sentence, where a memory map would end the program.
#[test]
fn a_file_cut_short_while_it_is_read_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.pt");
    let (patches, features) = (5000, 4);
    write_pt(&path, ndarray::Array2::from_elem((patches, features), 1.0f32).view()).unwrap();
    let file = FeatureFile::open(&path).unwrap();
    // the first part that is read checks the whole
    file.read_rows(0..100, &mut vec![0f32; 100 * features]).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(9000).unwrap();
    file.read_rows(0..100, &mut vec![0f32; 100 * features]).unwrap();
    let error = file.read_rows(0..patches, &mut vec![0f32; patches * features]).unwrap_err();
    assert!(message_about(&path, error).starts_with("cannot be read at byte "));
}

/// Blocks are read side by side; what is said of a damaged bag must not depend on which comes
/// first.
#[test]
fn of_several_bad_numbers_the_first_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.pt");
    let (patches, features) = (40_000, 3);
    let mut bag = ndarray::Array2::from_elem((patches, features), 1.0f32);
    for patch in [39_999, 11_000, 30_000] {
        bag[[patch, 1]] = f32::INFINITY;
    }
    write_pt(&path, bag.view()).unwrap();
    let file = FeatureFile::open(&path).unwrap();
    for _ in 0..20 {
        let error = file.read_rows(0..patches, &mut vec![half::bf16::ZERO; patches * features]).unwrap_err();
        assert_eq!(message_about(&path, error), "patch 11000, feature 1 is inf, expected a finite number");
    }
}
