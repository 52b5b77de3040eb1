//! Survival statistics on plain slices; usable without the rest of the crate.
//!
//! Every function takes columns of one cohort, one entry a patient: `time` (any one unit; event or
//! censoring, whichever came first), `event` (`true` = the event was observed, `false` = censored)
//! and, where it is needed, `risk` (any score; higher means an earlier event is expected). A
//! statistic that is not defined on the cohort is [`Error::Statistic`](crate::Error::Statistic),
//! which says why; no function returns NaN. `docs/survival.md` gives each formula, its source and
//! what it equals in R and scikit-survival.
//!
//! ```
//! use crossfusion::survival::{Limits, concordance_index, kaplan_meier};
//!
//! let time = [5.0, 8.0, 8.0, 12.0];
//! let event = [true, true, false, false];
//! let risk = [2.0, 0.5, 1.0, 0.1];
//! let c = concordance_index(&time, &event, &risk)?;
//! assert_eq!((c.concordant, c.discordant), (4, 1)); // of the pairs in which one surely outlived the other
//! let curve = kaplan_meier(&time, &event, Limits::Log, 0.95)?;
//! assert_eq!(curve.survival_at(9.0), Some(0.5));
//! # Ok::<(), crossfusion::Error>(())
//! ```

mod auc;
mod bootstrap;
mod brier;
mod cohort;
mod concordance;
mod cox;
mod distributions;
mod fold_mean;
mod hazard_ratio;
mod ipcw;
mod kaplan_meier;
mod log_rank;
mod nelson_aalen;
mod numeric;
mod time_order;

pub use auc::{DynamicAuc, dynamic_auc};
pub use bootstrap::{
    Bootstrap, Interval, PairedComparison, Patients, PermutationTest, bootstrap, bootstrap_difference,
    concordance_permutation_test,
};
pub use brier::{BrierScore, brier_score};
pub(crate) use cohort::short;
pub use cohort::{RiskSet, number_at_risk, risk_sets};
pub use concordance::{Concordance, RISK_TIE, concordance_index, concordance_index_ipcw};
pub use cox::{CoxCohort, Scalar, Ties, cox_loglik_and_gradient};
pub use fold_mean::{FoldMean, fold_mean, fold_mean_in_unit};
pub use hazard_ratio::{HazardRatio, hazard_ratio};
pub use ipcw::CensoringDistribution;
pub use kaplan_meier::{KaplanMeier, Limits, Quantile, Step, kaplan_meier};
pub use log_rank::{LogRank, log_rank};
pub use nelson_aalen::{CumulativeHazard, baseline_hazard, nelson_aalen};
