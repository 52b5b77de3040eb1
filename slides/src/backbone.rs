//! A patch encoder: an ONNX file, run by ONNX Runtime, and the TOML beside it that says how patches
//! are prepared.

use std::path::{Path, PathBuf};

use crossfusion::{Error, Result, data::atomic};
use ort::{
    ep,
    session::{
        Session,
        builder::{GraphOptimizationLevel, SessionBuilder},
    },
    value::TensorRef,
};

use crate::{python::package_folder, reading::Recipe};

/// What a network is run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Device {
    /// CUDA where this ONNX Runtime has it, else the CPU
    Auto,
    /// The CPU
    Cpu,
    /// A GPU, by an ONNX Runtime that has CUDA
    Cuda,
}

/// A network that is ready to run.
pub struct Backbone {
    /// How patches are prepared for it.
    pub recipe: Recipe,
    path: PathBuf,
    session: Session,
}

impl Backbone {
    /// Reads `path`, an ONNX file of one image input `[batch, 3, input, input]` and the features
    /// `[batch, features]` as its first output, and the TOML beside it. `library` is ONNX Runtime's
    /// shared library, where it is not the system's or the Python package's.
    pub fn load(path: &Path, library: Option<&Path>, device: Device, threads: usize) -> Result<Self> {
        if !path.is_file() {
            return Err(Error::file(path, "is not a file; scripts/export-backbone.py makes one"));
        }
        let recipe = read_recipe(path)?;
        let session = session(library, device, threads)?
            .commit_from_file(path)
            .map_err(|e| Error::file(path, format!("ONNX Runtime cannot load it: {e}")))?;
        let wrong = |message: String| Err(Error::file(path, message));
        let side = recipe.input as i64;
        let input = session.inputs().first().and_then(|input| input.dtype().tensor_shape());
        let takes = |shape: &[i64]| matches!(shape, [-1, 3 | -1, height, width] if [height, width].iter().all(|x| [-1, side].contains(x)));
        match input {
            Some(shape) if session.inputs().len() == 1 && takes(shape) => {}
            Some(shape) => {
                return wrong(format!(
                    "takes {} inputs, the first of {shape}, expected one of [batch, 3, {side}, {side}] with any batch \
                     (-1)",
                    session.inputs().len()
                ));
            }
            None => return wrong("takes no tensor".into()),
        }
        Ok(Self { recipe, path: path.to_path_buf(), session })
    }

    /// The features `[patches, features]` of prepared patches `[patches, 3, input, input]`.
    pub fn features(&mut self, pixels: &[f32]) -> Result<Vec<f32>> {
        let Recipe { input, features, .. } = self.recipe;
        let patches = pixels.len() / (3 * input * input);
        let failed = |e: ort::Error| Error::file(&self.path, format!("ONNX Runtime cannot run it: {e}"));
        let tensor = TensorRef::from_array_view(([patches, 3, input, input], pixels)).map_err(failed)?;
        let outputs = self.session.run(ort::inputs![tensor]).map_err(failed)?;
        let (shape, values) = outputs[0].try_extract_tensor::<f32>().map_err(failed)?;
        let expected = [patches as i64, features as i64];
        if shape[..] != expected {
            let message =
                format!("gives {shape} for {patches} patches, expected {expected:?} (`features` of its .toml)");
            return Err(Error::file(&self.path, message));
        }
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            return Err(Error::file(&self.path, format!("gives {} as a feature", values[at])));
        }
        Ok(values.to_vec())
    }
}

/// `uni2.onnx.data` beside `uni2.onnx`, as scripts/export-backbone.py names what is too large for
/// one file.
pub fn weights_path(onnx: &Path) -> PathBuf {
    let mut path = onnx.as_os_str().to_owned();
    path.push(".data");
    path.into()
}

/// `resnet50.toml` beside `resnet50.onnx`.
pub fn recipe_path(onnx: &Path) -> PathBuf {
    onnx.with_extension("toml")
}

fn read_recipe(onnx: &Path) -> Result<Recipe> {
    let path = recipe_path(onnx);
    if !path.exists() {
        let message = "is not there; it says how patches are prepared for the ONNX file beside it (docs/backbones.md)";
        return Err(Error::file(&path, message));
    }
    let recipe: Recipe = toml::from_str(&atomic::read_text(&path, atomic::MOST)?)
        .map_err(|e| Error::file(&path, format!("is no recipe of a backbone: {}", e.to_string().replace('\n', " "))))?;
    let Recipe { input, resize, std, .. } = &recipe;
    if !(1..=4096).contains(input) || resize.is_some_and(|side| !(*input..=4096).contains(&side)) {
        return Err(Error::file(
            &path,
            format!("has input = {input} and resize = {resize:?}; expected resize >= input"),
        ));
    }
    if std.iter().any(|&x| x.is_nan() || x <= 0.0) {
        return Err(Error::file(&path, format!("has std = {std:?}, expected positive numbers")));
    }
    Ok(recipe)
}

/// A builder of sessions, once the library is loaded.
fn session(library: Option<&Path>, device: Device, threads: usize) -> Result<SessionBuilder> {
    let failed = |e: &dyn std::fmt::Display| Error::Device(format!("ONNX Runtime: {e}"));
    let path = match library {
        Some(path) if path.is_file() => path.to_path_buf(),
        Some(path) => return Err(Error::file(path, "is not a file (--onnxruntime)")),
        None => find_library().ok_or_else(|| {
            let message = "ONNX Runtime is not installed: `pip install onnxruntime` for the python3 on the path (or \
                           onnxruntime-gpu), or --onnxruntime /path/to/libonnxruntime.so";
            Error::Device(message.into())
        })?,
    };
    let environment = ort::init_from(&path).map_err(|e| failed(&e))?.build().map_err(|e| failed(&e))?;
    let cuda = ep::CUDA::default().build();
    let providers = match device {
        Device::Auto => vec![cuda.fail_silently()],
        Device::Cpu => Vec::new(),
        Device::Cuda => vec![cuda.error_on_failure()],
    };
    let builder = || -> Result<SessionBuilder, ort::Error> {
        Ok(Session::builder(&environment)?
            .with_optimization_level(GraphOptimizationLevel::Level3)?
            .with_intra_threads(threads)?
            // threads that spin while they wait take the cores that patches are read on
            .with_intra_op_spinning(false)?
            .with_execution_providers(providers)?)
    };
    builder().map_err(|e| failed(&e))
}

/// $ORT_DYLIB_PATH, or the system's library, or that of Python's onnxruntime (onnxruntime-gpu has
/// the same folder).
fn find_library() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("ORT_DYLIB_PATH") {
        return Some(path.into());
    }
    let system = ["libonnxruntime.so.1", "libonnxruntime.so", "libonnxruntime.dylib"].map(PathBuf::from);
    // SAFETY: loading ONNX Runtime runs nothing but its libraries' initialisers.
    let loads = |path: &&PathBuf| unsafe { libloading::Library::new(path.as_path()) }.is_ok();
    if let Some(path) = system.iter().find(loads) {
        return Some(path.clone());
    }
    let folder = package_folder("onnxruntime")?.join("capi");
    let names = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    names.into_iter().find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("libonnxruntime.so") || (name.starts_with("libonnxruntime.") && name.ends_with(".dylib"))
    })
}
