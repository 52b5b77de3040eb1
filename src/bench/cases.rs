//! Every op at the sizes of one training step: what `cf-bench op` and the criterion benches run.

use crate::{
    Result,
    device::{Arena, Buffer, Device, Element, Matrix, Real, Storage, View},
    model::{BagSizes, Scale},
    ops::Draw,
};

/// The files of cases/, one for each op, in the order of a step.
macro_rules! ops {
    ($($op:ident),*) => {
        $(mod $op;)*

        fn cases<T: Element>(make: &mut Maker) -> Result<()> {
            $($op::cases::<T>(make)?;)*
            Ok(())
        }
    };
}

ops!(matmul, attention, ppeg, conv_fusion, layer_norm, elementwise, adam);

/// The model's width.
const D: usize = 512;
/// Any draw: an op's time does not depend on it.
const DRAW: Draw = Draw { seed: 1, step: 1 };
/// Scratch enough for any case of a typical slide.
const ARENA: usize = 1 << 30;

type Run = dyn Fn(&Device, &mut Arena) -> Result<()> + Send + Sync;

/// One op on one shape, ready to run again and again.
pub struct Case {
    /// The op's name, which several cases may share: "matmul forward".
    pub op: &'static str,
    /// Its sizes, and what they are of: "input: 15800 x 512 x 2048".
    pub shape: String,
    /// Of the activations; f64 has no kernels and counts as f32.
    pub storage: Storage,
    /// Operations of one run, of products and convolutions alone; a multiply-add is two.
    pub flop: f64,
    /// Bytes of one run: each input read once, each output written once.
    pub bytes: f64,
    run: Box<Run>,
    /// The same products for a BLAS, without epilogues.
    pub products: Vec<Product>,
}

/// out = a b, row-major; `out` is `[m, n]`.
#[derive(Clone, Copy)]
pub struct Product {
    /// `[m, depth]`, once it is transposed where it says so.
    pub a: Operand,
    /// `[depth, n]`, likewise.
    pub b: Operand,
    /// `[m, n]`, never transposed.
    pub out: Operand,
    /// What is summed over: the columns of `a`, and the rows of `b`.
    pub depth: usize,
}

/// A matrix of a case's memory, by its address: what a BLAS takes. It is there as long as the
/// [`Cases`].
#[derive(Clone, Copy)]
pub struct Operand {
    /// Of the first element, on the device.
    pub address: u64,
    /// Rows as they are stored.
    pub rows: usize,
    /// Columns as they are stored; those of a row lie side by side.
    pub cols: usize,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Whether the product takes its transpose.
    pub transposed: bool,
}

/// The cases of a slide, in the order of a step, with their memory.
pub struct Cases<'d> {
    device: &'d Device,
    arena: Arena,
    cases: Vec<Case>,
    _keep: Vec<Buffer>,
}

impl<'d> Cases<'d> {
    /// On random numbers; `parameters` is the size of the model whose Adam step is one of them.
    pub fn new<T: Element>(device: &'d Device, bags: BagSizes, features: usize, parameters: usize) -> Result<Self> {
        let bags = Scale::ALL.map(|scale| bags.get(scale).copied().unwrap_or(0));
        let side = (1..).find(|side| side * side >= bags[1]).unwrap_or(1);
        let slide = Slide { bags, features, side, parameters };
        let mut make = Maker { device, slide, cases: Vec::new(), keep: Vec::new() };
        cases::<T>(&mut make)?;
        Ok(Self { device, arena: Arena::new(device, ARENA)?, cases: make.cases, _keep: make.keep })
    }

    /// The cases in the order of a step, by whose place [`Self::run`] takes them.
    pub fn cases(&self) -> &[Case] {
        &self.cases
    }

    /// Runs the `i`-th of [`Self::cases`] once.
    pub fn run(&mut self, i: usize) -> Result<()> {
        (self.cases[i].run)(self.device, &mut self.arena)
    }
}

impl Operand {
    pub(super) fn plain(matrix: Matrix) -> Self {
        let Matrix { address, stride, rows, cols } = matrix;
        Self { address, rows: rows as usize, cols: cols as usize, stride: stride as usize, transposed: false }
    }

    pub(super) fn transposed(self) -> Self {
        Self { transposed: true, ..self }
    }
}

/// The sizes that an op's cases are made of.
struct Slide {
    /// Patches at 5x, 10x and 20x.
    bags: [usize; 3],
    features: usize,
    /// Of the square grid of the 10x bag's tokens.
    side: usize,
    /// Of the model whose Adam step is one of the cases.
    parameters: usize,
}

/// Where an op's file puts its cases, and makes matrices of random numbers for them.
struct Maker<'d> {
    device: &'d Device,
    slide: Slide,
    cases: Vec<Case>,
    keep: Vec<Buffer>,
}

impl Maker<'_> {
    /// One more case: an op's name, its shape, operations and bytes of a run, and the run.
    fn case<T: Element>(
        &mut self,
        op: &'static str,
        shape: &str,
        flop: f64,
        bytes: f64,
        run: impl Fn(&Device, &mut Arena) -> Result<()> + Send + Sync + 'static,
    ) -> &mut Case {
        let storage = T::KERNELS.unwrap_or(Storage::F32);
        let case = Case { op, shape: shape.into(), storage, flop, bytes, run: Box::new(run), products: Vec::new() };
        let at = self.cases.len();
        self.cases.push(case);
        &mut self.cases[at]
    }

    /// Tokens of a branch: the 10x bag, filled up to a square.
    fn tokens(&self) -> usize {
        self.slide.side * self.slide.side
    }

    /// Whether Hopper's kernels run here.
    fn hopper<T: Element>(&self) -> bool {
        self.device.has_wgmma() && T::KERNELS == Some(Storage::Bf16)
    }

    /// `[rows, cols]`, uniform on [-1, 1).
    fn matrix<T: Element>(&mut self, rows: usize, cols: usize) -> Result<View<T>> {
        let view = self.zeros(rows, cols)?;
        let values: Vec<T> =
            super::random(rows * cols).into_iter().map(|x| T::from_sum(T::Sum::of(f64::from(x)))).collect();
        self.device.upload(&values, view)?;
        Ok(view)
    }

    fn zeros<T: Element>(&mut self, rows: usize, cols: usize) -> Result<View<T>> {
        let buffer = self.device.alloc(rows * cols * size_of::<T>())?;
        let view = buffer.view(0, rows, cols);
        self.keep.push(buffer);
        Ok(view)
    }

    fn rows<T: Element, const N: usize>(&mut self, cols: usize) -> Result<[View<T>; N]> {
        let made: Vec<_> = (0..N).map(|_| self.matrix(1, cols)).collect::<Result<_>>()?;
        made.try_into().map_err(|_| crate::Error::Device("rows".into()))
    }
}
