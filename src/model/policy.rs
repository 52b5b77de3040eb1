//! What a pass keeps in memory, and what it computes again. Every policy gives the same gradients
//! (docs/giant-bags.md).

use serde::Serialize;

/// How a training step trades memory for time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Policy {
    /// Of each layer keep only input, attention's output and its log-sum-exp; backward computes the
    /// rest again, this many tokens at a time. None keeps everything.
    pub recompute: Option<usize>,
    /// Hold at most this many patches of each bag that the model can read part by part
    /// (`Network::STREAMED`). None holds the bags whole.
    pub stream: Option<usize>,
}

/// Tokens at a time; the second is one piece.
const PIECE: usize = 4096;
const WHOLE: usize = usize::MAX;
/// Patches at a time, the fewer the less memory.
const PARTS: [usize; 4] = [65536, 16384, 4096, 1024];

impl Policy {
    /// Keeps everything and holds bags whole: the fewest operations, the most memory.
    pub const KEEP: Self = Self { recompute: None, stream: None };

    /// All that a plan tries.
    pub fn all() -> impl Iterator<Item = Self> {
        let recompute = [None, Some(WHOLE), Some(PIECE)];
        let stream = std::iter::once(None).chain(PARTS.map(Some));
        stream.flat_map(move |stream| recompute.map(|recompute| Self { recompute, stream }))
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self.recompute {
            None => f.write_str("keep all")?,
            Some(WHOLE) => f.write_str("recompute layers")?,
            Some(rows) => write!(f, "recompute layers, {rows} tokens at a time")?,
        }
        match self.stream {
            None => Ok(()),
            Some(patches) => write!(f, "; stream bags, {patches} patches at a time"),
        }
    }
}

/// The ranges that cover `rows`, `piece` rows each but for the last.
pub(super) fn pieces(rows: usize, piece: Option<usize>) -> impl Iterator<Item = std::ops::Range<usize>> {
    let piece = piece.unwrap_or(WHOLE).clamp(1, rows.max(1));
    (0..rows).step_by(piece).map(move |start| start..rows.min(start + piece))
}
