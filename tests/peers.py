"""The layers that matrix.py asks: each as `unroll(cell, xs, h0)`, in its library's own words.

A library is imported where its layer is first called.
"""

import os
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matrix
import numpy as np
from jax import lax

import jaxrnn


def scan_with_custom_vjp(cell, xs, h0):
    """The BPTT that people write: a scan, and a backward scan as its `jax.custom_vjp`."""

    @jax.custom_vjp
    def states(U, W, b, xs, h0):
        def body(h, x):
            h = jnp.tanh(x @ U.T + h @ W.T + jnp.broadcast_to(b, h.shape))
            return h, h

        return lax.scan(body, h0, xs)[1]

    def forward(U, W, b, xs, h0):
        hs = states(U, W, b, xs, h0)
        return hs, (U, W, xs, h0, hs)

    def backward(kept, g):
        U, W, xs, h0, hs = kept

        def body(from_later, now):
            g, h = now
            delta = (g + from_later) * (1 - h * h)
            return delta @ W, delta

        d_h0, deltas = lax.scan(body, jnp.zeros_like(h0), (g, hs), reverse=True)
        h_prev = jnp.concatenate([h0[None], hs])[:-1]
        steps = tuple(range(xs.ndim - 1))
        dU, dW = (jnp.tensordot(deltas, x, (steps, steps)) for x in (xs, h_prev))
        return dU, dW, jnp.sum(deltas, steps), deltas @ U, d_h0

    states.defvjp(forward, backward)
    hs = states(cell.U, cell.W, cell.b, xs, h0)
    return hs[-1] if hs.shape[0] else h0, hs


def flax_nnx(cell, xs, h0, lengths=None):
    from flax import nnx

    # rngs=False: without a generator, so that nothing is drawn; the first state is given.
    inner = nnx.SimpleCell(*cell.U.mT.shape, dtype=xs.dtype, param_dtype=xs.dtype, rngs=nnx.Rngs(0))
    graph, params = nnx.split(nnx.RNN(inner, time_major=True, return_carry=True, rngs=False))
    dense_i, dense_h = params["cell"]["dense_i"], params["cell"]["dense_h"]
    dense_i["kernel"][...], dense_i["bias"][...] = cell.U.mT, cell.b
    dense_h["kernel"][...] = cell.W.mT
    return nnx.merge(graph, params)(xs, initial_carry=h0, seq_lengths=lengths)


def flax_linen(cell, xs, h0, lengths=None):
    from flax import linen as nn

    params = {"i": {"kernel": cell.U.mT, "bias": cell.b}, "h": {"kernel": cell.W.mT}}
    rnn = nn.RNN(nn.SimpleCell(cell.b.size), time_major=True, return_carry=True)
    return rnn.apply({"params": {"cell": params}}, xs, initial_carry=h0, seq_lengths=lengths)


def haiku(cell, xs, h0):
    import haiku as hk

    @hk.without_apply_rng
    @hk.transform
    def forward(xs, h0):
        hs, h_last = hk.dynamic_unroll(hk.VanillaRNN(cell.b.size, double_bias=False), xs, h0)
        return h_last, hs

    params = {"w": cell.U.mT, "b": cell.b}, {"w": cell.W.mT}
    names = "vanilla_rnn/linear", "vanilla_rnn/linear_1"
    return forward.apply(dict(zip(names, params, strict=True)), xs, h0)


@cache
def _keras_layer(input_size, hidden_size, dtype):
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    # A layer's variables must hold arrays, also when it is built while JAX traces.
    with jax.ensure_compile_time_eval():
        rnn = keras.layers.SimpleRNN(
            hidden_size, return_sequences=True, return_state=True, dtype=dtype
        )
        rnn.build((None, None, input_size))
    return rnn


def keras(cell, xs, h0, lengths=None, mask=None):
    if xs.ndim == 2:
        # One sequence under vmap: the layer needs a batch.
        h_last, hs = keras(cell, xs[:, None], h0[None])
        return h_last[0], hs[:, 0]
    if lengths is not None:
        mask = matrix.up_to(lengths)
    # Keras has the batch in front.
    how = {} if mask is None else {"mask": jnp.asarray(mask).T}
    rnn = _keras_layer(*cell.U.mT.shape, str(xs.dtype))
    others = [variable.value for variable in rnn.non_trainable_variables]
    (hs, h_last), _ = rnn.stateless_call(
        [cell.U.mT, cell.W.mT, cell.b], others, jnp.swapaxes(xs, 0, 1), initial_state=h0, **how
    )
    return h_last, jnp.swapaxes(hs, 0, 1)


class Row(NamedTuple):
    """One layer.

    Args:
      name: how the table calls it.
      packages: the distributions whose versions are recorded.
      find: `find(name, args, tangents)`, what that transformation makes of it.
      has: `has(name, transformation)`, whether that makes sense for it; always by default.
      dtype: of the numbers it is given.
      activation: "tanh", or what the library has instead.
      promotion: which dtypes may meet, as the library needs it.
      ranks: likewise for numbers of axes.
    """

    name: str
    packages: tuple[str, ...]
    find: Callable[..., Any]
    has: Callable[..., bool] | None = None
    dtype: str = "float32"
    activation: str = "tanh"
    promotion: str = "standard"
    ranks: str = "allow"

    def version(self):
        return ", ".join(f"{name} {version(name)}" for name in self.packages)


def _jax_row(name, package, unroll, options=(), **how):
    def has(_, asked):
        return asked.needs is None or asked.needs in options

    return Row(name, (package,), lambda which, *a: matrix.ask(which, unroll, *a), has, **how)


# torch has its own transformations: `torch.func`, and autograd for what that cannot do. Arrays
# are (U, W, b, xs, h0), the leaves of what the others get.

EACH = (0, 1, 2, 3, 4)


@cache
def _torch_layer(input_size, hidden_size):
    import torch

    return torch.nn.RNN(input_size, hidden_size, device="meta")


def torch_rnn(U, W, b, xs, h0):
    import torch

    rnn = _torch_layer(matrix.D, matrix.H)
    values = dict(zip(("weight_ih_l0", "weight_hh_l0", "bias_ih_l0"), (U, W, b), strict=True))
    values["bias_hh_l0"] = torch.zeros_like(b)
    hs, h_last = torch.func.functional_call(rnn, values, (xs, h0[None]))
    if isinstance(hs, torch.nn.utils.rnn.PackedSequence):
        hs = torch.nn.utils.rnn.pad_packed_sequence(hs, total_length=matrix.T)[0]
    return h_last[0], hs


def _torch_transformations():
    import torch
    from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
    from torch.utils.checkpoint import checkpoint

    f = torch_rnn

    def scalar(f):
        def loss(*args):
            h_last, hs = f(*args)
            return torch.sin(3 * hs).sum() + torch.exp(h_last).sum()

        return loss

    loss, gradient = scalar(f), grad(scalar(f), EACH)

    def dot(a, b):
        return sum((x * y).sum() for x, y in zip(a, b, strict=True))

    def members(a):
        return *(torch.stack([x, 0.9 * x, -x]) for x in a[:3]), *a[3:]

    many = (0, 0, 0, None, None)

    def over_data(axis, a, d):
        *cell, xs, h0 = a

        def one(x, h):
            return gradient(*cell, x, h)

        def mapped(U, W, b, xs, h0):
            axes = (None, None, None, axis, 0)
            return vmap(f, axes, (0, axis))(U, W, b, xs.movedim(1, axis), h0)

        return grad(scalar(mapped), EACH)(*a), vmap(one, (axis, 0))(xs.movedim(1, axis), h0)

    def value_and_grad(a, d):
        found, value = grad_and_value(loss, EACH)(*a)
        return value, found

    def pulled(a, d):
        out, pull = vjp(f, *a)
        return out, pull(tuple(x.cos() for x in out))

    def linear(a, d):
        out, push = linearize(f, *a)
        return out, push(*d)

    def forward_over_reverse(*a, d):
        return jvp(gradient, a, d)[1]

    def forward_over_forward(*a, d):
        return jvp(lambda *a: jvp(loss, a, d)[1], a, d)[1]

    def reverse_over_reverse(*a, d):
        return grad(lambda *a: dot(gradient(*a), d), EACH)(*a)

    def third(product, outer, a, d):
        def curvature(*a):
            found = product(*a, d=d)
            return dot(found, d) if isinstance(found, tuple) else found

        return jvp(curvature, a, d) if outer is jvp else grad(curvature, EACH)(*a)

    def by_autograd(loss, a, d=None):
        a = [x.clone().requires_grad_() for x in a]
        found = torch.autograd.grad(loss(*a), a, create_graph=d is not None)
        return (found, torch.autograd.grad(found, a, d)) if d is not None else found

    recomputed = scalar(lambda *a: checkpoint(f, *a, use_reentrant=False))

    def padded(lengths, padding, derivative, a, d):
        there = torch.as_tensor(matrix.up_to(lengths)[..., None])
        lengths = torch.as_tensor(lengths)

        def on_valid_steps(U, W, b, xs, h0):
            pack = torch.nn.utils.rnn.pack_padded_sequence
            h_last, hs = f(U, W, b, pack(xs, lengths, enforce_sorted=False), h0)
            return h_last, torch.where(there, hs, 0)

        a = (*a[:3], torch.where(there, a[3], padding), a[4])
        if derivative == "grad":
            return by_autograd(scalar(on_valid_steps), a)
        return jvp(on_valid_steps, a, d)

    def compiled(a, d):
        rnn = torch.nn.RNN(matrix.D, matrix.H)
        for parameter, value in zip(rnn.parameters(), (*a[:3], 0 * a[2]), strict=True):
            parameter.data = value
        # Without this option torch leaves the layer out.
        with torch._dynamo.config.patch(allow_rnn=True):
            hs, h_last = torch.compile(rnn, fullgraph=True)(a[3], a[4][None])
        return h_last[0].detach(), hs.detach()

    def exported(a, d):
        class Layer(torch.nn.Module):
            def forward(self, *a):
                return f(*a)

        time, batch = torch.export.Dim("T"), torch.export.Dim("B")
        shapes = ((None, None, None, {0: time, 1: batch}, {0: batch}),)
        program = torch.export.export(Layer(), a, dynamic_shapes=shapes)
        xs, h0 = a[3][: matrix.T - 2, : matrix.B - 1], a[4][: matrix.B - 1]
        return program.module()(*a[:3], xs, h0)

    def no_steps(derivative, a, d):
        a, d = ((*x[:3], x[3][:0], x[4]) for x in (a, d))
        return gradient(*a) if derivative == "grad" else jvp(f, a, d)

    def nested(inner_axes, outer_axes, inner_out, outer_out, a):
        both = vmap(vmap(f, inner_axes, inner_out), outer_axes, outer_out)
        return grad(scalar(both), EACH)(*members(a))

    data = (None, None, None, 1, 0)
    products = {
        "forward over reverse": forward_over_reverse,
        "reverse over forward": lambda *a, d: grad(lambda *a: jvp(loss, a, d)[1], EACH)(*a),
        "reverse over reverse": reverse_over_reverse,
        "forward over forward": forward_over_forward,
    }
    found = {
        "jit": compiled,
        "vmap over parameters": lambda a, d: vmap(f, many)(*members(a)),
        "grad of vmap over parameters": lambda a, d: grad(scalar(vmap(f, many)), EACH)(*members(a)),
        "vmap of grad over parameters": lambda a, d: vmap(gradient, many)(*members(a)),
        "data inside parameters": lambda a, d: nested(data, many, (0, 1), 0, a),
        "parameters inside data": lambda a, d: nested(many, data, 0, (0, 1), a),
        "grad": lambda a, d: gradient(*a),
        "value_and_grad": value_and_grad,
        "vjp": pulled,
        "jacrev": lambda a, d: jacrev(f, EACH)(*a),
        "jvp": lambda a, d: jvp(f, a, d),
        "jacfwd": lambda a, d: jacfwd(f, EACH)(*a),
        "linearize": linear,
        "hessian": lambda a, d: hessian(loss, EACH)(*a),
        "checkpoint, no policy": lambda a, d: by_autograd(recomputed, a),
        "checkpoint, second order": lambda a, d: by_autograd(recomputed, a, d)[1],
        "export": exported,
        "no steps, grad": partial(no_steps, "grad"),
        "no steps, jvp": partial(no_steps, "jvp"),
    }
    for axis, where in enumerate(("first", "in place", "last")):
        found[f"vmap over data, {where}"] = partial(over_data, axis)
    for name, lengths, padding in (
        ("sequences of several lengths", matrix.LENGTHS, 0.0),
        ("sequences of length 0", matrix.EMPTY, 0.0),
        ("padding that holds NaN", matrix.LENGTHS, float("nan")),
    ):
        for derivative in ("grad", "jvp"):
            found[f"{name}, {derivative}"] = partial(padded, lengths, padding, derivative)
    for name, product in products.items():
        found[name] = lambda a, d, product=product: product(*a, d=d)
        found[f"forward over {name}"] = partial(third, product, jvp)
        found[f"reverse over {name}"] = partial(third, product, grad)
    return found


def _torch(name, args, tangents):
    import torch

    _torch_layer(matrix.D, matrix.H)  # Built where nothing is transformed: it draws weights.
    tensors = [tuple(torch.as_tensor(np.array(x)) for x in jax.tree.leaves(a))
               for a in (args, tangents)]  # fmt: skip
    found = _torch_transformations()[name](*tensors)
    return jax.tree.map(lambda x: x.detach().numpy(), found)


def _torch_has(name, _):
    return name in _torch_transformations()


OWN = {"dtype": "float64", "promotion": "strict", "ranks": "raise"}


def _rows():
    yield _jax_row("jaxrnn", "jaxrnn", jaxrnn.unroll, ("lengths", "mask"), **OWN)
    yield _jax_row("naive scan", "jax", matrix.naive, **OWN)
    yield _jax_row("scan with `custom_vjp`", "jax", scan_with_custom_vjp, **OWN)
    yield _jax_row("flax.nnx", "flax", flax_nnx, ("lengths",))
    yield _jax_row("flax.linen", "flax", flax_linen, ("lengths",))
    yield _jax_row("haiku", "dm-haiku", haiku, activation="relu")
    yield _jax_row("keras", "keras", keras, ("lengths", "mask"))
    yield Row("torch", ("torch",), _torch, _torch_has)


ROWS = {row.name: row for row in _rows()}
