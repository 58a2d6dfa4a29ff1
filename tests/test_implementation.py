"""By what the loops are run: the choice, what each takes, and that none changes a derivative."""

import dataclasses
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, random_case, weights
from test_structure import lowered, trip_counts

import jaxrnn
from jaxrnn._backends import select
from jaxrnn._backends.select import Measured, choose
from jaxrnn._backends.target import Device, built_for
from jaxrnn._base.options import Options

H200 = Device("gpu", "NVIDIA H200", "9.0")
TPU = Device("tpu", "TPU v5 lite")
recent = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the Mosaic GPU kernels are written for jax 0.11 on"
)


def matrix_of(hidden_size, dtype="bfloat16"):
    return jnp.zeros((hidden_size, hidden_size), dtype)


def loss(unroll, cell, xs, h0):
    h_last, hs = unroll(cell, xs, h0)
    return jnp.sum(jnp.sin(hs)) + jnp.sum(jnp.exp(h_last))


# The choice -----------------------------------------------------------------------------------


def test_auto_is_the_scan_where_nothing_was_measured():
    assert choose(Options(False), matrix_of(64), (16,), jnp.tanh) == "scan"


@recent
@pytest.mark.parametrize(
    "kind, dtype, hidden_size, batch, expected",
    [
        ("NVIDIA H200", "bfloat16", 64, (16,), "mosaic_gpu"),
        ("NVIDIA H200", "bfloat16", 128, (4, 4), "mosaic_gpu"),
        ("NVIDIA H200", "bfloat16", 65, (64,), "mosaic_gpu"),
        ("NVIDIA H200", "bfloat16", 129, (16,), "scan"),
        ("NVIDIA H200", "bfloat16", 63, (16,), "scan"),
        ("NVIDIA H200", "bfloat16", 64, (15,), "scan"),
        ("NVIDIA H200", "bfloat16", 64, (65,), "scan"),
        ("NVIDIA H200", "float16", 64, (16,), "scan"),
        ("NVIDIA H100", "bfloat16", 64, (16,), "scan"),
    ],
)
def test_auto_takes_what_was_measured(monkeypatch, kind, dtype, hidden_size, batch, expected):
    entry = Measured("NVIDIA H200", "bfloat16", (64, 128), (16, 64), "mosaic_gpu")
    monkeypatch.setattr(select, "MEASURED", (entry,))
    loops = Options(False, device=Device("gpu", kind, "9.0"))
    assert choose(loops, matrix_of(hidden_size, dtype), batch, jnp.tanh) == expected


def test_auto_falls_back_where_its_kernel_cannot_run(monkeypatch):
    # TensorFloat-32 products are not what precision="highest" asks for; φ is not one it has.
    entry = Measured("TPU v5 lite", "float32", (1, 10**6), (1, 64), "pallas_tpu")
    monkeypatch.setattr(select, "MEASURED", (entry,))
    loops, W = Options(False, device=TPU), matrix_of(64, "float32")
    assert choose(loops, W, (4,), jnp.tanh) == "pallas_tpu"
    assert choose(loops._replace(precision="high"), W, (4,), jnp.tanh) == "scan"
    assert choose(loops, matrix_of(5000, "float32"), (4,), jnp.tanh) == "scan"
    assert choose(loops, W, (4,), jnp.sin) == "scan"
    # XLA does not split a kernel over devices.
    assert choose(loops._replace(device=TPU._replace(many=True)), W, (4,), jnp.tanh) == "scan"


@pytest.mark.parametrize(
    "kind, dtype, expected",
    [("TPU v2", "float32", "pallas_tpu"), ("TPU v3", "float32", "pallas_tpu"),
     ("TPU v3", "bfloat16", "scan"), ("TPU v4", "bfloat16", "pallas_tpu")],
)  # fmt: skip
def test_old_tpus_run_the_kernel_in_float32_only(monkeypatch, kind, dtype, expected):
    entry = Measured(kind, dtype, (1, 64), (1, 64), "pallas_tpu")
    monkeypatch.setattr(select, "MEASURED", (entry,))
    loops = Options(False, device=Device("tpu", kind))
    assert choose(loops, matrix_of(64, dtype), (4,), jnp.tanh) == expected


def test_auto_runs_an_activation_that_no_kernel_has(monkeypatch):
    entry = Measured("TPU v5 lite", "float32", (1, 10**6), (1, 64), "pallas_tpu")
    monkeypatch.setattr(select, "MEASURED", (entry,))
    params, xs, h0, _ = random_case(dtype=jnp.float32)
    phi = jaxrnn.Activation(
        jax.lax.erf, lambda h: 2 / jnp.pi**0.5 * jnp.exp(-jnp.square(jax.lax.erf_inv(h)))
    )
    cell = dataclasses.replace(params.cell, activation=phi)
    f = jax.jit(jax.grad(partial(loss, jaxrnn.unroll)))
    with built_for(TPU):
        text = f.trace(cell, xs, h0).lower(lowering_platforms=("tpu",)).as_text()
    assert "jaxrnn_" not in text


def test_a_pullback_has_the_precision_of_the_call():
    params, xs, h0, _ = random_case(dtype=jnp.float32)
    with jax.default_matmul_precision("highest"):
        states, pull = jax.vjp(jaxrnn.unroll, params.cell, xs, h0)
    assert set(precisions(pull, states)) == {HIGHEST}


def test_auto_falls_back_on_another_platform(monkeypatch):
    # Arrays may lie on the CPU of a machine whose accelerator the table names.
    entry = Measured("TPU v5 lite", "float32", (1, 10**6), (1, 64), "pallas_tpu")
    monkeypatch.setattr(select, "MEASURED", (entry,))
    params, xs, h0, _ = random_case(dtype=jnp.float32)
    args = params.cell, xs, h0
    gradient = jax.jit(jax.grad(partial(loss, jaxrnn.unroll), (0, 1, 2)))
    expected = jax.grad(partial(loss, partial(jaxrnn.unroll, implementation="scan")), (0, 1, 2))
    with built_for(TPU):
        assert_close(gradient(*args), expected(*args), 0)
        text = gradient.trace(*args).lower(lowering_platforms=("tpu",)).as_text()
        mapped = jax.vmap(jax.grad(partial(loss, jaxrnn.unroll)), (None, 1, 0))
        summed = jax.tree.map(lambda x: jnp.sum(x, 0), mapped(params.cell, xs, h0))
    assert_close(summed, expected(*args)[0], 1e-5)
    assert "jaxrnn_states" in text and "jaxrnn_adjoint" in text


def test_the_device_is_read_only_where_the_choice_depends_on_it(monkeypatch):
    device_for = select.device_for
    assert device_for("auto") is device_for("scan") is device_for("associative") is None
    assert device_for("mosaic_gpu").platform == "cpu"
    monkeypatch.setattr(select, "MEASURED", (None,))
    assert device_for("auto").platform == "cpu"
    with jax.default_device(jax.devices("cpu")[1]):
        assert device_for("auto").platform == "cpu"
    with jax.default_device("cpu"):
        assert device_for("auto").platform == "cpu"
    with built_for(TPU):
        assert device_for("auto") is TPU
    assert device_for("auto").platform == "cpu"


def test_auto_on_a_cpu_imports_no_pallas():
    code = (
        "import sys, jax, jax.numpy as jnp, jaxrnn; "
        "cell = jaxrnn.init_cell(jax.random.key(0), 2, 3); "
        "jax.grad(lambda c: jnp.sum(jaxrnn.unroll(c, jnp.ones((4, 2)))[0]))(cell); "
        "print(sorted(m for m in sys.modules if 'experimental.pallas' in m or '.kernels.' in m))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        run.stdout.strip() == "['jaxrnn._backends.kernels.loops', 'jaxrnn._backends.kernels.run']"
    )


# What a kernel does not take ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, device, dtype, hidden_size, precision, said",
    [
        ("pallas_tpu", None, "float32", 8, None, "it needs a TPU, not cpu (cpu)"),
        ("pallas_tpu", H200, "float32", 8, None, "it needs a TPU, not NVIDIA H200 (gpu)"),
        ("pallas_tpu", TPU, "float16", 8, None, "it runs bfloat16, float32, not float16"),
        ("pallas_tpu", TPU, "float64", 8, None, "it runs bfloat16, float32, not float64"),
        ("pallas_tpu", Device("tpu", "TPU v2"), "bfloat16", 8, None,
         "it runs float32 on TPU v2, not bfloat16"),
        ("pallas_tpu", Device("tpu", "TPU v3"), "bfloat16", 8, None,
         "it runs float32 on TPU v3, not bfloat16"),
        ("pallas_tpu", TPU, "float32", 4096, None, "it takes H up to 1664 in float32, not 4096"),
        ("pallas_tpu", TPU, "float32", 8, "high", "its products of float32 are those of "
         "precision 'default' or 'highest', not of 'high'"),
        pytest.param("mosaic_gpu", TPU, "bfloat16", 8, None, "it needs an NVIDIA GPU of compute "
                     "capability 9.0, not TPU v5 lite (tpu)", marks=recent),
        pytest.param("mosaic_gpu", Device("gpu", "NVIDIA A100", "8.0"), "bfloat16", 8, None,
                     "it needs an NVIDIA GPU of compute capability 9.0, not NVIDIA A100 (gpu)",
                     marks=recent),
        pytest.param("mosaic_gpu", H200, "float64", 8, None,
                     "it runs bfloat16, float16, float32, not float64", marks=recent),
        pytest.param("mosaic_gpu", H200, "bfloat16", 1025, None,
                     "it takes H up to 1024 in bfloat16, not 1025", marks=recent),
        pytest.param("mosaic_gpu", H200, "float32", 192, None,
                     "it takes H up to 160 in float32, not 192", marks=recent),
        pytest.param("mosaic_gpu", H200, "float32", 8, "highest", "its products of float32 are "
                     "TensorFloat-32, summed in float32, not of 'highest'",
                     marks=recent),
    ],
)  # fmt: skip
def test_kernels_name_the_arguments_they_cannot_run(
    name, device, dtype, hidden_size, precision, said
):
    cell = jaxrnn.Cell(*(jnp.zeros(s, dtype) for s in ((hidden_size, 2), (hidden_size,) * 2)),
                       jnp.zeros(hidden_size, dtype))  # fmt: skip
    call = partial(jaxrnn.unroll, cell, jnp.zeros((3, 2, 2), dtype), precision=precision)
    said = re.escape(f"implementation='{name}': {said}")
    with pytest.raises(NotImplementedError, match=f"^{said}$"):
        if device is None:
            call(implementation=name)
        with built_for(device):
            call(implementation=name)


def test_kernels_refuse_empty_batches_and_other_activations():
    def call(batch=2, activation="tanh"):
        cell = jaxrnn.init_cell(jax.random.key(0), 2, 3, activation=activation, dtype=jnp.float32)
        xs = jnp.zeros((3, batch, 2), jnp.float32)
        return jax.jit(partial(jaxrnn.unroll, implementation="pallas_tpu"))(cell, xs)

    with built_for(TPU):
        with pytest.raises(NotImplementedError, match=r"needs states, not those of shape \[0, 3\]"):
            call(batch=0)
        with pytest.raises(NotImplementedError, match="tanh, relu, sigmoid, identity, not another"):
            call(activation=jnp.sin)
        with jax.default_matmul_precision("high"), pytest.raises(NotImplementedError, match="high"):
            call()


def test_mosaic_kernels_name_the_jax_they_need():
    said = f"it is written for jax 0.11 and 0.12 (Python 3.12), not {jax.__version__}"
    assert (said in str(refusal("mosaic_gpu"))) == (jax.__version_info__ < (0, 11))


def refusal(name):
    cell = jaxrnn.init_cell(jax.random.key(0), 2, 3, dtype=jnp.float32)
    with pytest.raises(NotImplementedError) as caught:
        jaxrnn.unroll(cell, jnp.zeros((3, 2), jnp.float32), implementation=name)
    return caught.value


def everywhere(options):
    """Every function that runs the loops, called with those options."""
    params, xs, h0, ids = random_case(dtype=jnp.float32)
    cell = params.cell
    stack = (cell, jaxrnn.Cell(cell.W, cell.W, cell.b))
    hs = jnp.zeros((6, 3, 5), jnp.float32)
    yield lambda: jaxrnn.unroll(cell, xs, h0, **options)
    yield lambda: jaxrnn.unroll_layers(stack, xs, **options)
    yield lambda: jaxrnn.bidirectional(cell, cell, xs, **options)
    yield lambda: jaxrnn.bptt(cell, xs, h0, hs, hs, **options)
    yield lambda: jaxrnn.loss_and_grads(params, xs, ids, **options)
    deep = jaxrnn.Params(stack, params.readout)
    yield lambda: jaxrnn.loss_and_grads(deep, xs, ids, **options)
    yield lambda: jaxrnn.loss_and_grads(params, xs, ids, window=2, **options)


@pytest.mark.parametrize("which", range(7))
def test_no_function_falls_back_from_a_kernel(which):
    call = list(everywhere({"implementation": "pallas_tpu"}))[which]
    with jax.disable_jit(), pytest.raises(NotImplementedError, match="it needs a TPU, not cpu"):
        call()


def test_a_second_layer_that_is_too_large_is_refused():
    cell = jaxrnn.init_cell(jax.random.key(0), 2, 4, dtype=jnp.float32)
    above = jax.eval_shape(lambda: jaxrnn.init_cell(jax.random.key(0), 4, 2000, dtype=jnp.float32))
    above = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), above)
    with built_for(TPU), pytest.raises(NotImplementedError, match="1664 in float32, not 2000"):
        jaxrnn.unroll_layers((cell, above), jnp.zeros((3, 2), jnp.float32),
                             implementation="pallas_tpu")  # fmt: skip


# Precision ------------------------------------------------------------------------------------

HIGHEST = "HIGHEST", "HIGHEST"


def precisions(f, *args):
    """Of each product in the lowered program, that of its left operand and of its right."""
    products = [line for line in lowered(f, *args).splitlines() if "dot_general" in line]
    return [tuple(re.search(r"precision = \[(\w+), (\w+)\]", p).groups()) for p in products]


@pytest.mark.parametrize("which", range(7))
def test_every_product_has_the_precision_of_the_call(which):
    found = precisions(list(everywhere({"precision": "highest"}))[which])
    assert found and set(found) == {HIGHEST}
    assert HIGHEST not in precisions(list(everywhere({}))[which])


@pytest.mark.parametrize(
    "how", [{}, {"checkpoint_every": 2}, {"window": 2}, {"implementation": "associative"}],
    ids=str,
)  # fmt: skip
def test_every_product_of_a_derivative_has_the_precision_of_the_call(how):
    params, xs, h0, _ = random_case(dtype=jnp.float32, leak=jnp.float32(0.5))
    unroll = partial(jaxrnn.unroll, precision="highest", **how)
    f = partial(loss, unroll)
    args = params.cell, xs, h0

    def second(*args):
        return jax.jvp(jax.grad(f, (0, 1, 2)), args, args)

    for program in (jax.grad(f, (0, 1, 2)), lambda *a: jax.jvp(f, a, a), second):
        assert set(precisions(program, *args)) == {HIGHEST}


# The associative scan -------------------------------------------------------------------------


def test_the_associative_scan_leaves_only_the_loop_of_the_states():
    params, xs, h0, _ = random_case(T=16)
    args = params.cell, xs, h0
    by_scan = partial(loss, jaxrnn.unroll)
    associative = partial(loss, partial(jaxrnn.unroll, implementation="associative"))
    assert trip_counts(jax.grad(by_scan), *args) == [16, 16]
    assert trip_counts(jax.grad(associative), *args) == [16]
    assert trip_counts(lambda *a: jax.jvp(associative, a, a), *args) == [16]
    states = jaxrnn.unroll(*args)[1]
    bptt = partial(jaxrnn.bptt, *args, states, implementation="associative")
    assert trip_counts(bptt, states) == []


@pytest.mark.parametrize("T", [1, 2, 37])
def test_gradients_by_associative_scan_are_those_of_the_scan(T):
    params, xs, h0, ids = random_case(T=T)
    found, expected = (
        jaxrnn.loss_and_grads(params, xs, ids, h0=h0, lengths=jnp.array([T, 0, T // 2]), **how)
        for how in ({"implementation": "associative"}, {})
    )
    assert_close(jax.tree.leaves(found), jax.tree.leaves(expected))


def test_the_associative_scan_overflows_with_the_product_of_jacobians():
    # One unit doubles, the other halves; the loss sees the second alone. Its adjoint is finite,
    # the product of all Jacobians is not, and inf · 0 is NaN.
    W = jnp.diag(jnp.array([2.0, 0.5], jnp.float32))
    cell = jaxrnn.Cell(
        jnp.eye(2, dtype=jnp.float32), W, jnp.zeros(2, jnp.float32), None, "identity"
    )

    def gradient(T, implementation):
        xs = jnp.zeros((T, 2), jnp.float32)

        def last(h0):
            return jaxrnn.unroll(cell, xs, h0, implementation=implementation)[0][1]

        return jax.grad(last)(jnp.zeros(2, jnp.float32))

    for T in (100, 400):
        assert jnp.isfinite(gradient(T, "scan")).all()
    assert jnp.isfinite(gradient(100, "associative")).all()
    assert jnp.isnan(gradient(400, "associative")).any()


def test_export_with_symbolic_steps_has_no_associative_scan():
    params, _, _, _ = random_case()
    T = jax.export.symbolic_shape("T")[0]
    xs = jax.ShapeDtypeStruct((T, 3, 4), jnp.float64)
    f = jax.jit(partial(loss_of, params.cell))
    with pytest.raises(NotImplementedError, match="implementation='associative': it needs a T"):
        jax.export.export(f)(xs)


def loss_of(cell, xs):
    return jnp.sum(jaxrnn.unroll(cell, xs, implementation="associative")[0] * weights((3, 5)))
