"""Examples in docstrings and in the README run, with JAX as a user has it."""

import doctest
import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import pytest

from jaxrnn._cli import make_parser

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jaxrnn"
README = (ROOT / "README.md").read_text()
EXAMPLES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_examples_run(name):
    module = importlib.import_module(f"jaxrnn.{name}")
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted and not result.failed


def test_examples_are_found():
    expected = {"_api.unroll", "_api.layers", "_api.gradients", "text", "worked_example"}
    assert expected <= set(EXAMPLES)


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
