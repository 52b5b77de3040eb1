"""What a user writes, with types: test_types.py checks it with ``mypy --strict``; nothing runs it."""

from typing import Optional

import numpy as np
import numpy.typing as npt
import torch

import crossfusion
from crossfusion import models, ops, survival


def train(bags: tuple[torch.Tensor, torch.Tensor, torch.Tensor], label: int, censored: bool) -> float:
    model = models.CrossFusion(features=1024)
    logits: torch.Tensor = model(*bags)
    loss: torch.Tensor = ops.nll_surv(logits, label, censored, alpha=0.2)
    loss.backward()  # type: ignore[no-untyped-call]  # PyTorch's own
    q = torch.randn(300, 512)
    out: torch.Tensor = ops.attention(q, q, q, heads=4, dropout=0.2, draw=ops.draw())
    one_row: tuple[torch.Tensor, torch.Tensor] = ops.head_loss(
        out[:1], torch.ones(512), torch.zeros(512), torch.randn(4, 512), torch.zeros(4), label, censored, loss="ce"
    )
    hazards, curve, risk = models.survival(logits)
    return float((one_row[0] + hazards.sum() + curve.sum() + risk.sum()).item())


def read(path: str) -> npt.NDArray[np.float32]:
    features, places = crossfusion.read_bag(path, coordinates=True)
    known: Optional[npt.NDArray[np.int64]] = places
    assert known is None or len(known) == len(features)
    same: npt.NDArray[np.float32] = crossfusion.read_bag(path)
    needed: crossfusion.Plan = crossfusion.plan([len(same), 100, 400], features=same.shape[1])
    print(needed.peak_bytes)
    return same


def statistics(time: npt.NDArray[np.float64], event: npt.NDArray[np.bool_], risk: list[float]) -> float:
    risks = np.array(risk)

    def index(rows: npt.NDArray[np.intp]) -> float:
        return survival.concordance_index(time[rows], event[rows], risks[rows]).index

    interval = survival.bootstrap(survival.Patients.one_row_each(len(time)), index, seed=1)
    censoring = survival.CensoringDistribution.fit(time, event)
    uno: float = survival.concordance_index_ipcw(censoring, time, event, risk, tau=5.0)
    median: Optional[float] = survival.kaplan_meier(time, event, limits="log-log").median().estimate
    at: npt.NDArray[np.float64] = survival.kaplan_meier(time, event).survival_at([1.0, 2.0])
    return interval.estimate + uno + (median or 0.0) + float(at.sum())
