"""The whole library on kernels, interpreted: values, derivatives of both orders, vmap, options.

What each kernel computes by itself is in test_kernels_gpu.py and test_kernels_tpu.py.
"""

from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import matrix
import numpy as np
import pytest
from helpers import assert_close, random_case, weights
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_structure import equations

import jaxrnn
from jaxrnn._backends.select import LARGEST
from jaxrnn._backends.target import Device, built_for
from jaxrnn._base.forms import NAMED

HOPPER = Device("gpu", "NVIDIA H200", "9.0", interpret=True)
TPU = Device("tpu", "TPU v5 lite", interpret=True)
recent = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the Mosaic GPU kernels are written for jax 0.11 on"
)
KERNELS = [
    pytest.param(("pallas_tpu", TPU), id="TPU"),
    pytest.param(("mosaic_gpu", HOPPER), id="GPU", marks=recent),
]
NAMES = ["pallas_tpu", pytest.param("mosaic_gpu", marks=recent)]
NEEDED = {"jaxrnn_states", "jaxrnn_adjoint", "jaxrnn_tangent"}
# As in test_matrix: what adds up over T steps, in float32.
FIRST, SECOND = 1e-5, 6e-5

T, B, D, H = 5, 4, 3, 6


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    name, device = request.param
    if name == "mosaic_gpu":
        # Products of float32 are float32's own then, and tolerances as tight as those of a scan.
        module = import_module("jaxrnn._backends.kernels.mosaic_gpu_tf32")
        for name_of_rounding in ("rounded", "rounded_in_kernel"):
            monkeypatch.setattr(module, name_of_rounding, lambda v: v)
    # What interprets a kernel calls back in order, and JAX recomputes no such call.
    monkeypatch.setattr(jax, "checkpoint", lambda f: f)
    with built_for(device):
        yield name


def case(**how):
    params, xs, h0, ids = random_case(T=T, batch=(B,), D=D, H=H, dtype=jnp.float32, **how)
    return params, xs, h0, ids


def scalar(unroll, cell, xs, h0, **how):
    h_last, hs = unroll(cell, xs, h0, **how)
    return jnp.sum(jnp.sin(3 * hs)) + jnp.sum(jnp.exp(h_last))


def both(f, kernel, *args):
    """What f gives by kernels and by scans."""
    run = partial(jaxrnn.unroll, implementation=kernel)
    return jax.jit(partial(f, run))(*args), jax.jit(partial(f, jaxrnn.unroll))(*args)


VALID = {
    "": {},
    "lengths": {"lengths": jnp.array([5, 0, 2, 3])},
    "mask": {"mask": jnp.asarray(matrix.GAPS)},
}


full = pytest.mark.full


@pytest.mark.parametrize(
    ("activation", "leak", "valid", "how"),
    [
        pytest.param("tanh", None, "", {}, marks=full),
        ("relu", None, "lengths", {"reverse": True}),
        ("identity", 0.6, "mask", {}),
        ("sigmoid", 0.3, "lengths", {"truncate": 2}),
        pytest.param("tanh", 0.5, "", {"checkpoint_every": 2}, marks=full),
        ("tanh", None, "mask", {"reverse": True, "truncate": 2, "checkpoint_every": 3}),
        ("relu", None, "", {"window": 2}),
    ],
)
def test_states_and_gradients_equal_those_of_scans(kernel, activation, leak, valid, how):
    leak = None if leak is None else jnp.float32(leak)
    params, xs, h0, _ = case(activation=activation, leak=leak)

    def f(unroll, *args):
        loss = partial(scalar, unroll, **VALID[valid], **how)
        states = unroll(*args, **VALID[valid], **how)
        return states, jax.grad(loss, (0, 1, 2))(*args)

    found, expected = both(f, kernel, params.cell, xs, h0)
    assert_close(found, expected, FIRST)


DERIVATIVES = {
    "tangent": lambda loss, states, args, moved: jax.jvp(states, args, moved),
    "forward over reverse": lambda loss, states, args, moved: jax.jvp(
        jax.grad(loss, (0, 1, 2)), args, moved
    ),
    "reverse over forward": lambda loss, states, args, moved: jax.grad(
        lambda args: jax.jvp(loss, args, moved)[1]
    )(args),
}


@pytest.mark.parametrize(
    "name", ["tangent", "forward over reverse", pytest.param("reverse over forward", marks=full)]
)
def test_tangents_and_second_orders_equal_those_of_scans(kernel, name):
    params, xs, h0, _ = case(leak=jnp.full(H, 0.7, jnp.float32))
    args = params.cell, xs, h0
    moved = jax.tree.map(lambda x: weights(x.shape, x.size, x.dtype), args)

    def f(unroll, args, moved):
        loss = partial(scalar, unroll, lengths=jnp.array([5, 0, 2, 3]))
        return DERIVATIVES[name](loss, partial(unroll, **VALID["mask"]), args, moved)

    found, expected = both(f, kernel, args, moved)
    assert_close(found, expected, SECOND)


def test_gradients_by_hand_equal_those_of_scans(kernel):
    params, xs, h0, ids = case()
    lengths = jnp.array([5, 0, 2, 3])
    options = dict(h0=h0, lengths=lengths)
    found = jaxrnn.loss_and_grads(params, xs, ids, implementation=kernel, **options)
    expected = jaxrnn.loss_and_grads(params, xs, ids, **options)
    assert_close(jax.tree.leaves(found), jax.tree.leaves(expected), FIRST)
    hs = jaxrnn.unroll(params.cell, xs, h0, lengths=lengths)[1]
    call = partial(jaxrnn.bptt, params.cell, xs, h0, hs, jnp.cos(hs), lengths=lengths)
    found, expected = call(implementation=kernel), call()
    assert_close(jax.tree.leaves(found), jax.tree.leaves(expected), FIRST)


LONG = pytest.param({"checkpoint_every": 2, "truncate": 3}, marks=full)


@pytest.mark.parametrize("how", [{}, LONG], ids=str)
@pytest.mark.parametrize("mode", ["forward", pytest.param("reverse", marks=full)])
def test_gradients_by_hand_are_differentiable(kernel, mode, how):
    params, xs, h0, ids = case(leak=jnp.float32(0.6))
    lengths = jnp.array([5, 0, 2, 3])

    def f(implementation, params, h0):
        def gradient(params, h0):
            options = dict(h0=h0, lengths=lengths, implementation=implementation, **how)
            return jaxrnn.loss_and_grads(params, xs, ids, **options)[1].params

        if mode == "forward":
            return jax.jvp(gradient, (params, h0), (params, h0))
        return jax.grad(lambda p: jnp.sum(jnp.sin(gradient(p, h0).cell.W)))(params)

    found, expected = (jax.jit(partial(f, name))(params, h0) for name in (kernel, "scan"))
    assert_close(jax.tree.leaves(found), jax.tree.leaves(expected), SECOND)


@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_launches_the_kernel_of_the_batch(kernel, axis):
    params, xs, h0, _ = case()
    cell = params.cell
    unroll = partial(jaxrnn.unroll, implementation=kernel)
    one_by_one = jax.vmap(unroll, (None, 1 - axis, 0), (0, 1))
    given = xs if axis == 0 else xs.swapaxes(0, 1)
    batch, mapped = kernels_in(unroll, cell, xs, h0), kernels_in(one_by_one, cell, given, h0)
    assert batch == mapped != []
    assert_close(one_by_one(cell, given, h0), jaxrnn.unroll(cell, xs, h0), FIRST)


def test_vmap_over_cells_launches_one_kernel(kernel):
    _, xs, h0, _ = case()
    cells = jax.tree.map(lambda *x: jnp.stack(x), *[case(seed=s)[0].cell for s in range(4)])
    cells = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), cells)

    def f(unroll, cells, xs, h0):
        def loss(cells):
            inner = jax.vmap(unroll, (0, None, None))
            h_last, hs = jax.vmap(inner, (0, None, None))(cells, xs, h0)
            return jnp.sum(jnp.sin(3 * hs)) + jnp.sum(jnp.exp(h_last))

        return jax.value_and_grad(loss)(cells)

    found, expected = both(f, kernel, cells, xs, h0)
    assert_close(found, expected, FIRST)
    with_kernels = partial(f, partial(jaxrnn.unroll, implementation=kernel))
    alone = kernels_in(lambda c: with_kernels(c, xs, h0), cells)
    assert len(alone) == 2  # forward, and the adjoint


def test_layers_in_both_directions_equal_those_of_scans(kernel):
    params, xs, _, _ = case()
    above = jaxrnn.init_cell(jax.random.key(1), 2 * H, 4, dtype=jnp.float32)
    stack = ((params.cell, params.cell), above)
    found = jaxrnn.unroll_layers(stack, xs, implementation=kernel)
    assert_close(found, jaxrnn.unroll_layers(stack, xs), FIRST)


def test_gradients_of_ids_equal_those_of_scans(kernel):
    params, _, h0, _ = case()
    ids = jaxrnn.Ids(jnp.asarray(np.random.default_rng(0).integers(D, size=(T, B))))

    def f(unroll, cell, h0):
        return jax.value_and_grad(lambda c, h: scalar(unroll, c, ids, h), (0, 1))(cell, h0)

    found, expected = both(f, kernel, params.cell, h0)
    assert_close(found, expected, FIRST)


def test_bfloat16_is_within_its_rounding_of_the_scan(kernel):
    # Each state is rounded once, as in the scan; where sums in another order fall on the other
    # side of a rounding, it is half of eps, and T steps may add up: as in test_matrix.
    params, xs, h0, _ = case()
    args = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params.cell, xs, h0))

    def f(unroll, *args):
        return unroll(*args), jax.grad(partial(scalar, unroll), (0, 1, 2))(*args)

    found, expected = both(f, kernel, *args)
    assert {x.dtype.name for x in jax.tree.leaves(found)} == {"bfloat16"}
    assert_close(found, expected, T * float(jnp.finfo(jnp.bfloat16).eps))


def kernels_in(f, *args):
    """The shapes that each kernel in a program is launched with."""
    found = equations(jax.make_jaxpr(f)(*args))
    launched = [e for e, _ in found if e.primitive.name in ("pallas_call", "core_map", "mpmd_map")]
    return [sorted(str(v.aval) for v in e.invars) for e in launched]


@pytest.mark.parametrize("name", NAMES)
def test_every_loop_of_every_derivative_is_a_kernel(name):
    device = (HOPPER if name == "mosaic_gpu" else TPU)._replace(interpret=False)
    params, xs, h0, _ = case()
    args = params.cell, xs, h0

    def f(*args):
        loss = partial(scalar, partial(jaxrnn.unroll, implementation=name))
        return jax.jvp(jax.grad(loss, (0, 1, 2)), args, args)

    with built_for(device):
        platform = {"gpu": "cuda", "tpu": "tpu"}[device.platform]
        text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.while" not in text
    assert all(name in text for name in NEEDED)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", NAMED)
@pytest.mark.parametrize("name", NAMES)
def test_every_activation_lowers(name, activation, dtype):
    device = (HOPPER if name == "mosaic_gpu" else TPU)._replace(interpret=False)
    args = jax.tree.map(lambda x: x.astype(dtype), case(activation=activation)[:3])

    def f(params, xs, h0):
        return jax.grad(partial(scalar, partial(jaxrnn.unroll, implementation=name)))(
            params.cell, xs, h0
        )

    with built_for(device):
        platform = {"gpu": "cuda", "tpu": "tpu"}[device.platform]
        text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    assert "jaxrnn_states" in text and "jaxrnn_adjoint" in text


def split_gradient(**how):
    """Of a loss over a batch that two devices share."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def loss(cell, xs):
        def local(cell, xs):
            return lax.psum(jnp.sum(jnp.sin(jaxrnn.unroll(cell, xs, **how)[1])), "data")

        specs = P(), P(None, "data")
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(cell, xs)

    return jax.jit(jax.grad(loss, (0, 1)))


def test_the_tpu_kernel_runs_inside_shard_map():
    params, xs, _, _ = case()
    with built_for(TPU):
        found = split_gradient(implementation="pallas_tpu")(params.cell, xs)
    expected = split_gradient()(params.cell, xs)
    assert_close(jax.tree.leaves(found), jax.tree.leaves(expected), FIRST)


@recent
def test_the_gpu_kernel_lowers_inside_shard_map():
    # Its interpreter knows one device.
    params, xs, _, _ = case()
    with built_for(HOPPER._replace(interpret=False)):
        traced = split_gradient(implementation="mosaic_gpu").trace(params.cell, xs)
        assert "jaxrnn_adjoint" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_largest_sizes_are_those_of_the_tpu_kernel():
    pallas_tpu = import_module("jaxrnn._backends.kernels.pallas_tpu")
    for dtype, largest in LARGEST["pallas_tpu"].items():
        assert pallas_tpu.fits(largest, dtype) and not pallas_tpu.fits(largest + 1, dtype)


@recent
def test_the_largest_sizes_are_those_of_the_gpu_kernels():
    half = import_module("jaxrnn._backends.kernels.mosaic_gpu").MAX_HIDDEN
    single = import_module("jaxrnn._backends.kernels.mosaic_gpu_tf32").MAX_HIDDEN
    assert LARGEST["mosaic_gpu"] == {"bfloat16": half, "float16": half, "float32": single}
