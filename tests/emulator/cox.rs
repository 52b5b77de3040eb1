//! kernels/cox.cu against src/survival/cox.rs; against R in tests/survival/cox.rs.

use crossfusion::{
    device::Device,
    ops::cox::DeviceCohort,
    survival::{CoxCohort, Ties},
};

use super::{
    PLAIN, RACE,
    common::{Law, fill},
    gpu,
};
use crossfusion::device::emulator::{Emulator, Options};

struct Patients {
    name: &'static str,
    time: Vec<f64>,
    event: Vec<bool>,
    strata: Option<Vec<usize>>,
    weights: Option<Vec<f64>>,
    risk: Vec<f32>,
}

/// `times` distinct times, an event where `event` says so.
fn patients(name: &'static str, n: usize, times: usize, event: fn(usize) -> bool) -> Patients {
    let uniform = fill("time", n, Law { offset: 0.5, scale: 0.5 });
    Patients {
        name,
        time: uniform.iter().map(|u| (f64::from(*u) * times as f64).floor()).collect(),
        event: (0..n).map(event).collect(),
        strata: None,
        weights: None,
        risk: fill("risk", n, Law { offset: 0.0, scale: 2.0 }),
    }
}

fn small() -> Vec<Patients> {
    let some = |i: usize| i.is_multiple_of(3);
    let weights = |n| Some((0..n).map(|i| 0.5 + (i % 5) as f64).collect());
    vec![
        patients("one patient", 1, 1, |_| true),
        patients("no events", 33, 8, |_| false),
        patients("all events", 257, 60, |_| true),
        patients("all tied", 70, 1, some),
        Patients { risk: fill("far", 65, Law { offset: 0.0, scale: 80.0 }), ..patients("huge risks", 65, 40, some) },
        Patients { strata: Some((0..90).collect()), ..patients("strata of one", 90, 20, some) },
        Patients {
            strata: Some((0..301).map(|i| i % 4).collect()),
            weights: weights(301),
            ..patients("strata and weights", 301, 40, some)
        },
    ]
}

/// Several tiles, and several blocks.
fn large() -> Vec<Patients> {
    let some = |i: usize| !i.is_multiple_of(3);
    vec![
        patients("a tile and one more", 1025, 400, some),
        patients("one tie over three blocks", 2500, 1, some),
        Patients {
            strata: Some((0..5003).map(|i| usize::from(i > 1700)).collect()),
            ..patients("a stratum over blocks", 5003, 900, some)
        },
        // weight e^(risk) overflows unless the highest risk is found: in a lane, a warp and a block
        // that are not the first
        Patients {
            time: (0..2500).map(f64::from).collect(),
            weights: Some(vec![1e5; 2500]),
            risk: (0..2500).map(|i| if i == 1064 { 0.0 } else { -700.0 }).collect(),
            ..patients("one risk far above", 2500, 1, some)
        },
    ]
}

fn by_kernels(p: &Patients, ties: Ties, options: Options) -> (f64, Vec<f32>) {
    let emulator = Device::Emulator(Emulator::new(options));
    let device = gpu().unwrap_or(&emulator);
    let cohort = CoxCohort::new(&p.time, &p.event, p.strata.as_deref(), p.weights.as_deref()).unwrap();
    let cohort = DeviceCohort::new(device, &cohort).unwrap();
    let mut gradient = vec![f32::NAN; p.risk.len()];
    let what = |e| panic!("{}, {ties:?}, {options:?}: {e}", p.name);
    let loglik = cohort.loglik_and_gradient(&p.risk, ties, &mut gradient).unwrap_or_else(what);
    (loglik, gradient)
}

/// f64 sums of f32 risks: what remains is the rounding of the gradient to f32.
fn check(p: &Patients, ties: Ties, (loglik, gradient): &(f64, Vec<f32>)) {
    let cohort = CoxCohort::new(&p.time, &p.event, p.strata.as_deref(), p.weights.as_deref()).unwrap();
    let risk: Vec<f64> = p.risk.iter().map(|&r| f64::from(r)).collect();
    let mut truth = vec![0.0; risk.len()];
    let expected = cohort.loglik_and_gradient(&risk, ties, &mut truth).unwrap();
    let allowed = 1e-12 * expected.abs().max(1.0);
    assert!((loglik - expected).abs() <= allowed, "{}, {ties:?}: loglik {loglik}, expected {expected}", p.name);
    for (row, (&got, truth)) in gradient.iter().zip(truth).enumerate() {
        let allowed = f64::from(f32::EPSILON) * truth.abs() + 1e-12;
        assert!((f64::from(got) - truth).abs() <= allowed, "{}, {ties:?}: row {row} is {got}, not {truth}", p.name);
    }
}

#[test]
fn matches_the_cpu() {
    for p in small().iter().chain(&large()) {
        for ties in [Ties::Efron, Ties::Breslow] {
            let first = by_kernels(p, ties, PLAIN[0]);
            check(p, ties, &first);
            for options in &PLAIN[1..] {
                assert_eq!(by_kernels(p, ties, *options), first, "{}: {options:?} gives other bits", p.name);
            }
        }
    }
}

/// So many that a block takes two tiles.
#[test]
fn blocks_take_several_tiles() {
    let p = patients("more than 512 tiles", 530_000, 1000, |i| !i.is_multiple_of(3));
    check(&p, Ties::Efron, &by_kernels(&p, Ties::Efron, PLAIN[0]));
}

#[test]
fn has_no_races() {
    for p in small() {
        check(&p, Ties::Efron, &by_kernels(&p, Ties::Efron, RACE));
    }
    let p = &large()[1];
    check(p, Ties::Efron, &by_kernels(p, Ties::Efron, RACE));
}
