//! Whole models: made or loaded, planned, evaluated, trained, saved.

use std::{
    ffi::{CStr, CString, c_char},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use engine::{
    Error, Result,
    device::Real,
    eval::Network,
    loss::Prediction,
    model::{BagSizes, Bags, Config, Fusion, Model, ModelName, Policy, Scale, Scales},
    ops::Draw,
    train::{
        checkpoint::{self, ModelCard, Seen},
        step::{Engine, Memory, Plan, State},
    },
};
use half::bf16;

use crate::{
    array, cf_status,
    context::cf_context,
    dlpack::{DLTensor, Place, Stored, host_rows},
    given, given_mut, guard,
    ops::{cf_adam, cf_dropout, cf_loss},
    usage,
};

/// Which model, as the command line names them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum cf_model_name {
    CF_CROSSFUSION = 0,
    CF_CROSSFUSION_CONCAT = 1,
    CF_CROSSFUSION_SINGLE = 2,
}

/// How the streams are fused.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum cf_fusion {
    CF_CONV2D = 0,
    CF_CONV1D = 1,
}

/// How weights and activations are stored; arithmetic and master weights are f32.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum cf_precision {
    CF_F32 = 0,
    CF_BF16 = 1,
}

/// What a model is built from.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct cf_config {
    /// A `cf_model_name`.
    pub model: i32,
    /// Width of the patch features.
    pub features: u32,
    /// Width of the model; published: 512.
    pub dim: u32,
    /// Published: 4.
    pub heads: u32,
    /// Published: 1.
    pub layers: u32,
    /// Time bins; published: 4.
    pub n_classes: u32,
    /// A `cf_fusion`.
    pub fusion: i32,
    /// Published: 0.3.
    pub ffn_dropout: f64,
    /// Published: 0.2.
    pub attention_dropout: f64,
    /// Published: 0.3.
    pub fusion_dropout: f64,
}

impl cf_config {
    fn get(&self) -> Result<Config> {
        let model = match self.model {
            n if n == cf_model_name::CF_CROSSFUSION as i32 => ModelName::CrossFusion,
            n if n == cf_model_name::CF_CROSSFUSION_CONCAT as i32 => ModelName::CrossFusionConcat,
            n if n == cf_model_name::CF_CROSSFUSION_SINGLE as i32 => ModelName::CrossFusionSingle,
            other => return Err(usage(format!("model = {other}: expected 0 to 2"))),
        };
        let fusion = match self.fusion {
            n if n == cf_fusion::CF_CONV2D as i32 => Fusion::Conv2d,
            n if n == cf_fusion::CF_CONV1D as i32 => Fusion::Conv1d,
            other => return Err(usage(format!("fusion = {other}: expected 0 (conv2d) or 1 (conv1d)"))),
        };
        Ok(Config {
            model,
            features: self.features as usize,
            dim: self.dim as usize,
            heads: self.heads as usize,
            layers: self.layers as usize,
            n_classes: self.n_classes as usize,
            fusion,
            ffn_dropout: self.ffn_dropout,
            attention_dropout: self.attention_dropout,
            fusion_dropout: self.fusion_dropout,
        })
    }

    fn of(config: &Config) -> Self {
        Self {
            model: match config.model {
                ModelName::CrossFusion => cf_model_name::CF_CROSSFUSION,
                ModelName::CrossFusionConcat => cf_model_name::CF_CROSSFUSION_CONCAT,
                ModelName::CrossFusionSingle => cf_model_name::CF_CROSSFUSION_SINGLE,
            } as i32,
            features: config.features as u32,
            dim: config.dim as u32,
            heads: config.heads as u32,
            layers: config.layers as u32,
            n_classes: config.n_classes as u32,
            fusion: match config.fusion {
                Fusion::Conv2d => cf_fusion::CF_CONV2D,
                Fusion::Conv1d => cf_fusion::CF_CONV1D,
            } as i32,
            ffn_dropout: config.ffn_dropout,
            attention_dropout: config.attention_dropout,
            fusion_dropout: config.fusion_dropout,
        }
    }
}

/// The published model for features of a width.
///
/// # Safety
/// `out` must be null or a config.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_config_published(features: u32, out: *mut cf_config) -> cf_status {
    guard(|| {
        // SAFETY: the caller's.
        *unsafe { given_mut("out", out) }? = cf_config::of(&Config::new(features as usize));
        Ok(())
    })
}

enum Any {
    F32(Engine<f32>),
    Bf16(Engine<bf16>),
}

/// Runs `$work` with `$engine` of either type.
macro_rules! either {
    ($any:expr, $engine:ident => $work:expr) => {
        match $any {
            Any::F32($engine) => $work,
            Any::Bf16($engine) => $work,
        }
    };
}

/// A model with its parameters, gradients and Adam's moments. Calls on one model run one after
/// another, from any thread.
pub struct cf_model {
    engine: Mutex<Any>,
    names: Vec<CString>,
}

impl cf_model {
    fn new(context: &cf_context, config: &Config, precision: i32, seed: u64) -> Result<Self> {
        let device = context.shared_device();
        let engine = match precision {
            n if n == cf_precision::CF_F32 as i32 => Any::F32(Engine::new(device, config, seed)?),
            n if n == cf_precision::CF_BF16 as i32 => Any::Bf16(Engine::new(device, config, seed)?),
            other => return Err(usage(format!("precision = {other}: expected 0 (f32) or 1 (bf16)"))),
        };
        let name = |name: &String| CString::new(name.as_str()).unwrap_or_default();
        let names = model(&engine).layout().entries().iter().map(|entry| name(&entry.name)).collect();
        Ok(Self { engine: Mutex::new(engine), names })
    }

    fn lock(&self) -> MutexGuard<'_, Any> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn model(engine: &Any) -> &Model {
    either!(engine, engine => engine.model())
}

/// # Safety
/// `path` must be null or a C string.
unsafe fn path(path: *const c_char) -> Result<PathBuf> {
    // SAFETY: the caller's.
    let text = unsafe { CStr::from_ptr(given("path", path)?) };
    let text = text.to_str().map_err(|_| usage(format!("path {text:?} is not UTF-8")))?;
    Ok(Path::new(text).to_path_buf())
}

/// A fresh model, initialised from the seed as PyTorch would.
///
/// # Safety
/// Pointers must be null or live; `out` takes a model, which [`cf_model_free`] takes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_model_create(
    context: *const cf_context,
    config: *const cf_config,
    precision: i32,
    seed: u64,
    out: *mut *mut cf_model,
) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let (context, out) = (given("context", context)?, given_mut("out", out)?);
        *out = std::ptr::null_mut();
        let config = given("config", config)?.get()?;
        *out = Box::into_raw(Box::new(cf_model::new(context, &config, precision, seed)?));
        Ok(())
    })
}

/// The model of a checkpoint: `best.safetensors` of cf-train, or a published `.pt`, whose heads leave
/// no trace in it and are given (published: 4; 0 where the file says it).
///
/// # Safety
/// As [`cf_model_create`]; `path` must be null or a C string in UTF-8.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_model_load(
    context: *const cf_context,
    path: *const c_char,
    heads: u32,
    precision: i32,
    out: *mut *mut cf_model,
) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let (context, out) = (given("context", context)?, given_mut("out", out)?);
        *out = std::ptr::null_mut();
        let path = self::path(path)?;
        let Network { card, config, tensors } = Network::read(&path, (heads != 0).then_some(heads as usize))?;
        if card.is_none() && heads == 0 {
            return Err(usage(format!("{}: heads = 0, and the file does not say", path.display())));
        }
        let made = cf_model::new(context, &config, precision, 0)?;
        either!(&mut *made.lock(), engine => engine.load(&tensors)).map_err(|e| Error::file(&path, e))?;
        *out = Box::into_raw(Box::new(made));
        Ok(())
    })
}

/// Ends a model; null does nothing.
///
/// # Safety
/// `model` must be null or a model that no call uses now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_model_free(model: *mut cf_model) {
    if !model.is_null() {
        guard(|| {
            // SAFETY: the caller's; it is from `Box::into_raw`.
            drop(unsafe { Box::from_raw(model) });
            Ok(())
        });
    }
}

/// What the model is built from.
///
/// # Safety
/// Pointers must be null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_model_config(model: *const cf_model, out: *mut cf_config) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let any = given("model", model)?.lock();
        *given_mut("out", out)? = cf_config::of(self::model(&any).config());
        Ok(())
    })
}

/// Steps may take so many bytes at their peak, the model's state included; 0: as many as they like.
/// What does not fit is computed again.
///
/// # Safety
/// As [`cf_model_config`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_model_set_memory(model: *const cf_model, bytes: u64) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let memory = if bytes == 0 { Memory::Policy(Policy::KEEP) } else { Memory::Budget(bytes as usize) };
        either!(&mut *given("model", model)?.lock(), engine => engine.set_memory(memory));
        Ok(())
    })
}

/// What a step on one slide takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct cf_plan {
    /// Bytes at its peak, the model's state included.
    pub peak_bytes: u64,
    /// Bytes of the step's arena alone.
    pub arena_bytes: u64,
    /// Operations forward and backward (a multiply-add is two).
    pub flop: f64,
    /// Operations of the forward pass.
    pub forward_flop: f64,
    /// Kernels, where the device runs kernels.
    pub launches: u64,
}

/// The plan for a slide of so many patches at 5x, 10x and 20x; nothing is computed.
///
/// # Safety
/// Pointers must be null or live; `patches` three numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_model_plan(
    model: *const cf_model,
    patches: *const u64,
    training: bool,
    out: *mut cf_plan,
) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let any = given("model", model)?.lock();
        let patches = array("patches", patches, 3)?;
        let sizes = BagSizes::from([0, 1, 2].map(|i| patches[i] as usize));
        let plan: Plan = either!(&*any, engine => engine.plan(sizes, training))?;
        *given_mut("out", out)? = cf_plan {
            peak_bytes: plan.peak_bytes() as u64,
            arena_bytes: plan.arena_bytes as u64,
            flop: plan.step_flop,
            forward_flop: plan.forward_flop,
            launches: plan.launches as u64,
        };
        Ok(())
    })
}

/// A slide's features [patches, features] in the host's memory, without gaps, in the model's precision;
/// null at scales that the model does not read.
#[repr(C)]
pub struct cf_bags {
    pub x5: *const DLTensor,
    pub x10: *const DLTensor,
    pub x20: *const DLTensor,
}

/// # Safety
/// The tensors must be as DLPack says, and alive while the bags are used.
unsafe fn bags<'a, T: Stored>(model: &Model, bags: &cf_bags) -> Result<Bags<'a, T>> {
    let mut slices = Vec::new();
    for &scale in model.scales() {
        let (name, tensor) = match scale {
            Scale::X5 => ("x5", bags.x5),
            Scale::X10 => ("x10", bags.x10),
            Scale::X20 => ("x20", bags.x20),
        };
        // SAFETY: the caller's.
        slices.push((scale, unsafe { bag::<T>(name, tensor, model.config().features) }?));
    }
    Bags::new(slices.into_iter().collect::<Scales<&[T]>>(), model.config().features)
}

/// # Safety
/// As [`bags`].
unsafe fn bag<'a, T: Stored>(name: &str, tensor: *const DLTensor, features: usize) -> Result<&'a [T]> {
    // SAFETY: the caller's.
    unsafe {
        let Place { address, rows, cols, stride } = host_rows::<T>(name, tensor)?;
        if cols != features {
            return Err(usage(format!("{name} has {cols} features a patch, the model takes {features}")));
        }
        if rows > 1 && stride != cols {
            return Err(usage(format!("{name} has rows {stride} apart: expected features without gaps")));
        }
        let values = array(name, address, rows * cols)?; // `matrix` has bounded them
        // one of them would make everything that the model gives of the slide NaN
        match values.iter().position(|value| !value.to_sum().f64().is_finite()) {
            Some(at) => {
                Err(usage(format!("{name} has no finite number at patch {}, feature {}", at / cols, at % cols)))
            }
            None => Ok(values),
        }
    }
}

/// Hazards and survival of each time bin (`n_classes` numbers each, or null) and risk (or null) of a
/// slide, without dropout. This waits.
///
/// # Safety
/// Pointers must be null or live, and hold as many numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_model_predict(
    model: *const cf_model,
    slide: *const cf_bags,
    hazards: *mut f64,
    survival: *mut f64,
    risk: *mut f64,
) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let mut any = given("model", model)?.lock();
        let slide = given("slide", slide)?;
        let logits = either!(&mut *any, engine => {
            let bags = bags(engine.model(), slide)?;
            engine.evaluate(bags)
        })?;
        let found = Prediction::from_logits(&logits);
        for (values, to) in [(&found.hazards, hazards), (&found.survival, survival), (&vec![found.risk], risk)] {
            if !to.is_null() {
                std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len());
            }
        }
        Ok(())
    })
}

/// The logits of a slide without dropout, `n_classes` numbers. This waits.
///
/// # Safety
/// As [`cf_model_predict`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_model_logits(model: *const cf_model, slide: *const cf_bags, logits: *mut f64) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let mut any = given("model", model)?.lock();
        let slide = given("slide", slide)?;
        let found = either!(&mut *any, engine => {
            let bags = bags(engine.model(), slide)?;
            engine.evaluate(bags)
        })?;
        given("logits", logits)?;
        std::ptr::copy_nonoverlapping(found.as_ptr(), logits, found.len());
        Ok(())
    })
}

/// Forward, a loss and backward of one slide: `loss.share` of its gradient is added to the model's.
/// `dropout` gives seed and step of the model's own dropouts (its rate and site are not looked at);
/// null is no dropout. Loss and risk may be null. This waits.
///
/// # Safety
/// Pointers must be null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_model_accumulate(
    model: *const cf_model,
    slide: *const cf_bags,
    dropout: *const cf_dropout,
    loss: *const cf_loss,
    value: *mut f64,
    risk: *mut f64,
) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let mut any = given("model", model)?.lock();
        let (slide, loss) = (given("slide", slide)?, given("loss", loss)?.get()?);
        let draw = dropout.as_ref().map(|dropout| Draw { seed: dropout.seed, step: dropout.step });
        let (found, found_risk) = either!(&mut *any, engine => {
            let bags = bags(engine.model(), slide)?;
            let pending = engine.accumulate_loss(bags, draw, &loss)?;
            engine.finish(pending)
        })?;
        for (to, found) in [(value, found), (risk, found_risk)] {
            if !to.is_null() {
                *to = found;
            }
        }
        Ok(())
    })
}

/// One update of all parameters by the gradients, which are zero afterwards.
///
/// # Safety
/// Pointers must be null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_model_update(model: *const cf_model, adam: *const cf_adam) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let adam = given("adam", adam)?.get();
        either!(&mut *given("model", model)?.lock(), engine => engine.update(&adam))
    })
}

/// Writes the parameters under their published names as safetensors, whole or not at all.
///
/// # Safety
/// Pointers must be null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_model_save(model: *const cf_model, path: *const c_char) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let any = given("model", model)?.lock();
        let path = self::path(path)?;
        let card = ModelCard {
            model: self::model(&any).config().clone(),
            fold: 0,
            epoch: 0,
            c_index: None,
            bin_edges: Vec::new(),
            trained_on: Seen::default(),
            chosen_on: Seen::default(),
        };
        either!(&*any, engine => checkpoint::save_model(&path, engine, &card))
    })
}

/// How many parameter tensors the model has; 0 of null.
///
/// # Safety
/// `model` must be null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_model_parameters(model: *const cf_model) -> usize {
    // SAFETY: the caller's.
    unsafe { model.as_ref() }.map_or(0, |model| model.names.len())
}

/// The published name of the `i`-th parameter tensor, as long as the model lives; null past the end.
///
/// # Safety
/// As [`cf_model_parameters`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_model_parameter_name(model: *const cf_model, i: usize) -> *const c_char {
    // SAFETY: the caller's.
    let name = unsafe { model.as_ref() }.and_then(|model| model.names.get(i));
    name.map_or(std::ptr::null(), |name| name.as_ptr())
}

/// What a model keeps of each parameter.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum cf_state {
    CF_VALUES = 0,
    CF_GRADIENTS = 1,
}

/// The numbers of a parameter tensor by its published name, or of its gradient: `len` of them, row by
/// row. With `numbers` null, `len` takes how many there are. This waits.
///
/// # Safety
/// Pointers must be null or live, and `numbers` hold `len` floats.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_model_read(
    model: *const cf_model,
    state: i32,
    name: *const c_char,
    numbers: *mut f32,
    len: *mut usize,
) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let any = given("model", model)?.lock();
        let name = CStr::from_ptr(given("name", name)?).to_string_lossy();
        let which = match state {
            n if n == cf_state::CF_VALUES as i32 => State::Params,
            n if n == cf_state::CF_GRADIENTS as i32 => State::Grads,
            other => return Err(usage(format!("state = {other}: expected 0 (values) or 1 (gradients)"))),
        };
        let entry = self::model(&any).layout().entries().iter().find(|entry| entry.name == *name);
        let entry = entry.ok_or_else(|| usage(format!("the model has no parameter `{name}`")))?;
        let len = given_mut("len", len)?;
        if numbers.is_null() {
            *len = entry.len();
            return Ok(());
        }
        if *len != entry.len() {
            return Err(usage(format!("`{name}` has {} numbers, not {len}", entry.len())));
        }
        let values = either!(&*any, engine => engine.read(which, &name))?;
        std::ptr::copy_nonoverlapping(values.as_ptr(), numbers, values.len());
        Ok(())
    })
}

// Calls may come from any thread.
const _: fn() = || {
    fn any_thread<T: Send + Sync>() {}
    any_thread::<cf_context>();
    any_thread::<cf_model>();
};
