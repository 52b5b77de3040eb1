//! kernels/matmul.cu and matmul_wgmma.cu: what their launches are for given shapes.

use bytemuck::{Pod, Zeroable};

use super::{Matmul, WeightGrad};
use crate::{
    device::{Arg, Device, Element, Launch, Matrix, Storage},
    ops::{
        MULTIPROCESSORS,
        constants::{
            matmul::{PROBLEMS, WEIGHT_PROBLEMS},
            product::STAGES,
        },
        dropout::KernelDropout,
    },
};

/// Bytes of the depth in a stage.
const DEPTH_BYTES: usize = 128;

/// Rows that a split of the weight gradient's sum takes at least.
const SPLIT_ROWS: usize = 512;

/// `Problem` of the kernel; a zeroed matrix is an absent one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct KernelMatmul {
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
pub(crate) struct KernelWeightGrad {
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

/// Which of the two files' kernels multiply.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kernels {
    /// matmul.cu, any GPU since Ampere.
    Mma,
    /// matmul_wgmma.cu, Hopper, bf16 alone. Always the large tile.
    Wgmma,
}

impl Kernels {
    /// The wanted ones, if the device and the storage type have them; without a wish Hopper's, where
    /// their tiles are enough to keep half of a GPU's multiprocessors busy.
    pub(super) fn of(device: &Device, storage: Storage, wanted: Option<Self>, tiles: impl Fn() -> usize) -> Self {
        match wanted {
            _ if !device.has_wgmma() || storage != Storage::Bf16 => Self::Mma,
            Some(kernels) => kernels,
            None if 2 * tiles() >= MULTIPROCESSORS => Self::Wgmma,
            None => Self::Mma,
        }
    }
}

/// Tiles of 128 x 128 of some outputs.
pub(super) fn large_tiles(outputs: impl Iterator<Item = Matrix>) -> usize {
    outputs.map(|out| Shape::large("").tiles(out)).sum()
}

/// A block's tile and threads, and its kernel.
#[derive(Clone, Copy)]
struct Shape {
    kernel: &'static str,
    side: usize,
    threads: u32,
}

impl Shape {
    fn large(kernel: &'static str) -> Self {
        Self { kernel, side: 128, threads: 256 }
    }

    fn small(kernel: &'static str) -> Self {
        Self { kernel, side: 64, threads: 128 }
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

pub(crate) fn forward_launches(kernels: Kernels, storage: Storage, problems: &[KernelMatmul]) -> Vec<Launch> {
    launches(kernels, storage, problems, ["matmul_forward", "matmul_forward_small", "matmul_forward_wgmma"])
}

pub(crate) fn backward_input_launches(kernels: Kernels, storage: Storage, problems: &[KernelMatmul]) -> Vec<Launch> {
    const NAMES: [&str; 3] = ["matmul_backward_input", "matmul_backward_input_small", "matmul_backward_input_wgmma"];
    launches(kernels, storage, problems, NAMES)
}

/// Of the portable kernels the large tile where it gives enough blocks.
fn launches(
    kernels: Kernels,
    storage: Storage,
    problems: &[KernelMatmul],
    [large, small, wgmma]: [&'static str; 3],
) -> Vec<Launch> {
    let problems: Vec<_> = problems.iter().filter(|p| p.out.rows > 0 && p.out.cols > 0).copied().collect();
    let launch = |problems: &[KernelMatmul]| {
        let fill = |shape: Shape| problems.iter().map(|p| shape.tiles(p.out)).sum::<usize>() >= MULTIPROCESSORS;
        let shape = match kernels {
            Kernels::Wgmma => Shape::large(wgmma),
            Kernels::Mma if fill(Shape::large(large)) => Shape::large(large),
            Kernels::Mma => Shape::small(small),
        };
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

/// In how many parts each problem's rows are summed: about two blocks a multiprocessor, shared out
/// by rows.
pub(crate) fn splits(kernels: Kernels, problems: &[KernelWeightGrad]) -> Vec<usize> {
    let shape = weight_shape(kernels, problems);
    let work: usize = problems.iter().map(|p| shape.tiles(p.dw) * p.dy.rows as usize).sum();
    let of = |p: &KernelWeightGrad| {
        let rows = p.dy.rows as usize;
        (2 * MULTIPROCESSORS * rows).div_ceil(work.max(1)).clamp(1, rows.div_ceil(SPLIT_ROWS).max(1))
    };
    problems.iter().map(of).collect()
}

/// f32 elements of scratch for a problem in `splits` parts.
pub(crate) fn partial_len(splits: usize, out: usize, input: usize) -> usize {
    if splits > 1 { splits * (out * input + out) } else { 0 }
}

/// A tile is chosen for all problems of a call together, so that `splits` and the launches agree.
fn weight_shape(kernels: Kernels, problems: &[KernelWeightGrad]) -> Shape {
    match kernels {
        Kernels::Wgmma => Shape::large("matmul_backward_weight_wgmma"),
        Kernels::Mma if problems.iter().all(|p| p.dw.rows >= 128 && p.dw.cols >= 128) => {
            Shape::large("matmul_backward_weight")
        }
        Kernels::Mma => Shape::small("matmul_backward_weight_small"),
    }
}

/// The sums, and where a sum was split a second launch that adds its parts up.
pub(crate) fn backward_weight_launches(
    kernels: Kernels,
    storage: Storage,
    problems: &[KernelWeightGrad],
) -> Vec<Launch> {
    let shape = weight_shape(kernels, problems);
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
    use crate::device::{Dry, Facts};

    fn product(m: usize, n: usize) -> KernelMatmul {
        KernelMatmul { out: Matrix::new(0, m, n), ..Zeroable::zeroed() }
    }

    #[test]
    fn tiles_are_large_where_they_fill_a_gpu() {
        let launches = forward_launches(
            Kernels::Mma,
            Storage::Bf16,
            &[product(12000, 512), product(3000, 512), product(800, 512)],
        );
        assert_eq!(launches.len(), 1);
        assert_eq!((launches[0].kernel, launches[0].grid[0]), ("matmul_forward", (94 + 24 + 7) * 4));
        assert_eq!(launches[0].shared_bytes, 96 << 10);
        let small = forward_launches(Kernels::Mma, Storage::Bf16, &[product(3025, 512)]);
        assert_eq!((small[0].kernel, small[0].grid[0]), ("matmul_forward_small", 48 * 8));
    }

    #[test]
    fn hopper_s_kernels_are_taken_where_they_fill_half_of_it() {
        let facts = |has_wgmma| Facts { runs_kernels: true, has_wgmma };
        let [hopper, ampere] = [true, false].map(|has_wgmma| Device::Dry(Dry::new(facts(has_wgmma))));
        let of =
            |device, storage, m| Kernels::of(device, storage, None, || large_tiles([product(m, 512).out].into_iter()));
        assert_eq!(of(&hopper, Storage::Bf16, 3026), Kernels::Wgmma);
        assert_eq!(of(&hopper, Storage::Bf16, 1), Kernels::Mma);
        assert_eq!(of(&hopper, Storage::F32, 3026), Kernels::Mma);
        assert_eq!(of(&ampere, Storage::Bf16, 3026), Kernels::Mma);
        assert_eq!(Kernels::of(&ampere, Storage::Bf16, Some(Kernels::Wgmma), || 1000), Kernels::Mma);
        assert_eq!(Kernels::of(&hopper, Storage::Bf16, Some(Kernels::Mma), || 1000), Kernels::Mma);
    }

    #[test]
    fn hopper_s_kernels_take_the_large_tile_of_any_shape() {
        for launches in [forward_launches, backward_input_launches] {
            let launches = launches(Kernels::Wgmma, Storage::Bf16, &[product(3025, 512), product(1, 8)]);
            assert_eq!(launches.len(), 1);
            assert!(launches[0].kernel.ends_with("_wgmma"));
            assert_eq!((launches[0].grid[0], launches[0].block[0]), (24 * 4 + 1, 256));
            // two blocks fit an H100's 227 KiB
            assert_eq!(launches[0].shared_bytes, 96 << 10);
        }
    }

    #[test]
    fn empty_problems_take_no_blocks_and_many_take_several_launches() {
        assert!(forward_launches(Kernels::Mma, Storage::F32, &[product(0, 512)]).is_empty());
        let launches = forward_launches(Kernels::Mma, Storage::F32, &[product(5, 8); 9]);
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
        assert_eq!(splits(Kernels::Mma, &[weight(12000, 512, 512)]), [17]);
        assert_eq!(splits(Kernels::Mma, &[weight(300, 512, 512)]), [1]);
        assert_eq!(splits(Kernels::Mma, &[weight(12000, 512, 2048), weight(800, 512, 2048)]), [4, 1]);
        assert_eq!(partial_len(4, 2, 3), 32);
        // one tile of 128 instead of two of 64
        assert_eq!(splits(Kernels::Mma, &[weight(100_000, 128, 64)]), [132]);
        assert_eq!(splits(Kernels::Wgmma, &[weight(100_000, 128, 64)]), [196]);
        let split = KernelWeightGrad { splits: 3, ..weight(2000, 128, 64) };
        let launches = backward_weight_launches(Kernels::Wgmma, Storage::Bf16, &[split]);
        assert_eq!(
            launches.iter().map(|l| (l.kernel, l.grid[0])).collect::<Vec<_>>(),
            [("matmul_backward_weight_wgmma", 3), ("matmul_backward_weight_reduce", 9)]
        );
    }
}
