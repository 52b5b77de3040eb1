//! Explicit backward passes against central finite differences in f64, dropout on: every parameter
//! tensor and every bag, along a random direction; and the same bits from any number of threads,
//! the same numbers from any instruction set.
#![cfg(feature = "programs")]

mod common;

use common::{Law, fill};
use crossfusion::{
    device::{Cpu, Device, Real},
    loss::{Loss, Target},
    model::{BagGrads, Bags, Config, Fusion, ModelName},
    ops::Draw,
    train::step::{Engine, State},
};

const TARGET: Target = Target { label: 2, censored: false };
const DRAW: Draw = Draw { seed: 11, step: 5 };

struct Slide<T> {
    data: [Vec<T>; 3],
    features: usize,
}

impl<T: Real> Slide<T> {
    fn new(patches: [usize; 3], features: usize) -> Self {
        let law = Law { offset: 0.0, scale: 1.7 };
        let bag = |i: usize| {
            fill(&format!("bag {i}"), patches[i] * features, law).into_iter().map(|x| T::of(f64::from(x))).collect()
        };
        Self { data: [bag(0), bag(1), bag(2)], features }
    }

    fn zeros_like(&self) -> Self {
        Self { data: self.data.clone().map(|x| vec![T::ZERO; x.len()]), features: self.features }
    }

    fn bags(&self) -> Bags<'_, T> {
        Bags::new(self.data.each_ref().map(Vec::as_slice), self.features).unwrap()
    }

    fn grads(&mut self) -> BagGrads<'_, T> {
        BagGrads::new(self.data.each_mut().map(Vec::as_mut_slice), self.features).unwrap()
    }
}

/// An engine whose parameters are large enough for every path to matter: smaller weights, and the
/// bags' gradients vanish.
fn engine<T: Real>(device: Device, config: &Config) -> Engine<T> {
    let mut engine = Engine::new(device, config, 3).unwrap();
    let mut params: Vec<T> = engine.read_state(State::Params).unwrap();
    for entry in engine.model().layout().entries() {
        let law =
            if entry.shape.len() == 1 { Law { offset: 0.5, scale: 0.4 } } else { Law { offset: 0.0, scale: 1.0 } };
        for (p, x) in params[entry.offset..].iter_mut().zip(fill(&entry.name, entry.len(), law)) {
            *p = T::of(f64::from(x));
        }
    }
    engine.write_state(State::Params, &params).unwrap();
    engine
}

fn loss(engine: &mut Engine<f64>, slide: &Slide<f64>, draw: Option<Draw>) -> f64 {
    let mut value = 0.0;
    let zero = |logits: &[f64]| {
        value = Loss::NllSurv.evaluate(logits, TARGET, 0.2).0;
        vec![0.0; logits.len()]
    };
    engine.accumulate(slide.bags(), draw, None, zero).unwrap();
    value
}

fn check_finite_differences(config: &Config, patches: [usize; 3], draw: Option<Draw>) {
    const STEP: f64 = 1e-5;
    let mut engine = engine::<f64>(Device::from_name("cpu", 0).unwrap(), config);
    let mut slide = Slide::new(patches, config.features);
    let mut dslide = slide.zeros_like();
    engine
        .accumulate(slide.bags(), draw, Some(dslide.grads()), |logits| Loss::NllSurv.evaluate(logits, TARGET, 0.2).1)
        .unwrap();
    let params = engine.read_state(State::Params).unwrap();
    let grads = engine.read_state(State::Grads).unwrap();

    let check = |name: &str, analytic: f64, numeric: f64| {
        // the differences' own error: rounding of a loss of size 3, 3e-15 / STEP, and truncation
        // STEP^2
        let error = (analytic - numeric).abs();
        assert!(
            error <= 1e-6 * analytic.abs() + 3e-10,
            "{patches:?} {name}: backward {analytic:e}, differences {numeric:e}"
        );
    };
    for entry in engine.model().layout().entries().to_vec() {
        let direction = fill(&format!("direction {}", entry.name), entry.len(), Law { offset: 0.0, scale: 1.0 });
        let range = entry.offset..entry.offset + entry.len();
        let analytic: f64 = grads[range.clone()].iter().zip(&direction).map(|(g, d)| g * f64::from(*d)).sum();
        let mut at = |step: f64| {
            let mut moved = params.clone();
            moved[range.clone()].iter_mut().zip(&direction).for_each(|(p, d)| *p += step * f64::from(*d));
            engine.write_state(State::Params, &moved).unwrap();
            loss(&mut engine, &slide, draw)
        };
        let numeric = (at(STEP) - at(-STEP)) / (2.0 * STEP);
        check(&entry.name, analytic, numeric);
    }
    engine.write_state(State::Params, &params).unwrap();
    for (i, name) in ["x5", "x10", "x20"].iter().enumerate() {
        let original = slide.data[i].clone();
        let direction = fill(&format!("direction {name}"), original.len(), Law { offset: 0.0, scale: 1.0 });
        let analytic: f64 = dslide.data[i].iter().zip(&direction).map(|(g, d)| g * f64::from(*d)).sum();
        let mut at = |step: f64| {
            slide.data[i] = original.iter().zip(&direction).map(|(x, d)| x + step * f64::from(*d)).collect();
            loss(&mut engine, &slide, draw)
        };
        let numeric = (at(STEP) - at(-STEP)) / (2.0 * STEP);
        slide.data[i] = original;
        check(name, analytic, numeric);
    }
}

fn config(features: usize, dim: usize, heads: usize, layers: usize, fusion: Fusion) -> Config {
    Config { dim, heads, layers, fusion, ..Config::new(features) }
}

#[test]
fn conv2d_with_dropout() {
    check_finite_differences(&config(6, 8, 2, 1, Fusion::Conv2d), [3, 7, 11], Some(DRAW));
}

#[test]
fn conv1d_with_dropout() {
    check_finite_differences(&config(6, 8, 2, 1, Fusion::Conv1d), [3, 7, 11], Some(DRAW));
}

#[test]
fn two_layers_and_no_projection() {
    check_finite_differences(&config(12, 12, 3, 2, Fusion::Conv2d), [2, 9, 17], Some(DRAW));
}

/// The ablations; the one that reads x20 alone has no gradient of the other bags.
#[test]
fn other_models() {
    for model in [ModelName::CrossFusionConcat, ModelName::CrossFusionSingle] {
        let small = Config { model, ..config(6, 8, 2, 1, Fusion::Conv2d) };
        check_finite_differences(&small, [3, 7, 11], Some(DRAW));
        check_finite_differences(&Config { model, ..config(12, 12, 3, 2, Fusion::Conv2d) }, [2, 9, 17], None);
    }
    let sequence = Config { model: ModelName::CrossFusionSingle, ..config(6, 8, 2, 1, Fusion::Conv1d) };
    check_finite_differences(&sequence, [3, 7, 11], Some(DRAW));
}

#[test]
fn without_dropout() {
    check_finite_differences(&config(5, 8, 1, 1, Fusion::Conv2d), [1, 2, 3], None);
}

/// More tokens than an attention tile holds, in queries and in keys, so that tiles, segments and
/// their merging are all in use.
#[test]
fn many_tiles() {
    check_finite_differences(&config(4, 4, 1, 1, Fusion::Conv2d), [130, 121, 300], Some(DRAW));
}

fn gradients(device: Device, config: &Config, patches: [usize; 3]) -> (Vec<f64>, Vec<f32>) {
    let mut engine = engine::<f32>(device, config);
    let slide = Slide::new(patches, config.features);
    let logits = engine
        .accumulate(slide.bags(), Some(DRAW), None, |logits| Loss::NllSurv.evaluate(logits, TARGET, 0.2).1)
        .unwrap();
    assert_eq!(engine.arena_peak(), engine.arena_bytes(), "the plan is not what the step used");
    (logits, engine.read_state(State::Grads).unwrap())
}

#[test]
fn same_bits_from_any_number_of_threads() {
    let config = config(70, 64, 2, 1, Fusion::Conv2d);
    let one = gradients(Device::from_name("cpu", 1).unwrap(), &config, [40, 150, 1100]);
    for threads in [2, 3, 7] {
        let many = gradients(Device::from_name("cpu", threads).unwrap(), &config, [40, 150, 1100]);
        assert!(one == many, "{threads} threads differ from one");
    }
}

#[test]
fn narrower_instruction_sets_agree() {
    let config = config(20, 16, 2, 1, Fusion::Conv2d);
    let patches = [9, 30, 200];
    let (logits, grads) = gradients(Device::from_name("cpu", 2).unwrap(), &config, patches);
    let norm = grads.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
    for arch in narrower() {
        let (l, g) = gradients(Device::Cpu(Cpu::with_arch(2, arch).unwrap()), &config, patches);
        for (a, b) in logits.iter().zip(&l) {
            assert!((a - b).abs() < 1e-4 * a.abs().max(1.0), "{arch:?}: logits {l:?}, expected {logits:?}");
        }
        let error = grads.iter().zip(&g).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
        assert!(error < 1e-4 * norm, "{arch:?}: gradients off by {error:e} of {norm:e}");
    }
}

/// The instruction sets that this machine has besides its best.
fn narrower() -> Vec<pulp::Arch> {
    let mut sets = vec![pulp::Arch::Scalar];
    #[cfg(target_arch = "x86_64")]
    sets.extend(pulp::x86::V3::try_new().map(pulp::Arch::V3));
    sets
}

/// A broken weight must not look like a prediction.
#[test]
fn nan_reaches_the_logits() {
    let config = config(6, 8, 2, 1, Fusion::Conv2d);
    let mut engine = engine::<f32>(Device::from_name("cpu", 1).unwrap(), &config);
    let slide = Slide::new([3, 7, 11], 6);
    assert!(engine.evaluate(slide.bags()).unwrap().iter().all(|x| x.is_finite()));
    let entry =
        engine.model().layout().entries().iter().find(|entry| entry.name == "s_lin_proj.0.weight").unwrap().offset;
    let mut params = engine.read_state(State::Params).unwrap();
    params[entry] = f32::NAN;
    engine.write_state(State::Params, &params).unwrap();
    let logits = engine.evaluate(slide.bags()).unwrap();
    assert!(logits.iter().all(|x| x.is_nan()), "{logits:?}");
    assert!(Loss::NllSurv.evaluate(&logits, TARGET, 0.2).0.is_nan());
}

#[test]
fn a_refused_checkpoint_changes_nothing() {
    let config = config(6, 8, 2, 1, Fusion::Conv2d);
    let mut engine = engine::<f32>(Device::from_name("cpu", 1).unwrap(), &config);
    let before = engine.read_state(State::Params).unwrap();
    let mut tensors: crossfusion::data::torch::StateDict = engine
        .model()
        .layout()
        .entries()
        .iter()
        .map(|entry| {
            let parameter =
                crossfusion::data::torch::Parameter { shape: entry.shape.clone(), values: vec![0.0; entry.len()] };
            (entry.name.clone(), parameter)
        })
        .collect();
    tensors.insert("stray".into(), crossfusion::data::torch::Parameter { shape: vec![1], values: vec![0.0] });
    assert!(engine.load(&tensors).unwrap_err().to_string().contains("`stray`"));
    assert_eq!(engine.read_state(State::Params).unwrap(), before);
}
