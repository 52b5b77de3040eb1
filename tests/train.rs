//! Runs of `cf-train`: stopped and resumed they give the same bits as uninterrupted ones, with any number of threads; wrong input is refused in a
//! sentence.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
    time::{Duration, Instant},
};

use crossfusion::{
    Result,
    data::{
        dataset::Dataset,
        demo,
        labels::Bins,
        torch::{StateDict, read_state_dict},
    },
    train::{
        config::RunConfig,
        fold::{FoldTrainer, Observer, Outcome, SlideDone},
        run,
    },
};

/// The demo's cohort, written once.
fn cohort() -> &'static Path {
    static COHORT: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = COHORT.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        demo::write_demo(folder.path(), 3).unwrap();
        folder
    });
    folder.path()
}

fn config() -> RunConfig {
    let table: RunConfig = RunConfig {
        clinical: cohort().join("demo_cohort.csv"),
        splits: cohort().join("splits"),
        pt_dir: cohort().join("features"),
        backbone: "synthetic".into(),
        folds: 1,
        embed_dim: 16,
        num_heads: 2,
        num_epochs: 3,
        warmup_epochs: 0,
        // no divisor of the epoch's slides: gradients are left over at its end
        grad_accum_steps: 7,
        learning_rate: 1e-3,
        threads: 2,
        ..RunConfig::default()
    };
    table
}

/// Stops at each of these training slides, counted from the start of the run.
struct StopAt {
    stops: Vec<usize>,
    seen: usize,
}

impl Observer for StopAt {
    fn slide(&mut self, done: &SlideDone) -> ControlFlow<()> {
        self.seen += usize::from(!done.validating);
        if self.stops.contains(&self.seen) && !done.validating {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}

/// Trains fold 0 in a new folder, dropping and re-opening everything at each stop; returns its best model's and last checkpoint's parts.
fn train(config: &RunConfig, stops: &[usize]) -> (StateDict, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let dataset = Dataset::open(&config.source()).unwrap();
    let bins = Bins::cut(&dataset.slides, config.n_classes).unwrap();
    let fold = dataset.fold(&config.splits, 0).unwrap();
    let mut observer = StopAt { stops: stops.to_vec(), seen: 0 };
    for stop in 0..=stops.len() {
        let mut trainer = FoldTrainer::new(config, &dataset, &bins, (0, &fold), folder.path()).unwrap();
        let outcome = trainer.run(&mut observer).unwrap();
        assert_eq!(outcome == Outcome::Stopped, stop < stops.len());
    }
    let checkpoint = std::fs::read(FoldTrainer::checkpoint_path(folder.path())).unwrap();
    (read_state_dict(&FoldTrainer::best_path(folder.path())).unwrap(), checkpoint)
}

#[test]
fn a_stopped_run_goes_on_bit_by_bit() {
    let config = config();
    let whole = train(&config, &[]);
    let slides = Dataset::open(&config.source()).unwrap().fold(&config.splits, 0).unwrap().train.len();
    // at the first slide, in the middle, one before an epoch's end, at its end, just after it
    let stopped = train(&config, &[1, slides / 2, slides - 1, slides, slides + 1, 2 * slides + 5]);
    assert!(whole == stopped, "the resumed run differs");
}

#[test]
fn threads_change_nothing() {
    let config = RunConfig { num_epochs: 2, ..config() };
    let one = train(&RunConfig { threads: 1, ..config.clone() }, &[]);
    let three = train(&RunConfig { threads: 3, ..config }, &[]);
    assert!(one == three, "three threads differ from one");
}

#[test]
fn seeds_change_the_result() {
    let config = RunConfig { num_epochs: 1, ..config() };
    assert!(train(&config, &[]) != train(&RunConfig { seed: 8, ..config }, &[]));
}

fn cf_train(arguments: &[&str], folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cf-train")).args(arguments).current_dir(folder).output().unwrap()
}

/// A run's settings as a file.
fn write_config(folder: &Path, config: &RunConfig) -> PathBuf {
    let path = folder.join("settings.toml");
    std::fs::write(&path, config.to_toml().unwrap()).unwrap();
    path
}

/// Metrics but for the clock.
fn metrics(run: &Path) -> Result<Vec<String>> {
    let strip = |m: crossfusion::train::fold::EpochMetrics| {
        format!("{:?}", crossfusion::train::fold::EpochMetrics { seconds: 0.0, patches_per_second: 0.0, ..m })
    };
    Ok(run::read_metrics(run)?.into_iter().map(strip).collect())
}

#[cfg(unix)]
#[test]
fn a_killed_run_goes_on_bit_by_bit() {
    let folder = tempfile::tempdir().unwrap();
    let settings = write_config(folder.path(), &RunConfig { folds: 2, ..config() });
    let settings = settings.to_str().unwrap();
    let start = Instant::now();
    assert!(cf_train(&["--config", settings, "--out", "whole"], folder.path()).status.success());
    let took = start.elapsed();
    // killed at several moments of what an uninterrupted run takes, then resumed to the end
    let spawn = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_cf-train")).args(arguments).current_dir(folder.path()).spawn()
    };
    let mut child = spawn(&["--config", settings, "--out", "killed"]).unwrap();
    for _ in 0..4 {
        std::thread::sleep(took / 5 + Duration::from_millis(20));
        let _ = child.kill();
        child.wait().unwrap();
        child = spawn(&["--resume", "killed"]).unwrap();
    }
    assert!(child.wait().unwrap().success());
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    for fold in 0..2 {
        let best = |run: &Path| std::fs::read(FoldTrainer::best_path(&run::fold_folder(run, fold))).unwrap();
        assert!(best(&whole) == best(&killed), "fold {fold}: the best models differ");
    }
    assert_eq!(metrics(&whole).unwrap(), metrics(&killed).unwrap());
    let again = cf_train(&["--resume", "killed"], folder.path());
    assert!(again.status.success(), "a finished run can be resumed: {again:?}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_says_how_to_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let settings = write_config(folder.path(), &RunConfig { num_epochs: 10_000, es_patience: 10_000, ..config() });
    let mut command = Command::new(env!("CARGO_BIN_EXE_cf-train"));
    command.args(["--config", settings.to_str().unwrap(), "--out", "run"]).current_dir(folder.path());
    let child = command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let run = folder.path().join("run");
    let start = Instant::now();
    while run::read_metrics(&run).unwrap().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(120), "no epoch in two minutes");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(130));
    assert!(String::from_utf8_lossy(&out.stderr).contains("cf-train --resume run"), "{out:?}");
    assert!(FoldTrainer::checkpoint_path(&run::fold_folder(&run, 0)).exists());
}

#[test]
fn flags_override_the_file_and_the_file_the_defaults() {
    let folder = tempfile::tempdir().unwrap();
    let settings = write_config(folder.path(), &RunConfig { num_epochs: 1, seed: 5, ..config() });
    let out = cf_train(&["--config", settings.to_str().unwrap(), "--seed", "6", "--out", "run"], folder.path());
    assert!(out.status.success(), "{out:?}");
    let resolved = RunConfig::read(&run::config_path(&folder.path().join("run"))).unwrap();
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
    std::fs::create_dir_all(folder.path().join("splits")).unwrap();
    std::fs::write(folder.path().join("splits/splits_0.csv"), ",train,val\n0,DEMO-000,NOBODY\n").unwrap();
    for (arguments, code, expected) in [
        (vec![], 2, "missing --clinical, --splits, --pt-dir, --backbone"),
        (vec!["--config", good, "--learning-rate=-1"], 2, "--learning-rate -1: expected a number from 0 to 1"),
        (vec!["--config", good, "--loss-fn", "mse"], 2, "possible values: nll_surv, ce_surv"),
        (vec!["--config", good, "--embed-dim", "30", "--num-heads", "4"], 2, "expected an even dim that heads divides"),
        (vec!["--config", good, "--device", "tpu"], 2, "expected auto or cpu"),
        (vec!["--config", good, "--device", "cuda"], 1, "no CUDA kernels"),
        (vec!["--config", "typo.toml"], 2, "unknown field `learning_rat`"),
        (vec!["--config", "broken.toml"], 2, "broken.toml"),
        (vec!["--config", "missing.toml"], 2, "missing.toml: cannot be read"),
        (vec!["--config", good, "--clinical", "no.csv"], 1, "no.csv: cannot be read"),
        (vec!["--config", good, "--backbone", "resnet"], 1, "is not a folder"),
        (vec!["--config", good, "--splits", "splits"], 1, "row 2, column `val`: case `NOBODY`"),
        (vec!["--config", good, "--backbone-dim", "65"], 2, "the features of synthetic have width 64"),
        (vec!["--config", good, "--folds", "9"], 1, "splits_2.csv: cannot be read"),
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
