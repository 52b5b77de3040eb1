//! Kaplan-Meier, hazards, log-rank.

use super::*;

#[test]
fn kaplan_meier_equals_r() {
    for golden in goldens() {
        let curve = kaplan_meier(&golden.time, &golden.event, Limits::Log, 0.95).unwrap();
        let column = |get: fn(&Step) -> f64| curve.steps.iter().map(get).collect::<Vec<f64>>();
        let columns: [(&str, Vec<f64>); 3] = [
            ("time", column(|s| s.time)),
            ("survival", column(|s| s.survival)),
            ("at_risk", column(|s| s.at_risk as f64)),
        ];
        for (key, got) in columns {
            let Some(want) = golden.truth(&["kaplan_meier", key]) else { continue };
            assert_all_close(&got, &numbers(want), &format!("{} {key}", golden.name));
        }
        let limits = ["lower", "upper"].map(|key| golden.truth(&["kaplan_meier", key]).and_then(Value::as_array));
        if let [Some(lower), Some(upper)] = limits {
            assert_limits(&curve, lower, upper, &golden.name);
        }
    }
}

/// R's NA, null in JSON, is `None` here.
fn assert_limits(curve: &KaplanMeier, lower: &[Value], upper: &[Value], what: &str) {
    assert_eq!(curve.steps.len(), lower.len());
    for (step, (lower, upper)) in curve.steps.iter().zip(lower.iter().zip(upper)) {
        let what = format!("{what} limits at {}", step.time);
        match step.limits {
            Some((low, high)) => {
                assert_close(low, number(lower), &what);
                assert_close(high, number(upper), &what);
            }
            None => assert!(lower.is_null() && upper.is_null(), "{what}: no limits, expected {lower} to {upper}"),
        }
    }
}

#[test]
fn kaplan_meier_log_log_limits_medians_and_censored_equal_r() {
    for (golden, truth) in r_truth() {
        let fit = |limits, level| kaplan_meier(&golden.time, &golden.event, limits, level).unwrap();
        let (log, log_log) = (fit(Limits::Log, 0.95), fit(Limits::LogLog, 0.95));
        let want = &truth["km"];
        let (lower, upper) = (want["lower_log_log"].as_array().unwrap(), want["upper_log_log"].as_array().unwrap());
        assert_limits(&log_log, lower, upper, &golden.name);
        for (step, want) in fit(Limits::Log, 0.9).steps.iter().zip(want["lower_log_90"].as_array().unwrap()) {
            assert_eq!(step.limits.is_none(), want.is_null());
            step.limits.inspect(|&(low, _)| assert_close(low, number(want), "90% limit"));
        }
        for (step, want) in log.steps.iter().zip(numbers(&want["censored"])) {
            assert_eq!(step.censored as f64, want);
        }
        for (curve, key) in [(&log, "median_log"), (&log_log, "median_log_log")] {
            let Quantile { estimate, lower, upper } = curve.median();
            let want: Vec<Option<f64>> = want[key].as_array().unwrap().iter().map(Value::as_f64).collect();
            assert_eq!([estimate, lower, upper], want[..], "{} {key}", golden.name);
        }
    }
}

#[test]
fn kaplan_meier_edges() {
    // The curve runs along 1/2 from 2 to 3: R's median is 2.5. It never falls to 1/2 in the second
    // cohort.
    let curve = kaplan_meier(&[1.0, 2.0, 3.0, 4.0], &[true; 4], Limits::Log, 0.95).unwrap();
    assert_eq!(curve.median().estimate, Some(2.5));
    assert_eq!(curve.quantile(0.3).unwrap().estimate, Some(2.0));
    assert_eq!(
        (curve.survival_at(0.5), curve.survival_at(3.0), curve.survival_at(9.0)),
        (Some(1.0), Some(0.25), Some(0.0))
    );
    let curve = kaplan_meier(&[1.0, 2.0, 3.0], &[true, false, false], Limits::LogLog, 0.95).unwrap();
    assert_eq!(curve.median().estimate, None);
    assert_eq!((curve.survival_at(3.0), curve.survival_at(3.1)), (Some(1.0 - 1.0 / 3.0), None));
    // No event is no error: nobody died.
    let curve = kaplan_meier(&[1.0, 2.0], &[false, false], Limits::Log, 0.95).unwrap();
    assert_eq!(curve.steps[1].limits, Some((1.0, 1.0)));
    assert_eq!(reason(kaplan_meier(&[], &[], Limits::Log, 0.95)), "the cohort has no patients");
    assert!(reason(kaplan_meier(&[1.0], &[true], Limits::Log, 95.0)).contains("level is 95, not between 0 and 1"));
    assert!(reason(curve.quantile(1.0)).contains("probability is 1"));
    assert_eq!(number_at_risk(&[3.0, 1.0, 2.0, 2.0], &[0.0, 2.0, 2.5, 9.0]).unwrap(), [4, 3, 1, 0]);
}

#[test]
fn nelson_aalen_equals_r() {
    for (golden, truth) in r_truth() {
        let (hazard, std_error) = nelson_aalen(&golden.time, &golden.event).unwrap();
        assert_all_close(&hazard.hazard, &numbers(&truth["nelson_aalen"]["hazard"]), "hazard");
        assert_all_close(&std_error, &numbers(&truth["nelson_aalen"]["std_error"]), "standard error");
    }
}

#[test]
fn baseline_hazard_equals_r() {
    for (golden, truth) in r_truth() {
        for (ties, key) in [(Ties::Breslow, "breslow"), (Ties::Efron, "efron")] {
            let hazard = baseline_hazard(&golden.time, &golden.event, &golden.risk, ties).unwrap();
            let want = numbers(&truth["baseline"][key]);
            assert_all_close(&hazard.hazard, &want, key);
            // A shift of all risks by s divides the hazard by e^s.
            let shifted: Vec<f64> = golden.risk.iter().map(|r| r - 600.0).collect();
            let far = baseline_hazard(&golden.time, &golden.event, &shifted, ties).unwrap();
            for (far, want) in far.hazard.iter().zip(want) {
                assert_relative_eq!(far * (-600f64).exp(), want, max_relative = 1e-12);
            }
        }
    }
}

#[test]
fn hazards_at_a_time_and_beyond_a_double() {
    let (hazard, _) = nelson_aalen(&[1.0, 2.0, 3.0], &[true, false, true]).unwrap();
    let at = |t| hazard.hazard_at(t);
    assert_eq!((at(0.5), at(1.0), at(3.0), at(3.5)), (Some(0.0), Some(1.0 / 3.0), Some(1.0 / 3.0 + 1.0), None));
    for risk in [-800.0, 800.0] {
        assert!(reason(baseline_hazard(&[1.0], &[true], &[risk], Ties::Efron)).contains("subtract the mean"));
    }
    assert!(reason(nelson_aalen(&[f64::INFINITY], &[true])).contains("entry 0 of `time` is inf"));
}

#[test]
fn log_rank_of_the_median_split_equals_r() {
    for golden in goldens() {
        // At or above the median is the high-risk group, as the field's papers cut.
        let cut = median(&golden.risk);
        let group: Vec<usize> = golden.risk.iter().map(|&risk| usize::from(risk >= cut)).collect();
        let test = log_rank(&golden.time, &golden.event, &group, None).unwrap();
        for (key, got) in [("chisq", test.chi_squared), ("p", test.p_value)] {
            let Some(want) = golden.truth(&["logrank_median_split", key]) else { continue };
            assert_relative_eq!(got, number(want), max_relative = AGREE);
        }
    }
}

#[test]
fn log_rank_of_k_groups_and_strata_equals_r() {
    for (golden, truth) in r_truth() {
        let rows = 0..golden.time.len();
        let strata: Vec<usize> = rows.clone().map(|i| i / 3 % 4).collect();
        let three: Vec<usize> = rows.clone().map(|i| i % 3).collect();
        let two: Vec<usize> = rows.map(|i| i % 2).collect();
        for (key, group, strata) in [
            ("logrank_3", &three, None),
            ("logrank_3_strata", &three, Some(&strata[..])),
            ("logrank_2_strata", &two, Some(&strata[..])),
        ] {
            let got = log_rank(&golden.time, &golden.event, group, strata).unwrap();
            let want = &truth[key];
            let observed: Vec<f64> = got.observed.iter().map(|&o| o as f64).collect();
            assert_all_close(&observed, &numbers(&want["observed"]), key);
            assert_all_close(&got.expected, &numbers(&want["expected"]), key);
            assert_relative_eq!(got.chi_squared, number(&want["chisq"]), max_relative = AGREE);
            assert_relative_eq!(got.p_value, number(&want["p"]), max_relative = AGREE);
        }
    }
}

#[test]
fn log_rank_says_why_it_is_undefined() {
    let test = |time: &[f64], event: &[bool], group: &[usize]| reason(log_rank(time, event, group, None));
    assert_eq!(test(&[1.0, 2.0], &[true, true], &[0, 0]), "all patients are in one group");
    assert_eq!(test(&[1.0, 2.0, 3.0], &[true; 3], &[0, 2, 2]), "group 1 of 3 is empty");
    assert_eq!(test(&[1.0, 2.0], &[false; 2], &[0, 1]), "none of the 2 patients had an event");
    assert_eq!(test(&[1.0, 2.0], &[false, true], &[0, 1]), "group 0 had nobody at risk when an event occurred");
    assert!(test(&[1.0, 2.0], &[true, true], &[0, usize::MAX]).contains("more than the 2 patients"));
    assert_eq!(test(&[1.0, 2.0], &[true, true], &[0]), "`group` has 1 entries for 2 patients");
    assert!(reason(log_rank(&[1.0, 2.0], &[true; 2], &[0, 1], Some(&[0, 1]))).contains("never at risk together"));
}
