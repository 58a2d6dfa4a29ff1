"""Examples in docstrings and in the README run, with JAX as a user has it."""

import doctest
import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections import Counter

import jax
import pytest

from jaxrnn._app.cli import make_parser

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jaxrnn"
README = (ROOT / "README.md").read_text()


def home(path):
    """The module where doctest finds what this file defines: where it says that it is."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "jaxrnn" if parts[1] in ("_api", "_types") else ".".join(parts)


# How many examples there are in the files of each.
EXAMPLES = Counter()
for path in PACKAGE.rglob("*.py"):
    EXAMPLES[home(path)] += path.read_text().count(" >>> ")
EXAMPLES = +EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted == EXAMPLES[name] and not result.failed


def test_examples_are_found():
    assert {"jaxrnn", "jaxrnn.text", "jaxrnn.worked_example"} <= set(EXAMPLES)
    assert EXAMPLES["jaxrnn"] >= 10


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_in_the_readme_runs(tmp_path):
    code = "\n".join(blocks("python"))
    assert "jaxrnn.unroll" in code and "train.make_update" in code
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")


def test_commands_in_the_readme_are_understood():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    commands = [line.split("&&")[-1].strip() for line in lines]
    assert "jaxrnn train" in commands
    assert any(command.startswith("python -m pytest") for command in commands)
    ours = [shlex.split(command)[1:] for command in commands if command.startswith("jaxrnn")]
    assert len(ours) >= 4
    for arguments in ours:
        make_parser().parse_args(arguments)
