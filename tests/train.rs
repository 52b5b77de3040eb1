//! Runs of `cf-train`: stopped and resumed they give the same bits as uninterrupted ones, with any
//! number of threads; wrong input is refused in a sentence.

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
        torch::{StateDict, read_state_dict, write_pt},
    },
    folder::{Best, EpochMetrics},
    model::Scale,
    train::{
        checkpoint::read_card,
        config::{Precision, RunConfig},
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

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (from, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if from.is_dir() {
            copy(&from, &to);
        } else {
            std::fs::copy(&from, &to).unwrap();
        }
    }
}

fn config() -> RunConfig {
    RunConfig {
        clinical: cohort().join("demo_cohort.csv"),
        splits: cohort().join("splits"),
        pt_dir: cohort().join("features"),
        backbone: "synthetic".into(),
        folds: Some(1),
        embed_dim: 16,
        num_heads: 2,
        num_epochs: 3,
        warmup_epochs: 0,
        // no divisor of the epoch's slides: gradients are left over at its end
        grad_accum_steps: 7,
        learning_rate: 1e-3,
        threads: 2,
        ..RunConfig::default()
    }
}

/// Stops at each of these slides (epoch, whether validating, position), once, and keeps the metrics
/// but for the clock.
struct StopAt {
    stops: Vec<(usize, bool, usize)>,
    metrics: Vec<EpochMetrics>,
}

impl Observer for StopAt {
    fn slide(&mut self, done: &SlideDone) -> ControlFlow<()> {
        let here = (done.epoch, done.validating, done.position);
        match self.stops.iter().position(|&stop| stop == here) {
            Some(i) => {
                self.stops.remove(i);
                ControlFlow::Break(())
            }
            None => ControlFlow::Continue(()),
        }
    }

    fn epoch(&mut self, metrics: &EpochMetrics, _: Option<Best>) -> Result<()> {
        self.metrics.push(EpochMetrics { seconds: 0.0, patches_per_second: 0.0, ..metrics.clone() });
        Ok(())
    }
}

/// All that fold 0 has come to: the metrics of the epochs done, the best model, and the checkpoint,
/// which holds weights, gradients left over, both moments and the progress.
#[derive(PartialEq)]
struct Trained {
    metrics: Vec<EpochMetrics>,
    best: StateDict,
    checkpoint: Vec<u8>,
}

/// Trains fold 0 in a new folder up to a slide in the middle of the last epoch, where a checkpoint
/// still holds everything; before that, drops and re-opens everything at each of `stops`.
fn train(config: &RunConfig, stops: &[(usize, bool, usize)]) -> Trained {
    train_some(config, usize::MAX, stops, 30)
}

/// [`train`] on the first `slides` of either side.
fn train_some(config: &RunConfig, slides: usize, stops: &[(usize, bool, usize)], end: usize) -> Trained {
    let folder = tempfile::tempdir().unwrap();
    let dataset = Dataset::open(&config.source()).unwrap();
    let bins = Bins::cut(&dataset.slides, config.n_classes).unwrap();
    let mut fold = dataset.fold(&config.splits, 0).unwrap();
    fold.train.truncate(slides);
    fold.val.truncate(slides);
    let end = (config.num_epochs - 1, false, end);
    let mut observer = StopAt { stops: [stops, &[end]].concat(), metrics: Vec::new() };
    while !observer.stops.is_empty() {
        let mut trainer = FoldTrainer::<f32>::new(config, &dataset, &bins, (0, &fold), folder.path()).unwrap();
        assert_eq!(trainer.run(&mut observer).unwrap(), Outcome::Stopped, "missed {:?}", observer.stops);
    }
    let checkpoint = std::fs::read(FoldTrainer::checkpoint_path(folder.path())).unwrap();
    let best = read_state_dict(&FoldTrainer::best_path(folder.path())).unwrap();
    Trained { metrics: observer.metrics, best, checkpoint }
}

#[test]
fn a_stopped_run_goes_on_bit_by_bit() {
    let config = config();
    let whole = train(&config, &[]);
    let fold = Dataset::open(&config.source()).unwrap().fold(&config.splits, 0).unwrap();
    let (last, validation) = (fold.train.len(), fold.val.len());
    // first slide, middle, one before training's end, its end, first and last of validation, the
    // next epoch's first
    let stops = [(0, 1), (0, last / 2), (0, last - 1), (0, last), (1, 1), (1, 2), (1, last), (2, 7), (2, 8)];
    let stops = stops.map(|(epoch, position)| (epoch, false, position));
    let stopped = train(&config, &[&stops[..], &[(0, true, 1), (0, true, validation), (1, true, 5)]].concat());
    assert_eq!(whole.metrics.len(), 2);
    assert_eq!(whole.metrics, stopped.metrics);
    assert!(whole.best == stopped.best, "the best models differ");
    assert!(whole.checkpoint == stopped.checkpoint, "the checkpoints differ");
}

/// Kernels run a slide behind the host. Stops and checkpoints still fall between slides, and the
/// losses are the CPU's.
#[cfg(feature = "emulator")]
#[test]
fn a_device_that_the_host_runs_ahead_of_goes_on_bit_by_bit() {
    let cpu = RunConfig { num_epochs: 2, grad_accum_steps: 3, ..config() };
    let config = RunConfig { device: "emulator".into(), checkpoint_every: 2, ..cpu.clone() };
    let whole = train_some(&config, 7, &[], 5);
    let stops = [(0, false, 1), (0, false, 4), (0, true, 2), (1, false, 3)];
    let stopped = train_some(&config, 7, &stops, 5);
    assert!(whole == stopped, "a stopped run differs");
    let expected = train_some(&cpu, 7, &[], 5);
    let (got, expected) = (&whole.metrics[0], &expected.metrics[0]);
    for (got, expected) in [(got.train_loss, expected.train_loss), (got.val_loss, expected.val_loss)] {
        assert!((got - expected).abs() <= 1e-4 * expected.abs(), "{got}, not {expected}");
    }
}

#[test]
fn threads_change_nothing() {
    let config = RunConfig { num_epochs: 2, ..config() };
    let [one, two, three] = [1, 2, 3].map(|threads| train(&RunConfig { threads, ..config.clone() }, &[]));
    assert!(one == two, "two threads differ from one");
    assert!(one == three, "three threads differ from one");
}

#[test]
fn seeds_change_the_result() {
    let config = RunConfig { num_epochs: 2, ..config() };
    assert!(train(&config, &[]).best != train(&RunConfig { seed: 8, ..config }, &[]).best);
}

/// Patience counts the epochs after warm-up: a short one must not end a fold before any epoch may
/// be the best.
#[test]
fn patience_begins_after_the_warm_up() {
    let config = RunConfig { num_epochs: 6, warmup_epochs: 3, es_patience: 1, learning_rate: 0.0, ..config() };
    let dataset = Dataset::open(&config.source()).unwrap();
    let bins = Bins::cut(&dataset.slides, config.n_classes).unwrap();
    let mut fold = dataset.fold(&config.splits, 0).unwrap();
    fold.train.truncate(8);
    let folder = tempfile::tempdir().unwrap();
    let mut observer = StopAt { stops: Vec::new(), metrics: Vec::new() };
    let mut trainer = FoldTrainer::<f32>::new(&config, &dataset, &bins, (0, &fold), folder.path()).unwrap();
    assert_eq!(trainer.run(&mut observer).unwrap(), Outcome::Finished);
    // with a learning rate of 0 nothing gets better: the first epoch that may be the best is, the
    // next one is one too many
    let best: Vec<bool> = observer.metrics.iter().map(|m| m.best).collect();
    assert_eq!(best, [false, false, false, true, false]);
}

/// The clamped loss of a diverged model is finite, so training must look at the risk.
#[test]
fn a_diverged_model_ends_training() {
    // the first update leaves weights so large that the next slide's risk overflows
    let config = RunConfig { learning_rate: 1e30, ..config() };
    let dataset = Dataset::open(&config.source()).unwrap();
    let bins = Bins::cut(&dataset.slides, config.n_classes).unwrap();
    let fold = dataset.fold(&config.splits, 0).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut observer = StopAt { stops: Vec::new(), metrics: Vec::new() };
    let mut trainer = FoldTrainer::<f32>::new(&config, &dataset, &bins, (0, &fold), folder.path()).unwrap();
    let error = trainer.run(&mut observer).unwrap_err().to_string();
    assert!(error.starts_with("the risk is undefined: it is NaN for slide `DEMO-"), "{error}");
    assert!(error.contains("in epoch 1 of fold 0; a lower --learning-rate may help"), "{error}");
}

/// Checkpoints and metrics hold f64 as JSON; a bit lost there and a resumed run differs, or takes a
/// tied epoch for a better one.
#[test]
fn c_indices_survive_json() {
    for pairs in 1..500u32 {
        for concordant in 0..=pairs {
            let c = f64::from(concordant) / f64::from(pairs);
            let back: f64 = serde_json::from_str(&serde_json::to_string(&c).unwrap()).unwrap();
            assert_eq!(c.to_bits(), back.to_bits(), "{concordant} / {pairs}");
        }
    }
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
    let strip = |m| format!("{:?}", EpochMetrics { seconds: 0.0, patches_per_second: 0.0, ..m });
    Ok(crossfusion::folder::read_metrics(run)?.into_iter().map(strip).collect())
}

#[cfg(unix)]
#[test]
fn a_killed_run_goes_on_bit_by_bit() {
    goes_on_bit_by_bit(&RunConfig { folds: Some(2), ..config() });
}

#[cfg(unix)]
#[test]
fn a_killed_run_in_bf16_goes_on_bit_by_bit() {
    goes_on_bit_by_bit(&RunConfig { folds: Some(2), precision: Precision::Bf16, ..config() });
}

#[cfg(unix)]
fn goes_on_bit_by_bit(config: &RunConfig) {
    let folder = tempfile::tempdir().unwrap();
    let settings = write_config(folder.path(), config);
    let settings = settings.to_str().unwrap();
    let start = Instant::now();
    assert!(cf_train(&["--config", settings, "--out", "whole"], folder.path()).status.success());
    let took = start.elapsed();
    // killed at several moments of what an uninterrupted run takes, writing checkpoints all the
    // time, then resumed to the end
    let spawn = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_cf-train")).args(arguments).current_dir(folder.path()).spawn()
    };
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let mut child = spawn(&["--config", settings, "--out", "killed", "--checkpoint-every", "1"]).unwrap();
    while !crossfusion::folder::config_path(&killed).exists() {
        assert!(child.try_wait().unwrap().is_none(), "ended without a run folder");
        std::thread::sleep(Duration::from_millis(5));
    }
    for kill in 1..=5 {
        std::thread::sleep(took * kill / 15);
        let _ = child.kill();
        child.wait().unwrap();
        child = spawn(&["--resume", "killed"]).unwrap();
    }
    assert!(child.wait().unwrap().success());
    for fold in 0..2 {
        let best =
            |run: &Path| std::fs::read(FoldTrainer::best_path(&crossfusion::folder::fold_folder(run, fold))).unwrap();
        assert!(best(&whole) == best(&killed), "fold {fold}: the best models differ");
    }
    assert_eq!(metrics(&whole).unwrap(), metrics(&killed).unwrap());
    let again = cf_train(&["--resume", "killed"], folder.path());
    assert!(again.status.success(), "a finished run can be resumed: {again:?}");
    assert!(String::from_utf8_lossy(&again.stdout).contains("killed is finished"), "{again:?}");
    let left = std::fs::read_dir(killed.join("fold_0")).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(left.count(), 2, "a killed process' temporary file is still there");
}

/// A bag that cannot be read, or a change of settings or tables, stops a run in a sentence; put
/// right, it goes on bit by bit.
#[test]
fn a_damaged_run_says_so_and_goes_on_when_mended() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    copy(cohort(), &data);
    let config = RunConfig {
        clinical: data.join("demo_cohort.csv"),
        splits: data.join("splits"),
        pt_dir: data.join("features"),
        num_epochs: 2,
        checkpoint_every: 10,
        ..config()
    };
    let settings = write_config(folder.path(), &config);
    let settings = settings.to_str().unwrap();
    assert!(cf_train(&["--config", settings, "--out", "whole"], folder.path()).status.success());
    // a validation slide, so that an epoch's training is done when it is met
    let dataset = Dataset::open(&config.source()).unwrap();
    let slide = dataset.fold(&config.splits, 0).unwrap().val[3];
    let bag = data.join(format!("features/synthetic/x20/pt_files/{}.pt", dataset.slides[slide].name()));
    let good = std::fs::read(&bag).unwrap();
    let refused = |arguments: &[&str], expected: &[&str]| {
        let out = cf_train(arguments, folder.path());
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{arguments:?}: {stderr}");
        assert!(expected.iter().all(|part| stderr.contains(part)), "{stderr}\nexpected: {expected:?}");
    };
    let patches = *dataset.sizes[slide].get(Scale::X20).unwrap();
    write_pt(&bag, ndarray::Array2::from_elem((patches, 64), f32::NAN).view()).unwrap();
    refused(&["--config", settings, "--out", "run"], &[bag.to_str().unwrap(), "NaN"]);
    std::fs::write(&bag, &good).unwrap();

    let path = crossfusion::folder::config_path(&folder.path().join("run"));
    let before = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, before.replace("learning_rate = 0.001", "learning_rate = 0.002")).unwrap();
    refused(&["--resume", "run"], &["checkpoint.safetensors", "learning_rate = 0.001, but config.toml now says 0.002"]);
    std::fs::write(&path, &before).unwrap();

    let table = std::fs::read_to_string(&config.clinical).unwrap();
    let (row, rest) = table.split_once("\n1,").unwrap();
    std::fs::write(&config.clinical, format!("{row}9\n1,{rest}")).unwrap(); // one more digit of survival
    refused(&["--resume", "run"], &["written for other slides"]);
    std::fs::write(&config.clinical, &table).unwrap();

    // a cut line of metrics, as of a crash
    let mut file = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(crossfusion::folder::metrics_path(&folder.path().join("run")));
    std::io::Write::write_all(file.as_mut().unwrap(), b"{\"fold\":0,\"ep").unwrap();
    assert!(cf_train(&["--resume", "run"], folder.path()).status.success());
    let [whole, mended] = ["whole", "run"].map(|name| folder.path().join(name));
    assert_eq!(metrics(&whole).unwrap(), metrics(&mended).unwrap());
    let best = |run: &Path| std::fs::read(FoldTrainer::best_path(&crossfusion::folder::fold_folder(run, 0))).unwrap();
    assert!(best(&whole) == best(&mended), "the best models differ");
}

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

    let held = std::fs::File::create(folder.path().join("runs/synthetic-2/.lock")).unwrap();
    held.lock().unwrap();
    std::fs::remove_file(folder.path().join("runs/synthetic-2/report.html")).unwrap();
    let out = cf_train(&["--resume", "runs/synthetic-2"], folder.path());
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("another cf-train is at work"), "{out:?}");
}

/// Ctrl-C, the SIGTERM of a batch system that takes its machine back, the SIGHUP of a lost
/// terminal.
#[cfg(unix)]
#[test]
fn a_signal_saves_and_says_how_to_go_on() {
    for (signal, code) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
        let folder = tempfile::tempdir().unwrap();
        let settings = write_config(folder.path(), &RunConfig { num_epochs: 10_000, es_patience: 10_000, ..config() });
        let mut command = Command::new(env!("CARGO_BIN_EXE_cf-train"));
        command.args(["--config", settings.to_str().unwrap(), "--out", "my run"]).current_dir(folder.path());
        let child = command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped()).spawn().unwrap();
        let run = folder.path().join("my run");
        let start = Instant::now();
        while crossfusion::folder::read_metrics(&run).unwrap().is_empty() {
            assert!(start.elapsed() < Duration::from_secs(120), "no epoch in two minutes");
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        let out = child.wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(code), "{signal}: {out:?}");
        assert!(String::from_utf8_lossy(&out.stderr).contains("cf-train --resume 'my run'"), "{signal}: {out:?}");
        assert!(FoldTrainer::checkpoint_path(&crossfusion::folder::fold_folder(&run, 0)).exists(), "{signal}");
    }
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

/// Every bit of a checkpoint and of a best model counts: a flipped one is an error and not another
/// model. A best model that is gone or damaged is told before anything is trained; and what
/// config.toml lacks.
#[test]
fn a_resumed_run_wants_its_best_model_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let config = RunConfig { num_epochs: 3, warmup_epochs: 0, folds: Some(1), ..config() };
    let out = folder.path().join("run");
    std::fs::create_dir_all(&out).unwrap();
    let run = run::Run::open(config).unwrap();
    run.save_config(&out).unwrap();
    run.train(&out, &std::sync::atomic::AtomicBool::new(false)).unwrap();
    let best = out.join("fold_0/best.safetensors");
    let mut bytes = std::fs::read(&best).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&best, &bytes).unwrap();
    let resumed = || String::from_utf8(cf_train(&["--resume", "run"], folder.path()).stderr).unwrap();
    assert!(resumed().contains("best.safetensors: is damaged: it does not match its own checksum"), "{}", resumed());
    std::fs::remove_file(&best).unwrap();
    assert!(resumed().contains("best.safetensors: is gone, though its fold has chosen it"), "{}", resumed());
    let path = out.join("config.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let without: String =
        text.lines().filter(|line| !line.starts_with("clinical")).map(|l| l.to_string() + "\n").collect();
    std::fs::write(&path, without).unwrap();
    let said = resumed();
    assert!(said.contains("run/config.toml: lacks `clinical`"), "{said}");
}

#[test]
fn a_flipped_bit_in_a_runs_tensors_is_an_error() {
    let config = RunConfig { num_epochs: 1, ..config() };
    let folder = tempfile::tempdir().unwrap();
    let dataset = Dataset::open(&config.source()).unwrap();
    let bins = Bins::cut(&dataset.slides, config.n_classes).unwrap();
    let mut fold = dataset.fold(&config.splits, 0).unwrap();
    fold.train.truncate(8);
    fold.val.truncate(8);
    let long = RunConfig { num_epochs: 2, ..config.clone() };
    let trainer = || FoldTrainer::<f32>::new(&long, &dataset, &bins, (0, &fold), folder.path());
    let mut observer = StopAt { stops: vec![(1, false, 4)], metrics: Vec::new() };
    assert_eq!(trainer().unwrap().run(&mut observer).unwrap(), Outcome::Stopped);
    let (state, best) = (FoldTrainer::checkpoint_path(folder.path()), FoldTrainer::best_path(folder.path()));
    assert!(trainer().is_ok() && read_card(&best).unwrap().is_some());
    let mut flips = 0;
    for path in [&state, &best] {
        let good = std::fs::read(path).unwrap();
        let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
        // every 23rd byte of the header and every 4999th of the tensors, each time another bit
        for at in (0..header).step_by(23).chain((header..good.len()).step_by(4999)).chain([good.len() - 1]) {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            std::fs::write(path, &bad).unwrap();
            let refused = if path == &state { trainer().is_err() } else { read_card(path).is_err() };
            assert!(refused, "{}: byte {at} of {}, header of {header}", path.display(), good.len());
            flips += 1;
        }
        std::fs::write(path, &good[..good.len() - 4]).unwrap();
        assert!(if path == &state { trainer().is_err() } else { read_card(path).is_err() }, "cut short");
        std::fs::write(path, &good).unwrap();
    }
    assert!(flips > 200, "{flips}");
    let mut bad = std::fs::read(&best).unwrap();
    *bad.last_mut().unwrap() ^= 1;
    std::fs::write(&best, bad).unwrap();
    let error = read_card(&best).unwrap_err().to_string();
    assert!(error.ends_with("best.safetensors: is damaged: it does not match its own checksum"), "{error}");
}

/// A feature file or a table that is replaced between a kill and the resume; data that has moved.
#[test]
fn a_resumed_run_wants_the_inputs_that_it_was_begun_with() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    copy(cohort(), &data);
    let config = RunConfig {
        clinical: data.join("demo_cohort.csv"),
        splits: data.join("splits"),
        pt_dir: data.join("features"),
        num_epochs: 2,
        ..config()
    };
    let settings = write_config(folder.path(), &config);
    assert!(cf_train(&["--config", settings.to_str().unwrap(), "--out", "run"], folder.path()).status.success());
    let run = folder.path().join("run");
    let resume = |arguments: &[&str]| {
        std::fs::remove_file(run.join("report.html")).unwrap_or_default(); // as if it had been killed before
        cf_train(&[&["--resume", "run"], arguments].concat(), folder.path())
    };
    let bag = data.join("features/synthetic/x10/pt_files/DEMO-004-A.pt");
    let good = std::fs::read(&bag).unwrap();
    let mut other = good.clone();
    let at = other.len() / 2; // another number, in a file of the same shape
    other[at] ^= 1;
    std::fs::write(&bag, &other).unwrap();
    let out = resume(&[]);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("the run was begun with other inputs") && stderr.contains("DEMO-004-A.pt has"), "{stderr}");
    std::fs::write(&bag, &good).unwrap();

    // a column that the fold's labels do not see
    let table = std::fs::read_to_string(&config.clinical).unwrap();
    std::fs::write(&config.clinical, table.replace("\n", " \n")).unwrap();
    let stderr = String::from_utf8_lossy(&resume(&[]).stderr).into_owned();
    assert!(stderr.contains("demo_cohort.csv has another content"), "{stderr}");
    std::fs::write(&config.clinical, &table).unwrap();

    let new = folder.path().join("moved");
    std::fs::rename(&data, &new).unwrap();
    let stderr = String::from_utf8_lossy(&resume(&[]).stderr).into_owned();
    assert!(stderr.contains("demo_cohort.csv: cannot be read"), "{stderr}");
    let out =
        resume(&["--clinical", "moved/demo_cohort.csv", "--splits", "moved/splits", "--pt-dir", "moved/features"]);
    assert!(out.status.success(), "{out:?}");
    assert_eq!(RunConfig::read(&crossfusion::folder::config_path(&run)).unwrap().pt_dir, new.join("features"));
    let out = resume(&["--learning-rate", "0.5"]);
    assert_eq!(out.status.code(), Some(2), "{out:?}");
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
    for metrics in crossfusion::folder::read_metrics(&run).unwrap() {
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
