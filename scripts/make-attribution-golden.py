#!/usr/bin/env python3
"""Writes tests/goldens/attribution.json: what patches contribute to the risk of a golden's slide.

By PyTorch in float64: gradients by autograd; integrated gradients by the 160 points of Gauss and
Legendre, from zero features along t^3; attention as the probabilities of a softmax that is written
out. Needs torch, numpy and safetensors; the models are those of benches/peer/model.py. Prints how
far off the file is that was there.
"""
import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("errors", ROOT / "scripts/make-bf16-errors.py")
errors = importlib.util.module_from_spec(spec)
spec.loader.exec_module(errors)
model = errors.model

GOLDENS = [f"crossfusion_{name}" for name in ("tiny", "two_layers", "identity", "concat", "single")]
SCALES = ("x5", "x10", "x20")
POINTS, BATCH = 160, 32


def load(name):
    """A golden's network and bags `[1, patches, features]`, of one patch where it reads none."""
    with safe_open(ROOT / f"tests/goldens/{name}.safetensors", "np") as file:
        golden = json.loads(file.metadata()["golden"])
    config, tag, law = golden["config"], golden["fill_tag"], golden["input_law"]
    net = getattr(model, golden["model"])(**{k: config[k] for k in ("features", "dim", "heads", "layers")})
    fill = lambda name, p: errors.fill(tag + name, p["shape"], p["offset"], p["scale"])
    net.load_state_dict({name: fill(name, p) for name, p in golden["parameters"].items()})
    shape = lambda x: (1, golden["bags"].get(x, 1), config["features"])
    bags = {x: errors.fill(tag + x, shape(x), law["offset"], law["scale"]).double() for x in SCALES}
    return net.eval().double(), bags


def risk(net, bags):
    return -model.survival(net(*bags))[1].sum(1)


def products(net, bags, baseline, ts):
    """(x - baseline) . d risk / d x of each patch at shares of the way: `[ts, patches]` a scale."""
    found = {x: [] for x in bags}
    for some in torch.as_tensor(ts).view(-1, 1, 1).split(BATCH):
        at = [(baseline[x] + some * (bags[x] - baseline[x])).requires_grad_() for x in bags]
        gradients = torch.autograd.grad(risk(net, at).sum(), at, allow_unused=True)
        for x, gradient in zip(bags, gradients):
            if gradient is not None:
                found[x].append(((bags[x] - baseline[x]) * gradient).sum(-1))
    return {x: torch.cat(parts) for x, parts in found.items() if parts}


def of_baseline(net, bags, baseline, power):
    points, weights = np.polynomial.legendre.leggauss(POINTS)
    points, weights = (points + 1) / 2, torch.from_numpy(weights / 2)
    # the way is walked at t^power
    slopes = weights * power * torch.from_numpy(points ** (power - 1))
    on_the_way = products(net, bags, baseline, points**power)
    return {
        "baseline": risk(net, baseline.values()).item(),
        "gradient": {x: values[0] for x, values in products(net, bags, baseline, [1.0]).items()},
        "integrated": {x: slopes @ values for x, values in on_the_way.items()},
    }


def probabilities(attention, inputs):
    """Of each query over the context, the mean over the heads: `[queries, context]`."""
    x, context = inputs
    if attention.scale_embeddings is not None:
        x, context = x + attention.scale_embeddings, context + attention.scale_embeddings
    q = model.split_heads(attention.q_proj(x), attention.heads)
    k = model.split_heads(attention.k_proj(context), attention.heads)
    return (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1).mean(1)[0]


def attention(net, bags):
    """What each patch receives of the x10 patches, and of the class token by way of these."""
    last = net.final_transformer.post_layers.layers[-1][1]
    named = dict(net.named_children())
    # in CrossFusion's names c and f, in those of CrossFusionConcat coarse and fine
    names = {"x5": ("c_cross_attn", "coarse_cross_attn"), "x20": ("f_cross_attn", "fine_cross_attn")}
    cross = {x: named[name] for x, either in names.items() for name in either if name in named}
    seen = {}
    keep = lambda attention, inputs, _: seen.update({attention: probabilities(attention, inputs)})
    hooks = [attention.register_forward_hook(keep) for attention in (last, *cross.values())]
    net(*bags.values())
    for hook in hooks:
        hook.remove()
    # the square's last tokens are its first patches once more
    source = "x10" if cross else "x20"
    square, patches = seen[last][0, 1:], bags[source].shape[1]
    token = square[:patches].clone()
    token[: len(square) - patches] += square[patches:]
    of_patches = {x: seen[a].mean(0) for x, a in cross.items()}
    return of_patches, {source: token} | {x: token @ seen[a] for x, a in cross.items()}


def rounded(found):
    if isinstance(found, dict):
        return {x: rounded(found[x]) for x in sorted(found, key=(SCALES + tuple(found)).index)}
    return [float(f"{x:.12g}") for x in found.tolist()] if isinstance(found, torch.Tensor) else found


def numbers(found):
    """All numbers by their place."""
    if isinstance(found, dict):
        return {f"{key} {place}": x for key, of_key in found.items() for place, x in numbers(of_key).items()}
    return dict(enumerate(found)) if isinstance(found, list) else {"": found}


def main():
    result = {}
    for name in GOLDENS:
        net, bags = load(name)
        mean = {x: bag.mean(1, keepdim=True).expand_as(bag) for x, bag in bags.items()}
        zero = {x: torch.zeros_like(bag) for x, bag in bags.items()}
        whole = {"risk": risk(net, bags.values()).item()}
        whole |= {"mean": of_baseline(net, bags, mean, 1), "zero": of_baseline(net, bags, zero, 3)}
        with torch.no_grad():
            whole["attention"], whole["class_token"] = attention(net, bags)
        result[name] = rounded(whole)
    path = ROOT / "tests/goldens/attribution.json"
    if path.exists():
        before, after = numbers(json.loads(path.read_text())), numbers(result)
        assert before.keys() == after.keys(), "other numbers than before"
        off = max(abs(before[place] - after[place]) for place in after)
        print(f"{len(after)} numbers, off by {off:.1e} from before at most")
    path.write_text(json.dumps(result, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
