//! The Cox partial likelihood.

use super::*;

const BOTH_TIES: [(Ties, &str); 2] = [(Ties::Efron, "efron"), (Ties::Breslow, "breslow")];

fn assert_cox(cohort: &CoxCohort, risk: &[f64], ties: Ties, loglik: f64, want: &[f64], what: &str) {
    let mut gradient = vec![f64::NAN; risk.len()];
    let got = cohort.loglik_and_gradient(risk, ties, &mut gradient).unwrap();
    assert_relative_eq!(got, loglik, max_relative = AGREE);
    for (row, (got, want)) in gradient.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= 1e-10, "{what}: gradient of row {row} is {got}, expected {want}");
    }
    // f32 storage.
    let risk: Vec<f32> = risk.iter().map(|&r| r as f32).collect();
    let mut gradient = vec![f32::NAN; risk.len()];
    let got = cohort.loglik_and_gradient(&risk, ties, &mut gradient).unwrap();
    assert_relative_eq!(got, loglik, max_relative = 1e-5);
    for (row, (&got, want)) in gradient.iter().zip(want).enumerate() {
        assert!((f64::from(got) - want).abs() <= 1e-5 * want.abs().max(1.0), "{what} in f32: row {row} {got}, {want}");
    }
    #[cfg(feature = "emulator")]
    assert_cox_kernels(cohort, &risk, ties, loglik, want, what);
}

/// kernels/cox.cu on the emulator, or on the GPU if CROSSFUSION_DEVICE=cuda.
#[cfg(feature = "emulator")]
fn assert_cox_kernels(cohort: &CoxCohort, risk: &[f32], ties: Ties, loglik: f64, want: &[f64], what: &str) {
    use crossfusion::{device::Device, ops::cox::DeviceCohort};
    let name = std::env::var("CROSSFUSION_DEVICE").unwrap_or_else(|_| "emulator".into());
    let device = Device::from_name(&name, 0).unwrap();
    let mut gradient = vec![f32::NAN; risk.len()];
    let cohort = DeviceCohort::new(&device, cohort).unwrap();
    let got = cohort.loglik_and_gradient(risk, ties, &mut gradient).unwrap();
    assert_relative_eq!(got, loglik, max_relative = 1e-5);
    for (row, (&got, want)) in gradient.iter().zip(want).enumerate() {
        assert!(
            (f64::from(got) - want).abs() <= 1e-5 * want.abs().max(1.0),
            "{what} by kernels: row {row} {got}, {want}"
        );
    }
}

#[test]
fn cox_equals_r() {
    for golden in goldens() {
        let cohort = CoxCohort::new(&golden.time, &golden.event, golden.stratum.as_deref(), None).unwrap();
        for (ties, key) in BOTH_TIES {
            let truth = |of| golden.truth(&["cox", key, of]);
            let (Some(loglik), Some(gradient)) = (truth("loglik"), truth("grad")) else { continue };
            let what = format!("{} {key}", golden.name);
            assert_cox(&cohort, &golden.risk, ties, number(loglik), &numbers(gradient), &what);
        }
    }
}

#[test]
fn cox_with_strata_and_weights_equals_r() {
    for (golden, truth) in r_truth() {
        let n = golden.time.len();
        let strata: Vec<usize> = (0..n).map(|i| i / 3 % 4).collect();
        let weights: Vec<f64> = (0..n).map(|i| 0.5 + (i % 5) as f64).collect();
        for (key, strata, weights) in [
            ("cox_strata", Some(&strata[..]), None),
            ("cox_weighted", None, Some(&weights[..])),
            ("cox_strata_weighted", Some(&strata[..]), Some(&weights[..])),
        ] {
            let cohort = CoxCohort::new(&golden.time, &golden.event, strata, weights).unwrap();
            for (ties, tie_key) in BOTH_TIES {
                let want = &truth[key][tie_key];
                // R's residuals are those of one of the weight's copies.
                let martingale = numbers(&want["martingale"]);
                let gradient: Vec<f64> =
                    martingale.iter().enumerate().map(|(i, m)| m * weights.map_or(1.0, |w| w[i])).collect();
                let what = format!("{} {key} {tie_key}", golden.name);
                assert_cox(&cohort, &golden.risk, ties, number(&want["loglik"]), &gradient, &what);
            }
        }
    }
}

/// The log-likelihood by log(e^a + e^b) from the last row to the first: exact for any risks, but
/// without Efron's correction.
fn breslow_in_the_log_domain(time: &[f64], event: &[bool], risk: &[f64]) -> f64 {
    let mut order: Vec<usize> = (0..time.len()).collect();
    order.sort_by(|&a, &b| time[a].total_cmp(&time[b]));
    let (mut log_at_risk, mut loglik) = (f64::NEG_INFINITY, 0.0);
    for tied in order.chunk_by(|&a, &b| time[a] == time[b]).rev() {
        for &i in tied {
            let (low, high) = (risk[i].min(log_at_risk), risk[i].max(log_at_risk));
            log_at_risk = high + (low - high).exp().ln_1p();
        }
        loglik += tied.iter().filter(|&&i| event[i]).map(|&i| risk[i] - log_at_risk).sum::<f64>();
    }
    loglik
}

#[test]
fn cox_gradient_equals_finite_differences() {
    let mut random = Random(3);
    for n in [1, 2, 3, 17, 40] {
        let (time, event, risk) = random.cohort(n);
        let strata: Vec<usize> = (0..n).map(|_| random.below(3) as usize).collect();
        let weights: Vec<f64> = (0..n).map(|_| 0.25 + random.below(4) as f64).collect();
        let cohort = CoxCohort::new(&time, &event, Some(&strata), Some(&weights)).unwrap();
        for (ties, key) in BOTH_TIES {
            let mut gradient = vec![0.0; n];
            let mut scratch = vec![0.0; n];
            cohort.loglik_and_gradient(&risk, ties, &mut gradient).unwrap();
            for i in 0..n {
                let mut loglik = |step: f64| {
                    let mut moved = risk.clone();
                    moved[i] += step;
                    cohort.loglik_and_gradient(&moved, ties, &mut scratch).unwrap()
                };
                let h = 1e-4; // fourth-order central difference: error of order h^4 and 1e-16 / h
                let slope = (8.0 * (loglik(h) - loglik(-h)) - (loglik(2.0 * h) - loglik(-2.0 * h))) / (12.0 * h);
                assert!((slope - gradient[i]).abs() < 1e-9, "{key} n = {n} row {i}: {slope}, {}", gradient[i]);
            }
        }
    }
}

#[test]
fn cox_of_huge_risks_is_exact() {
    let mut random = Random(4);
    for (n, scale) in [(40, 80.0), (40, 700.0), (40, 1e4), (40, 1e12), (60_000, 700.0)] {
        let time: Vec<f64> = (0..n).map(|_| random.below(n as u64 / 2) as f64).collect();
        let event: Vec<bool> = (0..n).map(|_| random.below(3) > 0).collect();
        let mut risk: Vec<f64> = (0..n).map(|_| scale * (random.below(2001) as f64 / 1000.0 - 1.0)).collect();
        if n > 1000 {
            // The risks fall with time, all through the range: every shift and split of the large
            // cohort is used.
            risk.iter_mut().zip(&time).for_each(|(r, t)| *r = 0.01 * *r + scale * (1.0 - 4.0 * t / n as f64));
        }
        for (ties, key) in BOTH_TIES {
            let (loglik, gradient) = cox_loglik_and_gradient(&time, &event, &risk, ties).unwrap();
            assert!(gradient.iter().all(|g| g.is_finite()), "{key} n = {n}, risks of {scale}");
            // A shift of all risks changes nothing, so the gradient sums to zero.
            let total: f64 = gradient.iter().sum();
            let size: f64 = gradient.iter().map(|g| g.abs()).sum();
            assert!(total.abs() <= 1e-11 * size.max(1.0), "{key} n = {n}, risks of {scale}: sum {total} of {size}");
            if ties == Ties::Breslow {
                let want = breslow_in_the_log_domain(&time, &event, &risk);
                assert_relative_eq!(loglik, want, max_relative = AGREE);
            }
        }
    }
}

#[test]
fn cox_over_many_chunks_equals_its_definition() {
    // Ties within and across the chunks of 2^14 rows, strata, and the definition in O(n) per event
    // time.
    let n = 70_000;
    let mut random = Random(5);
    let time: Vec<f64> = (0..n).map(|_| random.below(40) as f64).collect();
    let event: Vec<bool> = (0..n).map(|_| random.below(2) > 0).collect();
    let risk: Vec<f64> = (0..n).map(|_| random.below(1000) as f64 / 250.0).collect();
    let strata: Vec<usize> = (0..n).map(|_| (random.below(5) / 4) as usize).collect();
    let (mut loglik, mut gradient) = (0.0, vec![0.0; n]);
    for stratum in 0..2 {
        let members: Vec<usize> = (0..n).filter(|&i| strata[i] == stratum).collect();
        for t in 0..40 {
            let at_risk: Vec<usize> = members.iter().copied().filter(|&i| time[i] >= t as f64).collect();
            let events: Vec<usize> = at_risk.iter().copied().filter(|&i| time[i] == t as f64 && event[i]).collect();
            let total: f64 = at_risk.iter().map(|&i| risk[i].exp()).sum();
            let of_events: f64 = events.iter().map(|&i| risk[i].exp()).sum();
            let (mut all, mut own) = (0.0, 0.0);
            for l in 0..events.len() {
                let gone = l as f64 / events.len() as f64;
                let denominator = total - gone * of_events;
                loglik -= denominator.ln();
                all += 1.0 / denominator;
                own += (1.0 - gone) / denominator;
            }
            for &i in &at_risk {
                let is_event = event[i] && time[i] == t as f64;
                gradient[i] -= risk[i].exp() * if is_event { own } else { all };
            }
            for &i in &events {
                loglik += risk[i];
                gradient[i] += 1.0;
            }
        }
    }
    let cohort = CoxCohort::new(&time, &event, Some(&strata), None).unwrap();
    assert_eq!(cohort.events(), event.iter().filter(|&&e| e).count());
    assert_cox(&cohort, &risk, Ties::Efron, loglik, &gradient, "definition");
}

#[test]
fn cox_presorted_equals_unsorted_on_any_number_of_threads() {
    let n = 50_000;
    let mut random = Random(6);
    let mut time: Vec<f64> = (0..n).map(|_| random.below(1 << 40) as f64 / 7.0).collect();
    time.iter_mut().step_by(3).for_each(|t| *t = (*t / 1e7).round());
    time.sort_by(f64::total_cmp);
    let event: Vec<bool> = (0..n).map(|_| random.below(2) > 0).collect();
    let risk: Vec<f32> = (0..n).map(|_| random.below(1000) as f32 / 100.0).collect();
    let run = |cohort: CoxCohort| {
        let mut gradient = vec![0.0f32; n];
        (cohort.loglik_and_gradient(&risk, Ties::Efron, &mut gradient).unwrap(), gradient)
    };
    let sorted = run(CoxCohort::presorted(&time, &event, None, None).unwrap());
    let unsorted = run(CoxCohort::new(&time, &event, None, None).unwrap());
    assert_eq!(sorted, unsorted);
    let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    assert_eq!(sorted, alone.install(|| run(CoxCohort::new(&time, &event, None, None).unwrap())));
}

#[test]
fn cox_edges() {
    let cox =
        |time: &[f64], event: &[bool], risk: &[f64]| cox_loglik_and_gradient(time, event, risk, Ties::Efron).unwrap();
    // No event, one row, one row a stratum: the likelihood is constant.
    assert_eq!(cox(&[1.0, 2.0], &[false; 2], &[3.0, 4.0]), (0.0, vec![0.0; 2]));
    assert_eq!(cox(&[1.0], &[true], &[700.0]), (0.0, vec![0.0]));
    let mut gradient = [f64::NAN; 3];
    let alone = CoxCohort::new(&[1.0, 2.0, 3.0], &[true; 3], Some(&[7, 5, 9]), None).unwrap();
    assert_eq!(alone.loglik_and_gradient(&[1.0, -80.0, 700.0], Ties::Efron, &mut gradient).unwrap(), 0.0);
    assert_eq!(gradient, [0.0; 3]);
    // All tied, equal risks: Efron's denominators are n, n - 1, ..., 1.
    let (loglik, gradient) = cox(&[1.0; 5], &[true; 5], &[2.0; 5]);
    assert_relative_eq!(loglik, -(120f64).ln(), max_relative = 1e-14);
    assert!(gradient.iter().all(|g| g.abs() < 1e-14));

    let new = |time: &[f64], event: &[bool], strata, weights| reason(CoxCohort::new(time, event, strata, weights));
    assert_eq!(new(&[], &[], None, None), "the cohort has no patients");
    assert_eq!(new(&[1.0], &[true], Some(&[1, 2]), None), "`strata` has 2 entries for 1 patients");
    assert_eq!(new(&[1.0, 2.0], &[true; 2], None, Some(&[1.0, 0.0])), "the weight of patient 1 is 0, not above 0");
    assert!(reason(CoxCohort::presorted(&[2.0, 1.0], &[true; 2], None, None)).contains("2 comes before 1 (row 1)"));
    let mut time: Vec<f64> = (0..50_000).map(f64::from).collect();
    (time[32_768], time[40_000]) = (0.5, 0.5); // the first row of a block, and a later one
    assert!(reason(CoxCohort::presorted(&time, &vec![true; 50_000], None, None)).contains("(row 32768)"));
    let mut gradient = [0.0; 2];
    let cohort = CoxCohort::new(&[1.0, 2.0], &[true; 2], None, None).unwrap();
    let mut run = |risk: &[f64]| reason(cohort.loglik_and_gradient(risk, Ties::Efron, &mut gradient));
    assert_eq!(run(&[0.0]), "`risk` has 1 entries for 2 patients");
    assert_eq!(run(&[0.0, f64::NAN]), "entry 1 of `risk` is NaN, not a finite number");
    assert!(run(&[f64::MIN, f64::MAX]).contains("more than a double holds"));
}
