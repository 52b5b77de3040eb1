//! The CUDA kernels on the emulator: the instructions that they use, the emulator's detectors, each op against its CPU twin.
#![cfg(feature = "emulator")]

#[path = "../common/mod.rs"]
mod common;
mod layer_norm;
mod probes;

use crossfusion::device::emulator::{Options, Schedule};

/// Plain runs that together cover the schedules and some chance.
const PLAIN: [Options; 5] = [
    Options { schedule: Schedule::Ordered, seed: 1, race: false },
    Options { schedule: Schedule::Random, seed: 1, race: false },
    Options { schedule: Schedule::Random, seed: 2, race: false },
    Options { schedule: Schedule::Skewed, seed: 1, race: false },
    Options { schedule: Schedule::Skewed, seed: 2, race: false },
];
const RACE: Options = Options { schedule: Schedule::Skewed, seed: 1, race: true };
