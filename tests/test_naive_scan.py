"""Form × option × transformation equal a naive scan: in pairs, and behind `full` all of them."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms import FIRST, GAPS, LENGTHS, B, D, H, T, naive, network, scalar, up_to
from helpers import assert_close, inner, pairs_of, pairwise, weights

import jaxrnn

# Transformations ------------------------------------------------------------------------------


def loss_of(run, known):
    return lambda arrays: scalar(run(arrays, known))


def gradient(run, arrays, tangents, known):
    return jax.grad(loss_of(run, known))(arrays)


def first_order(run, arrays, tangents, known):
    pushed = jax.jvp(lambda arrays: run(arrays, known), (arrays,), (tangents,))
    return gradient(run, arrays, tangents, known), pushed


def mapped_over_both(run, arrays, tangents, known):
    cells = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x, 0.5 * x]), arrays["cell"])
    axes = {"cell": None, "h0": 0, "xs": 1, "ids": 1, "drive": 1, "lengths": 0, "mask": 1}
    axes = [{name: axes[name] for name in given} for given in (arrays, known)]
    one = jax.vmap(lambda arrays, known: gradient(run, arrays, tangents, known), axes)
    return jax.vmap(lambda cell: one(arrays | {"cell": cell}, known))(cells)


def forward_over_reverse(run, arrays, tangents, known):
    return jax.jvp(jax.grad(loss_of(run, known)), (arrays,), (tangents,))[1]


def reverse_over_forward(run, arrays, tangents, known):
    loss = loss_of(run, known)
    return jax.grad(lambda arrays: jax.jvp(loss, (arrays,), (tangents,))[1])(arrays)


def reverse_over_reverse(run, arrays, tangents, known):
    loss = loss_of(run, known)
    return jax.grad(lambda arrays: inner(jax.grad(loss)(arrays), tangents))(arrays)


def third_order(run, arrays, tangents, known):
    def curvature(arrays):
        return inner(forward_over_reverse(run, arrays, tangents, known), tangents)

    return jax.grad(curvature)(arrays)


# name -> (what is compared, the order of the derivatives).
TRANSFORMATIONS = {
    "value, grad and jvp": (first_order, 1),
    "vmap of grad over cells and data": (mapped_over_both, 1),
    "forward over reverse": (forward_over_reverse, 2),
    "reverse over forward": (reverse_over_forward, 2),
    "reverse over reverse": (reverse_over_reverse, 2),
    "third order": (third_order, 3),
}

# Cases ----------------------------------------------------------------------------------------

SCALED = jaxrnn.Activation(
    lambda a: 1.7159 * jnp.tanh(2 / 3 * a), lambda h: 2 / 3 * (1.7159 - h * h / 1.7159)
)
ACTIVATIONS = {name: name for name in ("tanh", "relu", "sigmoid", "identity")}
ACTIVATIONS |= {"an Activation": SCALED, "sin": jnp.sin}
# A built-in form with its leak and its activation, or a custom form.
FACTORS = {
    "kind": [
        "rate, tanh", "rate, sigmoid", "rate scalar, relu", "rate per unit, sin",
        "rate scalar, an Activation", "voltage, identity", "voltage scalar, sigmoid",
        "voltage per unit, tanh", "rich", "no output", "nested",
    ],
    "transformation": list(TRANSFORMATIONS)[:3],
    "option": ["", "truncate=3", "window=3", "checkpoint_every=3"],
    "invalid": ["", "lengths", "mask"],
    "inputs": ["floats", "ids", "no inputs"],
    "reverse": ["", "reverse"],
    "drive": ["", "drive"],
    "bias": ["bias", "no bias"],
    "implementation": ["", "associative"],
}  # fmt: skip
PAIRS = list(pairwise(FACTORS))


def data_of(kind, bias, inputs, drive, invalid, **_):
    """What is differentiated, by name; and what is not."""
    kind, _, activation = kind.partition(", ")
    params, xs, h0, _ = network(kind, ACTIVATIONS.get(activation), bias)
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


def option_of(option):
    if not option:
        return {}
    name, value = option.split("=")
    return {name: int(value) if value.isdigit() else value}


def run_by(unroll, arrays, known, **how):
    arrays, known = dict(arrays), dict(known)
    xs = known.pop("ids") if "ids" in known else arrays.pop("xs")
    return unroll(arrays.pop("cell"), xs, arrays.pop("h0"), **arrays, **known, **how)


def ours(option, reverse, implementation, **_):
    how = option_of(option) | ({"implementation": implementation} if implementation else {})
    return partial(run_by, jaxrnn.unroll, reverse=bool(reverse), **how)


def by_naive_scan(option, reverse, **_):
    how = {k: v for k, v in option_of(option).items() if k != "checkpoint_every"}

    def run(arrays, known):
        known = {k: up_to(v) if k == "lengths" else v for k, v in known.items()}
        known = {"valid" if k in ("lengths", "mask") else k: v for k, v in known.items()}
        return run_by(naive, arrays, known, reverse=bool(reverse), **how)

    return run


def with_padding(arrays, invalid, padding):
    valid = {"lengths": np.asarray(up_to(LENGTHS)), "mask": GAPS}.get(invalid)
    if valid is None:
        return arrays
    fill = {k: jnp.where(valid[..., None], v, padding) for k, v in arrays.items()
            if k in ("xs", "drive")}  # fmt: skip
    return arrays | fill


def check(transformation, invalid, **how):
    arrays, known = data_of(invalid=invalid, **how)
    tangents = jax.tree.map(lambda x: weights(x.shape, x.size), arrays)
    transform, order = TRANSFORMATIONS[transformation]

    def by(run, padding):
        # What invalid steps hold reaches nothing, and the naive scan never meets it.
        padded = with_padding(arrays, invalid, padding)
        return jax.jit(partial(transform, run))(padded, tangents, known)

    # Every order multiplies the number of summed terms by about T.
    assert_close(by(ours(**how), jnp.nan), by(by_naive_scan(**how), 0.0), FIRST * T ** (order - 1))


def words(how):
    return ", ".join(filter(None, how.values()))


@pytest.mark.parametrize("how", PAIRS, ids=words)
def test_derivatives_equal_those_of_a_naive_scan(how):
    check(**how)


@pytest.mark.parametrize(("kind", "how"), [
    ("rate scalar, sigmoid", {"transformation": "reverse over reverse"}),
    ("rate, sin", {"transformation": "third order"}),
    ("rich", {"transformation": "reverse over reverse", "option": "truncate=3", "invalid": "mask"}),
], ids=str)  # fmt: skip
def test_higher_orders_equal_those_of_a_naive_scan(kind, how):
    check(**{name: values[0] for name, values in FACTORS.items()} | {"kind": kind} | how)


def test_every_pair_is_among_the_cases():
    met = set().union(*(pairs_of(how.values()) for how in PAIRS))
    sizes = [len(values) for values in FACTORS.values()]
    assert len(met) == sum(a * b for a, b in itertools.combinations(sizes, 2))
    assert len(PAIRS) < 1.5 * sizes[0] * sizes[1]


# Of each kind and variant, behind `full`.
KINDS = [
    *FACTORS["kind"], "rate scalar, tanh", "rate per unit, tanh", "voltage, tanh", "no parameters",
    "voltage scalar, tanh", "voltage scalar, relu", "voltage scalar, sin", "rate, an Activation",
]  # fmt: skip
VARIANTS = {
    "lengths": {"invalid": "lengths"},
    "mask": {"invalid": "mask"},
    "reverse": {"reverse": "reverse"},
    "reverse with lengths": {"reverse": "reverse", "invalid": "lengths"},
    "drive": {"drive": "drive"},
    "ids": {"inputs": "ids"},
    "window=3 with mask": {"option": "window=3", "invalid": "mask"},
    "no bias": {"bias": "no bias"},
    "no inputs": {"inputs": "no inputs"},
    "associative": {"implementation": "associative"},
}
OPTIONS = [*FACTORS["option"], "window=2", "checkpoint_every=sqrt"]
VARIANTS |= {option or "plain": {"option": option} for option in OPTIONS}


@pytest.mark.full
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_product_equals_a_naive_scan(kind, variant, transformation):
    plain = {name: values[0] for name, values in FACTORS.items()}
    check(**plain | VARIANTS[variant] | {"kind": kind, "transformation": transformation})
