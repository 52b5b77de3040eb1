"""The statistics: the numbers of R and scikit-survival that the Rust tests hold, errors, and files."""

import json
import multiprocessing
import pathlib
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

import crossfusion
from crossfusion import survival

ROOT = pathlib.Path(__file__).parents[2]


def test_concordance():
    c = survival.concordance_index([5, 8, 8, 12], [1, 1, 0, 0], [2.0, 0.5, 1.0, 0.1])
    assert (c.concordant, c.discordant) == (4, 1) and c.index == 0.8


def cohort(n=200, seed=3):
    random = np.random.default_rng(seed)
    time, event = random.exponential(10, n).round(1) + 0.1, random.random(n) < 0.6
    return time, event, -time + 20 * random.standard_normal(n)


def test_kaplan_meier_by_hand():
    time, event, _ = cohort()
    curve = survival.kaplan_meier(time, event)
    s, expected = 1.0, []
    for t in np.unique(time):
        s *= 1 - (event & (time == t)).sum() / (time >= t).sum()
        expected.append(s)
    np.testing.assert_allclose(curve.survival, expected)
    assert (curve.lower[1:5] <= curve.survival[1:5]).all() and (np.diff(curve.at_risk) < 0).all()


def test_every_statistic_answers():
    time, event, risk = cohort()
    group = np.where(risk > np.median(risk), "high", "low")
    times = np.quantile(time[event], [0.2, 0.5, 0.7])
    assert survival.log_rank(time, event, group).degrees_of_freedom == 1
    h = survival.hazard_ratio(time, event, (group == "high").astype(float))
    assert h.lower < h.ratio < h.upper
    censoring = survival.CensoringDistribution.fit(time, event)
    assert 0 < survival.concordance_index_ipcw(censoring, time, event, risk, tau=times[-1]) < 1
    assert len(survival.dynamic_auc(censoring, time, event, risk, times).auc) == 3
    predicted = np.full((len(time), 3), 0.5)
    assert survival.brier_score(censoring, time, event, predicted, times).integrated > 0
    hazard, std_error = survival.nelson_aalen(time, event)
    assert len(hazard.time) == len(std_error)
    assert (np.diff(survival.baseline_hazard(time, event, risk / 10).hazard) >= 0).all()
    assert survival.fold_mean([0.6, 0.7, 0.65]).lower < 0.65 < survival.fold_mean_in_unit([0.6, 0.7, 0.65]).upper
    assert survival.number_at_risk(time, [0.0, 1e9]).tolist() == [len(time), 0]
    assert sum(row.events for row in survival.risk_sets(time, event)) == event.sum()
    test = survival.concordance_permutation_test(time, event, risk, permutations=200)
    assert 0 < test.p_value < 0.05
    loglik, gradient = survival.cox_loglik_and_gradient(time, event, risk / 10)
    assert loglik < 0 and abs(gradient.sum()) < 1e-9
    moved = (risk / 10).copy()
    moved[7] += 1e-6
    slope = (survival.cox_loglik_and_gradient(time, event, moved)[0] - loglik) / 1e-6
    assert abs(slope - gradient[7]) < 1e-5


# names of the Rust module that Python has no use for, and why
ELSEWHERE = {
    "Bootstrap": "the arguments replicates, seed and level",
    "Scalar": "a trait: numpy's float64",
    "Step": "the columns of KaplanMeier",
}


def test_every_public_name_of_the_library_is_here():
    source = (ROOT / "src/survival/mod.rs").read_text()
    uses = re.findall(r"^pub use \w+::(?:\{([^}]*)\}|(\w+));", source, re.MULTILINE)
    names = {name.strip() for several, one in uses for name in (several or one).split(",") if name.strip()}
    names |= set(re.findall(r"^pub (?:fn|struct|enum|const|trait|type) (\w+)", source, re.MULTILINE))
    assert {"concordance_index", "bootstrap", "CensoringDistribution", "RISK_TIE", "CoxCohort"} <= names
    assert {name for name in names if not hasattr(survival, name)} == set(ELSEWHERE)
    # and their public methods
    methods = {
        (of, name)
        for path in (ROOT / "src/survival").glob("*.rs")
        for of, body in re.findall(r"^impl (\w+) \{\n(.*?)^\}", path.read_text(), re.MULTILINE | re.DOTALL)
        for name in re.findall(r"^    pub fn (\w+)", body, re.MULTILINE)
    }
    assert ("KaplanMeier", "survival_at") in methods
    elsewhere = {
        ("BrierScore", "integrated"),  # a field
        ("CoxCohort", "presorted"),  # the sort costs less than the call
        ("Patients", "all"),  # bootstrap draws
        ("Patients", "draw"),
    }
    for of, name in methods - elsewhere:
        if hasattr(survival, of) and name != "new":
            assert callable(getattr(getattr(survival, of), name)), (of, name)
    assert elsewhere <= methods
    assert set(survival.__all__) >= names - set(ELSEWHERE)
    tie = re.search(r"RISK_TIE: f64 = (\S+);", (ROOT / "src/survival/concordance.rs").read_text())
    assert float(tie[1]) == survival.RISK_TIE


def goldens():
    for path in sorted((ROOT / "tests/goldens").glob("survival_*.json")):
        golden = json.loads(path.read_text())
        columns = np.array(golden["time"]), np.array(golden["event"], bool), np.array(golden["risk"])
        yield path.stem[len("survival_") :], golden, *columns


def close(got, want):
    """As near as the Rust tests ask for; null is R's NA."""
    want = np.array([np.nan if x is None else x for x in np.atleast_1d(want)], float)
    np.testing.assert_allclose(np.atleast_1d(np.asarray(got, float)), want, rtol=1e-10, atol=1e-10)


def test_r_and_scikit_survival_agree():
    seen = set()
    for name, golden, time, event, risk in goldens():
        for key in ("efron", "breslow"):
            if want := golden.get("cox", {}).get(key):
                loglik, gradient = survival.cox_loglik_and_gradient(time, event, risk, key, golden.get("stratum"))
                close(loglik, want["loglik"])
                np.testing.assert_allclose(gradient, want["grad"], rtol=1e-8, atol=1e-8)
                seen.add("cox")
        if want := golden.get("concordance"):
            c = survival.concordance_index(time, event, risk)
            keys = ("index", "concordant", "discordant", "tied_risk")
            close([getattr(c, key) for key in keys], [want[key] for key in keys])
            seen.add("concordance")
        if want := golden.get("logrank_median_split"):
            test = survival.log_rank(time, event, np.where(risk >= np.median(risk), "high", "low"))
            close([test.chi_squared, test.p_value], [want["chisq"], want["p"]])
            assert test.groups.tolist() == ["high", "low"] and test.patients[0] == (risk >= np.median(risk)).sum()
            seen.add("log-rank")
        if want := golden.get("kaplan_meier"):
            curve = survival.kaplan_meier(time, event)
            for key in ("time", "survival", "at_risk", "lower", "upper"):
                close(getattr(curve, key), want[key])
            close(curve.survival_at(want["time"]), want["survival"])
            close(curve.limits_at(want["time"])[0], want["lower"])
            close(survival.number_at_risk(time, want["time"]), want["at_risk"])
            seen.add("Kaplan-Meier")
        if want := golden.get("scikit_survival"):
            train = np.arange(len(time)) % 2 == 0
            test = ~train & (time < time[train].max())
            censoring = survival.CensoringDistribution.fit(time[train], event[train])
            held_out = time[test], event[test], risk[test]
            if want.get("uno_c") is not None:
                close(survival.concordance_index_ipcw(censoring, *held_out, tau=want["tau"]), want["uno_c"])
                seen.add("Uno's C")
            if want.get("times") is not None:
                times = np.array(want["times"])
                auc = survival.dynamic_auc(censoring, *held_out, times)
                close(auc.auc, want["dynamic_auc"]["auc"])
                close(auc.mean, want["dynamic_auc"]["mean"])
                predicted = np.exp(-np.exp(risk[test] - risk.mean())[:, None] * times / np.median(time))
                brier = survival.brier_score(censoring, *held_out[:2], predicted, times)
                close(brier.score, want["brier"]["score"])
                close(brier.integrated, want["brier"]["integrated"])
                seen.add("over time")
    assert seen == {"cox", "concordance", "log-rank", "Kaplan-Meier", "Uno's C", "over time"}


def test_what_r_says_beyond():
    for name, want in json.loads((ROOT / "tests/survival/r_truth.json").read_text()).items():
        _, _, time, event, risk = next(golden for golden in goldens() if golden[0] == name)
        row = np.arange(len(time))
        group, stratum, weight = row % 3, row // 3 % 4, 0.5 + row % 5
        for key, of, strata in (
            ("logrank_3", group, None),
            ("logrank_2_strata", row % 2, stratum),
            ("logrank_3_strata", group, stratum),
        ):
            test = survival.log_rank(time, event, of, strata)
            close([test.chi_squared, test.p_value], [want[key]["chisq"], want[key]["p"]])
            close(test.observed, want[key]["observed"])
            close(test.expected, want[key]["expected"])
        for limits, key in (("log", "median_log"), ("log-log", "median_log_log")):
            median = survival.kaplan_meier(time, event, limits).median()
            close([np.nan if x is None else x for x in median], want["km"][key])
        curve = survival.kaplan_meier(time, event, "log-log")
        # R repeats the last limits where there are none of their own
        known = ~np.isnan(curve.lower)
        for key in ("lower", "upper"):
            of_r = np.array([np.nan if x is None else x for x in want["km"][f"{key}_log_log"]], float)
            close(getattr(curve, key)[known], of_r[known])
        assert known.sum() >= len(known) - 2
        close(curve.censored, want["km"]["censored"])
        close(survival.kaplan_meier(time, event, level=0.9).lower, want["km"]["lower_log_90"])
        hazard, std_error = survival.nelson_aalen(time, event)
        close(hazard.hazard, want["nelson_aalen"]["hazard"])
        close(std_error, want["nelson_aalen"]["std_error"])
        close(hazard.hazard_at(hazard.time), want["nelson_aalen"]["hazard"])
        for ties in ("efron", "breslow"):
            close(survival.baseline_hazard(time, event, risk, ties).hazard, want["baseline"][ties])
            for key, strata, weights in (
                ("cox_strata", stratum, None),
                ("cox_weighted", None, weight),
                ("cox_strata_weighted", stratum, weight),
            ):
                cohort = survival.CoxCohort(time, event, strata, weights)
                loglik, gradient = cohort.loglik_and_gradient(risk, ties)
                close(loglik, want[key][ties]["loglik"])
                residuals = np.array(want[key][ties]["martingale"])
                weighted = residuals if weights is None else residuals * weights
                np.testing.assert_allclose(gradient, weighted, rtol=1e-8, atol=1e-8)


def test_steps_between_and_beyond():
    curve = survival.kaplan_meier([2.0, 4.0, 6.0], [True, True, False])
    times, expected = [[0, 2], [3, 4], [6, 7]], [[1, 2 / 3], [2 / 3, 1 / 3], [1 / 3, np.nan]]
    np.testing.assert_allclose(curve.survival_at(times), expected)
    assert survival.kaplan_meier([2.0, 4.0], [True, True]).survival_at(9.0) == 0  # everyone has died
    assert np.isnan(curve.survival_at(np.nan)) and curve.limits_at(0)[0] == 1
    assert curve.quantile(0.1).estimate == 2 and curve.quantile(0.9).estimate is None
    hazard, _ = survival.nelson_aalen([2.0, 4.0, 6.0], [True, True, False])
    np.testing.assert_allclose(hazard.hazard_at([0, 3, 6, 7]), [0, 1 / 3, 1 / 3 + 1 / 2, np.nan])
    censoring = survival.CensoringDistribution.fit([2.0, 4.0, 6.0], [False, True, True])
    np.testing.assert_allclose(censoring.uncensored_at([[1, 2], [6, 7]]), [[1, 2 / 3], [2 / 3, np.nan]])


def splitmix(state):
    """As src/survival/bootstrap.rs draws: Steele et al. 2014."""
    mask = 2**64 - 1
    while True:
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        yield z ^ (z >> 31)


def test_the_bootstrap():
    patient, fold = np.repeat(np.arange(60), 2), np.repeat(np.arange(60) % 3, 2)
    time, event, risk = (np.repeat(x, 2) for x in cohort(60))
    noise = np.random.default_rng(5).standard_normal(120)
    c = lambda of: lambda rows: survival.concordance_index(time[rows], event[rows], of[rows]).index
    drawn = []

    def statistic(rows):
        drawn.append(rows)
        return c(risk)(rows)

    patients = survival.Patients([f"patient {p}" for p in patient], fold)
    interval = survival.bootstrap(patients, statistic, replicates=300, seed=7, level=0.9)
    assert interval.estimate == c(risk)(np.arange(120)) and drawn[0].tolist() == list(range(120))
    assert drawn[1].dtype == np.intp and len(drawn) == 301
    for rows in drawn:  # whole patients, as many of each fold
        assert np.bincount(fold[rows], minlength=3).tolist() == [40, 40, 40]
        assert (np.bincount(rows, minlength=120).reshape(60, 2) == np.bincount(rows, minlength=120)[::2, None]).all()
    values = np.array([c(risk)(rows) for rows in drawn[1:]])
    close([interval.lower, interval.upper], np.quantile(values, [0.05, 0.95]))
    close(interval.std_error, values.std(ddof=1))
    assert interval.undefined == 0 and interval.level == 0.9
    # the draws of replicate 3, by the law that the Rust library states
    start = next(splitmix(7)) ^ 3
    numbers = splitmix(next(splitmix(start)))
    members = [np.flatnonzero(np.arange(60) % 3 == f) for f in range(3)]
    expected = [p for f in range(3) for p in (members[f][(next(numbers) * 20) >> 64] for _ in range(20))]
    assert (drawn[4][::2] // 2).tolist() == expected

    pair = survival.bootstrap_difference(patients, c(risk), c(noise), replicates=300, seed=7, level=0.9)
    assert (pair.a, pair.b) == (interval.estimate, c(noise)(np.arange(120)))
    differences = values - [c(noise)(rows) for rows in drawn[1:]]
    close([pair.difference.lower, pair.difference.upper], np.quantile(differences, [0.05, 0.95]))
    close(pair.p_value, min(1, 2 * (1 + min((differences <= 0).sum(), (differences >= 0).sum())) / 301))
    assert pickle.loads(pickle.dumps(pair)) == pair


def test_the_bootstrap_says_what_fails():
    patients = survival.Patients.one_row_each(30)
    half = lambda rows: 1.0 if rows[0] % 2 else float("nan")
    with pytest.raises(ValueError, match="of 200 resampled cohorts fail: it is not finite"):
        survival.bootstrap(patients, half, replicates=200)

    def rarely(rows):
        if (rows == 7).sum() > 3:
            raise ValueError("patient 7 again")
        return rows.mean()

    assert 0 < survival.bootstrap(patients, rarely, replicates=500).undefined < 50
    with pytest.raises(KeyError, match="of the statistic"):  # not of the library: it ends the bootstrap
        survival.bootstrap(patients, lambda rows: {}["of the statistic"])
    with pytest.raises(TypeError):
        survival.bootstrap(patients, lambda rows: "text")
    with pytest.raises(TypeError, match="expected Patients"):
        survival.bootstrap(30, half)
    for wrong in ({"replicates": 1}, {"replicates": -1}, {"level": 1.0}, {"seed": -1}, {"seed": 2**64}):
        with pytest.raises(ValueError):
            survival.bootstrap(patients, lambda rows: 1.0, **wrong)
    with pytest.raises(ValueError, match="patient b is in two folds, 1 and 2"):
        survival.Patients(["a", "b", "b"], [1, 1, 2])
    with pytest.raises(ValueError, match="no patients"):
        survival.Patients([])


def test_a_cohort_is_pickled():
    time, event, risk = cohort()
    cohort_ = survival.CoxCohort(time, event, np.where(risk > 0, "a", "b"), np.abs(risk) + 1)
    again = pickle.loads(pickle.dumps(cohort_))
    assert again.events() == cohort_.events() == event.sum()
    a, b = (c.loglik_and_gradient(risk / 10) for c in (cohort_, again))
    assert a[0] == b[0] and (a[1] == b[1]).all()


TIME, EVENT, RISK = [1.0, 2, 3, 4, 5, 6], [1, 0, 1, 1, 0, 1], [0.5, 0.1, 0.9, 0.3, 0.2, 0.8]
CENSORING = survival.CensoringDistribution.fit(TIME, EVENT)
FUNCTIONS = {
    "concordance_index": dict(time=TIME, event=EVENT, risk=RISK),
    "concordance_index_ipcw": dict(censoring=CENSORING, time=TIME, event=EVENT, risk=RISK),
    "dynamic_auc": dict(censoring=CENSORING, time=TIME, event=EVENT, risk=RISK, times=[2.5, 4.5]),
    "brier_score": dict(censoring=CENSORING, time=TIME, event=EVENT, survival=np.full((6, 2), 0.5), times=[2.5, 4.5]),
    "kaplan_meier": dict(time=TIME, event=EVENT),
    "log_rank": dict(time=TIME, event=EVENT, group=[0, 1] * 3, strata=[0] * 3 + [1] * 3),
    "hazard_ratio": dict(time=TIME, event=EVENT, covariate=RISK),
    "nelson_aalen": dict(time=TIME, event=EVENT),
    "baseline_hazard": dict(time=TIME, event=EVENT, risk=RISK),
    "fold_mean": dict(values=RISK),
    "fold_mean_in_unit": dict(values=RISK),
    "number_at_risk": dict(time=TIME, at=[1.0, 3.0]),
    "risk_sets": dict(time=TIME, event=EVENT),
    "concordance_permutation_test": dict(time=TIME, event=EVENT, risk=RISK, fold=[0] * 3 + [1] * 3),
    "cox_loglik_and_gradient": dict(time=TIME, event=EVENT, risk=RISK, strata=[0, 1] * 3, weights=TIME),
    "CensoringDistribution.fit": dict(time=TIME, event=EVENT),
    "Patients": dict(patient=TIME, fold=[0] * 3 + [1] * 3),
}
MASK = [1, 0, 0, 0, 0, 0]
BAD_NUMBERS = {
    "NaN": [1, np.nan, 3, 4, 5, 6],
    "infinite": [1, np.inf, 3, 4, 5, 6],
    "text": ["1", "2", "3", "4", "5", "6"],
    "text in objects": np.array(["1", "2", "3", "4", "5", "6"], object),
    "complex": np.array(TIME) + 1j,
    "dates": np.arange(6).astype("datetime64[D]"),
    "none": [None] * 6,
    "objects": [object()] * 6,
    "masked": np.ma.array(TIME, mask=MASK),
    "ragged": [[1], [2, 3]],
    "two dimensions": np.array(TIME).reshape(6, 1),
    "one number": 3.0,
}
BAD_FLAGS = {
    "two": [2, 0, 1, 1, 0, 1],
    "NaN": [np.nan, 0, 1, 1, 0, 1],
    "text": ["True"] * 6,
    "none": [None] * 6,
    "two dimensions": np.array(EVENT).reshape(6, 1),
    "masked": np.ma.array(EVENT, mask=MASK),
    "too few": EVENT[:2],
    "empty": [],
}
BAD_LABELS = {
    "none": ["a", None] * 3,
    "NaN": [1, np.nan, 1, 2, 2, 2],
    "not a date": np.array(["NaT"] * 6, "datetime64[D]"),
    "several types": np.array(["a", 1, "b", 2, "b", 1], object),
    "two dimensions": np.arange(6).reshape(2, 3),
    "masked": np.ma.array([1] * 6, mask=MASK),
    "too few": [1, 2],
}
LABELS = ("group", "strata", "fold", "patient")


def call(name, **arguments):
    function = survival
    for part in name.split("."):
        function = getattr(function, part)
    return function(**arguments)


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_what_cannot_be_meant_is_refused(name):
    good = FUNCTIONS[name]
    call(name, **good)
    for column in good:
        if column == "censoring":
            with pytest.raises(TypeError, match="CensoringDistribution.fit"):
                call(name, **{**good, column: (TIME, EVENT)})
            continue
        bad = BAD_FLAGS if column == "event" else BAD_LABELS if column in LABELS else BAD_NUMBERS
        for what, value in bad.items():
            if column == "patient" and what == "too few":
                continue  # the fold has too many
            with pytest.raises(ValueError):
                print(column, what, call(name, **{**good, column: value}))
        if len(good) > 1 and column not in ("at", "times", *LABELS, "event"):
            if (name, column) != ("number_at_risk", "time"):
                for wrong in (good[column][:3], []):
                    with pytest.raises(ValueError):
                        print(column, wrong, call(name, **{**good, column: wrong}))


def test_columns_may_lie_as_they_like():
    """Strides, byte orders, types: the same numbers."""
    expected = survival.hazard_ratio(TIME, EVENT, RISK)
    assert expected != survival.hazard_ratio(TIME[::-1], EVENT, RISK)
    for column in (
        np.repeat(TIME, 2)[::2],
        np.array(TIME[::-1])[::-1],
        np.array(TIME, np.float32),
        np.array(TIME, ">f8"),
        np.array(TIME, np.int16),
        np.array(TIME, object),
        tuple(TIME),
    ):
        assert survival.hazard_ratio(column, EVENT, RISK) == expected
    assert survival.hazard_ratio(TIME, np.array(EVENT, float), RISK) == expected
    assert survival.hazard_ratio(TIME, np.array(EVENT, ">i4"), RISK) == expected
    # a time is only compared, so that a cohort may begin anywhere: an origin moves no rank
    assert survival.hazard_ratio(np.array(TIME) - 100, EVENT, RISK) == expected


def test_other_arguments_are_checked():
    with pytest.raises(ValueError, match="ties = 'exact'"):
        survival.baseline_hazard([1, 2], [1, 0], [1, 2], ties="exact")
    with pytest.raises(ValueError, match="limits = 'linear'"):
        survival.kaplan_meier(TIME, EVENT, limits="linear")
    for level in (0.0, 1.0, -1, np.nan):
        for function in (survival.kaplan_meier, lambda t, e, level: survival.hazard_ratio(t, e, RISK, level)):
            with pytest.raises(ValueError, match="confidence level"):
                function(TIME, EVENT, level=level)
    for wrong in (-1, 10**30):
        with pytest.raises(ValueError, match="ddof"):
            survival.fold_mean(RISK, ddof=wrong)
        with pytest.raises(ValueError, match="permutations"):
            survival.concordance_permutation_test(TIME, EVENT, RISK, permutations=wrong)
        with pytest.raises(ValueError, match="seed"):
            survival.concordance_permutation_test(TIME, EVENT, RISK, seed=wrong)
    for p in (0, 1, np.nan):
        with pytest.raises(ValueError, match="survival quantile"):
            survival.kaplan_meier(TIME, EVENT).quantile(p)
    with pytest.raises(ValueError, match="`tau` is NaN"):
        survival.concordance_index_ipcw(CENSORING, TIME, EVENT, RISK, tau=np.nan)
    with pytest.raises(ValueError, match=r"`survival` has shape \(2, 6\), expected \(6, 2\)"):
        survival.brier_score(CENSORING, TIME, EVENT, np.full((2, 6), 0.5), [2.5, 4.5])


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        crossfusion.read_bag("nowhere.pt")
    with pytest.raises(FileNotFoundError, match="slide a has no features at x5"):
        crossfusion.read_cohort("nowhere", ["a"])
    with pytest.raises(OSError):
        crossfusion.read_bag(tmp_path)
    for data in (b"", b"PK\x03\x04 and no more"):
        (tmp_path / "bad.pt").write_bytes(data)
        with pytest.raises(OSError, match="bad.pt"):
            crossfusion.read_bag(tmp_path / "bad.pt")
    for wrong in (None, 7):
        with pytest.raises(TypeError):
            crossfusion.read_bag(wrong)
    for wrong in ({"slides": "abc"}, {"slides": ["a"], "scales": "x5"}):
        with pytest.raises(TypeError, match="expected a list of names"):
            crossfusion.read_cohort(tmp_path, **wrong)


def _in_a_worker(path):
    time, event, risk = cohort(40000)
    loglik, _ = survival.cox_loglik_and_gradient(time, event, risk / 10)
    return loglik, float(crossfusion.read_bag(path).sum())


def test_a_fork_after_use(tmp_path):
    """DataLoader's workers read bags in forked processes: threads of before are not there."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "slide.pt"
    torch.save(torch.ones(4000, 1000), path)
    expected = _in_a_worker(path)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(_in_a_worker, [path] * 4).get(timeout=60) == [expected] * 4


def test_a_bag_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    bag = torch.randn(7, 12)
    for scale in ("x5", "x10", "x20"):
        (tmp_path / scale / "pt_files").mkdir(parents=True)
        torch.save(bag, tmp_path / scale / "pt_files" / "slide.pt")
    features, coordinates = crossfusion.read_bag(tmp_path / "x5/pt_files/slide.pt", coordinates=True)
    np.testing.assert_array_equal(features, bag.numpy())
    assert coordinates is None
    assert crossfusion.read_cohort(tmp_path, ["slide"])["slide"]["x20"].shape == (7, 12)
    with pytest.raises(ValueError, match="there is no scale x40"):
        crossfusion.read_cohort(tmp_path, ["slide"], ["x40"])


def test_a_cohort_is_read_from_the_folders_of_other_tools(tmp_path):
    torch = pytest.importorskip("torch")
    bag = torch.randn(3, 8)
    trident = tmp_path / "20x_256px_0px_overlap/features_uni"
    stamp = tmp_path / "x10/uni-0123456789"
    published = tmp_path / "uni/x5/pt_files"
    for folder in (trident, stamp, published):
        folder.mkdir(parents=True)
        torch.save(bag, folder / "slide.pt")
    cohort = crossfusion.read_cohort(tmp_path, ["slide.svs"], backbone="uni")
    for scale in ("x5", "x10", "x20"):
        np.testing.assert_array_equal(cohort["slide.svs"][scale], bag.numpy())
    with pytest.raises(FileNotFoundError, match="slide other has no features of uni at x5"):
        crossfusion.read_cohort(tmp_path, ["other"], backbone="uni")
    (tmp_path / "x20/uni").mkdir(parents=True)
    with pytest.raises(OSError, match="has features of `uni` at x20 in both"):
        crossfusion.read_cohort(tmp_path, ["slide"], backbone="uni")


def test_a_plan():
    free = crossfusion.plan([15625, 20000, 250000], features=1024)
    tight = crossfusion.plan([15625, 20000, 250000], features=1024, budget=3 << 30)
    assert tight.peak_bytes <= 3 << 30 < free.peak_bytes and tight.flop >= free.flop
    half = crossfusion.plan([800, 3000, 12000], features=2048, precision="bf16")
    assert half.arena_bytes < 0.6 * crossfusion.plan([800, 3000, 12000], features=2048).arena_bytes
    with pytest.raises(ValueError, match="there is no model"):
        crossfusion.plan([1, 1, 1], features=8, model="amil")
    with pytest.raises(ValueError):
        crossfusion.plan([800, 3000, 12000], features=2048, budget=1)
    assert crossfusion.plan(100, features=8) == crossfusion.plan(np.array([100, 100, 100]), features=8)
    for wrong in ([1, 2], [-1, 2, 3], [0, 1, 1], [1.5, 2, 3], "abc", [2**62] * 3, [10**30] * 3, [[1, 2, 3]]):
        with pytest.raises(ValueError, match="patches"):
            crossfusion.plan(wrong, features=64)
    for name in ("features", "dim", "heads", "layers", "budget"):
        for wrong in (-1, 0, 10**30):
            with pytest.raises(ValueError, match=name):
                crossfusion.plan([1, 1, 1], **{"features": 64, name: wrong})
    for name in ("features", "dim", "layers"):
        with pytest.raises(ValueError, match=f"{name} = 1099511627776: expected at most"):
            crossfusion.plan([1, 1, 1], **{"features": 64, name: 2**40})
    for patches, dim, heads, layers in ((2**26, 2**14, 128, 16), (2**25, 2**13, 64, 64)):
        largest = crossfusion.plan([patches] * 3, 2**16, dim=dim, heads=heads, layers=layers)
        assert largest.peak_bytes > 2**45
    for patches, dim, heads, layers in ((2**26, 2**14, 128, 17), (2**25 + 1, 2**13, 64, 64)):
        with pytest.raises(ValueError, match="no memory holds that"):
            crossfusion.plan([patches] * 3, 2**16, dim=dim, heads=heads, layers=layers)
    with pytest.raises(ValueError, match="do not fit into a memory budget"):
        crossfusion.plan([2**26] * 3, 2**16, budget=2**33)
    with pytest.raises(ValueError, match="expected cpu or cuda"):
        crossfusion.plan([1, 1, 1], features=64, device="tpu")


def test_useful_without_torch():
    code = "import sys; sys.modules['torch'] = None; import crossfusion; print(crossfusion.survival.fold_mean([1, 2]).mean)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1.5\n"
    without = "import sys; sys.modules['torch'] = None; "
    for code, error in (
        ("import crossfusion; assert not hasattr(crossfusion, 'ops'); crossfusion.ops", "AttributeError"),
        ("from crossfusion import *; from crossfusion import models", "ModuleNotFoundError"),
    ):
        said = subprocess.run([sys.executable, "-c", without + code], capture_output=True, text=True).stderr
        expected = f"{error}: crossfusion.ops and crossfusion.models need PyTorch, which is not installed\n"
        assert said.endswith(expected), said
