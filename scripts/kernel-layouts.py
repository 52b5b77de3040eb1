#!/usr/bin/env python3
"""Writes the layouts of docs/launching.md: each kernel's parameters, by the sources and a C++ compiler.

scripts/kernel-layouts.py           writes them
scripts/kernel-layouts.py --check   changes nothing; fails if they are not current

When a layout has changed, kAbiVersion of kernels/gpu.cuh must have, too: who launches the kernels by this page asks for
it. Either way fails where it has not.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
DOCS = ROOT / "docs/launching.md"
BEGIN, END = "<!-- begin: scripts/kernel-layouts.py -->\n", "<!-- end -->\n"


def struct_of(text, name):
    """Fields of a struct of plain data: (type, name with its brackets, comment)."""
    body = re.search(rf"struct (?:alignas\([^)]*\) )?{name} \{{(.*?)\}};", text, re.S)
    if not body:
        return None
    fields = []
    for line in re.findall(r"[^\n;]*;[^\n]*|[^\n]+", body[1]):
        code, _, comment = line.partition("//")
        declared = re.fullmatch(r"\s*((?:const )?[\w]+(?:<[^>]*>)?)(\*?) (.*);\s*", code)
        if not declared or "(" in code:
            continue
        kind, star, names = declared.groups()
        for field in names.split(", "):
            pointer = "*" if star or field.startswith("*") else ""
            for constant in re.findall(r"\[(k\w+)\]", field):
                field = field.replace(constant, re.search(rf"\b{constant} = (\d+)", text)[1])
            fields.append((kind + pointer, field.lstrip("*"), comment.strip()))
    return fields


def plain(kind):
    """The struct's own name of a field's type, if it is one."""
    return re.sub(r"<.*>", "", kind.removeprefix("const ").rstrip("*"))


def source(stem):
    """A kernel's file with the headers that it includes."""
    text, seen = "", []
    files = [f"{stem}.cu"]
    while files:
        file = files.pop()
        if file in seen or not (KERNELS / file).exists():
            continue
        seen.append(file)
        mine = (KERNELS / file).read_text()
        text = mine + text
        files += re.findall(r'#include "([\w.]+\.cuh)"', mine)
    return text


def measured(stem, text, names):
    """Sizes of structs and offsets of their fields, as a C++ compiler lays them out: constants of an assembler text."""
    lines = []
    constant = lambda what, value: lines.append(f'asm volatile("#layout {what} %0" :: "i"({value}));')
    for name in names:
        spelled = f"{name}<float>" if re.search(rf"template <class \w+> struct {name} ", text) else name
        lines.append(f"using Of{name} = {spelled};")
        constant(name, f"sizeof(Of{name})")
        for _, field, _ in struct_of(text, name):
            field = field.partition("[")[0]
            constant(f"{name}.{field}", f"offsetof(Of{name}, {field})")
    program = f'#include "{KERNELS}/{stem}.cu"\nvoid layouts() {{\n' + "\n".join(lines) + "\n}\n"
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-w", "-DREAL=f32", f"-I{KERNELS}", *"-S -x c++ -o - -".split()]
    compiled = subprocess.run(command, input=program, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {what: int(number) for what, number in re.findall(r"#layout (\S+) \D?(\d+)", compiled)}


def page():
    shown = {}
    for file in sorted(KERNELS.glob("*.cu")):
        if file.stem == "probes":
            continue
        text = source(file.stem)
        entries = re.findall(r"^KERNEL(?:_BLOCKS)?\((\w+), \w+(?:, \d+)?, (.*)\) \{", file.read_text(), re.M)
        parameters = {name: re.findall(r"(?:const )?(\w+(?:<[^>]*>)?) (\w+)", given) for name, given in entries}
        names, wanted = [], [plain(kind) for given in parameters.values() for kind, _ in given]
        while wanted:
            name = wanted.pop(0)
            fields = struct_of(text, name)
            if fields and name not in names:
                names.append(name)
                wanted += [plain(kind) for kind, _, _ in fields]
        at = measured(file.stem, text, names)
        yield f"### {file.name}\n"
        by_parameters = {}
        for name, given in parameters.items():
            spelled = ", ".join(kind for kind, _ in given)
            by_parameters.setdefault(spelled, []).append(name)
        for given, kernels in by_parameters.items():
            yield f"`{'`, `'.join(kernels)}`: ({given})\n"
        lines = []
        for name in names:
            rows = [f"{name}, {at[name]} bytes"]
            for kind, field, comment in struct_of(text, name):
                number = at[f"{name}.{field.partition('[')[0]}"]
                rows.append(f"{number:5}  {kind} {field}" + (f"  // {comment}" if comment else ""))
            if shown.get(name) != rows:
                lines += rows
            shown[name] = rows
        if lines:
            yield "```text\n" + "\n".join(lines) + "\n```\n"


def main():
    arguments = sys.argv[1:]
    if arguments not in ([], ["--check"]):
        sys.exit(__doc__)
    version = re.search(r"kAbiVersion = (\d+);", (KERNELS / "gpu.cuh").read_text())[1]
    text = DOCS.read_text()
    before, old, after = text.split(BEGIN)[0], text.split(BEGIN)[1].split(END)[0], text.split(END)[1]
    new = f"Version {version}.\n\n" + "\n".join(page())
    numbers = lambda page: re.findall(r"^ *\d+  [^/\n]*|^\w+, \d+ bytes|^`.*", page, re.M)
    if old.startswith(f"Version {version}.") and numbers(old) and numbers(old) != numbers(new):
        sys.exit("the kernels' parameters have changed: raise kAbiVersion in kernels/gpu.cuh")
    if arguments and new != old:
        sys.exit(f"{DOCS.relative_to(ROOT)} is not current: scripts/kernel-layouts.py")
    DOCS.write_text(before + BEGIN + new + END + after)


if __name__ == "__main__":
    main()
