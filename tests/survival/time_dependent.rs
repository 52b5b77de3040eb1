//! Dynamic AUC and Brier score.

use super::*;

#[test]
fn dynamic_auc_and_brier_score_equal_scikit_survival() {
    for golden in goldens() {
        let Some(times) = golden.truth(&["scikit_survival", "times"]) else { continue };
        let times = numbers(times);
        let (train, test) = golden.split();
        let censoring = CensoringDistribution::fit(&pick(&golden.time, &train), &pick(&golden.event, &train)).unwrap();
        let (time, event, risk) = (pick(&golden.time, &test), pick(&golden.event, &test), pick(&golden.risk, &test));
        let auc = dynamic_auc(&censoring, &time, &event, &risk, &times).unwrap();
        // The goldens' law: S(t) = exp(-exp(risk - mean of all risks) t / median of all times).
        let mean = golden.risk.iter().sum::<f64>() / golden.risk.len() as f64;
        let scale = median(&golden.time);
        let survival: Vec<f64> =
            risk.iter().flat_map(|r| times.iter().map(move |t| (-(r - mean).exp() * t / scale).exp())).collect();
        let brier = brier_score(&censoring, &time, &event, &survival, &times).unwrap();
        for (keys, got) in [
            (["scikit_survival", "dynamic_auc", "auc"], &auc.auc),
            (["scikit_survival", "dynamic_auc", "mean"], &vec![auc.mean]),
            (["scikit_survival", "brier", "score"], &brier.score),
            (["scikit_survival", "brier", "integrated"], &vec![brier.integrated().unwrap()]),
        ] {
            let Some(want) = golden.truth(&keys) else { continue };
            let want = if want.is_array() { numbers(want) } else { vec![number(want)] };
            assert_all_close(got, &want, &format!("{} {}", golden.name, keys.join(".")));
        }
    }
}

#[test]
fn dynamic_auc_equals_the_loop_over_all_pairs() {
    let mut random = Random(2);
    for n in 10..60 {
        let (time, event, mut risk) = random.cohort(n);
        // No near ties here: scikit-survival chains them, a loop over pairs would not.
        risk.iter_mut().for_each(|r| *r = (*r * 10.0).round());
        let censoring = CensoringDistribution::fit(&time, &event).unwrap();
        let t = 4.0;
        let weight = |i: usize| 1.0 / censoring.uncensored_at(time[i]).unwrap();
        let (mut won, mut pairs) = (0.0, 0.0);
        for i in (0..n).filter(|&i| event[i] && time[i] <= t) {
            for j in (0..n).filter(|&j| time[j] > t) {
                won += weight(i) * if risk[i] == risk[j] { 0.5 } else { f64::from(risk[i] > risk[j]) };
                pairs += weight(i);
            }
        }
        let got = dynamic_auc(&censoring, &time, &event, &risk, &[t]).unwrap();
        assert_relative_eq!(got.auc[0], won / pairs, max_relative = 1e-12);
        assert_eq!(got.mean, got.auc[0]);
    }
}

#[test]
fn auc_and_brier_say_why_they_are_undefined() {
    let (time, event) = ([1.0, 2.0, 3.0, 4.0], [false, true, true, false]);
    let censoring = CensoringDistribution::fit(&time, &event).unwrap();
    let auc = |times: &[f64]| reason(dynamic_auc(&censoring, &time, &event, &[0.0; 4], times));
    assert_eq!(auc(&[1.5]), "nobody had an event by time 1.5");
    assert_eq!(auc(&[4.0]), "time 4 is outside the follow-up, from 1 to before 4");
    assert_eq!(auc(&[3.0, 3.0]), "its times do not ascend: 3 is followed by 3");
    assert_eq!(auc(&[]), "no times are given");
    assert_eq!(auc(&[f64::NAN]), "entry 0 of `times` is NaN, not a finite number");
    let short = CensoringDistribution::fit(&[1.0, 2.0], &[true, true]).unwrap();
    assert!(reason(dynamic_auc(&short, &time, &event, &[0.0; 4], &[3.0])).contains("time 3 lies beyond 2"));

    let brier = |survival: &[f64], times: &[f64]| reason(brier_score(&censoring, &time, &event, survival, times));
    assert_eq!(brier(&[0.5; 4], &[2.0, 3.0]), "`survival` has 4 entries, expected 4 patients x 2 times");
    assert_eq!(brier(&[0.5, 0.5, 1.5, 0.5], &[2.0]), "patient 2 survives time 2 with probability 1.5");
    assert!(brier(&[0.5, f64::NAN, 0.5, 0.5], &[2.0]).contains("probability NaN"));
    let one = brier_score(&censoring, &time, &event, &[0.5; 4], &[2.0]).unwrap();
    assert_eq!(reason(one.integrated()), "it needs at least two times");
}
