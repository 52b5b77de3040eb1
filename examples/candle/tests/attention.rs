//! The fused attention against candle's own ops in F64: forward, all gradients, dropout, layouts,
//! and what is refused.

use candle_core::{DType, Device, Error, Result, Tensor, Var};
use crossfusion::ops::{Draw, Dropout};
use crossfusion_candle_example::{FusedAttention, plain};

const CPU: &Device = &Device::Cpu;

fn fused() -> FusedAttention {
    FusedAttention::new(CPU).unwrap()
}

/// Normal numbers in F64, the same for the same seed.
fn random(seed: u64, shape: impl Into<candle_core::Shape>) -> Tensor {
    let shape = shape.into();
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    // Box-Muller
    let normal = (0..shape.elem_count())
        .map(|_| (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos())
        .collect();
    Tensor::from_vec::<_, f64>(normal, shape, CPU).unwrap()
}

fn variable(tensor: &Tensor) -> Var {
    Var::from_tensor(tensor).unwrap()
}

fn dropout(rate: f64, step: u32) -> Option<Dropout> {
    Dropout::with_rate(Draw { seed: 3, step }, 5, rate).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn largest(tensor: &Tensor) -> f64 {
    numbers(tensor).iter().fold(0.0, |most, x| x.abs().max(most))
}

/// Asserts that no number differs by more than `tolerance` times the largest one.
#[track_caller]
fn near(what: &str, got: &Tensor, expected: &Tensor, tolerance: f64) {
    near_beside(what, got, expected, tolerance, largest(expected));
}

/// The same of another number than the largest.
#[track_caller]
fn near_beside(what: &str, got: &Tensor, expected: &Tensor, tolerance: f64, unit: f64) {
    assert_eq!(got.dims(), expected.dims(), "{what}");
    assert!(unit > 0.0, "{what}: nothing is expected: this shows nothing");
    let worst = numbers(got).into_iter().zip(numbers(expected)).map(|(got, expected)| (got - expected).abs() / unit);
    // NaN is the worst
    let worst = worst.fold(0.0, |worst, error| if error <= worst { worst } else { error });
    assert!(worst <= tolerance, "{what}: off by {worst:e} of {unit}, more than {tolerance:e}");
}

/// The output, and the gradients of the inputs from a weighted sum of it.
fn passes(inputs: &[Tensor; 3], attention: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>) -> [Tensor; 4] {
    let [q, k, v] = inputs.each_ref().map(variable);
    let out = attention(&q, &k, &v).unwrap();
    let weights = random(99, out.shape()).to_dtype(out.dtype()).unwrap();
    let loss = (&out * weights).unwrap().sum_all().unwrap();
    let gradients = loss.backward().unwrap();
    let [dq, dk, dv] = [q, k, v].map(|input| gradients.get(&input).unwrap().clone());
    [out, dq, dk, dv]
}

#[test]
fn forward_and_gradients_are_those_of_plain_attention() {
    // batch, queries, keys, heads, head_dim, and what q is multiplied by: its scores are normal
    // with this deviation, so that 100 gives some of several hundred
    let cases = [
        (1, 1, 1, 1, 4, 1.0),
        (2, 7, 5, 3, 8, 1.0),
        (1, 1, 150, 4, 16, 1.0),
        (3, 9, 1, 2, 8, 1.0),
        (1, 300, 130, 2, 32, 1.0),
        (2, 33, 257, 1, 128, 1.0),
        (2, 40, 70, 2, 6, 100.0),
    ];
    for case @ (batch, queries, keys, heads, head_dim, scale) in cases {
        for dtype in [DType::F64, DType::F32, DType::BF16] {
            let shapes = [queries, keys, keys].map(|length| (batch, length, heads, head_dim));
            let mut inputs = [0, 1, 2].map(|i| random(i as u64 + 1, shapes[i]));
            inputs[0] = (&inputs[0] * scale).unwrap();
            // rounding the inputs is no error: plain attention is given the same numbers
            let inputs = inputs.map(|input| input.to_dtype(dtype).unwrap());
            let exact = inputs.each_ref().map(|input| input.to_dtype(DType::F64).unwrap());
            let all = passes(&exact, |q, k, v| plain::attention(q, k, v, None));
            let got = passes(&inputs, |q, k, v| fused().forward(q, k, v, None));

            // A score that is off by epsilon times itself moves its probability by as much. Bf16
            // rounds the output to 8 bits, which backward takes a difference with.
            let tolerance = match dtype {
                DType::BF16 if scale > 1.0 => 0.04,
                DType::BF16 => 0.008,
                DType::F32 => f64::from(f32::EPSILON) * (32.0 + 4.0 * scale),
                _ => f64::EPSILON * (32.0 + 4.0 * scale),
            };
            for ((what, got), expected) in ["out", "dq", "dk", "dv"].iter().zip(&got).zip(&all) {
                assert_eq!(got.dtype(), dtype);
                // of one key the probability is 1 whatever its score, so that dq and dk are 0
                let unit = if keys == 1 { largest(&all[3]) } else { largest(expected) };
                near_beside(&format!("{case:?} {dtype:?} {what}"), got, expected, tolerance, unit);
            }
        }
    }
}

#[test]
fn tensors_are_read_in_any_layout() {
    let attention = fused();
    // what is stored, by length, and the view of it that is (2, length, 3, 4)
    type Shape = fn(usize) -> Vec<usize>;
    type View = fn(&Tensor, usize) -> Result<Tensor>;
    let layouts: [(&str, Shape, View); 6] = [
        ("a part of a wider projection", |l| vec![2, l, 3, 3, 4], |x, _| x.narrow(2, 1, 1)?.squeeze(2)),
        ("heads before tokens", |l| vec![2, 3, l, 4], |x, _| x.transpose(1, 2)),
        ("a part of each head", |l| vec![2, l, 3, 8], |x, _| x.narrow(3, 4, 4)),
        ("every second column", |l| vec![2, l, 3, 4, 2], |x, _| x.narrow(4, 1, 1)?.squeeze(4)),
        ("one entry for both", |l| vec![1, l, 3, 4], |x, l| x.expand((2, l, 3, 4))),
        ("one token for all", |_| vec![2, 1, 3, 4], |x, l| x.expand((2, l, 3, 4))),
    ];
    let lengths = [5, 9, 9];
    for (what, shape, view) in layouts {
        for input in 0..3 {
            let mut stored = [0, 1, 2].map(|i| random(i as u64 + 1, (2, lengths[i], 3, 4)));
            stored[input] = random(4, shape(lengths[input]));
            let viewed = |q: &Tensor, k: &Tensor, v: &Tensor| -> Result<[Tensor; 3]> {
                let mut inputs = [q, k, v].map(Tensor::clone);
                inputs[input] = view(&inputs[input], lengths[input])?;
                Ok(inputs)
            };
            let got = passes(&stored, |q, k, v| {
                let [q, k, v] = viewed(q, k, v)?;
                attention.forward(&q, &k, &v, None)
            });
            let expected = passes(&stored, |q, k, v| {
                let [q, k, v] = viewed(q, k, v)?;
                plain::attention(&q, &k, &v, None)
            });
            // where all keys or all values are one, some gradients are 0
            let unit = expected.iter().map(largest).fold(0.0, f64::max);
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                near_beside(&format!("{what}, input {input}, tensor {i}"), got, expected, 1e-13, unit);
            }
        }
    }
}

#[test]
fn gradients_come_from_any_loss() {
    let attention = fused();
    let inputs = [random(1, (2, 5, 3, 4)), random(2, (2, 9, 3, 4)), random(3, (2, 9, 3, 4))];
    type Loss = fn(&Tensor) -> Result<Tensor>;
    let losses: [(&str, Loss); 4] = [
        ("sum", |out| out.sum_all()),
        ("sum of the tokens", |out| out.sum(1)?.sqr()?.sum_all()),
        ("transposed", |out| (out.transpose(1, 2)? * random(4, (2, 3, 5, 4)))?.sum_all()),
        ("part", |out| out.narrow(1, 1, 2)?.sqr()?.sum_all()),
    ];
    for (what, loss) in losses {
        let gradients = |attention: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>| {
            let [q, k, v] = inputs.each_ref().map(variable);
            let gradients = loss(&attention(&q, &k, &v).unwrap()).unwrap().backward().unwrap();
            [q, k, v].map(|input| gradients.get(&input).unwrap().clone())
        };
        let got = gradients(&|q, k, v| attention.forward(q, k, v, None));
        let expected = gradients(&|q, k, v| plain::attention(q, k, v, None));
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            near(&format!("{what}: input {i}"), got, expected, 1e-13);
        }
    }
}

/// What dropout multiplies the probabilities by, `(batch, heads, n, n)`: with scores of 0 all are 1
/// / n, and with the identity for values each is a number of the output.
fn factors(attention: &FusedAttention, batch: usize, heads: usize, n: usize, dropout: Option<Dropout>) -> Tensor {
    let zeros = Tensor::zeros((batch, n, heads, n), DType::F64, CPU).unwrap();
    let identity = Tensor::eye(n, DType::F64, CPU).unwrap().reshape((1, n, 1, n)).unwrap();
    let identity = identity.expand((batch, n, heads, n)).unwrap();
    let out = attention.forward(&zeros, &zeros, &identity, dropout).unwrap();
    (out.transpose(1, 2).unwrap() * n as f64).unwrap()
}

#[test]
fn dropout_is_the_same_in_both_passes() {
    let attention = fused();
    let (batch, heads, n) = (2, 3, 64);
    for rate in [0.2, 0.5] {
        let factors = factors(&attention, batch, heads, n, dropout(rate, 1));
        let inputs = [1, 2, 3].map(|seed| random(seed, (batch, n, heads, n)));
        let got = passes(&inputs, |q, k, v| attention.forward(q, k, v, dropout(rate, 1)));
        let expected = passes(&inputs, |q, k, v| plain::attention(q, k, v, Some(&factors)));
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            near(&format!("rate {rate}, tensor {i}"), got, expected, 1e-12);
        }
    }
}

#[test]
fn dropout_drops_as_many_as_it_says_and_others_each_time() {
    let attention = fused();
    let (batch, heads, n) = (2, 3, 64);
    let draw = |dropout| numbers(&factors(&attention, batch, heads, n, dropout));
    let first = draw(dropout(0.25, 1));
    let kept = first.iter().filter(|&&factor| (factor - 1.0 / 0.75).abs() < 1e-12).count();
    assert_eq!(kept + first.iter().filter(|&&factor| factor == 0.0).count(), first.len());
    // binomial of 24576 numbers: the deviation is sqrt(0.25 0.75 / 24576) = 0.0028
    assert!((kept as f64 / first.len() as f64 - 0.75).abs() < 0.012, "{kept} of {}", first.len());

    assert_eq!(draw(dropout(0.25, 1)), first);
    assert_ne!(draw(dropout(0.25, 2)), first);
    let heads: Vec<_> = first.chunks(n * n).collect();
    for (i, head) in heads.iter().enumerate() {
        assert!(!heads[..i].contains(head), "head {i} of the batch drops what another does");
    }
    assert!(draw(dropout(0.0, 1)).iter().all(|factor| (factor - 1.0).abs() < 1e-12));
}

/// Central differences in a direction of all inputs together, which know nothing of plain
/// attention.
#[test]
fn gradients_with_dropout_are_slopes() {
    let attention = fused();
    let shapes = [(1, 6, 2, 4), (1, 11, 2, 4), (1, 11, 2, 4)];
    let [inputs, direction] = [0, 10].map(|seed| [0, 1, 2].map(|i| random(seed + i as u64, shapes[i])));
    let weights = random(20, shapes[0]);
    let loss = |inputs: &[Tensor; 3]| -> Result<Tensor> {
        let [q, k, v] = inputs;
        (attention.forward(q, k, v, dropout(0.3, 1))? * &weights)?.sum_all()
    };
    let at = |step: f64| {
        let moved = std::array::from_fn(|i| (&inputs[i] + (&direction[i] * step).unwrap()).unwrap());
        loss(&moved).unwrap().to_scalar::<f64>().unwrap()
    };
    let slope = (at(1e-5) - at(-1e-5)) / 2e-5;

    let variables = inputs.each_ref().map(variable);
    let gradients = loss(&variables.each_ref().map(|v| v.as_tensor().clone())).unwrap().backward().unwrap();
    let along = |i: usize| {
        let gradient = gradients.get(&variables[i]).unwrap();
        numbers(&(gradient * &direction[i]).unwrap()).iter().sum::<f64>()
    };
    let got = along(0) + along(1) + along(2);
    assert!((got - slope).abs() <= 1e-8 * slope.abs().max(1.0), "{got}, but the slope is {slope}");
}

#[test]
fn some_inputs_alone_have_gradients() {
    let attention = fused();
    let inputs = [random(1, (1, 5, 2, 4)), random(2, (1, 9, 2, 4)), random(3, (1, 9, 2, 4))];
    let [_, expected @ ..] = passes(&inputs, |q, k, v| plain::attention(q, k, v, None));
    let weights = random(99, (1, 5, 2, 4));
    for wanted in 0..3 {
        let wanted_input = variable(&inputs[wanted]);
        let mut given = inputs.clone();
        given[wanted] = wanted_input.as_tensor().clone();
        let out = attention.forward(&given[0], &given[1], &given[2], None).unwrap();
        let gradients = (out * &weights).unwrap().sum_all().unwrap().backward().unwrap();
        for (i, input) in given.iter().enumerate() {
            match gradients.get(input) {
                Some(gradient) if i == wanted => near(&format!("input {i}"), gradient, &expected[i], 1e-13),
                gradient => assert!(gradient.is_none() && i != wanted, "input {i} of {wanted}"),
            }
        }
    }
    let [q, k, v] = &inputs;
    assert!(!attention.forward(q, k, v, None).unwrap().track_op());
}

#[test]
fn backward_runs_again_and_after_other_calls() {
    let attention = fused();
    let inputs = [random(1, (1, 5, 2, 4)), random(2, (1, 9, 2, 4)), random(3, (1, 9, 2, 4))];
    let [q, k, v] = inputs.each_ref().map(variable);
    let loss = attention.forward(&q, &k, &v, dropout(0.3, 1)).unwrap().sqr().unwrap().sum_all().unwrap();
    let gradients = || {
        let gradients = loss.backward().unwrap();
        [&q, &k, &v].map(|input| numbers(gradients.get(input).unwrap()))
    };
    let first = gradients();
    assert_eq!(gradients(), first);
    // another call, of other sizes, by a clone and in another thread
    let other = attention.clone();
    let work =
        move || other.forward(&random(4, (2, 3, 1, 8)), &random(5, (2, 4, 1, 8)), &random(6, (2, 4, 1, 8)), None);
    std::thread::spawn(work).join().unwrap().unwrap();
    assert_eq!(gradients(), first);
}

/// One tensor for queries, keys and values: its gradient is the sum of three.
#[test]
fn self_attention() {
    let attention = fused();
    let gradient = |attention: &dyn Fn(&Tensor) -> Result<Tensor>| {
        let x = variable(&random(1, (2, 7, 3, 4)));
        let gradients = attention(&x).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
        gradients.get(&x).unwrap().clone()
    };
    let got = gradient(&|x| attention.forward(x, x, x, None));
    near("self-attention", &got, &gradient(&|x| plain::attention(x, x, x, None)), 1e-13);
}

#[test]
fn without_keys_the_result_is_zero() {
    let none = Tensor::zeros((1, 0, 2, 4), DType::F64, CPU).unwrap();
    let q = variable(&random(1, (1, 3, 2, 4)));
    let out = fused().forward(&q, &none, &none, None).unwrap();
    assert_eq!(numbers(&out), [0.0; 24]);
    let gradients = out.sum_all().unwrap().backward().unwrap();
    assert_eq!(numbers(gradients.get(&q).unwrap()), [0.0; 24]);
}

#[test]
fn what_cannot_be_computed_is_refused_in_a_sentence() {
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, CPU).unwrap();
    let f32 = |shape: &[usize]| zeros(shape, DType::F32);
    let shape: &[usize] = &[2, 5, 3, 4];
    let last_site = Dropout::with_rate(Draw { seed: 0, step: 0 }, u32::MAX - 5, 0.5).unwrap();
    let cases = [
        (
            [f32(&[5, 3, 4]), f32(shape), f32(shape)],
            None,
            "attention: q has shape [5, 3, 4], expected (batch, length, heads, head_dim)",
        ),
        (
            [f32(shape), f32(&[2, 5, 4, 3]), f32(shape)],
            None,
            "attention: k has shape [2, 5, 4, 3], expected (2, any length, 3, 4) as of q",
        ),
        (
            [f32(shape), f32(shape), f32(&[2, 6, 3, 4])],
            None,
            "attention: v has shape [2, 6, 3, 4], expected [2, 5, 3, 4] as of k",
        ),
        ([f32(shape), f32(shape), zeros(shape, DType::F64)], None, "attention: v is F64, but q F32"),
        ([(); 3].map(|_| zeros(shape, DType::F16)), None, "attention: F16: expected F32 or BF16, or F64 on a CPU"),
        (
            [(); 3].map(|_| f32(&[1, 2, 1, 129])),
            None,
            "attention forward: 129 columns in 1 heads: heads must divide the columns into at most 128 each",
        ),
        (
            [(); 3].map(|_| f32(&[2, 5, 0, 4])),
            None,
            "attention forward: 0 columns in 0 heads: heads must divide the columns into at most 128 each",
        ),
        (
            [(); 3].map(|_| f32(shape)),
            last_site,
            "attention: dropout at site 4294967290: no room for the sites of 6 heads",
        ),
    ];
    let attention = fused();
    for ([q, k, v], dropout, expected) in cases {
        let error: Error = attention.forward(&q, &k, &v, dropout).unwrap_err();
        // with RUST_BACKTRACE=1 a backtrace follows
        assert_eq!(error.to_string().lines().next(), Some(expected));
    }
}
