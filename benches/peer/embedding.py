"""This package's operators beside PyTorch's, in one run: attention with dropout, a whole training step,
the Cox loss.

    python benches/peer/embedding.py [--small]

Needs torch and the package (`pip install ./python`); torchsurv for its Cox loss, if it is there. Runs
alternate, and the best of each counts.
"""

import argparse
import json
import sys
import time

import torch
import torch.nn.functional as F

import model as reference
from crossfusion import models, ops


def best(repeat, **runs):
    """Seconds of the best of `repeat` runs of each, in turn, after one that warms up."""
    found = {name: [] for name in runs}
    for i in range(repeat + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i:
                found[name].append(time.perf_counter() - start)
    return {name: min(times) for name, times in found.items()}


def attention(n, m, heads, head, rate):
    q, k, v = (torch.randn(size, heads * head, requires_grad=True) for size in (n, m, m))
    dout = torch.randn(n, heads * head)
    split = lambda x: x.view(-1, heads, head).transpose(0, 1)[None]

    def ours():
        torch.autograd.grad(ops.attention(q, k, v, heads, rate), (q, k, v), dout)

    def theirs():
        out = F.scaled_dot_product_attention(split(q), split(k), split(v), dropout_p=rate)
        torch.autograd.grad(out[0].transpose(0, 1).flatten(1), (q, k, v), dout)

    return best(3, ours=ours, pytorch=theirs)


def step(sizes, features):
    ours, theirs = models.CrossFusion(features).train(), reference.CrossFusion(features).train()
    theirs.load_state_dict(ours.state_dict())
    bags = [torch.randn(1, n, features) for n in sizes]

    def run(model):
        adam = torch.optim.Adam(model.parameters(), lr=1e-4)

        def one():
            adam.zero_grad()
            ops.nll_surv(model(*bags), 1, False, 0.2).backward()
            adam.step()

        return one

    return best(2, ours=run(ours), pytorch=run(theirs))


def cox(n):
    risk = torch.randn(n, requires_grad=True)
    when, event = torch.rand(n) * 100, torch.rand(n) < 0.4
    runs = {"ours": lambda: ops.cox(risk, when, event).backward()}
    try:
        from torchsurv.loss.cox import neg_partial_log_likelihood as loss

        runs["torchsurv"] = lambda: loss(risk, event, when, ties_method="efron").backward()
    except ImportError:
        print("torchsurv is not installed: its Cox loss is left out", file=sys.stderr)
    return best(3, **runs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tenth of the size: does it run?")
    small = parser.parse_args().small
    sizes = (80, 300, 1200) if small else (800, 3000, 12000)
    result = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "attention, dropout 0.2": attention(sizes[1], sizes[2], 4, 128, 0.2),
        "attention": attention(sizes[1], sizes[2], 4, 128, 0.0),
        "step, dropout": step(sizes, 2048),
        "cox, Efron": cox(10_000 if small else 1_000_000),
    }
    print(json.dumps(result, indent=1))
