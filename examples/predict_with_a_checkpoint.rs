//! Loads a published checkpoint, which says nothing of its model but the names and shapes of its
//! tensors, and predicts a slide that is in memory.
//!
//!     cargo run --release --example predict_with_a_checkpoint [best_model.pt]
//!
//! Without an argument it takes the small one that the tests use.

use std::path::PathBuf;

use crossfusion::{
    Result,
    data::torch::read_state_dict,
    device::Device,
    eval::infer,
    loss::Prediction,
    model::{Bags, Scale, Scales},
    train::step::Engine,
};

/// Attention heads of the published models, which leave no trace in a checkpoint.
const HEADS: usize = 4;

fn main() -> Result<()> {
    let path = std::env::args_os().nth(1).map(PathBuf::from);
    let path = path.unwrap_or_else(|| "tests/fixtures/models/CrossFusion.pt".into());
    let tensors = read_state_dict(&path)?;
    let config = infer::config(&tensors, HEADS)?;
    println!("{}: {}, {} features, width {}", path.display(), config.model, config.features, config.dim);

    let mut engine = Engine::<f32>::new(Device::from_name("auto", 0)?, &config, 0)?;
    engine.load(&tensors)?;

    // the model says which scales it reads
    let patches = Scales::from([5, 11, 23]).only(config.model.scales());
    let features: Scales<Vec<f32>> = patches.map(|scale: Scale, n| {
        (0..n * config.features).map(|j| ((scale as usize + 1) as f32 * j as f32).sin()).collect()
    });
    let bags = Bags::new(features.as_ref().map(|_, bag| &bag[..]), config.features)?;
    let Prediction { hazards, survival, risk } = Prediction::from_logits(&engine.evaluate(bags)?);
    println!("hazards {hazards:.4?}\nsurvival {survival:.4?}\nrisk {risk:.4}");
    assert!(survival.windows(2).all(|pair| pair[1] <= pair[0]));
    Ok(())
}
