//! The ops on another library's memory and stream of a GPU: cudarc's `CudaSlice` and `CudaStream`.
//! Ignored where there is no GPU; .ci/run has it run under the emulated driver.
#![cfg(feature = "programs")]

use std::sync::Arc;

use crossfusion::{
    device::{Cpu, Device, Mat, MatMut, Tensor, Workspace},
    ops::{self, Attention},
};
use cudarc::driver::{CudaContext, DevicePtr, DevicePtrMut};

const ROWS: usize = 40;
const COLS: usize = 64;
const HEADS: usize = 2;

#[test]
#[ignore = "needs --device cuda: a GPU, or the emulated driver"]
fn attention_on_a_callers_slices_and_stream() {
    let values: Vec<f32> = (0..ROWS * COLS).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0).collect();

    let context = CudaContext::new(0).unwrap();
    let stream = context.new_stream().unwrap();
    // SAFETY: written before it is read.
    let mut host = unsafe { context.alloc_pinned::<f32>(ROWS * COLS) }.unwrap();
    host.as_mut_slice().unwrap().copy_from_slice(&values);
    let x = stream.clone_htod(&host).unwrap();
    let (mut out, mut lse) =
        (stream.alloc_zeros::<f32>(ROWS * COLS).unwrap(), stream.alloc_zeros::<f32>(HEADS * ROWS).unwrap());
    // SAFETY: a stream of the primary context, which outlives the device.
    let device = Arc::new(unsafe { Device::on_stream(0, stream.cu_stream().cast()) }.unwrap());
    let workspace = &mut Workspace::new(&device).unwrap();
    {
        // the guards tell cudarc of the work when they go, behind it on the stream
        let ((x, _read), (out, _out), (lse, _lse)) =
            (x.device_ptr(&stream), out.device_ptr_mut(&stream), lse.device_ptr_mut(&stream));
        // SAFETY: slices of these sizes, which live until the stream has done the work.
        let (x, out, lse) = unsafe {
            (
                Mat::from_raw(&device, x as *const f32, ROWS, COLS, COLS).unwrap(),
                MatMut::from_raw(&device, out as *mut f32, ROWS, COLS, COLS).unwrap(),
                MatMut::from_raw(&device, lse as *mut f32, HEADS, ROWS, ROWS).unwrap(),
            )
        };
        ops::attention(workspace, &mut [Attention { q: x, k: x, v: x, heads: HEADS, dropout: None, out, lse }])
            .unwrap();
    }
    stream.memcpy_dtoh(&out, &mut host).unwrap();
    let got = host.as_slice().unwrap().to_vec(); // waits for the copy

    let cpu = Arc::new(Device::Cpu(Cpu::new(1).unwrap()));
    let x = Tensor::from_slice(&cpu, &values, ROWS, COLS).unwrap();
    let (mut out, mut lse) = (Tensor::zeros(&cpu, ROWS, COLS).unwrap(), Tensor::zeros(&cpu, HEADS, ROWS).unwrap());
    let (q, out_mut, lse_mut) = (x.mat(), out.mat_mut(), lse.mat_mut());
    let call = Attention { q, k: q, v: q, heads: HEADS, dropout: None, out: out_mut, lse: lse_mut };
    ops::attention(&mut Workspace::new(&cpu).unwrap(), &mut [call]).unwrap();
    for (i, (got, expected)) in got.iter().zip(out.to_vec().unwrap()).enumerate() {
        assert!((got - expected).abs() < 1e-5, "{i}: {got}, expected {expected}");
    }
}
