//! kernels/head.cu against src/ops/head.rs and src/loss/mod.rs.

use crossfusion::{
    Result,
    device::{Device, Element, emulator::Emulator},
    loss::{Loss, Prediction, Target},
    ops::{
        head::{self, Head, HeadGrad},
        layer_norm::Norm,
    },
};
use serde::Deserialize;

use crate::{
    PLAIN, RACE,
    bed::{Bed, Case, check, check_races},
    common::{self, Law},
    gpu,
};

struct ClassToken {
    d: usize,
    classes: usize,
}

impl Case for ClassToken {
    fn name(&self) -> String {
        format!("head of {} to {}", self.d, self.classes)
    }

    fn run<T: Element>(&self, bed: &mut Bed<T>) -> Result<()> {
        let Self { d, classes } = *self;
        let unit = Law { offset: 0.0, scale: 1.0 };
        let norm = Norm {
            x: bed.input("x", 1, d, Law { offset: 2.0, scale: 1.0 }),
            stats: bed.sums("stats", 1, 2),
            weight: bed.input("norm weight", 1, d, unit),
            bias: bed.input("norm bias", 1, d, unit),
            y: bed.output("normed", 1, d),
        };
        let (weight, bias) = (bed.input("weight", classes, d, unit), bed.input("bias", 1, classes, unit));
        let forward = Head { norm, weight, bias, logits: bed.sums("logits", 1, classes) };
        let dlogits = bed.accumulated("dlogits", 1, classes);
        let grad = HeadGrad {
            forward,
            dlogits,
            dx: bed.output("dx", 1, d),
            dnorm_weight: bed.accumulated("dnorm weight", 1, d),
            dnorm_bias: bed.accumulated("dnorm bias", 1, d),
            dweight: bed.accumulated("dweight", classes, d),
            dbias: bed.accumulated("dbias", 1, classes),
        };
        head::forward(bed.device, &forward)?;
        head::backward(bed.device, &mut bed.arena, &grad)
    }
}

const CASES: [ClassToken; 4] = [
    ClassToken { d: 8, classes: 1 },
    ClassToken { d: 40, classes: 4 },
    ClassToken { d: 264, classes: 32 },
    ClassToken { d: 512, classes: 4 },
];

#[test]
fn matches_the_cpu() {
    CASES.iter().for_each(check);
}

#[test]
fn has_no_races() {
    CASES[..3].iter().for_each(check_races);
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
        let classes = case.logits.len();
        let (tensors, result) = (device.alloc(2 * classes * 4).unwrap(), device.alloc(16).unwrap());
        let (logits, dlogits) = (tensors.view::<f32>(0, 1, classes), tensors.view(classes, 1, classes));
        device.upload(&case.logits.iter().map(|&x| x as f32).collect::<Vec<_>>(), logits).unwrap();
        let loss = if case.loss == "nll" { Loss::NllSurv } else { Loss::CeSurv };
        let target = Target { label: case.label, censored: case.censorship == 1.0 };
        let share = 0.5;
        head::loss(device, logits, dlogits, &result, (loss, target, case.alpha, share)).unwrap();
        let result: Vec<f64> = bytemuck::pod_collect_to_vec(&device.read(&result).unwrap());
        let close = |what: &str, got: f64, expected: f64| {
            assert!((got - expected).abs() <= 1e-6 * expected.abs().max(1.0), "case {i} {what}: {got}, not {expected}");
        };
        close("loss", result[0], case.value);
        close("risk", result[1], Prediction::from_logits(&case.logits).risk);
        for (got, expected) in device.download(dlogits).unwrap().iter().zip(&case.grad) {
            close("gradient", f64::from(*got) / share, *expected);
        }
    }
}
