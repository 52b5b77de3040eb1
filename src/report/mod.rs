//! What an evaluation shows: its numbers ([`Summary`]), plots, and one page that holds them all.
//!
//! Everything here is made from predictions and plain metadata; no model is needed.

pub mod accuracy;
pub mod auc;
pub mod calibration;
mod card;
pub mod figure;
mod files;
pub mod forest;
pub mod groups;
pub mod history;
pub mod html;
pub mod km;
pub mod plots;
pub mod risk;
pub mod seeds;
mod summary;
mod table;

use crate::Error;

/// Of this program: "0.1.0 (a1b2c3d)", the commit where it was built from a git checkout.
pub const VERSION: &str = env!("CROSSFUSION_VERSION");

pub use files::{FIGURES, files_of, predictions_csv, read_evaluation, read_predictions, save, write};
pub use history::best_epoch_note;
pub use summary::{FoldFacts, FoldResult, RESAMPLING, Resampling, SlideResult, Summary};
pub use table::{Cell, StatisticRow};

/// The run a report is about, as far as numbers do not tell.
#[derive(Clone, Debug, Default)]
pub struct About {
    /// The headline: the cohort.
    pub title: String,
    /// Backbone, model, date of the run and the like, in the order shown.
    pub facts: Vec<(String, String)>,
    /// How each fold's model was chosen, in a sentence; empty where that is not known.
    pub protocol: String,
    /// The resolved configuration, as TOML.
    pub config: String,
    /// Commands that give this result again, one a line.
    pub commands: String,
}

/// "p = 0.034", "p < 0.0001".
pub fn p_text(p: f64) -> String {
    match p {
        p if p < 1e-4 => "p < 0.0001".into(),
        p if p < 0.01 => format!("p = {p:.4}"),
        p => format!("p = {p:.3}"),
    }
}

/// What an error says besides the statistic's name.
pub(crate) fn reason(error: &Error) -> String {
    match error {
        Error::Statistic { reason, .. } => reason.clone(),
        other => other.to_string(),
    }
}
