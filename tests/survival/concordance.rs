//! Harrell's and Uno's C.

use super::*;

#[test]
fn concordance_equals_scikit_survival_and_r() {
    for golden in goldens() {
        let got = concordance_index(&golden.time, &golden.event, &golden.risk).unwrap();
        for (source, from) in [("R", &["concordance"][..]), ("sksurv", &["scikit_survival", "concordance_censored"])] {
            let truth = |key| golden.truth(&[from, &[key]].concat()).map(number);
            if let Some(want) = truth("index") {
                assert_close(got.index, want, &format!("{} C of {source}", golden.name));
            }
            let counts = [("concordant", got.concordant), ("discordant", got.discordant), ("tied_risk", got.tied_risk)];
            // R's pairs tied in time are others: two events.
            let tied_time = (source == "sksurv").then_some(("tied_time", got.tied_time));
            for (key, count) in counts.into_iter().chain(tied_time) {
                if let Some(want) = truth(key) {
                    assert_eq!(count as f64, want, "{} {key} of {source}", golden.name);
                }
            }
        }
    }
}

#[test]
fn uno_c_equals_scikit_survival() {
    for golden in goldens() {
        let Some(want) = golden.truth(&["scikit_survival", "uno_c"]) else { continue };
        let tau = golden.truth(&["scikit_survival", "tau"]).map(number);
        let (train, test) = golden.split();
        let censoring = CensoringDistribution::fit(&pick(&golden.time, &train), &pick(&golden.event, &train)).unwrap();
        let (time, event, risk) = (pick(&golden.time, &test), pick(&golden.event, &test), pick(&golden.risk, &test));
        let got = concordance_index_ipcw(&censoring, &time, &event, &risk, tau).unwrap();
        assert_close(got, number(want), &format!("{} Uno's C", golden.name));
    }
}

/// scikit-survival's loop over all pairs, with the weights of the events.
fn concordance_of_all_pairs(time: &[f64], event: &[bool], risk: &[f64], weight: &[f64]) -> (Concordance, f64) {
    let mut c = Concordance { index: 0.0, concordant: 0, discordant: 0, tied_risk: 0, tied_time: 0 };
    let (mut score, mut comparable) = (0.0, 0.0);
    for i in (0..time.len()).filter(|&i| event[i]) {
        for j in 0..time.len() {
            if time[j] > time[i] || time[j] == time[i] && !event[j] {
                let tied = (risk[j] - risk[i]).abs() <= RISK_TIE;
                c.tied_time += u64::from(time[j] == time[i]);
                c.tied_risk += u64::from(tied);
                c.concordant += u64::from(!tied && risk[j] < risk[i]);
                c.discordant += u64::from(!tied && risk[j] > risk[i]);
                score += weight[i] * if tied { 0.5 } else { f64::from(risk[j] < risk[i]) };
                comparable += weight[i];
            }
        }
    }
    let pairs = (c.concordant + c.discordant + c.tied_risk) as f64;
    c.index = (c.concordant as f64 + 0.5 * c.tied_risk as f64) / pairs;
    (c, score / comparable)
}

#[test]
fn concordance_equals_the_loop_over_all_pairs() {
    let mut random = Random(1);
    let mut compared = 0;
    for n in 2..80 {
        let (time, event, risk) = random.cohort(n);
        let (want, _) = concordance_of_all_pairs(&time, &event, &risk, &vec![1.0; n]);
        if want.index.is_nan() {
            reason(concordance_index(&time, &event, &risk));
            continue;
        }
        assert_eq!(concordance_index(&time, &event, &risk).unwrap(), want, "n = {n}");

        let censoring = CensoringDistribution::fit(&time, &event).unwrap();
        let tau = 5.0;
        let weight: Vec<f64> = (0..n)
            .map(|i| if event[i] && time[i] < tau { censoring.uncensored_at(time[i]).unwrap().powi(-2) } else { 0.0 })
            .collect();
        let (_, want) = concordance_of_all_pairs(&time, &event, &risk, &weight);
        if want.is_finite() {
            let got = concordance_index_ipcw(&censoring, &time, &event, &risk, Some(tau)).unwrap();
            assert_relative_eq!(got, want, max_relative = 1e-12);
            compared += 1;
        }
    }
    assert!(compared > 60);
}

#[test]
fn risks_within_1e_8_are_tied_and_that_is_not_transitive() {
    let risk = [2e-8, 1.2e-8, 0.4e-8];
    let c = concordance_index(&[1.0, 2.0, 3.0], &[true; 3], &risk).unwrap();
    assert_eq!((c.concordant, c.tied_risk), (1, 2));
    for risk in [[0.0, RISK_TIE], [RISK_TIE, 0.0]] {
        assert_eq!(concordance_index(&[1.0, 2.0], &[true; 2], &risk).unwrap().tied_risk, 1); // exactly 1e-8 is tied
    }
}

#[test]
fn concordance_says_why_it_is_undefined() {
    let c = |time: &[f64], event: &[bool], risk: &[f64]| reason(concordance_index(time, event, risk));
    assert_eq!(c(&[], &[], &[]), "the cohort has no patients");
    assert_eq!(c(&[1.0, 2.0], &[false, false], &[0.0, 1.0]), "none of the 2 patients had an event");
    assert!(c(&[2.0, 2.0], &[true, true], &[0.0, 1.0]).contains("no two patients are comparable"));
    assert!(c(&[3.0, 2.0], &[true, false], &[0.0, 1.0]).contains("no two patients are comparable"));
    assert_eq!(c(&[1.0, 2.0], &[true, true], &[0.0]), "`risk` has 1 entries for 2 patients");
    assert_eq!(c(&[1.0, 2.0], &[true], &[0.0, 1.0]), "`event` has 1 entries for 2 patients");
    assert_eq!(c(&[1.0, f64::NAN], &[true, true], &[0.0, 1.0]), "entry 1 of `time` is NaN, not a finite number");
    assert_eq!(c(&[1.0, 2.0], &[true, true], &[f64::INFINITY, 1.0]), "entry 0 of `risk` is inf, not a finite number");

    let censoring = CensoringDistribution::fit(&[1.0, 2.0, 4.0, 4.0], &[true, false, true, false]).unwrap();
    let uno = |time: &[f64], tau| reason(concordance_index_ipcw(&censoring, time, &[true, true], &[0.0, 1.0], tau));
    assert_eq!(uno(&[1.0, 3.0], Some(0.5)), "no event came before tau = 0.5");
    assert!(uno(&[1.0, 4.0], None).contains("everyone was censored by time 4"));
    let censoring = CensoringDistribution::fit(&[1.0, 2.0, 4.0], &[true, false, true]).unwrap();
    let uno = |time: &[f64], tau| reason(concordance_index_ipcw(&censoring, time, &[true, true], &[0.0, 1.0], tau));
    assert!(uno(&[1.0, 5.0], Some(6.0)).contains("time 5 lies beyond 4"));
    assert_eq!(uno(&[1.0, 3.0], Some(f64::NAN)), "`tau` is NaN");
}
