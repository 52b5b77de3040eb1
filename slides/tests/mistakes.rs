//! What goes wrong on the way from slides to features, and what is then said.

mod common;

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, path::Path};

use common::{cf_slide, stderr, stdout, write_slide};
use crossfusion::model::Scale;
use crossfusion_slides::{
    coordinates::Coordinates,
    patching::{coordinates_path, read_table},
    slide::check_library,
};

const ONNX: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/means.onnx");

/// A folder to make slides in; None, said loudly, without OpenSlide.
fn folder(test: &str) -> Option<tempfile::TempDir> {
    if let Err(why) = check_library() {
        eprintln!("SKIPPED {test}: {why}");
        return None;
    }
    Some(tempfile::tempdir().unwrap())
}

/// A slide of 4 by 4 patches of tissue, of so many patches a side in all.
fn slide(path: &Path, side: usize) -> &str {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let is_tissue = |at: usize| (256..5 * 256).contains(&at);
    let colour = |x, y| if is_tissue(x) && is_tissue(y) { [200, 60, (x / 256 * 40) as u8] } else { [255; 3] };
    write_slide(path, side * 256, side * 256, colour);
    path.to_str().unwrap()
}

/// Patches by a preset that finds the tissue of [`slide`]: what was said, and the exit code.
fn patch(slides: &[&str], out: &Path, more: &[&str]) -> (String, Option<i32>) {
    let settings = ["--out", out.to_str().unwrap(), "--power", "20", "--a-t", "1"];
    let output = cf_slide(&[&["patch"], slides, &settings, more].concat());
    (stdout(&output) + &stderr(&output), output.status.code())
}

fn embed(patches: &Path, out: &Path, more: &[&str]) -> Option<(String, Option<i32>)> {
    let arguments = ["embed", patches.to_str().unwrap(), "--backbone", ONNX, "--out", out.to_str().unwrap()];
    let output = cf_slide(&[&arguments, more].concat());
    let said = stdout(&output) + &stderr(&output);
    if said.contains("is not installed") {
        eprintln!("SKIPPED in part: {said}");
        return None;
    }
    Some((said, output.status.code()))
}

#[test]
fn two_slides_of_one_name_are_refused_and_one_that_moved_is_not() {
    let Some(folder) = folder("two_slides_of_one_name_are_refused_and_one_that_moved_is_not") else { return };
    let at = |name: &str| folder.path().join(name);
    let (in_a, out) = (at("a"), at("out"));
    let a = in_a.join("one.tiff");
    slide(&a, 6);
    // one file by two ways is one slide
    let ways = [a.to_str().unwrap(), &format!("{}/../a/one.tiff", in_a.display()), in_a.to_str().unwrap()];
    let (said, code) = patch(&ways, &out, &[]);
    assert!(code == Some(0) && said.contains("1 slides with patches"), "{said}");
    // another slide of the name, later and into the same folder
    let b = at("b/one.tiff");
    slide(&b, 8);
    let (said, code) = patch(&[b.to_str().unwrap()], &out, &[]);
    assert!(code == Some(1) && said.contains("are both called `one`; their patches would be one file"), "{said}");
    // the slide itself, moved: it is not done again, and is embedded from where it is
    std::fs::create_dir(at("c")).unwrap();
    let c = at("c/one.tiff");
    std::fs::rename(&a, &c).unwrap();
    let (said, code) = patch(&[c.to_str().unwrap()], &out, &[]);
    assert!(code == Some(0) && said.contains("1 of 1 slides are there already"), "{said}");
    assert_eq!(read_table(&out).unwrap()["one"].path, c);
}

#[test]
fn a_name_that_no_table_can_hold_is_refused() {
    let Some(folder) = folder("a_name_that_no_table_can_hold_is_refused") else { return };
    slide(&folder.path().join("good.tiff"), 6);
    std::fs::write(folder.path().join(OsStr::from_bytes(b"x\xff.svs")), "").unwrap();
    let (said, code) = patch(&[folder.path().to_str().unwrap()], &folder.path().join("out"), &[]);
    assert!(code == Some(1) && said.contains("has a name that is not UTF-8"), "{said}");
}

/// Settings that nothing came of do not stand in the way of better ones.
#[test]
fn settings_without_any_patches_are_forgotten() {
    let Some(folder) = folder("settings_without_any_patches_are_forgotten") else { return };
    let (path, out) = (folder.path().join("one.tiff"), folder.path().join("out"));
    let one = slide(&path, 6);
    let (said, _) = patch(&[one], &out, &["--seg-level", "3"]);
    assert!(said.contains("has levels 0 to 0, and --seg-level is 3"), "{said}");
    let (said, code) = patch(&[one], &out, &["--sthresh", "250"]);
    assert!(code == Some(0) && said.contains("no tissue"), "{said}");
    let (said, code) = patch(&[one], &out, &[]);
    assert!(code == Some(0) && said.contains("1 slides with patches"), "{said}");
    let (said, code) = patch(&[one], &out, &["--sthresh", "250"]);
    assert!(code == Some(2) && said.contains("holds patches of other settings"), "{said}");
}

/// Patches of one slide are not read from another that has come into its place.
#[test]
fn another_slide_in_a_slides_place_is_refused() {
    let Some(folder) = folder("another_slide_in_a_slides_place_is_refused") else { return };
    let at = |name: &str| folder.path().join(name);
    let (out, features) = (at("out"), at("features"));
    let (one, two) = (at("slides/one.tiff"), at("slides/two.tiff"));
    let (said, code) = patch(&[slide(&one, 6), slide(&two, 6)], &out, &[]);
    assert_eq!(code, Some(0), "{said}");
    slide(&one, 8);
    let Some((said, code)) = embed(&out, &features, &[]) else { return };
    let why = "one.tiff: has 2048 x 2048 pixels, but its patches are of a slide of 1536 x 1536";
    assert!(code == Some(1) && said.contains(why), "{said}");
    // and of the patches those are counted that were embedded
    let patches: usize = Scale::ALL
        .map(|scale| Coordinates::read(&coordinates_path(&out, scale, "two")).unwrap().corners.len())
        .iter()
        .sum();
    assert!(said.contains(&format!("1 slides embedded ({patches} patches), 0 were there already, 1 failed")), "{said}");
}

#[test]
fn a_folder_without_patches_is_named() {
    let Some(folder) = folder("a_folder_without_patches_is_named") else { return };
    let Some((said, code)) = embed(folder.path(), &folder.path().join("out"), &[]) else { return };
    assert!(code == Some(1) && said.contains("is no folder of `cf-slide patch`: it has no slides.csv"), "{said}");
    let missing = Coordinates::read(&folder.path().join("one.h5")).unwrap_err().to_string();
    assert!(missing.contains("one.h5: cannot be read: No such file"), "{missing}");
}
