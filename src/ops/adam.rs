//! Adam with L2 weight decay (Kingma & Ba 2015, algorithm 1; the decay is added to the gradient, not decoupled), over a whole arena.

use crate::{
    Result,
    device::{Device, Real, View},
};

#[derive(Clone, Copy, Debug)]
pub struct Adam {
    pub learning_rate: f64,
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
}

/// The arenas of one model, each `[1, n]`.
#[derive(Clone, Copy)]
pub struct State<T> {
    pub params: View<T>,
    pub grads: View<T>,
    /// First and second moments.
    pub m: View<T>,
    pub v: View<T>,
}

/// One update, the `step`-th (from 1); the gradients are zero afterwards.
pub fn step<T: Real>(device: &Device, adam: &Adam, state: State<T>, step: u64) -> Result<()> {
    const OP: &str = "adam";
    let n = state.params.cols();
    for (name, tensor) in [("grads", state.grads), ("m", state.m), ("v", state.v)] {
        tensor.check(OP, name, &[1, n])?;
    }
    let correction = |beta: f64| 1.0 - beta.powf(step as f64);
    let rate = T::of(adam.learning_rate / correction(adam.beta1));
    let unbias = T::of(1.0 / correction(adam.beta2).sqrt());
    let (beta1, beta2, decay, epsilon) =
        (T::of(adam.beta1), T::of(adam.beta2), T::of(adam.weight_decay), T::of(adam.epsilon));
    if let Device::Cpu(cpu) = device {
        const CHUNK: usize = 1 << 15;
        cpu.parallel(
            n.div_ceil(CHUNK),
            #[inline(always)]
            |task| {
                let range = task * CHUNK..n.min((task + 1) * CHUNK);
                let of = |tensor: View<T>| tensor.cols_range(range.clone());
                // SAFETY: the views are live, and each range is one task's.
                let (params, grads, m, v) = unsafe {
                    (
                        of(state.params).row_mut(0),
                        of(state.grads).row_mut(0),
                        of(state.m).row_mut(0),
                        of(state.v).row_mut(0),
                    )
                };
                for (((p, g), m), v) in params.iter_mut().zip(grads).zip(m).zip(v) {
                    let gradient = *g + decay * *p;
                    *m = beta1 * *m + (T::ONE - beta1) * gradient;
                    *v = beta2 * *v + (T::ONE - beta2) * gradient * gradient;
                    *p += -(rate * *m / ((*v).sqrt() * unbias + epsilon));
                    *g = T::ZERO;
                }
            },
        );
    }
    Ok(())
}
