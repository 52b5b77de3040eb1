//! An op on one shape, run on several devices and in several precisions on the same numbers, and
//! compared.

use crossfusion::{
    Result,
    device::{
        Arena, Buffer, Cpu, Device, Element, Real, Storage, View,
        emulator::{Emulator, Options},
    },
};
use half::bf16;

use super::{
    PLAIN, RACE,
    common::{Law, fill},
    gpu,
};

/// What a case takes its tensors from. Inputs are the same numbers everywhere: rounded to the
/// storage that is being tested.
pub struct Bed<'a, T: Element> {
    pub device: &'a Device,
    pub arena: Arena,
    /// Whether this is the plain computation in bf16, on the CPU in f32: outputs are rounded at the
    /// end, and a case whose op would plainly store more than those rounds that too.
    pub plainly: bool,
    storage: Storage,
    keep: Vec<Buffer>,
    outputs: Vec<(String, Output<T>)>,
}

enum Output<T: Element> {
    Stored(View<T>),
    Sums(View<T::Sum>),
}

pub trait Case {
    fn name(&self) -> String;
    fn run<T: Element>(&self, bed: &mut Bed<T>) -> Result<()>;
    /// What the kernels that are tested store.
    fn storages(&self) -> &[Storage] {
        &[Storage::F32, Storage::Bf16]
    }
}

impl<T: Element> Bed<'_, T> {
    fn matrix<E: Element>(&mut self, values: &[f32], rows: usize, cols: usize) -> View<E> {
        let buffer = self.device.alloc(rows * cols * size_of::<E>()).unwrap();
        let view = buffer.view(0, rows, cols);
        let values: Vec<E> = values.iter().map(|&x| E::from_sum(E::Sum::of(f64::from(x)))).collect();
        self.device.upload(&values, view).unwrap();
        self.keep.push(buffer);
        view
    }

    pub fn read<E: Element>(&self, view: View<E>) -> Vec<f64> {
        self.device.download(view).unwrap().into_iter().map(|x| x.to_sum().f64()).collect()
    }

    pub fn write<E: Element>(&self, values: &[f64], view: View<E>) {
        let values: Vec<E> = values.iter().map(|&x| E::from_sum(E::Sum::of(x))).collect();
        self.device.upload(&values, view).unwrap();
    }

    pub fn input(&mut self, name: &str, rows: usize, cols: usize, law: Law) -> View<T> {
        let mut values = fill(name, rows * cols, law);
        if self.storage == Storage::Bf16 {
            values.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
        }
        self.matrix(&values, rows, cols)
    }

    /// To be written: NaN before.
    pub fn output(&mut self, name: &str, rows: usize, cols: usize) -> View<T> {
        let view = self.unchecked(rows, cols);
        self.outputs.push((name.into(), Output::Stored(view)));
        view
    }

    /// Memory that the op may or may not write to: NaN before.
    pub fn unchecked<E: Element>(&mut self, rows: usize, cols: usize) -> View<E> {
        self.matrix(&vec![f32::NAN; rows * cols], rows, cols)
    }

    /// An input that the op writes over.
    pub fn in_place(&mut self, name: &str, rows: usize, cols: usize, law: Law) -> View<T> {
        let view = self.input(name, rows, cols, law);
        self.outputs.push((name.into(), Output::Stored(view)));
        view
    }

    /// Sums to be written.
    pub fn sums(&mut self, name: &str, rows: usize, cols: usize) -> View<T::Sum> {
        let view = self.unchecked(rows, cols);
        self.outputs.push((name.into(), Output::Sums(view)));
        view
    }

    /// What holds `sums` rounded to `T`: the same memory where nothing is rounded. An output.
    pub fn rounded(&mut self, sums: View<T::Sum>) -> View<T> {
        let same: Box<dyn std::any::Any> = Box::new(sums);
        match same.downcast::<View<T>>() {
            Ok(same) => {
                self.outputs.push(("rounded".into(), Output::Stored(*same)));
                *same
            }
            Err(_) => self.output("rounded", sums.rows(), sums.cols()),
        }
    }

    /// Sums that the op adds to: not zero before.
    pub fn accumulated(&mut self, name: &str, rows: usize, cols: usize) -> View<T::Sum> {
        let values = fill(name, rows * cols, Law { offset: 0.0, scale: 1.0 });
        let view = self.matrix(&values, rows, cols);
        self.outputs.push((name.into(), Output::Sums(view)));
        view
    }
}

type Tensors = Vec<(String, Vec<f64>)>;

/// Runs the case; `rounded`: what is stored as bf16 in the end.
fn run<T: Element>(case: &impl Case, device: &Device, storage: Storage, rounded: bool) -> Tensors {
    let arena = Arena::new(device, 8 << 20).unwrap();
    let mut bed = Bed::<T> { device, arena, plainly: rounded, storage, keep: Vec::new(), outputs: Vec::new() };
    case.run(&mut bed).unwrap_or_else(|e| panic!("{}: {e}", case.name()));
    let values = |output: &Output<T>| -> Vec<f64> {
        match output {
            Output::Sums(view) => device.download(*view).unwrap().into_iter().map(Real::f64).collect(),
            Output::Stored(view) => {
                let values = device.download(*view).unwrap().into_iter().map(|x| x.to_sum().f64());
                let round = |x| if rounded { bf16::from_f64(x).to_f64() } else { x };
                values.map(round).collect()
            }
        }
    };
    bed.outputs.iter().map(|(name, output)| (name.clone(), values(output))).collect()
}

fn by_kernels(case: &impl Case, storage: Storage, options: Options) -> Tensors {
    let emulator = Device::Emulator(Emulator::new(options));
    let device = gpu().unwrap_or(&emulator);
    match storage {
        Storage::F32 => run::<f32>(case, device, storage, false),
        Storage::Bf16 => run::<bf16>(case, device, storage, false),
    }
}

/// At most twice the error of the same computation done plainly in the storage type, and an ulp of
/// f32: of the tensor, and of numbers of size 1, which the inputs are, where the truth is zero.
fn compare(case: &impl Case, storage: Storage, got: &Tensors) {
    let cpu = Device::Cpu(Cpu::new(1).unwrap());
    let truth = run::<f64>(case, &cpu, storage, false);
    let plain = run::<f32>(case, &cpu, storage, storage == Storage::Bf16);
    assert!(got.len() == truth.len() && got.len() == plain.len(), "{}: outputs are missing", case.name());
    for (((name, got), (_, truth)), (_, plain)) in got.iter().zip(&truth).zip(&plain) {
        let size = norm(truth.iter().copied().filter(|x| x.is_finite())) + (truth.len() as f64).sqrt();
        let (ours, theirs) = (distance(got, truth), distance(plain, truth));
        assert!(
            ours <= 2.0 * theirs + f64::from(f32::EPSILON) * size,
            "{}, {storage:?}: {name}: off by {ours:.2e} of {size:.2e}, plain by {theirs:.2e}",
            case.name()
        );
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    // a log-sum-exp over no keys is -infinity, on either side
    norm(a.iter().zip(b).map(|(a, b)| if a == b { 0.0 } else { a - b }))
}

/// Right, and the same bits under every schedule.
pub fn check(case: &impl Case) {
    for &storage in case.storages() {
        let first = by_kernels(case, storage, PLAIN[0]);
        compare(case, storage, &first);
        if storage == Storage::Bf16 {
            let cpu = Device::Cpu(Cpu::new(2).unwrap());
            compare(case, storage, &run::<bf16>(case, &cpu, storage, false));
        }
        for options in &PLAIN[1..] {
            let again = by_kernels(case, storage, *options);
            let same = first
                .iter()
                .zip(&again)
                .all(|((_, a), (_, b))| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()));
            assert!(same, "{}, {storage:?}: {options:?} gives other bits", case.name());
        }
    }
}

/// Right in race mode, which looks at every access.
pub fn check_races(case: &impl Case) {
    for &storage in case.storages() {
        compare(case, storage, &by_kernels(case, storage, RACE));
    }
}
