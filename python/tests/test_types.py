"""The package's types, by mypy: of its own code, of the compiled module, and as a user sees them."""

import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("mypy")
pytest.importorskip("torch")

HERE = pathlib.Path(__file__).parent
# what a type must refuse: were everything Any, mypy would say nothing
WRONG = """
from crossfusion import models, ops, read_bag, survival
survival.concordance_index([1.0], [True])
survival.kaplan_meier([1.0], [True], limits="linear")
survival.fold_mean([1.0]).median
survival.bootstrap(survival.Patients([1]), lambda rows: "text")
ops.attention("q", "k", "v", heads=2)
ops.layer_norm(1, 2, 3).shape
models.CrossFusion("1024")
read_bag(7)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Of all runs: most of a run is PyTorch's own types."""
    return str(tmp_path_factory.mktemp("mypy"))


def mypy(*arguments, module="mypy", cwd=HERE):
    found = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, cwd=cwd)
    return found.returncode, found.stdout + found.stderr


def test_the_package_is_typed(tmp_path, cache):
    status, said = mypy("--strict", "--cache-dir", cache, "--package", "crossfusion", cwd=tmp_path)
    assert status == 0, said


def test_a_user_is_checked(tmp_path, cache):
    status, said = mypy("--strict", "--cache-dir", cache, str(HERE / "typed_user.py"), cwd=tmp_path)
    assert status == 0, said


def test_what_is_wrong_is_refused(tmp_path, cache):
    (tmp_path / "wrong.py").write_text(WRONG)
    status, said = mypy("--cache-dir", cache, "wrong.py", cwd=tmp_path)
    assert status == 1
    lines = WRONG.splitlines()
    for number, line in enumerate(lines, 1):
        if "(" in line:
            assert f"wrong.py:{number}: error" in said, f"mypy does not mind: {line}\n{said}"


def test_the_compiled_module_is_as_its_stub_says(tmp_path):
    allowed = tmp_path / "allowed"
    allowed.write_text(r"crossfusion\._crossfusion\.__all__")  # which pyo3 makes, of all names
    status, said = mypy("crossfusion._crossfusion", "--allowlist", str(allowed), module="mypy.stubtest", cwd=tmp_path)
    assert status == 0, said
