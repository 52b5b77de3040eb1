"""CrossFusion's kernels as PyTorch operators, with gradients.

On the CPU and on CUDA (on the current stream, without waiting for it), in float32, bfloat16 and, on
the CPU, float64. Inputs are taken where they lie; what is not contiguous in its last dimension is
copied first. Gradients of parameters are summed in float32 (float64) and rounded to the parameter's
type. Each operator is a ``torch.library`` custom operator: it can be compiled whole
(``torch.compile(fullgraph=True)``), and autograd knows it.

Dropout draws by counter: from a tensor ``draw`` of two int64 on the CPU, a seed and a step, which
:func:`draw` makes from PyTorch's generator. Forward and backward draw the same; a different step
draws another mask.
"""

import math

import torch

from . import _crossfusion

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


def draw():
    """Seed and step of one dropout, from PyTorch's default generator of the CPU."""
    return torch.randint(0, 2**31 - 1, (2,), dtype=torch.int64)


_fresh = draw  # where an argument is called draw


def _place(x):
    """Where an operator runs: the GPU and its current stream, or the CPU and PyTorch's threads."""
    if x.device.type == "cuda":
        with torch.cuda.device(x.device):
            return x.device.index, torch.cuda.current_stream(x.device).cuda_stream
    if x.device.type != "cpu":
        raise ValueError(f"crossfusion runs on cpu and cuda, not on {x.device}")
    return -1, torch.get_num_threads()


def _rows(x):
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


def _matrix(x):
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

    def __init__(self):
        self.tensors = []

    def __call__(self, x):
        x = _rows(x)
        self.tensors.append(x)
        return _matrix(x)

    def all(self, tensors):
        return tuple(map(self, tensors))


def _sums(x):
    """The type that sums are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _same(name, first, **others):
    """All of one type and on one device, or a ValueError that names the one that is not."""
    for other, tensor in others.items():
        if tensor is not None and (tensor.dtype != first.dtype or tensor.device != first.device):
            raise ValueError(
                f"{name}: {other} is {tensor.dtype} on {tensor.device}, expected {first.dtype} on {first.device}"
            )


def _drop(draw, rate, site=0):
    seed, step = (int(n) for n in draw.tolist()) if rate else (0, 0)
    return seed, step & 0xFFFFFFFF, site, float(rate)


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
def _(q, k, v, heads, rate, draw):
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
def _(q, k, v, out, lse, dout, heads, rate, draw):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _attention_setup(ctx, inputs, output):
    q, k, v, ctx.heads, ctx.rate, draw = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, draw)


def _attention_grad(ctx, dout, _):
    q, k, v, out, lse, draw = ctx.saved_tensors
    dq, dk, dv = _attention_backward(q, k, v, out, lse, dout.to(q.dtype), ctx.heads, ctx.rate, draw)
    return dq, dk, dv, None, None, None


_attention.register_autograd(_attention_grad, setup_context=_attention_setup)


def attention(q, k, v, heads, dropout=0.0, draw=None):
    """softmax(q kᵀ / sqrt(d / heads)) v of each head, with dropout of the probabilities.

    q ``[n, d]`` or ``[b, n, d]``, k and v ``[m, d]`` or ``[b, m, d]``; the result is shaped as q. Head
    h owns columns ``h * d / heads`` and on; at most 128 columns a head. No ``n x m`` matrix is held,
    with dropout either. ``draw``: see :func:`draw`; by default a fresh one.
    """
    single = q.dim() == 2
    if single:
        q, k, v = q[None], k[None], v[None]
    if draw is None:
        draw = _fresh() if dropout else torch.zeros(2, dtype=torch.int64)
    out = _attention(q, k, v, heads, float(dropout), draw)[0]
    return out[0] if single else out


# ---- layer norm --------------------------------------------------------------------------------


@torch.library.custom_op("crossfusion::layer_norm", mutates_args=())
def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _same("layer_norm", x, weight=weight, bias=bias)
    flat = x.detach().reshape(-1, x.shape[-1])
    y = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    stats = torch.empty((flat.shape[0], 2), dtype=_sums(x), device=x.device)
    held = _Held()
    _crossfusion.layer_norm_forward(_place(x), held.all((flat, weight, bias, y, stats)))
    return y.view(x.shape), stats


@_layer_norm.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape), x.new_empty((x.numel() // x.shape[-1], 2), dtype=_sums(x))


@torch.library.custom_op("crossfusion::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    x: torch.Tensor, stats: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat, dy = (t.detach().reshape(-1, x.shape[-1]) for t in (x, dy))
    dx = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    dweight, dbias = (torch.zeros(x.shape[-1], dtype=_sums(x), device=x.device) for _ in range(2))
    held = _Held()
    _crossfusion.layer_norm_backward(_place(x), held.all((flat, stats, weight, dy, dx, dweight, dbias)))
    return dx.view(x.shape), dweight.to(weight.dtype), dbias.to(weight.dtype)


@_layer_norm_backward.register_fake
def _(x, stats, weight, dy):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _layer_norm_setup(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight)


def _layer_norm_grad(ctx, dy, _):
    x, stats, weight = ctx.saved_tensors
    return _layer_norm_backward(x, stats, weight, dy.to(x.dtype))


_layer_norm.register_autograd(_layer_norm_grad, setup_context=_layer_norm_setup)


def layer_norm(x, weight, bias):
    """LayerNorm over the last dimension, epsilon 1e-5; x ``[..., d]``, weight and bias ``[d]``."""
    return _layer_norm(x, weight, bias)[0]


# ---- linear and feed-forward ---------------------------------------------------------------------


@torch.library.custom_op("crossfusion::linear", mutates_args=())
def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    _same("linear", x, weight=weight, bias=bias)
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    held = _Held()
    _crossfusion.linear_forward(_place(x), held.all((x, weight, bias, y)))
    return y


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.custom_op("crossfusion::linear_backward", mutates_args=())
def _linear_backward(
    x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, wants_dx: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty(x.shape if wants_dx else (0,), dtype=x.dtype, device=x.device)
    dweight = torch.zeros(weight.shape, dtype=_sums(x), device=x.device)
    dbias = torch.zeros(weight.shape[0], dtype=_sums(x), device=x.device)
    held = _Held()
    given, out = held.all((dy, x, weight)), held(dx) if wants_dx else None
    _crossfusion.linear_backward(_place(x), given, out, held.all((dweight, dbias)))
    return dx, dweight.to(x.dtype), dbias.to(x.dtype)


@_linear_backward.register_fake
def _(x, weight, dy, wants_dx):
    return x.new_empty(x.shape if wants_dx else (0,)), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _linear_setup(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _linear_grad(ctx, dy):
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0]
    dx, dweight, dbias = _linear_backward(x, weight, dy.to(x.dtype), wanted)
    return dx if wanted else None, dweight, dbias


_linear.register_autograd(_linear_grad, setup_context=_linear_setup)


def linear(x, weight, bias):
    """x Wᵀ + bias: x ``[m, in]``, weight ``[out, in]``, bias ``[out]``, as ``nn.Linear`` has them."""
    return _linear(x, weight, bias)


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
def _(x, w1, b1, w2, b2, rate, draw):
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
    grads = [torch.zeros(s, dtype=_sums(x), device=x.device) for s in (w1.shape, w1.shape[0], w2.shape, w2.shape[0])]
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
def _(x, w1, w2, hidden, dout, rate, draw):
    shapes = (x.shape, w1.shape, (w1.shape[0],), w2.shape, (w2.shape[0],))
    return [x.new_empty(shape) for shape in shapes]


def _feed_forward_setup(ctx, inputs, output):
    x, w1, _, w2, _, ctx.rate, draw = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, w1, w2, output[1], draw)


def _feed_forward_grad(ctx, dout, _):
    x, w1, w2, hidden, draw = ctx.saved_tensors
    return (*_feed_forward_backward(x, w1, w2, hidden, dout.to(x.dtype), ctx.rate, draw), None, None)


_feed_forward.register_autograd(_feed_forward_grad, setup_context=_feed_forward_setup)


def feed_forward(x, w1, b1, w2, b2, dropout=0.0, draw=None):
    """x + dropout(dropout(GELU(x W1ᵀ + b1)) W2ᵀ + b2): x ``[m, d]``, w1 ``[h, d]``, w2 ``[d, h]``; GELU is exact."""
    if draw is None:
        draw = _fresh() if dropout else torch.zeros(2, dtype=torch.int64)
    return _feed_forward(x, w1, b1, w2, b2, float(dropout), draw)[0]


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
def _(x, k7, k5, k3, b7, b5, b3, side):
    return x.new_empty(x.shape)


@torch.library.custom_op("crossfusion::ppeg_backward", mutates_args=())
def _ppeg_backward(
    x: torch.Tensor, k7: torch.Tensor, k5: torch.Tensor, k3: torch.Tensor, dy: torch.Tensor, side: int
) -> list[torch.Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernels = [torch.zeros(k.shape, dtype=_sums(x), device=x.device) for k in (k7, k5, k3)]
    biases = [torch.zeros(x.shape[1], dtype=_sums(x), device=x.device) for _ in range(3)]
    held = _Held()
    _crossfusion.ppeg_backward(_place(x), held.all((x, k7, k5, k3, dy, dx, *kernels, *biases)), side)
    return [dx, *(gradient.to(x.dtype) for gradient in kernels + biases)]


@_ppeg_backward.register_fake
def _(x, k7, k5, k3, dy, side):
    biases = [x.new_empty(x.shape[1]) for _ in range(3)]
    return [x.new_empty(x.shape), *(k.new_empty(k.shape) for k in (k7, k5, k3)), *biases]


def _ppeg_setup(ctx, inputs, output):
    x, k7, k5, k3, _, _, _, ctx.side = inputs
    ctx.save_for_backward(x, k7, k5, k3)


def _ppeg_grad(ctx, dy):
    x, k7, k5, k3 = ctx.saved_tensors
    return (*_ppeg_backward(x, k7, k5, k3, dy.to(x.dtype), ctx.side), None)


_ppeg.register_autograd(_ppeg_grad, setup_context=_ppeg_setup)


def ppeg(x, kernels, biases, side):
    """x + conv7(x) + conv5(x) + conv3(x), depthwise on the tokens' square grid (TransMIL's encoding).

    x ``[first + side * side, c]``, whose first rows (a class token) pass through; kernels
    ``[c, 1, 7, 7]``, ``[c, 1, 5, 5]`` and ``[c, 1, 3, 3]``, biases ``[c]``.
    """
    return _ppeg(x, *kernels, *biases, side)


# ---- conv fusion -------------------------------------------------------------------------------


@torch.library.custom_op("crossfusion::conv_fusion", mutates_args=())
def _conv_fusion(
    streams: list[torch.Tensor],
    mix: list[torch.Tensor],
    kernels: list[torch.Tensor],
    biases: list[torch.Tensor],
    side: int,
    rate: float,
    draw: torch.Tensor,
) -> torch.Tensor:
    x = streams[0]
    out = torch.empty((x.shape[0], x.shape[1] // 2), dtype=x.dtype, device=x.device)
    held = _Held()
    operands = _conv_fusion_operands(held, streams, mix, kernels, biases)
    _crossfusion.conv_fusion_forward(_place(x), *operands, held(out), side, _drop(draw, rate))
    return out


def _conv_fusion_operands(held, streams, mix, kernels, biases):
    names = {f"operand {i}": t for i, t in enumerate([*streams[1:], *mix, *kernels, *biases])}
    _same("conv_fusion", streams[0], **names)
    mix = held.all(m.reshape(-1) for m in mix) or None
    return list(held.all(streams)), mix, held.all(kernels), held.all(biases)


@_conv_fusion.register_fake
def _(streams, mix, kernels, biases, side, rate, draw):
    return streams[0].new_empty((streams[0].shape[0], streams[0].shape[1] // 2))


@torch.library.custom_op("crossfusion::conv_fusion_backward", mutates_args=())
def _conv_fusion_backward(
    streams: list[torch.Tensor],
    mix: list[torch.Tensor],
    kernels: list[torch.Tensor],
    biases: list[torch.Tensor],
    out: torch.Tensor,
    dout: torch.Tensor,
    side: int,
    rate: float,
    draw: torch.Tensor,
) -> list[torch.Tensor]:
    x = streams[0]
    dstreams = [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in streams]
    zeros = lambda tensors: [torch.zeros(t.shape, dtype=_sums(t), device=t.device) for t in tensors]
    dmix, dkernels, dbiases = zeros(mix), zeros(kernels), zeros(biases)
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
def _(streams, mix, kernels, biases, out, dout, side, rate, draw):
    return [t.new_empty(t.shape) for t in [*streams, *mix, *kernels, *biases]]


def _conv_fusion_setup(ctx, inputs, output):
    streams, mix, kernels, biases, ctx.side, ctx.rate, draw = inputs
    ctx.sizes = [len(streams), len(mix), len(kernels), len(biases)]
    ctx.save_for_backward(output, draw, *streams, *mix, *kernels, *biases)


def _conv_fusion_grad(ctx, dout):
    out, draw, *tensors = ctx.saved_tensors
    lists = _split(tensors, ctx.sizes)
    found = _conv_fusion_backward(*lists, out, dout.to(out.dtype), ctx.side, ctx.rate, draw)
    return (*_split(found, ctx.sizes), None, None, None)


def _split(tensors, sizes):
    lists, at = [], 0
    for size in sizes:
        lists.append(list(tensors[at : at + size]))
        at += size
    return lists


_conv_fusion.register_autograd(_conv_fusion_grad, setup_context=_conv_fusion_setup)


def conv_fusion(streams, mix, kernels, biases, side, dropout=0.0, draw=None):
    """relu(the sum of grouped 7-, 5-, 3- and 1-tap convolutions of the streams' weighted sum).

    Three streams ``[side * side, d]`` and their mix, weight and bias of ``nn.Conv3d(3, 1, 1)``; or one
    stream and ``mix=()``. Kernels ``[d / 2, 2, k, k]``, biases ``[d / 2]``; dropout of whole channels. The
    result is ``[side * side, d / 2]``.
    """
    if draw is None:
        draw = _fresh() if dropout else torch.zeros(2, dtype=torch.int64)
    return _conv_fusion(list(streams), list(mix), list(kernels), list(biases), side, float(dropout), draw)


# ---- losses ------------------------------------------------------------------------------------


def _at(logits, label):
    """Hazard and survival of a bin, and survival before it."""
    hazards = torch.sigmoid(logits.reshape(-1).double())
    survival = torch.cumprod(1 - hazards, dim=0)
    if not 0 <= label < len(hazards):
        raise ValueError(f"label {label} of {len(hazards)} classes")
    return hazards[label], survival[label], survival[label - 1] if label else torch.ones_like(survival[0])


def _log(p):
    return torch.log(torch.clamp(p, min=1e-7))


def nll_surv(logits, label, censored, alpha=0.0):
    """Negative log-likelihood of discrete hazards, the published loss.

    logits ``[classes]`` or ``[1, classes]``; ``label`` is the time bin of the event or of the last
    visit, ``censored`` whether no event was seen; ``alpha`` weighs the uncensored part up.
    """
    hazard, survival, before = _at(logits, label)
    loss = -(1 - alpha) * _log(survival) if censored else -_log(before) - _log(hazard)
    return loss.to(logits.dtype)


def ce_surv(logits, label, censored, alpha=0.0):
    """Cross-entropy of the survival curve at the label's bin; arguments as :func:`nll_surv`'s."""
    hazard, survival, before = _at(logits, label)
    if censored:
        loss = -(1 - alpha) * _log(survival)
    else:
        loss = -(1 - alpha) * _log(1 - survival) - alpha * (torch.log(before + 1e-7) + _log(hazard))
    return loss.to(logits.dtype)


def cox(risk, time, event, ties="efron"):
    """The negative Cox partial log-likelihood of log-risks ``[n]``, in O(n log n), with its gradient."""
    if ties not in ("efron", "breslow"):
        raise ValueError(f"ties = {ties!r}: expected 'efron' or 'breslow'")
    time = torch.as_tensor(time, dtype=torch.float64)
    event = torch.as_tensor(event, dtype=torch.bool)
    return _cox(risk.reshape(-1), time, event, ties == "efron")[0]


@torch.library.custom_op("crossfusion::cox", mutates_args=())
def _cox(risk: torch.Tensor, time: torch.Tensor, event: torch.Tensor, efron: bool) -> tuple[torch.Tensor, torch.Tensor]:
    columns = (x.detach().cpu().contiguous() for x in (time.double(), event.bool(), risk.double()))
    times, events, risks = (column.numpy() for column in columns)
    loglik, gradient = _crossfusion.CoxCohort(times, events, None, None).loglik_and_gradient(risks, efron)
    value = torch.tensor(-loglik, dtype=risk.dtype, device=risk.device)
    return value, torch.from_numpy(gradient).neg_().to(risk)


@_cox.register_fake
def _(risk, time, event, efron):
    return risk.new_empty(()), risk.new_empty(risk.shape)


def _cox_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _cox_grad(ctx, dvalue, _):
    (gradient,) = ctx.saved_tensors
    return dvalue * gradient, None, None, None


_cox.register_autograd(_cox_grad, setup_context=_cox_setup)
