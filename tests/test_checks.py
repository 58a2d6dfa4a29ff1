"""What the public functions say to arguments that do not fit."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

import jaxrnn
from jaxrnn import Cell, Ids, Params, Readout, textbook

T, B, D, H, K = 5, 2, 4, 3, 2
CELL = Cell(jnp.zeros((H, D)), jnp.zeros((H, H)), jnp.zeros(H))
READOUT = Readout(jnp.zeros((K, H)), jnp.zeros(K))
XS, HS = jnp.zeros((T, B, D)), jnp.zeros((T, B, H))
IDS = np.zeros((T, B), int)
LOGITS = jnp.zeros((T, B, K))


def cell(**changes):
    return {"cell": dataclasses.replace(CELL, **changes)}


def readout(**changes):
    return {"readout": dataclasses.replace(READOUT, **changes)}


def ids(*index, value):
    result = IDS.copy()
    result[index] = value
    return result


# Every function by the same words, each with arguments that fit.


def step(cell=CELL, x=XS[0], h=HS[0]):
    return jaxrnn.step(cell, x, h)


def unroll(cell=CELL, xs=XS, h0=None, **how):
    return jaxrnn.unroll(cell, xs, h0, **how)


def bptt(cell=CELL, xs=XS, h0=None, hs=HS, dhs=HS, **how):
    return jaxrnn.bptt(cell, xs, h0, hs, dhs, **how)


def loss_and_grads(cell=CELL, readout=READOUT, xs=XS, targets=IDS, **how):
    return jaxrnn.loss_and_grads(Params(cell, readout), xs, targets, **how)


def double_sum(cell=CELL, readout=READOUT, xs=XS, targets=IDS):
    return textbook.loss_and_grads(Params(cell, readout), xs, targets)


def contributions(cell=CELL, readout=READOUT, xs=XS, targets=IDS):
    return textbook.contributions(Params(cell, readout), xs, targets)


def apply_readout(readout=READOUT, hs=HS):
    return jaxrnn.apply_readout(readout, hs)


def cross_entropy(logits=LOGITS, targets=IDS, where=None):
    return jaxrnn.cross_entropy(logits, targets, where=where)


def init_cell(input_size=D, hidden_size=H, **how):
    return jaxrnn.init_cell(random.key(0), input_size, hidden_size, **how)


def init_params(output_size=K, **how):
    return jaxrnn.init_params(random.key(0), D, H, output_size, **how)


RECURRENT = (unroll, bptt, loss_and_grads)
WHOLE = (loss_and_grads, double_sum, contributions)
SEQUENCES = (*RECURRENT, double_sum, contributions)

# fmt: off
CELLS = [
    ({"cell": (CELL, CELL)}, TypeError, "cell: expected a jaxrnn.Cell, got tuple"),
    (cell(U=jnp.zeros(D)), ValueError, "cell.U: expected shape [any, any], got [4]"),
    (cell(U=jnp.zeros((H, D), int)), TypeError,
     "cell.U: expected a floating dtype, got int64"),
    (cell(W=jnp.zeros((H, D))), ValueError, "cell.W: expected shape [3, 3], got [3, 4]"),
    (cell(W=jnp.zeros((H, H), complex)), TypeError,
     "cell.W: expected a floating dtype, got complex128"),
    (cell(b=jnp.zeros(D)), ValueError, "cell.b: expected shape [3], got [4]"),
    (cell(b="b"), TypeError, "cell.b: expected an array, got str"),
    (cell(b=None), TypeError, "cell.b: expected an array, got NoneType"),
    (cell(leak=jnp.zeros(2)), ValueError, "cell.leak: expected shape [] or [3], got [2]"),
    (cell(leak=1), TypeError, "cell.leak: expected a floating dtype, got int64"),
]
ACTIVATIONS = [
    (cell(activation="swish"), ValueError,
     "activation: expected one of 'tanh', 'relu', 'sigmoid', 'identity', got 'swish'"),
    (cell(activation=3), TypeError,
     "activation: expected a name, a jaxrnn.Activation or a callable, got int"),
]
INPUTS = [
    ({"xs": IDS}, TypeError, "xs: expected floats, or ids wrapped as jaxrnn.Ids(ids), "
     "got bare int64"),
    ({"xs": [0, 1]}, TypeError, "xs: expected floats, or ids wrapped as jaxrnn.Ids(ids), "
     "got bare int64"),
    ({"xs": XS[..., :3]}, ValueError, "xs: expected shape [T, *batch, 4], got [5, 2, 3]"),
    ({"xs": XS[0, 0]}, ValueError, "xs: expected shape [T, *batch, 4], got [4]"),
    ({"xs": XS.astype(complex)}, TypeError, "xs: expected a floating dtype, got complex128"),
    ({"xs": XS > 0}, TypeError, "xs: expected a floating dtype, got bool"),
    ({"xs": None}, TypeError, "xs: expected an array, got NoneType"),
    ({"xs": Ids(XS)}, TypeError, "xs.ids: expected an integer dtype, got float64"),
    ({"xs": Ids(0)}, ValueError, "xs.ids: expected shape [T, *batch], got []"),
    ({"xs": Ids(ids(3, 1, value=D))}, ValueError,
     "xs.ids: expected ids from 0 to 3, got 4 at index (3, 1)"),
    ({"xs": Ids(ids(0, 1, value=-1))}, ValueError,
     "xs.ids: expected ids from 0 to 3, got -1 at index (0, 1)"),
]
OF_STEP = [
    ({"x": IDS[0]}, TypeError, "x: expected floats, or ids wrapped as jaxrnn.Ids(ids), "
     "got bare int64"),
    ({"x": XS[0, :, :3]}, ValueError, "x: expected shape [*batch, 4], got [2, 3]"),
    ({"x": Ids([0, 7])}, ValueError,
     "x.ids: expected ids from 0 to 3, got 7 at index (1,)"),
    ({"h": HS}, ValueError, "h: expected shape [2, 3], got [5, 2, 3]"),
    ({"h": HS[0].astype(int)}, TypeError, "h: expected a floating dtype, got int64"),
    ({"h": None}, TypeError, "h: expected an array, got NoneType"),
]
STATES = [
    ({"h0": HS[0, 0]}, ValueError, "h0: expected shape [2, 3], got [3]"),
    ({"h0": HS[0] > 0}, TypeError, "h0: expected a floating dtype, got bool"),
    ({"drive": XS}, ValueError, "drive: expected shape [5, 2, 3], got [5, 2, 4]"),
    ({"drive": HS.astype(int)}, TypeError, "drive: expected a floating dtype, got int64"),
    ({"lengths": [1, 2], "mask": IDS == 0}, ValueError,
     "lengths and mask: expected at most one of them, got both"),
    ({"lengths": [1, 6]}, ValueError, "lengths: expected 0 to 5, got 6"),
    ({"lengths": [-1, 5]}, ValueError, "lengths: expected 0 to 5, got -1"),
    ({"lengths": 2}, ValueError, "lengths: expected shape [2], got []"),
    ({"lengths": [1.0, 2.0]}, TypeError, "lengths: expected an integer dtype, got float64"),
    ({"mask": IDS}, TypeError, "mask: expected dtype bool, got int64"),
    ({"mask": IDS[0] == 0}, ValueError, "mask: expected shape [5, 2], got [2]"),
]
OF_BPTT = [
    ({"hs": HS[1:]}, ValueError, "hs: expected shape [5, 2, 3], got [4, 2, 3]"),
    ({"dhs": XS}, ValueError, "dhs: expected shape [5, 2, 3], got [5, 2, 4]"),
    ({"dh_last": HS}, ValueError, "dh_last: expected shape [2, 3], got [5, 2, 3]"),
]
READOUTS = [
    ({"readout": CELL}, TypeError, "readout: expected a jaxrnn.Readout, got Cell"),
    (readout(V=jnp.zeros((K, H), int)), TypeError,
     "readout.V: expected a floating dtype, got int64"),
    (readout(c=jnp.zeros(H)), ValueError, "readout.c: expected shape [2], got [3]"),
]
TARGETS = [
    ({"targets": IDS[1:]}, ValueError, "targets: expected shape [5, 2], got [4, 2]"),
    ({"targets": XS}, ValueError, "targets: expected shape [5, 2, 2], got [5, 2, 4]"),
    ({"targets": IDS == 0}, TypeError, "targets: expected a floating dtype, got bool"),
    ({"targets": ids(4, 0, value=2)}, ValueError,
     "targets: expected ids from 0 to 1, got 2 at index (4, 0)"),
]
OF_CROSS_ENTROPY = [
    ({"logits": IDS}, TypeError, "logits: expected a floating dtype, got int64"),
    ({"logits": 1.0}, ValueError, "logits: expected shape [T, *batch, K], got []"),
    ({"where": IDS}, TypeError, "where: expected dtype bool, got int64"),
    ({"where": IDS[0] == 0}, ValueError, "where: expected shape [5, 2], got [2]"),
]
OF_INIT = [
    ({"input_size": 0}, ValueError, "input_size: expected at least 1, got 0"),
    ({"hidden_size": 3.0}, TypeError, "hidden_size: expected a whole number, got float"),
    ({"hidden_size": True}, TypeError, "hidden_size: expected a whole number, got bool"),
    ({"recurrent": "haar"}, ValueError, "recurrent: expected one of 'orthogonal', "
     "'identity', 'normal', 'uniform', got 'haar'"),
    ({"activation": "swish"}, *ACTIVATIONS[0][1:]),
    ({"leak": [0.5, 0.5]}, ValueError, "leak: expected shape [] or [3], got [2]"),
]
TABLE = [
    ((step, *RECURRENT, double_sum, contributions), CELLS),
    ((step, *RECURRENT, double_sum, contributions), ACTIVATIONS),
    (SEQUENCES, INPUTS), (RECURRENT, STATES), ((*WHOLE, cross_entropy), TARGETS),
    ((*WHOLE, apply_readout), READOUTS), ((step,), OF_STEP), ((bptt,), OF_BPTT),
    ((cross_entropy,), OF_CROSS_ENTROPY), ((init_cell,), OF_INIT),
    (WHOLE, [(readout(V=jnp.zeros((K, D))), ValueError,
              "readout.V: expected shape [any, 3], got [2, 4]")]),
    ((apply_readout,), [({"hs": XS}, ValueError, "hs: expected shape [..., 3], got [5, 2, 4]"),
                        ({"hs": IDS}, TypeError, "hs: expected a floating dtype, got int64")]),
    ((init_params,), [({"output_size": -1}, ValueError, "output_size: expected at least 1, got -1"),
                      ({"output_size": 2.0}, TypeError,
                       "output_size: expected a whole number, got float")]),
]
# fmt: on
CASES = [
    pytest.param(function, *case, id=f"{function.__name__}-{case[2]}")
    for functions, cases in TABLE
    for function in functions
    for case in cases
]


@pytest.mark.parametrize(("function", "changes", "kind", "message"), CASES)
def test_message_names_argument_expectation_and_what_came(function, changes, kind, message):
    # The argument may be named with the path to it: params.cell.U.
    with pytest.raises(kind, match=r"^(params\.|cell\.)*" + re.escape(message) + "$"):
        function(**changes)


@pytest.mark.parametrize("function", dict.fromkeys(f for fs, _ in TABLE for f in fs))
def test_the_arguments_of_the_table_fit_where_they_are_not_changed(function):
    jax.eval_shape(function)


@pytest.mark.parametrize("call", [jaxrnn.loss_and_grads, textbook.loss_and_grads])
def test_params_in_another_shape(call):
    with pytest.raises(TypeError, match=r"^params: expected a jaxrnn.Params, got tuple$"):
        call((CELL, READOUT), XS, IDS)


@pytest.mark.parametrize("xs", [[[0.0], [0.0, 1.0]], np.array([XS, None], object)])
def test_arrays_that_jax_cannot_make(xs):
    with pytest.raises((TypeError, ValueError), match=r"^xs: expected .*, got "):
        unroll(xs=xs)


@pytest.mark.parametrize("dtype", [int, complex])
def test_init_in_a_dtype_that_is_not_floating(dtype):
    with pytest.raises(TypeError, match=rf"^dtype: expected .*floating.*, got .*{dtype.__name__}"):
        init_cell(dtype=dtype)


def test_an_activation_without_a_function():
    with pytest.raises(TypeError, match=r"^activation.*: expected .*callable.*, got .*str"):
        unroll(**cell(activation=jaxrnn.Activation("tanh")))


def test_shapes_are_checked_under_jit_too():
    with pytest.raises(ValueError, match=r"^h0: expected shape \[2, 3\], got \[3\]"):
        jax.jit(jaxrnn.unroll)(CELL, XS, HS[0, 0])


def test_constructors_take_anything():
    made = Params(Cell("U", None, 3, leak={}, activation=None), Readout(object(), Ids("a")))
    assert made.cell.U == "U" and made.readout.c.ids == "a"
    mapped = jax.tree.map(lambda _: object(), Params(CELL, READOUT))
    assert isinstance(mapped, Params) and type(mapped.cell.W) is object
    assert jax.tree.map(lambda _: None, CELL).activation == "tanh"
