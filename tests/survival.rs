//! The survival statistics against R's survival 3.5.3 and scikit-survival 0.28 (`survival_*.json`
//! of the folder in CROSSFUSION_GOLDENS, by default tests/goldens; further numbers of R in
//! tests/survival/r_truth.json), against brute force on small random data, and on degenerate
//! cohorts.
#![cfg(feature = "programs")]

#[path = "survival/concordance.rs"]
mod concordance;
#[path = "survival/cox.rs"]
mod cox;
#[path = "survival/curves.rs"]
mod curves;
#[path = "survival/hazard_ratio.rs"]
mod hazard_ratio;
#[path = "survival/time_dependent.rs"]
mod time_dependent;
#[path = "survival/uncertainty.rs"]
mod uncertainty;

use std::path::{Path, PathBuf};

use approx::assert_relative_eq;
use crossfusion::survival::*;
use crossfusion::{Error, Result};
use serde_json::Value;

/// R, scikit-survival and this crate are to agree to this, relative to the number or, below 1,
/// absolute.
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

    /// scikit-survival's split: even rows train, odd rows with a time below the last training time
    /// test.
    fn split(&self) -> (Vec<usize>, Vec<usize>) {
        let train: Vec<usize> = (0..self.time.len()).step_by(2).collect();
        let last = train.iter().map(|&row| self.time[row]).fold(f64::MIN, f64::max);
        let test = (1..self.time.len()).step_by(2).filter(|&row| self.time[row] < last).collect();
        (train, test)
    }
}

fn folder() -> PathBuf {
    std::env::var_os("CROSSFUSION_GOLDENS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens"), PathBuf::from)
}

fn goldens() -> Vec<Golden> {
    let folder = folder();
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
    let all: Value = serde_json::from_str(include_str!("survival/r_truth.json")).unwrap();
    let golden = |name: &str| Golden::read(&folder().join(format!("survival_{name}.json")));
    all.as_object().unwrap().iter().map(|(name, truth)| (golden(name), truth.clone())).collect()
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

    /// `n` patients whose times, events and risks are tied often; some risks differ by about
    /// [`RISK_TIE`].
    fn cohort(&mut self, n: usize) -> (Vec<f64>, Vec<bool>, Vec<f64>) {
        let time = (0..n).map(|_| self.below(8) as f64).collect();
        let event = (0..n).map(|_| self.below(3) > 0).collect();
        let risk = (0..n).map(|_| self.below(4) as f64 * 0.3 + self.below(5) as f64 * 0.6e-8).collect();
        (time, event, risk)
    }
}

/// A file without any known truth would pass every test.
#[test]
fn every_golden_has_something_to_compare() {
    const TRUTHS: [&str; 5] = ["cox", "concordance", "logrank_median_split", "kaplan_meier", "scikit_survival"];
    for golden in goldens() {
        let known = TRUTHS.iter().filter(|key| golden.json.get(key).is_some_and(|value| !value.is_null())).count();
        assert!(known > 0, "{} has none of {TRUTHS:?}", golden.name);
    }
}
