//! The goldens' generator and reader, shared by the integration tests: their numbers are not stored
//! but drawn anew from names ([`fill`]).
#![allow(dead_code)] // each test uses its part

use std::{collections::BTreeMap, path::PathBuf};

use crossfusion::data::torch::{self, StateDict};
use serde::Deserialize;

/// The folder named by CROSSFUSION_GOLDENS, or the committed one.
pub fn goldens() -> PathBuf {
    match std::env::var_os("CROSSFUSION_GOLDENS") {
        Some(folder) => folder.into(),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens"),
    }
}

/// Uniform on [-1, 1): splitmix64 of (fnv1a64(name) + (i + 1) * golden ratio), top 24 bits; then
/// offset + scale * u in float32.
pub fn fill(name: &str, count: usize, law: Law) -> Vec<f32> {
    let hash = name.bytes().fold(0xCBF2_9CE4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3));
    let value = |i: u64| {
        let z = hash.wrapping_add((i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let u = ((z ^ (z >> 31)) >> 40) as f32 * (2.0f32).powi(-23) - 1.0;
        law.offset as f32 + law.scale as f32 * u
    };
    (0..count as u64).map(value).collect()
}

#[derive(Clone, Copy, Deserialize)]
pub struct Law {
    pub offset: f64,
    pub scale: f64,
}

#[derive(Clone, Deserialize)]
pub struct Parameter {
    pub shape: Vec<usize>,
    #[serde(flatten)]
    pub law: Law,
}

#[derive(Clone, Deserialize)]
pub struct ModelConfig {
    pub features: usize,
    #[serde(default = "default_dim")]
    pub dim: usize,
    #[serde(default = "default_heads")]
    pub heads: usize,
    #[serde(default = "default_layers")]
    pub layers: usize,
    #[serde(default = "default_classes")]
    pub n_classes: usize,
    #[serde(default)]
    pub fusion: crossfusion::model::Fusion,
}

fn default_dim() -> usize {
    512
}
fn default_heads() -> usize {
    4
}
fn default_layers() -> usize {
    1
}
fn default_classes() -> usize {
    4
}

impl ModelConfig {
    pub fn build(&self) -> crossfusion::model::Config {
        crossfusion::model::Config {
            dim: self.dim,
            heads: self.heads,
            layers: self.layers,
            n_classes: self.n_classes,
            fusion: self.fusion,
            ..crossfusion::model::Config::new(self.features)
        }
    }
}

/// A bag filled by name.
pub fn bag(tag: &str, name: &str, patches: usize, features: usize, law: Law) -> Vec<f32> {
    fill(&format!("{tag}{name}"), patches * features, law)
}

/// All parameters of a golden, by name.
pub fn parameters(tag: &str, laws: &BTreeMap<String, Parameter>) -> StateDict {
    let tensor = |(name, p): (&String, &Parameter)| {
        let values = fill(&format!("{tag}{name}"), p.shape.iter().product(), p.law);
        (name.clone(), torch::Parameter { shape: p.shape.clone(), values })
    };
    laws.iter().map(tensor).collect()
}
