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
    stratum: Option<Vec<usize>>,
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
            stratum: json.get("stratum").map(|s| numbers(s).iter().map(|&s| s as usize).collect()),
            risk: numbers(&json["risk"]),
            json,
        }
    }

    /// The truth under a path of keys; notes on stderr that this golden has none.
    fn truth(&self, keys: &[&str]) -> Option<&Value> {
        let found = keys.iter().try_fold(&self.json, |value, key| value.get(key)).filter(|value| !value.is_null());
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

// ---- Kaplan-Meier ----

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

// ---- hazards ----

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
    assert!(reason(baseline_hazard(&[1.0], &[true], &[-800.0], Ties::Efron)).contains("subtract the mean"));
    assert!(reason(nelson_aalen(&[f64::INFINITY], &[true])).contains("entry 0 of `time` is inf"));
}

// ---- AUC and Brier score ----

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

// ---- Cox ----

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

/// The log-likelihood by log(e^a + e^b) from the last row to the first: exact for any risks, but without Efron's correction.
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
            // The risks fall with time, all through the range: every shift and split of the large cohort is used.
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
    // Ties within and across the chunks of 2^14 rows, strata, and the definition in O(n) per event time.
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

    let new = |time: &[f64], event: &[bool], strata, weights| {
        reason(CoxCohort::new(time, event, strata, weights).map(|_| ()))
    };
    assert_eq!(new(&[], &[], None, None), "the cohort has no patients");
    assert_eq!(new(&[1.0], &[true], Some(&[1, 2]), None), "`strata` has 2 entries for 1 patients");
    assert_eq!(new(&[1.0, 2.0], &[true; 2], None, Some(&[1.0, 0.0])), "the weight of patient 1 is 0, not above 0");
    assert!(
        reason(CoxCohort::presorted(&[2.0, 1.0], &[true; 2], None, None).map(|_| ()))
            .contains("2 comes before 1 (row 1)")
    );
    let mut gradient = [0.0; 2];
    let cohort = CoxCohort::new(&[1.0, 2.0], &[true; 2], None, None).unwrap();
    let mut run = |risk: &[f64]| reason(cohort.loglik_and_gradient(risk, Ties::Efron, &mut gradient));
    assert_eq!(run(&[0.0]), "`risk` has 1 entries for 2 patients");
    assert_eq!(run(&[0.0, f64::NAN]), "entry 1 of `risk` is NaN, not a finite number");
    assert!(run(&[f64::MIN, f64::MAX]).contains("more than a double holds"));
}

// ---- uncertainty ----

/// 200 patients of two rows each, in four folds, with a risk `signal` that tells something and one that is noise.
struct Cohort {
    time: Vec<f64>,
    event: Vec<bool>,
    signal: Vec<f64>,
    noise: Vec<f64>,
    patient: Vec<usize>,
    fold: Vec<usize>,
}

impl Cohort {
    fn made_up() -> Self {
        let mut random = Random(7);
        let patient: Vec<usize> = (0..400).map(|row| row / 2).collect();
        let of_patient: Vec<(f64, bool)> = (0..200).map(|_| (random.below(1000) as f64, random.below(3) > 0)).collect();
        let time: Vec<f64> = patient.iter().map(|&p| of_patient[p].0).collect();
        Self {
            event: patient.iter().map(|&p| of_patient[p].1).collect(),
            signal: time.iter().map(|t| -t + 100.0 * random.below(10) as f64).collect(),
            noise: time.iter().map(|_| random.below(1000) as f64).collect(),
            fold: patient.iter().map(|p| p % 4).collect(),
            time,
            patient,
        }
    }

    fn c_index(&self, risk: &[f64], rows: &[usize]) -> Result<f64> {
        Ok(concordance_index(&pick(&self.time, rows), &pick(&self.event, rows), &pick(risk, rows))?.index)
    }
}

#[test]
fn bootstrap_draws_whole_patients_within_folds() {
    let cohort = Cohort::made_up();
    let patients = Patients::new(&cohort.patient, Some(&cohort.fold)).unwrap();
    let plan = Bootstrap { replicates: 50, seed: 3, level: 0.9 };
    let drawn = std::sync::Mutex::new(Vec::new());
    bootstrap(&patients, plan, |rows| {
        drawn.lock().unwrap().push(rows.to_vec());
        Ok(1.0)
    })
    .unwrap();
    let mut drawn = drawn.into_inner().unwrap();
    assert_eq!(drawn.len(), 51);
    for rows in &drawn {
        let mut of_fold = [0; 4];
        let mut of_row = [0; 400];
        for &row in rows {
            of_fold[cohort.fold[row]] += 1;
            of_row[row] += 1;
        }
        assert_eq!(of_fold, [100; 4]);
        assert!(of_row.chunks(2).all(|of_patient| of_patient[0] == of_patient[1]));
    }
    drawn.sort();
    drawn.dedup();
    assert_eq!(drawn.len(), 51, "replicates differ from each other and from the cohort");
}

#[test]
fn bootstrap_is_the_same_on_any_number_of_threads_and_another_with_another_seed() {
    let cohort = Cohort::made_up();
    let patients = Patients::new(&cohort.patient, Some(&cohort.fold)).unwrap();
    let run = |seed| {
        let plan = Bootstrap { replicates: 200, seed, level: 0.95 };
        bootstrap(&patients, plan, |rows| cohort.c_index(&cohort.signal, rows)).unwrap()
    };
    let threads = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
    let first = run(1);
    assert_eq!(first, threads(1).install(|| run(1)));
    assert_eq!(first, threads(3).install(|| run(1)));
    assert_ne!(first, run(2));
    assert!(first.lower < first.estimate && first.estimate < first.upper && first.undefined == 0);
}

#[test]
fn bootstrap_of_a_mean_has_its_known_error() {
    // The standard error of a mean of n values under resampling is sqrt(sum (x - mean)^2) / n.
    let values: Vec<f64> = (0..100).map(|i| f64::from(i * i)).collect();
    let mean = |rows: &[usize]| Ok(pick(&values, rows).iter().sum::<f64>() / rows.len() as f64);
    let plan = Bootstrap { replicates: 20_000, seed: 5, level: 0.95 };
    let interval = bootstrap(&Patients::one_row_each(100).unwrap(), plan, mean).unwrap();
    let centre = values.iter().sum::<f64>() / 100.0;
    let known = values.iter().map(|x| (x - centre).powi(2)).sum::<f64>().sqrt() / 100.0;
    assert_eq!(interval.estimate, centre);
    // Five standard errors of a standard deviation, and of a 2.5% quantile, of 20,000 normal draws.
    assert!((interval.std_error / known - 1.0).abs() < 5.0 / 40_000f64.sqrt());
    assert!(((interval.upper - interval.lower) / (2.0 * 1.96 * known) - 1.0).abs() < 0.05);
}

#[test]
fn paired_comparison_and_permutation_tell_signal_from_noise() {
    let cohort = Cohort::made_up();
    let patients = Patients::new(&cohort.patient, None).unwrap();
    let (signal, noise) =
        (|rows: &[usize]| cohort.c_index(&cohort.signal, rows), |rows: &[usize]| cohort.c_index(&cohort.noise, rows));
    let plan = Bootstrap { replicates: 999, ..Bootstrap::default() };
    let compared = bootstrap_difference(&patients, plan, signal, noise).unwrap();
    assert_eq!(compared.difference.estimate, compared.a - compared.b);
    assert!(compared.difference.lower > 0.0 && compared.p_value < 0.05, "{compared:?}");
    let same = bootstrap_difference(&patients, plan, signal, signal).unwrap();
    assert_eq!((same.difference.lower, same.difference.upper, same.p_value), (0.0, 0.0, 1.0));

    // Every second row: one a patient.
    let rows: Vec<usize> = (0..400).step_by(2).collect();
    let (time, event, fold) = (pick(&cohort.time, &rows), pick(&cohort.event, &rows), pick(&cohort.fold, &rows));
    let test =
        |risk: &[f64]| concordance_permutation_test(&time, &event, &pick(risk, &rows), Some(&fold), 499, 1).unwrap();
    assert_eq!(test(&cohort.time.iter().map(|t| -t).collect::<Vec<f64>>()).p_value, 1.0 / 500.0);
    assert!(test(&cohort.noise).p_value > 0.02);
    assert_eq!(test(&vec![1.0; 400]).p_value, 1.0);
}

#[test]
fn permutation_p_is_uniform_without_signal() {
    // Exact test: the share of p <= alpha is at most alpha; over 200 cohorts of noise within 4 standard errors.
    let mut random = Random(9);
    let small = (0..200)
        .filter(|&seed| {
            let (time, event, _) = random.cohort(30);
            let risk: Vec<f64> = (0..30).map(|_| random.below(1 << 30) as f64).collect();
            concordance_permutation_test(&time, &event, &risk, None, 99, seed).unwrap().p_value <= 0.2
        })
        .count();
    assert!((small as f64 - 40.0).abs() < 4.0 * (200.0 * 0.2 * 0.8f64).sqrt(), "{small} of 200 have p <= 0.2");
}

#[test]
fn uncertainty_says_why_it_is_undefined() {
    assert_eq!(reason(Patients::new(&[], None)), "the cohort has no patients");
    assert_eq!(reason(Patients::new(&[4, 4], Some(&[0, 1]))), "patient 4 is in two folds, 0 and 1");
    assert_eq!(reason(Patients::new(&[4, 5], Some(&[0]))), "`fold` has 1 entries for 2 patients");
    let patients = Patients::one_row_each(2).unwrap();
    let c =
        |rows: &[usize]| Ok(concordance_index(&pick(&[1.0, 2.0], rows), &[true; 2], &pick(&[0.0, 1.0], rows))?.index);
    let why = reason(bootstrap(&patients, Bootstrap::default(), c));
    assert!(why.contains("of 2000 resampled cohorts fail: the C-index is undefined: no two patients"), "{why}");
    assert!(
        reason(bootstrap(&patients, Bootstrap { replicates: 1, ..Bootstrap::default() }, c)).contains("at least 2")
    );
    assert!(reason(bootstrap(&patients, Bootstrap { level: 1.0, ..Bootstrap::default() }, c)).contains("level is 1"));
    assert!(reason(concordance_permutation_test(&[1.0], &[false], &[0.0], None, 9, 0)).contains("had an event"));
}

#[test]
fn fold_mean_equals_r() {
    // R: x <- c(0.61, 0.66, 0.58, 0.70, 0.63); mean(x); sd(x); t.test(x)
    let values = [0.61, 0.66, 0.58, 0.70, 0.63];
    let got = fold_mean(&values, 1, 0.95).unwrap();
    for (got, want) in [
        (got.mean, 0.636),
        (got.sd, 0.0461519230368573),
        (got.lower, 0.578694818717263),
        (got.upper, 0.693305181282737),
    ] {
        assert_relative_eq!(got, want, max_relative = 1e-12);
    }
    let zero = fold_mean(&values, 0, 0.95).unwrap();
    assert_relative_eq!(zero.sd, got.sd * 0.8f64.sqrt(), max_relative = 1e-14);
    assert_eq!((zero.lower, zero.upper), (got.lower, got.upper));
    assert!(reason(fold_mean(&[0.6], 0, 0.95)).contains("1 folds are too few"));
    assert!(reason(fold_mean(&[0.6, f64::NAN], 0, 0.95)).contains("entry 1 of `values` is NaN"));
}
