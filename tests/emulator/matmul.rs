//! kernels/matmul.cu and matmul_wgmma.cu against src/ops/matmul.rs.

use bytemuck::Zeroable;
use crossfusion::{
    Result,
    device::{Element, Storage},
    ops::{
        Draw, Dropout,
        matmul::{
            self, Epilogue, Matmul, WeightGrad,
            kernel::{self, Kernels},
        },
    },
};
use half::bf16;

use super::{
    Guarded, PLAIN,
    bed::{Bed, Case, check, check_races},
    common::Law,
};

/// Which part of a linear layer, and `[m, k]` times `[k, n]` of each problem.
#[derive(Clone)]
struct Products {
    part: Part,
    epilogue: Options,
    sizes: Vec<[usize; 3]>,
    kernels: Kernels,
}

#[derive(Clone, Copy, Debug)]
enum Part {
    Forward,
    Input,
    Weight,
}

#[derive(Clone, Copy, Debug, Default)]
struct Options {
    accumulate: bool,
    bias: bool,
    gelu: bool,
    gelu_grad: bool,
    dropout: bool,
    residual: bool,
}

const UNIT: Law = Law { offset: 0.0, scale: 1.0 };

impl Case for Products {
    fn name(&self) -> String {
        format!("{:?} {:?} {:?} {:?}", self.kernels, self.part, self.sizes, self.epilogue)
    }

    fn storages(&self) -> &[Storage] {
        if self.kernels == Kernels::Wgmma { &[Storage::Bf16] } else { &[Storage::F32, Storage::Bf16] }
    }

    fn run<T: Element>(&self, bed: &mut Bed<T>) -> Result<()> {
        let (mut products, mut weights) = (Vec::new(), Vec::new());
        for (i, &[m, n, k]) in self.sizes.iter().enumerate() {
            let of = |name: &str| format!("{name} {i}");
            if let Part::Weight = self.part {
                let dy = bed.input(&of("dy"), m, n + 8, UNIT).cols_range(0..n);
                let x = bed.input(&of("x"), m, k + 8, UNIT).cols_range(8..k + 8);
                let (dw, db) = (bed.accumulated(&of("dw"), n, k), bed.accumulated(&of("db"), 1, n));
                weights.push(WeightGrad { dy, x, dw, db });
                continue;
            }
            let o = self.epilogue;
            // the rows of a, b and, where it is read, out lie in wider matrices; what stands beside
            // out must stay
            let a = bed.input(&of("a"), m, k + 8, UNIT).cols_range(8..k + 8);
            let b = match self.part {
                Part::Forward => bed.input(&of("b"), n, k + 8, UNIT).cols_range(0..k),
                _ => bed.input(&of("b"), k, n + 8, UNIT).cols_range(8..n + 8),
            };
            let out = if o.accumulate {
                bed.in_place(&of("out"), m, n + 16, UNIT).cols_range(8..n + 8)
            } else {
                bed.output(&of("out"), m, n)
            };
            let epilogue = Epilogue {
                accumulate: o.accumulate,
                bias: o.bias.then(|| bed.input(&of("bias"), 1, n, UNIT)),
                gelu: o.gelu.then(|| bed.output(&of("pre"), m, n)),
                gelu_grad: o.gelu_grad.then(|| bed.input(&of("pre"), m, n, Law { offset: 0.0, scale: 3.0 })),
                dropout: Dropout::new(o.dropout.then_some(Draw { seed: 1 << 40 | 7, step: 3 }), i as u32, 0.3),
                residual: o.residual.then(|| bed.input(&of("residual"), m, n, UNIT)),
            };
            products.push(Matmul { a, b, out, epilogue });
        }
        let by = Some(self.kernels);
        match self.part {
            Part::Forward => matmul::forward_by(bed.device, &products, by),
            Part::Input => matmul::backward_input_by(bed.device, &products, by),
            Part::Weight => matmul::backward_weight_by(bed.device, &mut bed.arena, &weights, by),
        }
    }
}

fn products(part: Part, epilogue: Options, sizes: &[[usize; 3]]) -> Products {
    Products { part, epilogue, sizes: sizes.to_vec(), kernels: Kernels::Mma }
}

const NONE: Options =
    Options { accumulate: false, bias: false, gelu: false, gelu_grad: false, dropout: false, residual: false };
const FFN: Options = Options { bias: true, gelu: true, dropout: true, ..NONE };
const BACK: Options = Options { gelu_grad: true, dropout: true, ..NONE };
const ADD: Options = Options { accumulate: true, residual: true, bias: true, ..NONE };

/// One element a side, ragged everywhere, whole tiles, several stages, depth 0, and groups.
fn small() -> Vec<Products> {
    let mut cases = Vec::new();
    for part in [Part::Forward, Part::Input] {
        cases.push(products(part, NONE, &[[1, 8, 8]]));
        cases.push(products(part, NONE, &[[5, 8, 0], [65, 72, 200]]));
        cases.push(products(part, FFN, &[[33, 40, 72]]));
        cases.push(products(part, BACK, &[[70, 64, 24]]));
        cases.push(products(part, ADD, &[[17, 136, 64], [1, 24, 16], [0, 8, 8]]));
    }
    cases.push(products(Part::Weight, NONE, &[[1, 8, 8]]));
    cases.push(products(Part::Weight, NONE, &[[70, 72, 136], [300, 8, 16], [0, 16, 8]]));
    cases
}

/// The large tile (at least 132 of them: scripts/kernel-report.py sees that it runs), split sums, more problems than a launch takes.
fn large() -> Vec<Products> {
    vec![
        products(Part::Forward, FFN, &[[1100, 1160, 72], [700, 1032, 40]]),
        products(Part::Input, BACK, &[[1100, 1160, 72], [700, 1032, 40]]),
        products(Part::Weight, NONE, &[[1300, 136, 144], [40, 128, 128], [600, 200, 136]]),
        products(Part::Weight, NONE, &[[1100, 8, 24]]),
        products(Part::Forward, NONE, &[[9, 16, 24]; 10]),
        products(Part::Weight, NONE, &[[9, 16, 24]; 14]),
    ]
}

#[test]
fn matches_the_cpu() {
    small().iter().for_each(check);
}

#[test]
fn large_tiles_and_split_sums_match_the_cpu() {
    large().iter().for_each(check);
}

#[test]
fn has_no_races() {
    small().iter().for_each(check_races);
    check_races(&products(Part::Weight, NONE, &[[1100, 8, 24]]));
}

#[test]
fn large_tiles_have_no_races() {
    check_races(&products(Part::Forward, FFN, &[[1100, 1160, 8], [700, 1032, 8]]));
    check_races(&products(Part::Input, BACK, &[[1100, 1160, 8], [700, 1032, 8]]));
    check_races(&products(Part::Weight, NONE, &[[70, 136, 144]]));
}

fn by_wgmma(cases: Vec<Products>) -> impl Iterator<Item = Products> {
    cases.into_iter().map(|case| Products { kernels: Kernels::Wgmma, ..case })
}

#[test]
fn wgmma_matches_the_cpu() {
    by_wgmma([small(), large()].concat()).for_each(|case| check(&case));
}

#[test]
fn wgmma_has_no_races() {
    by_wgmma(small()).for_each(|case| check_races(&case));
    by_wgmma(vec![products(Part::Weight, NONE, &[[1100, 136, 24]])]).for_each(|case| check_races(&case));
}

/// bf16 fragments reach the registers without bank conflicts, in both tiles and all layouts.
/// Counted by hand: a warp reads 2 fragments of b and 4 (large tile) or 2 of a per 16 of the depth.
#[test]
fn fragments_have_no_bank_conflicts() {
    if super::gpu().is_some() {
        return; // nothing counts there
    }
    // 132 large tiles, or one small one; depth 64 is one stage
    for (rows, cols, warps, fragments) in [(12 * 128, 11 * 128, 132 * 8, 6), (64, 64, 4, 4)] {
        let (a, b) =
            (Guarded::new(&vec![bf16::ONE; rows * 64]).unwrap(), Guarded::new(&vec![bf16::ONE; cols * 64]).unwrap());
        let out = Guarded::<bf16>::unset(rows * cols).unwrap();
        let mut problem = kernel::KernelMatmul::zeroed();
        (problem.a, problem.out) = (a.matrix(rows, 64), out.matrix(rows, cols));
        problem.b = b.matrix(cols, 64);
        let forward = kernel::forward_launches(Kernels::Mma, Storage::Bf16, &[problem]);
        problem.b = b.matrix(64, cols);
        let input = kernel::backward_input_launches(Kernels::Mma, Storage::Bf16, &[problem]);
        for launch in forward.iter().chain(&input) {
            let stats = super::launch(launch, PLAIN[0]).unwrap();
            assert_eq!((stats.ldmatrix, stats.ldmatrix_conflicts), (warps * fragments * 4, 0), "{}", launch.kernel);
        }
    }
    for (side, warps, fragments) in [(128, 8, 6), (64, 4, 4)] {
        let (dy, x) =
            (Guarded::new(&vec![bf16::ONE; 64 * side]).unwrap(), Guarded::new(&vec![bf16::ONE; 64 * side]).unwrap());
        let dw = Guarded::new(&vec![0f32; side * side]).unwrap();
        let db = Guarded::new(&vec![0f32; side]).unwrap();
        let mut problem = kernel::KernelWeightGrad::zeroed();
        (problem.dy, problem.x) = (dy.matrix(64, side), x.matrix(64, side));
        (problem.dw, problem.db, problem.splits) = (dw.matrix(side, side), db.address(), 1);
        for launch in kernel::backward_weight_launches(Kernels::Mma, Storage::Bf16, &[problem]) {
            let stats = super::launch(&launch, PLAIN[0]).unwrap();
            assert_eq!((stats.ldmatrix, stats.ldmatrix_conflicts), (warps * fragments * 4, 0), "{}", launch.kernel);
        }
    }
}

/// What a kernel would multiply with whatever lies beside it is refused: 12 columns of bf16 in rows
/// of 16, and an address between.
#[test]
fn operands_that_kernels_cannot_take_are_refused() {
    use crossfusion::{
        device::{Device, Mat, Tensor, Workspace, emulator::Emulator},
        ops::{Attention, Linear, attention, linear},
    };
    let device = std::sync::Arc::new(Device::Emulator(Emulator::new(PLAIN[0])));
    let mut workspace = Workspace::new(&device).unwrap();
    let zeros = |rows, cols| Tensor::<bf16>::zeros(&device, rows, cols).unwrap();
    let (x, weight, bias, mut y) = (zeros(4, 16), zeros(8, 12), zeros(1, 8), zeros(4, 8));
    let mut refusal = |x: Mat<bf16>, weight: Mat<bf16>| {
        let (bias, gelu, dropout, residual) = (Some(bias.mat()), None, None, None);
        let problem = Linear { x, weight, bias, gelu, dropout, residual, y: y.mat_mut() };
        linear(&mut workspace, &mut [problem]).unwrap_err().to_string()
    };
    let refused = refusal(x.mat().cols_range(0..12).unwrap(), weight.mat());
    assert!(
        refused.contains("matmul forward: a has 12 columns, 16 apart") && refused.contains("multiples of 8"),
        "{refused}"
    );
    let (wide, weight) = (zeros(4, 24), zeros(8, 16));
    let refused = refusal(wide.mat().cols_range(4..20).unwrap(), weight.mat());
    assert!(refused.contains("a has 16 columns"), "{refused}");
    let (q, mut out) = (zeros(4, 24), zeros(4, 24));
    let mut lse = Tensor::<f32>::zeros(&device, 2, 4).unwrap();
    let (q, out, lse) = (q.mat(), out.mat_mut(), lse.mat_mut());
    let problem = Attention { q, k: q, v: q, heads: 2, dropout: None, out, lse };
    let refused = attention(&mut workspace, &mut [problem]).unwrap_err().to_string();
    assert!(refused.contains("heads of 12 columns: kernels take multiples of 8"), "{refused}");
}
