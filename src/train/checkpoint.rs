//! Files of a run that hold tensors: `best.safetensors`, a model in public parameter names, and
//! `checkpoint.safetensors`, all that an interrupted fold needs to go on bit by bit.
//!
//! Each carries a checksum of itself in its metadata, under `sha256`: the SHA-256 (FIPS 180-4) of
//! the whole file with 64 zeros in the checksum's own place. A file that does not match is an
//! error.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    ops::Range,
    path::Path,
};

use memmap2::Mmap;
use safetensors::{SafeTensors, tensor::Dtype};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use super::{
    config::{Difference, RunConfig},
    step::{Engine, State},
};
use crate::{
    Error, Result,
    data::{
        atomic::write_atomically,
        cohort::Slide,
        digest::{hex, id_digest},
        features::DType,
        safetensors::{Entry, header},
    },
    device::Element,
    model,
};

/// Metadata key of our JSON.
const KEY: &str = "crossfusion";
/// Metadata key of the checksum.
const CHECKSUM: &str = "sha256";
/// What stands in the checksum's place while it is computed.
const BLANK: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// What `best.safetensors` says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelCard {
    /// What the model is built from.
    pub model: model::Config,
    /// The fold that it was trained for.
    pub fold: usize,
    /// The epoch whose weights these are, counted from 0.
    pub epoch: usize,
    /// Validation C-index, where it is defined.
    pub c_index: Option<f64>,
    /// Survival bins of the labels, in months.
    pub bin_edges: Vec<f64>,
    /// Slides and patients whose outcomes its weights were fitted to.
    pub trained_on: Seen,
    /// Slides and patients by whose C-index its epoch was chosen.
    pub chosen_on: Seen,
}

/// Slides and patients that a model has seen, each as the digest of its name
/// ([`id_digest`]), sorted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// Of slides' names, without the extension of a slide file.
    pub slides: Vec<String>,
    /// Of patients, as [`Slide::patient`] names them.
    pub patients: Vec<String>,
}

impl Seen {
    /// The digests of these slides and of their patients.
    pub fn new<'a>(slides: impl Iterator<Item = &'a Slide>) -> Self {
        let (slides, patients): (BTreeSet<_>, BTreeSet<_>) =
            slides.map(|slide| (id_digest(slide.name()), id_digest(slide.patient()))).unzip();
        Self { slides: slides.into_iter().collect(), patients: patients.into_iter().collect() }
    }

    /// Whether the slide is among them, by its name.
    pub fn has_slide(&self, slide: &Slide) -> bool {
        self.slides.binary_search(&id_digest(slide.name())).is_ok()
    }

    /// Whether the slide's patient is among them.
    pub fn has_patient(&self, slide: &Slide) -> bool {
        self.patients.binary_search(&id_digest(slide.patient())).is_ok()
    }
}

/// Writes the model's parameters under their public names.
pub fn save_model<T: Element<Sum = f32>>(path: &Path, engine: &Engine<T>, card: &ModelCard) -> Result<()> {
    let entries = engine.model().layout().entries().iter();
    let tensors = entries.map(|entry| Stored {
        name: entry.name.clone(),
        shape: entry.shape.clone(),
        state: State::Params,
        range: entry.offset..entry.offset + entry.len(),
    });
    save(path, Some(engine), tensors.collect(), card)
}

/// The card of a model file that this program wrote; None if another did.
pub fn read_card(path: &Path) -> Result<Option<ModelCard>> {
    let json = verify(path)?;
    json.map(|json| parse(path, &json)).transpose()
}

/// What a checkpoint belongs to. With anything else a fold would go on, but not as it began, so
/// that is refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    format: u32,
    settings: RunConfig,
    /// Fingerprint of the fold's slides and labels.
    slides: u64,
}

/// Version of the arenas' layout and of the JSON beside them. 2: the projections of queries, keys
/// and values lie side by side. 3: files carry their checksum.
const FORMAT: u32 = 3;

impl Origin {
    /// Data may move to other paths; what it holds is in the fingerprint.
    pub fn new(config: &RunConfig, slides: u64) -> Self {
        Self { format: FORMAT, settings: config.without_machine().without_paths(), slides }
    }

    /// An error that says in what the checkpoint at `path` differs from `now`.
    pub fn check(&self, path: &Path, now: &Self) -> Result<()> {
        self.check_settings(path, &now.settings)?;
        if self.slides != now.slides {
            return Err(Error::file(
                path,
                "was written for other slides: a table, a fold or the features have changed",
            ));
        }
        Ok(())
    }

    /// An error if the checkpoint at `path` was written by other settings, but for those of the
    /// machine and of the data's place.
    pub fn check_settings(&self, path: &Path, now: &RunConfig) -> Result<()> {
        if self.format != FORMAT {
            let message = format!("has format {}, expected {FORMAT}: another version wrote it", self.format);
            return Err(Error::file(path, message));
        }
        match self.settings.difference(now) {
            None => Ok(()),
            Some(Difference { key, one, other }) => {
                let message = format!("was written with {key} = {one}, but config.toml now says {other}");
                Err(Error::file(path, message))
            }
        }
    }
}

/// The arenas of a checkpoint, in this order.
const ARENAS: [(&str, State); 4] =
    [("params", State::Params), ("grads", State::Grads), ("adam_m", State::M), ("adam_v", State::V)];

/// Writes an engine's whole state, with the trainer's as JSON. Without an engine: a finished
/// fold's, which needs no tensors.
pub fn save_state<S: Serialize, T: Element<Sum = f32>>(
    path: &Path,
    engine: Option<&Engine<T>>,
    state: &S,
) -> Result<()> {
    let len = engine.map_or(0, |engine| engine.model().layout().len());
    let arenas = ARENAS.iter().filter(|_| engine.is_some());
    let arenas = arenas.map(|&(name, state)| Stored { name: name.into(), shape: vec![len], state, range: 0..len });
    save(path, engine, arenas.collect(), state)
}

/// Reads the trainer's state of a checkpoint; None if there is no such file.
pub fn read_state<S: DeserializeOwned>(path: &Path) -> Result<Option<S>> {
    if !path.exists() {
        return Ok(None);
    }
    let json = verify(path)?.ok_or_else(|| Error::file(path, "is not a checkpoint of cf-train"))?;
    parse(path, &json).map(Some)
}

/// Puts the arenas of a checkpoint back, whose state [`read_state`] has read and found whole.
pub fn load_state<T: Element<Sum = f32>>(path: &Path, engine: &mut Engine<T>) -> Result<()> {
    let len = engine.model().layout().len();
    for (name, which) in ARENAS {
        for start in (0..len).step_by(PIECE) {
            // mapped anew for each piece: what has been read no longer counts as the process's
            // memory
            let bytes = map(path)?;
            let file = SafeTensors::deserialize(&bytes);
            let file = file.map_err(|e| Error::file(path, format!("is not a safetensors file: {e}")))?;
            let tensor = file.tensor(name).map_err(|_| Error::file(path, format!("lacks the tensor `{name}`")))?;
            let stored = tensor.data().len() / size_of::<f32>();
            if tensor.dtype() != Dtype::F32 || stored != len {
                return Err(Error::file(path, format!("tensor `{name}` has {stored} elements, expected {len}")));
            }
            let piece = start..len.min(start + PIECE);
            let bytes = &tensor.data()[piece.start * size_of::<f32>()..piece.end * size_of::<f32>()];
            engine.write_part(which, piece.start, &bytemuck::pod_collect_to_vec::<u8, f32>(bytes))?;
        }
    }
    engine.round_weights()
}

/// Elements that are held in host memory at a time on their way to or from a file.
const PIECE: usize = 1 << 20;

/// A tensor of a file: part of an arena.
struct Stored {
    name: String,
    shape: Vec<usize>,
    state: State,
    range: Range<usize>,
}

/// A safetensors file, piece by piece: an engine under a memory budget cannot hold a copy of
/// itself.
fn save<S: Serialize, T: Element<Sum = f32>>(
    path: &Path,
    engine: Option<&Engine<T>>,
    tensors: Vec<Stored>,
    json: &S,
) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| Error::file(path, format!("cannot be written: {e}"));
    let json = serde_json::to_string(json).map_err(|e| failed(&e))?;
    let entries = tensors.iter().map(|Stored { name, shape, .. }| Entry { name, dtype: DType::F32, shape });
    let entries: Vec<_> = entries.collect();
    let header = header(&[(KEY, &json), (CHECKSUM, BLANK)], &entries);
    let place = checksum_place(&header, BLANK).ok_or_else(|| failed(&"its header has no place for a checksum"))?;
    write_atomically(path, |file| {
        let mut hash = Sha256::new();
        let mut put = |bytes: &[u8]| {
            hash.update(bytes);
            file.write_all(bytes).map_err(|e| failed(&e))
        };
        put(&header)?;
        for Stored { state, range, .. } in tensors {
            for start in range.clone().step_by(PIECE) {
                let part = start..range.end.min(start + PIECE);
                if let Some(engine) = engine {
                    put(bytemuck::cast_slice(&engine.read_part(state, part)?))?;
                }
            }
        }
        let checksum = hex(&hash.finalize());
        let place = SeekFrom::Start(place.start as u64);
        file.seek(place).and_then(|_| file.write_all(checksum.as_bytes())).map_err(|e| failed(&e))
    })
}

/// Where `checksum` stands in a header. The first match is the right one: in our JSON, which is a
/// string within the header, every quotation mark is escaped.
fn checksum_place(header: &[u8], checksum: &str) -> Option<Range<usize>> {
    let wanted = format!("\"{CHECKSUM}\":\"{checksum}\"");
    let start = header.windows(wanted.len()).position(|window| window == wanted.as_bytes())?;
    let end = start + wanted.len() - 1;
    Some(end - checksum.len()..end)
}

/// Our JSON in a file, whose checksum is checked; None where another program wrote the file.
fn verify(path: &Path) -> Result<Option<String>> {
    let unreadable = |e| Error::file(path, format!("cannot be read: {e}"));
    let metadata = {
        let bytes = map(path)?;
        let (_, header) = SafeTensors::read_metadata(&bytes)
            .map_err(|e| Error::file(path, format!("is not a safetensors file: {e}")))?;
        header.metadata().clone().unwrap_or_default()
    };
    let (json, checksum) = match (metadata.get(KEY), metadata.get(CHECKSUM)) {
        (None, None) => return Ok(None),
        (Some(json), Some(checksum)) if checksum.len() == BLANK.len() => (json, checksum),
        _ => {
            let message = "has no checksum: it is damaged, or a version before 0.2 wrote it";
            return Err(Error::file(path, message));
        }
    };
    // Read, not through the map: the pages of a large checkpoint would count as the process's
    // memory.
    let mut file = File::open(path).map_err(unreadable)?;
    let mut length = [0; size_of::<u64>()];
    file.read_exact(&mut length).map_err(unreadable)?;
    let mut header = vec![0; u64::from_le_bytes(length) as usize]; // the parser has bounded it
    file.read_exact(&mut header).map_err(unreadable)?;
    if let Some(place) = checksum_place(&header, checksum) {
        header[place].copy_from_slice(BLANK.as_bytes());
    }
    let mut hash = Sha256::new();
    hash.update(length);
    hash.update(&header);
    let mut piece = vec![0; PIECE];
    loop {
        match file.read(&mut piece).map_err(unreadable)? {
            0 => break,
            n => hash.update(&piece[..n]),
        }
    }
    if hex(&hash.finalize()) != *checksum {
        return Err(Error::file(path, "is damaged: it does not match its own checksum"));
    }
    Ok(Some(json.clone()))
}

fn map(path: &Path) -> Result<Mmap> {
    let unreadable = |e| Error::file(path, format!("cannot be read: {e}"));
    let file = File::open(path).map_err(unreadable)?;
    if !file.metadata().map_err(unreadable)?.is_file() {
        return Err(Error::file(path, "is a folder or a device, expected a file"));
    }
    // SAFETY: these files are replaced by renaming, never written in place.
    unsafe { Mmap::map(&file) }.map_err(unreadable)
}

fn parse<S: DeserializeOwned>(path: &Path, json: &str) -> Result<S> {
    serde_json::from_str(json)
        .map_err(|e| Error::file(path, format!("holds settings that this version cannot read: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// TCGA's tables name a patient, or a slide's barcode, as the case.
    #[test]
    fn a_patient_is_known_again_by_another_slide() {
        let slide = |case: &str, slide: &str| {
            let (case_id, slide_id) = (case.into(), slide.into());
            Slide { case_id, slide_id, months: 1.0, censored: false }
        };
        let barcode = slide("TCGA-AA-3488-01Z-00-DX1", "TCGA-AA-3488-01Z-00-DX1.svs");
        let seen = Seen::new([&barcode].into_iter());
        for other in ["TCGA-AA-3488", "TCGA-AA-3488-01Z-00-DX2"] {
            let other = slide(other, "TCGA-AA-3488-01Z-00-DX2.svs");
            assert!(seen.has_patient(&other) && !seen.has_slide(&other), "{}", other.case_id);
        }
        assert!(!seen.has_patient(&slide("TCGA-AA-3489", "another.svs")));
    }
}
