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

/// Writes a slide of one level, an uncompressed tiled TIFF, whose pixels `colour` gives.
pub fn write_slide(path: &Path, width: usize, height: usize, colour: impl Fn(usize, usize) -> [u8; 3]) {
    const TILE: usize = 256;
    let tiles = [width.div_ceil(TILE), height.div_ceil(TILE)];
    let count = (tiles[0] * tiles[1]) as u32;
    // behind the header: bits of the three channels, where each tile begins, and its bytes
    let (bits, offsets, bytes) = (8u32, 14u32, 14 + 4 * count);
    let directory = bytes + 4 * count;
    let entries: [(u16, u16, u32, u32); 10] = [
        (256, 4, 1, width as u32),
        (257, 4, 1, height as u32),
        (258, 3, 3, bits),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (277, 3, 1, 3),
        (322, 4, 1, TILE as u32),
        (323, 4, 1, TILE as u32),
        (324, 4, count, offsets),
        (325, 4, count, bytes),
    ];
    let data = directory + 2 + 12 * entries.len() as u32 + 4;
    let size = (3 * TILE * TILE) as u32;
    let mut file = b"II*\0".to_vec();
    file.extend(directory.to_le_bytes());
    file.extend([8, 0, 8, 0, 8, 0]);
    file.extend((0..count).flat_map(|tile| (data + tile * size).to_le_bytes()));
    file.extend((0..count).flat_map(|_| size.to_le_bytes()));
    file.extend((entries.len() as u16).to_le_bytes());
    for (tag, kind, count, value) in entries {
        file.extend(tag.to_le_bytes());
        file.extend(kind.to_le_bytes());
        file.extend(count.to_le_bytes());
        file.extend(value.to_le_bytes());
    }
    file.extend([0; 4]);
    for tile in 0..count as usize {
        let (left, top) = (tile % tiles[0] * TILE, tile / tiles[0] * TILE);
        file.extend((0..TILE * TILE).flat_map(|i| colour(left + i % TILE, top + i / TILE)));
    }
    std::fs::write(path, file).unwrap();
}
