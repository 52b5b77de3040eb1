"""The Python of the READMEs runs as it stands."""

import pathlib

import pytest

pytest.importorskip("torch")


@pytest.mark.parametrize("path", ["README.md", "python/README.md"])
def test_the_readme(path):
    text = (pathlib.Path(__file__).parents[2] / path).read_text()
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert blocks
    for block in blocks:
        exec(compile(block, path, "exec"), {})
