"""CrossFusion's kernels as PyTorch operators, with gradients.

On the CPU and on CUDA (on the current stream, without waiting for it), in float32, bfloat16 and, on
the CPU, float64. Inputs are taken where they lie; what is not contiguous in its last dimension is
copied first. Gradients of parameters are summed in float32 (float64) and rounded to the parameter's
type. Each operator is a ``torch.library`` custom operator: it can be compiled whole
(``torch.compile(fullgraph=True)``), and autograd knows it.

Dropout draws by counter: from a tensor ``draw`` of two int64, a seed and a step, which :func:`draw`
makes from PyTorch's generator. Forward and backward draw the same; a different step draws another
mask. On CUDA it may lie on the GPU, and is read there when the operator runs: so a captured CUDA
graph draws anew if it is written to between two launches; from the CPU, the capture's mask repeats.
"""

import math
import operator
import typing

try:
    import torch
except ModuleNotFoundError:
    message = "crossfusion.ops and crossfusion.models need PyTorch, which is not installed"
    raise ModuleNotFoundError(message, name="torch") from None
from torch.autograd import forward_ad

from . import _crossfusion

__all__ = [
    "attention",
    "ce_surv",
    "conv_fusion",
    "cox",
    "draw",
    "feed_forward",
    "head_loss",
    "layer_norm",
    "linear",
    "nll_surv",
    "ppeg",
]

Tensor = torch.Tensor
# as the library takes them: see _matrix and _drop
_Matrix = tuple[int, int, int, int, int]
_Draws = tuple[int, int, float, int]
# of an operator's arguments: None of what is no tensor
_Grads = tuple[typing.Any, ...]

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


# PyTorch's number of threads knows nothing of a container's quota.
_CORES = _crossfusion.cores()


def draw() -> Tensor:
    """Seed and step of one dropout, from PyTorch's default generator of the CPU."""
    return torch.randint(0, 2**31 - 1, (2,), dtype=torch.int64)


def _draw(draw: typing.Optional[Tensor], rate: float, x: Tensor) -> Tensor:
    """The given draw, or a fresh one where one is needed, of an operator on x."""
    if draw is None:
        return _fresh() if rate else torch.zeros(2, dtype=torch.int64)
    _tensors("dropout", draw=draw)
    if draw.dtype != torch.int64 or draw.shape != (2,) or draw.device not in (torch.device("cpu"), x.device):
        raise ValueError(
            f"dropout: draw is {list(draw.shape)} of {draw.dtype} on {draw.device}, expected two int64 on the CPU"
            f"{f' or {x.device}' if x.is_cuda else ''}"
        )
    return draw.contiguous()


_fresh = draw  # where an argument is called draw


def _place(x: Tensor) -> tuple[int, int]:
    """Where an operator runs: the GPU and its current stream, or the CPU and PyTorch's threads."""
    if x.device.type == "cuda":
        with torch.cuda.device(x.device):
            return x.device.index or 0, int(torch.cuda.current_stream(x.device).cuda_stream)
    if x.device.type != "cpu":
        raise ValueError(f"crossfusion runs on cpu and cuda, not on {x.device}")
    return -1, min(torch.get_num_threads(), _CORES)


def _rows(x: Tensor) -> Tensor:
    """A tensor whose rows have no gaps and do not overlap: itself, or a copy."""
    x = x.detach()
    if x.dim() == 0 or x.numel() == 0:
        return x.contiguous()
    inner, first = 1, 1 if x.dim() > 1 else 0
    for size, stride in zip(reversed(x.shape[first:]), reversed(x.stride()[first:])):
        if size > 1 and stride != inner:
            return x.contiguous()
        inner *= size
    if x.dim() > 1 and x.shape[0] > 1 and x.stride(0) < inner:
        return x.contiguous()
    piece = 16 // x.element_size()
    if x.device.type == "cuda" and (x.data_ptr() % 16 or (x.dim() > 1 and x.stride(0) % piece)):
        return x.contiguous()
    return x


def _matrix(x: Tensor) -> _Matrix:
    """Address, rows, columns, elements from row to row, type: as the library takes it."""
    if x.dtype not in _TYPES:
        raise ValueError(f"crossfusion takes float32, bfloat16 and (on the CPU) float64, not {x.dtype}")
    if x.dim() <= 1:
        return x.data_ptr(), 1, x.numel(), x.numel(), _TYPES[x.dtype]
    cols = math.prod(x.shape[1:])
    stride = x.stride(0) if x.shape[0] > 1 else cols
    return x.data_ptr(), x.shape[0], cols, max(stride, cols), _TYPES[x.dtype]


class _Held:
    """Tensors as the library takes them, each kept alive as long as this is: a call must hold what it
    gives by address, copies included."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __call__(self, x: Tensor) -> _Matrix:
        x = _rows(x)
        self.tensors.append(x)
        return _matrix(x)

    def all(self, tensors: typing.Iterable[Tensor]) -> tuple[_Matrix, ...]:
        return tuple(map(self, tensors))


def _sums(x: Tensor) -> torch.dtype:
    """The type that sums are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _gradient(x: Tensor, *shape: int) -> Tensor:
    """Where a parameter's gradient is summed: zeros on a GPU; on the CPU the library zeroes it."""
    make = torch.zeros if x.device.type == "cuda" else torch.empty
    return make(shape, dtype=_sums(x), device=x.device)


def _tensors(name: str, **tensors: object) -> None:
    """All dense tensors on one device, or an error that names the one that is not.

    Here and not in the operator: one operand on the meta device, and PyTorch would call what is
    registered for shapes alone, whose result is memory that nobody has written.
    """
    device = None
    for which, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: {which} is of type {type(tensor).__name__}, expected a tensor")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name}: {which} is {tensor.layout}, expected a dense tensor")
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(f"{name}: {which} is on {tensor.device}, expected {device}")
        # PyTorch would take what has no rule for zero
        dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
        if dual and dual.tangent is not None:
            raise NotImplementedError(f"{name}: {which} has a tangent, and this operator no forward-mode derivative")


def _same(name: str, first: Tensor, **others: Tensor) -> None:
    """All of one type, or a ValueError that names the one that is not."""
    for other, tensor in others.items():
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"{name}: {other} is {tensor.dtype} on {tensor.device}, expected {first.dtype} on {first.device}"
            )


def _dims(name: str, which: str, tensor: Tensor, *dims: int) -> None:
    """So many dimensions: the library sees all but the first together, and would take others for them."""
    if tensor.dim() not in dims:
        expected = " or ".join(map(str, dims))
        raise ValueError(f"{name}: {which} has shape {list(tensor.shape)}, expected {expected} dimensions")


def _shape(name: str, which: str, tensor: Tensor, *shape: int) -> None:
    """Of this shape, or a ValueError."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: {which} has shape {list(tensor.shape)}, expected {list(shape)}")


def _whole(name: str, which: str, value: int, least: int = 1) -> int:
    if not isinstance(value, (int, torch.SymInt)):
        value = operator.index(value)  # a TypeError of what is no integer
    if not least <= value < 2**31:
        raise ValueError(f"{name}: {which} is {value}, expected {least} to 2^31")
    return value


def _autocast(first: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, tensors in its type, as PyTorch's own products take them; float64 stays, as there."""
    tensors = (first, *others)
    kind = first.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return tensors
    lower = torch.get_autocast_dtype(kind)
    if lower not in _TYPES:
        raise ValueError(f"autocast's type is {lower}: crossfusion computes in bfloat16, torch.autocast(dtype=torch.bfloat16)")
    return tuple(t.to(lower) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _autocast_norm(first: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """As `_autocast`, but tensors of one type stay as they are: a norm that is given float32 computes
    in it, and one that is given a product's bfloat16 need not go back."""
    tensors = (first, *others)
    return tensors if all(tensor.dtype == first.dtype for tensor in others) else _autocast(*tensors)


def _drop(draw: Tensor, rate: float) -> _Draws:
    """By its numbers; on a GPU by its address, so that a captured graph reads what is there."""
    if draw.is_cuda:
        return 0, 0, float(rate), draw.data_ptr()
    seed, step = (int(n) for n in draw.tolist()) if rate else (0, 0)
    return seed & 0xFFFFFFFFFFFFFFFF, step & 0xFFFFFFFF, float(rate), 0


# ---- attention ---------------------------------------------------------------------------------


@torch.library.custom_op("crossfusion::attention", mutates_args=())
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, rate: float, draw: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    _same("attention", q, k=k, v=v)
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"attention: q, k and v are of {q.shape[0]}, {k.shape[0]} and {v.shape[0]} groups")
    held = _Held()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], heads, q.shape[1]), dtype=_sums(q), device=q.device)
    groups = [held.all(group) for group in zip(q, k, v, out, lse)]
    _crossfusion.attention_forward(_place(q), groups, heads, _drop(draw, rate))
    return out, lse


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, heads: int, rate: float, draw: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], heads, q.shape[1]), dtype=_sums(q))


@torch.library.custom_op("crossfusion::attention_backward", mutates_args=())
def _attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    heads: int,
    rate: float,
    draw: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    held = _Held()
    groups = [held.all(group) for group in zip(q, k, v, out, lse, dout, dq, dk, dv)]
    _crossfusion.attention_backward(_place(q), groups, heads, _drop(draw, rate))
    return dq, dk, dv


@_attention_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    heads: int,
    rate: float,
    draw: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _attention_setup(ctx: typing.Any, inputs: tuple[typing.Any, ...], output: typing.Any) -> None:
    q, k, v, ctx.heads, ctx.rate, draw = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, draw)


def _attention_grad(ctx: typing.Any, dout: Tensor, _: Tensor) -> _Grads:
    q, k, v, out, lse, draw = ctx.saved_tensors
    dq, dk, dv = _attention_backward(q, k, v, out, lse, dout.to(q.dtype), ctx.heads, ctx.rate, draw)
    return dq, dk, dv, None, None, None


_attention.register_autograd(_attention_grad, setup_context=_attention_setup)


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float = 0.0, draw: typing.Optional[Tensor] = None
) -> Tensor:
    """softmax(q kᵀ / sqrt(d / heads)) v of each head, with dropout of the probabilities.

    q ``[n, d]`` or ``[b, n, d]``, k and v ``[m, d]`` or ``[b, m, d]``; the result is shaped as q. Head
    h owns columns ``h * d / heads`` and on; at most 128 columns a head. No ``n x m`` matrix is held,
    with dropout either. Without keys (m = 0) the result is zero. ``draw``: see :func:`draw`; by default
    a fresh one.
    """
    _tensors("attention", q=q, k=k, v=v)
    _dims("attention", "q", q, 2, 3)
    for which, tensor in (("k", k), ("v", v)):
        _dims("attention", which, tensor, q.dim())
    heads = _whole("attention", "heads", heads)
    q, k, v = _autocast(q, k, v)
    single = q.dim() == 2
    if single:
        q, k, v = q[None], k[None], v[None]
    out: Tensor = _attention(q, k, v, heads, float(dropout), _draw(draw, dropout, q))[0]
    return out[0] if single else out


# ---- layer norm --------------------------------------------------------------------------------


@torch.library.custom_op("crossfusion::layer_norm", mutates_args=())
def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _same("layer_norm", x, weight=weight, bias=bias)
    flat = x.detach().reshape(-1, x.shape[-1])
    # not a view: a result that is one may not be changed in place
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stats = torch.empty((flat.shape[0], 2), dtype=_sums(x), device=x.device)
    held = _Held()
    _crossfusion.layer_norm_forward(_place(x), held.all((flat, weight, bias, y.view(flat.shape), stats)))
    return y, stats


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.numel() // x.shape[-1], 2), dtype=_sums(x))


@torch.library.custom_op("crossfusion::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    x: torch.Tensor, stats: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat, dy = (t.detach().reshape(-1, x.shape[-1]) for t in (x, dy))
    dx = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    dweight, dbias = (_gradient(x, x.shape[-1]) for _ in range(2))
    held = _Held()
    _crossfusion.layer_norm_backward(_place(x), held.all((flat, stats, weight, dy, dx, dweight, dbias)))
    return dx.view(x.shape), dweight.to(weight.dtype), dbias.to(weight.dtype)


@_layer_norm_backward.register_fake
def _(x: Tensor, stats: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _layer_norm_setup(ctx: typing.Any, inputs: tuple[typing.Any, ...], output: typing.Any) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight)


def _layer_norm_grad(ctx: typing.Any, dy: Tensor, _: Tensor) -> _Grads:
    x, stats, weight = ctx.saved_tensors
    return tuple(_layer_norm_backward(x, stats, weight, dy.to(x.dtype)))


_layer_norm.register_autograd(_layer_norm_grad, setup_context=_layer_norm_setup)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the last dimension, epsilon 1e-5; x ``[..., d]``, weight and bias ``[d]``.

    The result is shaped as x.
    """
    _tensors("layer_norm", x=x, weight=weight, bias=bias)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"layer_norm: x has shape {list(x.shape)}, expected a column at least")
    _dims("layer_norm", "weight", weight, 1)
    _dims("layer_norm", "bias", bias, 1)
    y: Tensor = _layer_norm(*_autocast_norm(x, weight, bias))[0]
    return y


# ---- linear and feed-forward ---------------------------------------------------------------------


@torch.library.custom_op("crossfusion::linear", mutates_args=())
def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: typing.Optional[torch.Tensor] = None
) -> torch.Tensor:
    _same("linear", x, weight=weight, bias=bias, **({} if residual is None else {"residual": residual}))
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    held = _Held()
    beside = None if residual is None else held(residual)
    _crossfusion.linear_forward(_place(x), held.all((x, weight, bias, y)), beside)
    return y


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, residual: typing.Optional[Tensor] = None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.custom_op("crossfusion::linear_backward", mutates_args=())
def _linear_backward(
    x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, wants_dx: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty(x.shape if wants_dx else (0,), dtype=x.dtype, device=x.device)
    dweight, dbias = _gradient(x, *weight.shape), _gradient(x, weight.shape[0])
    held = _Held()
    given, out = held.all((dy, x, weight)), held(dx) if wants_dx else None
    _crossfusion.linear_backward(_place(x), given, out, held.all((dweight, dbias)))
    return dx, dweight.to(x.dtype), dbias.to(x.dtype)


@_linear_backward.register_fake
def _(x: Tensor, weight: Tensor, dy: Tensor, wants_dx: bool) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if wants_dx else (0,))
    return dx, weight.new_empty(weight.shape), weight.new_empty((weight.shape[0],))


def _linear_setup(ctx: typing.Any, inputs: tuple[typing.Any, ...], output: typing.Any) -> None:
    x, weight, *_ = inputs
    ctx.save_for_backward(x, weight)


def _linear_grad(ctx: typing.Any, dy: Tensor) -> _Grads:
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dx, dweight, dbias = _linear_backward(x, weight, dy.to(x.dtype), wanted[0])
    # a residual that was not given is no input either
    return (dx if wanted[0] else None, dweight, dbias, dy)[: len(wanted)]


_linear.register_autograd(_linear_grad, setup_context=_linear_setup)


def _flat(x: Tensor) -> Tensor:
    """[..., d] as [rows, d]."""
    return x[None] if x.dim() == 1 else x.flatten(0, -2)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: typing.Optional[Tensor] = None,
    residual: typing.Optional[Tensor] = None,
) -> Tensor:
    """x Wᵀ + bias, as ``nn.Linear``, and + residual in the same pass.

    x ``[..., in]``, weight ``[out, in]``, bias ``[out]``; residual and the result ``[..., out]``.
    """
    _tensors("linear", x=x, weight=weight)
    if bias is None:
        bias = weight.new_zeros(weight.shape[:1])
    operands = {"x": x, "weight": weight, "bias": bias} | ({} if residual is None else {"residual": residual})
    _tensors("linear", **operands)
    _dims("linear", "weight", weight, 2)
    _dims("linear", "bias", bias, 1)
    if x.dim() == 0:
        raise ValueError("linear: x has no dimension, expected [..., in]")
    _shape("linear", "weight", weight, weight.shape[0], x.shape[-1])
    _shape("linear", "bias", bias, weight.shape[0])
    shape = (*x.shape[:-1], weight.shape[0])
    if residual is not None:
        _shape("linear", "residual", residual, *shape)
    rows = [t if which in ("weight", "bias") else _flat(t) for which, t in operands.items()]
    given = _autocast(*rows)
    y: Tensor = _linear(*given, *([None] if residual is None else []))
    return y.view(shape) if x.dim() != 2 else y


@torch.library.custom_op("crossfusion::feed_forward", mutates_args=())
def _feed_forward(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    rate: float,
    draw: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    _same("feed_forward", x, w1=w1, b1=b1, w2=w2, b2=b2)
    hidden, z = (torch.empty((x.shape[0], w1.shape[0]), dtype=x.dtype, device=x.device) for _ in range(2))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    held = _Held()
    _crossfusion.feed_forward_forward(
        _place(x), held.all((x, w1, b1, w2, b2, hidden, z, out)), _drop(draw, rate)
    )
    return out, hidden


@_feed_forward.register_fake
def _(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, rate: float, draw: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], w1.shape[0]))


@torch.library.custom_op("crossfusion::feed_forward_backward", mutates_args=())
def _feed_forward_backward(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    hidden: torch.Tensor,
    dout: torch.Tensor,
    rate: float,
    draw: torch.Tensor,
) -> list[torch.Tensor]:
    z, dhidden = (torch.empty(hidden.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    dz, dx = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    grads = [_gradient(x, *shape) for shape in (w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])]
    held = _Held()
    _crossfusion.feed_forward_backward(
        _place(x),
        held.all((dout, x, w1, w2, hidden)),
        held.all((z, dz, dhidden)),
        held(dx),
        held.all(grads),
        _drop(draw, rate),
    )
    return [dx, *(gradient.to(x.dtype) for gradient in grads)]


@_feed_forward_backward.register_fake
def _(
    x: Tensor, w1: Tensor, w2: Tensor, hidden: Tensor, dout: Tensor, rate: float, draw: Tensor
) -> list[Tensor]:
    shapes = (x.shape, w1.shape, (w1.shape[0],), w2.shape, (w2.shape[0],))
    return [x.new_empty(shape) for shape in shapes]


def _feed_forward_setup(ctx: typing.Any, inputs: tuple[typing.Any, ...], output: typing.Any) -> None:
    x, w1, _, w2, _, ctx.rate, draw = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, w1, w2, output[1], draw)


def _feed_forward_grad(ctx: typing.Any, dout: Tensor, _: Tensor) -> _Grads:
    x, w1, w2, hidden, draw = ctx.saved_tensors
    return (*_feed_forward_backward(x, w1, w2, hidden, dout.to(x.dtype), ctx.rate, draw), None, None)


_feed_forward.register_autograd(_feed_forward_grad, setup_context=_feed_forward_setup)


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    dropout: float = 0.0,
    draw: typing.Optional[Tensor] = None,
) -> Tensor:
    """x + dropout(dropout(GELU(x W1ᵀ + b1)) W2ᵀ + b2); GELU is exact.

    x and the result ``[m, d]``, w1 ``[h, d]``, b1 ``[h]``, w2 ``[d, h]``, b2 ``[d]``. ``draw``: see
    :func:`draw`; by default a fresh one.
    """
    _tensors("feed_forward", x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    for which, tensor, dims in (("x", x, 2), ("w1", w1, 2), ("b1", b1, 1), ("w2", w2, 2), ("b2", b2, 1)):
        _dims("feed_forward", which, tensor, dims)
    d, h = x.shape[1], w1.shape[0]
    for which, tensor, shape in (("w1", w1, (h, d)), ("b1", b1, (h,)), ("w2", w2, (d, h)), ("b2", b2, (d,))):
        _shape("feed_forward", which, tensor, *shape)
    x, w1, b1, w2, b2 = _autocast(x, w1, b1, w2, b2)
    out: Tensor = _feed_forward(x, w1, b1, w2, b2, float(dropout), _draw(draw, dropout, x))[0]
    return out


# ---- PPEG --------------------------------------------------------------------------------------


@torch.library.custom_op("crossfusion::ppeg", mutates_args=())
def _ppeg(
    x: torch.Tensor,
    k7: torch.Tensor,
    k5: torch.Tensor,
    k3: torch.Tensor,
    b7: torch.Tensor,
    b5: torch.Tensor,
    b3: torch.Tensor,
    side: int,
) -> torch.Tensor:
    _same("ppeg", x, k7=k7, k5=k5, k3=k3, b7=b7, b5=b5, b3=b3)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    held = _Held()
    _crossfusion.ppeg_forward(_place(x), held.all((x, k7, k5, k3, b7, b5, b3, y)), side)
    return y


@_ppeg.register_fake
def _(
    x: Tensor, k7: Tensor, k5: Tensor, k3: Tensor, b7: Tensor, b5: Tensor, b3: Tensor, side: int
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("crossfusion::ppeg_backward", mutates_args=())
def _ppeg_backward(
    x: torch.Tensor, k7: torch.Tensor, k5: torch.Tensor, k3: torch.Tensor, dy: torch.Tensor, side: int
) -> list[torch.Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernels = [_gradient(x, *k.shape) for k in (k7, k5, k3)]
    biases = [_gradient(x, x.shape[1]) for _ in range(3)]
    held = _Held()
    _crossfusion.ppeg_backward(_place(x), held.all((x, k7, k5, k3, dy, dx, *kernels, *biases)), side)
    return [dx, *(gradient.to(x.dtype) for gradient in kernels + biases)]


@_ppeg_backward.register_fake
def _(x: Tensor, k7: Tensor, k5: Tensor, k3: Tensor, dy: Tensor, side: int) -> list[Tensor]:
    biases = [x.new_empty((x.shape[1],)) for _ in range(3)]
    return [x.new_empty(x.shape), *(k.new_empty(k.shape) for k in (k7, k5, k3)), *biases]


def _ppeg_setup(ctx: typing.Any, inputs: tuple[typing.Any, ...], output: typing.Any) -> None:
    x, k7, k5, k3, _, _, _, ctx.side = inputs
    ctx.save_for_backward(x, k7, k5, k3)


def _ppeg_grad(ctx: typing.Any, dy: Tensor) -> _Grads:
    x, k7, k5, k3 = ctx.saved_tensors
    return (*_ppeg_backward(x, k7, k5, k3, dy.to(x.dtype), ctx.side), None)


_ppeg.register_autograd(_ppeg_grad, setup_context=_ppeg_setup)


def ppeg(x: Tensor, kernels: typing.Sequence[Tensor], biases: typing.Sequence[Tensor], side: int) -> Tensor:
    """x + conv7(x) + conv5(x) + conv3(x), depthwise on the tokens' square grid (TransMIL's encoding).

    x ``[first + side * side, c]``, whose first rows (a class token) pass through; kernels
    ``[c, 1, 7, 7]``, ``[c, 1, 5, 5]`` and ``[c, 1, 3, 3]``, biases ``[c]``. The result is shaped as x.
    """
    shapes: list[tuple[int, ...]] = [(1, 7, 7), (1, 5, 5), (1, 3, 3)]
    _tensors("ppeg", x=x, **_named("kernel", kernels), **_named("bias", biases))
    _dims("ppeg", "x", x, 2)
    _convolutions("ppeg", kernels, biases, shapes, x.shape[1])
    y: Tensor = _ppeg(*_autocast(x, *kernels, *biases), _whole("ppeg", "side", side, 0))
    return y


def _named(which: str, tensors: typing.Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{which} {i}": tensor for i, tensor in enumerate(tensors)}


def _convolutions(
    name: str,
    kernels: typing.Sequence[Tensor],
    biases: typing.Sequence[Tensor],
    shapes: list[tuple[int, ...]],
    channels: int,
) -> None:
    """A kernel of each shape (behind its channels), and as many biases."""
    if not len(kernels) == len(biases) == len(shapes):
        got, expected = f"{len(kernels)} kernels and {len(biases)} biases", len(shapes)
        raise ValueError(f"{name}: {got}, expected {expected} of each")
    for i, (kernel, bias, shape) in enumerate(zip(kernels, biases, shapes)):
        _shape(name, f"kernel {i}", kernel, channels, *shape)
        _shape(name, f"bias {i}", bias, channels)


# ---- conv fusion -------------------------------------------------------------------------------


@torch.library.custom_op("crossfusion::conv_fusion", mutates_args=())
def _conv_fusion(
    streams: list[torch.Tensor],
    mix: list[torch.Tensor],
    kernels: list[torch.Tensor],
    biases: list[torch.Tensor],
    side: typing.Optional[int],
    rate: float,
    draw: torch.Tensor,
) -> torch.Tensor:
    x = streams[0]
    out = torch.empty((x.shape[0], x.shape[1] // 2), dtype=x.dtype, device=x.device)
    held = _Held()
    operands = _conv_fusion_operands(held, streams, mix, kernels, biases)
    _crossfusion.conv_fusion_forward(_place(x), *operands, held(out), side, _drop(draw, rate))
    return out


def _conv_fusion_operands(
    held: _Held, streams: list[Tensor], mix: list[Tensor], kernels: list[Tensor], biases: list[Tensor]
) -> tuple[list[_Matrix], typing.Optional[tuple[_Matrix, ...]], tuple[_Matrix, ...], tuple[_Matrix, ...]]:
    named = _named("stream", streams) | _named("mix", mix) | _named("kernel", kernels) | _named("bias", biases)
    _same("conv_fusion", streams[0], **named)
    flat = held.all(m.reshape(-1) for m in mix) or None
    return list(held.all(streams)), flat, held.all(kernels), held.all(biases)


@_conv_fusion.register_fake
def _(
    streams: list[Tensor],
    mix: list[Tensor],
    kernels: list[Tensor],
    biases: list[Tensor],
    side: typing.Optional[int],
    rate: float,
    draw: Tensor,
) -> Tensor:
    return streams[0].new_empty((streams[0].shape[0], streams[0].shape[1] // 2))


@torch.library.custom_op("crossfusion::conv_fusion_backward", mutates_args=())
def _conv_fusion_backward(
    streams: list[torch.Tensor],
    mix: list[torch.Tensor],
    kernels: list[torch.Tensor],
    biases: list[torch.Tensor],
    out: torch.Tensor,
    dout: torch.Tensor,
    side: typing.Optional[int],
    rate: float,
    draw: torch.Tensor,
) -> list[torch.Tensor]:
    x = streams[0]
    dstreams = [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in streams]
    dmix, dkernels, dbiases = (
        [_gradient(t, *t.shape) for t in tensors] for tensors in (mix, kernels, biases)
    )
    held = _Held()
    _crossfusion.conv_fusion_backward(
        _place(x),
        *_conv_fusion_operands(held, streams, mix, kernels, biases),
        held(out),
        side,
        _drop(draw, rate),
        held(dout),
        list(held.all(dstreams)),
        held.all(d.view(-1) for d in dmix) or None,
        held.all(dkernels),
        held.all(dbiases),
    )
    return [*dstreams, *(d.to(x.dtype) for d in dmix + dkernels + dbiases)]


@_conv_fusion_backward.register_fake
def _(
    streams: list[Tensor],
    mix: list[Tensor],
    kernels: list[Tensor],
    biases: list[Tensor],
    out: Tensor,
    dout: Tensor,
    side: typing.Optional[int],
    rate: float,
    draw: Tensor,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in [*streams, *mix, *kernels, *biases]]


def _conv_fusion_setup(ctx: typing.Any, inputs: tuple[typing.Any, ...], output: typing.Any) -> None:
    streams, mix, kernels, biases, ctx.side, ctx.rate, draw = inputs
    ctx.sizes = [len(streams), len(mix), len(kernels), len(biases)]
    ctx.save_for_backward(output, draw, *streams, *mix, *kernels, *biases)


def _conv_fusion_grad(ctx: typing.Any, dout: Tensor) -> _Grads:
    out, draw, *tensors = ctx.saved_tensors
    lists = _split(tensors, ctx.sizes)
    found = _conv_fusion_backward(*lists, out, dout.to(out.dtype), ctx.side, ctx.rate, draw)
    return (*_split(found, ctx.sizes), None, None, None)


def _split(tensors: typing.Sequence[Tensor], sizes: list[int]) -> list[list[Tensor]]:
    lists, at = [], 0
    for size in sizes:
        lists.append(list(tensors[at : at + size]))
        at += size
    return lists


_conv_fusion.register_autograd(_conv_fusion_grad, setup_context=_conv_fusion_setup)


def conv_fusion(
    streams: typing.Sequence[Tensor],
    mix: typing.Sequence[Tensor],
    kernels: typing.Sequence[Tensor],
    biases: typing.Sequence[Tensor],
    side: typing.Optional[int] = None,
    dropout: float = 0.0,
    draw: typing.Optional[Tensor] = None,
) -> Tensor:
    """relu(the sum of grouped 7-, 5-, 3- and 1-tap convolutions of the streams' weighted sum).

    Three streams ``[n, d]`` and their mix, weight (3 numbers) and bias (1) of ``nn.Conv3d(3, 1, 1)``;
    or one stream and ``mix=()``. The tokens lie on a square of ``side``, n = side * side, row by row,
    and kernels are ``[d / 2, 2, k, k]`` of ``nn.Conv2d(d, d / 2, k, groups=d / 2)``; or, without
    ``side``, in a sequence, and kernels are ``[d / 2, 2, k]`` of ``nn.Conv1d``. Biases ``[d / 2]``;
    dropout of whole channels. The result is ``[n, d / 2]``.
    """
    streams, mix = list(streams), list(mix)
    if len(streams) not in (1, 3) or len(mix) != (2 if len(streams) == 3 else 0):
        raise ValueError(
            f"conv_fusion: {len(streams)} streams and {len(mix)} tensors of a mix, "
            "expected three and two, or one and none"
        )
    _tensors(
        "conv_fusion",
        **_named("stream", streams),
        **_named("mix", mix),
        **_named("kernel", kernels),
        **_named("bias", biases),
    )
    for i, tensor in enumerate(streams):
        _dims("conv_fusion", f"stream {i}", tensor, 2)
        _shape("conv_fusion", f"stream {i}", tensor, *streams[0].shape)
    for which, tensor, numbers in zip(("mix 0", "mix 1"), mix, (3, 1)):
        if tensor.numel() != numbers:
            raise ValueError(f"conv_fusion: {which} has shape {list(tensor.shape)}, expected {numbers} numbers")
    taps = (7, 5, 3, 1)
    shapes: list[tuple[int, ...]] = [(2, k) if side is None else (2, k, k) for k in taps]
    _convolutions("conv_fusion", kernels, biases, shapes, streams[0].shape[1] // 2)
    if side is not None:
        side = _whole("conv_fusion", "side", side, 0)
    tensors = _autocast(*streams, *mix, *kernels, *biases)
    lists = _split(tensors, [len(streams), len(mix), len(kernels), len(biases)])
    out: Tensor = _conv_fusion(*lists, side, float(dropout), _draw(draw, dropout, lists[0][0]))
    return out


# ---- losses ------------------------------------------------------------------------------------


def _at(
    name: str, logits: Tensor, label: int, censored: bool, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Hazard and survival of a bin, and survival before it."""
    _tensors(name, logits=logits)
    if not logits.is_floating_point():
        raise ValueError(f"{name}: logits are {logits.dtype}, expected floating point numbers")
    if logits.dim() not in (1, 2) or (logits.dim() == 2 and logits.shape[0] != 1):
        raise ValueError(f"{name}: logits have shape {list(logits.shape)}, expected [classes] or [1, classes]")
    label = _label(name, label, logits.shape[-1], censored, alpha)
    hazards = torch.sigmoid(logits.reshape(-1).double())
    survival = torch.cumprod(1 - hazards, dim=0)
    return hazards[label], survival[label], survival[label - 1] if label else torch.ones_like(survival[0])


def _label(name: str, label: int, classes: int, censored: bool, alpha: float) -> int:
    label = operator.index(label)
    if not 0 <= label < classes:
        raise ValueError(f"{name}: label {label} of {classes} classes")
    if censored not in (0, 1):  # any other thing would be true
        raise ValueError(f"{name}: censored is {censored!r}, expected True or False")
    if not 0 <= alpha <= 1:
        raise ValueError(f"{name}: alpha is {alpha}, expected 0 to 1")
    return label


def _log(p: Tensor) -> Tensor:
    return torch.log(torch.clamp(p, min=1e-7))


def nll_surv(logits: Tensor, label: int, censored: bool, alpha: float = 0.0) -> Tensor:
    """Negative log-likelihood of discrete hazards, the published loss: a tensor of no dimension.

    logits ``[classes]`` or ``[1, classes]``; ``label`` is the time bin of the event or of the last
    visit, ``censored`` whether no event was seen; ``alpha`` weighs the uncensored part up.
    """
    hazard, survival, before = _at("nll_surv", logits, label, censored, alpha)
    loss = -(1 - alpha) * _log(survival) if censored else -_log(before) - _log(hazard)
    return loss.to(logits.dtype)


def ce_surv(logits: Tensor, label: int, censored: bool, alpha: float = 0.0) -> Tensor:
    """Cross-entropy of the survival curve at the label's bin; arguments as :func:`nll_surv`'s."""
    hazard, survival, before = _at("ce_surv", logits, label, censored, alpha)
    if censored:
        loss = -(1 - alpha) * _log(survival)
    else:
        loss = -(1 - alpha) * _log(1 - survival) - alpha * (torch.log(before + 1e-7) + _log(hazard))
    return loss.to(logits.dtype)


@torch.library.custom_op("crossfusion::times", mutates_args=())
def _times(gradients: list[torch.Tensor], by: torch.Tensor, of: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients that forward has found, times the loss's own. An operator because it has no gradient: a
    plain product would say that a gradient of the gradient is zero. What they are the gradients `of` is
    an argument so that autograd knows of this dependence, and refuses it."""
    return [(by * gradient).to(gradient.dtype) for gradient in gradients]


@_times.register_fake
def _(gradients: list[Tensor], by: Tensor, of: list[Tensor]) -> list[Tensor]:
    return [gradient.new_empty(gradient.shape) for gradient in gradients]


@torch.library.custom_op("crossfusion::head_loss", mutates_args=())
def _head_loss(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    cross_entropy: bool,
    label: int,
    censored: bool,
    alpha: float,
) -> list[torch.Tensor]:
    given = (x, norm_weight, norm_bias, weight, bias)
    _same("head_loss", x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias)
    classes, sums = weight.shape[0], _sums(x)
    stats, logits, dlogits = (torch.empty(n, dtype=sums, device=x.device) for n in (2, classes, classes))
    normed, dx = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    grads = [_gradient(x, *t.shape) for t in given[1:]]
    result = torch.empty(2, dtype=torch.float64, device=x.device)
    held = _Held()
    _crossfusion.head_loss(
        _place(x),
        held.all(given),
        held.all((stats, normed, logits, dlogits)),
        held.all((dx, *grads)),
        held(result),
        cross_entropy,
        label,
        censored,
        alpha,
    )
    loss, risk = result.to(sums).unbind()
    return [loss.clone(), risk.clone(), dx, *(gradient.to(x.dtype) for gradient in grads)]


@_head_loss.register_fake
def _(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    cross_entropy: bool,
    label: int,
    censored: bool,
    alpha: float,
) -> list[Tensor]:
    numbers = [x.new_empty((), dtype=_sums(x)) for _ in range(2)]
    return [*numbers, *(t.new_empty(t.shape) for t in (x, norm_weight, norm_bias, weight, bias))]


def _head_loss_setup(ctx: typing.Any, inputs: tuple[typing.Any, ...], output: typing.Any) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:5], *output[2:])


def _head_loss_grad(ctx: typing.Any, douts: list[Tensor]) -> _Grads:
    saved = list(ctx.saved_tensors)
    return (*_times(saved[5:], douts[0], saved[:5]), None, None, None, None)


_head_loss.register_autograd(_head_loss_grad, setup_context=_head_loss_setup)


def head_loss(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    label: int,
    censored: bool,
    alpha: float = 0.0,
    loss: typing.Literal["nll", "ce"] = "nll",
) -> tuple[Tensor, Tensor]:
    """A survival loss of the logits W LayerNorm(x) + bias of one row, and the slide's risk.

    x ``[1, d]`` or ``[d]``, norm_weight and norm_bias ``[d]``, weight ``[classes, d]``, bias
    ``[classes]``; ``label``, ``censored`` and ``alpha`` as :func:`nll_surv`'s. Both results are tensors
    of no dimension in float32 (float64); the risk has no gradient. All is computed at once, the
    gradients too, and on a GPU nothing waits for the host.
    """
    _tensors("head_loss", x=x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias)
    _dims("head_loss", "x", x, 1, 2)
    for which, tensor, dims in (
        ("norm_weight", norm_weight, 1), ("norm_bias", norm_bias, 1), ("weight", weight, 2), ("bias", bias, 1)
    ):
        _dims("head_loss", which, tensor, dims)
    if loss not in ("nll", "ce"):
        raise ValueError(f"head_loss: loss = {loss!r}, expected 'nll' or 'ce'")
    label = _label("head_loss", label, weight.shape[0], censored, alpha)
    tensors = _autocast_norm(x, norm_weight, norm_bias, weight, bias)
    found = _head_loss(*tensors, loss == "ce", label, bool(censored), float(alpha))
    return found[0], found[1]


# ---- Cox -----------------------------------------------------------------------------------------


def cox(
    risk: Tensor,
    time: typing.Any,
    event: typing.Any,
    ties: typing.Literal["efron", "breslow"] = "efron",
    strata: typing.Any = None,
) -> Tensor:
    """The negative Cox partial log-likelihood of log-risks, in O(n log n), with its gradient.

    risk ``[n]`` or ``[n, 1]``; time, event (True: it was observed) and strata (whole numbers; only risks
    of one stratum are compared) ``[n]``, tensors, arrays or lists. The result is a tensor of no dimension,
    of the risks' type.
    """
    _tensors("cox", risk=risk)
    if not risk.is_floating_point():
        raise ValueError(f"cox: risk is {risk.dtype}, expected floating point numbers")
    if risk.dim() != 1 and not (risk.dim() == 2 and risk.shape[1] == 1):
        raise ValueError(f"cox: risk has shape {list(risk.shape)}, expected [n] or [n, 1]")
    if ties not in ("efron", "breslow"):
        raise ValueError(f"ties = {ties!r}: expected 'efron' or 'breslow'")
    try:
        time, event = torch.as_tensor(time), torch.as_tensor(event)
        given = strata is not None
        strata = torch.as_tensor(strata) if given else torch.zeros(0, dtype=torch.int64)
    except (RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f"cox: time, event and strata must be numbers: {e}") from None
    for which, tensor in (("time", time), ("event", event), ("strata", strata)):
        _tensors("cox", **{which: tensor})
        _dims("cox", which, tensor, 1)
        if tensor.device.type not in ("cpu", risk.device.type):
            raise ValueError(f"cox: {which} is on {tensor.device}, expected the CPU or {risk.device}")
        if tensor.is_complex():
            raise ValueError(f"cox: {which} is {tensor.dtype}, expected real numbers")
    if given and strata.shape != time.shape:
        raise ValueError(f"cox: strata has shape {list(strata.shape)}, expected {list(time.shape)}")
    if strata.is_floating_point() and strata.numel():
        raise ValueError(f"cox: strata are {strata.dtype}, expected whole numbers")
    value: Tensor = _cox(risk.reshape(-1), time.double(), event, strata.long(), ties == "efron")[0]
    return value


@torch.library.custom_op("crossfusion::cox", mutates_args=())
def _cox(
    risk: torch.Tensor, time: torch.Tensor, event: torch.Tensor, strata: torch.Tensor, efron: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if event.dtype != torch.bool and not ((event == 0) | (event == 1)).all():
        raise ValueError("cox: `event` must be True or False, or 1 and 0")
    columns = (x.detach().cpu().contiguous() for x in (time.double(), event.bool(), risk.double()))
    times, events, risks = (column.numpy() for column in columns)
    groups = None
    if strata.numel():
        # numbered from 0, as the library takes them
        groups = torch.unique(strata.detach().cpu(), return_inverse=True)[1].numpy().astype("uintp")
    loglik, gradient = _crossfusion.CoxCohort(times, events, groups, None).loglik_and_gradient(risks, efron)
    value = torch.tensor(-loglik, dtype=risk.dtype, device=risk.device)
    return value, torch.from_numpy(gradient).neg_().to(risk)


@_cox.register_fake
def _(risk: Tensor, time: Tensor, event: Tensor, strata: Tensor, efron: bool) -> tuple[Tensor, Tensor]:
    return risk.new_empty(()), risk.new_empty(risk.shape)


def _cox_setup(ctx: typing.Any, inputs: tuple[typing.Any, ...], output: typing.Any) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], output[1])


def _cox_grad(ctx: typing.Any, dvalue: Tensor, _: Tensor) -> _Grads:
    risk, gradient = ctx.saved_tensors
    return (*_times([gradient], dvalue, [risk]), None, None, None, None)


_cox.register_autograd(_cox_grad, setup_context=_cox_setup)
