//! Survival losses of one slide's logits, each with its gradient, in f64: a handful of numbers a
//! slide.
//!
//! With n discrete time bins:
//!
//! ```text
//! hazards h = sigmoid(logits),   survival S_t = product over u <= t of (1 - h_u),   S_-1 = 1
//! risk = -sum of S
//! ```
//!
//! The label y is the slide's bin; c is 1 when it is censored there, else 0.
//!
//! The Cox loss compares slides, so it is one of a batch: [`CoxBatch`].

mod cox;

pub use cox::CoxBatch;

/// Below it, a probability is taken for it, and no gradient flows.
const EPSILON: f64 = 1e-7;

/// Which loss, under the names of the published script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "programs", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
pub enum Loss {
    /// Negative log-likelihood of discrete hazards (Zadeh & Schmid 2020, eq. 3).
    NllSurv,
    /// Cross-entropy of the survival curve at the label's bin, regularised by the likelihood's
    /// uncensored part.
    CeSurv,
    /// Cox partial likelihood of the risks of a batch of slides (Cox 1972); needs no time bins.
    CoxSurv,
}

/// What a slide's logits say.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "programs", derive(serde::Serialize, serde::Deserialize))]
pub struct Prediction {
    /// Empty, as is `survival`, where the model has one output.
    pub hazards: Vec<f64>,
    /// S_0 .. S_{n-1}
    pub survival: Vec<f64>,
    /// -sum of survival, or the one output itself: higher is worse.
    pub risk: f64,
}

impl Prediction {
    /// Of one output the risk alone; of several the hazards of as many time bins, and what follows
    /// from them.
    pub fn from_logits(logits: &[f64]) -> Self {
        if let &[risk] = logits {
            return Self { hazards: Vec::new(), survival: Vec::new(), risk };
        }
        let (hazards, survival) = curve(logits);
        let risk = -survival.iter().sum::<f64>();
        Self { hazards, survival, risk }
    }

    /// d risk / d logits: with S_t = S_{t-1} (1 - h_t), d(-S_t) / d logit_u = h_u S_t for u <= t.
    pub fn risk_gradient(&self) -> Vec<f64> {
        if self.hazards.is_empty() {
            return vec![1.0];
        }
        let mut later = 0.0; // sum of S_t over t >= u
        let mut gradient: Vec<f64> = (self.hazards.iter().zip(&self.survival).rev())
            .map(|(h, s)| {
                later += s;
                h * later
            })
            .collect();
        gradient.reverse();
        gradient
    }
}

/// A slide's outcome in bins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The time bin of the event or of the last visit.
    pub label: usize,
    /// Whether no event was seen.
    pub censored: bool,
}

impl Loss {
    /// The loss of one slide and its gradient in the logits. `alpha` weighs the uncensored part up:
    /// 0.2 in training, 0 in validation. `target.label` must be below the number of logits. The Cox
    /// loss of one slide is 0: nobody else is at risk.
    pub fn evaluate(self, logits: &[f64], target: Target, alpha: f64) -> (f64, Vec<f64>) {
        let (hazards, survival) = curve(logits);
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
            (Self::CoxSurv, _) => (0.0, 0.0, 0.0, 0.0),
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

/// Hazards and survival.
fn curve(logits: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let hazards: Vec<f64> = logits.iter().map(|&x| 1.0 / (1.0 + (-x).exp())).collect();
    let step = |s: &mut f64, h: &f64| {
        *s *= 1.0 - h;
        Some(*s)
    };
    let survival = hazards.iter().scan(1.0, step).collect();
    (hazards, survival)
}

fn log_clamped(p: f64) -> f64 {
    // f64::max would take NaN for EPSILON
    if p < EPSILON { EPSILON.ln() } else { p.ln() }
}

/// Derivative of [`log_clamped`].
fn inverse(p: f64) -> f64 {
    if p < EPSILON { 0.0 } else { 1.0 / p }
}
