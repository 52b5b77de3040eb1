//! Every op at the sizes of one training step: what `cf-bench op` and the criterion benches run.

use crate::{
    Result,
    device::{Arena, Buffer, Device, Element, Matrix, Real, Storage, View},
    model::{BagSizes, Scale},
    ops::{
        Draw, Dropout,
        adam::{self, Adam, Arenas},
        attention::{self, Attention, AttentionGrad},
        conv_fusion::{self, ConvFusion, ConvFusionGrad, Grid, Weights},
        elementwise::{self, Map},
        layer_norm::{self, Norm, NormGrad},
        matmul::{self, Epilogue, Matmul, WeightGrad},
        ppeg::{self, Ppeg, PpegGrad},
    },
};

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

impl Case {
    fn new<T: Element>(
        op: &'static str,
        shape: impl Into<String>,
        flop: f64,
        bytes: f64,
        run: impl Fn(&Device, &mut Arena) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        let storage = T::KERNELS.unwrap_or(Storage::F32);
        Self { op, shape: shape.into(), storage, flop, bytes, run: Box::new(run), products: Vec::new() }
    }

    fn with_products(self, products: Vec<Product>) -> Self {
        Self { products, ..self }
    }

    pub(super) fn run(&self, device: &Device, arena: &mut Arena) -> Result<()> {
        (self.run)(device, arena)
    }
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
        let mut keep = Vec::new();
        let cases = cases::<T>(device, bags, features, parameters, &mut keep)?;
        Ok(Self { device, arena: Arena::new(device, ARENA)?, cases, _keep: keep })
    }

    /// The cases in the order of a step, by whose place [`Self::run`] takes them.
    pub fn cases(&self) -> &[Case] {
        &self.cases
    }

    /// Runs the `i`-th of [`Self::cases`] once.
    pub fn run(&mut self, i: usize) -> Result<()> {
        self.cases[i].run(self.device, &mut self.arena)
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

/// Matrices of random numbers on a device, and the memory behind them.
struct Maker<'a> {
    device: &'a Device,
    keep: &'a mut Vec<Buffer>,
}

impl Maker<'_> {
    /// `[rows, cols]`, uniform on [-1, 1).
    fn matrix<T: Element>(&mut self, rows: usize, cols: usize) -> Result<View<T>> {
        let buffer = self.device.alloc(rows * cols * size_of::<T>())?;
        let view = buffer.view(0, rows, cols);
        let values: Vec<T> =
            super::random(rows * cols).into_iter().map(|x| T::from_sum(T::Sum::of(f64::from(x)))).collect();
        self.device.upload(&values, view)?;
        self.keep.push(buffer);
        Ok(view)
    }

    fn rows<T: Element, const N: usize>(&mut self, cols: usize) -> Result<[View<T>; N]> {
        let made: Vec<_> = (0..N).map(|_| self.matrix(1, cols)).collect::<Result<_>>()?;
        made.try_into().map_err(|_| crate::Error::Device("rows".into()))
    }
}

/// Whether Hopper's kernels run here.
fn hopper<T: Element>(device: &Device) -> bool {
    device.has_wgmma() && T::KERNELS == Some(Storage::Bf16)
}

const D: usize = 512;
const HEADS: usize = 4;

/// The cases of a slide with these bags, in the order of a step. `keep` holds their memory.
pub(super) fn cases<T: Element>(
    device: &Device,
    bags: BagSizes,
    features: usize,
    parameters: usize,
    keep: &mut Vec<Buffer>,
) -> Result<Vec<Case>> {
    let make = &mut Maker { device, keep };
    let [m5, m10, m20] = Scale::ALL.map(|scale| bags.get(scale).copied().unwrap_or(0));
    let side = (1..).find(|side| side * side >= m10).unwrap_or(1);
    let n = side * side;
    let mut cases = Vec::new();
    products::<T>(make, [m5, m20, m10], features, n, &mut cases)?;
    for (name, rate) in [("", 0.0), (", dropout 0.2", 0.2)] {
        attentions::<T>(make, &format!("3 x {n} x {n}{name}"), &[(n, n); 3], rate, &mut cases)?;
    }
    let cross = format!("{m10} x {m5} and {m20}");
    attentions::<T>(make, &cross, &[(m10, m5), (m10, m20)], 0.0, &mut cases)?;
    convolutions::<T>(make, side, &mut cases)?;
    rowwise::<T>(make, n, parameters, &mut cases)?;
    Ok(cases)
}

fn products<T: Element>(
    make: &mut Maker,
    input: [usize; 3],
    features: usize,
    n: usize,
    cases: &mut Vec<Case>,
) -> Result<()> {
    let groups = [
        ("input", input.to_vec(), D, features),
        ("3 branches, kv", vec![n; 3], 2 * D, D),
        ("3 branches, out", vec![n; 3], D, D),
        ("3 branches, ffn 2", vec![n; 3], D, 2 * D),
    ];
    for (name, rows, out, inner) in groups {
        let (mut forward, mut backward, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        let mut plain = (Vec::new(), Vec::new(), Vec::new());
        for &m in &rows {
            let (x, y, w) = (make.matrix(m, inner)?, make.matrix(m, out)?, make.matrix(out, inner)?);
            let [bias] = make.rows(out)?;
            let (dw, [db]) = (make.matrix(out, inner)?, make.rows(out)?);
            let epilogue = Epilogue { bias: Some(bias), ..Default::default() };
            let [plain_x, plain_y, plain_w]: [Operand; 3] = [x, y, w].map(|m: View<T>| Operand::plain(m.into()));
            plain.0.push(Product { a: plain_x, b: plain_w.transposed(), out: plain_y, depth: inner });
            plain.1.push(Product { a: plain_y, b: plain_w, out: plain_x, depth: out });
            forward.push(Matmul { a: x, b: w, out: y, epilogue });
            backward.push(Matmul::<T> { a: y, b: w, out: x, epilogue: Epilogue::default() });
            let plain_dw = Operand::plain(dw.into());
            plain.2.push(Product { a: plain_y.transposed(), b: plain_x, out: plain_dw, depth: m });
            weights.push(WeightGrad::<T> { dy: y, x, dw, db });
        }
        let by_wgmma = (forward.clone(), backward.clone(), weights.clone());
        let total: usize = rows.iter().sum();
        let (flop, element) = (2.0 * (total * out * inner) as f64, size_of::<T>());
        let bytes = (element * (total * (out + inner) + rows.len() * out * inner)) as f64;
        let weight_bytes = bytes + (rows.len() * out * inner * (2 * size_of::<T::Sum>() - element)) as f64;
        let shape = format!("{name}: {total} x {out} x {inner}");
        cases.push(
            Case::new::<T>("matmul forward", shape.clone(), flop, bytes, move |device, _| {
                matmul::forward(device, &forward)
            })
            .with_products(plain.0),
        );
        cases.push(
            Case::new::<T>("matmul backward input", shape.clone(), flop, bytes, move |device, _| {
                matmul::backward_input(device, &backward)
            })
            .with_products(plain.1),
        );
        cases.push(
            Case::new::<T>("matmul backward weight", shape.clone(), flop, weight_bytes, move |device, arena| {
                matmul::backward_weight(device, arena, &weights)
            })
            .with_products(plain.2),
        );
        if hopper::<T>(make.device) {
            let (forward, backward, weights) = by_wgmma;
            cases.push(Case::new::<T>("matmul forward wgmma", shape.clone(), flop, bytes, move |device, _| {
                matmul::forward_wgmma(device, &forward)
            }));
            cases.push(Case::new::<T>("matmul backward input wgmma", shape.clone(), flop, bytes, move |device, _| {
                matmul::backward_input_wgmma(device, &backward)
            }));
            cases.push(Case::new::<T>(
                "matmul backward weight wgmma",
                shape,
                flop,
                weight_bytes,
                move |device, arena| matmul::backward_weight_wgmma(device, arena, &weights),
            ));
        }
    }
    Ok(())
}

/// The feed-forward's first product has the heaviest epilogue; it stands with the row-wise ops.
fn feed_forward<T: Element>(make: &mut Maker, n: usize, cases: &mut Vec<Case>) -> Result<()> {
    let (a, b, out) = (make.matrix::<T>(n, D)?, make.matrix(2 * D, D)?, make.matrix(n, 2 * D)?);
    let (pre, [bias]) = (make.matrix(n, 2 * D)?, make.rows(2 * D)?);
    let dropout = Dropout::new(Some(DRAW), 0, 0.3);
    let problem =
        Matmul { a, b, out, epilogue: Epilogue { bias: Some(bias), gelu: Some(pre), dropout, ..Default::default() } };
    let shape = format!("ffn 1, bias + GELU + dropout: {n} x {} x {D}", 2 * D);
    let (flop, bytes) = (4.0 * (n * D * D) as f64, (size_of::<T>() * (5 * n * D + 2 * D * D)) as f64);
    cases.push(Case::new::<T>("matmul forward", shape.clone(), flop, bytes, move |device, _| {
        matmul::forward(device, &[problem])
    }));
    if hopper::<T>(make.device) {
        cases.push(Case::new::<T>("matmul forward wgmma", shape, flop, bytes, move |device, _| {
            matmul::forward_wgmma(device, &[problem])
        }));
    }
    let map = Map { x: pre, gelu: true, dropout, out };
    cases.push(Case::new::<T>(
        "map",
        format!("GELU + dropout 0.3: {n} x {}", 2 * D),
        0.0,
        (size_of::<T>() * 4 * n * D) as f64,
        move |device, _| elementwise::map(device, &[map]),
    ));
    Ok(())
}

const DRAW: Draw = Draw { seed: 1, step: 1 };

fn attentions<T: Element>(
    make: &mut Maker,
    shape: &str,
    sizes: &[(usize, usize)],
    rate: f64,
    cases: &mut Vec<Case>,
) -> Result<()> {
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    let (mut flop, mut rows) = (0.0, 0);
    for (site, &(n, m)) in sizes.iter().enumerate() {
        let (q, kv) = (make.matrix::<T>(n, D)?, make.matrix::<T>(m, 2 * D)?);
        let (out, lse) = (make.matrix(n, D)?, make.matrix(HEADS, n)?);
        let dropout = Dropout::new(Some(DRAW), (site * HEADS) as u32, rate);
        let (k, v) = (kv.cols_range(0..D), kv.cols_range(D..2 * D));
        let problem = Attention { q, k, v, out, lse, heads: HEADS, dropout };
        let (dout, dq, dkv) = (make.matrix(n, D)?, make.matrix(n, D)?, make.matrix::<T>(m, 2 * D)?);
        let (dk, dv) = (dkv.cols_range(0..D), dkv.cols_range(D..2 * D));
        forward.push(problem);
        backward.push(AttentionGrad { forward: problem, dout, dq, dk, dv });
        flop += 4.0 * (n * m * D) as f64;
        rows += 2 * n + 2 * m;
    }
    // backward needs what forward wrote
    let (first, by_wgmma) = (forward.clone(), forward.clone());
    let bytes = (size_of::<T>() * rows * D) as f64;
    cases.push(Case::new::<T>("attention forward", shape, flop, bytes, move |device, arena| {
        attention::forward(device, arena, &forward)
    }));
    if hopper::<T>(make.device) {
        cases.push(Case::new::<T>("attention forward wgmma", shape, flop, bytes, move |device, arena| {
            attention::forward_wgmma(device, arena, &by_wgmma)
        }));
    }
    attention::forward(make.device, &mut Arena::new(make.device, ARENA)?, &first)?;
    let again = backward.clone();
    cases.push(Case::new::<T>("attention backward", shape, 2.5 * flop, 2.0 * bytes, move |device, arena| {
        attention::backward(device, arena, &backward)
    }));
    if make.device.runs_kernels() {
        cases.push(Case::new::<T>(
            "attention backward atomic",
            shape,
            2.5 * flop,
            2.0 * bytes,
            move |device, arena| attention::backward_atomic(device, arena, &again),
        ));
    }
    Ok(())
}

fn convolutions<T: Element>(make: &mut Maker, side: usize, cases: &mut Vec<Case>) -> Result<()> {
    let n = side * side;
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let [x, y, dy, dx] = [make.matrix(n, D)?, make.matrix(n, D)?, make.matrix(n, D)?, make.matrix(n, D)?];
        let mut kernels = Vec::new();
        let mut dkernels = Vec::new();
        for side in ppeg::SIDES {
            kernels.push(make.matrix::<T>(D, side * side)?);
            dkernels.push(make.matrix(D, side * side)?);
        }
        let (kernels, dkernels) = ([kernels[0], kernels[1], kernels[2]], [dkernels[0], dkernels[1], dkernels[2]]);
        forward.push(Ppeg { x, y, side, kernels, biases: make.rows(D)? });
        backward.push(PpegGrad { x, dy, dx, side, kernels, dkernels, dbiases: make.rows(D)? });
    }
    let (flop, element) = (2.0 * 49.0 * (3 * n * D) as f64, size_of::<T>());
    let shape = format!("3 x {side} x {side} x {D}");
    cases.push(Case::new::<T>(
        "ppeg forward",
        shape.clone(),
        flop,
        (6 * n * D * element) as f64,
        move |device, arena| ppeg::forward(device, arena, &forward),
    ));
    cases.push(Case::new::<T>(
        "ppeg backward",
        shape,
        2.0 * flop,
        (9 * n * D * element) as f64,
        move |device, arena| ppeg::backward(device, arena, &backward),
    ));

    let streams = [make.matrix(n, D)?, make.matrix(n, D)?, make.matrix(n, D)?];
    let dstreams = [make.matrix(n, D)?, make.matrix(n, D)?, make.matrix(n, D)?];
    let (out, dout) = (make.matrix(n, D / 2)?, make.matrix(n, D / 2)?);
    let (weights, grads) = (fusion_weights::<T>(make)?, fusion_weights::<T::Sum>(make)?);
    let dropout = Dropout::new(Some(DRAW), 0, 0.3);
    let problem = ConvFusion { streams, weights, grid: Grid::square(side), dropout, out };
    let grad = ConvFusionGrad { forward: problem, dout, dstreams, grads };
    let (flop, shape) = (flop / 3.0, format!("{side} x {side} x {D}, 3 streams"));
    cases.push(Case::new::<T>(
        "conv_fusion forward",
        shape.clone(),
        flop,
        (7 * n * D / 2 * element) as f64,
        move |device, arena| conv_fusion::forward(device, arena, &problem),
    ));
    cases.push(Case::new::<T>(
        "conv_fusion backward",
        shape,
        2.0 * flop,
        (7 * n * D * element) as f64,
        move |device, arena| conv_fusion::backward(device, arena, &grad),
    ));
    Ok(())
}

fn fusion_weights<T: Element>(make: &mut Maker) -> Result<Weights<T>> {
    let mut kernels = Vec::new();
    for side in conv_fusion::SIDES {
        kernels.push(make.matrix(D / 2, 2 * side * side)?);
    }
    Ok(Weights {
        mix: Some((make.matrix(1, 3)?, make.matrix(1, 1)?)),
        kernels: [kernels[0], kernels[1], kernels[2], kernels[3]],
        biases: make.rows(D / 2)?,
    })
}

fn rowwise<T: Element>(make: &mut Maker, n: usize, parameters: usize, cases: &mut Vec<Case>) -> Result<()> {
    feed_forward::<T>(make, n, cases)?;
    let (x, y, dy, dx) = (make.matrix::<T>(n, D)?, make.matrix(n, D)?, make.matrix(n, D)?, make.matrix(n, D)?);
    let (stats, [weight, bias], [dweight, dbias]) = (make.matrix(n, 2)?, make.rows(D)?, make.rows(D)?);
    let norm = Norm { x, stats, weight, bias, y };
    let shape = format!("{n} x {D}");
    let bytes = (2 * n * D * size_of::<T>()) as f64;
    cases.push(Case::new::<T>("layer_norm forward", shape.clone(), 0.0, bytes, move |device, _| {
        layer_norm::forward(device, &[norm])
    }));
    let grad = NormGrad { x, stats, weight, dy, dx, dweight, dbias };
    cases.push(Case::new::<T>("layer_norm backward", shape.clone(), 0.0, 1.5 * bytes, move |device, arena| {
        layer_norm::backward(device, arena, &[grad])
    }));
    cases.push(Case::new::<T>("sum", shape, 0.0, 2.0 * bytes, move |device, _| {
        elementwise::sum(device, &[x, dy, dx], y)
    }));
    let [params, grads, m, v] = make.rows::<T::Sum, 4>(parameters)?;
    let weights = View::of_sums(params).map_or_else(|| make.matrix(1, parameters), Ok)?;
    elementwise::zero(make.device, v)?; // a second moment is not negative
    let arenas = Arenas { params, weights, grads, m, v };
    // rate 0: a thousand runs must not wander off
    let settings = Adam { learning_rate: 0.0, weight_decay: 0.0, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
    let moved = 8 * size_of::<T::Sum>() + size_of::<T>();
    cases.push(Case::new::<T>("adam", format!("{parameters}"), 0.0, (parameters * moved) as f64, move |device, _| {
        adam::step::<T>(device, &settings, arenas, 1)
    }));
    Ok(())
}

/// Scratch enough for any case of a typical slide.
pub(super) const ARENA: usize = 1 << 30;
