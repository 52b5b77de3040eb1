#!/usr/bin/env python3
"""Predicts a training step on an H100, kernel by kernel, from the machine code: no GPU is asked.

scripts/predict-step.py           writes the tables of docs/kernels.md
scripts/predict-step.py --check   changes nothing; fails if they are not current, and names each
                                  loop that has grown by more than 3 %

Wants a build with an nvcc (`cargo build --release --bins`): it reads target/kernels, the launches
of `cf-bench plan --launches`, the layouts of docs/launching.md, and docs/kernels.md for blocks a
multiprocessor.

A block's main loop costs what its busiest part costs, and a fifth of what the other parts cost,
which they do not wholly hide: instructions issued, shared memory, tensor cores, exponentials.
Blocks are laid on 132 multiprocessors in their order, so that tails count. Kernels without a
product cost their traffic.
"""

import heapq
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
DOCS = ROOT / "docs/kernels.md"
BEGIN, END = "<!-- begin: scripts/predict-step.py -->\n", "<!-- end: scripts/predict-step.py -->\n"
GROWTH = 0.03  # of a loop's instructions

# An H100 SXM (NVIDIA's white paper), by cycle and multiprocessor.
CLOCK, PROCESSORS = 1.755e9, 132
ISSUED, SHARED_BYTES, EXPONENTIALS = 4, 128, 16
WGMMA_FLOP = 4096  # bf16
MMA_FLOP = 0.62 * WGMMA_FLOP  # mma.sync reaches no more (Luo et al. 2024, arXiv:2402.13499)
PER_WARP = 0.45  # instructions a cycle that one warp alone issues, by the latency of its registers
HIDDEN = 0.8  # of what is not the busiest part
# cycles of a block of 128 x 128: until its first stage has landed, and to finish its accumulators
PROLOGUE, EPILOGUE = 1200, 2500
MEMORY, LAUNCH = 2.6e12, 2e-6  # bytes a second that a kernel of many rows reaches; seconds a launch


# ---- launches


def layouts():
    """Structs of docs/launching.md: name -> (bytes, [(offset, type, field, [count, ...])])."""
    found = {}
    for block in re.findall(r"```text\n(.*?)```", (ROOT / "docs/launching.md").read_text(), re.S):
        for line in block.splitlines():
            if head := re.fullmatch(r"(\w+), (\d+) bytes", line):
                fields = found.setdefault(head[1], (int(head[2]), []))[1]
            elif field := re.match(r" *(\d+)  (.+?) (\w+)((?:\[\d+\])*)(?:  //.*)?$", line):
                counts = [int(n) for n in re.findall(r"\d+", field[4])]
                fields.append((int(field[1]), field[2], field[3], counts))
    return found


def decoded(structs, kind, data, real):
    """The value of a C++ type at the start of `data`, and its bytes; `real` has as many."""
    kind = kind.removeprefix("const ")
    if kind.endswith("*"):
        return int.from_bytes(data[:8], "little"), 8
    if kind in ("int32_t", "uint32_t", "float"):
        return int.from_bytes(data[:4], "little"), 4
    if kind in ("int64_t", "uint64_t"):
        return int.from_bytes(data[:8], "little"), 8
    name, _, element = kind.rstrip(">").partition("<")
    size, fields = structs[name]
    value = {"element": 4 if "float" in element else real}
    for offset, field_kind, field, counts in fields:
        if counts:
            values, at = [], offset
            for _ in range(math.prod(counts)):
                one, step = decoded(structs, field_kind, data[at:], real)
                values.append(one)
                at += step
            value[field] = values
        else:
            value[field] = decoded(structs, field_kind, data[offset:], real)[0]
    return value, size


def launches(precision):
    command = [
        BUILT / "release/cf-bench",
        "plan",
        "--device",
        "hopper",
        "--precision",
        precision,
        "--launches",
    ]
    structs = layouts()
    parameters = {}
    for names, kind in re.findall(
        r"^(`.*`): \((\w+)[^)]*\)$", (ROOT / "docs/launching.md").read_text(), re.M
    ):
        parameters |= {name: kind for name in re.findall(r"`(\w+)`", names)}
    for line in subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines():
        launch = json.loads(line)
        launch["name"], _, storage = launch["kernel"].rpartition("_")
        data = bytes.fromhex(launch["arguments"][0])
        launch["argument"] = decoded(
            structs, parameters[launch["name"]], data, 2 if storage == "bf16" else 4
        )[0]
        yield launch


def problems(launch):
    """Of a table, those that are there; else the argument itself."""
    argument = launch["argument"]
    if "problem" not in argument:
        return [argument]
    return argument["problem"][: argument.get("count", len(argument["problem"]))]


def traffic(value):
    """Bytes of all matrices of an argument."""
    if isinstance(value, list):
        return sum(map(traffic, value))
    if not isinstance(value, dict):
        return 0
    if "rows" in value and "stride" in value:
        return value["rows"] * value["cols"] * value["element"] if value["data"] else 0
    return sum(map(traffic, value.values()))


# ---- machine code


def machine_code(stem, storage):
    """Kernels of a file: symbol -> [(address, instruction)]."""
    folders = [os.environ.get(v) for v in ("CROSSFUSION_CUDA", "CUDA_HOME", "CUDA_PATH")] + [
        ROOT / "target/cuda"
    ]
    path = os.pathsep.join(
        [os.path.join(f, "bin") for f in folders if f] + [os.environ.get("PATH", "")]
    )
    dump = shutil.which("cuobjdump", path=path) or sys.exit(
        "no cuobjdump: scripts/cuda-toolchain.sh installs one"
    )
    fatbin = BUILT / f"kernels/{stem}_{storage}.fatbin"
    text = subprocess.run(
        [dump, "-sass", "-arch", "sm_90a", fatbin], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    for part in text.split("Function : ")[1:]:
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", part)
        yield (
            part.split()[0],
            [(int(address, 16), instruction.strip()) for address, instruction in lines],
        )


def count(code, pattern):
    return sum(bool(re.search(rf"\b(?:{pattern})\b", instruction)) for _, instruction in code)


class Loop:
    """A kernel's main loop, by what one turn of it executes in a warp."""

    def __init__(self, code, copies, products, draws, dropout):
        """`copies`, `products`, `draws`: LDGSTS, HMMA and calls of Philox that a turn needs.

        Inner loops run as often as that takes.
        """
        at = {address: i for i, (address, _) in enumerate(code)}
        jumps = []
        for i, (_, instruction) in enumerate(code):
            if target := re.search(r"\bBRA(?:\.\S+)? (?:!?U?P\w+, )?0x([0-9a-f]+)", instruction):
                jumps.append((i, at.get(int(target[1], 16), len(code))))
        back = [(to, i) for i, to in jumps if to < i]
        multiplies = lambda loop: count(code[loop[0] : loop[1] + 1], r"H(?:G?)MMA[.\w]*")
        first, last = max(filter(multiplies, back), key=lambda loop: loop[1] - loop[0])
        weight = [1.0] * len(code)
        inner = [loop for loop in back if first < loop[0] and loop[1] < last]
        # a call of Philox has 14 wide products
        wide = r"IMAD\.(?:WIDE|HI)[.\w]*"
        for pattern, need in (
            (r"LDGSTS[.\w]*", copies),
            (r"HMMA[.\w]*", products),
            (wide, 13 * draws),
        ):
            most = 10 if pattern == wide else 0
            holding = [(a, b) for a, b in inner if count(code[a : b + 1], pattern) > most]
            inside = sum(count(code[a : b + 1], pattern) for a, b in holding)
            if inside:
                outside = 0 if pattern == wide else count(code[first : last + 1], pattern) - inside
                for a, b in holding:
                    weight[a : b + 1] = [(need - outside) / inside] * (b + 1 - a)
        # what a branch skips: loads come every turn, the generator with dropout; edges and the
        # bias's sums seldom
        for i, to in jumps:
            if first <= i < to <= last and to - i > 20:
                skipped = code[i + 1 : to]
                drawing = count(skipped, wide) > 10 and dropout
                runs = drawing or count(skipped, r"LDGSTS[.\w]*|HG?MMA[.\w]*|STG[.\w]*")
                if not runs:
                    weight[i + 1 : to] = [0.0] * (to - i - 1)
        self.instructions = sum(weight[first : last + 1])
        body = list(zip(code[first : last + 1], weight[first : last + 1], strict=True))
        executed = lambda pattern: sum(
            w for (_, i), w in body if re.search(rf"\b(?:{pattern})\b", i)
        )
        self.exponentials = executed(r"MUFU[.\w]*")
        # cycles of 128 bytes: a matrix of ldmatrix is one, other accesses by their width; wgmma
        # reads its right operand there, and 64 x 16 of the left one unless that is in registers
        self.wavefronts = sum(
            w
            * (
                4
                if ".128" in i or ".4" in i or ".M88.4" in i
                else 2
                if ".64" in i or ".2" in i
                else 1
            )
            for (_, i), w in body
            if re.search(r"\b(?:LDSM|LDS|STS|LDGSTS)\b", i)
        )
        for (_, instruction), w in body:
            if shape := re.search(r"HGMMA\.64x(\d+)x16[.\w]* \w+, (\w+)", instruction):
                read = 32 * int(shape[1]) + (2048 if shape[2] == "gdesc" else 0)
                self.wavefronts += w * read / SHARED_BYTES / 4  # of four warps


class Kernel:
    """What the model knows of one that multiplies matrices."""

    def __init__(self, name, row, code, dropout):
        self.name, self.threads, self.places = name, row[0], row[1]
        wgmma = "wgmma" in name
        dim = int(name.rpartition("_")[2]) if name[-1].isdigit() else 0
        if name.startswith("attention_forward"):
            self.own = self.depth = 128 if wgmma else 64
            flop, copied = 4 * self.own * self.depth * dim, 2 * self.depth * dim
        elif name.startswith("attention_dq_product"):
            self.own, self.depth = 128, 64
            flop, copied = 2 * 128 * dim * 64, (128 + dim) * 64
        elif name.startswith("attention_d"):
            self.own, self.depth = (128, 64) if wgmma else (64, 32)
            flop = (8 if "dkv" in name else 6) * self.own * self.depth * dim
            copied = 2 * self.depth * dim
        else:
            self.own, self.depth = (64 if "small" in name else 128), 64
            flop, copied = 2 * self.own**2 * self.depth, 2 * self.own * self.depth
        warps = self.threads / 32
        # a thread copies 16 bytes at a time, a warp multiplies by mma.m16n8k16, a call of Philox is
        # eight draws
        copies, products = copied * 2 / 16 / self.threads, flop / 4096 / warps
        draws = self.own * self.depth / 8 / self.threads
        self.loop = Loop(code, copies, products, draws, dropout)
        issue = (
            self.loop.instructions
            * warps
            / ISSUED
            / min(1.0, PER_WARP * warps * self.places / ISSUED)
        )
        shared = self.loop.wavefronts * warps
        tensor = flop / (WGMMA_FLOP if wgmma else MMA_FLOP)
        parts = [issue, shared, tensor, self.loop.exponentials * warps * 32 / EXPONENTIALS]
        self.turn = max(parts) + (1 - HIDDEN) * (sum(parts) - max(parts))
        self.bound = ("issue", "shared memory", "tensor cores", "exponentials")[
            parts.index(max(parts))
        ]

    def blocks(self, launch):
        """Cycles of each block, in the grid's order."""
        cost = []
        for p in problems(launch):
            if self.name.startswith("attention"):
                queries, keys = p["q"]["rows"], p["k"]["rows"]
                if "dkv" in self.name:
                    queries, keys = keys, queries
                turns = math.ceil(keys / self.depth)
                splits = max(1, p.get("splits", 1))
                block = math.ceil(turns / splits) * self.turn + 2 * PROLOGUE
                cost += [block] * (math.ceil(queries / self.own) * p["heads"] * splits)
                continue
            if "weight" in self.name:
                rows, cols, depth, splits = (
                    p["dw"]["rows"],
                    p["dw"]["cols"],
                    p["dy"]["rows"],
                    p["splits"],
                )
                epilogue = EPILOGUE
            else:
                rows, cols, depth, splits = p["out"]["rows"], p["out"]["cols"], p["a"]["cols"], 1
                extra = (
                    (p["gelu"] or p["gelu_grad"])
                    + 0.4 * bool(p["dropout"]["threshold"])
                    + 0.2 * bool(p["residual"]["data"])
                )
                epilogue = EPILOGUE * (1 + extra)
            part = (self.own / 128) ** 2
            turns = math.ceil(math.ceil(depth / self.depth) / splits)
            tiles = math.ceil(rows / self.own) * math.ceil(cols / self.own)
            cost += [turns * self.turn + part * epilogue + PROLOGUE] * (tiles * splits)
        return cost


def makespan(blocks, places):
    """Cycles of blocks on all multiprocessors, each of which holds `places` at a time.

    Fewer use it only in part.
    """
    share = lambda n: (n / places) ** 0.69
    waiting, held, seen, events, now = (
        blocks[::-1],
        [[] for _ in range(PROCESSORS)],
        [0.0] * PROCESSORS,
        [],
        0.0,
    )
    for _ in range(places):
        for processor in held:
            if waiting:
                processor.append(waiting.pop())

    def plan(i):
        if held[i]:
            heapq.heappush(
                events, (seen[i] + min(held[i]) / (share(len(held[i])) / len(held[i])), i)
            )

    for i in range(PROCESSORS):
        plan(i)
    while events:
        now, i = heapq.heappop(events)
        done = (now - seen[i]) * share(len(held[i])) / len(held[i])
        held[i], seen[i] = [left - done for left in held[i] if left - done > 1e-6], now
        while waiting and len(held[i]) < places:
            held[i].append(waiting.pop())
        plan(i)
    return now


# ---- the tables


def light(launch):
    """Seconds of a kernel without a product: what it reads and writes."""
    a = launch["argument"]
    if launch["name"] == "adam_step":
        moved = 34 * a["n"]
    elif launch["name"] == "matmul_backward_weight_reduce":
        moved = sum(
            4 * p["dw"]["rows"] * p["dw"]["cols"] * (p["splits"] + 2)
            for p in problems(launch)
            if p["splits"] > 1
        )
    elif launch["name"] == "attention_delta":
        moved = sum(traffic(p["out"]) + traffic(p["dout"]) for p in problems(launch))
    elif "reduce" in launch["name"] or "join" in launch["name"]:
        moved = 0  # a few partial sums: the launch is what they cost
    else:
        moved = traffic(a)
    return moved / MEMORY


def depthwise(launch, code, row):
    """Seconds of a convolution: a warp of four takes four patches of 2 x 8 tokens of each tile."""
    back = []
    at = {address: i for i, (address, _) in enumerate(code)}
    for i, (_, instruction) in enumerate(code):
        target = re.search(r"\bBRA 0x([0-9a-f]+)", instruction)
        if target and at.get(int(target[1], 16), i) < i:
            back.append((at[int(target[1], 16)], i))
    patch = max((b - a for a, b in back if count(code[a:b], "FFMA") > 400), default=0)
    warps, places = row[0] // 32, row[1]
    turn = patch * warps / ISSUED / min(1.0, PER_WARP * warps * places / ISSUED)
    blocks = math.prod(launch["grid"])
    tiles = 1
    if "backward" in launch["name"]:
        side = (
            launch["argument"]["problem"][0]["side"]
            if "problem" in launch["argument"]
            else launch["argument"]["forward"]["height"]
        )
        tiles = math.ceil(math.ceil(side / 16) ** 2 / launch["grid"][0])
    return makespan([tiles * (4 * turn + 2 * PROLOGUE) + 2 * PROLOGUE] * blocks, places) / CLOCK


def tables():
    rows = {}
    for name, storage, threads, blocks in re.findall(
        r"^\| (\w+) \| (f32|bf16) \| [^|]* \| (\d+) \| [^|]* \| (\d+) \|", DOCS.read_text(), re.M
    ):
        rows[f"{name}_{storage}"] = (int(threads), int(blocks))
    files = {}
    for file in (ROOT / "kernels").glob("*.cu"):
        for name in re.findall(r"^KERNEL(?:_BLOCKS)?\((\w+),", file.read_text(), re.M):
            files[name] = file.stem
    codes = {}
    for stem in sorted(set(files.values()) - {"probes"}):
        codes |= dict(machine_code(stem, "bf16"))
    of = {}  # kernel -> [launches, seconds, seconds without tails]
    kernels = {}
    for launch in launches("bf16"):
        symbol, name = launch["kernel"], launch["name"]
        tails = 0.0
        if re.match(r"matmul_(?!.*reduce)|attention_(forward|dkv|dq)", name):
            drawn = (
                any(p["dropout"]["threshold"] for p in problems(launch))
                if name.startswith("attention")
                else False
            )
            kernel = kernels.setdefault(
                (name, drawn), Kernel(name, rows[symbol], codes[symbol], drawn)
            )
            blocks = kernel.blocks(launch)
            seconds = makespan(blocks, kernel.places) / CLOCK
            tails = seconds - sum(blocks) / PROCESSORS / CLOCK
        elif re.match(r"ppeg_(?!reduce)|conv_fusion_(?!reduce)", name):
            seconds = depthwise(launch, codes[symbol], rows[symbol])
        else:
            seconds = light(launch)
        total = of.setdefault(name, [0, 0.0, 0.0])
        total[0] += 1
        total[1] += seconds
        total[2] += tails
    yield "| kernel | launches | ms | of that tails | % of the step |\n|---|---|---|---|---|\n"
    step = sum(seconds + n * LAUNCH for n, seconds, _ in of.values())
    for name, (n, seconds, tails) in sorted(of.items(), key=lambda item: -item[1][1]):
        seconds += n * LAUNCH
        shown = f"{1e3 * tails:.2f}" if tails else "-"
        yield f"| {name} | {n} | {1e3 * seconds:.2f} | {shown} | {100 * seconds / step:.0f} |\n"
    n, tails = sum(total[0] for total in of.values()), sum(total[2] for total in of.values())
    yield f"| **the step** | {n} | **{1e3 * step:.2f}** | {1e3 * tails:.2f} | 100 |\n\n"
    yield "| loop | instructions a turn and warp | cycles a turn | bound by |\n|---|---|---|---|\n"
    for (name, drawn), kernel in sorted(kernels.items()):
        loop = f"{name}, dropout" if drawn else name
        yield f"| {loop} | {kernel.loop.instructions:.0f} | {kernel.turn:.0f} | {kernel.bound} |\n"


def loops(text):
    return {
        name: int(n)
        for name, n in re.findall(r"^\| ([\w, ]+) \| (\d+) \| \d+ \| [a-z ]+ \|$", text, re.M)
    }


def main():
    arguments = sys.argv[1:]
    if arguments not in ([], ["--check"]):
        sys.exit(__doc__)
    text = DOCS.read_text()
    before, old, after = (
        text.split(BEGIN)[0],
        text.split(BEGIN)[1].split(END)[0],
        text.split(END)[1],
    )
    new = "".join(tables())
    if arguments != ["--check"]:
        DOCS.write_text(before + BEGIN + new + END + after)
        return
    was, grown = loops(old), []
    for name, n in loops(new).items():
        if name in was and n > (1 + GROWTH) * was[name]:
            grown.append(f"{name}: {n} instructions a turn, {was[name]} in the table\n")
    current = (
        "" if new == old else f"{DOCS.relative_to(ROOT)} is not current: scripts/predict-step.py\n"
    )
    print(
        "".join(grown) + current or "the predicted step is current",
        end="" if grown or current else "\n",
    )
    sys.exit(bool(grown or current))


if __name__ == "__main__":
    main()
