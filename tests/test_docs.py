"""Examples that stand in docstrings run, with JAX as a user has it."""

import doctest
import importlib
import pathlib

import jax
import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "jaxrnn"
EXAMPLES = sorted(path.stem for path in PACKAGE.glob("*.py") if ">>> " in path.read_text())


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_examples_run(name):
    module = importlib.import_module(f"jaxrnn.{name}")
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted and not result.failed


def test_examples_are_found():
    assert {"_step", "_unroll", "_bptt", "_text", "worked_example"} <= set(EXAMPLES)
