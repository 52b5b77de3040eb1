#!/usr/bin/env python3
"""Breaks one line of a kernel at a time and shows who notices, in kernels/mutants.txt.

scripts/mutants.py [KERNEL...]   runs all mutants, or those of some kernels, and writes their rows
scripts/mutants.py --check       runs nothing; fails if a mutant's text is no longer in its kernel, or the table lacks its row

The mutants of kernels/foo.cu stand in tests/emulator/mutants/foo.toml, with the tests of it in plain mode (results and
schedules) and in race mode. A mutant is `text` in the kernel's file, or in `file`, a header that it includes: the first
place where it stands, or the one after `nth` others, `becomes` something else. It is built into a copy of the
emulator's libraries, and runs the tests. A mutant that nobody catches makes the script fail.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "kernels/mutants.txt"
KERNELS = {file.stem: tomllib.loads(file.read_text()) for file in sorted((ROOT / "tests/emulator/mutants").glob("*.toml"))}
MUTANTS = [{"kernel": kernel, "file": f"{kernel}.cu", "nth": 0} | mutant for kernel, of in KERNELS.items() for mutant in of["mutant"]]

# As in build.rs.
COMMON = "-std=c++20 -fPIC -fvisibility=hidden -ftls-model=initial-exec -fno-strict-aliasing -w -x c++ -c".split()
MODES = {
    "plain": ["-O2"],
    "race": "-O1 -g -DSIMT_RACE -fsanitize=thread,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined".split(),
}


def built():
    """The test binary and the folder with build.rs's objects."""
    command = "cargo test --release --features emulator --lib --no-run --message-format=json"
    lines = subprocess.run(command.split(), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    messages = [json.loads(line) for line in lines]
    test = next(m["executable"] for m in messages if m.get("target", {}).get("kind") == ["lib"] and m.get("profile", {}).get("test") and m.get("executable"))
    out = next(m["out_dir"] for m in messages if m["reason"] == "build-script-executed" and "CROSSFUSION_EMULATOR_BUILT" in dict(m["env"]))
    return test, Path(out)


def mutate(mutant):
    """The text of the mutant's file."""
    old, nth = mutant["text"], mutant["nth"]
    parts = (ROOT / "kernels" / mutant["file"]).read_text().split(old)
    if len(parts) < nth + 2:
        sys.exit(f"no longer in {mutant['file']}: {old!r}")
    return old.join(parts[: nth + 1]) + mutant["becomes"] + old.join(parts[nth + 1 :])


def build(mutant, objects, folder):
    """The two libraries of the emulator, with the mutant in them."""
    kernel = mutant["kernel"]
    for copied in [ROOT / f"kernels/{kernel}.cu", *(ROOT / "kernels").glob("*.cuh")]:  # a header includes its neighbours
        shutil.copy(copied, folder)
    (folder / mutant["file"]).write_text(mutate(mutant))
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
    command = [test, *(f"emulator_tests::{name}" for name in filters), "--test-threads=1"]
    try:
        done = subprocess.run(command, env=environment, timeout=300, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode == 0:
        return None
    text = done.stdout
    for pattern in (r"thread \d+: (.*)", r"(a kernel wrote outside[^\"]*)", r"\} (\w+: error .*)", r"(.* gives other bits)"):
        if found := re.search(pattern, text):
            # without addresses, lines, which move, folders of this machine, and the end of a quoted error
            return re.sub(r' 0x[0-9a-f]+|/\S*/(?=\w+\.cu)|(?<=\.cu):\d+|(?<=\.cuh):\d+|"\)$', "", found[1])
    return f"crash ({done.returncode})" if done.returncode < 0 else "wrong result"


def caught(mutant, test, objects):
    """What the plain and the race tests say."""
    with tempfile.TemporaryDirectory() as folder:
        build(mutant, objects, Path(folder))
        return [noticed(test, KERNELS[mutant["kernel"]][mode], Path(folder)) for mode in MODES]


def name_of(mutant):
    where = mutant["kernel"] if mutant["file"] == f"{mutant['kernel']}.cu" else f"{mutant['kernel']}/{mutant['file']}"
    return f"{where}: {mutant['what']}"


def rows():
    """The table: what the plain and the race tests say of each mutant."""
    found = re.findall(r"^(\S.*)\n    plain: (.*)\n    race:  (.*)\n", TABLE.read_text(), re.M)
    return {name: (plain, race) for name, plain, race in found}


def write(table):
    names = [name_of(m) for m in MUTANTS if name_of(m) in table]
    text = "".join(f"{name}\n    plain: {table[name][0]}\n    race:  {table[name][1]}\n" for name in names)
    alive = sum(table[name] == ("-", "-") for name in names)
    TABLE.write_text(text + f"{len(names) - alive} of {len(names)} caught\n")


def check():
    names = [name_of(m) for m in MUTANTS]
    if repeated := {name for name in names if names.count(name) > 1}:
        sys.exit(f"two mutants of one name: {repeated}")
    for mutant in MUTANTS:
        mutate(mutant)
    table = rows()
    if missing := [name for name in names if name not in table]:
        sys.exit(f"not in {TABLE.name}: {missing}")
    if alive := [name for name in names if table[name] == ("-", "-")]:
        sys.exit(f"nobody notices: {alive}")


def main():
    if sys.argv[1:] == ["--check"]:
        return check()
    if unknown := set(sys.argv[1:]) - set(KERNELS):
        sys.exit(f"no mutants of {unknown}")
    mutants = [m for m in MUTANTS if m["kernel"] in (sys.argv[1:] or KERNELS)]
    test, objects = built()
    table = rows()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, found in zip(mutants, pool.map(lambda m: caught(m, test, objects), mutants)):
            table[name_of(mutant)] = tuple(text or "-" for text in found)
            print(name_of(mutant), *table[name_of(mutant)], sep="\n    ", flush=True)
    write(table)
    check()


if __name__ == "__main__":
    main()
