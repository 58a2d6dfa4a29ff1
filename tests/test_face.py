"""What `import jaxrnn` shows, what it loads, and what its dataclasses do as Python objects."""

import copy
import dataclasses
import importlib
import inspect
import json
import pickle
import pkgutil
import pydoc
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import jaxrnn
from jaxrnn import Activation, Cell, CellGradients, Form, Gradients, Ids, Params, Readout, train

SUBMODULES = ("convert", "text", "textbook", "train", "worked_example")
OF_TEXT, OF_CONVERT = ("Vocabulary", "generate", "one_hot"), (
    "from_flax", "from_haiku", "from_keras", "from_torch", "to_torch",
)  # fmt: skip
LATER = (*SUBMODULES, *OF_TEXT, *OF_CONVERT)


def in_a_new_process(code):
    """What it prints, as JSON."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_every_public_name_is_there_and_nothing_else():
    assert set(LATER) < set(jaxrnn.__all__) and len(set(jaxrnn.__all__)) == len(jaxrnn.__all__)
    shown = [name for name in dir(jaxrnn) if not name.startswith("__")]
    assert sorted(shown) == sorted(jaxrnn.__all__)
    for name in jaxrnn.__all__:
        value = getattr(jaxrnn, name)
        module = value.__name__ if isinstance(value, types.ModuleType) else None
        assert module == (f"jaxrnn.{name}" if name in SUBMODULES else None)
    with pytest.raises(AttributeError, match=r"^module 'jaxrnn' has no attribute 'unrolll'$"):
        _ = jaxrnn.unrolll
    assert not hasattr(jaxrnn, "__wrapped__")


def test_submodules_are_loaded_when_first_used():
    loaded = in_a_new_process(
        "import json, sys, jaxrnn; of = lambda: [m for m in sys.modules if 'jaxrnn.' in m];"
        "before = of(); dir(jaxrnn); jaxrnn.train.make_update, jaxrnn.convert, jaxrnn.textbook;"
        "jaxrnn.worked_example; print(json.dumps([before, of()]))"
    )
    for name in SUBMODULES:
        assert f"jaxrnn.{name}" not in loaded[0] and f"jaxrnn.{name}" in loaded[1]


EACH_ALONE = """
import json, os, jaxrnn
for name in {names}:
    print(end="", flush=True)
    if os.fork() == 0:  # nothing but jaxrnn is imported in this process
        x = getattr(jaxrnn, name)
        print(json.dumps([name, getattr(x, "__module__", None) or x.__name__]), flush=True)
        os._exit(0)
    os.wait()
"""


def test_each_late_name_needs_no_other_import():
    code = EACH_ALONE.format(names=LATER)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    homes = dict(map(json.loads, run.stdout.splitlines()))
    assert homes == {
        **{name: f"jaxrnn.{name}" for name in SUBMODULES},
        **dict.fromkeys(OF_TEXT, "jaxrnn.text"), **dict.fromkeys(OF_CONVERT, "jaxrnn.convert"),
    }  # fmt: skip


def test_public_names_say_that_they_are_of_jaxrnn():
    for name in set(jaxrnn.__all__) - set(LATER):
        value = getattr(jaxrnn, name)
        assert (value.__module__, value.__qualname__) == ("jaxrnn", name)
        assert pickle.loads(pickle.dumps(value)) is value


def test_help_lists_the_public_names():
    page = pydoc.render_doc(jaxrnn, renderer=pydoc.plaintext)
    names = *LATER, "Cell", "Form", "unroll", "bptt", "loss_and_grads", "step"
    listed = set(re.findall(r"^    (?:class )?(\w+)", page, re.MULTILINE))
    assert set(names) <= listed
    assert "function unroll in module jaxrnn\n" in pydoc.render_doc(jaxrnn.unroll)


def public_modules():
    found = [info.name for info in pkgutil.iter_modules(jaxrnn.__path__)]
    names = [name for name in found if not name.startswith("_")]
    assert set(names) == set(SUBMODULES)
    return [jaxrnn, *(importlib.import_module(f"jaxrnn.{name}") for name in names)]


def public_dataclasses():
    """Every public dataclass that JAX takes for a pytree."""
    found = {
        value for module in public_modules() for value in map(vars(module).get, dir(module))
        if inspect.isclass(value) and dataclasses.is_dataclass(value)
        and value.__module__.startswith("jaxrnn") and not value.__name__.startswith("_")
    }  # fmt: skip
    leaf = jax.tree.structure(0)
    empty = {kind: object.__new__(kind) for kind in found}
    for kind, value in empty.items():
        for field in dataclasses.fields(kind):
            object.__setattr__(value, field.name, None)
    return {kind.__name__: kind for kind in found if jax.tree.structure(empty[kind]) != leaf}


# Named, so that they can be pickled.
def residual(a, h, scale):
    return h + scale * jnp.tanh(a)


def complement(y):
    return 1 - jnp.exp(-y)


def softplus(a):
    return jax.nn.softplus(a)


def a_cell(size=3, **how):
    return jaxrnn.init_cell(jax.random.key(0), 2, size, dtype="float32", **how)


CELLS = {
    **{name: a_cell(activation=name) for name in ("tanh", "relu", "sigmoid", "identity")},
    "voltage": a_cell(form="voltage"),
    "leak": a_cell(leak=0.5),
    "leaks": a_cell(form="voltage", leak=jnp.full(3, 0.5, "float32")),
    "no bias": dataclasses.replace(a_cell(), b=None),
}
READOUT = Readout(jnp.ones((2, 3), "float32"), jnp.zeros(2, "float32"))
PARAMS = Params(CELLS["tanh"], READOUT)
STACK = Params((CELLS["leak"], a_cell(), (a_cell(), a_cell())), READOUT)
STATE = train.init_state(PARAMS, optax.sgd(0.1), 2, jax.random.key(3))
EXAMPLES = {
    **{f"Cell {name}": cell for name, cell in CELLS.items()},
    "Readout": READOUT,
    "Params": PARAMS,
    "Params of a stack": STACK,
    "Ids": Ids(jnp.arange(3)),
    "CellGradients": CellGradients(a_cell(), None, jnp.ones(3), jnp.ones((2, 3)), jnp.ones((2, 3))),
    "Gradients": Gradients(PARAMS, jnp.ones(3), jnp.ones(3)),
    "TrainState": STATE,
    "Figures": train.Figures(*jnp.ones(3), jnp.asarray(True)),
}
CUSTOM = {
    "function": a_cell(activation=softplus),
    "Activation": a_cell(activation=Activation(softplus, complement)),
    "Form": Cell(*jax.tree.leaves(a_cell()), form=Form(residual), parameters=jnp.ones(3)),
}


def test_the_examples_hold_every_public_pytree():
    assert {type(value) for value in EXAMPLES.values()} == set(public_dataclasses().values())
    assert {"Cell", "TrainState", "Figures"} <= set(public_dataclasses())


# optax's own named tuples, which are not ours to register.
for kind in (optax.EmptyState, optax.ScaleByAdamState, optax.TraceState):
    export.register_namedtuple_serialization(kind, serialized_name=f"optax.{kind.__name__}")


@pytest.mark.parametrize("name", EXAMPLES)
def test_functions_of_every_pytree_are_exported(name):
    value = EXAMPLES[name]
    taken = jax.jit(lambda x: (x, {"beside": [x]}))
    blob = export.export(taken)(value).serialize()
    found, beside = export.deserialize(blob).call(value)
    assert found == beside["beside"][0] == value
    assert jax.tree.structure(found) == jax.tree.structure(value)


def test_an_exported_function_is_read_by_another_process():
    value = STACK, STATE
    blob = export.export(jax.jit(lambda x: x))(value).serialize()
    kinds = in_a_new_process(
        "import json, sys, jax, jaxrnn, jaxrnn.train, optax; from jax import export;"
        "export.register_namedtuple_serialization(optax.EmptyState,"
        " serialized_name='optax.EmptyState');"
        f"found = export.deserialize(bytearray.fromhex({blob.hex()!r})).in_tree;"
        "print(json.dumps(str(found)))"
    )
    assert "TrainState" in kinds and "'tanh', 'rate'" in kinds.replace('"', "'")


@pytest.mark.parametrize("name", CUSTOM)
def test_exporting_a_custom_function_names_its_field(name):
    cell = CUSTOM[name]
    field = "form" if name == "Form" else "activation"
    exported = export.export(jax.jit(lambda cell: jax.tree.map(jnp.sin, cell)))(cell)
    said = rf"^{field}: expected a name, to be serialised, got functions, .*; or export what takes"
    with pytest.raises(ValueError, match=said):
        exported.serialize()
    # The arrays alone go.
    leaves, tree = jax.tree.flatten(cell)
    sines = jax.jit(lambda *leaves: jax.tree.leaves(jax.tree.map(jnp.sin, tree.unflatten(leaves))))
    exported = export.deserialize(export.export(sines)(*leaves).serialize())
    np.testing.assert_array_equal(exported.call(*leaves)[0], jnp.sin(cell.U))


@pytest.mark.parametrize("name", [*EXAMPLES, *CUSTOM])
def test_copies_and_pickles_are_equal(name):
    value = {**EXAMPLES, **CUSTOM}[name]
    if name == "TrainState":  # JAX pickles raw keys only
        value = dataclasses.replace(value, key=jax.random.key_data(value.key))
    for made in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert made == value and type(made) is type(value) and repr(made) == repr(value)
        assert jax.tree.structure(made) == jax.tree.structure(value)
    changed = jax.tree.map(lambda x: ~x if x.dtype == bool else x + jnp.ones((), x.dtype), value)
    assert changed != value and value != jax.tree.map(lambda x: x.astype("float16"), value)
    with pytest.raises(TypeError, match="unhashable"):
        hash(value)


@pytest.mark.parametrize("activation", [lambda a: jnp.tanh(a), jnp.tanh])
def test_functions_without_a_module_name_are_not_pickled(activation):
    cell = a_cell(activation=activation)
    assert copy.deepcopy(cell) == cell
    with pytest.raises((pickle.PicklingError, AttributeError), match=activation.__name__):
        pickle.dumps(cell)


def test_equality_compares_structure_and_names():
    cell = a_cell()
    assert cell != a_cell(activation="relu") and cell != a_cell(form="voltage")
    assert cell != a_cell(leak=0.5) and cell != READOUT and cell != 3
    assert Params((cell,), READOUT) != Params(cell, READOUT)
    assert STATE == STATE and STATE != dataclasses.replace(STATE, key=jax.random.key(4))


def test_shapes_and_empty_tangents_are_compared_and_shown():
    shapes = jax.eval_shape(a_cell), jax.eval_shape(a_cell), jax.eval_shape(lambda: a_cell(4))
    assert shapes[0] == shapes[1] != shapes[2] and shapes[0] != a_cell()
    assert repr(shapes[0]) == repr(a_cell())
    empty = Ids(np.zeros(3, jax.dtypes.float0))
    assert empty == copy.deepcopy(empty) != Ids(np.zeros(2, jax.dtypes.float0))
    assert repr(empty) == "Ids(ids=f0[3])"


def test_repr_is_one_line_of_shapes():
    cell = jaxrnn.init_cell(jax.random.key(0), 3, 16)
    assert repr(cell) == "Cell(U=f32[16,3], W=f32[16,16], b=f32[16], activation='tanh')"
    found = repr(dataclasses.replace(cell, b=None, leak=jnp.ones((), "bfloat16"), form="voltage"))
    assert found == (
        "Cell(U=f32[16,3], W=f32[16,16], b=None, leak=bf16[], activation='tanh', form='voltage')"
    )
    assert repr(Ids(np.zeros((2, 3), "uint8"))) == "Ids(ids=u8[2,3])"
    assert "key=key<fry>[]" in repr(STATE) and "h=f32[2,3]" in repr(STATE)
    adam = repr(train.init_state(PARAMS, optax.adam(0.1), 2))
    assert "ScaleByAdamState(count=i32[], mu=Params(" in adam and "Array(" not in adam
    assert repr(EXAMPLES["Figures"]).endswith("finite=bool[])")
    assert all("\n" not in repr(value) for value in (*EXAMPLES.values(), *CUSTOM.values()))


def test_traced_cells_have_the_same_repr():
    seen = []
    jax.jit(lambda cell: seen.append(repr(cell)))(a_cell())
    jax.grad(lambda cell: seen.append(repr(cell)) or jnp.sum(cell.W))(a_cell())
    jax.vmap(lambda cell: seen.append(repr(cell)))(jax.tree.map(lambda x: x[None], a_cell()))
    assert seen == [repr(a_cell())] * 3
