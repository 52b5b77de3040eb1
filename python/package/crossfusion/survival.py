"""Survival statistics on numpy arrays, with the names that the Rust library gives them.

Every function takes columns of one cohort, one entry a patient: ``time`` (any one unit; event or
censoring, whichever came first), ``event`` (True: the event was observed) and, where it is needed,
``risk`` (any score; higher means an earlier event). ValueError where a statistic is not defined, with
the reason; none returns NaN for that. docs/survival.md has each formula and its source.
"""

import typing

import numpy as np

from . import _crossfusion


def _numbers(values):
    return np.ascontiguousarray(values, dtype=np.float64)


def _flags(values):
    values = np.asarray(values)
    if values.dtype != np.bool_ and not np.isin(values, (0, 1)).all():
        raise ValueError("`event` must be True or False, or 1 and 0")
    return np.ascontiguousarray(values, dtype=np.bool_)


def _groups(values):
    """Any labels, as numbers from 0."""
    if values is None:
        return None
    return np.ascontiguousarray(np.unique(np.asarray(values), return_inverse=True)[1].ravel(), dtype=np.uintp)


def _efron(ties):
    if ties not in ("efron", "breslow"):
        raise ValueError(f"ties = {ties!r}: expected 'efron' or 'breslow'")
    return ties == "efron"


class Concordance(typing.NamedTuple):
    index: float
    """(concordant + tied_risk / 2) / (concordant + discordant + tied_risk)"""
    concordant: int
    discordant: int
    tied_risk: int
    tied_time: int


def concordance_index(time, event, risk):
    """Harrell's C; scikit-survival's ``concordance_index_censored``. O(n log n)."""
    return Concordance(*_crossfusion.concordance_index(_numbers(time), _flags(event), _numbers(risk)))


def concordance_index_ipcw(train_time, train_event, time, event, risk, tau=None):
    """Uno's C, weighted by the censoring of the training patients; events from ``tau`` on are not counted."""
    return _crossfusion.concordance_index_ipcw(
        _numbers(train_time), _flags(train_event), _numbers(time), _flags(event), _numbers(risk), tau
    )


class DynamicAuc(typing.NamedTuple):
    times: np.ndarray
    auc: np.ndarray
    mean: float


def dynamic_auc(train_time, train_event, time, event, risk, times):
    """Cumulative/dynamic AUC at each of ``times``; scikit-survival's ``cumulative_dynamic_auc``."""
    times = _numbers(times)
    auc, mean = _crossfusion.dynamic_auc(
        _numbers(train_time), _flags(train_event), _numbers(time), _flags(event), _numbers(risk), times
    )
    return DynamicAuc(times, auc, mean)


class BrierScore(typing.NamedTuple):
    times: np.ndarray
    score: np.ndarray
    integrated: typing.Optional[float]
    """Over the times; None of a single one."""


def brier_score(train_time, train_event, time, event, survival, times):
    """Brier score of predicted survival ``[patients, times]`` at each of ``times``."""
    times = _numbers(times)
    survival = _numbers(survival)
    if survival.shape != (len(np.atleast_1d(time)), len(times)):
        raise ValueError(f"`survival` has shape {survival.shape}, expected {(len(time), len(times))}")
    score, integrated = _crossfusion.brier_score(
        _numbers(train_time), _flags(train_event), _numbers(time), _flags(event), survival.ravel(), times
    )
    return BrierScore(times, score, integrated)


class KaplanMeier(typing.NamedTuple):
    time: np.ndarray
    at_risk: list
    events: list
    censored: list
    survival: np.ndarray
    lower: np.ndarray
    """NaN where there is no estimate of the variance (R prints NA), as in ``upper``."""
    upper: np.ndarray
    median: tuple
    """Estimate, lower and upper limit; None where the curve does not fall so far."""


def kaplan_meier(time, event, limits="log", level=0.95):
    """The Kaplan-Meier curve with Greenwood's variance; R's ``survfit``. ``limits``: log or log-log."""
    if limits not in ("log", "log-log"):
        raise ValueError(f"limits = {limits!r}: expected 'log' or 'log-log'")
    curve, median = _crossfusion.kaplan_meier(_numbers(time), _flags(event), limits == "log-log", level)
    return KaplanMeier(*curve, median)


class LogRank(typing.NamedTuple):
    chi_squared: float
    degrees_of_freedom: int
    p_value: float
    patients: list
    observed: list
    expected: list


def log_rank(time, event, group, strata=None):
    """Log-rank test of two or more groups (any labels); R's ``survdiff``."""
    return LogRank(*_crossfusion.log_rank(_numbers(time), _flags(event), _groups(group), _groups(strata)))


class HazardRatio(typing.NamedTuple):
    ratio: float
    lower: float
    upper: float
    level: float
    coefficient: float
    std_error: float


def hazard_ratio(time, event, covariate, level=0.95):
    """A Cox model of one covariate with Efron's ties; R's ``coxph``."""
    return HazardRatio(*_crossfusion.hazard_ratio(_numbers(time), _flags(event), _numbers(covariate), level))


class CumulativeHazard(typing.NamedTuple):
    time: np.ndarray
    hazard: np.ndarray


def nelson_aalen(time, event):
    """The Nelson-Aalen estimate and its standard errors."""
    times, hazard, std_error = _crossfusion.nelson_aalen(_numbers(time), _flags(event))
    return CumulativeHazard(times, hazard), std_error


def baseline_hazard(time, event, risk, ties="efron"):
    """The baseline hazard of a Cox model whose ``risk`` is the log hazard ratio; R's ``basehaz``."""
    return CumulativeHazard(
        *_crossfusion.baseline_hazard(_numbers(time), _flags(event), _numbers(risk), _efron(ties))
    )


class FoldMean(typing.NamedTuple):
    mean: float
    sd: float
    ddof: int
    lower: float
    upper: float
    level: float


def fold_mean(values, ddof=0, level=0.95):
    """Mean over folds with Student's t interval."""
    return FoldMean(*_crossfusion.fold_mean(_numbers(values), ddof, level, False))


def fold_mean_in_unit(values, ddof=0, level=0.95):
    """The same of a statistic in 0..1, whose limits lie there, too."""
    return FoldMean(*_crossfusion.fold_mean(_numbers(values), ddof, level, True))


def number_at_risk(time, at):
    """For each of ``at``, how many were followed so far."""
    return _crossfusion.number_at_risk(_numbers(time), _numbers(at))


class RiskSet(typing.NamedTuple):
    time: float
    at_risk: int
    events: int
    censored: int


def risk_sets(time, event):
    """The distinct times in order, with the counts at each."""
    return [RiskSet(*row) for row in _crossfusion.risk_sets(_numbers(time), _flags(event))]


class PermutationTest(typing.NamedTuple):
    index: float
    p_value: float


def concordance_permutation_test(time, event, risk, fold=None, permutations=2000, seed=0):
    """Is the C-index better than chance? Risks are dealt out anew among the patients of each fold."""
    return PermutationTest(
        *_crossfusion.concordance_permutation_test(
            _numbers(time), _flags(event), _numbers(risk), _groups(fold), permutations, seed
        )
    )


def cox_loglik_and_gradient(time, event, risk, ties="efron", strata=None, weights=None):
    """The Cox partial log-likelihood of log-risks, and its gradient in them. O(n log n)."""
    weights = None if weights is None else _numbers(weights)
    return _crossfusion.cox_loglik_and_gradient(
        _numbers(time), _flags(event), _numbers(risk), _efron(ties), _groups(strata), weights
    )
