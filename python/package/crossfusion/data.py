"""Feature files, cohorts, and what a training step takes."""

import operator
import os
import typing

import numpy as np
import numpy.typing as npt

from . import _crossfusion

SCALES = ("x5", "x10", "x20")

Features = npt.NDArray[np.float32]
Coordinates = typing.Optional[npt.NDArray[np.int64]]
Path = typing.Union[str, "os.PathLike[str]"]


class Plan(typing.NamedTuple):
    """What a training step on one slide takes: what :func:`plan` finds."""

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


@typing.overload
def read_bag(path: Path, coordinates: typing.Literal[False] = False) -> Features: ...
@typing.overload
def read_bag(path: Path, coordinates: typing.Literal[True]) -> tuple[Features, Coordinates]: ...
@typing.overload
def read_bag(path: Path, coordinates: bool) -> typing.Union[Features, tuple[Features, Coordinates]]: ...
def read_bag(path: Path, coordinates: bool = False) -> typing.Union[Features, tuple[Features, Coordinates]]:
    """The features of a slide at one scale, ``[patches, features]`` in float32.

    ``.pt`` (nothing in it is executed), ``.safetensors``, and CLAM's, TRIDENT's and STAMP's ``.h5``.
    With ``coordinates``, a pair of the features and the patches' places ``[patches, 2]``, or None
    where the file has none. An OSError names the file and what is wrong with it.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such file")
    features, places = _crossfusion.read_bag(path)
    return (features, places) if coordinates else features


def read_cohort(
    folder: Path,
    slides: typing.Iterable[str],
    scales: typing.Sequence[str] = SCALES,
    backbone: typing.Optional[str] = None,
) -> dict[str, dict[str, Features]]:
    """Bags of several slides: a dict of slide to a dict of scale to ``[patches, features]``.

    ``folder`` holds ``x5/pt_files/SLIDE.pt`` and so on, or ``h5_files/SLIDE.h5``. With a ``backbone`` it is
    what ``cf-train --pt-dir`` takes: the published folders, TRIDENT's or STAMP's. ``slides`` are names of slides,
    with or without the extension of a slide's file. A FileNotFoundError names the slide that has no file.
    """
    for name, value in (("slides", slides), ("scales", scales)):
        if isinstance(value, str):  # its letters would be taken one by one
            raise TypeError(f"`{name}` is the text {value!r}, expected a list of names")
    scales = list(scales)
    return {slide: {scale: read_bag(_find(folder, backbone, scale, slide)) for scale in scales} for slide in slides}


def _find(folder: Path, backbone: typing.Optional[str], scale: str, slide: str) -> str:
    folder = os.fspath(folder)
    path = _crossfusion.feature_file(folder, backbone or "", scale, slide)
    if path is None:
        of = f" of {backbone}" if backbone else ""
        raise FileNotFoundError(f"{folder}: slide {slide} has no features{of} at {scale}")
    return os.fspath(path)


def _size(name: str, value: int) -> int:
    """A number of something that fits a machine word; the library knows what is too much."""
    value = operator.index(value)
    if not 1 <= value < 2**63:
        raise ValueError(f"{name} = {value}: expected a positive number below 2^63")
    return value


def plan(
    patches: typing.Union[int, typing.Sequence[int], npt.NDArray[np.integer[typing.Any]]],
    features: int,
    model: str = "crossfusion",
    dim: int = 512,
    heads: int = 4,
    layers: int = 1,
    device: typing.Literal["cpu", "cuda"] = "cpu",
    precision: typing.Literal["f32", "bf16"] = "f32",
    budget: typing.Optional[int] = None,
) -> Plan:
    """What a training step takes on a slide of so many patches at 5x, 10x and 20x; nothing is run.

    ``patches`` are three numbers, or one for all scales. ``budget`` (bytes) bounds the step's peak: what
    does not fit is computed again. ValueError where nothing fits it.
    """
    if device not in ("cpu", "cuda") or precision not in ("f32", "bf16"):
        raise ValueError(f"device = {device!r}, precision = {precision!r}: expected cpu or cuda, f32 or bf16")
    given = np.asarray(patches)
    if given.shape not in ((), (1,), (3,)) or given.dtype.kind not in "iu":
        raise ValueError(f"patches = {patches!r}: expected three whole numbers, or one for all scales")
    found = _crossfusion.plan(
        model,
        _size("features", features),
        _size("dim", dim),
        _size("heads", heads),
        _size("layers", layers),
        [_size("patches", n) for n in np.broadcast_to(given, 3).tolist()],
        device == "cuda",
        precision == "bf16",
        None if budget is None else _size("budget", budget),
    )
    return Plan(*found)
