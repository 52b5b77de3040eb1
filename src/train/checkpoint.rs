//! Files of a run that hold tensors: `best.safetensors`, a model in public parameter names, and `checkpoint.safetensors`, all that an
//! interrupted fold needs to go on bit by bit.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::Write,
    path::Path,
};

use memmap2::Mmap;

use safetensors::{
    SafeTensors,
    tensor::{Dtype, TensorView},
};
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
    let params = engine.read_state(State::Params)?;
    let layout = &engine.model.layout;
    let tensors = layout.entries().iter().map(|entry| {
        let values = &params[entry.offset..entry.offset + entry.len()];
        (entry.name.clone(), entry.shape.clone(), values)
    });
    save(path, tensors, card)
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

/// Version of the arenas' layout and of the JSON beside them.
const FORMAT: u32 = 1;

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
    let read = |(name, which)| engine.map(|engine| Ok((name, engine.read_state(which)?)));
    let arenas = ARENAS.into_iter().filter_map(read).collect::<Result<Vec<(&str, _)>>>()?;
    let tensors = arenas.iter().map(|(name, values)| (name.to_string(), vec![values.len()], values.as_slice()));
    save(path, tensors, state)
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
    let (bytes, _) = read(path)?;
    let file =
        SafeTensors::deserialize(&bytes).map_err(|e| Error::file(path, format!("is not a safetensors file: {e}")))?;
    for (name, which) in ARENAS {
        let tensor = file.tensor(name).map_err(|_| Error::file(path, format!("lacks the tensor `{name}`")))?;
        let values: Vec<f32> = bytemuck::pod_collect_to_vec(tensor.data());
        if tensor.dtype() != Dtype::F32 || values.len() != engine.model.layout.len() {
            let message =
                format!("tensor `{name}` has {} elements, expected {}", values.len(), engine.model.layout.len());
            return Err(Error::file(path, message));
        }
        engine.write_state(which, &values)?;
    }
    Ok(())
}

fn save<'a, S: Serialize>(
    path: &Path,
    tensors: impl Iterator<Item = (String, Vec<usize>, &'a [f32])>,
    json: &S,
) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| Error::file(path, format!("cannot be written: {e}"));
    let mut views = BTreeMap::new();
    for (name, shape, values) in tensors {
        let view = TensorView::new(Dtype::F32, shape, bytemuck::cast_slice(values)).map_err(|e| failed(&e))?;
        views.insert(name, view);
    }
    let json = serde_json::to_string(json).map_err(|e| failed(&e))?;
    let metadata = HashMap::from([(KEY.to_string(), json)]);
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| failed(&e))?;
    write_atomically(path, |file| file.write_all(&bytes).map_err(|e| failed(&e)))
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
