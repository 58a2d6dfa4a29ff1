"""Examples in docstrings and in the README run as a user has JAX; links and commands are real."""

import ast
import doctest
import importlib
import os
import pathlib
import re
import shlex
from collections import Counter
from importlib.util import find_spec

import jax
import pytest

from jaxrnn._app.cli import parse

ROOT = pathlib.Path(__file__).parent.parent
READMES = [path for name in (".", "tests", "benchmarks")
           if (path := ROOT / name / "README.md").exists()]  # fmt: skip
PEERS = {"flax", "haiku", "equinox", "keras", "torch"}


@pytest.fixture
def as_users_have_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        with jax.numpy_rank_promotion("allow"):
            yield


def home(path):
    """The module where doctest finds what this file defines: where it says that it is."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "jaxrnn" if parts[1] in ("_api", "_types") else ".".join(parts)


# How many examples there are in the files of each.
EXAMPLES = Counter()
for path in (ROOT / "jaxrnn").rglob("*.py"):
    EXAMPLES[home(path)] += path.read_text().count(" >>> ")
EXAMPLES = +EXAMPLES


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_examples_run(name):
    result = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert result.attempted == EXAMPLES[name] and not result.failed


def test_docstrings_have_examples():
    assert {"jaxrnn", "jaxrnn.text"} <= set(EXAMPLES)
    assert EXAMPLES["jaxrnn"] >= 10


def blocks(readme, language):
    """The code blocks of a language, each with the number of its first line."""
    text = readme.read_text()
    for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start(1)].count("\n"), match[1]


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name.split(".")[0] for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.usefixtures("as_users_have_it")
def test_python_in_the_readme_runs():
    """Block after block in one namespace, without those of a library that is not installed."""
    namespace, ran = {"__name__": "readme"}, 0
    for line, code in blocks(ROOT / "README.md", "python"):
        tree = ast.increment_lineno(ast.parse(code), line)
        if any(name in PEERS and find_spec(name) is None for name in imported(tree)):
            continue
        exec(compile(tree, ROOT / "README.md", "exec"), namespace)
        ran += 1
    assert ran >= 3 and "jaxrnn" in namespace


def test_commands_in_the_readme_are_understood():
    lines = [line for _, block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    commands = [part.strip() for line in lines for part in re.split(r"&&|\|", line)]
    assert any("pytest" in command for command in commands)
    ours = [shlex.split(command, comments=True)[1:] for command in commands
            if command.startswith("jaxrnn ")]  # fmt: skip
    assert ["train"] in [arguments[:1] for arguments in ours]
    for arguments in ours:
        assert parse(arguments).command == arguments[0]


def anchors(readme):
    """The names by which a heading is linked to, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", readme.read_text(), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        words = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()
        yield re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_relative_links_lead_somewhere(readme):
    text = re.sub(r"^```.*?^```", "", readme.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    links = [link for link in links if not re.match(r"https?:|mailto:", link)]
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        target = (readme.parent / name).resolve() if name else readme
        assert target.exists() and target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_readme_is_linked_from_the_front_page():
    text = (ROOT / "README.md").read_text()
    for readme in READMES[1:]:
        assert os.fspath(readme.relative_to(ROOT)) in text
