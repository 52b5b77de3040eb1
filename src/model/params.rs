//! A model's parameters: one flat arena and a table of names.
//!
//! Names and shapes are those of the public checkpoints; offsets are ours, so that weights that are
//! used together (a query's, key's and value's projection) lie together. Gradients and Adam's
//! moments are arenas with the same offsets.

use std::ops::Range;

use crate::{
    Result,
    device::{Buffer, Device, Element, Real, View},
};

/// One named tensor.
#[derive(Clone, Debug)]
pub struct Entry {
    /// As public checkpoints call it.
    pub name: String,
    /// As in public checkpoints: outermost axis first.
    pub shape: Vec<usize>,
    /// Elements from the start of the arena.
    pub offset: usize,
    init: Init,
}

impl Entry {
    /// Elements, which lie side by side in row-major order.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements; every tensor of a model has some.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How a tensor starts, as in the published code.
#[derive(Clone, Copy, Debug)]
enum Init {
    Constant(f64),
    /// Standard deviation; truncated at +-2.
    Normal(f64),
}

/// A matrix of the parameter arena. The same handle names the parameter, its gradient and its
/// moments.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Param {
    offset: usize,
    rows: usize,
    cols: usize,
}

impl Param {
    pub(crate) fn cols(self) -> usize {
        self.cols
    }

    pub(crate) fn of<T: Element>(self, arena: &Buffer) -> View<T> {
        arena.view(self.offset, self.rows, self.cols)
    }
}

/// y = x Wᵀ + b; weight `[out, in]`, bias `[1, out]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Linear {
    pub weight: Param,
    pub bias: Param,
}

impl Linear {
    /// Some of its outputs.
    pub(crate) fn outputs(self, range: Range<usize>) -> Self {
        let Self { weight, bias } = self;
        let offset = weight.offset + range.start * weight.cols;
        Self {
            weight: Param { offset, rows: range.len(), ..weight },
            bias: Param { offset: bias.offset + range.start, cols: range.len(), ..bias },
        }
    }
}

/// Weight and bias `[1, d]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NormWeights {
    pub weight: Param,
    pub bias: Param,
}

/// The table, and the builder that models fill it with.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    entries: Vec<Entry>,
    len: usize,
}

/// Tensors start on multiples of this many elements: 128 bytes in bf16.
const ALIGNMENT: usize = 64;
/// Std of linear weights, scale embeddings.
const LINEAR: Init = Init::Normal(0.02);

impl Layout {
    /// The tensors in the order of their offsets.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Elements of the arena, padding included.
    pub fn len(&self) -> usize {
        self.len.next_multiple_of(ALIGNMENT)
    }

    /// Whether no tensor has been laid out yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// An arena of it as a matrix, whose rows go to many threads.
    pub(crate) fn rows<T: Element>(&self, arena: &Buffer) -> View<T> {
        arena.view(0, self.len() / ALIGNMENT, ALIGNMENT)
    }

    /// Elements of all tensors, what a paper calls the number of parameters.
    pub fn parameters(&self) -> usize {
        self.entries.iter().map(Entry::len).sum()
    }

    /// Fresh weights, a pure function of the seed and each tensor's name.
    pub(crate) fn initialize<T: Real>(&self, device: &Device, seed: u64, arena: &Buffer) -> Result<()> {
        for entry in &self.entries {
            let values: Vec<T> = match entry.init {
                Init::Constant(value) => vec![T::of(value); entry.len()],
                Init::Normal(std) => {
                    normals(seed, &entry.name).map(|z| T::of((z * std).clamp(-2.0, 2.0))).take(entry.len()).collect()
                }
            };
            device.upload(&values, arena.view(entry.offset, 1, entry.len()))?;
        }
        Ok(())
    }

    fn tensor(&mut self, name: String, shape: &[usize], init: Init) -> Param {
        let entry = Entry { name, shape: shape.to_vec(), offset: self.len, init };
        let (offset, rows) = (entry.offset, if shape.len() == 1 { 1 } else { shape[0] });
        let cols = entry.len() / rows;
        self.len += entry.len();
        self.entries.push(entry);
        Param { offset, rows, cols }
    }

    fn align(&mut self) {
        self.len = self.len.next_multiple_of(ALIGNMENT);
    }

    pub(super) fn linear(&mut self, name: &str, out: usize, input: usize) -> Linear {
        self.align();
        let weight = self.tensor(format!("{name}.weight"), &[out, input], LINEAR);
        self.align();
        let bias = self.tensor(format!("{name}.bias"), &[out], Init::Constant(0.0));
        Linear { weight, bias }
    }

    /// Linear layers of the same input, side by side: their outputs are one product's columns.
    pub(super) fn linears<const N: usize>(&mut self, names: [&str; N], out: usize, input: usize) -> Linear {
        self.align();
        let weight = names.map(|name| self.tensor(format!("{name}.weight"), &[out, input], LINEAR))[0];
        self.align();
        let bias = names.map(|name| self.tensor(format!("{name}.bias"), &[out], Init::Constant(0.0)))[0];
        Linear { weight: Param { rows: N * out, ..weight }, bias: Param { cols: N * out, ..bias } }
    }

    pub(super) fn norm(&mut self, name: &str, d: usize) -> NormWeights {
        self.align();
        let weight = self.tensor(format!("{name}.weight"), &[d], Init::Constant(1.0));
        self.align();
        let bias = self.tensor(format!("{name}.bias"), &[d], Init::Constant(0.0));
        NormWeights { weight, bias }
    }

    /// A convolution's weight `[out, inputs a group, taps..]` and bias; Kaiming normal over out *
    /// taps, gain sqrt(2).
    pub(super) fn convolution(&mut self, name: &str, out: usize, inputs: usize, taps: &[usize]) -> (Param, Param) {
        self.align();
        let fan_out = out * taps.iter().product::<usize>();
        let init = Init::Normal((2.0 / fan_out as f64).sqrt());
        let weight = self.tensor(format!("{name}.weight"), &[&[out, inputs], taps].concat(), init);
        self.align();
        let bias = self.tensor(format!("{name}.bias"), &[out], Init::Constant(0.0));
        (weight, bias)
    }

    /// A learned row `[1, 1, d]`.
    pub(super) fn token(&mut self, name: &str, d: usize, std: f64) -> Param {
        self.align();
        self.tensor(name.to_string(), &[1, 1, d], Init::Normal(std))
    }
}

/// Standard normals by Box and Muller (1958) from a splitmix64 stream that starts at the name's
/// FNV-1a hash.
fn normals(seed: u64, name: &str) -> impl Iterator<Item = f64> {
    let hash =
        name.bytes().fold(0xCBF2_9CE4_8422_2325u64, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3));
    let mut state = hash ^ seed.wrapping_mul(0xD6E8_FEB8_6659_FD93);
    let mut uniform = move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 * (0.5f64).powi(53)
    };
    std::iter::repeat_with(move || {
        let (u, v) = (1.0 - uniform(), uniform());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    })
}
