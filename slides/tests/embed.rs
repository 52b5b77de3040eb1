//! `cf-slide embed` on a generated slide, and on real slides against features that PyTorch made.

mod common;

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use common::{cf_slide, shared, stderr, stdout, write_slide};
use crossfusion::{data::features::FeatureFile, model::Scale};
use crossfusion_slides::{
    coordinates::Coordinates,
    features::{self, Format},
    patching::{self, coordinates_path},
};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

/// Runs `cf-slide`, which must succeed; None, said loudly, where a library is not installed.
fn run(test: &str, arguments: &[&str]) -> Option<String> {
    let output = cf_slide(arguments);
    let errors = stderr(&output);
    if errors.contains("is not installed") || stdout(&output).contains("is not installed") {
        eprintln!("SKIPPED {test}: {errors}");
        return None;
    }
    assert!(output.status.success(), "{errors}{}", stdout(&output));
    Some(stdout(&output))
}

/// Tissue from pixel 256 on, each square of 256 pixels in a colour of its own. The squares begin at
/// 257, where the patches do: closing by an even number of pixels moves what it closes by one.
fn mosaic(x: usize, y: usize) -> [u8; 3] {
    let [i, j] = [x, y].map(|at| if at == 256 { 1 } else { at.saturating_sub(1) / 256 });
    if (1..=4).contains(&i) && (1..=4).contains(&j) { [200, 20 + 10 * i as u8, 30 + 10 * j as u8] } else { [255; 3] }
}

#[test]
fn features_of_a_generated_slide_are_its_colours() {
    let test = "features_of_a_generated_slide_are_its_colours";
    let folder = tempfile::tempdir().unwrap();
    let [slides, patches, out] = ["slides", "patches", "features"].map(|name| folder.path().join(name));
    std::fs::create_dir(&slides).unwrap();
    write_slide(&slides.join("mosaic.tiff"), 6 * 256, 6 * 256, mosaic);
    let [slides, patches_, out_] = [&slides, &patches, &out].map(|path| path.to_str().unwrap());
    let patched = run(test, &["patch", slides, "--out", patches_, "--power", "20", "--preset", "bwh-biopsy"]);
    if patched.is_none() {
        return;
    }
    let onnx = format!("{FIXTURES}/means.onnx");
    for (format, kind) in [("pt", Format::Pt), ("safetensors", Format::Safetensors), ("h5", Format::H5)] {
        let arguments =
            ["embed", patches_, "--backbone", &onnx, "--out", out_, "--format", format, "--batch-size", "5"];
        let Some(said) = run(test, &arguments) else { return };
        assert!(said.contains("1 slides embedded (21 patches), 0 were there already, 0 failed"), "{said}");
        for (scale, count) in Scale::ALL.into_iter().zip([1, 4, 16]) {
            let corners = Coordinates::read(&coordinates_path(&patches, scale, "mosaic")).unwrap().corners;
            let path = features::path(&out.join("means"), scale, "mosaic", kind);
            let found = FeatureFile::open(&path).unwrap().read().unwrap();
            assert_eq!((found.dim(), corners.len()), ((count, 3), count), "{scale}");
            for (corner, features) in corners.iter().zip(found.rows()) {
                // a patch of one colour keeps it, however it is resized
                let [r, g, b] = mosaic(corner[0] as usize, corner[1] as usize).map(|x| f32::from(x) / 255.0);
                let expected = [(r - 0.5) / 0.5, (g - 0.25) / 0.25, b];
                let off = features.iter().zip(expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
                assert!(scale != Scale::X20 || off < 1e-5, "{corner:?}: {features} and {expected:?}");
            }
        }
        let again = run(test, &arguments).unwrap();
        assert!(again.contains("0 slides embedded (0 patches), 1 were there already"), "{again}");
    }

    // another recipe into the same folder is refused, and a recipe that is wrong says so
    let [onnx, toml] = ["means.onnx", "means.toml"].map(|name| folder.path().join(name));
    std::fs::copy(format!("{FIXTURES}/means.onnx"), &onnx).unwrap();
    let recipe = std::fs::read_to_string(format!("{FIXTURES}/means.toml")).unwrap();
    for (from, to, code, why) in [
        ("bilinear", "bicubic", 2, "holds features of another network, recipe or patches"),
        ("features = 3", "features = 4", 1, "gives [21, 3] for 21 patches, expected [21, 4] (`features` of its .toml)"),
        ("input = 32", "input = 64", 1, "expected one of [batch, 3, 64, 64]"),
        ("mean = ", "means = ", 1, "means.toml: is no recipe of a backbone"),
    ] {
        std::fs::write(&toml, recipe.replace(from, to)).unwrap();
        let name = if code == 2 { "means" } else { "other" };
        let output =
            cf_slide(&["embed", patches_, "--backbone", onnx.to_str().unwrap(), "--out", out_, "--name", name]);
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert!(stderr(&output).contains(why), "{}", stderr(&output));
        let _ = std::fs::remove_dir_all(out.join("other"));
    }
    // and so are other weights beside the same network
    std::fs::write(&toml, &recipe).unwrap();
    let weights = folder.path().join("means.onnx.data");
    for (weights_, code) in [("some weights", 0), ("some weights", 0), ("other weight", 2)] {
        std::fs::write(&weights, weights_).unwrap();
        let output =
            cf_slide(&["embed", patches_, "--backbone", onnx.to_str().unwrap(), "--out", out_, "--name", "weights"]);
        assert_eq!(output.status.code(), Some(code), "{weights_}: {}", stderr(&output));
    }

    // a slide that has gone fails with its name, and the others go on
    std::fs::remove_file(folder.path().join("slides/mosaic.tiff")).unwrap();
    let onnx = format!("{FIXTURES}/means.onnx");
    let output = cf_slide(&["embed", patches_, "--backbone", &onnx, "--out", out_, "--name", "gone"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("mosaic.tiff: cannot be read"), "{}", stdout(&output));
}

/// efficientnet_lite0 of $CROSSFUSION_BACKBONES or target/backbones; None, said loudly, without it.
fn efficientnet(test: &str) -> Option<PathBuf> {
    let onnx = std::env::var_os("CROSSFUSION_BACKBONES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/backbones"), PathBuf::from)
        .join("efficientnet_lite0.onnx");
    if !onnx.exists() {
        eprintln!("SKIPPED {test}: {} not found; scripts/export-backbone.py writes it", onnx.display());
        return None;
    }
    Some(onnx)
}

/// ONNX Runtime's threads, still at work, are not there to complain of what the end takes away.
#[test]
fn ctrl_c_says_nothing() {
    let test = "ctrl_c_says_nothing";
    let Some(onnx) = efficientnet(test) else { return };
    let folder = tempfile::tempdir().unwrap();
    let [slide, patches, out] = ["large.tiff", "patches", "features"].map(|name| folder.path().join(name));
    write_slide(&slide, 12 * 256, 12 * 256, |x, y| if x.min(y) > 256 { [200, 60, 90] } else { [255; 3] });
    let [slide, patches, out_] = [&slide, &patches, &out].map(|path| path.to_str().unwrap());
    if run(test, &["patch", slide, "--out", patches, "--power", "20", "--preset", "bwh-biopsy"]).is_none() {
        return;
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_cf-slide"));
    command.args(["embed", patches, "--backbone", onnx.to_str().unwrap(), "--out", out_, "--batch-size", "1"]);
    let mut embed = command.stderr(Stdio::piped()).spawn().unwrap();
    while !out.join("efficientnet_lite0/backbone.toml").exists() && embed.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(300));
    let killed = Command::new("kill").args(["-INT", &embed.id().to_string()]).status().unwrap();
    let ended = embed.wait_with_output().unwrap();
    if ended.status.code() != Some(130) {
        eprintln!("SKIPPED {test}: it had ended before ({killed}): {}", stderr(&ended));
        return;
    }
    assert_eq!(stderr(&ended), "");
}

#[test]
fn features_of_real_slides_are_pytorchs() {
    let test = "features_of_real_slides_are_pytorchs";
    let Some(data) = shared(test, "slides") else { return };
    let Some(expected) = shared(test, "features/efficientnet_lite0") else { return };
    let Some(onnx) = efficientnet(test) else { return };
    let folder = tempfile::tempdir().unwrap();
    let [patches, out] = ["patches", "features"].map(|name| folder.path().join(name));
    let [data_, patches_, out_] = [&data, &patches, &out].map(|path| path.to_str().unwrap());
    let names = ["cmu-1-small-region", "tcga-cr-7395-01a-01-ts1"];
    let slides = names.map(|name| format!("{data_}/{name}.svs"));
    let settings = ["--power", "20", "--preset", "bwh-biopsy"];
    if run(test, &[&["patch", &slides[0], &slides[1], "--out", patches_], &settings[..]].concat()).is_none() {
        return;
    }
    // the features are of other patches than CLAM's: theirs take the place of those
    let mut total = 0;
    for scale in Scale::ALL {
        for name in names {
            let theirs = expected.join(format!("{scale}/h5_files/{name}.h5"));
            let ours = coordinates_path(&patches, scale, name);
            let level = crossfusion_slides::slide::Slide::open(&data.join(format!("{name}.svs"))).unwrap().levels()[0];
            let coordinates = Coordinates::read(&theirs).unwrap();
            total += coordinates.corners.len();
            coordinates.write(&ours, name, level).unwrap();
        }
    }
    let onnx = onnx.to_str().unwrap();
    let Some(said) = run(test, &["embed", patches_, "--backbone", onnx, "--out", out_]) else { return };
    assert!(said.contains(&format!("2 slides embedded ({total} patches)")), "{said}");
    assert_eq!(patching::read_table(&patches).unwrap().len(), 2);
    for scale in Scale::ALL {
        for name in names {
            let read = |path: &Path| FeatureFile::open(path).unwrap().read().unwrap();
            let theirs = read(&expected.join(format!("{scale}/pt_files/{name}.pt")));
            let ours = read(&features::path(&out.join("efficientnet_lite0"), scale, name, Format::Pt));
            let largest = theirs.iter().fold(0f32, |a, x| a.max(x.abs()));
            let off = (&ours - &theirs).iter().fold(0f32, |a, x| a.max(x.abs())) / largest;
            assert!(off < 1e-3, "{name} at {scale}: {off} of the largest feature");
        }
    }
}
