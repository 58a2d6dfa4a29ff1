"""The unroll under every transformation of JAX, and in every pair of its variants."""

import json
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import matrix
import numpy as np
import pytest
from helpers import (
    TOLERANCE,
    assert_close,
    inner,
    naive_unroll,
    pairwise,
    random_case,
    split_at_marks,
    weights,
)
from matrix import B, D, H, T, naive

import jaxrnn

# What is compiled here, once, takes the time; the sizes do not.


@pytest.fixture(scope="module")
def case():
    return matrix.case()


# Of each of these another one of the same row is left.
RARE = {
    "checkpoint, nothing_saveable", "checkpoint, dots_saveable", "checkpoint, everything_saveable",
    "forward over forward over reverse", "reverse over reverse over reverse",
    "vmap over data, first", "data inside parameters", "no steps, jvp", "vmap over parameters",
    "padding that holds NaN, jvp", "sequences of length 0, jvp",
}  # fmt: skip


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.full) if name in RARE else name
    for name in matrix.TRANSFORMATIONS
])  # fmt: skip
def test_a_transformation_equals_that_of_a_naive_scan(name, case):
    found = matrix.ask(name, jaxrnn.unroll, *case)
    expected = matrix.expected(name, *case)
    assert_close(jax.tree.leaves(found), jax.tree.leaves(expected), matrix.tolerance(name))


# Dtypes, in pairs with all else ---------------------------------------------------------------

SCALED = jaxrnn.Activation(
    lambda a: 1.7159 * jnp.tanh(2 / 3 * a), lambda h: 2 / 3 * (1.7159 - h * h / 1.7159)
)
ACTIVATIONS = {name: name for name in ("tanh", "relu", "sigmoid", "identity")}
ACTIVATIONS |= {"an Activation": SCALED, "a callable": jnp.sin}
FACTORS = {
    "activation": list(ACTIVATIONS),
    "dtype": ["float64", "float32", "bfloat16", "float16"],
    "option": ["", "checkpoint_every", "truncate", "window"],
    "invalid": ["", "lengths", "mask"],
    "leak": ["", "scalar", "per unit"],
    "mixture": ["forward over reverse", "reverse over forward", "reverse over reverse"],
    "inputs": ["floats", "ids"],
    "reverse": ["", "reverse"],
    "drive": ["", "drive"],
    "mapped": ["", "vmap"],
    "implementation": ["", "associative"],
}


# In float64 test_naive_scan.py has the pairs.
FEW = {
    "activation": ["tanh", "a callable"], "dtype": ["float32", "bfloat16"],
    "leak": ["", "per unit"], "mixture": ["forward over reverse", "reverse over forward"],
}  # fmt: skip
PAIRS = list(pairwise(FACTORS | FEW))


def arrays_of(activation, leak, inputs, drive, dtype, **_):
    """What is differentiated, by name, and ids where they are the inputs."""
    leak = {"": None, "scalar": 0.6, "per unit": np.array([0.0, 0.3, 0.7, 1.0])}[leak]
    leak = None if leak is None else jnp.asarray(leak, dtype)
    params, xs, h0, _ = random_case(
        seed=5, T=T, batch=(B,), D=D, H=H, dtype=dtype, leak=leak,
        activation=ACTIVATIONS[activation],
    )  # fmt: skip
    arrays = {"cell": params.cell, "h0": h0}
    if inputs == "floats":
        arrays["xs"] = xs
    if drive:
        arrays["drive"] = 0.3 * weights((T, B, H), seed=3, dtype=dtype)
    ids = jnp.asarray(np.random.default_rng(4).integers(D, size=(T, B)))
    return arrays, (jaxrnn.Ids(ids) if inputs == "ids" else None)


def ours(arrays, ids, option, invalid, reverse, mapped, implementation, **_):
    how = {option: 2} if option else {}
    how |= {"implementation": implementation} if implementation else {}
    valid = {"lengths": matrix.LENGTHS, "mask": matrix.GAPS}.get(invalid)
    given = {"xs": ids, invalid or "mask": valid} | arrays
    axes = {"cell": None, "h0": 0, "xs": 1, "lengths": 0, "mask": 1, "drive": 1}
    if valid is None:
        given.pop("mask")

    def run(given):
        return jaxrnn.unroll(reverse=bool(reverse), **how, **given)

    if mapped:
        run = jax.vmap(run, ({name: axes[name] for name in given},), (0, 1))
    return run(given)


def by_naive_scan(arrays, ids, option, invalid, reverse, **_):
    valid = {"lengths": matrix.up_to(matrix.LENGTHS), "mask": matrix.GAPS}.get(invalid)
    how = {option: 2} if option in ("truncate", "window") else {}
    return naive(**({"xs": ids} | arrays), valid=valid, reverse=bool(reverse), **how)


def derivatives(run, mixture, arrays, tangents):
    """Of a loss in float64: (states and first derivatives, Hessian times vector)."""

    def loss(arrays):
        states = run(arrays)
        h_last, hs = jax.tree.map(lambda h: h.astype(jnp.float64), states)
        return jnp.sum(jnp.sin(hs)) + jnp.sum(jnp.exp(h_last)), states

    def along(arrays):
        gradient, states = jax.grad(loss, has_aux=True)(arrays)
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), (gradient, tangents))
        return inner(*wide), (gradient, states)

    def pushed(arrays):
        _, slope, states = jax.jvp(loss, (arrays,), (tangents,), has_aux=True)
        return slope, states

    if mixture == "forward over reverse":
        first, (product, d_states) = jax.jvp(jax.grad(loss, has_aux=True), (arrays,), (tangents,))
        return (*first, d_states), product
    outer = {"reverse over reverse": along, "reverse over forward": pushed}[mixture]
    first, product = jax.value_and_grad(outer, has_aux=True)(arrays)
    # A slope is one number, of which cancellation may leave little: it is not compared.
    return first[1], product


# Rounding to half precision errs by eps/2, in each state, each tangent and each adjoint. Through
# Jacobians of norm ≤ 1 that adds up over T = 5 steps; a first derivative meets it in its
# states and in itself (2·T·eps/2), a second in twice as many factors.
FIRST, SECOND = T, 2 * T


def check(how):
    arrays, ids = arrays_of(**how)
    tangents = jax.tree.map(lambda x: weights(x.shape, x.size, x.dtype), arrays)

    def by(run):
        return jax.jit(partial(derivatives, lambda a: run(a, ids, **how), how["mixture"]))

    found = by(ours)(arrays, tangents)
    assert {x.dtype.name for x in jax.tree.leaves(found)} == {how["dtype"]}
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), (arrays, tangents))
    expected = by(by_naive_scan)(*wide)
    if how["dtype"] in TOLERANCE:
        once = TOLERANCE[how["dtype"]]
        twice = 6 * once
    else:
        once, twice = (n * float(jnp.finfo(how["dtype"]).eps) for n in (FIRST, SECOND))
    assert_close(found[0], expected[0], once)
    assert_close(found[1], expected[1], twice)


def words(case):
    return ", ".join(filter(None, case.values()))


@pytest.mark.parametrize("how", PAIRS, ids=words)
def test_derivatives_in_every_dtype_equal_those_of_float64(how):
    check(how)


# name -> the factors that differ from the plain one.
VARIANTS = {
    "plain": {},
    "lengths": {"invalid": "lengths"},
    "mask": {"invalid": "mask"},
    "reverse": {"reverse": "reverse"},
    "reverse with lengths": {"reverse": "reverse", "invalid": "lengths"},
    "ids": {"inputs": "ids"},
    "leak": {"leak": "scalar"},
    "leak of each unit": {"leak": "per unit"},
    "drive": {"drive": "drive"},
    "checkpoint_every": {"option": "checkpoint_every"},
    "truncate": {"option": "truncate"},
    "window": {"option": "window"},
}


@pytest.mark.full
@pytest.mark.parametrize("mixture", FACTORS["mixture"])
@pytest.mark.parametrize("mapped", FACTORS["mapped"])
@pytest.mark.parametrize("dtype", FACTORS["dtype"])
@pytest.mark.parametrize("activation", FACTORS["activation"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_whole_product_in_every_dtype(variant, activation, dtype, mapped, mixture):
    plain = {name: values[0] for name, values in FACTORS.items()}
    asked = {"activation": activation, "dtype": dtype, "mapped": mapped, "mixture": mixture}
    check(plain | VARIANTS[variant] | asked)


# Edges ----------------------------------------------------------------------------------------

SHAPES = {
    "no steps": {"T": 0},
    "one step": {"T": 1},
    "no sequences": {"batch": (0,)},
    "one unit": {"H": 1},
    "one of everything": {"T": 1, "batch": (1,), "D": 1, "H": 1},
    "no batch axis": {"batch": ()},
    "three batch axes": {"batch": (2, 1, 3)},
}


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES.keys())
def test_derivatives_of_small_shapes_and_more_batch_axes(sizes):
    args, tangents = matrix.case(**sizes)
    found, expected = (
        jax.jit(partial(derivatives, lambda args, f=f: f(*args), "forward over reverse"))(
            args, tangents
        )
        for f in (jaxrnn.unroll, naive_unroll)
    )
    assert_close(found, expected, 6 * TOLERANCE["float64"])


def test_derivatives_of_numpy_arrays(case):
    args, tangents = jax.tree.map(np.asarray, case)
    for name in ("grad", "jvp"):
        # Not under jit, where they would be JAX's arrays.
        found = matrix.TRANSFORMATIONS[name].run(jaxrnn.unroll, args, tangents)
        assert_close(found, matrix.expected(name, *case))


def test_derivatives_by_weakly_typed_values(case):
    (cell, xs, h0), _ = case
    one = jnp.broadcast_to(jnp.asarray(0.5), h0.shape)
    assert one.weak_type

    def run(f):
        # A Python number as the leak: it is differentiated like an array.
        def states(values):
            leak, h0 = values
            return f(jaxrnn.Cell(cell.U, cell.W, cell.b, leak), xs, h0)

        found = jax.jit(partial(derivatives, states, "forward over reverse"))
        return found((0.3, one), (1.0, one))

    found = run(jaxrnn.unroll)
    assert_close(found, run(naive_of_any_leak), 6 * TOLERANCE["float64"])
    assert {x.dtype.name for x in jax.tree.leaves(found)} == {"float64"}


def naive_of_any_leak(cell, xs, h0):
    return naive_unroll(jax.tree.map(jnp.asarray, cell), xs, h0)


def nothing(x):
    return np.zeros(np.shape(x), jax.dtypes.float0)


@pytest.mark.parametrize("invalid", ["lengths", "mask"])
def test_ids_lengths_and_masks_have_no_tangents(case, invalid):
    (cell, _, h0), (d_cell, _, d_h0) = case
    ids = jaxrnn.Ids(jnp.asarray(np.random.default_rng(4).integers(D, size=(T, B))))
    valid = jnp.asarray(matrix.LENGTHS if invalid == "lengths" else matrix.GAPS)

    def states(cell, ids, h0, valid):
        return jaxrnn.unroll(cell, ids, h0, **{invalid: valid})

    def loss(*args):
        return jnp.sum(jnp.sin(states(*args)[1]))

    given = cell, ids, h0, valid
    tangents = d_cell, jax.tree.map(nothing, ids), d_h0, nothing(valid)
    pushed = jax.jit(lambda *given: jax.jvp(states, given, tangents))(*given)
    found = jax.grad(loss, (0, 1, 2, 3), allow_int=True)(*given)
    assert found[1].ids.dtype == found[3].dtype == jax.dtypes.float0

    known = matrix.up_to(matrix.LENGTHS) if invalid == "lengths" else matrix.GAPS

    @jax.jit
    def expected(cell, h0):
        def states(cell, h0):
            return naive(cell, ids, h0, valid=known)

        gradient = jax.grad(lambda *args: jnp.sum(jnp.sin(states(*args)[1])), (0, 1))
        return jax.jvp(states, (cell, h0), (d_cell, d_h0)), gradient(cell, h0)

    assert_close((pushed, (found[0], found[2])), expected(cell, h0))


# The table ------------------------------------------------------------------------------------

FOUND = json.loads(matrix.FOUND.read_text())


def test_the_readme_shows_the_table():
    readme = pathlib.Path(__file__).with_name("README.md")
    table = split_at_marks(readme.read_text(), "transformations")[1]
    assert table == matrix.render(FOUND)


def test_our_row_holds_what_the_tests_run():
    assert FOUND["rows"]["jaxrnn"]["marks"] == dict.fromkeys(matrix.TRANSFORMATIONS, "yes")
    assert FOUND["groups"] == matrix.groups()


def test_rows_hold_known_transformations_and_marks():
    for row in FOUND["rows"].values():
        assert set(row["marks"]) <= set(matrix.TRANSFORMATIONS)
        assert set(row["marks"].values()) <= {"yes", "no", "wrong"}


@pytest.mark.parametrize(("find", "mark"), [
    (lambda: [1.0, 2.0], "yes"), (lambda: [1.0, 2.1], "wrong"), (lambda: [1.0, np.nan], "wrong"),
    (lambda: [1 / 0, 2.0], "no"),
])  # fmt: skip
def test_marks_are_yes_no_and_wrong(find, mark):
    assert matrix.judged(find, [1.0, 2.0], 1e-4)[0] == mark


@pytest.mark.parametrize(("marks", "word"), [
    ("yes yes", "yes"), ("no no", "no"), ("wrong", "wrong"), ("yes no", "1 of 2"),
    ("yes wrong no", "1 of 3, else wrong"), ("", "–"),
])  # fmt: skip
def test_several_marks_are_summed_up_in_one_word(marks, word):
    marks = dict(enumerate(marks.split()))
    assert matrix.summary(marks, range(3)) == word


def test_a_wrong_layer_is_marked_wrong(case):
    # The residual of h_{t-1} in place of its product with W.
    def other(cell, xs, h0):
        return naive(jaxrnn.Cell(cell.U, jnp.eye(H), cell.b), xs, h0)

    reference = matrix.expected("grad", *case)
    mark, _ = matrix.judged(partial(matrix.ask, "grad", other, *case), reference, 1e-4)
    assert mark == "wrong"
