"""The house: what imports what, what `import jaxrnn` brings in, what the face documents."""

import ast
import inspect
import pathlib
import subprocess
import sys
import tomllib

import pytest

import jaxrnn
from jaxrnn import convert, text, textbook, train, worked_example

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jaxrnn"

# A file imports only from floors below its own.
FLOORS = [
    ["_primitive", "_segments", "_schedule", "_sharding"],
    ["_fold", "_linear_map"],
    ["_dtypes"],
    ["_checks"],
    ["_activation", "_padding", "_dropout", "_precision", "_files"],
    ["_cell", "_target", "_plots", "_console"],
    ["_implementation"],
    ["_step", "_loss", "_init"],
    ["_jacobians"],
    ["_associative", "_kernels"],
    ["_states", "_recurrence"],
    ["_linearised"],
    ["_tangent"],
    ["_window"],
    ["_rule"],
    ["_checkpointed"],
    ["_unroll"],
    ["_layers", "_bptt"],
    ["_loss_and_grads"],
    ["textbook", "convert", "text"],
    ["worked_example", "train"],
    ["_example_report", "_training"],
    ["_cli"],
    ["__main__"],
]


def imports(path):
    """The modules of the package that a file names, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxrnn":
            parts = (node.module or "").split(".")[1:]
            yield from parts[:1] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("jaxrnn."):
                    yield alias.name.split(".")[1]


def test_files_import_from_floors_below_their_own():
    floor = {name: n for n, names in enumerate(FLOORS) for name in names}
    files = {path: path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    files |= {path: path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert set(files.values()) == set(floor)
    for path, name in files.items():
        for imported in imports(path):
            inside = path.parent.name == imported
            assert inside or floor[imported] < floor[name], f"{name} imports {imported}"


# Within a room, likewise.
ROOMS = {
    "_kernels": [
        ["loops"],
        ["_tiles"],
        ["mosaic_gpu_cluster"],
        ["mosaic_gpu", "mosaic_gpu_tf32", "pallas_tpu"],
        ["run"],
    ],
    "_training": [
        ["id_file", "levels", "lock", "signals", "kept"],
        ["config", "devices", "processes", "directory", "checkpoints", "progress", "ngram"],
        ["sources"],
        ["encode"],
        ["corpus", "saved"],
        ["memory"],
        ["plan", "prepare", "run", "sample_command", "show_command"],
        ["train_command"],
    ],
}


@pytest.mark.parametrize("room", ROOMS)
def test_files_of_rooms_too(room):
    floor = {name: n for n, names in enumerate(ROOMS[room]) for name in names}
    files = {path.stem: path for path in PACKAGE.glob(f"{room}/*.py") if path.stem != "__init__"}
    assert set(files) == set(floor)
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                f"jaxrnn.{room}"
            ):
                inside = node.module.split(".")[2:] or [alias.name for alias in node.names]
                assert all(floor[other] < floor[name] for other in inside), f"{name}: {inside}"


def test_the_picture_in_the_readme_is_the_house():
    blocks = (ROOT / "README.md").read_text().split("```text\n")
    picture = next(block for block in blocks if block.startswith(" __main__")).split("```")[0]
    known = {name for names in FLOORS for name in names}
    drawn = [set(line.split()) & known for line in picture.splitlines()]
    assert drawn == [set(names) for names in reversed(FLOORS)]


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
            assert f"{parameter}:" in text, f"{name} does not describe {parameter}"


def test_version_and_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == "0.1.0"
    names = {line.split(">")[0] for line in project["dependencies"]}
    assert names == {"jax", "jaxlib", "optax"}
    assert set(project["optional-dependencies"]) == {
        "cli", "plot", "bench", "peers", "test", "cuda", "tpu",
    }  # fmt: skip
