//! `cf-slide patch` on real slides, against the coordinates that CLAM wrote.

mod common;

use std::path::Path;

use common::{cf_slide, shared, stderr, stdout};
use crossfusion::model::Scale;
use crossfusion_slides::{coordinates::Coordinates, patching};
use rust_hdf5::H5File;

const SLIDES: [&str; 2] = ["cmu-1-small-region", "tcga-cr-7395-01a-01-ts1"];

/// Type and bytes of the attributes of `coords`, and the slide's name.
fn attributes(path: &Path) -> (Vec<String>, String) {
    let file = H5File::open(path).unwrap();
    let dataset = file.dataset("coords").unwrap();
    let numbers = ["patch_size", "patch_level", "downsample", "downsampled_level_dim", "level_dim"].map(|name| {
        let attribute = dataset.attr(name).unwrap();
        format!("{name} {:?} {:?}", attribute.datatype().unwrap(), attribute.read_raw().unwrap())
    });
    (numbers.to_vec(), dataset.attr("name").unwrap().read_string().unwrap())
}

#[test]
fn coordinates_are_clams() {
    let Some(data) = shared("coordinates_are_clams", "slides") else { return };
    let out = tempfile::tempdir().unwrap();
    let mut compared = 0;
    for (preset, clam) in [("bwh-biopsy", "bwh_biopsy"), ("tcga", "tcga")] {
        let out = out.path().join(preset);
        let slides = SLIDES.map(|name| data.join(format!("{name}.svs")));
        let slides = slides.each_ref().map(|path| path.to_str().unwrap());
        // the slide from TCGA does not say its power; CLAM's patches are as those of 20x
        let output = cf_slide(&[
            "patch",
            slides[0],
            slides[1],
            "--out",
            out.to_str().unwrap(),
            "--preset",
            preset,
            "--power",
            "20",
        ]);
        assert!(output.status.success(), "{}", stderr(&output));
        for (scale, suffix) in Scale::ALL.into_iter().zip(["-1024", "-512", ""]) {
            for name in SLIDES {
                let theirs = data.join(format!("clam/{clam}{suffix}/{name}.h5"));
                let ours = patching::coordinates_path(&out, scale, name);
                if !theirs.exists() {
                    assert!(!ours.exists(), "CLAM finds no patches on {name} with {preset}");
                    continue;
                }
                let [ours, theirs] = [ours, theirs].map(|path| (Coordinates::read(&path).unwrap(), attributes(&path)));
                assert_eq!(ours, theirs, "{name} at {scale} with {preset}");
                compared += ours.0.corners.len();
            }
        }
    }
    assert_eq!(compared, 50 + 169 + 168 + 16 + 47 + 47 + 5 + 14 + 14);
}

#[test]
fn a_cohort_goes_on_after_broken_slides_and_resumes() {
    let Some(data) = shared("a_cohort_goes_on_after_broken_slides_and_resumes", "slides") else { return };
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let run = |more: &[&str]| {
        let mut arguments = vec!["patch", "--out", out.to_str().unwrap(), "--preset", "bwh-biopsy"];
        arguments.extend(more);
        cf_slide(&arguments)
    };
    let first = run(&[data.to_str().unwrap()]);
    assert_eq!(first.status.code(), Some(1), "{}", stderr(&first));
    let said = stdout(&first);
    for (broken, why) in [
        ("broken.svs", "is not a slide of a format that OpenSlide reads"),
        ("osp_unopenable.tiff", "OpenSlide cannot read it: Unsupported TIFF compression: 52479"),
        ("osp_unreadable.svs", "OpenSlide cannot read it"),
        ("tcga-cr-7395-01a-01-ts1.svs", "says neither the power of its objective nor the size of its pixels"),
    ] {
        assert!(said.contains(&format!("{broken}: {why}")), "{broken} in:\n{said}");
    }
    let rows = patching::read_table(&out).unwrap();
    assert_eq!(rows.len(), 10);
    assert_eq!(rows["cmu-1-small-region"].status, patching::Status::Patched);
    assert_eq!(rows["tcga-cr-7395-01a-01-ts1"].status, patching::Status::Failed);

    // one slide more by a flag, into the same folder, whose other rows stay
    let tcga = data.join("tcga-cr-7395-01a-01-ts1.svs");
    let second = run(&[tcga.to_str().unwrap(), "--power", "20"]);
    assert!(second.status.success(), "{}", stderr(&second));
    let rows = patching::read_table(&out).unwrap();
    assert_eq!(rows.len(), 10);
    let counts = Scale::ALL.map(|scale| rows["tcga-cr-7395-01a-01-ts1"].patches(scale));
    assert_eq!(counts, [Some(14), Some(47), Some(169)]);

    // what is there is not touched; what has gone is made again
    let written =
        |name: &str| patching::coordinates_path(&out, Scale::X20, name).metadata().unwrap().modified().unwrap();
    let before = written("tcga-cr-7395-01a-01-ts1");
    std::fs::remove_file(patching::coordinates_path(&out, Scale::X10, "cmu-1-small-region")).unwrap();
    let third = run(&[data.to_str().unwrap()]);
    assert_eq!(third.status.code(), Some(1));
    assert!(stdout(&third).contains("2 of 10 slides are there already"), "{}", stdout(&third));
    assert_eq!(written("tcga-cr-7395-01a-01-ts1"), before);
    assert!(patching::coordinates_path(&out, Scale::X10, "cmu-1-small-region").exists());

    let other = run(&[data.to_str().unwrap(), "--a-t", "3"]);
    assert_eq!(other.status.code(), Some(2));
    assert!(stderr(&other).contains("holds patches of other settings"), "{}", stderr(&other));
    let leftovers = std::fs::read_dir(&out)
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().ends_with(".tmp"));
    assert_eq!(leftovers.count(), 0);
}
