"""What the compiled programs do, counted: products in loops, arrays, temporaries, compilations."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from helpers import naive_unroll, random_case

import jaxrnn
from jaxrnn import textbook
from jaxrnn._core import schedule

T, B, D, H = 20, 6, 16, 24


@pytest.fixture(scope="module")
def case():
    params, xs, h0, _ = random_case(T=T, batch=(B,), D=D, H=H, dtype=jnp.float32)
    return params.cell, xs, h0


def loss(unroll):
    return lambda cell, xs, h0: jnp.sum(jnp.sin(unroll(cell, xs, h0)[1]))


def equations(jaxpr):
    """Every equation, those of inner programs too, as (equation, the loops it is in).

    A loop is a number: one inner program can be called from two places.
    """
    numbers = itertools.count()

    def walk(jaxpr, loops):
        for eqn in jaxpr.eqns:
            inner, params = loops, eqn.params
            if eqn.primitive.name == "scan":
                inner = (*loops, next(numbers))
            elif eqn.primitive.name == "custom_linear_solve":
                params = {"solve": params["jaxprs"].solve}  # the others do not run
            elif eqn.primitive.name == "linear_map":  # traced where it is lowered, as here
                run = functools.partial(eqn.primitive.impl, **params)
                params = {"run": jax.make_jaxpr(run)(*(var.aval for var in eqn.invars))}
            yield eqn, inner
            for leaf in jax.tree.leaves(list(params.values())):
                body = getattr(leaf, "jaxpr", leaf)
                if hasattr(body, "eqns"):
                    yield from walk(body, inner)

    return list(walk(jaxpr.jaxpr, ()))


def lowered(f, *args):
    """The program in StableHLO, before XLA removes anything."""
    return jax.jit(f).lower(*args).as_text()


def optimised(f, *args):
    return jax.jit(f).lower(*args).compile().as_text()


def compiled_products(f, *args):
    """Products in the optimised HLO, following fusions and calls: (outside loops, in each loop)."""
    text = optimised(f, *args)
    bodies = {}
    for block in re.split(r"\n\n", text):
        head = re.match(r"\s*(?:ENTRY )?%?([\w.\-]+) \(", block)
        if head:
            bodies[head[1]] = block

    def count(name):
        block = bodies[name]
        here = len(re.findall(r"= \S+ dot\(", block)) + block.count("matmul")
        called = re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", block)
        return here + sum(count(n) for n in called if n in bodies)

    entry = re.search(r"ENTRY %?([\w.\-]+) \(", text)[1]
    return count(entry), sorted(count(name) for name in re.findall(r"body=%?([\w.\-]+)", text))


def products_per_loop(f, *args):
    return compiled_products(f, *args)[1]


def trip_counts(f, *args):
    """How many steps each loop of the compiled program has."""
    found = re.findall(r" while\(.*known_trip_count\D+(\d+)", optimised(f, *args))
    return sorted(map(int, found))


def shapes(text):
    """Of every array in a StableHLO text."""
    found = re.findall(r"tensor<([\dx]*)[a-z]\w*>", text)
    return [tuple(map(int, sizes.split("x")[:-1])) for sizes in found]


def carried(f, *args):
    """The shapes that the loops of the program hand on from step to step, sorted."""
    found = []
    for values, types in re.findall(r"stablehlo\.return (.*) : (.*)", lowered(f, *args)):
        # A loop hands on unchanged what its body only reads.
        names = [name.strip() for name in values.split(",")]
        if any(name.startswith("%iterArg") for name in names):
            found += [shape for name, shape in zip(names, shapes(types), strict=True)
                      if not name.startswith("%iterArg")]  # fmt: skip
    return sorted(found)


def test_the_readers_see_the_naive_backward(case):
    # A plain scan's backward recomputes nothing here but forms dW, dU and two products back.
    gradient = jax.grad(loss(naive_unroll), (0, 1, 2))
    assert products_per_loop(gradient, *case)[-1] >= 3
    assert trip_counts(gradient, *case) == [T, T]
    assert (H, H) in carried(gradient, *case)


def test_loops_of_the_gradient(case):
    """Each loop has one product; none accumulates a gradient."""
    gradient = jax.grad(loss(jaxrnn.unroll), (0, 1, 2))
    assert products_per_loop(gradient, *case) == [1, 1]
    assert trip_counts(gradient, *case) == [T, T]


def test_loops_of_bptt(case):
    cell, xs, h0 = case
    hs = jnp.ones((T, B, H), jnp.float32)
    assert products_per_loop(jaxrnn.bptt, cell, xs, h0, hs, hs) == [1]


@pytest.mark.parametrize("mixture", ["forward over reverse", "reverse over forward"])
def test_second_order_needs_four_loops_and_no_more(case, mixture):
    f = loss(jaxrnn.unroll)
    if mixture == "forward over reverse":

        def product(*args):
            return jax.jvp(jax.grad(f, (0, 1, 2)), args, args)[1]
    else:

        def product(*args):
            return jax.grad(lambda *a: jax.jvp(f, a, args)[1], (0, 1, 2))(*args)

    assert products_per_loop(product, *case) == [1, 1, 1, 1]
    assert trip_counts(product, *case) == [T] * 4


def test_no_carry_holds_a_gradient_of_the_weights(case):
    found = carried(jax.grad(loss(jaxrnn.unroll)), *case)
    assert (B, H) in found and (H, H) not in found and (H, D) not in found


def test_no_array_holds_a_jacobian_or_a_gradient_per_sequence(case):
    cell, xs, h0 = case

    def vmapped(cell, xs, h0):
        return jax.vmap(lambda x, h: jaxrnn.unroll(cell, x, h), (1, 0), (0, 1))(xs, h0)

    for unroll in (jaxrnn.unroll, vmapped):
        seen = shapes(lowered(jax.grad(loss(unroll), (0, 1, 2)), cell, xs, h0))
        assert (H, H) in seen
        assert not [s for s in seen if len(s) > 2 and s[-2:] in ((H, H), (H, D))]


def test_vmap_runs_the_same_loops_as_the_batch(case):
    cell, xs, h0 = case

    def vmapped(cell, xs, h0):
        return jax.vmap(lambda x, h: jaxrnn.unroll(cell, x, h), (0, 0), (0, 0))(xs, h0)

    args = cell, jnp.moveaxis(xs, 1, 0), h0
    of_batch, gradient = (jax.grad(loss(f), (0, 1, 2)) for f in (jaxrnn.unroll, vmapped))
    assert products_per_loop(gradient, *args) == [1, 1]
    assert carried(gradient, *args) == carried(of_batch, *case)


def test_the_compiled_program_has_no_gradient_that_nobody_asked_for(case):
    def outside(*wanted):
        count, loops = compiled_products(jax.grad(loss(jaxrnn.unroll), wanted), *case)
        assert loops == [1, 1]
        return count

    # U x is one product, dU and dW are one each, so is dx; dh_0 is what the loop ends with.
    assert [outside(0), outside(0, 1), outside(0, 1, 2), outside(1), outside(2)] == [3, 4, 4, 2, 1]

    def of_bias(b, cell, xs, h0):
        return loss(jaxrnn.unroll)(dataclasses.replace(cell, b=b), xs, h0)

    assert compiled_products(jax.grad(of_bias), case[0].b, *case)[0] == 1


NETWORKS = {
    "leak": {"leak": 0.5},
    "relu with leak": {"leak": 0.5, "activation": "relu"},
    "a callable with leak": {"leak": 0.5, "activation": jax.nn.softplus},
    "a callable": {"activation": jax.nn.softplus},
    "voltage": {"leak": 0.5, "form": "voltage"},
    "custom": {"form": jaxrnn.Form(lambda a, h, _: 0.5 * h + jnp.sin(a), lambda h, _: jnp.cos(h))},
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_no_preactivation_is_formed_again(case, network):
    def of_weights(weights, cell, xs, h0):
        cell = dataclasses.replace(cell, **weights)
        return loss(jaxrnn.unroll)(cell, xs, h0)

    cell, xs, h0 = case
    cell = dataclasses.replace(cell, **network)
    weights = {"U": cell.U, "W": cell.W, "b": cell.b}
    # As of tanh without a leak: U x, dU and dW.
    assert compiled_products(jax.grad(of_weights), weights, cell, xs, h0) == (3, [1, 1])


def test_arrays_of_all_steps():
    """Beyond inputs and outputs, of which the states are one, at most two of [T, B, H]."""
    T, B, D, H = 100, 16, 64, 64

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    def both(cell, xs, h0, g):
        hs, pull = jax.vjp(lambda *args: jaxrnn.unroll(*args)[1], cell, xs, h0)
        return hs, pull(g)

    cell = jaxrnn.Cell(shape(H, D), shape(H, H), shape(H))
    args = cell, shape(T, B, D), shape(B, H), shape(T, B, H)
    used = jax.jit(both).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert used <= 2 * 4 * T * B * H + 4 * 8 * H * (H + D)


def compiled(unroll, T, B, D, H, axis=1):
    """The gradient of everything, compiled for these sizes, of which no array need exist."""

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    def of_batch(cell, xs, h0):
        if axis == 1:
            return unroll(cell, xs, h0)
        return jax.vmap(lambda x, h: unroll(cell, x, h))(xs, h0)

    def gradient(cell, xs, h0, g):
        return jax.grad(lambda *a: jnp.sum(of_batch(*a)[1] * g), (0, 1, 2))(cell, xs, h0)

    cell = jaxrnn.Cell(shape(H, D), shape(H, H), shape(H))
    time_and_batch = (T, B) if axis else (B, T)
    args = cell, shape(*time_and_batch, D), shape(B, H), shape(*time_and_batch, H)
    return jax.jit(gradient).lower(*args).compile()


def temporaries(*args, **how):
    return compiled(*args, **how).memory_analysis().temp_size_in_bytes


# (T, B, D, H), how many arrays of states the gradient may have beside one segment, and whether
# that is less than the naive scan's, which has 2.1 arrays from jax 0.11 on, and 3.1 before.
SIZES = {
    "in one piece": ((100, 16, 8, 64), 3, False),
    "in segments": ((784, 128, 1, 128), 1, True),
    "in segments, wide": ((100, 128, 512, 512), 1, False),
    "in segments, long": ((50_000, 1, 8, 32), 1, True),
}


@pytest.mark.parametrize(("sizes", "arrays", "leaner"), SIZES.values(), ids=SIZES.keys())
def test_temporaries(sizes, arrays, leaner):
    """The states; of a segment eight arrays more; weights and their like."""
    T, B, D, H = sizes
    state = 4 * B * H
    length = schedule.segment_length(T, (B,), D, H)
    rest = 8 * length * state * (length < T) + 4 * 8 * H * (H + D)
    limit = arrays * T * state + rest
    assert temporaries(jaxrnn.unroll, *sizes) <= limit
    # A mapped axis is moved behind time: of inputs, states and g at most two are copied for it.
    assert temporaries(jaxrnn.unroll, *sizes, axis=0) <= limit + 2 * T * state
    assert not leaner or temporaries(jaxrnn.unroll, *sizes) < temporaries(naive_unroll, *sizes)


@pytest.mark.parametrize("phi", ["tanh", "relu"])
@pytest.mark.parametrize("form", ["rate", "voltage"])
def test_temporaries_with_a_leak(form, phi):
    """At most one array of states more than the naive scan, whose loss needs no states."""
    T, B, D, H = 60, 64, 3, 128

    def of_weights(unroll):
        def gradient(cell, weights, xs, g):
            def loss(weights):
                return jnp.sum(unroll(dataclasses.replace(cell, **weights), xs) * g)

            return jax.grad(loss)(weights)

        return gradient

    def naive(cell, xs):
        function = jnp.tanh if phi == "tanh" else jax.nn.relu

        def step(h, x):
            s = h if form == "rate" else function(h)
            a = x @ cell.U.T + s @ cell.W.T + jnp.broadcast_to(cell.b, h.shape)
            h = 0.8 * h + 0.2 * (function(a) if form == "rate" else a)
            return h, h

        return jax.lax.scan(step, jnp.zeros((B, H), jnp.float32), xs)[1]

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    weights = {"U": shape(H, D), "W": shape(H, H), "b": shape(H)}
    cell = jaxrnn.Cell(**weights, leak=0.2, activation=phi, form=form)
    args = weights, shape(T, B, D), shape(T, B, H)
    found = {}
    for unroll in (naive, lambda cell, xs: jaxrnn.unroll(cell, xs)[1]):
        compiled = jax.jit(functools.partial(of_weights(unroll), cell)).lower(*args).compile()
        found[unroll] = compiled.memory_analysis().temp_size_in_bytes
    of_naive, ours = found.values()
    assert ours <= of_naive + 4 * T * B * H


@pytest.mark.parametrize(("axis", "most"), [(1, 0), (0, 2)])
def test_no_whole_array_is_transposed_or_copied(axis, most):
    """Of a batch; an axis mapped before time has g moved, and with jax 0.12 copied too."""
    T, B, D, H = SIZES["in segments"][0]
    text = compiled(jaxrnn.unroll, T, B, D, H, axis=axis).as_text()
    made = re.findall(r"= f32\[([\d,]+)\]\S* (\w+)\(.*(?:calls=%(\S*))?", text)
    whole = [
        (name, calls) for sizes, name, calls in made
        if math.prod(map(int, sizes.split(","))) == T * B * H
    ]  # fmt: skip
    moved = [w for w in whole if w[0] in ("copy", "transpose") or "transpose" in w[1]]
    assert whole and len(moved) <= most, moved


def test_loss_and_grads_keeps_no_more_than_the_states():
    """Logits, errors and cotangents of [T, B, …] exist for a segment only."""
    T, B, D, H, K = 512, 64, 65, 128, 65

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    cell = jaxrnn.Cell(shape(H, D), shape(H, H), shape(H))
    params = jaxrnn.Params(cell, jaxrnn.Readout(shape(K, H), shape(K)))
    ids = shape(T, B, dtype=jnp.int32)
    run = jax.jit(lambda params, ids, y: jaxrnn.loss_and_grads(params, jaxrnn.Ids(ids), y))
    found = run.lower(params, ids, ids).compile().memory_analysis().temp_size_in_bytes
    length = schedule.segment_length(T, (B,), D, H)
    assert length < T
    assert found <= 4 * B * (T * (H + 2) + length * (4 * H + 3 * K)) + 4 * 8 * H * (H + D + K)


CALLS = {
    "unroll": lambda p, xs, h0, y: jaxrnn.unroll(p.cell, xs, h0),
    "unroll with lengths": lambda p, xs, h0, y: jaxrnn.unroll(p.cell, xs, lengths=y[0]),
    "step": lambda p, xs, h0, y: jaxrnn.step(p.cell, xs[0], h0),
    "bptt": lambda p, xs, h0, y: jaxrnn.bptt(p.cell, xs, h0, hs := h0 + 0 * xs[..., :1], hs),
    "loss_and_grads": lambda p, xs, h0, y: jaxrnn.loss_and_grads(p, xs, y, h0=h0),
    "textbook.loss_and_grads": lambda p, xs, h0, y: textbook.loss_and_grads(p, xs, y),
    "textbook.contributions": lambda p, xs, h0, y: textbook.contributions(p, xs, y),
    "a gradient": lambda p, xs, h0, y: jax.grad(
        lambda xs: jnp.sum(jaxrnn.unroll(p.cell, xs, h0)[1])
    )(xs),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_eager_calls_compile_once_per_shape(call):
    traces = []

    def counted(a):
        if a.shape != (1, 1):  # the shape with which arguments are checked, at every call
            traces.append(a.shape)
        return jnp.tanh(a)

    def traced(**how):
        before = len(traces)
        params, xs, h0, targets = random_case(activation=counted, seed=before, **how)
        with jax.numpy_rank_promotion("allow"):
            call(params, xs, h0, targets)
        return len(traces) - before

    assert traced() > 0 and traced() == 0
    assert (traced(T=4) > 0) != (call is CALLS["step"])
    assert traced() == 0
