#!/usr/bin/env python3
"""Writes tests/fixtures/files: feature files and checkpoints as PyTorch, h5py and safetensors write them, and broken ones.

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install torch numpy h5py hdf5plugin safetensors
    /tmp/venv/bin/python scripts/make-fixtures.py

The files are committed; run it again only to add one. Every good file holds the same bag (`value` in tests/files.rs),
whose numbers are exact in every float type.
"""

import json
import os
import pathlib
import pickle
import struct
import warnings
import zipfile

import h5py
import hdf5plugin
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
torch.save({"score": np.float64(0.5), "features": bag}, good / "numpy_scalar.pt")

# Tensors whose values are not their storage's.
torch.save(torch._neg_view(-bag), good / "negated.pt")
legacy(torch._neg_view(-bag.half()), good / "negated_legacy_f16.pt")
torch.save({"features": torch.complex(bag + 1, -bag).conj().imag}, good / "imaginary_part_of_a_conjugate.pt")

# A batch of one on the other axis.
torch.save(bag[:, None], good / "batch_in_the_middle.pt")
save_file({"features": bag[:, None].clone()}, good / "batch_in_the_middle.safetensors")
with h5py.File(good / "batch_in_the_middle.h5", "w") as f:
    f.create_dataset("features", data=bag.numpy()[:, None], chunks=(5, 1, 4), compression="gzip", fletcher32=True)

# The other names.
torch.save({"feats": bag, "features_of": "S1"}, good / "feats.pt")
torch.save({"x": bag, "coords": coords.float()}, good / "x.pt")
torch.save({"x": coords[:, 0].float(), "y": coords[:, 1].float(), "features": bag}, good / "x_and_y.pt")
save_file({"embeddings": bag, "coords": coords.float()}, good / "embeddings.safetensors")
with h5py.File(good / "tile_embeds.h5", "w") as f:
    f.create_dataset("tile_embeds", data=bag.numpy())
    f.create_dataset("last_layer_embed", data=bag.numpy().mean(0))

# Python's and numpy's objects beside the features, and as features.
torch.save(
    {
        "features": bag,
        "coords": coords.numpy(),
        "path": pathlib.PurePosixPath("/data/S1.svs"),
        "magnification": np.float32(20),
        "counts": np.arange(3),
        "names": np.array(["a", "b"]),
        "objects": np.array([{}, 1], dtype=object),
        "shape": bag.shape,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "classes": {1, 2},
        "raw": b"abc",
        "mask": bag.to_sparse(),
    },
    good / "dict_of_python_objects.pt",
)
torch.save(bag.numpy(), good / "numpy.pt")
torch.save(bag.numpy(), good / "numpy_protocol5.pt", pickle_protocol=5)
torch.save({"embeddings": bag.numpy()[None]}, good / "numpy_dict.pt")
legacy(np.asfortranarray(bag.numpy().astype(">f8")), good / "numpy_big_endian_columns_legacy.pt")
torch.save((bag, coords), good / "pair.pt")
torch.save([coords.float(), bag[None]], good / "pair_coordinates_first.pt")
tagged = bag.clone()
tagged.mpp = 0.5
torch.save(tagged, good / "tensor_with_attributes.pt")

# HDF5's checksums, filters, layouts and types.
with h5py.File(good / "fletcher32.h5", "w") as f:
    f.create_dataset("features", data=bag.numpy(), chunks=(4, 4), shuffle=True, compression="gzip", fletcher32=True)
with h5py.File(good / "fletcher32_latest.h5", "w", libver="latest") as f:
    f.create_dataset("features", data=bag.numpy(), chunks=(4, FEATURES), maxshape=(None, FEATURES), fletcher32=True)
with h5py.File(good / "fixed_array.h5", "w", libver="latest") as f:
    f.create_dataset("features", data=bag.numpy(), chunks=(2, FEATURES))
with h5py.File(good / "btree2.h5", "w", libver="latest") as f:
    f.create_dataset("features", data=bag.numpy(), chunks=(3, 2), maxshape=(None, None))
with h5py.File(good / "user_block.h5", "w", userblock_size=1024) as f:
    f.create_dataset("features", data=bag.numpy(), chunks=(4, FEATURES))
with h5py.File(good / "compact.h5", "w") as f:
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple((PATCHES, FEATURES))
    h5py.h5d.create(f.id, b"features", h5py.h5t.IEEE_F32LE, space, layout).write(space, space, bag.numpy())
with h5py.File(good / "zeros_and_links.h5", "w") as f:
    f.create_dataset("features", data=bag.numpy(), chunks=(1, 1))  # one of them is zero, and written
    f["x"] = h5py.SoftLink("/features")


def custom_float(size, sign, exponent_at, exponent, mantissa, bias):
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(sign, exponent_at, exponent, 0, mantissa)
    kind.set_precision(8 * size)
    kind.set_size(size)
    kind.set_ebias(bias)
    return kind


def write_custom(path, kind):
    with h5py.File(path, "w") as f:
        space = h5py.h5s.create_simple((PATCHES, FEATURES))
        h5py.h5d.create(f.id, b"features", kind, space).write(space, space, bag.numpy())  # HDF5 converts

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
rezip(good / "f32.pt", bad / "big_endian.pt", replace={"byteorder": b"big"})
rezip(good / "f32.pt", bad / "short_storage.pt", replace={"data/0": bytes(PATCHES * FEATURES)})
save_file({"a": bag, "b": bag + 1}, bad / "two_matrices.safetensors")
save_file({"features": coords}, bad / "int64.safetensors")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch crossfusion_pickle_ran",)


torch.save(Malicious(), bad / "malicious.pt")
(bad / "malicious_plain_pickle.pt").write_bytes(pickle.dumps(Malicious(), protocol=4))


# Names that are none of features.
torch.save({"coords": coords, "embedding": bag}, bad / "dict_of_another_name.pt")
save_file({"tiles": bag.half()[None], "slide_mean": bag.mean(0)}, bad / "another_name.safetensors")
torch.save({"coords": coords.float(), "feature": bag.to(torch.int8)}, bad / "coordinates_alone.pt")
save_file({"coords": coords.float(), "patch_level": coords}, bad / "coordinates_alone.safetensors")
torch.save({"x": coords[:, :1].float(), "y": coords[:, 1:].float()}, bad / "x_and_y.pt")
torch.save({"features": bag, "embeddings": bag[:, :3].clone()}, bad / "two_names.pt")
torch.save({"features": bag.to(torch.int8), "x": bag}, bad / "int8_and_x.pt")
torch.save((bag, bag + 1), bad / "pair_of_bags.pt")

# Tensors that are no plain floats.
torch.save(torch.complex(bag, bag), bad / "complex.pt")
torch.save({"features": torch.complex(bag, bag).conj()}, bad / "conjugate.pt")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.save({"features": torch.quantize_per_tensor(bag, 0.1, 0, torch.quint8)}, bad / "quantized.pt")
    torch.save({"features": bag.to_sparse_csr()}, bad / "sparse_csr.pt")
    torch.save({"features": torch.nested.nested_tensor([bag, bag[:5]])}, bad / "nested.pt")
torch.save(bag.to_sparse(), bad / "sparse.pt")
torch.save({"features": bag.to("meta")}, bad / "meta.pt")
torch.save({"features": bag.to(torch.float8_e4m3fn)}, bad / "float8.pt")
torch.save({"features": bag > 0}, bad / "bool.pt")
torch.save({"features": coords.to(torch.uint16)}, bad / "uint16.pt")
torch.save({"features": coords.numpy()}, bad / "numpy_int64.pt")
torch.save({"features": np.array([["a"]])}, bad / "numpy_text.pt")

# Files that are damaged, or several things at once.


def flip(source, path, at, bit=7):
    data = bytearray(source.read_bytes())
    data[at if at >= 0 else len(data) + at] ^= 1 << bit
    path.write_bytes(data)


def place(path, numbers):
    return path.read_bytes().index(numbers.numpy().tobytes())


flip(good / "f32.pt", bad / "flipped.pt", place(good / "f32.pt", bag) + 3)
flip(good / "sliced_view.pt", bad / "flipped_beside_the_view.pt", place(good / "sliced_view.pt", bag) - 1, 0)
flip(good / "fletcher32_latest.h5", bad / "flipped_fletcher32.h5", place(good / "fletcher32_latest.h5", bag[4:8]) + 3)
(bad / "junk_before.pt").write_bytes(b"junk" + (good / "f32.pt").read_bytes())
(bad / "zip_before.pt").write_bytes((good / "f16.pt").read_bytes() + (good / "f32.pt").read_bytes())
(bad / "junk_behind_legacy.pt").write_bytes((good / "legacy.pt").read_bytes() + b"junk")
(bad / "zip_behind_legacy.pt").write_bytes((good / "legacy.pt").read_bytes() + (good / "f32.pt").read_bytes())
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    with zipfile.ZipFile(good / "f32.pt") as old, zipfile.ZipFile(bad / "member_twice.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
        new.writestr("f32/data/0", (-bag).numpy().tobytes())
    with zipfile.ZipFile(bad / "with_comment.pt", "w") as new, zipfile.ZipFile(good / "f32.pt") as old:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
        new.comment = b"a comment"


def safetensors(path, header, data):
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


entry = {"dtype": "F32", "shape": [PATCHES, FEATURES], "data_offsets": [0, 4 * PATCHES * FEATURES]}
numbers = bag.numpy().tobytes()
archive = (good / "f32.pt").read_bytes()
inside = {"dtype": "U8", "shape": [len(archive)], "data_offsets": [len(numbers), len(numbers) + len(archive)]}
safetensors(bad / "zip_inside.safetensors", {"features": entry, "other": inside}, numbers + archive)
safetensors(bad / "junk_behind.safetensors", {"features": entry}, numbers + b"junk")
hole = {**entry, "data_offsets": [8, 8 + len(numbers)]}
safetensors(bad / "hole.safetensors", {"features": hole}, bytes(8) + numbers)
twin = {**entry, "data_offsets": [4, 4 + len(numbers)]}
safetensors(bad / "overlap.safetensors", {"features": entry, "other": twin}, numbers + bytes(4))
with h5py.File(bad / "zip_in_user_block.h5", "w", userblock_size=2048) as f:
    f.create_dataset("features", data=bag.numpy())
with open(bad / "zip_in_user_block.h5", "r+b") as f:
    f.write(archive)
(bad / "zip_behind.h5").write_bytes((good / "stamp.h5").read_bytes() + archive)

# HDF5 that is sound, and not what is read.
write_custom(bad / "bfloat16.h5", custom_float(2, 15, 7, 8, 7, 127))
write_custom(bad / "float8.h5", custom_float(1, 7, 3, 4, 3, 7))
with h5py.File(bad / "group.h5", "w") as f:
    f.create_dataset("features/uni", data=bag.numpy())
for name, filters in {
    "blosc": hdf5plugin.Blosc(),
    "lz4": hdf5plugin.LZ4(),
    "bitshuffle": hdf5plugin.Bitshuffle(),
    "zstd": hdf5plugin.Zstd(),
    "scaleoffset": {"scaleoffset": 4},
}.items():
    with h5py.File(bad / f"{name}.h5", "w") as f:
        f.create_dataset("features", data=bag.numpy(), chunks=(4, FEATURES), **filters)
with h5py.File(bad / "chunk_never_written.h5", "w") as f:
    f.create_dataset("features", shape=(PATCHES, FEATURES), dtype="f4", chunks=(4, FEATURES))[:8] = bag.numpy()[:8]
with h5py.File(bad / "chunk_never_written_latest.h5", "w", libver="latest") as f:
    features = f.create_dataset(
        "features", shape=(PATCHES, FEATURES), dtype=">f8", chunks=(4, FEATURES), fillvalue=0.5, compression="gzip"
    )
    features[:8] = bag.numpy()[:8]
with h5py.File(bad / "external.h5", "w") as f:
    f.create_dataset("features", data=bag.numpy(), external="external.raw")
os.remove("external.raw")
with h5py.File(bad / "virtual.h5", "w") as f:
    layout = h5py.VirtualLayout((PATCHES, FEATURES), dtype="f4")
    layout[:] = h5py.VirtualSource("clam.h5", "features", (PATCHES, FEATURES))
    f.create_virtual_dataset("features", layout)
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
for name, prefix in {"compiled": "_orig_mod.", "lightning": "model.", "stacked": "module._orig_mod."}.items():
    prefixed = {prefix + key: tensor for key, tensor in state.items()}
    torch.save({"state_dict": prefixed, "epoch": 3} if name == "lightning" else prefixed, checkpoints / f"{name}.pt")
save_file({f"net.module.{key}": tensor for key, tensor in state.items()}, checkpoints / "two_prefixes.safetensors")
flip(checkpoints / "bare.pt", checkpoints / "flipped.pt", place(checkpoints / "bare.pt", state["0.weight"]) + 1)
