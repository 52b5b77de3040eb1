//! kernels/conv_fusion.cu: what its launches are for given shapes.

use bytemuck::{Pod, Zeroable};

use super::{ConvFusion, ConvFusionGrad, Grid};
use crate::{
    device::{Arg, Element, Launch, Matrix, Storage},
    ops::{depthwise::KernelShape, dropout::KernelDropout},
};

/// `Fusion` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct KernelFusion {
    pub streams: [Matrix; 3],
    pub out: Matrix,
    pub kernels: [u64; 4],
    pub biases: [u64; 4],
    pub mix_weight: u64,
    pub mix_bias: u64,
    pub dropout: KernelDropout,
    pub height: i32,
    pub width: i32,
}

/// `FusionGrad` of the kernel; parameters' gradients and scratch are f32.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct KernelFusionGrad {
    pub forward: KernelFusion,
    pub dout: Matrix,
    pub dstreams: [Matrix; 3],
    pub dkernels: [u64; 4],
    pub dbiases: [u64; 4],
    pub dmix_weight: u64,
    pub dmix_bias: u64,
    /// Scratch of [`partial_lens`] elements.
    pub partial: u64,
    pub mix_partial: u64,
}

impl<T: Element> From<&ConvFusion<T>> for KernelFusion {
    fn from(p: &ConvFusion<T>) -> Self {
        Self {
            streams: p.streams.map(Matrix::from),
            out: p.out.into(),
            kernels: p.weights.kernels.map(|k| k.address()),
            biases: p.weights.biases.map(|b| b.address()),
            mix_weight: p.weights.mix.map_or(0, |mix| mix.0.address()),
            mix_bias: p.weights.mix.map_or(0, |mix| mix.1.address()),
            dropout: p.dropout.into(),
            height: p.grid.height as i32,
            width: p.grid.width as i32,
        }
    }
}

impl<T: Element> From<&ConvFusionGrad<T>> for KernelFusionGrad {
    /// Without scratch.
    fn from(p: &ConvFusionGrad<T>) -> Self {
        Self {
            forward: (&p.forward).into(),
            dout: p.dout.into(),
            dstreams: p.dstreams.map(Matrix::from),
            dkernels: p.grads.kernels.map(|k| k.address()),
            dbiases: p.grads.biases.map(|b| b.address()),
            dmix_weight: p.grads.mix.map_or(0, |mix| mix.0.address()),
            dmix_bias: p.grads.mix.map_or(0, |mix| mix.1.address()),
            partial: 0,
            mix_partial: 0,
        }
    }
}

/// Elements of backward's two scratch arrays, for streams of width d.
pub(crate) fn partial_lens(grid: Grid, d: usize) -> [usize; 2] {
    [grid.partial_len(d), grid.backward_blocks(d) * 4]
}

/// Of the four forms of a kernel: mixed on a grid and on a sequence, a single stream on a grid and
/// on a sequence.
fn form(names: [&'static str; 4], p: &KernelFusion, grid: Grid) -> &'static str {
    names[2 * usize::from(p.mix_weight == 0) + usize::from(grid.is_sequence())]
}

pub(crate) fn forward_launch(storage: Storage, grid: Grid, p: &KernelFusion) -> Launch {
    let shape = KernelShape { problems: &[(grid, p.streams[0].cols as usize)], storage, args: Arg::new(*p) };
    let names = [
        "conv_fusion_forward",
        "conv_fusion_forward_sequence",
        "conv_fusion_forward_single",
        "conv_fusion_forward_single_sequence",
    ];
    shape.forward(form(names, p, grid), 32 * size_of::<f32>())
}

/// dstreams and the partial sums, then the sums of those.
pub(crate) fn backward_launches(storage: Storage, grid: Grid, p: &KernelFusionGrad) -> [Launch; 2] {
    let shape = KernelShape { problems: &[(grid, p.forward.streams[0].cols as usize)], storage, args: Arg::new(*p) };
    let backward = [
        "conv_fusion_backward",
        "conv_fusion_backward_sequence",
        "conv_fusion_backward_single",
        "conv_fusion_backward_single_sequence",
    ];
    let reduce = [
        "conv_fusion_reduce",
        "conv_fusion_reduce_sequence",
        "conv_fusion_reduce_single",
        "conv_fusion_reduce_single_sequence",
    ];
    let [backward, reduce] = [backward, reduce].map(|names| form(names, &p.forward, grid));
    // a block more for the mix
    let mixed = usize::from(p.forward.mix_weight != 0);
    // beside the tile: the channels' factors and the warps' sums for the mix, each from a multiple
    // of 128 bytes on
    [shape.backward(backward, 16 * size_of::<f32>(), 384), shape.reduce(reduce, mixed)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_follow_the_grid() {
        let streams = [Matrix::new(0, 3025, 512); 3];
        let forward = KernelFusion { streams, mix_weight: 64, ..Zeroable::zeroed() };
        let p = KernelFusionGrad { forward, ..Zeroable::zeroed() };
        let forward = forward_launch(Storage::F32, Grid::square(55), &p.forward);
        assert_eq!((forward.symbol().as_str(), forward.grid), ("conv_fusion_forward_f32", [16, 16, 1]));
        assert_eq!(forward.shared_bytes, 22 * 22 * 128 + 49 * 33 * 4);
        let [backward, reduce] = backward_launches(Storage::Bf16, Grid::sequence(3025), &p);
        assert_eq!((backward.symbol().as_str(), backward.grid), ("conv_fusion_backward_sequence_bf16", [24, 16, 1]));
        assert_eq!((reduce.kernel, reduce.grid), ("conv_fusion_reduce_sequence", [8 * 512 / 128 + 1, 1, 1]));
        let single = KernelFusion { mix_weight: 0, ..p.forward };
        let single = backward_launches(
            Storage::F32,
            Grid::square(55),
            &KernelFusionGrad { forward: single, ..Zeroable::zeroed() },
        );
        assert_eq!(
            single.map(|launch| (launch.kernel, launch.grid[0])),
            [("conv_fusion_backward_single", 2 * 8), ("conv_fusion_reduce_single", 50 * 512 / 128)]
        );
        assert_eq!(partial_lens(Grid::sequence(3025), 512), [24 * 8 * 512, 24 * 16 * 4]);
    }
}
