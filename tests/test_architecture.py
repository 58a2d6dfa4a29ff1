"""The house: what imports what, how large it is, what `import jaxrnn` brings in and documents."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys
import tomllib

import counts
import pytest

import jaxrnn
from jaxrnn import convert, text, textbook, train, worked_example

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jaxrnn"

# A module imports from its own room and from those before it.
ROOMS = {
    "_record": 0,
    "_types": 0,
    "_jax": 1,
    "_base": 2,
    "_backends": 3,
    "_core": 4,
    "_api": 5,
    **dict.fromkeys(("textbook", "convert", "text", "train", "worked_example", "__init__"), 6),
    "_app": 7,
    "__main__": 8,
}


def imports(source):
    """The rooms of the package that a source names, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for package, *rest in (name.split(".") for name in names):
            if package == "jaxrnn":
                yield rest[0] if rest and rest[0] in ROOMS else "__init__"


def imports_against_the_order(room, source):
    # `_jax` knows nothing of networks: not even their types.
    allowed = {"_jax"} if room == "_jax" else {r for r in ROOMS if ROOMS[r] <= ROOMS[room]}
    return set(imports(source)) - allowed


def test_imports_run_one_way():
    files = {path: path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}
    rooms = {path: name.removesuffix(".py") for path, name in files.items()}
    assert set(rooms.values()) == set(ROOMS)
    wrong = {path.name: imports_against_the_order(room, path.read_text())
             for path, room in rooms.items()}  # fmt: skip
    assert not {name: found for name, found in wrong.items() if found}


@pytest.mark.parametrize(
    ("room", "line", "against"),
    [
        ("_base", "def f():\n    from jaxrnn._core import linear", {"_core"}),
        ("_jax", "from jaxrnn._types import Cell", {"_types"}),
        ("_core", "from jaxrnn import unroll", {"__init__"}),
        ("train", "import jaxrnn._app.run", {"_app"}),
        ("_core", "from jaxrnn import _types, _jax\nimport jax", set()),
        ("_app", "from jaxrnn import train", set()),
    ],
)
def test_the_reader_of_imports_sees_what_is_against_the_order(room, line, against):
    assert imports_against_the_order(room, line) == against


def test_lines_of_the_core():
    assert counts.lines_of_core() <= 1740


def test_lines_of_the_library():
    assert counts.lines_of_library() <= 6070  # the aim is 4,600


def test_lines_and_files_of_the_program():
    files = [
        path.read_text().splitlines() for path in (PACKAGE / "_app").iterdir() if path.is_file()
    ]
    assert len(files) <= 12 and sum(map(len, files)) <= 2300


@pytest.mark.parametrize("sizes", [counts.SMALL, counts.LONG], ids=str)
@pytest.mark.parametrize(("gradient", "most"), [(False, 9), (True, 15)])
def test_frames_between_a_call_and_its_loops(gradient, most, sizes):
    outer, _ = counts.frames(gradient, sizes)
    assert 0 < outer <= most


def test_functions_that_run_in_an_eager_call():
    # Arrays of types that were checked before are not checked again.
    calls = counts.eager_calls()
    for name, call in calls.items():
        assert counts.functions_run(call) <= (25 if "step" in name else 80), name


def test_import_brings_in_nothing_beyond_jax_and_optax():
    code = (
        "import sys, jax, jax.numpy, optax; before = set(sys.modules); import jaxrnn;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    brought = set(run.stdout.split()) - set(sys.stdlib_module_names)
    assert brought - {"jax"} == {"jaxrnn"}


def public_functions():
    for home in (jaxrnn, convert, text, textbook, train, worked_example):
        for name, value in vars(home).items():
            own = home is jaxrnn or getattr(value, "__module__", "") == home.__name__
            if own and inspect.isfunction(value) and not name.startswith("_"):
                yield f"{home.__name__}.{name}", value


def test_public_functions_document_arguments_results_and_errors():
    functions = dict(public_functions())
    assert {"jaxrnn.unroll", "jaxrnn.bptt", "jaxrnn.textbook.contributions"} <= set(functions)
    for name, function in functions.items():
        text = inspect.getdoc(function) or ""
        result = "Yields:" if inspect.isgeneratorfunction(function) else "Returns:"
        parameters = inspect.signature(function).parameters
        for section in (result, *(("Args:", "Raises:") if parameters else ())):
            assert section in text, f"{name} lacks {section}"
        for parameter in parameters:
            described = re.search(rf"^ *(\w+, )*{parameter}(, \w+)*:", text, re.MULTILINE)
            assert described, f"{name} does not describe {parameter}"


def test_version_and_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == jaxrnn.__version__ == "0.1.0"
    names = {line.split(">")[0] for line in project["dependencies"]}
    assert names == {"jax", "jaxlib", "optax"}
    assert set(project["optional-dependencies"]) == {
        "cli", "plot", "bench", "peers", "test", "cuda", "tpu",
    }  # fmt: skip
