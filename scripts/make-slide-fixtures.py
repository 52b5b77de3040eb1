#!/usr/bin/env python3
"""Writes slides/tests/fixtures: what OpenCV and PIL make of random images, and a network.

Needs numpy, onnx, opencv-python-headless, pillow and safetensors. The images are made here; the
tests of crossfusion-slides compare with the results and need none of these packages.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import onnx
from PIL import Image
from safetensors.numpy import save_file

FOLDER = Path(__file__).resolve().parent.parent / "slides/tests/fixtures"


def stained(rng, height, width):
    """An image of soft blobs on bright ground, with noise, as tissue on glass."""
    image = np.full((height, width, 3), rng.integers(215, 250), np.float32)
    y, x = np.mgrid[:height, :width]
    for _ in range(rng.integers(1, 5)):
        centre = rng.uniform(0, 1, 2) * [height, width]
        blob = np.exp(-(((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / rng.uniform(30, 250)))
        image -= blob[..., None] * rng.uniform(0, 140, 3).astype(np.float32)
    image += rng.normal(0, rng.uniform(0, 12), image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def outlines(mask):
    """Points of all contours, their lengths, and the parent of each (-1 for an area)."""
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if not contours:
        kinds = {"points": np.int16, "lengths": np.int32, "parents": np.int32, "areas": np.float64}
        return {
            name: np.zeros((0, 2) if name == "points" else 0, kind) for name, kind in kinds.items()
        }
    return {
        "points": np.concatenate(contours)[:, 0].astype(np.int16),
        "lengths": np.array([len(c) for c in contours], np.int32),
        "parents": hierarchy[0, :, 3].astype(np.int32),
        "areas": np.array([cv2.contourArea(c) for c in contours]),
    }


def opencv(rng, images, masks):
    out = {}
    for i in range(images):
        image = stained(rng, *rng.integers(20, 48, 2))
        saturation = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[:, :, 1]
        case = {"image": image, "saturation": saturation}
        case["threshold"] = np.array(
            [cv2.threshold(saturation, 0, 255, cv2.THRESH_OTSU)[0]], np.float64
        )
        for size in (3, 7, 11):
            case[f"median{size}"] = cv2.medianBlur(saturation, size)
        mask = cv2.threshold(saturation, int(case["threshold"][0]), 255, cv2.THRESH_BINARY)[1]
        case["above"] = mask
        for size in (2, 4, 5):
            case[f"close{size}"] = cv2.morphologyEx(
                mask, cv2.MORPH_CLOSE, np.ones((size, size), np.uint8)
            )
        out |= {f"image{i}.{name}": np.ascontiguousarray(value) for name, value in case.items()}
    for i in range(masks):
        # the last is large enough for OpenCV's seven bits of a label to run over many times
        side = (150, 170) if i == masks - 1 else rng.integers(1, 26, 2)
        noise = rng.random(side)
        mask = ((noise < rng.uniform(0.2, 0.8)) * 255).astype(np.uint8)
        if i % 3 == 1:
            mask = cv2.medianBlur(mask, 3)
        out |= {f"mask{i}.mask": mask} | {
            f"mask{i}.{name}": value for name, value in outlines(mask).items()
        }
        contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        if contours:
            # scaled as CLAM scales them, so that edges are longer than a pixel
            largest = max(contours, key=len)
            scaled = np.array(largest * (16.03, 15.98), dtype="int32")
            corners = scaled[:20, 0]
            middles = (corners[1:] + corners[:-1]) / 2
            points = np.concatenate([rng.integers(-20, 16 * 26, (40, 2)) / 2, corners, middles])
            out[f"mask{i}.polygon"] = np.ascontiguousarray(scaled[:, 0])
            out[f"mask{i}.twice_points"] = (points * 2).astype(np.int32)
            sides = [cv2.pointPolygonTest(scaled, (float(x), float(y)), False) for x, y in points]
            out[f"mask{i}.sides"] = np.array(sides, np.int32)
            out[f"mask{i}.rectangle"] = np.array(cv2.boundingRect(scaled), np.int32)
    return out


def pil(rng):
    out = {}
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    for i, (size, to) in enumerate([(64, 32), (64, 28), (61, 28), (28, 40), (32, 32)]):
        image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        image[: size // 2] = stained(rng, size // 2, size)
        out[f"{i}.image"] = image
        for name, how in filters.items():
            out[f"{i}.{name}"] = np.asarray(Image.fromarray(image).resize((to, to), how))
    return out


def means():
    """A network whose features are the means of red, green and blue."""
    helper, float_ = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["means"]),
        helper.make_node("Flatten", ["means"], ["features"]),
    ]
    images = helper.make_tensor_value_info("images", float_, ["batch", 3, 32, 32])
    features = helper.make_tensor_value_info("features", float_, ["batch", 3])
    graph = helper.make_graph(nodes, "means", [images], [features])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--images", type=int, default=6, help="images for the filters")
    parser.add_argument("--masks", type=int, default=24, help="masks for the contours")
    arguments = parser.parse_args()
    rng = np.random.default_rng(18)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(opencv(rng, arguments.images, arguments.masks), arguments.out / "opencv.safetensors")
    save_file(pil(rng), arguments.out / "pil.safetensors")
    onnx.save(means(), arguments.out / "means.onnx")


if __name__ == "__main__":
    main()
