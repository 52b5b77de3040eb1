//! The statistics on numpy's arrays, as tuples; python/package/crossfusion/survival.py names their fields.

use engine::survival::{self, CensoringDistribution, CoxCohort, Limits, Ties};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::raise;

type Numbers<'py> = PyReadonlyArray1<'py, f64>;
type Flags<'py> = PyReadonlyArray1<'py, bool>;
type Groups<'py> = PyReadonlyArray1<'py, usize>;
type Vector<'py> = Bound<'py, PyArray1<f64>>;

fn ties(efron: bool) -> Ties {
    if efron { Ties::Efron } else { Ties::Breslow }
}

/// Runs a statistic without the interpreter's lock.
fn compute<R: Send>(py: Python<'_>, work: impl FnOnce() -> engine::Result<R> + Send) -> PyResult<R> {
    py.detach(work).map_err(raise)
}

#[pyfunction]
fn concordance_index(
    py: Python<'_>,
    time: Numbers,
    event: Flags,
    risk: Numbers,
) -> PyResult<(f64, u64, u64, u64, u64)> {
    let (time, event, risk) = (time.as_slice()?, event.as_slice()?, risk.as_slice()?);
    let c = compute(py, || survival::concordance_index(time, event, risk))?;
    Ok((c.index, c.concordant, c.discordant, c.tied_risk, c.tied_time))
}

#[pyfunction]
fn concordance_index_ipcw(
    py: Python<'_>,
    train_time: Numbers,
    train_event: Flags,
    time: Numbers,
    event: Flags,
    risk: Numbers,
    tau: Option<f64>,
) -> PyResult<f64> {
    let (train_time, train_event) = (train_time.as_slice()?, train_event.as_slice()?);
    let (time, event, risk) = (time.as_slice()?, event.as_slice()?, risk.as_slice()?);
    compute(py, || {
        let censoring = CensoringDistribution::fit(train_time, train_event)?;
        survival::concordance_index_ipcw(&censoring, time, event, risk, tau)
    })
}

#[pyfunction]
fn dynamic_auc<'py>(
    py: Python<'py>,
    train_time: Numbers,
    train_event: Flags,
    time: Numbers,
    event: Flags,
    risk: Numbers,
    times: Numbers,
) -> PyResult<(Vector<'py>, f64)> {
    let (train_time, train_event) = (train_time.as_slice()?, train_event.as_slice()?);
    let (time, event, risk, times) = (time.as_slice()?, event.as_slice()?, risk.as_slice()?, times.as_slice()?);
    let found = compute(py, || {
        let censoring = CensoringDistribution::fit(train_time, train_event)?;
        survival::dynamic_auc(&censoring, time, event, risk, times)
    })?;
    Ok((found.auc.into_pyarray(py), found.mean))
}

/// `predicted`: [patients, times], patient by patient.
#[pyfunction]
fn brier_score<'py>(
    py: Python<'py>,
    train_time: Numbers,
    train_event: Flags,
    time: Numbers,
    event: Flags,
    predicted: Numbers,
    times: Numbers,
) -> PyResult<(Vector<'py>, Option<f64>)> {
    let (train_time, train_event) = (train_time.as_slice()?, train_event.as_slice()?);
    let (time, event) = (time.as_slice()?, event.as_slice()?);
    let (predicted, times) = (predicted.as_slice()?, times.as_slice()?);
    let found = compute(py, || {
        let censoring = CensoringDistribution::fit(train_time, train_event)?;
        survival::brier_score(&censoring, time, event, predicted, times)
    })?;
    let integrated = found.integrated().ok();
    Ok((found.score.into_pyarray(py), integrated))
}

type Curve<'py> = (Vector<'py>, Vec<usize>, Vec<usize>, Vec<usize>, Vector<'py>, Vector<'py>, Vector<'py>);
type Median = (Option<f64>, Option<f64>, Option<f64>);

#[pyfunction]
fn kaplan_meier<'py>(
    py: Python<'py>,
    time: Numbers,
    event: Flags,
    log_log: bool,
    level: f64,
) -> PyResult<(Curve<'py>, Median)> {
    let (time, event) = (time.as_slice()?, event.as_slice()?);
    let limits = if log_log { Limits::LogLog } else { Limits::Log };
    let found = compute(py, || survival::kaplan_meier(time, event, limits, level))?;
    let column = |of: &dyn Fn(&survival::Step) -> f64| found.steps.iter().map(of).collect::<Vec<_>>().into_pyarray(py);
    let counts = |of: &dyn Fn(&survival::Step) -> usize| found.steps.iter().map(of).collect::<Vec<_>>();
    let median = found.median();
    let curve = (
        column(&|step| step.time),
        counts(&|step| step.at_risk),
        counts(&|step| step.events),
        counts(&|step| step.censored),
        column(&|step| step.survival),
        column(&|step| step.limits.map_or(f64::NAN, |limits| limits.0)),
        column(&|step| step.limits.map_or(f64::NAN, |limits| limits.1)),
    );
    Ok((curve, (median.estimate, median.lower, median.upper)))
}

/// Chi-squared, its degrees of freedom, p; and of each group its patients, events, events expected.
type Groupwise = (f64, usize, f64, Vec<usize>, Vec<usize>, Vec<f64>);

#[pyfunction]
fn log_rank(py: Python<'_>, time: Numbers, event: Flags, group: Groups, strata: Option<Groups>) -> PyResult<Groupwise> {
    let (time, event, group) = (time.as_slice()?, event.as_slice()?, group.as_slice()?);
    let strata = strata.as_ref().map(|strata| strata.as_slice()).transpose()?;
    let found = compute(py, || survival::log_rank(time, event, group, strata))?;
    Ok((found.chi_squared, found.degrees_of_freedom, found.p_value, found.patients, found.observed, found.expected))
}

#[pyfunction]
fn hazard_ratio(
    py: Python<'_>,
    time: Numbers,
    event: Flags,
    covariate: Numbers,
    level: f64,
) -> PyResult<(f64, f64, f64, f64, f64, f64)> {
    let (time, event, covariate) = (time.as_slice()?, event.as_slice()?, covariate.as_slice()?);
    let h = compute(py, || survival::hazard_ratio(time, event, covariate, level))?;
    Ok((h.ratio, h.lower, h.upper, h.level, h.coefficient, h.std_error))
}

#[pyfunction]
fn nelson_aalen<'py>(
    py: Python<'py>,
    time: Numbers,
    event: Flags,
) -> PyResult<(Vector<'py>, Vector<'py>, Vector<'py>)> {
    let (time, event) = (time.as_slice()?, event.as_slice()?);
    let (found, std_error) = compute(py, || survival::nelson_aalen(time, event))?;
    Ok((found.time.into_pyarray(py), found.hazard.into_pyarray(py), std_error.into_pyarray(py)))
}

#[pyfunction]
fn baseline_hazard<'py>(
    py: Python<'py>,
    time: Numbers,
    event: Flags,
    risk: Numbers,
    efron: bool,
) -> PyResult<(Vector<'py>, Vector<'py>)> {
    let (time, event, risk) = (time.as_slice()?, event.as_slice()?, risk.as_slice()?);
    let found = compute(py, || survival::baseline_hazard(time, event, risk, ties(efron)))?;
    Ok((found.time.into_pyarray(py), found.hazard.into_pyarray(py)))
}

#[pyfunction]
fn fold_mean(
    py: Python<'_>,
    values: Numbers,
    ddof: usize,
    level: f64,
    in_unit: bool,
) -> PyResult<(f64, f64, usize, f64, f64, f64)> {
    let values = values.as_slice()?;
    let mean = if in_unit { survival::fold_mean_in_unit } else { survival::fold_mean };
    let found = compute(py, || mean(values, ddof, level))?;
    Ok((found.mean, found.sd, found.ddof, found.lower, found.upper, found.level))
}

#[pyfunction]
fn number_at_risk(py: Python<'_>, time: Numbers, at: Numbers) -> PyResult<Vec<usize>> {
    let (time, at) = (time.as_slice()?, at.as_slice()?);
    compute(py, || survival::number_at_risk(time, at))
}

#[pyfunction]
fn risk_sets(py: Python<'_>, time: Numbers, event: Flags) -> PyResult<Vec<(f64, usize, usize, usize)>> {
    let (time, event) = (time.as_slice()?, event.as_slice()?);
    let sets = compute(py, || survival::risk_sets(time, event))?;
    Ok(sets.into_iter().map(|set| (set.time, set.at_risk, set.events, set.censored)).collect())
}

#[pyfunction]
fn concordance_permutation_test(
    py: Python<'_>,
    time: Numbers,
    event: Flags,
    risk: Numbers,
    fold: Option<Groups>,
    permutations: usize,
    seed: u64,
) -> PyResult<(f64, f64)> {
    let (time, event, risk) = (time.as_slice()?, event.as_slice()?, risk.as_slice()?);
    let fold = fold.as_ref().map(|fold| fold.as_slice()).transpose()?;
    let found = compute(py, || survival::concordance_permutation_test(time, event, risk, fold, permutations, seed))?;
    Ok((found.index, found.p_value))
}

/// The log-likelihood, and its gradient in the risks.
#[pyfunction]
fn cox_loglik_and_gradient<'py>(
    py: Python<'py>,
    time: Numbers,
    event: Flags,
    risk: Numbers,
    efron: bool,
    strata: Option<Groups>,
    weights: Option<Numbers>,
) -> PyResult<(f64, Vector<'py>)> {
    let (time, event, risk) = (time.as_slice()?, event.as_slice()?, risk.as_slice()?);
    let strata = strata.as_ref().map(|strata| strata.as_slice()).transpose()?;
    let weights = weights.as_ref().map(|weights| weights.as_slice()).transpose()?;
    let (loglik, gradient) = compute(py, || {
        let mut gradient = vec![0.0; time.len()];
        let cohort = CoxCohort::new(time, event, strata, weights)?;
        Ok((cohort.loglik_and_gradient(risk, ties(efron), &mut gradient)?, gradient))
    })?;
    Ok((loglik, gradient.into_pyarray(py)))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(concordance_index, module)?)?;
    module.add_function(wrap_pyfunction!(concordance_index_ipcw, module)?)?;
    module.add_function(wrap_pyfunction!(dynamic_auc, module)?)?;
    module.add_function(wrap_pyfunction!(brier_score, module)?)?;
    module.add_function(wrap_pyfunction!(kaplan_meier, module)?)?;
    module.add_function(wrap_pyfunction!(log_rank, module)?)?;
    module.add_function(wrap_pyfunction!(hazard_ratio, module)?)?;
    module.add_function(wrap_pyfunction!(nelson_aalen, module)?)?;
    module.add_function(wrap_pyfunction!(baseline_hazard, module)?)?;
    module.add_function(wrap_pyfunction!(fold_mean, module)?)?;
    module.add_function(wrap_pyfunction!(number_at_risk, module)?)?;
    module.add_function(wrap_pyfunction!(risk_sets, module)?)?;
    module.add_function(wrap_pyfunction!(concordance_permutation_test, module)?)?;
    module.add_function(wrap_pyfunction!(cox_loglik_and_gradient, module)?)
}
