"""The recurrent layers of other JAX libraries, each as its documentation uses it.

Weights are kept in the library's own containers, so that its own flattening is part of a call.
"""

import os
from functools import cache

import jax
import jax.numpy as jnp

from benchmarks.subjects import Layer, only_plain
from benchmarks.subjects.naive import PHI
from benchmarks.workloads import Network


def flax_nnx(network: Network) -> Layer:
    """`nnx.RNN(nnx.SimpleCell)`, split into a graph and parameters, merged inside the function."""
    from flax import nnx

    only_plain(network)

    def layer(input_size, hidden_size, dtype):
        rngs = nnx.Rngs(0)
        how = dict(dtype=dtype, param_dtype=dtype, activation_fn=PHI[network.activation])
        cell = nnx.SimpleCell(input_size, hidden_size, rngs=rngs, **how)
        return nnx.RNN(cell, time_major=True, rngs=False)

    @cache
    def graph(*sizes_and_dtype):
        return nnx.split(nnx.eval_shape(lambda: layer(*sizes_and_dtype)))[0]

    def load(U, W, b):
        model = layer(*U.mT.shape, U.dtype)
        model.cell.dense_i.kernel[...] = U.mT
        model.cell.dense_i.bias[...] = b
        model.cell.dense_h.kernel[...] = W.mT
        return nnx.state(model, nnx.Param)

    def unroll(params, xs):
        kernel = params.cell.dense_i.kernel[...]
        model = nnx.merge(graph(*kernel.shape, kernel.dtype), params)
        # Without a carry, jax.grad fails: RNN would draw one from its generator.
        carry = jnp.zeros((xs.shape[1], kernel.shape[1]), kernel.dtype)
        return model(xs, initial_carry=carry)

    def unload(grads):
        cell = grads.cell
        return cell.dense_i.kernel[...].mT, cell.dense_h.kernel[...].mT, cell.dense_i.bias[...]

    return Layer(unroll, load, unload)


def haiku(network: Network) -> Layer:
    """`hk.dynamic_unroll` of `hk.VanillaRNN`, which is a relu network."""
    import haiku as hk

    only_plain(network)
    inputs, recurrent = "vanilla_rnn/linear", "vanilla_rnn/linear_1"

    def load(U, W, b):
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

    return Layer(unroll, load, unload)


def keras(network: Network) -> Layer:
    """`keras.layers.SimpleRNN` on the JAX backend, through `stateless_call`."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras as library

    only_plain(network)
    if library.backend.backend() != "jax":
        raise RuntimeError("keras was imported before, with another backend than jax")

    @cache
    def layer(input_size, hidden_size, dtype):
        # A layer's variables must hold arrays, also when it is built while JAX traces.
        with jax.ensure_compile_time_eval():
            rnn = library.layers.SimpleRNN(
                hidden_size, activation=network.activation, return_sequences=True, dtype=dtype
            )
            rnn.build((None, None, input_size))
        return rnn

    def load(U, W, b):
        return [U.mT, W.mT, b]

    def unroll(weights, xs):
        kernel = weights[0]
        rnn = layer(*kernel.shape, kernel.dtype.name)
        others = [variable.value for variable in rnn.non_trainable_variables]
        return rnn.stateless_call(weights, others, xs)[0]

    def unload(grads):
        return grads[0].mT, grads[1].mT, grads[2]

    return Layer(unroll, load, unload, batch_first=True)


def equinox(network: Network) -> Layer:
    """A cell of two `eqx.nn.Linear`, scanned and mapped as its documentation does a `GRUCell`."""
    import equinox as eqx

    only_plain(network)

    class Elman(eqx.Module):
        inputs: eqx.nn.Linear
        recurrent: eqx.nn.Linear

        def __call__(self, xs):
            def step(h, x):
                h = PHI[network.activation](self.inputs(x) + self.recurrent(h))
                return h, h

            h0 = jnp.zeros(self.recurrent.out_features, self.recurrent.weight.dtype)
            return jax.lax.scan(step, h0, xs)[1]

    def arrays(model):
        return model.inputs.weight, model.recurrent.weight, model.inputs.bias

    def load(U, W, b):
        (H, D), key = U.shape, jax.random.key(0)
        linear = eqx.nn.Linear(D, H, key=key), eqx.nn.Linear(H, H, use_bias=False, key=key)
        return eqx.tree_at(arrays, Elman(*linear), (U, W, b))

    def unroll(model, xs):
        return jax.vmap(model)(xs)

    return Layer(unroll, load, arrays, batch_first=True)
