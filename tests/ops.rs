//! The public ops, called as another engine would: gradients against central differences in f64,
//! groups of problems, operands of other libraries, and a pool of threads across a fork.
#![cfg(feature = "programs")]

#[path = "ops/draws.rs"]
mod draws;
#[path = "ops/head.rs"]
mod head;

use std::sync::Arc;

use crossfusion::{
    Result,
    device::{Cpu, Device, Mat, MatMut, Tensor, Workspace},
    ops::{
        self, AdamState, Attention, AttentionBackward, AttentionMerge, ConvFusion, ConvFusionBackward, Draw, Dropout,
        GeluDropout, Head, HeadBackward, LayerNorm, LayerNormBackward, Linear, LinearBackwardInput,
        LinearBackwardWeight, Ppeg, PpegBackward, TokenGrid, adam::Adam,
    },
};

fn cpu() -> Arc<Device> {
    Arc::new(Device::Cpu(Cpu::new(2).unwrap()))
}

/// Numbers on [-1, 1), another law for each seed.
fn random(seed: u64, len: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Inputs of an op by shape, `[rows, cols]`.
type Shapes<'a> = &'a [[usize; 2]];

/// Checks `backward`, which gives each input's gradient from the output's, against central
/// differences of `forward`. Both get all inputs.
fn check(
    what: &str,
    shapes: Shapes,
    forward: impl Fn(&[Vec<f64>]) -> Vec<f64>,
    backward: impl Fn(&[Vec<f64>], &[f64]) -> Vec<Vec<f64>>,
) {
    let mut inputs: Vec<_> =
        shapes.iter().enumerate().map(|(i, [rows, cols])| random(i as u64 + 1, rows * cols)).collect();
    let dout = random(99, forward(&inputs).len());
    let loss = |inputs: &[Vec<f64>]| forward(inputs).iter().zip(&dout).map(|(a, b)| a * b).sum::<f64>();
    let gradients = backward(&inputs, &dout);
    assert_eq!(gradients.len(), inputs.len(), "{what}");
    for (i, gradient) in gradients.iter().enumerate() {
        assert_eq!(gradient.len(), inputs[i].len(), "{what}: input {i}");
        assert!(gradient.iter().any(|g| *g != 0.0), "{what}: input {i} has no gradient: this shows nothing");
        for j in (0..gradient.len()).step_by(gradient.len().div_ceil(7)) {
            let (at, step) = (inputs[i][j], 1e-5);
            let mut moved = |to: f64| {
                inputs[i][j] = to;
                loss(&inputs)
            };
            let slope = (moved(at + step) - moved(at - step)) / (2.0 * step);
            moved(at);
            let error = (slope - gradient[j]).abs();
            assert!(error <= 1e-7 * slope.abs().max(1.0), "{what}: input {i}[{j}]: {} but {slope}", gradient[j]);
        }
    }
}

/// Matrices of a call.
struct Call<'d> {
    device: &'d Device,
}

impl<'d> Call<'d> {
    fn given(&self, values: &[f64], [rows, cols]: [usize; 2]) -> Tensor<'d, f64> {
        Tensor::from_slice(self.device, values, rows, cols).unwrap()
    }

    fn zeros(&self, [rows, cols]: [usize; 2]) -> Tensor<'d, f64> {
        Tensor::zeros(self.device, rows, cols).unwrap()
    }
}

fn dropout(rate: f64) -> Option<Dropout> {
    Dropout::with_rate(Draw { seed: 3, step: 5 }, 2, rate).unwrap()
}

#[test]
fn layer_norm() {
    let shapes = [[5, 12], [1, 12], [1, 12]];
    let (device, padded) = (cpu(), [8, 12]);
    let call = Call { device: &device };
    let run = |inputs: &[Vec<f64>]| {
        let [x, weight, bias] = [0, 1, 2].map(|i| call.given(&inputs[i], shapes[i]));
        let (mut y, mut stats) = (call.zeros(padded), call.zeros([5, 2]));
        let (x, weight, bias) = (x.mat(), weight.mat(), bias.mat());
        let problem = LayerNorm { x, weight, bias, y: y.mat_mut(), stats: stats.mat_mut() };
        ops::layer_norm(&mut Workspace::new(&device).unwrap(), &mut [problem]).unwrap();
        (y.to_vec().unwrap(), stats)
    };
    check(
        "layer_norm",
        &shapes,
        |inputs| run(inputs).0,
        |inputs, dy| {
            let stats = run(inputs).1;
            let (x, weight, dy) =
                (call.given(&inputs[0], shapes[0]), call.given(&inputs[1], shapes[1]), call.given(dy, padded));
            let [mut dx, mut dweight, mut dbias] = shapes.map(|shape| call.zeros(shape));
            let problem = LayerNormBackward {
                x: x.mat(),
                stats: stats.mat(),
                weight: weight.mat(),
                dy: dy.mat(),
                dx: dx.mat_mut(),
                dweight: dweight.mat_mut(),
                dbias: dbias.mat_mut(),
            };
            ops::layer_norm_backward(&mut Workspace::new(&device).unwrap(), &mut [problem]).unwrap();
            [dx, dweight, dbias].map(|gradient| gradient.to_vec().unwrap()).to_vec()
        },
    );
}

/// Two layers, as in a feed-forward: GELU, dropout and a residual, and backward through all of them.
#[test]
fn feed_forward() {
    let (n, d, h) = (6, 8, 10);
    let shapes = [[n, d], [h, d], [1, h], [d, h], [1, d]];
    let device = cpu();
    let call = Call { device: &device };
    let run = |inputs: &[Vec<f64>]| {
        let [x, w1, b1, w2, b2] = [0, 1, 2, 3, 4].map(|i| call.given(&inputs[i], shapes[i]));
        let [mut hidden, mut z, mut y] = [call.zeros([n, h]), call.zeros([n, h]), call.zeros([n, d])];
        let workspace = &mut Workspace::new(&device).unwrap();
        let first = Linear {
            x: x.mat(),
            weight: w1.mat(),
            bias: Some(b1.mat()),
            gelu: Some(hidden.mat_mut()),
            dropout: dropout(0.3),
            residual: None,
            y: z.mat_mut(),
        };
        ops::linear(workspace, &mut [first]).unwrap();
        let second = Linear {
            x: z.mat(),
            weight: w2.mat(),
            bias: Some(b2.mat()),
            gelu: None,
            dropout: None,
            residual: Some(x.mat()),
            y: y.mat_mut(),
        };
        ops::linear(workspace, &mut [second]).unwrap();
        (y.to_vec().unwrap(), hidden, z)
    };
    check(
        "feed_forward",
        &shapes,
        |inputs| run(inputs).0,
        |inputs, dy| {
            let (_, hidden, z) = run(inputs);
            // z again, as a backward pass that has not kept it takes it
            let mut again = call.zeros([n, h]);
            let workspace = &mut Workspace::new(&device).unwrap();
            let (x, out) = (hidden.mat(), again.mat_mut());
            ops::gelu_dropout(workspace, &mut [GeluDropout { x, gelu: true, dropout: dropout(0.3), out }]).unwrap();
            assert_eq!(again.to_vec().unwrap(), z.to_vec().unwrap());

            let [x, w1, _, w2, _] = [0, 1, 2, 3, 4].map(|i| call.given(&inputs[i], shapes[i]));
            let (dy, mut dhidden) = (call.given(dy, [n, d]), call.zeros([n, h]));
            let [mut dx, mut dw1, mut db1, mut dw2, mut db2] = shapes.map(|shape| call.zeros(shape));
            let through_second = LinearBackwardInput {
                dy: dy.mat(),
                weight: w2.mat(),
                gelu: Some(hidden.mat()),
                dropout: dropout(0.3),
                residual: None,
                accumulate: false,
                dx: dhidden.mat_mut(),
            };
            ops::linear_backward_input(workspace, &mut [through_second]).unwrap();
            let through_first = LinearBackwardInput {
                dy: dhidden.mat(),
                weight: w1.mat(),
                gelu: None,
                dropout: None,
                residual: Some(dy.mat()),
                accumulate: false,
                dx: dx.mat_mut(),
            };
            ops::linear_backward_input(workspace, &mut [through_first]).unwrap();
            let weights = &mut [
                LinearBackwardWeight { dy: dy.mat(), x: z.mat(), dweight: dw2.mat_mut(), dbias: db2.mat_mut() },
                LinearBackwardWeight { dy: dhidden.mat(), x: x.mat(), dweight: dw1.mat_mut(), dbias: db1.mat_mut() },
            ];
            ops::linear_backward_weight(workspace, weights).unwrap();
            [dx, dw1, db1, dw2, db2].map(|gradient| gradient.to_vec().unwrap()).to_vec()
        },
    );
}

#[test]
fn attention() {
    let (n, m, d, heads) = (7, 150, 6, 2);
    let shapes = [[n, d], [m, d], [m, d]];
    let device = cpu();
    let call = Call { device: &device };
    for rate in [0.0, 0.4] {
        let run = |inputs: &[Vec<f64>]| {
            let [q, k, v] = [0, 1, 2].map(|i| call.given(&inputs[i], shapes[i]));
            let (mut out, mut lse) = (call.zeros([n, d]), call.zeros([heads, n]));
            let (q, k, v) = (q.mat(), k.mat(), v.mat());
            let (out_mut, lse_mut) = (out.mat_mut(), lse.mat_mut());
            let problem = Attention { q, k, v, heads, dropout: dropout(rate), out: out_mut, lse: lse_mut };
            ops::attention(&mut Workspace::new(&device).unwrap(), &mut [problem]).unwrap();
            (out, lse)
        };
        check(
            "attention",
            &shapes,
            |inputs| run(inputs).0.to_vec().unwrap(),
            |inputs, dout| {
                let (out, lse) = run(inputs);
                let [q, k, v] = [0, 1, 2].map(|i| call.given(&inputs[i], shapes[i]));
                let dout = call.given(dout, [n, d]);
                let [mut dq, mut dk, mut dv] = shapes.map(|shape| call.zeros(shape));
                let problem = AttentionBackward {
                    q: q.mat(),
                    k: k.mat(),
                    v: v.mat(),
                    heads,
                    dropout: dropout(rate),
                    out: out.mat(),
                    lse: lse.mat(),
                    dout: dout.mat(),
                    dq: dq.mat_mut(),
                    dk: dk.mat_mut(),
                    dv: dv.mat_mut(),
                };
                ops::attention_backward(&mut Workspace::new(&device).unwrap(), &mut [problem]).unwrap();
                [dq, dk, dv].map(|gradient| gradient.to_vec().unwrap()).to_vec()
            },
        );
    }
}

#[test]
fn conv_fusion() {
    let d = 6;
    for (grid, n, taps) in [(TokenGrid::Square(4), 16, [49, 25, 9, 1]), (TokenGrid::Sequence(11), 11, [7, 5, 3, 1])] {
        for streams in [3, 1] {
            let mix: Shapes = if streams == 3 { &[[1, 3], [1, 1]] } else { &[] };
            let mut shapes = vec![[n, d]; streams];
            shapes.extend(mix);
            shapes.extend(taps.map(|taps| [d / 2, 2 * taps]));
            shapes.extend([[1, d / 2]; 4]);
            let device = cpu();
            let call = Call { device: &device };
            let tensors = |inputs: &[Vec<f64>]| -> Vec<_> {
                inputs.iter().zip(&shapes).map(|(values, &shape)| call.given(values, shape)).collect()
            };
            fn mats<'a>(tensors: &'a [Tensor<f64>]) -> Vec<Mat<'a, f64>> {
                tensors.iter().map(|tensor| tensor.mat()).collect()
            }
            let at = streams + mix.len();
            let run = |inputs: &[Vec<f64>]| {
                let (inputs, mut out) = (tensors(inputs), call.zeros([n, d / 2]));
                let inputs = mats(&inputs);
                let mut problem = ConvFusion {
                    streams: &inputs[..streams],
                    mix: (streams == 3).then(|| [inputs[3], inputs[4]]),
                    kernels: [0, 1, 2, 3].map(|i| inputs[at + i]),
                    biases: [4, 5, 6, 7].map(|i| inputs[at + i]),
                    grid,
                    dropout: dropout(0.3),
                    out: out.mat_mut(),
                };
                ops::conv_fusion(&mut Workspace::new(&device).unwrap(), &mut problem).unwrap();
                out
            };
            check(
                &format!("conv_fusion {grid:?}, {streams} streams"),
                &shapes,
                |inputs| run(inputs).to_vec().unwrap(),
                |inputs, dout| {
                    let (out, inputs, dout) = (run(inputs), tensors(inputs), call.given(dout, [n, d / 2]));
                    let inputs = mats(&inputs);
                    let mut gradients: Vec<_> = shapes.iter().map(|&shape| call.zeros(shape)).collect();
                    let mut grads = gradients.iter_mut().map(|gradient| gradient.mat_mut());
                    let dstreams: Vec<_> = grads.by_ref().take(streams).collect();
                    let mut four = |n: usize| -> Vec<MatMut<f64>> { grads.by_ref().take(n).collect() };
                    let dmix: Option<[_; 2]> = (streams == 3).then(|| four(2).try_into().ok().unwrap());
                    let mut problem = ConvFusionBackward {
                        streams: &inputs[..streams],
                        mix: (streams == 3).then(|| [inputs[3], inputs[4]]),
                        kernels: [0, 1, 2, 3].map(|i| inputs[at + i]),
                        biases: [4, 5, 6, 7].map(|i| inputs[at + i]),
                        grid,
                        dropout: dropout(0.3),
                        out: out.mat(),
                        dout: dout.mat(),
                        dstreams,
                        dmix,
                        dkernels: four(4).try_into().ok().unwrap(),
                        dbiases: four(4).try_into().ok().unwrap(),
                    };
                    ops::conv_fusion_backward(&mut Workspace::new(&device).unwrap(), &mut problem).unwrap();
                    gradients.iter().map(|gradient| gradient.to_vec().unwrap()).collect()
                },
            );
        }
    }
}

#[test]
fn ppeg() {
    let (side, c) = (4, 5);
    let shapes = [[side * side + 1, c], [c, 49], [c, 25], [c, 9], [1, c], [1, c], [1, c]];
    let device = cpu();
    let call = Call { device: &device };
    check(
        "ppeg",
        &shapes,
        |inputs| {
            let inputs = [0, 1, 2, 3, 4, 5, 6].map(|i| call.given(&inputs[i], shapes[i]));
            let [x, k7, k5, k3, b7, b5, b3] = inputs.each_ref().map(Tensor::mat);
            let mut y = call.zeros(shapes[0]);
            let problem = Ppeg { x, side, kernels: [k7, k5, k3], biases: [b7, b5, b3], y: y.mat_mut() };
            ops::ppeg(&mut Workspace::new(&device).unwrap(), &mut [problem]).unwrap();
            y.to_vec().unwrap()
        },
        |inputs, dy| {
            let inputs = [0, 1, 2, 3].map(|i| call.given(&inputs[i], shapes[i]));
            let [x, k7, k5, k3] = inputs.each_ref().map(Tensor::mat);
            let dy = call.given(dy, shapes[0]);
            let mut gradients = shapes.map(|shape| call.zeros(shape));
            let [dx, d7, d5, d3, b7, b5, b3] = gradients.each_mut().map(Tensor::mat_mut);
            let problem = PpegBackward {
                x,
                side,
                kernels: [k7, k5, k3],
                dy: dy.mat(),
                dx,
                dkernels: [d7, d5, d3],
                dbiases: [b7, b5, b3],
            };
            ops::ppeg_backward(&mut Workspace::new(&device).unwrap(), &mut [problem]).unwrap();
            gradients.map(|gradient| gradient.to_vec().unwrap()).to_vec()
        },
    );
}

/// Two parts of a context, merged, are the whole.
#[test]
fn attention_in_parts() {
    let (n, m, d, heads) = (5, 12, 6, 2);
    let device = cpu();
    let call = Call { device: &device };
    let workspace = &mut Workspace::new(&device).unwrap();
    let [q, k, v] =
        [[n, d], [m, d], [m, d]].map(|[rows, cols]| call.given(&random(rows as u64, rows * cols), [rows, cols]));
    let mut attend = |range: std::ops::Range<usize>| {
        let (mut out, mut lse) = (call.zeros([n, d]), call.zeros([heads, n]));
        let (k, v) = (k.mat().rows_range(range.clone()).unwrap(), v.mat().rows_range(range).unwrap());
        let (q, out_mut, lse_mut) = (q.mat(), out.mat_mut(), lse.mat_mut());
        let problem = Attention { q, k, v, heads, dropout: None, out: out_mut, lse: lse_mut };
        ops::attention(workspace, &mut [problem]).unwrap();
        (out, lse)
    };
    let (whole, parts) = (attend(0..m), [attend(0..7), attend(7..m)]);
    let (mut out, mut lse) = (call.zeros([n, d]), call.zeros([heads, n]));
    for (i, (part, part_lse)) in parts.iter().enumerate() {
        let (part, part_lse, out, lse) = (part.mat(), part_lse.mat(), out.mat_mut(), lse.mat_mut());
        let problem = AttentionMerge { part, part_lse, out, lse, first: i == 0 };
        ops::attention_merge(&mut Workspace::new(&device).unwrap(), &mut [problem]).unwrap();
    }
    for (got, expected) in [(&out, &whole.0), (&lse, &whole.1)] {
        let pairs = got.to_vec().unwrap().into_iter().zip(expected.to_vec().unwrap());
        pairs.for_each(|(a, b)| assert!((a - b).abs() < 1e-12, "{a}, not {b}"));
    }
}

/// The first update, by hand: both moments are corrected for their start at 0, so that a weight moves
/// by the rate against its gradient's sign.
#[test]
fn adam() {
    let device = cpu();
    let call = Call { device: &device };
    let gradients = [3.0, -0.5, 20.0, 0.0];
    let [mut params, mut m, mut v] = [0; 3].map(|_| call.zeros([1, 4]));
    let mut grads = call.given(&gradients, [1, 4]);
    let settings = Adam { learning_rate: 0.1, weight_decay: 0.0, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
    let (params_mut, grads_mut, m, v) = (params.mat_mut(), grads.mat_mut(), m.mat_mut(), v.mat_mut());
    let mut state = AdamState::<f64> { params: params_mut, weights: None, grads: grads_mut, m, v };
    ops::adam(&mut Workspace::new(&device).unwrap(), &settings, &mut state, 1).unwrap();
    for (got, gradient) in params.to_vec().unwrap().into_iter().zip(gradients) {
        let expected = if gradient == 0.0 { 0.0 } else { -0.1 * gradient.signum() };
        assert!((got - expected).abs() < 1e-7, "{got}, not {expected}");
    }
    assert_eq!(grads.to_vec().unwrap(), [0.0; 4]);
}

/// Settings by which parameters would become NaN, or move away from a minimum.
#[test]
fn adam_s_settings_are_checked() {
    let device = cpu();
    let call = Call { device: &device };
    let good = Adam { learning_rate: 0.1, weight_decay: 0.0, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
    let bad = [
        (good, 0, "step is 0"),
        (Adam { learning_rate: f64::NAN, ..good }, 1, "learning_rate is NaN"),
        (Adam { learning_rate: -1.0, ..good }, 1, "learning_rate is -1"),
        (Adam { weight_decay: f64::INFINITY, ..good }, 1, "weight_decay is inf"),
        (Adam { beta1: 1.0, ..good }, 1, "beta1 is 1"),
        (Adam { beta2: 1.5, ..good }, 1, "beta2 is 1.5"),
        (Adam { epsilon: -1e-8, ..good }, 1, "epsilon is -0.00000001"),
    ];
    for (settings, step, words) in bad {
        let [mut params, mut grads, mut m, mut v] = [0; 4].map(|_| call.zeros([1, 4]));
        let (params, grads, m, v) = (params.mat_mut(), grads.mat_mut(), m.mat_mut(), v.mat_mut());
        let mut state = AdamState::<f64> { params, weights: None, grads, m, v };
        let said = ops::adam(&mut Workspace::new(&device).unwrap(), &settings, &mut state, step).unwrap_err();
        assert!(said.to_string().contains(words), "{said}");
    }
}

/// Sides whose squares wrap around to the 9 tokens, or to none, that are there.
#[test]
fn a_grid_of_a_wrapped_side_is_refused() {
    let device = cpu();
    let call = Call { device: &device };
    for side in [1 << 32, (1 << 63) + 3, usize::MAX - 2, usize::MAX] {
        let (x, mut y) = (call.zeros([9, 4]), call.zeros([9, 4]));
        let kernels = [49, 25, 9].map(|taps| call.zeros([4, taps]));
        let [k7, k5, k3] = kernels.each_ref().map(Tensor::mat);
        let bias = call.zeros([1, 4]);
        let biases = [bias.mat(), bias.mat(), bias.mat()];
        let problem = Ppeg { x: x.mat(), side, kernels: [k7, k5, k3], biases, y: y.mat_mut() };
        let said = ops::ppeg(&mut Workspace::new(&device).unwrap(), &mut [problem]).unwrap_err().to_string();
        assert!(said.contains(&format!("a square grid of side {side}")), "{said}");
        let kernels = [49, 25, 9, 1].map(|taps| call.zeros([2, 2 * taps]));
        let [k7, k5, k3, k1] = kernels.each_ref().map(Tensor::mat);
        let bias = call.zeros([1, 2]);
        let mut out = call.zeros([9, 2]);
        let mut problem = ConvFusion {
            streams: &[x.mat()],
            mix: None,
            kernels: [k7, k5, k3, k1],
            biases: [bias.mat(), bias.mat(), bias.mat(), bias.mat()],
            grid: TokenGrid::Square(side),
            dropout: None,
            out: out.mat_mut(),
        };
        let said = ops::conv_fusion(&mut Workspace::new(&device).unwrap(), &mut problem).unwrap_err().to_string();
        assert!(said.contains(&format!("a square grid of side {side}")), "{said}");
    }
}

#[test]
fn what_cannot_be_meant_is_said_by_name() {
    let (device, other) = (cpu(), cpu());
    let workspace = &mut Workspace::new(&device).unwrap();
    let (x, elsewhere) = (Tensor::<f32>::zeros(&device, 3, 8).unwrap(), Tensor::<f32>::zeros(&other, 3, 8).unwrap());
    let mut out = Tensor::<f32>::zeros(&device, 3, 8).unwrap();
    let mut say = |x: Mat<f32>| {
        let problem = GeluDropout { x, gelu: true, dropout: None, out: out.mat_mut() };
        ops::gelu_dropout(workspace, &mut [problem]).unwrap_err().to_string()
    };
    assert!(say(elsewhere.mat()).contains("gelu_dropout: x is on another device"), "{}", say(elsewhere.mat()));
    assert!(say(x.mat().rows_range(0..2).unwrap()).contains("gelu_dropout: x has shape [2, 8], expected [3, 8]"));
    for rate in [-0.1, 1.0, f64::NAN] {
        let text = Dropout::with_rate(Draw { seed: 0, step: 0 }, 0, rate).unwrap_err().to_string();
        assert!(text.contains("expected one from 0 to 0.95"), "{text}");
    }
    let numbers = [0f32; 16];
    let foreign = |address: *const f32, rows, cols, stride| -> Result<()> {
        // SAFETY: nothing is read: these are refused.
        unsafe { Mat::from_raw(&device, address, rows, cols, stride) }.map(|_| ())
    };
    let refused = |result: Result<()>, words: &str| {
        let text = result.unwrap_err().to_string();
        assert!(text.contains(words), "{text}");
    };
    refused(foreign(numbers.as_ptr(), 4, 4, 3), "rows of 4 elements, 3 apart, overlap");
    refused(foreign(std::ptr::null(), 4, 4, 4), "there is no element of 4 bytes at address 0x0");
    refused(foreign(numbers.as_ptr().wrapping_byte_add(1), 2, 2, 2), "no element of 4 bytes");
    refused(foreign(numbers.as_ptr(), usize::MAX, 4, 4), "are in no memory");
    foreign(std::ptr::null(), 0, 4, 4).unwrap();
}

/// DataLoader's workers and multiprocessing fork a process whose pool has been used: its threads are
/// not there in the child.
#[cfg(unix)]
#[test]
fn a_pool_survives_a_fork() {
    let device = Arc::new(Device::Cpu(Cpu::new(4).unwrap()));
    let run = || {
        let x = Tensor::from_slice(&device, &random(1, 3000 * 64), 3000, 64).unwrap();
        let mut out = Tensor::zeros(&device, 3000, 64).unwrap();
        let problem = GeluDropout { x: x.mat(), gelu: true, dropout: None, out: out.mat_mut() };
        ops::gelu_dropout(&mut Workspace::new(&device).unwrap(), &mut [problem]).unwrap();
        out.to_vec().unwrap()
    };
    let expected = run();
    // SAFETY: the child does nothing but compute, and ends by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let same = std::panic::catch_unwind(|| run() == expected).unwrap_or(false);
        // SAFETY: ends the child without what the test harness does at an exit.
        unsafe { libc::_exit(if same { 0 } else { 1 }) };
    }
    let mut status = -1;
    for _ in 0..300 {
        // SAFETY: a child of this process, and a place for its status.
        if unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == child {
            assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "the child ended with {status}");
            assert_eq!(run(), expected, "after the fork");
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    // SAFETY: the child, which hangs.
    unsafe { libc::kill(child, libc::SIGKILL) };
    panic!("the child hangs");
}
