//! Feature files, and what a training step takes.

use std::path::PathBuf;

use engine::{
    data::{features::FeatureFile, layout},
    device::Facts,
    eval::Network,
    model::{BagSizes, Config, Fusion, ModelName, Policy, Scale},
    train::{
        plan::{Planner, Plans},
        step::Memory,
    },
};
use half::bf16;
use numpy::{IntoPyArray, PyArray1, PyArray2};
use pyo3::{exceptions::PyValueError, prelude::*};

use crate::compute;

type Coordinates<'py> = Option<Bound<'py, PyArray2<i64>>>;

/// A feature file's numbers [patches, features] in f32, and its patches' coordinates, if it has them.
#[pyfunction]
fn read_bag(py: Python<'_>, path: PathBuf) -> PyResult<(Bound<'_, PyArray2<f32>>, Coordinates<'_>)> {
    let read = || {
        let file = FeatureFile::open(&path)?;
        Ok((file.read()?, file.coordinates()?))
    };
    let (features, coordinates) = compute(py, read)?;
    Ok((features.into_pyarray(py), coordinates.map(|coordinates| coordinates.into_pyarray(py))))
}

/// Which model, its sizes and rates by the names that a model file has for them, and its parameters
/// with their shapes.
type ModelFile<'py> = (String, Vec<(&'static str, f64)>, Vec<(String, Vec<usize>, Bound<'py, PyArray1<f32>>)>);

/// A model of cf-train or a published checkpoint.
#[pyfunction]
fn read_model(py: Python<'_>, path: PathBuf, heads: Option<usize>) -> PyResult<ModelFile<'_>> {
    let network = compute(py, || Network::read(&path, heads))?;
    let config = &network.config;
    if config.fusion == Fusion::Conv1d {
        let message = format!(
            "{}: its convolution runs along the sequence (conv1d), which crossfusion.models has not",
            path.display()
        );
        return Err(PyValueError::new_err(message));
    }
    let sizes = vec![
        ("features", config.features as f64),
        ("dim", config.dim as f64),
        ("heads", config.heads as f64),
        ("layers", config.layers as f64),
        ("n_classes", config.n_classes as f64),
        ("ffn_dropout", config.ffn_dropout),
        ("attention_dropout", config.attention_dropout),
        ("fusion_dropout", config.fusion_dropout),
    ];
    let name = config.model.to_string();
    let tensors = network.tensors.into_iter();
    let tensors = tensors.map(|(name, tensor)| (name, tensor.shape, tensor.values.into_pyarray(py))).collect();
    Ok((name, sizes, tensors))
}

/// The file of a slide's features at one scale (`x20`), if there is one.
#[pyfunction]
fn feature_file(folder: PathBuf, backbone: &str, scale: &str, slide: &str) -> PyResult<Option<PathBuf>> {
    let known = Scale::ALL.into_iter().find(|known| known.name() == scale);
    let known =
        known.ok_or_else(|| PyValueError::new_err(format!("there is no scale {scale}: expected x5, x10 or x20")))?;
    layout::feature_file(&folder, backbone, known, slide).map_err(crate::raise)
}

/// Peak bytes, arena bytes, operations of a step and of its forward pass, launches, policy.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // what a plan depends on
fn plan(
    py: Python<'_>,
    model: &str,
    features: usize,
    dim: usize,
    heads: usize,
    layers: usize,
    patches: [usize; 3],
    on_gpu: bool,
    bf16_stored: bool,
    budget: Option<usize>,
) -> PyResult<(usize, usize, f64, f64, usize, String)> {
    let name = ModelName::ALL.into_iter().find(|name| name.to_string() == model);
    let model = name.ok_or_else(|| PyValueError::new_err(format!("there is no model {model}")))?;
    let config = Config { model, dim, heads, layers, ..Config::new(features) };
    let facts = Facts { runs_kernels: on_gpu, has_wgmma: false };
    let memory = budget.map_or(Memory::Policy(Policy::KEEP), Memory::Budget);
    let sizes = BagSizes::from(patches);
    let find = || {
        let model = engine::model::Model::new(&config)?;
        if bf16_stored {
            Planner::<bf16>::new(facts, model, memory, Plans::default()).plan(sizes, true)
        } else {
            Planner::<f32>::new(facts, model, memory, Plans::default()).plan(sizes, true)
        }
    };
    let plan = compute(py, find)?;
    let policy = plan.policy.to_string();
    Ok((plan.peak_bytes(), plan.arena_bytes, plan.step_flop, plan.forward_flop, plan.launches, policy))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(read_bag, module)?)?;
    module.add_function(wrap_pyfunction!(feature_file, module)?)?;
    module.add_function(wrap_pyfunction!(read_model, module)?)?;
    module.add_function(wrap_pyfunction!(plan, module)?)
}
