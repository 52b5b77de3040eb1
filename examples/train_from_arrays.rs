//! Trains CrossFusion on patch features that are already in memory, without files: two updates of
//! two slides each, as a training loop of your own would make them, and a prediction.
//!
//!     cargo run --release --example train_from_arrays

use crossfusion::{
    Result,
    device::Device,
    loss::{Loss, Prediction, Target},
    model::{Bags, Config},
    ops::{Draw, adam::Adam, head::SlideLoss},
    train::step::Engine,
};

const FEATURES: usize = 64;

/// A slide: its patches' features at 5x, 10x and 20x, row-major, and what became of its patient.
struct Slide {
    patches: [Vec<f32>; 3],
    target: Target,
}

fn main() -> Result<()> {
    let slides: Vec<Slide> = (0..4).map(slide).collect();
    let config = Config { dim: 32, heads: 4, ..Config::new(FEATURES) };
    let mut engine = Engine::<f32>::new(Device::from_name("auto", 0)?, &config, 7)?;
    let adam = Adam { learning_rate: 1e-3, weight_decay: 4e-6, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };

    for (step, slide) in slides.iter().enumerate() {
        let bags = Bags::new(slide.patches.each_ref().map(Vec::as_slice), FEATURES)?;
        // the seed and the step say which units drop out: the same numbers give the same bits again
        let dropout = Some(Draw { seed: 7, step: step as u32 });
        let loss = SlideLoss { loss: Loss::NllSurv, target: slide.target, alpha: 0.2, share: 0.5 };
        let pending = engine.accumulate_loss(bags, dropout, &loss)?;
        let (loss, risk) = engine.finish(pending)?;
        println!("slide {step}: loss {loss:.4}, risk {risk:.4}");
        if step % 2 == 1 {
            engine.update(&adam)?;
        }
    }

    let bags = Bags::new(slides[0].patches.each_ref().map(Vec::as_slice), FEATURES)?;
    let Prediction { survival, risk, .. } = Prediction::from_logits(&engine.evaluate(bags)?);
    println!("survival of the first slide after each bin {survival:.3?}, risk {risk:.4}");
    assert_eq!(survival.len(), config.n_classes);
    Ok(())
}

/// Made up: your features would stand here.
fn slide(i: usize) -> Slide {
    let bag = |patches: usize| (0..patches * FEATURES).map(|j| ((i + 1) as f32 * 0.1 * j as f32).sin()).collect();
    // the time bin of the event, or of the last visit of a patient who is censored
    Slide { patches: [bag(5), bag(20), bag(80)], target: Target { label: i, censored: i == 2 } }
}
