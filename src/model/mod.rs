//! The model: its parameters, its parts, and how they are put together.

mod bags;
mod cross;
mod crossfusion;
mod crossfusion_concat;
mod crossfusion_single;
mod encoder;
mod fusion;
mod layer;
mod network;
mod params;
mod policy;
mod projection;
mod readout;
mod scale;
mod stream;
mod transformer;

pub(crate) use bags::Bag;
pub(crate) use bags::Room;
pub use bags::{BagGrads, Bags, Features, ReadPatches};
pub use crossfusion::CrossFusion;
pub use crossfusion_concat::CrossFusionConcat;
pub use crossfusion_single::CrossFusionSingle;
pub use network::{AttentionOf, Model, ModelName};
pub(crate) use network::{Network, each};
pub use params::{Entry, Layout};
pub use policy::Policy;
pub use scale::{BagSizes, Scale, Scales};
use serde::{Deserialize, Serialize};
pub(crate) use stream::STREAM_BUFFERS;

use crate::{
    Error, Result,
    device::{Arena, Buffer, Device, Element, View},
    ops::{Draw, Dropout, head},
};

/// How the three streams are fused, as in the published code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fusion {
    /// On the square grid of tokens, as published.
    #[default]
    Conv2d,
    /// Along the token sequence.
    Conv1d,
}

/// What a model is built from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Which model the settings are of; the published one where a file does not say.
    #[serde(default)]
    pub model: ModelName,
    /// Width of the patch features.
    pub features: usize,
    /// Width of the model.
    pub dim: usize,
    /// Attention heads, which divide `dim`.
    pub heads: usize,
    /// Self-attention layers before and after each positional encoding.
    pub layers: usize,
    /// Time bins, as many as logits; 1 of a model whose output is the risk.
    pub n_classes: usize,
    /// What the convolution runs along; [`Fusion::Conv2d`] of the model that has none.
    pub fusion: Fusion,
    /// Dropout after GELU and after the feed-forward's second layer.
    pub ffn_dropout: f64,
    /// Dropout of self-attention's probabilities.
    pub attention_dropout: f64,
    /// Dropout of whole channels in the conv fusion.
    pub fusion_dropout: f64,
}

pub use crate::ops::MOST_DROPOUT;

/// Most columns of an attention head.
pub const MOST_HEAD_COLUMNS: usize = 128;
/// Most layers of a transformer: more are a slip of the pen, and would only take memory.
pub const MOST_LAYERS: usize = 64;
/// The model's greatest width.
pub const MOST_DIM: usize = 1 << 14;
/// The widest features.
pub const MOST_FEATURES: usize = 1 << 16;
/// Most patches of a bag: a plan of the smallest parts walks through 2^16 of them.
pub const MOST_PATCHES: usize = 1 << 26;

impl Config {
    /// The published model for features of this width.
    pub fn new(features: usize) -> Self {
        Self {
            model: ModelName::CrossFusion,
            features,
            dim: 512,
            heads: 4,
            layers: 1,
            n_classes: 4,
            fusion: Fusion::Conv2d,
            ffn_dropout: 0.3,
            attention_dropout: 0.2,
            fusion_dropout: 0.3,
        }
    }

    /// An error naming the setting that no model can be built from.
    pub fn check(&self) -> Result<()> {
        let positive = [("features", self.features), ("layers", self.layers), ("n_classes", self.n_classes)];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(Error::Usage(format!("{name} = 0: expected at least 1")));
        }
        let bounded = [
            ("features", self.features, MOST_FEATURES),
            ("dim", self.dim, MOST_DIM),
            ("layers", self.layers, MOST_LAYERS),
            ("n_classes", self.n_classes, MOST_DIM),
        ];
        if let Some((name, value, most)) = bounded.iter().find(|(_, value, most)| value > most) {
            return Err(Error::Usage(format!("{name} = {value}: expected at most {most}")));
        }
        if self.heads == 0 || self.dim == 0 || !self.dim.is_multiple_of(self.heads) || !self.dim.is_multiple_of(2) {
            return Err(Error::Usage(format!(
                "dim = {} with heads = {}: expected an even dim that heads divides",
                self.dim, self.heads
            )));
        }
        if self.dim / self.heads > MOST_HEAD_COLUMNS {
            return Err(Error::Usage(format!(
                "dim = {} with heads = {}: expected heads of at most {MOST_HEAD_COLUMNS} columns",
                self.dim, self.heads
            )));
        }
        if self.model == ModelName::CrossFusionConcat && self.fusion != Fusion::Conv2d {
            return Err(Error::Usage(format!("fusion = conv1d: {} has no convolution to fuse by", self.model)));
        }
        for (name, rate) in [
            ("ffn_dropout", self.ffn_dropout),
            ("attention_dropout", self.attention_dropout),
            ("fusion_dropout", self.fusion_dropout),
        ] {
            if !(0.0..=MOST_DROPOUT).contains(&rate) {
                return Err(Error::Usage(format!("{name} = {rate}: expected a rate from 0 to {MOST_DROPOUT}")));
            }
        }
        Ok(())
    }
}

/// The side of the smallest square that holds so many tokens.
fn square_side(tokens: usize) -> usize {
    (1..).find(|side| side * side >= tokens).unwrap_or(tokens)
}

/// The first of so many dropout sites, which are then taken.
fn dropout_sites(next: &mut u32, sites: u32) -> u32 {
    *next += sites;
    *next - sites
}

impl Config {
    /// An error if the kernels cannot run this model: they move 16 bytes at a time, 8 columns of
    /// bf16.
    pub fn check_for_kernels(&self) -> Result<()> {
        let widths = [("features", self.features, 8), ("dim", self.dim, 16), ("dim / heads", self.dim / self.heads, 8)];
        if let Some((name, width, of)) = widths.into_iter().find(|(_, width, of)| !width.is_multiple_of(*of)) {
            return Err(Error::Usage(format!("{name} = {width}: a GPU needs a multiple of {of}; use --device cpu")));
        }
        let (classes, most) = (self.n_classes, head::MOST_CLASSES);
        if classes > most {
            return Err(Error::Usage(format!("n_classes = {classes}: a GPU takes at most {most}; use --device cpu")));
        }
        Ok(())
    }
}

/// What the parts of a forward or backward pass share.
pub(crate) struct Context<'a> {
    pub device: &'a Device,
    pub arena: &'a mut Arena,
    /// Of the bags that are held whole, where the device does not read them in the host's memory.
    pub room: &'a mut Room,
    /// Of the type that the ops read.
    pub params: &'a Buffer,
    /// Of the type that sums are kept in; written by backward only.
    pub grads: &'a Buffer,
    /// The pass's dropout, if any.
    pub draw: Option<Draw>,
    /// Whether backward follows.
    pub training: bool,
    pub policy: Policy,
    pub config: &'a Config,
}

impl Context<'_> {
    fn dropout(&self, site: u32, rate: f64) -> Option<Dropout> {
        Dropout::new(self.draw, site, rate)
    }

    /// Whether backward finds all that forward computed.
    fn keeps_all(&self) -> bool {
        self.training && self.policy.recompute.is_none()
    }

    /// A matrix on the saved stack, or on the scratch stack.
    fn matrix<T: Element>(&mut self, save: bool, rows: usize, cols: usize) -> Result<View<T>> {
        if save { self.arena.save(rows, cols) } else { self.arena.scratch(rows, cols) }
    }

    /// Saved for backward, whatever the policy.
    fn keep<T: Element>(&mut self, rows: usize, cols: usize) -> Result<View<T>> {
        self.matrix(self.training, rows, cols)
    }

    /// Saved for backward, unless that computes it again.
    fn keep_inner<T: Element>(&mut self, rows: usize, cols: usize) -> Result<View<T>> {
        self.matrix(self.keeps_all(), rows, cols)
    }

    /// A whole bag where this device's ops can read it.
    fn stage<T: Element>(&mut self, bag: &Bag<'_, T>) -> Result<View<T>> {
        match bag {
            Bag::Memory(bag) if !self.device.runs_kernels() => Ok(*bag),
            bag => self.room.receive(self.device, bag, self.config.features),
        }
    }

    fn linear<T: Element>(&self, linear: params::Linear) -> LinearViews<T> {
        LinearViews {
            weight: linear.weight.of(self.params),
            bias: linear.bias.of(self.params),
            dweight: linear.weight.of(self.grads),
            dbias: linear.bias.of(self.grads),
        }
    }
}

/// A linear layer's parameters and gradients.
#[derive(Clone, Copy)]
struct LinearViews<T: Element> {
    weight: View<T>,
    bias: View<T>,
    dweight: View<T::Sum>,
    dbias: View<T::Sum>,
}
