//! kernels/ppeg.cu against src/ops/ppeg.rs.

use crossfusion::{
    Result,
    device::Element,
    ops::ppeg::{self, Ppeg, PpegGrad, SIDES},
};

use super::{
    bed::{Bed, Case, check, check_races},
    common::Law,
};

/// Problems of one call: the grid's side, rows before it, columns.
struct Encodings(Vec<(usize, usize, usize)>);

const UNIT: Law = Law { offset: 0.1, scale: 1.0 };
/// As a convolution of 49 taps is initialised.
const WEIGHT: Law = Law { offset: 0.0, scale: 0.3 };

impl Case for Encodings {
    fn name(&self) -> String {
        format!("ppeg of (side, first, columns) {:?}", self.0)
    }

    fn run<T: Element>(&self, bed: &mut Bed<T>) -> Result<()> {
        let (mut encodings, mut grads) = (Vec::new(), Vec::new());
        for (i, &(side, first, c)) in self.0.iter().enumerate() {
            let of = |name: &str| format!("{name} {i}");
            let n = first + side * side;
            // rows lie in wider matrices
            let x = bed.input(&of("x"), n, c + 8, UNIT).cols_range(8..c + 8);
            let dy = bed.input(&of("dy"), n, c + 16, UNIT).cols_range(0..c);
            let kernels = SIDES.map(|s| bed.input(&of(&format!("kernel {s}")), c, s * s, WEIGHT));
            let biases = SIDES.map(|s| bed.input(&of(&format!("bias {s}")), 1, c, UNIT));
            encodings.push(Ppeg { x, y: bed.output(&of("y"), n, c), side, kernels, biases });
            grads.push(PpegGrad {
                x,
                dy,
                dx: bed.output(&of("dx"), n, c),
                side,
                kernels,
                dkernels: SIDES.map(|s| bed.accumulated(&of(&format!("dkernel {s}")), c, s * s)),
                dbiases: SIDES.map(|s| bed.accumulated(&of(&format!("dbias {s}")), 1, c)),
            });
        }
        ppeg::forward(bed.device, &mut bed.arena, &encodings)?;
        ppeg::backward(bed.device, &mut bed.arena, &grads)
    }
}

/// From a single token to tiles that the grid fills, exceeds by one row and cuts; rows before the
/// grid; groups of channels that the columns fill, exceed and cut.
const SINGLE: [(usize, usize, usize); 8] =
    [(1, 0, 8), (2, 1, 16), (3, 0, 32), (7, 1, 96), (8, 0, 64), (13, 1, 40), (16, 0, 32), (20, 1, 40)];

#[test]
fn matches_the_cpu() {
    SINGLE.iter().for_each(|&case| check(&Encodings(vec![case])));
}

#[test]
fn problems_share_launches() {
    check(&Encodings(vec![(17, 1, 8), (1, 0, 72), (33, 0, 8), (3, 2, 40), (5, 1, 16)]));
}

/// More tiles than backward's parts: 6 x 6 of them in 32 blocks.
#[test]
fn a_part_takes_several_tiles() {
    check(&Encodings(vec![(82, 1, 8)]));
}

#[test]
fn has_no_races() {
    check_races(&Encodings(vec![(1, 0, 8)]));
    check_races(&Encodings(vec![(3, 1, 16), (17, 0, 8)]));
    check_races(&Encodings(vec![(9, 1, 40)]));
}
