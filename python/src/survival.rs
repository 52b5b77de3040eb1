//! The statistics on numpy's arrays, as tuples; python/package/crossfusion/survival.py names their
//! fields.

use engine::{
    Error, Result,
    survival::{self, Bootstrap, CensoringDistribution, Limits, Patients, Ties},
};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::{exceptions::PyValueError, prelude::*};

use crate::{compute, raise};

type Numbers<'py> = PyReadonlyArray1<'py, f64>;
type Flags<'py> = PyReadonlyArray1<'py, bool>;
type Groups<'py> = PyReadonlyArray1<'py, usize>;
type Vector<'py> = Bound<'py, PyArray1<f64>>;
type Counts<'py> = Bound<'py, PyArray1<isize>>;

/// Signed, as numpy has integers: differences of unsigned ones would wrap around.
fn signed(py: Python<'_>, counts: Vec<usize>) -> Counts<'_> {
    counts.into_iter().map(|n| n as isize).collect::<Vec<_>>().into_pyarray(py)
}

fn ties(efron: bool) -> Ties {
    if efron { Ties::Efron } else { Ties::Breslow }
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

type Curve<'py> = (Vector<'py>, Counts<'py>, Counts<'py>, Counts<'py>, Vector<'py>, Vector<'py>, Vector<'py>);

/// Time, at risk, events, censored, survival, and its limits: NaN where there are none.
#[pyfunction]
fn kaplan_meier<'py>(py: Python<'py>, time: Numbers, event: Flags, log_log: bool, level: f64) -> PyResult<Curve<'py>> {
    let (time, event) = (time.as_slice()?, event.as_slice()?);
    let limits = if log_log { Limits::LogLog } else { Limits::Log };
    let found = compute(py, || survival::kaplan_meier(time, event, limits, level))?;
    let column = |of: &dyn Fn(&survival::Step) -> f64| found.steps.iter().map(of).collect::<Vec<_>>().into_pyarray(py);
    let counts = |of: &dyn Fn(&survival::Step) -> usize| signed(py, found.steps.iter().map(of).collect());
    Ok((
        column(&|step| step.time),
        counts(&|step| step.at_risk),
        counts(&|step| step.events),
        counts(&|step| step.censored),
        column(&|step| step.survival),
        column(&|step| step.limits.map_or(f64::NAN, |limits| limits.0)),
        column(&|step| step.limits.map_or(f64::NAN, |limits| limits.1)),
    ))
}

type Quantile = (Option<f64>, Option<f64>, Option<f64>);

/// Where a curve of [`kaplan_meier`] and its limits fall to 1 - p.
#[pyfunction]
fn kaplan_meier_quantile(
    py: Python<'_>,
    time: Numbers,
    survival: Numbers,
    lower: Numbers,
    upper: Numbers,
    p: f64,
) -> PyResult<Quantile> {
    let (time, survival) = (time.as_slice()?, survival.as_slice()?);
    let (lower, upper) = (lower.as_slice()?, upper.as_slice()?);
    let step = |i: usize| survival::Step {
        time: time[i],
        at_risk: 0, // the counts are not looked at
        events: 0,
        censored: 0,
        survival: survival[i],
        limits: (!lower[i].is_nan()).then(|| (lower[i], upper[i])),
    };
    let shortest = time.len().min(survival.len()).min(lower.len()).min(upper.len());
    let curve = survival::KaplanMeier { steps: (0..shortest).map(step).collect(), level: 0.95 };
    let found = compute(py, || curve.quantile(p))?;
    Ok((found.estimate, found.lower, found.upper))
}

/// Chi-squared, its degrees of freedom, p; and of each group its patients, events, events expected.
type Groupwise<'py> = (f64, usize, f64, Counts<'py>, Counts<'py>, Vector<'py>);

#[pyfunction]
fn log_rank<'py>(
    py: Python<'py>,
    time: Numbers,
    event: Flags,
    group: Groups,
    strata: Option<Groups>,
) -> PyResult<Groupwise<'py>> {
    let (time, event, group) = (time.as_slice()?, event.as_slice()?, group.as_slice()?);
    let strata = strata.as_ref().map(|strata| strata.as_slice()).transpose()?;
    let found = compute(py, || survival::log_rank(time, event, group, strata))?;
    let (patients, observed) = (signed(py, found.patients), signed(py, found.observed));
    let expected = found.expected.into_pyarray(py);
    Ok((found.chi_squared, found.degrees_of_freedom, found.p_value, patients, observed, expected))
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
fn number_at_risk<'py>(py: Python<'py>, time: Numbers, at: Numbers) -> PyResult<Counts<'py>> {
    let (time, at) = (time.as_slice()?, at.as_slice()?);
    Ok(signed(py, compute(py, || survival::number_at_risk(time, at))?))
}

/// G(t) of [`CensoringDistribution`] at each of `at`: NaN where it is not known.
#[pyfunction]
fn uncensored_at<'py>(py: Python<'py>, time: Numbers, event: Flags, at: Numbers) -> PyResult<Vector<'py>> {
    let (time, event, at) = (time.as_slice()?, event.as_slice()?, at.as_slice()?);
    let found = compute(py, || {
        let censoring = CensoringDistribution::fit(time, event)?;
        Ok(at.iter().map(|&t| censoring.uncensored_at(t).unwrap_or(f64::NAN)).collect::<Vec<_>>())
    })?;
    Ok(found.into_pyarray(py))
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

/// Estimate, lower and upper end, level, standard error, undefined replicates.
type Interval = (f64, f64, f64, f64, f64, usize);

fn interval(found: survival::Interval) -> Interval {
    (found.estimate, found.lower, found.upper, found.level, found.std_error, found.undefined)
}

/// What a Python function says of these rows. Its ValueError means that the statistic is not
/// defined there; whatever else it raises ends the bootstrap.
fn statistic_of(statistic: &Bound<'_, PyAny>, rows: Vec<usize>) -> PyResult<Result<f64>> {
    let py = statistic.py();
    let found = statistic.call1((signed(py, rows),)).and_then(|value| value.extract::<f64>());
    match found {
        Err(e) if e.is_instance_of::<PyValueError>(py) => Ok(Err(Error::Usage(e.value(py).to_string()))),
        found => found.map(Ok),
    }
}

/// `statistic` is called in the thread of the caller, one resampled cohort after the other.
#[pyfunction]
fn bootstrap(
    patient: Groups,
    fold: Option<Groups>,
    replicates: usize,
    seed: u64,
    level: f64,
    statistic: &Bound<'_, PyAny>,
) -> PyResult<Interval> {
    let (patients, plan) = plan(patient, fold, replicates, seed, level)?;
    let estimate = statistic_of(statistic, patients.all())?.map_err(raise)?;
    let of = |b| statistic_of(statistic, patients.draw(seed, b));
    let found = (0..replicates).map(of).collect::<PyResult<Vec<_>>>()?;
    plan.interval(estimate, &found).map(interval).map_err(raise)
}

/// Both estimates, the interval of their difference, p.
#[pyfunction]
fn bootstrap_difference(
    patient: Groups,
    fold: Option<Groups>,
    replicates: usize,
    seed: u64,
    level: f64,
    a: &Bound<'_, PyAny>,
    b: &Bound<'_, PyAny>,
) -> PyResult<(f64, f64, Interval, f64)> {
    let (patients, plan) = plan(patient, fold, replicates, seed, level)?;
    let all = patients.all();
    let of_a = statistic_of(a, all.clone())?.map_err(raise)?;
    let of_b = statistic_of(b, all)?.map_err(raise)?;
    let difference = |replicate| {
        let rows = patients.draw(seed, replicate);
        let a = statistic_of(a, rows.clone())?;
        Ok(match (a, statistic_of(b, rows)?) {
            (Ok(a), Ok(b)) => Ok(a - b),
            (Err(e), _) | (_, Err(e)) => Err(e),
        })
    };
    let found = (0..replicates).map(difference).collect::<PyResult<Vec<_>>>()?;
    let found = plan.comparison(of_a, of_b, &found).map_err(raise)?;
    Ok((found.a, found.b, interval(found.difference), found.p_value))
}

fn plan(
    patient: Groups,
    fold: Option<Groups>,
    replicates: usize,
    seed: u64,
    level: f64,
) -> PyResult<(Patients, Bootstrap)> {
    let fold = fold.as_ref().map(|fold| fold.as_slice()).transpose()?;
    let patients = Patients::new(patient.as_slice()?, fold).map_err(raise)?;
    let plan = Bootstrap { replicates, seed, level };
    plan.check().map_err(raise)?;
    Ok((patients, plan))
}

/// A cohort that is sorted once.
#[pyclass(frozen)]
struct CoxCohort(survival::CoxCohort);

#[pymethods]
impl CoxCohort {
    #[new]
    fn new(
        py: Python<'_>,
        time: Numbers,
        event: Flags,
        strata: Option<Groups>,
        weights: Option<Numbers>,
    ) -> PyResult<Self> {
        let (time, event) = (time.as_slice()?, event.as_slice()?);
        let strata = strata.as_ref().map(|strata| strata.as_slice()).transpose()?;
        let weights = weights.as_ref().map(|weights| weights.as_slice()).transpose()?;
        Ok(Self(compute(py, || survival::CoxCohort::new(time, event, strata, weights))?))
    }

    fn events(&self) -> usize {
        self.0.events()
    }

    /// The log-likelihood, and its gradient in the risks.
    fn loglik_and_gradient<'py>(&self, py: Python<'py>, risk: Numbers, efron: bool) -> PyResult<(f64, Vector<'py>)> {
        let risk = risk.as_slice()?;
        let (loglik, gradient) = compute(py, || {
            let mut gradient = vec![0.0; risk.len()];
            Ok((self.0.loglik_and_gradient(risk, ties(efron), &mut gradient)?, gradient))
        })?;
        Ok((loglik, gradient.into_pyarray(py)))
    }
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
    module.add_function(wrap_pyfunction!(kaplan_meier_quantile, module)?)?;
    module.add_function(wrap_pyfunction!(uncensored_at, module)?)?;
    module.add_function(wrap_pyfunction!(bootstrap, module)?)?;
    module.add_function(wrap_pyfunction!(bootstrap_difference, module)?)?;
    module.add_class::<CoxCohort>()
}
