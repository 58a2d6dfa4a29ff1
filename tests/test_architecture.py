"""The house: what imports what, how large it is, what `import jaxrnn` brings in and documents."""

import ast
import contextlib
import inspect
import pathlib
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
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
def test_imports_against_the_order_are_found(room, line, against):
    assert imports_against_the_order(room, line) == against


# How large it is ------------------------------------------------------------------------------


def lines(paths):
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_the_core_is_short():
    assert lines(p for room in ("_base", "_core") for p in (PACKAGE / room).glob("*.py")) <= 1740


def test_the_library_is_short():
    # Without programs for accelerators and the command line; the aim is 4,600.
    apart = [PACKAGE / name for name in ("_backends/kernels", "_app", "__main__.py")]
    paths = [p for p in PACKAGE.rglob("*.py") if not any(p.is_relative_to(a) for a in apart)]
    assert lines(paths) <= 6070


def test_lines_and_files_of_the_program():
    files = [path for path in (PACKAGE / "_app").iterdir() if path.is_file()]
    assert len(files) <= 12 and lines(files) <= 2300


# How far it is from a call to a loop ----------------------------------------------------------


@contextlib.contextmanager
def scans_seen():
    """Yields a list of the library's frames on the stack at each call of `lax.scan` in no other."""
    home = str(PACKAGE) + "/"
    scan, seen, depth = jax.lax.scan, [], 0

    def recorded(*args, **kwargs):
        nonlocal depth
        frame, count = inspect.currentframe(), 0
        while frame := frame.f_back:
            count += frame.f_code.co_filename.startswith(home)
        if not depth:
            seen.append(count)
        depth += 1
        try:
            return scan(*args, **kwargs)
        finally:
            depth -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "scan", recorded)
        yield seen


SMALL, LONG = (5, 2, 3, 4), (2048, 16, 64, 64)  # (T, B, D, H); LONG goes back in segments


@pytest.mark.parametrize("sizes", [SMALL, LONG], ids=str)
@pytest.mark.parametrize(("gradient", "most"), [(False, 9), (True, 14)])
def test_frames_between_a_call_and_its_loops(gradient, most, sizes):
    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    T, B, D, H = sizes
    cell, xs = jaxrnn.Cell(shape(H, D), shape(H, H), shape(H)), shape(T, B, D)
    program = jaxrnn.unroll
    if gradient:
        program = jax.grad(lambda cell, xs: jnp.sum(jaxrnn.unroll(cell, xs)[1]))
    jax.clear_caches()
    with scans_seen() as seen:
        jax.jit(program).lower(cell, xs)
    jax.clear_caches()
    assert seen and max(seen) <= most


def eager_calls():
    """Eager calls of one small cell of each kind, compiled and checked already."""
    cell = jaxrnn.Cell(jnp.ones((16, 3)), jnp.ones((16, 16)), jnp.ones(16))
    form = jaxrnn.Form(lambda a, h, gain: jnp.tanh(gain * a))
    cells = {
        "tanh": cell,
        "callable": replace(cell, activation=lambda a: jnp.tanh(a)),
        "leak": replace(cell, leak=jnp.asarray(0.5)),
        "custom": replace(cell, form=form, parameters=jnp.ones(16)),
        "number and NumPy": replace(cell, b=np.ones(16), leak=0.5),
    }
    xs, h = jnp.ones((5, 3)), jnp.zeros(16)
    jitted = jax.jit(lambda cell, xs: jaxrnn.unroll(cell, xs))
    calls = {f"step, {n}": partial(jaxrnn.step, c, xs[0], h) for n, c in cells.items()}
    calls |= {f"unroll, {n}": partial(jaxrnn.unroll, c, xs) for n, c in cells.items()}
    calls["jitted unroll"] = partial(jitted, cell, xs)
    for call in calls.values():
        jax.block_until_ready(call())
    return calls


def functions_run(call):
    """How many Python functions are called, by the library, by JAX and by Python itself."""
    count = 0

    def see(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def test_functions_that_run_in_an_eager_call():
    # Arrays of types that were checked before are not checked again.
    for name, call in eager_calls().items():
        assert functions_run(call) <= (25 if "step" in name else 80), name


# What it brings in and documents --------------------------------------------------------------


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
