#!/usr/bin/env python3
"""Writes tests/goldens/bf16.json: how far PyTorch in plain bf16 (weights and activations) is from PyTorch in f64.

For each golden with stored gradients and many draws of its numbers, the golden's own the first: the root mean square of
|logits - truth| / |truth|, and of the same for the gradients of all parameters and of all inputs. One draw passes or fails
by luck.
Needs torch, numpy and safetensors; the model is benches/peer/model.py.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benches/peer"))
import model

DRAWS = 96  # of tests/goldens.rs
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def fill(name, shape, offset, scale):
    """The goldens' generator (tests/common/mod.rs)."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    with np.errstate(over="ignore"):
        z = np.uint64(h) + (np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(1)) * GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    u = (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return torch.from_numpy((np.float32(offset) + np.float32(scale) * u).astype(np.float32).reshape(shape))


def loss_of(kind, logits, label, censored, alpha):
    hazards, survival = model.survival(logits)
    padded = torch.cat([torch.ones_like(survival[:, :1]), survival], dim=1)
    clamped = lambda p: p.clamp(min=1e-7).log()
    s_y, before, h_y = padded[0, label + 1], padded[0, label], hazards[0, label]
    if kind == "nll":
        uncensored = -(1 - censored) * (clamped(before) + clamped(h_y))
        return (1 - alpha) * (-censored * clamped(s_y) + uncensored) + alpha * uncensored
    entropy = -censored * clamped(s_y) - (1 - censored) * clamped(1 - s_y)
    return (1 - alpha) * entropy - alpha * (1 - censored) * ((before + 1e-7).log() + clamped(h_y))


def run(golden, tag, dtype):
    """Logits, parameters' gradients and inputs' gradients of one draw, in f64."""
    config, law, spec = golden["config"], golden["input_law"], golden["loss"]
    net = getattr(model, golden["model"])(**{k: config[k] for k in ("features", "dim", "heads", "layers")})
    net.load_state_dict({n: fill(tag + n, p["shape"], p["offset"], p["scale"]) for n, p in golden["parameters"].items()})
    net.eval().to(dtype)
    bags = {x: fill(tag + x, (1, golden["bags"][x], config["features"]), law["offset"], law["scale"]) for x in ("x5", "x10", "x20")}
    bags = [bag.to(dtype).requires_grad_() for bag in bags.values()]
    logits = net(*bags)
    loss_of(spec["name"], logits.double(), spec["label"], spec["censorship"], spec["alpha"]).backward()
    flat = lambda tensors: torch.cat([t.detach().double().flatten() for t in tensors if t is not None])
    return flat([logits]), flat([p.grad for p in net.parameters()]), flat([bag.grad for bag in bags])


def errors(path):
    with safe_open(path, "pt") as file:
        golden = json.loads(file.metadata()["golden"])
        if not hasattr(model, golden["model"]) or "grad.cls_token" not in file.keys():
            return None
    squares = np.zeros(3)
    for draw in range(DRAWS):
        tag = golden["fill_tag"] + (f"{draw}/" if draw else "")
        plain, truth = run(golden, tag, torch.bfloat16), run(golden, tag, torch.float64)
        squares += [float(((a - b) ** 2).sum() / (b**2).sum()) for a, b in zip(plain, truth)]
    return dict(zip(("logits", "parameters", "inputs"), np.sqrt(squares / DRAWS)))


def main():
    folder = ROOT / "tests/goldens"
    found = {path.stem: errors(path) for path in sorted(folder.glob("*.safetensors"))}
    result = {name: e for name, e in found.items() if e}
    (folder / "bf16.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
