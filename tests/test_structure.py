"""What the compiled programs do, counted: products in loops, arrays, temporaries, compilations."""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from helpers import naive_unroll, random_case, weights

import jaxrnn
from jaxrnn import textbook

T, B, D, H = 20, 6, 3, 16


@pytest.fixture(scope="module")
def case():
    params, xs, h0, _ = random_case(T=T, batch=(B,), D=D, H=H, dtype=jnp.float32)
    return params.cell, xs, h0


def loss(unroll):
    return lambda cell, xs, h0: jnp.sum(jnp.sin(unroll(cell, xs, h0)[1]))


def equations(jaxpr):
    """Every equation, those of inner programs too, as (equation, the loops it stands in).

    A loop is named by a number: one inner program can be called from two places.
    """
    numbers = itertools.count()

    def walk(jaxpr, loops):
        for eqn in jaxpr.eqns:
            inner, params = loops, eqn.params
            if eqn.primitive.name == "scan":
                inner = (*loops, next(numbers))
            elif eqn.primitive.name == "custom_linear_solve":
                params = {"solve": params["jaxprs"].solve}  # the others do not run
            yield eqn, inner
            for leaf in jax.tree.leaves(list(params.values())):
                body = getattr(leaf, "jaxpr", leaf)
                if hasattr(body, "eqns"):
                    yield from walk(body, inner)

    return list(walk(jaxpr.jaxpr, ()))


def products_per_loop(f, *args):
    found = equations(jax.make_jaxpr(f)(*args))
    loops = {number: 0 for _, inside in found for number in inside}
    for eqn, inside in found:
        for number in inside:
            loops[number] += eqn.primitive.name == "dot_general"
    return sorted(loops.values())


def products_per_compiled_loop(f, *args):
    """Products in each while body of the optimised HLO, following fusions and calls."""
    text = jax.jit(f).lower(*args).compile().as_text()
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

    return sorted(count(name) for name in re.findall(r"body=%?([\w.\-]+)", text))


def test_walkers_see_the_naive_backward(case):
    # A plain scan's backward recomputes nothing here but forms dW, dU and two products back.
    assert products_per_loop(jax.grad(loss(naive_unroll), (0, 1, 2)), *case)[-1] >= 4
    assert products_per_compiled_loop(jax.grad(loss(naive_unroll), (0, 1, 2)), *case)[-1] >= 3


def test_loops_of_the_gradient(case):
    """The forward loop has two products, the backward one; none accumulates a gradient."""
    gradient = jax.grad(loss(jaxrnn.unroll), (0, 1, 2))
    assert products_per_loop(gradient, *case) == [1, 2]
    assert products_per_compiled_loop(gradient, *case) == [1, 2]


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

    assert products_per_loop(product, *case) == [1, 1, 1, 2]


@pytest.mark.parametrize(("unroll", "held"), [(jaxrnn.unroll, False), (naive_unroll, True)])
def test_no_carry_holds_a_gradient_of_the_weights(case, unroll, held):
    found = equations(jax.make_jaxpr(jax.grad(loss(unroll)))(*case))
    bodies = [eqn.params["jaxpr"] for eqn, _ in found if eqn.primitive.name == "scan"]
    # What a body puts out is a carry or one step of [T, B, H];
    carried = [var.aval.shape for body in bodies for var in getattr(body, "jaxpr", body).outvars]
    assert (B, H) in carried
    assert ((H, H) in carried) == held


def shapes(f, *args):
    return {var.aval.shape for eqn, _ in equations(jax.make_jaxpr(f)(*args)) for var in eqn.outvars
            if hasattr(var.aval, "shape")}  # fmt: skip


def test_no_array_holds_a_jacobian_or_a_gradient_per_sequence(case):
    cell, xs, h0 = case

    def vmapped(cell, xs, h0):
        return jax.vmap(lambda x, h: jaxrnn.unroll(cell, x, h), (1, 0), (0, 1))(xs, h0)

    for unroll in (jaxrnn.unroll, vmapped):
        seen = shapes(jax.grad(loss(unroll), (0, 1, 2)), cell, xs, h0)
        assert (H, H) in seen
        assert not [s for s in seen if s[-2:] == (H, H) and len(s) > 2]
        assert not [s for s in seen if s[-2:] == (H, D) and len(s) > 2]


def test_vmap_runs_the_same_loops_as_the_batch(case):
    cell, xs, h0 = case

    def vmapped(cell, xs, h0):
        return jax.vmap(lambda x, h: jaxrnn.unroll(cell, x, h), (0, 0), (0, 0))(xs, h0)

    first = jnp.moveaxis(xs, 1, 0)
    gradient = jax.grad(loss(vmapped), (0, 1, 2))
    assert products_per_compiled_loop(gradient, cell, first, h0) == [1, 2]
    # Folded loops carry the batch, time in front.
    stacked = [eqn.outvars[-1].aval.shape for eqn, _ in
               equations(jax.make_jaxpr(gradient)(cell, first, h0))
               if eqn.primitive.name == "scan"]  # fmt: skip
    assert stacked == [(T, B, H)] * 2


def test_gradients_nobody_asked_for_are_not_computed(case):
    everything = equations(jax.make_jaxpr(jax.grad(loss(jaxrnn.unroll), (0, 1, 2)))(*case))
    only_cell = equations(jax.make_jaxpr(jax.grad(loss(jaxrnn.unroll)))(*case))

    def dots(found):
        return sum(eqn.primitive.name == "dot_general" for eqn, _ in found)

    # dx and dh_0 are one product each.
    assert dots(only_cell) == dots(everything) - 2


def test_temporaries_are_four_arrays_of_states():
    """The states, those before each, the adjoint and delta; no more with T."""
    params, xs, h0, _ = random_case(T=100, batch=(16,), D=8, H=64, dtype=jnp.float32)
    g = weights((100, 16, 64), dtype=jnp.float32)
    gradient = jax.grad(lambda *a: jnp.sum(jaxrnn.unroll(*a)[1] * g), (0, 1, 2))
    compiled = jax.jit(gradient).lower(params.cell, xs, h0).compile()
    states, rest = 100 * 16 * 64 * 4, 8 * 64 * 64 * 4
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * states + rest


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
