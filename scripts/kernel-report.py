#!/usr/bin/env python3
"""Writes the table of docs/kernels.md: what the compiled kernels use of a GPU. Run `cargo build` with an nvcc before.

scripts/kernel-report.py           writes the table; bank conflicts stay as they stand in it
scripts/kernel-report.py --banks   counts bank conflicts anew: runs the race tests on the emulator (some minutes)
scripts/kernel-report.py --check   changes nothing; fails if the table is not current, or if
  - a kernel spills registers or has a stack frame, on any GPU that we compile for,
  - nvcc warned,
  - a kernel that multiplies matrices on tensor cores does not load them by cp.async (LDGSTS) and, in bf16, ldmatrix (LDSM), or
    works in another type than its own (bf16, TF32 for f32),
  - a file matmul*.cu or attention*.cu has no such kernel,
  - a kernel of a file *_wgmma.cu, which is for Hopper and bf16, is not wgmma (HGMMA) with cp.async there and a trap elsewhere, or ptxas
    had to order its products (C75..: they run one by one, or it added a wait or a fence),
  - a kernel's dynamic shared memory is not in DYNAMIC below.

Reads target/kernels (or $CARGO_TARGET_DIR/kernels), where build.rs leaves fatbins and what ptxas said, and cuobjdump.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "kernels"
DOCS = ROOT / "docs/kernels.md"
BEGIN, END = "<!-- begin: scripts/kernel-report.py -->\n", "<!-- end -->\n"
STORAGE = ("f32", "bf16")
SASS_OF = ("sm_80", "sm_90a")

# Bytes of dynamic shared memory that a kernel's launch asks for, at the published model's sizes (d = 512): (f32, bf16).
DYNAMIC = {
    "attention_forward_32": (24576, 20480),
    "attention_forward_64": (49152, 40960),
    "attention_forward_128": (98304, 81920),
    "attention_forward_wgmma_128": (0, 163840),
    "attention_dkv_32": (35328, 19456),
    "attention_dkv_64": (68096, 35840),
    "attention_dkv_128": (101120, 68608),
    "attention_dqkv_32": (43520, 23552),
    "attention_dqkv_64": (76288, 39936),
    "attention_dqkv_128": (101120, 72704),
    "attention_dq_32": (32768, 16384),
    "attention_dq_64": (65536, 32768),
    "attention_dq_128": (98304, 65536),
    "conv_fusion_backward": (37828, 37828),
    "conv_fusion_backward_sequence": (9884, 9884),
    "conv_fusion_backward_single": (37828, 37828),
    "conv_fusion_backward_single_sequence": (9884, 9884),
    "conv_fusion_forward": (68420, 68420),
    "conv_fusion_forward_sequence": (18076, 18076),
    "conv_fusion_forward_single": (68420, 68420),
    "conv_fusion_forward_single_sequence": (18076, 18076),
    "matmul_forward": (98304, 98304),
    "matmul_forward_small": (49152, 49152),
    "matmul_backward_input": (98304, 98304),
    "matmul_backward_input_small": (49152, 49152),
    "matmul_backward_weight": (98304, 98304),
    "matmul_backward_weight_small": (49152, 49152),
    "matmul_forward_wgmma": (0, 98304),
    "matmul_backward_input_wgmma": (0, 98304),
    "matmul_backward_weight_wgmma": (0, 98304),
    "ppeg_backward": (68420, 37444),
    "ppeg_forward": (68420, 37444),
}


def cuobjdump():
    folders = [os.environ.get(v) for v in ("CROSSFUSION_CUDA", "CUDA_HOME", "CUDA_PATH")] + [ROOT / "target/cuda"]
    path = [os.path.join(f, "bin") for f in folders if f] + [os.environ.get("PATH", "")]
    found = shutil.which("cuobjdump", path=os.pathsep.join(path))
    return found or sys.exit("no cuobjdump: scripts/cuda-toolchain.sh installs one")


def run(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


class Kernel:
    """One entry point of one fatbin."""

    def __init__(self, symbol):
        self.name, self.storage = symbol.rsplit("_", 1)
        self.registers = {}  # by architecture
        self.static_shared = 0
        self.spills = {}  # architecture -> (stack frame, spill stores, spill loads) in bytes
        self.threads = 0
        self.uses_dynamic = self.uses_mma = False
        self.sass = {a: {} for a in SASS_OF}  # architecture -> instruction -> count

    def dynamic_shared(self):
        """None: unknown."""
        if self.name in DYNAMIC:
            return DYNAMIC[self.name][STORAGE.index(self.storage)]
        return None if self.uses_dynamic else 0

    def count(self, architecture, prefix):
        return sum(n for i, n in self.sass[architecture].items() if i.startswith(prefix))

    def blocks(self):
        """How many blocks an H100's multiprocessor holds (CUDA programming guide, compute capability 9.0; cuda_occupancy.h)."""
        shared = self.dynamic_shared()
        if shared is None:
            return None
        warps = -(-self.threads // 32)
        per_warp = -(-self.registers["sm_90a"] * 32 // 256) * 256  # registers are given to warps in units of 256,
        by_registers = 65536 // 4 // per_warp * 4 // warps  # from four files of 16 K
        a_block = -(-(self.static_shared + shared) // 128) * 128 + 1024  # 1 KiB of each block is the system's
        return min(by_registers, 64 // warps, 32, 228 * 1024 // a_block)


def kernels(stem, storage, dump):
    """The kernels of one file in one storage type, in the order of the source, and ptxas's text."""
    fatbin = BUILT / f"{stem}_{storage}.fatbin"
    sources = [ROOT / f"kernels/{stem}.cu", *(ROOT / "kernels").glob("*.cuh")]
    if not fatbin.exists() or any(s.stat().st_mtime > fatbin.stat().st_mtime for s in sources):
        sys.exit(f"{fatbin} is missing or older than its source: cargo build, with an nvcc")

    found = {}
    for entry in run(dump, "-ptx", fatbin).split(".visible .entry ")[1:]:
        kernel = found[entry[: entry.index("(")]] = Kernel(entry[: entry.index("(")])
        kernel.threads = int(re.search(r"\.maxntid (\d+)", entry)[1])
        kernel.uses_dynamic = "gpu_dynamic_shared" in entry
        kernel.uses_mma = "mma.sync" in entry

    report = fatbin.with_suffix(".ptxas").read_text()
    for section in report.split("Compiling entry function ")[1:]:
        symbol, architecture = re.match(r"'(\w+)' for '(\w+)'", section).groups()
        kernel = found[symbol]
        kernel.registers[architecture] = int(re.search(r"Used (\d+) registers", section)[1])
        kernel.static_shared = max(kernel.static_shared, *map(int, re.findall(r"(\d+) bytes smem", section)), 0)
        # of the entry and of functions that were not inlined
        sizes = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", section)
        kernel.spills[architecture] = tuple(max(map(int, column)) for column in zip(*sizes, strict=True))

    for architecture in SASS_OF:
        for function in run(dump, "-sass", "-arch", architecture, fatbin).split("Function : ")[1:]:
            counts = found[function.split()[0]].sass[architecture]
            for instruction in re.findall(r"\b(?:HMMA|HGMMA|LDSM|LDGSTS)[.\w]*", function):
                counts[instruction] = counts.get(instruction, 0) + 1
    in_source = (ROOT / f"kernels/{stem}.cu").read_text()
    order = lambda k: re.search(rf"KERNEL(_BLOCKS)?\({k.name},", in_source).start()
    return sorted(found.values(), key=order), report


def complaints(stem, storage, found, report):
    for line in report.splitlines():
        if "warning" in line and not line.startswith("Remark"):
            yield f"{stem}, {storage}: {line}"
        if "(C75" in line and stem != "probes":
            yield f"{stem}, {storage}: {line}"
    for k in found:
        who = f"{k.name}_{k.storage}"
        for architecture, sizes in k.spills.items():
            if any(sizes):
                yield f"{who}, {architecture}: stack frame {sizes[0]}, spill stores {sizes[1]}, spill loads {sizes[2]} bytes"
        if stem == "probes":
            continue
        if k.dynamic_shared() is None:
            yield f"{who}: give its dynamic shared memory in DYNAMIC, scripts/kernel-report.py"
        if k.uses_mma:
            mma = "TF32" if k.storage == "f32" else "BF16"
            for a in SASS_OF:
                if not (any(i.startswith("HMMA") for i in k.sass[a]) and all(mma in i for i in k.sass[a] if i.startswith("HMMA"))):
                    yield f"{who}, {a}: HMMA in {mma} expected, found {sorted(k.sass[a])}"
                if not k.count(a, "LDGSTS"):
                    yield f"{who}, {a}: multiplies matrices without cp.async (LDGSTS)"
                if k.storage == "bf16" and not k.count(a, "LDSM"):
                    yield f"{who}, {a}: multiplies matrices without ldmatrix (LDSM)"
        if stem.endswith("_wgmma"):
            if not (k.count("sm_90a", "HGMMA") and k.count("sm_90a", "LDGSTS")) or k.count("sm_90a", "HMMA"):
                yield f"{who}, sm_90a: HGMMA and LDGSTS alone expected, found {sorted(k.sass['sm_90a'])}"
            if k.sass["sm_80"]:
                yield f"{who}, sm_80: a trap expected, found {sorted(k.sass['sm_80'])}"
    if stem.endswith("_wgmma"):
        if bool(found) != (storage == "bf16"):
            yield f"{stem}, {storage}: {len(found)} kernels"
    elif stem.startswith(("matmul", "attention")) and not any(k.uses_mma for k in found):
        yield f"{stem}, {storage}: no kernel uses tensor cores"


def count_conflicts():
    """Of each kernel the extra cycles of shared memory that bank conflicts cost, over all the emulator's race tests."""
    totals = {}
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        command = "cargo test --release --features emulator --lib no_races".split()
        subprocess.run(command, cwd=ROOT, check=True, env=dict(os.environ, CROSSFUSION_EMULATOR_STATS=str(counts)))
        for line in counts.read_text().splitlines():
            symbol, cycles, extra = line.split()
            before = totals.get(symbol, (0, 0))
            totals[symbol] = before[0] + int(cycles), before[1] + int(extra)
    return {symbol: f"{round(100 * extra / cycles)} %" for symbol, (cycles, extra) in totals.items() if cycles}


def conflicts_of(text):
    """As they stand in the table."""
    rows = re.findall(r"^\| (\w+) \| (f32|bf16) \|.*\| ([^|]*) \|$", text, re.M)
    return {f"{name}_{storage}": last for name, storage, last in rows}


def table(found, conflicts):
    yield "| kernel | storage | registers sm_80 / sm_90 | threads | shared memory, static + dynamic | blocks per SM | stack, spills | HMMA or HGMMA, LDSM, LDGSTS sm_80 | sm_90 | bank conflicts |\n"
    yield "|---|---|---|---|---|---|---|---|---|---|\n"
    for k in found:
        dynamic, blocks = k.dynamic_shared(), k.blocks()
        counts = [" ".join(str(k.count(a, i)) for i in (("HMMA", "HGMMA"), "LDSM", "LDGSTS")) for a in SASS_OF]
        stack, spills = max(s[0] for s in k.spills.values()), max(s[1] + s[2] for s in k.spills.values())
        cells = [
            k.name,
            k.storage,
            f"{k.registers['sm_80']} / {k.registers['sm_90a']}",
            k.threads,
            f"{k.static_shared} + {'?' if dynamic is None else dynamic}",
            "?" if blocks is None else blocks,
            f"{stack}, {spills}",
            *("-" if c == "0 0 0" else c for c in counts),
            conflicts.get(f"{k.name}_{k.storage}", "?") if k.static_shared + (dynamic or 0) else "-",
        ]
        yield "| " + " | ".join(map(str, cells)) + " |\n"


def main():
    arguments = sys.argv[1:]
    if arguments not in ([], ["--banks"], ["--check"]):
        sys.exit(__doc__)
    if not (BUILT / "nvcc.txt").exists():
        sys.exit(f"no {BUILT}/nvcc.txt: scripts/cuda-toolchain.sh, then cargo build")
    version, dump = (BUILT / "nvcc.txt").read_text(), cuobjdump()
    todo = [(f.stem, storage) for f in sorted((ROOT / "kernels").glob("*.cu")) for storage in STORAGE]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda t: kernels(*t, dump), todo))
    rows = [k for (stem, _), (found, _) in zip(todo, done, strict=True) if stem != "probes" for k in found]

    text = DOCS.read_text()
    conflicts = count_conflicts() if arguments == ["--banks"] else conflicts_of(text)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    new = f"{before}{BEGIN}nvcc {version}, flags of build.rs.\n\n{''.join(table(rows, conflicts))}{END}{after}"
    if arguments != ["--check"]:
        DOCS.write_text(new)
        return
    errors = [c for t, d in zip(todo, done, strict=True) for c in complaints(*t, *d)]
    if new != text:
        theirs = re.search(r"nvcc ([\d.]+),", text)
        other = f"; it is of nvcc {theirs[1]}, this one is {version}" if theirs and theirs[1] != version else ""
        errors.append(f"{DOCS.relative_to(ROOT)} is not current: scripts/kernel-report.py{other}")
    print("\n".join(errors) or f"{sum(len(found) for found, _ in done)} kernels: no spills, no stack frames; {DOCS.relative_to(ROOT)} is current")
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
