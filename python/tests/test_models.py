"""The models beside the published ones in plain PyTorch (benches/peer/model.py) and beside the goldens."""

import copy
import csv
import json
import pathlib
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import crossfusion
from crossfusion import models, ops

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benches/peer"))
import model as reference

GOLDENS = pathlib.Path(__file__).parents[2] / "tests/goldens"
NAMES = ["CrossFusion", "CrossFusionConcat", "CrossFusionSingle"]


def fill(name, count, law):
    """The goldens' numbers: splitmix64 of (fnv1a64(name) + (i + 1) * golden ratio), top 24 bits."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    with np.errstate(over="ignore"):
        z = np.uint64(h) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    u = (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return np.float32(law["offset"]) + np.float32(law["scale"]) * u


def safetensors(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    golden = json.loads(header.pop("__metadata__")["golden"])
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = np.frombuffer(data[8 + length + start : 8 + length + end], dtype=np.float32)
    return golden, tensors


def test_the_goldens():
    seen = set()
    for path in sorted(GOLDENS.glob("crossfusion_*.safetensors")):
        golden, tensors = safetensors(path)
        config = {"dim": 512, "heads": 4, "layers": 1, "n_classes": 4, **golden["config"]}
        if config.pop("fusion", "conv2d") != "conv2d":
            continue  # the modules are the published ones
        model = getattr(models, golden["model"])(**config).eval()
        parameters = {
            name: torch.from_numpy(fill(golden["fill_tag"] + name, int(np.prod(p["shape"])), p)).view(p["shape"])
            for name, p in golden["parameters"].items()
        }
        model.load_state_dict(parameters, strict=True)
        bags = []
        for scale in ("x5", "x10", "x20"):
            n = golden["bags"].get(scale)
            values = n and fill(golden["fill_tag"] + scale, n * config["features"], golden["input_law"])
            bags.append(n and torch.from_numpy(values).view(1, n, -1).requires_grad_())
        logits = model(*bags)
        np.testing.assert_allclose(logits[0].detach(), tensors["logits"], rtol=1e-5, atol=1e-5)
        hazards, survival, risk = models.survival(logits)
        np.testing.assert_allclose(risk.detach(), tensors["risk"], rtol=1e-5, atol=1e-5)
        loss = {"nll": ops.nll_surv, "ce": ops.ce_surv}[golden["loss"]["name"]]
        spec = golden["loss"]
        value = loss(logits, spec["label"], spec["censorship"] == 1, spec["alpha"])
        np.testing.assert_allclose(value.item(), tensors["loss"], rtol=1e-5, atol=1e-5)
        value.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        # of models of published width the golden has norms alone
        sizes = {
            name: tensors[f"gradnorm.{name}"][0]
            if f"gradnorm.{name}" in tensors
            else np.linalg.norm(tensors[f"grad.{name}"])
            for name in gradients
        }
        floor = 1e-4 * max(sizes.values())
        for name, size in sizes.items():
            got = gradients[name].numpy().ravel()
            if f"grad.{name}" in tensors:
                distance = np.linalg.norm(got - tensors[f"grad.{name}"])
            else:
                distance = abs(np.linalg.norm(got) - size)
            assert distance <= 1e-4 * (size + floor), f"{path.stem}: {name} is off by {distance} of {size}"
        seen.add(golden["model"])
    assert seen == set(NAMES)


def pair(name, features=24, dim=32, heads=2):
    torch.manual_seed(0)
    theirs = getattr(reference, name)(features, dim, heads)
    ours = getattr(models, name)(features, dim, heads)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def slide(features=24, sizes=(5, 14, 60), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, n, features, generator=generator) for n in sizes]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_stand_in_the_published_order(name):
    """Optimizers tell parameters apart by their order, and a seed draws in it."""
    published = torch.load(GOLDENS.parent / f"fixtures/models/{name}.pt", weights_only=True)
    ours, theirs = pair(name)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == list(published)
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    torch.manual_seed(3)
    ours = getattr(models, name)(24, 32, 4)
    torch.manual_seed(3)
    theirs = getattr(reference, name)(24, 32, 4)
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", NAMES)
def test_a_drop_in_for_the_published_class(name):
    ours, theirs = pair(name)
    ours.eval(), theirs.eval()
    bags = slide()
    a, b = ours(*bags), theirs(*bags)
    assert a.shape == b.shape == (1, 4)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    a.square().sum().backward(), b.square().sum().backward()
    largest = max(p.grad.norm() for p in theirs.parameters())
    others = dict(theirs.named_parameters())
    for key, p in ours.named_parameters():
        q = others[key]
        assert (p.grad - q.grad).norm() <= 1e-4 * (q.grad.norm() + 1e-4 * largest), key


def test_training_draws_and_evaluation_does_not():
    model, _ = pair("CrossFusion")
    bags = slide()
    model.train()
    assert not torch.equal(model(*bags), model(*bags))
    model.eval()
    assert torch.equal(model(*bags), model(*bags))


def test_a_model_is_copied_and_pickled():
    model, _ = pair("CrossFusion")
    bags = slide()
    model.eval()
    expected = model(*bags)
    assert torch.equal(copy.deepcopy(model)(*bags), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(*bags), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_compiles_whole(name):
    model, _ = pair(name)
    model.train()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for sizes in ((5, 14, 60), (7, 20, 81), (3, 100, 9)):
        compiled(*slide(sizes=sizes)).sum().backward()
    assert len(compilations) == 1, f"{len(compilations)} compilations for three sizes of slide"
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_bag_of_another_shape_is_named(name):
    # of as many features as the model is wide nothing projects them: one column would be repeated
    for features, dim in ((24, 32), (32, 32)):
        model = getattr(models, name)(features, dim, heads=2)
        x5, x10, x20 = bags = slide(features)
        for i in (2,) if name == "CrossFusionSingle" else range(3):
            for wrong, match in (
                (torch.cat([bags[i], bags[i]]), "a bag has shape"),
                (bags[i][:, :0], "with a patch at least"),
                (bags[i][..., :1], rf"expected \[1, patches, {features}\]"),
                (bags[i][..., :0], "a bag has shape"),
                (bags[i][None], "a bag has shape"),
                (bags[i][0, 0], "a bag has shape"),
            ):
                with pytest.raises(ValueError, match=match):
                    model(*bags[:i], wrong, *bags[i + 1 :])
            for wrong in (None, bags[i].tolist(), bags[i].numpy()):
                with pytest.raises(TypeError, match="a bag is of type"):
                    model(*bags[:i], wrong, *bags[i + 1 :])


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_other_sizes_is_refused(name):
    good = {"features": 24, "dim": 32, "heads": 2}
    for key in ("features", "dim", "heads", "layers", "n_classes"):
        for wrong in (0, -1):
            with pytest.raises(ValueError, match=f"{key} is {wrong}"):
                getattr(models, name)(**{**good, key: wrong})
        with pytest.raises(TypeError):
            getattr(models, name)(**{**good, key: 1.5})
    for wrong in ({"dim": 33}, {"heads": 3}, {"dim": 512, "heads": 2}):
        with pytest.raises(ValueError, match="expected an even number, and at most 128 for each head"):
            getattr(models, name)(**{**good, **wrong})


def test_bags_with_and_without_a_batch():
    model, _ = pair("CrossFusion")
    model.eval()
    bags = slide()
    assert torch.equal(model(*bags), model(*(bag[0] for bag in bags)))


def test_bfloat16_and_inference():
    model, _ = pair("CrossFusion")
    model.eval()
    bags = slide()
    expected = model(*bags)
    with torch.inference_mode():
        assert torch.equal(model(*bags), expected)
    half = copy.deepcopy(model).bfloat16()
    assert (half(*(bag.bfloat16() for bag in bags)) - expected).abs().max() < 0.05
    with pytest.raises(ValueError, match="linear: weight is torch.bfloat16"):
        half(*bags)


def test_a_plain_training_loop():
    """Their DataLoader, their Adam, our modules: the trajectory of our own engine, in golden form."""
    t = json.loads((GOLDENS / "trajectory.json").read_text())
    config = {"dim": 512, "heads": 4, "layers": 1, "n_classes": 4, **t["config"]}
    config.pop("fusion", None)
    model = models.CrossFusion(**config)
    model.load_state_dict(
        {
            name: torch.from_numpy(fill(t["fill_tag"] + name, int(np.prod(p["shape"])), p)).view(p["shape"])
            for name, p in t["parameters"].items()
        }
    )
    model.eval()  # the trajectory has no dropout

    class Slides(torch.utils.data.Dataset):
        def __len__(self):
            return len(t["bags"])

        def __getitem__(self, i):
            bags = [
                torch.from_numpy(fill(f"{t['fill_tag']}{i}/{scale}", n * config["features"], t["input_law"])).view(n, -1)
                for scale, n in zip(("x5", "x10", "x20"), t["bags"][i])
            ]
            return (*bags, t["labels"][i], t["censorship"][i])

    loader = torch.utils.data.DataLoader(Slides(), batch_size=1, num_workers=2, multiprocessing_context="fork")
    adam = torch.optim.Adam(model.parameters(), lr=t["lr"], weight_decay=t["weight_decay"])
    steps = iter(t["steps"])
    for _ in range(t["epochs"]):
        for i, (x5, x10, x20, label, censored) in enumerate(loader):
            step = next(steps)
            assert step["slide"] == i
            for group in adam.param_groups:
                group["lr"] = step["lr"]
            logits = model(x5, x10, x20)
            loss = ops.nll_surv(logits, int(label), bool(censored), t["alpha"])
            (loss / t["accumulate"]).backward()
            risk = models.survival(logits)[2].item()
            assert abs(loss.item() - step["loss"]) <= 1e-4 * max(1, abs(step["loss"])), step
            assert abs(risk - step["risk"]) <= 1e-4 * max(1, abs(step["risk"])), step
            if (i + 1) % t["accumulate"] == 0:
                adam.step()
                adam.zero_grad()
    assert next(steps, None) is None


PROGRAMS = pathlib.Path(__file__).resolve().parents[2] / "target/release"


@pytest.mark.skipif(not (PROGRAMS / "cf-train").exists(), reason="cargo build --release has not made cf-train")
def test_a_trained_model_is_loaded(tmp_path):
    """One epoch of the demo: the module's risks are those that the evaluation wrote."""
    settings = ["--embed-dim", "16", "--num-heads", "2", "--num-epochs", "1", "--warmup-epochs", "0"]
    trained = subprocess.run(
        [PROGRAMS / "cf-train", "--demo", *settings], cwd=tmp_path, capture_output=True, text=True
    )
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "runs/demo-1"
    model = models.load(run / "fold_0/best.safetensors").eval()
    with open(run / "predictions.csv") as table:
        rows = [row for row in csv.DictReader(table) if row["fold"] == "0"][:5]
    names = [row["slide_id"] for row in rows]
    bags = crossfusion.read_cohort(run / "cohort/features", names, backbone="synthetic")
    for row in rows:
        x5, x10, x20 = (torch.from_numpy(bags[row["slide_id"]][scale]) for scale in ("x5", "x10", "x20"))
        with torch.no_grad():
            risk = models.survival(model(x5, x10, x20))[2]
        assert risk.item() == pytest.approx(float(row["risk"]), abs=1e-5)
    with pytest.raises(ValueError, match="best.safetensors has 2 attention heads, not 4"):
        models.load(run / "fold_0/best.safetensors", heads=4)
    # a model is told by its content: under another name it keeps its card and its checksum
    data = bytearray((run / "fold_0/best.safetensors").read_bytes())
    (tmp_path / "blob").write_bytes(data)
    assert models.load(tmp_path / "blob").final_transformer.pre_layers.layers[0][1].heads == 2
    data[-1] ^= 1
    (tmp_path / "blob.pt").write_bytes(data)
    with pytest.raises(OSError, match="checksum"):
        models.load(tmp_path / "blob.pt")


def test_a_published_checkpoint_is_loaded(tmp_path):
    for cls in (models.CrossFusion, models.CrossFusionConcat, models.CrossFusionSingle):
        torch.manual_seed(1)
        model = cls(features=12, dim=8, heads=2).eval()
        torch.save(model.state_dict(), tmp_path / "best_model.pt")
        loaded = models.load(tmp_path / "best_model.pt", heads=2).eval()
        bags = [torch.randn(1, n, 12) for n in (3, 5, 9)]
        assert type(loaded) is cls and torch.equal(model(*bags), loaded(*bags))
        assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    before = torch.get_rng_state()
    models.load(tmp_path / "best_model.pt", heads=2)
    assert torch.equal(before, torch.get_rng_state())
    for heads in (0, -1, 10**30):
        with pytest.raises(ValueError, match=f"heads is {heads}"):
            models.load(tmp_path / "best_model.pt", heads=heads)
    state = {name.replace("proj1", "other"): tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(OSError, match="other.pt: .*proj1"):
        models.load(tmp_path / "other.pt", heads=2)
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        models.load("nowhere.pt")
