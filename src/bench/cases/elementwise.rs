//! A feed-forward's GELU and dropout as an op of its own, and the sum of three gradients.

use super::{D, DRAW, Maker};
use crate::{
    Result,
    device::Element,
    ops::{
        Dropout,
        elementwise::{self, Map},
    },
};

pub(super) fn cases<T: Element>(make: &mut Maker) -> Result<()> {
    let (n, element) = (make.tokens(), size_of::<T>());
    let (x, out) = (make.matrix::<T>(n, 2 * D)?, make.matrix(n, 2 * D)?);
    let map = Map { x, gelu: true, dropout: Dropout::new(Some(DRAW), 0, 0.3), out };
    let shape = format!("GELU + dropout 0.3: {n} x {}", 2 * D);
    make.case::<T>("map", &shape, 0.0, (4 * n * D * element) as f64, move |device, _| {
        elementwise::map(device, &[map])
    });
    let terms = [make.matrix::<T>(n, D)?, make.matrix(n, D)?, make.matrix(n, D)?];
    let out = make.matrix(n, D)?;
    make.case::<T>("sum", &format!("{n} x {D}"), 0.0, (4 * n * D * element) as f64, move |device, _| {
        elementwise::sum(device, &terms, out)
    });
    Ok(())
}
