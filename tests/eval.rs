//! Evaluation of a small trained run, and of single checkpoints, against what training itself
//! measured and plain counting of pairs.
#![cfg(feature = "programs")]

mod common;
#[path = "eval/compare.rs"]
mod compare;
#[path = "eval/refusals.rs"]
mod refusals;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{OnceLock, atomic::AtomicBool},
};

use crossfusion::{
    data::{
        clinical::Columns,
        dataset::{Source, Which},
        demo,
        torch::{read_state_dict, write_pt},
    },
    device::Device,
    eval::{self, Checkpoint, Moved, predict},
    loss::Loss,
    model::{Fusion, ModelName},
    report::Summary,
    survival::Bootstrap,
    train::{
        config::RunConfig,
        protocol::{Protocol, Reported},
        run::Run,
    },
};

/// Few replicates: most tests are not about them.
const PLAN: Bootstrap = Bootstrap { replicates: 40, seed: 0, level: 0.95 };

fn device() -> Device {
    Device::from_name("cpu", 1).unwrap()
}

/// An empty folder among cargo's temporary files, for whoever wants to look at it.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("eval").join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// Two folds trained for three epochs on the demo's cohort, once for all tests; one of them writes
/// its evaluation there.
fn trained() -> &'static (PathBuf, RunConfig) {
    static RUN: OnceLock<(PathBuf, RunConfig)> = OnceLock::new();
    RUN.get_or_init(|| {
        let folder = folder("trained");
        demo::write_demo(&folder.join("cohort"), 7).unwrap();
        let cohort = folder.join("cohort");
        let config = RunConfig {
            clinical: cohort.join("demo_cohort.csv"),
            splits: cohort.join("splits"),
            pt_dir: cohort.join("features"),
            backbone: "synthetic".into(),
            folds: Some(2),
            embed_dim: 16,
            num_heads: 2,
            num_epochs: 3,
            warmup_epochs: 0,
            ..RunConfig::default()
        };
        let run = Run::open(config.clone()).unwrap();
        run.save_config(&folder).unwrap();
        run.train(&folder, &AtomicBool::new(false), None).unwrap();
        (folder, config)
    })
}

/// The trained run, evaluated once for all tests.
fn evaluated() -> &'static Summary {
    static SUMMARY: OnceLock<Summary> = OnceLock::new();
    SUMMARY.get_or_init(|| eval::evaluate_run(&trained().0, &Moved::default(), device(), None, PLAN).unwrap())
}

/// The trained run's settings and models in a folder of its own.
fn copy_of_trained(name: &str) -> (PathBuf, RunConfig) {
    let (from, config) = trained();
    let to = folder(name);
    for file in ["config.toml", "fold_0/metrics.jsonl", "fold_0/best.safetensors", "fold_0/checkpoint.safetensors"] {
        std::fs::create_dir_all(to.join(file).parent().unwrap()).unwrap();
        std::fs::copy(from.join(file), to.join(file)).unwrap();
    }
    (to, config.clone())
}

struct Row {
    slide: String,
    fold: usize,
    time: f64,
    event: bool,
    risk: f64,
}

fn predictions(folder: &Path) -> Vec<Row> {
    let mut table = csv::Reader::from_path(folder.join("predictions.csv")).unwrap();
    let row = |row: csv::StringRecord| Row {
        slide: row[1].to_string(),
        fold: row[2].parse().unwrap(),
        time: row[3].parse().unwrap(),
        event: &row[4] == "1",
        risk: row[5].parse().unwrap(),
    };
    table.records().map(|record| row(record.unwrap())).collect()
}

/// Harrell's C pair by pair, as scikit-survival's `concordance_index_censored` defines it.
fn concordance(rows: &[&Row]) -> f64 {
    let (mut score, mut pairs) = (0.0, 0.0);
    for a in rows.iter().filter(|a| a.event) {
        for b in rows.iter().filter(|b| a.time < b.time || (a.time == b.time && !b.event)) {
            pairs += 1.0;
            score += if (a.risk - b.risk).abs() <= 1e-8 { 0.5 } else { f64::from(a.risk > b.risk) };
        }
    }
    score / pairs
}

#[test]
fn a_runs_c_indices_are_those_of_its_training_and_of_its_predictions() {
    let ((folder, config), summary) = (trained(), evaluated());
    let (rows, metrics) = (predictions(folder), crossfusion::folder::read_metrics(folder, 0..2).unwrap());
    assert_eq!((rows.len(), summary.slides, summary.patients), (172, 172, 150));
    let mut c = Vec::new();
    for result in &summary.folds {
        let of_fold: Vec<&Row> = rows.iter().filter(|row| row.fold == result.fold).collect();
        c.push(concordance(&of_fold));
        approx::assert_abs_diff_eq!(result.c_index.unwrap(), c[result.fold], epsilon = 1e-12);
        let best = metrics.iter().rfind(|epoch| epoch.fold == result.fold && epoch.best).unwrap();
        assert_eq!((result.best_epoch, result.c_index), (Some(best.epoch), best.val_c_index));

        let split = std::fs::read_to_string(config.splits.join(format!("splits_{}.csv", result.fold))).unwrap();
        let validation: Vec<&str> = split.lines().map(|line| line.rsplit(',').next().unwrap()).collect();
        assert!(of_fold.iter().all(|row| validation.contains(&&row.slide[..8])));
    }
    approx::assert_abs_diff_eq!(summary.c_index_mean.unwrap(), (c[0] + c[1]) / 2.0, epsilon = 1e-12);
    approx::assert_abs_diff_eq!(summary.c_index_std.unwrap(), (c[0] - c[1]).abs() / 2.0, epsilon = 1e-12);

    let json = std::fs::read(folder.join("summary.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["folds"][1]["c_index"].as_f64(), summary.folds[1].c_index);
    let protocol = json["protocol"].as_str().unwrap();
    assert!(protocol.contains("optimistic") && summary.table().contains(protocol), "{protocol}");
    let html = std::fs::read_to_string(folder.join("report.html")).unwrap();
    assert!(html.contains(&format!("<td>{:.4}</td>", c[0])) && html.contains("synthetic, 64 features"));
}

#[test]
fn a_checkpoint_alone_predicts_what_its_run_does() {
    let (run, config) = copy_of_trained("checkpoint");
    eval::evaluate_run(&run, &Moved::default(), device(), None, PLAN).unwrap();
    let path = run.join("fold_0/best.safetensors");
    let mut checkpoint =
        Checkpoint { path: &path, source: config.source(), split: Some((&config.splits, 0)), heads: None };
    eval::evaluate_checkpoint(&checkpoint, &run.join("alone"), device(), None, PLAN).unwrap();
    let risks = |folder: &Path| predictions(folder).into_iter().map(|row| (row.slide, row.risk)).collect::<Vec<_>>();
    assert_eq!(risks(&run.join("alone")), risks(&run));

    checkpoint.split = None;
    let summary = eval::evaluate_checkpoint(&checkpoint, &run.join("all"), device(), None, PLAN).unwrap();
    assert_eq!((summary.slides, summary.folds.len()), (172, 1));
}

#[test]
fn an_unfinished_run_and_a_cohort_without_events_give_notes() {
    let (run, mut config) = copy_of_trained("notes");
    config.clinical = run.join("no events.csv");
    let text = std::fs::read_to_string(&trained().1.clinical).unwrap();
    let censor = |line: &str| {
        let mut cells: Vec<&str> = line.split(',').collect();
        cells[3] = if cells[3] == "0" { "1" } else { cells[3] };
        cells.join(",") + "\n"
    };
    std::fs::write(&config.clinical, text.lines().map(censor).collect::<String>()).unwrap();
    std::fs::write(run.join("config.toml"), config.to_toml().unwrap()).unwrap();
    let summary = eval::evaluate_run(&run, &Moved::default(), device(), None, PLAN).unwrap();
    assert_eq!((summary.c_index_mean, &summary.log_rank, summary.events), (None, &None, 0));
    let notes = [summary.notes, summary.warnings].concat().join("\n");
    for part in [
        "There is no model of fold 1 yet: these figures are of fold 0 alone.",
        "Fold 0 has no C-index: none of",
        "There is no log-rank test",
    ] {
        assert!(notes.contains(part), "{notes}");
    }
    for file in ["report.html", "figures/km.svg", "figures/km.png", "figures/km.csv", "predictions.csv", "summary.json"]
    {
        assert!(run.join(file).is_file(), "{file} is missing");
    }
}

fn cf_eval(arguments: &[&str], folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cf-eval")).args(arguments).current_dir(folder).output().unwrap()
}

/// As the published program saved it, and from DataParallel; neither says what model it is.
#[test]
fn published_checkpoints_predict() {
    let data = match std::env::var_os("CROSSFUSION_DATA") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"),
    };
    let files = ["best_model.pt", "best_model_data_parallel.pt"].map(|name| data.join("files").join(name));
    if !files[0].is_file() {
        eprintln!("SKIPPED published_checkpoints_predict: {} not found", files[0].display());
        return;
    }
    let features = read_state_dict(&files[0]).unwrap()["s_lin_proj.0.weight"].shape[1];
    let folder = folder("published");
    let mut table = String::from(",case_id,slide_id,censorship,survival_months\n");
    for slide in 0..8 {
        table += &format!("{slide},CASE-{slide},SLIDE-{slide}.svs,{},{}.5\n", slide % 2, 3 * slide);
        for (magnification, patches) in [("x5", 3), ("x10", 10), ("x20", 35)] {
            let folder = folder.join("backbone").join(magnification).join("pt_files");
            std::fs::create_dir_all(&folder).unwrap();
            let bag = ndarray::Array2::from_shape_fn((patches, features), |(i, j)| ((slide + i * j) as f32).sin());
            write_pt(&folder.join(format!("SLIDE-{slide}.pt")), bag.view()).unwrap();
        }
    }
    let clinical = folder.join("clinical.csv");
    std::fs::write(&clinical, table).unwrap();
    let columns = Columns::default();
    let source = Source {
        clinical: &clinical,
        columns: &columns,
        manifest: None,
        pt_dir: &folder,
        backbone: "backbone",
        scales: &[],
        skip: &[],
    };
    let [plain, parallel] = files.map(|path| {
        let checkpoint = Checkpoint { path: &path, source: source.clone(), split: None, heads: None };
        eval::evaluate_checkpoint(&checkpoint, &folder, device(), None, PLAN).unwrap();
        predictions(&folder).into_iter().map(|row| row.risk).collect::<Vec<_>>()
    });
    assert_eq!(plain, parallel);
    assert!(plain.windows(2).all(|pair| pair[0] != pair[1]), "every slide has its own risk: {plain:?}");
}

/// A published checkpoint of each model, told by its tensors alone, against PyTorch's logits
/// (scripts/make-model-fixtures.py). The model that reads x20 alone finds no other features.
#[test]
fn published_checkpoints_of_each_model_agree_with_pytorch() {
    #[derive(serde::Deserialize)]
    struct Expected {
        features: usize,
        bags: std::collections::BTreeMap<String, usize>,
        logits: Vec<f64>,
    }
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
    for name in ["CrossFusion", "CrossFusionConcat", "CrossFusionSingle"] {
        let json = std::fs::read(fixtures.join(format!("{name}.json"))).unwrap();
        let Expected { features, bags, logits } = serde_json::from_slice(&json).unwrap();
        let pt_dir = folder(name);
        for (scale, patches) in &bags {
            if name == "CrossFusionSingle" && scale != "x20" {
                continue;
            }
            let values = common::fill(scale, patches * features, common::Law { offset: 0.0, scale: 1.7 });
            let folder = pt_dir.join("backbone").join(scale).join("pt_files");
            std::fs::create_dir_all(&folder).unwrap();
            let bag = ndarray::Array2::from_shape_vec((*patches, features), values).unwrap();
            write_pt(&folder.join("SLIDE.pt"), bag.view()).unwrap();
        }
        let model = fixtures.join(format!("{name}.pt"));
        let request =
            predict::Request { model: &model, heads: None, pt_dir: &pt_dir, backbone: "backbone", slides: Which::All };
        let predictions = predict::predict(&request, device(), None).unwrap();
        let hazards = &predictions.slides[0].hazards;
        assert_eq!(hazards.len(), logits.len(), "{name}");
        for (hazard, logit) in hazards.iter().zip(&logits) {
            approx::assert_abs_diff_eq!(*hazard, 1.0 / (1.0 + (-logit).exp()), epsilon = 2e-6);
        }
    }
}

/// Trained, evaluated and told apart: each model's run says what it is, and the one that reads x20
/// alone needs no other features.
#[test]
fn each_model_is_trained_and_evaluated() {
    let (trained_run, config) = trained();
    let cohort = folder("models");
    let copy = cohort.join("features/synthetic");
    std::fs::create_dir_all(&copy).unwrap();
    std::os::unix::fs::symlink(config.pt_dir.join("synthetic/x20"), copy.join("x20")).unwrap();
    let other_run = crossfusion::folder::fold_folder(trained_run, 0).join("best.safetensors");
    for (model, pt_dir, title) in [
        (ModelName::CrossFusionConcat, config.pt_dir.clone(), "CrossFusionConcat (ablation), "),
        (ModelName::CrossFusionSingle, cohort.join("features"), "CrossFusionSingle (ablation) conv2d, "),
    ] {
        let out = cohort.join(model.to_string());
        std::fs::create_dir_all(&out).unwrap();
        let config = RunConfig { model, pt_dir, folds: Some(1), num_epochs: 2, warmup_epochs: 0, ..config.clone() };
        let run = Run::open(config.clone()).unwrap();
        run.save_config(&out).unwrap();
        run.train(&out, &AtomicBool::new(false), None).unwrap();
        let summary = eval::evaluate_run(&out, &Moved::default(), device(), None, PLAN).unwrap();
        assert_eq!(summary.slides, 86);
        let page = std::fs::read_to_string(out.join("report.html")).unwrap();
        assert!(page.contains(title), "{model}: the report does not say {title}");
        assert!(std::fs::read_to_string(out.join("config.toml")).unwrap().contains(&format!("model = \"{model}\"")));
        // another model in its place
        std::fs::copy(&other_run, out.join("fold_0/best.safetensors")).unwrap();
        let error = eval::evaluate_run(&out, &Moved::default(), device(), None, PLAN).unwrap_err().to_string();
        assert!(error.contains("best.safetensors: "), "{error}");
    }
    let nowhere = RunConfig { pt_dir: cohort.join("features"), ..config.clone() };
    let error = Run::open(nowhere).err().unwrap().to_string();
    assert!(
        error.contains("at x5, x10 and x20 of none of the 172 slides (172 lack x5, 172 lack x10, 0 lack x20)"),
        "{error}"
    );
    let fusion = RunConfig { model: ModelName::CrossFusionConcat, fusion: Fusion::Conv1d, ..config.clone() };
    let error = fusion.model_config(8).check().unwrap_err().to_string();
    assert!(error.contains("crossfusion-concat has no convolution"), "{error}");
}

/// No two of the slides that should choose the epoch can be compared, in one fold or in both.
#[test]
fn the_protocol_does_not_speak_of_a_choice_that_was_none() {
    let sentence = |unchosen: &[usize]| {
        let reported = Reported { loss: Loss::NllSurv, tested: false, folds: 2, unchosen };
        Protocol::Published.sentence(&reported)
    };
    assert!(sentence(&[]).ends_with("an optimistic estimate. Epochs count from 1."));
    let one = sentence(&[1]);
    assert!(one.contains("optimistic estimate. Of fold 1 the last epoch is shown, since no two"), "{one}");
    let all = sentence(&[0, 1]);
    assert!(all.starts_with("The last epoch of each fold is shown") && !all.contains("optimistic"), "{all}");
}

/// The mean of a run's folds on slides whose outcome nobody gave, against the folds' models one by
/// one.
#[test]
fn a_run_predicts_as_the_mean_of_its_folds() {
    let (run, config) = trained();
    let out = folder("predict");
    let table = out.join("slides.csv");
    std::fs::write(&table, "slide_id\nDEMO-003-A.svs\nDEMO-000-B\nNOT-THERE\n").unwrap();
    let predict = |model: &Path, slides: Option<&Path>| {
        let pt_dir = &config.pt_dir;
        let request = predict::Request {
            model,
            heads: None,
            pt_dir,
            backbone: "synthetic",
            slides: slides.map_or(Which::All, Which::Table),
        };
        predict::predict(&request, device(), None).unwrap()
    };
    let all = predict(run, None);
    assert_eq!((all.slides.len(), all.models.len(), all.left_out.len()), (172, 2, 0));
    let note = all.notes.join("\n");
    assert!(note.contains("The model was trained on 86 of these 172 slides"), "{note}");
    let some = predict(run, Some(&table));
    assert_eq!(some.left_out.iter().map(|slide| slide.slide_id.as_str()).collect::<Vec<_>>(), ["NOT-THERE"]);

    let by_fold = [0, 1].map(|fold| {
        let path = run.join(format!("fold_{fold}/best.safetensors"));
        let checkpoint = Checkpoint { path: &path, source: config.source(), split: None, heads: None };
        let alone = out.join(format!("alone_{fold}"));
        eval::evaluate_checkpoint(&checkpoint, &alone, device(), None, PLAN).unwrap();
        predictions(&alone)
    });
    for slide in &all.slides {
        let risks: Vec<f64> = by_fold
            .iter()
            .map(|rows| rows.iter().find(|row| row.slide.trim_end_matches(".svs") == slide.slide_id).unwrap().risk)
            .collect();
        assert_eq!(slide.risk_by_model, risks);
        approx::assert_abs_diff_eq!(slide.risk, (risks[0] + risks[1]) / 2.0, epsilon = 1e-12);
        approx::assert_abs_diff_eq!(slide.risk, -slide.survival.iter().sum::<f64>(), epsilon = 1e-12);
        assert_eq!(slide.hazards.len(), 4);
    }
    assert_eq!(some.slides[0].risk, all.slides.iter().find(|slide| slide.slide_id == "DEMO-003-A").unwrap().risk);

    // by the program, in a folder of its own
    let arguments = [
        "predict",
        run.to_str().unwrap(),
        "--pt-dir",
        config.pt_dir.to_str().unwrap(),
        "--backbone",
        "synthetic",
        "--slides",
        "slides.csv",
        "--out",
        "told",
    ];
    let told = cf_eval(&arguments, &out);
    assert!(told.status.success(), "{told:?}");
    let said = String::from_utf8(told.stdout).unwrap();
    assert!(
        said.contains("2 slides predicted by the mean of 2 models\n1 slide left out, which left_out.csv"),
        "{said}"
    );
    assert!(std::fs::read_to_string(out.join("told/left_out.csv")).unwrap().contains("NOT-THERE"));
    let again = cf_eval(&arguments, &out);
    let refused = String::from_utf8(again.stderr).unwrap();
    assert!(again.status.code() == Some(2) && refused.contains("--out told: holds told/predictions.csv"), "{refused}");
    std::fs::write(&table, "slide_id;x\nDEMO-003-A;1\n;2\n").unwrap();
    let blank = [&arguments[..8], &["--out", "blank"]].concat();
    let refused = String::from_utf8(cf_eval(&blank, &out).stderr).unwrap();
    assert!(refused.contains("slides.csv, row 3, column `slide_id`: the cell is empty"), "{refused}");
    std::fs::write(&table, "slide_id\n").unwrap();
    let arguments = [&arguments[..8], &["--out", "empty"]].concat();
    let refused = String::from_utf8(cf_eval(&arguments, &out).stderr).unwrap();
    assert!(refused.contains("slides.csv: has no row") && !out.join("empty").exists(), "{refused}");
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.join("told/predictions.json")).unwrap()).unwrap();
    assert_eq!(json["slides"][1]["slide_id"], "DEMO-000-B");
    assert_eq!(json["bin_edges"].as_array().unwrap().len(), 5);
    let mut csv = csv::Reader::from_path(out.join("told/predictions.csv")).unwrap();
    let heads: Vec<String> = csv.headers().unwrap().iter().map(String::from).collect();
    assert_eq!(heads[..4], ["slide_id", "risk", "median_months", "hazard_0"]);
    let row = csv.records().next().unwrap().unwrap();
    assert_eq!(row[1].parse::<f64>().unwrap(), some.slides[0].risk);
}

/// A model that has seen the slides, or other slides of the patients, is no measure of itself.
#[test]
fn slides_of_the_training_are_counted() {
    let (run, config) = trained();
    let out = folder("seen");
    let path = run.join("fold_0/best.safetensors");
    let of = |split: Option<(&Path, usize)>| {
        let checkpoint = Checkpoint { path: &path, source: config.source(), split, heads: None };
        eval::evaluate_checkpoint(&checkpoint, &out, device(), None, PLAN).unwrap().warnings.join("\n")
    };
    let own = of(Some((&config.splits, 0)));
    assert!(!own.contains("was trained on"), "{own}");
    let other = of(Some((&config.splits, 1)));
    assert!(other.contains("The model was trained on 86 of these 86 slides"), "{other}");
    let all = of(None);
    assert!(all.contains("trained on 86 of these 172 slides, and its epoch was chosen by 86 of them"), "{all}");
    assert!(evaluated().warnings.iter().all(|text| !text.contains("trained on")), "{:?}", evaluated().warnings);

    // the other slide of a patient who was trained on
    let table = out.join("other.csv");
    std::fs::write(&table, "case_id,slide_id,censorship,survival_months\nDEMO-007,X.svs,0,5\nDEMO-001,Y.svs,1,9\n")
        .unwrap();
    for x in ["x5", "x10", "x20"] {
        let files = out.join("features/synthetic").join(x).join("pt_files");
        std::fs::create_dir_all(&files).unwrap();
        for name in ["X", "Y"] {
            std::fs::copy(
                config.pt_dir.join(format!("synthetic/{x}/pt_files/DEMO-001-A.pt")),
                files.join(format!("{name}.pt")),
            )
            .unwrap();
        }
    }
    let pt_dir = out.join("features");
    let source = Source { clinical: &table, pt_dir: &pt_dir, ..config.source() };
    let checkpoint = Checkpoint { path: &path, source, split: None, heads: None };
    let notes = eval::evaluate_checkpoint(&checkpoint, &out, device(), None, PLAN).unwrap().warnings.join("\n");
    assert!(notes.contains("The model was trained on other slides of 2 of these patients"), "{notes}");
}
