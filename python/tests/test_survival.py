"""The statistics: the numbers of R and scikit-survival that the Rust tests hold, errors, and files."""

import pathlib
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
    assert (curve.lower[1:5] <= curve.survival[1:5]).all() and len(curve.median) == 3


def test_every_statistic_answers():
    time, event, risk = cohort()
    group = np.where(risk > np.median(risk), "high", "low")
    times = np.quantile(time[event], [0.2, 0.5, 0.7])
    assert survival.log_rank(time, event, group).degrees_of_freedom == 1
    h = survival.hazard_ratio(time, event, (group == "high").astype(float))
    assert h.lower < h.ratio < h.upper
    assert 0 < survival.concordance_index_ipcw(time, event, time, event, risk, tau=times[-1]) < 1
    assert len(survival.dynamic_auc(time, event, time, event, risk, times).auc) == 3
    predicted = np.full((len(time), 3), 0.5)
    assert survival.brier_score(time, event, time, event, predicted, times).integrated > 0
    hazard, std_error = survival.nelson_aalen(time, event)
    assert len(hazard.time) == len(std_error)
    assert (np.diff(survival.baseline_hazard(time, event, risk / 10).hazard) >= 0).all()
    assert survival.fold_mean([0.6, 0.7, 0.65]).lower < 0.65 < survival.fold_mean_in_unit([0.6, 0.7, 0.65]).upper
    assert survival.number_at_risk(time, [0.0, 1e9]) == [len(time), 0]
    assert sum(row.events for row in survival.risk_sets(time, event)) == event.sum()
    test = survival.concordance_permutation_test(time, event, risk, permutations=200)
    assert 0 < test.p_value < 0.05
    loglik, gradient = survival.cox_loglik_and_gradient(time, event, risk / 10)
    assert loglik < 0 and abs(gradient.sum()) < 1e-9
    moved = (risk / 10).copy()
    moved[7] += 1e-6
    slope = (survival.cox_loglik_and_gradient(time, event, moved)[0] - loglik) / 1e-6
    assert abs(slope - gradient[7]) < 1e-5


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="entry 1 of `time`"):
        survival.concordance_index([1, np.nan], [1, 0], [1, 2])
    with pytest.raises(ValueError, match="True or False"):
        survival.concordance_index([1, 2], [2, 0], [1, 2])
    with pytest.raises(ValueError, match="ties = 'exact'"):
        survival.baseline_hazard([1, 2], [1, 0], [1, 2], ties="exact")
    with pytest.raises(OSError, match="nowhere.pt"):
        crossfusion.read_bag("nowhere.pt")
    with pytest.raises(FileNotFoundError, match="slide a has no features at x5"):
        crossfusion.read_cohort("nowhere", ["a"])


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


def test_useful_without_torch():
    code = "import sys; sys.modules['torch'] = None; import crossfusion; print(crossfusion.survival.fold_mean([1, 2]).mean)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1.5\n"
