//! The op on tensors of a GPU, on candle's stream. NEVER YET RUN ON A GPU: see
//! README.md.
//!
//! The library is told addresses and a stream, so that its own binding of the driver need not be
//! candle's.

use candle_core::{
    CudaDevice, CudaStorage, DeviceLocation, Error, Layout, Result, Shape, Storage, Tensor,
    backend::{BackendDevice, BackendStorage},
    bail,
    cuda_backend::{
        CudaDType,
        cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop},
    },
    op::BackpropOp,
};
use crossfusion::device::{Device, Element};

use crate::{
    Call,
    problems::{self, Batch, Sizes},
};

/// The GPU of a device of candle's, on its stream.
pub(crate) fn device(cuda: &CudaDevice) -> Result<Device> {
    let DeviceLocation::Cuda { gpu_id } = cuda.location() else { bail!("attention: a GPU without a number") };
    let stream = cuda.cuda_stream();
    // SAFETY: a stream of this GPU's primary context, which the attention keeps alive with its
    // candle device.
    unsafe { Device::on_stream(gpu_id, stream.cu_stream().cast()) }.map_err(Error::wrap)
}

/// out of q, k and v; the call keeps their log-sum-exp.
pub(crate) fn forward<T>(call: &Call, inputs: [(&CudaStorage, &Layout); 3]) -> Result<CudaStorage>
where
    T: Element<Sum: CudaDType + DeviceRepr> + CudaDType + DeviceRepr,
{
    let sizes = Sizes::of(inputs.map(|(_, layout)| layout))?;
    let cuda = inputs[0].0.device();
    let stream = cuda.cuda_stream();
    // SAFETY: the kernels write all of both before anything reads them.
    let (mut out, mut lse) = unsafe { (cuda.alloc::<T>(sizes.q_len())?, cuda.alloc::<T::Sum>(sizes.lse_len())?) };
    {
        let [q, k, v] = inputs.map(|(storage, layout)| read(storage, layout, &stream));
        let ((q, _q), (k, _k), (v, _v)) = (q?, k?, v?);
        let ((out, _out), (lse, _lse)) = (write(&mut out, &stream), write(&mut lse, &stream));
        // SAFETY: candle's layouts stay within their storages, which are borrowed, and which are
        // freed in the order of the stream; out and lse are this function's, and of the sizes.
        unsafe { problems::forward(call, sizes, [q, k, v], out, lse) }.map_err(Error::wrap)?;
    }
    call.keep(tensor(lse, sizes.lse_dims(), cuda))?;
    Ok(CudaStorage::wrap_cuda_slice(out, cuda.clone()))
}

/// dq, dk and dv of q, k, v, out, its log-sum-exp and its gradient.
pub(crate) fn backward<T>(call: &Call, [q, k, v, out, lse, dout]: [&Tensor; 6]) -> Result<[Tensor; 3]>
where
    T: Element<Sum: CudaDType + DeviceRepr> + CudaDType + DeviceRepr,
{
    let sizes = Sizes::of([q.layout(), k.layout(), v.layout()])?;
    let cuda = q.device().as_cuda_device()?;
    let stream = cuda.cuda_stream();
    // SAFETY: as in forward.
    let (mut dq, mut dk, mut dv) =
        unsafe { (cuda.alloc::<T>(sizes.q_len())?, cuda.alloc::<T>(sizes.k_len())?, cuda.alloc::<T>(sizes.k_len())?) };
    {
        // locked for reading until the work is queued
        let inputs = [q, k, v, out, dout].map(Tensor::storage_and_layout);
        let (lse, _) = lse.storage_and_layout();
        let [q, k, v, out, dout] = inputs.each_ref().map(|(storage, layout)| read(on_gpu(storage)?, layout, &stream));
        let ((q, _q), (k, _k), (v, _v), (out, _out), (dout, _dout)) = (q?, k?, v?, out?, dout?);
        let (lse, _lse) = on_gpu(&lse)?.as_cuda_slice::<T::Sum>()?.device_ptr(&stream);
        let ((dq, _dq), (dk, _dk), (dv, _dv)) =
            (write(&mut dq, &stream), write(&mut dk, &stream), write(&mut dv, &stream));
        // SAFETY: as in forward, whose q, k, v, out and lse these are; the gradients are this
        // function's.
        unsafe { problems::backward(call, sizes, [q, k, v, out, dout], lse as *const T::Sum, [dq, dk, dv]) }
            .map_err(Error::wrap)?;
    }
    Ok([tensor(dq, q.shape(), cuda), tensor(dk, k.shape(), cuda), tensor(dv, v.shape(), cuda)])
}

/// A tensor to read, once other streams have written it. Others wait with writing it for what this
/// stream has been given when the second value is dropped; so in [`write()`].
fn read<'a, T: Element + CudaDType>(
    storage: &'a CudaStorage,
    layout: &Layout,
    stream: &'a CudaStream,
) -> Result<(Batch<T>, SyncOnDrop<'a>)> {
    let (address, queued) = storage.as_cuda_slice::<T>()?.device_ptr(stream);
    Ok((Batch::new(address as *const T, layout)?, queued))
}

fn write<'a, T>(slice: &'a mut CudaSlice<T>, stream: &'a CudaStream) -> (*mut T, SyncOnDrop<'a>) {
    let (address, queued) = slice.device_ptr_mut(stream);
    (address as *mut T, queued)
}

fn on_gpu(storage: &Storage) -> Result<&CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        _ => bail!("attention: a tensor is not in the GPU's memory"),
    }
}

fn tensor<T: CudaDType>(slice: CudaSlice<T>, shape: impl Into<Shape>, cuda: &CudaDevice) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, cuda.clone()));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}
