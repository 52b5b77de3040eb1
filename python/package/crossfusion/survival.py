"""Survival statistics on numpy arrays, with the names that the Rust library gives them.

Every function takes columns of one cohort, one entry a patient: ``time`` (any one unit; event or
censoring, whichever came first), ``event`` (True: the event was observed) and, where it is needed,
``risk`` (any score; higher means an earlier event). Shapes are in brackets, n being the patients.
ValueError where a statistic is not defined, with the reason; none returns NaN for that.
docs/survival.md has each formula and its source.
"""

import dataclasses
import operator
import typing

import numpy as np
import numpy.typing as npt

from . import _crossfusion

__all__ = [
    "BrierScore",
    "CensoringDistribution",
    "Concordance",
    "CoxCohort",
    "CumulativeHazard",
    "DynamicAuc",
    "FoldMean",
    "HazardRatio",
    "Interval",
    "KaplanMeier",
    "Limits",
    "LogRank",
    "PairedComparison",
    "Patients",
    "PermutationTest",
    "Quantile",
    "RISK_TIE",
    "RiskSet",
    "Ties",
    "baseline_hazard",
    "bootstrap",
    "bootstrap_difference",
    "brier_score",
    "concordance_index",
    "concordance_index_ipcw",
    "concordance_permutation_test",
    "cox_loglik_and_gradient",
    "dynamic_auc",
    "fold_mean",
    "fold_mean_in_unit",
    "hazard_ratio",
    "kaplan_meier",
    "log_rank",
    "nelson_aalen",
    "number_at_risk",
    "risk_sets",
]

Numbers = npt.NDArray[np.float64]
Counts = npt.NDArray[np.intp]

Ties = typing.Literal["efron", "breslow"]
"""How events at the same time are counted."""
Limits = typing.Literal["log", "log-log"]
"""The scale on which a Kaplan-Meier curve's limits are symmetric."""
Statistic = typing.Callable[[npt.NDArray[np.intp]], float]
"""Of the rows of a resampled cohort; a ValueError says that it is not defined there."""

RISK_TIE = 1e-8
"""Risks closer than this are tied in the C-indices and the dynamic AUC, as in scikit-survival."""


# ---- arguments -----------------------------------------------------------------------------------


def _array(name: str, values: npt.ArrayLike) -> npt.NDArray[typing.Any]:
    if np.ma.is_masked(values):  # numpy would take what is under the mask
        raise ValueError(f"`{name}` has masked entries: leave these patients out")
    return np.asarray(values)


def _numbers(name: str, values: npt.ArrayLike, shape: typing.Optional[tuple[int, ...]] = None) -> Numbers:
    """Numbers in one dimension, or of a shape. Neither text nor dates nor complex numbers, which numpy
    would convert."""
    array = _array(name, values)
    text = array.dtype.kind == "O" and any(isinstance(value, (str, bytes)) for value in array.flat)
    if text or array.dtype.kind not in "biufO":
        raise ValueError(f"`{name}` holds {'text' if text else array.dtype}, expected numbers")
    if array.shape != shape if shape else array.ndim != 1:
        raise ValueError(f"`{name}` has shape {array.shape}, expected {shape or 'one dimension'}")
    try:
        return np.ascontiguousarray(array, dtype=np.float64)
    except (TypeError, ValueError) as e:
        raise ValueError(f"`{name}` holds what is not a number: {e}") from None


def _flags(name: str, values: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    array = _array(name, values)
    if array.ndim != 1:
        raise ValueError(f"`{name}` has shape {array.shape}, expected one dimension")
    if array.dtype.kind not in "b" and not np.isin(array, (0, 1)).all():
        raise ValueError(f"`{name}` must be True or False, or 1 and 0")
    return np.ascontiguousarray(array, dtype=np.bool_)


def _groups(name: str, values: npt.ArrayLike) -> tuple[npt.NDArray[typing.Any], npt.NDArray[np.uintp]]:
    """The labels in order, of any type, and each patient's as a number from 0."""
    array = _array(name, values)
    if array.ndim != 1:
        raise ValueError(f"`{name}` has shape {array.shape}, expected one dimension")
    if array.dtype.kind == "O":
        missing = np.array([value is None or (isinstance(value, float) and value != value) for value in array], bool)
    else:
        missing = np.asarray(array != array)  # NaN, and dates that are not given
    if missing.any():
        raise ValueError(f"entry {missing.argmax()} of `{name}` is missing: leave these patients out")
    try:
        labels, places = np.unique(array, return_inverse=True)
    except TypeError:
        raise ValueError(f"`{name}` has labels of several types, which have no order") from None
    return labels, np.ascontiguousarray(places.ravel(), dtype=np.uintp)


def _places(name: str, values: typing.Optional[npt.ArrayLike]) -> typing.Optional[npt.NDArray[np.uintp]]:
    return None if values is None else _groups(name, values)[1]


def _efron(ties: Ties) -> bool:
    if ties not in ("efron", "breslow"):
        raise ValueError(f"ties = {ties!r}: expected 'efron' or 'breslow'")
    return ties == "efron"


def _whole(name: str, value: int, most: int = 2**32) -> int:
    value = operator.index(value)
    if not 0 <= value <= most:
        raise ValueError(f"{name} = {value}: expected 0 to {most}")
    return value


def _seed(value: int) -> int:
    return _whole("seed", value, 2**64 - 1)


def _step(times: Numbers, values: Numbers, first: float, at: npt.ArrayLike, ends: bool) -> Numbers:
    """A step function continuous from the right: ``first`` before the first time, NaN behind the last
    where nobody is followed any more (``ends``)."""
    at = np.asarray(at, dtype=np.float64)
    found = np.concatenate(([first], values))[np.searchsorted(times, at, side="right")]
    return np.asarray(np.where(np.isnan(at) | (ends & (at > times[-1])), np.nan, found))


# ---- concordance ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Concordance:  # no tuple, whose `index` is something else
    """The pairs in which one surely outlived the other, counted: see :func:`concordance_index`."""

    index: float
    """(concordant + tied_risk / 2) / (concordant + discordant + tied_risk)"""
    concordant: int
    discordant: int
    tied_risk: int
    tied_time: int


def concordance_index(time: npt.ArrayLike, event: npt.ArrayLike, risk: npt.ArrayLike) -> Concordance:
    """Harrell's C; scikit-survival's ``concordance_index_censored``. O(n log n).

    time, event, risk ``[n]``.
    """
    return Concordance(
        *_crossfusion.concordance_index(_numbers("time", time), _flags("event", event), _numbers("risk", risk))
    )


class CensoringDistribution(typing.NamedTuple):
    """G(t) = P(a patient is still uncensored after t), of the patients that it is fitted to.

    The Kaplan-Meier estimate with the roles of event and censoring exchanged; at a tied time the events
    come first and leave the risk set. scikit-survival's ``CensoringDistributionEstimator``.
    """

    time: Numbers
    """``[n]``, as :meth:`fit` was given it."""
    event: npt.NDArray[np.bool_]
    """``[n]``"""

    @classmethod
    def fit(cls, time: npt.ArrayLike, event: npt.ArrayLike) -> "CensoringDistribution":
        """G of patients, usually those of training: time, event ``[n]``. Without censoring it is 1."""
        fitted = cls(_numbers("time", time), _flags("event", event))
        _crossfusion.uncensored_at(*fitted, np.empty(0))  # says what is wrong with them
        return fitted

    def uncensored_at(self, t: npt.ArrayLike) -> Numbers:
        """G at times of any shape. NaN after the last time of the patients, unless G is zero there."""
        times = np.asarray(t, dtype=np.float64)
        return _crossfusion.uncensored_at(self.time, self.event, times.ravel()).reshape(times.shape)


def _censoring(censoring: CensoringDistribution) -> tuple[Numbers, npt.NDArray[np.bool_]]:
    if not isinstance(censoring, CensoringDistribution):
        kind = type(censoring).__name__
        raise TypeError(f"`censoring` is of type {kind}, expected CensoringDistribution.fit(time, event)")
    return _numbers("time", censoring.time), _flags("event", censoring.event)


def concordance_index_ipcw(
    censoring: CensoringDistribution,
    time: npt.ArrayLike,
    event: npt.ArrayLike,
    risk: npt.ArrayLike,
    tau: typing.Optional[float] = None,
) -> float:
    """Uno's C, weighted by the censoring of the training patients; events from ``tau`` on do not count.

    time, event, risk ``[n]``. scikit-survival's ``concordance_index_ipcw``.
    """
    return _crossfusion.concordance_index_ipcw(
        *_censoring(censoring), _numbers("time", time), _flags("event", event), _numbers("risk", risk), tau
    )


# ---- over time -----------------------------------------------------------------------------------


class DynamicAuc(typing.NamedTuple):
    """See :func:`dynamic_auc`."""

    times: Numbers
    """``[times]``"""
    auc: Numbers
    """``[times]``"""
    mean: float
    """Weighted by the fall of the Kaplan-Meier curve up to each time."""


def dynamic_auc(
    censoring: CensoringDistribution,
    time: npt.ArrayLike,
    event: npt.ArrayLike,
    risk: npt.ArrayLike,
    times: npt.ArrayLike,
) -> DynamicAuc:
    """Cumulative/dynamic AUC at each of ``times``; scikit-survival's ``cumulative_dynamic_auc``.

    time, event, risk ``[n]``; ``times`` ascend, and lie within the follow-up.
    """
    times = _numbers("times", times)
    auc, mean = _crossfusion.dynamic_auc(
        *_censoring(censoring), _numbers("time", time), _flags("event", event), _numbers("risk", risk), times
    )
    return DynamicAuc(times, auc, mean)


class BrierScore(typing.NamedTuple):
    """See :func:`brier_score`."""

    times: Numbers
    """``[times]``"""
    score: Numbers
    """``[times]``: 0 is perfect; 0.25 is what S = 1/2 for everyone scores without censoring."""
    integrated: typing.Optional[float]
    """The mean over the span of the times; None of a single one."""


def brier_score(
    censoring: CensoringDistribution,
    time: npt.ArrayLike,
    event: npt.ArrayLike,
    survival: npt.ArrayLike,
    times: npt.ArrayLike,
) -> BrierScore:
    """Brier score of predicted survival at each of ``times``; scikit-survival's ``brier_score``.

    time, event ``[n]``, survival ``[n, times]``; ``times`` ascend, and lie within the follow-up.
    """
    time, times = _numbers("time", time), _numbers("times", times)
    survival = _numbers("survival", survival, (len(time), len(times)))
    score, integrated = _crossfusion.brier_score(
        *_censoring(censoring), time, _flags("event", event), survival.ravel(), times
    )
    return BrierScore(times, score, integrated)


# ---- curves --------------------------------------------------------------------------------------


class Quantile(typing.NamedTuple):
    """A time at which a curve falls to a given survival; None where it, or its limit, does not."""

    estimate: typing.Optional[float]
    lower: typing.Optional[float]
    upper: typing.Optional[float]


class KaplanMeier(typing.NamedTuple):
    """See :func:`kaplan_meier`: one entry a time at which something happened."""

    time: Numbers
    at_risk: Counts
    """Just before the time."""
    events: Counts
    censored: Counts
    survival: Numbers
    """After the time."""
    lower: Numbers
    """NaN where there is no estimate of the variance (R prints NA), as in ``upper``."""
    upper: Numbers
    level: float

    def survival_at(self, t: npt.ArrayLike) -> Numbers:
        """S at times of any shape, continuous from the right. NaN after the last time, unless everyone
        has died by then."""
        return _step(self.time, self.survival, 1.0, t, bool(self.survival[-1] > 0))

    def limits_at(self, t: npt.ArrayLike) -> tuple[Numbers, Numbers]:
        """The lower and the upper limit of S at times of any shape; 1 before the first."""
        ends = bool(self.survival[-1] > 0)
        return _step(self.time, self.lower, 1.0, t, ends), _step(self.time, self.upper, 1.0, t, ends)

    def median(self) -> Quantile:
        """Median survival and its limits, as R prints it: where the curve and its limits cross 1/2."""
        return self.quantile(0.5)

    def quantile(self, p: float) -> Quantile:
        """The time by which a share ``p`` has died, 0 < p < 1, and its limits."""
        return Quantile(*_crossfusion.kaplan_meier_quantile(self.time, self.survival, self.lower, self.upper, p))


def kaplan_meier(
    time: npt.ArrayLike, event: npt.ArrayLike, limits: Limits = "log", level: float = 0.95
) -> KaplanMeier:
    """The Kaplan-Meier curve with Greenwood's variance; R's ``survfit``. time, event ``[n]``."""
    if limits not in ("log", "log-log"):
        raise ValueError(f"limits = {limits!r}: expected 'log' or 'log-log'")
    curve = _crossfusion.kaplan_meier(_numbers("time", time), _flags("event", event), limits == "log-log", level)
    return KaplanMeier(*curve, level)


class CumulativeHazard(typing.NamedTuple):
    """A cumulative hazard, a step function: ``hazard[i]`` from ``time[i]`` on, 0 before."""

    time: Numbers
    hazard: Numbers

    def hazard_at(self, t: npt.ArrayLike) -> Numbers:
        """H at times of any shape. NaN after the last time, where nobody was followed."""
        return _step(self.time, self.hazard, 0.0, t, True)


def nelson_aalen(time: npt.ArrayLike, event: npt.ArrayLike) -> tuple[CumulativeHazard, Numbers]:
    """The Nelson-Aalen estimate and its standard errors; R's ``cumhaz`` and ``std.chaz``.

    time, event ``[n]``.
    """
    times, hazard, std_error = _crossfusion.nelson_aalen(_numbers("time", time), _flags("event", event))
    return CumulativeHazard(times, hazard), std_error


def baseline_hazard(
    time: npt.ArrayLike, event: npt.ArrayLike, risk: npt.ArrayLike, ties: Ties = "efron"
) -> CumulativeHazard:
    """The baseline hazard of a Cox model whose ``risk`` is the log hazard ratio; R's ``basehaz``.

    time, event, risk ``[n]``.
    """
    return CumulativeHazard(
        *_crossfusion.baseline_hazard(
            _numbers("time", time), _flags("event", event), _numbers("risk", risk), _efron(ties)
        )
    )


class RiskSet(typing.NamedTuple):
    """One distinct time of a cohort, and what happened at it."""

    time: float
    at_risk: int
    """Patients whose time is not earlier, those of this time included."""
    events: int
    censored: int


def risk_sets(time: npt.ArrayLike, event: npt.ArrayLike) -> list[RiskSet]:
    """The distinct times in order, with the counts at each. time, event ``[n]``."""
    return [RiskSet(*row) for row in _crossfusion.risk_sets(_numbers("time", time), _flags("event", event))]


def number_at_risk(time: npt.ArrayLike, at: npt.ArrayLike) -> Counts:
    """For each of ``at`` ``[m]``, how many of ``time`` ``[n]`` are not earlier."""
    return _crossfusion.number_at_risk(_numbers("time", time), _numbers("at", at))


# ---- groups and covariates -----------------------------------------------------------------------


class LogRank(typing.NamedTuple):
    """See :func:`log_rank`."""

    chi_squared: float
    degrees_of_freedom: int
    p_value: float
    patients: Counts
    """``[groups]``, in the order of ``groups``, as the next two."""
    observed: Counts
    expected: Numbers
    groups: npt.NDArray[typing.Any]
    """The labels, ascending."""


def log_rank(
    time: npt.ArrayLike, event: npt.ArrayLike, group: npt.ArrayLike, strata: typing.Optional[npt.ArrayLike] = None
) -> LogRank:
    """Log-rank test of two or more groups; R's ``survdiff``.

    time, event, group, strata ``[n]``; group and strata are labels of any type.
    """
    labels, places = _groups("group", group)
    found = _crossfusion.log_rank(_numbers("time", time), _flags("event", event), places, _places("strata", strata))
    return LogRank(*found, labels)


class HazardRatio(typing.NamedTuple):
    """See :func:`hazard_ratio`."""

    ratio: float
    lower: float
    upper: float
    level: float
    coefficient: float
    """log(ratio)"""
    std_error: float
    """Of the coefficient."""


def hazard_ratio(
    time: npt.ArrayLike, event: npt.ArrayLike, covariate: npt.ArrayLike, level: float = 0.95
) -> HazardRatio:
    """A Cox model of one covariate with Efron's ties; R's ``coxph``. time, event, covariate ``[n]``."""
    return HazardRatio(
        *_crossfusion.hazard_ratio(
            _numbers("time", time), _flags("event", event), _numbers("covariate", covariate), level
        )
    )


class CoxCohort:
    """A cohort whose Cox partial likelihood is taken more than once: it is sorted here.

    time, event ``[n]``; ``strata`` ``[n]`` are labels of any type, ``weights`` ``[n]`` case weights
    above 0.
    """

    def __init__(
        self,
        time: npt.ArrayLike,
        event: npt.ArrayLike,
        strata: typing.Optional[npt.ArrayLike] = None,
        weights: typing.Optional[npt.ArrayLike] = None,
    ) -> None:
        weights = None if weights is None else _numbers("weights", weights)
        self._columns = (_numbers("time", time), _flags("event", event), _places("strata", strata), weights)
        self._cohort = _crossfusion.CoxCohort(*self._columns)

    def __reduce__(self) -> tuple[typing.Any, ...]:
        return CoxCohort, self._columns

    def events(self) -> int:
        """The number of events."""
        return self._cohort.events()

    def loglik_and_gradient(self, risk: npt.ArrayLike, ties: Ties = "efron") -> tuple[float, Numbers]:
        """The log-likelihood of log-risks ``[n]``, and its gradient in them ``[n]``. O(n)."""
        return self._cohort.loglik_and_gradient(_numbers("risk", risk), _efron(ties))


def cox_loglik_and_gradient(
    time: npt.ArrayLike,
    event: npt.ArrayLike,
    risk: npt.ArrayLike,
    ties: Ties = "efron",
    strata: typing.Optional[npt.ArrayLike] = None,
    weights: typing.Optional[npt.ArrayLike] = None,
) -> tuple[float, Numbers]:
    """The Cox partial log-likelihood of log-risks, and its gradient in them ``[n]``. O(n log n).

    time, event, risk ``[n]``; strata and weights as :class:`CoxCohort`'s.
    """
    return CoxCohort(time, event, strata, weights).loglik_and_gradient(risk, ties)


# ---- uncertainty ---------------------------------------------------------------------------------


class FoldMean(typing.NamedTuple):
    """See :func:`fold_mean`."""

    mean: float
    sd: float
    ddof: int
    lower: float
    upper: float
    level: float


def fold_mean(values: npt.ArrayLike, ddof: int = 0, level: float = 0.95) -> FoldMean:
    """Mean over folds ``[folds]`` with Student's t interval."""
    return FoldMean(*_crossfusion.fold_mean(_numbers("values", values), _whole("ddof", ddof), level, False))


def fold_mean_in_unit(values: npt.ArrayLike, ddof: int = 0, level: float = 0.95) -> FoldMean:
    """The same of a statistic in 0..1, whose limits lie there, too."""
    return FoldMean(*_crossfusion.fold_mean(_numbers("values", values), _whole("ddof", ddof), level, True))


@dataclasses.dataclass(frozen=True)
class PermutationTest:
    """See :func:`concordance_permutation_test`."""

    index: float
    """Harrell's C of the cohort."""
    p_value: float
    """One-sided: (1 + permutations with a C as high) / (1 + permutations), so never 0."""


def concordance_permutation_test(
    time: npt.ArrayLike,
    event: npt.ArrayLike,
    risk: npt.ArrayLike,
    fold: typing.Optional[npt.ArrayLike] = None,
    permutations: int = 2000,
    seed: int = 0,
) -> PermutationTest:
    """Is the C-index better than chance? Risks are dealt out anew among the patients of each fold.

    time, event, risk ``[n]``; fold ``[n]`` are labels of any type.
    """
    return PermutationTest(
        *_crossfusion.concordance_permutation_test(
            _numbers("time", time),
            _flags("event", event),
            _numbers("risk", risk),
            _places("fold", fold),
            _whole("permutations", permutations),
            _seed(seed),
        )
    )


class Patients:
    """What :func:`bootstrap` draws: whole patients, within folds.

    ``patient`` ``[rows]`` labels the patient of each row (slide), ``fold`` ``[rows]`` its fold, from which
    as many patients are drawn as it has; without ``fold`` all are drawn from one. Labels of any type.
    """

    def __init__(self, patient: npt.ArrayLike, fold: typing.Optional[npt.ArrayLike] = None) -> None:
        patients, self._patient = _groups("patient", patient)
        self._fold: typing.Optional[npt.NDArray[np.uintp]] = None
        if not len(self._patient):
            raise ValueError("the bootstrap is undefined: the cohort has no patients")
        if fold is None:
            return
        folds, self._fold = _groups("fold", fold)
        if len(self._fold) != len(self._patient):
            rows, given = len(self._patient), len(self._fold)
            raise ValueError(f"the bootstrap is undefined: `fold` has {given} entries for {rows} patients")
        first = np.unique(self._patient, return_index=True)[1][self._patient]  # the patient's first row
        elsewhere = np.flatnonzero(self._fold != self._fold[first])
        if len(elsewhere):
            row = elsewhere[0]
            a, b = folds[self._fold[first[row]]], folds[self._fold[row]]
            raise ValueError(
                f"the bootstrap is undefined: patient {patients[self._patient[row]]} is in two folds, {a} and {b}"
            )

    @classmethod
    def one_row_each(cls, patients: int) -> "Patients":
        """As many patients of one row each, in one fold."""
        return cls(np.arange(_whole("patients", patients)))


class Interval(typing.NamedTuple):
    """An estimate with a percentile interval."""

    estimate: float
    """The statistic on the cohort itself."""
    lower: float
    upper: float
    level: float
    std_error: float
    """Standard deviation of the replicates."""
    undefined: int
    """Replicates on which the statistic was not defined (no event drawn, say). They are left out; more
    than one in ten is an error."""


def _drawn(
    patients: Patients, replicates: int, seed: int, level: float
) -> tuple[npt.NDArray[np.uintp], typing.Optional[npt.NDArray[np.uintp]], int, int, float]:
    if not isinstance(patients, Patients):
        raise TypeError(f"`patients` is of type {type(patients).__name__}, expected Patients")
    return patients._patient, patients._fold, _whole("replicates", replicates), _seed(seed), level


def bootstrap(
    patients: Patients, statistic: Statistic, replicates: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile interval (Efron & Tibshirani 1993, chapter 13) of any statistic of a cohort.

    ``statistic`` is given the row numbers of a resampled cohort, an array of integers in which the rows
    of a patient drawn twice occur twice. Where it raises a ValueError or is not finite, the replicate is
    left out. The draws are those of the Rust library and of ``cf-eval``:

    >>> from crossfusion.survival import Patients, bootstrap, concordance_index
    >>> c = lambda rows: concordance_index(time[rows], event[rows], risk[rows]).index
    >>> bootstrap(Patients.one_row_each(len(time)), c)  # doctest: +SKIP
    """
    return Interval(*_crossfusion.bootstrap(*_drawn(patients, replicates, seed, level), statistic))


class PairedComparison(typing.NamedTuple):
    """Two runs on the same patients."""

    a: float
    b: float
    difference: Interval
    """Of a - b."""
    p_value: float
    """Two-sided: twice the smaller share of replicates on either side of 0, counting the observed one."""


def bootstrap_difference(
    patients: Patients,
    a: Statistic,
    b: Statistic,
    replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedComparison:
    """Bootstrap of the difference of two statistics on the same draws, which keeps what the two runs
    have in common. Arguments as :func:`bootstrap`'s."""
    found = _crossfusion.bootstrap_difference(*_drawn(patients, replicates, seed, level), a, b)
    value_a, value_b, difference, p_value = found
    return PairedComparison(value_a, value_b, Interval(*difference), p_value)
