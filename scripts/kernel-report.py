#!/usr/bin/env python3
"""Writes the table of docs/kernels.md: what the compiled kernels use of a GPU. Run `cargo build` with an nvcc before.

scripts/kernel-report.py             writes the table; dynamic shared memory and bank conflicts stay as they stand in it
scripts/kernel-report.py --launches  finds these two anew: runs tests on the emulator (some minutes)
scripts/kernel-report.py --check     changes nothing; fails if the table is not current, or if
  - a kernel spills registers or has a stack frame, on any GPU that we compile for,
  - nvcc warned,
  - a kernel that multiplies matrices on tensor cores does not load them by cp.async (LDGSTS) and, in bf16, ldmatrix (LDSM), or
    works in another type than its own (bf16, TF32 for f32),
  - a file matmul*.cu or attention*.cu has no such kernel,
  - a kernel of a file *_wgmma.cu, which is for Hopper and bf16, is not wgmma (HGMMA) with cp.async there and a trap elsewhere, or ptxas
    had to order its products (C75..: they run one by one, or it added a wait or a fence),
  - a kernel's dynamic shared memory is not in the table, or, where $CROSSFUSION_EMULATOR_STATS is a file that the emulator
    has written its launches to, is another there, or the kernel is not.

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
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BUILT = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "kernels"
DOCS = ROOT / "docs/kernels.md"
BEGIN, END = "<!-- begin: scripts/kernel-report.py -->\n", "<!-- end -->\n"
STORAGE = ("f32", "bf16")
SASS_OF = ("sm_80", "sm_90a")


def cuobjdump():
    folders = [os.environ.get(v) for v in ("CROSSFUSION_CUDA", "CUDA_HOME", "CUDA_PATH")] + [ROOT / "target/cuda"]
    path = [os.path.join(f, "bin") for f in folders if f] + [os.environ.get("PATH", "")]
    found = shutil.which("cuobjdump", path=os.pathsep.join(path))
    return found or sys.exit("no cuobjdump: scripts/cuda-toolchain.sh installs one")


def run(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


class Launched(NamedTuple):
    """What a kernel's launches on the emulator tell of it."""

    dynamic: int | None  # bytes of shared memory
    conflicts: str  # extra cycles of shared memory that bank conflicts cost, over all launches


class Kernel:
    """One entry point of one fatbin."""

    def __init__(self, symbol):
        self.name, self.storage = symbol.rsplit("_", 1)
        self.registers = {}  # by architecture
        self.static_shared = 0
        self.spills = {}  # architecture -> (stack frame, spill stores, spill loads) in bytes
        self.threads = 0
        self.launched = Launched(None, "?")
        self.uses_dynamic = self.uses_mma = False
        self.sass = {a: {} for a in SASS_OF}  # architecture -> instruction -> count

    def dynamic_shared(self):
        """None: unknown. The PTX of a trap, as on GPUs before Hopper, uses none."""
        return 0 if self.launched.dynamic is None and not self.uses_dynamic else self.launched.dynamic


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
            yield f"{who}: no launch on the emulator, and so no dynamic shared memory: scripts/kernel-report.py --launches"
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


def launches_of(path):
    """Of each kernel that the emulator launched and told the file of."""
    totals = {}
    for line in Path(path).read_text().splitlines():
        symbol, *numbers = line.split()
        dynamic, cycles, extra = map(int, numbers)
        before = totals.get(symbol, (0, 0, 0))
        totals[symbol] = max(before[0], dynamic), before[1] + cycles, before[2] + extra
    percent = lambda extra, cycles: f"{round(100 * extra / cycles)} %" if cycles else "?"
    return {symbol: Launched(dynamic, percent(extra, cycles)) for symbol, (dynamic, cycles, extra) in totals.items()}


def launch_anew():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launches"
        command = "cargo test --release --features emulator --lib -- no_races large_tiles".split()
        subprocess.run(command, cwd=ROOT, check=True, env=dict(os.environ, CROSSFUSION_EMULATOR_STATS=str(path)))
        return launches_of(path)


def launches_in(text):
    """As they stand in the table."""
    rows = re.findall(r"^\| (\w+) \| (f32|bf16) \|.* \+ (\d+) \|.*\| ([^|]*) \|$", text, re.M)
    return {f"{name}_{storage}": Launched(int(dynamic), conflicts) for name, storage, dynamic, conflicts in rows}


def table(found):
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
            k.launched.conflicts if k.static_shared + (dynamic or 0) else "-",
        ]
        yield "| " + " | ".join(map(str, cells)) + " |\n"


def main():
    arguments = sys.argv[1:]
    if arguments not in ([], ["--launches"], ["--check"]):
        sys.exit(__doc__)
    if not (BUILT / "nvcc.txt").exists():
        sys.exit(f"no {BUILT}/nvcc.txt: scripts/cuda-toolchain.sh, then cargo build")
    version, dump = (BUILT / "nvcc.txt").read_text(), cuobjdump()
    todo = [(f.stem, storage) for f in sorted((ROOT / "kernels").glob("*.cu")) for storage in STORAGE]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda t: kernels(*t, dump), todo))
    rows = [k for (stem, _), (found, _) in zip(todo, done, strict=True) if stem != "probes" for k in found]

    text = DOCS.read_text()
    launched = launch_anew() if arguments == ["--launches"] else launches_in(text)
    for k in rows:
        k.launched = launched.get(f"{k.name}_{k.storage}", k.launched)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    new = f"{before}{BEGIN}nvcc {version}, flags of build.rs.\n\n{''.join(table(rows))}{END}{after}"
    if arguments != ["--check"]:
        DOCS.write_text(new)
        return
    errors = [c for t, d in zip(todo, done, strict=True) for c in complaints(*t, *d)]
    tested = os.environ.get("CROSSFUSION_EMULATOR_STATS")
    seen, unseen = launches_of(tested) if tested else launched, []
    for symbol, before in launched.items():
        if symbol not in seen:
            unseen.append(symbol)
        elif seen[symbol].dynamic != before.dynamic:
            errors.append(f"{symbol}: {seen[symbol].dynamic} bytes of dynamic shared memory, {before.dynamic} in the table")
    # one storage is enough: some kernels are of f64 or of bytes in both
    names = {symbol.rsplit("_", 1)[0] for symbol in seen}
    errors.extend(f"{s}: no test launches it on the emulator" for s in unseen if s.rsplit("_", 1)[0] not in names)
    if new != text:
        theirs = re.search(r"nvcc ([\d.]+),", text)
        other = f"; it is of nvcc {theirs[1]}, this one is {version}" if theirs and theirs[1] != version else ""
        errors.append(f"{DOCS.relative_to(ROOT)} is not current: scripts/kernel-report.py{other}")
    print("\n".join(errors) or f"{sum(len(found) for found, _ in done)} kernels: no spills, no stack frames; {DOCS.relative_to(ROOT)} is current")
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
