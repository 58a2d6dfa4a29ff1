"""The rate form and the voltage form, each against loops that are written out here."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from helpers import FUNCTIONS, TOLERANCE, assert_close, random_case, weights
from jax import lax
from test_matrix import pairs_of, pairwise

import jaxrnn
from jaxrnn import textbook, train

T, B, D, H, K = 7, 3, 3, 4, 3
LENGTHS = np.array([7, 0, 4])
GAPS = np.arange(T * B).reshape(T, B) % 4 != 1
LEAKS = {"": None, "scalar": 0.6, "per unit": [0.0, 0.3, 0.7, 1.0]}
FIRST = TOLERANCE["float64"]


def network(form="rate", leak="", activation="tanh", bias="bias", dtype=jnp.float64, **sizes):
    """Params, xs, h0, targets."""
    leak = None if LEAKS[leak] is None else jnp.asarray(LEAKS[leak], dtype)
    sizes = {"T": T, "batch": (B,), "D": D, "H": H, "K": K} | sizes
    params, *rest = random_case(
        5, dtype=dtype, form=form, leak=leak, activation=activation, **sizes
    )
    if bias == "no bias":
        params = dataclasses.replace(params, cell=dataclasses.replace(params.cell, b=None))
    return params, *rest


def phi_of(cell):
    return FUNCTIONS[cell.activation] if isinstance(cell.activation, str) else cell.activation


def g(cell, h):
    return phi_of(cell)(h) if cell.form == "voltage" else h


def numbered(valid, reverse):
    """How many valid steps were read before each."""
    counts = jnp.cumsum(valid[::-1] if reverse else valid, axis=0)
    return (counts[::-1] if reverse else counts) - 1


def naive(
    cell, xs, h0, *, drive=None, valid=None, reverse=False, truncate=None, window=None, push=None
):
    """A plain scan of either form, for JAX to differentiate; `push` is added to each new state.

    With a window it carries a state for each number of steps since the one that does not move.
    """
    if isinstance(xs, jaxrnn.Ids):
        xs = jax.nn.one_hot(xs.ids, cell.U.shape[1], dtype=cell.U.dtype)
    phi, steps = phi_of(cell), xs.shape[:-1]
    zeros = jnp.zeros((*steps, cell.W.shape[0]), cell.W.dtype)
    drive, push = (zeros if x is None else x for x in (drive, push))
    valid = jnp.ones(steps, bool) if valid is None else jnp.asarray(valid)
    number = numbered(valid, reverse)
    cut = jnp.zeros(steps, bool) if truncate is None else (number > 0) & (number % truncate == 0)

    def step(h, x, drive, push, cut):
        s = g(cell, h)
        a = x @ cell.U.T + jnp.where(cut, lax.stop_gradient(s), s) @ cell.W.T + drive
        a = a if cell.b is None else a + jnp.broadcast_to(cell.b, a.shape)
        new = a if cell.form == "voltage" else phi(a)
        if cell.leak is not None:
            leak = jnp.broadcast_to(cell.leak, new.shape)
            new = (1 - leak) * h + leak * new
        return new + push

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


def up_to(lengths):
    lengths = jnp.asarray(lengths)
    return jnp.arange(T).reshape(T, *(1,) * lengths.ndim) < lengths[None]


def scalar(states):
    """A number in which every state counts, and each in another way."""
    h_last, hs = states
    each = sum(jnp.sum(jnp.sin(3 * h)) for h in jax.tree.leaves(hs))
    return each + sum(jnp.sum(jnp.exp(h)) for h in jax.tree.leaves(h_last))


# A NumPy double sum ---------------------------------------------------------------------------

BOTH = ["rate", "voltage"]
NETWORKS = [
    *itertools.product(BOTH, LEAKS, ["tanh"], ["bias"]),
    *itertools.product(BOTH, ["scalar"], ["sigmoid"], ["no bias"]),
    ("voltage", "", "identity", "no bias"), ("voltage", "per unit", "relu", "bias"),
]  # fmt: skip
ONE_OF_EACH = [("", "bias"), ("scalar", "no bias"), ("per unit", "bias")]
OPTIONS = [{"truncate": 3}, {"window": 2}, {"window": 3, "reverse": True}]


def in_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def arrays_of(cell):
    return {name: in_numpy(getattr(cell, name)) for name in ("U", "W", "b", "leak")}


def check_against_the_oracle(form, leak, activation, bias, **options):
    params, xs, h0, targets = network(form, leak, activation, bias)
    cell, drive, valid = params.cell, 0.3 * weights((T, B, H), 3), GAPS
    dhs, dh_last = weights((T, B, H), 1), weights((B, H), 2)
    reverse = options.get("reverse", False)
    given = (form, activation, arrays_of(cell), *in_numpy((xs, h0, drive)), valid)
    expected = oracle.batch_states_of_form(*given, reverse)
    sums, d = oracle.batch_gradients_of_form(*given, *in_numpy((dhs, dh_last)), **options)
    of_cell = dataclasses.replace(cell, **sums)

    there = jnp.asarray(valid)[..., None]
    xs, dhs = jnp.where(there, xs, jnp.nan), jnp.where(there, dhs, jnp.nan)
    how = {"mask": valid, **options}

    @jax.jit
    def by_jax(cell, xs, h0, drive):
        def states(cell, xs, h0, drive):
            return jaxrnn.unroll(cell, xs, h0, drive=drive, **how)

        seen, pull = jax.vjp(states, cell, xs, h0, drive)
        return seen, pull((dh_last, dhs))

    seen, pulled = by_jax(cell, xs, h0, drive)
    assert_close(seen, expected)
    assert_close(pulled, (of_cell, d["xs"], d["h0"], d["delta"]))
    hs = jnp.where(there, seen[1], jnp.nan)
    found = jaxrnn.bptt(cell, xs, h0, hs, dhs, dh_last=dh_last, drive=drive, **how)
    names = ("xs", "h0", "delta", "adjoint")
    assert_close(
        (found.cell, *(getattr(found, name) for name in names)),
        (of_cell, *(d[name] for name in names)),
    )
    for on_padding in (found.xs, found.delta, found.adjoint):
        assert not np.any(np.where(there, 0, on_padding))

    V, c = in_numpy((params.readout.V, params.readout.c))
    given = (form, activation, given[2], V, c, given[3], np.eye(K)[np.asarray(targets)], *given[4:])
    loss, sums, d, dV, dc = oracle.batch_loss_and_grads_of_form(*given, **options)
    readout = jaxrnn.Readout(dV, dc)
    expected_params = jaxrnn.Params(dataclasses.replace(cell, **sums), readout)
    found_loss, found = jaxrnn.loss_and_grads(params, xs, targets, h0=h0, drive=drive, **how)
    assert_close(
        (found_loss, found.params, found.h0, found.h_last),
        (loss, expected_params, d["h0"], expected[0]),
    )


def check_textbook(form, leak, activation, bias, **options):
    params, xs, _, targets = network(form, leak, activation, bias)
    V, c = in_numpy((params.readout.V, params.readout.c))
    zeros, every = np.zeros((T, B, H)), np.ones((T, B), bool)
    loss, sums, _, dV, dc = oracle.batch_loss_and_grads_of_form(
        form, activation, arrays_of(params.cell), V, c, np.asarray(xs),
        np.eye(K)[np.asarray(targets)], zeros[0], zeros, every, **options,
    )  # fmt: skip
    cell = dataclasses.replace(params.cell, **sums)
    found = textbook.loss_and_grads(params, xs, targets, **options)
    assert_close(found, (loss, jaxrnn.Params(cell, jaxrnn.Readout(dV, dc))))


@pytest.mark.parametrize("how", NETWORKS, ids=" ".join)
def test_states_and_all_gradients_match_the_double_sum(how):
    check_against_the_oracle(*how)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("form", BOTH)
def test_truncate_and_window_leave_out_terms_of_the_double_sum(form, options):
    check_against_the_oracle(form, "per unit", "tanh", "bias", **options)


@pytest.mark.parametrize("how", NETWORKS[1:7], ids=" ".join)
def test_textbook_matches_the_double_sum(how):
    check_textbook(*how)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
@pytest.mark.parametrize("form", BOTH)
def test_textbook_truncates_and_windows_likewise(form, options):
    check_textbook(form, "scalar", "sigmoid", "bias", **options)


@pytest.mark.parametrize(("leak", "bias"), ONE_OF_EACH)
def test_contributions_are_what_each_step_of_a_voltage_network_owes(leak, bias):
    params, xs, _, targets = network("voltage", leak, "sigmoid", bias)
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (T, *x.shape)), params.cell)

    def losses(copies):
        # Step k has parameters of its own, so that a derivative by them is the (t, k) term.
        def body(h, now):
            cell, x = now
            h, _ = naive(cell, x[None], h)
            return h, h

        _, hs = lax.scan(body, jnp.zeros((B, H)), (copies, xs))
        return jnp.sum(cross_entropy(params.readout, g(params.cell, hs), targets), axis=1)

    terms = textbook.contributions(params, xs, targets)
    assert_close(terms, jax.jit(jax.jacrev(losses))(copies))


# Conversions between forms --------------------------------------------------------------------


def compare(ours, theirs, *args, tolerance=FIRST):
    """Values, and the gradients of all args."""

    def both(f):
        def loss(args):
            found = f(*args)
            return sum(jnp.sum(jnp.sin(3 * y)) for y in jax.tree.leaves(found)), found

        return jax.jit(jax.grad(loss, has_aux=True))(args)

    assert_close(both(ours), both(theirs), tolerance)


def original(step):
    """h_1 … h_T of h_t = step(parameters, h_{t−1}, x_t, ξ_t), as a plain scan."""

    def states(parameters, h0, xs, noise):
        def body(h, now):
            h = step(parameters, h, *now)
            return h, h

        return lax.scan(body, h0, (xs, noise))[1]

    return states


def parameters_of(leak):
    params, xs, h0, _ = network(leak=leak)
    cell = params.cell
    return (cell.U, cell.W, cell.b, cell.leak), h0, xs, 0.3 * weights((T, B, H), 3)


def affine(W, h, U, x, b):
    return h @ W.T + x @ U.T + jnp.broadcast_to(b, h.shape)


def spread(leak, like):
    return jnp.broadcast_to(leak, like.shape)


@original
def voltages(parameters, v, x, noise):
    U, W, b, leak = parameters
    leak = spread(leak, v)
    return (1 - leak) * v + leak * affine(W, jnp.tanh(v), U, x, b) + noise


@pytest.mark.parametrize("leak", ["scalar", "per unit"])
def test_voltage_equals_its_own_equation(leak):
    def ours(parameters, v0, xs, noise):
        U, W, b, leak = parameters
        cell = jaxrnn.Cell(U, W, b, leak, form="voltage")
        return jaxrnn.unroll(cell, xs, v0, drive=noise / spread(leak, noise))[1]

    parameters, *rest = parameters_of(leak)
    if leak == "per unit":
        # Noise outside the bracket of α is a drive of ξ / α: no α may be 0 here.
        parameters = (*parameters[:3], jnp.asarray([0.1, 0.3, 0.7, 1.0]))
    compare(ours, voltages, parameters, *rest)


def test_voltage_equals_its_conversion_from_the_rate_form():
    def converted(parameters, v0, xs, noise):
        U, W, b, leak = parameters
        current = affine(jnp.zeros_like(W), noise, U, xs, b) + noise / leak

        def body(d, now):
            d = (1 - leak) * d + leak * now
            return d, d

        _, d = lax.scan(body, v0, current)
        d = jnp.concatenate([v0[None], d])
        cell = jaxrnn.Cell(jnp.zeros((H, 0)), W, None, leak)
        _, rates = jaxrnn.unroll(cell, jnp.zeros((T, B, 0)), drive=d[:-1])
        return rates @ W.T + d[1:]

    def native(parameters, v0, xs, noise):
        U, W, b, leak = parameters
        cell = jaxrnn.Cell(U, W, b, leak, form="voltage")
        return jaxrnn.unroll(cell, xs, v0, drive=noise / leak)[1]

    args = parameters_of("scalar")
    compare(converted, voltages, *args)
    compare(converted, native, *args)


@pytest.mark.parametrize("leak", ["scalar", "per unit"])
def test_outer_leak_equals_an_elman_network_of_other_weights(leak):
    @original
    def outer(parameters, h, x, noise):
        U, W, b, leak = parameters
        leak = spread(leak, h)
        return jnp.tanh((1 - leak) * h + leak * affine(W, h, U, x, b) + noise)

    def elman(parameters, h0, xs, noise):
        U, W, b, leak = parameters
        leak = spread(leak, b)
        rows = leak[:, None]
        cell = jaxrnn.Cell(rows * U, jnp.diag(1 - leak) + rows * W, leak * b)
        return jaxrnn.unroll(cell, xs, h0, drive=noise)[1]

    compare(elman, outer, *parameters_of(leak))


@pytest.mark.parametrize("leak", ["scalar", "per unit"])
def test_wilson_cowan_equals_a_rate_network_of_filtered_inputs(leak):
    @original
    def wilson_cowan(parameters, h, x, noise):
        U, W, b, leak = parameters
        leak = spread(leak, h)
        rates = jnp.tanh(h @ W.T + jnp.broadcast_to(b, h.shape) + noise)
        return (1 - leak) * h + leak * (rates + x @ U.T)

    def converted(parameters, h0, xs, noise):
        U, W, b, leak = parameters
        spread_leak = spread(leak, h0)

        def body(f, x):
            new = (1 - spread_leak) * f + spread_leak * (x @ U.T)
            return new, (f, new)

        _, (before, f) = lax.scan(body, jnp.zeros_like(h0), xs)
        cell = jaxrnn.Cell(jnp.zeros((H, 0)), W, b, leak)
        drive = before @ W.T + noise
        return f + jaxrnn.unroll(cell, xs[..., :0], h0, drive=drive)[1]

    compare(converted, wilson_cowan, *parameters_of(leak))


# Form × option × transformation ---------------------------------------------------------------


def loss_of(run, known):
    return lambda arrays: scalar(run(arrays, known))


def inner(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def gradient(run, arrays, tangents, known):
    return jax.grad(loss_of(run, known))(arrays)


def pushed(run, arrays, tangents, known):
    return jax.jvp(lambda arrays: run(arrays, known), (arrays,), (tangents,))


def mapped_over_data(run, arrays, tangents, known):
    axes = {"cell": None, "h0": 0, "xs": 1, "ids": 1, "drive": 1, "lengths": 0, "mask": 1}
    one = lambda arrays, known: gradient(run, arrays, tangents, known)  # noqa: E731
    return jax.vmap(one, [{name: axes[name] for name in given} for given in (arrays, known)])(
        arrays, known
    )


def mapped_over_parameters(run, arrays, tangents, known):
    cells = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x, 0.5 * x]), arrays["cell"])
    one = lambda cell: gradient(run, arrays | {"cell": cell}, tangents, known)  # noqa: E731
    return jax.vmap(one)(cells)


def forward_over_reverse(run, arrays, tangents, known):
    return jax.jvp(jax.grad(loss_of(run, known)), (arrays,), (tangents,))[1]


def reverse_over_forward(run, arrays, tangents, known):
    loss = loss_of(run, known)
    return jax.grad(lambda arrays: jax.jvp(loss, (arrays,), (tangents,))[1])(arrays)


def third_order(run, arrays, tangents, known):
    def curvature(arrays):
        return inner(forward_over_reverse(run, arrays, tangents, known), tangents)

    return jax.grad(curvature)(arrays)


# name -> (what is compared, the order of the derivatives).
TRANSFORMATIONS = {
    "grad": (gradient, 1),
    "jvp": (pushed, 1),
    "vmap of grad over data": (mapped_over_data, 1),
    "vmap of grad over parameters": (mapped_over_parameters, 1),
    "forward over reverse": (forward_over_reverse, 2),
    "reverse over forward": (reverse_over_forward, 2),
    "third order": (third_order, 3),
}
FACTORS = {
    "transformation": list(TRANSFORMATIONS),
    "kind": [f"{form} {leak}".strip() for form in BOTH for leak in LEAKS],
    "option": ["", "truncate=3", "window=2", "window=3", "checkpoint_every=3",
               "checkpoint_every=sqrt"],
    "activation": ["tanh", "relu", "sigmoid", "sin"],
    "invalid": ["", "lengths", "mask"],
    "inputs": ["floats", "ids", "no inputs"],
    "reverse": ["", "reverse"],
    "drive": ["", "drive"],
    "bias": ["bias", "no bias"],
    "implementation": ["", "associative"],
}  # fmt: skip
PAIRS = list(pairwise(FACTORS))


def data_of(kind, activation, bias, inputs, drive, invalid, **_):
    """What is differentiated, by name; and what is not."""
    form, _, leak = kind.partition(" ")
    activation = jnp.sin if activation == "sin" else activation
    params, xs, h0, _ = network(form, leak, activation, bias)
    arrays, known = {"cell": params.cell, "h0": h0}, {}
    if inputs == "ids":
        known["ids"] = jaxrnn.Ids(jnp.asarray(np.random.default_rng(4).integers(D, size=(T, B))))
    else:
        arrays["xs"] = xs
    if inputs == "no inputs":
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
        known = dict(known)
        if "lengths" in known:
            known["valid"] = up_to(known.pop("lengths"))
        elif "mask" in known:
            known["valid"] = known.pop("mask")
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

    def find(run, padding):
        # What invalid steps hold reaches nothing, and the naive scan never meets it.
        given = with_padding(arrays, invalid, padding)
        return jax.jit(partial(transform, run))(given, tangents, known)

    found, expected = find(ours(**how), jnp.nan), find(by_naive_scan(**how), 0.0)
    # Every order multiplies the number of summed terms by about T.
    assert_close(found, expected, FIRST * T ** (order - 1))


def words(how):
    return ", ".join(filter(None, how.values()))


def test_every_pair_is_among_the_cases():
    met = set().union(*(pairs_of(how.values()) for how in PAIRS))
    sizes = [len(values) for values in FACTORS.values()]
    assert len(met) == sum(a * b for a, b in itertools.combinations(sizes, 2))
    assert len(PAIRS) < 1.5 * sizes[0] * sizes[1]


@pytest.mark.parametrize("how", PAIRS, ids=words)
def test_equals_a_naive_scan(how):
    check(**how)


# name -> the factors that differ from the plain one.
FORMS = {kind: {"kind": kind} for kind in FACTORS["kind"]}
FORMS |= {
    f"voltage scalar {phi}": {"kind": "voltage scalar", "activation": phi}
    for phi in ("relu", "sin", "sigmoid")
}
VARIANTS = {
    "plain": {},
    "lengths": {"invalid": "lengths"},
    "mask": {"invalid": "mask"},
    "reverse": {"reverse": "reverse"},
    "drive": {"drive": "drive"},
    "ids": {"inputs": "ids"},
    "window=3 with mask": {"option": "window=3", "invalid": "mask"},
    "no bias": {"bias": "no bias"},
    "no inputs": {"inputs": "no inputs"},
    "associative": {"implementation": "associative"},
}
VARIANTS |= {option: {"option": option} for option in FACTORS["option"] if option}


@pytest.mark.full
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", FORMS)
def test_the_whole_product_equals_a_naive_scan(form, variant, transformation):
    plain = {name: values[0] for name, values in FACTORS.items()}
    check(**plain | FORMS[form] | VARIANTS[variant] | {"transformation": transformation})


# Long sequences -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["voltage", "voltage per unit", "rate scalar"])
def test_checkpoints_at_a_prime_length_change_no_gradient(kind):
    time, size = 10_007, 2
    form, _, leak = kind.partition(" ")
    params, xs, h0, _ = network(form, T=time, batch=(1,), D=1, H=size)
    leak = {"": None, "scalar": jnp.asarray(0.6), "per unit": jnp.asarray([0.2, 1.0])}[leak]
    cell = dataclasses.replace(params.cell, leak=leak)

    def gradients(**how):
        def loss(cell, xs, h0):
            h_last, hs = jaxrnn.unroll(cell, xs, h0, **how)
            return jnp.sum(hs**2) + jnp.sum(h_last)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(cell, xs, h0)

    # Sums of time terms, in another order.
    eps = float(jnp.finfo(jnp.float64).eps)
    assert_close(gradients(checkpoint_every="sqrt"), gradients(), time * eps)


# Stacks ---------------------------------------------------------------------------------------


def layer(seed, D, H, **how):
    return random_case(seed, D=D, H=H, **how)[0].cell


def stack(*kinds):
    """A layer of each kind; sigmoid is 1/2 at 0, and so shows what padding becomes."""
    how = {
        "voltage": dict(form="voltage", activation="sigmoid"),
        "leaky voltage": dict(form="voltage", leak=jnp.linspace(0, 1, H)),
        "rate": dict(leak=jnp.asarray(0.4)),
    }
    sizes = [D] + [H] * len(kinds)
    return tuple(layer(n, sizes[n], H, **how[kind]) for n, kind in enumerate(kinds))


def naive_outputs(cell, xs, h0, valid, **how):
    h_last, hs = naive(cell, xs, h0, valid=valid, **how)
    return h_last, jnp.where(jnp.asarray(valid)[..., None], g(cell, hs), 0)


def naive_layers(cells, xs, h0, valid, **how):
    last, y = [], xs
    for each, h in zip(cells, h0, strict=True):
        h, y = naive_both(each, y, h, valid) if isinstance(each, tuple) else naive_outputs(
            each, y, h, valid, **how
        )  # fmt: skip
        last.append(h)
    return tuple(last), y


def naive_both(cells, xs, h0, valid):
    last, ys = zip(
        naive_outputs(cells[0], xs, h0[0], valid),
        naive_outputs(cells[1], xs, h0[1], valid, reverse=True),
        strict=True,
    )
    return last, jnp.concatenate(ys, -1)


STACKS = {
    "voltage over voltage": ("voltage", "leaky voltage"),
    "rate over voltage": ("voltage", "rate"),
    "voltage over rate over voltage": ("leaky voltage", "rate", "voltage"),
}


def first_states(count):
    return tuple(weights((B, H), 20 + n) for n in range(count))


@pytest.mark.parametrize("kinds", STACKS.values(), ids=STACKS)
def test_layers_hand_up_outputs_and_return_states_last(kinds):
    cells, xs, h0 = stack(*kinds), weights((T, B, D)), first_states(len(kinds))
    valid = up_to(LENGTHS)

    def ours(cells, xs, h0):
        return jaxrnn.unroll_layers(cells, xs, h0, lengths=LENGTHS)

    compare(ours, lambda *args: naive_layers(*args, valid), cells, xs, h0)
    _, ys = ours(cells, xs, h0)
    assert not np.any(np.where(valid[..., None], 0, ys))


@pytest.mark.parametrize("how", [{"lengths": LENGTHS}, {"mask": GAPS}], ids=["lengths", "mask"])
def test_two_directions_of_voltage_cells(how):
    (forward, _), (backward, _) = stack("voltage", "rate"), stack("voltage", "rate")
    backward = dataclasses.replace(backward, activation="tanh", leak=jnp.asarray(0.3))
    xs, h0 = weights((T, B, D)), first_states(2)
    valid = up_to(LENGTHS) if "lengths" in how else jnp.asarray(GAPS)

    def ours(cells, xs, h0):
        return jaxrnn.bidirectional(*cells, xs, h0, **how)

    compare(ours, lambda *args: naive_both(*args, valid), (forward, backward), xs, h0)
    _, ys = ours((forward, backward), xs, h0)
    assert not np.any(np.where(valid[..., None], 0, ys))


def test_one_cell_as_layers_returns_outputs():
    (cell,), xs = stack("voltage"), weights((T, B, D))
    h_last, hs = jaxrnn.unroll(cell, xs, lengths=LENGTHS)
    found = jaxrnn.unroll_layers(cell, xs, lengths=LENGTHS)
    valid = up_to(LENGTHS)[..., None]
    assert_close(found, (h_last, jnp.where(valid, jax.nn.sigmoid(hs), 0)))


def test_a_residual_adds_outputs():
    cells, xs, h0 = stack("voltage", "leaky voltage"), weights((T, B, D)), first_states(2)

    def ours(cells, xs, h0):
        return jaxrnn.unroll_layers(cells, xs, h0, residual=True, lengths=LENGTHS)

    def by_hand(cells, xs, h0):
        first, y = naive_outputs(cells[0], xs, h0[0], up_to(LENGTHS))
        second, z = naive_outputs(cells[1], y, h0[1], up_to(LENGTHS))
        return (first, second), y + z

    compare(ours, by_hand, cells, xs, h0)


# The loss -------------------------------------------------------------------------------------


def cross_entropy(readout, ys, targets):
    logits = ys @ readout.V.T
    logits += jnp.broadcast_to(readout.c, logits.shape)
    log_likelihood = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_likelihood, targets[..., None], axis=-1)[..., 0]


def check_loss(cell, naive_run, h0, readout_size, **how):
    """loss_and_grads with lengths against a naive network's loss."""
    readout = jaxrnn.Readout(weights((K, readout_size), 30), weights((K,), 31))
    params, xs = jaxrnn.Params(cell, readout), weights((T, B, D))
    targets = jnp.asarray(np.random.default_rng(6).integers(K, size=(T, B)))
    valid = up_to(LENGTHS)

    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def expected(params, h0):
        h_last, ys = naive_run(params.cell, xs, h0, valid)
        each = cross_entropy(params.readout, ys, targets)
        return jnp.sum(jnp.where(valid, each, 0)), h_last

    (loss, h_last), (d_params, d_h0) = jax.jit(expected)(params, h0)
    padded = jnp.where(valid[..., None], xs, jnp.nan)
    found, gradients = jaxrnn.loss_and_grads(params, padded, targets, h0=h0, lengths=LENGTHS, **how)
    assert_close(
        (found, gradients.params, gradients.h0, gradients.h_last), (loss, d_params, d_h0, h_last)
    )


LOSS_OPTIONS = [{}, {"checkpoint_every": 3}, {"checkpoint_every": 3, "truncate": 3}, {"window": 2}]


@pytest.mark.parametrize("how", LOSS_OPTIONS, ids=str)
def test_the_loss_of_a_stack_with_voltages(how):
    cells = stack("leaky voltage", "rate", "voltage")
    options = {k: v for k, v in how.items() if k != "checkpoint_every"}
    check_loss(cells, partial(naive_layers, **options), first_states(3), H, **how)


@pytest.mark.parametrize("how", LOSS_OPTIONS[1:], ids=str)
def test_the_loss_of_one_voltage_layer(how):
    cell = stack("leaky voltage")[0]
    options = {k: v for k, v in how.items() if k != "checkpoint_every"}
    check_loss(cell, partial(naive_outputs, **options), first_states(1)[0], H, **how)


@pytest.mark.parametrize("how", [{"checkpoint_every": 3}], ids=str)
def test_the_loss_of_voltages_in_two_directions(how):
    pair = stack("voltage")[0], stack("leaky voltage")[0]
    cells = (pair, layer(9, 2 * H, H, form="voltage"))
    h0 = (first_states(2), weights((B, H), 22))
    check_loss(cells, naive_layers, h0, H, **how)


# Half precision -------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "leak"), [
    ("rate", "scalar"), ("voltage", ""), ("voltage", "scalar"), ("voltage", "per unit"),
])  # fmt: skip
def test_bfloat16_gradients_are_near_those_of_the_same_numbers(form, leak):
    params, xs, h0, _ = network(form, leak, T=64, batch=(8,), dtype=jnp.bfloat16)

    def gradients(unroll, *args):
        def loss(*args):
            return jnp.sum(jnp.sin(unroll(*args)[1].astype(jnp.float64)))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*args)

    args = (params.cell, xs, h0)
    found = gradients(jaxrnn.unroll, *args)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    expected = gradients(naive, *jax.tree.map(lambda x: x.astype(jnp.float64), args))
    # Of α = 0 every step adds the same rounded cotangent: those errors do not average out.
    assert_close(found[0].leak, expected[0].leak, 5e-2)
    found, expected = (
        (dataclasses.replace(cell, leak=None), *rest) for cell, *rest in (found, expected)
    )
    assert_close(found, expected, 2e-2)
    hs = jaxrnn.unroll(*args)[1]
    by_hand = jaxrnn.bptt(*args, hs, jnp.cos(hs.astype(jnp.float32)).astype(hs.dtype))
    # Cotangents are rounded as well here.
    assert_close(by_hand.cell.W, expected[0].W, 2e-2)


@pytest.mark.parametrize("leak", ["scalar", "per unit"])
def test_sums_of_4096_ones_in_bfloat16_do_not_stop_at_256(leak):
    time = batch = 64
    ones = jnp.ones(2) if leak == "per unit" else jnp.ones(())
    U, W, b = jnp.ones((2, 1)), jnp.zeros((2, 2)), jnp.zeros(2)
    cell = jaxrnn.Cell(U, W, b, ones, form="voltage")
    # h_t = drive_t + x_t = t: a_t − h_{t−1} is 1, and so is dL/da_t.
    steps = jnp.arange(time, dtype=jnp.float64)[:, None, None]
    drive = jnp.broadcast_to(steps, (time, batch, 2))
    given = (cell, jnp.ones((time, batch, 1)), jnp.zeros((batch, 2)), drive)
    cell, xs, h0, drive = jax.tree.map(lambda x: x.astype(jnp.bfloat16), given)

    @jax.grad
    def by_jax(cell):
        return jnp.sum(jaxrnn.unroll(cell, xs, h0, drive=drive)[1].astype(jnp.float32))

    _, hs = jaxrnn.unroll(cell, xs, h0, drive=drive)
    by_hand = jaxrnn.bptt(cell, xs, h0, hs, jnp.ones_like(hs), drive=drive).cell
    for found in (by_jax(cell), by_hand):
        assert found.b.dtype == jnp.bfloat16
        # 4,096 is a number of bfloat16, of which every term and every sum here is one in float32.
        np.testing.assert_array_equal(found.b.astype(jnp.float64), 4096)
        np.testing.assert_array_equal(found.U.astype(jnp.float64), 4096)
        expected = 2 * 4096 if leak == "scalar" else 4096
        np.testing.assert_array_equal(found.leak.astype(jnp.float64), expected)


# The face -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mosaic_gpu", "pallas_tpu"])
def test_kernels_refuse_the_voltage_form_by_name(name):
    params, xs, h0, targets = network("voltage", dtype=jnp.float32, H=128, batch=(8,))
    hs = jnp.zeros((T, 8, 128), jnp.float32)
    calls = [
        lambda how: jaxrnn.unroll(params.cell, xs, h0, **how),
        lambda how: jaxrnn.bptt(params.cell, xs, h0, hs, hs, **how),
        lambda how: jaxrnn.loss_and_grads(params, xs, targets, h0=h0, **how),
        lambda how: jaxrnn.unroll_layers((params.cell,), xs, (h0,), **how),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="voltage"):
            call({"implementation": name})


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", jnp.sin])
def test_outputs_are_the_activation_of_voltages_and_rates_themselves(activation):
    params, *_ = network("voltage", activation=activation)
    hs = weights((T, B, H))
    assert_close(jaxrnn.outputs(params.cell, hs), phi_of(params.cell)(hs))
    rate = dataclasses.replace(params.cell, form="rate")
    np.testing.assert_array_equal(jaxrnn.outputs(rate, hs), hs)


@pytest.mark.parametrize(("leak", "bias"), ONE_OF_EACH)
def test_steps_of_voltages_one_by_one_are_the_unroll(leak, bias):
    params, xs, h0, _ = network("voltage", leak, "sigmoid", bias)
    h, hs = h0, []
    for x in xs:
        h = jaxrnn.step(params.cell, x, h)
        hs.append(h)
    assert_close((h, jnp.stack(hs)), jax.jit(naive)(params.cell, xs, h0))


def test_without_bias_no_gradient_of_one():
    params, xs, h0, targets = network("rate", "scalar", bias="no bias")
    _, hs = jaxrnn.unroll(params.cell, xs, h0)
    found = jaxrnn.bptt(params.cell, xs, h0, hs, hs).cell
    terms = textbook.contributions(params, xs, targets)
    for cell in (found, terms):
        assert cell.b is None
        assert jax.tree.structure(cell) == jax.tree.structure(params.cell)


@pytest.mark.parametrize("form", BOTH)
def test_networks_without_inputs(form):
    params, xs, h0, targets = network(form, "per unit", "sigmoid")
    cell = dataclasses.replace(params.cell, U=params.cell.U[:, :0])
    params, xs = dataclasses.replace(params, cell=cell), xs[..., :0]
    dhs, dh_last = weights((T, B, H), 1), weights((B, H), 2)

    @jax.jit
    def expected(cell, xs, h0):
        seen, pull = jax.vjp(naive, cell, xs, h0)
        return seen, pull((dh_last, dhs))

    seen, pulled = expected(cell, xs, h0)
    assert_close(jaxrnn.unroll(cell, xs, h0), seen)
    found = jaxrnn.bptt(cell, xs, h0, seen[1], dhs, dh_last=dh_last)
    assert_close((found.cell, found.xs, found.h0), pulled)
    mapped = jax.vmap(jaxrnn.unroll, (None, 1, 0), (0, 1))(cell, xs, h0)
    assert_close(mapped, seen)
    h_last, ys = jaxrnn.unroll_layers((cell, cell_above()), xs, (h0, None))
    assert_close(h_last[0], seen[0])
    assert ys.shape == (T, B, H)

    @partial(jax.value_and_grad, argnums=(0, 1))
    def loss(params, h0):
        ys = g(params.cell, naive(params.cell, xs, h0)[1])
        return jnp.sum(cross_entropy(params.readout, ys, targets))

    total, gradients = jaxrnn.loss_and_grads(params, xs, targets, h0=h0)
    assert_close((total, (gradients.params, gradients.h0)), jax.jit(loss)(params, h0))


def cell_above():
    return layer(3, H, H, form="voltage")


@pytest.mark.parametrize("form", BOTH)
def test_initial_cells_of_either_form(form):
    cell = jaxrnn.init_cell(jax.random.key(0), 0, H, form=form, dtype=jnp.float64)
    assert (cell.form, cell.U.shape, cell.W.shape) == (form, (H, 0), (H, H))
    assert np.all(np.isfinite(cell.W)) and np.any(cell.W)
    given = (jaxrnn.init_cell(jax.random.key(1), D, H, form=form, dtype=jnp.float64),
             weights((T, B, D)), weights((B, H)))  # fmt: skip
    assert_close(jaxrnn.unroll(*given), jax.jit(naive)(*given))


def test_the_rate_form_is_the_default():
    cell = jaxrnn.Cell(jnp.zeros((H, D)), jnp.zeros((H, H)), jnp.zeros(H))
    assert cell.form == "rate"
    assert jaxrnn.init_cell(jax.random.key(0), D, H).form == "rate"


def test_the_likeliest_ids_are_generated_from_outputs():
    params, *_ = network("voltage", "scalar", "sigmoid", D=K)
    cell, readout = params.cell, params.readout
    h, logits, expected = np.zeros((1, H)), None, []
    for n in range(8):
        drawn = n % 2 if n < 2 else int(np.argmax(logits))
        if n >= 2:
            expected.append(drawn)
        h, _ = naive(cell, jnp.eye(K)[drawn][None, None], h)
        logits = jax.nn.sigmoid(h[0]) @ readout.V.T + readout.c
    found = jaxrnn.generate(params, jax.random.key(1), jnp.array([0, 1]), 6, temperature=0)
    assert found.tolist() == expected


def test_an_update_descends_the_loss_of_outputs():
    params, *_ = network("voltage", "scalar", "sigmoid", D=K)
    generator = np.random.default_rng(0)
    inputs, targets = generator.integers(0, K, (T, B)), generator.integers(0, K, (T, B))

    @partial(jax.value_and_grad)
    def mean_loss(params):
        xs = jax.nn.one_hot(inputs, K, dtype=jnp.float64)
        ys = g(params.cell, naive(params.cell, xs, jnp.zeros((B, H)))[1])
        return jnp.mean(cross_entropy(params.readout, ys, jnp.asarray(targets)))

    loss, gradient = jax.jit(mean_loss)(params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    # optax multiplies floats by its integer step counts.
    with jax.numpy_dtype_promotion("standard"):
        state = train.init_state(params, optax.sgd(0.1), B)
        new, found = train.make_update(optax.sgd(0.1))(state, inputs, targets)
    assert_close((found, new.params), (loss, expected))


# λ --------------------------------------------------------------------------------------------

MASKS = {
    "mask": {"mask": GAPS},
    "lengths in reverse": {"lengths": LENGTHS, "reverse": True},
    "mask and truncate": {"mask": GAPS, "truncate": 3},
    "mask and window": {"mask": GAPS, "window": 3},
}


@pytest.mark.parametrize("how", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("form", BOTH)
def test_adjoints_are_gradients_of_what_is_added_to_a_state(form, how):
    params, xs, h0, _ = network(form, "per unit", "sigmoid")
    valid = jnp.asarray(how["mask"]) if "mask" in how else up_to(how["lengths"])
    options = {k: v for k, v in how.items() if k not in ("mask", "lengths")}

    @partial(jax.jit)
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def expected(push, drive):
        states = naive(params.cell, xs, h0, valid=valid, push=push, drive=drive, **options)
        return scalar(states), states

    (_, (h_last, hs)), wanted = expected(jnp.zeros((T, B, H)), jnp.zeros((T, B, H)))
    dhs = jnp.where(valid[..., None], 3 * jnp.cos(3 * hs), jnp.nan)
    xs = jnp.where(valid[..., None], xs, jnp.nan)
    found = jaxrnn.bptt(params.cell, xs, h0, hs, dhs, dh_last=jnp.exp(h_last), **how)
    assert_close((found.adjoint, found.delta), wanted)
    assert not np.any(np.where(valid[..., None], 0, found.adjoint))


DIFFERENTIATED = {
    "": {}, "mask": {"mask": GAPS}, "truncate": {"truncate": 3}, "window": {"window": 3},
}  # fmt: skip


@pytest.mark.parametrize("how", DIFFERENTIATED.values(), ids=DIFFERENTIATED)
@pytest.mark.parametrize("form", BOTH)
def test_all_that_bptt_returns_is_differentiable(form, how):
    params, xs, h0, _ = network(form, "per unit", "sigmoid")
    valid = jnp.asarray(how.get("mask", np.ones((T, B), bool)))
    options = {k: v for k, v in how.items() if k != "mask"}
    known = valid[..., None]

    def by_hand(cell, xs, h0, dhs):
        _, hs = jaxrnn.unroll(cell, xs, h0, **how)
        found = jaxrnn.bptt(cell, xs, h0, hs, dhs, **how)
        return jax.tree.leaves(found)

    def by_jax(cell, xs, h0, dhs):
        def states(cell, xs, h0, drive, push):
            return naive(cell, xs, h0, drive=drive, push=push, valid=valid, **options)[1]

        nothing = jnp.zeros((T, B, H))
        _, pull = jax.vjp(states, cell, xs, h0, nothing, nothing)
        return jax.tree.leaves(pull(dhs))

    def derivatives(f):
        def number(*args):
            return sum(jnp.sum(jnp.sin(x + n)) for n, x in enumerate(f(*args)))

        args = params.cell, jnp.where(known, xs, 0), h0, jnp.where(known, weights((T, B, H)), 0)
        tangents = jax.tree.map(jnp.cos, args)
        moved = jax.jvp(number, args, tangents)[1]
        # Of dhs alone the map is transposed once more; else JAX differentiates it.
        of_dhs = jnp.where(known, jax.grad(number, 3)(*args), 0)
        dcell, _, dh0 = jax.grad(number, (0, 1, 2))(*args)
        return dcell, dh0, of_dhs, moved

    found, expected = (jax.jit(derivatives, static_argnums=0)(f) for f in (by_hand, by_jax))
    assert_close(found, expected)
