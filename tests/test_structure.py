"""What the compiled programs do, counted: products in loops, arrays, temporaries, compilations."""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers import compile_as_user, naive_unroll, random_case, rare, temporaries

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


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def lowered(f, *args):
    """The program in StableHLO, before XLA removes anything."""
    return jax.jit(f).lower(*args).as_text()


def optimised(f, *args):
    """The program in HLO, as XLA compiles it for a user."""
    return compile_as_user(jax.jit(f).lower(*args)).as_text()


def compiled_loops(f, *args):
    """Of the optimised HLO: (products outside loops, (steps, products in one) of each loop).

    Fusions and calls are followed.
    """
    text = optimised(f, *args)
    bodies = {}
    for block in re.split(r"\n\n", text):
        head = re.match(r"\s*(?:ENTRY )?%?([\w.\-]+) \(", block)
        if head:
            bodies[head[1]] = block

    def products(name):
        block = bodies[name]
        here = len(re.findall(r"= \S+ dot\(", block)) + block.count("matmul")
        called = re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", block)
        return here + sum(products(n) for n in called if n in bodies)

    entry = re.search(r"ENTRY %?([\w.\-]+) \(", text)[1]
    loops = re.findall(r" while\(.*body=%?([\w.\-]+).*known_trip_count\D+(\d+)", text)
    assert len(loops) == text.count(" while(")
    return products(entry), sorted((int(steps), products(body)) for body, steps in loops)


def trip_counts(f, *args):
    """How many steps each loop of the compiled program has."""
    return [steps for steps, _ in compiled_loops(f, *args)[1]]


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


AS_A_USER = """
import sys
sys.path.insert(0, {tests!r})
from test_structure import gradient_and_shapes, instructions, jax, jaxrnn
jax.config.update("jax_enable_x64", True)
f, *args = gradient_and_shapes(jaxrnn.unroll, 4, 2, 3, 5)
print(*instructions(jax.jit(f).lower(*args).compile().as_text()), sep="\\n")
"""


def instructions(text):
    """Those of an HLO text, without the places in Python that they come from."""
    return [re.sub(r", metadata={[^}]*}", "", x) for x in text.splitlines() if " = " in x]


def test_compile_as_user_gives_the_program_of_a_process_without_flags():
    code = AS_A_USER.format(tests=str(pathlib.Path(__file__).parent))
    env = {**os.environ, "XLA_FLAGS": ""}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    found = instructions(optimised(*gradient_and_shapes(jaxrnn.unroll, 4, 2, 3, 5)))
    assert found and found == run.stdout.splitlines()


def test_the_readers_see_the_naive_backward(case):
    # A plain scan's backward recomputes nothing here but forms dW, dU and two products back.
    gradient = jax.grad(loss(naive_unroll), (0, 1, 2))
    (forward, _), (backward, products) = compiled_loops(gradient, *case)[1]
    assert forward == backward == T and products >= 3
    assert (H, H) in carried(gradient, *case)


def test_bptt_has_one_loop_of_one_product(case):
    cell, xs, h0 = case
    hs = jnp.ones((T, B, H), jnp.float32)
    assert compiled_loops(jaxrnn.bptt, cell, xs, h0, hs, hs)[1] == [(T, 1)]


@pytest.mark.parametrize("mixture", ["forward over reverse", "reverse over forward"])
def test_second_order_has_four_loops_of_one_product(case, mixture):
    f = loss(jaxrnn.unroll)
    if mixture == "forward over reverse":

        def product(*args):
            return jax.jvp(jax.grad(f, (0, 1, 2)), args, args)[1]
    else:

        def product(*args):
            return jax.grad(lambda *a: jax.jvp(f, a, args)[1], (0, 1, 2))(*args)

    assert compiled_loops(product, *case)[1] == [(T, 1)] * 4


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
    assert compiled_loops(gradient, *args)[1] == [(T, 1)] * 2
    assert carried(gradient, *args) == carried(of_batch, *case)


@pytest.mark.parametrize(("wanted", "outside"), [
    # U x is one product, dU and dW are one each, so is dx; dh_0 is what the loop ends with.
    (("cell",), 3), (("cell", "xs", "h0"), 4), (("xs",), 2), (("h0",), 1), (("b",), 1),
], ids=str)  # fmt: skip
def test_only_the_gradients_that_are_used_are_computed(case, wanted, outside):
    cell, xs, h0 = case

    def gradient(cell, xs, h0):
        def of_some(arrays):
            given = {"cell": cell, "xs": xs, "h0": h0} | arrays
            b = given.pop("b", None)
            whole = given["cell"] if b is None else dataclasses.replace(cell, b=b)
            return loss(jaxrnn.unroll)(**given | {"cell": whole})

        values = {"cell": cell, "xs": xs, "h0": h0, "b": cell.b}
        return jax.grad(of_some)({name: values[name] for name in wanted})

    # Each loop has one product, and none accumulates a gradient.
    assert compiled_loops(gradient, cell, xs, h0) == (outside, [(T, 1)] * 2)


NETWORKS = {
    "leak": {"leak": 0.5},
    "relu with leak": {"leak": 0.5, "activation": "relu"},
    "a callable with leak": {"leak": 0.5, "activation": jax.nn.softplus},
    "a callable": {"activation": jax.nn.softplus},
    "voltage": {"leak": 0.5, "form": "voltage"},
    "custom": {"form": jaxrnn.Form(lambda a, h, _: 0.5 * h + jnp.sin(a), lambda h, _: jnp.cos(h))},
}


@pytest.mark.parametrize("name", [
    rare(name) if name in ("relu with leak", "a callable with leak") else name for name in NETWORKS
])  # fmt: skip
def test_no_preactivation_is_formed_again(case, name):
    def of_weights(weights, cell, xs, h0):
        cell = dataclasses.replace(cell, **weights)
        return loss(jaxrnn.unroll)(cell, xs, h0)

    cell, xs, h0 = case
    cell = dataclasses.replace(cell, **NETWORKS[name])
    weights = {"U": cell.U, "W": cell.W, "b": cell.b}
    # As of tanh without a leak: U x, dU and dW.
    assert compiled_loops(jax.grad(of_weights), weights, cell, xs, h0) == (3, [(T, 1)] * 2)


def test_few_arrays_hold_all_steps():
    """Beyond inputs and outputs, of which the states are one, at most two of [T, B, H]."""
    T, B, D, H = 100, 16, 64, 64

    def both(cell, xs, h0, g):
        hs, pull = jax.vjp(lambda *args: jaxrnn.unroll(*args)[1], cell, xs, h0)
        return hs, pull(g)

    cell = jaxrnn.Cell(shape(H, D), shape(H, H), shape(H))
    args = cell, shape(T, B, D), shape(B, H), shape(T, B, H)
    assert temporaries(both, *args) <= 2 * 4 * T * B * H + 4 * 8 * H * (H + D)


def gradient_and_shapes(unroll, T, B, D, H, axis=1):
    """The gradient of everything, and the shapes of its arguments for these sizes."""

    def of_batch(cell, xs, h0):
        if axis == 1:
            return unroll(cell, xs, h0)
        return jax.vmap(lambda x, h: unroll(cell, x, h))(xs, h0)

    def gradient(cell, xs, h0, g):
        return jax.grad(lambda *a: jnp.sum(of_batch(*a)[1] * g), (0, 1, 2))(cell, xs, h0)

    cell = jaxrnn.Cell(shape(H, D), shape(H, H), shape(H))
    time_and_batch = (T, B) if axis else (B, T)
    return gradient, cell, shape(*time_and_batch, D), shape(B, H), shape(*time_and_batch, H)


def temporaries_of(*args, **how):
    return temporaries(*gradient_and_shapes(*args, **how))


# (T, B, D, H), and how many arrays of states the gradient may have beside one segment.
SIZES = {
    "in one piece": ((100, 16, 8, 64), 3),
    "in segments": ((784, 128, 1, 128), 1),
    "in segments, wide": ((100, 128, 512, 512), 1),
    "in segments, long": ((50_000, 1, 8, 32), 1),
}


def limit(sizes, arrays):
    """The states; of a segment eight arrays more; weights and the like."""
    T, B, D, H = sizes
    state = 4 * B * H
    length = schedule.segment_length(T, (B,), D, H)
    return arrays * T * state + 8 * length * state * (length < T) + 4 * 8 * H * (H + D)


@pytest.mark.parametrize(("sizes", "arrays"), SIZES.values(), ids=SIZES)
def test_temporaries_are_the_states_and_one_segment(sizes, arrays):
    assert temporaries_of(jaxrnn.unroll, *sizes) <= limit(sizes, arrays)


def test_temporaries_of_a_mapped_axis_are_two_arrays_more():
    # It is moved behind time: of inputs, states and g at most two are copied for it.
    sizes, arrays = SIZES["in segments"]
    T, B, _, H = sizes
    most = limit(sizes, arrays + 2)
    assert temporaries_of(jaxrnn.unroll, *sizes, axis=0) <= most < 4 * 4 * T * B * H


def test_temporaries_in_segments_are_below_those_of_a_naive_scan():
    # Which has 2.1 arrays of states from jax 0.11 on, and 3.1 before.
    sizes, _ = SIZES["in segments"]
    assert temporaries_of(jaxrnn.unroll, *sizes) < temporaries_of(naive_unroll, *sizes)


@pytest.mark.parametrize(("form", "phi"), [
    ("rate", "relu"), ("voltage", "tanh"),
    rare("rate", "tanh"), rare("voltage", "relu"),
])  # fmt: skip
def test_temporaries_with_a_leak_are_bounded(form, phi):
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

    weights = {"U": shape(H, D), "W": shape(H, H), "b": shape(H)}
    cell = jaxrnn.Cell(**weights, leak=0.2, activation=phi, form=form)
    args = weights, shape(T, B, D), shape(T, B, H)
    of_naive, ours = (
        temporaries(functools.partial(of_weights(unroll), cell), *args)
        for unroll in (naive, lambda cell, xs: jaxrnn.unroll(cell, xs)[1])
    )
    assert ours <= of_naive + 4 * T * B * H


@pytest.mark.parametrize(("axis", "most"), [(1, 0), (0, 2)])
def test_no_whole_array_is_transposed_or_copied(axis, most):
    """Of a batch; an axis mapped before time has g moved, and with jax 0.12 copied too."""
    T, B, D, H = SIZES["in segments"][0]
    text = optimised(*gradient_and_shapes(jaxrnn.unroll, T, B, D, H, axis=axis))
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

    cell = jaxrnn.Cell(shape(H, D), shape(H, H), shape(H))
    params = jaxrnn.Params(cell, jaxrnn.Readout(shape(K, H), shape(K)))
    ids = shape(T, B, dtype=jnp.int32)

    def run(params, ids, y):
        return jaxrnn.loss_and_grads(params, jaxrnn.Ids(ids), y)

    found = temporaries(run, params, ids, ids)
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
