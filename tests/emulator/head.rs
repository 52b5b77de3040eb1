//! kernels/head.cu against src/ops/head.rs and src/loss/mod.rs.

use crossfusion::{
    Result,
    device::{Device, Element, emulator::Emulator},
    loss::{Loss, Prediction, Target},
    ops::{
        head::{self, Head, HeadGrad, SlideLoss},
        layer_norm::Norm,
    },
};
use serde::Deserialize;

use super::{
    PLAIN, RACE,
    bed::{Bed, Case, check, check_races},
    common::{self, Law},
    gpu,
};

struct ClassToken {
    d: usize,
    classes: usize,
    /// `head::train` with this loss, instead of forward and backward.
    loss: Option<(Loss, Target)>,
}

impl Case for ClassToken {
    fn name(&self) -> String {
        format!("head of {} to {}, {:?}", self.d, self.classes, self.loss)
    }

    fn run<T: Element>(&self, bed: &mut Bed<T>) -> Result<()> {
        let Self { d, classes, loss } = *self;
        let unit = Law { offset: 0.0, scale: 1.0 };
        let small = Law { offset: 0.0, scale: 2.0 / (d as f64).sqrt() };
        let mut grad = HeadGrad {
            forward: Head {
                norm: Norm {
                    x: bed.input("x", 1, d, Law { offset: 2.0, scale: 1.0 }),
                    stats: bed.unchecked(1, 2),
                    weight: bed.input("norm weight", 1, d, unit),
                    bias: bed.input("norm bias", 1, d, unit),
                    y: bed.unchecked(1, d),
                },
                weight: bed.input("weight", classes, d, small),
                bias: bed.input("bias", 1, classes, unit),
                logits: bed.unchecked(1, classes),
            },
            dlogits: bed.unchecked(1, classes),
            dx: bed.output("dx", 1, d),
            dnorm_weight: bed.accumulated("dnorm weight", 1, d),
            dnorm_bias: bed.accumulated("dnorm bias", 1, d),
            dweight: bed.accumulated("dweight", classes, d),
            dbias: bed.accumulated("dbias", 1, classes),
        };
        if let Some((loss, target)) = loss {
            let (loss, result) = (SlideLoss { loss, target, alpha: 0.2, share: 0.5 }, bed.device.alloc(16)?);
            head::train(bed.device, &grad, &loss, result.view(0, 1, 2))?;
            let result: Vec<f64> = bytemuck::pod_collect_to_vec(&bed.device.read(&result)?);
            let shown = bed.sums("loss, risk", 1, 2);
            bed.write(&result, shown);
            return Ok(());
        }
        grad.forward.norm.stats = bed.sums("stats", 1, 2);
        grad.forward.norm.y = bed.output("normed", 1, d);
        grad.forward.logits = bed.sums("logits", 1, classes);
        grad.dlogits = bed.accumulated("dlogits", 1, classes);
        head::forward(bed.device, &grad.forward)?;
        head::backward(bed.device, &grad)
    }
}

const CASES: [ClassToken; 7] = [
    ClassToken { d: 8, classes: 1, loss: None },
    ClassToken { d: 40, classes: 4, loss: None },
    ClassToken { d: 264, classes: 32, loss: None },
    ClassToken { d: 40, classes: 4, loss: Some((Loss::NllSurv, Target { label: 2, censored: false })) },
    ClassToken { d: 264, classes: 32, loss: Some((Loss::CeSurv, Target { label: 31, censored: false })) },
    ClassToken { d: 512, classes: 4, loss: Some((Loss::NllSurv, Target { label: 0, censored: true })) },
    ClassToken { d: 512, classes: 4, loss: None },
];

#[test]
fn matches_the_cpu() {
    CASES.iter().for_each(check);
}

#[test]
fn has_no_races() {
    CASES[..5].iter().for_each(check_races);
}

/// PyTorch's losses and gradients, saturated logits included: the tolerance of tests/goldens.rs.
#[test]
fn losses_equal_the_goldens() {
    #[derive(Deserialize)]
    struct Golden {
        loss: String,
        alpha: f64,
        logits: Vec<f64>,
        label: usize,
        censorship: f64,
        value: f64,
        grad: Vec<f64>,
    }
    let file = std::fs::read(common::goldens().join("losses.json")).unwrap();
    let cases: Vec<Golden> = serde_json::from_slice(&file).unwrap();
    for (i, case) in cases.iter().enumerate() {
        let emulator = Device::Emulator(Emulator::new(if i % 50 == 0 { RACE } else { PLAIN[0] }));
        let device = gpu().unwrap_or(&emulator);
        // a head without weights: its logits are the bias, and the bias's gradient is theirs
        let (classes, d) = (case.logits.len(), 8);
        let tensors = device.alloc((7 * d + 2 * classes * d + 4 * classes + 2) * 4).unwrap();
        let mut offset = 0;
        let mut take = |rows: usize, cols: usize| {
            offset += rows * cols;
            tensors.view::<f32>(offset - rows * cols, rows, cols)
        };
        // matrices first: their rows are read in pieces of 16 bytes
        let (weight, dweight) = (take(classes, d), take(classes, d));
        let norm = Norm { x: take(1, d), weight: take(1, d), bias: take(1, d), y: take(1, d), stats: take(1, 2) };
        let forward = Head { norm, weight, bias: take(1, classes), logits: take(1, classes) };
        let (dlogits, dx, dnorm_weight, dnorm_bias) = (take(1, classes), take(1, d), take(1, d), take(1, d));
        let grad = HeadGrad { forward, dlogits, dx, dnorm_weight, dnorm_bias, dweight, dbias: take(1, classes) };
        device.upload(&case.logits.iter().map(|&x| x as f32).collect::<Vec<_>>(), forward.bias).unwrap();
        let loss = if case.loss == "nll" { Loss::NllSurv } else { Loss::CeSurv };
        let target = Target { label: case.label, censored: case.censorship == 1.0 };
        let (loss, result) = (SlideLoss { loss, target, alpha: case.alpha, share: 0.5 }, device.alloc(16).unwrap());
        head::train(device, &grad, &loss, result.view(0, 1, 2)).unwrap();
        let result: Vec<f64> = bytemuck::pod_collect_to_vec(&device.read(&result).unwrap());
        let close = |what: &str, got: f64, expected: f64| {
            assert!((got - expected).abs() <= 1e-6 * expected.abs().max(1.0), "case {i} {what}: {got}, not {expected}");
        };
        close("loss", result[0], case.value);
        close("risk", result[1], Prediction::from_logits(&case.logits).risk);
        for (got, expected) in device.download(grad.dbias).unwrap().iter().zip(&case.grad) {
            close("gradient", f64::from(*got) / loss.share, *expected);
        }
    }
}
