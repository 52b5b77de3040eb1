//! Files of a run that hold tensors: `best.safetensors`, a model in public parameter names, and `checkpoint.safetensors`, all that an
//! interrupted fold needs to go on bit by bit.

use std::{fs::File, io::Write, ops::Range, path::Path};

use memmap2::Mmap;
use safetensors::{SafeTensors, tensor::Dtype};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    config::RunConfig,
    step::{Engine, State},
};
use crate::{Error, Result, data::atomic::write_atomically, device::Element, model};

/// Metadata key of our JSON.
const KEY: &str = "crossfusion";

/// What `best.safetensors` says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelCard {
    pub model: model::Config,
    pub fold: usize,
    pub epoch: usize,
    /// Validation C-index, where it is defined.
    pub c_index: Option<f64>,
    /// Survival bins of the labels, in months.
    pub bin_edges: Vec<f64>,
}

/// Writes the model's parameters under their public names.
pub fn save_model<T: Element<Sum = f32>>(path: &Path, engine: &Engine<T>, card: &ModelCard) -> Result<()> {
    let entries = engine.model.layout.entries().iter();
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
    let (_, metadata) = read(path)?;
    metadata.map(|json| parse(path, &json)).transpose()
}

/// What a checkpoint belongs to. With anything else a fold would go on, but not as it began, so that is refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    format: u32,
    settings: RunConfig,
    /// Fingerprint of the fold's slides and labels.
    slides: u64,
}

/// Version of the arenas' layout and of the JSON beside them. 2: queries', keys' and values' projections side by side.
const FORMAT: u32 = 2;

impl Origin {
    /// Data may move to other paths; what it holds is in the fingerprint.
    pub fn new(config: &RunConfig, slides: u64) -> Self {
        let RunConfig { clinical, manifest, splits, pt_dir, .. } = RunConfig::default();
        let settings = RunConfig { clinical, manifest, splits, pt_dir, ..config.without_machine() };
        Self { format: FORMAT, settings, slides }
    }

    /// An error that says in what the checkpoint at `path` differs from `now`.
    pub fn check(&self, path: &Path, now: &Self) -> Result<()> {
        if self.format != now.format {
            let message = format!("has format {}, expected {}: another version wrote it", self.format, now.format);
            return Err(Error::file(path, message));
        }
        if self.settings != now.settings {
            let keys = |origin: &Self| toml::Table::try_from(&origin.settings).unwrap_or_default();
            let (before, now) = (keys(self), keys(now));
            let changed = before.keys().chain(now.keys()).find(|key| before.get(*key) != now.get(*key));
            let key = changed.map_or("", String::as_str);
            let of = |table: &toml::Table| table.get(key).map_or("absent".into(), toml::Value::to_string);
            let message = format!("was written with {key} = {}, but config.toml now says {}", of(&before), of(&now));
            return Err(Error::file(path, message));
        }
        if self.slides != now.slides {
            return Err(Error::file(
                path,
                "was written for other slides: a table, a fold or the features have changed",
            ));
        }
        Ok(())
    }
}

/// The arenas of a checkpoint, in this order.
const ARENAS: [(&str, State); 4] =
    [("params", State::Params), ("grads", State::Grads), ("adam_m", State::M), ("adam_v", State::V)];

/// Writes an engine's whole state, with the trainer's as JSON. Without an engine: a finished fold's, which needs no tensors.
pub fn save_state<S: Serialize, T: Element<Sum = f32>>(
    path: &Path,
    engine: Option<&Engine<T>>,
    state: &S,
) -> Result<()> {
    let len = engine.map_or(0, |engine| engine.model.layout.len());
    let arenas = ARENAS.iter().filter(|_| engine.is_some());
    let arenas = arenas.map(|&(name, state)| Stored { name: name.into(), shape: vec![len], state, range: 0..len });
    save(path, engine, arenas.collect(), state)
}

/// Reads the trainer's state of a checkpoint; None if there is no such file.
pub fn read_state<S: DeserializeOwned>(path: &Path) -> Result<Option<S>> {
    if !path.exists() {
        return Ok(None);
    }
    let (_, metadata) = read(path)?;
    let json = metadata.ok_or_else(|| Error::file(path, "is not a checkpoint of cf-train"))?;
    parse(path, &json).map(Some)
}

/// Puts a checkpoint's arenas back.
pub fn load_state<T: Element<Sum = f32>>(path: &Path, engine: &mut Engine<T>) -> Result<()> {
    let len = engine.model.layout.len();
    for (name, which) in ARENAS {
        for start in (0..len).step_by(PIECE) {
            // mapped anew for each piece: what has been read no longer counts as the process's memory
            let (bytes, _) = read(path)?;
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

/// A safetensors file, piece by piece: an engine under a memory budget has no room for a copy of itself.
fn save<S: Serialize, T: Element<Sum = f32>>(
    path: &Path,
    engine: Option<&Engine<T>>,
    tensors: Vec<Stored>,
    json: &S,
) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| Error::file(path, format!("cannot be written: {e}"));
    let json = serde_json::to_string(json).map_err(|e| failed(&e))?;
    let mut header = serde_json::json!({ "__metadata__": { KEY: json } });
    let mut end = 0;
    for tensor in &tensors {
        let start = end;
        end += tensor.range.len() * size_of::<f32>();
        header[&tensor.name] =
            serde_json::json!({ "dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end] });
    }
    let mut header = header.to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    write_atomically(path, |file| {
        let mut put = |bytes: &[u8]| file.write_all(bytes).map_err(|e| failed(&e));
        put(&(header.len() as u64).to_le_bytes())?;
        put(&header)?;
        for Stored { state, range, .. } in tensors {
            for start in range.clone().step_by(PIECE) {
                let part = start..range.end.min(start + PIECE);
                if let Some(engine) = engine {
                    put(bytemuck::cast_slice(&engine.read_part(state, part)?))?;
                }
            }
        }
        Ok(())
    })
}

/// A file's bytes, and our JSON if it has any.
fn read(path: &Path) -> Result<(Mmap, Option<String>)> {
    let open = || {
        let file = File::open(path)?;
        // SAFETY: these files are replaced by renaming, never written in place.
        unsafe { Mmap::map(&file) }
    };
    let bytes = open().map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
    let (_, metadata) =
        SafeTensors::read_metadata(&bytes).map_err(|e| Error::file(path, format!("is not a safetensors file: {e}")))?;
    let json = metadata.metadata().as_ref().and_then(|m| m.get(KEY)).cloned();
    Ok((bytes, json))
}

fn parse<S: DeserializeOwned>(path: &Path, json: &str) -> Result<S> {
    serde_json::from_str(json)
        .map_err(|e| Error::file(path, format!("holds settings that this version cannot read: {e}")))
}
