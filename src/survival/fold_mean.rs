//! The mean of a statistic over the folds of a cross-validation.

use super::cohort::{check_column, check_level, undefined};
use super::distributions::student_two_sided;
use crate::Result;

/// The mean of a statistic over folds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FoldMean {
    /// Over the folds.
    pub mean: f64,
    /// Standard deviation with the divisor `folds - ddof`.
    pub sd: f64,
    /// Delta degrees of freedom of `sd`: the field's papers print 0 (numpy's default),
    /// statisticians 1.
    pub ddof: usize,
    /// mean -+ t(folds - 1) * (the standard deviation of ddof 1) / sqrt(folds), whatever `ddof`.
    pub lower: f64,
    /// The interval's upper end.
    pub upper: f64,
    /// The interval's level: 0.95, say.
    pub level: f64,
}

/// Mean over folds with Student's t interval. Folds share training patients, so they are not
/// independent and the interval is too narrow (Bengio & Grandvalet 2004): it tells how folds vary,
/// not how patients do.
pub fn fold_mean(values: &[f64], ddof: usize, level: f64) -> Result<FoldMean> {
    const NAME: &str = "the mean over folds";
    check_column(NAME, "values", values, values.len())?;
    check_level(NAME, level)?;
    let folds = values.len();
    if folds < 2 || folds <= ddof {
        return Err(undefined(NAME, format!("{folds} folds are too few for an interval (ddof {ddof})")));
    }
    let n = folds as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    let sd = (squares / (folds - ddof) as f64).sqrt();
    let margin = student_two_sided(level, folds - 1) * (squares / (n - 1.0) / n).sqrt();
    Ok(FoldMean { mean, sd, ddof, lower: mean - margin, upper: mean + margin, level })
}

/// The same for a statistic that lies in 0..1, as a C-index does: the limits are those of the
/// mean's logit, `logit(mean) -+ t(folds - 1) * s / sqrt(folds) / (mean (1 - mean))`, turned back,
/// so that they lie in 0..1, too (the delta method; what Stata's `proportion` prints). Where all
/// folds agree both limits are the mean.
///
/// An error of fewer than three folds: Student's t of one degree of freedom is 12.7, which says
/// nothing.
pub fn fold_mean_in_unit(values: &[f64], ddof: usize, level: f64) -> Result<FoldMean> {
    const NAME: &str = "the mean over folds";
    if let Some(row) = values.iter().position(|value| !(0.0..=1.0).contains(value)) {
        return Err(undefined(NAME, format!("entry {row} of `values` is {}, not in 0..1", values[row])));
    }
    if values.len() < 3 {
        return Err(undefined(NAME, format!("{} folds are too few for an interval, which needs 3", values.len())));
    }
    let plain = fold_mean(values, ddof, level)?;
    let (mean, margin) = (plain.mean, plain.upper - plain.mean);
    if margin == 0.0 || mean == 0.0 || mean == 1.0 {
        return Ok(FoldMean { lower: mean, upper: mean, ..plain });
    }
    let logit = (mean / (1.0 - mean)).ln();
    let width = margin / (mean * (1.0 - mean));
    let back = |x: f64| 1.0 / (1.0 + (-x).exp());
    Ok(FoldMean { lower: back(logit - width), upper: back(logit + width), ..plain })
}
