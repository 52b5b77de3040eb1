//! Adam's step over all parameters of a model.

use super::Maker;
use crate::{
    Result,
    device::{Element, View},
    ops::adam::{self, Adam, Arenas},
};

pub(super) fn cases<T: Element>(make: &mut Maker) -> Result<()> {
    let parameters = make.slide.parameters;
    let [params, grads, m] = make.rows::<T::Sum, 3>(parameters)?;
    let v = make.zeros(1, parameters)?; // a second moment is not negative
    let weights = View::of_sums(params).map_or_else(|| make.matrix(1, parameters), Ok)?;
    let arenas = Arenas { params, weights, grads, m, v };
    // rate 0: a thousand runs must not wander off
    let settings = Adam { learning_rate: 0.0, weight_decay: 0.0, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
    let moved = 8 * size_of::<T::Sum>() + size_of::<T>();
    make.case::<T>("adam", &parameters.to_string(), 0.0, (parameters * moved) as f64, move |device, _| {
        adam::step::<T>(device, &settings, arenas, 1)
    });
    Ok(())
}
