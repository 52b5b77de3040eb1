"""CrossFusion's kernels, models and statistics.

- :mod:`crossfusion.ops`: fused attention with dropout, conv fusion, PPEG, LayerNorm, the survival
  losses and the Cox partial likelihood, as PyTorch operators with gradients;
- :mod:`crossfusion.models`: ``CrossFusion`` and its ablations as ``nn.Module``, with the published
  names of parameters;
- :mod:`crossfusion.survival`: C-index, Kaplan-Meier, log-rank and more, on numpy arrays;
- :func:`read_bag`: feature files; :func:`plan`: what a training step takes.

``ops`` and ``models`` need PyTorch, the rest does not.
"""

import typing

from . import survival
from ._crossfusion import __version__
from .data import Plan, plan, read_bag, read_cohort

if typing.TYPE_CHECKING:
    from . import models as models, ops as ops

# without ops and models: what needs PyTorch is asked for by name
__all__ = ["Plan", "__version__", "plan", "read_bag", "read_cohort", "survival"]


def __getattr__(name: str) -> typing.Any:
    # PyTorch takes a second to import: only when it is asked for
    if name in ("ops", "models"):
        import importlib

        try:
            return importlib.import_module(f".{name}", __name__)
        except ModuleNotFoundError as e:
            if e.name != "torch":
                raise
            raise AttributeError(str(e)) from None
    raise AttributeError(f"module 'crossfusion' has no attribute {name!r}")
