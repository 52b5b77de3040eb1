#!/usr/bin/env python3
"""Writes tests/goldens/bf16.json: how far PyTorch in plain bf16 (weights and activations) is from the goldens, which are f64.

For each golden with stored gradients: |logits - golden|, and |gradients - golden| over all parameters and over all inputs.
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


def errors(path):
    with safe_open(path, "pt") as file:
        golden = json.loads(file.metadata()["golden"])
        if not hasattr(model, golden["model"]) or "grad.cls_token" not in file.keys():
            return None
        config, tag, law = golden["config"], golden["fill_tag"], golden["input_law"]
        net = getattr(model, golden["model"])(**{k: config[k] for k in ("features", "dim", "heads", "layers")})
        net.load_state_dict({n: fill(tag + n, p["shape"], p["offset"], p["scale"]) for n, p in golden["parameters"].items()})
        net.eval().to(torch.bfloat16)
        bags = {x: fill(tag + x, (1, golden["bags"][x], config["features"]), law["offset"], law["scale"]) for x in ("x5", "x10", "x20")}
        bags = {x: bag.to(torch.bfloat16).requires_grad_() for x, bag in bags.items()}
        logits = net(*bags.values())
        spec = golden["loss"]
        loss_of(spec["name"], logits.double(), spec["label"], spec["censorship"], spec["alpha"]).backward()
        of = lambda name: file.get_tensor(name).double().flatten()
        distance = lambda pairs: float(sum(((a.detach().double().flatten() - b) ** 2).sum() for a, b in pairs).sqrt())
        parameters = [(p.grad, of(f"grad.{n}")) for n, p in net.named_parameters()]
        inputs = [(bag.grad, of(f"grad.{x}")) for x, bag in bags.items() if bag.grad is not None]
        return {"logits": distance([(logits, of("logits"))]), "parameters": distance(parameters), "inputs": distance(inputs)}


def main():
    folder = ROOT / "tests/goldens"
    found = {path.stem: errors(path) for path in sorted(folder.glob("*.safetensors"))}
    result = {name: e for name, e in found.items() if e}
    (folder / "bf16.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
