//! What patches contribute to a risk: against PyTorch in float64, against finite differences, the
//! same in every memory policy and from any number of threads, and on slides with a planted region.
#![cfg(feature = "programs")]

mod common;

use std::{collections::BTreeMap, ops::Range};

use common::{Law, Parameter, fill};
use crossfusion::{
    Result,
    device::{Device, Element, Real},
    eval::attribution::{
        Attribution, Baseline, Region, Scores, attention, by_region, gradient, integrated, occlusion, rank_correlation,
    },
    loss::{Loss, Prediction, Target},
    model::{AttentionOf, BagGrads, Bags, Config, Features, ModelName, Policy, ReadPatches, Scale, Scales},
    ops::{Draw, adam::Adam},
    train::step::{Engine, Memory, State},
};
use safetensors::SafeTensors;
use serde::Deserialize;

/// By CROSSFUSION_DEVICE, or the CPU.
fn device() -> Device {
    Device::from_name(&std::env::var("CROSSFUSION_DEVICE").unwrap_or_else(|_| "cpu".into()), 0).unwrap()
}

fn cpu(threads: usize) -> Device {
    Device::from_name("cpu", threads).unwrap()
}

/// A bag of a slide, as an array or read part by part.
struct Bag<T> {
    values: Vec<T>,
    features: usize,
}

impl<T: Element> ReadPatches<T> for Bag<T> {
    fn patches(&self) -> usize {
        self.values.len() / self.features
    }

    fn read(&self, patches: Range<usize>, out: &mut [T]) -> Result<()> {
        out.copy_from_slice(&self.values[patches.start * self.features..patches.end * self.features]);
        Ok(())
    }
}

type Slide<T> = Scales<Bag<T>>;

fn in_memory<T: Element>(slide: &Slide<T>) -> Bags<'_, T> {
    let features = slide.values().next().unwrap().features;
    Bags::new(slide.as_ref().map(|_, bag| &bag.values[..]), features).unwrap()
}

fn from_readers<T: Element>(slide: &Slide<T>) -> Bags<'_, T> {
    let features = slide.values().next().unwrap().features;
    Bags::of(slide.as_ref().map(|_, bag| Features::Reader(bag as &dyn ReadPatches<T>)), features).unwrap()
}

/// Patches of these numbers at x5, x10 and x20.
fn slide<T: Element<Sum: Real>>(patches: [usize; 3], features: usize) -> Slide<T> {
    let bag = |scale: Scale, patches: usize| {
        let values = fill(scale.name(), patches * features, Law { offset: 0.0, scale: 1.7 });
        Bag { values: values.into_iter().map(|x| T::from_sum(T::Sum::of(x.into()))).collect(), features }
    };
    Scales::from(patches).map(bag)
}

/// Parameters large enough for every path to matter.
fn engine<T: Element<Sum: Real>>(device: Device, config: &Config) -> Engine<T> {
    let mut engine = Engine::new(device, config, 3).unwrap();
    let mut params = engine.read_state(State::Params).unwrap();
    for entry in engine.model().layout().entries() {
        let law =
            if entry.shape.len() == 1 { Law { offset: 0.5, scale: 0.4 } } else { Law { offset: 0.0, scale: 1.0 } };
        for (p, x) in params[entry.offset..].iter_mut().zip(fill(&entry.name, entry.len(), law)) {
            *p = T::Sum::of(f64::from(x));
        }
    }
    engine.write_state(State::Params, &params).unwrap();
    engine
}

/// Every model, with a projection and without; and one whose only output is the risk.
fn configs(features: usize) -> Vec<Config> {
    let of = |model, dim, heads, layers| Config { model, dim, heads, layers, ..Config::new(features) };
    let mut configs: Vec<_> = ModelName::ALL.into_iter().map(|model| of(model, features / 3 * 2, 2, 1)).collect();
    configs.extend(ModelName::ALL.map(|model| of(model, features, 3, 2)));
    configs.push(Config { n_classes: 1, ..configs[0].clone() });
    configs
}

/// |a - b| / |b| over all scales, which have to be the same.
fn relative(a: &Scores, b: &Scores) -> f64 {
    let lengths = |scores: &Scores| scores.as_ref().map(|_, x| x.len());
    assert_eq!(lengths(a), lengths(b));
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let (a, b) = (|| a.values().flatten(), || b.values().flatten());
    norm(&mut a().zip(b()).map(|(a, b)| a - b)) / norm(&mut b().copied())
}

// ---- against PyTorch ----

#[derive(Deserialize)]
struct Golden {
    model: String,
    config: common::ModelConfig,
    bags: BTreeMap<String, usize>,
    fill_tag: String,
    input_law: Law,
    parameters: BTreeMap<String, Parameter>,
}

/// By PyTorch in float64: autograd for the gradients, the probabilities of a softmax that is
/// written out for attention (scripts/make-attribution-golden.py).
#[derive(Deserialize)]
struct Expected {
    risk: f64,
    mean: OfBaseline,
    zero: OfBaseline,
    attention: BTreeMap<String, Vec<f64>>,
    class_token: BTreeMap<String, Vec<f64>>,
}

#[derive(Deserialize)]
struct OfBaseline {
    baseline: f64,
    gradient: BTreeMap<String, Vec<f64>>,
    integrated: BTreeMap<String, Vec<f64>>,
}

fn scores(of: &BTreeMap<String, Vec<f64>>) -> Scores {
    Scale::ALL.into_iter().filter_map(|scale| Some((scale, of.get(scale.name())?.clone()))).collect()
}

/// How far two rules of integration may be apart behind a ReLU, whose kinks make any rule slow.
/// What the sums of PyTorch's own miss is up to 3 % of the change in risk.
const KINKS: f64 = 2e-2;

fn check_goldens<T: Element<Sum: Real>>(device: fn() -> Device, tolerance: f64, points: usize) {
    let text = std::fs::read(common::goldens().join("attribution.json")).unwrap();
    let expected: BTreeMap<String, Expected> = serde_json::from_slice(&text).unwrap();
    assert_eq!(expected.len(), 5);
    for (name, expected) in expected {
        let file = std::fs::read(common::goldens().join(format!("{name}.safetensors"))).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
        let golden: Golden = serde_json::from_str(&metadata.metadata().clone().unwrap()["golden"]).unwrap();
        let model = match golden.model.as_str() {
            "CrossFusion" => ModelName::CrossFusion,
            "CrossFusionConcat" => ModelName::CrossFusionConcat,
            "CrossFusionSingle" => ModelName::CrossFusionSingle,
            other => panic!("{name} is of {other}"),
        };
        let config = Config { model, ..golden.config.build() };
        // of all models this one has no ReLU
        let kinks = if model == ModelName::CrossFusionConcat { 1e-7 } else { KINKS };
        let mut engine = Engine::<T>::new(device(), &config, 0).unwrap();
        engine.load(&common::parameters(&golden.fill_tag, &golden.parameters)).unwrap();
        let bag = |scale: Scale| {
            let (tag, features) = (&golden.fill_tag, config.features);
            let values = common::bag(tag, scale.name(), golden.bags[scale.name()], features, golden.input_law);
            let values = values.into_iter().map(|x| T::from_sum(T::Sum::of(x.into()))).collect();
            (scale, Bag { values, features })
        };
        let slide: Slide<T> = model.scales().iter().map(|&scale| bag(scale)).collect();
        let bags = in_memory(&slide);
        let check = |what: &str, got: &Attribution, expected: &BTreeMap<String, Vec<f64>>, risk: f64, slack: f64| {
            let error = relative(&got.scores, &scores(expected));
            assert!(error < slack * tolerance, "{name}, {what}: off by {error:.1e}");
            assert!((got.risk - risk).abs() < tolerance, "{name}, {what}: risk {}, expected {risk}", got.risk);
        };
        for (baseline, of_baseline) in [(Baseline::Mean, &expected.mean), (Baseline::Zero, &expected.zero)] {
            let found = gradient(&mut engine, bags, baseline).unwrap();
            check(&format!("gradient, {baseline:?}"), &found, &of_baseline.gradient, expected.risk, 1.0);
            if points > 0 {
                let way = integrated(&mut engine, bags, baseline, points, &mut |_| ()).unwrap();
                let what = format!("integrated, {baseline:?}");
                check(&what, &way.attribution, &of_baseline.integrated, expected.risk, kinks / tolerance);
                assert!((way.baseline - of_baseline.baseline).abs() < tolerance, "{what}");
            }
        }
        let of_class_token = attention(&mut engine, bags, AttentionOf::ClassToken).unwrap();
        check("class token", &of_class_token, &expected.class_token, expected.risk, 1.0);
        match attention(&mut engine, bags, AttentionOf::Patches) {
            Ok(of_patches) => check("attention", &of_patches, &expected.attention, expected.risk, 1.0),
            Err(e) => {
                assert!(model == ModelName::CrossFusionSingle && e.to_string().contains("no cross-attention"), "{e}");
            }
        }
    }
}

#[test]
fn as_pytorch_has_it() {
    // the goldens have 12 digits
    check_goldens::<f64>(|| cpu(0), 1e-10, 200);
}

#[test]
fn as_pytorch_has_it_in_f32() {
    check_goldens::<f32>(device, 3e-4, 0);
}

// ---- against finite differences, in f64 ----

fn risk(engine: &mut Engine<f64>, slide: &Slide<f64>) -> f64 {
    Prediction::from_logits(&engine.evaluate(in_memory(slide)).unwrap()).risk
}

/// A patch's gradient times input is how the risk changes as its features are stretched.
#[test]
fn gradient_times_input_is_a_finite_difference() {
    const STEP: f64 = 1e-5;
    let mut checked = 0;
    for config in configs(12) {
        let mut engine = engine::<f64>(cpu(2), &config);
        let mut slide = slide::<f64>([3, 7, 11], config.features);
        let Attribution { scores, .. } = gradient(&mut engine, in_memory(&slide), Baseline::Zero).unwrap();
        for &scale in engine.model().scales() {
            for patch in 0..slide.get(scale).unwrap().values.len() / 12 {
                let mut at = |step: f64| {
                    let stretch = |slide: &mut Slide<f64>, factor: f64| {
                        let (_, bag) = slide.iter_mut().find(|(s, _)| *s == scale).unwrap();
                        bag.values[patch * 12..][..12].iter_mut().for_each(|x| *x *= factor);
                    };
                    let before = slide.get(scale).unwrap().values.clone();
                    stretch(&mut slide, 1.0 + step);
                    let risk = risk(&mut engine, &slide);
                    slide.insert(scale, Bag { values: before, features: 12 });
                    risk
                };
                let numeric = (at(STEP) - at(-STEP)) / (2.0 * STEP);
                let got = scores.get(scale).unwrap()[patch];
                // rounding of a risk of size 4, 4e-16 / STEP, and truncation STEP^2
                assert!(
                    (got - numeric).abs() <= 1e-6 * numeric.abs() + 3e-10,
                    "{config:?} {scale} {patch}: {got:e}, differences {numeric:e}"
                );
                checked += usize::from(numeric.abs() > 1e-8);
            }
        }
    }
    assert!(checked > 60, "only {checked} patches matter");
}

/// The same numbers as the whole gradient, which is then formed.
#[test]
fn products_are_the_gradient_times_the_features() {
    for config in configs(48) {
        let mut engine = engine::<f64>(cpu(2), &config);
        let slide = slide::<f64>([5, 17, 40], 48);
        let mut whole = slide.as_ref().map(|_, bag| vec![0.0; bag.values.len()]);
        let memory = whole.iter_mut().map(|(scale, x)| (scale, &mut x[..])).collect::<Scales<_>>();
        let bag_grads = BagGrads::new(memory, 48).unwrap();
        let risk_gradient = |logits: &[f64]| Prediction::from_logits(logits).risk_gradient();
        engine.accumulate(in_memory(&slide), None, Some(bag_grads), risk_gradient).unwrap();
        let expected = whole.only(engine.model().scales()).map(|scale, dx| {
            let x = &slide.get(scale).unwrap().values;
            x.chunks(48).zip(dx.chunks(48)).map(|(x, dx)| x.iter().zip(dx).map(|(x, dx)| x * dx).sum()).collect()
        });
        let got = gradient(&mut engine, in_memory(&slide), Baseline::Zero).unwrap();
        assert!(relative(&got.scores, &expected) < 1e-12, "{config:?}");
    }
}

/// With more points, what is missing shrinks until nothing is.
#[test]
fn integrated_gradients_sum_up_to_the_change_of_risk() {
    let mut changes = Vec::new();
    for config in configs(12) {
        let mut engine = engine::<f64>(cpu(2), &config);
        let slide = slide::<f64>([3, 7, 11], config.features);
        let mut passes = Vec::new();
        let way = integrated(&mut engine, in_memory(&slide), Baseline::Mean, 64, &mut |p| passes.push(p.done)).unwrap();
        assert_eq!(passes, (1..=66).collect::<Vec<_>>());
        let change = way.attribution.risk - way.baseline;
        let most = if config.model == ModelName::CrossFusionConcat { 1e-5 } else { 2.0 * KINKS };
        assert!(
            way.error().abs() <= most * change.abs() + 1e-8,
            "{config:?}: {:e} of {change:e} is missing",
            way.error()
        );
        changes.push(change.abs());
    }
    assert!(changes.iter().all(|&change| change > 1e-6), "the risk hardly changes: {changes:?}");
}

#[test]
fn what_cannot_be_told_is_refused() {
    let config = &configs(12)[0];
    let mut engine = engine::<f64>(cpu(1), config);
    let slide = slide::<f64>([3, 7, 11], 12);
    let error = integrated(&mut engine, in_memory(&slide), Baseline::Mean, 0, &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("0 points"), "{error}");
    let nan = vec![f64::NAN; engine.read_state(State::Params).unwrap().len()];
    engine.write_state(State::Params, &nan).unwrap();
    let error = gradient(&mut engine, in_memory(&slide), Baseline::Zero).unwrap_err();
    assert!(error.to_string().contains("risk is NaN"), "{error}");
}

// ---- the same from any threads, and in every policy ----

/// Every method's scores.
fn all_methods<T: Element>(engine: &mut Engine<T>, bags: Bags<'_, T>) -> Vec<(&'static str, Attribution)> {
    let mut found = vec![
        ("gradient", gradient(engine, bags, Baseline::Mean).unwrap()),
        ("integrated", integrated(engine, bags, Baseline::Mean, 3, &mut |_| ()).unwrap().attribution),
        ("class token", attention(engine, bags, AttentionOf::ClassToken).unwrap()),
    ];
    if engine.model().config().model != ModelName::CrossFusionSingle {
        found.push(("attention", attention(engine, bags, AttentionOf::Patches).unwrap()));
    }
    let region = |patches: [Vec<usize>; 3]| Region::from(patches).only(engine.model().scales());
    let last = bags.sizes().get(Scale::X20).map_or(0, |patches| patches - 1);
    let regions = [region([vec![0], vec![0, 2], vec![1, 3, 4]]), region([vec![2], vec![5], vec![7, last]])];
    found.push(("occlusion", occlusion(engine, bags, &regions, &mut |_| ()).unwrap().attribution));
    found
}

#[test]
fn same_bits_from_any_number_of_threads() {
    for config in &configs(48)[..3] {
        let slide = slide::<f32>([40, 150, 500], 48);
        let one = all_methods(&mut engine::<f32>(cpu(1), config), in_memory(&slide));
        for threads in [2, 5] {
            assert_eq!(one, all_methods(&mut engine::<f32>(cpu(threads), config), in_memory(&slide)));
        }
    }
}

/// Whether every method's scores are these, to so much of their size.
fn check_methods(what: &str, found: &[(&str, Attribution)], expected: &[(&'static str, Attribution)], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for ((method, expected), (_, found)) in expected.iter().zip(found) {
        let mut error = relative(&found.scores, &expected.scores);
        if *method == "occlusion" {
            // the difference of two risks, each as exact as it is large
            error *= expected.total().abs() / expected.risk.abs();
        }
        assert!(error < tolerance, "{what}, {method}: off by {error:.1e}");
    }
}

fn check_policies<T: Element<Sum: Real>>(device: fn() -> Device, tolerance: f64) {
    for config in configs(48) {
        let slide = slide::<T>([40, 37, 450], 48);
        let mut engine = engine::<T>(device(), &config);
        let expected = all_methods(&mut engine, in_memory(&slide));
        for recompute in [None, Some(usize::MAX), Some(16)] {
            for stream in [None, Some(13), Some(400)] {
                let policy = Policy { recompute, stream };
                engine.set_memory(Memory::Policy(policy));
                let found = all_methods(&mut engine, from_readers(&slide));
                check_methods(&format!("{} {policy}", config.model), &found, &expected, tolerance);
            }
        }
    }
}

/// A small slide by every method, held and streamed, in f32 on CROSSFUSION_DEVICE against f64 on
/// the CPU.
#[test]
fn every_method_on_the_device() {
    for config in &configs(48)[..3] {
        let (patches, policy) = ([3, 6, 20], Policy { recompute: Some(16), stream: Some(13) });
        let expected = all_methods(&mut engine::<f64>(cpu(2), config), in_memory(&slide(patches, 48)));
        let (mut engine, slide) = (engine::<f32>(device(), config), slide(patches, 48));
        let found = all_methods(&mut engine, in_memory(&slide));
        check_methods(&format!("{}, held", config.model), &found, &expected, 1e-3);
        engine.set_memory(Memory::Policy(policy));
        let found = all_methods(&mut engine, from_readers(&slide));
        check_methods(&format!("{}, {policy}", config.model), &found, &expected, 1e-3);
    }
}

#[test]
fn streamed_and_recomputed_are_the_same() {
    check_policies::<f64>(|| cpu(2), 1e-11);
}

/// The arena of a training step is enough for every method.
#[test]
fn streamed_and_recomputed_are_the_same_in_f32() {
    check_policies::<f32>(device, 1e-3);
}

// ---- slides with a planted region ----

const FEATURES: usize = 24;

/// A slide of a square of patches at x5, each of which holds 4 at x10 and 16 at x20; a square of a
/// third of its side is a tumour, where features are shifted, or is not.
struct Planted {
    slide: Slide<f32>,
    /// Whether a patch lies in the region.
    inside: Scales<Vec<bool>>,
    regions: Vec<Region>,
    /// Side of the tumour, 0 to 3 patches of x5.
    tumour: usize,
}

impl Planted {
    const SIDE: usize = 6;

    fn new(number: usize, tumour: usize) -> Self {
        let (side, name) = (Self::SIDE, format!("planted {number}"));
        let corner = [number % (side - tumour), number / 7 % (side - tumour)];
        let patches = [1, 2, 4].map(|finer| {
            let side = side * finer;
            (0..side * side).map(move |i| [i / side / finer, i % side / finer]).collect::<Vec<_>>()
        });
        let is_inside =
            |place: &[usize; 2]| (0..2).all(|axis| (corner[axis]..corner[axis] + tumour).contains(&place[axis]));
        let inside = Scales::from(patches.clone()).map(|_, places| places.iter().map(is_inside).collect::<Vec<_>>());
        let slide = inside.as_ref().map(|scale, inside| {
            let noise = fill(&format!("{name} {scale}"), inside.len() * FEATURES, Law { offset: 0.0, scale: 1.0 });
            let shift = fill(&format!("tumour at {scale}"), FEATURES, Law { offset: 0.0, scale: 1.5 });
            let is_shifted = |i: usize| inside[i / FEATURES];
            let value = |(i, x): (usize, &f32)| x + if is_shifted(i) { shift[i % FEATURES] } else { 0.0 };
            Bag { values: noise.iter().enumerate().map(value).collect(), features: FEATURES }
        });
        let in_square = |square: usize| {
            let of = |places: &Vec<[usize; 2]>| {
                let inside = |i: &usize| places[*i][0] / 2 == square / 3 && places[*i][1] / 2 == square % 3;
                (0..places.len()).filter(inside).collect::<Vec<_>>()
            };
            Region::from(patches.each_ref().map(of))
        };
        Self { slide, inside, regions: (0..9).map(in_square).collect(), tumour }
    }
}

/// Trained on slides of which every other has the region, and dies early.
fn trained(model: ModelName) -> Engine<f32> {
    let config = Config { model, dim: 32, ..Config::new(FEATURES) };
    let mut engine = Engine::<f32>::new(cpu(0), &config, 7).unwrap();
    let adam = Adam { learning_rate: 1e-3, weight_decay: 4e-6, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
    for step in 0..240 {
        let planted = Planted::new(step, step % 4);
        let target = Target { label: 3 - planted.tumour, censored: false };
        let draw = Some(Draw { seed: 7, step: step as u32 });
        let loss = |logits: &[f64]| {
            Loss::NllSurv.evaluate(logits, target, 0.2).1.into_iter().map(|g| g / 4.0).collect::<Vec<_>>()
        };
        engine.accumulate(in_memory(&planted.slide), draw, None, loss).unwrap();
        if step % 4 == 3 {
            engine.update(&adam).unwrap();
        }
    }
    engine
}

/// The probability that a patch of the region has a higher score than one outside.
fn auc(scores: &[f64], inside: &[bool]) -> f64 {
    let of = |side: bool| scores.iter().zip(inside).filter(move |(_, inside)| **inside == side).map(|(x, _)| *x);
    let pairs = of(true).flat_map(|a| {
        of(false).map(move |b| {
            if a > b {
                1.0
            } else if a == b {
                0.5
            } else {
                0.0
            }
        })
    });
    pairs.sum::<f64>() / (of(true).count() * of(false).count()) as f64
}

/// What all scales together say of each x20 patch: of a coarser patch, its share.
fn together(scores: &Scores) -> Vec<f64> {
    let side = 4 * Planted::SIDE;
    let at = |i: usize| {
        scores.iter().map(move |(scale, scores)| {
            let coarser = 4 >> scale as usize;
            scores[i / side / coarser * (side / coarser) + i % side / coarser] / (coarser * coarser) as f64
        })
    };
    (0..side * side).map(|i| at(i).sum()).collect()
}

/// The scores of all scales together; a model may put all of a scale's weight on another. Of
/// CrossFusion each scale too.
#[test]
fn a_planted_region_ranks_above_the_rest() {
    for model in ModelName::ALL {
        let mut engine = trained(model);
        let (mut found, mut agreement) = (BTreeMap::<String, Vec<f64>>::new(), Vec::new());
        for number in 1000..1006 {
            let planted = Planted::new(number, 2);
            let bags = in_memory(&planted.slide);
            let direct = gradient(&mut engine, bags, Baseline::Mean).unwrap().scores;
            let way = integrated(&mut engine, bags, Baseline::Mean, 32, &mut |_| ()).unwrap().attribution.scores;
            for (method, scores) in [("gradient", &direct), ("integrated", &way)] {
                let whole = auc(&together(scores), planted.inside.get(Scale::X20).unwrap());
                found.entry(format!("{method}, all scales")).or_default().push(whole);
                for (scale, scores) in scores.iter().filter(|_| model == ModelName::CrossFusion) {
                    let auc = auc(scores, planted.inside.get(scale).unwrap());
                    found.entry(format!("{method}, {scale}")).or_default().push(auc);
                }
            }
            let occluded = occlusion(&mut engine, bags, &planted.regions, &mut |_| ()).unwrap();
            agreement.extend(rank_correlation(&occluded.effects, &by_region(&way, &planted.regions)));
        }
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        for (what, auc) in found {
            println!("{model}, {what}: AUC {:.3}", mean(&auc));
            assert!(mean(&auc) >= 0.9, "{model}, {what}: AUC {auc:.3?}");
        }
        println!("{model}: integrated gradients and occlusion rank regions alike by {:.3}", mean(&agreement));
        assert!(mean(&agreement) > 0.5, "{model}: rank correlations {agreement:.3?}");
    }
}
