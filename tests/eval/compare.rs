//! Paired comparison: closed cases, the definition, and what cannot be compared.

use super::{PLAN, cf_eval, evaluated, folder, trained};
use crossfusion::{
    eval::compare::{self, Comparison, Difference, compare_runs},
    report::{SlideResult, predictions_csv, read_predictions},
};
use std::path::{Path, PathBuf};

/// 60 patients in two folds, whose times ascend within each and are events but every third.
fn patients(risk: impl Fn(f64) -> f64) -> Vec<SlideResult> {
    let patient = |i: usize| SlideResult {
        case_id: format!("CASE-{i:02}"),
        slide_id: format!("SLIDE-{i:02}"),
        fold: i % 2,
        time: 1.0 + i as f64,
        event: !i.is_multiple_of(3),
        risk: risk(i as f64),
        hazards: Vec::new(),
        survival: Vec::new(),
    };
    (0..60).map(patient).collect()
}

fn compare(a: &[SlideResult], b: &[SlideResult]) -> crossfusion::Result<Comparison> {
    compare::compare((Path::new("runs/a"), a), (Path::new("runs/b"), b), PLAN)
}

fn row<'a>(comparison: &'a Comparison, name: &str) -> &'a Difference {
    comparison.rows.iter().find(|row| row.name == name).unwrap()
}

#[test]
fn runs_that_agree_and_runs_that_oppose_each_other_are_closed_cases() {
    let (best, worst) = (patients(|i| -i), patients(|i| i));
    let same = compare(&best, &best).unwrap();
    assert_eq!(
        same.rows.iter().map(|row| row.name.as_str()).collect::<Vec<_>>(),
        ["fold 0", "fold 1", "mean of folds", "pooled"]
    );
    assert_eq!((same.patients, same.events, same.only_a, same.only_b), (60, 40, 0, 0));
    for row in &same.rows {
        assert_eq!(
            (row.difference.estimate, row.difference.interval, row.p_value),
            (Some(0.0), Some([0.0; 2]), Some(1.0))
        );
    }
    let apart = compare(&best, &worst).unwrap();
    for row in &apart.rows {
        assert_eq!((row.a.estimate, row.b.estimate), (Some(1.0), Some(0.0)));
        assert_eq!((row.difference.estimate, row.difference.interval), (Some(1.0), Some([1.0; 2])));
        assert_eq!(row.p_value, Some(2.0 / (1.0 + PLAN.replicates as f64)));
    }
}

#[test]
fn a_difference_is_that_of_the_c_indices_and_turns_with_the_runs() {
    let (a, b) = (patients(|i| (i * 0.37).sin() - 0.04 * i), patients(|i| (i * 1.7).cos() - 0.01 * i));
    let (forth, back) = (compare(&a, &b).unwrap(), compare(&b, &a).unwrap());
    for (forth, back) in forth.rows.iter().zip(&back.rows) {
        let difference = forth.difference.estimate.unwrap();
        approx::assert_abs_diff_eq!(difference, forth.a.estimate.unwrap() - forth.b.estimate.unwrap(), epsilon = 1e-15);
        let ([lower, upper], [low, high]) = (forth.difference.interval.unwrap(), back.difference.interval.unwrap());
        approx::assert_abs_diff_eq!(lower, -high, epsilon = 1e-12);
        approx::assert_abs_diff_eq!(upper, -low, epsilon = 1e-12);
        assert!(lower < difference && difference < upper && forth.p_value == back.p_value);
    }
    let of = |name: &str| row(&forth, name).difference.estimate.unwrap();
    approx::assert_abs_diff_eq!(of("mean of folds"), 0.5 * (of("fold 0") + of("fold 1")), epsilon = 1e-12);
    let rows: Vec<super::Row> = a
        .iter()
        .map(|p| super::Row { slide: String::new(), fold: p.fold, time: p.time, event: p.event, risk: p.risk })
        .collect();
    let pooled = super::concordance(&rows.iter().collect::<Vec<_>>());
    approx::assert_abs_diff_eq!(row(&forth, "pooled").a.estimate.unwrap(), pooled, epsilon = 1e-12);
}

#[test]
fn only_patients_in_common_count_and_other_folds_leave_the_pool() {
    let (a, mut b) = (patients(|i| -i), patients(|i| (i * 0.9).sin()));
    b.retain(|p| p.time > 10.0);
    let part = compare(&a[..50], &b).unwrap();
    assert_eq!((part.patients, part.only_a, part.only_b), (40, 10, 10));
    let same = compare(&a, &a).unwrap();
    assert!(same.notes[0].starts_with("Both predicted the same risks"), "{:?}", same.notes);
    assert!(part.notes[0].contains("10 patients of A alone and 10 of B alone"), "{:?}", part.notes);
    b[3].fold = 1 - b[3].fold;
    let comparison = compare(&a, &b).unwrap();
    assert_eq!(comparison.rows.len(), 1);
    assert!(comparison.notes[1].contains("split the patients into folds differently"), "{:?}", comparison.notes);
    assert!(comparison.table().contains("pooled"));
}

#[test]
fn what_cannot_be_compared_is_said() {
    let (a, mut b) = (patients(|i| -i), patients(|i| -i));
    b[7].event = !b[7].event;
    let error = compare(&a, &b).unwrap_err().to_string();
    for part in ["different cohorts", "runs/a", "CASE-07", "8 months, event", "8 months, censored"] {
        assert!(error.contains(part), "{error}");
    }
    b.iter_mut().for_each(|p| p.case_id.push('x'));
    let error = compare(&a, &b).unwrap_err().to_string();
    assert!(error.contains("no patient in common"), "{error}");
    let twice = [a.clone(), a.iter().map(|p| SlideResult { fold: 1 - p.fold, ..p.clone() }).collect()].concat();
    let error = compare(&a, &twice).unwrap_err().to_string();
    assert!(error.contains("runs/b: validates patient CASE-00 in the folds 0 and 1"), "{error}");
}

/// A folder that holds an evaluation's predictions alone, as one of a checkpoint does.
fn evaluation(name: &str, patients: &[SlideResult]) -> PathBuf {
    let folder = folder(name);
    std::fs::write(folder.join("predictions.csv"), predictions_csv(patients).unwrap()).unwrap();
    folder
}

#[test]
fn the_program_compares_runs_and_leaves_plot_and_numbers() {
    evaluated();
    let (run, _) = trained();
    let mut other = read_predictions(&run.join("predictions.csv")).unwrap();
    other.iter_mut().for_each(|p| p.risk = -p.risk);
    let other = evaluation("compare other", &other);
    let at = folder("compare");
    let path = |path: &Path| path.to_str().unwrap().to_string();
    let arguments = ["compare", &path(run), &path(&other), "--out", "c", "--bootstrap", "50", "--seed", "3"];
    let out = cf_eval(&arguments, &at);
    assert!(out.status.success(), "{out:?}");
    let printed = String::from_utf8(out.stdout).unwrap();
    for part in ["150 patients in both", "mean of folds", "pooled", "50 bootstrap cohorts (seed 3)"] {
        assert!(printed.contains(part), "{printed}");
    }
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(at.join("c/compare.json")).unwrap()).unwrap();
    let pooled = &json["rows"][3];
    let number = |value: &serde_json::Value| value.as_f64().unwrap();
    // the reversed risks have the reversed order
    approx::assert_abs_diff_eq!(
        number(&pooled["a"]["estimate"]) + number(&pooled["b"]["estimate"]),
        1.0,
        epsilon = 1e-12
    );
    assert!(printed.contains(&format!("{:+.4}", number(&pooled["difference"]["estimate"]))), "{printed}");
    let table = std::fs::read_to_string(at.join("c/figures/compare.csv")).unwrap();
    assert!(table.lines().count() == 5 && !table.contains("NaN"), "{table}");
    for file in ["compare.svg", "compare.png"] {
        assert!(at.join("c/figures").join(file).is_file(), "{file}");
    }
}

#[test]
fn an_unfinished_run_is_not_compared() {
    evaluated();
    let (run, _) = trained();
    let (unfinished, _) = super::copy_of_trained("compare unfinished");
    let at = folder("compare errors");
    let refused = |b: &Path| compare_runs(run, b, &at.join("out"), PLAN).unwrap_err().to_string();
    let error = refused(&unfinished);
    assert!(error.contains("is not finished, fold 1 of 2") && error.contains("cf-train --resume '"), "{error}");
    assert!(refused(&at).contains("is neither a run nor an evaluation"));
    let broken = evaluation("compare broken", &patients(|i| -i));
    std::fs::write(broken.join("predictions.csv"), "case_id,slide_id,fold,time,event,risk\nA,B,0,1,1,x\n").unwrap();
    let error = refused(&broken);
    assert!(error.contains("row 2, column `risk`: `x`, expected a number"), "{error}");
    assert!(!at.join("out").exists(), "nothing is left behind");
    let out = cf_eval(&["compare", "one"], &at);
    assert_eq!(out.status.code(), Some(2));
}

/// A digit changed by hand after the evaluation, in a copy of the evaluated run.
#[test]
fn predictions_are_those_of_the_evaluation() {
    evaluated();
    let (run, _) = trained();
    let edited = folder("compare edited");
    for name in ["predictions.csv", "summary.json"] {
        std::fs::copy(run.join(name), edited.join(name)).unwrap();
    }
    let compare = || compare_runs(run, &edited, &edited.join("out"), PLAN);
    assert_eq!(compare().unwrap().rows[0].difference.estimate, Some(0.0));
    let path = edited.join("predictions.csv");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen(",-0.", ",-0.1", 1).replacen(",-1.", ",-1.1", 1)).unwrap();
    assert_ne!(std::fs::read_to_string(&path).unwrap(), text);
    let error = compare().unwrap_err().to_string();
    assert!(error.contains("predictions.csv: has changed since the evaluation wrote it"), "{error}");
    std::fs::remove_file(edited.join("summary.json")).unwrap();
    let of_b = || {
        let warnings = compare().unwrap().warnings.into_iter();
        warnings.filter(|warning| warning.starts_with("B: ")).collect::<Vec<_>>()
    };
    let warnings = of_b();
    assert!(warnings.len() == 1 && warnings[0].starts_with("B: There is no summary.json"), "{warnings:?}");
    let last = text.lines().next_back().unwrap();
    std::fs::write(&path, format!("{text}{last}\n")).unwrap();
    let error = compare().unwrap_err().to_string();
    assert!(error.contains("column `slide_id`: `DEMO-") && error.contains("of the same fold already"), "{error}");

    // what an evaluation warned of is said again
    std::fs::write(&path, &text).unwrap();
    std::fs::write(edited.join("summary.json"), r#"{"warnings": ["The model was trained on these slides."]}"#).unwrap();
    assert_eq!(of_b(), ["B: The model was trained on these slides."]);
}

/// Of a handful of patients, whose resampled C-indices are 0 and 1 often.
#[test]
fn intervals_stay_where_the_statistic_can_be() {
    for seed in 0..6 {
        let wave = |factor: f64| patients(move |i| (i * factor + f64::from(seed)).sin());
        let comparison = compare(&wave(1.3)[..9], &wave(2.9)[..9]).unwrap();
        for row in &comparison.rows {
            for (estimate, low) in [(&row.a, 0.0), (&row.b, 0.0), (&row.difference, -1.0)] {
                let ends = estimate.interval.into_iter().flatten().chain(estimate.estimate);
                assert!(ends.clone().count() > 0, "{row:?}");
                ends.for_each(|end| assert!((low..=1.0).contains(&end), "{row:?}"));
            }
        }
    }
}
