//! `cf-slide predict` and `heatmap` on the demo's run: what they print and write, and the page in a
//! headless browser.

use std::{
    path::PathBuf,
    process::{Command, Output},
    sync::{OnceLock, atomic::AtomicBool},
};

use crossfusion::{
    data::{demo, features::FeatureFile},
    device::Device,
    eval,
    model::Scale,
    survival::Bootstrap,
    train::{config::RunConfig, run::Run},
};
use crossfusion_slides::{
    coordinates::Coordinates,
    features::{self, Format},
    patching::coordinates_path,
    slide::Level,
};
use serde_json::Value;

fn cf_slide(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cf-slide")).args(arguments).output().unwrap()
}

fn succeeds(arguments: &[&str]) -> String {
    let Output { status, stdout, stderr } = cf_slide(arguments);
    assert!(status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

fn fails(code: i32, arguments: &[&str]) -> String {
    let Output { status, stderr, .. } = cf_slide(arguments);
    assert_eq!(status.code(), Some(code), "{arguments:?}");
    String::from_utf8(stderr).unwrap()
}

/// The demo's cohort and a run of it of two folds and an epoch each, with coordinates of one slide.
struct Demo {
    folder: tempfile::TempDir,
    run: PathBuf,
}

const SLIDE: &str = "DEMO-003-A";

fn demo() -> &'static Demo {
    static DEMO: OnceLock<Demo> = OnceLock::new();
    DEMO.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let (cohort, run) = (folder.path().join("cohort"), folder.path().join("run"));
        demo::write_demo(&cohort, 7).unwrap();
        let config = RunConfig {
            clinical: cohort.join("demo_cohort.csv"),
            splits: cohort.join("splits"),
            pt_dir: cohort.join("features"),
            backbone: "synthetic".into(),
            folds: Some(2),
            embed_dim: 16,
            num_heads: 2,
            num_epochs: 2,
            warmup_epochs: 0,
            ..RunConfig::default()
        };
        std::fs::create_dir(&run).unwrap();
        let training = Run::open(config).unwrap();
        training.save_config(&run).unwrap();
        training.train(&run, &AtomicBool::new(false), None).unwrap();
        let plan = Bootstrap { replicates: 20, ..Bootstrap::default() };
        eval::evaluate_run(&run, &eval::Moved::default(), Device::from_name("cpu", 0).unwrap(), None, plan).unwrap();
        for scale in Scale::ALL {
            let features = cohort.join(format!("features/synthetic/{scale}/pt_files/{SLIDE}.pt"));
            let patches = FeatureFile::open(&features).unwrap().patches();
            let side = 1024 >> (scale as usize);
            let across = 4 << (scale as usize);
            let corners = (0..patches as i64).map(|i| [i % across * side, i / across * side]).collect();
            let path = coordinates_path(&folder.path().join("patches"), scale, SLIDE);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let level = Level { width: 4096, height: 16384, downsample: 1.0 };
            Coordinates { corners, level: 0, size: side as usize, slide: None }.write(&path, SLIDE, level).unwrap();
        }
        Demo { folder, run }
    })
}

impl Demo {
    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().into()
    }

    /// A command's arguments, on the demo's features.
    fn arguments<'a>(&'a self, command: &[&'a str]) -> Vec<String> {
        let features = ["--pt-dir", &self.path("cohort/features"), "--backbone", "synthetic"].map(String::from);
        let run = self.run.to_str().unwrap().to_string();
        let command: Vec<String> = command.iter().map(ToString::to_string).collect();
        [&command[..1], &[run], &command[1..], &features].concat()
    }

    fn succeeds(&self, command: &[&str]) -> String {
        let arguments = self.arguments(command);
        succeeds(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

#[test]
fn a_slide_is_predicted_beside_the_runs_cohort() {
    let demo = demo();
    let out = demo.path("prediction");
    let said = demo.succeeds(&["predict", SLIDE, "DEMO-000-B", "--out", &out]);
    assert!(said.contains(SLIDE) && said.contains("percentile"), "{said}");
    let json: Value = serde_json::from_slice(&std::fs::read(format!("{out}/predictions.json")).unwrap()).unwrap();
    let slides = json["slides"].as_array().unwrap();
    assert_eq!(slides.len(), 2);
    let risks: Vec<f64> = slides[0]["risk_by_model"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    let spread = (risks[0] - risks[1]).abs() / 2f64.sqrt();
    assert!((slides[0]["risk_spread"].as_f64().unwrap() - spread).abs() < 1e-12);

    // the percentile again, from the run's own table: the mean over its folds
    let mut cohort = csv::Reader::from_path(demo.run.join("predictions.csv")).unwrap();
    let heads = cohort.headers().unwrap().clone();
    let place = |name: &str| heads.iter().position(|head| head == name).unwrap();
    let rows: Vec<(usize, f64)> = cohort
        .records()
        .map(|row| row.unwrap())
        .map(|row| (row[place("fold")].parse().unwrap(), row[place("risk")].parse().unwrap()))
        .collect();
    let below = |fold: usize| {
        let of_fold: Vec<f64> = rows.iter().filter(|row| row.0 == fold).map(|row| row.1).collect();
        let count = |is: &dyn Fn(f64) -> bool| of_fold.iter().filter(|&&risk| is(risk)).count() as f64;
        100.0 * (count(&|risk| risk < risks[fold]) + count(&|risk| risk == risks[fold]) / 2.0) / of_fold.len() as f64
    };
    let percentile = (below(0) + below(1)) / 2.0;
    assert!((slides[0]["percentile"].as_f64().unwrap() - percentile).abs() < 1e-9, "expected {percentile}");
}

#[test]
fn every_method_writes_its_scores() {
    let demo = demo();
    let patches = demo.path("patches");
    let mut sums = Vec::new();
    for (method, scales) in [("gradient", 3), ("integrated", 3), ("attention", 2), ("class-token", 3), ("occlusion", 3)]
    {
        let out = demo.path(method);
        let more = ["--points", "5", "--squares", "6"];
        let command = ["heatmap", SLIDE, "--method", method, "--patches", &patches, "--out", &out];
        let said = demo.succeeds(&[&command[..], &more].concat());
        assert_eq!(said.contains("completeness"), method == "integrated", "{said}");
        assert_eq!(said.matches("rank correlation").count(), if method == "occlusion" { 2 } else { 0 }, "{said}");

        let mut table = csv::Reader::from_path(format!("{out}/heatmap.csv")).unwrap();
        let rows: Vec<csv::StringRecord> = table.records().map(Result::unwrap).collect();
        let geojson: Value = serde_json::from_slice(&std::fs::read(format!("{out}/heatmap.geojson")).unwrap()).unwrap();
        let tiles = geojson["features"].as_array().unwrap();
        assert_eq!((geojson["type"].as_str(), tiles.len()), (Some("FeatureCollection"), rows.len()));
        for (row, tile) in rows.iter().zip(tiles) {
            let [x, y, side, score] = [2, 3, 4, 5].map(|i| row[i].parse::<f64>().unwrap());
            let ring = tile["geometry"]["coordinates"][0].as_array().unwrap();
            assert_eq!(ring[2], serde_json::json!([(x + side) as i64, (y + side) as i64]));
            assert_eq!(tile["properties"]["objectType"], "tile");
            let measured = tile["properties"]["measurements"].as_object().unwrap();
            assert_eq!(measured.values().next().unwrap().as_f64(), Some(score));
        }
        let of_scales: std::collections::BTreeSet<&str> = rows.iter().map(|row| &row[1]).collect();
        assert_eq!(of_scales.len(), scales, "{method}");
        for scale in of_scales {
            assert!(std::path::Path::new(&format!("{out}/heatmap_{scale}.png")).is_file());
        }
        sums.push(rows.iter().map(|row| row[5].parse::<f64>().unwrap()).sum::<f64>());
    }
    // what a patch of x5 and x20 receives is shared out among all
    assert!((sums[2] - 2.0).abs() < 1e-4, "{sums:?}");
}

/// A slide whose x20 features alone are larger than the budget.
#[test]
fn a_heatmap_within_a_memory_budget_is_the_same() {
    let demo = demo();
    let slide = "LARGE";
    for (scale, patches) in Scale::ALL.into_iter().zip([20, 60, 60_000]) {
        let (across, side) = (250, 1024 >> (scale as usize));
        let corners: Vec<[i64; 2]> = (0..patches).map(|i| [i % across * side, i / across * side]).collect();
        let values = (0..64 * patches as u32).map(|i| f32::from((i.wrapping_mul(2_654_435_761) >> 16) as i16) / 2e4);
        let values: Vec<f32> = values.collect();
        let path = features::path(&demo.folder.path().join("large/large"), scale, slide, Format::H5);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        features::write(&path, Format::H5, &corners, &values).unwrap();
    }
    let (run, features) = (demo.run.to_str().unwrap(), demo.path("large"));
    let heatmap = |out: &str, budget: &str| {
        let out = demo.path(out);
        let arguments = ["heatmap", run, slide, "--pt-dir", &features, "--backbone", "large", "--out", &out];
        let output = cf_slide(&[&arguments[..], &["--memory-budget", budget]].concat());
        let scores = std::fs::read(format!("{out}/heatmap.csv")).map(|table| {
            let rows = csv::Reader::from_reader(&table[..]).into_records().map(Result::unwrap);
            rows.map(|row| (row[1].to_string(), row[5].parse::<f64>().unwrap())).collect::<Vec<_>>()
        });
        (output, scores.unwrap_or_default())
    };
    let (output, held) = heatmap("held", "8GiB");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(held.len(), 60_080);
    let (output, streamed) = heatmap("streamed", "14MiB"); // the features are of 14.6
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for scale in Scale::ALL.map(Scale::name) {
        let of = |scores: &[(String, f64)]| -> Vec<f64> {
            scores.iter().filter(|(of, _)| of == scale).map(|(_, score)| *score).collect()
        };
        let (held, streamed) = (of(&held), of(&streamed));
        let size = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
        let off = size(&mut held.iter().zip(&streamed).map(|(a, b)| a - b)) / size(&mut held.iter().copied());
        assert!(off < 1e-4, "{scale}: off by {off:.1e}");
    }
    let (output, nothing) = heatmap("too-little", "1MiB");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), nothing.len()), (Some(2), 0), "{error}");
    assert!(error.contains("do not fit into a memory budget of 1.0 MiB: the least is"), "{error}");
    assert!(!std::path::Path::new(&demo.path("too-little")).exists(), "something was written");
}

#[test]
fn what_is_missing_is_named() {
    let (demo, out) = (demo(), demo().path("refused"));
    let with = |command: &[&str]| demo.arguments(command);
    let fails = |code: i32, command: &[String]| fails(code, &command.iter().map(String::as_str).collect::<Vec<_>>());
    let message = fails(1, &with(&["heatmap", SLIDE, "--out", &out]));
    assert!(message.contains("DEMO-003-A.pt") && message.contains("--patches"), "{message}");
    let message = fails(1, &with(&["heatmap", "NO-SLIDE", "--out", &out]));
    assert!(message.contains("NO-SLIDE"), "{message}");
    let message = fails(1, &with(&["predict", "NO-SLIDE", "--out", &out]));
    assert!(message.contains("NO-SLIDE"), "{message}");
    assert!(!std::path::Path::new(&out).exists(), "something was written");

    // before anything is computed
    let (patches, out) = (demo.path("patches"), demo.path("cohort/demo_cohort.csv"));
    let command = ["heatmap", SLIDE, "--method", "occlusion", "--patches", &patches, "--out", &out];
    let output = cf_slide(&with(&command).iter().map(String::as_str).collect::<Vec<_>>());
    let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(error.contains("demo_cohort.csv: cannot be made") && !said.contains("alike"), "{said}{error}");
}

/// The page's script, in Chromium without a network: all patches are drawn.
#[test]
fn the_page_draws_in_a_browser() {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let Some(browser) = names.into_iter().find(|name| Command::new(name).arg("--version").output().is_ok()) else {
        eprintln!("SKIPPED: there is no Chromium to try the page in; `apt-get install chromium`");
        return;
    };
    let demo = demo();
    let (patches, out) = (demo.path("patches"), demo.path("page"));
    demo.succeeds(&["heatmap", SLIDE, "--patches", &patches, "--out", &out]);
    let rows = csv::Reader::from_path(format!("{out}/heatmap.csv")).unwrap().records().count();
    let flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"];
    let output = Command::new(browser).args(flags).arg(format!("file://{out}/heatmap.html")).output().unwrap();
    let page = String::from_utf8_lossy(&output.stdout);
    assert!(page.contains(&format!("data-patches=\"{rows}\"")), "{rows} patches: {}", &page[..page.len().min(300)]);
}
