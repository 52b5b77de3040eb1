//! The gradient of a batch in the Cox loss.

use super::*;

/// Patients with 1, 2, 1, 1 and 1 slides; two events at one time, and a censoring at it.
const SLIDES: [usize; 5] = [1, 2, 1, 1, 1];
const TIME: [f64; 5] = [3.0, 5.0, 3.0, 1.0, 3.0];
const EVENT: [bool; 5] = [true, true, true, false, false];
/// Patches of the six slides.
const PATCHES: [[usize; 3]; 6] = [[1, 4, 9], [2, 3, 5], [3, 7, 11], [1, 1, 1], [2, 6, 10], [1, 5, 8]];

fn draw(i: usize) -> Option<Draw> {
    Some(Draw { seed: 11, step: 40 + i as u32 })
}

fn model(n_classes: usize) -> Config {
    Config { dim: 8, heads: 2, layers: 1, n_classes, ..Config::new(6) }
}

/// An engine whose parameters are large enough for every path to matter.
fn engine<T: Real>(config: &Config) -> Engine<T> {
    let mut engine = Engine::new(Device::from_name("cpu", 1).unwrap(), config, 3).unwrap();
    let mut params: Vec<T> = engine.read_state(State::Params).unwrap();
    for entry in engine.model().layout().entries() {
        let law =
            if entry.shape.len() == 1 { Law { offset: 0.5, scale: 0.4 } } else { Law { offset: 0.0, scale: 0.3 } };
        for (p, x) in params[entry.offset..].iter_mut().zip(fill(&entry.name, entry.len(), law)) {
            *p = T::of(f64::from(x));
        }
    }
    engine.write_state(State::Params, &params).unwrap();
    engine
}

fn slides<T: Real>() -> Vec<[Vec<T>; 3]> {
    let bag = |i: usize, scale: usize| {
        let values = fill(&format!("slide {i} bag {scale}"), 6 * PATCHES[i][scale], Law { offset: 0.0, scale: 1.7 });
        values.into_iter().map(|x| T::of(f64::from(x))).collect()
    };
    (0..PATCHES.len()).map(|i| [bag(i, 0), bag(i, 1), bag(i, 2)]).collect()
}

fn bags<T: Real>(slide: &[Vec<T>; 3]) -> Bags<'_, T> {
    Bags::new(slide.each_ref().map(Vec::as_slice), 6).unwrap()
}

/// Minus the sum of the survival curve, or the one logit, as its definition says it.
fn risk(logits: &[f64]) -> f64 {
    let survival = |t: usize| logits[..=t].iter().map(|x| 1.0 - 1.0 / (1.0 + (-x).exp())).product::<f64>();
    if logits.len() == 1 { logits[0] } else { -(0..logits.len()).map(survival).sum::<f64>() }
}

/// The loss of the six slides' risks, event by event.
fn plain_loss(risks: &[f64], ties: Ties) -> f64 {
    let mut rest = risks;
    let patients: Vec<f64> = SLIDES
        .iter()
        .map(|&n| {
            let (own, others) = rest.split_at(n);
            rest = others;
            own.iter().sum::<f64>() / n as f64
        })
        .collect();
    let total = |of: &dyn Fn(usize) -> bool| (0..5).filter(|&j| of(j)).map(|j| patients[j].exp()).sum::<f64>();
    let mut loglik = 0.0;
    for i in (0..5).filter(|&i| EVENT[i]) {
        let at_risk = total(&|j| TIME[j] >= TIME[i]);
        let tied = |j: usize| EVENT[j] && TIME[j] == TIME[i];
        let earlier = (0..i).filter(|&j| tied(j)).count() as f64;
        let gone = match ties {
            Ties::Breslow => 0.0,
            Ties::Efron => earlier / (0..5).filter(|&j| tied(j)).count() as f64 * total(&tied),
        };
        loglik += patients[i] - (at_risk - gone).ln();
    }
    -loglik / EVENT.iter().filter(|e| **e).count() as f64
}

/// Runs the batch as training does; returns loss and gradient.
fn batch<T: Real>(engine: &mut Engine<T>, slides: &[[Vec<T>; 3]], ties: Ties) -> (f64, Vec<T>) {
    let batch = CoxBatch::new(SLIDES.to_vec(), &TIME, &EVENT, ties).unwrap();
    let mut passes = 0;
    let show = |work: &mut cox::Work<'_, T>| {
        passes += 1;
        slides.iter().enumerate().try_for_each(|(i, slide)| work(i, bags(slide)).map(|_| ()))?;
        Ok(ControlFlow::Continue(()))
    };
    let (loss, risks) = cox::accumulate(engine, &batch, draw, |_, _| Ok(()), show).unwrap().unwrap();
    assert_eq!((passes, risks.len()), (2, 6));
    (loss, engine.read_state(State::Grads).unwrap())
}

/// The gradient of the batch against central differences of its loss, in f64 with dropout on, where
/// each slide keeps its draw: a pass without it or with another slide's, or a wrong weight of a
/// slide, is off by far more than the differences' error.
#[test]
fn the_batch_has_the_gradient_of_its_loss() {
    const STEP: f64 = 1e-5;
    for (n_classes, ties) in [(1, Ties::Efron), (1, Ties::Breslow), (4, Ties::Efron)] {
        let mut engine = engine::<f64>(&model(n_classes));
        let slides = slides::<f64>();
        let (loss, gradient) = batch(&mut engine, &slides, ties);
        let params = engine.read_state(State::Params).unwrap();
        let mut loss_at = |params: &[f64]| {
            engine.write_state(State::Params, params).unwrap();
            let risks: Vec<f64> =
                slides.iter().enumerate().map(|(i, s)| risk(&engine.forward(bags(s), draw(i)).unwrap())).collect();
            plain_loss(&risks, ties)
        };
        assert!((loss - loss_at(&params)).abs() < 1e-12, "{n_classes} outputs, {ties:?}: loss {loss}");
        let entries = crossfusion::model::Model::new(&model(n_classes)).unwrap().layout().entries().to_vec();
        let mut largest = 0.0f64;
        for entry in entries {
            let direction = fill(&format!("direction {}", entry.name), entry.len(), Law { offset: 0.0, scale: 1.0 });
            let range = entry.offset..entry.offset + entry.len();
            let analytic: f64 = gradient[range.clone()].iter().zip(&direction).map(|(g, d)| g * f64::from(*d)).sum();
            let mut at = |step: f64| {
                let mut moved = params.clone();
                moved[range.clone()].iter_mut().zip(&direction).for_each(|(p, d)| *p += step * f64::from(*d));
                loss_at(&moved)
            };
            let numeric = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            // the differences' own error: rounding 1e-16 / STEP and truncation STEP^2
            assert!(
                (analytic - numeric).abs() <= 1e-6 * analytic.abs() + 1e-8,
                "{n_classes} outputs, {ties:?}, {}: two passes {analytic:e}, differences {numeric:e}",
                entry.name
            );
            largest = largest.max(analytic.abs());
        }
        assert!(largest > 1e-2, "the loss hardly depends on the parameters: {largest:e}");
    }
}

/// In f32, as it trains: against the slides' own gradients, all held at once, weighed by
/// differences of the plain loss in the risks.
#[test]
fn two_passes_equal_all_slides_at_once() {
    for n_classes in [1, 4] {
        let slides = slides::<f32>();
        let mut one_by_one = engine::<f32>(&model(n_classes));
        let zeros = vec![0.0f32; one_by_one.model().layout().len()];
        let (mut risks, mut jacobian) = (Vec::new(), Vec::new());
        for (i, slide) in slides.iter().enumerate() {
            let of_risk = |logits: &[f64]| Prediction::from_logits(logits).risk_gradient();
            risks.push(risk(&one_by_one.accumulate(bags(slide), draw(i), None, of_risk).unwrap()));
            jacobian.push(one_by_one.read_state(State::Grads).unwrap());
            one_by_one.write_state(State::Grads, &zeros).unwrap();
        }
        let weight = |i: usize| {
            let at = |step: f64| {
                let mut moved = risks.clone();
                moved[i] += step;
                plain_loss(&moved, Ties::Efron)
            };
            (at(1e-5) - at(-1e-5)) / 2e-5
        };
        let weights: Vec<f64> = (0..6).map(weight).collect();
        let expected: Vec<f64> = (0..zeros.len())
            .map(|p| jacobian.iter().zip(&weights).map(|(row, w)| w * f64::from(row[p])).sum())
            .collect();
        let (_, gradient) = batch(&mut engine(&model(n_classes)), &slides, Ties::Efron);
        let norm = expected.iter().map(|g| g * g).sum::<f64>().sqrt();
        let error = gradient.iter().zip(&expected).map(|(g, e)| (f64::from(*g) - e).powi(2)).sum::<f64>().sqrt();
        assert!(error < 1e-5 * norm, "{n_classes} outputs: off by {error:e} of {norm:e}");
    }
}

/// Nobody else at risk at the only event: one pass, no gradient. No event: no loss at all.
#[test]
fn a_batch_without_a_comparison_gives_no_gradient() {
    let mut engine = engine::<f32>(&model(1));
    let slides = slides::<f32>();
    for event in [[false, false], [false, true]] {
        let batch = CoxBatch::new(vec![1, 1], &[1.0, 2.0], &event, Ties::Efron).unwrap();
        assert!(!batch.is_comparable());
        let mut passes = 0;
        let show = |work: &mut cox::Work<'_, f32>| {
            passes += 1;
            work(0, bags(&slides[0]))?;
            work(1, bags(&slides[1]))?;
            Ok(ControlFlow::Continue(()))
        };
        let (loss, risks) = cox::accumulate(&mut engine, &batch, draw, |_, _| Ok(()), show).unwrap().unwrap();
        assert_eq!((loss, risks.len(), passes), (0.0, 2, 1));
        assert!(engine.read_state(State::Grads).unwrap().iter().all(|&g| g == 0.0));
    }
    let without = CoxBatch::new(vec![1, 1], &[1.0, 2.0], &[false, false], Ties::Efron).unwrap();
    assert!(without.evaluate(&[0.0, 0.0]).unwrap_err().to_string().contains("no slide has an event"));
    assert!(CoxBatch::new(vec![1, 1], &[1.0, 2.0], &[true, false], Ties::Efron).unwrap().is_comparable());
}
