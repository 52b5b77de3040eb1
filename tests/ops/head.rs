//! The head: logits of one row, a loss of them, and back.

use crossfusion::{
    loss::{Loss, Target},
    ops::head::SlideLoss,
};

use super::*;

const D: usize = 8;
const CLASSES: usize = 4;
const SHAPES: [[usize; 2]; 5] = [[1, D], [1, D], [1, D], [CLASSES, D], [1, CLASSES]];

/// What backward begins with.
enum From<'a> {
    Dlogits(&'a [f64]),
    Loss(SlideLoss),
}

struct Ran {
    logits: Vec<f64>,
    gradients: Vec<Vec<f64>>,
    /// Loss and risk, of [`From::Loss`].
    result: Vec<f64>,
}

fn run(inputs: &[Vec<f64>], from: From) -> Ran {
    let device = cpu();
    let call = Call { device: &device };
    let inputs = [0, 1, 2, 3, 4].map(|i| call.given(&inputs[i], SHAPES[i]));
    let [x, norm_weight, norm_bias, weight, bias] = inputs.each_ref().map(Tensor::mat);
    let [mut stats, mut normed, mut logits] = [call.zeros([1, 2]), call.zeros([1, D]), call.zeros([1, CLASSES])];
    let workspace = &mut Workspace::new(&device).unwrap();
    let (mut gradients, mut result) = (SHAPES.map(|shape| call.zeros(shape)), call.zeros([1, 2]));
    let mut dlogits = match from {
        From::Dlogits(dlogits) => call.given(dlogits, [1, CLASSES]),
        From::Loss(_) => call.zeros([1, CLASSES]),
    };
    {
        let (stats, normed, logits) = (stats.mat_mut(), normed.mat_mut(), logits.mat_mut());
        let mut forward = Head { x, norm_weight, norm_bias, weight, bias, stats, normed, logits };
        if let From::Dlogits(_) = from {
            ops::head(workspace, &mut forward).unwrap();
        }
        let [dx, dnorm_weight, dnorm_bias, dweight, dbias] = gradients.each_mut().map(Tensor::mat_mut);
        let dlogits = dlogits.mat_mut();
        let mut problem = HeadBackward { forward, dlogits, dx, dnorm_weight, dnorm_bias, dweight, dbias };
        match from {
            From::Dlogits(_) => ops::head_backward(workspace, &mut problem).unwrap(),
            From::Loss(loss) => ops::head_loss(workspace, &mut problem, &loss, &mut result.mat_mut()).unwrap(),
        }
    }
    let gradients = gradients.map(|gradient| gradient.to_vec().unwrap()).to_vec();
    Ran { logits: logits.to_vec().unwrap(), gradients, result: result.to_vec().unwrap() }
}

#[test]
fn gradients_of_the_logits() {
    let logits = |inputs: &[Vec<f64>]| run(inputs, From::Dlogits(&[0.0; CLASSES])).logits;
    check("head", &SHAPES, logits, |inputs, dout| run(inputs, From::Dlogits(dout)).gradients);
}

#[test]
fn gradients_of_a_loss() {
    for (loss, censored) in [(Loss::NllSurv, false), (Loss::NllSurv, true), (Loss::CeSurv, false)] {
        let (target, alpha) = (Target { label: 2, censored }, 0.3);
        let with = |share| From::Loss(SlideLoss { loss, target, alpha, share });
        let value = |inputs: &[Vec<f64>]| {
            let ran = run(inputs, with(1.0));
            let (value, _) = loss.evaluate(&run(inputs, From::Dlogits(&[0.0; CLASSES])).logits, target, alpha);
            assert!((ran.result[0] - value).abs() < 1e-12, "{loss:?}: {}, expected {value}", ran.result[0]);
            vec![value]
        };
        check(&format!("{loss:?}"), &SHAPES, value, |inputs, dout| run(inputs, with(dout[0])).gradients);
    }
}

/// Every operand: a kernel would read or write past the end of one that is too short.
#[test]
fn a_head_of_other_shapes_is_refused() {
    let device = cpu();
    let (d, classes) = (8, 4);
    let names = ["x", "norm_weight", "norm_bias", "weight", "bias", "stats", "normed", "logits", "dlogits"];
    let gradients = ["dx", "dnorm_weight", "dnorm_bias", "dweight", "dbias"];
    let names: Vec<&str> = names.into_iter().chain(gradients).collect();
    for short in 1..names.len() {
        let of = |name: &str| match name {
            "weight" | "dweight" => [classes, d],
            "bias" | "dbias" | "logits" | "dlogits" => [1, classes],
            "stats" => [1, 2],
            _ => [1, d],
        };
        let tensor = |i: usize| {
            let [rows, cols] = of(names[i]);
            Tensor::<f64>::zeros(&device, rows, cols - usize::from(i == short)).unwrap()
        };
        let mut tensors: Vec<Tensor<f64>> = (0..names.len()).map(tensor).collect();
        let (given, written) = tensors.split_at_mut(5);
        let [stats, normed, logits, dlogits, dx, dnorm_weight, dnorm_bias, dweight, dbias] = written else { panic!() };
        let forward = Head {
            x: given[0].mat(),
            norm_weight: given[1].mat(),
            norm_bias: given[2].mat(),
            weight: given[3].mat(),
            bias: given[4].mat(),
            stats: stats.mat_mut(),
            normed: normed.mat_mut(),
            logits: logits.mat_mut(),
        };
        let mut problem = HeadBackward {
            forward,
            dlogits: dlogits.mat_mut(),
            dx: dx.mat_mut(),
            dnorm_weight: dnorm_weight.mat_mut(),
            dnorm_bias: dnorm_bias.mat_mut(),
            dweight: dweight.mat_mut(),
            dbias: dbias.mat_mut(),
        };
        let text = ops::head_backward(&mut Workspace::new(&device).unwrap(), &mut problem).unwrap_err().to_string();
        assert!(text.contains(&format!("head backward: {} has shape", names[short])), "{text}");
    }
}
