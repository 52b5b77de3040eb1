"""The operators: registrations and gradients by PyTorch's own checks, agreement with PyTorch's, and the
traps that other libraries' users fell into."""

import math
import multiprocessing
import pickle
import copy

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
    x = [rand(side * side, d) for _ in range(streams)]
    mix = [rand(1, 3, 1, 1, 1), rand(1)] if streams == 3 else []
    kernels = [rand(d // 2, 2, k, k) for k in (7, 5, 3, 1)]
    return x, mix, kernels, [rand(d // 2) for _ in range(4)], side


def ppeg_inputs(c=4, side=3):
    return rand(side * side + 1, c), [rand(c, 1, k, k) for k in (7, 5, 3)], [rand(c) for _ in range(3)], side


CASES = {
    "attention": lambda rate: (
        ops._attention, (rand(2, 5, 6), rand(2, 9, 6), rand(2, 9, 6), 2, rate, DRAW)
    ),
    "layer_norm": lambda rate: (ops._layer_norm, (rand(2, 5, 6), rand(6), rand(6))),
    "linear": lambda rate: (ops._linear, (rand(5, 6), rand(4, 6), rand(4))),
    "feed_forward": lambda rate: (
        ops._feed_forward, (rand(5, 6), rand(8, 6), rand(8), rand(6, 8), rand(6), rate, DRAW)
    ),
    "ppeg": lambda rate: (lambda *a: ops._ppeg(*a), flat_ppeg()),
    "conv_fusion": lambda rate: (ops._conv_fusion, (*conv_inputs(), rate, DRAW)),
    "conv_fusion_single": lambda rate: (ops._conv_fusion, (*conv_inputs(streams=1), rate, DRAW)),
    "cox": lambda rate: (
        ops._cox, (rand(8), torch.rand(8, dtype=torch.float64), torch.arange(8) % 3 > 0, True)
    ),
}


def flat_ppeg():
    x, kernels, biases, side = ppeg_inputs()
    return (x, *kernels, *biases, side)


@pytest.mark.parametrize("name", list(CASES))
def test_registrations(name):
    _, arguments = CASES[name](0.3)
    op = getattr(torch.ops.crossfusion, name.replace("_single", "")).default
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


def test_no_keys_give_zero():
    q = rand(4, 8)
    out = ops.attention(q, torch.zeros(0, 8, dtype=torch.float64), torch.zeros(0, 8, dtype=torch.float64), heads=2)
    out.sum().backward()
    assert (out == 0).all() and (q.grad == 0).all()


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
    # E[dropout(P) v] = P v: the mean of many draws is the attention without
    mean = torch.stack([with_draw(9, step) for step in range(400)]).mean(0)
    plain = ops.attention(q, k, v, 2)
    assert (mean - plain).abs().max() < 6 * plain.abs().max() / math.sqrt(400)


def test_gradients_that_are_not_contiguous():
    x, weight, bias = rand(5, 6), rand(6), rand(6)
    ops.layer_norm(x, weight, bias).sum().backward()  # an expanded gradient: all strides are 0
    expanded = x.grad.clone()
    x.grad = None
    ops.layer_norm(x, weight, bias).backward(torch.ones(5, 6, dtype=torch.float64))
    assert torch.equal(x.grad, expanded)
    x.grad = None
    ops.layer_norm(x, weight, bias).t().backward(torch.ones(6, 5, dtype=torch.float64))  # transposed
    assert torch.equal(x.grad, expanded)
    q, kv = rand(4, 7, 8), rand(9, 8)
    wide = torch.randn(9, 20, dtype=torch.float64)
    out = ops.attention(q[1], wide[:, 2:10], kv, 2)  # parts of wider tensors
    assert torch.allclose(out, plain_attention(q[1], wide[:, 2:10], kv, 2))
    out = ops.attention(q[1], kv.t().contiguous().t(), kv, 2)
    assert torch.allclose(out, plain_attention(q[1], kv, kv, 2))


def test_some_inputs_alone_want_gradients():
    for wanted in range(3):
        tensors = [rand(5, 8, grad=i == wanted) for i in range(3)]
        ops.attention(*tensors, heads=2).sum().backward()
        assert [t.grad is not None for t in tensors] == [i == wanted for i in range(3)]
    with torch.no_grad():
        assert not ops.attention(*tensors, heads=2).requires_grad


def test_a_second_backward_says_so():
    x, weight, bias = rand(5, 6), rand(6), rand(6)
    y = ops.layer_norm(x, weight, bias).sum()
    y.backward(retain_graph=True)
    first = x.grad.clone()
    y.backward()
    assert torch.equal(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()
    gradient = torch.autograd.grad(ops.layer_norm(x, weight, bias).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError):  # a gradient of a gradient is not there, and not silently zero
        torch.autograd.grad(gradient.sum(), x)


def test_an_input_that_is_written_to_between_is_noticed():
    x, weight, bias = rand(5, 6), rand(6), rand(6)
    y = ops.layer_norm(x * 1, weight, bias)
    z = x * 1
    y = ops.layer_norm(z, weight, bias)
    z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


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


def test_autocast():
    linear = torch.nn.Linear(8, 8)
    x = torch.randn(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = linear(x)
        out = ops.attention(q, q, q, heads=2)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
    assert linear.weight.grad.isfinite().all()


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


def test_losses_are_the_goldens():
    import json
    import pathlib

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
