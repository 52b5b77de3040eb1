//! What cannot be evaluated, and what has changed since the training.

use super::*;

/// The run was trained for other outcomes than it is evaluated on.
#[test]
fn an_edited_clinical_table_is_noticed() {
    let (run, mut config) = copy_of_trained("edited");
    let about_cohort = |summary: &Summary| {
        summary
            .warnings
            .iter()
            .filter(|text| text.contains("other than it was trained for"))
            .cloned()
            .collect::<Vec<_>>()
    };
    assert_eq!(about_cohort(evaluated()), [""; 0]);
    let text = std::fs::read_to_string(&config.clinical).unwrap();
    let mut lines: Vec<String> = text.lines().map(String::from).collect();
    lines[1] += "1"; // another digit of the first slide's months
    config.clinical = run.join("edited.csv");
    std::fs::write(&config.clinical, lines.join("\n") + "\n").unwrap();
    std::fs::write(run.join("config.toml"), config.to_toml().unwrap()).unwrap();
    let notes = about_cohort(&eval::evaluate_run(&run, &Moved::default(), device(), None, PLAN).unwrap());
    assert!(notes.len() == 1 && notes[0].contains("a table, a fold or the features have changed"), "{notes:?}");
}

#[test]
fn a_folds_state_is_no_model() {
    let (run, config) = copy_of_trained("state");
    let path = run.join("fold_0/checkpoint.safetensors");
    let checkpoint = Checkpoint { path: &path, source: config.source(), split: None, heads: None };
    let error = eval::evaluate_checkpoint(&checkpoint, &run.join("out"), device(), None, PLAN).unwrap_err().to_string();
    assert!(
        error.contains("checkpoint.safetensors: is a fold's state") && error.contains("best.safetensors"),
        "{error}"
    );
}

#[test]
fn what_cannot_be_evaluated_is_said() {
    let (run, config) = copy_of_trained("refused");
    let said = |result: crossfusion::Result<_>| result.map(|_: Summary| ()).unwrap_err().to_string();
    let error = said(eval::evaluate_run(&run.join("fold_0"), &Moved::default(), device(), None, PLAN));
    assert!(error.contains("is not a run folder"), "{error}");

    let path = run.join("fold_0/metrics.jsonl");
    let checkpoint = Checkpoint { path: &path, source: config.source(), split: None, heads: None };
    let error = said(eval::evaluate_checkpoint(&checkpoint, &run.join("out"), device(), None, PLAN));
    assert!(error.contains("metrics.jsonl"), "{error}");

    // features of another width
    for magnification in ["x5", "x10", "x20"] {
        let folder = run.join("features/narrow").join(magnification).join("pt_files");
        std::fs::create_dir_all(&folder).unwrap();
        write_pt(&folder.join("DEMO-001-A.pt"), ndarray::Array2::zeros((4, 8)).view()).unwrap();
    }
    let pt_dir = run.join("features");
    let source = Source { pt_dir: &pt_dir, backbone: "narrow", ..config.source() };
    let path = run.join("fold_0/best.safetensors");
    let checkpoint = Checkpoint { path: &path, source, split: None, heads: None };
    let error = said(eval::evaluate_checkpoint(&checkpoint, &run.join("out"), device(), None, PLAN));
    assert!(error.contains("best.safetensors: takes features of width 64, but narrow's are 8"), "{error}");
    assert!(!run.join("out").exists(), "nothing is left behind");
}

/// Files of one fold that tell of different epochs: each edit is named in a warning.
#[test]
fn files_of_a_fold_that_do_not_belong_together_are_told() {
    let (run, _) = copy_of_trained("unlike");
    let path = run.join("fold_0/metrics.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    let warnings = |edited: &str| {
        std::fs::write(&path, edited).unwrap();
        let summary = eval::evaluate_run(&run, &Moved::default(), device(), None, PLAN).unwrap();
        summary.warnings.into_iter().filter(|warning| warning.contains("belong together")).collect::<Vec<_>>()
    };
    assert_eq!(warnings(&text), [""; 0]);
    let lines: Vec<&str> = text.lines().filter(|line| line.contains("\"fold\":0")).collect();
    let without_last = lines[..lines.len() - 1].join("\n") + "\n";
    let [warning] = &warnings(&without_last)[..] else { panic!("expected one warning") };
    assert!(warning.contains("metrics.jsonl has 2 epochs of it, its checkpoint 3"), "{warning}");
    let without_best = text.replace("\"best\":true", "\"best\":false");
    let [warning] = &warnings(&without_best)[..] else { panic!("expected one warning") };
    assert!(warning.contains("metrics.jsonl has none as the best, its checkpoint epoch"), "{warning}");

    // a file without an end is no table, in a run and where it is compared
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    let error = eval::evaluate_run(&run, &Moved::default(), device(), None, PLAN).unwrap_err().to_string();
    assert!(error.contains("metrics.jsonl: is larger than 1.0 GiB"), "{error}");
}

/// The card says what the heads are; a flag that says otherwise is not ignored. A run whose data
/// has moved.
#[test]
fn flags_that_contradict_a_model_are_refused_and_moved_data_is_found() {
    let (run, config) = copy_of_trained("moved");
    let path = run.join("fold_0/best.safetensors");
    let checkpoint = Checkpoint { path: &path, source: config.source(), split: None, heads: Some(4) };
    let error = eval::evaluate_checkpoint(&checkpoint, &run.join("out"), device(), None, PLAN).unwrap_err();
    assert!(error.to_string().ends_with("has 2 attention heads, not 4"), "{error}");
    assert_eq!(error.exit_code(), 2);

    let gone = RunConfig { pt_dir: run.join("nowhere"), ..config.clone() };
    std::fs::write(run.join("config.toml"), gone.to_toml().unwrap()).unwrap();
    assert!(eval::evaluate_run(&run, &Moved::default(), device(), None, PLAN).is_err());
    let moved = Moved { pt_dir: Some(config.pt_dir.clone()), ..Moved::default() };
    // what an evaluation left that was killed as it wrote, and what a training is writing
    let [ours, others] = [".report.html.123.tmp", ".inputs.json.124.tmp"].map(|name| run.join(name));
    for path in [&ours, &others] {
        std::fs::write(path, "half").unwrap();
    }
    let summary = eval::evaluate_run(&run, &moved, device(), None, PLAN).unwrap();
    assert_eq!(summary.folds[0].c_index, evaluated().folds[0].c_index);
    assert!(!ours.exists() && others.exists());
}

/// Features that have changed since training are named, and so is a C-index that is no longer the
/// recorded one.
#[test]
fn changed_features_and_another_c_index_are_noticed() {
    let (run, mut config) = copy_of_trained("changed");
    std::fs::copy(trained().0.join("inputs.json"), run.join("inputs.json")).unwrap();
    let pt_dir = run.join("features");
    for x in ["x5", "x10", "x20"] {
        let [from, to] = [&config.pt_dir, &pt_dir].map(|folder| folder.join("synthetic").join(x).join("pt_files"));
        std::fs::create_dir_all(&to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
    config.pt_dir.clone_from(&pt_dir);
    std::fs::write(run.join("config.toml"), config.to_toml().unwrap()).unwrap();
    let warnings = |summary: Summary| -> Vec<String> {
        let about_inputs = |text: &String| text.contains("inputs") || text.contains("was recorded");
        summary.warnings.into_iter().filter(about_inputs).collect()
    };
    let same = warnings(eval::evaluate_run(&run, &Moved::default(), device(), None, PLAN).unwrap());
    assert_eq!(same, [""; 0], "a copy of the features is the same features");
    // every second of the first slides has the opposite features at 10x
    let of = |name: &str| pt_dir.join(format!("synthetic/x10/pt_files/{name}.pt"));
    let patches = |path: &Path| crossfusion::data::features::FeatureFile::open(path).unwrap().read().unwrap();
    for slide in (0..60).step_by(2) {
        let path = of(&format!("DEMO-{slide:03}-A"));
        let flipped = patches(&path).mapv(|x| -x);
        write_pt(&path, flipped.view()).unwrap();
    }
    let changed = warnings(eval::evaluate_run(&run, &Moved::default(), device(), None, PLAN).unwrap());
    assert!(
        changed.iter().any(|note| note.contains("not those of the training") && note.contains("27 more")),
        "{changed:?}"
    );
    assert!(changed.iter().any(|note| note.contains("was recorded when its model was chosen")), "{changed:?}");
}

/// The model and its checkpoint say what it was trained by; an edited config.toml is not believed
/// over them.
#[test]
fn a_run_is_evaluated_by_the_settings_of_its_training_alone() {
    let (run, config) = copy_of_trained("settings");
    let said = || eval::evaluate_run(&run, &Moved::default(), device(), None, PLAN).unwrap_err().to_string();
    for (edit, expected) in [
        (RunConfig { loss_fn: Loss::CoxSurv, ..config.clone() }, "loss_fn = \"nll_surv\", but config.toml now says"),
        (RunConfig { protocol: Protocol::Nested, ..config.clone() }, "protocol = \"published\", but config.toml"),
        (RunConfig { num_heads: 4, ..config.clone() }, "num_heads = 2, but config.toml now says 4"),
        (RunConfig { seed: 8, ..config.clone() }, "seed = 7, but config.toml now says 8"),
    ] {
        std::fs::write(run.join("config.toml"), edit.to_toml().unwrap()).unwrap();
        assert!(said().contains(expected), "{}\nexpected: {expected}", said());
    }
    // without the checkpoint the model's own card is left
    let edit = RunConfig { num_heads: 4, ..config.clone() };
    std::fs::write(run.join("config.toml"), edit.to_toml().unwrap()).unwrap();
    let checkpoint = std::fs::read(run.join("fold_0/checkpoint.safetensors")).unwrap();
    std::fs::remove_file(run.join("fold_0/checkpoint.safetensors")).unwrap();
    assert!(said().contains("best.safetensors: is of another model than config.toml describes"), "{}", said());

    // a finished fold whose model is gone is not left out
    std::fs::write(run.join("config.toml"), config.to_toml().unwrap()).unwrap();
    std::fs::write(run.join("fold_0/checkpoint.safetensors"), checkpoint).unwrap();
    std::fs::remove_file(run.join("fold_0/best.safetensors")).unwrap();
    assert!(said().contains("best.safetensors: is gone, though its fold has chosen it"), "{}", said());
    let resumed =
        Run::open(config.clone()).unwrap().train(&run, &AtomicBool::new(false), None).unwrap_err().to_string();
    assert!(resumed.contains("is gone, though its fold"), "{resumed}");
}
