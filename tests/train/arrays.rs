//! Folds of one run in processes of their own, as jobs of a batch system train them.

use super::*;

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Stdio},
};

/// Five small folds: 32 patients to train on and 8 to validate.
fn five_folds(folder: &Path) -> RunConfig {
    let splits = folder.join("splits");
    std::fs::create_dir_all(&splits).unwrap();
    for fold in 0..5 {
        let mut table = String::from(",train,val\n");
        for patient in 1..=40 {
            let id = format!("DEMO-{patient:03}");
            table += &if patient % 5 == fold { format!(",,{id}\n") } else { format!(",{id},\n") };
        }
        std::fs::write(splits.join(format!("splits_{fold}.csv")), table).unwrap();
    }
    RunConfig { splits, folds: None, checkpoint_every: 5, threads: 1, ..config() }
}

fn spawn(arguments: &[&str], folder: &Path) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cf-train"));
    command.args(arguments).current_dir(folder).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn cf_eval(run: &str, folder: &Path) -> Output {
    // the report says on how many threads
    Command::new(env!("CARGO_BIN_EXE_cf-eval")).args([run, "--threads", "1"]).current_dir(folder).output().unwrap()
}

/// A program's refusal; nobody has seen it panic.
fn refusal(arguments: &[&str], folder: &Path, code: i32) -> String {
    let out = cf_train(arguments, folder);
    let stderr = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(code), "{arguments:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{arguments:?}: {stderr}");
    stderr
}

/// A report but for the day and time of the training.
fn undated(report: &str) -> String {
    let (before, after) = report.split_once("<div><dt>Trained</dt>").unwrap();
    let (_, after) = after.split_once("</div>").unwrap();
    before.to_string() + after
}

#[test]
fn folds_in_processes_of_their_own_are_the_run_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let settings = write_config(folder, &five_folds(folder));
    let settings = settings.to_str().unwrap();
    let out = cf_train(&["--config", settings, "--out", "run"], folder);
    assert!(out.status.success(), "{out:?}");
    std::fs::rename(folder.join("run"), folder.join("whole")).unwrap();

    // all begin the run at once; two are killed in the middle, and the same command goes on
    let numbers = ["0", "1", "2", "3", "4"];
    let fold = |number: &str| spawn(&["--config", settings, "--out", "run", "--fold", number], folder);
    let mut children = numbers.map(fold);
    let (whole, run) = (folder.join("whole"), folder.join("run"));
    for (fold, child) in children.iter_mut().enumerate().skip(3) {
        let checkpoint = FoldTrainer::checkpoint_path(&crossfusion::folder::fold_folder(&run, fold));
        while !checkpoint.exists() {
            assert!(child.try_wait().unwrap().is_none(), "fold {fold} ended without a checkpoint");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap(); // SIGKILL
    }
    for (number, child) in numbers.iter().zip(children) {
        let out = child.wait_with_output().unwrap();
        assert_eq!(out.status.success(), !["3", "4"].contains(number), "fold {number}: {out:?}");
    }
    assert_eq!(run::unfinished(&run, 0..5).unwrap(), [3, 4]);
    let some = cf_eval("run", folder);
    let stdout = String::from_utf8_lossy(&some.stdout);
    assert!(some.status.success(), "{some:?}");
    assert!(stdout.contains("Fold 3") || stdout.contains("no model of fold"), "{stdout}");
    let out = cf_train(&["--resume", "run", "--fold", "4"], folder);
    let stdout = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && stdout.contains("fold 4 of run is trained, but not yet fold 3"), "{out:?}");
    let out = cf_train(&["--config", settings, "--out", "run", "--fold", "3"], folder);
    let stdout = String::from_utf8_lossy(&out.stdout);
    assert!(stdout.contains("fold 3 of run is trained, and so are all others; cf-eval run reports"), "{out:?}");
    // the report that is there lacks two folds: this is not finished yet
    let out = cf_train(&["--resume", "run"], folder);
    assert!(out.status.success() && !String::from_utf8_lossy(&out.stdout).contains("is finished"), "{out:?}");
    let out = cf_train(&["--resume", "run"], folder);
    assert!(String::from_utf8_lossy(&out.stdout).contains("run is finished"), "{out:?}");

    let read = |run: &Path, file: &str| std::fs::read(run.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
    let of_run = ["config.toml", "inputs.json", "left_out.csv", "predictions.csv", "summary.json"].map(String::from);
    let of_folds = numbers
        .iter()
        .flat_map(|fold| ["best.safetensors", "checkpoint.safetensors"].map(|file| format!("fold_{fold}/{file}")));
    for file in of_run.into_iter().chain(of_folds) {
        assert!(read(&whole, &file) == read(&run, &file), "{file} differs");
    }
    let metrics = |run: &Path| -> Vec<EpochMetrics> {
        let epochs = crossfusion::folder::read_metrics(run, 0..5).unwrap().into_iter();
        epochs.map(|epoch| EpochMetrics { seconds: 0.0, patches_per_second: 0.0, ..epoch }).collect()
    };
    assert_eq!(metrics(&whole).len(), 15);
    assert_eq!(metrics(&whole), metrics(&run));
    let report = |run: &Path| undated(&String::from_utf8(read(run, "report.html")).unwrap());
    assert!(report(&whole) == report(&run), "the reports differ");
    let left = std::fs::read_dir(&run).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let temporary: Vec<String> = left.filter(|name| name.ends_with(".tmp")).collect();
    assert_eq!(temporary, [""; 0]);
}

/// What keeps processes apart, and what keeps a run together.
#[test]
fn a_fold_that_does_not_belong_to_the_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let config = RunConfig { num_epochs: 1, ..five_folds(folder) };
    let settings = write_config(folder, &config);
    let settings = settings.to_str().unwrap();
    let refused = |arguments: &[&str], code, expected: &str| {
        let said = refusal(&[&["--config", settings], arguments].concat(), folder, code);
        assert!(said.contains(expected), "{arguments:?}: {said}\nexpected: {expected}");
    };
    refused(&["--fold", "1"], 2, "--fold 1: expected --out as well");
    refused(&["--fold", "5", "--out", "run"], 2, "--fold 5: the run has folds 0, 1, 2, 3 and 4");
    refused(&["--fold", "3", "--folds", "1", "--out", "run"], 2, "--fold 3: the run has fold 0");
    refused(&["--fold", "1", "--out", "run", "--check"], 2, "cannot be used with");
    assert!(refusal(&["--demo", "--fold", "1", "--out", "run"], folder, 2).contains("cannot be used with"));
    refused(&["--fold", "1", "--out", "settings.toml"], 2, "is a file, expected a folder");
    refused(&["--fold", "1", "--out", "splits"], 2, "and is no run; choose another");
    assert!(!folder.join("run").exists(), "a refused process left a folder");

    // what a process leaves that was killed while it began the run
    let run = folder.join("run");
    std::fs::create_dir(&run).unwrap();
    std::fs::write(run.join(".config.toml.12-0f.tmp"), "seed = ").unwrap();
    std::fs::write(run.join("inputs.json"), "{\"tables\":{},\"features\":{}}").unwrap();
    let out = cf_train(&["--config", settings, "--out", "run", "--fold", "1"], folder);
    assert!(out.status.success(), "{out:?}");
    assert!(!run.join(".config.toml.12-0f.tmp").exists(), "the half-written file is still there");
    let stdout = String::from_utf8(out.stdout).unwrap();
    assert!(stdout.contains("fold 1 of run is trained, but not yet folds 0, 2, 3 and 4"), "{stdout}");
    let out = cf_eval("run", folder);
    let stdout = String::from_utf8(out.stdout).unwrap();
    let expected = "WARNING: There is no model of folds 0, 2, 3 and 4 yet: these figures are of fold 1 alone.";
    assert!(out.status.success() && stdout.contains(expected), "{stdout}");

    refused(
        &["--fold", "2", "--out", "run", "--learning-rate", "0.5"],
        2,
        "--out run: the run was begun with learning_rate = 0.001, not 0.5; choose another --out",
    );
    let said = refusal(&["--resume", "run", "--fold", "2", "--seed", "9"], folder, 2);
    assert!(said.contains("--resume keeps the run's settings, and seed is 7 there, not 9"), "{said}");
    let table = config.splits.join("splits_3.csv");
    let good = std::fs::read_to_string(&table).unwrap();
    std::fs::write(&table, good.replacen(",DEMO-001,\n", "", 1)).unwrap();
    for arguments in [["--out", "run", "--fold", "2"], ["--resume", "run", "--fold", "2"]] {
        let config: &[&str] = if arguments[0] == "--out" { &["--config", settings] } else { &[] };
        let said = refusal(&[config, &arguments].concat(), folder, 1);
        assert!(said.contains("begun with other inputs") && said.contains("splits_3.csv has another"), "{said}");
    }
    std::fs::write(&table, &good).unwrap();

    // as another process holds it; when it ends, killed or not, its lock is gone
    std::fs::create_dir_all(run.join("fold_2")).unwrap();
    let held = std::fs::File::create(run.join("fold_2/.lock")).unwrap();
    held.lock().unwrap();
    refused(&["--fold", "2", "--out", "run"], 1, "run/fold_2: another cf-train is at work on this fold");
    let all = refusal(&["--resume", "run"], folder, 1);
    assert!(all.contains("run/fold_2: another cf-train is at work on this fold"), "{all}");
    drop(held);
    // one process trains what is left, and reports
    let out = cf_train(&["--resume", "run"], folder);
    assert!(out.status.success() && run.join("report.html").is_file(), "{out:?}");
    assert_eq!(run::unfinished(&run, 0..5).unwrap(), [0; 0]);

    // an earlier version's run, whose folds wrote one file
    let metrics = crossfusion::folder::read_metrics(&run, 0..5).unwrap();
    let files = [0, 1, 2, 3, 4].map(|fold| crossfusion::folder::metrics_path(&run, fold));
    let lines: String = files.iter().map(|file| std::fs::read_to_string(file).unwrap()).collect();
    files.iter().for_each(|file| std::fs::remove_file(file).unwrap());
    std::fs::write(run.join("metrics.jsonl"), lines).unwrap();
    assert_eq!(crossfusion::folder::read_metrics(&run, 0..5).unwrap(), metrics);
}

/// A batch system's SIGTERM: the command that is said goes on with this fold.
#[test]
fn an_interrupted_fold_says_how_it_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let long = RunConfig { num_epochs: 10_000, es_patience: 10_000, ..five_folds(folder) };
    let settings = write_config(folder, &long);
    let child = spawn(&["--config", settings.to_str().unwrap(), "--out", "run", "--fold", "3"], folder);
    let checkpoint = folder.join("run/fold_3/checkpoint.safetensors");
    let start = Instant::now();
    while !checkpoint.exists() {
        assert!(start.elapsed() < Duration::from_secs(120), "no checkpoint in two minutes");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let out = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(143), "{stderr}");
    assert!(stderr.contains("stopped; go on with: cf-train --resume run --fold 3"), "{stderr}");
    assert!(!folder.join("run/fold_0").exists());
}

/// Runs of several seeds are the runs of each, fold by fold or not, and are reported side by side.
#[test]
fn seeds_are_runs_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let settings = write_config(folder, &RunConfig { num_epochs: 1, folds: Some(2), ..five_folds(folder) });
    let settings = settings.to_str().unwrap();
    let train = |arguments: &[&str]| {
        let out = cf_train(&[&["--config", settings], arguments].concat(), folder);
        assert!(out.status.success(), "{arguments:?}: {out:?}");
        String::from_utf8(out.stdout).unwrap()
    };
    let said = train(&["--seeds", "2", "--out", "both"]);
    train(&["--seed", "8", "--out", "alone"]);
    let read = |file: &str| std::fs::read(folder.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
    let best = |run: &str| [0, 1].map(|fold| read(&format!("{run}/fold_{fold}/best.safetensors")));
    assert!(best("both/seed_8") == best("alone") && best("both/seed_7") != best("alone"));
    assert!(read("both/seed_8/predictions.csv") == read("alone/predictions.csv"));

    // the numbers of the runs' own summaries, and their mean and standard deviation of two
    let json = |file: &str| serde_json::from_slice::<serde_json::Value>(&read(file)).unwrap();
    let seeds = json("both/seeds.json");
    let [a, b] = [7, 8].map(|seed| {
        let summary = json(&format!("both/seed_{seed}/summary.json"));
        summary["by_slide"]["c_index_pooled"]["estimate"].as_f64().unwrap()
    });
    assert_eq!(seeds["seeds"][1]["by_slide"]["c_index_pooled"].as_f64(), Some(b));
    assert_eq!(seeds["over_seeds"][0]["mean"]["c_index_pooled"].as_f64(), Some((a + b) / 2.0));
    let sd = seeds["over_seeds"][0]["sd"]["c_index_pooled"].as_f64().unwrap();
    assert!((sd - (a - b).abs() / 2.0f64.sqrt()).abs() < 1e-12, "{sd} of {a} and {b}");
    let row = |name: &str| said.lines().find(|line| line.trim_start().starts_with(name)).unwrap().to_string();
    assert!(row("8").contains(&format!("{b:.4}")) && row("mean").contains(&format!("{:.4}", (a + b) / 2.0)), "{said}");
    assert!(String::from_utf8(read("both/report.html")).unwrap().contains("href=\"seed_8/report.html\""));

    // fold by fold, and one seed whose second fold is not there yet
    train(&["--seeds", "2", "--fold", "1", "--out", "parts"]);
    train(&["--seed", "7", "--fold", "0", "--out", "parts/seed_7"]);
    let said = String::from_utf8(cf_eval("parts", folder).stdout).unwrap();
    for warning in [
        "WARNING: Seed 8: There is no model of fold 0 yet: these figures are of fold 1 alone.",
        "WARNING: The seeds are not evaluated on the same folds",
    ] {
        assert!(said.contains(warning), "{said}");
    }
    train(&["--seeds", "2", "--fold", "0", "--out", "parts"]);
    assert!(cf_eval("parts", folder).status.success());
    assert_eq!(json("parts/seeds.json"), seeds);

    let refused = |arguments: &[&str], expected: &str| {
        let said = refusal(&[&["--config", settings], arguments].concat(), folder, 2);
        assert!(said.contains(expected), "{said}\nexpected: {expected}");
    };
    refused(&["--seeds", "2"], "--seeds 2: expected --out as well");
    refused(&["--seeds", "2", "--out", "alone"], "--out alone: is the run of one seed");
    refused(&["--fold", "1", "--out", "both"], "and is no run; choose another");
    let last = i64::MAX.to_string();
    refused(&["--seeds", "2", "--seed", &last, "--out", "large"], "on, expected none beyond 9223372036854775807");
    assert!(!folder.join("large").exists());
    refused(&["--seeds", "3", "--alpha-surv", "0.5", "--out", "both"], "begun with alpha_surv = 0.2, not 0.5");
    std::fs::create_dir_all(folder.join("both/seed_9")).unwrap();
    let other = std::fs::read_to_string(folder.join("alone/config.toml")).unwrap().replace("seed = 8", "seed = 9");
    std::fs::write(folder.join("both/seed_9/config.toml"), &other).unwrap();
    let said = String::from_utf8(cf_eval("both", folder).stdout).unwrap();
    assert!(said.contains("WARNING: There is no model of seed 9 yet."), "{said}");
    std::fs::write(folder.join("both/seed_9/config.toml"), other.replace("alpha_surv = 0.2", "alpha_surv = 0.3"))
        .unwrap();
    let said = String::from_utf8(cf_eval("both", folder).stderr).unwrap();
    assert!(said.contains("seed_9: has alpha_surv = 0.3, and both/seed_7 0.2: they are not seeds of one"), "{said}");
    // a job whose --seed was forgotten would count one seed twice
    std::fs::write(folder.join("both/seed_9/config.toml"), other.replace("seed = 9", "seed = 7")).unwrap();
    let said = String::from_utf8(cf_eval("both", folder).stderr).unwrap();
    assert!(said.contains("seed_9: its config.toml has seed = 7, expected that of the folder's name"), "{said}");
}

/// An earlier version's process holds the lock of the run's folder for as long as it trains.
#[test]
fn a_process_that_waits_for_another_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let settings = write_config(folder, &RunConfig { num_epochs: 1, ..five_folds(folder) });
    std::fs::create_dir(folder.join("run")).unwrap();
    let held = std::fs::File::create(folder.join("run/.lock")).unwrap();
    held.lock().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_cf-train"));
    command.args(["--config", settings.to_str().unwrap(), "--out", "run", "--fold", "0"]).current_dir(folder);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let (said, lines) = std::sync::mpsc::channel();
    let reader =
        std::thread::spawn(move || stdout.lines().for_each(|line| said.send(line.unwrap()).unwrap_or_default()));
    let first = lines.recv_timeout(Duration::from_secs(120)).expect("not a word in two minutes");
    assert_eq!(first, "waiting for another cf-train that is at work in run");
    assert!(!folder.join("run/config.toml").exists());
    drop(held);
    reader.join().unwrap();
    assert!(child.wait().unwrap().success());
}

/// Some network file systems have no locks; then a process does not take away what another is
/// writing, and says what the user has to see to.
#[cfg(target_os = "linux")]
#[test]
fn folds_begin_a_run_without_locks() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let settings = write_config(folder, &RunConfig { num_epochs: 1, ..five_folds(folder) });
    std::fs::write(
        folder.join("no_locks.c"),
        "#include <errno.h>\nint flock(int f, int o) { errno = ENOSYS; return -1; }",
    )
    .unwrap();
    // the linker that Rust itself takes
    let mut compile = Command::new("cc");
    compile.args(["-shared", "-fPIC", "-o", "no_locks.so", "no_locks.c"]).current_dir(folder);
    assert!(compile.status().unwrap().success());
    std::fs::create_dir(folder.join("run")).unwrap();
    let of_another = folder.join("run/.inputs.json.12-0f.tmp");
    std::fs::write(&of_another, "{").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_cf-train"));
    command.args(["--config", settings.to_str().unwrap(), "--out", "run", "--fold", "0"]).current_dir(folder);
    let out = command.env("LD_PRELOAD", folder.join("no_locks.so")).output().unwrap();
    assert!(out.status.success(), "{out:?}");
    assert!(of_another.exists(), "it took away what another process was writing");
    let stdout = String::from_utf8(out.stdout).unwrap();
    let note = "note: run/fold_0: the file system has no locks (";
    assert!(stdout.contains(note), "{stdout}");
}

/// Training that ends meanwhile does not make an evaluation say that its files do not fit: the
/// fold ends here after its metrics are read, while the evaluation waits for `inputs.json`, a pipe.
#[test]
fn a_fold_may_end_while_it_is_evaluated() {
    use std::os::unix::fs::OpenOptionsExt;
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let config = RunConfig { folds: Some(1), num_epochs: 2, ..five_folds(folder) };
    let settings = write_config(folder, &config);
    assert!(cf_train(&["--config", settings.to_str().unwrap(), "--out", "run"], folder).status.success());
    let metrics = crossfusion::folder::metrics_path(&folder.join("run"), 0);
    let checkpoint = FoldTrainer::checkpoint_path(&folder.join("run/fold_0"));
    let (lines, ended) = (std::fs::read_to_string(&metrics).unwrap(), std::fs::read(&checkpoint).unwrap());
    std::fs::write(&metrics, lines.split_inclusive('\n').next().unwrap()).unwrap();
    std::fs::remove_file(&checkpoint).unwrap();
    let inputs = folder.join("run/inputs.json");
    let fingerprints = std::fs::read(&inputs).unwrap();
    std::fs::remove_file(&inputs).unwrap();
    assert!(Command::new("mkfifo").arg(&inputs).status().unwrap().success());

    let mut command = Command::new(env!("CARGO_BIN_EXE_cf-eval"));
    let mut child = command.arg("run").current_dir(folder).stdout(Stdio::piped()).spawn().unwrap();
    let open = |flags| std::fs::OpenOptions::new().write(true).custom_flags(flags).open(&inputs);
    // without waiting, it cannot be opened until there is a reader; kept, so that the pipe has no
    // end yet
    let found = loop {
        match open(libc::O_NONBLOCK) {
            Ok(found) => break found,
            Err(_) => assert!(child.try_wait().unwrap().is_none(), "the evaluation did not read inputs.json"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut pipe = open(0).unwrap();
    drop(found);
    std::fs::write(&metrics, &lines).unwrap();
    std::fs::write(&checkpoint, &ended).unwrap();
    pipe.write_all(&fingerprints).unwrap();
    drop(pipe);
    let out = child.wait_with_output().unwrap();
    let stdout = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && stdout.contains("report run/report.html"), "{stdout}");
    assert!(!stdout.contains("do not belong together"), "{stdout}");
}
