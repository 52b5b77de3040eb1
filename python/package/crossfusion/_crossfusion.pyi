# The compiled module, as python/src has it: everything here is called by the modules beside it alone.

import pathlib
from typing import Any, Callable, Optional, Sequence, final

import numpy as np
import numpy.typing as npt

__version__: str

_Numbers = npt.NDArray[np.float64]
_Flags = npt.NDArray[np.bool_]
_Places = npt.NDArray[np.uintp]
_Counts = npt.NDArray[np.intp]
_Interval = tuple[float, float, float, float, float, int]

# A GPU and its stream, or -1 and a number of threads.
_Place = tuple[int, int]
# Address, rows, columns, elements from row to row, type.
_Matrix = tuple[int, int, int, int, int]
# Seed, step, site, rate.
_Draws = tuple[int, int, float, int]

def cores() -> int: ...

# ops.rs
def attention_forward(place: _Place, groups: Sequence[Sequence[_Matrix]], heads: int, drop: _Draws) -> None: ...
def attention_backward(place: _Place, groups: Sequence[Sequence[_Matrix]], heads: int, drop: _Draws) -> None: ...
def layer_norm_forward(place: _Place, m: Sequence[_Matrix]) -> None: ...
def layer_norm_backward(place: _Place, m: Sequence[_Matrix]) -> None: ...
def linear_forward(place: _Place, m: Sequence[_Matrix], residual: Optional[_Matrix]) -> None: ...
def linear_backward(
    place: _Place, m: Sequence[_Matrix], dx: Optional[_Matrix], grads: Sequence[_Matrix]
) -> None: ...
def feed_forward_forward(place: _Place, m: Sequence[_Matrix], drop: _Draws) -> None: ...
def feed_forward_backward(
    place: _Place,
    m: Sequence[_Matrix],
    scratch: Sequence[_Matrix],
    dx: _Matrix,
    grads: Sequence[_Matrix],
    drop: _Draws,
) -> None: ...
def ppeg_forward(place: _Place, m: Sequence[_Matrix], side: int) -> None: ...
def ppeg_backward(place: _Place, m: Sequence[_Matrix], side: int) -> None: ...
def conv_fusion_forward(
    place: _Place,
    streams: Sequence[_Matrix],
    mix: Optional[Sequence[_Matrix]],
    kernels: Sequence[_Matrix],
    biases: Sequence[_Matrix],
    out: _Matrix,
    side: Optional[int],
    drop: _Draws,
) -> None: ...
def conv_fusion_backward(
    place: _Place,
    streams: Sequence[_Matrix],
    mix: Optional[Sequence[_Matrix]],
    kernels: Sequence[_Matrix],
    biases: Sequence[_Matrix],
    out: _Matrix,
    side: Optional[int],
    drop: _Draws,
    dout: _Matrix,
    dstreams: Sequence[_Matrix],
    dmix: Optional[Sequence[_Matrix]],
    dkernels: Sequence[_Matrix],
    dbiases: Sequence[_Matrix],
) -> None: ...
def head_loss(
    place: _Place,
    m: Sequence[_Matrix],
    scratch: Sequence[_Matrix],
    grads: Sequence[_Matrix],
    result: _Matrix,
    cross_entropy: bool,
    label: int,
    censored: bool,
    alpha: float,
) -> None: ...

# survival.rs
def concordance_index(time: _Numbers, event: _Flags, risk: _Numbers) -> tuple[float, int, int, int, int]: ...
def concordance_index_ipcw(
    train_time: _Numbers,
    train_event: _Flags,
    time: _Numbers,
    event: _Flags,
    risk: _Numbers,
    tau: Optional[float],
) -> float: ...
def dynamic_auc(
    train_time: _Numbers, train_event: _Flags, time: _Numbers, event: _Flags, risk: _Numbers, times: _Numbers
) -> tuple[_Numbers, float]: ...
def brier_score(
    train_time: _Numbers,
    train_event: _Flags,
    time: _Numbers,
    event: _Flags,
    predicted: _Numbers,
    times: _Numbers,
) -> tuple[_Numbers, Optional[float]]: ...
def kaplan_meier(
    time: _Numbers, event: _Flags, log_log: bool, level: float
) -> tuple[_Numbers, _Counts, _Counts, _Counts, _Numbers, _Numbers, _Numbers]: ...
def kaplan_meier_quantile(
    time: _Numbers, survival: _Numbers, lower: _Numbers, upper: _Numbers, p: float
) -> tuple[Optional[float], Optional[float], Optional[float]]: ...
def uncensored_at(time: _Numbers, event: _Flags, at: _Numbers) -> _Numbers: ...
def log_rank(
    time: _Numbers, event: _Flags, group: _Places, strata: Optional[_Places]
) -> tuple[float, int, float, _Counts, _Counts, _Numbers]: ...
def hazard_ratio(
    time: _Numbers, event: _Flags, covariate: _Numbers, level: float
) -> tuple[float, float, float, float, float, float]: ...
def nelson_aalen(time: _Numbers, event: _Flags) -> tuple[_Numbers, _Numbers, _Numbers]: ...
def baseline_hazard(time: _Numbers, event: _Flags, risk: _Numbers, efron: bool) -> tuple[_Numbers, _Numbers]: ...
def fold_mean(
    values: _Numbers, ddof: int, level: float, in_unit: bool
) -> tuple[float, float, int, float, float, float]: ...
def number_at_risk(time: _Numbers, at: _Numbers) -> _Counts: ...
def risk_sets(time: _Numbers, event: _Flags) -> list[tuple[float, int, int, int]]: ...
def concordance_permutation_test(
    time: _Numbers, event: _Flags, risk: _Numbers, fold: Optional[_Places], permutations: int, seed: int
) -> tuple[float, float]: ...
def bootstrap(
    patient: _Places,
    fold: Optional[_Places],
    replicates: int,
    seed: int,
    level: float,
    statistic: Callable[[npt.NDArray[np.intp]], float],
) -> _Interval: ...
def bootstrap_difference(
    patient: _Places,
    fold: Optional[_Places],
    replicates: int,
    seed: int,
    level: float,
    a: Callable[[npt.NDArray[np.intp]], float],
    b: Callable[[npt.NDArray[np.intp]], float],
) -> tuple[float, float, _Interval, float]: ...
@final
class CoxCohort:
    def __new__(
        cls, time: _Numbers, event: _Flags, strata: Optional[_Places], weights: Optional[_Numbers]
    ) -> CoxCohort: ...
    def events(self) -> int: ...
    def loglik_and_gradient(self, risk: _Numbers, efron: bool) -> tuple[float, _Numbers]: ...

# data.rs
def read_bag(path: str) -> tuple[npt.NDArray[np.float32], Optional[npt.NDArray[np.int64]]]: ...
def read_model(
    path: str, heads: Optional[int]
) -> tuple[str, list[tuple[str, float]], list[tuple[str, list[int], npt.NDArray[np.float32]]]]: ...
def feature_file(folder: str, backbone: str, scale: str, slide: str) -> Optional[pathlib.Path]: ...
def plan(
    model: str,
    features: int,
    dim: int,
    heads: int,
    layers: int,
    patches: Sequence[int],
    on_gpu: bool,
    bf16_stored: bool,
    budget: Optional[int],
) -> tuple[int, int, float, float, int, str]: ...
