"""Wrong formulas fail the suite: each mutant is a copy of the package with one line changed."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
WITNESSES = [
    f"tests/test_{name}.py"
    for name in (
        "gradients",
        "orders",
        "vmap",
        "schedule",
        "reach",
        "layers",
        "implementation",
        "kernels",
        "train",
        "devices",
    )
]

# name -> (file, what stands there, what the mutant says instead, the witnesses that see it)
MUTANTS = {
    "adjoint off by a thousandth": (
        "_recurrence.py", "J_t.through_W(W_T_times(delta))", "1.001 * W_T_times(delta)",
        "match_a_naive_scan and tanh and 7",
    ),
    "adjoint without its transpose": (
        "_recurrence.py", "W_T_times = repeated_product(J.W, ",
        "W_T_times = repeated_product(J.W.T, ", "match_a_naive_scan and tanh and 7",
    ),
    "adjoint added after the product": (
        "_recurrence.py", "adjoint = from_later if g is None else g + from_later",
        "adjoint = from_later",
        "match_a_naive_scan and tanh and 7",
    ),
    "state before off by one": (
        "_jacobians.py", "jnp.concatenate([h0[None], hs[:-1]])", "hs",
        "match_a_naive_scan and tanh and 7",
    ),
    "slope off by a thousandth": (
        "_activation.py", "(1 - h) * (1 + h)", "1.001 * (1 - h) * (1 + h)",
        "match_a_naive_scan and tanh and 7",
    ),
    "leak that does not pass the state on": (
        "_jacobians.py", "(1 - like(self.leak, v)) * v", "0.999 * (1 - like(self.leak, v)) * v",
        "match_a_naive_scan and leak and 7",
    ),
    "tangent of W without its transpose": (
        "_linearised.py", "product(at.seen, dcell.W.T, ", "product(at.seen, dcell.W, ",
        "match_a_naive_scan and tanh and 7",
    ),
    "hand gradient of V from the state before": (
        "_loss_and_grads.py", "_sum_outer(error, hs, ", "_sum_outer(error, jnp.roll(hs, 1, 0), ",
        "equations_of_section_3",
    ),
    "the source's sign": (
        "_loss.py", "y_hat - jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)",
        "jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype) - y_hat",
        "equations_of_section_3",
    ),
    "one Jacobian too few in the double sum": (
        "textbook.py", "jnp.concatenate([jacobians[1:], jnp.zeros_like(jacobians[:1])])",
        "jacobians", "double_sum",
    ),
    "gradient of a leak without the state before": (
        "_linearised.py", "adjoint * (at.phi - at.h_prev.astype(adjoint.dtype))",
        "adjoint * at.phi",
        "match_a_naive_scan and leak and 7",
    ),
    "tangent of a leak without the state before": (
        "_linearised.py", "(at.phi - at.h_prev.astype(e.dtype))", "at.phi.astype(e.dtype)",
        "forward_mode and leaky and 2",
    ),
    "no cotangent of the last state": (
        "_tangent.py", "if g_last is None else g_last", "if g_last is None else 0 * g_last",
        "match_a_naive_scan and tanh and 7",
    ),
    "tangent of the first state at the last step, in second orders": (
        "_tangent.py", "e.at[-1 if loops.reverse else 0]", "e.at[0 if loops.reverse else -1]",
        "hessian_vector_products and tanh",
    ),
    "frozen steps that have a Jacobian": (
        "_recurrence.py", "select(mask, passed, adjoint)", "select(mask, passed, 0 * adjoint)",
        "reverse_and_lengths and lengths",
    ),
    "a fold that turns the members around": (
        "_fold.py", "return jnp.moveaxis(x, axis, to)", "return jnp.moveaxis(x, axis, to)[::-1]",
        "under_vmap and batch and first",
    ),
    "ids that miss their column": (
        "_linearised.py", "dU.T.at[xs.ids]", "dU.T.at[xs.ids - 1]", "ids_under_every_choice and 2",
    ),
    "wrong matvec, seen by second orders only": (
        "_recurrence.py", "return y - times(", "return y - 1.001 * times(",
        "hessian_vector_products and tanh and reverse",
    ),
    "a segment that starts from the state after": (
        "_segments.py", "else (length - 1, time - 1)", "else (length, time)",
        "gradients_under_every_choice and plain and 2",
    ),
    "a segment that forgets what the later ones pass back": (
        "_tangent.py", "return (share.h0, sums)", "return (0 * share.h0, sums)",
        "gradients_under_every_choice and plain and 2",
    ),
    "a rest that is written over": (
        "_segments.py", "last = count * length", "last = (count - 1) * length",
        "gradients_under_every_choice and plain and 2",
    ),
    "inputs before the loop without the drive": (
        "_states.py", "from_inputs(weights, xs, drive), None",
        "from_inputs(weights, xs), None", "gradients_under_every_choice and plain and before",
    ),
    "weights on the left, not transposed": (
        "_step.py", "left, accumulate = matrix.T,", "left, accumulate = matrix,",
        "gradients_under_every_choice and plain and left",
    ),
    "a cut one step late": (
        "_padding.py", "(number % every == 0)", "(number % every == 1 % every)",
        "of_the_definition and truncate and plain and not checkpoint",
    ),
    "a cut that first orders alone see": (
        "_linearised.py", "lax.stop_gradient(h_prev)", "h_prev",
        "of_the_definition and truncate and plain and not checkpoint",
    ),
    "a window one step too long": (
        "_window.py", "length=sweeps - 1", "length=sweeps",
        "of_the_definition and window and plain",
    ),
    "a window whose first state moves, seen by second orders only": (
        "_window.py", "lax.stop_gradient((known.steps.hs, known.h0))",
        "(known.steps.hs, known.h0)", "of_the_definition and window and plain",
    ),
    "a window of the double sum one step too long": (
        "textbook.py", "steps - k < how.window", "steps - k <= how.window",
        "double_sum_is_cut_off and window and plain",
    ),
    "a segment computed again that hands nothing back": (
        "_checkpointed.py", "from_later = share.h0", "from_later = 0 * share.h0",
        "change_no_gradient and floats and 2",
    ),
    "a segment computed again with the lengths of the first": (
        "_states.py", "leading_shape(xs)[0], first)", "leading_shape(xs)[0], 0 * first)",
        "change_no_gradient and lengths and 2",
    ),
    "a segment of the loss computed again without its cuts": (
        "_loss_and_grads.py", "recurrence(cell, now, h_before, loops=loops)[1]",
        "recurrence(cell, now._replace(cut=None), h_before, loops=loops)[1]",
        "keep_the_cuts and 3",
    ),
    "kept states that carry no derivative": (
        "_checkpointed.py", "if g_start is not None:", "if False:",
        "no_derivative_of_second_order and False",
    ),
    "both directions alike": (
        "_layers.py", 'reverse=not options["reverse"]', 'reverse=options["reverse"]',
        "two_directions",
    ),
    "a residual that forgets the layers below": (
        "_layers.py", "y = hs + y if residual and h_last else hs", "y = hs",
        "stack_is_one_layer and True",
    ),
    "products of Jacobians in the wrong order": (
        "_associative.py", "jnp.matmul(B, A,", "jnp.matmul(A, B,", "by_associative_scan and 37",
    ),
    "an associative adjoint that reads the Jacobian of its own step": (
        "_associative.py", "jnp.roll(matrices, 1 if J.loops.reverse else -1, 0)", "matrices",
        "by_associative_scan and 37",
    ),
    "a kernel's adjoint without its transpose": (
        "_kernels/run.py", "J.W.T, J.leak", "J.W, J.leak", "states_and_all_gradients and TPU",
    ),
    "a kernel that goes through its cuts": (
        "_kernels/loops.py", "jnp.where(flags.cut > 0, 0.0, delta)", "delta",
        "states_and_all_gradients and TPU and sigmoid",
    ),
    "a kernel whose leak passes too little on": (
        "_kernels/loops.py", "_where(flags.valid, _keep(leak, adjoint), adjoint)",
        "_where(flags.valid, 0.999 * _keep(leak, adjoint), adjoint)",
        "states_and_all_gradients and TPU and identity",
    ),
    "members of a kernel that pair with each other's weights": (
        "_kernels/run.py", "x = jnp.moveaxis(x, axis, place)",
        "x = jnp.moveaxis(x, axis, place) if place else jnp.moveaxis(x, axis, place)[::-1]",
        "members_run_side_by_side and TPU",
    ),
    "an update by a sum instead of a mean": (
        "train.py", "g / jnp.asarray(size, g.dtype)", "g", "is_the_sources_update",
    ),
    "gradients of one's own loss added up over devices twice": (
        "train.py", "params = varying_like(params, inputs)", "pass",
        "ones_own_is_split",
    ),
    "a window that forgets the one before": (
        "train.py", "targets, h0=h)", "targets)", "the_carried_state and rmsprop",
    ),
}  # fmt: skip


def verdict(copy, chosen):
    # What `-k` would not choose is not even imported.
    first = chosen.split()[0]
    files = [name for name in WITNESSES if first in (copy / name).read_text()]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist",
         "-o", "addopts=", *(files or WITNESSES), "-k", chosen],
        cwd=copy, capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    return run.returncode, run.stdout


@pytest.fixture
def copy(tmp_path):
    for folder in ("jaxrnn", "tests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_mutant_fails(copy, mutant):
    file, line, wrong, chosen = mutant
    source = (copy / "jaxrnn" / file).read_text()
    assert source.count(line) == 1, f"{file} no longer holds {line!r} once"
    (copy / "jaxrnn" / file).write_text(source.replace(line, wrong))
    code, output = verdict(copy, chosen)
    assert code == 1 and "relative error" in output, output


def test_the_unchanged_copy_passes(copy):
    code, output = verdict(copy, "match_a_naive_scan and tanh and 7")
    assert code == 0 and "passed" in output, output


def test_a_wrong_matvec_is_invisible_at_first_order(copy):
    file, line, wrong, _ = MUTANTS["wrong matvec, seen by second orders only"]
    path = copy / "jaxrnn" / file
    path.write_text(path.read_text().replace(line, wrong))
    code, output = verdict(copy, "match_a_naive_scan and tanh and 7")
    assert code == 0, output
