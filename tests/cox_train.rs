//! Cox training gives the gradient of the whole batch, from the memory of one slide; it stops and
//! resumes bit by bit. The nested protocol keeps a fold's validation outcomes away from its
//! weights.
#![cfg(feature = "programs")]

mod common;
#[path = "cox_train/gradient.rs"]
mod gradient;

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

use common::{Law, fill};
use crossfusion::{
    Result,
    data::{
        dataset::{Dataset, Fold},
        demo,
        labels::Bins,
        torch::{StateDict, read_state_dict, write_pt},
    },
    device::{Device, Real},
    folder::{Best, EpochMetrics},
    loss::{CoxBatch, Loss, Prediction},
    model::{Bags, Config},
    ops::Draw,
    survival::Ties,
    train::{
        config::RunConfig,
        cox::{self, BatchSize, CoxUnit},
        fold::{FoldTrainer, Observer, Outcome, SlideDone},
        protocol::{self, Protocol},
        step::{Engine, State},
    },
};

#[test]
fn an_epoch_has_every_unit_once() {
    let units: Vec<Vec<usize>> = (0..86).map(|i| vec![2 * i; 1 + i % 2]).collect();
    for (size, count) in
        [(BatchSize::All, 1), (BatchSize::AtMost(200), 1), (BatchSize::AtMost(32), 3), (BatchSize::AtMost(2), 43)]
    {
        let batches = cox::batches(&units, size, 7, 0, 4);
        let sizes: Vec<usize> = batches.iter().map(Vec::len).collect();
        assert_eq!(sizes.len(), count);
        assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1, "{sizes:?}");
        if let BatchSize::AtMost(most) = size {
            assert!(sizes.iter().all(|&n| n <= most));
        }
        let mut shown = batches.concat();
        assert_ne!(shown, units, "the epoch is not shuffled");
        shown.sort_unstable();
        assert_eq!(shown, units);
        assert_ne!(batches, cox::batches(&units, size, 7, 0, 5));
    }
}

/// The demo's cohort with bags of a few patches, which suffice here; written once.
fn cohort() -> &'static Path {
    static COHORT: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = COHORT.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        demo::write_demo(folder.path(), 3).unwrap();
        for (magnification, fewest) in [("x5", 1), ("x10", 3), ("x20", 9)] {
            let bags = folder.path().join("features/synthetic").join(magnification).join("pt_files");
            let files: Vec<PathBuf> = std::fs::read_dir(bags).unwrap().map(|entry| entry.unwrap().path()).collect();
            for file in files {
                let name = format!("{magnification} {}", file.file_stem().unwrap().display());
                let patches = fewest + name.bytes().map(usize::from).sum::<usize>() % 4;
                let values = fill(&name, patches * 8, Law { offset: 0.0, scale: 1.7 });
                write_pt(&file, ndarray::ArrayView2::from_shape((patches, 8), &values).unwrap()).unwrap();
            }
        }
        folder
    });
    folder.path()
}

fn config() -> RunConfig {
    RunConfig {
        clinical: cohort().join("demo_cohort.csv"),
        splits: cohort().join("splits"),
        pt_dir: cohort().join("features"),
        backbone: "synthetic".into(),
        folds: Some(1),
        embed_dim: 8,
        num_heads: 2,
        n_classes: 1,
        loss_fn: Loss::CoxSurv,
        cox_batch: BatchSize::AtMost(9),
        num_epochs: 3,
        warmup_epochs: 0,
        learning_rate: 1e-3,
        threads: 2,
        ..RunConfig::default()
    }
}

/// Fold 0 but for most of its slides: it begins with patients of two slides.
fn small_fold(dataset: &Dataset, config: &RunConfig) -> Fold {
    let mut fold = dataset.fold(&config.splits, 0).unwrap();
    fold.train.truncate(24);
    fold.val.truncate(14);
    fold
}

/// Stops at each of these slides (epoch, whether validating, position), once, and keeps the metrics
/// but for the clock.
#[derive(Default)]
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

#[derive(PartialEq)]
struct Trained {
    metrics: Vec<EpochMetrics>,
    best: StateDict,
    checkpoint: Vec<u8>,
}

/// Trains the part of fold 0 that training may see up to a stop in the last epoch, where a
/// checkpoint still holds everything; before that, drops and re-opens everything at each of
/// `stops`.
fn train(config: &RunConfig, stops: &[(usize, bool, usize)]) -> Trained {
    let folder = tempfile::tempdir().unwrap();
    let dataset = Dataset::open(&config.source()).unwrap();
    let part = protocol::prepare(config, &dataset, (0, &small_fold(&dataset, config))).unwrap();
    let end = (config.num_epochs - 1, true, 2);
    let mut observer = StopAt { stops: [stops, &[end]].concat(), ..StopAt::default() };
    while !observer.stops.is_empty() {
        let mut trainer =
            FoldTrainer::<f32>::new(config, &dataset, &part.bins, (0, &part.slides), folder.path()).unwrap();
        assert_eq!(trainer.run(&mut observer).unwrap(), Outcome::Stopped, "missed {:?}", observer.stops);
    }
    let checkpoint = std::fs::read(FoldTrainer::checkpoint_path(folder.path())).unwrap();
    let best = read_state_dict(&FoldTrainer::best_path(folder.path())).unwrap();
    Trained { metrics: observer.metrics, best, checkpoint }
}

/// A stop in either pass of a batch, where gradients of some of its slides are already summed, must
/// leave nothing behind.
#[test]
fn a_stopped_run_goes_on_bit_by_bit() {
    for config in
        [config(), RunConfig { cox_unit: CoxUnit::Patient, n_classes: 3, cox_batch: BatchSize::All, ..config() }]
    {
        let whole = train(&config, &[]);
        // 24 slides, each shown twice: a first slide, both passes' middle, a batch's end, the last
        // batch's end, the next epoch
        let stops = [(0, 1), (0, 7), (0, 15), (0, 16), (0, 20), (0, 47), (0, 48), (1, 1), (1, 30), (1, 48)];
        let stops = stops.map(|(epoch, position)| (epoch, false, position));
        let stopped = train(&config, &[&stops[..], &[(0, true, 1), (0, true, 14), (1, true, 5)]].concat());
        assert_eq!(whole.metrics.len(), 2);
        assert_eq!(whole.metrics, stopped.metrics);
        assert!(whole.best == stopped.best, "the best models differ");
        assert!(whole.checkpoint == stopped.checkpoint, "the checkpoints differ");
        assert!(whole.metrics[0].train_loss > 0.0 && whole.metrics[0].val_loss > 0.0);
    }
}

/// What the settings say is what is trained with.
#[test]
fn batches_ties_and_units_change_the_result() {
    let folder = tempfile::tempdir().unwrap();
    let clinical = with_outcomes(folder.path(), |_, censored, months| (censored, (months / 5.0).ceil() * 5.0));
    let config = RunConfig { clinical, num_epochs: 2, ..config() };
    let usual = train(&config, &[]);
    assert!(usual == train(&RunConfig { threads: 1, ..config.clone() }, &[]), "one thread differs from two");
    for other in [
        RunConfig { cox_batch: BatchSize::All, ..config.clone() },
        RunConfig { cox_ties: Ties::Breslow, ..config.clone() },
        RunConfig { cox_unit: CoxUnit::Patient, ..config.clone() },
        RunConfig { seed: 8, ..config.clone() },
    ] {
        assert!(usual.best != train(&other, &[]).best);
    }
}

/// Batches of two often hold no event; they are counted, and the others are trained on.
#[test]
fn batches_without_a_comparison_are_counted() {
    let config = RunConfig { cox_batch: BatchSize::AtMost(2), num_epochs: 2, ..config() };
    let trained = train(&config, &[]);
    let dataset = Dataset::open(&config.source()).unwrap();
    let units = cox::units(CoxUnit::Slide, &dataset, &small_fold(&dataset, &config).train).unwrap();
    let outcome = |unit: &Vec<usize>| (dataset.slides[unit[0]].months, !dataset.slides[unit[0]].censored);
    let without = |pair: &&Vec<Vec<usize>>| {
        let [(a, event_a), (b, event_b)] = [outcome(&pair[0]), outcome(&pair[1])];
        !(event_a && a <= b || event_b && b <= a)
    };
    let expected = cox::batches(&units, config.cox_batch, config.seed, 0, 0).iter().filter(without).count();
    assert!(expected > 0, "the test needs a batch without a comparison");
    assert_eq!(trained.metrics[0].batches_without_update, expected);
}

/// The demo's clinical table with other outcomes: a case, its censorship and its months to the new
/// censorship and months.
fn with_outcomes(to: &Path, change: impl Fn(&str, u32, f64) -> (u32, f64)) -> PathBuf {
    let table = std::fs::read_to_string(cohort().join("demo_cohort.csv")).unwrap();
    let line = |line: &str| {
        let cells: Vec<&str> = line.split(',').collect();
        let [row, case, slide, censored, months] = cells[..] else { panic!("{line}") };
        match months.parse::<f64>() {
            Ok(months) => {
                let (censored, months) = change(case, censored.parse().unwrap(), months);
                format!("{row},{case},{slide},{censored},{months}\n")
            }
            Err(_) => format!("{line}\n"), // the header
        }
    };
    let path = to.join("changed.csv");
    std::fs::write(&path, table.lines().map(line).collect::<String>()).unwrap();
    path
}

/// With the nested protocol neither labels, nor sampling, nor the choice of the epoch has seen a
/// fold's validation outcomes: the same bits of weights, moments and progress, whatever they are.
/// The published one sees them.
#[test]
fn nested_training_does_not_see_the_validation_outcomes() {
    let folder = tempfile::tempdir().unwrap();
    for loss_fn in [Loss::NllSurv, Loss::CoxSurv] {
        let n_classes = if loss_fn == Loss::CoxSurv { 1 } else { 3 };
        let nested = RunConfig { protocol: Protocol::Nested, loss_fn, n_classes, num_epochs: 2, ..config() };
        let dataset = Dataset::open(&nested.source()).unwrap();
        let fold = small_fold(&dataset, &nested);
        let case = |&slide: &usize| dataset.slides[slide].case_id.clone();
        let outer: Vec<String> = fold.val.iter().map(case).collect();
        let inner = protocol::prepare(&nested, &dataset, (0, &fold)).unwrap();
        assert!(inner.slides.train.iter().chain(&inner.slides.val).all(|slide| fold.train.contains(slide)));
        let chosen_by = case(&inner.slides.val[0]);

        let before = train(&nested, &[]);
        let changed = |of: &dyn Fn(&str) -> bool, config: &RunConfig| {
            let other = |case: &str, censored: u32, months: f64| match of(case) {
                true => (1 - censored, 3.0 * months + 1.0),
                false => (censored, months),
            };
            train(&RunConfig { clinical: with_outcomes(folder.path(), other), ..config.clone() }, &[])
        };
        let validation = |case: &str| outer.iter().any(|other| other == case);
        assert!(before == changed(&validation, &nested), "{loss_fn:?}: the validation outcomes had an influence");
        // the comparison can fail: of the patients that choose the epoch, and with the published
        // protocol, it does
        assert!(before.metrics != changed(&|case| case == chosen_by, &nested).metrics);
        let published = RunConfig { protocol: Protocol::Published, ..nested };
        assert!(train(&published, &[]).metrics != changed(&validation, &published).metrics);
    }
}

#[test]
fn nested_bins_are_cut_from_the_training_slides() {
    let config = RunConfig { loss_fn: Loss::NllSurv, n_classes: 4, ..config() };
    let dataset = Dataset::open(&config.source()).unwrap();
    let fold = dataset.fold(&config.splits, 0).unwrap();
    let bins = |protocol| {
        let config = RunConfig { protocol, ..config.clone() };
        protocol::prepare(&config, &dataset, (0, &fold)).unwrap().bins
    };
    let training: Vec<_> = fold.train.iter().map(|&slide| dataset.slides[slide].clone()).collect();
    assert_eq!(bins(Protocol::Nested), Bins::cut(&training, 4).unwrap());
    assert_eq!(bins(Protocol::Published), Bins::cut(&dataset.slides, 4).unwrap());
    assert_ne!(bins(Protocol::Nested), bins(Protocol::Published));
}

fn cf_train(arguments: &[&str], folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cf-train")).args(arguments).current_dir(folder).output().unwrap()
}

/// A folder of splits whose one fold has these patients of the demo.
fn splits(folder: &Path, train: std::ops::Range<usize>, val: std::ops::Range<usize>) -> PathBuf {
    let mut table = String::from(",train,val\n");
    for i in 0..train.len().max(val.len()) {
        let cell =
            |side: &std::ops::Range<usize>| side.clone().nth(i).map_or(String::new(), |p| format!("DEMO-{p:03}"));
        table += &format!("{i},{},{}\n", cell(&train), cell(&val));
    }
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("splits_0.csv"), table).unwrap();
    folder.to_path_buf()
}

fn write_config(folder: &Path, config: &RunConfig) -> String {
    let path = folder.join("settings.toml");
    // as a user writes it: the number of outputs follows from the loss
    let toml: String =
        config.to_toml().unwrap().lines().filter(|l| !l.starts_with("n_classes")).map(|l| format!("{l}\n")).collect();
    std::fs::write(&path, toml).unwrap();
    path.to_str().unwrap().into()
}

#[test]
fn a_nested_cox_run_from_settings_to_report() {
    let folder = tempfile::tempdir().unwrap();
    let splits = splits(&folder.path().join("splits"), 0..20, 20..32);
    let config = RunConfig { splits, num_epochs: 1, cox_batch: BatchSize::All, ..config() };
    let settings = write_config(folder.path(), &config);
    let out =
        cf_train(&["--config", &settings, "--protocol", "nested", "--cox-batch", "8", "--out", "run"], folder.path());
    assert!(out.status.success(), "{out:?}");
    let run = folder.path().join("run");
    let resolved = RunConfig::read(&crossfusion::folder::config_path(&run)).unwrap();
    let settings = (resolved.n_classes, resolved.cox_batch, resolved.protocol, resolved.loss_fn);
    assert_eq!(settings, (1, BatchSize::AtMost(8), Protocol::Nested, Loss::CoxSurv));
    let stdout = String::from_utf8_lossy(&out.stdout);
    assert!(stdout.contains("to choose the epoch by;\n        14 to evaluate at the end"), "{stdout}");
    for file in ["report.html", "summary.json"] {
        let text = std::fs::read_to_string(run.join(file)).unwrap();
        assert!(text.contains("Nested: each fold\u{2019}s epoch was chosen"), "{file}");
        assert!(!text.contains("As published"), "{file}");
        assert!(!text.contains("evaluated on other than"), "{file}: nothing has changed since training");
    }
    // the one output is the risk, and there are no bins
    let predictions = std::fs::read_to_string(run.join("predictions.csv")).unwrap();
    assert_eq!(predictions.lines().next().unwrap(), "case_id,slide_id,fold,time,event,risk");
    assert_eq!(predictions.lines().count(), 1 + 14);
    let again = cf_train(&["--resume", "run"], folder.path());
    assert!(String::from_utf8_lossy(&again.stdout).contains("run is finished"), "{again:?}");
}

#[test]
fn wrong_input_is_refused_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let settings = write_config(folder.path(), &config());
    let path = |path: &Path| path.to_str().unwrap().to_string();
    // the demo's table, with everybody of these sides censored, or with one event
    let table = std::fs::read_to_string(cohort().join("demo_cohort.csv")).unwrap();
    let censored = |name: &str, events: &[&str]| {
        let change = |line: &str| {
            let mut cells: Vec<&str> = line.split(',').collect();
            if cells[3] != "censorship" && !events.contains(&cells[2]) {
                cells[3] = "1";
            }
            cells.join(",") + "\n"
        };
        let file = folder.path().join(name);
        std::fs::write(&file, table.lines().map(change).collect::<String>()).unwrap();
        path(&file)
    };
    let event = table.lines().skip(1).map(|line| line.split(',').collect::<Vec<_>>()).filter(|cells| cells[3] == "0");
    let events: Vec<&str> = event.map(|cells| cells[2]).collect();
    let first = events.iter().position(|slide| *slide > "DEMO-021").unwrap();
    let (none, train_only) = (censored("none.csv", &[]), censored("train.csv", &events[..first]));
    // the first patient has two slides; one of them becomes an event or no longer is one
    let two_outcomes = folder.path().join("two.csv");
    let line = table.lines().nth(1).unwrap();
    let cells: Vec<&str> = line.split(',').collect();
    let other = format!("{},{},{},{},999", cells[0], cells[1], cells[2], cells[3]);
    std::fs::write(&two_outcomes, table.replace(line, &other)).unwrap();
    let splits = path(&splits(&folder.path().join("splits"), 0..20, 22..32));
    for (arguments, code, expected) in [
        (vec!["--cox-batch", "1"], 2, "--cox-batch 1: expected at least 2, for one slide has no other"),
        (vec!["--cox-batch", "some"], 2, "`some`, expected a number or `all`"),
        (vec!["--cox-ties", "exact"], 2, "possible values: breslow, efron"),
        (vec!["--cox-unit", "tile"], 2, "possible values: slide, patient"),
        (vec!["--protocol", "honest"], 2, "possible values: published, nested"),
        (vec!["--n-classes", "0"], 2, "--n-classes 0: expected at least 1"),
        (vec!["--loss-fn", "nll_surv", "--n-classes", "1"], 2, "--n-classes 1: expected at least 2"),
        (vec!["--clinical", &none], 1, "none of the 23 training slides of fold 0 has an event"),
        (vec!["--clinical", &train_only], 1, "none of the 11 validation slides of fold 0 has an event"),
        (
            vec!["--clinical", &none, "--protocol", "nested"],
            2,
            "0 training patients of fold 0 have an event, expected at least 2",
        ),
        (
            vec!["--clinical", two_outcomes.to_str().unwrap(), "--cox-unit", "patient"],
            2,
            "case `DEMO-000` has one outcome at slide `DEMO-000-A.svs` and another at slide `DEMO-000-B.svs`",
        ),
    ] {
        let out = cf_train(
            &[&["--config", &settings, "--splits", &splits, "--out", "run"], arguments.as_slice()].concat(),
            folder.path(),
        );
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(expected), "{arguments:?}: {stderr}\nexpected: {expected}");
        assert!(!stderr.contains("panicked"), "{arguments:?}: {stderr}");
    }
    assert!(!folder.path().join("run").exists(), "a refused run left a folder");
    // a file of settings that says it wrongly
    let broken = folder.path().join("broken.toml");
    std::fs::write(&broken, "cox_batch = \"half\"\n").unwrap();
    let out = cf_train(&["--config", broken.to_str().unwrap()], folder.path());
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(stderr.contains("`half`, expected a number or `all`"), "{stderr}");
}
