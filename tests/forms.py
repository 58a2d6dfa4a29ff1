"""What tests of forms share: networks of every form, and a naive scan with every option."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from helpers import FUNCTIONS, TOLERANCE, assert_close, random_case, weights
from jax import lax

import jaxrnn

T, B, D, H, K = 7, 3, 3, 4, 3
LENGTHS = np.array([7, 0, 4])
GAPS = np.arange(T * B).reshape(T, B) % 4 != 1
LEAKS = {"": None, "scalar": 0.6, "per unit": [0.0, 0.3, 0.7, 1.0]}
FIRST = TOLERANCE["float64"]


# Custom forms ---------------------------------------------------------------------------------

MODRELU = jaxrnn.Form(lambda a, h, bias: jnp.sign(a) * jax.nn.relu(jnp.abs(a) + bias))


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


# Networks -------------------------------------------------------------------------------------


def network(kind="rate", activation="tanh", bias="bias", dtype=jnp.float64, **sizes):
    """Params, xs, h0, targets. kind: of KINDS, or a built-in form with a leak of LEAKS."""
    if kind in KINDS:
        how = {"form": KINDS[kind][0], "parameters": parameters_of(kind, dtype)}
    else:
        form, _, leak = kind.partition(" ")
        leak = None if LEAKS[leak] is None else jnp.asarray(LEAKS[leak], dtype)
        how = {"form": form, "leak": leak, "activation": activation}
    sizes = {"T": T, "batch": (B,), "D": D, "H": H, "K": K} | sizes
    params, *rest = random_case(5, dtype=dtype, **sizes)
    b = None if bias == "no bias" else params.cell.b
    return dataclasses.replace(params, cell=dataclasses.replace(params.cell, b=b, **how)), *rest


def layer(seed, kind, D=D, dtype=jnp.float64, **how):
    """A cell of that kind that reads D inputs."""
    cell = network(kind, dtype=dtype)[0].cell
    U, W, b = (getattr(random_case(seed, D=D, H=H, dtype=dtype)[0].cell, n) for n in "UWb")
    return dataclasses.replace(cell, U=U, W=W, b=b, **how)


def stack(*kinds):
    """A layer of each kind; a sigmoid is 1/2 at 0, and so shows what padding becomes."""
    return tuple(
        layer(n, kind, H if n else D, activation="tanh" if n else "sigmoid")
        for n, kind in enumerate(kinds)
    )


def first_states(count):
    return tuple(weights((B, H), 20 + n) for n in range(count))


# The naive scan -------------------------------------------------------------------------------


def spread(x, like):
    return jnp.broadcast_to(x, like.shape)


def for_units(cell, like):
    return jax.tree.map(lambda x: spread(x, like), cell.parameters)


def phi_of(cell):
    phi = cell.activation
    return FUNCTIONS[phi] if isinstance(phi, str) else getattr(phi, "function", phi)


def f(cell, a, h):
    if isinstance(cell.form, jaxrnn.Form):
        return cell.form.update(a, h, for_units(cell, a))
    new = phi_of(cell)(a) if cell.form == "rate" else a
    if cell.leak is None:
        return new
    leak = spread(cell.leak, new)
    return (1 - leak) * h + leak * new


def g(cell, h):
    if not isinstance(cell.form, jaxrnn.Form):
        return phi_of(cell)(h) if cell.form == "voltage" else h
    return h if cell.form.output is None else cell.form.output(h, for_units(cell, h))


def up_to(lengths):
    lengths = jnp.asarray(lengths)
    return jnp.arange(T).reshape(T, *(1,) * lengths.ndim) < lengths[None]


def numbered(valid, reverse):
    """How many valid steps were read before each."""
    counts = jnp.cumsum(valid[::-1] if reverse else valid, axis=0)
    return (counts[::-1] if reverse else counts) - 1


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
    drive, push = (nothing if x is None else x for x in (drive, push))
    valid = jnp.ones(steps, bool) if valid is None else jnp.asarray(valid)
    number = numbered(valid, reverse)
    cut = jnp.zeros(steps, bool) if truncate is None else (number > 0) & (number % truncate == 0)

    def step(h, x, drive, push, cut):
        s = g(cell, jnp.where(cut, lax.stop_gradient(h), h))
        a = s @ cell.W.T + x @ cell.U.T + drive
        a = a if cell.b is None else a + spread(cell.b, a)
        return f(cell, a, h) + push

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


# Agreement ------------------------------------------------------------------------------------


def scalar(states):
    """A number in which every state counts, and each in another way."""
    h_last, hs = states
    each = sum(jnp.sum(jnp.sin(3 * h)) for h in jax.tree.leaves(hs))
    return each + sum(jnp.sum(jnp.exp(h)) for h in jax.tree.leaves(h_last))


def compare(ours, theirs, *args, tolerance=FIRST):
    """Values, and the gradients of all args."""

    def both(f):
        def loss(args):
            found = f(*args)
            return sum(jnp.sum(jnp.sin(3 * y)) for y in jax.tree.leaves(found)), found

        return jax.jit(jax.grad(loss, has_aux=True))(args)

    assert_close(both(ours), both(theirs), tolerance)


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
