"""The kernel for TPU: interpreted it is the scan, in every block of it, and it lowers."""

from functools import partial
from itertools import combinations, product

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import draw, every_loop, scanned
from test_structure import equations

from jaxrnn._backends.kernels import loops, pallas_tpu
from jaxrnn._base.forms import NAMED

DTYPES = ("float32", "bfloat16")
ALL = ("leak", "valid", "cut")
OPTIONS = ((), ("leak",), ("valid",), ("cut",), ALL)
# Sums in another order differ by some eps, 1e-5 being 84 of float32. In bfloat16 such a sum may
# round a v the other way, by one eps; of seven steps, each 0.9 times the one before at most, that
# makes Σ 0.9^k ≈ 5 eps.
TOLERANCE = {"float32": 1e-5, "bfloat16": 6 * float(jnp.finfo("bfloat16").eps)}


def in_pairs(*factors):
    """Few cases of the product, in which any two values of two factors meet."""
    met_by = {case: set(combinations(enumerate(case), 2)) for case in product(*factors)}
    left = set().union(*met_by.values())
    while left:
        case = max(met_by, key=lambda case: len(met_by[case] & left))
        left -= met_by[case]
        yield case


def out_dtype(loop, dtype):
    return dtype if loop.name == "jaxrnn_states" else "float32"


def difference(loop, arrays, *, reverse, **how):
    """The largest one between the kernel and the scan, relative to the largest entry."""

    @jax.jit
    def both(arrays):
        dtype = out_dtype(loop, arrays.matrix.dtype)
        found = pallas_tpu.run(loop, arrays, dtype, reverse=reverse, interpret=True, **how)
        return found, scanned(loop, arrays, reverse=reverse)

    found, wanted = both(arrays)
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, wanted)

    def relative(x, y):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        return np.max(np.abs(x - y)) / np.max(np.abs(y))

    # By NumPy: a maximum by XLA may lose NaN.
    return np.max(jax.tree.leaves(jax.tree.map(relative, found, wanted)))


# In blocks of three steps 7 are two of them and part of a third, which the loop enters first in
# reverse. The sequences make two tiles, one of them padded.
FEW = in_pairs(
    range(4), DTYPES, (False, True), (7, 1), (64, 192), ((), ("valid",), ALL), ("tanh", "sigmoid")
)
MANY = in_pairs(range(4), DTYPES, (False, True), (7, 2, 1), (64, 128, 192), OPTIONS, NAMED)
CASES = [*FEW, *(pytest.param(*case, marks=pytest.mark.full) for case in MANY)]


@pytest.mark.parametrize("which, dtype, reverse, T, H, options, activation", CASES)
def test_the_kernel_equals_the_scan(which, dtype, reverse, T, H, options, activation):
    loop = list(every_loop(jnp.dtype(dtype), activation))[which]
    rows = 32 // jnp.dtype(dtype).itemsize
    arrays = draw(loop, T, 2, 2 * rows - 3, H, dtype, **dict.fromkeys(options, True))
    assert difference(loop, arrays, reverse=reverse, _blocks=(rows, 3)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("reverse", (pytest.param(False, marks=pytest.mark.full), True))
def test_the_kernel_equals_the_scan_in_its_own_blocks(reverse):
    loop = loops.states(jnp.tanh, jnp.dtype("float32"))
    arrays = draw(loop, 66, 1, 130, 8, "float32", valid=True)
    assert difference(loop, arrays, reverse=reverse) <= TOLERANCE["float32"]


def test_the_adjoint_takes_one_stream():
    *_, loop = every_loop(jnp.dtype("float32"))
    arrays = draw(loop, 2, 1, 3, 64, "float32", streams=1)
    assert difference(loop, arrays, reverse=True) <= TOLERANCE["float32"]


def test_nan_computed_on_padding_is_not_read():
    def activation(a):
        return jnp.where(a == 0, jnp.nan, jnp.tanh(a))

    loop = loops.states(activation, jnp.dtype("float32"))
    arrays = draw(loop, 3, 1, 3, 64, "float32")
    assert difference(loop, arrays, reverse=False) <= TOLERANCE["float32"]


def test_a_kernel_that_restarts_in_every_block_fails(monkeypatch):
    loop = loops.states(jnp.tanh, jnp.dtype("float32"))
    arrays = draw(loop, 4, 1, 3, 64, "float32")
    monkeypatch.setattr(pallas_tpu.pl, "when", lambda condition: lambda body: body())
    assert difference(loop, arrays, reverse=False, _blocks=(8, 2)) > 0.01


def lowered(loop, H, dtype, **how):
    """The text of a kernel of that size for TPU, with every option."""
    small = draw(loop, 100, 2, 130, 1, dtype, leak=True, valid=True, cut=True)

    def wide(x):
        return jax.ShapeDtypeStruct((*x.shape[:-1], H), x.dtype)

    arrays = small._replace(
        matrix=jax.ShapeDtypeStruct((2, H, H), dtype),
        **{
            part: jax.tree.map(wide, getattr(small, part))
            for part in ("v0", "c0", "streams", "leak")
        },
    )

    @jax.jit
    def kernel(arrays):
        return pallas_tpu.run(loop, arrays, out_dtype(loop, dtype), **how)

    return kernel.trace(arrays).lower(lowering_platforms=("tpu",)).as_text()


SIZES = (64, 192, 1024, "largest")
SIZES += tuple(pytest.param(H, marks=pytest.mark.full) for H in (128, 256, 512))


@pytest.mark.parametrize("H", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_loop_lowers(dtype, H):
    H = {"float32": 1664, "bfloat16": 2304}[dtype] if H == "largest" else H
    for loop, reverse in zip(every_loop(jnp.dtype(dtype)), (False, True) * 2, strict=True):
        assert f'kernel_name = "{loop.name}"' in lowered(loop, H, dtype, reverse=reverse)


@pytest.mark.parametrize("which", range(4))
def test_indices_have_32_bits_under_x64(which):
    # Mosaic's compiler takes no other; lowering does not notice.
    assert jax.config.read("jax_enable_x64")
    loop = list(every_loop(jnp.dtype("float32")))[which]
    arrays = draw(loop, 5, 1, 9, 64, "float32", leak=True, valid=True, cut=True)
    run = partial(pallas_tpu.run, loop, out_dtype="float32", reverse=True, _blocks=(8, 2))
    (call,) = (e for e, _ in equations(jax.make_jaxpr(run)(arrays)) if "grid_mapping" in e.params)
    blocks = call.params["grid_mapping"].block_mappings
    results = [aval for block in blocks for aval in block.index_map_jaxpr.out_avals]
    inside = equations(jax.extend.core.ClosedJaxpr(call.params["jaxpr"], ()))
    results += [var.aval for eqn, _ in inside for var in eqn.outvars]
    integers = {str(x.dtype) for x in results if jnp.issubdtype(x.dtype, jnp.integer)}
    assert len(results) > 3 * len(blocks) and integers == {"int32"}


@pytest.mark.parametrize("precision", ("default", "highest"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_precision_lowers(dtype, precision):
    loop = next(every_loop(jnp.dtype(dtype)))
    with jax.default_matmul_precision(precision):
        by_default = lowered(loop, 128, dtype, reverse=False)
    assert loop.name in by_default
    assert loop.name in lowered(loop, 128, dtype, reverse=False, precision=precision)


@pytest.mark.parametrize("dtype, largest", (("float32", 1664), ("bfloat16", 2304)))
def test_larger_hidden_sizes_do_not_fit(dtype, largest):
    assert pallas_tpu.fits(largest, dtype)
    assert not pallas_tpu.fits(largest + 1, dtype)
