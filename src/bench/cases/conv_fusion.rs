//! Convolutional fusion of the three streams.

use super::{D, DRAW, Maker};
use crate::{
    Result,
    device::Element,
    ops::{
        Dropout,
        conv_fusion::{self, ConvFusion, ConvFusionGrad, Grid, Weights},
    },
};

pub(super) fn cases<T: Element>(make: &mut Maker) -> Result<()> {
    let (side, n) = (make.slide.side, make.tokens());
    let streams = [make.matrix(n, D)?, make.matrix(n, D)?, make.matrix(n, D)?];
    let dstreams = [make.matrix(n, D)?, make.matrix(n, D)?, make.matrix(n, D)?];
    let (out, dout) = (make.matrix(n, D / 2)?, make.matrix(n, D / 2)?);
    let (weights, grads) = (random_weights::<T>(make)?, random_weights::<T::Sum>(make)?);
    let dropout = Dropout::new(Some(DRAW), 0, 0.3);
    let problem = ConvFusion { streams, weights, grid: Grid::square(side), dropout, out };
    let grad = ConvFusionGrad { forward: problem, dout, dstreams, grads };
    let (flop, element) = (2.0 * 49.0 * (n * D) as f64, size_of::<T>());
    let shape = format!("{side} x {side} x {D}, 3 streams");
    make.case::<T>("conv_fusion forward", &shape, flop, (7 * n * D / 2 * element) as f64, move |device, arena| {
        conv_fusion::forward(device, arena, &problem)
    });
    make.case::<T>("conv_fusion backward", &shape, 2.0 * flop, (7 * n * D * element) as f64, move |device, arena| {
        conv_fusion::backward(device, arena, &grad)
    });
    Ok(())
}

fn random_weights<T: Element>(make: &mut Maker) -> Result<Weights<T>> {
    let mut kernels = Vec::new();
    for side in conv_fusion::SIDES {
        kernels.push(make.matrix(D / 2, 2 * side * side)?);
    }
    Ok(Weights {
        mix: Some((make.matrix(1, 3)?, make.matrix(1, 1)?)),
        kernels: [kernels[0], kernels[1], kernels[2], kernels[3]],
        biases: make.rows(D / 2)?,
    })
}
