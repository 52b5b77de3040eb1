//! A small synthetic cohort in the real layout on disk, with a survival signal planted in the
//! features.
//!
//! Each patient has a latent risk z, standard normal. Survival is exponential with hazard
//! proportional to exp(2 z), censoring is independent and about as frequent. A slide is a grid of
//! patches at 10x, four times as many at 20x and a quarter at 5x; a share of them that grows with z
//! lies in a tumour, where the features are shifted along a direction of each magnification.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

use ndarray::Array2;

use super::{atomic::write_text, torch::write_pt};
use crate::{Error, Result};

const PATIENTS: usize = 150;
const FOLDS: usize = 2;
const BACKBONE: &str = "synthetic";
const FEATURES: usize = 64;
/// Every seventh patient has a second slide.
const SECOND_SLIDE: usize = 7;
/// Patches at 10x of the one large slide; the others have 40 to 140.
const LARGE: usize = 900;

/// What suits a cohort this small: a narrow model, many small steps, one sweep of the learning
/// rate.
const SETTINGS: &str = "
    embed_dim = 64
    num_epochs = 20
    cosine_t_max = 20
    learning_rate = 5e-4
    grad_accum_steps = 4
";

/// The run's settings for a cohort in `folder`, as a table that flags override.
pub fn settings(folder: &Path) -> Result<toml::Table> {
    let invalid = |e: &dyn std::fmt::Display| Error::Usage(format!("--demo: {e}"));
    let mut table: toml::Table = toml::from_str(SETTINGS).map_err(|e| invalid(&e))?;
    for (key, path) in [("clinical", clinical(folder)), ("splits", splits(folder)), ("pt_dir", features(folder))] {
        table.insert(key.into(), toml::Value::try_from(path).map_err(|e| invalid(&e))?);
    }
    table.insert("backbone".into(), BACKBONE.into());
    table.insert("folds".into(), (FOLDS as i64).into());
    Ok(table)
}

fn clinical(folder: &Path) -> PathBuf {
    folder.join("demo_cohort.csv")
}

fn splits(folder: &Path) -> PathBuf {
    folder.join("splits")
}

fn features(folder: &Path) -> PathBuf {
    folder.join("features")
}

/// Writes the cohort; the same seed gives the same bytes.
pub fn write_demo(folder: &Path, seed: u64) -> Result<()> {
    let splits = splits(folder);
    let folders = ["x5", "x10", "x20"].map(|x| features(folder).join(BACKBONE).join(x).join("pt_files"));
    for folder in folders.iter().chain([&splits]) {
        std::fs::create_dir_all(folder).map_err(|e| Error::file(folder, format!("cannot be made: {e}")))?;
    }
    let mut random = Random(seed ^ 0xC0FF_EE00);
    let directions = [0, 1, 2].map(|_| (0..FEATURES).map(|_| random.normal()).collect::<Vec<_>>());
    let mut table = String::from(",case_id,slide_id,censorship,survival_months\n");
    let mut row = 0;
    for patient in 0..PATIENTS {
        let z = random.normal();
        let death = 30.0 * (-2.0 * z).exp() * random.exponential();
        let last_contact = 34.0 * random.exponential();
        let (months, censored) = if death <= last_contact { (death, 0) } else { (last_contact, 1) };
        for slide in 0..1 + usize::from(patient % SECOND_SLIDE == 0) {
            let case = format!("DEMO-{patient:03}");
            let name = format!("{case}-{}", ["A", "B"][slide]);
            let _ = writeln!(table, "{row},{case},{name}.svs,{censored},{months:.2}");
            row += 1;
            let n = if (patient, slide) == (7, 0) { LARGE } else { 40 + (100.0 * random.uniform()) as usize };
            let tumour = 1.0 / (1.0 + (-1.5 * z - 0.3 * random.normal()).exp());
            for (scale, patches) in [n.div_ceil(4), n, 4 * n].into_iter().enumerate() {
                let bag = random.bag(patches, tumour, &directions[scale]);
                write_pt(&folders[scale].join(format!("{name}.pt")), bag.view())?;
            }
        }
    }
    write_text(&clinical(folder), &table)?;
    for fold in 0..FOLDS {
        let (mut train, mut val) = (Vec::new(), Vec::new());
        for patient in 0..PATIENTS {
            if patient % FOLDS == fold { &mut val } else { &mut train }.push(format!("DEMO-{patient:03}"));
        }
        let mut table = String::from(",train,val\n");
        for i in 0..train.len().max(val.len()) {
            let cell = |side: &[String]| side.get(i).cloned().unwrap_or_default();
            let _ = writeln!(table, "{i},{},{}", cell(&train), cell(&val));
        }
        write_text(&splits.join(format!("splits_{fold}.csv")), &table)?;
    }
    Ok(())
}

/// A splitmix64 stream.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 * (0.5f64).powi(53)
    }

    /// Mean 1.
    fn exponential(&mut self) -> f64 {
        -(1.0 - self.uniform()).ln()
    }

    fn normal(&mut self) -> f64 {
        let radius = (2.0 * self.exponential()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Patches of which the first share lies in the tumour.
    fn bag(&mut self, patches: usize, tumour: f64, direction: &[f64]) -> Array2<f32> {
        let inside = (patches as f64 * tumour).round() as usize;
        Array2::from_shape_fn((patches, direction.len()), |(i, j)| {
            let shift = if i < inside { direction[j] } else { 0.0 };
            (0.5 * self.normal() + shift) as f32
        })
    }
}
