"""Functions of a cell that are not elementwise are refused by name, wherever they enter."""

import gc
import math
import weakref
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naive_unroll, random_case, rare
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrnn
from jaxrnn import Activation, Form, textbook


def cell_of(size, **how):
    params, xs, h0, targets = random_case(T=3, batch=(2,), D=3, H=size, K=3, **how)
    return params, xs, h0, targets


def clipped(a, most):
    return a * jnp.minimum(1, most / jnp.linalg.norm(a, axis=-1, keepdims=True))


MIXING = {
    "softmax": jax.nn.softmax,
    "softmax over sequences": partial(jax.nn.softmax, axis=0),
    "layer norm": jax.nn.standardize,
    "mean of units": lambda a: a - jnp.mean(a, -1, keepdims=True),
    "mean of sequences": lambda a: a - jnp.mean(a, 0, keepdims=True),
    "mean of all": lambda a: jnp.tanh(a) + jnp.mean(a),
    "norm of all": lambda a: jnp.tanh(a) * jnp.exp(-jnp.linalg.norm(a)),
    "whether any is large": lambda a: jax.lax.cond(jnp.any(a > 3), jnp.tanh, lambda a: a, a),
    "one unit": lambda a: a * a[..., :1],
    "the last unit": lambda a: a.at[..., 0].add(a[..., -1]),
    "the largest": lambda a: jnp.where(a == jnp.max(a, -1, keepdims=True), a, 0),
    "flip": lambda a: a[..., ::-1],
    "roll": lambda a: jnp.roll(a, 2, -1),
    "cumsum": lambda a: jnp.cumsum(a, -1),
    "sort": jnp.sort,
    **{f"a norm of {most}": partial(clipped, most=most) for most in (1e-2, 1.0, 50.0, 1e5)},
}
ELEMENTWISE = {
    "gelu": jax.nn.gelu,
    "selu": jax.nn.selu,
    "hard tanh": jax.nn.hard_tanh,
    "log": jnp.log,  # NaN of half the values that are tried
    "exp": jnp.exp,  # inf of some
    "step": lambda a: (a > 0).astype(a.dtype),
    "clip": lambda a: jnp.clip(a, -1, 1),
    "gain of each unit": lambda a: jnp.tanh(a) * jnp.linspace(0.5, 1, a.shape[-1]).reshape(
        *(1,) * (a.ndim - 1), -1
    ),
    "a constant": lambda a: jnp.full_like(a, 2),
}  # fmt: skip


def _fails(a):
    raise KeyError


WRONG = {
    "NumPy": (np.tanh, "of jax.numpy say.* got tanh, which fails"),
    "math": (math.tanh, "of jax.numpy say.* got tanh, which fails: TypeError: "),
    "an error without text": (_fails, "_fails, which fails: KeyError$"),
    "None": (lambda a: None, "which makes None of float64"),
    "a list": (lambda a: [a], "which makes list of float64"),
    "a sum": (jnp.sum, "sum, which makes float64"),
    "bools": (lambda a: a > 0, "which makes bool"),
    "complex": (lambda a: a + jnp.asarray(1j, jnp.complex128) * a, "which"),
    "two": (lambda a: (a, a), "which makes float64.*, float64"),
    "an axis": (lambda a: jax.lax.pmean(a, "devices"), "which fails"),
    "another size": (lambda a: a + jnp.ones((1, 1, 1, 7)), "which"),
    "no argument": (lambda: 1.0, "which fails"),
}


KEY = jax.random.key(3)
BY_SHAPE = {
    "dropout": lambda a: jnp.where(jax.random.bernoulli(KEY, 0.5, a.shape), jnp.tanh(a), 0),
    "noise": lambda a: jnp.tanh(a + jax.random.normal(KEY, a.shape, a.dtype)),
    "rank": lambda a: jnp.tanh(a) * a.ndim,
    "size": lambda a: jnp.tanh(a) / a.size,
    "sequences": lambda a: jnp.tanh(a) * a.shape[0],
    "one row": lambda a: jnp.tanh(a) * (1 + (a.ndim < 2)),
    "many steps": lambda a: jnp.tanh(a) * (1 + (a.ndim > 1 and a.shape[0] > 10)),
}


@jax.custom_jvp
def mean_of_tangents(a):
    return jnp.tanh(a)


@mean_of_tangents.defjvp
def _(primals, tangents):
    return jnp.tanh(primals[0]), tangents[0] - jnp.mean(tangents[0], -1, keepdims=True)


def with_cotangents(change):
    """tanh that changes what comes back to it."""

    @jax.custom_vjp
    def same(x):
        return x

    same.defvjp(lambda x: (x, None), lambda _, g: (change(g),))
    return lambda a: same(jnp.tanh(a))


DERIVATIVES = {
    "clipped": with_cotangents(lambda g: jnp.clip(g, -0.1, 0.1)),
    "centred": with_cotangents(lambda g: g - jnp.mean(g, -1, keepdims=True)),
    "normed": with_cotangents(lambda g: g / jnp.linalg.norm(g)),
    "mean of tangents": mean_of_tangents,
    "without sign": with_cotangents(jnp.abs),
    "above 0 alone": with_cotangents(jax.nn.relu),
    "clipped far out": with_cotangents(lambda g: jnp.clip(g, -1e4, 1e4)),
    "dead near 0": with_cotangents(lambda g: jnp.where(abs(g) < 1e-4, 0, g)),
}


@pytest.mark.parametrize("name", BY_SHAPE)
def test_functions_that_depend_on_the_shape_are_refused(name):
    params, xs, h0, _ = cell_of(4, activation=BY_SHAPE[name])
    with pytest.raises(ValueError, match=r"^activation: .* depends on the shape"):
        jaxrnn.unroll(params.cell, xs, h0)


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_that_mix_units_are_refused(name):
    params, xs, h0, _ = cell_of(4, activation=DERIVATIVES[name])
    with pytest.raises(ValueError, match=r"^activation: .* that of no elementwise function$"):
        jaxrnn.unroll(params.cell, xs, h0)


FEW_BITS = "bfloat16", "float16", "float8_e5m2", "float8_e4m3fn"


@pytest.mark.parametrize("size", [4, rare(1), rare(64)])
@pytest.mark.parametrize("dtype", FEW_BITS)
def test_functions_may_compute_in_few_bits(dtype, size):
    for phi in (
        lambda a: jnp.tanh(a.astype(dtype)).astype(a.dtype),
        lambda a: jnp.tanh(a.astype(dtype).astype(a.dtype)),
    ):
        zeros = jnp.zeros((size, size), "float32")
        cell = jaxrnn.Cell(jnp.ones((size, 3), "float32"), zeros, zeros[0], activation=phi)
        h = jaxrnn.step(cell, jnp.ones(3, "float32"), jnp.zeros(size, "float32"))
        np.testing.assert_allclose(h, phi(jnp.sum(cell.U, 1)), rtol=0, atol=0.25)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_functions_may_return_another_dtype(dtype):
    def phi(a):
        return jnp.tanh(a).astype(dtype)

    params, xs, h0, _ = cell_of(4, activation=phi, leak=jnp.float32(0.3), dtype=jnp.float32)

    def loss(cell):
        return jnp.sum(jaxrnn.unroll(cell, xs, h0)[1])

    found = jax.grad(loss)(params.cell)
    plain = jaxrnn.Cell(params.cell.U, params.cell.W, params.cell.b, params.cell.leak)
    # Half precision has 11 bits.
    tolerance = 2.0**-8 if dtype == "float16" else 1e-5
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(jax.grad(loss)(plain)), strict=True):
        assert a.dtype == jnp.float32
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("name", MIXING)
def test_functions_that_mix_units_are_refused(name, size):
    if size == 2 and name == "roll":
        pytest.skip("two units rolled by two are where they were")
    params, xs, h0, _ = cell_of(size, activation=MIXING[name])
    with pytest.raises(ValueError, match=r"^activation: .* depends on others$"):
        jaxrnn.unroll(params.cell, xs, h0)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_functions_are_accepted(name):
    phi = ELEMENTWISE[name]
    for size in (1, 16):
        made = jaxrnn.init_cell(
            jax.random.key(0), 3, size, activation=phi, recurrent="identity", dtype="float64"
        )
        assert made.activation is phi
    params, xs, h0, _ = cell_of(3, activation=phi)
    cell = params.cell
    a = xs[0] @ cell.U.T + h0 @ cell.W.T + jnp.broadcast_to(cell.b, h0.shape)
    np.testing.assert_allclose(jaxrnn.step(cell, xs[0], h0), phi(a), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", WRONG)
def test_functions_that_are_not_of_jax_are_refused_in_one_line(name):
    phi, said = WRONG[name]
    params, xs, h0, _ = cell_of(4, activation=phi)
    with pytest.raises(ValueError, match=f"^activation: expected an elementwise .*{said}") as e:
        jaxrnn.unroll(params.cell, xs, h0)
    assert "\n" not in str(e.value)


SOFTMAX = jax.nn.softmax
FORMS = {
    "update of a": (Form(lambda a, h, p: SOFTMAX(a)), "update"),
    "update of h": (Form(lambda a, h, p: a + SOFTMAX(h)), "update"),
    "update of parameters": (Form(lambda a, h, p: a * SOFTMAX(p)), "update"),
    "output of h": (Form(lambda a, h, p: a, lambda h, p: SOFTMAX(h)), "output"),
    "output of parameters": (Form(lambda a, h, p: a, lambda h, p: h * jnp.sum(p)), "output"),
    "the shape of an update": (Form(lambda a, h, p: a[..., :1]), "update"),
    "arguments": (Form(lambda a, h: a), "update"),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_mix_units_are_refused(name):
    form, which = FORMS[name]
    params, xs, h0, _ = cell_of(4, form=form, parameters=jnp.linspace(0.5, 1, 4))
    with pytest.raises(ValueError, match=rf"^cell\.form\.{which}: expected an elementwise"):
        jaxrnn.unroll(params.cell, xs, h0)
    with pytest.raises(ValueError, match=rf"^form\.{which}: expected an elementwise"):
        jaxrnn.init_cell(jax.random.key(0), 3, 4, form=form, parameters=jnp.ones(4))


def test_a_derivative_that_mixes_units_is_refused():
    phi = Activation(jnp.tanh, lambda h: 1 - h * jnp.max(h, -1, keepdims=True))
    params, xs, h0, _ = cell_of(4, activation=phi)
    match = r"^activation\.derivative_from_output: .* depends on others$"
    with pytest.raises(ValueError, match=match):
        jaxrnn.unroll(params.cell, xs, h0)


@pytest.mark.parametrize("phi", [Activation("tanh"), Activation(None), Activation(jnp.tanh, 3)])
def test_the_part_of_an_activation_that_is_no_function_is_named(phi):
    which = "derivative_from_output" if phi.derivative_from_output else "function"
    with pytest.raises(TypeError, match=rf"^activation\.{which}: expected a callable, got "):
        jaxrnn.init_cell(jax.random.key(0), 3, 4, activation=phi)


def test_forms_without_an_update_are_refused():
    with pytest.raises(TypeError, match=r"^form\.update: expected a callable, got None$"):
        jaxrnn.init_cell(jax.random.key(0), 3, 4, form=Form(None))


def test_a_function_as_a_form_is_refused_with_the_call_that_makes_one():
    said = r"^form: expected one of .*, got residual; jaxrnn\.Form\(residual\) makes one$"

    def residual(a, h, _):
        return a + h

    with pytest.raises(ValueError, match=said):
        jaxrnn.init_cell(jax.random.key(0), 3, 4, form=residual)


def everywhere(phi):
    params, xs, h0, targets = cell_of(4, activation=phi)
    cell, hs = params.cell, jnp.zeros((3, 2, 4))
    return {
        "step": lambda: jaxrnn.step(cell, xs[0], h0),
        "unroll_layers": lambda: jaxrnn.unroll_layers((cell,), xs),
        "bidirectional": lambda: jaxrnn.bidirectional(cell, cell, xs),
        "outputs": lambda: jaxrnn.outputs(cell, hs),
        "bptt": lambda: jaxrnn.bptt(cell, xs, h0, hs, hs),
        "loss_and_grads": lambda: jaxrnn.loss_and_grads(params, xs, targets),
        "textbook": lambda: textbook.loss_and_grads(params, xs, targets),
        "generate": lambda: jaxrnn.generate(params, jax.random.key(0), jnp.array([0]), 3),
        "init_cell": lambda: jaxrnn.init_cell(jax.random.key(0), 3, 4, activation=phi),
        "init_params": lambda: jaxrnn.init_params(jax.random.key(0), 3, 4, 3, activation=phi),
        "jit": lambda: jax.jit(jaxrnn.unroll)(cell, xs),
        "grad": lambda: jax.grad(lambda c: jnp.sum(jaxrnn.unroll(c, xs)[0]))(cell),
        "vmap": lambda: jax.vmap(lambda x: jaxrnn.unroll(cell, x), 1)(xs),
        "to_torch": lambda: jaxrnn.to_torch(cell),
    }


@pytest.mark.parametrize("name", everywhere(None))
def test_every_public_function_refuses_a_function_that_mixes_units(name):
    with pytest.raises(ValueError, match=r"^activation: .*_softmax"):
        everywhere(_softmax)[name]()


def _softmax(a):
    return jax.nn.softmax(a)


def test_a_mean_over_devices_is_refused():
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,))
    phi = lambda a: jax.lax.pmean(jnp.tanh(a), "devices")  # noqa: E731
    params, xs, h0, _ = cell_of(4, activation=phi)
    run = jax.shard_map(lambda xs, h0: jaxrnn.unroll(params.cell, xs, h0)[1],
                        mesh=mesh, in_specs=(P(None, "devices"), P("devices")),
                        out_specs=P(None, "devices"))  # fmt: skip
    with pytest.raises(ValueError, match=r"^activation: expected an elementwise"):
        run(xs, h0)


@pytest.mark.parametrize(("kind", "custom"), [
    (AxisType.Explicit, False), (None, True), rare(None, False), rare(AxisType.Auto, False),
    rare(AxisType.Auto, True), rare(AxisType.Explicit, True),
])  # fmt: skip
def test_a_new_function_is_tried_inside_an_eager_shard_map(custom, kind):
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(kind or AxisType.Auto,))
    form = Form(lambda a, h, p: jnp.tanh(p * a), lambda h, p: jnp.sin(h))
    how = {"form": form, "parameters": jnp.ones(4)} if custom else {"activation": lambda a: a**3}
    params, xs, h0, _ = cell_of(4, **how)
    specs = P(), P(None, "devices"), P("devices")
    run = jax.shard_map(lambda *args: jaxrnn.unroll(*args)[1],
                        mesh=mesh, in_specs=specs, out_specs=specs[1])  # fmt: skip
    with jax.set_mesh(mesh) if kind else nullcontext():
        places = jax.tree.map(partial(NamedSharding, mesh), specs)
        found = run(*jax.device_put((params.cell, xs, h0), places))
    np.testing.assert_allclose(found, jaxrnn.unroll(params.cell, xs, h0)[1], rtol=1e-12)


@pytest.mark.parametrize("known", ["linear", "gelu", "silu", "nonsense", ""])
def test_unknown_names_say_that_any_callable_will_do(known):
    params, xs, *_ = cell_of(4, activation=known)
    with pytest.raises(ValueError, match=f"^activation: expected one of .* callable.*{known}"):
        jaxrnn.unroll(params.cell, xs)


@pytest.mark.parametrize("phi", [None, 3, jnp.ones(4)])
def test_activations_that_are_no_function_are_refused(phi):
    with pytest.raises(TypeError, match=r"^activation: expected a name, .* callable"):
        jaxrnn.init_cell(jax.random.key(0), 3, 4, activation=phi)


def test_a_callable_without_a_hash_is_refused():
    class Gain(dict):
        def __call__(self, a):
            return jnp.tanh(a)

    said = r"^activation: expected a callable that can be static .* Form takes .* parameters$"
    with pytest.raises(TypeError, match=said):
        jaxrnn.init_cell(jax.random.key(0), 3, 4, activation=Gain())


def test_a_function_is_tried_once_for_each_size(capfd):
    calls = []

    def phi(a):
        calls.append(a.shape)
        jax.debug.print("{}", a.shape[0])
        return jnp.tanh(a)

    params, xs, h0, _ = cell_of(4, activation=phi)
    jaxrnn.step(params.cell, xs[0], h0).block_until_ready()
    jax.effects_barrier()
    # The trial prints nothing: what is seen is one step of two sequences.
    assert capfd.readouterr().out.split() == ["2"]
    count = len(calls)
    for _ in range(3):
        jaxrnn.step(params.cell, xs[0], h0)
    assert len(calls) == count


def test_functions_that_were_tried_are_not_kept_alive():
    def try_one(n):
        phi = lambda a: a + n  # noqa: E731
        jaxrnn.init_cell(jax.random.key(0), 1, 1, activation=phi)
        return weakref.ref(phi)

    kept = [try_one(n) for n in range(50)]
    gc.collect()
    assert sum(ref() is not None for ref in kept) < 40


def test_trying_a_function_passes_debug_nans():
    params, xs, h0, _ = cell_of(4, activation=lambda a: jnp.log(2 + a) + jnp.sqrt(3 + a))
    with jax.debug_nans(True), jax.debug_infs(True):
        h = jaxrnn.step(params.cell, 0.1 * xs[0], h0)
    assert np.isfinite(h).all()


def test_functions_without_reverse_mode_have_gradients():
    def phi(a):  # tanh(tanh(a)) by a loop of unknown length, which JAX differentiates forward alone
        run = lambda state: (state[0] + 1, jnp.tanh(state[1]))  # noqa: E731
        return jax.lax.while_loop(lambda state: state[0] < 2, run, (0, a))[1]

    def loss(unroll, cell):
        h_last, hs = unroll(cell, xs, h0)
        return jnp.sum(jnp.sin(hs)) + jnp.sum(h_last)

    params, xs, h0, _ = cell_of(4)
    plain = jaxrnn.Cell(params.cell.U, params.cell.W, params.cell.b,
                        activation=lambda a: jnp.tanh(jnp.tanh(a)))  # fmt: skip
    looped = jaxrnn.Cell(params.cell.U, params.cell.W, params.cell.b, activation=phi)
    expected = jax.grad(partial(loss, naive_unroll))(plain)
    found = jax.grad(partial(loss, jaxrnn.unroll))(looped)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_an_error_in_a_derivative_is_raised_unchanged():
    @jax.custom_vjp
    def phi(a):
        return jnp.tanh(a)

    def backward(a, g):
        raise ValueError("no slope today")

    phi.defvjp(lambda a: (phi(a), a), backward)
    params, xs, h0, _ = cell_of(4, activation=phi)
    with pytest.raises(ValueError, match=r"^no slope today"):
        jax.grad(lambda cell: jnp.sum(jaxrnn.unroll(cell, xs, h0)[0]))(params.cell)
