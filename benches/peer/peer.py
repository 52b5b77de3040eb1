#!/usr/bin/env python3
"""Times PyTorch on what `cf-bench step` and `cf-bench op` time, for a comparison in one run on one machine.

    peer.py step --bags 800,3000,12000 --features 2048 --dropout on --precision bf16 [--compile] [--repeat 10]
    peer.py op   --bags 800,3000,12000 --features 2048 --precision bf16 [--repeat 10]
    peer.py cox  --n 1000000 [--repeat 10]

Prints one line of JSON. Needs torch, and torchsurv for the Cox loss; runs on a GPU if there is one. bf16
is autocast for the step, bf16 tensors for the ops.
"""
import argparse
import json
import math
import os
import resource
import statistics
import time

import torch
import torch.nn.functional as F

import model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D, HEADS = 512, 4


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(run, repeat):
    """Median of runs that start with a cold L2 cache, after three that warm up."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE) if DEVICE == "cuda" else None
    times = []
    for i in range(repeat + 3):
        if flush is not None:
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end) * 1e-3
        else:
            begin = time.perf_counter()
            run()
            elapsed = time.perf_counter() - begin
        if i >= 3:
            times.append(elapsed)
    return statistics.median(times)


def step(arguments):
    torch.manual_seed(0)
    net = model.CrossFusion(arguments.features).to(DEVICE)
    net.train(arguments.dropout == "on")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, weight_decay=4e-6)
    bags = [torch.randn(1, n, arguments.features, device=DEVICE) for n in arguments.bags]
    forward = torch.compile(net) if arguments.compile else net
    parts = {"forward_s": [], "backward_s": [], "optimizer_s": [], "step_s": []}
    for i in range(arguments.repeat + arguments.warmup):
        synchronize()
        marks = [time.perf_counter()]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=arguments.precision == "bf16"):
            hazards, survival = model.survival(forward(*bags))
            loss = -(hazards[:, 1].float().clamp(min=1e-7).log() + survival[:, 0].float().clamp(min=1e-7).log()).mean()
        synchronize()
        marks.append(time.perf_counter())
        loss.backward()
        synchronize()
        marks.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        marks.append(time.perf_counter())
        if i >= arguments.warmup:
            for name, elapsed in zip(parts, [b - a for a, b in zip(marks, marks[1:])] + [marks[-1] - marks[0]]):
                parts[name].append(elapsed)
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {name: {"min": min(t), "median": statistics.median(t)} for name, t in parts.items()} | {"peak_bytes": peak}


def ops(arguments):
    """Medians under the names and shapes of src/bench/cases.rs, as far as PyTorch has the op as one call."""
    m5, x10, m20 = arguments.bags
    side = math.isqrt(x10 - 1) + 1
    n, dtype = side * side, torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    rows = []

    def matrix(*shape):
        return torch.rand(*shape, device=DEVICE, dtype=dtype) * 2 - 1

    def time_op(op, shape, run):
        rows.append({"op": op, "shape": shape, "median_us": 1e6 * seconds(run, arguments.repeat)})

    groups = [("input", [m5, m20, x10], D, arguments.features), ("3 branches, kv", [n] * 3, 2 * D, D),
              ("3 branches, out", [n] * 3, D, D), ("3 branches, ffn 2", [n] * 3, D, 2 * D)]
    for name, counts, out, inner in groups:
        problems = [(matrix(m, inner), matrix(out, inner), matrix(out), matrix(m, out)) for m in counts]
        shape = f"{name}: {sum(counts)} x {out} x {inner}"
        time_op("matmul forward", shape, lambda: [F.linear(x, w, b) for x, w, b, _ in problems])
        time_op("matmul backward input", shape, lambda: [dy @ w for _, w, _, dy in problems])
        time_op("matmul backward weight", shape, lambda: [(dy.t() @ x, dy.sum(0)) for x, _, _, dy in problems])

    def attention(sizes, rate, shape):
        qkv = [[matrix(1, HEADS, rows, D // HEADS).requires_grad_() for rows in (n, m, m)] for n, m in sizes]
        run = lambda: [F.scaled_dot_product_attention(*x, dropout_p=rate) for x in qkv]
        time_op("attention forward", shape, lambda: torch.no_grad()(run)())
        outs = run()
        douts = [torch.randn_like(out) for out in outs]
        inputs = [x for triple in qkv for x in triple]
        time_op("attention backward", shape, lambda: torch.autograd.grad(outs, inputs, douts, retain_graph=True))

    attention([(n, n)] * 3, 0.0, f"3 x {n} x {n}")
    attention([(n, n)] * 3, 0.2, f"3 x {n} x {n}, dropout 0.2")
    attention([(x10, m5), (x10, m20)], 0.0, f"{x10} x {m5} and {m20}")

    def module(name, net, inputs, shape):
        net = net.to(DEVICE, dtype)
        inputs = [x.requires_grad_() for x in inputs]
        time_op(f"{name} forward", shape, lambda: torch.no_grad()(net)(*inputs))
        out = net(*inputs)
        dout = torch.randn_like(out)
        wanted = inputs + list(net.parameters())
        time_op(f"{name} backward", shape, lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True))

    class Branches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = torch.nn.ModuleList(model.PPEG(D) for _ in range(3))

        def forward(self, *xs):
            return torch.stack([part(x, side) for part, x in zip(self.parts, xs)])

    module("ppeg", Branches(), [matrix(1, n, D) for _ in range(3)], f"3 x {side} x {side} x {D}")

    class Fusion(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.processor = model.ConvProcessor(D)

        def forward(self, *xs):
            grids = torch.stack([model.grid(x, side) for x in xs], dim=1)
            return model.tokens(self.processor.conv_block(self.processor.conv3d(grids).squeeze(1)))

    fusion = Fusion()
    del fusion.processor.linear  # not part of the op
    module("conv_fusion", fusion, [matrix(1, n, D) for _ in range(3)], f"{side} x {side} x {D}, 3 streams")
    module("layer_norm", torch.nn.LayerNorm(D), [matrix(n, D)], f"{n} x {D}")
    return {"ops": rows}


def cox(arguments):
    """The fastest loss and gradient of torchsurv: log-risks, times and events at random."""
    from torchsurv.loss.cox import neg_partial_log_likelihood

    torch.manual_seed(0)
    risk = torch.randn(arguments.n, requires_grad=True)
    when, event = torch.rand(arguments.n) * 100, torch.rand(arguments.n) < 0.4
    run = lambda: neg_partial_log_likelihood(risk, event, when, ties_method="efron").backward()
    times = []
    for _ in range(arguments.repeat + 1):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return {"seconds": min(times[1:])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["step", "op", "cox"])
    parser.add_argument("--bags", type=lambda s: [int(v) for v in s.split(",")], default=[800, 3000, 12000])
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--dropout", choices=["on", "off"], default="on")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3, help="steps before those that count")
    parser.add_argument("--n", type=int, default=1_000_000, help="patients of cox")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    result = {"step": step, "op": ops, "cox": cox}[arguments.command](arguments)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    print(json.dumps({"torch": torch.__version__, "device": name, "precision": arguments.precision} | result))


if __name__ == "__main__":
    main()
