#!/usr/bin/env python3
"""PyTorch and cf-bench on the same work, in turn, on this machine: prints tables of speed.

    scripts/peer.py                    # makes target/peer with PyTorch and torchsurv, if it is not there
    scripts/peer.py --python PYTHON    # one that has torch (and torchsurv, for its Cox loss)
    scripts/peer.py --small            # a tenth of the sizes: does it run?

Runs alternate, two rounds of each, and the fastest counts; PyTorch has as many threads as cf-bench. The
peer of a step is the published model in plain PyTorch (benches/peer/model.py), in bf16 under autocast. It
takes about twenty minutes on two cores.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
PEER = ROOT / "benches/peer/peer.py"
ROUNDS = 2


def run(*command):
    """What a program prints as JSON."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}")
    return json.loads(done.stdout)


def environment():
    """A Python with PyTorch and torchsurv, made where there is none."""
    python = ROOT / "target/peer/bin/python"
    whole = [python, "-c", "import torch, torchsurv"]
    if not python.exists() or subprocess.run(whole, capture_output=True).returncode:
        subprocess.run([sys.executable, "-m", "venv", ROOT / "target/peer"], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "torch", "torchsurv"], check=True)
    return python


def processor():
    """The CPU's name, and what it multiplies by."""
    name, flags = platform.processor(), set()
    try:
        for line in open("/proc/cpuinfo"):
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            if key.strip() == "flags":
                flags = set(value.split())
    except OSError:
        pass
    known = {"AVX-512": "avx512f", "AVX512_BF16": "avx512_bf16", "AMX": "amx_bf16"}
    units = [unit for unit, flag in known.items() if flag in flags]
    return f"{name} ({', '.join(units) or 'no AVX-512'})"


def step(bench, python, sizes, precision, dropout):
    """Seconds of forward, backward and the step, and bytes of memory, of us and of the peer."""
    shape = ["--bags", sizes, "--features", "2048", "--dropout", dropout, "--precision", precision]
    found = {"ours": [], "peer": []}
    for _ in range(ROUNDS):
        found["ours"].append(run(bench, "step", "--device", "cpu", *shape, "--repeat", "2", "--json"))
        found["peer"].append(run(python, PEER, "step", *shape, "--repeat", "2", "--warmup", "1"))

    def best(name, memory):
        seconds = {part: min(one[part]["min"] for one in found[name]) for part in ("forward_s", "backward_s", "step_s")}
        return seconds | {"memory": max(one[memory] for one in found[name])}

    return best("ours", "peak_rss_bytes"), best("peer", "peak_bytes")


def ops(bench, python, sizes, precision):
    """(op and shape, our seconds, the peer's), of the ops that PyTorch has as one call."""
    names = ["attention", "conv_fusion", "ppeg", "layer_norm"]
    settings = ["--device", "cpu", "--bags", sizes, "--precision", precision, "--repeat", "3", "--peer", python, "--json"]
    rows = {}
    for _ in range(ROUNDS):
        for row in run(bench, "op", *names, *settings)["ops"]:
            if row["peer_us"]:
                rows.setdefault(f"{row['op']}, {row['shape']}", []).append((row["median_us"], row["peer_us"]))
    return [(name, *(1e-6 * min(times) for times in zip(*both))) for name, both in rows.items()]


def cox(bench, python, patients):
    """Our seconds and torchsurv's, of patients in no order: both sort them."""
    ours, peer = [], []
    for _ in range(ROUNDS):
        ours.append(run(bench, "op", "cox", "--n", patients, "--repeat", "3", "--json")["unsorted_s"]["min"])
        peer.append(run(python, PEER, "cox", "--n", patients, "--repeat", "3")["seconds"])
    return min(ours), min(peer)


def gigabytes(count):
    return f"{count / 1e9:.2f} GB"


def time(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="a Python with torch, instead of target/peer's")
    parser.add_argument("--small", action="store_true", help="a tenth of the sizes: does it run?")
    arguments = parser.parse_args()
    python = arguments.python or environment()
    subprocess.run(["cargo", "build", "--release", "--quiet", "--bin", "cf-bench"], cwd=ROOT, check=True)
    bench = ROOT / "target/release/cf-bench"
    sizes = "80,300,1200" if arguments.small else "800,3000,12000"
    patients = 10_000 if arguments.small else 1_000_000
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    versions = run(python, "-c", "import json, torch; print(json.dumps(torch.__version__))")

    print(f"{processor()}, {os.cpu_count()} threads; commit {commit or 'unknown'}; PyTorch {versions}.\n")
    print("| step | forward | backward | step | memory | PyTorch: step | memory | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for precision in ("f32", "bf16"):
        for dropout in ("off", "on"):
            ours, peer = step(bench, python, sizes, precision, dropout)
            cells = [time(ours["forward_s"]), time(ours["backward_s"]), time(ours["step_s"]), gigabytes(ours["memory"])]
            cells += [time(peer["step_s"]), gigabytes(peer["memory"]), f"{peer['step_s'] / ours['step_s']:.2f}"]
            print(f"| {precision}, dropout {dropout} | {' | '.join(cells)} |", flush=True)
    print("\n| op | this | peer | ratio |\n|---|---|---|---|")
    for precision in ("f32", "bf16"):
        for name, ours, peer in ops(bench, python, sizes, precision):
            print(f"| {name}, {precision} | {time(ours)} | {time(peer)} | {peer / ours:.2f} |", flush=True)
    ours, peer = cox(bench, python, patients)
    name = f"Cox loss and gradient of {patients:,} rows, Efron; torchsurv"
    print(f"| {name} | {time(ours)} | {time(peer)} | {peer / ours:.2f} |")


if __name__ == "__main__":
    main()
