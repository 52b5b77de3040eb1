//! Cohorts on disk as users have them: the folders of several tools, slides that are left out,
//! folds numbered from 1, folds with test slides.
#![cfg(feature = "programs")]

use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::atomic::AtomicBool,
};

use crossfusion::{
    data::{
        cohort::{LeftOut, Slide},
        dataset::Dataset,
        labels::Bins,
        layout::find_features,
        torch::{read_state_dict, write_pt},
    },
    device::Device,
    eval::{self, Checkpoint, Moved},
    model::Scale,
    report::{self, SlideResult, Summary},
    survival::Bootstrap,
    train::{
        config::RunConfig,
        protocol::{self, Protocol},
        run::Run,
    },
};

const PLAN: Bootstrap = Bootstrap { replicates: 40, seed: 0, level: 0.95 };

fn slide(id: &str) -> Slide {
    Slide { case_id: format!("case of {id}"), slide_id: id.into(), months: 1.0, censored: false }
}

fn touch(path: &Path) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, "").unwrap();
}

/// The files of these slides below `folder`, or what is wrong.
fn files(folder: &Path, backbone: &str, ids: &[&str]) -> Result<Vec<[String; 3]>, String> {
    let slides = ids.iter().map(|id| slide(id)).collect();
    let rows: HashMap<String, usize> = ids.iter().enumerate().map(|(i, id)| (id.to_string(), i + 2)).collect();
    let relative = |path: &PathBuf| path.strip_prefix(folder).unwrap().display().to_string();
    match find_features(slides, &rows, folder, backbone, &Scale::ALL) {
        Ok((found, missing)) if missing.slides.is_empty() => {
            Ok(found.iter().map(|(_, files)| Scale::ALL.map(|scale| relative(files.get(scale).unwrap()))).collect())
        }
        Ok((_, missing)) => Err(missing.slides[0].reason.clone()),
        Err(e) => Err(e.to_string()),
    }
}

#[test]
fn slide_files_extensions_are_left_out_of_names() {
    let folder = tempfile::tempdir().unwrap();
    let x = |x: &str, file: &str| folder.path().join("enc").join(x).join(file);
    let ids = ["a.svs", "b.ndpi", "c.TIF", "d.mrxs", "e", "f.svs", "g.h.dcm"];
    // f's file has the slide's whole name, which comes first
    let stems = ["a", "b", "c", "d", "e", "f.svs", "g.h"];
    for magnification in ["x5", "x10", "x20"] {
        stems.iter().for_each(|stem| touch(&x(magnification, &format!("pt_files/{stem}.pt"))));
    }
    touch(&x("x10", "pt_files/f.pt"));
    let found = files(folder.path(), "enc", &ids).unwrap();
    for (files, stem) in found.iter().zip(stems) {
        assert_eq!(*files, ["x5", "x10", "x20"].map(|x| format!("enc/{x}/pt_files/{stem}.pt")));
    }
    let error = files(folder.path(), "enc", &["a.svs", "z.ndpi"]).unwrap_err();
    let expected = x("x5", "pt_files/z.pt");
    assert_eq!(error, format!("no features at x5, x10, x20, looked for the likes of {}", expected.display()));
    let error = files(folder.path(), "enc", &["z.ndpi"]).unwrap_err();
    assert!(
        error.contains("at x5, x10 and x20 of none of the 1 slides (1 lack x5, 1 lack x10, 1 lack x20)")
            && error.contains("z.pt"),
        "{error}"
    );
    assert!(
        files(folder.path(), "other", &["a"])
            .unwrap_err()
            .contains("other: is not a folder; features are looked for in")
    );
}

#[test]
fn the_folders_of_trident_and_stamp_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let touch = |path: &str| touch(&folder.path().join(path));
    let trident = ["5x_512px_0px_overlap", "10x_256px_0px_overlap", "20x_256px_64px_overlap"];
    for place in trident {
        touch(&format!("{place}/features_uni_v1/a.h5"));
        touch(&format!("{place}/features_conch_v15/a.h5"));
        touch(&format!("{place}/slide_features_titan/a.h5"));
        touch(&format!("{place}/patches/a_patches.h5"));
    }
    let hash = "0a1b2c3d4e5f60718293a4b5c6d7e8f9";
    for x in ["x5", "x10", "x20"] {
        touch(&format!("{x}/mahmood-uni-{hash}/a.h5"));
        touch(&format!("{x}/mahmood-uni-slide/a.h5"));
        touch(&format!("flat/{x}/a.h5"));
    }
    assert_eq!(
        files(folder.path(), "uni_v1", &["a.svs"]).unwrap()[0],
        trident.map(|x| format!("{x}/features_uni_v1/a.h5"))
    );
    let stamp = ["x5", "x10", "x20"].map(|x| format!("{x}/mahmood-uni-{hash}/a.h5"));
    assert_eq!(files(folder.path(), "mahmood-uni", &["a.svs"]).unwrap()[0], stamp);
    assert_eq!(
        files(folder.path(), "flat", &["a.svs"]).unwrap()[0],
        ["x5", "x10", "x20"].map(|x| format!("flat/{x}/a.h5"))
    );
    // the place of one that is missing
    let error = files(folder.path(), "uni_v1", &["a", "b"]).unwrap_err();
    assert!(error.contains("5x_512px_0px_overlap/features_uni_v1/b.h5"), "{error}");
    // two patch sizes at one magnification, two versions of STAMP, two tools
    touch("20x_512px_0px_overlap/features_uni_v1/a.h5");
    let error = files(folder.path(), "uni_v1", &["a"]).unwrap_err();
    assert!(
        error.contains(
            "at x20 in both 20x_256px_64px_overlap/features_uni_v1 and 20x_512px_0px_overlap/features_uni_v1; expected one"
        ),
        "{error}"
    );
    touch(&format!("x5/mahmood-uni-{}/a.h5", hash.replace('a', "b")));
    assert!(files(folder.path(), "mahmood-uni", &["a"]).unwrap_err().contains("at x5 in both x5/mahmood-uni-0a1b"));
    touch("conch_v15/x10/pt_files/a.pt");
    assert!(files(folder.path(), "conch_v15", &["a"]).unwrap_err().contains("in both conch_v15/x10 and 10x_256px"));
}

#[test]
fn slides_that_share_a_file_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |x: &str, name: &str| folder.path().join(format!("enc/{x}/pt_files/{name}.pt"));
    for x in ["x5", "x10", "x20"] {
        ["a", "b", "c", "linked"].iter().for_each(|name| touch(&path(x, name)));
    }
    assert_eq!(files(folder.path(), "enc", &["a", "b.svs", "c"]).unwrap().len(), 3);
    // a manifest that lists a slide twice gives it twice
    assert_eq!(files(folder.path(), "enc", &["a", "a"]).unwrap().len(), 2);
    for (ids, expected) in [
        (
            ["a", "b", "a.svs"],
            "x5/pt_files/a.pt: is the feature file of two slides, `a` (row 2 of the clinical table) and `a.svs` (row 4 of the clinical table)",
        ),
        (
            ["b", "a.svs", "a.SVS"],
            "two slides, `a.svs` (row 3 of the clinical table) and `a.SVS` (row 4 of the clinical table)",
        ),
        (
            ["b", "a.svs", "a.tif"],
            "two slides, `a.svs` (row 3 of the clinical table) and `a.tif` (row 4 of the clinical table)",
        ),
    ] {
        let error = files(folder.path(), "enc", &ids).unwrap_err();
        assert!(error.contains(expected), "{error}\nexpected: {expected}");
    }
    let linked = path("x20", "linked");
    std::fs::remove_file(&linked).unwrap();
    std::os::unix::fs::symlink("c.pt", &linked).unwrap();
    let error = files(folder.path(), "enc", &["a", "c", "linked"]).unwrap_err();
    assert!(error.contains("x20/pt_files/linked.pt: is the feature file of two slides"), "{error}");
    std::fs::remove_file(&linked).unwrap();
    std::fs::hard_link(path("x20", "c"), &linked).unwrap();
    let error = files(folder.path(), "enc", &["linked", "a", "c"]).unwrap_err();
    assert!(
        error.contains("x20/pt_files/c.pt: is the feature file of two slides") && error.contains("`linked` (row 2 of"),
        "{error}"
    );
}

/// A hundred and fifty patients with small bags below `folder`, two folds of them, and a run of a
/// narrow model's two epochs on them.
fn small_cohort(folder: &Path) -> RunConfig {
    let noise = |i: usize| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as f32 / (1 << 24) as f32 - 0.5;
    let mut clinical = String::from(",case_id,slide_id,censorship,survival_months\n");
    for patient in 0..150 {
        let z = noise(patient);
        let months = 60.0 * (-2.0 * z).exp() + 5.0 * noise(patient + 1000);
        clinical += &format!("{patient},P-{patient:03},P-{patient:03}-A.svs,{},{months:.2}\n", patient % 3 / 2);
        for (x, patches) in [("x5", 2), ("x10", 5), ("x20", 9)] {
            let folder = folder.join("features/small").join(x).join("pt_files");
            std::fs::create_dir_all(&folder).unwrap();
            let value = |(i, j)| noise(7919 * patient + 83 * i + j + patches) + if j == 0 { z } else { 0.0 };
            let bag = ndarray::Array2::from_shape_fn((patches, 8), value);
            write_pt(&folder.join(format!("P-{patient:03}-A.pt")), bag.view()).unwrap();
        }
    }
    std::fs::write(folder.join("clinical.csv"), clinical).unwrap();
    std::fs::create_dir_all(folder.join("splits")).unwrap();
    for fold in 0..2 {
        let side = |patient: usize| if patient % 2 == fold { "val" } else { "train" };
        let rows: String = (0..150).map(|patient| format!("P-{patient:03},{}\n", side(patient))).collect();
        std::fs::write(folder.join(format!("splits/splits_{fold}.csv")), format!("case_id,split\n{rows}")).unwrap();
    }
    RunConfig {
        clinical: folder.join("clinical.csv"),
        splits: folder.join("splits"),
        pt_dir: folder.join("features"),
        backbone: "small".into(),
        embed_dim: 16,
        num_heads: 2,
        num_epochs: 2,
        warmup_epochs: 0,
        grad_accum_steps: 8,
        threads: 2,
        ..RunConfig::default()
    }
}

fn train(config: &RunConfig, folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    let run = Run::open(config.clone()).unwrap();
    run.save_config(folder).unwrap();
    run.train(folder, &AtomicBool::new(false), None).unwrap();
}

fn device() -> Device {
    Device::from_name("cpu", 2).unwrap()
}

/// case_id, slide_id and risk of each row of predictions.csv.
fn predictions(folder: &Path) -> Vec<[String; 3]> {
    let mut table = csv::Reader::from_path(folder.join("predictions.csv")).unwrap();
    table.records().map(|row| row.unwrap()).map(|row| [0, 1, 5].map(|i| row[i].to_string())).collect()
}

/// A fold of these patients: one in five is for testing, one in five for validation, the last five
/// are in no column.
fn write_fold(path: &Path, tested: bool) {
    let mut table = String::from("train,val,test\n");
    for patient in 0..145 {
        let mut cells = [const { String::new() }; 3];
        cells[[0, 0, 0, 1, if tested { 2 } else { 0 }][patient % 5]] = format!("P-{patient:03}");
        table += &(cells.join(",") + "\n");
    }
    std::fs::write(path, table).unwrap();
}

#[test]
fn test_slides_are_reported_and_have_no_say() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = small_cohort(&folder.path().join("cohort"));
    config.splits = folder.path().join("splits");
    std::fs::create_dir_all(&config.splits).unwrap();
    write_fold(&config.splits.join("splits_0.csv"), true);
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    train(&config, &one);
    let summary = eval::evaluate_run(&one, &Moved::default(), device(), None, PLAN).unwrap();
    assert!(
        summary.protocol.contains("The results are of the folds\u{2019} test slides, which were used once"),
        "{}",
        summary.protocol
    );
    assert!(summary.protocol.contains(
        "chosen by the C-index on its validation slides, and label bins were cut over all slides but the test"
    ));
    let rows = predictions(&one);
    let cases: BTreeSet<&str> = rows.iter().map(|[case, ..]| case.as_str()).collect();
    let expected: Vec<String> = (0..145).filter(|i| i % 5 == 4).map(|i| format!("P-{i:03}")).collect();
    assert_eq!(cases, expected.iter().map(String::as_str).collect());
    // and the epoch is the best one on the validation slides
    let metrics = crossfusion::folder::read_metrics(&one, 0..2).unwrap();
    let best = metrics.iter().max_by(|a, b| a.val_c_index.partial_cmp(&b.val_c_index).unwrap()).unwrap();
    assert_eq!(summary.folds[0].best_epoch, Some(best.epoch));
    let left_out = std::fs::read_to_string(one.join("left_out.csv")).unwrap();
    assert!(left_out.contains("P-145,P-145-A.svs,in no fold") && left_out.lines().count() == 1 + 5, "{left_out}");

    // one checkpoint on this fold predicts the same
    let path = one.join("fold_0/best.safetensors");
    let checkpoint = Checkpoint { path: &path, source: config.source(), split: Some((&config.splits, 0)), heads: None };
    let out = folder.path().join("alone");
    eval::evaluate_checkpoint(&checkpoint, &out, device(), None, PLAN).unwrap();
    assert_eq!(predictions(&out), rows);
    assert!(std::fs::read_to_string(out.join("report.html")).unwrap().contains("test part of fold 0"));

    // other outcomes of the test patients, some beyond all others, give the same weights and
    // predictions
    let text = std::fs::read_to_string(&config.clinical).unwrap();
    let change = |line: &str| {
        let mut cells: Vec<String> = line.split(',').map(String::from).collect();
        if expected.contains(&cells[1]) {
            cells[3] = if cells[3] == "0" { "1".into() } else { "0".into() };
            cells[4] = format!("{}", 1.0 + cells[0].parse::<f64>().unwrap());
        }
        cells.join(",") + "\n"
    };
    config.clinical = folder.path().join("other.csv");
    std::fs::write(&config.clinical, text.lines().map(change).collect::<String>()).unwrap();
    train(&config, &two);
    let weights = |run: &Path| read_state_dict(&run.join("fold_0/best.safetensors")).unwrap();
    assert!(weights(&one) == weights(&two), "test outcomes have changed the weights");
    eval::evaluate_run(&two, &Moved::default(), device(), None, PLAN).unwrap();
    assert_eq!(predictions(&two), rows);

    // nested: the fold's own validation slides choose, and bins are of the training slides
    config.protocol = Protocol::Nested;
    let dataset = Dataset::open(&config.source()).unwrap();
    let fold = dataset.fold(&config.splits, 0).unwrap();
    let part = protocol::prepare(&config, &dataset, (0, &fold)).unwrap();
    let training: Vec<Slide> = fold.train.iter().map(|&i| dataset.slides[i].clone()).collect();
    assert_eq!((&part.slides.train, &part.slides.val, part.held_out), (&fold.train, &fold.val, fold.test.len()));
    assert_eq!(part.bins, Bins::cut(&training, 4).unwrap());

    // results of two kinds are not put together
    write_fold(&config.splits.join("splits_1.csv"), false);
    let error = Run::open(config).err().unwrap().to_string();
    assert!(error.contains("has test slides in fold 0 and none in fold 1, expected all folds alike"), "{error}");
}

/// Two outcomes of one patient are no second fold.
#[test]
fn patients_are_said_to_be_in_several_folds_where_they_are() {
    let notes = |second_fold: usize, second_time: f64| {
        let row = |i: usize, case: usize, fold: usize, time: f64| SlideResult {
            case_id: format!("P{case}"),
            slide_id: format!("S{i}"),
            fold,
            time,
            event: true,
            risk: i as f64,
            ..SlideResult::default()
        };
        let mut rows: Vec<_> = (0..8).map(|i| row(i, i, i % 2 * second_fold, i as f64)).collect();
        rows.push(row(8, 0, second_fold, second_time));
        let fold = |fold| report::FoldFacts { fold, train_slides: None, best_epoch: None, bin_edges: Vec::new() };
        let folds: Vec<_> = (0..=second_fold).map(fold).collect();
        Summary::new(&folds, &rows, PLAN).unwrap().notes.join("\n")
    };
    let said = "validated in several folds";
    let (one, two) = (notes(0, 5.0), notes(1, 0.0));
    assert!(one.contains("the slides of patient P0 have different outcomes") && !one.contains(said), "{one}");
    assert!(two.contains(said), "{two}");
}

#[test]
fn columns_are_kept_in_the_settings() {
    let config = RunConfig { columns: "time=OS.time:days,event=OS".parse().unwrap(), ..RunConfig::default() };
    let text = config.to_toml().unwrap();
    assert!(text.contains("columns = \"event=OS,time=OS.time:days\""), "{text}");
    assert_eq!(toml::from_str::<RunConfig>(&text).unwrap(), config);
    assert!(!RunConfig::default().to_toml().unwrap().contains("columns"));
    let error = toml::from_str::<RunConfig>("columns = \"age=x\"").unwrap_err().to_string();
    assert!(error.contains("columns: `age`, expected case_id"), "{error}");
}

fn program(path: &str, arguments: &[&str], folder: &Path) -> Output {
    let out = Command::new(path).args(arguments).current_dir(folder).output().unwrap();
    assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    out
}

#[test]
fn folds_numbered_from_1_keep_their_numbers() {
    let (train, eval) = (env!("CARGO_BIN_EXE_cf-train"), env!("CARGO_BIN_EXE_cf-eval"));
    let folder = tempfile::tempdir().unwrap();
    let config = small_cohort(&folder.path().join("cohort"));
    for fold in [1, 0] {
        let path = |fold: usize| config.splits.join(format!("splits_{fold}.csv"));
        std::fs::rename(path(fold), path(fold + 1)).unwrap();
    }
    std::fs::write(folder.path().join("settings.toml"), config.to_toml().unwrap()).unwrap();
    program(train, &["--config", "settings.toml", "--out", "run"], folder.path());
    let run = folder.path().join("run");
    let resolved = RunConfig::read(&run.join("config.toml")).unwrap();
    assert_eq!((resolved.folds, resolved.first_fold, resolved.fold_numbers()), (Some(2), 1, 1..3));
    let read = |file: &str| std::fs::read(run.join(file)).unwrap();
    let folds: Vec<usize> =
        crossfusion::folder::read_metrics(&run, 1..3).unwrap().iter().map(|epoch| epoch.fold).collect();
    assert_eq!(folds, [1, 1, 2, 2]);
    let (best, predicted) =
        (["fold_1", "fold_2"].map(|f| read(&format!("{f}/best.safetensors"))), read("predictions.csv"));

    // the second fold again, with the same result
    std::fs::remove_dir_all(run.join("fold_2")).unwrap();
    program(train, &["--resume", "run"], folder.path());
    assert!(best == ["fold_1", "fold_2"].map(|f| read(&format!("{f}/best.safetensors"))), "a resumed fold differs");
    assert_eq!(crossfusion::folder::read_metrics(&run, 1..3).unwrap().len(), 4);
    let said = program(train, &["--resume", "run"], folder.path());
    assert!(String::from_utf8_lossy(&said.stdout).contains("run is finished"), "{said:?}");
    program(eval, &["run", "--bootstrap", "40"], folder.path());
    assert!(predicted == read("predictions.csv"));
    program(eval, &["compare", "run", "run", "--out", "same", "--bootstrap", "40"], folder.path());

    // fold 1 is splits_1.csv
    let arguments = "--checkpoint run/fold_1/best.safetensors --clinical cohort/clinical.csv --pt-dir cohort/features \
                     --backbone small --splits cohort/splits --fold 1 --out alone --bootstrap 40";
    program(eval, &arguments.split_whitespace().collect::<Vec<_>>(), folder.path());
    let alone = predictions(&folder.path().join("alone"));
    assert_eq!(alone, predictions(&run)[..alone.len()]);

    // fewer than there are, which is said
    let said = program(train, &["--config", "settings.toml", "--out", "one", "--folds", "1"], folder.path());
    assert!(
        String::from_utf8_lossy(&said.stdout).contains("note: The folder of folds holds 2, of which --folds takes 1"),
        "{said:?}"
    );
    assert!(folder.path().join("one/fold_1").is_dir() && !folder.path().join("one/fold_2").exists());
    let summary = std::fs::read_to_string(folder.path().join("one/summary.json")).unwrap();
    assert!(summary.contains("The folder of folds holds 2, of which --folds takes 1."));
}

/// Twelve patients; the manifest lacks one slide, features another, the folds a third, and the
/// table an outcome of one that they name.
#[test]
fn every_slide_left_out_is_listed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (mut clinical, mut manifest) =
        (String::from("PATIENT_ID;slide_id;event;OS_DAYS\n"), String::from("id\tfilename\n"));
    for i in 0..12 {
        clinical += &format!("TCGA-AA-00{i:02}-0{i};S{i}.ndpi;{};{}\n", i % 2, 30 * (i + 1));
        if i != 3 {
            manifest += &format!("{i}\tS{i}.ndpi\n");
        }
        for magnification in ["x5", "x10", "x20"].iter().filter(|x| (i, **x) != (4, "x10")) {
            let folder = path("features/enc").join(magnification).join("pt_files");
            std::fs::create_dir_all(&folder).unwrap();
            let bag = ndarray::Array2::from_shape_fn((4, 3), |(a, b)| (i + a * b) as f32);
            write_pt(&folder.join(format!("S{i}.pt")), bag.view()).unwrap();
        }
    }
    // two barcodes of one patient, on two sides
    clinical = clinical.replace("TCGA-AA-0001-01", "TCGA-AA-0000-01");
    manifest += "13\tTCGA-ZZ-0013.svs\n";
    std::fs::write(path("clinical.csv"), &clinical).unwrap();
    std::fs::write(path("manifest.csv"), &manifest).unwrap();
    std::fs::create_dir(path("splits")).unwrap();
    let split = "S0,S1\nS2,S4\nS3,S6\nS8,S7\nS9,TCGA-ZZ-0013\nS10,S11\n";
    std::fs::write(path("splits/splits_0.csv"), format!("train,val\n{split}")).unwrap();
    let config = RunConfig {
        clinical: path("clinical.csv"),
        manifest: Some(path("manifest.csv")),
        splits: path("splits"),
        pt_dir: path("features"),
        backbone: "enc".into(),
        n_classes: 2,
        embed_dim: 16,
        num_heads: 2,
        ..RunConfig::default()
    };
    let dataset = Dataset::open(&config.source()).unwrap();
    let looked_for = path("features/enc/x10/pt_files/S4.pt").display().to_string();
    assert_eq!(
        dataset.notes(),
        [
            "The clinical table is read by other columns: case_id from `PATIENT_ID`; censorship from `event`, in which 1 is the \
             event; survival_months from `OS_DAYS`, in days"
                .to_string(),
            "1 of 12 slides left out, not in the manifest; the first is `S3.ndpi`".into(),
            "Some case ids are of one patient, `TCGA-AA-0000-00` and `TCGA-AA-0000-01` for example: 11 cases are counted as \
             patients, and are 10; case_id should name the patient"
                .into(),
            format!(
                "1 of 12 slides left out, without features (0 at x5, 1 at x10, 0 at x20); the first is `S4.ndpi`, looked for as \
                 {looked_for}"
            ),
        ]
    );
    let fold = dataset.fold(&config.splits, 0).unwrap();
    let leak = "Fold 0 leaks: 1 patient is on two of its sides under several case ids, such as `TCGA-AA-0000-00` in train and \
                `TCGA-AA-0000-01` in val; its result is optimistic";
    assert_eq!(fold.notes, [leak]);
    assert_eq!(fold.reported(), fold.val);
    let row = |slide_id: &str, case_id: &str, reason: &str| LeftOut {
        slide_id: slide_id.into(),
        case_id: case_id.into(),
        reason: reason.into(),
    };
    let expected = [
        row("S3.ndpi", "TCGA-AA-0003-03", "not in the manifest"),
        row("S4.ndpi", "TCGA-AA-0004-04", &format!("no features at x10, looked for the likes of {looked_for}")),
        row("S5.ndpi", "TCGA-AA-0005-05", "in no fold"),
        row("", "TCGA-ZZ-0013", "named in the folds, but without an outcome in the clinical table"),
    ];
    assert_eq!(dataset.left_out([&fold].into_iter()), expected);
    let config = RunConfig { grad_accum_steps: 2, ..config };
    Run::open(config).unwrap().save_config(folder.path()).unwrap();
    let mut table = csv::Reader::from_path(path("left_out.csv")).unwrap();
    let rows: Vec<LeftOut> = table.records().map(|r| r.unwrap()).map(|r| row(&r[1], &r[0], &r[2])).collect();
    assert_eq!(rows, expected);
}
