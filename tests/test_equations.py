"""Published equations as NumPy loops, each beside the same network written as a `Form`."""

from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms import LENGTHS, MODRELU, B, D, H, K, T, spread, up_to
from helpers import assert_close, weights
from jax import lax

import jaxrnn

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
def test_hand_formulas_match_the_published_loop(name):
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
def test_states_and_gradients_match_the_published_loop(name, spelling):
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
def test_bptt_matches_the_hand_formulas(name):
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
def test_jslds_linearises_a_step(form):
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
def test_a_reservoir_runs_in_a_closed_loop(form):
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
