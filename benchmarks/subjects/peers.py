"""The recurrent layers of other JAX libraries, each as its documentation uses it.

Each function imports its library and returns the subject; the tables' names are the
distribution's or the module's. Weights are kept in the library's own containers, so that its
own flattening is part of a call.
"""

import os
from functools import cache

import jax
import jax.numpy as jnp

from benchmarks.networks import Network
from benchmarks.side import NotOfferedError
from benchmarks.subjects import JaxSubject, of_activation
from benchmarks.subjects.naive import PHI


def flax_nnx(activation: str = "tanh") -> JaxSubject:
    """`nnx.RNN(nnx.SimpleCell)`, split into a graph and parameters, merged inside the function."""
    from flax import nnx

    def layer(input_size, hidden_size, dtype):
        rngs = nnx.Rngs(0)
        how = dict(dtype=dtype, param_dtype=dtype, activation_fn=PHI[activation])
        cell = nnx.SimpleCell(input_size, hidden_size, rngs=rngs, **how)
        return nnx.RNN(cell, time_major=True, rngs=False)

    @cache
    def graph(*sizes_and_dtype):
        return nnx.split(nnx.eval_shape(lambda: layer(*sizes_and_dtype)))[0]

    def load(U, W, b):
        U, W, b = map(jnp.asarray, (U, W, b))
        model = layer(*U.mT.shape, U.dtype)
        model.cell.dense_i.kernel[...] = U.mT
        model.cell.dense_i.bias[...] = b
        model.cell.dense_h.kernel[...] = W.mT
        return nnx.state(model, nnx.Param)

    def unroll(params, xs):
        kernel = params.cell.dense_i.kernel[...]
        model = nnx.merge(graph(*kernel.shape, kernel.dtype), params)
        # Without a carry of one's own, jax.grad fails: RNN would draw one from its generator.
        carry = jnp.zeros((xs.shape[1], kernel.shape[1]), kernel.dtype)
        return model(xs, initial_carry=carry)

    def unload(grads):
        cell = grads.cell
        return (
            cell.dense_i.kernel[...].mT,
            cell.dense_h.kernel[...].mT,
            cell.dense_i.bias[...],
        )

    of = of_activation(flax_nnx)
    return JaxSubject("flax.nnx", "flax", unroll, load, unload, activation=activation, of=of)


def flax_linen(activation: str = "tanh") -> JaxSubject:
    """`nn.RNN(nn.SimpleCell)`, applied."""
    from flax import linen as nn

    def load(U, W, b):
        U, W, b = map(jnp.asarray, (U, W, b))
        return {"params": {"cell": {"i": {"kernel": U.mT, "bias": b}, "h": {"kernel": W.mT}}}}

    def unroll(variables, xs):
        hidden_size = variables["params"]["cell"]["h"]["kernel"].shape[0]
        cell = nn.SimpleCell(hidden_size, activation_fn=PHI[activation])
        return nn.RNN(cell, time_major=True).apply(variables, xs)

    def unload(grads):
        cell = grads["params"]["cell"]
        return cell["i"]["kernel"].mT, cell["h"]["kernel"].mT, cell["i"]["bias"]

    of = of_activation(flax_linen)
    return JaxSubject("flax.linen", "flax", unroll, load, unload, activation=activation, of=of)


def haiku() -> JaxSubject:
    """`hk.dynamic_unroll` of `hk.VanillaRNN`, which is a relu network."""
    import haiku as hk

    inputs, recurrent = "vanilla_rnn/linear", "vanilla_rnn/linear_1"

    def load(U, W, b):
        U, W, b = map(jnp.asarray, (U, W, b))
        return {inputs: {"w": U.mT, "b": b}, recurrent: {"w": W.mT}}

    def unroll(params, xs):
        @hk.without_apply_rng
        @hk.transform
        def forward(xs):
            core = hk.VanillaRNN(params[recurrent]["w"].shape[0], double_bias=False)
            state = core.initial_state(xs.shape[1]).astype(params[recurrent]["w"].dtype)
            return hk.dynamic_unroll(core, xs, state)[0]

        return forward.apply(params, xs)

    def unload(grads):
        return grads[inputs]["w"].mT, grads[recurrent]["w"].mT, grads[inputs]["b"]

    def of(network):
        if network != Network("relu"):
            raise NotOfferedError("it is a relu network, of one layer without more")
        return subject

    subject = JaxSubject("haiku, relu", "dm-haiku", unroll, load, unload, activation="relu", of=of)
    return subject


def keras(activation: str = "tanh") -> JaxSubject:
    """`keras.layers.SimpleRNN` on the JAX backend, through `stateless_call`."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras as library

    if library.backend.backend() != "jax":
        raise RuntimeError("keras was imported before, with another backend than jax")

    @cache
    def layer(input_size, hidden_size, dtype):
        # A layer's variables must hold arrays, also when it is built while JAX traces.
        with jax.ensure_compile_time_eval():
            rnn = library.layers.SimpleRNN(
                hidden_size, activation=activation, return_sequences=True, dtype=dtype
            )
            rnn.build((None, None, input_size))
        return rnn

    def load(U, W, b):
        U, W, b = map(jnp.asarray, (U, W, b))
        return [U.mT, W.mT, b]

    def unroll(weights, xs):
        kernel = weights[0]
        rnn = layer(*kernel.shape, kernel.dtype.name)
        others = [variable.value for variable in rnn.non_trainable_variables]
        return rnn.stateless_call(weights, others, xs)[0]

    def unload(grads):
        return grads[0].mT, grads[1].mT, grads[2]

    of = of_activation(keras)
    return JaxSubject(
        "keras", "keras", unroll, load, unload, batch_first=True, activation=activation, of=of
    )


def equinox(activation: str = "tanh") -> JaxSubject:
    """A cell of two `eqx.nn.Linear`, scanned and mapped: equinox has no Elman cell.

    The scan and the map are those of the documentation of its `GRUCell`.
    """
    import equinox as eqx

    class Elman(eqx.Module):
        inputs: eqx.nn.Linear
        recurrent: eqx.nn.Linear

        def __init__(self, input_size, hidden_size, key):
            keys = jax.random.split(key)
            self.inputs = eqx.nn.Linear(input_size, hidden_size, key=keys[0])
            self.recurrent = eqx.nn.Linear(hidden_size, hidden_size, use_bias=False, key=keys[1])

        def __call__(self, xs):
            def step(h, x):
                h = PHI[activation](self.inputs(x) + self.recurrent(h))
                return h, h

            h0 = jnp.zeros(self.recurrent.out_features, self.recurrent.weight.dtype)
            return jax.lax.scan(step, h0, xs)[1]

    def arrays(model):
        return model.inputs.weight, model.recurrent.weight, model.inputs.bias

    def load(U, W, b):
        model = Elman(U.shape[1], U.shape[0], jax.random.key(0))
        return eqx.tree_at(arrays, model, tuple(map(jnp.asarray, (U, W, b))))

    def unroll(model, xs):
        return jax.vmap(model)(xs)

    of = of_activation(equinox)
    return JaxSubject(
        "equinox", "equinox", unroll, load, arrays, batch_first=True, activation=activation, of=of
    )
