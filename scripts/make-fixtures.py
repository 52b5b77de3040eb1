#!/usr/bin/env python3
"""Writes tests/fixtures/files: feature files and checkpoints as PyTorch, h5py and safetensors write them, and broken ones.

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install torch numpy h5py safetensors
    /tmp/venv/bin/python scripts/make-fixtures.py

The files are committed; run it again only to add one. Every good file holds the same bag (`value` in tests/files.rs),
whose numbers are exact in every float type.
"""

import os
import pathlib
import pickle
import zipfile

import h5py
import numpy as np
import torch
from safetensors.torch import save_file

PATCHES, FEATURES = 13, 6
out = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "files"
good, bad, checkpoints = out / "good", out / "bad", out / "checkpoints"
for folder in (good, bad, checkpoints):
    folder.mkdir(parents=True, exist_ok=True)

bag = ((torch.arange(PATCHES * FEATURES) * 7 % 201 - 100) / 64).reshape(PATCHES, FEATURES)
coords = torch.stack([torch.arange(PATCHES) * 256, torch.arange(PATCHES) * 512], dim=1)


def legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def rezip(source, path, compression=zipfile.ZIP_STORED, replace={}):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compression) as new:
        for info in old.infolist():
            name = info.filename.split("/", 1)[1]
            new.writestr(zipfile.ZipInfo(info.filename), replace.get(name, old.read(info)), compression)


def truncate(source, path, share=0.6):
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


# The same bag in every format.
torch.save(bag, good / "f32.pt")
torch.save(bag.half(), good / "f16.pt")
torch.save(bag.bfloat16(), good / "bf16.pt")
torch.save(bag.double(), good / "f64.pt")
torch.save(bag, good / "protocol4.pt", pickle_protocol=4)
torch.save(bag[None], good / "batch_of_one.pt")
torch.save(torch.nn.Parameter(bag), good / "parameter.pt")
torch.save({"features": bag, "coords": coords, "slide": "S1", "mpp": 0.5}, good / "dict.pt")
torch.save({"coords": coords, "embedding": bag}, good / "dict_of_another_name.pt")
torch.save(torch.cat([bag + 1, bag, bag])[PATCHES : 2 * PATCHES], good / "sliced_view.pt")
torch.save(bag.T.contiguous().T, good / "transposed_view.pt")
torch.save(torch.stack([bag, bag + 1], dim=2).reshape(PATCHES, -1)[:, ::2], good / "every_other_column.pt")
torch.save(torch.stack([bag, bag + 1], dim=2).reshape(PATCHES, -1).half()[:, ::2], good / "every_other_column_f16.pt")
torch.save(torch.cat([bag, bag + 1], dim=1)[:, :FEATURES], good / "left_columns.pt")
rezip(good / "f32.pt", good / "deflated.pt", zipfile.ZIP_DEFLATED)
legacy(bag, good / "legacy.pt")
legacy(bag.half(), good / "legacy_f16.pt")
legacy({"coords": coords, "features": bag}, good / "legacy_dict.pt")
save_file({"features": bag}, good / "f32.safetensors")
save_file({"features": bag.bfloat16(), "coords": coords}, good / "bf16.safetensors")
save_file({"tiles": bag.half()[None], "slide_mean": bag.mean(0)}, good / "another_name.safetensors")
with h5py.File(good / "clam.h5", "w") as f:
    f.create_dataset("features", data=bag.numpy(), chunks=(1, FEATURES), maxshape=(None, FEATURES))
    f.create_dataset("coords", data=coords.numpy().astype("int32"), chunks=(1, 2), maxshape=(None, 2))
with h5py.File(good / "trident.h5", "w") as f:
    f.create_dataset("features", data=bag.numpy()[None], chunks=(1, PATCHES, FEATURES), compression="gzip")
    f.create_dataset("coords", data=coords.numpy()[None])
with h5py.File(good / "stamp.h5", "w") as f:
    f.create_dataset("feats", data=bag.half().numpy())
    f.create_dataset("coords", data=coords.numpy() * 0.5)
with h5py.File(good / "latest_lzf.h5", "w", libver="latest") as f:
    f.create_dataset("patch_embeddings", data=bag.numpy(), chunks=(4, FEATURES), compression="lzf", shuffle=True)
with h5py.File(good / "big_endian_f64.h5", "w") as f:
    f.create_dataset("features", data=bag.numpy().astype(">f8"))

# Files that must be refused, each for one reason.
torch.save(bag[:0], bad / "empty.pt")
spoiled = bag.clone()
spoiled[4, 2] = float("nan")
torch.save(spoiled, bad / "nan.pt")
spoiled[4, 2] = float("-inf")
save_file({"features": spoiled.half()}, bad / "infinite.safetensors")
spoiled = bag.double()
spoiled[12, 5] = 1e300
torch.save(spoiled, bad / "too_large_for_f32.pt")
truncate(good / "f32.pt", bad / "truncated.pt")
truncate(good / "legacy.pt", bad / "truncated_legacy.pt")
truncate(good / "f32.safetensors", bad / "truncated.safetensors")
truncate(good / "stamp.h5", bad / "truncated.h5", 0.5)
(bad / "not_a_tensor.pt").write_bytes(b"hello")
(bad / "no_bytes.pt").write_bytes(b"")
torch.save(coords, bad / "int64.pt")
torch.save(bag[0], bad / "one_dimension.pt")
torch.save(torch.stack([bag, bag]), bad / "batch_of_two.pt")
torch.save(bag[:1].expand(1 << 40, FEATURES), bad / "expanded.pt")
torch.save([bag], bad / "list.pt")
torch.save({"features": "see the other file"}, bad / "features_are_text.pt")
torch.save({"score": np.float64(0.5), "features": bag}, bad / "numpy_scalar.pt")
rezip(good / "f32.pt", bad / "big_endian.pt", replace={"byteorder": b"big"})
rezip(good / "f32.pt", bad / "short_storage.pt", replace={"data/0": bytes(PATCHES * FEATURES)})
save_file({"a": bag, "b": bag + 1}, bad / "two_matrices.safetensors")
save_file({"features": coords}, bad / "int64.safetensors")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch crossfusion_pickle_ran",)


torch.save(Malicious(), bad / "malicious.pt")
(bad / "malicious_plain_pickle.pt").write_bytes(pickle.dumps(Malicious(), protocol=4))
with h5py.File(bad / "int64.h5", "w") as f:
    f.create_dataset("features", data=coords.numpy())
with h5py.File(bad / "no_features.h5", "w") as f:
    f.create_dataset("coords", data=coords.numpy())
with h5py.File(bad / "empty.h5", "w") as f:
    f.create_dataset("features", shape=(0, FEATURES), dtype="f4", chunks=(1, FEATURES), maxshape=(None, FEATURES))
with h5py.File(bad / "nan.h5", "w") as f:
    f.create_dataset("features", data=np.where(np.arange(PATCHES)[:, None] == 9, np.nan, bag.numpy()))
with h5py.File(bad / "never_written.h5", "w") as f:
    f.create_dataset("features", shape=(1 << 30, FEATURES), dtype="f4", chunks=(1, FEATURES))
with h5py.File(bad / "external_link.h5", "w") as f:
    f["features"] = h5py.ExternalLink("../good/clam.h5", "/features")

# A checkpoint in every wrapping; `running_mean` and the integer `num_batches_tracked` are buffers.
torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
with torch.no_grad():
    model[0].weight.copy_(torch.arange(6).reshape(2, 3) / 4)
state = model.state_dict()
torch.save(state, checkpoints / "bare.pt")
torch.save({f"module.{name}": tensor for name, tensor in state.items()}, checkpoints / "data_parallel.pt")
adam = torch.optim.Adam(model.parameters()).state_dict()
torch.save({"epoch": 3, "model_state_dict": state, "optimizer": adam, "best": None}, checkpoints / "nested.pt")
legacy(state, checkpoints / "legacy.pt")
save_file(state, checkpoints / "bare.safetensors")
torch.save({**state, "0.bias": torch.tensor([1.0, float("nan")])}, checkpoints / "nan.pt")
