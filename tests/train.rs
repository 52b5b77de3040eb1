//! Runs of `cf-train`: stopped and resumed they give the same bits as uninterrupted ones, with any
//! number of threads; wrong input is refused in a sentence.
#![cfg(feature = "programs")]

#[cfg(unix)]
#[path = "train/arrays.rs"]
mod arrays;
#[path = "train/program.rs"]
mod program;

use std::{
    collections::BTreeSet,
    ffi::OsString,
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
    Ok(crossfusion::folder::read_metrics(run, 0..2)?.into_iter().map(strip).collect())
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
    let expected = [".lock", "best.safetensors", "checkpoint.safetensors", "metrics.jsonl"].map(OsString::from);
    assert_eq!(left.collect::<BTreeSet<_>>(), BTreeSet::from(expected), "a killed process' temporary file");
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
        .open(crossfusion::folder::metrics_path(&folder.path().join("run"), 0));
    std::io::Write::write_all(file.as_mut().unwrap(), b"{\"fold\":0,\"ep").unwrap();
    assert!(cf_train(&["--resume", "run"], folder.path()).status.success());
    let [whole, mended] = ["whole", "run"].map(|name| folder.path().join(name));
    assert_eq!(metrics(&whole).unwrap(), metrics(&mended).unwrap());
    let best = |run: &Path| std::fs::read(FoldTrainer::best_path(&crossfusion::folder::fold_folder(run, 0))).unwrap();
    assert!(best(&whole) == best(&mended), "the best models differ");
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
        while crossfusion::folder::read_metrics(&run, 0..1).unwrap().is_empty() {
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
    run.train(&out, &std::sync::atomic::AtomicBool::new(false), None).unwrap();
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

/// Several processes of a program that cannot speak to each other would train the same run several
/// times over.
#[cfg(not(feature = "mpi"))]
#[test]
fn a_program_without_mpi_says_so_under_mpirun() {
    let command = Command::new(env!("CARGO_BIN_EXE_cf-train")).arg("--demo").env("OMPI_COMM_WORLD_SIZE", "2").output();
    let output = command.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("built without MPI: build it with --features mpi"), "{said}");
}
