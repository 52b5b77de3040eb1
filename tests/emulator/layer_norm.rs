//! kernels/layer_norm.cu against src/ops/layer_norm.rs.

use crossfusion::{
    device::{Arena, Cpu, Device, Matrix, Real, View, emulator::Options},
    ops::layer_norm::{
        self, KernelNorm, KernelNormGrad, Norm, NormGrad, apply_launches, backward_launches, forward_launches,
        partial_len,
    },
};
use half::bf16;

use super::{
    Element, Guarded, PLAIN, RACE,
    common::{Law, fill},
    error, launch,
};

/// A shape to test: x `[rows, cols]`, y `[padded, cols]`.
#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    padded: usize,
    cols: usize,
}

/// One element, ragged rows and columns, a whole square, twice the rows, packs in one storage type
/// only, the model's width, and one that no shared memory would hold whole.
const CASES: [Case; 8] = [
    Case { rows: 1, padded: 1, cols: 1 },
    Case { rows: 1, padded: 2, cols: 7 },
    Case { rows: 3, padded: 4, cols: 33 },
    Case { rows: 33, padded: 36, cols: 132 },
    Case { rows: 64, padded: 64, cols: 96 },
    Case { rows: 70, padded: 140, cols: 40 },
    Case { rows: 300, padded: 324, cols: 512 },
    Case { rows: 34, padded: 36, cols: 4104 },
];

/// Inputs, and what the parameters' gradients hold before.
struct Inputs<T> {
    x: Vec<T>,
    dy: Vec<T>,
    weight: Vec<T>,
    bias: Vec<T>,
    dweight: Vec<f32>,
    dbias: Vec<f32>,
}

fn inputs<T: Element>(case: Case) -> Inputs<T> {
    let draw = |name: &str, len, offset, scale| fill(name, len, Law { offset, scale });
    let stored = |name: &str, len, offset, scale| draw(name, len, offset, scale).into_iter().map(T::of).collect();
    Inputs {
        x: stored("x", case.rows * case.cols, 3.0, 2.0),
        dy: stored("dy", case.padded * case.cols, 0.1, 1.0),
        weight: stored("weight", case.cols, 1.0, 0.5),
        bias: stored("bias", case.cols, 0.0, 0.5),
        dweight: draw("dweight", case.cols, 0.0, 1.0),
        dbias: draw("dbias", case.cols, 0.0, 1.0),
    }
}

const NAMES: [&str; 5] = ["y", "stats", "dx", "dweight", "dbias"];

/// The outputs by the CPU's op in precision `R`, of the very numbers that the kernel reads.
fn reference<R: Real, T: Element>(case: Case, inputs: &Inputs<T>) -> [Vec<f64>; 5] {
    let Case { rows, padded, cols } = case;
    let widen = |v: &[T]| v.iter().map(|x| R::of(f64::from(x.f32()))).collect::<Vec<R>>();
    let (x, dy, weight, bias) = (widen(&inputs.x), widen(&inputs.dy), widen(&inputs.weight), widen(&inputs.bias));
    let [mut dweight, mut dbias] =
        [&inputs.dweight, &inputs.dbias].map(|v| v.iter().map(|&x| R::of(f64::from(x))).collect::<Vec<R>>());
    let (mut y, mut stats, mut dx) =
        (vec![R::ZERO; padded * cols], vec![R::ZERO; rows * 2], vec![R::ZERO; rows * cols]);
    // SAFETY: the vectors outlive the ops, and nothing else touches them meanwhile.
    let (x, weight) = (unsafe { View::of_slice(&x, rows, cols) }, unsafe { View::of_slice(&weight, 1, cols) });
    // SAFETY: as above.
    let stats_view = unsafe { View::of_slice_mut(&mut stats, rows, 2) };
    let device = Device::Cpu(Cpu::new(1).unwrap());
    let norm = Norm {
        x,
        stats: stats_view,
        weight,
        // SAFETY: as above.
        bias: unsafe { View::of_slice(&bias, 1, cols) },
        // SAFETY: as above.
        y: unsafe { View::of_slice_mut(&mut y, padded, cols) },
    };
    layer_norm::forward(&device, &[norm]).unwrap();
    let grad = NormGrad {
        x,
        stats: stats_view,
        weight,
        // SAFETY: as above.
        dy: unsafe { View::of_slice(&dy, padded, cols) },
        // SAFETY: as above.
        dx: unsafe { View::of_slice_mut(&mut dx, rows, cols) },
        // SAFETY: as above.
        dweight: unsafe { View::of_slice_mut(&mut dweight, 1, cols) },
        // SAFETY: as above.
        dbias: unsafe { View::of_slice_mut(&mut dbias, 1, cols) },
    };
    layer_norm::backward(&device, &mut Arena::new(&device, 0).unwrap(), &[grad]).unwrap();
    [y, stats, dx, dweight, dbias].map(|v| v.into_iter().map(Real::f64).collect())
}

/// The buffers of one problem on the emulator.
struct Problem<T> {
    case: Case,
    x: Guarded<T>,
    dy: Guarded<T>,
    weight: Guarded<T>,
    bias: Guarded<T>,
    y: Guarded<T>,
    dx: Guarded<T>,
    stats: Guarded<f32>,
    partial: Guarded<f32>,
    dweight: Guarded<f32>,
    dbias: Guarded<f32>,
}

impl<T: Element> Problem<T> {
    fn new(case: Case, inputs: &Inputs<T>) -> Self {
        let Case { rows, padded, cols } = case;
        Self {
            case,
            x: Guarded::new(&inputs.x).unwrap(),
            dy: Guarded::new(&inputs.dy).unwrap(),
            weight: Guarded::new(&inputs.weight).unwrap(),
            bias: Guarded::new(&inputs.bias).unwrap(),
            y: Guarded::unset(padded * cols).unwrap(),
            dx: Guarded::unset(rows * cols).unwrap(),
            stats: Guarded::unset(rows * 2).unwrap(),
            partial: Guarded::unset(partial_len(rows, cols)).unwrap(),
            dweight: Guarded::new(&inputs.dweight).unwrap(),
            dbias: Guarded::new(&inputs.dbias).unwrap(),
        }
    }

    fn norm(&self) -> KernelNorm {
        let Case { rows, padded, cols } = self.case;
        KernelNorm {
            x: self.x.matrix(rows, cols),
            y: self.y.matrix(padded, cols),
            stats: self.stats.address(),
            weight: self.weight.address(),
            bias: self.bias.address(),
        }
    }

    fn grad(&self) -> KernelNormGrad {
        let Case { rows, padded, cols } = self.case;
        KernelNormGrad {
            x: self.x.matrix(rows, cols),
            dy: self.dy.matrix(padded, cols),
            dx: self.dx.matrix(rows, cols),
            stats: self.stats.address(),
            weight: self.weight.address(),
            partial: self.partial.address(),
            dweight: self.dweight.address(),
            dbias: self.dbias.address(),
        }
    }

    fn outputs(&self) -> [Vec<f64>; 5] {
        let widen = |v: Vec<T>| v.into_iter().map(|x| f64::from(x.f32())).collect();
        let wide = |v: Vec<f32>| v.into_iter().map(f64::from).collect();
        let f32s = |m: &Guarded<f32>| wide(m.read().unwrap());
        self.partial.read().unwrap();
        [
            widen(self.y.read().unwrap()),
            f32s(&self.stats),
            widen(self.dx.read().unwrap()),
            f32s(&self.dweight),
            f32s(&self.dbias),
        ]
    }
}

/// Forward and backward of all cases in shared launches.
fn run<T: Element>(cases: &[Case], options: Options) -> Vec<[Vec<f64>; 5]> {
    let problems: Vec<_> = cases.iter().map(|&case| Problem::<T>::new(case, &inputs(case))).collect();
    let norms: Vec<_> = problems.iter().map(Problem::norm).collect();
    let grads: Vec<_> = problems.iter().map(Problem::grad).collect();
    for step in [forward_launches(T::STORAGE, &norms), backward_launches(T::STORAGE, &grads)].concat() {
        launch(&step, options).unwrap_or_else(|e| panic!("{cases:?}, {options:?}: {e}"));
    }
    problems.iter().map(Problem::outputs).collect()
}

/// At most twice the error of the same computation done plainly in the storage type, and an ulp of
/// f32 where that has none.
fn check<T: Element>(case: Case, got: &[Vec<f64>; 5]) {
    let inputs = inputs::<T>(case);
    let (truth, mut plain) = (reference::<f64, T>(case, &inputs), reference::<f32, T>(case, &inputs));
    for tensor in [0, 2] {
        plain[tensor].iter_mut().for_each(|x| *x = f64::from(T::of(*x as f32).f32()));
    }
    for (i, name) in NAMES.iter().enumerate() {
        let (ours, theirs) = (error(&got[i], &truth[i]), error(&plain[i], &truth[i]));
        assert!(
            ours <= 2.0 * theirs + f64::from(f32::EPSILON),
            "{case:?} {name}: error {ours:.2e}, plain {theirs:.2e}"
        );
    }
}

fn matches_the_cpu<T: Element>() {
    for case in CASES {
        let first = run::<T>(&[case], PLAIN[0]);
        check::<T>(case, &first[0]);
        for options in &PLAIN[1..] {
            assert_eq!(run::<T>(&[case], *options), first, "{case:?}: {options:?} gives other bits");
        }
    }
    let together = [CASES[6], CASES[3], CASES[4]];
    for (case, got) in together.iter().zip(run::<T>(&together, PLAIN[4])) {
        check::<T>(*case, &got);
    }
}

#[test]
fn matches_the_cpu_in_f32() {
    matches_the_cpu::<f32>();
}

#[test]
fn matches_the_cpu_in_bf16() {
    matches_the_cpu::<bf16>();
}

#[test]
fn has_no_races() {
    for case in &CASES[..6] {
        check::<f32>(*case, &run::<f32>(&[*case], RACE)[0]);
        check::<bf16>(*case, &run::<bf16>(&[*case], RACE)[0]);
    }
    run::<f32>(&[CASES[2], CASES[5], CASES[0]], RACE);
    apply_and_in_place_by::<f32>(RACE);
    apply_and_in_place_by::<bf16>(RACE);
}

#[test]
fn apply_and_in_place() {
    apply_and_in_place_by::<f32>(PLAIN[4]);
    apply_and_in_place_by::<bf16>(PLAIN[4]);
}

/// In packs of 16 bytes, and element by element.
fn apply_and_in_place_by<T: Element>(options: Options) {
    apply_and_in_place_of::<T>(CASES[5], options);
    apply_and_in_place_of::<T>(CASES[2], options);
}

/// apply gives forward's bits, and dx may take the place of dy.
fn apply_and_in_place_of<T: Element>(case: Case, options: Options) {
    let expected = run::<T>(&[case], options);
    let p = Problem::new(case, &inputs::<T>(case));
    launch(&forward_launches(T::STORAGE, &[p.norm()])[0], options).unwrap();
    let again = Guarded::<T>::unset(case.padded * case.cols).unwrap();
    let norm = KernelNorm { y: again.matrix(case.padded, case.cols), ..p.norm() };
    launch(&apply_launches(T::STORAGE, &[norm])[0], options).unwrap();
    assert_eq!(again.read().unwrap(), p.y.read().unwrap());

    let dx = Matrix::new(p.dy.address(), case.rows, case.cols);
    for step in backward_launches(T::STORAGE, &[KernelNormGrad { dx, ..p.grad() }]) {
        launch(&step, options).unwrap();
    }
    let dx: Vec<f64> = p.dy.read().unwrap()[..case.rows * case.cols].iter().map(|x| f64::from(x.f32())).collect();
    assert_eq!(dx, expected[0][2]);
    assert_eq!(p.outputs()[3..], expected[0][3..]);
}
