//! The CUDA kernels on the emulator: the instructions that they use, the emulator's detectors, each op against its CPU twin.
#![cfg(feature = "emulator")]

#[path = "../common/mod.rs"]
mod common;
mod layer_norm;
mod probes;

use crossfusion::device::{
    Stored,
    emulator::{Options, Schedule},
};
use half::bf16;

/// Plain runs that together cover the schedules and some chance.
const PLAIN: [Options; 5] = [
    Options { schedule: Schedule::Ordered, seed: 1, race: false },
    Options { schedule: Schedule::Random, seed: 1, race: false },
    Options { schedule: Schedule::Random, seed: 2, race: false },
    Options { schedule: Schedule::Skewed, seed: 1, race: false },
    Options { schedule: Schedule::Skewed, seed: 2, race: false },
];
const RACE: Options = Options { schedule: Schedule::Skewed, seed: 1, race: true };

/// An element of a kernel's storage.
trait Element: Stored + PartialEq + std::fmt::Debug {
    fn of(x: f32) -> Self;
    fn f32(self) -> f32;
}
impl Element for f32 {
    fn of(x: f32) -> Self {
        x
    }
    fn f32(self) -> f32 {
        self
    }
}
impl Element for bf16 {
    fn of(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn f32(self) -> f32 {
        self.to_f32()
    }
}

/// |got - truth| / |truth| over a whole tensor.
fn error(got: &[f64], truth: &[f64]) -> f64 {
    assert_eq!(got.len(), truth.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(truth).map(|(a, b)| a - b)) / norm(&mut truth.iter().copied()).max(f64::MIN_POSITIVE)
}
