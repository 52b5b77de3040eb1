//! LayerNorm of one branch.

use super::{D, Maker};
use crate::{
    Result,
    device::Element,
    ops::layer_norm::{self, Norm, NormGrad},
};

pub(super) fn cases<T: Element>(make: &mut Maker) -> Result<()> {
    let n = make.tokens();
    let (x, y, dy, dx) = (make.matrix::<T>(n, D)?, make.matrix(n, D)?, make.matrix(n, D)?, make.matrix(n, D)?);
    let (stats, [weight, bias], [dweight, dbias]) = (make.matrix(n, 2)?, make.rows(D)?, make.rows(D)?);
    let norm = Norm { x, stats, weight, bias, y };
    let shape = format!("{n} x {D}");
    let bytes = (2 * n * D * size_of::<T>()) as f64;
    make.case::<T>("layer_norm forward", &shape, 0.0, bytes, move |device, _| layer_norm::forward(device, &[norm]));
    let grad = NormGrad { x, stats, weight, dy, dx, dweight, dbias };
    make.case::<T>("layer_norm backward", &shape, 0.0, 1.5 * bytes, move |device, arena| {
        layer_norm::backward(device, arena, &[grad])
    });
    Ok(())
}
