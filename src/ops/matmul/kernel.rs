//! kernels/matmul.cu: what its launches are for given shapes.

use bytemuck::{Pod, Zeroable};

use super::{Matmul, WeightGrad};
use crate::{
    device::{Arg, Element, Launch, Matrix, Storage},
    ops::dropout::KernelDropout,
};

// As in the kernel.
const PROBLEMS: usize = 8;
const WEIGHT_PROBLEMS: usize = 12;
const STAGES: usize = 3;
/// Bytes of the depth in a stage.
const DEPTH_BYTES: usize = 128;

/// Blocks that fill a large GPU (an H100 has 132 multiprocessors); below it smaller tiles, or a split sum, spread the work.
const FULL: usize = 132;
/// Rows that a split of the weight gradient's sum takes at least.
const SPLIT_ROWS: usize = 512;

/// `Problem` of the kernel; a zeroed matrix is an absent one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct KernelMatmul {
    pub a: Matrix,
    pub b: Matrix,
    pub out: Matrix,
    pub pre: Matrix,
    pub residual: Matrix,
    pub bias: u64,
    pub dropout: KernelDropout,
    pub accumulate: i32,
    pub gelu: i32,
    pub gelu_grad: i32,
    first_tile: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Table {
    problem: [KernelMatmul; PROBLEMS],
    count: i32,
    padding: i32,
}

/// `WeightProblem` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct KernelWeightGrad {
    pub dy: Matrix,
    pub x: Matrix,
    pub dw: Matrix,
    pub db: u64,
    /// Scratch of `splits * (out * in + out)` f32 if there are several [`splits`].
    pub partial: u64,
    pub splits: i32,
    first_tile: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct WeightTable {
    problem: [KernelWeightGrad; WEIGHT_PROBLEMS],
    count: i32,
    padding: i32,
}

impl<T: Element> From<&Matmul<T>> for KernelMatmul {
    fn from(p: &Matmul<T>) -> Self {
        let e = &p.epilogue;
        let matrix = |view: Option<crate::device::View<T>>| view.map_or(Zeroable::zeroed(), Matrix::from);
        Self {
            a: p.a.into(),
            b: p.b.into(),
            out: p.out.into(),
            pre: matrix(e.gelu.or(e.gelu_grad)),
            residual: matrix(e.residual),
            bias: e.bias.map_or(0, |bias| bias.address()),
            dropout: e.dropout.into(),
            accumulate: e.accumulate.into(),
            gelu: e.gelu.is_some().into(),
            gelu_grad: e.gelu_grad.is_some().into(),
            first_tile: 0,
        }
    }
}

impl<T: Element> From<&WeightGrad<T>> for KernelWeightGrad {
    /// Without splits and scratch.
    fn from(p: &WeightGrad<T>) -> Self {
        let (dw, db) = (p.dw.into(), p.db.address());
        Self { dy: p.dy.into(), x: p.x.into(), dw, db, partial: 0, splits: 1, first_tile: 0 }
    }
}

/// A block's tile and threads, and its kernel.
#[derive(Clone, Copy)]
struct Shape {
    kernel: &'static str,
    side: usize,
    threads: u32,
}

impl Shape {
    /// The large tile where it gives enough blocks.
    fn choose([large, small]: [&'static str; 2], outs: impl Iterator<Item = Matrix> + Clone) -> Self {
        let shape = Self { kernel: large, side: 128, threads: 256 };
        if outs.map(|out| shape.tiles(out)).sum::<usize>() >= FULL {
            shape
        } else {
            Self { kernel: small, side: 64, threads: 128 }
        }
    }

    fn tiles(self, out: Matrix) -> usize {
        (out.rows as usize).div_ceil(self.side) * (out.cols as usize).div_ceil(self.side)
    }

    fn launch<T: Pod>(self, storage: Storage, blocks: usize, table: T) -> Launch {
        Launch {
            kernel: self.kernel,
            storage,
            grid: [blocks as u32, 1, 1],
            block: [self.threads, 1, 1],
            shared_bytes: (STAGES * 2 * self.side * DEPTH_BYTES) as u32,
            args: vec![Arg::new(table)],
        }
    }
}

pub fn forward_launches(storage: Storage, problems: &[KernelMatmul]) -> Vec<Launch> {
    launches(storage, problems, ["matmul_forward", "matmul_forward_small"])
}

pub fn backward_input_launches(storage: Storage, problems: &[KernelMatmul]) -> Vec<Launch> {
    launches(storage, problems, ["matmul_backward_input", "matmul_backward_input_small"])
}

fn launches(storage: Storage, problems: &[KernelMatmul], kernels: [&'static str; 2]) -> Vec<Launch> {
    let problems: Vec<_> = problems.iter().filter(|p| p.out.rows > 0 && p.out.cols > 0).copied().collect();
    let launch = |problems: &[KernelMatmul]| {
        let shape = Shape::choose(kernels, problems.iter().map(|p| p.out));
        let mut table = Table { problem: [Zeroable::zeroed(); PROBLEMS], count: problems.len() as i32, padding: 0 };
        let mut blocks = 0;
        for (place, p) in table.problem.iter_mut().zip(problems) {
            *place = KernelMatmul { first_tile: blocks as i32, ..*p };
            blocks += shape.tiles(p.out);
        }
        shape.launch(storage, blocks, table)
    };
    problems.chunks(PROBLEMS).map(launch).collect()
}

/// In how many parts each problem's rows are summed: about two blocks a multiprocessor, shared out by rows.
pub fn splits(problems: &[KernelWeightGrad]) -> Vec<usize> {
    let shape = weight_shape(problems);
    let work: usize = problems.iter().map(|p| shape.tiles(p.dw) * p.dy.rows as usize).sum();
    let of = |p: &KernelWeightGrad| {
        let rows = p.dy.rows as usize;
        (2 * FULL * rows).div_ceil(work.max(1)).clamp(1, rows.div_ceil(SPLIT_ROWS).max(1))
    };
    problems.iter().map(of).collect()
}

/// f32 elements of scratch for a problem in `splits` parts.
pub fn partial_len(splits: usize, out: usize, input: usize) -> usize {
    if splits > 1 { splits * (out * input + out) } else { 0 }
}

/// A tile is chosen for all problems of a call together, so that `splits` and the launches agree.
fn weight_shape(problems: &[KernelWeightGrad]) -> Shape {
    let large = |p: &KernelWeightGrad| p.dw.rows >= 128 && p.dw.cols >= 128;
    if problems.iter().all(large) {
        Shape { kernel: "matmul_backward_weight", side: 128, threads: 256 }
    } else {
        Shape { kernel: "matmul_backward_weight_small", side: 64, threads: 128 }
    }
}

/// The sums, and where a sum was split a second launch that adds its parts up.
pub fn backward_weight_launches(storage: Storage, problems: &[KernelWeightGrad]) -> Vec<Launch> {
    let shape = weight_shape(problems);
    let mut launches = Vec::new();
    for problems in problems.chunks(WEIGHT_PROBLEMS) {
        let mut table =
            WeightTable { problem: [Zeroable::zeroed(); WEIGHT_PROBLEMS], count: problems.len() as i32, padding: 0 };
        let (mut blocks, mut longest) = (0, 0);
        for (place, p) in table.problem.iter_mut().zip(problems) {
            *place = KernelWeightGrad { first_tile: blocks as i32, ..*p };
            blocks += shape.tiles(p.dw) * p.splits as usize;
            if p.splits > 1 {
                longest = longest.max(p.dw.rows as usize * (p.dw.cols as usize + 1));
            }
        }
        if blocks > 0 {
            launches.push(shape.launch(storage, blocks, table));
        }
        if longest > 0 {
            let reduce = Shape { kernel: "matmul_backward_weight_reduce", side: 0, threads: 256 };
            let mut launch = reduce.launch(storage, longest.div_ceil(4 * 256), table);
            launch.grid[1] = problems.len() as u32;
            launches.push(launch);
        }
    }
    launches
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(m: usize, n: usize) -> KernelMatmul {
        KernelMatmul { out: Matrix::new(0, m, n), ..Zeroable::zeroed() }
    }

    #[test]
    fn tiles_are_large_where_they_fill_a_gpu() {
        let launches = forward_launches(Storage::Bf16, &[product(12000, 512), product(3000, 512), product(800, 512)]);
        assert_eq!(launches.len(), 1);
        assert_eq!((launches[0].kernel, launches[0].grid[0]), ("matmul_forward", (94 + 24 + 7) * 4));
        assert_eq!(launches[0].shared_bytes, 96 << 10);
        let small = forward_launches(Storage::Bf16, &[product(3025, 512)]);
        assert_eq!((small[0].kernel, small[0].grid[0]), ("matmul_forward_small", 48 * 8));
    }

    #[test]
    fn empty_problems_take_no_blocks_and_many_take_several_launches() {
        assert!(forward_launches(Storage::F32, &[product(0, 512)]).is_empty());
        let launches = forward_launches(Storage::F32, &[product(5, 8); 9]);
        assert_eq!(launches.iter().map(|l| l.grid[0]).collect::<Vec<_>>(), [8, 1]);
    }

    #[test]
    fn long_sums_are_split_until_a_gpu_is_full() {
        let weight = |rows, out, input| KernelWeightGrad {
            dy: Matrix::new(0, rows, out),
            x: Matrix::new(0, rows, input),
            dw: Matrix::new(0, out, input),
            ..Zeroable::zeroed()
        };
        assert_eq!(splits(&[weight(12000, 512, 512)]), [17]);
        assert_eq!(splits(&[weight(300, 512, 512)]), [1]);
        assert_eq!(splits(&[weight(12000, 512, 2048), weight(800, 512, 2048)]), [4, 1]);
        assert_eq!(partial_len(4, 2, 3), 32);
    }
}
