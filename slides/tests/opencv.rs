//! The steps of segmentation against OpenCV on random images (scripts/make-slide-fixtures.py).

use std::{cmp::Ordering, collections::BTreeMap};

use crossfusion_slides::{
    slide::Image,
    tissue::{self, Outline, Plane, Point, Polygon},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

/// The arrays of one random image, by name.
type Case<'a> = BTreeMap<String, TensorView<'a>>;

/// The cases whose names begin so: `image0.saturation` is `saturation` of the case `image0`.
fn cases<'a>(file: &'a SafeTensors, kind: &str) -> Vec<Case<'a>> {
    let mut cases: BTreeMap<String, Case> = BTreeMap::new();
    for (name, view) in file.tensors() {
        let (case, array) = name.split_once('.').unwrap();
        if case.starts_with(kind) {
            cases.entry(case.into()).or_default().insert(array.into(), view);
        }
    }
    cases.into_values().collect()
}

fn fixture() -> Vec<u8> {
    std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/opencv.safetensors")).unwrap()
}

fn plane(view: &TensorView) -> Plane {
    let [height, width] = view.shape()[..] else { panic!("not a plane") };
    Plane { width, height, pixels: view.data().to_vec() }
}

fn integers(view: &TensorView) -> Vec<i64> {
    match view.dtype() {
        Dtype::I16 => view.data().chunks_exact(2).map(|b| i16::from_le_bytes([b[0], b[1]]).into()).collect(),
        Dtype::I32 => view.data().chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()).into()).collect(),
        dtype => panic!("{dtype:?}"),
    }
}

fn floats(view: &TensorView) -> Vec<f64> {
    view.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
}

fn points(numbers: &[i64]) -> Vec<Point> {
    numbers.chunks_exact(2).map(|p| Point { x: p[0] as i32, y: p[1] as i32 }).collect()
}

#[test]
fn filters_are_opencvs() {
    let bytes = fixture();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let cases = cases(&file, "image");
    assert!(cases.len() >= 6);
    for case in cases {
        let view = &case["image"];
        let image = Image { width: view.shape()[1], height: view.shape()[0], pixels: view.data().to_vec() };
        let saturation = tissue::saturation(&image);
        assert_eq!(saturation, plane(&case["saturation"]));
        for size in [3, 7, 11] {
            assert_eq!(tissue::median(&saturation, size), plane(&case[&format!("median{size}")]), "median of {size}");
        }
        let threshold = tissue::otsu(&saturation);
        assert_eq!(f64::from(threshold), floats(&case["threshold"])[0]);
        let above = tissue::above(&saturation, threshold);
        assert_eq!(above, plane(&case["above"]));
        for size in [2, 4, 5] {
            assert_eq!(tissue::close(&above, size), plane(&case[&format!("close{size}")]), "closing by {size}");
        }
    }
}

#[test]
fn outlines_are_opencvs() {
    let bytes = fixture();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut holes = 0;
    for case in cases(&file, "mask") {
        let (points, areas) = (points(&integers(&case["points"])), floats(&case["areas"]));
        let mut expected: Vec<Outline> = Vec::new();
        let mut start = 0;
        for ((length, parent), area) in
            integers(&case["lengths"]).into_iter().zip(integers(&case["parents"])).zip(areas)
        {
            let border = points[start..start + length as usize].to_vec();
            start += border.len();
            assert_eq!(tissue::twice_area(&border) as f64, 2.0 * area);
            match parent {
                -1 => expected.push(Outline { border, holes: Vec::new() }),
                // OpenCV lists the holes of an area behind it
                _ => expected.last_mut().unwrap().holes.push(border),
            }
        }
        holes += expected.iter().map(|outline| outline.holes.len()).sum::<usize>();
        assert_eq!(tissue::outlines(&plane(&case["mask"])), expected);
    }
    assert!(holes > 300, "only {holes} holes were compared");
}

#[test]
fn points_are_on_the_side_that_opencv_says() {
    let bytes = fixture();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut seen = [0; 3];
    for case in cases(&file, "mask") {
        let Some(corners) = case.get("polygon") else { continue };
        let polygon = Polygon::new(&points(&integers(corners)));
        let [x, y, width, height] = integers(&case["rectangle"])[..] else { panic!("not a rectangle") };
        let [low, high] = polygon.bounds.map(|p| [i64::from(p.x), i64::from(p.y)]);
        assert_eq!([low[0], low[1], high[0] - low[0] + 1, high[1] - low[1] + 1], [x, y, width, height]);
        let twice = integers(&case["twice_points"]);
        for (point, side) in twice.chunks_exact(2).zip(integers(&case["sides"])) {
            let expected = [Ordering::Less, Ordering::Equal, Ordering::Greater][(side + 1) as usize];
            assert_eq!(polygon.side([point[0], point[1]]), expected, "{point:?}");
            seen[(side + 1) as usize] += 1;
        }
    }
    assert!(seen.iter().all(|&n| n > 50), "outside, on, inside: {seen:?}");
}
