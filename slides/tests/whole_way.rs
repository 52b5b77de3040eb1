//! scripts/whole-way.sh on generated slides, from slides to heatmaps; and `--onnx` of `predict` and
//! `heatmap`, which takes a slide all the way by itself.

mod common;

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use common::{cf_slide, stderr, stdout, write_slide};
use crossfusion_slides::{
    heatmap::Ground,
    slide::{Slide, check_library},
};
use serde_json::Value;

const ONNX: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/means.onnx");
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/whole-way.sh");
/// Names as people have them, the second slide's in a folder of its own.
const SLIDES: [&str; 2] = ["1 [A], \"rechts\".tiff", "2 größer.v2.tiff"];
const FOLDERS: [&str; 2] = ["my slides", "my slides/case 2"];
const PATCHING: [&str; 4] = ["--power", "20", "--preset", "bwh-biopsy"];

/// Squares of tissue of 256 pixels, of colours that `number` changes.
fn mosaic(number: usize) -> impl Fn(usize, usize) -> [u8; 3] {
    move |x, y| {
        let [i, j] = [x, y].map(|at| at / 256);
        let colour = [200 - 40 * number as u8, 20 + 10 * i as u8, 30 + (i * j * (7 + number) % 5 * 20) as u8];
        if (1..=4).contains(&i) && (1..=4).contains(&j) { colour } else { [255; 3] }
    }
}

/// What the script left of two slides.
struct Way {
    folder: tempfile::TempDir,
}

impl Way {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn slide(&self, number: usize) -> String {
        self.path(FOLDERS[number]).join(SLIDES[number]).to_str().unwrap().into()
    }

    fn script(&self) -> std::process::Output {
        let programs = Path::new(env!("CARGO_BIN_EXE_cf-slide")).parent().unwrap();
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(SCRIPT);
        command.arg(self.path("my slides")).arg(ONNX).arg(self.path("out")).args(PATCHING);
        command.env("PATH", path).output().unwrap()
    }
}

/// Runs the script once; None, said loudly, where something that it needs is not there.
fn way(test: &str) -> Option<&'static Way> {
    static WAY: OnceLock<Result<Way, String>> = OnceLock::new();
    let make = || {
        if !Path::new(env!("CARGO_BIN_EXE_cf-slide")).with_file_name("cf-train").exists() {
            return Err("cf-train is not built; `cargo build --release` does it".into());
        }
        let way = Way { folder: tempfile::tempdir().unwrap() };
        std::fs::create_dir_all(way.path(FOLDERS[1])).unwrap();
        std::fs::write(Path::new(&way.slide(0)).with_extension("xml"), "<annotations/>").unwrap();
        (0..2).for_each(|i| write_slide(Path::new(&way.slide(i)), 6 * 256, 6 * 256, mosaic(i)));
        std::fs::write(way.path("my slides/broken.svs"), "no slide").unwrap();
        // a slide that is lost once it has been patched
        let (gone, patches) = (way.path("gone.tiff"), way.path("out/patches"));
        write_slide(&gone, 6 * 256, 6 * 256, mosaic(0));
        cf_slide(&[&["patch", gone.to_str().unwrap(), "--out", patches.to_str().unwrap()], &PATCHING[..]].concat());
        std::fs::remove_file(gone).unwrap();
        let output = way.script();
        if stderr(&output).contains("is not installed") {
            return Err(stderr(&output));
        }
        assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
        assert!(stdout(&output).contains("broken.svs: is not a slide"), "{}", stdout(&output));
        assert!(stdout(&output).contains("gone.tiff: cannot be read"), "{}", stdout(&output));
        Ok(way)
    };
    match WAY.get_or_init(make) {
        Ok(way) => Some(way),
        Err(why) => {
            eprintln!("SKIPPED {test}: {why}");
            None
        }
    }
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Slides and risks of a predictions.json.
fn risks(folder: &Path) -> Vec<(String, f64)> {
    let json: Value = serde_json::from_str(&text(&folder.join("predictions.json"))).unwrap();
    let slides = json["slides"].as_array().unwrap().iter();
    slides.map(|slide| (slide["slide_id"].as_str().unwrap().into(), slide["risk"].as_f64().unwrap())).collect()
}

fn name(slide: &str) -> &str {
    slide.strip_suffix(".tiff").unwrap()
}

#[test]
fn the_script_goes_from_slides_to_heatmaps() {
    let Some(way) = way("the_script_goes_from_slides_to_heatmaps") else { return };
    let out = way.path("out");
    let found = risks(&out.join("predictions"));
    assert_eq!(found.iter().map(|(slide, _)| slide.as_str()).collect::<Vec<_>>(), SLIDES.map(name));
    for slide in SLIDES.map(name) {
        let heatmap = out.join("heatmaps").join(slide);
        // 1, 4 and 16 patches, and the head of the table
        assert_eq!(text(&heatmap.join("heatmap.csv")).lines().count(), 1 + 1 + 4 + 16);
        for file in ["heatmap.png", "heatmap_x5.png", "heatmap.html", "heatmap.geojson", "heatmap_tiles/0/0_0.jpg"] {
            assert!(heatmap.join(file).is_file(), "{file}");
        }
    }
    // what is there is not done again, but for the slide that failed
    let written = |file: &str| out.join(file).metadata().unwrap().modified().unwrap();
    let files = ["predictions/predictions.csv", "run/fold_0/best.safetensors", "run/report.html"];
    let before = files.map(written);
    let again = way.script();
    assert!(again.status.success(), "{}", stderr(&again));
    assert_eq!(before, files.map(written));
}

#[test]
fn a_slide_goes_all_the_way_by_onnx() {
    let Some(way) = way("a_slide_goes_all_the_way_by_onnx") else { return };
    let (out, run) = (way.path("out"), way.path("out/run"));
    let run = run.to_str().unwrap();
    let (prediction, heatmap) = (way.path("prediction"), way.path("heatmap"));
    let (prediction_, heatmap_) = (prediction.to_str().unwrap(), heatmap.to_str().unwrap());
    let by_onnx = [&["--onnx", ONNX], &PATCHING[..]].concat();
    let slides = [way.slide(0), way.slide(1)];
    let command = [&["predict", run, &slides[0], &slides[1], "--out", prediction_], &by_onnx[..]].concat();
    let output = cf_slide(&command);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(risks(&prediction), risks(&out.join("predictions")));
    let output = cf_slide(&[&["heatmap", run, &slides[1], "--out", heatmap_], &by_onnx[..]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let theirs = out.join("heatmaps").join(name(SLIDES[1]));
    for file in ["heatmap.csv", "heatmap.geojson", "heatmap.html"] {
        assert!(text(&heatmap.join(file)) == text(&theirs.join(file)), "{file} differs");
    }

    // of a folder, those that can be read
    let all = way.path("all");
    let slides = way.path("my slides");
    let command = ["predict", run, slides.to_str().unwrap(), "--out", all.to_str().unwrap()];
    let output = cf_slide(&[&command, &by_onnx[..]].concat());
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("1 of 3 slides failed"), "{}", stderr(&output));
    assert_eq!(risks(&all), risks(&prediction));
    let left_out = text(&all.join("left_out.csv"));
    assert!(left_out.contains("broken") && left_out.contains("is not a slide of a format"), "{left_out}");

    // slides without tissue, and none at all
    let broken = way.path("my slides/broken.svs");
    let no_tissue = way.path("white.tiff");
    write_slide(&no_tissue, 1024, 1024, |_, _| [255; 3]);
    for (slide, why) in [(&broken, "is not a slide of a format that OpenSlide reads"), (&no_tissue, "no tissue")] {
        let refused = way.path("refused");
        for command in ["predict", "heatmap"] {
            let arguments = [command, run, slide.to_str().unwrap(), "--out", refused.to_str().unwrap()];
            let output = cf_slide(&[&arguments, &by_onnx[..]].concat());
            assert_eq!(output.status.code(), Some(1), "{command}");
            let said = stderr(&output);
            assert!(said.contains(why) && said.contains(slide.to_str().unwrap()), "{command}: {said}");
            let _ = std::fs::remove_dir_all(&refused);
        }
    }
}

#[test]
fn what_cannot_be_done_is_said_before_it_takes_time() {
    let Some(way) = way("what_cannot_be_done_is_said_before_it_takes_time") else { return };
    let (run, out) = (way.path("out/run"), way.path("nothing"));
    let (run, slide, slides) = (run.to_str().unwrap(), way.slide(0), way.path("my slides"));
    // it takes 12 features, and means.onnx gives 3
    let other = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/models/CrossFusion.pt");
    let slides = slides.to_str().unwrap();
    for (command, model, slide, code, why) in [
        ("predict", other, &*slide, 1, "CrossFusion.pt: takes features of width 12, but means's are 3"),
        ("heatmap", other, &slide, 1, "CrossFusion.pt: takes features of width 12, but means's are 3"),
        ("predict", slides, &slide, 2, "my slides: is neither a run folder, it has no config.toml, nor a model"),
        ("predict", "nowhere", &slide, 1, "nowhere: cannot be read"),
        ("heatmap", run, slides, 2, "my slides: is a folder, expected a slide"),
    ] {
        let output = cf_slide(&[command, model, slide, "--onnx", ONNX, "--out", out.to_str().unwrap()]);
        let said = stderr(&output);
        assert!(output.status.code() == Some(code) && said.contains(why), "{command} {model}: {said}");
        assert!(!out.exists(), "{command} {model}: something was written");
    }
    // settings by which there is no tissue, and then others into the same folder
    let command = ["predict", run, &slide, "--onnx", ONNX, "--power", "20", "--out", out.to_str().unwrap()];
    let output = cf_slide(&command);
    assert!(output.status.code() == Some(1) && stderr(&output).contains("try --preset"), "{}", stderr(&output));
    let output = cf_slide(&[&command[..], &["--preset", "bwh-biopsy"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
}

/// A slide that is not at hand is named with its ending or without, or by a file of its features.
#[test]
fn features_are_found_by_any_name_of_their_slide() {
    let Some(way) = way("features_are_found_by_any_name_of_their_slide") else { return };
    let (run, features, patches) = (way.path("out/run"), way.path("out/features"), way.path("out/patches"));
    let [run, features_, patches] = [&run, &features, &patches].map(|path| path.to_str().unwrap());
    let name = name(SLIDES[1]);
    let file = features.join(format!("means/x10/pt_files/{name}.pt"));
    let expected = text(&way.path("out/heatmaps").join(name).join("heatmap.csv"));
    for (i, named) in [SLIDES[1], name, file.to_str().unwrap()].into_iter().enumerate() {
        let out = way.path(&format!("named {i}"));
        let arguments = ["heatmap", run, named, "--pt-dir", features_, "--backbone", "means", "--patches", patches];
        let output = cf_slide(&[&arguments[..], &["--out", out.to_str().unwrap()]].concat());
        assert!(output.status.success(), "{named}: {}", stderr(&output));
        assert!(stdout(&output).contains("is no slide; pictures are on white"), "{}", stdout(&output));
        assert_eq!(text(&out.join("heatmap.csv")), expected, "{named}");
    }
}

/// A picture's last row and column may lie partly beyond the slide's edge.
#[test]
fn pictures_are_white_beyond_the_edge() {
    if let Err(why) = check_library() {
        eprintln!("SKIPPED pictures_are_white_beyond_the_edge: {why}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("white.tiff");
    write_slide(&path, 300, 203, |_, _| [255; 3]);
    let slide = Slide::open(&path).unwrap();
    let ground = Ground::new(Some(&slide), &[]);
    for downsample in [1, 4, 8] {
        let picture = ground.picture([0, 0], 304 / downsample, 208 / downsample, downsample as f64).unwrap();
        assert!(picture.pixels.iter().all(|&x| x == 255), "by {downsample}: {:?}", picture.pixels.iter().min());
    }
}
