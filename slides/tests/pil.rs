//! Resizing against Pillow on random images (scripts/make-slide-fixtures.py).

use crossfusion_slides::{
    resize::{Filter, resize},
    slide::Image,
};
use safetensors::{SafeTensors, tensor::TensorView};

fn image(view: TensorView) -> Image {
    Image { width: view.shape()[1], height: view.shape()[0], pixels: view.data().to_vec() }
}

#[test]
fn resizing_is_pillows() {
    let bytes = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/pil.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let cases = file.names().iter().filter(|name| name.ends_with(".image")).count();
    assert_eq!(cases, 5);
    for case in 0..cases {
        for (name, filter) in [("bilinear", Filter::Bilinear), ("bicubic", Filter::Bicubic)] {
            let from = image(file.tensor(&format!("{case}.image")).unwrap());
            let to = image(file.tensor(&format!("{case}.{name}")).unwrap());
            let what = format!("{name} from {} to {}", from.width, to.width);
            assert!(resize(from, to.width, to.height, filter) == to, "{what}");
        }
    }
}
