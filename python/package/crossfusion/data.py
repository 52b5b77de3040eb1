"""Feature files, cohorts, and what a training step takes."""

import os
import typing

import numpy as np

from . import _crossfusion

SCALES = ("x5", "x10", "x20")


class Plan(typing.NamedTuple):
    """What a training step on one slide takes: see :func:`plan`."""

    peak_bytes: int
    """At the step's peak, parameters, gradients and Adam's moments included."""
    arena_bytes: int
    """Of the step's activations and scratch alone."""
    flop: float
    """Operations, a multiply-add being two."""
    forward_flop: float
    """Operations of the forward pass."""
    launches: int
    """Kernels, on a GPU."""
    policy: str
    """What is kept and what is computed again."""


def read_bag(path, coordinates=False):
    """The features of a slide at one scale, ``[patches, features]`` in float32.

    ``.pt`` (nothing in it is executed), ``.safetensors``, and CLAM's, TRIDENT's and STAMP's ``.h5``.
    With ``coordinates``, a pair of the features and the patches' places ``[patches, 2]``, or None
    where the file has none. An OSError names the file and what is wrong with it.
    """
    features, places = _crossfusion.read_bag(os.fspath(path))
    return (features, places) if coordinates else features


def read_cohort(folder, slides, scales=SCALES):
    """Bags of several slides: a dict of slide to a dict of scale to ``[patches, features]``.

    ``folder`` holds ``x5/pt_files/SLIDE.pt`` and so on, or ``h5_files/SLIDE.h5``.
    """
    return {slide: {scale: read_bag(_find(folder, scale, slide)) for scale in scales} for slide in slides}


def _find(folder, scale, slide):
    tried = [
        os.path.join(os.fspath(folder), scale, kind, f"{slide}.{extension}")
        for kind, extension in (("pt_files", "pt"), ("pt_files", "safetensors"), ("h5_files", "h5"))
    ]
    for path in tried:
        if os.path.exists(path):
            return path
    raise FileNotFoundError(f"slide {slide} has no features at {scale}: none of {', '.join(tried)}")


def plan(
    patches,
    features,
    model="crossfusion",
    dim=512,
    heads=4,
    layers=1,
    device="cpu",
    precision="f32",
    budget=None,
):
    """What a training step takes on a slide of so many patches at 5x, 10x and 20x; nothing is run.

    ``budget`` (bytes) bounds the step's peak: what does not fit is computed again. ValueError where
    nothing fits it.
    """
    if device not in ("cpu", "cuda") or precision not in ("f32", "bf16"):
        raise ValueError(f"device = {device!r}, precision = {precision!r}: expected cpu or cuda, f32 or bf16")
    patches = [int(n) for n in np.broadcast_to(patches, 3)]
    found = _crossfusion.plan(
        model, features, dim, heads, layers, patches, device == "cuda", precision == "bf16", budget
    )
    return Plan(*found)
