//! Survival losses of one slide's logits, each with its gradient, in f64: a handful of numbers a slide.
//!
//! With n discrete time bins: hazards h = sigmoid(logits), survival S_t = product over u <= t of (1 - h_u), S_-1 = 1, risk = -sum of S.
//! The label y is the slide's bin, c = 1 when it is censored there.

use serde::{Deserialize, Serialize};

/// Below it, a probability is taken for it, and no gradient flows.
const EPSILON: f64 = 1e-7;

/// Which loss, under the names of the published script.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Loss {
    /// Negative log-likelihood of discrete hazards (Zadeh & Schmid 2020, eq. 3).
    NllSurv,
    /// Cross-entropy of the survival curve at the label's bin, regularised by the likelihood's uncensored part.
    CeSurv,
}

/// What a slide's logits say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    pub hazards: Vec<f64>,
    /// S_0 .. S_{n-1}
    pub survival: Vec<f64>,
    /// -sum of survival: higher is worse.
    pub risk: f64,
}

impl Prediction {
    pub fn from_logits(logits: &[f64]) -> Self {
        let hazards: Vec<f64> = logits.iter().map(|&x| 1.0 / (1.0 + (-x).exp())).collect();
        let survival: Vec<f64> = hazards
            .iter()
            .scan(1.0, |s, h| {
                *s *= 1.0 - h;
                Some(*s)
            })
            .collect();
        let risk = -survival.iter().sum::<f64>();
        Self { hazards, survival, risk }
    }
}

/// A slide's outcome in bins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub label: usize,
    pub censored: bool,
}

impl Loss {
    /// The loss and its gradient in the logits. `alpha` weighs the uncensored part up: 0.2 in training, 0 in validation.
    /// `target.label` must be below the number of logits.
    pub fn evaluate(self, logits: &[f64], target: Target, alpha: f64) -> (f64, Vec<f64>) {
        let Prediction { hazards, survival, .. } = Prediction::from_logits(logits);
        let y = target.label;
        let before = if y == 0 { 1.0 } else { survival[y - 1] };
        // gradients in h_y, S_y and S_{y-1}
        let (value, dh, ds, dbefore) = match (self, target.censored) {
            (Self::NllSurv, true) => {
                ((alpha - 1.0) * log_clamped(survival[y]), 0.0, (alpha - 1.0) * inverse(survival[y]), 0.0)
            }
            (Self::NllSurv, false) => {
                (-log_clamped(before) - log_clamped(hazards[y]), -inverse(hazards[y]), 0.0, -inverse(before))
            }
            (Self::CeSurv, true) => {
                ((alpha - 1.0) * log_clamped(survival[y]), 0.0, (alpha - 1.0) * inverse(survival[y]), 0.0)
            }
            (Self::CeSurv, false) => {
                let entropy = -log_clamped(1.0 - survival[y]);
                let regular = -(before + EPSILON).ln() - log_clamped(hazards[y]);
                let value = (1.0 - alpha) * entropy + alpha * regular;
                let ds = (1.0 - alpha) * inverse(1.0 - survival[y]);
                (value, -alpha * inverse(hazards[y]), ds, -alpha / (before + EPSILON))
            }
        };
        // back through S_t = S_{t-1} (1 - h_t) and the sigmoid
        let mut gradient = vec![0.0; logits.len()];
        let mut carried = 0.0;
        for t in (0..=y).rev() {
            let own = if t == y { ds } else { 0.0 } + if t + 1 == y { dbefore } else { 0.0 };
            carried += own;
            let previous = if t == 0 { 1.0 } else { survival[t - 1] };
            let h = hazards[t];
            gradient[t] = (if t == y { dh } else { 0.0 } - carried * previous) * h * (1.0 - h);
            carried *= 1.0 - h;
        }
        (value, gradient)
    }
}

fn log_clamped(p: f64) -> f64 {
    // f64::max would take NaN for EPSILON
    if p < EPSILON { EPSILON.ln() } else { p.ln() }
}

/// Derivative of [`log_clamped`].
fn inverse(p: f64) -> f64 {
    if p < EPSILON { 0.0 } else { 1.0 / p }
}
