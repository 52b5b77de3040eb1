"""The operators: registrations and gradients by PyTorch's own checks, agreement with PyTorch's, and the
traps that other libraries' users fell into."""

import json
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F

from crossfusion import ops

torch.manual_seed(0)


def rand(*shape, dtype=torch.float64, scale=1.0, grad=True):
    return (torch.randn(*shape, dtype=dtype) * scale).requires_grad_(grad)


def plain_attention(q, k, v, heads):
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(-3, -2)
    out = F.scaled_dot_product_attention(split(q), split(k), split(v))
    return out.transpose(-3, -2).flatten(-2)


DRAW = torch.tensor([7, 3])


def conv_inputs(d=6, side=3, streams=3):
    """Without a side, a sequence of 10 tokens."""
    x = [rand(side * side if side else 10, d) for _ in range(streams)]
    mix = [rand(1, 3, 1, 1, 1), rand(1)] if streams == 3 else []
    kernels = [rand(d // 2, 2, *([k, k] if side else [k])) for k in (7, 5, 3, 1)]
    return x, mix, kernels, [rand(d // 2) for _ in range(4)], side


def head_inputs():
    return rand(1, 6), rand(6), rand(6), rand(4, 6), rand(4)


def ppeg_inputs(c=4, side=3):
    return rand(side * side + 1, c), [rand(c, 1, k, k) for k in (7, 5, 3)], [rand(c) for _ in range(3)], side


CASES = {
    "attention": lambda rate: (
        ops._attention, (rand(2, 5, 6), rand(2, 9, 6), rand(2, 9, 6), 2, rate, DRAW)
    ),
    "layer_norm": lambda rate: (ops._layer_norm, (rand(2, 5, 6), rand(6), rand(6))),
    "linear": lambda rate: (ops._linear, (rand(5, 6), rand(4, 6), rand(4))),
    "linear_residual": lambda rate: (ops._linear, (rand(5, 6), rand(4, 6), rand(4), rand(5, 4))),
    "feed_forward": lambda rate: (
        ops._feed_forward, (rand(5, 6), rand(8, 6), rand(8), rand(6, 8), rand(6), rate, DRAW)
    ),
    "ppeg": lambda rate: (lambda *a: ops._ppeg(*a), flat_ppeg()),
    "conv_fusion": lambda rate: (ops._conv_fusion, (*conv_inputs(), rate, DRAW)),
    "conv_fusion_single": lambda rate: (ops._conv_fusion, (*conv_inputs(streams=1), rate, DRAW)),
    "conv_fusion_sequence": lambda rate: (ops._conv_fusion, (*conv_inputs(side=None), rate, DRAW)),
    "head_loss": lambda rate: (lambda *a: ops._head_loss(*a)[0], (*head_inputs(), False, 2, False, 0.2)),
    "cox": lambda rate: (
        ops._cox, (rand(8), torch.rand(8, dtype=torch.float64), torch.arange(8) % 3 > 0, torch.arange(8) % 2, True)
    ),
}


def flat_ppeg():
    x, kernels, biases, side = ppeg_inputs()
    return (x, *kernels, *biases, side)


@pytest.mark.parametrize("name", list(CASES))
def test_registrations(name):
    _, arguments = CASES[name](0.3)
    op = getattr(torch.ops.crossfusion, re.sub("_(single|sequence|residual)", "", name)).default
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("name", list(CASES))
def test_gradients(name, rate):
    op, arguments = CASES[name](rate)
    flat, places = [], []
    for i, a in enumerate(arguments):
        for j, t in enumerate(a if isinstance(a, list) else [a]):
            if isinstance(t, torch.Tensor) and t.requires_grad:
                flat.append(t)
                places.append((i, j, isinstance(a, list)))

    def call(*tensors):
        filled = [list(a) if isinstance(a, list) else a for a in arguments]
        for (i, j, listed), t in zip(places, tensors):
            if listed:
                filled[i][j] = t
            else:
                filled[i] = t
        out = op(*filled)
        return out[0] if isinstance(out, tuple) else out

    assert torch.autograd.gradcheck(call, flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n, m, scale", [(37, 200, 1), (1, 5, 1), (6, 1, 1), (20, 30, 30)])
def test_attention_is_pytorchs(dtype, n, m, scale):
    q, k, v = (rand(size, 16, dtype=dtype, scale=s) for size, s in ((n, scale), (m, scale), (m, 1)))
    dout = torch.randn(n, 16, dtype=dtype)
    ours = torch.autograd.grad(ops.attention(q, k, v, heads=2), (q, k, v), dout)
    truth = [t.detach().double().requires_grad_() for t in (q, k, v)]
    theirs = torch.autograd.grad(plain_attention(*truth, 2), truth, dout.double())
    plain = torch.autograd.grad(plain_attention(q, k, v, 2), (q, k, v), dout)
    for a, b, c in zip(ours, theirs, plain):
        assert torch.isfinite(a).all()
        error = lambda x: (x.double() - b).norm()
        # as good as PyTorch's own in this type, and an absolute term where that is exact
        assert error(a) <= 2 * error(c) + 1e-5 * (1 + b.norm()) * (1 if scale == 1 else 30)


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_keys_give_zero(dtype, rate):
    for n, m in ((4, 0), (0, 5), (0, 0)):
        q, k, v = (rand(size, 8, dtype=dtype) for size in (n, m, m))
        out = ops.attention(q, k, v, heads=2, dropout=rate)
        out.sum().backward()
        assert out.shape == (n, 8)
        for x in (out, q.grad, k.grad, v.grad):
            assert (x == 0).all()


def test_scores_of_a_few_hundred():
    """The softmax is a step there: exact zeros in the probabilities, and no NaN behind them."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        q, k = rand(20, 16, dtype=dtype, scale=20), rand(30, 16, dtype=dtype, scale=20)
        v = rand(30, 16, dtype=dtype)
        assert (q @ k.t()).abs().max() > 800
        ops.attention(q, k, v, heads=1, dropout=0.3).square().sum().backward()
        assert all(x.grad.isfinite().all() for x in (q, k, v))


def plain_conv_fusion(streams, mix, kernels, biases, side):
    x = sum(w * s for w, s in zip(mix[0].reshape(-1), streams)) + mix[1] if mix else streams[0]
    x = x.t()[None] if side is None else x.t().reshape(1, -1, side, side)
    convolve = F.conv1d if side is None else F.conv2d
    groups = kernels[0].shape[0]
    y = sum(convolve(x, k, b, padding=k.shape[-1] // 2, groups=groups) for k, b in zip(kernels, biases))
    return torch.relu(y).flatten(2)[0].t()


@pytest.mark.parametrize("streams", [3, 1])
@pytest.mark.parametrize("side", [None, 3, 5])
def test_conv_fusion_is_pytorchs(side, streams):
    x, mix, kernels, biases, _ = arguments = conv_inputs(d=8, side=side, streams=streams)
    ours, theirs = ops.conv_fusion(*arguments), plain_conv_fusion(*arguments)
    assert torch.allclose(ours, theirs) and (ours == 0).any() and (ours > 0).any()
    dout = torch.randn_like(ours)
    tensors = [*x, *mix, *kernels, *biases]
    for a, b in zip(torch.autograd.grad(ours, tensors, dout), torch.autograd.grad(theirs, tensors, dout)):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("loss", ["nll", "ce"])
@pytest.mark.parametrize("censored", [False, True])
@pytest.mark.parametrize("label", [0, 2, 3])
def test_head_loss_is_its_parts(label, censored, loss):
    x, norm_weight, norm_bias, weight, bias = tensors = head_inputs()
    value, risk = ops.head_loss(*tensors, label, censored, alpha=0.3, loss=loss)
    logits = F.linear(F.layer_norm(x, (6,), norm_weight, norm_bias), weight, bias)
    truth = {"nll": ops.nll_surv, "ce": ops.ce_surv}[loss](logits, label, censored, 0.3)
    assert torch.allclose(value, truth) and not risk.requires_grad
    assert torch.allclose(risk, -torch.cumprod(1 - torch.sigmoid(logits), 1).sum())
    ours, theirs = torch.autograd.grad(3 * value, tensors), torch.autograd.grad(3 * truth, tensors)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b)
    half = [t.detach().bfloat16().requires_grad_() for t in tensors]
    value, _ = ops.head_loss(*half, label, censored, loss=loss)
    value.backward()
    assert value.dtype == torch.float32 and all(t.grad.dtype == torch.bfloat16 for t in half)


def test_dropout_draws_by_its_numbers():
    q, k, v = rand(30, 8), rand(400, 8), rand(400, 8)
    with_draw = lambda *numbers: ops.attention(q, k, v, 2, 0.5, torch.tensor(numbers))
    assert torch.equal(with_draw(1, 2), with_draw(1, 2))
    assert not torch.equal(with_draw(1, 2), with_draw(1, 3))
    assert not torch.equal(ops.attention(q, k, v, 2, 0.5), ops.attention(q, k, v, 2, 0.5))
    torch.manual_seed(5)
    first = ops.attention(q, k, v, 2, 0.5)
    torch.manual_seed(5)
    assert torch.equal(first, ops.attention(q, k, v, 2, 0.5))
    # by address, as on a GPU
    out, lse, draw = torch.empty_like(q), torch.empty(2, len(q), dtype=q.dtype), torch.tensor([1, 2])
    held = ops._Held()
    call = [held.all((q, k, v, out, lse))]
    for step in (2, 3):
        draw[1] = step
        ops._crossfusion.attention_forward((-1, 2), call, 2, (0, 0, 0.5, draw.data_ptr()))
        assert torch.equal(out, with_draw(1, step))
    # E[dropout(P) v] = P v: the mean of many draws is the attention without
    mean = torch.stack([with_draw(9, step) for step in range(400)]).mean(0)
    plain = ops.attention(q, k, v, 2)
    assert (mean - plain).abs().max() < 6 * plain.abs().max() / math.sqrt(400)


def all_ops():
    """Each public operator as a function of tensors, and its tensors."""
    x, mix, kernels, biases, side = conv_inputs()
    px, pk, pb, pside = ppeg_inputs()
    time, event = torch.rand(8, dtype=torch.float64), torch.arange(8) % 3 > 0
    return {
        "attention": (lambda q, k, v: ops.attention(q, k, v, 2, 0.3, DRAW), [rand(5, 6), rand(9, 6), rand(9, 6)]),
        "layer_norm": (ops.layer_norm, [rand(5, 6), rand(6), rand(6)]),
        "linear": (ops.linear, [rand(5, 6), rand(4, 6), rand(4)]),
        "linear_residual": (ops.linear, [rand(5, 6), rand(4, 6), rand(4), rand(5, 4)]),
        "feed_forward": (
            lambda *t: ops.feed_forward(*t, 0.3, DRAW), [rand(5, 6), rand(8, 6), rand(8), rand(6, 8), rand(6)]
        ),
        "ppeg": (lambda x, *t: ops.ppeg(x, t[:3], t[3:], pside), [px, *pk, *pb]),
        "conv_fusion": (
            lambda *t: ops.conv_fusion(t[:3], t[3:5], t[5:9], t[9:], side, 0.3, DRAW), [*x, *mix, *kernels, *biases]
        ),
        "head_loss": (lambda *t: ops.head_loss(*t, 2, False)[0], list(head_inputs())),
        "cox": (lambda risk: ops.cox(risk, time, event), [rand(8)]),
        "nll_surv": (lambda logits: ops.nll_surv(logits, 1, True), [rand(4)]),
        "ce_surv": (lambda logits: ops.ce_surv(logits, 1, False, 0.2), [rand(4)]),
    }


NAMES = list(all_ops())


def in_other_strides(dout):
    """The same numbers as gradients come: transposed, part of a wider tensor, backwards in memory."""
    yield dout.t().contiguous().t() if dout.dim() == 2 else dout
    yield torch.stack([dout, dout], -1)[..., 0]
    if dout.dim() == 2:
        yield F.pad(dout, (3, 2))[:, 3:-2]
        yield torch.repeat_interleave(dout, 2, 0)[::2]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_any_strides(name):
    op, tensors = all_ops()[name]
    out = op(*tensors)
    grads = lambda dout: torch.autograd.grad(out, tensors, dout, retain_graph=True)
    # out.sum().backward(): one number expanded, all strides are 0
    ones = grads(torch.ones_like(out))
    for a, b in zip(grads(torch.ones((), dtype=out.dtype).expand_as(out)), ones):
        assert torch.equal(a, b)
    for a, b in zip(torch.autograd.grad(out.sum(), tensors, retain_graph=True), ones):
        assert torch.equal(a, b)
    dout = torch.randn_like(out)
    plain = grads(dout)
    for other in in_other_strides(dout):
        assert torch.equal(other, dout)
        for a, b in zip(grads(other), plain):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_any_strides(name):
    op, tensors = all_ops()[name]
    expected = op(*tensors)
    for arrange in (
        lambda t: t.detach().t().contiguous().t() if t.dim() == 2 else t.detach(),
        lambda t: torch.stack([t.detach(), t.detach()], -1)[..., 0],
        lambda t: F.pad(t.detach(), (1, 2))[..., 1:-2],
        lambda t: torch._neg_view(-t.detach()),
    ):
        others = [arrange(t).requires_grad_() for t in tensors]
        out = op(*others)
        assert torch.equal(out, expected)
        plain = torch.autograd.grad(expected.sum(), tensors, retain_graph=True)
        for a, b in zip(torch.autograd.grad(out.sum(), others), plain):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_any_one_input_alone_wants_a_gradient(name):
    op, tensors = all_ops()[name]
    whole = torch.autograd.grad(op(*tensors).sum(), tensors)
    for wanted, expected in enumerate(whole):
        some = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        op(*some).sum().backward()
        assert torch.equal(some[wanted].grad, expected)
        assert all(t.grad is None for i, t in enumerate(some) if i != wanted)


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients(name):
    op, tensors = all_ops()[name]
    expected = op(*tensors).detach()
    with torch.no_grad():
        out = op(*tensors)
    assert not out.requires_grad and torch.equal(out, expected)
    with torch.inference_mode():
        out = op(*tensors)
        assert out.is_inference() and torch.equal(out, expected)
        inside = [t.detach().clone() for t in tensors]  # inference tensors themselves
        assert torch.equal(op(*inside), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_backward_more(name):
    op, tensors = all_ops()[name]
    out = op(*tensors).sum()
    first = torch.autograd.grad(out, tensors, retain_graph=True)
    second = torch.autograd.grad(out, tensors)
    for a, b in zip(first, second):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, tensors)
    # a gradient of a gradient is right, or an error, and not silently zero
    out = op(*tensors)
    gradient = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
    if name in ("nll_surv", "ce_surv"):
        torch.autograd.grad(sum(g.sum() for g in gradient), tensors)
    else:
        with pytest.raises(RuntimeError, match="autograd|differentiable|grad"):
            torch.autograd.grad(sum(g.square().sum() for g in gradient), tensors)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_that_are_not_there_are_errors(name):
    """Of second order of a plain loss, and in forward mode: PyTorch takes what it knows no rule of for zero."""
    op, tensors = all_ops()[name]
    gradient = torch.autograd.grad(op(*tensors).sum(), tensors, create_graph=True)
    assert gradient[0].requires_grad
    if name in ("nll_surv", "ce_surv"):
        return
    with pytest.raises(RuntimeError, match="autograd|differentiable|grad"):
        torch.autograd.grad(gradient[0].square().sum(), tensors)
    tangents = tuple(torch.ones_like(t) for t in tensors)
    with pytest.raises(NotImplementedError, match="tangent"):
        torch.func.jvp(lambda *t: op(*t), tuple(t.detach() for t in tensors), tangents)


def test_a_result_is_changed_in_place():
    x, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((3, 8), (8,), (8,)))
    y = ops.layer_norm(x, weight, bias)
    y += x
    expected = torch.nn.functional.layer_norm(x, (8,), weight, bias) + x
    for a, b in zip(torch.autograd.grad(y.square().sum(), (x, weight)), torch.autograd.grad(expected.square().sum(), (x, weight))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("cox", "head_loss")])
def test_what_is_written_to_between_is_noticed(name):
    """The version counter of each tensor that backward reads: none is used silently with other numbers."""
    op, tensors = all_ops()[name]
    expected = torch.autograd.grad(op(*tensors).sum(), tensors)
    for i in range(len(tensors)):
        copies = [t * 1 for t in tensors]
        out = op(*copies).sum()
        with torch.no_grad():
            copies[i].mul_(2)
        try:
            found = torch.autograd.grad(out, tensors)
        except RuntimeError as e:
            assert "modified by an inplace operation" in str(e)
        else:  # not needed (a bias, say): then the gradients are those of before
            for a, b in zip(found, expected):
                assert torch.equal(a, b)
    if name not in ("nll_surv", "ce_surv"):  # which keep the hazards alone
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            copies = [t * 1 for t in tensors]
            out = op(*copies).sum()
            with torch.no_grad():
                copies[0].mul_(2)
            torch.autograd.grad(out, tensors)


@pytest.mark.parametrize("name", NAMES)
def test_every_op_compiles_whole(name):
    op, tensors = all_ops()[name]
    torch.compiler.reset()  # the other cases have the same function
    compiled = torch.compile(lambda *t: op(*t), fullgraph=True, backend="aot_eager")
    ours, plain = compiled(*tensors), op(*tensors)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours.sum(), tensors), torch.autograd.grad(plain.sum(), tensors)):
        torch.testing.assert_close(a, b)


def test_types_that_do_not_fit_are_named():
    q, k = rand(4, 8, dtype=torch.float32), rand(4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="k is torch.bfloat16 on cpu, expected torch.float32"):
        ops.attention(q, k, q, heads=2)
    with pytest.raises(ValueError, match="not torch.float16"):
        ops.attention(q.half(), q.half(), q.half(), heads=2)
    with pytest.raises(ValueError, match="8 columns in 3 heads"):
        ops.attention(q, q, q, heads=3)
    with pytest.raises(ValueError, match="dropout at a rate of 1"):
        ops.attention(q, q, q, heads=2, dropout=1.0)
    with pytest.raises(ValueError, match="v has shape"):
        ops.attention(q, q, rand(5, 8, dtype=torch.float32), heads=2)


def tensors_of(name, arguments):
    """Where each tensor of a call is: its name, and its place where there is a list."""
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor) and key != "draw":
            yield key, None, value
        for i, tensor in enumerate(value if isinstance(value, list) else []):
            yield key, i, tensor


F32 = dict(dtype=torch.float32, grad=False)
CALLS = {
    "attention": lambda: dict(q=rand(5, 8, **F32), k=rand(9, 8, **F32), v=rand(9, 8, **F32), heads=2),
    "layer_norm": lambda: dict(x=rand(5, 8, **F32), weight=rand(8, **F32), bias=rand(8, **F32)),
    "linear": lambda: dict(x=rand(5, 8, **F32), weight=rand(4, 8, **F32), bias=rand(4, **F32), residual=rand(5, 4, **F32)),
    "feed_forward": lambda: dict(
        x=rand(5, 8, **F32), w1=rand(6, 8, **F32), b1=rand(6, **F32), w2=rand(8, 6, **F32), b2=rand(8, **F32)
    ),
    "head_loss": lambda: dict(
        x=rand(1, 8, **F32),
        norm_weight=rand(8, **F32),
        norm_bias=rand(8, **F32),
        weight=rand(4, 8, **F32),
        bias=rand(4, **F32),
        label=1,
        censored=False,
    ),
    "ppeg": lambda: dict(
        x=rand(10, 4, **F32),
        kernels=[rand(4, 1, k, k, **F32) for k in (7, 5, 3)],
        biases=[rand(4, **F32) for _ in range(3)],
        side=3,
    ),
    "conv_fusion": lambda: dict(
        streams=[rand(9, 6, **F32) for _ in range(3)],
        mix=[rand(1, 3, 1, 1, 1, **F32), rand(1, **F32)],
        kernels=[rand(3, 2, k, k, **F32) for k in (7, 5, 3, 1)],
        biases=[rand(3, **F32) for _ in range(4)],
        side=3,
    ),
    "nll_surv": lambda: dict(logits=rand(4, **F32), label=1, censored=False),
    "ce_surv": lambda: dict(logits=rand(4, **F32), label=1, censored=False),
    "cox": lambda: dict(risk=rand(6, **F32), time=torch.arange(6.0), event=torch.arange(6) % 2),
}
# what is in the place of a tensor, and the arguments that may be so
LOGITS = [("nll_surv", "logits"), ("ce_surv", "logits")]
COX = [("cox", "risk"), ("cox", "time"), ("cox", "event")]
BAD_TENSORS = {
    "none": (lambda t: None, [("linear", "residual")]),
    "text": (lambda t: "x", []),
    "a number": (lambda t: 1.0, []),
    "integers": (lambda t: t.long(), COX[1:]),
    "complex": (lambda t: t.to(torch.complex64), []),
    "half": (lambda t: t.half(), LOGITS + COX),
    "another type": (lambda t: t.double(), LOGITS + COX),
    "no dimension": (lambda t: torch.tensor(1.0), [("conv_fusion", "mix 1")]),
    "no elements": (lambda t: t[..., :0], []),
    "a dimension more": (lambda t: t[None], [("layer_norm", "x"), ("conv_fusion", "mix"), *LOGITS]),
    "two dimensions more": (lambda t: t[None, None], [("layer_norm", "x"), ("conv_fusion", "mix")]),
    "a column less": (lambda t: t[..., 1:], LOGITS),
    "on no device": (lambda t: t.to("meta"), [*LOGITS, COX[0]]),  # where it is the only one: shapes alone
    "sparse": (lambda t: t.to_sparse(), []),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_no_tensor_that_does_not_fit_gives_a_number(name):
    """Neither a panic nor a result: a TypeError or ValueError for each tensor in turn."""
    op = getattr(ops, name)
    arguments = CALLS[name]()
    op(**arguments)
    for key, i, tensor in list(tensors_of(name, arguments)):
        for what, (bad, fine) in BAD_TENSORS.items():
            if (name, key) in fine or (name, f"{key} {i}") in fine:
                continue
            if (name, key, what) == ("linear", "bias", "none"):
                continue  # it may be left out
            value = bad(tensor)
            if i is not None:
                value = [*arguments[key][:i], value, *arguments[key][i + 1 :]]
            with pytest.raises((TypeError, ValueError)):
                print(name, key, i, what, op(**{**arguments, key: value}))


def test_other_arguments_that_do_not_fit():
    def refused(name, match=None, **changed):
        with pytest.raises((TypeError, ValueError), match=match):
            print(name, changed, getattr(ops, name)(**{**CALLS[name](), **changed}))

    for wrong in (0, -1, 3, 1.5, "2", None, 2**40, 10**30):
        refused("attention", heads=wrong)
    for wrong in (4, -1, 1.5, "3", None, 10**30):
        refused("ppeg", side=wrong)
        if wrong is not None:
            refused("conv_fusion", side=wrong)
    refused("conv_fusion", match="kernel 0 has shape", side=None)  # a sequence's kernels have one row
    for name in ("attention", "feed_forward", "conv_fusion"):
        for wrong in (1.0, 0.99, -0.1, math.nan, math.inf, "x", None):
            refused(name, dropout=wrong)
        nowhere = torch.zeros(2, dtype=torch.int64, device="meta")
        for wrong in (torch.tensor([1]), torch.tensor([1.0, 2.0]), [1, 2], nowhere):
            refused(name, match="draw", dropout=0.5, draw=wrong)
        getattr(ops, name)(**CALLS[name](), dropout=0.5, draw=torch.tensor([-1, -(2**63)]))  # any two numbers
    for name, count in (("kernels", 3), ("biases", 3)):
        for wrong in ([], CALLS["ppeg"]()[name][1:], CALLS["ppeg"]()[name] * 2):
            refused("ppeg", match=f"expected {count} of each", **{name: wrong})
    for wrong in ([], CALLS["conv_fusion"]()["streams"][:2]):
        refused("conv_fusion", match="expected three and two, or one and none", streams=wrong)
    refused("conv_fusion", match="expected three and two, or one and none", mix=[])
    for name in ("nll_surv", "ce_surv", "head_loss"):
        for wrong in (-1, 4, 1.5, "1", None, 10**30):
            refused(name, label=wrong)
        for wrong in ("yes", None, 2, math.nan, -1):
            refused(name, match="censored", censored=wrong)
        for wrong in (-0.1, 1.1, math.nan, "x"):
            refused(name, alpha=wrong)
    refused("nll_surv", match="expected .classes. or .1, classes.", logits=torch.zeros(2, 4))  # a batch of two
    refused("head_loss", match="expected 'nll' or 'ce'", loss="cox")
    refused("cox", match="expected 'efron' or 'breslow'", ties="exact")
    refused("cox", match="True or False", event=[2, 0, 1, 1, 0, 1])
    refused("cox", match="True or False", event=[math.nan, 0, 1, 1, 0, 1])
    refused("cox", match="NaN", time=[math.nan, 1, 2, 3, 4, 5])
    refused("cox", match="NaN", risk=torch.full((6,), math.nan))
    refused("cox", match="entries", time=[1.0, 2.0])
    refused("cox", match="numbers", time=[None] * 6)


def test_autocast():
    linear = torch.nn.Linear(8, 8)
    x = torch.randn(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = linear(x)
        out = ops.attention(q, q, q, heads=2)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
    assert linear.weight.grad.isfinite().all()
    # a layer's result is in bfloat16 there and the next weight is not, which elsewhere is refused
    weight, bias = rand(8, dtype=torch.float32), rand(8, dtype=torch.float32)
    with pytest.raises(ValueError, match="weight is torch.float32"):
        ops.layer_norm(q.detach(), weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.layer_norm(linear(x), weight, bias)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and ops.layer_norm(x, weight, bias).dtype == torch.float32
        # products take autocast's type, as PyTorch's do, and leave float64 alone, as they do
        assert ops.linear(x, linear.weight, linear.bias).dtype == torch.bfloat16
        assert ops.attention(x, x, x, heads=2).dtype == torch.bfloat16
        assert ops.attention(x.double(), x.double(), x.double(), heads=2).dtype == torch.float64
        with pytest.raises(ValueError, match="k is torch.bfloat16"):
            ops.attention(x.double(), x, x, heads=2)
    truth = F.layer_norm(linear(x).bfloat16().float(), (8,), weight, bias)
    assert (y - truth).abs().max() < 0.05 and weight.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match="autocast's type is torch.float16"):
        ops.linear(x, linear.weight, linear.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        with pytest.raises(ValueError, match="weight is torch.float32"):
            ops.layer_norm(q.detach(), weight, bias)
    for name in ("linear", "feed_forward", "ppeg", "conv_fusion", "head_loss", "attention"):
        arguments = CALLS[name]()
        key, i, tensor = next(tensors_of(name, arguments))
        first = tensor.bfloat16()
        arguments[key] = first if i is None else [first, *arguments[key][1:]]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            getattr(ops, name)(**arguments)


def test_compiled_whole_and_once():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    def step(q, k, v):
        return ops.attention(q, k, v, 2, 0.1).square().mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for n, m in ((5, 40), (6, 41), (9, 70), (30, 8), (11, 3)):
        q, k, v = (rand(size, 8, dtype=torch.float32) for size in (n, m, m))
        compiled(q, k, v).backward()
        assert q.grad.isfinite().all()
    assert len(compilations) == 1, f"{len(compilations)} compilations for five sizes of slide"


def _attend(_):
    x = torch.ones(400, 8)
    return float(ops.attention(x, x, x, heads=2).sum())


def test_a_fork_after_use():
    expected = _attend(0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(_attend, range(4)).get(timeout=60) == [expected] * 4


def _gradients(_):
    """Forward and backward, without PyTorch's autograd, which refuses to work in a fork; of so few numbers
    that its own operators start no threads, which would be waited for in vain."""
    x = torch.arange(1600, dtype=torch.float32).reshape(1, 200, 8).sin()
    out, lse = ops._attention(x, x, x, 2, 0.1, DRAW)
    return [float(d.sum()) for d in ops._attention_backward(x, x, x, out, lse, out, 2, 0.1, DRAW)]


def test_a_fork_that_goes_backward():
    expected = _gradients(0)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map_async(_gradients, range(6)).get(timeout=60) == [expected] * 6
    assert _gradients(0) == expected  # and the parent goes on


QUOTA = """
set -e
mount -t tmpfs none /sys/fs/cgroup
v1=$(grep -E '^[0-9]+:([a-z_]+,)*cpu(,[a-z_]+)*:' /proc/self/cgroup || true)
if [ -n "$v1" ]; then
  folder=/sys/fs/cgroup/cpu/${v1##*:}
  mkdir -p "$folder" && echo 150000 > "$folder/cpu.cfs_quota_us" && echo 100000 > "$folder/cpu.cfs_period_us"
else
  v2=$(grep '^0::' /proc/self/cgroup)
  folder=/sys/fs/cgroup/${v2##*:}
  mkdir -p "$folder" && touch /sys/fs/cgroup/cgroup.controllers && echo "150000 100000" > "$folder/cpu.max"
fi
"""


def test_a_containers_quota_is_counted():
    """A quota of 1.5 cores is one thread, whatever the machine has and PyTorch takes: in a mount namespace
    of its own, whose control group says so."""
    if not shutil.which("unshare") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs unshare and two cores")
    code = "import torch; from crossfusion import ops; torch.set_num_threads(2); print(ops._place(torch.zeros(1)))"
    whole = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    script = QUOTA + f"exec {sys.executable} -c '{code}'"
    limited = subprocess.run(["unshare", "--mount", "bash", "-c", script], capture_output=True, text=True)
    if "unshare" in limited.stderr or "mount" in limited.stderr:
        pytest.skip(f"not allowed here: {limited.stderr.strip()}")
    assert (whole.stdout, limited.stdout) == ("(-1, 2)\n", "(-1, 1)\n"), limited.stderr


def test_losses_are_the_goldens():
    cases = json.loads((pathlib.Path(__file__).parents[2] / "tests/goldens/losses.json").read_text())
    assert cases
    for case in cases:
        logits = torch.tensor(case["logits"], dtype=torch.float64, requires_grad=True)
        loss = {"nll": ops.nll_surv, "ce": ops.ce_surv}[case["loss"]]
        value = loss(logits, case["label"], case["censorship"] == 1, case["alpha"])
        value.backward()
        assert abs(value.item() - case["value"]) <= 1e-6 * max(1, abs(case["value"]))
        np.testing.assert_allclose(logits.grad.numpy(), case["grad"], rtol=1e-6, atol=1e-6)


def test_cox_is_a_plain_sum():
    torch.manual_seed(2)
    risk, time, event = rand(60), torch.randint(1, 20, (60,)).double(), torch.rand(60) < 0.6
    value = ops.cox(risk, time, event, ties="breslow")
    at_risk = time[None, :] >= time[:, None]
    sums = torch.logsumexp(risk[None, :].expand(60, 60).masked_fill(~at_risk, -math.inf), 1)
    truth = -((risk - sums) * event).sum()
    assert torch.allclose(value, truth)
    ours, theirs = torch.autograd.grad(value, risk), torch.autograd.grad(truth, risk)
    assert torch.allclose(ours[0], theirs[0])


def test_linear_is_that_of_pytorch():
    x, weight, bias = rand(3, 5, 8), rand(6, 8), rand(6)
    residual = rand(3, 5, 6)
    torch.testing.assert_close(ops.linear(x, weight, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(ops.linear(x[0, 0], weight), F.linear(x[0, 0], weight))
    y = ops.linear(x, weight, bias, residual)
    torch.testing.assert_close(y, F.linear(x, weight, bias) + residual)
    grads = torch.autograd.grad(y.square().sum(), (x, weight, bias, residual))
    truth = torch.autograd.grad((F.linear(x, weight, bias) + residual).square().sum(), (x, weight, bias, residual))
    for grad, true in zip(grads, truth):
        torch.testing.assert_close(grad, true)
    with pytest.raises(ValueError, match=r"residual has shape \[5, 6\], expected \[3, 5, 6\]"):
        ops.linear(x, weight, bias, residual[0])


def test_cox_compares_within_strata():
    risk, time, event = rand(12), torch.arange(12) % 7, torch.arange(12) % 3 > 0
    strata = torch.tensor([5, -1] * 6)
    parts = [ops.cox(risk[strata == s], time[strata == s], event[strata == s]) for s in (5, -1)]
    whole = ops.cox(risk, time, event, strata=strata)
    torch.testing.assert_close(whole, sum(parts))
    (grad,) = torch.autograd.grad(whole, risk)
    torch.testing.assert_close(grad, torch.autograd.grad(sum(parts), risk)[0])
    for wrong, match in ((strata[1:], "strata has shape"), ([], "strata"), (strata.double(), "whole numbers")):
        with pytest.raises(ValueError, match=match):
            ops.cox(risk, time, event, strata=wrong)
