#!/usr/bin/env python3
"""Breaks one line of a kernel at a time and shows who notices: `scripts/mutants.py > kernels/mutants.txt`, or one kernel's with its name.

Each mutant replaces a piece of text, is built into a copy of the emulator's libraries, and runs the kernel's own tests:
the plain ones (results and schedules) and the race ones. A mutant that nobody catches makes the script fail.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Of each kernel: the tests in plain and in race mode.
TESTS = {
    "cox": (["cox::matches_the_cpu"], ["cox::has_no_races"]),
    "layer_norm": (["layer_norm::matches_the_cpu", "layer_norm::apply_and_in_place"], ["layer_norm::has_no_races"]),
}

# Kernel, what is broken, the text (its first occurrence, or the n-th after #n), what takes its place.
MUTANTS = [
    ("layer_norm", "forward: no row guard", "if (row >= n0) return;", ""),
    ("layer_norm", "forward: no guard on the repeated row", "if (row + n0 < p.y.rows) store", "store"),
    ("layer_norm", "forward: repeated row forgotten", "if (row + n0 < p.y.rows) store", "if (false) store"),
    ("layer_norm", "forward: every lane takes the whole row's sum", "int c = lane * V", "int c = 0"),
    ("layer_norm", "forward: reads a pack past the row", "c < d; c += 32 * V", "c < d + V; c += 32 * V"),
    ("layer_norm", "forward: no sum over the warp", "mean = warp_sum(sum) / float(d);", "mean = sum / float(d);"),
    ("layer_norm", "forward: statistics by every lane", "if (lane == 0) {", "{"),
    ("layer_norm", "forward: two warps write one row's statistics", "p.stats[2 * row] = mean;", "p.stats[2 * (row / 2)] = mean;"),
    ("layer_norm", "forward: warps share a row", "blockIdx.x) * kWarps + int(threadIdx.x) / 32;", "blockIdx.x) * kWarps + int(threadIdx.x) / 64;"),
    ("layer_norm", "backward: no guard on the block", "if (first >= n0) return;", ""),
    ("layer_norm", "backward: no guard on the last row", "min(first + kRowsPerBlock, n0)", "first + kRowsPerBlock"),
    ("layer_norm", "backward: no guard on the repeated row", "row + n0 < p.dy.rows ? p.dy.row(row + n0) : nullptr", "p.dy.row(row + n0)"),
    ("layer_norm", "backward: repeated row forgotten", "row + n0 < p.dy.rows ? p.dy.row(row + n0) : nullptr", "nullptr"),
    ("layer_norm", "backward: sums not cleared", "dweight[c + e * step] = dbias[c + e * step] = 0.f;", ";"),
    ("layer_norm", "backward: all warps add to the first one's sums", "sums + warp * 2 * d,", "sums,"),
    ("layer_norm", "backward: lanes add to each other's columns", "dbias[c / V + e * step] += g.v[e];", "dbias[c / V] += g.v[e];"),
    ("layer_norm", "backward: no __syncthreads before the warps' sums are read", "__syncthreads();", ""),
    ("layer_norm", "backward: __syncwarp instead of __syncthreads", "__syncthreads();", "__syncwarp();"),
    ("layer_norm", "backward: barrier in half of the warps", "__syncthreads();", "if (warp < 4) __syncthreads();"),
    ("layer_norm", "backward: launch gives shared memory for one warp less", "shared.take<float>(kWarps * 2 * d)", "shared.take<float>((kWarps + 1) * 2 * d)"),
    ("layer_norm", "backward: past the end of partial", "c < 2 * d; c += kThreads", "c < 2 * d + 1; c += kThreads"),
    ("layer_norm", "backward: one warp's sums forgotten", "for (int w = 0; w < kWarps; w++)", "for (int w = 1; w < kWarps; w++)"),
    ("layer_norm", "backward: dx before the sums are known", "mean_gx = warp_sum(mean_gx) / float(d);", "mean_gx = mean_gx / float(d);"),
    ("layer_norm", "backward: dbias overwrites dweight's partial sums", "p.partial[int64_t(blockIdx.x) * (2 * d) + c] = total;", "p.partial[int64_t(blockIdx.x) * (2 * d) + in_half] = total;"),
    ("layer_norm", "reduce: no column guard", "if (c < 2 * d)\n", "if (true)\n"),
    ("layer_norm", "reduce: no __syncthreads", "__syncthreads();#1", ""),
    ("layer_norm", "reduce: every warp adds the total", "if (warp > 0 || c >= 2 * d) return;", "if (c >= 2 * d) return;"),
    ("layer_norm", "reduce: no column guard on the result", "if (warp > 0 || c >= 2 * d) return;", "if (warp > 0) return;"),
    ("layer_norm", "reduce: overwrites dweight", "p.dweight[c] += total;", "p.dweight[c] = total;"),
    ("cox", "highest: no sum over the warp", "highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, d));#1", ";"),
    ("cox", "highest: no __syncthreads", "__syncthreads();#3", ""),
    ("cox", "highest: one warp forgotten", "for (int w = 1; w < kThreads / 32; w++)", "for (int w = 2; w < kThreads / 32; w++)"),
    ("cox", "highest: every thread writes", "if (threadIdx.x > 0) return;\n  for (int w = 1", "for (int w = 1"),
    ("cox", "highest of all blocks: no __syncthreads", "__syncthreads();#2", ""),
    ("cox", "highest of all blocks: only the first", "i < blocks; i += kThreads) highest", "i < 1; i += kThreads) highest"),
    ("cox", "scan: lanes join the wrong way round", "mine = join(before, mine);", "mine = join(mine, before);"),
    ("cox", "scan: no lane guard", "if (lane >= d) mine", "mine"),
    ("cox", "scan: first lane keeps its own", "if (lane == 0) before = none<N>();", ""),
    ("cox", "scan: no __syncthreads before the warps' sums are read", "__syncthreads();", ""),
    ("cox", "scan: no __syncthreads before they are written again", "__syncthreads();  // `shared` may be used again", ""),
    ("cox", "scan: earlier warps forgotten", "for (int w = 0; w < warp; w++)", "for (int w = 1; w < warp; w++)"),
    ("cox", "scan: the total lacks the last warp", "for (int w = warp; w < kThreads / 32; w++)", "for (int w = warp; w < kThreads / 32 - 1; w++)"),
    ("cox", "join: a stratum's sum runs on", "k == 0 ? 1u : 2u", "k == 0 ? 0u : 2u"),
    ("cox", "join: a tie's sum runs on", "k == 0 ? 1u : 2u", "k == 0 ? 1u : 0u"),
    ("cox", "join: starts forgotten", "s.starts = before.starts | after.starts;", "s.starts = after.starts;"),
    ("cox", "blocks before: this one too", "const int blocks = int(blockIdx.x), each", "const int blocks = int(blockIdx.x) + 1, each"),
    ("cox", "risk sets: past the end", "place = begin + int(threadIdx.x); place < end", "place = begin + int(threadIdx.x); place < end + 1"),
    ("cox", "risk sets: rows of the next tile", "min(i + kRows, end), of), total, shared[0]);\n    all = join", "i + kRows, of), total, shared[0]);\n    all = join"),
    ("cox", "risk sets: carry between tiles forgotten", "before = join(before, total);", ";"),
    ("cox", "risk sets: every thread writes the total", "if (threadIdx.x == 0) write_total(p, all);", "write_total(p, all);"),
    ("cox", "Efron: ranks from 1", "- 1.0) / set[3]", ") / set[3]"),
    ("cox", "Efron: always", "p.efron ? (p", "true ? (p"),
    ("cox", "hazards: carry between tiles forgotten", "before = join(before, total);#1", ";"),
    ("cox", "hazards: log-likelihood without a barrier", "__syncthreads();#4", ""),
    ("cox", "hazards: one thread's log-likelihood forgotten", "for (int i = 1; i < kThreads; i++) loglik", "for (int i = 2; i < kThreads; i++) loglik"),
    ("cox", "gradient: hazard at the event's own place", "p.hazards + int64_t(p.last[place]) * 2", "p.hazards + int64_t(place) * 2"),
    ("cox", "gradient: events take the whole hazard", "event ? hazard[0] - hazard[1] : hazard[0]", "hazard[0]"),
    ("cox", "gradient: by place", "p.gradient[p.row(place)]", "p.gradient[place]"),
    ("cox", "gradient: weights forgotten", "(event ? p.weight(place) : 0.0)", "(event ? 1.0 : 0.0)"),
    ("cox", "gradient: one block's log-likelihood", "i < int(gridDim.x); i++) loglik", "i < 1; i++) loglik"),
    ("layer_norm", "reduce: last block forgotten", "(p.x.rows + kRowsPerBlock - 1) / kRowsPerBlock", "p.x.rows / kRowsPerBlock"),
]

# As in build.rs.
COMMON = "-std=c++20 -fPIC -fvisibility=hidden -ftls-model=initial-exec -fno-strict-aliasing -w -x c++ -c".split()
MODES = {
    "plain": ["-O2"],
    "race": "-O1 -g -DSIMT_RACE -fsanitize=thread,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined".split(),
}


def built():
    """The test binary and the folder with build.rs's objects."""
    command = "cargo test --release --features emulator --test emulator --no-run --message-format=json"
    lines = subprocess.run(command.split(), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    messages = [json.loads(line) for line in lines]
    test = next(m["executable"] for m in messages if m.get("target", {}).get("name") == "emulator" and m.get("executable"))
    out = next(m["out_dir"] for m in messages if m["reason"] == "build-script-executed" and "CROSSFUSION_EMULATOR_BUILT" in dict(m["env"]))
    return test, Path(out)


def mutate(source, old, new):
    old, _, nth = old.partition("#")
    parts = source.split(old)
    nth = int(nth or 0)
    if len(parts) < nth + 2:
        sys.exit(f"no longer in the kernel: {old!r}")
    return old.join(parts[: nth + 1]) + new + old.join(parts[nth + 1 :])


def build(kernel, source, objects, folder):
    """The two libraries, with `source` in place of the kernel."""
    (folder / f"{kernel}.cu").write_text(source)
    compiler = os.environ.get("CXX", "c++")
    for mode, flags in MODES.items():
        mine = []
        for real in ("f32", "bf16"):
            mine.append(folder / f"{kernel}-{real}-{mode}.o")
            here = ["-I", ROOT / "kernels", f"-ffile-prefix-map={folder}/=kernels/", f"-ffile-prefix-map={ROOT}/="]
            subprocess.run([compiler, *COMMON, *flags, f"-DREAL={real}", *here, folder / f"{kernel}.cu", "-o", mine[-1]], check=True)
        others = [o for o in sorted(objects.glob(f"*-{mode}.o")) if o.name not in {m.name for m in mine}]
        library = folder / f"emulator-{mode}.so"
        subprocess.run([compiler, "-shared", "-pthread", "-o", library, *mine, *others, "-ldl"], check=True)


def noticed(test, filters, folder):
    """What the tests say against the mutant, or None."""
    environment = dict(os.environ, CROSSFUSION_EMULATOR=str(folder), RUST_BACKTRACE="0")
    command = [test, *filters, "--test-threads=1"]
    try:
        done = subprocess.run(command, env=environment, timeout=300, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode == 0:
        return None
    text = done.stdout
    for pattern in (r"thread \d+: (.*)", r"(a kernel wrote outside[^\"]*)", r"\} (\w+: error .*)", r"(.* gives other bits)"):
        if found := re.search(pattern, text):
            return re.sub(r" 0x[0-9a-f]+", "", found[1])
    return f"crash ({done.returncode})" if done.returncode < 0 else "wrong result"


def main():
    mutants = [m for m in MUTANTS if m[0] in (sys.argv[1:] or TESTS)]
    test, objects = built()
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for kernel, name, old, new in mutants:
            build(kernel, mutate((ROOT / f"kernels/{kernel}.cu").read_text(), old, new), objects, folder)
            plain, race = (noticed(test, filters, folder) for filters in TESTS[kernel])
            survivors += not (plain or race)
            print(f"{kernel}: {name}\n    plain: {plain or '-'}\n    race:  {race or '-'}", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} caught")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
