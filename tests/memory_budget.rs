//! `cf-train --memory-budget`: the same training in less memory, refusals before anything is
//! written, files that fail in mid-run.
#![cfg(feature = "programs")]

use std::{
    path::Path,
    process::{Command, Output},
};

use crossfusion::{
    data::{demo, features::FeatureFile, torch::write_pt},
    folder::EpochMetrics,
};

/// `cf-train` on the demo's cohort in `folder`.
fn cf_train(folder: &Path, arguments: &[&str]) -> Output {
    let cohort = ["--clinical", "demo_cohort.csv", "--splits", "splits", "--pt-dir", "features"];
    let model = ["--backbone", "synthetic", "--folds", "1", "--embed-dim", "16", "--num-heads", "2"];
    let training = ["--num-epochs", "2", "--warmup-epochs", "0", "--learning-rate", "1e-3", "--threads", "2"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_cf-train"));
    command.args(cohort).args(model).args(training).args(arguments).current_dir(folder).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!text.contains("panicked"), "{text}");
    text
}

fn close(a: &[EpochMetrics], b: &[EpochMetrics]) {
    assert_eq!((a.len(), b.len()), (2, 2));
    for (a, b) in a.iter().zip(b) {
        for (a, b) in [(a.train_loss, b.train_loss), (a.val_loss, b.val_loss)] {
            assert!((a - b).abs() <= 1e-4 * b.abs(), "{a} {b}"); // 1e-6 a step, and Adam between
        }
    }
}

#[test]
fn a_small_budget_trains_the_same() {
    let folder = tempfile::tempdir().unwrap();
    demo::write_demo(folder.path(), 3).unwrap();
    let folder = folder.path();

    let refused = stderr(&cf_train(folder, &["--memory-budget", "1MB", "--out", "refused"]), 2);
    assert!(refused.contains("slide DEMO-007-A.svs: 225, 900 and 3600 patches of 64 features"), "{refused}");
    assert!(!folder.join("refused").exists());
    let least = refused.split("the least is ").nth(1).unwrap().trim();
    let refused = stderr(&cf_train(folder, &["--memory-budget", "plenty"]), 2);
    assert!(refused.contains("--memory-budget"), "{refused}");

    stdout(&cf_train(folder, &["--out", "whole"]));
    let said = stdout(&cf_train(folder, &["--memory-budget", least, "--out", "small"]));
    assert!(said.contains("recompute layers") && said.contains("stream bags"), "{said}");
    let [whole, small] =
        ["whole", "small"].map(|run| crossfusion::folder::read_metrics(&folder.join(run), 0..2).unwrap());
    close(&small, &whole);

    // evaluation takes the run's budget, or its own
    let mut eval = Command::new(env!("CARGO_BIN_EXE_cf-eval"));
    let output = eval.args(["small", "--memory-budget", "1MB"]).current_dir(folder).output().unwrap();
    assert!(stderr(&output, 2).contains("--memory-budget: slide "));

    // Cox goes through each slide twice
    let cox = ["--loss-fn", "cox_surv", "--cox-batch", "20"];
    stdout(&cf_train(folder, &[&cox[..], &["--out", "cox"]].concat()));
    stdout(&cf_train(folder, &[&cox[..], &["--memory-budget", least, "--out", "small cox"]].concat()));
    let [whole, small] =
        ["cox", "small cox"].map(|run| crossfusion::folder::read_metrics(&folder.join(run), 0..2).unwrap());
    close(&small, &whole);
}

/// A slide whose file breaks while it is streamed: the run stops with the file's name, and goes on
/// once the file is back.
#[test]
fn a_run_whose_stream_fails_can_be_resumed() {
    let folder = tempfile::tempdir().unwrap();
    demo::write_demo(folder.path(), 3).unwrap();
    let folder = folder.path();
    let refused = stderr(&cf_train(folder, &["--memory-budget", "1MB"]), 2);
    let least = refused.split("the least is ").nth(1).unwrap().trim().to_string();
    // with Cox every slide is seen in every epoch
    let budget = ["--loss-fn", "cox_surv", "--memory-budget", least.as_str(), "--out"];
    stdout(&cf_train(folder, &[&budget[..], &["whole"]].concat()));

    // the header still says what it said: only a number is not one
    let path = folder.join("features/synthetic/x20/pt_files/DEMO-007-A.pt");
    let good = std::fs::read(&path).unwrap();
    let mut values = FeatureFile::open(&path).unwrap().read().unwrap();
    let middle = values.nrows() / 2;
    values[(middle, 5)] = f32::NAN;
    write_pt(&path, values.view()).unwrap();
    let error = stderr(&cf_train(folder, &[&budget[..], &["broken"]].concat()), 1);
    assert!(error.contains("DEMO-007-A.pt: patch ") && error.contains("expected a finite number"), "{error}");

    // other bytes than the file's own checksum is of
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    std::fs::write(&path, bad).unwrap();
    let error = stderr(&cf_train(folder, &[&budget[..], &["damaged"]].concat()), 1);
    assert!(error.contains("DEMO-007-A.pt: is damaged: its member"), "{error}");

    std::fs::write(&path, good).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_cf-train")).args(["--resume", "broken"]).current_dir(folder).output();
    stdout(&output.unwrap());
    let strip = |m: EpochMetrics| EpochMetrics { seconds: 0.0, patches_per_second: 0.0, ..m };
    let [whole, broken] = ["whole", "broken"].map(|run| {
        crossfusion::folder::read_metrics(&folder.join(run), 0..2).unwrap().into_iter().map(strip).collect::<Vec<_>>()
    });
    assert_eq!(whole, broken);
}
