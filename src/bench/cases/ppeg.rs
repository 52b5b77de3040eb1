//! PPEG of the three branches.

use super::{D, Maker};
use crate::{
    Result,
    device::Element,
    ops::ppeg::{self, Ppeg, PpegGrad},
};

pub(super) fn cases<T: Element>(make: &mut Maker) -> Result<()> {
    let (side, n) = (make.slide.side, make.tokens());
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let [x, y, dy, dx] = [make.matrix(n, D)?, make.matrix(n, D)?, make.matrix(n, D)?, make.matrix(n, D)?];
        let mut kernels = Vec::new();
        let mut dkernels = Vec::new();
        for side in ppeg::SIDES {
            kernels.push(make.matrix::<T>(D, side * side)?);
            dkernels.push(make.matrix(D, side * side)?);
        }
        let (kernels, dkernels) = ([kernels[0], kernels[1], kernels[2]], [dkernels[0], dkernels[1], dkernels[2]]);
        forward.push(Ppeg { x, y, side, kernels, biases: make.rows(D)? });
        backward.push(PpegGrad { x, dy, dx, side, kernels, dkernels, dbiases: make.rows(D)? });
    }
    let (flop, element) = (2.0 * 49.0 * (3 * n * D) as f64, size_of::<T>());
    let shape = format!("3 x {side} x {side} x {D}");
    make.case::<T>("ppeg forward", &shape, flop, (6 * n * D * element) as f64, move |device, arena| {
        ppeg::forward(device, arena, &forward)
    });
    make.case::<T>("ppeg backward", &shape, 2.0 * flop, (9 * n * D * element) as f64, move |device, arena| {
        ppeg::backward(device, arena, &backward)
    });
    Ok(())
}
