//! What cf-train takes, refuses, shows and prints.

use super::*;

/// Runs without --out get folders of their own, and no demo overwrites another run.
#[test]
fn runs_do_not_share_folders() {
    let folder = tempfile::tempdir().unwrap();
    let settings = write_config(folder.path(), &RunConfig { num_epochs: 1, ..config() });
    let run = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cf-train"));
        command.args(["--config", settings.to_str().unwrap()]).current_dir(folder.path());
        command.stdout(std::process::Stdio::null()).spawn().unwrap()
    };
    let mut children = [run(), run()]; // at the same time
    assert!(children.iter_mut().all(|child| child.wait().unwrap().success()));
    let best = |run: &str| std::fs::read(folder.path().join("runs").join(run).join("fold_0/best.safetensors")).unwrap();
    assert!(best("synthetic-1") == best("synthetic-2"), "the same settings gave two results");

    let out = cf_train(&["--demo", "--out", "runs/synthetic-1"], folder.path());
    assert_eq!(out.status.code(), Some(2));
    assert!(!folder.path().join("runs/synthetic-1/cohort").exists(), "a refused demo wrote its cohort");

    let held = std::fs::File::create(folder.path().join("runs/synthetic-2/fold_0/.lock")).unwrap();
    held.lock().unwrap();
    std::fs::remove_file(folder.path().join("runs/synthetic-2/report.html")).unwrap();
    let out = cf_train(&["--resume", "runs/synthetic-2"], folder.path());
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("another cf-train is at work"), "{out:?}");
}

#[test]
fn flags_override_the_file_and_the_file_the_defaults() {
    let folder = tempfile::tempdir().unwrap();
    let settings = write_config(folder.path(), &RunConfig { num_epochs: 1, seed: 5, ..config() });
    let out = cf_train(&["--config", settings.to_str().unwrap(), "--seed", "6", "--out", "run"], folder.path());
    assert!(out.status.success(), "{out:?}");
    let resolved = RunConfig::read(&crossfusion::folder::config_path(&folder.path().join("run"))).unwrap();
    assert_eq!((resolved.num_epochs, resolved.seed, resolved.es_patience), (1, 6, 20));
    // and it is refused to write there again
    let out = cf_train(&["--config", settings.to_str().unwrap(), "--out", "run"], folder.path());
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("is not empty"), "{out:?}");
}

#[test]
fn wrong_input_is_refused_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let good = write_config(folder.path(), &config());
    let good = good.to_str().unwrap();
    std::fs::write(folder.path().join("typo.toml"), "learning_rat = 1\n").unwrap();
    std::fs::write(folder.path().join("broken.toml"), "learning_rate = \n").unwrap();
    std::fs::write(folder.path().join("type.toml"), "# of µ\nseed = \"a\"\n").unwrap();
    std::fs::create_dir_all(folder.path().join("splits")).unwrap();
    std::fs::write(folder.path().join("splits/splits_0.csv"), ",train,val\n0,DEMO-000,NOBODY\n").unwrap();
    for (arguments, code, expected) in [
        (vec![], 2, "missing --clinical, --splits, --pt-dir, --backbone"),
        (vec!["--config", good, "--learning-rate=-1"], 2, "--learning-rate -1: expected a number from 0 to 1"),
        (vec!["--config", good, "--loss-fn", "mse"], 2, "possible values: nll_surv, ce_surv"),
        (
            vec!["--config", good, "--embed-dim", "30", "--num-heads", "4"],
            2,
            "expected an even width that the heads divide",
        ),
        (vec!["--config", good, "--threads", "100000"], 2, "100000 threads: expected at most 1024"),
        (vec!["--config", good, "--device", "tpu"], 2, "expected auto, cpu or cuda"),
        (vec!["--config", good, "--device", "cuda"], 1, "--device cuda: "),
        (vec!["--config", "typo.toml"], 2, "typo.toml: line 1, `learning_rat = 1`: unknown field `learning_rat`"),
        (vec!["--config", "broken.toml"], 2, "broken.toml: line 1, `learning_rate =`: "),
        (vec!["--config", "type.toml"], 2, "type.toml: line 2, `seed = \"a\"`: invalid type"),
        (vec!["--config", "missing.toml"], 2, "missing.toml: cannot be read"),
        (vec!["--config", "/dev/zero"], 2, "/dev/zero: is larger than 1.0 MiB, the most that is read"),
        (vec!["--config", good, "--clinical", "no.csv"], 1, "no.csv: cannot be read"),
        (vec!["--config", good, "--backbone", "resnet"], 1, "is not a folder"),
        (vec!["--config", good, "--splits", "splits"], 1, "row 2, column `val`: case `NOBODY`"),
        (vec!["--config", good, "--es-patience", "0"], 2, "--es-patience 0: expected at least 1"),
        (vec!["--config", good, "--backbone-dim", "65"], 2, "the features of synthetic have width 64"),
        (vec!["--config", good, "--folds", "9"], 2, "--folds 9: "),
        (vec!["--config", good, "--eta-min", "0.5"], 2, "--eta-min 0.5: expected at most --learning-rate 0.001"),
        (vec!["--config", good, "--num-epochs", "5", "--warmup-epochs", "5"], 2, "--num-epochs 5: the first 5 epochs"),
        (vec!["--config", good, "--ffn-dropout", "1"], 2, "--ffn-dropout 1: expected a rate from 0 to 0.95"),
        (vec!["--config", good, "--embed-dim", "0"], 2, "--embed-dim 0: expected at least 1"),
        (vec!["--config", good, "--embed-dim", "512"], 2, "--num-heads 2: expected heads of at most 128 columns"),
        (vec!["--config", good, "--grad-accum-steps", "87"], 2, "fold 0 trains on 86 slides, so that no epoch would"),
        (vec!["--demo", "--clinical", "a.csv"], 2, "--demo and --clinical: the demo writes a cohort of its own"),
        (vec!["--demo", "--pt-dir", "x"], 2, "--demo and --pt-dir: "),
        (vec!["--resume", "nowhere"], 2, "is not a run folder"),
        (vec!["--resume", "nowhere", "--demo"], 2, "cannot be used with"),
    ] {
        let out = cf_train(&[arguments.as_slice(), &[]].concat(), folder.path());
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(expected), "{arguments:?}: {stderr}\nexpected: {expected}");
        assert!(!stderr.contains("panicked"), "{arguments:?}: {stderr}");
    }
    assert!(!folder.path().join("runs").exists(), "a refused run left a folder");
}

/// The published rule updates after every n-th slide of an epoch: a smaller fold would never
/// update.
#[test]
fn a_fold_that_would_never_update_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let settings = write_config(folder.path(), &RunConfig { grad_accum_steps: 80, ..config() });
    let settings = settings.to_str().unwrap();
    let nested = ["--config", settings, "--protocol", "nested", "--out", "run"];
    let out = cf_train(&nested, folder.path());
    // 60 of 75 training patients are left to train on, with their second slides
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("--grad-accum-steps 80: fold 0 trains on 7"), "{stderr}");
    assert!(!folder.path().join("run").exists());
    let out = cf_train(&["--config", settings, "--num-epochs", "1", "--out", "run"], folder.path());
    assert!(out.status.success(), "{out:?}");
    let stdout = String::from_utf8_lossy(&out.stdout);
    assert!(stdout.contains("fold 0: 86 slides to train, 1 update an epoch; 86 to validate"), "{stdout}");
}

/// Where no two validation slides can be compared, no epoch can be chosen, which is said before
/// training.
#[test]
fn slides_that_cannot_choose_an_epoch_are_told_before_training() {
    let folder = tempfile::tempdir().unwrap();
    let splits = folder.path().join("splits");
    std::fs::create_dir_all(&splits).unwrap();
    // one slide alone on the validation side
    let train: String = (1..150).map(|patient| format!(",DEMO-{patient:03},\n")).collect();
    std::fs::write(
        splits.join("splits_0.csv"),
        format!(",train,val\n,DEMO-002,DEMO-001\n{}", train.replace(",DEMO-001,\n,DEMO-002,\n", "")),
    )
    .unwrap();
    let settings = write_config(folder.path(), &RunConfig { splits, num_epochs: 1, ..config() });
    let out = cf_train(&["--config", settings.to_str().unwrap(), "--out", "run"], folder.path());
    let stdout = String::from_utf8_lossy(&out.stdout);
    assert!(stdout.contains("no two of those that choose the epoch can be compared"), "{out:?}");
}

/// No line is wider than a terminal of 80 columns, but for those that name paths.
#[test]
fn what_a_run_shows_fits_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let settings = write_config(folder.path(), &RunConfig { num_epochs: 2, folds: Some(2), ..config() });
    let out = cf_train(&["--config", settings.to_str().unwrap(), "--out", "run"], folder.path());
    let stdout = String::from_utf8(out.stdout).unwrap();
    let training: Vec<&str> = stdout.lines().take_while(|line| !line.contains("- slides -")).collect();
    let rows = training.iter().filter(|line| line.contains("/2  ")).count();
    assert_eq!(rows, 4, "{stdout}");
    assert!(training.iter().all(|line| line.chars().count() <= 80), "{stdout}");
    assert!(training.iter().any(|line| line.contains("run left")) && stdout.contains("* the best"), "{stdout}");
}

/// A file's control characters are shown and do not reach the terminal.
#[test]
fn what_is_quoted_from_a_file_is_escaped() {
    let folder = tempfile::tempdir().unwrap();
    let settings = write_config(folder.path(), &config());
    std::fs::write(folder.path().join("title.csv"), "a\u{1b}]0;owned\u{7},b\n1,2\n").unwrap();
    let arguments = ["--config", settings.to_str().unwrap(), "--clinical", "title.csv"];
    let out = cf_train(&arguments, folder.path());
    assert_eq!(out.status.code(), Some(1));
    assert!(!out.stderr.contains(&0x1b) && !out.stderr.contains(&7), "{out:?}");
}

/// TensorBoard's own reader on the files that it is written for; a resumed run goes on in them.
#[test]
fn tensorboard_reads_its_event_files() {
    let python = std::env::var("CROSSFUSION_PYTHON").unwrap_or_else(|_| "python3".into());
    let has = Command::new(&python).args(["-c", "import tensorboard"]).output();
    if !has.is_ok_and(|out| out.status.success()) {
        eprintln!("SKIPPED tensorboard_reads_its_event_files: {python} has no tensorboard; set CROSSFUSION_PYTHON");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let settings = write_config(folder.path(), &RunConfig { num_epochs: 2, folds: Some(2), ..config() });
    let arguments = ["--config", settings.to_str().unwrap(), "--out", "run", "--tensorboard"];
    assert!(cf_train(&arguments, folder.path()).status.success());
    let run = folder.path().join("run");
    let script = "
import sys, json
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
out = {}
for fold in (0, 1):
    events = EventAccumulator(f'{sys.argv[1]}/tensorboard/fold_{fold}').Reload()
    out[fold] = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()['scalars']}
print(json.dumps(out))";
    let read = Command::new(&python).args(["-c", script, run.to_str().unwrap()]).output().unwrap();
    let read: serde_json::Value = serde_json::from_slice(&read.stdout).unwrap_or_else(|e| panic!("{e}: {read:?}"));
    for metrics in crossfusion::folder::read_metrics(&run, 0..2).unwrap() {
        let scalar = |tag: &str| {
            let point = &read[metrics.fold.to_string()][tag][metrics.epoch];
            assert_eq!(point[0].as_u64(), Some(metrics.epoch as u64 + 1), "{tag}: {point}");
            point[1].as_f64().unwrap()
        };
        for (tag, expected) in [
            ("loss/train", metrics.train_loss),
            ("loss/validation", metrics.val_loss),
            ("c_index/train", metrics.train_c_index.unwrap()),
            ("c_index/validation", metrics.val_c_index.unwrap()),
            ("learning_rate", metrics.learning_rate),
        ] {
            assert_eq!(scalar(tag) as f32, expected as f32, "{tag} of {metrics:?}");
        }
    }
}

/// The programs print what `--help` says that they print.
#[test]
fn completions_and_manual_pages_are_printed() {
    for (program, path) in [
        ("cf-train", env!("CARGO_BIN_EXE_cf-train")),
        ("cf-eval", env!("CARGO_BIN_EXE_cf-eval")),
        ("cf-bench", env!("CARGO_BIN_EXE_cf-bench")),
    ] {
        let print = |arguments: &[&str]| {
            let out = Command::new(path).args(arguments).output().unwrap();
            assert!(out.status.success(), "{program} {arguments:?}: {out:?}");
            String::from_utf8(out.stdout).unwrap()
        };
        assert!(print(&["--completions", "bash"]).contains(&format!("-o default {program}\n")), "{program}");
        let page = print(&["--man"]);
        assert!(page.contains(&format!(".TH {program}")) && page.contains(".SH SYNOPSIS\n.nf\n"), "{program}");
        // what cannot be written is an error; a pipe that is closed is not
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let out = Command::new(path).arg("--man").stdout(full).output().unwrap();
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(
            out.status.code() == Some(1) && said.contains("standard output: cannot be written"),
            "{program}: {said}"
        );
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert!(Command::new(path).arg("--man").stdout(writer).status().unwrap().success(), "{program}");
        assert!(print(&["--help"]).contains("--completions <SHELL>"), "{program}");
    }
}

/// A cohort is read to its last value before training: what is wrong is listed, and left out by
/// name if that is asked for.
#[test]
fn a_check_lists_what_is_wrong_and_skip_bad_leaves_it_out() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    copy(cohort(), &data);
    let config = RunConfig {
        clinical: data.join("demo_cohort.csv"),
        splits: data.join("splits"),
        pt_dir: data.join("features"),
        num_epochs: 1,
        ..config()
    };
    let settings = write_config(folder.path(), &config);
    let settings = settings.to_str().unwrap();
    let out = cf_train(&["--config", settings, "--check"], folder.path());
    let stdout = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{out:?}");
    assert!(stdout.contains("172 slides, 516 feature files") && stdout.contains("nothing is wrong"), "{stdout}");

    let bag = |x: &str, name: &str| data.join(format!("features/synthetic/{x}/pt_files/{name}.pt"));
    let mut values = ndarray::Array2::from_elem((50, 64), 0.5f32);
    values[(49, 3)] = f32::INFINITY;
    write_pt(&bag("x10", "DEMO-004-A"), values.view()).unwrap();
    write_pt(&bag("x20", "DEMO-009-A"), ndarray::Array2::zeros((5, 8)).view()).unwrap();
    let cut = std::fs::read(bag("x5", "DEMO-011-A")).unwrap();
    std::fs::write(bag("x5", "DEMO-011-A"), &cut[..cut.len() / 2]).unwrap();
    // what has a feature file's name and is none
    std::fs::remove_file(bag("x20", "DEMO-011-A")).unwrap();
    std::os::unix::fs::symlink("/nowhere", bag("x20", "DEMO-011-A")).unwrap();
    std::fs::remove_file(bag("x20", "DEMO-004-A")).unwrap();
    std::fs::create_dir(bag("x20", "DEMO-004-A")).unwrap();
    let out = cf_train(&["--config", settings, "--check"], folder.path());
    let stdout = String::from_utf8_lossy(&out.stdout);
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    assert!(stdout.contains("DEMO-004-A.pt  is a folder, expected a file"), "{stdout}");
    assert!(stdout.contains("DEMO-011-A.pt  cannot be read: No such file"), "{stdout}");
    for part in ["patch 49, feature 3 is inf", "width 8, expected 64", "x5/pt_files/DEMO-011-A.pt", "3 slides cannot"] {
        assert!(stdout.contains(part), "{stdout}");
    }
    assert!(!folder.path().join("runs").exists());

    // a slide without a file is said, and not counted among what was read
    let gone = bag("x10", "DEMO-013-A");
    std::fs::rename(&gone, folder.path().join("gone.pt")).unwrap();
    let stdout = cf_train(&["--config", settings, "--check"], folder.path()).stdout;
    let stdout = String::from_utf8_lossy(&stdout);
    assert!(
        stdout.contains("171 slides, 513 feature files") && stdout.contains("1 of 172 slides left out"),
        "{stdout}"
    );
    std::fs::rename(folder.path().join("gone.pt"), &gone).unwrap();

    let out = cf_train(&["--config", settings, "--skip-bad", "--out", "run"], folder.path());
    assert!(out.status.success(), "{out:?}");
    let run = folder.path().join("run");
    let resolved = RunConfig::read(&crossfusion::folder::config_path(&run)).unwrap();
    assert_eq!(resolved.skip_slides, ["DEMO-004-A.svs", "DEMO-009-A.svs", "DEMO-011-A.svs"]);
    let left_out = std::fs::read_to_string(run.join("left_out.csv")).unwrap();
    assert!(left_out.contains("DEMO-004-A.svs") && left_out.contains("feature 3 is inf"), "{left_out}");
    let predictions = std::fs::read_to_string(run.join("predictions.csv")).unwrap();
    assert!(!predictions.contains("DEMO-004-A") && predictions.contains("DEMO-002-A"), "{predictions}");
}
