#!/usr/bin/env python3
"""Writes tests/fixtures/models: a checkpoint of each model as its published program saves it (`torch.save` of the state dict), and
beside it the bags' sizes and PyTorch's logits in float64. The bags are those of tests/common/mod.rs (`fill` of "x5" and so on).

Needs torch, numpy and safetensors; the models are those of benches/peer/model.py.
"""
import importlib.util
import json
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("errors", ROOT / "scripts/make-bf16-errors.py")
errors = importlib.util.module_from_spec(spec)
spec.loader.exec_module(errors)

FEATURES, DIM = 12, 16
BAGS = {"x5": 5, "x10": 11, "x20": 23}


def main():
    folder = ROOT / "tests/fixtures/models"
    folder.mkdir(parents=True, exist_ok=True)
    bags = [errors.fill(x, (1, n, FEATURES), 0.0, 1.7).double() for x, n in BAGS.items()]
    for name in ("CrossFusion", "CrossFusionConcat", "CrossFusionSingle"):
        net = getattr(errors.model, name)(FEATURES, DIM).eval()
        law = lambda p: (0.5, 0.4) if p.dim() == 1 else (0.0, 0.6)
        net.load_state_dict({n: errors.fill(n, p.shape, *law(p)) for n, p in net.state_dict().items()})
        torch.save(net.state_dict(), folder / f"{name}.pt")
        logits = net.double()(*bags)[0].tolist()
        (folder / f"{name}.json").write_text(json.dumps({"features": FEATURES, "bags": BAGS, "logits": logits}) + "\n")


if __name__ == "__main__":
    main()
