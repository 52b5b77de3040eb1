//! kernels/conv_fusion.cu against src/ops/conv_fusion.rs.

use crossfusion::{
    Result,
    device::Element,
    ops::{
        Draw, Dropout,
        conv_fusion::{self, ConvFusion, ConvFusionGrad, Grid, SIDES, Weights},
    },
};

use super::{
    bed::{Bed, Case, check, check_races},
    common::Law,
};

/// A fusion of streams of width `d`.
#[derive(Clone, Copy)]
struct Fusion {
    grid: Grid,
    d: usize,
    dropout: bool,
    /// One stream, without a mix, instead of three.
    single: bool,
}

const UNIT: Law = Law { offset: 0.1, scale: 1.0 };
/// Kernels and dout are mostly positive: the mix's gradients are single numbers, sums over all
/// tokens and channels, and where such a sum cancels its relative error is chance.
const KERNEL: Law = Law { offset: 0.1, scale: 0.3 };
const POSITIVE: Law = Law { offset: 1.0, scale: 1.0 };

impl Case for Fusion {
    fn name(&self) -> String {
        let single = if self.single { ", single" } else { "" };
        format!("conv_fusion {:?}, d {}, dropout {}{single}", self.grid, self.d, self.dropout)
    }

    fn run<T: Element>(&self, bed: &mut Bed<T>) -> Result<()> {
        let (grid, d) = (self.grid, self.d);
        let (n, outputs) = (grid.tokens(), d / 2);
        // rows lie in wider matrices
        let mut stream = |s| bed.input(&format!("stream {s}"), n, d + 8, UNIT).cols_range(8..d + 8);
        let streams = if self.single { [stream(0); 3] } else { [0, 1, 2].map(stream) };
        let kernels = SIDES.map(|s| bed.input(&format!("kernel {s}"), outputs, 2 * grid.taps_of(s), KERNEL));
        let biases = SIDES.map(|s| bed.input(&format!("bias {s}"), 1, outputs, UNIT));
        let weight = bed.input("mix weight", 1, 3, Law { offset: 0.4, scale: 0.3 });
        let mix = (!self.single).then_some((weight, bed.input("mix bias", 1, 1, Law { offset: 0.5, scale: 0.2 })));
        let dropout = Dropout::new(self.dropout.then_some(Draw { seed: 1 << 40 | 7, step: 3 }), 5, 0.3);
        let out = bed.output("out", n, outputs);
        let forward = ConvFusion { streams, weights: Weights { mix, kernels, biases }, grid, dropout, out };
        let dout = bed.input("dout", n, outputs + 8, POSITIVE).cols_range(0..outputs);
        let grads = Weights {
            mix: mix.map(|_| (bed.accumulated("dmix weight", 1, 3), bed.accumulated("dmix bias", 1, 1))),
            kernels: SIDES.map(|s| bed.accumulated(&format!("dkernel {s}"), outputs, 2 * grid.taps_of(s))),
            biases: SIDES.map(|s| bed.accumulated(&format!("dbias {s}"), 1, outputs)),
        };
        let mut dstream = |s| bed.output(&format!("dstream {s}"), n, d);
        let dstreams = if self.single { [dstream(0); 3] } else { [0, 1, 2].map(dstream) };
        let backward = ConvFusionGrad { forward, dout, dstreams, grads };
        conv_fusion::forward(bed.device, &mut bed.arena, &forward)?;
        conv_fusion::backward(bed.device, &mut bed.arena, &backward)
    }
}

fn square(side: usize, d: usize, dropout: bool) -> Fusion {
    Fusion { grid: Grid::square(side), d, dropout, single: false }
}

fn sequence(tokens: usize, d: usize, dropout: bool) -> Fusion {
    Fusion { grid: Grid::sequence(tokens), d, dropout, single: false }
}

#[test]
fn squares_match_the_cpu() {
    let cases = [(1, 16), (2, 32), (3, 96), (7, 64), (8, 16), (13, 80), (16, 32), (20, 48)];
    cases.iter().enumerate().for_each(|(i, &(side, d))| check(&square(side, d, i % 2 == 1)));
}

#[test]
fn sequences_match_the_cpu() {
    let cases = [(1, 16), (2, 32), (6, 64), (128, 48), (129, 96), (300, 32)];
    cases.iter().enumerate().for_each(|(i, &(tokens, d))| check(&sequence(tokens, d, i % 2 == 0)));
}

#[test]
fn single_streams_match_the_cpu() {
    for case in [
        square(2, 32, true),
        square(13, 80, false),
        square(16, 32, true),
        sequence(6, 64, false),
        sequence(300, 32, true),
    ] {
        check(&Fusion { single: true, ..case });
    }
}

/// More tiles than backward's parts.
#[test]
fn a_part_takes_several_tiles() {
    check(&square(82, 16, true));
    check(&sequence(33 * 128 + 5, 16, false));
    check(&Fusion { single: true, ..square(82, 16, false) });
}

#[test]
fn has_no_races() {
    check_races(&square(1, 16, true));
    check_races(&square(9, 48, true));
    check_races(&square(17, 16, false));
    check_races(&sequence(5, 48, true));
    check_races(&sequence(131, 16, false));
    check_races(&Fusion { single: true, ..square(9, 48, true) });
    check_races(&Fusion { single: true, ..sequence(131, 16, false) });
}
