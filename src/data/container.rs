//! What a file is, by its content.

pub const ZIP_MAGIC: &[u8] = b"PK\x03\x04";
const ZIP_END_MAGIC: &[u8] = b"PK\x05\x06";
/// Bytes of an archive's end without a comment.
pub const ZIP_END: usize = 22;

/// The formats, told apart by content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// What `torch.save` wrote: a zip archive, or pickles.
    Torch,
    Safetensors,
    Hdf5,
}

/// What a file is. One that is several things at once, so that programs would read different things
/// from it, is refused.
pub fn container(bytes: &[u8]) -> Result<Option<Container>, String> {
    let zip = bytes.starts_with(ZIP_MAGIC);
    let kinds = [
        ("a zip archive", Container::Torch, zip || ends_like_zip(bytes)),
        ("a pickle", Container::Torch, bytes.first() == Some(&0x80) && !is_safetensors(bytes)),
        ("a safetensors file", Container::Safetensors, is_safetensors(bytes)),
        ("an HDF5 file", Container::Hdf5, hdf5_start(bytes).is_some()),
    ];
    let mut found = kinds.iter().filter(|(_, _, found)| *found);
    match (found.next(), found.next()) {
        (Some((a, ..)), Some((b, ..))) => {
            Err(format!("is {a} and {b} at once: what it holds depends on who reads it, so it is not read"))
        }
        // what comes before a zip archive belongs to nobody
        (Some(("a zip archive", ..)), None) if !zip => {
            Err("is a zip archive with something in front of it, so it is not read".into())
        }
        (kind, _) => Ok(kind.map(|&(_, container, _)| container)),
    }
}

/// Where an HDF5 file begins: at 0, or behind a user block of 512 bytes, 1024, 2048 and so on.
pub fn hdf5_start(bytes: &[u8]) -> Option<usize> {
    let mut places = std::iter::once(0).chain(std::iter::successors(Some(512usize), |&at| at.checked_mul(2)));
    places.by_ref().take_while(|&at| at < bytes.len()).find(|&at| bytes[at..].starts_with(b"\x89HDF\r\n\x1a\n"))
}

/// Whether the bytes begin like a safetensors file: a header's length that fits, and then JSON.
fn is_safetensors(bytes: &[u8]) -> bool {
    let Some((&length, rest)) = bytes.split_first_chunk() else { return false };
    rest.first() == Some(&b'{') && u64::from_le_bytes(length) <= rest.len() as u64
}

/// Whether a zip archive's end stands where zip readers look for it, right behind what must come
/// before it: the directory of its members, or the locator that large archives have.
fn ends_like_zip(bytes: &[u8]) -> bool {
    let tail = bytes.len().saturating_sub(ZIP_END + usize::from(u16::MAX));
    (tail..bytes.len().saturating_sub(ZIP_END - 1)).any(|at| {
        let end = &bytes[at..at + ZIP_END];
        let directory = u32::from_le_bytes([end[12], end[13], end[14], end[15]]) as usize;
        let follows = |size, magic| at.checked_sub(size).is_some_and(|at| bytes[at..].starts_with(magic));
        end.starts_with(ZIP_END_MAGIC) && (follows(directory, b"PK\x01\x02") || follows(20, b"PK\x06\x07"))
    })
}
