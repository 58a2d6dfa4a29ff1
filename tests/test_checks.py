"""What the public functions say to arguments that do not fit."""

import dataclasses
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_case, rare, weights
from jax import random

import jaxrnn
from jaxrnn import Cell, Ids, Params, Readout, textbook

T, B, D, H, K = 5, 2, 4, 3, 2
CELL = Cell(jnp.zeros((H, D)), jnp.zeros((H, H)), jnp.zeros(H))
READOUT = Readout(jnp.zeros((K, H)), jnp.zeros(K))
XS, HS = jnp.zeros((T, B, D)), jnp.zeros((T, B, H))
IDS = np.zeros((T, B), int)
LOGITS = jnp.zeros((T, B, K))
SECOND = Cell(jnp.zeros((H, H)), jnp.zeros((H, H)), jnp.zeros(H))
STACK, PAIRS = (CELL, SECOND), ((CELL, CELL), dataclasses.replace(SECOND, U=jnp.zeros((H, 2 * H))))
WIDE = Cell(jnp.zeros((K, H)), jnp.zeros((K, K)), jnp.zeros(K))
PARAMS = Params(CELL, READOUT)
TURNED = XS.swapaxes(0, 1)  # batch first
VALID = IDS == 0


def cell(**changes):
    return {"cell": dataclasses.replace(CELL, **changes)}


def readout(**changes):
    return {"readout": dataclasses.replace(READOUT, **changes)}


def ids(*index, value):
    result = IDS.copy()
    result[index] = value
    return result


class Sparse:
    """As scipy and JAX have them."""

    def todense(self):
        return XS


class Torch:
    """A tensor that requires grad."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. "
                           "Use tensor.detach().numpy() instead.\nat some place")  # fmt: skip


# Every function by the same words, each with arguments that fit.


def step(cell=CELL, x=XS[0], h=HS[0]):
    return jaxrnn.step(cell, x, h)


def outputs(cell=CELL, hs=HS):
    return jaxrnn.outputs(cell, hs)


def unroll(cell=CELL, xs=XS, h0=None, **how):
    return jaxrnn.unroll(cell, xs, h0, **how)


def bptt(cell=CELL, xs=XS, h0=None, hs=HS, dhs=HS, **how):
    return jaxrnn.bptt(cell, xs, h0, hs, dhs, **how)


def loss_and_grads(cell=CELL, readout=READOUT, xs=XS, targets=IDS, **how):
    return jaxrnn.loss_and_grads(Params(cell, readout), xs, targets, **how)


def unroll_layers(cells=STACK, xs=XS, h0=None, **how):
    return jaxrnn.unroll_layers(cells, xs, h0, **how)


def pairs(cells=PAIRS, xs=XS, h0=None, **how):
    return jaxrnn.unroll_layers(cells, xs, h0, **how)


def bidirectional(forward=CELL, backward=CELL, xs=XS, h0=None, **how):
    return jaxrnn.bidirectional(forward, backward, xs, h0, **how)


def with_params(params=PARAMS, xs=XS, targets=IDS, **how):
    return jaxrnn.loss_and_grads(params, xs, targets, **how)


def double_sum_with_params(params=PARAMS, xs=XS, targets=IDS):
    return textbook.loss_and_grads(params, xs, targets)


def double_sum(cell=CELL, readout=READOUT, xs=XS, targets=IDS):
    return textbook.loss_and_grads(Params(cell, readout), xs, targets)


def contributions(cell=CELL, readout=READOUT, xs=XS, targets=IDS):
    return textbook.contributions(Params(cell, readout), xs, targets)


def apply_readout(readout=READOUT, hs=HS, **how):
    return jaxrnn.apply_readout(readout, hs, **how)


def cross_entropy(logits=LOGITS, targets=IDS, where=None):
    return jaxrnn.cross_entropy(logits, targets, where=where)


def init_cell(input_size=D, hidden_size=H, **how):
    return jaxrnn.init_cell(random.key(0), input_size, hidden_size, **how)


def init_params(output_size=K, **how):
    return jaxrnn.init_params(random.key(0), D, H, output_size, **how)


ONE_CELL = (unroll, bptt)
RECURRENT = (*ONE_CELL, loss_and_grads)
LAYERS = (unroll_layers, pairs, bidirectional)
TEXTBOOK = (double_sum, contributions)
WHOLE = (loss_and_grads, *TEXTBOOK)
SEQUENCES = (*RECURRENT, *TEXTBOOK)

RAGGED = "a list whose entries have different shapes"

# fmt: off
CELLS = [
    (cell(U=jnp.zeros(D)), ValueError, "cell.U: expected shape [any, any], got [4]"),
    (cell(U=jnp.zeros((H, D), int)), TypeError,
     "cell.U: expected a floating dtype, got int64"),
    (cell(W=jnp.zeros((H, D))), ValueError, "cell.W: expected shape [3, 3], got [3, 4]"),
    (cell(W=jnp.zeros((H, H), complex)), TypeError,
     "cell.W: expected a floating dtype, got complex128"),
    (cell(W=[[0.0], [0.0, 1.0]]), TypeError, f"cell.W: expected an array, got {RAGGED}"),
    (cell(b=jnp.zeros(D)), ValueError, "cell.b: expected shape [3], got [4]"),
    (cell(b="b"), TypeError, "cell.b: expected an array, got str"),
    (cell(leak=jnp.zeros(2)), ValueError, "cell.leak: expected shape [] or [3], got [2]"),
    (cell(leak=1), TypeError, "cell.leak: expected a floating dtype, got int64"),
    (cell(leak=True), TypeError, "cell.leak: expected a floating dtype, got bool"),
]
ANY = "a jaxrnn.Activation or any elementwise callable (jax.nn.gelu, say)"
ACTIVATIONS = [
    (cell(activation="swish"), ValueError,
     f"activation: expected one of 'tanh', 'relu', 'sigmoid', 'identity', {ANY}, got 'swish'"),
    (cell(activation=3), TypeError, f"activation: expected a name, {ANY}, got int"),
]
# Something else where one Cell belongs.
OF_ONE_CELL = [
    ({"cell": STACK}, TypeError,
     "cell: expected a jaxrnn.Cell (a stack goes to unroll_layers), got tuple"),
    ({"cell": list(STACK)}, TypeError,
     "cell: expected a jaxrnn.Cell (a stack goes to unroll_layers), got list"),
    ({"cell": PARAMS}, TypeError, "cell: expected a jaxrnn.Cell, got Params; take its cell"),
    ({"cell": READOUT}, TypeError, "cell: expected a jaxrnn.Cell, got Readout"),
    ({"cell": None}, TypeError, "cell: expected a jaxrnn.Cell, got None"),
]
OF_PARAMS = [
    ({"params": (CELL, READOUT)}, TypeError, "params: expected a jaxrnn.Params, got tuple"),
    ({"params": CELL}, TypeError, "params: expected a jaxrnn.Params, got Cell"),
    ({"params": XS}, TypeError,
     "params: expected a jaxrnn.Params, got float64 array of shape [5, 2, 4]"),
    ({"params": Params(READOUT, CELL)}, TypeError,
     "params.cell: expected a jaxrnn.Cell or a tuple of layers, got Readout"),
    ({"params": Params(PARAMS, READOUT)}, TypeError,
     "params.cell: expected a jaxrnn.Cell or a tuple of layers, got Params; take its cell"),
    ({"params": Params(CELL, PARAMS)}, TypeError,
     "params.readout: expected a jaxrnn.Readout, got Params; take its readout"),
    ({"params": Params((CELL, WIDE), Readout(jnp.zeros((K, H)), jnp.zeros(K)))}, ValueError,
     "params.readout.V: expected shape [any, 2], got [2, 3]"),
]
BARE = "xs: expected floats, or ids wrapped as jaxrnn.Ids(ids), got bare int64"
INPUTS = [
    ({"xs": IDS}, TypeError, BARE),
    ({"xs": [0, 1]}, TypeError, BARE),
    ({"xs": XS[..., :3]}, ValueError, "xs: expected shape [T, *batch, 4], got [5, 2, 3]"),
    ({"xs": XS[0, 0]}, ValueError, "xs: expected shape [T, *batch, 4], got [4]"),
    ({"xs": 1.0}, ValueError, "xs: expected shape [T, *batch, 4], got []"),
    ({"xs": XS.astype(complex)}, TypeError, "xs: expected a floating dtype, got complex128"),
    ({"xs": XS > 0}, TypeError, "xs: expected a floating dtype, got bool"),
    ({"xs": None}, TypeError, "xs: expected an array, got None"),
    ({"xs": "xs"}, TypeError, "xs: expected an array, got str"),
    ({"xs": [[0.0], [0.0, 1.0]]}, TypeError, f"xs: expected an array, got {RAGGED}"),
    ({"xs": [XS, XS[0]]}, TypeError, f"xs: expected an array, got {RAGGED}"),
    ({"xs": [XS, XS[:, :1]]}, TypeError, f"xs: expected an array, got {RAGGED}"),
    ({"xs": [1.0, None]}, TypeError,
     "xs: expected an array, got a list that cannot become one: None is not a valid value "
     "for jnp.array"),
    ({"xs": np.ma.masked_array([0.0, 1.0], [True, False])}, TypeError,
     "xs: expected an array, got a masked one; fill it first: value.filled(...)"),
    ({"xs": np.zeros((T, B, D), ">f4")}, TypeError, "xs: expected native byte order, got >f4; "
     "convert it first: value.astype(value.dtype.newbyteorder('='))"),
    ({"xs": np.zeros(D, "f8,i4")}, TypeError, "xs: expected a numeric or boolean dtype, "
     "got [('f0', '<f8'), ('f1', '<i4')]"),
    ({"xs": np.datetime64("2026")}, TypeError,
     "xs: expected a numeric or boolean dtype, got datetime64[Y]"),
    ({"xs": Sparse()}, TypeError,
     "xs: expected an array, got Sparse; make it dense first: value.todense()"),
    ({"xs": Torch()}, TypeError, "xs: expected an array, got Torch; Can't call numpy() on Tensor "
     "that requires grad. Use tensor.detach().numpy() instead"),
    ({"xs": [Torch()]}, TypeError, "xs: expected an array, got a list that cannot become "
     "one: Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead"),
    ({"xs": np.array([XS, None], object)}, TypeError,
     "xs: expected a numeric or boolean dtype, got object"),
    ({"xs": np.array([["a"]])}, TypeError, "xs: expected a numeric or boolean dtype, got <U1"),
    ({"xs": Ids(XS)}, TypeError, "xs.ids: expected an integer dtype, got float64"),
    ({"xs": Ids(VALID)}, TypeError, "xs.ids: expected an integer dtype, got bool"),
    ({"xs": Ids(Ids(IDS))}, TypeError, "xs.ids: expected an array, got Ids"),
    ({"xs": Ids(None)}, TypeError, "xs.ids: expected an array, got None"),
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
    ({"x": HS[0], "h": XS[0]}, ValueError,
     "x: expected shape [2, 4], got [2, 3]; x and h look swapped"),
    ({"cell": XS[0], "x": CELL}, TypeError, "cell: expected a jaxrnn.Cell, "
     "got float64 array of shape [2, 4]; cell and x look swapped"),
    ({"x": HS[0], "h": HS[0]}, ValueError, "x: expected shape [*batch, 4], got [2, 3]"),
    ({"h": HS}, ValueError, "h: expected shape [2, 3], got [5, 2, 3]"),
    ({"h": HS[0].astype(int)}, TypeError, "h: expected a floating dtype, got int64"),
    ({"h": None}, TypeError, "h: expected an array, got None"),
]
FIRST = "looks batch-first: time comes first here"
SWAPPED = "; time and batch look swapped: time comes first in every argument"
STATES = [
    ({"h0": HS[0, 0]}, ValueError, "h0: expected shape [2, 3], got [3]"),
    ({"h0": HS[0].T}, ValueError, "h0: expected shape [2, 3], got [3, 2]"),
    ({"h0": HS}, ValueError, "h0: expected shape [2, 3], got [5, 2, 3]"),
    ({"h0": HS[0] > 0}, TypeError, "h0: expected a floating dtype, got bool"),
    ({"h0": (HS[0], HS[0])}, ValueError, "h0: expected shape [2, 3], got [2, 2, 3]"),
    ({"h0": HS[0], "xs": TURNED}, ValueError,
     f"h0: expected shape [5, 3], got [2, 3]; xs [2, 5, 4] {FIRST}"),
    ({"h0": HS[0], "xs": Ids(IDS.T)}, ValueError,
     f"h0: expected shape [5, 3], got [2, 3]; xs.ids [2, 5] {FIRST}"),
    ({"h0": HS[0], "xs": XS[0]}, ValueError, "h0: expected shape [3], got [2, 3]"),
    ({"drive": XS}, ValueError, "drive: expected shape [5, 2, 3], got [5, 2, 4]"),
    ({"drive": HS.astype(int)}, TypeError, "drive: expected a floating dtype, got int64"),
    ({"drive": [HS, HS[0]]}, TypeError, f"drive: expected an array, got {RAGGED}"),
    ({"xs": HS[0], "h0": XS}, ValueError,
     "xs: expected shape [5, 2, 4], got [2, 3]; xs and h0 look swapped"),
    ({"xs": HS[0, 0], "h0": XS[:, 0]}, ValueError,
     "xs: expected shape [5, 4], got [3]; xs and h0 look swapped"),
    ({"xs": HS[0], "h0": XS[:, 0]}, ValueError, "xs: expected shape [T, *batch, 4], got [2, 3]"),
    ({"drive": HS.swapaxes(0, 1)}, ValueError,
     f"drive: expected shape [5, 2, 3], got [2, 5, 3]{SWAPPED}"),
    ({"drive": HS, "xs": TURNED}, ValueError,
     f"drive: expected shape [2, 5, 3], got [5, 2, 3]{SWAPPED}"),
]
LENGTHS = [
    ({"lengths": [1, 2], "mask": VALID}, ValueError,
     "lengths and mask: expected at most one of them, got both"),
    ({"lengths": [1, 6]}, ValueError, "lengths: expected 0 to 5, got 6"),
    ({"lengths": [-1, 5]}, ValueError, "lengths: expected 0 to 5, got -1"),
    ({"lengths": 2}, ValueError, "lengths: expected shape [2], got []"),
    ({"lengths": IDS}, ValueError, "lengths: expected shape [2], got [5, 2]"),
    ({"lengths": [1.0, 2.0]}, TypeError, "lengths: expected an integer dtype, got float64"),
    ({"lengths": [True, False]}, TypeError, "lengths: expected an integer dtype, got bool"),
    ({"lengths": "all"}, TypeError, "lengths: expected an array, got str"),
    ({"lengths": [1, 2**70]}, TypeError,
     "lengths: expected an array, got a list that cannot become one: a number is too large"),
    ({"lengths": np.array([1, 2], ">i4")}, TypeError, "lengths: expected native byte order, "
     "got >i4; convert it first: value.astype(value.dtype.newbyteorder('='))"),
    ({"lengths": [1, 2], "xs": TURNED}, ValueError,
     f"lengths: expected shape [5], got [2]; xs [2, 5, 4] {FIRST}"),
    ({"mask": IDS}, TypeError, "mask: expected dtype bool, got int64"),
    ({"mask": VALID.astype(float)}, TypeError, "mask: expected dtype bool, got float64"),
    ({"mask": VALID[0]}, ValueError, "mask: expected shape [5, 2], got [2]"),
    ({"mask": VALID.T}, ValueError, f"mask: expected shape [5, 2], got [2, 5]{SWAPPED}"),
    ({"mask": VALID, "xs": TURNED}, ValueError,
     f"mask: expected shape [2, 5], got [5, 2]{SWAPPED}"),
]
HOW = [
    ({"truncate": 0}, ValueError, "truncate: expected at least 1, got 0"),
    ({"truncate": True}, TypeError, "truncate: expected a whole number, got bool"),
    ({"truncate": 2.0}, TypeError, "truncate: expected a whole number, got float"),
    ({"truncate": "sqrt"}, TypeError, "truncate: expected a whole number, got str"),
    ({"window": -1}, ValueError, "window: expected at least 1, got -1"),
    ({"window": 2.5}, TypeError, "window: expected a whole number, got float"),
    ({"window": [2]}, TypeError, "window: expected a whole number, got list"),
    ({"truncate": 2, "window": 2}, ValueError,
     "truncate and window: expected at most one of them, got both"),
]
PRECISION = "precision: expected None, 'default', 'high', 'highest' or another precision of "
RUNS = [
    ({"implementation": "cudnn"}, ValueError, "implementation: expected one of 'auto', 'scan', "
     "'mosaic_gpu', 'pallas_tpu', 'associative', got 'cudnn'"),
    ({"implementation": None}, ValueError, "implementation: expected one of 'auto', 'scan', "
     "'mosaic_gpu', 'pallas_tpu', 'associative', got None"),
    ({"precision": "exact"}, ValueError, f"{PRECISION}jax.numpy.matmul, got 'exact'"),
    ({"precision": 3}, ValueError, f"{PRECISION}jax.numpy.matmul, got int"),
    ({"precision": ["high", "high"]}, ValueError, f"{PRECISION}jax.numpy.matmul, got list"),
    ({"precision": jnp.ones(2)}, ValueError,
     f"{PRECISION}jax.numpy.matmul, got float64 array of shape [2]"),
]
CHECKPOINTS = [
    ({"checkpoint_every": 0}, ValueError, "checkpoint_every: expected at least 1, got 0"),
    ({"checkpoint_every": -1}, ValueError, "checkpoint_every: expected at least 1, got -1"),
    ({"checkpoint_every": 2.5}, TypeError, "checkpoint_every: expected a whole number, got float"),
    ({"checkpoint_every": True}, TypeError, "checkpoint_every: expected a whole number, got bool"),
    ({"checkpoint_every": "square"}, ValueError,
     "checkpoint_every: expected None, a whole number or 'sqrt', got 'square'"),
    ({"checkpoint_every": np.array(["sqrt"])}, TypeError,
     "checkpoint_every: expected a whole number, got <U4 array of shape [1]"),
    ({"checkpoint_every": jnp.array(2)}, TypeError,
     "checkpoint_every: expected a whole number, got int64 array of shape []"),
    ({"checkpoint_every": 2, "window": 2}, ValueError,
     "checkpoint_every and window: expected at most one of them, got both"),
    ({"checkpoint_every": "sqrt", "window": 2}, ValueError,
     "checkpoint_every and window: expected at most one of them, got both"),
]
REVERSE = [
    ({"reverse": 1}, TypeError, "reverse: expected a bool, got int"),
    ({"reverse": None}, TypeError, "reverse: expected a bool, got None"),
    ({"reverse": "backward"}, TypeError, "reverse: expected a bool, got str"),
    ({"reverse": jnp.array(True)}, TypeError,
     "reverse: expected a bool, got bool array of shape []"),
    ({"reverse": [True, False]}, TypeError, "reverse: expected a bool, got list"),
]
OF_BPTT = [
    ({"hs": HS[1:]}, ValueError, "hs: expected shape [5, 2, 3], got [4, 2, 3]"),
    ({"hs": XS, "xs": HS}, ValueError, "xs: expected shape [T, *batch, 4], got [5, 2, 3]"),
    ({"hs": None}, TypeError, "hs: expected an array, got None"),
    ({"hs": HS[0], "h0": HS}, ValueError,
     "h0: expected shape [2, 3], got [5, 2, 3]; h0 and hs look swapped"),
    ({"dhs": HS[0], "h0": HS}, ValueError,
     "h0: expected shape [2, 3], got [5, 2, 3]; h0 and dhs look swapped"),
    ({"cell": XS, "xs": CELL}, TypeError, "cell: expected a jaxrnn.Cell, "
     "got float64 array of shape [5, 2, 4]; cell and xs look swapped"),
    ({"dhs": XS}, ValueError, "dhs: expected shape [5, 2, 3], got [5, 2, 4]"),
    ({"dhs": HS.astype(int)}, TypeError, "dhs: expected a floating dtype, got int64"),
    ({"dh_last": HS}, ValueError, "dh_last: expected shape [2, 3], got [5, 2, 3]"),
]
OF_UNROLL = [
    ({"cell": XS, "xs": CELL}, TypeError, "cell: expected a jaxrnn.Cell, "
     "got float64 array of shape [5, 2, 4]; cell and xs look swapped"),
    ({"cell": XS}, TypeError, "cell: expected a jaxrnn.Cell, got float64 array of shape [5, 2, 4]"),
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
    ({"targets": VALID}, TypeError,
     "targets: expected integer ids, or floats of shape [5, 2, 2], got bool"),
    ({"targets": IDS.astype(float)}, ValueError,
     "targets: expected integer ids, or floats of shape [5, 2, 2], got floats of shape [5, 2]"),
    ({"targets": LOGITS.astype(int)}, ValueError,
     "targets: expected shape [5, 2], got [5, 2, 2]; rows must be floats"),
    ({"targets": IDS.T}, ValueError, f"targets: expected shape [5, 2], got [2, 5]{SWAPPED}"),
    ({"targets": LOGITS.swapaxes(0, 1)}, ValueError,
     f"targets: expected shape [5, 2, 2], got [2, 5, 2]{SWAPPED}"),
    ({"targets": Ids(IDS)}, TypeError, "targets: expected an array, got Ids"),
    ({"targets": None}, TypeError, "targets: expected an array, got None"),
    ({"targets": ids(4, 0, value=2)}, ValueError,
     "targets: expected ids from 0 to 1, got 2 at index (4, 0)"),
    ({"targets": ids(0, 1, value=-100)}, ValueError,
     "targets: expected ids from 0 to 1, got -100 at index (0, 1)"),
]
OF_WHOLE = [
    (readout(V=jnp.zeros(H)), ValueError, "readout.V: expected shape [any, 3], got [3]"),
    (readout(V=jnp.zeros((K, D))), ValueError, "readout.V: expected shape [any, 3], got [2, 4]"),
    ({"xs": IDS, "targets": XS}, TypeError, BARE),
    ({"xs": TURNED, "targets": IDS}, ValueError,
     f"targets: expected shape [2, 5], got [5, 2]{SWAPPED}"),
]
OF_CROSS_ENTROPY = [
    ({"logits": IDS}, TypeError, "logits: expected a floating dtype, got int64"),
    ({"logits": IDS, "targets": LOGITS}, TypeError,
     "logits: expected a floating dtype, got int64"),
    ({"logits": 1.0}, ValueError, "logits: expected shape [T, *batch, K], got []"),
    ({"where": IDS}, TypeError, "where: expected dtype bool, got int64"),
    ({"where": VALID[0]}, ValueError, "where: expected shape [5, 2], got [2]"),
]
OF_APPLY_READOUT = [
    ({"hs": XS}, ValueError, "hs: expected shape [..., 3], got [5, 2, 4]"),
    ({"hs": IDS}, TypeError, "hs: expected a floating dtype, got int64"),
    ({"readout": HS, "hs": READOUT}, TypeError,
     "readout: expected a jaxrnn.Readout, got float64 array of shape [5, 2, 3]; "
     "readout and hs look swapped"),
    ({"readout": PARAMS}, TypeError,
     "readout: expected a jaxrnn.Readout, got Params; take its readout"),
]
OF_GRADIENTS = [
    ({"params": XS, "xs": PARAMS}, TypeError, "params: expected a jaxrnn.Params, "
     "got float64 array of shape [5, 2, 4]; params and xs look swapped"),
]
OF_OUTPUTS = [
    ({"cell": HS, "hs": CELL}, TypeError, "cell: expected a jaxrnn.Cell, "
     "got float64 array of shape [5, 2, 3]; cell and hs look swapped"),
    ({"hs": XS}, ValueError, "hs: expected shape [..., 3], got [5, 2, 4]"),
]
OF_LAYERS = [
    ({"cells": XS, "xs": CELL}, TypeError, "cells: expected a jaxrnn.Cell, "
     "got float64 array of shape [5, 2, 4]; cells and xs look swapped"),
    ({"cells": ()}, ValueError, "cells: expected at least one layer, got none"),
    ({"cells": XS, "xs": STACK}, TypeError, "cells: expected a jaxrnn.Cell, "
     "got float64 array of shape [5, 2, 4]; cells and xs look swapped"),
    ({"cells": XS}, TypeError,
     "cells: expected a jaxrnn.Cell or a tuple of layers, got float64 array of shape [5, 2, 4]"),
    ({"cells": PARAMS}, TypeError,
     "cells: expected a jaxrnn.Cell or a tuple of layers, got Params; take its cell"),
    ({"cells": (CELL, READOUT)}, TypeError,
     "cells[1]: expected a jaxrnn.Cell or a pair (forward, backward), got Readout"),
    ({"cells": (CELL, (SECOND,) * 3)}, ValueError,
     "cells[1]: expected a jaxrnn.Cell or a pair (forward, backward), got 3 entries"),
    ({"cells": (CELL, (SECOND, None))}, TypeError,
     "cells[1][1]: expected a jaxrnn.Cell, got None"),
    ({"cells": (CELL, (SECOND, STACK))}, TypeError,
     "cells[1][1]: expected a jaxrnn.Cell, got tuple"),
    ({"cells": (CELL, CELL)}, ValueError, "cells[1].U: expected shape [any, 3], got [3, 4]"),
    ({"cells": ((CELL, CELL), SECOND)}, ValueError,
     "cells[1].U: expected shape [any, 6], got [3, 3]"),
    ({"cells": ((CELL, SECOND),)}, ValueError,
     "cells[0][1].U: expected shape [any, 4], got [3, 3]"),
    ({"cells": (CELL, dataclasses.replace(SECOND, b=jnp.zeros(2)))}, ValueError,
     "cells[1].b: expected shape [3], got [2]"),
    ({"dropout": 1}, ValueError, "dropout: expected a number from 0 to below 1, got 1.0"),
    ({"dropout": -0.1}, ValueError, "dropout: expected a number from 0 to below 1, got -0.1"),
    ({"dropout": float("nan")}, ValueError,
     "dropout: expected a number from 0 to below 1, got nan"),
    ({"dropout": "0.5"}, TypeError, "dropout: expected a number, got str"),
    ({"dropout": [0.5, 0.5]}, TypeError, "dropout: expected a number, got list"),
    ({"dropout": random.key(0)}, TypeError,
     "dropout: expected a number, got key<fry> array of shape []"),
    ({"dropout": 0.5}, ValueError,
     "key: expected a JAX random key, with dropout above 0, got None"),
    ({"dropout": 0.5, "key": 0}, TypeError, "key: expected a JAX random key, got int"),
    ({"dropout": 0.5, "key": jnp.zeros(2)}, TypeError,
     "key: expected a JAX random key, got float64 array of shape [2]"),
    ({"dropout": 0.5, "key": random.split(random.key(0))}, ValueError,
     "key: expected one JAX random key, got key<fry> array of shape [2]"),
    ({"dropout": 0.5, "key": jnp.zeros((2, 2), "uint32")}, ValueError,
     "key: expected one JAX random key, got uint32 array of shape [2, 2]"),
    ({"residual": True, "cells": (CELL, WIDE)}, ValueError,
     "residual: expected layers of one size, got sizes 3, 2"),
    ({"residual": 1}, TypeError, "residual: expected a bool, got int"),
]
OF_BIDIRECTIONAL = [
    ({"backward": XS, "xs": CELL}, TypeError,
     "backward: expected a jaxrnn.Cell or a tuple of layers, got float64 array of shape [5, 2, 4]"),
    ({"forward": ()}, ValueError, "forward: expected at least one layer, got none"),
    ({"forward": (CELL, CELL)}, ValueError,
     "forward[1].U: expected shape [any, 3], got [3, 4]"),
    ({"backward": SECOND}, ValueError,
     "backward: expected a first U of shape [any, 4], got [any, 3]"),
    ({"backward": STACK, "h0": (None, HS[0])}, TypeError,
     "h0[1]: expected a tuple of 2, in the structure of the cells, "
     "got float64 array of shape [2, 3]"),
]
# Of two layers, or of two directions.
STRUCTURES = [
    ({"h0": HS[0]}, TypeError,
     "h0: expected a tuple of 2, in the structure of the cells, got float64 array of shape [2, 3]"),
    ({"h0": (HS[0],) * 3}, ValueError,
     "h0: expected a tuple of 2, in the structure of the cells, got 3 entries"),
    ({"h0": (None, HS[0, 0])}, ValueError, "h0[1]: expected shape [2, 3], got [3]"),
    ({"h0": (None, IDS[0])}, TypeError, "h0[1]: expected a floating dtype, got int64"),
    ({"h0": (None, HS[0]), "xs": TURNED}, ValueError,
     f"h0[1]: expected shape [5, 3], got [2, 3]; xs [2, 5, 4] {FIRST}"),
    ({"drive": HS}, TypeError,
     "drive: expected a tuple of 2, in the structure of the cells, "
     "got float64 array of shape [5, 2, 3]"),
    ({"drive": (None, XS)}, ValueError, "drive[1]: expected shape [5, 2, 3], got [5, 2, 4]"),
    ({"drive": (None, HS.swapaxes(0, 1))}, ValueError,
     f"drive[1]: expected shape [5, 2, 3], got [2, 5, 3]{SWAPPED}"),
]
OF_PAIRS = [
    ({"h0": ((None, HS[0, 0]), None)}, ValueError, "h0[0][1]: expected shape [2, 3], got [3]"),
    ({"h0": (HS[0], None)}, TypeError,
     "h0[0]: expected a tuple of 2, in the structure of the cells, "
     "got float64 array of shape [2, 3]"),
]
OF_INIT = [
    ({"input_size": -1}, ValueError, "input_size: expected at least 0, got -1"),
    ({"hidden_size": 3.0}, TypeError, "hidden_size: expected a whole number, got float"),
    ({"hidden_size": True}, TypeError, "hidden_size: expected a whole number, got bool"),
    ({"recurrent": "haar"}, ValueError, "recurrent: expected one of 'orthogonal', "
     "'identity', 'normal', 'uniform', got 'haar'"),
    ({"activation": "swish"}, *ACTIVATIONS[0][1:]),
    ({"leak": [0.5, 0.5]}, ValueError, "leak: expected shape [] or [3], got [2]"),
]
TABLE = [
    ((step, *RECURRENT, *TEXTBOOK), CELLS + ACTIVATIONS), ((step, *ONE_CELL), OF_ONE_CELL),
    ((with_params, double_sum_with_params), OF_PARAMS), (TEXTBOOK, OF_ONE_CELL[:1]),
    ((*SEQUENCES, *LAYERS), INPUTS), (RECURRENT, STATES), ((*RECURRENT, *LAYERS), LENGTHS + HOW),
    ((unroll, loss_and_grads, *LAYERS), CHECKPOINTS), ((*RECURRENT, unroll_layers, pairs), REVERSE),
    ((*RECURRENT, *LAYERS), RUNS), ((apply_readout,), RUNS[-2:]),
    ((*WHOLE, cross_entropy), TARGETS), ((*WHOLE, apply_readout), READOUTS), (WHOLE, OF_WHOLE),
    ((with_params,), OF_GRADIENTS), ((outputs,), OF_OUTPUTS),
    ((step,), OF_STEP), ((bptt,), OF_BPTT), ((unroll,), OF_UNROLL),
    ((cross_entropy,), OF_CROSS_ENTROPY), ((apply_readout,), OF_APPLY_READOUT),
    ((unroll_layers,), OF_LAYERS), ((bidirectional,), OF_BIDIRECTIONAL),
    ((unroll_layers, bidirectional), STRUCTURES), ((pairs,), OF_PAIRS), ((init_cell,), OF_INIT),
    ((init_params,), [({"output_size": -1}, ValueError, "output_size: expected at least 1, got -1"),
                      ({"layers": 0}, ValueError, "layers: expected at least 1, got 0"),
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
# A shape is known under every transformation.
SHAPES = [
    pytest.param(functions[0], *case, id=f"{functions[0].__name__}-{case[2]}")
    for functions, cases in TABLE
    for case in cases
    if ": expected shape" in case[2]
]


def said(message):
    """The argument may be named with the path to it: params.cell.U; JAX adds notes below."""
    return r"^(params\.|cell\.)*" + re.escape(message) + r"(\n-{20}|$)"


def entered(*args, **kwargs):
    pytest.fail("a compiled function was entered")


MODULES = [module for name, module in sys.modules.items() if name.split(".")[0] == "jaxrnn"]
COMPILED = [
    (module, name)
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, type(jax.jit(entered)))
]


@pytest.fixture
def nothing_compiled(monkeypatch):
    """Every compiled function of the package fails the test that enters it."""
    for module, name in COMPILED:
        monkeypatch.setattr(module, name, entered)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(("function", "changes", "kind", "message"), CASES)
def test_message_names_the_argument_the_expectation_and_the_value(function, changes, kind, message):
    with pytest.raises(kind, match=said(message)):
        function(**changes)


def under_jit(function, changes):
    jax.jit(lambda changes: function(**changes))(changes)


def under_vmap(function, changes):
    twice = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 2), changes)
    jax.vmap(lambda changes: function(**changes))(twice)


def under_grad(function, changes):
    def loss(s):
        moved = jax.tree.map(lambda x: x + s if jnp.result_type(x) == jnp.float64 else x, changes)
        return sum(map(jnp.sum, jax.tree.leaves(function(**moved))))

    jax.grad(loss)(0.0)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("transformed", [under_jit, under_vmap, under_grad])
@pytest.mark.parametrize(("function", "changes", "kind", "message"), SHAPES)
def test_shapes_are_named_under_transformations(transformed, function, changes, kind, message):
    with pytest.raises(kind, match=said(message)):
        transformed(function, changes)


def test_the_table_is_large_and_each_message_one_line():
    messages = {message for _, cases in TABLE for *_, message in cases}
    assert len(messages) >= 150
    assert all(re.fullmatch(r"[^\n:]+: expected [^\n]+, got [^\n]+", m) for m in messages)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("function", [step, *SEQUENCES, *LAYERS])
def test_a_good_call_enters_a_compiled_function(function):
    with pytest.raises(pytest.fail.Exception, match="entered"):
        function()


TRACED = [
    *[(function, name) for function in (*RECURRENT, unroll_layers, pairs)
      for name in ("reverse", "truncate", "window")],
    *[(function, "checkpoint_every") for function in (unroll, loss_and_grads, *LAYERS)],
    (unroll_layers, "dropout"), (unroll_layers, "residual"),
]  # fmt: skip
WANTED = {"reverse": "a bool", "residual": "a bool", "dropout": "a number"}


@pytest.mark.parametrize(("function", "name"), TRACED)
def test_traced_options_are_refused(function, name):
    wanted = WANTED.get(name, "a whole number")
    message = f"{name}: expected {wanted}, got traced int64 array of shape []"
    with pytest.raises(TypeError, match=said(message)):
        jax.jit(lambda value: function(**{name: value}))(1)


@pytest.mark.skipif(np.longdouble == np.float64, reason="no wider float here")
@pytest.mark.parametrize("kind", [np.longdouble, np.clongdouble])
def test_floats_that_are_too_wide_are_refused(kind):
    for value in (np.zeros((T, B, D), kind), kind(0)):
        message = f"xs: expected float64 or narrower, got {np.dtype(kind)}"
        with pytest.raises(TypeError, match=said(message)):
            unroll(xs=value)


def test_an_error_of_the_device_is_raised_unchanged():
    class Full:
        def __array__(self, dtype=None, copy=None):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        unroll(xs=Full())


@pytest.mark.parametrize("key", [random.key(0), random.PRNGKey(0), np.zeros(2, "uint32")])
def test_keys_of_either_kind_are_accepted(key):
    _, hs = jax.eval_shape(partial(unroll_layers, dropout=0.5, key=key))
    _, traced = jax.eval_shape(lambda key: unroll_layers(dropout=np.float32(0.5), key=key), key)
    assert hs.shape == traced.shape == HS.shape


@pytest.mark.parametrize("reverse", [True, np.bool_(True)])
def test_bools_of_either_kind_are_accepted(reverse):
    for function in (*RECURRENT, unroll_layers, pairs):
        found = jax.eval_shape(partial(function, reverse=reverse))
        assert found == jax.eval_shape(partial(function, reverse=bool(reverse)))


@pytest.mark.parametrize(
    ("dtype", "how"),
    [("int8", {"reverse": True}), ("int64", {"checkpoint_every": 2}), rare("int64", {}),
     rare("int64", {"truncate": 2}), rare("int64", {"window": 2})],
    ids=str,
)  # fmt: skip
def test_traced_lengths_are_clipped(dtype, how):
    params, xs, h0, targets = random_case(T=T, batch=(4,), H=2)
    dhs, of_bptt = weights((T, 4, 2)), {k: v for k, v in how.items() if k != "checkpoint_every"}

    @jax.jit
    def found(lengths):
        def loss(cell, xs, h0):
            h_last, hs = jaxrnn.unroll(cell, xs, h0, lengths=lengths, **how)
            return jnp.sum(dhs * hs) + jnp.sum(h_last), (h_last, hs)

        states = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params.cell, xs, h0)
        hs = states[0][1][1]
        by_hand = jaxrnn.bptt(params.cell, xs, h0, hs, dhs, lengths=lengths, **of_bptt)
        whole = jaxrnn.loss_and_grads(params, xs, targets, h0=h0, lengths=lengths, **how)
        return states, by_hand, whole

    beyond, clipped = np.array([-3, 2, 6, 127], dtype), np.array([0, 2, T, T], dtype)
    assert_close(found(beyond), found(clipped), 0)


@pytest.mark.parametrize("invalid", [-1, D])
def test_a_traced_invalid_id_gives_nan(invalid):
    hs = jax.jit(lambda ids: unroll(xs=Ids(ids))[1])(ids(2, 1, value=invalid))
    nan = np.zeros((T, B, H), bool)
    nan[2:, 1] = True
    np.testing.assert_array_equal(jnp.isnan(hs), nan)
    h = jax.jit(lambda ids: step(x=Ids(ids)))(np.array([0, invalid]))
    np.testing.assert_array_equal(jnp.isnan(h), nan[2])
    loss = jax.jit(lambda ids: cross_entropy(targets=ids))(ids(3, 0, value=invalid))
    np.testing.assert_array_equal(jnp.isnan(loss), ids(3, 0, value=1) == 1)
    for function in WHOLE[:2]:
        assert jnp.isnan(jax.jit(lambda ids, f=function: f(targets=ids))(ids(3, 0, value=9))[0])


@pytest.mark.parametrize("far", [2**32, -(2**32), 2**32 + 1])
def test_numbers_beyond_32_bits_do_not_wrap(far):
    with jax.enable_x64(False):
        far = np.array([0, far])
        with pytest.raises(ValueError, match=r"^x.ids: expected ids from 0 to 3, got -?2147483"):
            step(x=Ids(far))
        with pytest.raises(ValueError, match=r"^lengths: expected 0 to 5, got -?2147483"):
            unroll(lengths=far)


@pytest.mark.parametrize("function", dict.fromkeys(f for fs, _ in TABLE for f in fs))
def test_the_default_arguments_of_the_table_are_valid(function):
    assert jax.tree.leaves(jax.eval_shape(function))


@pytest.mark.parametrize("dtype", [int, complex])
def test_init_refuses_a_dtype_that_is_not_floating(dtype):
    with pytest.raises(TypeError, match=rf"^dtype: expected .*floating.*, got .*{dtype.__name__}"):
        init_cell(dtype=dtype)


def test_an_activation_without_a_function_is_refused():
    with pytest.raises(TypeError, match=r"^activation.*: expected .*callable.*, got .*str"):
        unroll(**cell(activation=jaxrnn.Activation("tanh")))


def test_numbers_and_numpy_are_arrays_from_the_second_call_on():
    made = cell(leak=0.5, b=np.ones(H), W=np.eye(H))["cell"]
    x, h = np.ones(D), np.zeros(H)
    arrays = jax.tree.map(jnp.asarray, (made, x, h))
    for _ in range(3):
        found = jaxrnn.step(made, x, h)
        assert isinstance(found, jax.Array) and found.dtype == jaxrnn.step(*arrays).dtype
        np.testing.assert_array_equal(found, jaxrnn.step(*arrays))
        with jax.disable_jit():
            np.testing.assert_allclose(jaxrnn.step(made, x, h), found, rtol=1e-12)
        with pytest.raises(TypeError, match=r"^x: expected an array, got a masked one"):
            jaxrnn.step(made, np.ma.masked_array(x, False), h)


def test_constructors_check_nothing():
    made = Params(Cell("U", None, 3, leak={}, activation=None), Readout(object(), Ids("a")))
    assert made.cell.U == "U" and made.readout.c.ids == "a"
    mapped = jax.tree.map(lambda _: object(), Params(CELL, READOUT))
    assert isinstance(mapped, Params) and type(mapped.cell.W) is object
    assert jax.tree.map(lambda _: None, CELL).activation == "tanh"


@jax.tree_util.register_pytree_node_class
class Variable:
    """An array in a box, as flax.nnx keeps its parameters."""

    def __init__(self, value):
        self.value = value

    def __jax_array__(self):
        return self.value

    def tree_flatten(self):
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


def test_parameters_may_be_variables_of_a_module():
    cell = jaxrnn.init_cell(jax.random.key(0), 3, 4)
    boxed = jax.tree.map(Variable, cell)
    xs = jnp.ones((5, 2, 3), cell.U.dtype)
    expected = jaxrnn.unroll(cell, xs)[1]
    for _ in range(2):  # the second call finds that these types passed
        np.testing.assert_array_equal(jaxrnn.unroll(boxed, xs)[1], expected)
