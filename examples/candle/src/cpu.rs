//! The op on tensors in the host's memory.

use candle_core::{CpuStorage, Device, Error, Layout, Result, Storage, Tensor, WithDType, bail};
use crossfusion::device::Element;

use crate::{
    Call,
    problems::{self, Batch, Sizes},
};

/// out of q, k and v; the call keeps their log-sum-exp.
pub(crate) fn forward<T: Element<Sum: WithDType> + WithDType>(
    call: &Call,
    inputs: [(&CpuStorage, &Layout); 3],
) -> Result<CpuStorage> {
    let sizes = Sizes::of(inputs.map(|(_, layout)| layout))?;
    let [q, k, v] = inputs.map(|(storage, layout)| Batch::new(storage.as_slice::<T>()?.as_ptr(), layout));
    let mut out = vec![T::default(); sizes.q_len()];
    let mut lse = vec![T::Sum::default(); sizes.lse_len()];
    // SAFETY: candle's layouts stay within their storages, which are borrowed; out and lse are this
    // function's, and of the sizes.
    unsafe { problems::forward(call, sizes, [q?, k?, v?], out.as_mut_ptr(), lse.as_mut_ptr()) }.map_err(Error::wrap)?;
    call.keep(Tensor::from_vec(lse, sizes.lse_dims(), &Device::Cpu)?)?;
    Ok(T::to_cpu_storage_owned(out))
}

/// dq, dk and dv of q, k, v, out, its log-sum-exp and its gradient.
pub(crate) fn backward<T: Element<Sum: WithDType> + WithDType>(
    call: &Call,
    [q, k, v, out, lse, dout]: [&Tensor; 6],
) -> Result<[Tensor; 3]> {
    let sizes = Sizes::of([q.layout(), k.layout(), v.layout()])?;
    // locked for reading as long as the addresses are used
    let inputs = [q, k, v, out, dout].map(Tensor::storage_and_layout);
    let [q_read, k_read, v_read, out_read, dout_read] =
        inputs.each_ref().map(|(storage, layout)| Batch::new(slice::<T>(storage)?.as_ptr(), layout));
    let (lse, _) = lse.storage_and_layout();
    let mut dq = vec![T::default(); sizes.q_len()];
    let [mut dk, mut dv] = [(); 2].map(|_| vec![T::default(); sizes.k_len()]);
    let gradients = [&mut dq, &mut dk, &mut dv].map(|gradient| gradient.as_mut_ptr());
    // SAFETY: as in forward, whose q, k, v, out and lse these are; the gradients are this
    // function's.
    unsafe {
        let inputs = [q_read?, k_read?, v_read?, out_read?, dout_read?];
        problems::backward(call, sizes, inputs, slice(&lse)?.as_ptr(), gradients)
    }
    .map_err(Error::wrap)?;
    Ok([
        Tensor::from_vec(dq, q.shape(), &Device::Cpu)?,
        Tensor::from_vec(dk, k.shape(), &Device::Cpu)?,
        Tensor::from_vec(dv, v.shape(), &Device::Cpu)?,
    ])
}

fn slice<T: WithDType>(storage: &Storage) -> Result<&[T]> {
    match storage {
        Storage::Cpu(storage) => storage.as_slice(),
        _ => bail!("attention: a tensor is not in the host's memory"),
    }
}
