//! Matrix products of a linear layer, with what stands next to them in the model done while a block
//! is still in cache.
//!
//! For y = x Wᵀ + b with x `[m, in]`, W `[out, in]` (PyTorch's `nn.Linear`):
//!
//! ```text
//! forward          y  = epilogue(x Wᵀ)
//! backward_input   dx = epilogue(dy W)           (=, or += with Epilogue::accumulate)
//! backward_weight  dW += dyᵀ x, db += colsum(dy)
//! ```
//!
//! Each takes a list of independent problems, which a GPU runs as one launch.
//!
//! On an H100 bf16 is multiplied by Hopper's wgmma, where there are tiles enough; elsewhere by
//! mma.sync. Neither has run on a GPU yet.

mod cpu;
pub(crate) mod kernel;

pub(super) use cpu::column_sums;
use kernel::{KernelMatmul, KernelWeightGrad, Kernels};

use super::Dropout;
use crate::{
    Result,
    device::{Arena, Cpu, Device, Element, View, storage},
};

/// What happens to a product while it is in cache, in this order.
#[derive(Clone, Copy)]
pub(crate) struct Epilogue<T> {
    /// Adds what `out` held before.
    pub accumulate: bool,
    /// Adds `[1, n]` to every row.
    pub bias: Option<View<T>>,
    /// Stores the value so far (`[m, n]`, what backward needs), then takes GELU of it.
    pub gelu: Option<View<T>>,
    /// Multiplies by GELU's derivative at the stored values.
    pub gelu_grad: Option<View<T>>,
    pub dropout: Option<Dropout>,
    /// Adds `[m, n]`.
    pub residual: Option<View<T>>,
}

impl<T> Default for Epilogue<T> {
    fn default() -> Self {
        Self { accumulate: false, bias: None, gelu: None, gelu_grad: None, dropout: None, residual: None }
    }
}

/// out `[m, n]` = epilogue(a `[m, k]` times b), b being `[n, k]` in [`forward`] and `[k, n]` in
/// [`backward_input`].
#[derive(Clone, Copy)]
pub(crate) struct Matmul<T> {
    pub a: View<T>,
    pub b: View<T>,
    pub out: View<T>,
    pub epilogue: Epilogue<T>,
}

/// dw `[out, in]` += dyᵀ x, db `[1, out]` += colsum(dy), from dy `[m, out]` and x `[m, in]`.
#[derive(Clone, Copy)]
pub(crate) struct WeightGrad<T: Element> {
    pub dy: View<T>,
    pub x: View<T>,
    pub dw: View<T::Sum>,
    pub db: View<T::Sum>,
}

pub(crate) fn forward<T: Element>(device: &Device, problems: &[Matmul<T>]) -> Result<()> {
    forward_by(device, problems, None)
}

/// [`forward`] by these kernels, where the device and `T` have them; None: by those that are
/// predicted to be the fastest.
pub(crate) fn forward_by<T: Element>(device: &Device, problems: &[Matmul<T>], by: Option<Kernels>) -> Result<()> {
    run(device, "matmul forward", problems, true, by)
}

pub(crate) fn backward_input<T: Element>(device: &Device, problems: &[Matmul<T>]) -> Result<()> {
    backward_input_by(device, problems, None)
}

/// As [`forward_by`].
pub(crate) fn backward_input_by<T: Element>(
    device: &Device,
    problems: &[Matmul<T>],
    by: Option<Kernels>,
) -> Result<()> {
    run(device, "matmul backward input", problems, false, by)
}

pub(crate) fn backward_weight<T: Element>(
    device: &Device,
    arena: &mut Arena,
    problems: &[WeightGrad<T>],
) -> Result<()> {
    backward_weight_by(device, arena, problems, None)
}

/// As [`forward_by`].
pub(crate) fn backward_weight_by<T: Element>(
    device: &Device,
    arena: &mut Arena,
    problems: &[WeightGrad<T>],
    by: Option<Kernels>,
) -> Result<()> {
    const OP: &str = "matmul backward weight";
    for p in problems {
        let (m, n, k) = (p.dy.rows(), p.dy.cols(), p.x.cols());
        p.x.check(OP, "x", &[m, k])?;
        p.dw.check(OP, "dw", &[n, k])?;
        p.db.check(OP, "db", &[1, n])?;
    }
    problems.iter().for_each(|p| device.count(2.0 * p.dy.rows() as f64 * (p.dw.rows() * p.dw.cols()) as f64));
    device.run_with_scratch(
        arena,
        |_| Ok(|cpu: &Cpu| cpu::backward_weight(cpu, problems)),
        |arena| {
            for p in problems {
                p.dy.check_for_kernels(OP, "dy")?;
                p.x.check_for_kernels(OP, "x")?;
                p.dw.check_for_kernels(OP, "dw")?;
            }
            let (storage, mut parts) =
                (storage::<T>()?, problems.iter().map(KernelWeightGrad::from).collect::<Vec<_>>());
            let kernels = Kernels::of(device, storage, by, || kernel::large_tiles(parts.iter().map(|p| p.dw)));
            let splits = kernel::splits(kernels, &parts);
            for ((p, part), splits) in problems.iter().zip(&mut parts).zip(splits) {
                let partial = arena.scratch::<f32>(1, kernel::partial_len(splits, p.dw.rows(), p.dw.cols()))?;
                (part.partial, part.splits) = (partial.address(), splits as i32);
            }
            Ok(kernel::backward_weight_launches(kernels, storage, &parts))
        },
    )
}

fn run<T: Element>(
    device: &Device,
    op: &'static str,
    problems: &[Matmul<T>],
    transposed: bool,
    by: Option<Kernels>,
) -> Result<()> {
    for p in problems {
        let (m, n, k) = (p.out.rows(), p.out.cols(), p.a.cols());
        p.a.check(op, "a", &[m, k])?;
        p.b.check(op, "b", &if transposed { [n, k] } else { [k, n] })?;
        let e = &p.epilogue;
        if let Some(bias) = e.bias {
            bias.check(op, "bias", &[1, n])?;
        }
        for (name, tensor) in [("pre-activation", e.gelu), ("pre-activation", e.gelu_grad), ("residual", e.residual)] {
            if let Some(tensor) = tensor {
                tensor.check(op, name, &[m, n])?;
            }
        }
    }
    problems.iter().for_each(|p| device.count(2.0 * (p.out.rows() * p.out.cols()) as f64 * p.a.cols() as f64));
    device.run(
        |cpu| cpu::run(cpu, problems, transposed),
        || {
            problems.iter().try_for_each(|p| check_for_kernels(op, p))?;
            let (storage, problems) = (storage::<T>()?, problems.iter().map(KernelMatmul::from).collect::<Vec<_>>());
            let launches = if transposed { kernel::forward_launches } else { kernel::backward_input_launches };
            let kernels = Kernels::of(device, storage, by, || kernel::large_tiles(problems.iter().map(|p| p.out)));
            Ok(launches(kernels, storage, &problems))
        },
    )
}

fn check_for_kernels<T: Element>(op: &'static str, p: &Matmul<T>) -> Result<()> {
    let Epilogue { bias, gelu, gelu_grad, residual, .. } = p.epilogue;
    let optional = [("bias", bias), ("pre-activation", gelu.or(gelu_grad)), ("residual", residual)];
    for (name, tensor) in [("a", Some(p.a)), ("b", Some(p.b)), ("out", Some(p.out))].into_iter().chain(optional) {
        tensor.map_or(Ok(()), |tensor| tensor.check_for_kernels(op, name))?;
    }
    Ok(())
}
