//! CrossFusion's fused attention as an op of [candle](candle_core): forward, backward and dropout,
//! on the CPU and (feature `cuda`) on candle's CUDA stream.
//!
//! ```
//! use candle_core::{Device, Error, Tensor, Var};
//! use crossfusion::ops::{Draw, Dropout};
//! use crossfusion_candle_example::FusedAttention;
//!
//! # fn main() -> candle_core::Result<()> {
//! let device = Device::Cpu;
//! let attention = FusedAttention::new(&device)?; // once
//!
//! // 30 queries attend to 120 keys; (batch, length, heads, head_dim), as in candle-flash-attn
//! let q = Var::randn(0f32, 1., (1, 30, 4, 32), &device)?;
//! let k = Tensor::randn(0f32, 1., (1, 120, 4, 32), &device)?;
//! let v = Var::randn(0f32, 1., (1, 120, 4, 32), &device)?;
//!
//! // another step for each pass, another site for each layer
//! let dropout = Dropout::with_rate(Draw { seed: 7, step: 0 }, 0, 0.2).map_err(Error::wrap)?;
//! let out = attention.forward(&q, &k, &v, dropout)?;
//! let gradients = out.sum_all()?.backward()?;
//! assert_eq!(gradients.get(&v).unwrap().dims(), [1, 120, 4, 32]);
//! # Ok(())
//! # }
//! ```
//!
//! How it is made, for an op of your own:
//!
//! - [`FusedAttention`] has what outlives a call: the library's device, which has threads on a CPU
//!   and loaded kernels on a GPU.
//! - `Call` is one call, and candle's `CustomOp3`. It keeps the log-sum-exp that backward needs:
//!   candle hands an op's inputs, its output and the output's gradient to `bwd`, and nothing else.
//!   Each call has an op of its own, so that the log-sum-exp is the one of its output, however
//!   often backward runs, and is freed with the graph. To compute it again in `bwd` would cost a
//!   forward pass.
//! - cpu.rs and cuda.rs allocate what is written and find addresses; problems.rs makes the
//!   library's calls of addresses, the same for both.
//!
//! Gradients are without a graph: they cannot be differentiated again.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod plain;
mod problems;

use std::sync::{Arc, OnceLock};

use candle_core::{
    CpuStorage, CustomOp3, DType, Device, Error, Layout, Result, Shape, Tensor, backend::BackendStorage, bail,
};
use crossfusion::{device, ops::Dropout};
use half::bf16;

use problems::{Batch, Sizes};

/// Fused attention on one device of candle's. Cheap to clone.
#[derive(Clone)]
pub struct FusedAttention {
    /// Work on a GPU goes to the stream of the device below, so this one is dropped first.
    device: Arc<device::Device>,
    candle: Device,
}

impl FusedAttention {
    /// Takes all cores of a CPU, or loads the kernels on a GPU: make one and keep it.
    pub fn new(candle: &Device) -> Result<Self> {
        let device = match candle {
            Device::Cpu => device::Device::Cpu(device::Cpu::new(0).map_err(Error::wrap)?),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => cuda::device(device)?,
            other => bail!("attention: {:?}: expected a CPU, or with feature `cuda` an NVIDIA GPU", other.location()),
        };
        Ok(Self { device: Arc::new(device), candle: candle.clone() })
    }

    /// dropout(softmax(q kᵀ / sqrt(head_dim))) v of each head, never holding all scores.
    ///
    /// q and the result are `(batch, queries, heads, head_dim)`, k and v `(batch, keys, heads,
    /// head_dim)`, all F32 or BF16, or F64 on a CPU; heads have up to 128 columns. They are read
    /// where they lie if each token's heads lie side by side, as in a part of a wider projection,
    /// and copied first if not. Without keys the result is 0.
    ///
    /// Head h of entry b draws its dropout at the site + b heads + h; backward draws the same.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
        for (name, tensor) in [("q", q), ("k", k), ("v", v)] {
            if !tensor.device().same_device(&self.candle) {
                bail!("attention: {name} is on another device than this attention");
            }
            if tensor.dtype() != q.dtype() {
                bail!("attention: {name} is {:?}, but q {:?}", tensor.dtype(), q.dtype());
            }
        }
        let sizes = Sizes::of([q.layout(), k.layout(), v.layout()])?;
        if let Some(dropout) = dropout {
            sizes.check_sites(dropout)?;
        }
        let call = Call { on: self.clone(), dropout, lse: OnceLock::new() };
        readable(q)?.apply_op3(&readable(k)?, &readable(v)?, call)
    }
}

/// The tensor, or a copy of it in a layout that the op reads.
fn readable(tensor: &Tensor) -> Result<Tensor> {
    if Batch::reads(tensor.layout()) { Ok(tensor.clone()) } else { tensor.contiguous() }
}

/// One call of the op.
struct Call {
    on: FusedAttention,
    dropout: Option<Dropout>,
    /// `(batch, heads, queries)`: the scores' log-sum-exp, which forward writes and every backward
    /// pass reads.
    lse: OnceLock<Tensor>,
}

impl Call {
    fn keep(&self, lse: Tensor) -> Result<()> {
        self.lse.set(lse).map_err(|_| Error::msg("attention: a second forward pass of one call"))
    }
}

fn unsupported<T>(dtype: DType) -> Result<T> {
    bail!("attention: {dtype:?}: expected F32 or BF16, or F64 on a CPU")
}

impl CustomOp3 for Call {
    fn name(&self) -> &'static str {
        "fused attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let inputs = [(q, q_layout), (k, k_layout), (v, v_layout)];
        let out = match q {
            CpuStorage::F32(_) => cpu::forward::<f32>(self, inputs),
            CpuStorage::BF16(_) => cpu::forward::<bf16>(self, inputs),
            CpuStorage::F64(_) => cpu::forward::<f64>(self, inputs),
            other => unsupported(other.dtype()),
        };
        Ok((out?, q_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &candle_core::CudaStorage,
        q_layout: &Layout,
        k: &candle_core::CudaStorage,
        k_layout: &Layout,
        v: &candle_core::CudaStorage,
        v_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let inputs = [(q, q_layout), (k, k_layout), (v, v_layout)];
        let out = match q.dtype() {
            DType::F32 => cuda::forward::<f32>(self, inputs),
            DType::BF16 => cuda::forward::<bf16>(self, inputs),
            other => unsupported(other),
        };
        Ok((out?, q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(lse) = self.lse.get() else { bail!("attention: backward of what never went forward") };
        // candle 0.11 adds up gradients into contiguous ones, but no contract says so: a sum's own
        // is one number, with strides of 0
        let tensors = [q, k, v, out, lse, &readable(dout)?];
        let gradients = match (&self.on.candle, q.dtype()) {
            (Device::Cpu, DType::F32) => cpu::backward::<f32>(self, tensors),
            (Device::Cpu, DType::BF16) => cpu::backward::<bf16>(self, tensors),
            (Device::Cpu, DType::F64) => cpu::backward::<f64>(self, tensors),
            #[cfg(feature = "cuda")]
            (Device::Cuda(_), DType::F32) => cuda::backward::<f32>(self, tensors),
            #[cfg(feature = "cuda")]
            (Device::Cuda(_), DType::BF16) => cuda::backward::<bf16>(self, tensors),
            (_, other) => unsupported(other),
        };
        let [dq, dk, dv] = gradients?;
        // the kernels find all three together; those that nobody asked for end here
        Ok((q.track_op().then_some(dq), k.track_op().then_some(dk), v.track_op().then_some(dv)))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    /// What autograd hands on is contiguous today, so this asks the op itself.
    #[test]
    fn the_outputs_gradient_is_read_in_any_layout() -> Result<()> {
        let random = |shape| Var::randn(0f64, 1., shape, &Device::Cpu);
        let (q, k, v) = (random((2, 5, 3, 4))?, random((2, 9, 3, 4))?, random((2, 9, 3, 4))?);
        let on = FusedAttention::new(&Device::Cpu)?;
        let call = Call { on, dropout: None, lse: OnceLock::new() };
        let inputs = [&q, &k, &v].map(|input| input.storage_and_layout());
        let [q_in, k_in, v_in] = inputs.each_ref().map(|(storage, layout)| match &**storage {
            candle_core::Storage::Cpu(storage) => (storage, *layout),
            _ => unreachable!("made on a CPU"),
        });
        let (out, shape) = call.cpu_fwd(q_in.0, q_in.1, k_in.0, k_in.1, v_in.0, v_in.1)?;
        let out = Tensor::from_slice(out.as_slice::<f64>()?, shape, &Device::Cpu)?;

        let one = Tensor::ones((1, 1, 1, 1), DType::F64, &Device::Cpu)?.expand((2, 5, 3, 4))?;
        let transposed = random((2, 3, 5, 4))?.transpose(1, 2)?;
        for dout in [one, transposed] {
            assert!(!dout.is_contiguous());
            let gradients = |dout: &Tensor| -> Result<Vec<Vec<f64>>> {
                let (dq, dk, dv) = call.bwd(&q, &k, &v, &out, dout)?;
                [dq, dk, dv].into_iter().flatten().map(|gradient| gradient.flatten_all()?.to_vec1()).collect()
            };
            let got = gradients(&dout)?;
            assert_eq!(got.len(), 3);
            assert_eq!(got, gradients(&dout.contiguous()?)?);
        }
        Ok(())
    }
}
