//! Digests: of names, so that a model can say whom it was trained on without naming them, and of
//! the files that a run reads, so that a change of them is noticed.

use std::{fmt::Write as _, fs::File, io, os::unix::fs::FileExt, path::Path};

use sha2::{Digest, Sha256};

/// Bytes at either end of a file that its sample holds.
const END: usize = 16 << 10;
/// Blocks between the ends that the sample holds, and their size in bytes.
const BLOCKS: u64 = 16;
const BLOCK: usize = 4 << 10;

/// Hexadecimal digits, two a byte.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The SHA-256 of these bytes.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// What stands for a slide's or a patient's name in a model's card: 64 bits of its SHA-256. It
/// tells who was seen to those who know the name; short names can be guessed from it.
pub fn id_digest(id: &str) -> String {
    hex(&Sha256::digest(id.as_bytes())[..8])
}

/// The SHA-256 of a file's first and last 16 KiB and of sixteen blocks of 4 KiB spread evenly
/// between them; of the whole file where it is no larger than these together. It goes with the
/// file's length.
pub fn sample(path: &Path) -> io::Result<String> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut hash = Sha256::new();
    let mut take = |start: u64, count: usize| {
        let mut bytes = vec![0; count];
        file.read_exact_at(&mut bytes, start)?;
        hash.update(&bytes);
        io::Result::Ok(())
    };
    let ends = 2 * END as u64;
    if len <= ends + BLOCKS * BLOCK as u64 {
        take(0, len as usize)?;
    } else {
        take(0, END)?;
        let between = len - ends - BLOCK as u64;
        for i in 0..BLOCKS {
            take(END as u64 + between * i / (BLOCKS - 1), BLOCK)?;
        }
        take(len - END as u64, END)?;
    }
    Ok(hex(&hash.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_sha256sum() {
        assert_eq!(sha256(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(id_digest("abc"), "ba7816bf8f01cfea");
    }

    #[test]
    fn a_sample_sees_both_ends_and_every_block() {
        let folder = tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"));
        let path = folder.path().join("file");
        let of =
            |bytes: &[u8]| std::fs::write(&path, bytes).and_then(|()| sample(&path)).unwrap_or_else(|e| panic!("{e}"));
        let small: Vec<u8> = (0..1000).map(|i| i as u8).collect();
        assert_eq!(of(&small), sha256(&small));
        let mut large = vec![7u8; 400_000];
        let before = of(&large);
        let noticed = |at: usize, large: &mut Vec<u8>| {
            large[at] ^= 1;
            let differs = of(large) != before;
            large[at] ^= 1;
            differs
        };
        let last = large.len() - 1;
        let between = large.len() - 2 * END - BLOCK;
        let blocks = (0..BLOCKS as usize).map(|i| END + between * i / (BLOCKS as usize - 1));
        for at in blocks.chain([0, END - 1, last + 1 - END, last]) {
            assert!(noticed(at, &mut large), "byte {at}");
        }
        let seen = (0..large.len()).step_by(997).filter(|&at| noticed(at, &mut large)).count();
        assert!((20..200).contains(&seen), "{seen} of 402 bytes are in the sample"); // about a quarter
    }
}
