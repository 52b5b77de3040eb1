//! Every memory policy gives the gradients of the one that keeps everything, and holds what its
//! plan says; on the CPU, and by CROSSFUSION_DEVICE on another device.
#![cfg(feature = "programs")]

mod common;

use std::{collections::VecDeque, ops::Range};

use common::{Law, fill};
use crossfusion::{
    Error, Result,
    device::{Device, Element, Real},
    loss::{Loss, Target},
    model::{BagGrads, BagSizes, Bags, Config, Features, ModelName, Policy, ReadPatches, Scale},
    ops::{Draw, adam::Adam, head::SlideLoss},
    train::step::{Engine, Memory, State},
};
use half::bf16;

const FEATURES: usize = 48;
const WHOLE: usize = usize::MAX;

struct Rows<T> {
    values: Vec<T>,
    /// Reading from here on fails.
    broken_from: usize,
}

impl<T: Element> ReadPatches<T> for Rows<T> {
    fn patches(&self) -> usize {
        self.values.len() / FEATURES
    }

    fn read(&self, patches: Range<usize>, out: &mut [T]) -> Result<()> {
        if patches.end > self.broken_from {
            return Err(Error::Usage("slide.pt: cannot be read".into()));
        }
        out.copy_from_slice(&self.values[patches.start * FEATURES..patches.end * FEATURES]);
        Ok(())
    }
}

/// A config of one layer with a projection, or of two with features as wide as the model.
fn config(projected: bool) -> Config {
    let (dim, heads, layers) = if projected { (32, 4, 1) } else { (FEATURES, 6, 2) };
    Config { dim, heads, layers, ..Config::new(FEATURES) }
}

/// The same of every model.
fn configs(projected: bool) -> [Config; 3] {
    ModelName::ALL.map(|model| Config { model, ..config(projected) })
}

fn engine<T: Element<Sum: Real>>(device: Device, config: &Config) -> Engine<T> {
    let mut engine = Engine::new(device, config, 3).unwrap();
    let mut params = engine.read_state(State::Params).unwrap();
    for entry in engine.model().layout().entries() {
        // small weights would keep the bags' influence on the logits below rounding
        let law =
            if entry.shape.len() == 1 { Law { offset: 0.5, scale: 0.4 } } else { Law { offset: 0.0, scale: 0.5 } };
        for (p, x) in params[entry.offset..].iter_mut().zip(fill(&entry.name, entry.len(), law)) {
            *p = T::Sum::of(f64::from(x));
        }
    }
    engine.write_state(State::Params, &params).unwrap();
    engine
}

fn slide<T: Element<Sum: Real>>(sizes: [usize; 3]) -> [Rows<T>; 3] {
    drawn("", sizes)
}

/// Other numbers for each `draw`.
fn drawn<T: Element<Sum: Real>>(draw: &str, [x5, x10, x20]: [usize; 3]) -> [Rows<T>; 3] {
    let law = Law { offset: 0.0, scale: 1.7 };
    [("x5", x5), ("x10", x10), ("x20", x20)].map(|(name, patches)| Rows {
        values: fill(&format!("{draw}{name}"), patches * FEATURES, law)
            .into_iter()
            .map(|x| T::from_sum(T::Sum::of(x.into())))
            .collect(),
        broken_from: WHOLE,
    })
}

/// How a step is taken: the loss' logits, the parameters' gradients, the bags' gradients.
struct Step<T> {
    logits: Vec<f64>,
    grads: Vec<T>,
    dbags: Vec<T>,
}

fn step<T: Element<Sum: Real>>(engine: &mut Engine<T>, slide: &[Rows<T>; 3], streamed: bool) -> Result<Step<T::Sum>> {
    let zeros = vec![T::Sum::ZERO; engine.read_state(State::Grads)?.len()];
    engine.write_state(State::Grads, &zeros)?;
    let files = if streamed { engine.model().streamed() } else { &[] };
    let features = |i: usize| match Scale::ALL[i] {
        scale if files.contains(&scale) => Features::Reader(&slide[i]),
        _ => Features::Memory(&slide[i].values),
    };
    let bags = Bags::of([0, 1, 2].map(features), FEATURES)?;
    let mut dbags = slide.each_ref().map(|rows| vec![T::default(); rows.values.len()]);
    let inputs = BagGrads::new(dbags.each_mut().map(Vec::as_mut_slice), FEATURES)?;
    let target = Target { label: 1, censored: false };
    let draw = Some(Draw { seed: 7, step: 3 });
    let logits = engine.accumulate(bags, draw, Some(inputs), |logits| Loss::NllSurv.evaluate(logits, target, 0.2).1)?;
    let dbags = dbags.concat().into_iter().map(T::to_sum).collect();
    Ok(Step { logits, grads: engine.read_state(State::Grads)?, dbags })
}

/// |a - b| / |b|
fn relative<T: Real>(a: &[T], b: &[T]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(&a, &b)| a.f64() - b.f64())) / norm(&mut b.iter().map(|&b| b.f64()))
}

/// The gradient of each tensor that has one (a key's bias has none), on its own: a mistake in what
/// lies next to the bags is small in the whole.
fn check_tensors<T: Element>(engine: &Engine<T>, got: &[T::Sum], expected: &[T::Sum], tolerance: f64, what: &str) {
    let mut checked = Vec::new();
    for entry in engine.model().layout().entries() {
        let range = entry.offset..entry.offset + entry.len();
        let (got, expected) = (&got[range.clone()], &expected[range]);
        if expected.iter().map(|g| g.f64().powi(2)).sum::<f64>() > 1e-12 {
            let error = relative(got, expected);
            assert!(error <= tolerance, "{what}: {} is off by {error:.1e}", entry.name);
            checked.push(entry.name.as_str());
        }
    }
    let names = match engine.model().config().model {
        ModelName::CrossFusion => {
            ["c_cross_attn.v_proj.weight", "f_cross_attn.v_proj.weight", "s_transformer.ppeg.proj.weight"]
        }
        ModelName::CrossFusionConcat => {
            ["coarse_cross_attn.v_proj.weight", "fine_cross_attn.v_proj.weight", "source_transformer.ppeg.proj.weight"]
        }
        ModelName::CrossFusionSingle => [
            "source_transformer.pre_layers.layers.0.1.v_proj.weight",
            "source_transformer.ppeg.proj.weight",
            "conv_processor.linear.0.weight",
        ],
    };
    for name in names {
        assert!(checked.contains(&name), "{name} hardly has a gradient: this test shows nothing");
    }
}

fn device() -> Device {
    let name = std::env::var("CROSSFUSION_DEVICE").unwrap_or_else(|_| "cpu".into());
    Device::from_name(&name, 2).unwrap()
}

/// Policies with ragged, exact and overlong pieces, and whether only recomputation differs from
/// keeping all.
fn policies() -> Vec<(Policy, bool)> {
    let mut policies = Vec::new();
    for recompute in [None, Some(WHOLE), Some(5), Some(16)] {
        for stream in [None, Some(1000), Some(64), Some(7)] {
            let exact = stream.is_none() && recompute.is_none_or(|rows| rows == WHOLE);
            policies.push((Policy { recompute, stream }, exact));
        }
    }
    policies
}

fn check_all<T: Element<Sum: Real>>(device: impl Fn() -> Device, config: &Config, sizes: [usize; 3], tolerance: f64) {
    let slide = slide::<T>(sizes);
    let [x5, x10, x20] = sizes;
    let mut keep = engine::<T>(device(), config);
    let expected = step(&mut keep, &slide, false).unwrap();
    for (policy, exact) in policies() {
        for streamed in [false, true] {
            if streamed && policy.stream.is_none() {
                continue;
            }
            let mut engine = engine::<T>(device(), config);
            engine.set_memory(Memory::Policy(policy));
            let got = step(&mut engine, &slide, streamed).unwrap();
            if exact {
                assert!(got.logits == expected.logits && got.grads == expected.grads, "{policy}: other bits");
                assert!(got.dbags == expected.dbags, "{policy}: other bits in the bags' gradients");
            }
            let mut errors = vec![relative(&got.logits, &expected.logits), relative(&got.grads, &expected.grads)];
            // no training uses the bags' gradients, and in f32 rounding alone moves them by up to
            // 2e-6
            if size_of::<T>() == 8 {
                errors.push(relative(&got.dbags, &expected.dbags));
            }
            assert!(errors.iter().all(|&e| e <= tolerance), "{policy}, streamed {streamed}: {errors:?}");
            // rounding alone moves a tensor's gradient by up to 4e-5 in f32, 2e-13 in f64
            let what = format!("{policy}, streamed {streamed}");
            check_tensors(&engine, &got.grads, &expected.grads, if size_of::<T>() == 8 { 1e-11 } else { 2e-4 }, &what);
            // a bag in the CPU's memory needs no buffer; kernels write the bags' gradients into
            // memory on top of the plan
            if !engine.device().runs_kernels() && (streamed || policy.stream.is_none()) {
                let plan = engine.plan(BagSizes::from([x5, x10, x20]), true).unwrap();
                assert_eq!(engine.arena_peak(), plan.arena_bytes, "{policy}, streamed {streamed}");
            }
        }
    }
}

#[test]
fn all_policies_agree_in_f32() {
    for (projected, sizes) in [(true, [9, 21, 130]), (false, [64, 16, 1]), (true, [1, 1, 300])] {
        // on the emulator, which takes minutes, the ablations are checked on the first slide
        let models = if device().runs_kernels() && sizes != [9, 21, 130] { 1 } else { 3 };
        configs(projected)[..models].iter().for_each(|config| check_all::<f32>(device, config, sizes, 1e-6));
    }
}

/// In f64 rounding is out of the way: what is left of a difference would be another formula.
#[test]
fn all_policies_agree_in_f64() {
    for (projected, sizes) in [(true, [70, 33, 257]), (false, [5, 10, 65])] {
        for config in configs(projected) {
            check_all::<f64>(|| Device::from_name("cpu", 2).unwrap(), &config, sizes, 1e-13);
        }
    }
}

/// In bf16, which rounds what is stored between the parts: the root mean square of the errors over
/// some slides is at most 1.25 times that of keeping everything. One slide's may be twice as large.
#[test]
fn all_policies_are_as_good_in_bf16() {
    let cpu = || Device::from_name("cpu", 2).unwrap();
    // on the emulator, which takes minutes, one model and one slide
    let (models, draws, most) = if device().runs_kernels() { (1, 1, 2.0) } else { (3, 12, 1.25) };
    for config in &configs(true)[..models] {
        // squares of the errors of keeping everything, and of each policy
        let mut plain = [0.0; 2];
        let mut squares = vec![[0.0; 2]; policies().len()];
        for draw in 0..draws {
            let (draw, sizes) = (if draw == 0 { String::new() } else { format!("{draw}/") }, [9, 21, 130]);
            let (slide, rounded) = (drawn::<f64>(&draw, sizes), drawn::<bf16>(&draw, sizes));
            let truth = step(&mut engine::<f64>(cpu(), config), &slide, false).unwrap();
            let add = |squares: &mut [f64; 2], got: &Step<f32>| {
                let grads: Vec<f64> = got.grads.iter().map(|&g| f64::from(g)).collect();
                let errors = [relative(&got.logits, &truth.logits), relative(&grads, &truth.grads)];
                squares.iter_mut().zip(errors).for_each(|(square, error)| *square += error * error);
            };
            let expected = step(&mut engine::<bf16>(device(), config), &rounded, false).unwrap();
            add(&mut plain, &expected);
            for ((policy, exact), squares) in policies().into_iter().zip(&mut squares) {
                let mut engine = engine::<bf16>(device(), config);
                engine.set_memory(Memory::Policy(policy));
                let got = step(&mut engine, &rounded, policy.stream.is_some()).unwrap();
                if exact {
                    assert!(got.logits == expected.logits && got.grads == expected.grads, "{policy}: other bits");
                }
                add(squares, &got);
            }
        }
        for ((policy, _), squares) in policies().into_iter().zip(squares) {
            let ratios = [0, 1].map(|i: usize| (squares[i] / plain[i]).sqrt());
            println!("{policy}: {ratios:.2?}");
            assert!(ratios.iter().all(|ratio| *ratio <= most), "{policy}: {ratios:?}");
        }
    }
}

/// The next slide is started before the loss of the one in hand is asked for: memory that both use
/// must be free in time.
#[test]
fn slides_in_flight_do_not_meet() {
    let slides = [[9, 21, 130], [64, 16, 1], [1, 30, 300], [12, 5, 77]].map(slide::<f32>);
    let adam = Adam { learning_rate: 1e-3, weight_decay: 0.0, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
    for policy in [Policy::KEEP, Policy { recompute: Some(7), stream: Some(32) }] {
        let run = |ahead: usize| {
            let mut engine = engine::<f32>(device(), &config(true));
            engine.set_memory(Memory::Policy(policy));
            // growing memory waits for everything
            let sizes = slides.each_ref().map(|slide| slide.each_ref().map(|rows| rows.values.len() / FEATURES));
            engine.reserve(sizes.map(|[x5, x10, x20]| BagSizes::from([x5, x10, x20])), true).unwrap();
            let (mut pending, mut losses) = (VecDeque::new(), Vec::new());
            for (i, slide) in slides.iter().enumerate() {
                // what was read is gone when the slide has been started
                let [x5, x10, x20] = slide.each_ref().map(|rows| rows.values.clone());
                let bags = Bags::new([&x5[..], &x10, &x20], FEATURES).unwrap();
                let target = Target { label: i, censored: i == 2 };
                let loss = SlideLoss { loss: Loss::NllSurv, target, alpha: 0.2, share: 0.5 };
                let draw = Some(Draw { seed: 7, step: i as u32 });
                pending.push_back(engine.accumulate_loss(bags, draw, &loss).unwrap());
                if i % 2 == 1 {
                    engine.update(&adam).unwrap();
                }
                while pending.len() > ahead {
                    losses.push(engine.finish(pending.pop_front().unwrap()).unwrap());
                }
            }
            losses.extend(pending.into_iter().map(|pending| engine.finish(pending).unwrap()));
            (losses, engine.read_state(State::Params).unwrap())
        };
        let (losses, params) = run(0);
        assert!(losses.iter().all(|&(loss, risk)| loss > 0.0 && risk < 0.0), "{policy}: {losses:?}");
        assert!(run(1) == (losses, params.clone()), "{policy}: other bits");
        // losses that nobody asked for in time are lost, gradients are not
        assert!(run(slides.len()).1 == params, "{policy}: other weights");
    }
}

/// One slide has the larger arena, another the larger bags; the budget holds each, and not both.
#[test]
fn slides_that_fit_one_by_one_are_held_one_by_one() {
    let config = config(true);
    let slides = [[300, 40, 2], [5, 150, 5]].map(slide::<f32>);
    let sizes = slides.each_ref().map(|slide| {
        let [x5, x10, x20] = slide.each_ref().map(|rows| rows.values.len() / FEATURES);
        BagSizes::from([x5, x10, x20])
    });
    let mut free = engine::<f32>(device(), &config);
    let plans = sizes.map(|sizes| free.plan(sizes, true).unwrap());
    let budget = plans[0].peak_bytes().max(plans[1].peak_bytes());
    let mut tight = engine::<f32>(device(), &config);
    tight.set_memory(Memory::Budget(budget));
    tight.reserve(sizes, true).unwrap();
    assert_eq!(tight.arena_bytes(), 0, "the larger arena beside the larger bags would exceed the budget");
    for slide in &slides {
        let (got, expected) = (step(&mut tight, slide, false).unwrap(), step(&mut free, slide, false).unwrap());
        assert!(got.grads == expected.grads && got.logits == expected.logits);
        assert_eq!(tight.arena_bytes(), 0);
    }
    tight.set_memory(Memory::Budget(2 * budget));
    tight.reserve(sizes, true).unwrap();
    assert_eq!(tight.arena_bytes(), plans[0].arena_bytes.max(plans[1].arena_bytes));
}

#[test]
fn a_context_without_patches_is_refused() {
    let mut slide = slide::<f32>([9, 21, 130]);
    slide[0].values.clear();
    let mut engine = engine::<f32>(device(), &config(true));
    engine.set_memory(Memory::Policy(Policy { recompute: None, stream: Some(32) }));
    for streamed in [true, false] {
        let error = step(&mut engine, &slide, streamed).err().unwrap().to_string();
        assert!(error.contains("x5") && error.contains("[0, 48]"), "{error}");
    }
}

#[test]
fn evaluation_holds_less_and_finds_the_same() {
    let (slide, config) = (slide::<f32>([9, 21, 130]), config(true));
    let bags = Bags::new(slide.each_ref().map(|rows| rows.values.as_slice()), FEATURES).unwrap();
    let mut engine = engine::<f32>(device(), &config);
    let expected = engine.accumulate(bags, None, None, |logits| vec![0.0; logits.len()]).unwrap();
    let sizes = BagSizes::from([9, 21, 130]);
    let (training, evaluation) = (engine.plan(sizes, true).unwrap(), engine.plan(sizes, false).unwrap());
    assert!(2 * evaluation.arena_bytes < training.arena_bytes, "{evaluation:?}");
    for (policy, _) in policies() {
        engine.set_memory(Memory::Policy(policy));
        let logits = engine.evaluate(bags).unwrap();
        let error = relative(&logits, &expected);
        assert!(error <= if policy.stream.is_some() { 1e-6 } else { 0.0 }, "{policy}: {error}");
    }
}

#[test]
fn a_read_error_in_mid_slide_ends_the_step() {
    let mut slide = slide::<f32>([9, 21, 130]);
    slide[2].broken_from = 100;
    let mut engine = engine::<f32>(device(), &config(true));
    engine.set_memory(Memory::Policy(Policy { recompute: None, stream: Some(32) }));
    let error = step(&mut engine, &slide, true).err().unwrap();
    assert_eq!(error.to_string(), "slide.pt: cannot be read");
}

#[test]
fn a_budget_takes_the_policy_of_the_fewest_operations_that_fits() {
    let sizes = BagSizes::from([2000, 400, 60_000]);
    let mut engine = Engine::<f32>::new(Device::from_name("cpu", 1).unwrap(), &Config::new(64), 1).unwrap();
    let keep = engine.plan(sizes, true).unwrap();
    assert_eq!(keep.policy, Policy::KEEP);
    let mut last = keep;
    let mut seen = vec![keep.policy];
    let mut budget = keep.peak_bytes();
    let least = loop {
        engine.set_memory(Memory::Budget(budget));
        match engine.plan(sizes, true) {
            Ok(plan) => {
                assert!(plan.peak_bytes() <= budget);
                assert!(
                    plan.step_flop >= last.step_flop,
                    "{} takes fewer operations than {}",
                    plan.policy,
                    last.policy
                );
                if plan.policy != last.policy {
                    seen.push(plan.policy);
                }
                last = plan;
                budget = plan.peak_bytes() - 1;
            }
            Err(error) => break error.to_string(),
        }
    };
    assert!(seen.len() > 2 && seen.last().unwrap().stream.is_some(), "{seen:?}");
    assert!(least.contains("2000, 400 and 60000 patches of 64 features"), "{least}");
    // The least that is named can be given as it stands, and is no more than rounded up.
    let named: bytesize::ByteSize = least.rsplit(' ').next().unwrap().parse().unwrap();
    let rounding = named.as_u64() as usize - last.peak_bytes();
    assert!(rounding <= 1 << 20, "{least}: {} fit", last.peak_bytes());
    engine.set_memory(Memory::Budget(named.as_u64() as usize));
    assert_eq!(engine.plan(sizes, true).unwrap().policy, last.policy);
}
