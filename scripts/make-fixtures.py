#!/usr/bin/env python3
"""Writes tests/fixtures/files: one small bag in every layout that the readers know, and broken ones.

Needs: pip install torch numpy h5py safetensors. The files are committed; run this only to add one.
"""
import os
import sys

import h5py
import numpy as np
import torch
from safetensors.torch import save_file

out = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "../tests/fixtures/files")
os.makedirs(out, exist_ok=True)
bag = torch.sin(torch.arange(11 * 6, dtype=torch.float32)).reshape(11, 6)


def path(name):
    return os.path.join(out, name)


def save(name, value, **options):
    torch.save(value, path(name), **options)


save("f32.pt", bag)
save("legacy.pt", bag, _use_new_zipfile_serialization=False)
save("f16.pt", bag.half())
save("bf16.pt", bag.bfloat16())
save("f64.pt", bag.double())
save("batch_of_one.pt", bag[None])
save("parameter.pt", torch.nn.Parameter(bag))
save("dict.pt", {"features": bag, "coords": torch.zeros(11, 2, dtype=torch.int64)})
save("sliced_view.pt", torch.cat([torch.zeros(3, 6), bag, torch.ones(2, 6)])[3:14])
save("transposed_view.pt", bag.T.contiguous().T)
save_file({"features": bag}, path("features.safetensors"))
save_file({"anything": bag.bfloat16()}, path("bf16.safetensors"))
with h5py.File(path("clam.h5"), "w") as h:
    h.create_dataset("features", data=bag.numpy(), chunks=(1, 6), maxshape=(None, 6))
    h.create_dataset("coords", data=np.zeros((11, 2), np.int32))
with h5py.File(path("trident.h5"), "w") as h:
    h.create_dataset("features", data=bag.numpy()[None], compression="gzip")
with h5py.File(path("stamp_f16.h5"), "w") as h:
    h.create_dataset("feats", data=bag.numpy().astype(np.float16))
with h5py.File(path("lzf_latest.h5"), "w", libver="latest") as h:
    h.create_dataset("patch_embeddings", data=bag.numpy().astype(np.float64), compression="lzf", chunks=(4, 6))

save("empty.pt", bag[:0])
nan = bag.clone()
nan[7, 4] = float("nan")
save("nan.pt", nan)
save("integers.pt", torch.arange(12).reshape(3, 4))
save("three_dimensions.pt", torch.zeros(2, 3, 4))
save("list.pt", [bag])
with open(path("f32.pt"), "rb") as f:
    whole = f.read()
with open(path("truncated.pt"), "wb") as f:
    f.write(whole[: len(whole) // 2])
with open(path("not_a_tensor.pt"), "wb") as f:
    f.write(b"hello")
with open(path("no_features.h5"), "wb") as f:
    pass
with h5py.File(path("no_features.h5"), "w") as h:
    h.create_dataset("coords", data=np.zeros((11, 2), np.int32))


class Malicious:
    def __reduce__(self):
        return os.system, ("echo this must never run",)


save("malicious.pt", Malicious())

weights = {"a.weight": bag, "a.bias": bag[0].double()}
save("state_dict.pt", weights)
save("data_parallel.pt", {"state_dict": {"module." + k: v for k, v in weights.items()}, "epoch": 3})
