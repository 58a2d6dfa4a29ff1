"""Custom forms: published equations as NumPy loops, and every option and transformation."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_forms as forms
from helpers import TOLERANCE, assert_close, random_case, weights
from jax import lax
from test_forms import GAPS, LENGTHS, B, D, H, K, T, compare, scalar, up_to
from test_matrix import pairs_of, pairwise

import jaxrnn
from jaxrnn import textbook, train

FIRST = TOLERANCE["float64"]

# Published equations --------------------------------------------------------------------------
#
# Each row is a code base that was read. `loop` is its equation as it stands there, one step after
# another in NumPy, and works for complex numbers too. `network` says which U, W, b, θ and drive
# make it an equation of this library, `equation` what f and g then are, with their derivatives as
# formulas, and `pull` leads gradients of U, W, b … back to what the code base learns.


class Network(NamedTuple):
    """What one cell is run with: h0 [B, H], xs [T, B, D], drive [T, B, H] or None."""

    U: Any
    W: Any
    b: Any
    theta: Any
    xs: Any
    h0: Any
    drive: Any = None


class Equation(NamedTuple):
    """Two functions of formulas.

    f: (a, h, θ) -> (f, ∂f/∂a, ∂f/∂h, ∂f/∂θ in the structure of θ)
    g: (h, θ) -> (g, ∂g/∂h, ∂g/∂θ likewise, or None where it is not in g)
    """

    f: Callable
    g: Callable


class Row(NamedTuple):
    learned: dict[str, np.ndarray]
    loop: Callable
    network: Callable
    equation: Equation
    form: Any
    pull: Callable = lambda p, d: {}
    others: Any = MappingProxyType({})  # other ways to write it: name -> p -> (states, outputs)
    valid: Any = np.ones((T, B), bool)
    counted: Any = np.ones((T, B))  # how much each output counts in the loss
    averages: Any = np.eye(T)  # the outputs that the loss reads, as averages over time


ROWS: dict[str, Row] = {}


def row(name):
    def add(build):
        ROWS[name] = build()
        return build

    return add


def drawn(*shape, seed, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def usual(**more):
    """Arrays that most rows learn."""
    W = 0.9 * np.linalg.qr(drawn(H, H, seed=2))[0]
    return {
        "U": drawn(H, D, seed=1, scale=D**-0.5), "W": W, "b": drawn(H, seed=3, scale=1 / 3),
        "xs": drawn(T, B, D, seed=4), "h0": drawn(B, H, seed=5, scale=1 / 2),
    } | {name: np.asarray(value) for name, value in more.items()}  # fmt: skip


NOISE = drawn(T, B, H, seed=6, scale=0.3)
PER_UNIT = np.array([0.1, 0.3, 0.7, 0.9])


def affine(p, s, x):
    return s @ p["W"].T + x @ p["U"].T + p["b"]


def tanh(z):
    y = np.tanh(z)
    return y, 1 - y * y


def identity(h, theta):
    return h, 1.0, None


def tanh_of_state(h, theta):
    return *tanh(h), None


def leaky(moved, slope, h, alpha, by_alpha=1.0, key="alpha"):
    """(1 − α) h + α moved, and its derivatives; by_alpha is dα/dθ."""
    new = (1 - alpha) * h + alpha * moved
    return new, alpha * slope, 1 - alpha, {key: by_alpha * (moved - h)}


def voltage(a, h, theta):
    return leaky(a, 1.0, h, theta["alpha"])


def rate(a, h, theta):
    return leaky(*tanh(a), h, theta["alpha"])


VOLTAGE = jaxrnn.Form(
    lambda a, h, p: (1 - p["alpha"]) * h + p["alpha"] * a, lambda h, _: jnp.tanh(h)
)
RATE = jaxrnn.Form(lambda a, h, p: (1 - p["alpha"]) * h + p["alpha"] * jnp.tanh(a))
ELMAN = jaxrnn.Form(lambda a, h, _: jnp.tanh(a))


def spread(x, like):
    return jnp.broadcast_to(x, like.shape)


def by_unroll(cell, xs, h0, **how):
    _, hs = jaxrnn.unroll(cell, xs, h0, **how)
    return hs, jaxrnn.outputs(cell, hs)


@row("keith-murray/ctrnn-jax")
def _():
    p = usual(alpha=0.2, noise=NOISE) | {"h0": np.ones((B, H))}

    def loop(p):
        v, alpha = p["h0"], p["alpha"]
        for x, noise in zip(p["xs"], p["noise"], strict=True):
            v = (1 - alpha) * v + alpha * affine(p, np.tanh(v), x) + noise
            yield v, np.tanh(v)

    def network(p, _):
        alpha = {"alpha": p["alpha"]}
        return Network(p["U"], p["W"], p["b"], alpha, p["xs"], p["h0"], p["noise"] / p["alpha"])

    def pull(p, d):
        through_drive = np.sum(d.drive * p["noise"]) / p["alpha"] ** 2
        return {"noise": d.drive / p["alpha"], "alpha": d.theta["alpha"] - through_drive}

    def built_in(p):
        cell = jaxrnn.Cell(p["U"], p["W"], p["b"], p["alpha"], form="voltage")
        return by_unroll(cell, p["xs"], p["h0"], drive=p["noise"] / p["alpha"])

    return Row(p, loop, network, Equation(voltage, tanh_of_state), VOLTAGE, pull,
               {"voltage": built_in})  # fmt: skip


@row("lindermanlab/nm-rnn")
def _():
    p = {k: v for k, v in usual(alpha=0.4).items() if k not in ("W", "b")}
    p |= {"left": drawn(H, 2, seed=7, scale=1.3), "right": drawn(H, 2, seed=8, scale=1.3)}

    def loop(p):
        v, alpha = p["h0"], p["alpha"]
        for x in p["xs"]:
            recurrent = np.tanh(v) @ p["right"] @ p["left"].T / H
            v = (1 - alpha) * v + alpha * (recurrent + x @ p["U"].T)
            yield v, np.tanh(v)

    def network(p, _):
        W = p["left"] @ p["right"].T / H
        return Network(p["U"], W, None, {"alpha": p["alpha"]}, p["xs"], p["h0"])

    def pull(p, d):
        return {"left": d.W @ p["right"] / H, "right": d.W.T @ p["left"] / H}

    def built_in(p):
        cell = jaxrnn.Cell(p["U"], network(p, None).W, None, p["alpha"], form="voltage")
        return by_unroll(cell, p["xs"], p["h0"])

    counted = (np.arange(T * B).reshape(T, B) % 3 > 0).astype(float)
    return Row(p, loop, network, Equation(voltage, tanh_of_state), VOLTAGE, pull,
               {"voltage": built_in}, counted=counted)  # fmt: skip


@row("bowen-w-zheng/Trainable_Low_Rank_RNN")
def _():
    p = {k: v for k, v in usual(g=0.8).items() if k != "W"}
    p |= {"M": drawn(H, 2, seed=7), "N": drawn(H, 2, seed=8)}
    C = drawn(H, H, seed=9, scale=H**-0.5)
    alpha = 0.25

    def loop(p):
        v = p["h0"]
        W = p["g"] * C + p["M"] @ p["N"].T / H
        for x in p["xs"]:
            v = v + alpha * (affine(p | {"W": W}, np.tanh(v), x) - v)
            yield v, np.tanh(v)

    def network(p, _):
        W = p["g"] * C + p["M"] @ p["N"].T / H
        return Network(p["U"], W, p["b"], None, p["xs"], p["h0"])

    def pull(p, d):
        return {"g": np.sum(d.W * C), "M": d.W @ p["N"] / H, "N": d.W.T @ p["M"] / H}

    def f(a, h, theta):
        return (1 - alpha) * h + alpha * a, alpha, 1 - alpha, None

    form = jaxrnn.Form(lambda a, h, _: (1 - alpha) * h + alpha * a, lambda h, _: jnp.tanh(h))
    last_of_each = np.kron(np.eye(2), np.full((1, 3), 1 / 3))  # the means of steps 2-4 and 5-7
    averages = np.concatenate([np.zeros((2, T - 6)), last_of_each], axis=1)
    return Row(p, loop, network, Equation(f, tanh_of_state), form, pull, averages=averages)


@row("synsense/rockpool rate_jax")
def _():
    p = usual(tau=1 / PER_UNIT, threshold=drawn(H, seed=7, scale=0.3))

    def loop(p):
        v = p["h0"]
        for x in p["xs"]:
            s = np.maximum(v - p["threshold"], 0)
            v = v + (affine(p, s, x) - v) / p["tau"]
            yield v, np.maximum(v - p["threshold"], 0)

    def network(p, _):
        theta = {name: p[name] for name in ("tau", "threshold")}
        return Network(p["U"], p["W"], p["b"], theta, p["xs"], p["h0"])

    def f(a, h, theta):
        tau = theta["tau"]
        *found, by = leaky(a, 1.0, h, 1 / tau, -1 / tau**2, "tau")
        return *found, by | {"threshold": np.zeros_like(h)}

    def g(h, theta):
        on = (h > theta["threshold"]).astype(float)
        s = on * (h - theta["threshold"])
        return s, on, {"tau": np.zeros_like(h), "threshold": -on}

    form = jaxrnn.Form(
        lambda a, h, p: h + (a - h) / p["tau"], lambda h, p: jax.nn.relu(h - p["threshold"])
    )

    def built_in(p):
        # The distance to the threshold, v − θ, is a voltage whose bias is less by θ.
        b, leak, threshold = p["b"] - p["threshold"], 1 / p["tau"], p["threshold"]
        cell = jaxrnn.Cell(p["U"], p["W"], b, leak, activation="relu", form="voltage")
        hs, outputs = by_unroll(cell, p["xs"], p["h0"] - spread(threshold, p["h0"]))
        return hs + spread(threshold, hs), outputs

    return Row(p, loop, network, Equation(f, g), form, others={"voltage": built_in})


@row("mlprt/feedbax")
def _():
    p = usual(alpha=0.6, noise=NOISE)

    def loop(p):
        h, alpha = p["h0"], p["alpha"]
        for x, noise in zip(p["xs"], p["noise"], strict=True):
            h = h + alpha * (np.tanh(affine(p, h, x) + noise) - h)
            yield h, h

    def network(p, _):
        theta = {"alpha": p["alpha"]}
        return Network(p["U"], p["W"], p["b"], theta, p["xs"], p["h0"], p["noise"])

    def built_in(p):
        cell = jaxrnn.Cell(p["U"], p["W"], p["b"], p["alpha"])
        return by_unroll(cell, p["xs"], p["h0"], drive=p["noise"])

    return Row(p, loop, network, Equation(rate, identity), RATE, lambda p, d: {"noise": d.drive},
               {"rate": built_in})  # fmt: skip


@row("smpuglie/Pugliese_cpg_2025")
def _():
    p = usual(
        alpha=PER_UNIT, largest=[2.0, 1.5, 3.0, 0.8], gain=[1.0, 0.7, 1.3, 2.0],
        threshold=[-0.5, 0.1, -1.0, 0.0],
    )  # fmt: skip
    names = "alpha", "largest", "gain", "threshold"

    def loop(p):
        h = p["h0"]
        for x in p["xs"]:
            current = p["gain"] * (affine(p, h, x) - p["threshold"])
            rates = np.maximum(p["largest"] * np.tanh(current / p["largest"]), 0)
            h = h + p["alpha"] * (rates - h)
            yield h, h

    def network(p, _):
        return Network(p["U"], p["W"], p["b"], {n: p[n] for n in names}, p["xs"], p["h0"])

    def f(a, h, theta):
        alpha, largest, gain, threshold = (theta[n] for n in names)
        z = gain * (a - threshold) / largest
        t, slope = tanh(z)
        on = (t > 0).astype(float)
        *found, by = leaky(on * largest * t, on * gain * slope, h, alpha)
        by |= {"largest": alpha * on * (t - z * slope), "threshold": -alpha * on * gain * slope}
        return *found, by | {"gain": alpha * on * (a - threshold) * slope}

    def update(a, h, p):
        rates = p["largest"] * jnp.tanh(p["gain"] * (a - p["threshold"]) / p["largest"])
        return h + p["alpha"] * (jax.nn.relu(rates) - h)

    return Row(p, loop, network, Equation(f, identity), jaxrnn.Form(update))


@row("OpenReservoirComputing")
def _():
    p = usual(alpha=0.6)

    def loop(p):
        r, alpha = p["h0"], p["alpha"]
        for taught in p["xs"]:
            r = (1 - alpha) * r + alpha * np.tanh(affine(p, r, taught))
            yield r, r

    def network(p, _):
        return Network(p["U"], p["W"], p["b"], {"alpha": p["alpha"]}, p["xs"], p["h0"])

    def by_drive(form, p):
        alpha = {"leak": p["alpha"]} if form == "rate" else {"parameters": {"alpha": p["alpha"]}}
        cell = jaxrnn.Cell(jnp.zeros((H, 0)), p["W"], p["b"], form=form, **alpha)
        nothing = jnp.zeros((T, B, 0))
        return by_unroll(cell, nothing, p["h0"], drive=p["xs"] @ p["U"].T)

    others = {"Form with the series as drive": partial(by_drive, RATE),
              "rate with the series as drive": partial(by_drive, "rate")}  # fmt: skip
    return Row(p, loop, network, Equation(rate, identity), RATE, others=others)


def of_a_alone(a, h, theta):
    return *tanh(a), 0.0, None


def sequences_of_one_first_state(p, xp):
    h0 = xp.broadcast_to(p["h0"], (B, H))
    return Network(p["U"], p["W"], p["b"], None, p["xs"], h0)


def sum_of_first_states(p, d):
    return {"h0": d.h0.sum(0)}


@row("google/learned_optimization tasks/rnn")
def _():
    valid = np.asarray(up_to(LENGTHS))
    p = usual() | {"h0": drawn(H, seed=5)}

    def loop(p):
        h = np.broadcast_to(p["h0"], (B, H))
        for x, there in zip(p["xs"], valid[..., None], strict=True):
            h = np.where(there, np.tanh(affine(p, h, x)), h)
            yield np.where(there, h, 0), np.where(there, h, 0)

    def built_in(p):
        cell = jaxrnn.Cell(p["U"], p["W"], p["b"])
        return by_unroll(cell, p["xs"], spread(p["h0"], jnp.ones((B, H))), lengths=LENGTHS)

    return Row(p, loop, sequences_of_one_first_state, Equation(of_a_alone, identity), ELMAN,
               sum_of_first_states, {"Elman": built_in}, valid)  # fmt: skip


@row("BrainPy Song_2016_EI_RNN")
def _():
    p = usual(alpha=0.4, noise=NOISE)
    signs = np.array([1.0, 1.0, 1.0, -1.0])  # three excitatory units, one that inhibits

    def loop(p):
        h, alpha = p["h0"], p["alpha"]
        W = p["W"] * np.sign(p["W"].real) * signs
        for x, noise in zip(p["xs"], p["noise"], strict=True):
            h = np.maximum((1 - alpha) * h + alpha * affine(p | {"W": W}, h, x) + noise, 0)
            yield h, h

    def dale(p, xp):
        return xp.abs(p["W"]) * xp.broadcast_to(signs, (H, H))

    def network(p, xp):
        drive, theta = p["noise"] / p["alpha"], {"alpha": p["alpha"]}
        return Network(p["U"], dale(p, xp), p["b"], theta, p["xs"], p["h0"], drive)

    def pull(p, d):
        through_drive = np.sum(d.drive * p["noise"]) / p["alpha"] ** 2
        return {
            "W": d.W * signs * np.sign(p["W"]), "noise": d.drive / p["alpha"],
            "alpha": d.theta["alpha"] - through_drive,
        }  # fmt: skip

    def f(a, h, theta):
        z, by_a, by_h, by = leaky(a, 1.0, h, theta["alpha"])
        on = (z > 0).astype(float)
        return on * z, on * by_a, on * by_h, {"alpha": on * by["alpha"]}

    form = jaxrnn.Form(lambda a, h, p: jax.nn.relu((1 - p["alpha"]) * h + p["alpha"] * a))

    def built_in(p):
        alpha = p["alpha"]
        W = (1 - alpha) * jnp.eye(H) + alpha * dale(p, jnp)
        cell = jaxrnn.Cell(alpha * p["U"], W, alpha * p["b"], activation="relu")
        return by_unroll(cell, p["xs"], p["h0"], drive=p["noise"])

    return Row(p, loop, network, Equation(f, identity), form, pull, {"Elman": built_in})


@row("computation-thru-dynamics")
def _():
    p = usual() | {"h0": drawn(H, seed=5)}

    def loop(p):
        h = np.broadcast_to(p["h0"], (B, H))
        for x in p["xs"]:
            h = np.tanh(affine(p, h, x))
            yield h, h

    def of_each_trial(form, p):
        cell = jaxrnn.Cell(p["U"], p["W"], p["b"], form=form)
        hs = jax.vmap(lambda xs: jaxrnn.unroll(cell, xs, p["h0"])[1], 1, 1)(p["xs"])
        return hs, hs

    others = {"Form, vmapped trials": partial(of_each_trial, ELMAN),
              "Elman, vmapped trials": partial(of_each_trial, "rate")}  # fmt: skip
    return Row(p, loop, sequences_of_one_first_state, Equation(of_a_alone, identity), ELMAN,
               sum_of_first_states, others)  # fmt: skip


@row("FranzKnut/jax_rtrl ctrnn")
def _():
    p = usual(tau=1 / PER_UNIT)

    def loop(p):
        h = p["h0"]
        for x in p["xs"]:
            h = h + (np.tanh(affine(p, h, x)) - h) / p["tau"]
            yield h, h

    def network(p, _):
        return Network(p["U"], p["W"], p["b"], {"tau": p["tau"]}, p["xs"], p["h0"])

    def f(a, h, theta):
        return leaky(*tanh(a), h, 1 / theta["tau"], -1 / theta["tau"] ** 2, "tau")

    def built_in(p):
        cell = jaxrnn.Cell(p["U"], p["W"], p["b"], 1 / p["tau"])
        return by_unroll(cell, p["xs"], p["h0"])

    form = jaxrnn.Form(lambda a, h, p: h + (jnp.tanh(a) - h) / p["tau"])
    return Row(p, loop, network, Equation(f, identity), form, others={"rate": built_in})


@row("rnn-jax antisymmetric")
def _():
    p = usual(epsilon=0.3, gamma=0.2)

    def loop(p):
        h = p["h0"]
        W = p["W"] - p["W"].T - p["gamma"] * np.eye(H)
        for x in p["xs"]:
            h = h + p["epsilon"] * np.tanh(affine(p | {"W": W}, h, x))
            yield h, h

    def network(p, xp):
        W = p["W"] - p["W"].T - p["gamma"] * xp.eye(H)
        return Network(p["U"], W, p["b"], (p["epsilon"],), p["xs"], p["h0"])

    def pull(p, d):
        return {"W": d.W - d.W.T, "gamma": -np.trace(d.W), "epsilon": d.theta[0]}

    def f(a, h, theta):
        y, slope = tanh(a)
        return h + theta[0] * y, theta[0] * slope, 1.0, (y,)

    form = jaxrnn.Form(lambda a, h, p: h + p[0] * jnp.tanh(a))
    return Row(p, loop, network, Equation(f, identity), form, pull)


MODRELU = jaxrnn.Form(lambda a, h, bias: jnp.sign(a) * jax.nn.relu(jnp.abs(a) + bias))


@row("modReLU")
def _():
    p = {k: v for k, v in usual(bias=[-0.1, 0.2, -0.3, 0.05]).items() if k != "b"}

    def loop(p):
        h = p["h0"]
        for x in p["xs"]:
            a = affine(p | {"b": 0}, h, x)
            sign = np.sign(a.real)
            h = sign * np.maximum(sign * a + p["bias"], 0)
            yield h, h

    def network(p, _):
        return Network(p["U"], p["W"], None, p["bias"], p["xs"], p["h0"])

    def pull(p, d):
        return {"bias": d.theta}

    def f(a, h, bias):
        on, sign = (np.abs(a) + bias > 0).astype(float), np.sign(a)
        return on * (a + sign * bias), on, 0.0, on * sign

    return Row(p, loop, network, Equation(f, identity), MODRELU, pull)


def by_numpy(row, network, dhs_of, dh_last):
    """Forward, then backward in time: (hs, outputs), and gradients as a Network, δ and λ.

    dhs_of: (hs, outputs) -> (dL/dh_t at fixed later states, dL/ds_t): arrays `[T, B, H]`.
    """
    U, W, b, theta, xs, h0, drive = network
    there = row.valid[..., None]
    drive = np.zeros((T, B, H)) if drive is None else drive
    h, seen = h0, []
    for t in range(T):
        s, q, by_g = row.equation.g(h, theta)
        a = s @ W.T + xs[t] @ U.T + (0 if b is None else b) + drive[t]
        new, p, k, by_f = row.equation.f(a, h, theta)
        seen.append((s, q, by_g, p, k, by_f))
        h = np.where(there[t], new, h)
        seen[-1] += (h,)
    hs = np.where(there, np.stack([now[-1] for now in seen]), 0)
    s, q, by_g = row.equation.g(hs, theta)
    outputs = np.where(there, s, 0)
    dhs, ds = dhs_of(hs, outputs)
    g = np.where(there, dhs + ds * q, 0)

    def add(total, per_step):
        return total + (per_step.sum(0) if np.ndim(total) else per_step.sum())

    sums = [np.zeros_like(U), np.zeros_like(W), None if b is None else np.zeros_like(b)]
    dtheta = jax.tree.map(np.zeros_like, theta)
    if by_g is not None:  # the readout's share
        for t in range(T):
            dtheta = jax.tree.map(lambda d, m, t=t: add(d, ds[t] * m[t]), dtheta, by_g)
    dxs, delta, adjoint = np.zeros_like(xs), np.zeros_like(drive), np.zeros_like(drive)
    later = dh_last
    for t in reversed(range(T)):
        s, q, by_g, p, k, by_f, _ = seen[t]
        adjoint[t] = np.where(there[t], later + g[t], 0)
        delta[t] = p * adjoint[t]
        through_W = delta[t] @ W
        sums[0] += delta[t].T @ xs[t]
        sums[1] += delta[t].T @ s
        sums[2] = None if b is None else sums[2] + delta[t].sum(0)
        dxs[t] = delta[t] @ U
        dtheta = jax.tree.map(lambda d, m, t=t: add(d, m * adjoint[t]), dtheta, by_f)
        if by_g is not None:
            dtheta = jax.tree.map(lambda d, m, r=through_W: add(d, r * m), dtheta, by_g)
        later = np.where(there[t], k * adjoint[t] + q * through_W, later)
    return (hs, outputs), Network(*sums, dtheta, dxs, later, delta), adjoint


# A loss as the code bases have it: a linear readout of outputs, squared errors, L2 on rates.
V, TARGETS, L2 = drawn(K, H, seed=10), drawn(T, B, K, seed=11), 0.1


def loss_of(row, outputs):
    """Of NumPy's arrays or JAX's."""
    outputs = row.counted[..., None] * outputs
    read = (row.averages @ outputs.reshape(T, B * H)).reshape(-1, B, H)
    errors = read @ V.T - TARGETS[: len(row.averages)]
    return (errors * errors).sum() + L2 * (outputs * outputs).sum()


def loss_by_outputs(row, hs, outputs):
    counted = row.counted[..., None]
    outputs = counted * outputs
    read = np.einsum("ut,tbh->ubh", row.averages, outputs)
    errors = read @ V.T - TARGETS[: len(row.averages)]
    d = np.einsum("ut,ubh->tbh", row.averages, 2 * errors @ V) + 2 * L2 * outputs
    return np.zeros_like(hs), counted * d


def by_the_loop(row, p):
    hs, outputs = zip(*row.loop(p), strict=True)
    return np.stack(hs), np.stack(outputs)


def gradient_by_hand(row):
    """Of the loss by all that the row learns."""
    network = row.network(row.learned, np)
    seen, d, _ = by_numpy(row, network, partial(loss_by_outputs, row), np.zeros((B, H)))
    found = {"U": d.U, "W": d.W, "b": d.b, "xs": d.xs, "h0": d.h0}
    found |= d.theta if isinstance(d.theta, dict) else {}
    found |= row.pull(row.learned, d)
    return seen, {name: found[name] for name in row.learned}


def by_complex_steps(loss, p):
    """The gradient of a loss of real arrays, Im L(p + iε e) / ε for each entry: exact, ε² = 0."""
    tiny, found = 1e-100, {name: np.zeros(np.shape(value)) for name, value in p.items()}
    for name, value in p.items():
        for index in np.ndindex(np.shape(value)):
            moved = np.array(value, complex)
            moved[index] += 1j * tiny
            found[name][index] = np.imag(loss(p | {name: moved})) / tiny
    return found


@pytest.mark.parametrize("name", ROWS)
def test_formulas_of_gradients_match_the_published_loop(name):
    row = ROWS[name]
    seen, gradient = gradient_by_hand(row)
    assert_close(seen, by_the_loop(row, row.learned))
    assert_close(
        gradient, by_complex_steps(lambda p: loss_of(row, by_the_loop(row, p)[1]), row.learned)
    )


def with_nan_padding(row, network):
    there = row.valid[..., None]
    if row.valid.all():
        return network, {}
    return network._replace(xs=jnp.where(there, network.xs, jnp.nan)), {"mask": row.valid}


def cell_of(row, network):
    U, W, b, theta, *_ = network
    return jaxrnn.Cell(U, W, b, form=row.form, parameters=theta)


def by_form(row, p):
    network, how = with_nan_padding(row, row.network(p, jnp))
    cell = cell_of(row, network)
    hs, outputs = by_unroll(cell, network.xs, network.h0, drive=network.drive, **how)
    return hs, jnp.where(row.valid[..., None], outputs, 0)


SPELLINGS = [(name, other) for name, row in ROWS.items() for other in ("Form", *row.others)]


@pytest.mark.parametrize(("name", "spelling"), SPELLINGS, ids=map(", ".join, SPELLINGS))
def test_the_equation_of(name, spelling):
    row = ROWS[name]
    run = partial(by_form, row) if spelling == "Form" else row.others[spelling]

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def found(p):
        seen = run(p)
        return loss_of(row, seen[1]), seen

    gradient, seen = found(jax.tree.map(jnp.asarray, row.learned))
    expected_states, expected = gradient_by_hand(row)
    assert_close(seen, expected_states)
    assert_close(gradient, expected)


@pytest.mark.parametrize("name", ROWS)
def test_bptt_of_the_equation_of(name):
    row = ROWS[name]
    network = row.network(row.learned, np)
    dhs, dh_last = np.asarray(weights((T, B, H), 1)), np.asarray(weights((B, H), 2))
    seen, d, adjoint = by_numpy(row, network, lambda hs, _: (dhs, 0 * hs), dh_last)
    network, how = with_nan_padding(row, jax.tree.map(jnp.asarray, network))
    cell = cell_of(row, network)
    found = jaxrnn.bptt(
        cell, network.xs, network.h0, jnp.asarray(seen[0]), jnp.asarray(dhs),
        dh_last=jnp.asarray(dh_last), drive=network.drive, **how,
    )  # fmt: skip
    expected = jaxrnn.CellGradients(cell_of(row, d), d.xs, d.h0, d.drive, adjoint)
    assert_close(found, expected)


@pytest.mark.parametrize("form", [ELMAN, "rate"], ids=["Form", "Elman"])
def test_the_equation_of_jslds(form):
    # The step's own linearisation around points e, of inputs around c, is run in its place.
    p = usual(e=drawn(B, H, seed=7, scale=0.5), c=drawn(B, D, seed=8))

    def by_loop(p):
        h, hs = p["h0"], []
        at = np.tanh(affine(p, p["e"], p["c"]))
        for x in p["xs"]:
            moved = (h - p["e"]) @ p["W"].T + (x - p["c"]) @ p["U"].T
            h = at + (1 - at * at) * moved
            hs.append(h)
        return np.stack(hs)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def found(p):
        cell = jaxrnn.Cell(p["U"], p["W"], p["b"], form=form)

        def body(h, x):
            moved = x - p["c"], h - p["e"]
            of_cell = partial(jaxrnn.step, cell)
            at, away = jax.jvp(of_cell, (p["c"], p["e"]), moved)
            return at + away, at + away

        hs = lax.scan(body, p["h0"], p["xs"])[1]
        return (hs**2).sum(), hs

    gradient, hs = found(jax.tree.map(jnp.asarray, p))
    assert_close(hs, by_loop(p))
    assert_close(gradient, by_complex_steps(lambda p: (by_loop(p) ** 2).sum(), p))


@pytest.mark.parametrize("form", [RATE, "rate"], ids=["Form", "rate"])
def test_the_closed_loop_of_a_reservoir(form):
    # What is read from the states is the next input.
    p = usual(alpha=0.6, read=drawn(D, H, seed=7, scale=0.3))
    p = {k: v for k, v in p.items() if k != "xs"}

    def by_loop(p):
        r, rs, alpha = p["h0"], [], p["alpha"]
        for _ in range(T):
            r = (1 - alpha) * r + alpha * np.tanh(affine(p, r, r @ p["read"].T))
            rs.append(r)
        return np.stack(rs)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def found(p):
        alpha = {"leak": p["alpha"]} if form == "rate" else {"parameters": {"alpha": p["alpha"]}}
        cell = jaxrnn.Cell(p["U"], p["W"], p["b"], form=form, **alpha)

        def body(r, _):
            r = jaxrnn.step(cell, r @ p["read"].T, r)
            return r, r

        rs = lax.scan(body, p["h0"], length=T)[1]
        return (rs**2).sum(), rs

    gradient, rs = found(jax.tree.map(jnp.asarray, p))
    assert_close(rs, by_loop(p))
    assert_close(gradient, by_complex_steps(lambda p: (by_loop(p) ** 2).sum(), p))


# Any form, as a plain scan --------------------------------------------------------------------


def rich_update(a, h, p):
    return (1 - p["alpha"]) * h + p["alpha"] * jnp.tanh(p["gain"] * a) + 0.1 * jnp.sin(h)


def rich_output(h, p):
    return jax.nn.sigmoid(h - p["threshold"])


def nested_update(a, h, p):
    (gain, rest), bias = p["f"], p["bias"]
    return rest["keep"] * jnp.cos(h) + gain * jnp.arctan(a + bias)


# name -> (a form, its parameters, in which θ is in f alone, in g alone, in both, or in neither).
KINDS = {
    "rich": (
        jaxrnn.Form(rich_update, rich_output),
        {"alpha": 0.3, "gain": [0.7, 1.1, 0.9, 1.2], "threshold": [-0.2, 0.1, 0.4, 0.0]},
    ),
    "no output": (MODRELU, [-0.1, 0.2, -0.3, 0.05]),
    "no parameters": (
        jaxrnn.Form(lambda a, h, _: 0.5 * h + 0.5 * jnp.sin(a), lambda h, _: h - h**3 / 9),
        None,
    ),
    "nested": (
        jaxrnn.Form(nested_update, lambda h, p: p["f"][1]["keep"] * h + p["shift"][0] * h**2),
        {"f": (0.6, {"keep": [0.1, 0.2, 0.3, 0.4]}), "bias": [0.1, -0.2, 0.3, 0.0],
         "shift": (0.2,)},
    ),
}  # fmt: skip


def is_number_or_list(x):
    return isinstance(x, float | list)


def parameters_of(kind, dtype=jnp.float64):
    convert = partial(jnp.asarray, dtype=dtype)
    return jax.tree.map(convert, KINDS[kind][1], is_leaf=is_number_or_list)


def network(kind="rich", bias="bias", dtype=jnp.float64, **sizes):
    """Params, xs, h0, targets."""
    params, *rest = forms.network(bias=bias, dtype=dtype, **sizes)
    how = {"form": KINDS[kind][0], "parameters": parameters_of(kind, dtype)}
    return dataclasses.replace(params, cell=dataclasses.replace(params.cell, **how)), *rest


def for_units(cell, like):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, like.shape), cell.parameters)


def f(cell, a, h):
    if isinstance(cell.form, jaxrnn.Form):
        return cell.form.update(a, h, for_units(cell, a))
    new = forms.phi_of(cell)(a) if cell.form == "rate" else a
    if cell.leak is None:
        return new
    leak = spread(cell.leak, new)
    return (1 - leak) * h + leak * new


def g(cell, h):
    if not isinstance(cell.form, jaxrnn.Form):
        return forms.g(cell, h)
    return h if cell.form.output is None else cell.form.output(h, for_units(cell, h))


def naive(
    cell, xs, h0, *, drive=None, valid=None, reverse=False, truncate=None, window=None, push=None
):
    """A plain scan for JAX to differentiate; `push` is added to each new state.

    With a window it carries a state for each number of steps since the one that does not move:
    the parameters of g move in all of them, and so they do before a cut.
    """
    if isinstance(xs, jaxrnn.Ids):
        xs = jax.nn.one_hot(xs.ids, cell.U.shape[1], dtype=cell.U.dtype)
    steps = xs.shape[:-1]
    nothing = jnp.zeros((*steps, cell.W.shape[0]), cell.W.dtype)
    b = nothing[0] if cell.b is None else spread(cell.b, nothing[0])
    drive, push = (nothing if x is None else x for x in (drive, push))
    valid = jnp.ones(steps, bool) if valid is None else jnp.asarray(valid)
    number = forms.numbered(valid, reverse)
    cut = jnp.zeros(steps, bool) if truncate is None else (number > 0) & (number % truncate == 0)

    def step(h, x, drive, push, cut):
        s = g(cell, jnp.where(cut, lax.stop_gradient(h), h))
        return f(cell, s @ cell.W.T + x @ cell.U.T + b + drive, h) + push

    def body(states, now):
        x, drive, push, valid, cut = now
        valid, cut = valid[..., None], cut[..., None]
        before = states if window is None else (lax.stop_gradient(states[-1]), *states[:-1])
        new = [step(h, x, drive, push, cut) for h in before]
        states = tuple(jnp.where(valid, n, h) for n, h in zip(new, states, strict=True))
        return states, jnp.where(valid, states[-1], 0)

    now = xs, drive, push, valid, cut
    states, hs = lax.scan(body, (h0,) * (window or 1), now, reverse=reverse)
    return states[-1], hs


def naive_outputs(cells, xs, h0, valid, reverse=False, **how):
    """(h_last in the structure of the cells, outputs of the last layer), 0 on invalid steps."""
    if isinstance(cells, jaxrnn.Cell):
        h_last, hs = naive(cells, xs, h0, valid=valid, reverse=reverse, **how)
        return h_last, jnp.where(jnp.asarray(valid)[..., None], g(cells, hs), 0)
    last, y = [], xs
    for layer, h in zip(cells, h0, strict=True):
        h, y = (naive_both if isinstance(layer, tuple) else naive_outputs)(
            layer, y, h, valid, **how
        )  # fmt: skip
        last.append(h)
    return tuple(last), y


def naive_both(pair, xs, h0, valid, **how):
    found = [naive_outputs(*each, valid, reverse, **how)
             for *each, reverse in zip(pair, (xs, xs), h0, (False, True), strict=True)]  # fmt: skip
    last, ys = zip(*found, strict=True)
    return last, jnp.concatenate(ys, -1)


# Kind × option × transformation ---------------------------------------------------------------


def first_order(run, arrays, tangents, known):
    gradient = jax.value_and_grad(forms.loss_of(run, known))(arrays)
    return gradient, forms.pushed(run, arrays, tangents, known)


def mapped_over_both(run, arrays, tangents, known):
    several = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x, 0.5 * x]), arrays["cell"])

    def one(cell):
        return forms.mapped_over_data(run, arrays | {"cell": cell}, tangents, known)

    return jax.vmap(one)(several)


def reverse_over_reverse(run, arrays, tangents, known):
    loss = forms.loss_of(run, known)
    return jax.grad(lambda arrays: forms.inner(jax.grad(loss)(arrays), tangents))(arrays)


# name -> (what is compared, the order of the derivatives).
TRANSFORMATIONS = {
    "value, grad and jvp": (first_order, 1),
    "vmap of grad over cells and data": (mapped_over_both, 1),
    "forward over reverse": (forms.forward_over_reverse, 2),
    "reverse over reverse": (reverse_over_reverse, 2),
}
# To keep them few: the last transformation, a kind and "sqrt" are met elsewhere in this file.
FACTORS = {
    "transformation": list(TRANSFORMATIONS)[:3],
    "option": ["", "truncate=3", "window=3", "checkpoint_every=3"],
    "kind": ["rich", "no output", "nested"],
    "invalid": ["", "mask", "lengths"],
    "inputs": ["floats", "ids", "no inputs"],
    "reverse": ["", "reverse"],
    "drive": ["", "drive"],
    "bias": ["bias", "no bias"],
    "implementation": ["", "associative"],
}
PAIRS = list(pairwise(FACTORS))


def data_of(kind, bias, inputs, drive, invalid, **_):
    """What is differentiated, by name; and what is not."""
    params, xs, h0, _ = network(kind, bias)
    arrays, known = {"cell": params.cell, "h0": h0, "xs": xs}, {}
    if inputs == "ids":
        del arrays["xs"]
        known["ids"] = jaxrnn.Ids(jnp.asarray(np.random.default_rng(4).integers(D, size=(T, B))))
    elif inputs == "no inputs":
        arrays["cell"] = dataclasses.replace(params.cell, U=params.cell.U[:, :0])
        arrays["xs"] = xs[..., :0]
    if drive:
        arrays["drive"] = 0.3 * weights((T, B, H), 3)
    if invalid:
        known[invalid] = jnp.asarray({"lengths": LENGTHS, "mask": GAPS}[invalid])
    return arrays, known


def by_naive_scan(option, reverse, **_):
    how = {k: v for k, v in forms.option_of(option).items() if k != "checkpoint_every"}

    def run(arrays, known):
        known = {k: up_to(v) if k == "lengths" else v for k, v in known.items()}
        known = {"valid" if k in ("lengths", "mask") else k: v for k, v in known.items()}
        return forms.run_by(naive, arrays, known, reverse=bool(reverse), **how)

    return run


def check(transformation, invalid, **how):
    arrays, known = data_of(invalid=invalid, **how)
    tangents = jax.tree.map(lambda x: weights(x.shape, x.size), arrays)
    transform, order = TRANSFORMATIONS[transformation]

    def find(run, padding):
        # What invalid steps hold reaches nothing, and the naive scan never meets it.
        padded = forms.with_padding(arrays, invalid, padding)
        return jax.jit(partial(transform, run))(padded, tangents, known)

    # Every order multiplies the number of summed terms by about T.
    found, expected = find(forms.ours(**how), jnp.nan), find(by_naive_scan(**how), 0.0)
    assert_close(found, expected, FIRST * T ** (order - 1))


@pytest.mark.parametrize("how", PAIRS, ids=forms.words)
def test_equals_a_naive_scan(how):
    check(**how)


def test_reverse_over_reverse_equals_that_of_a_naive_scan():
    plain = {name: values[0] for name, values in FACTORS.items()}
    how = {"option": "truncate=3", "invalid": "mask", "transformation": "reverse over reverse"}
    check(**plain | how)


def test_every_pair_is_among_the_cases():
    met = set().union(*(pairs_of(how.values()) for how in PAIRS))
    sizes = [len(values) for values in FACTORS.values()]
    assert len(met) == sum(a * b for a, b in itertools.combinations(sizes, 2))


@pytest.mark.full
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("invalid", FACTORS["invalid"])
@pytest.mark.parametrize("option", [*FACTORS["option"], "checkpoint_every=sqrt"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_product_equals_a_naive_scan(kind, option, invalid, transformation):
    plain = {name: values[0] for name, values in FACTORS.items()}
    how = {"kind": kind, "option": option, "invalid": invalid, "transformation": transformation}
    check(**plain | how)


def test_the_hessian_by_parameters_alone_within_a_window():
    params, xs, h0, _ = network()

    def hessian(unroll, parameters):
        def loss(parameters):
            return scalar(unroll(dataclasses.replace(params.cell, parameters=parameters), xs, h0))

        return jax.jacfwd(jax.grad(loss))(parameters)

    def by(unroll):
        how = partial(hessian, partial(unroll, window=2))
        return jax.jit(how)(params.cell.parameters)

    assert_close(by(jaxrnn.unroll), by(naive), FIRST * T)


def test_vmap_over_parameters_of_one_form_beside_shared_weights():
    params, xs, h0, _ = network("nested")
    several = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, -x]), params.cell.parameters)

    def gradients(unroll, several):
        def loss(cell, theta):
            return scalar(unroll(dataclasses.replace(cell, parameters=theta), xs, h0))

        return jax.vmap(jax.grad(loss, (0, 1)), (None, 0))(params.cell, several)

    found, expected = (jax.jit(partial(gradients, u))(several) for u in (jaxrnn.unroll, naive))
    assert_close(found, expected)


# bptt -----------------------------------------------------------------------------------------

BY_HAND = {
    "mask and drive": {"mask": GAPS, "drive": 0.3 * np.asarray(weights((T, B, H), 3))},
    "lengths in reverse": {"lengths": LENGTHS, "reverse": True},
    "mask and truncate": {"mask": GAPS, "truncate": 3},
    "mask and window": {"mask": GAPS, "window": 3},
}


def valid_of(how):
    """Valid steps, and the options that the naive scan knows."""
    valid = np.ones((T, B), bool)
    valid = np.asarray(up_to(how["lengths"])) if "lengths" in how else how.get("mask", valid)
    names = "reverse", "truncate", "window"
    return valid, {name: how[name] for name in names if name in how}


@pytest.mark.parametrize("how", BY_HAND.values(), ids=BY_HAND)
def test_bptt_returns_the_gradients_of_everything(how):
    params, xs, h0, _ = network()
    valid, options = valid_of(how)
    there = jnp.asarray(valid)[..., None]

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2, 3, 4), has_aux=True)
    def expected(cell, xs, h0, drive, push):
        states = naive(cell, xs, h0, drive=drive, push=push, valid=valid, **options)
        return scalar(states), states

    nothing = jnp.zeros((T, B, H))
    drive = jnp.asarray(how.get("drive", nothing))
    (_, (h_last, hs)), wanted = expected(params.cell, xs, h0, drive, nothing)
    dhs = jnp.where(there, 3 * jnp.cos(3 * hs), jnp.nan)
    xs = jnp.where(there, xs, jnp.nan)
    found = jaxrnn.bptt(params.cell, xs, h0, hs, dhs, dh_last=jnp.exp(h_last), **how)
    assert_close((found.cell, found.xs, found.h0, found.delta, found.adjoint), wanted)
    for on_padding in (found.xs, found.delta, found.adjoint):
        assert not np.any(np.where(there, 0, on_padding))


@pytest.mark.parametrize("name", ["mask and truncate", "mask and window"])
def test_all_that_bptt_returns_is_differentiable(name):
    how = BY_HAND[name]
    params, xs, h0, _ = network()
    valid, options = valid_of(how)
    there = jnp.asarray(valid)[..., None]

    def by_hand(cell, xs, h0, dhs):
        _, hs = jaxrnn.unroll(cell, xs, h0, **how)
        return jaxrnn.bptt(cell, xs, h0, hs, dhs, **how)

    def by_jax(cell, xs, h0, dhs):
        def states(cell, xs, h0, drive, push):
            return naive(cell, xs, h0, drive=drive, push=push, valid=valid, **options)[1]

        nothing = jnp.zeros((T, B, H))
        return jax.vjp(states, cell, xs, h0, nothing, nothing)[1](dhs)

    def derivatives(run):
        def number(cell, h0, dhs):
            leaves = jax.tree.leaves(run(cell, jnp.where(there, xs, 0), h0, dhs))
            return sum(jnp.sum(jnp.sin(x + n)) for n, x in enumerate(leaves))

        args = params.cell, h0, jnp.where(there, weights((T, B, H)), 0)
        if "window" in how:
            return jax.jvp(number, args, jax.tree.map(jnp.cos, args))[1]
        dcell, dh0, of_dhs = jax.grad(number, (0, 1, 2))(*args)
        return dcell, dh0, jnp.where(there, of_dhs, 0)

    found, expected = (jax.jit(derivatives, static_argnums=0)(run) for run in (by_hand, by_jax))
    assert_close(found, expected, FIRST * T)


# The loss -------------------------------------------------------------------------------------


def layer(seed, kind, D=D, dtype=jnp.float64):
    cell = random_case(seed, D=D, H=H, dtype=dtype)[0].cell
    if kind == "voltage":
        return dataclasses.replace(cell, form="voltage", leak=jnp.linspace(0, 1, H, dtype=dtype))
    if kind == "rate":
        return dataclasses.replace(cell, leak=jnp.asarray(0.4, dtype))
    form, theta = KINDS[kind][0], parameters_of(kind, dtype)
    return dataclasses.replace(cell, form=form, parameters=theta)


def stack(*kinds):
    return tuple(layer(n, kind, H if n else D) for n, kind in enumerate(kinds))


first_states = forms.first_states


@pytest.mark.parametrize("how", [{}, *forms.LOSS_OPTIONS[2:]], ids=str)
def test_the_loss_reads_outputs_and_its_gradient_has_the_share_of_the_readout(how):
    options = {k: v for k, v in how.items() if k != "checkpoint_every"}
    forms.check_loss(
        layer(0, "rich"), partial(naive_outputs, **options), first_states(1)[0], H, **how
    )


def test_the_loss_of_a_stack_of_all_forms():
    cells, how = stack("rich", "rate", "voltage"), {"truncate": 3}
    run = partial(naive_outputs, **how)
    forms.check_loss(cells, run, first_states(3), H, checkpoint_every=3, **how)


def test_the_loss_of_custom_forms_in_two_directions():
    cells = (layer(0, "rich"), layer(1, "voltage")), layer(2, "nested", 2 * H)
    h0 = first_states(2), weights((B, H), 22)
    forms.check_loss(cells, naive_outputs, h0, H)


@pytest.mark.parametrize(
    ("kind", "option"),
    [("rich", {}), ("rich", {"truncate": 3}), ("rich", {"window": 2}), ("no output", {})],
    ids=str,
)
def test_textbook_matches_the_gradient_of_a_naive_scan(kind, option):
    params, xs, _, targets = network(kind)

    @jax.jit
    @jax.value_and_grad
    def expected(params):
        hs = naive(params.cell, xs, jnp.zeros((B, H)), **option)[1]
        return jnp.sum(forms.cross_entropy(params.readout, g(params.cell, hs), targets))

    loss, gradient = expected(params)
    assert_close(textbook.loss_and_grads(params, xs, targets, **option), (loss, gradient))
    if "truncate" not in option:
        return
    terms = textbook.contributions(params, xs, targets, **option)
    later = np.arange(T)[:, None] < np.arange(T)  # k > t
    for leaf in jax.tree.leaves(terms):
        assert not np.any(np.asarray(leaf)[later])
    assert_close(jax.tree.map(lambda x: x.sum((0, 1)), terms), gradient.cell)


def test_contributions_are_what_each_step_owes():
    params, xs, _, targets = network()
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (T, *x.shape)), params.cell)

    def losses(copies):
        # Step k, and the readout after it, have parameters of their own.
        def body(h, now):
            cell, x = now
            h, _ = naive(cell, x[None], h)
            return h, g(cell, h)

        _, ys = lax.scan(body, jnp.zeros((B, H)), (copies, xs))
        return jnp.sum(forms.cross_entropy(params.readout, ys, targets), axis=1)

    terms = textbook.contributions(params, xs, targets)
    assert_close(terms, jax.jit(jax.jacrev(losses))(copies))


# Layers, steps, training ----------------------------------------------------------------------


def test_a_stack_of_all_forms_hands_up_outputs():
    cells, xs, h0 = stack("voltage", "rich", "no output", "nested"), weights((T, B, D)), None
    h0, valid = first_states(4), up_to(LENGTHS)

    def ours(cells, xs, h0):
        return jaxrnn.unroll_layers(cells, xs, h0, lengths=LENGTHS)

    compare(ours, partial(naive_outputs, valid=valid), cells, xs, h0)
    _, ys = ours(cells, xs, h0)
    assert not np.any(np.where(valid[..., None], 0, ys))


def test_a_custom_form_reads_in_two_directions():
    cells, xs, h0 = (layer(0, "rich"), layer(1, "nested")), weights((T, B, D)), first_states(2)

    def ours(cells, xs, h0):
        return jaxrnn.bidirectional(*cells, xs, h0, mask=GAPS)

    compare(ours, partial(naive_both, valid=jnp.asarray(GAPS)), cells, xs, h0)
    _, ys = ours(cells, xs, h0)
    assert not np.any(np.where(GAPS[..., None], 0, ys))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_one_by_one_are_the_unroll(kind):
    params, xs, h0, _ = network(kind)
    ids = jaxrnn.Ids(jnp.argmax(xs, -1))
    for given in (xs, ids):
        h, hs = h0, []
        for t in range(T):
            x = jax.tree.map(lambda x, t=t: x[t], given)
            h = jaxrnn.step(params.cell, x, h)
            hs.append(h)
        assert_close(jaxrnn.unroll(params.cell, given, h0), (h, jnp.stack(hs)))


@pytest.mark.parametrize("kind", ["rich", "no output"])
def test_outputs_and_their_gradients(kind):
    cell, hs = network(kind)[0].cell, weights((T, B, H))
    assert_close(jaxrnn.outputs(cell, hs), g(cell, hs))

    def gradients(outputs):
        return jax.grad(lambda cell, hs: jnp.sum(jnp.sin(outputs(cell, hs))), (0, 1))(cell, hs)

    assert_close(gradients(jaxrnn.outputs), gradients(g))


@pytest.mark.parametrize("time", [0, 1])
def test_few_steps(time):
    params, xs, h0, targets = network("rich", T=time)

    def run(cell, xs, h0):
        return jaxrnn.unroll(cell, xs, h0)

    if time:
        compare(run, naive, params.cell, xs, h0)
        return
    h_last, hs = run(params.cell, xs, h0)
    assert_close(h_last, h0)
    assert hs.shape == (0, B, H)
    found = jaxrnn.bptt(params.cell, xs, h0, hs, hs, dh_last=h0)
    assert_close((found.cell, found.h0), (jax.tree.map(jnp.zeros_like, params.cell), h0))
    loss, gradients = jaxrnn.loss_and_grads(params, xs, targets, h0=h0)
    assert not any(np.any(x) for x in jax.tree.leaves((loss, gradients.params)))


def test_the_likeliest_ids_are_generated_from_outputs():
    params, *_ = network("rich", D=K)
    h, logits, expected, run = np.zeros((1, H)), None, [], jax.jit(naive)
    for n in range(8):
        drawn = n % 2 if n < 2 else int(np.argmax(logits))
        expected += [drawn] if n >= 2 else []
        h, _ = run(params.cell, jnp.eye(K)[drawn][None, None], h)
        logits = g(params.cell, h[0]) @ params.readout.V.T + params.readout.c
    found = jaxrnn.generate(params, jax.random.key(1), jnp.array([0, 1]), 6, temperature=0)
    assert found.tolist() == expected


def test_an_update_descends_the_loss():
    params, *_ = network("rich", D=K)
    generator = np.random.default_rng(0)
    inputs, targets = generator.integers(0, K, (T, B)), generator.integers(0, K, (T, B))

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params):
        xs = jax.nn.one_hot(inputs, K, dtype=jnp.float64)
        ys = g(params.cell, naive(params.cell, xs, jnp.zeros((B, H)))[1])
        return jnp.mean(forms.cross_entropy(params.readout, ys, jnp.asarray(targets)))

    loss, gradient = mean_loss(params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    # optax multiplies floats by its integer step counts.
    with jax.numpy_dtype_promotion("standard"):
        state = train.init_state(params, optax.sgd(0.1), B)
        new, found = train.make_update(optax.sgd(0.1))(state, inputs, targets)
    assert_close((found, new.params), (loss, expected))
    assert mean_loss(new.params)[0] < loss


def test_initial_cells_of_a_custom_form():
    form, theta = KINDS["rich"]
    theta = jax.tree.map(np.asarray, theta, is_leaf=is_number_or_list)
    cell = jaxrnn.init_cell(jax.random.key(0), D, H, form=form, parameters=theta, dtype="bfloat16")
    assert cell.form is form and cell.leak is None
    assert {x.dtype for x in jax.tree.leaves(cell)} == {jnp.dtype("bfloat16")}
    assert jaxrnn.unroll(cell, jnp.ones((T, D), jnp.bfloat16))[1].shape == (T, H)


# The built-in forms, written as a Form --------------------------------------------------------

BUILT_IN = {
    "rate": jaxrnn.Form(lambda a, h, leak: (1 - leak) * h + leak * jnp.sin(a)),
    "voltage": jaxrnn.Form(
        lambda a, h, leak: (1 - leak) * h + leak * a, lambda h, _: jnp.sin(h)
    ),
}  # fmt: skip
NOISY = {"drive": 0.3 * weights((T, B, H), 3)}
SAME_OPTIONS = {
    "mask, drive, truncate": {"mask": jnp.asarray(GAPS), "truncate": 3} | NOISY,
    "window, associative": {"window": 3, "implementation": "associative"},
    "lengths, reverse, sqrt": {
        "lengths": jnp.asarray(LENGTHS), "reverse": True, "checkpoint_every": "sqrt"
    },
}  # fmt: skip


def both_ways(form):
    """A network of a built-in form, and the same of a custom one."""
    params, xs, h0, targets = forms.network(form, "per unit", jnp.sin)
    cell = params.cell
    custom = dataclasses.replace(cell, leak=None, form=BUILT_IN[form], parameters=cell.leak)
    return [(dataclasses.replace(params, cell=c), xs, h0, targets) for c in (cell, custom)]


def leaves_of(params):
    """In which the leak is a parameter."""
    cell = getattr(params, "cell", params)
    theta = cell.leak if cell.parameters is None else cell.parameters
    return cell.U, cell.W, cell.b, theta, getattr(params, "readout", None)


SAME = [("rate", 0), ("voltage", 0), ("voltage", 1), ("rate", 2)]


@pytest.mark.parametrize(("form", "name"), [(form, list(SAME_OPTIONS)[n]) for form, n in SAME])
def test_a_built_in_form_written_as_a_form_is_the_same(form, name):
    how = SAME_OPTIONS[name]

    def everything(params, xs, h0):
        def states(cell, xs, h0):
            return jaxrnn.unroll(cell, xs, h0, **how)

        seen, pull = jax.vjp(states, params.cell, xs, h0)
        dcell, *rest = pull(jax.tree.map(jnp.cos, seen))
        return seen, leaves_of(dcell), rest

    found, expected = (jax.jit(everything)(*args[:3]) for args in both_ways(form))
    assert_close(found, expected)


@pytest.mark.parametrize("form", BUILT_IN)
def test_gradients_by_hand_of_a_built_in_form_written_as_a_form_are_the_same(form):
    how = SAME_OPTIONS["mask, drive, truncate"]

    def everything(params, xs, h0, targets):
        hs = jnp.sin(jnp.cumsum(xs @ params.cell.U.T, 0))  # whatever they are
        found = jaxrnn.bptt(params.cell, xs, h0, hs, jnp.cos(hs), **how)
        loss, of_loss = jaxrnn.loss_and_grads(params, xs, targets, h0=h0, **how)
        others = found.xs, found.h0, found.delta, found.adjoint, loss, of_loss.h0
        return leaves_of(found.cell), leaves_of(of_loss.params), others

    found, expected = (jax.jit(everything)(*args) for args in both_ways(form))
    assert_close(found, expected)


# Half precision -------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def sines_and_gradients(unroll, *args):
    def loss(*args):
        _, hs = unroll(*args)
        return jnp.sum(jnp.sin(hs.astype(jnp.float32))), hs

    return jax.grad(loss, (0, 1, 2), has_aux=True)(*args)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_float32(dtype):
    params, xs, h0, _ = network("rich", dtype=jnp.dtype(dtype))

    args = params.cell, xs, h0
    found = sines_and_gradients(jaxrnn.unroll, *args)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), args)
    expected = sines_and_gradients(naive, *wide)
    # T states and T adjoints are each rounded once, by eps/2, and Jacobians are below 1 here:
    # |∂f/∂h| ≤ 0.8, and 0.3 · 1.2 · 0.9 / 4 by way of W.
    limit = T * float(jnp.finfo(dtype).eps)
    assert_close(found, expected, limit)
    hs = found[1]
    by_hand = jaxrnn.bptt(*args, hs, jnp.cos(hs.astype(jnp.float32)).astype(hs.dtype))
    assert {x.dtype for x in jax.tree.leaves(by_hand)} == {jnp.dtype(dtype)}
    assert_close((by_hand.cell, by_hand.xs, by_hand.h0), expected[0], limit)


def test_sums_of_parameters_in_bfloat16_do_not_stop_at_256():
    time = batch = 64
    form = jaxrnn.Form(lambda a, h, p: a + p["unit"] + p["all"], lambda h, p: h + p["read"])
    zeros = {"unit": jnp.zeros(2), "all": jnp.zeros(()), "read": jnp.zeros(2)}
    cell = jaxrnn.Cell(jnp.ones((2, 1)), jnp.zeros((2, 2)), None, form=form, parameters=zeros)
    readout = jaxrnn.Readout(jnp.zeros((2, 2)), jnp.zeros(2))
    to_half = lambda x: x.astype(jnp.bfloat16)  # noqa: E731
    params, xs = jax.tree.map(to_half, (jaxrnn.Params(cell, readout), jnp.ones((time, batch, 1))))

    def by_jax(cell):
        return jnp.sum(jaxrnn.unroll(cell, xs)[1].astype(jnp.float32))

    hs = jaxrnn.unroll(params.cell, xs)[1]
    by_hand = jaxrnn.bptt(params.cell, xs, None, hs, jnp.ones_like(hs)).cell
    for found in (jax.grad(by_jax)(params.cell), by_hand):
        # 4,096 is a number of bfloat16; "all" is in two units.
        np.testing.assert_array_equal(found.parameters["unit"].astype(jnp.float64), 4096)
        np.testing.assert_array_equal(found.parameters["all"].astype(jnp.float64), 2 * 4096)
        np.testing.assert_array_equal(found.parameters["read"].astype(jnp.float64), 0)


# What else a form may be ----------------------------------------------------------------------


@jax.custom_vjp
def spike(h):
    return (h > 0).astype(h.dtype)


spike.defvjp(lambda h: (spike(h), h), lambda h, d: (d / (1 + jnp.abs(h)) ** 2,))


def test_a_surrogate_gradient_of_spikes():
    # A function that JAX differentiates in reverse mode only, with learned decay and threshold.
    form = jaxrnn.Form(
        lambda a, v, p: p["decay"] * v + a, lambda v, p: spike(v - p["threshold"])
    )  # fmt: skip
    theta = {"decay": jnp.asarray(0.8), "threshold": jnp.linspace(0.1, 0.5, H)}
    params, xs, h0, _ = network()
    cell = dataclasses.replace(params.cell, form=form, parameters=theta)
    compare(jaxrnn.unroll, naive, cell, xs, h0)
    forms.check_loss(cell, naive_outputs, h0, H)


def test_parameters_may_be_python_numbers():
    params, xs, h0, _ = network()
    theta = {"alpha": 0.3, "gain": 1.0, "threshold": np.linspace(0, 1, H)}

    def gradient(unroll, alpha):
        cell = dataclasses.replace(params.cell, parameters=theta | {"alpha": alpha})
        return scalar(unroll(cell, xs, h0))

    found = jax.grad(partial(gradient, jaxrnn.unroll))(0.3)
    assert_close(found, jax.jit(jax.grad(partial(gradient, naive)))(jnp.asarray(0.3)))


def test_gradients_of_parameters_that_nothing_depends_on_are_0():
    theta = {"none": None, "unused": jnp.ones(H), "unused number": jnp.ones(()), "empty": ()}
    form = jaxrnn.Form(lambda a, h, _: 0.5 * h + jnp.tanh(a), lambda h, _: jnp.sin(h))
    params, xs, h0, targets = network()
    cell = dataclasses.replace(params.cell, form=form, parameters=theta)
    _, hs = jaxrnn.unroll(cell, xs, h0)
    params = dataclasses.replace(params, cell=cell)
    found = (
        jax.grad(lambda cell: scalar(jaxrnn.unroll(cell, xs, h0)))(cell),
        jaxrnn.bptt(cell, xs, h0, hs, hs).cell,
        jaxrnn.loss_and_grads(params, xs, targets)[1].params.cell,
        textbook.loss_and_grads(params, xs, targets)[1].cell,
    )
    for gradient in found:
        assert jax.tree.structure(gradient) == jax.tree.structure(cell)
        assert not any(np.any(x) for x in jax.tree.leaves(gradient.parameters))


def test_the_activation_is_ignored():
    params, xs, h0, _ = network()
    other = dataclasses.replace(params.cell, activation="relu")
    assert_close(jaxrnn.unroll(other, xs, h0), jaxrnn.unroll(params.cell, xs, h0), 0.0)
    assert "activation" not in repr(other)


def test_functions_get_arrays_of_one_shape():
    shapes = set()

    def update(a, h, p):
        shapes.add(tuple(map(jnp.shape, (a, h, *jax.tree.leaves(p)))))
        return p["alpha"] * a + p["gain"] * h

    def output(h, p):
        shapes.add(tuple(map(jnp.shape, (h, *jax.tree.leaves(p)))))
        return p["threshold"] * h

    params, xs, h0, targets = network()
    cell = dataclasses.replace(params.cell, form=jaxrnn.Form(update, output))
    params = dataclasses.replace(params, cell=cell)
    jax.grad(lambda cell: scalar(jaxrnn.unroll(cell, xs, h0)))(cell)
    jaxrnn.loss_and_grads(params, xs, targets)
    jaxrnn.step(cell, xs[0], h0)
    assert all(len(set(each)) == 1 and each[0][-1] == H for each in shapes)


def test_a_known_array_of_each_unit_may_be_closed_over():
    scale = np.linspace(0.2, 0.8, H)
    form = jaxrnn.Form(lambda a, h, _: jnp.tanh(a) * jnp.broadcast_to(scale, a.shape))
    params, xs, h0, _ = network()
    cell = dataclasses.replace(params.cell, form=form, parameters=None)
    compare(jaxrnn.unroll, naive, cell, xs, h0)


def test_slopes_that_are_infinite_at_0_do_not_reach_gradients_from_invalid_steps():
    # Of a sequence without steps a, h and hs are 0, where these functions have no slope.
    def root(x):
        return jnp.sign(x) * jnp.sqrt(jnp.abs(x))

    form = jaxrnn.Form(lambda a, h, p: root(p * a) + root(p * h) / 9, lambda h, p: root(p * h))
    params, xs, h0, targets = network(bias="no bias")
    cell = dataclasses.replace(params.cell, form=form, parameters=jnp.linspace(0.5, 1, H))
    params = dataclasses.replace(params, cell=cell)
    h0 = h0.at[1].set(0)
    assert LENGTHS[1] == 0

    def of_states(unroll, *args):
        def loss(cell, xs, h0):
            return jnp.sum(jnp.sin(unroll(cell, xs, h0)[1]))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*args)

    def of_layers(cell, xs, h0):
        return jaxrnn.unroll_layers(cell, xs, h0, lengths=LENGTHS)

    def of_loss(params, xs, h0, targets, lengths):
        found = jaxrnn.loss_and_grads(params, xs, targets, h0=h0, lengths=lengths)
        return found[0], found[1].params

    there = np.array([0, 2])
    fewer = xs[:, there], h0[there]
    every = partial(jaxrnn.unroll, lengths=LENGTHS)
    without = partial(jaxrnn.unroll, lengths=LENGTHS[there])
    found, expected = of_states(every, cell, xs, h0), of_states(without, cell, *fewer)
    assert np.all(np.isfinite(expected[0].W))
    assert_close((found[0], found[1][:, there]), (expected[0], expected[1]))
    assert_close(
        of_loss(params, xs, h0, targets, LENGTHS),
        of_loss(params, *fewer, targets[:, there], LENGTHS[there]),
    )
    outputs = of_states(of_layers, cell, xs, h0)
    assert np.all(np.isfinite(outputs[0].W)) and np.all(np.isfinite(outputs[0].parameters))


def test_outputs_that_are_infinite_at_0_do_not_reach_gradients_from_invalid_steps():
    form = jaxrnn.Form(
        lambda a, h, p: h / 2 + jax.nn.sigmoid(p * a), lambda h, p: jnp.log(jnp.abs(p * h))
    )
    params, xs, h0, _ = network()
    cell = dataclasses.replace(params.cell, form=form, parameters=jnp.linspace(0.5, 1, H))
    h0 = h0.at[1].set(0)
    assert LENGTHS[1] == 0

    def gradient(lengths, *args):
        def loss(cell, xs, h0):
            return jnp.sum(jnp.sin(jaxrnn.unroll(cell, xs, h0, lengths=lengths)[1]))

        return jax.grad(loss)(*args)

    there = np.array([0, 2])
    expected = gradient(LENGTHS[there], cell, xs[:, there], h0[there])
    assert np.all(np.isfinite(expected.W)) and np.all(np.isfinite(expected.parameters))
    assert_close(gradient(LENGTHS, cell, xs, h0), expected)


# Errors ---------------------------------------------------------------------------------------


def replaced(**how):
    params, xs, h0, targets = network()
    return (
        dataclasses.replace(params, cell=dataclasses.replace(params.cell, **how)),
        xs,
        h0,
        targets,
    )


def form_of(update=rich_update, output=rich_output):
    return {"form": jaxrnn.Form(update, output)}


def theta_of(**how):
    return {"parameters": parameters_of("rich") | how}


def missing_argument(a, h):
    return a + h


# name -> (what of the cell is wrong, the error, a word of its message).
WRONG = {
    "a leak": ({"leak": jnp.asarray(0.5)}, ValueError, "leak"),
    "parameters of the rate form": ({"form": "rate"}, ValueError, "parameters"),
    "parameters of the voltage form": ({"form": "voltage"}, ValueError, "parameters"),
    "parameters of H + 1 units": (theta_of(gain=jnp.ones(H + 1)), ValueError, "parameters.*gain"),
    "parameters of two axes": (theta_of(gain=jnp.ones((B, H))), ValueError, "parameters.*gain"),
    "integer parameters": (theta_of(gain=jnp.ones(H, int)), TypeError, "parameters.*gain"),
    "a word as a parameter": (theta_of(gain="one"), TypeError, "parameters.*gain"),
    "a number as a form": ({"form": 3}, (TypeError, ValueError), "form"),
    "a function as a form": ({"form": rich_update}, (TypeError, ValueError), "form"),
    "an unknown form": ({"form": "current", "parameters": None}, ValueError, "form"),
    "an update that is none": (form_of(update="tanh"), TypeError, "update"),
    "an output that is none": (form_of(output=0.5), TypeError, "output"),
    "an update that mixes units": (
        form_of(lambda a, h, p: jax.nn.softmax(a)), ValueError, "update.*depends on others"),
    "an update that mixes states of units": (
        form_of(lambda a, h, p: a + jnp.roll(h, 1, -1)), ValueError, "update.*depends on others"),
    "an update that mixes parameters of units": (
        form_of(lambda a, h, p: a * jnp.mean(p["gain"])), ValueError, "update"),
    "an update that mixes sequences": (
        form_of(lambda a, h, p: a - jnp.mean(a, 0, keepdims=True)), ValueError, "update"),
    "an output that mixes units": (
        form_of(output=lambda h, p: h / jnp.linalg.norm(h)), ValueError, "output"),
    "an update of another shape": (form_of(lambda a, h, p: a[..., :1]), ValueError, "update"),
    "an output of another shape": (form_of(output=lambda h, p: jnp.sum(h)), ValueError, "output"),
    "an update of integers": (form_of(lambda a, h, p: a.astype(int)), ValueError, "update"),
    "an update of two results": (form_of(lambda a, h, p: (a, h)), ValueError, "update"),
    "an update without parameters": (form_of(missing_argument), ValueError, "update"),
    "an update that asks for another parameter": (
        form_of(lambda a, h, p: a * p["beta"]), ValueError, "update.*beta"),
}  # fmt: skip


@pytest.mark.parametrize(("how", "kind", "match"), WRONG.values(), ids=WRONG)
def test_a_wrong_cell_is_refused_in_one_line(how, kind, match):
    params, xs, h0, targets = replaced(**how)
    hs = jnp.zeros((T, B, H))
    calls = [
        lambda: jaxrnn.unroll(params.cell, xs, h0),
        lambda: jaxrnn.step(params.cell, xs[0], h0),
        lambda: jaxrnn.bptt(params.cell, xs, h0, hs, hs),
        lambda: jaxrnn.loss_and_grads(params, xs, targets),
        lambda: jaxrnn.unroll_layers((params.cell,), xs),
        lambda: textbook.loss_and_grads(params, xs, targets),
        lambda: jaxrnn.outputs(params.cell, hs),
    ]
    for call in calls:
        with pytest.raises(kind, match=match) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_a_form_without_an_update_is_refused():
    with pytest.raises(TypeError, match="update"):
        jaxrnn.Form()


@pytest.mark.parametrize("by", [jax.jit, jax.grad, jax.vmap], ids=["jit", "grad", "vmap"])
@pytest.mark.parametrize("which", ["update", "output"])
def test_a_traced_value_that_is_closed_over_is_refused_by_the_name_of_parameters(which, by):
    params, xs, h0, _ = network()

    @by
    def number(gain):
        functions = {
            "update": lambda a, h, p: gain * jnp.tanh(a),
            "output": lambda h, p: gain * h,
        }
        how = form_of(**{which: functions[which]})
        return jnp.sum(jaxrnn.unroll(dataclasses.replace(params.cell, **how), xs, h0)[1])

    with pytest.raises(ValueError, match="parameters") as raised:
        number(jnp.ones(2) if by is jax.vmap else 1.0)
    assert which in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["mosaic_gpu", "pallas_tpu"])
def test_kernels_refuse_a_custom_form_by_name(name):
    params, xs, h0, targets = network(dtype=jnp.float32, batch=(8,))
    hs = jnp.zeros((T, 8, H), jnp.float32)
    calls = [
        lambda how: jaxrnn.unroll(params.cell, xs, h0, **how),
        lambda how: jaxrnn.bptt(params.cell, xs, h0, hs, hs, **how),
        lambda how: jaxrnn.loss_and_grads(params, xs, targets, h0=h0, **how),
        lambda how: jaxrnn.unroll_layers((params.cell,), xs, (h0,), **how),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="custom form"):
            call({"implementation": name})


def test_torch_has_no_custom_form():
    params, *_ = network()
    with pytest.raises(ValueError, match="custom form"):
        jaxrnn.convert.to_torch(params.cell)
