//! Adam with L2 weight decay (Kingma & Ba 2015, algorithm 1; the decay is added to the gradient,
//! not decoupled), over a whole arena.

use bytemuck::{Pod, Zeroable};

use super::constants::adam::THREADS;

use crate::{
    Error, Result,
    device::{Arg, Cpu, Device, Element, Launch, Real, Storage, View, is_rounded, round, storage},
};

/// The optimizer (Kingma & Ba 2015), with L2 weight decay.
#[derive(Clone, Copy, Debug)]
pub struct Adam {
    /// Step size.
    pub learning_rate: f64,
    /// L2: this share of a weight is added to its gradient.
    pub weight_decay: f64,
    /// How much of the first moment is kept.
    pub beta1: f64,
    /// How much of the second moment is kept.
    pub beta2: f64,
    /// Added to the second moment's root.
    pub epsilon: f64,
}

impl Adam {
    /// An error that names a setting under which parameters would not be numbers, or would move away.
    fn check(&self, step: u64) -> Result<()> {
        let Self { learning_rate, weight_decay, beta1, beta2, epsilon } = *self;
        let wrong = |name: &str, value: &dyn std::fmt::Display, expected: &str| {
            Err(Error::Usage(format!("adam: {name} is {value}, expected {expected}")))
        };
        for (name, value) in [("learning_rate", learning_rate), ("weight_decay", weight_decay), ("epsilon", epsilon)] {
            if !(value >= 0.0 && value.is_finite()) {
                return wrong(name, &value, "a number from 0");
            }
        }
        for (name, value) in [("beta1", beta1), ("beta2", beta2)] {
            if !(0.0..1.0).contains(&value) {
                return wrong(name, &value, "a number from 0 to below 1");
            }
        }
        if step == 0 { wrong("step", &step, "a number from 1") } else { Ok(()) }
    }
}

/// The arenas of one model, each `[1, n]`.
#[derive(Clone, Copy)]
pub(crate) struct Arenas<T: Element> {
    /// What is trained.
    pub params: View<T::Sum>,
    /// What the ops read: the same rounded to `T`, written by every step; the same memory where
    /// nothing is rounded.
    pub weights: View<T>,
    pub grads: View<T::Sum>,
    /// First and second moments.
    pub m: View<T::Sum>,
    pub v: View<T::Sum>,
}

/// One update, the `step`-th (from 1); the gradients are zero afterwards.
pub(crate) fn step<T: Element>(device: &Device, adam: &Adam, arenas: Arenas<T>, step: u64) -> Result<()> {
    const OP: &str = "adam";
    adam.check(step)?;
    let n = arenas.params.cols();
    for (name, tensor) in [("grads", arenas.grads), ("m", arenas.m), ("v", arenas.v)] {
        tensor.check(OP, name, &[1, n])?;
    }
    arenas.weights.check(OP, "weights", &[1, n])?;
    device.run(
        |cpu| cpu_step(cpu, adam, arenas, step),
        || {
            if !n.is_multiple_of(4) {
                return Err(Error::Usage(format!("adam: an arena of {n} elements, a kernel takes a multiple of 4")));
            }
            Ok(launch(storage::<T>()?, adam, &arenas, step))
        },
    )
}

/// The rate, and what the second moment's root is multiplied by, corrected for the moments' start
/// at 0.
fn corrected(adam: &Adam, step: u64) -> (f64, f64) {
    let correction = |beta: f64| 1.0 - beta.powf(step as f64);
    (adam.learning_rate / correction(adam.beta1), 1.0 / correction(adam.beta2).sqrt())
}

/// `Adam` of kernels/adam.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct KernelAdam {
    params: u64,
    grads: u64,
    m: u64,
    v: u64,
    weights: u64,
    n: u64,
    rate: f32,
    unbias: f32,
    beta1: f32,
    beta2: f32,
    decay: f32,
    epsilon: f32,
}

fn launch<T: Element>(storage: Storage, adam: &Adam, arenas: &Arenas<T>, step: u64) -> Option<Launch> {
    let n = arenas.params.cols();
    let (rate, unbias) = corrected(adam, step);
    let kernel = KernelAdam {
        params: arenas.params.address(),
        grads: arenas.grads.address(),
        m: arenas.m.address(),
        v: arenas.v.address(),
        weights: arenas.weights.address(),
        n: n as u64,
        rate: rate as f32,
        unbias: unbias as f32,
        beta1: adam.beta1 as f32,
        beta2: adam.beta2 as f32,
        decay: adam.weight_decay as f32,
        epsilon: adam.epsilon as f32,
    };
    (n > 0).then(|| Launch {
        kernel: "adam_step",
        storage,
        grid: [n.div_ceil(4 * THREADS) as u32, 1, 1],
        block: [THREADS as u32, 1, 1],
        shared_bytes: 0,
        args: vec![Arg::new(kernel)],
    })
}

fn cpu_step<T: Element>(cpu: &Cpu, adam: &Adam, state: Arenas<T>, step: u64) {
    let n = state.params.cols();
    let (rate, unbias) = corrected(adam, step);
    let [rate, unbias, beta1, beta2, decay, epsilon] =
        [rate, unbias, adam.beta1, adam.beta2, adam.weight_decay, adam.epsilon].map(T::Sum::of);
    let one = T::Sum::ONE;
    const CHUNK: usize = 1 << 15;
    cpu.parallel(
        n.div_ceil(CHUNK),
        #[inline(always)]
        |task| {
            let range = task * CHUNK..n.min((task + 1) * CHUNK);
            let of = |tensor: View<T::Sum>| tensor.cols_range(range.clone());
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
                *m = beta1 * *m + (one - beta1) * gradient;
                *v = beta2 * *v + (one - beta2) * gradient * gradient;
                *p += -(rate * *m / ((*v).sqrt() * unbias + epsilon));
                *g = T::Sum::ZERO;
            }
            if is_rounded::<T>() {
                // SAFETY: as above.
                round(params, unsafe { state.weights.cols_range(range.clone()).row_mut(0) });
            }
        },
    );
}
