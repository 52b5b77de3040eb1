//! kernels/ppeg.cu: what its launches are for given shapes.

use bytemuck::{Pod, Zeroable};

use super::{Ppeg, PpegGrad};
use crate::{
    device::{Arg, Element, Launch, Matrix, Storage},
    ops::{
        constants::depthwise::{CHANNELS, PROBLEMS},
        depthwise::{Grid, KernelShape},
    },
};

/// `Ppeg` of the kernel; the last of the small kernels is absent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct KernelPpeg {
    pub x: Matrix,
    pub y: Matrix,
    pub kernels: [u64; 4],
    pub biases: [u64; 3],
    pub side: u64,
}

/// `PpegGrad` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct KernelPpegGrad {
    pub x: Matrix,
    pub dy: Matrix,
    pub dx: Matrix,
    pub kernels: [u64; 4],
    pub dkernels: [u64; 4],
    pub dbiases: [u64; 3],
    /// Scratch of [`partial_len`] f32.
    pub partial: u64,
    pub side: u64,
}

impl<T: Element> From<&Ppeg<T>> for KernelPpeg {
    fn from(p: &Ppeg<T>) -> Self {
        let [k0, k1, k2] = p.kernels.map(|k| k.address());
        Self {
            x: p.x.into(),
            y: p.y.into(),
            kernels: [k0, k1, k2, 0],
            biases: p.biases.map(|b| b.address()),
            side: p.side as u64,
        }
    }
}

impl<T: Element> From<&PpegGrad<T>> for KernelPpegGrad {
    /// Without scratch.
    fn from(p: &PpegGrad<T>) -> Self {
        let ([k0, k1, k2], [d0, d1, d2]) = (p.kernels.map(|k| k.address()), p.dkernels.map(|k| k.address()));
        Self {
            x: p.x.into(),
            dy: p.dy.into(),
            dx: p.dx.into(),
            kernels: [k0, k1, k2, 0],
            dkernels: [d0, d1, d2, 0],
            dbiases: p.dbiases.map(|b| b.address()),
            partial: 0,
            side: p.side as u64,
        }
    }
}

/// Elements of a backward problem's scratch, for c channels.
pub(crate) fn partial_len(side: usize, c: usize) -> usize {
    Grid::square(side).partial_len(c)
}

fn shape(x: Matrix, side: u64) -> (Grid, usize) {
    (Grid::square(side as usize), x.cols as usize)
}

/// One launch for every four problems.
pub(crate) fn forward_launches(storage: Storage, problems: &[KernelPpeg]) -> Vec<Launch> {
    let launch = |problems: &[KernelPpeg]| {
        let shapes: Vec<_> = problems.iter().map(|p| shape(p.x, p.side)).collect();
        let shape = KernelShape { problems: &shapes, storage, args: Arg::new(table(problems)) };
        shape.forward("ppeg_forward", CHANNELS * storage.bytes())
    };
    problems.chunks(PROBLEMS).map(launch).collect()
}

/// Of every four problems: dx and the partial sums, then the sum of those.
pub(crate) fn backward_launches(storage: Storage, problems: &[KernelPpegGrad]) -> Vec<Launch> {
    let launches = |problems: &[KernelPpegGrad]| {
        let shapes: Vec<_> = problems.iter().map(|p| shape(p.x, p.side)).collect();
        let shape = KernelShape { problems: &shapes, storage, args: Arg::new(table(problems)) };
        [shape.backward("ppeg_backward", CHANNELS * storage.bytes(), 0), shape.reduce("ppeg_reduce", 0)]
    };
    problems.chunks(PROBLEMS).flat_map(launches).collect()
}

fn table<P: Pod>(problems: &[P]) -> [P; PROBLEMS] {
    let mut table = [P::zeroed(); PROBLEMS];
    table[..problems.len()].copy_from_slice(problems);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(side: usize, c: usize) -> KernelPpegGrad {
        KernelPpegGrad { x: Matrix::new(0, side * side, c), side: side as u64, ..Zeroable::zeroed() }
    }

    #[test]
    fn launches_cover_the_largest_problem() {
        let launches = backward_launches(Storage::Bf16, &[problem(55, 512), problem(250, 40), problem(1, 8)]);
        assert_eq!(launches[0].symbol(), "ppeg_backward_bf16");
        // 256 tiles in 32 parts, 16 groups of 32 channels
        assert_eq!(launches[0].grid, [32, 16, 3]);
        // 22 x 22 tokens of 64 bytes, 49 taps of 33 floats
        assert_eq!(launches[0].shared_bytes, 22 * 22 * 64 + 49 * 33 * 4);
        assert_eq!(launches[1].grid, [50 * 512 / 128, 1, 3]);
        assert_eq!(partial_len(55, 512), 16 * 50 * 512);
    }

    #[test]
    fn a_launch_takes_four_problems() {
        let launches = backward_launches(Storage::F32, &[problem(3, 8); 5]);
        assert_eq!(launches.iter().map(|l| l.grid[2]).collect::<Vec<_>>(), [4, 4, 1, 1]);
        assert!(backward_launches(Storage::F32, &[]).is_empty());
    }
}
