//! The survival statistics against R's survival 3.5.3 and scikit-survival 0.28 (`survival_*.json` of the folder in
//! CROSSFUSION_GOLDENS, by default tests/goldens; further numbers of R in tests/survival/r_truth.json), against
//! brute force on small random data, and on degenerate cohorts.

use std::path::{Path, PathBuf};

use approx::assert_relative_eq;
use crossfusion::survival::*;
use crossfusion::{Error, Result};
use serde_json::Value;

/// R, scikit-survival and this crate are to agree to this, relative to the number or, below 1, absolute.
const AGREE: f64 = 1e-10;

fn assert_close(got: f64, want: f64, what: &str) {
    assert!((got - want).abs() <= AGREE * want.abs().max(1.0), "{what}: got {got:?}, expected {want:?}");
}

fn assert_all_close(got: &[f64], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (row, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert_close(g, w, &format!("{what}[{row}]"));
    }
}

/// One `survival_*.json`.
struct Golden {
    name: String,
    time: Vec<f64>,
    event: Vec<bool>,
    stratum: Vec<usize>,
    risk: Vec<f64>,
    json: Value,
}

impl Golden {
    fn read(path: &Path) -> Self {
        let json: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        Self {
            name: path.file_stem().unwrap().to_string_lossy().into_owned(),
            time: numbers(&json["time"]),
            event: numbers(&json["event"]).iter().map(|&e| e == 1.0).collect(),
            stratum: numbers(&json["stratum"]).iter().map(|&s| s as usize).collect(),
            risk: numbers(&json["risk"]),
            json,
        }
    }

    /// The truth under a path of keys; notes on stderr that this golden has none.
    fn truth(&self, keys: &[&str]) -> Option<&Value> {
        let found = keys.iter().try_fold(&self.json, |value, key| value.get(key));
        if found.is_none() {
            eprintln!("NOTE {}: no key {}, not compared", self.name, keys.join("."));
        }
        found
    }

    /// scikit-survival's split: even rows train, odd rows with a time below the last training time test.
    fn split(&self) -> (Vec<usize>, Vec<usize>) {
        let train: Vec<usize> = (0..self.time.len()).step_by(2).collect();
        let last = train.iter().map(|&row| self.time[row]).fold(f64::MIN, f64::max);
        let test = (1..self.time.len()).step_by(2).filter(|&row| self.time[row] < last).collect();
        (train, test)
    }
}

fn goldens() -> Vec<Golden> {
    let folder = std::env::var_os("CROSSFUSION_GOLDENS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens"), PathBuf::from);
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy();
            name.starts_with("survival_") && name.ends_with(".json")
        })
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} has no survival_*.json", folder.display());
    paths.iter().map(|path| Golden::read(path)).collect()
}

/// The repository's own goldens together with what R says beyond them.
fn r_truth() -> Vec<(Golden, Value)> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let all: Value =
        serde_json::from_str(&std::fs::read_to_string(tests.join("survival/r_truth.json")).unwrap()).unwrap();
    all.as_object()
        .unwrap()
        .iter()
        .map(|(name, truth)| (Golden::read(&tests.join(format!("goldens/survival_{name}.json"))), truth.clone()))
        .collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("expected a number, got {value}"))
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap_or_else(|| panic!("expected an array, got {value}")).iter().map(number).collect()
}

fn pick<T: Copy>(column: &[T], rows: &[usize]) -> Vec<T> {
    rows.iter().map(|&row| column[row]).collect()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    0.5 * (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2])
}

/// The reason of an `Error::Statistic`.
fn reason<T: std::fmt::Debug>(result: Result<T>) -> String {
    match result.unwrap_err() {
        Error::Statistic { reason, .. } => reason,
        other => panic!("expected Error::Statistic, got {other}"),
    }
}

/// Small uniform numbers for made-up cohorts (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n
    }

    /// `n` patients whose times, events and risks are tied often; some risks differ by about [`RISK_TIE`].
    fn cohort(&mut self, n: usize) -> (Vec<f64>, Vec<bool>, Vec<f64>) {
        let time = (0..n).map(|_| self.below(8) as f64).collect();
        let event = (0..n).map(|_| self.below(3) > 0).collect();
        let risk = (0..n).map(|_| self.below(4) as f64 * 0.3 + self.below(5) as f64 * 0.6e-8).collect();
        (time, event, risk)
    }
}

// ---- concordance ----

#[test]
fn concordance_equals_scikit_survival_and_r() {
    for golden in goldens() {
        let got = concordance_index(&golden.time, &golden.event, &golden.risk).unwrap();
        for keys in [&["concordance"][..], &["scikit_survival", "concordance_censored"]] {
            let Some(want) = golden.truth(keys) else { continue };
            assert_close(got.index, number(&want["index"]), &format!("{} C", golden.name));
            let counts = [("concordant", got.concordant), ("discordant", got.discordant), ("tied_risk", got.tied_risk)];
            for (key, count) in counts.into_iter().chain([("tied_time", got.tied_time)]) {
                if let Some(want) = want.get(key) {
                    assert_eq!(count as f64, number(want), "{} {key}", golden.name);
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
    assert_eq!(c(&[1.0, f64::NAN], &[true, true], &[0.0, 1.0]), "`time` of patient 1 is NaN, not a finite number");
    assert_eq!(c(&[1.0, 2.0], &[true, true], &[f64::INFINITY, 1.0]), "`risk` of patient 0 is inf, not a finite number");

    let censoring = CensoringDistribution::fit(&[1.0, 2.0, 4.0, 4.0], &[true, false, true, false]).unwrap();
    let uno = |time: &[f64], tau| reason(concordance_index_ipcw(&censoring, time, &[true, true], &[0.0, 1.0], tau));
    assert_eq!(uno(&[1.0, 3.0], Some(0.5)), "no event came before tau = 0.5");
    assert!(uno(&[1.0, 4.0], None).contains("everyone was censored by time 4"));
    let censoring = CensoringDistribution::fit(&[1.0, 2.0, 4.0], &[true, false, true]).unwrap();
    let uno = |time: &[f64], tau| reason(concordance_index_ipcw(&censoring, time, &[true, true], &[0.0, 1.0], tau));
    assert!(uno(&[1.0, 5.0], Some(6.0)).contains("time 5 lies beyond 4"));
    assert_eq!(uno(&[1.0, 3.0], Some(f64::NAN)), "`tau` is NaN");
}

// ---- Kaplan-Meier ----

#[test]
fn kaplan_meier_equals_r() {
    for golden in goldens() {
        let curve = kaplan_meier(&golden.time, &golden.event, Limits::Log, 0.95).unwrap();
        let Some(want) = golden.truth(&["kaplan_meier"]) else { continue };
        let column = |get: fn(&Step) -> f64| curve.steps.iter().map(get).collect::<Vec<f64>>();
        let columns: [(&str, Vec<f64>); 3] = [
            ("time", column(|s| s.time)),
            ("survival", column(|s| s.survival)),
            ("at_risk", column(|s| s.at_risk as f64)),
        ];
        for (key, got) in columns {
            assert_all_close(&got, &numbers(&want[key]), &format!("{} {key}", golden.name));
        }
        assert_limits(&curve, want["lower"].as_array(), want["upper"].as_array(), &golden.name);
    }
}

/// R's NA, null in JSON, is `None` here.
fn assert_limits(curve: &KaplanMeier, lower: Option<&Vec<Value>>, upper: Option<&Vec<Value>>, what: &str) {
    let (lower, upper) = (lower.unwrap(), upper.unwrap());
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
        assert_limits(&log_log, want["lower_log_log"].as_array(), want["upper_log_log"].as_array(), &golden.name);
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
    // The curve runs along 1/2 from 2 to 3: R's median is 2.5. It never falls to 1/2 in the second cohort.
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

// ---- log-rank ----

#[test]
fn log_rank_of_the_median_split_equals_r() {
    for golden in goldens() {
        let Some(want) = golden.truth(&["logrank_median_split"]) else { continue };
        let cut = median(&golden.risk);
        let group: Vec<usize> = golden.risk.iter().map(|&risk| usize::from(risk >= cut)).collect();
        let got = log_rank(&golden.time, &golden.event, &group, None).unwrap();
        assert_relative_eq!(got.chi_squared, number(&want["chisq"]), max_relative = AGREE);
        assert_relative_eq!(got.p_value, number(&want["p"]), max_relative = AGREE);
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
