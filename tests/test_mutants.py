"""Wrong formulas fail: mutants in process, and, behind `full`, copies with one line changed."""

import functools
import os
import pathlib
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_case, weights
from jax import lax

import jaxrnn
from jaxrnn._base import arithmetic, forms, masking
from jaxrnn._core import derivative, linear, loss, schedule, window

ROOT = pathlib.Path(__file__).parent.parent

T, B, H = 5, 2, 3
MASK = jnp.asarray(np.arange(T)[:, None] % 3 != np.arange(B) + 1)
LEAK = jnp.linspace(0.2, 0.9, H)
CUSTOM = {
    "form": jaxrnn.Form(
        lambda a, h, p: (1 - p["alpha"]) * jnp.sin(h) + p["alpha"] * jnp.tanh(a),
        lambda h, p: jnp.tanh(h - p["threshold"]),
    ),
    "parameters": {"alpha": jnp.asarray(0.4), "threshold": jnp.linspace(-0.5, 0.5, H)},
}


# Witnesses: a derivative of the library beside that of a plain loop. ---------------------------

hold = lax.stop_gradient  # also while a mutant has another one in its place


def plain_step(cell, x, h, cut=False):
    if isinstance(cell.form, jaxrnn.Form):
        s = cell.form.output(hold(h) if cut else h, cell.parameters)
        return cell.form.update(cell.W @ s + cell.U @ x + cell.b, h, cell.parameters)
    phi = {"tanh": jnp.tanh, "relu": jax.nn.relu}[cell.activation]
    s = phi(h) if cell.form == "voltage" else h
    a = cell.W @ (hold(s) if cut else s) + cell.U @ x + cell.b
    f = a if cell.form == "voltage" else phi(a)
    return f if cell.leak is None else (1 - cell.leak) * h + cell.leak * f


def plain_loop(cell, xs, h0, *, mask=None, truncate=None, window=None):
    """One sequence after the other, one step after the other."""

    def of_one(xs, h0, valid):
        hs, number = [h0], 0
        for t in range(T):
            cut = truncate is not None and number > 0 and number % truncate == 0
            hs.append(plain_step(cell, xs[t], hs[-1], cut) if valid[t] else hs[-1])
            number += valid[t]
        if window is not None:
            for t in reversed(range(1, T + 1)):
                h = h0 if t < window else hold(hs[t - window])
                for x in xs[max(t - window, 0) : t]:
                    h = plain_step(cell, x, h)
                hs[t] = h
        return hs[-1], jnp.stack([h if v else 0 * h for h, v in zip(hs[1:], valid, strict=True)])

    valid = np.ones((T, B), bool) if mask is None else np.asarray(mask)
    found = [of_one(xs[:, n], h0[n], valid[:, n]) for n in range(B)]
    return jnp.stack([h for h, _ in found]), jnp.stack([hs for _, hs in found], 1)


def loss_of(unroll, how):
    def of(*args):
        h_last, hs = unroll(*args, **how)
        return jnp.sum(jnp.sin(hs) * weights(hs.shape)) + jnp.sum(jnp.exp(h_last))

    return of


def gradient(f, args):
    return jax.grad(f, (0, 1, 2))(*args)


def tangent(f, args):
    direction = jax.tree.map(lambda x: weights(x.shape, x.size), args)
    return jax.jvp(f, args, direction)


def curvature(f, args):
    return tangent(lambda *args: gradient(f, args), args)


def of_unroll(product, how=None, **cell):
    """What compares one derivative of `unroll` with that of the plain loop."""
    how = how or {}

    def by(unroll):
        params, xs, h0, _ = random_case(T=T, batch=(B,), D=3, H=H, **cell)
        run = jax.jit(lambda *args: product(loss_of(unroll, how), args))
        return run(params.cell, xs, h0)

    expected = functools.cache(lambda: by(plain_loop))
    # Two orders: 6 times the tolerance of the first.
    return lambda: assert_close(by(jaxrnn.unroll), expected(), 6e-12)


def of_segments():
    jax.clear_caches()
    length, schedule.segment_length = schedule.segment_length, lambda *sizes: 2
    try:
        WITNESSES["gradient"]()
    finally:
        schedule.segment_length = length
        jax.clear_caches()


def of_loss_and_grads(**cell):
    params, xs, h0, ids = random_case(T=T, batch=(B,), D=3, H=H, **cell)

    def by_jax(params, h0):
        ys = plain_loop(params.cell, xs, h0)[1]
        if cell:
            ys = jax.vmap(jax.vmap(cell["form"].output, (0, None)), (0, None))(
                ys, params.cell.parameters
            )
        Omega = jaxrnn.apply_readout(params.readout, ys)
        chosen = jax.nn.log_softmax(Omega) * jax.nn.one_hot(ids, Omega.shape[-1])
        return -jnp.sum(chosen)

    found = jaxrnn.loss_and_grads(params, xs, ids, h0=h0)[1]
    expected = jax.jit(jax.grad(by_jax, (0, 1)))(params, h0)
    assert_close((found.params, found.h0), expected)


def of_bptt():
    params, xs, h0, _ = random_case(T=T, batch=(B,), D=3, H=H)
    args = params.cell, xs, h0
    hs, pull = jax.vjp(lambda *args: plain_loop(*args, mask=MASK)[1], *args)
    found = jaxrnn.bptt(*args, hs, weights(hs.shape), mask=MASK)
    assert_close((found.cell, found.xs, found.h0), pull(weights(hs.shape)))


WITNESSES = {
    "gradient": of_unroll(gradient),
    "tangent": of_unroll(tangent),
    "curvature": of_unroll(curvature),
    "leak": of_unroll(gradient, leak=LEAK),
    "relu with a leak": of_unroll(gradient, leak=LEAK, activation="relu"),
    "tangent of a leak": of_unroll(tangent, leak=LEAK),
    "voltage": of_unroll(gradient, leak=LEAK, form="voltage"),
    "mask": of_unroll(gradient, {"mask": MASK}),
    "truncate": of_unroll(gradient, {"truncate": 2}, leak=LEAK),
    "curvature, truncate": of_unroll(curvature, {"truncate": 2}),
    "window": of_unroll(gradient, {"window": 2}),
    "curvature, window": of_unroll(curvature, {"window": 2}),
    "custom": of_unroll(gradient, **CUSTOM),
    "tangent, custom": of_unroll(tangent, **CUSTOM),
    "truncate, custom": of_unroll(gradient, {"truncate": 2}, **CUSTOM),
    "curvature, truncate, custom": of_unroll(curvature, {"truncate": 2}, **CUSTOM),
    "loss_and_grads, custom": functools.partial(of_loss_and_grads, **CUSTOM),
    "segments": of_segments,
    "loss_and_grads": of_loss_and_grads,
    "bptt": of_bptt,
}


# Mutants in process. ---------------------------------------------------------------------------


def without(**what):
    """The same function of `Jacobians` that lack this."""
    return lambda right: lambda J, *args, **how: right(replace(J, **what), *args, **how)


def wrong_matvec(right):
    def solve(matvec, b, **how):
        return right(lambda y: y - 1.001 * (y - matvec(y)), b, **how)

    return solve


def window_too_long(right):
    def states(J, e, y0):
        options = J.options._replace(window=J.options.window + 1)
        return right(replace(J, options=options), e, y0)

    return states


def linearised_as(change):
    return lambda right: lambda *args: change(right(*args))


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def cut_too(at):
    keep = jax.tree.map(lambda slope: jnp.where(at.J.cut[..., None], 0, slope), at.by_g)
    return at._replace(by_g=keep)


# name -> (where, the name there, the wrong one made of the right one, the witness that sees it)
MUTANTS = {
    "adjoint without its transpose": (
        linear, "_backward", lambda right: lambda J, *args, **how: right(
            replace(J, W=J.W.T), *args, **how), "gradient",
    ),
    "tangent through a transpose": (
        linear, "_forward", lambda right: lambda J, *args: right(replace(J, W=J.W.T), *args),
        "tangent",
    ),
    "slope off by a thousandth": (
        forms.NAMED, "tanh", lambda right: replace(
            right, derivative_from_output=lambda h: 1.001 * (1 - h) * (1 + h)), "gradient",
    ),
    "state before off by one": (
        masking, "previous", lambda right: lambda hs, h0, reverse: hs, "gradient",
    ),
    "tangent of W from the state after": (
        derivative, "_tangent_of_a", lambda right: lambda at, tangents: right(
            at._replace(s_prev=at.steps.hs), tangents), "gradient",
    ),
    "slope of the wrong side": (
        linear.Jacobians, "before_W", without(q=None), "voltage",
    ),
    "no cut": (
        linear.Jacobians, "before_W", without(cut=None), "truncate",
    ),
    "leak forgotten in delta": (
        linear.Jacobians, "after_W", without(leak=None), "leak",
    ),
    "leak that does not pass the state on": (
        linear.Jacobians, "beside_W", lambda right: lambda J, v: 0.999 * right(J, v), "leak",
    ),
    "leak that passes no tangent on": (
        linear.Jacobians, "beside_W", lambda right: lambda J, v: 0 * right(J, v),
        "tangent of a leak",
    ),
    "gradient of a voltage's leak without the state before": (
        derivative, "_voltage_leak_gradient", lambda right: lambda at, G, adjoint: right(
            at._replace(h_prev=0 * at.h_prev), G, adjoint), "voltage",
    ),
    "a custom form that passes no state on": (
        linear.Jacobians, "beside_W", without(k=None), "custom",
    ),
    "a custom form without the slope of its output": (
        linear.Jacobians, "before_W", without(q=None), "custom",
    ),
    "parameters of f that do not move": (
        derivative, "linearised", linearised_as(lambda at: at._replace(by_f=zeros(at.by_f))),
        "tangent, custom",
    ),
    "parameters of g that do not move": (
        derivative, "linearised", linearised_as(lambda at: at._replace(by_g=zeros(at.by_g))),
        "custom",
    ),
    "parameters of g that a cut stops": (
        derivative, "linearised", linearised_as(cut_too), "truncate, custom",
    ),
    "a cut of a custom form that first orders alone see": (
        lax, "stop_gradient", lambda right: lambda x: x, "curvature, truncate, custom",
    ),
    "parameters that the readout does not see": (
        loss, "output_derivatives", lambda right: lambda *args: (
            right(*args)[0], zeros(right(*args)[1])), "loss_and_grads, custom",
    ),
    "a readout without the slope of the output": (
        loss, "output_derivatives", lambda right: lambda *args: (None, right(*args)[1]),
        "loss_and_grads, custom",
    ),
    "invalid steps that have a Jacobian": (
        linear, "_backward", without(mask=None), "mask",
    ),
    "states of padding that are not frozen": (
        masking, "frozen_states", lambda right: lambda hs, *args: hs, "bptt",
    ),
    "a cut one step late": (
        masking, "cut_steps", lambda right: lambda *args: jnp.roll(right(*args), 1, 0),
        "truncate",
    ),
    "a cut that first orders alone see": (
        lax, "stop_gradient", lambda right: lambda x: x, "curvature, truncate",
    ),
    "a window one step too long": (
        window, "tangent_states", window_too_long, "window",
    ),
    "a window that second orders see otherwise": (
        window, "recomputed", lambda right: lambda options, *args: right(
            options._replace(window=options.window + 1), *args), "curvature, window",
    ),
    "wrong matvec": (
        lax, "custom_linear_solve", wrong_matvec, "curvature",
    ),
    "φ(a) that was kept of another a": (
        forms, "kept", lambda right: lambda cell, s, a, moved: right(cell, s, a, 1.001 * moved),
        "leak",
    ),
    "an a that was kept of another step": (
        forms, "kept", lambda right: lambda cell, s, a, moved: right(cell, s, 1.001 * a, moved),
        "custom",
    ),
    "an s that was kept of another step": (
        forms, "kept", lambda right: lambda cell, s, *more: right(cell, 1.001 * s, *more),
        "voltage",
    ),
    "relu that passes where it is off": (
        forms, "kept",
        lambda right: lambda *args: (k := right(*args))._replace(on=jnp.ones_like(k.on)),
        "relu with a leak",
    ),
    "a segment that starts from the first state": (
        derivative, "state_before", lambda right: lambda options, known, *_: known[2], "segments",
    ),
    "the source's sign": (
        loss, "output_error", lambda right: lambda *args: -right(*args), "loss_and_grads",
    ),
    "gradient of V from the state after": (
        arithmetic, "sum_outer", lambda right: lambda error, s, precision: right(
            error, jnp.roll(s, -1, 0), precision), "loss_and_grads",
    ),
}  # fmt: skip


def mutate(monkeypatch, where, name, make):
    """Put the wrong one in place of the right one, in every module that names it."""
    if isinstance(where, dict):
        monkeypatch.setitem(where, name, make(where[name]))
        return
    right = getattr(where, name)
    wrong = make(right)
    homes = [m for m in sys.modules.values() if m.__name__.startswith("jaxrnn.")]
    for home in [where, *homes]:
        for key, value in list(vars(home).items()):
            if value is right:
                monkeypatch.setattr(home, key, wrong)


@pytest.fixture
def no_caches():
    """What was compiled of a wrong formula is not used again, nor of the right one for it."""
    jax.clear_caches()
    yield
    jax.clear_caches()


# One of each formula and of each diagonal; behind `full` the others too.
DEFAULT = (
    "adjoint without its transpose", "tangent through a transpose", "slope off by a thousandth",
    "state before off by one", "slope of the wrong side", "leak forgotten in delta",
    "leak that does not pass the state on", "no cut", "invalid steps that have a Jacobian",
    "a window one step too long", "wrong matvec", "the source's sign",
    "a custom form that passes no state on", "parameters of g that do not move",
    "a segment that starts from the first state",
)  # fmt: skip


def by_default(names, default):
    return [name if name in default else pytest.param(name, marks=pytest.mark.full)
            for name in names]  # fmt: skip


@pytest.mark.parametrize("name", by_default(WITNESSES, {MUTANTS[name][-1] for name in DEFAULT}))
def test_the_right_formulas_agree_with_a_plain_loop(name):
    WITNESSES[name]()  # asserts


@pytest.mark.parametrize("name", by_default(MUTANTS, DEFAULT))
def test_a_wrong_formula_fails(monkeypatch, no_caches, name):
    *wrong, witness = MUTANTS[name]
    mutate(monkeypatch, *wrong)
    with pytest.raises(AssertionError, match="relative error"):
        WITNESSES[witness]()


def test_a_wrong_matvec_changes_no_first_order(monkeypatch, no_caches):
    *wrong, _ = MUTANTS["wrong matvec"]
    mutate(monkeypatch, *wrong)
    WITNESSES["gradient"]()  # asserts


# Mutants of the text: a copy of the package with one line changed, and the suite. --------------

SUITE = [
    f"tests/test_{name}.py"
    for name in (
        "gradients",
        "naive_scan",
        "vmap",
        "schedule",
        "reach",
        "layers",
        "implementation",
        "kernels",
        "train",
        "devices",
    )
]

# name -> (file, what is there, what the mutant says instead, the tests that see it)
TEXT_MUTANTS = {
    "adjoint off by a thousandth": (
        "_core/linear.py", "J_t.before_W(W_T_times(delta))",
        "1.001 * J_t.before_W(W_T_times(delta))",
        "match_a_naive_scan and tanh and 7",
    ),
    "adjoint without its transpose": (
        "_core/linear.py", "W_T_times = _repeated(J.W, ", "W_T_times = _repeated(J.W.T, ",
        "match_a_naive_scan and tanh and 7",
    ),
    "adjoint added after the product": (
        "_core/linear.py", "adjoint = from_later if g is None else g + from_later",
        "adjoint = from_later",
        "match_a_naive_scan and tanh and 7",
    ),
    "state before off by one": (
        "_base/masking.py", "jnp.concatenate([h0[None], hs[:-1]])", "hs",
        "match_a_naive_scan and tanh and 7",
    ),
    "slope off by a thousandth": (
        "_base/forms.py", "(1 - h) * (1 + h)", "1.001 * (1 - h) * (1 + h)",
        "match_a_naive_scan and tanh and 7",
    ),
    "leak that does not pass the state on": (
        "_core/linear.py", "(1 - like(self.leak, v)) * v", "0.999 * (1 - like(self.leak, v)) * v",
        "match_a_naive_scan and leak and 7",
    ),
    "tangent of W without its transpose": (
        "_core/derivative.py", "product(at.s_prev, dcell.W.T, ", "product(at.s_prev, dcell.W, ",
        "match_a_naive_scan and tanh and 7",
    ),
    "hand gradient of V from the state before": (
        "_core/loss.py", "sum_outer(error, s, ", "sum_outer(error, jnp.roll(s, 1, 0), ",
        "equations_of_section_3",
    ),
    "the source's sign": (
        "_core/loss.py", "y_hat - jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)",
        "jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype) - y_hat",
        "equations_of_section_3",
    ),
    "one Jacobian too few in the double sum": (
        "textbook.py", "jnp.concatenate([jacobians[1:], jnp.zeros_like(jacobians[:1])])",
        "jacobians", "double_sum",
    ),
    "gradient of a leak without the state before": (
        "_core/derivative.py", "by_alpha = moved - h_prev.astype(moved.dtype)",
        "by_alpha = moved",
        "match_a_naive_scan and leak and 7",
    ),
    "tangent of a leak twice": (
        "_core/derivative.py", "e += moved\n", "e += 2 * moved\n",
        "forward_mode and 2",
    ),
    "no cotangent of the last state": (
        "_core/derivative.py", "if g_last is None else g_last, sums",
        "if g_last is None else 0 * g_last, sums",
        "match_a_naive_scan and tanh and 7",
    ),
    "tangent of the first state at the last step, in second orders": (
        "_core/derivative.py", "e.at[options.first]", "e.at[options.last]",
        "derivatives_equal_those_of_a_naive_scan and tanh and over",
    ),
    "frozen steps that have a Jacobian": (
        "_core/linear.py", "select(J_t.mask, passed, adjoint)",
        "select(J_t.mask, passed, 0 * adjoint)",
        "derivatives_equal_those_of_a_naive_scan and lengths",
    ),
    "a fold that turns the members around": (
        "_jax/batch_axes.py", "return jnp.moveaxis(x, axis, to)",
        "return jnp.moveaxis(x, axis, to)[::-1]",
        "under_vmap and batch and first",
    ),
    "ids that miss their column": (
        "_base/arithmetic.py", "dU.T.at[xs.ids]", "dU.T.at[xs.ids - 1]",
        "ids_under_every_choice and 2",
    ),
    "wrong matvec, seen by second orders only": (
        "_core/linear.py", "lambda y: y - times(", "lambda y: y - 1.001 * times(",
        "derivatives_equal_those_of_a_naive_scan and tanh and over",
    ),
    "a segment that starts from the state after": (
        "_core/derivative.py", "if reverse else start - 1", "if reverse else start",
        "gradients_do_not_depend_on_the_schedule and plain and 2",
    ),
    "a segment that forgets what the later ones pass back": (
        "_core/derivative.py", "return (share.h0, sums)", "return (0 * share.h0, sums)",
        "gradients_do_not_depend_on_the_schedule and plain and 2",
    ),
    "a rest that is written over": (
        "_core/remat.py", "(carry, out), count * length",
        "(carry, out), (count - 1) * length",
        "gradients_do_not_depend_on_the_schedule and plain and 2",
    ),
    "inputs before the loop without the drive": (
        "_core/forward.py", "of_x(x, drive)", "of_x(x, None)",
        "gradients_do_not_depend_on_the_schedule and plain and before",
    ),
    "weights on the left, not transposed": (
        "_base/arithmetic.py", "left, accumulate = matrix.T,", "left, accumulate = matrix,",
        "gradients_do_not_depend_on_the_schedule and plain and left",
    ),
    "a cut one step late": (
        "_base/masking.py", "(number % every == 0)", "(number % every == 1 % every)",
        "of_the_definition and truncate and plain and not checkpoint",
    ),
    "a cut that first orders alone see": (
        "_core/derivative.py", "lax.stop_gradient(h_prev)", "h_prev",
        "of_the_definition and truncate and plain and not checkpoint",
    ),
    "a window one step too long": (
        "_core/window.py", "length=sweeps - 1", "length=sweeps",
        "of_the_definition and window and plain",
    ),
    "a window whose first state moves, seen by second orders only": (
        "_core/derivative.py", "lax.stop_gradient((hs, h0))", "(hs, h0)",
        "of_the_definition and window and plain",
    ),
    "a window of the double sum one step too long": (
        "textbook.py", "steps - k < options.window", "steps - k <= options.window",
        "truncates_and_windows and None",
    ),
    "a segment computed again that hands nothing back": (
        "_core/remat.py", "now: segment(carry, *now)",
        "now: segment(lax.stop_gradient(carry), *now)",
        "change_no_gradient and floats and 2",
    ),
    "a segment computed again with the lengths of the first": (
        "_core/derivative.py", "valid_steps(lengths, None, size, first)",
        "valid_steps(lengths, None, size, 0 * first)",
        "change_no_gradient and lengths and 2",
    ),
    "a segment of the loss computed again without its cuts": (
        "_core/loss.py", "None, mask, drive, cut, options=options)",
        "None, mask, drive, None, options=options)",
        "change_no_derivative_of_the_gradients and 3",
    ),
    "both directions alike": (
        "_core/layers.py", "(options, options.turned())", "(options, options)",
        "bidirectional_equals",
    ),
    "a residual that forgets the layers below": (
        "_core/layers.py", "y = out + y if residual and h_last else out", "y = out",
        "stack_is_one_layer and True",
    ),
    "products of Jacobians in the wrong order": (
        "_backends/associative.py", "jnp.matmul(B, A,", "jnp.matmul(A, B,",
        "by_associative_scan and 37",
    ),
    "an associative adjoint that reads the Jacobian of its own step": (
        "_backends/associative.py", "jnp.roll(matrices, 1 if J.options.reverse else -1, 0)",
        "matrices",
        "by_associative_scan and 37",
    ),
    "a kernel's adjoint without its transpose": (
        "_backends/kernels/run.py", "J.W.T, J.leak", "J.W, J.leak",
        "states_and_gradients_equal and TPU",
    ),
    "a kernel that goes through its cuts": (
        "_backends/kernels/loops.py", "jnp.where(flags.cut > 0, 0.0, delta)", "delta",
        "states_and_gradients_equal and TPU and sigmoid",
    ),
    "a kernel whose leak passes too little on": (
        "_backends/kernels/loops.py", "_where(flags.valid, _keep(leak, adjoint), adjoint)",
        "_where(flags.valid, 0.999 * _keep(leak, adjoint), adjoint)",
        "states_and_gradients_equal and TPU and identity",
    ),
    "members of a kernel that pair with each other's weights": (
        "_backends/kernels/run.py", "x = jnp.moveaxis(x, axis, place)",
        "x = jnp.moveaxis(x, axis, place) if place else jnp.moveaxis(x, axis, place)[::-1]",
        "launches_one_kernel and TPU",
    ),
    "an update by a sum instead of a mean": (
        "train.py", "g / jnp.asarray(size, g.dtype)", "g", "is_the_sources_update",
    ),
    "gradients of one's own loss added up over devices twice": (
        "train.py", "params = varying_like(params, inputs)", "pass",
        "custom_loss_is_split",
    ),
    "a window that forgets the one before": (
        "train.py", "targets, h0=h)", "targets)", "the_carried_state",
    ),
}  # fmt: skip


def verdict(copy, chosen):
    # What `-k` would not choose is not even imported.
    first = chosen.split()[0]
    files = [name for name in SUITE if first in (copy / name).read_text()]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist",
         "-o", "addopts=", *(files or SUITE), "-k", chosen],
        cwd=copy, capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    return run.returncode, run.stdout


@pytest.fixture
def copy(tmp_path):
    for folder in ("jaxrnn", "tests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.full
@pytest.mark.parametrize("mutant", TEXT_MUTANTS.values(), ids=TEXT_MUTANTS.keys())
def test_a_wrong_line_fails_the_suite(copy, mutant):
    file, line, wrong, chosen = mutant
    source = (copy / "jaxrnn" / file).read_text()
    assert source.count(line) == 1, f"{file} no longer holds {line!r} once"
    (copy / "jaxrnn" / file).write_text(source.replace(line, wrong))
    code, output = verdict(copy, chosen)
    assert code == 1 and "relative error" in output, output


@pytest.mark.full
def test_the_unchanged_copy_passes(copy):
    code, output = verdict(copy, "match_a_naive_scan and tanh and 7")
    assert code == 0 and "passed" in output, output


@pytest.mark.full
def test_a_wrong_line_of_the_matvec_changes_no_first_order(copy):
    file, line, wrong, _ = TEXT_MUTANTS["wrong matvec, seen by second orders only"]
    path = copy / "jaxrnn" / file
    path.write_text(path.read_text().replace(line, wrong))
    code, output = verdict(copy, "match_a_naive_scan and tanh and 7")
    assert code == 0, output
