"""What half precision costs: errors against float64, beside those of the peers.

`python tests/test_precision.py tests/README.md` measures the table of that file and writes it.
"""

import dataclasses
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from helpers import naive_unroll, random_case, rare, weights, write_table

import jaxrnn

T, B, D, H = 100, 8, 16, 32
PARTS = ("hs", "U", "W", "b", "xs", "h0")
JAX_PEERS = {
    "naive scan": (naive_unroll, "jax"),
    "scan with `custom_vjp`": (peers.scan_with_custom_vjp, "jax"),
    "flax.nnx": (peers.flax_nnx, "flax"),
    "flax.linen": (peers.flax_linen, "flax"),
    "haiku (relu)": (peers.haiku, "haiku"),
}


def case(dtype, activation):
    """A cell, xs, h0 and cotangents of the states, rounded to that dtype."""
    params, xs, h0, _ = random_case(T=T, batch=(B,), D=D, H=H, activation=activation)
    cell = params.cell
    if activation == "relu":
        # Units near 0 may be rounded to the other side, and that would drown the rest.
        cell = dataclasses.replace(cell, W=0.3 * cell.W, b=cell.b + 8)
    values = (cell, xs, h0, weights((T, B, H)))
    return jax.tree.map(lambda x: x.astype(dtype), values)


def states_and_gradients(unroll, cell, xs, h0, g):
    def states(cell, xs, h0):
        return unroll(cell, xs, h0)[1]

    hs, pull = jax.vjp(states, cell, xs, h0)
    dcell, dxs, dh0 = pull(g)
    return hs, dcell.U, dcell.W, dcell.b, dxs, dh0


def by_torch(cell, xs, h0, g):
    import torch

    rnn = torch.nn.RNN(D, H, dtype=getattr(torch, xs.dtype.name))
    given = [torch.tensor(np.asarray(x, np.float32), dtype=rnn.weight_ih_l0.dtype)
             for x in (cell.U, cell.W, cell.b, 0 * cell.b, xs, h0, g)]  # fmt: skip
    for parameter, value in zip(rnn.parameters(), given, strict=False):
        parameter.data = value
    xs, h0 = given[4].requires_grad_(), given[5].requires_grad_()
    hs, _ = rnn(xs, h0[None])
    wanted = rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, xs, h0
    found = [hs, *torch.autograd.grad(hs, wanted, given[6])]
    return [x.detach().float().numpy() for x in found]


def errors(name, dtype):
    """For each part the Frobenius norm of what is off, relative to that of the truth."""
    activation = "relu" if "relu" in name else "tanh"
    values = case(dtype, activation)
    exact = jax.tree.map(lambda x: x.astype(jnp.float64), values)
    truth = jax.jit(states_and_gradients, static_argnums=0)(naive_unroll, *exact)
    if name == "torch":
        found = by_torch(*values)
    else:
        unroll = jaxrnn.unroll if name.startswith("jaxrnn") else JAX_PEERS[name][0]
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            found = jax.jit(states_and_gradients, static_argnums=0)(unroll, *values)
    return {
        part: float(np.linalg.norm(np.asarray(a, float) - e) / np.linalg.norm(e))
        for part, a, e in zip(PARTS, found, truth, strict=True)
    }


def installed(package):
    return importlib.util.find_spec(package) is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_errors_are_those_of_rounding_each_state_once(dtype):
    # States below 1 are multiples of eps/2: rounded, they err by eps/(2√12) in the mean square.
    # Each error goes on through Jacobians of norm ≤ 0.9, so √(1/(1 − 0.81)) = 2.3 of them add
    # up at random, and states are of size 1/2: 0.66 eps. Gradients pass by those states once
    # more on their way back, at most as much again; a naive scan's, summed in half precision,
    # do not stay below.
    eps = float(jnp.finfo(dtype).eps)
    found = errors("jaxrnn", dtype)
    assert found["hs"] < 0.66 * eps and max(found.values()) < 2 * 0.66 * eps
    assert max(errors("naive scan", dtype).values()) > 2 * 0.66 * eps


@pytest.mark.parametrize("dtype", ["bfloat16", rare("float16")])
@pytest.mark.parametrize("name", [*JAX_PEERS, "torch"])
@pytest.mark.filterwarnings("ignore")
def test_no_peer_is_more_precise(name, dtype):
    if not installed(JAX_PEERS.get(name, (None, "torch"))[1]):
        pytest.skip(f"{name} is not installed")
    ours = errors("jaxrnn (relu)" if "relu" in name else "jaxrnn", dtype)
    theirs = errors(name, dtype)
    # One draw of the roundings: of as many independent ones as the smallest part has entries, H,
    # the norm varies by 1/√(2 H).
    assert all(ours[part] <= theirs[part] * (1 + 1 / np.sqrt(2 * H)) for part in PARTS)


def table():
    """The lines of a table: errors in units of 1e-3."""
    yield "| 1e-3 | " + " | ".join(f"{d} {p}" for d in ("bf16", "f16") for p in PARTS) + " |"
    yield "| --- |" + " --: |" * 2 * len(PARTS)
    for name in ("jaxrnn", *JAX_PEERS, "jaxrnn (relu)", "torch"):
        cells = []
        for dtype in ("bfloat16", "float16"):
            try:
                cells += [f"{1e3 * e:.2f}" for e in errors(name, dtype).values()]
            except Exception as error:
                cells += [type(error).__name__] + [""] * (len(PARTS) - 1)
        yield f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    import conftest  # noqa: F401  the tests' settings

    write_table(sys.argv[1], "precision", "\n".join(table()))
