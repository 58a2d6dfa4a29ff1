"""The GPU kernels without a GPU: Pallas' interpreter against a scan, and lowering for CUDA."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rare
from kernels import draw, every_loop, scanned, tf32

from jaxrnn._backends.kernels import loops, mosaic_gpu, mosaic_gpu_cluster, mosaic_gpu_tf32
from jaxrnn._backends.kernels._tiles import cut, padded, round_up

if jax.__version_info__ < (0, 11):
    pytest.skip("Pallas interprets GPU kernels from jax 0.11", allow_module_level=True)

# Blocks and warpgroups run as threads, and whether a race shows depends on how they are scheduled.
REPEATS = 3
NAMES = ["states", "tangent", "adjoint", "delta"]
ALL = dict(leak=True, valid=True, cut=True)


def clustered(loop, arrays, out_dtype, *, reverse, interpret=False, slots=2):
    """Let a cluster work on any size, that a small one can be interpreted."""
    batch, hidden = arrays.c0.shape[-2:]
    swapped = padded(arrays, round_up(batch, 16), round_up(hidden, 64), swap=True)
    out, end = mosaic_gpu_cluster.cluster(
        loop, swapped, out_dtype, 16, reverse=reverse, interpret=interpret, slots=slots
    )
    return cut(out, end, arrays, swap=True)


def loop_of(name, dtype, activation="tanh"):
    if (name, activation) == ("states", "relu"):
        # jax.nn.relu has a rule for its derivative, and jax 0.11 lowers none in a kernel.
        return loops.states(lambda a: jnp.maximum(a, 0), dtype)
    return dict(zip(NAMES, every_loop(dtype, activation), strict=True))[name]


def tolerance(dtype):
    """Of errors, in terms of the largest entry.

    The interpreter multiplies in float32, as the scan does, but adds up in another order. Now and
    then that rounds an entry of v, in float32 to TF32, to the neighbour, one eps away at most; the
    next steps carry that on, and no step enlarges it.
    """
    return 2 * (2.0**-10 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps))


def error(got, want):
    """The largest error, in terms of the largest entry, after shapes and dtypes."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    errors = []
    for one, other in zip(got, want, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        errors.append(float(jnp.abs(one - other).max() / jnp.abs(other).max()))
    return max(errors)


def errors_of(run, loop, arrays, *, reverse, repeats=REPEATS, **options):
    factor = tf32 if run is mosaic_gpu_tf32.run else lambda x: x
    want = scanned(loop, arrays, reverse=reverse, factor=factor)
    interpreted = jax.jit(
        lambda arrays: run(loop, arrays, want[0].dtype, reverse=reverse, interpret=True, **options)
    )
    return [error(interpreted(arrays), want) for _ in range(repeats)]


def lowered(run, loop, T, M, B, H, dtype, **options):
    """The program for CUDA, as text."""
    arrays = shapes(draw(loop, 1, 1, 1, 1, dtype, **options), T, M, B, H)
    out_dtype = jax.eval_shape(lambda a: scanned(loop, a, reverse=False), arrays)[0].dtype
    program = jax.jit(lambda a: run(loop, a, out_dtype, reverse=bool(options)))
    return program.trace(arrays).lower(lowering_platforms=("cuda",)).as_text()


def shapes(arrays, T, M, B, H):
    """What `draw` gives, of this size and without values."""
    sized = loops.Arrays(
        matrix=(M, H, H),
        v0=(M, B, H),
        c0=(M, B, H),
        streams=((T, M, B, H),) * len(arrays.streams),
        flags=loops.Flags((T, M, B), (T, M, B)),
        leak=(M, H),
    )
    return jax.tree.map(
        lambda x, shape: None if x is None else jax.ShapeDtypeStruct(shape, x.dtype),
        arrays,
        sized,
        is_leaf=lambda x: x is None,
    )


# loop, T, M, B, H, reverse, options: tiles are of 16 sequences and of 64 hidden units.
ONE_BLOCK = [
    ("states", 7, 2, 20, 100, True, ALL),
    ("tangent", 2, 2, 32, 128, True, dict(leak=True, cut=True)),
    ("adjoint", 7, 1, 20, 192, False, dict(valid=True)),
    ("delta", 2, 2, 20, 100, True, ALL),
    rare("states", 1, 1, 20, 64, False, {}),
    rare("tangent", 2, 2, 20, 100, False, ALL),
    rare("adjoint", 7, 1, 20, 100, True, ALL),
    rare("delta", 7, 1, 33, 128, False, {}),
]


@pytest.mark.parametrize(("name", "T", "M", "B", "H", "reverse", "options"), ONE_BLOCK)
def test_one_block_equals_the_scan(name, T, M, B, H, reverse, options):
    dtype = jnp.float16 if (NAMES.index(name) + T) % 2 else jnp.bfloat16
    loop = loop_of(name, dtype)
    arrays = draw(loop, T, M, B, H, dtype, **options)
    errors = errors_of(mosaic_gpu.run, loop, arrays, reverse=reverse)
    assert max(errors) <= tolerance(dtype)


# As above, with tiles of 64 sequences and of 32 hidden units.
TF32 = [
    ("states", 7, 1, 70, 64, True, dict(valid=True)),
    ("tangent", 2, 1, 128, 160, False, dict(leak=True, cut=True)),
    ("adjoint", 2, 2, 70, 90, True, ALL),
    ("delta", 2, 2, 70, 90, True, ALL),
    rare("adjoint", 1, 2, 70, 128, False, {}),
    *(rare(name, 2, 2, 70, 90, True, ALL) for name in NAMES[:2]),
]


@pytest.mark.parametrize(("name", "T", "M", "B", "H", "reverse", "options"), TF32)
def test_tf32_equals_the_scan_of_rounded_factors(name, T, M, B, H, reverse, options):
    loop = loop_of(name, jnp.float32)
    arrays = draw(loop, T, M, B, H, jnp.float32, **options)
    errors = errors_of(mosaic_gpu_tf32.run, loop, arrays, reverse=reverse)
    assert max(errors) <= tolerance(jnp.float32)


def test_tf32_rounds_both_factors():
    # A sum of one product: h_1 = tf32(W) tf32(h_0), and where W is 1, h_2 = tf32(h_1).
    loop = loops.states(lambda a: a, jnp.dtype("float32"))
    arrays = draw(loop, 2, 2, 64, 32, jnp.float32)
    ones, weights = jnp.eye(32, dtype=jnp.float32), jnp.diag(arrays.v0[1, 0])
    v0 = arrays.v0.at[1].set(1.0)
    a = arrays.streams[0].at[0, 1].set(0.0).at[1].set(0.0)
    arrays = arrays._replace(matrix=jnp.stack([ones, weights]), v0=v0, c0=v0, streams=(a,))
    hs, _ = mosaic_gpu_tf32.run(loop, arrays, jnp.float32, reverse=False, interpret=True)
    assert (hs[0, 0] == tf32(v0[0]) + a[0, 0]).all() and (hs[1, 0] == tf32(hs[0, 0])).all()
    assert (hs[0, 1] == tf32(jnp.diag(weights))[None]).all()
    assert (hs[1, 0] == hs[0, 0]).mean() < 0.01


def test_rounding_in_a_kernel_is_to_the_nearest_tf32():
    scales = 2.0 ** np.arange(-100, 100)[:, None]
    x = jnp.asarray(scales * np.random.default_rng(0).standard_normal(999), "float32")
    rounded = jax.jit(mosaic_gpu_tf32.rounded_in_kernel)
    assert (rounded(x) == tf32(x)).all()
    special = jnp.array([0.0, jnp.nan, 2**114, 1 + 2.0**-11 + 2.0**-20], jnp.float32)
    assert jnp.array_equal(
        mosaic_gpu_tf32.rounded_in_kernel(special), tf32(special), equal_nan=True
    )


def test_rounding_keeps_a_norm_that_truncation_loses():
    def cut_off(x):
        return (np.asarray(x).view(np.int32) & ~np.int32(0x1FFF)).view(np.float32)

    rng = np.random.default_rng(0)
    W = np.linalg.qr(rng.standard_normal((64, 64)))[0].astype(np.float32)
    first = rng.standard_normal((4, 64)).astype(np.float32)
    left = []
    for of_matrix, of_v in (
        (cut_off, cut_off), (mosaic_gpu_tf32.rounded, mosaic_gpu_tf32.rounded_in_kernel),
    ):  # fmt: skip
        h, factor = first, np.asarray(of_matrix(W)).T
        for _ in range(1024):
            h = (np.asarray(of_v(h)) @ factor).astype(np.float32)
        left.append(np.linalg.norm(h) / np.linalg.norm(first))
    assert left[0] < 0.55 and abs(left[1] - 1) < 0.01


@pytest.mark.parametrize(
    ("name", "T"), [("states", 3), ("delta", 2), rare("tangent", 1), rare("adjoint", 2)]
)
def test_a_cluster_of_blocks_equals_the_scan(name, T):
    loop = loop_of(name, jnp.bfloat16)
    arrays = draw(loop, T, 2, 20, 128, jnp.bfloat16, **ALL)
    errors = errors_of(clustered, loop, arrays, reverse=True)
    assert max(errors) <= tolerance(jnp.bfloat16)


def test_a_cluster_runs_what_one_block_cannot_hold():
    loop = loop_of("delta", jnp.float16)
    arrays = draw(loop, 2, 1, 20, 330, jnp.float16, cut=True)
    errors = errors_of(mosaic_gpu.run, loop, arrays, reverse=False)
    assert max(errors) <= tolerance(jnp.float16)


@pytest.mark.parametrize(("name", "activation"), [
    ("states", "relu"), ("adjoint", "sigmoid"), rare("states", "sigmoid"), rare("adjoint", "relu"),
    rare("states", "identity"), rare("adjoint", "identity"),
])  # fmt: skip
def test_other_activations_equal_the_scan(name, activation):
    dtype = jnp.bfloat16
    loop = loop_of(name, dtype, activation)
    arrays = draw(loop, 2, 1, 20, 64, dtype)
    errors = errors_of(mosaic_gpu.run, loop, arrays, reverse=False, repeats=1)
    assert max(errors) <= tolerance(dtype)


def test_wider_tiles_equal_the_scan():
    loop = loop_of("states", jnp.bfloat16)
    arrays = draw(loop, 2, 1, 40, 64, jnp.bfloat16)
    errors = errors_of(mosaic_gpu.run, loop, arrays, reverse=False, repeats=1, tile=32)
    assert max(errors) <= tolerance(jnp.bfloat16)


@pytest.mark.parametrize("run", [mosaic_gpu.run, mosaic_gpu_tf32.run])
def test_a_race_between_steps_fails(run):
    """With one slot v is overwritten while another warpgroup still multiplies with it."""
    dtype = jnp.float32 if run is mosaic_gpu_tf32.run else jnp.bfloat16
    loop = loop_of("states", dtype)
    arrays = draw(loop, 7, 1, 20, 128, dtype)
    errors = errors_of(run, loop, arrays, reverse=False, repeats=5, slots=1)
    assert max(errors) > 10 * tolerance(dtype)


LOADED = ["copy_gmem_to_smem", "copy_gmem_to_smem", "barrier_wait"]
PUBLISHED = ["commit_smem", "barrier_arrive", "barrier_wait"]
EXCHANGED = ["commit_smem", "copy_smem_to_gmem", "wait_smem_to_gmem", "barrier_arrive"]
RELOADED = ["barrier_wait", "copy_gmem_to_smem", "barrier_wait"]


@pytest.mark.parametrize(
    ("run", "dtype", "H", "order"),
    [
        (mosaic_gpu.run, jnp.bfloat16, 320, LOADED + PUBLISHED),
        (mosaic_gpu_tf32.run, jnp.float32, 160, LOADED + PUBLISHED),
        (mosaic_gpu.run, jnp.bfloat16, 384, LOADED + EXCHANGED + RELOADED),
    ],
)
def test_fences_and_barriers_keep_a_step_in_order(run, dtype, H, order):
    """The interpreter does not need the fences, a device does."""
    loop = loop_of("states", dtype)
    arrays = shapes(draw(loop, 1, 1, 1, 1, dtype), 3, 1, 16, H)
    jaxpr = jax.make_jaxpr(lambda a: run(loop, a, dtype, reverse=False))(arrays)
    assert re.findall(f"({'|'.join(sorted(set(order)))})", str(jaxpr)) == order


LOWERED = [(64, jnp.bfloat16), (192, jnp.float16), (384, jnp.bfloat16), (1024, jnp.float16)]
LOWERED += [
    rare(H, dtype) for H in (64, 128, 192, 256, 320, 384, 512, 768, 1024)
    for dtype in (jnp.bfloat16, jnp.float16) if (H, dtype) not in LOWERED
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("H", "dtype"), LOWERED)
def test_every_loop_lowers(name, H, dtype):
    """Layouts, shared memory and primitives, as the compiler for CUDA takes them."""
    loop = loop_of(name, dtype)
    options = ALL if (dtype == jnp.bfloat16) == (H % 128 == 0) else {}
    assert loop.name in lowered(mosaic_gpu.run, loop, 3, 2, 40, H, dtype, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("H", [64, 160, rare(32), rare(96), rare(128)])
def test_every_tf32_loop_lowers(name, H):
    loop = loop_of(name, jnp.float32)
    options = ALL if H % 64 == 0 else {}
    assert loop.name in lowered(mosaic_gpu_tf32.run, loop, 3, 2, 70, H, jnp.float32, **options)


@pytest.mark.parametrize("activation", ["relu", rare("sigmoid"), rare("identity")])
@pytest.mark.parametrize("name", NAMES)
def test_other_activations_lower(name, activation):
    loop = loop_of(name, jnp.bfloat16, activation)
    assert loop.name in lowered(mosaic_gpu.run, loop, 3, 1, 16, 64, jnp.bfloat16)


@pytest.mark.parametrize(
    ("module", "dtype"), [(mosaic_gpu, jnp.bfloat16), (mosaic_gpu_tf32, jnp.float32)]
)
def test_larger_than_the_largest_is_refused(module, dtype):
    loop = loop_of("states", dtype)
    with pytest.raises(ValueError, match=r"at most|shared memory"):
        lowered(module.run, loop, 2, 1, 64, module.MAX_HIDDEN + 1, dtype)
