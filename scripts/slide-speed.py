#!/usr/bin/env python3
"""Times `cf-slide embed` and a plain Python loop in turn, reading alone and the whole.

    cargo build --release -p crossfusion-slides --bins --examples
    scripts/slide-speed.py PATCHES BACKBONE.onnx

The Python loop is what people write: openslide reads a patch, Pillow resizes it to 256 pixels and
to the network's input, numpy normalises it, onnxruntime runs batches of 32. Both read the same
patches with the same OpenSlide and give the same features. It needs openslide-python,
openslide-bin, onnxruntime, h5py, numpy and Pillow.
"""

import argparse
import csv
import os
import shutil
import subprocess
import tempfile
import time
import tomllib
from pathlib import Path

import h5py
import numpy as np
import onnxruntime
import openslide
import openslide_bin
from PIL import Image

TARGET = Path(__file__).resolve().parent.parent / "target/release"
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def patches(folder, recipe):
    """Every patch of a folder of `cf-slide patch`, as the network takes it."""
    mean, std = (np.array(recipe[name], np.float32)[:, None, None] for name in ("mean", "std"))
    side, filter_ = recipe["input"], FILTERS[recipe["interpolation"]]
    for row in csv.DictReader((folder / "slides.csv").open()):
        if row["status"] != "patched":
            continue
        slide = openslide.OpenSlide(row["path"])
        for scale in ("x5", "x10", "x20"):
            file = folder / scale / "patches" / f"{Path(row['path']).stem}.h5"
            if not file.exists():
                continue
            with h5py.File(file) as h5:
                corners, size = h5["coords"][:], int(h5["coords"].attrs["patch_size"])
            for x, y in corners:
                image = slide.read_region((int(x), int(y)), 0, (size, size)).convert("RGB")
                image = image.resize((256, 256), Image.Resampling.BICUBIC).resize(
                    (side, side), filter_
                )
                yield (np.asarray(image, np.float32).transpose(2, 0, 1) / 255 - mean) / std


def python(folder, recipe, session):
    """Patches and seconds of the Python loop; without a session it reads alone."""
    start, count, batch = time.perf_counter(), 0, []
    for patch in patches(folder, recipe):
        count += 1
        if session:
            batch.append(patch)
            if len(batch) == 32:
                session.run(None, {"images": np.stack(batch)})
                batch = []
    if batch:
        session.run(None, {"images": np.stack(batch)})
    return count, time.perf_counter() - start


def ours(folder, onnx, whole, threads):
    """Patches and seconds of this project, whose start and loading of the network count too."""
    library = Path(openslide_bin.__file__).parent / "libopenslide.so.1"
    environment = os.environ | {"CROSSFUSION_OPENSLIDE": str(library)}
    if not whole:
        command = [TARGET / "examples/reading", folder, onnx.with_suffix(".toml"), str(threads)]
        count, seconds = subprocess.run(
            command, env=environment, check=True, capture_output=True
        ).stdout.split()
        return int(count), float(seconds)
    out = tempfile.mkdtemp()
    start = time.perf_counter()
    command = [
        TARGET / "cf-slide",
        "embed",
        folder,
        "--backbone",
        onnx,
        "--out",
        out,
        "--threads",
        str(threads),
    ]
    said = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return int(said.split("(")[1].split()[0]), seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("patches", type=Path)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    recipe = tomllib.loads(arguments.onnx.with_suffix(".toml").read_text())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    session = onnxruntime.InferenceSession(
        str(arguments.onnx), options, providers=["CPUExecutionProvider"]
    )
    runs = {
        "reading, Python": lambda: python(arguments.patches, recipe, None),
        "reading, cf-slide": lambda: ours(
            arguments.patches, arguments.onnx, False, arguments.threads
        ),
        "whole, Python": lambda: python(arguments.patches, recipe, session),
        "whole, cf-slide": lambda: ours(arguments.patches, arguments.onnx, True, arguments.threads),
    }
    seconds = {name: [] for name in runs}
    for _ in range(arguments.repeat):
        for name, run in runs.items():
            count, taken = run()
            seconds[name].append(taken)
    print(
        f"{count} patches, {arguments.threads} threads, OpenSlide {openslide.__library_version__}, "
        f"ONNX Runtime {onnxruntime.__version__}; {arguments.repeat} runs in turn, patches/s"
    )
    rates = {name: [count / s for s in sorted(taken)] for name, taken in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:18} best {rate[0]:7.1f}, median {rate[len(rate) // 2]:7.1f}")
    for what in ("reading", "whole"):
        ours_, python_ = rates[what + ", cf-slide"], rates[what + ", Python"]
        middle = len(ours_) // 2
        best, median = ours_[0] / python_[0], ours_[middle] / python_[middle]
        print(f"{what}: {best:.2f} times Python's best, {median:.2f} times its median")


if __name__ == "__main__":
    main()
