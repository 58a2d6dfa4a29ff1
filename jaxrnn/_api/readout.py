"""The readout and the loss."""

from typing import Any

import jax

from jaxrnn._api import checks
from jaxrnn._api.cell import check_last_axis, check_readout
from jaxrnn._api.sequences import check_targets
from jaxrnn._core import loss
from jaxrnn._types import Readout


def apply_readout(readout: Readout, hs: jax.Array, *, precision: Any = None) -> jax.Array:
    """The logits Ω_t = V s_t + c.

    For custom losses and samplers; `loss_and_grads` applies the readout itself.

    Args:
      readout: the `Readout`.
      hs: outputs of the units, `[..., H]`: the states in the rate form, else `outputs(cell, hs)`.
      precision: of the product, as in `jax.numpy.matmul`.

    Returns:
      Logits, `[..., K]`, in the result dtype of readout and hs.

    Raises:
      TypeError: a dtype that is not floating.
      ValueError: shapes that do not fit; an invalid precision.

    Numerics: the product accumulates in float32 or better.
    Source: section 2, equation 2.
    """
    checks.precision(precision)
    checks.not_swapped("readout", readout, "hs", hs, Readout)
    readout = check_readout("readout", readout)
    return loss.logits(readout, check_last_axis("hs", hs, readout.V.shape[1]), precision)


def cross_entropy(
    logits: jax.Array, targets: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Cross-entropy of each step, in nats.

    L_t = −y_t · ln softmax(Ω_t) = ln Σ_k exp Ω_{t,k} − y_t · Ω_t

    Args:
      logits: Ω, `[T, *batch, K]` (any leading axes), float.
      targets: y, integer ids `[T, *batch]`, or floats `[T, *batch, K]`: one-hot rows or
        probabilities.
      where: bool mask, `[T, *batch]`. Where it is False the loss is 0, whatever the logits and
        targets, and no gradient flows.

    Returns:
      Losses, `[T, *batch]`: float32 for half-precision logits, else in the dtype of logits.

    Raises:
      TypeError: logits that are not floating.
      ValueError: shapes that do not fit, or an id outside 0 … K − 1, which under jit, where its
        value is unknown, gives NaN.

    Numerics: the maximum is subtracted before the exponential, so logits of ±1e4 are safe. A
    class with logit −∞ contributes 0 if its target is 0, else ∞.
    Source: section 2, equations 3 and 4.
    """
    logits = checks.floating("logits", logits)
    if logits.ndim < 1:
        checks.bad_value("logits", "shape [T, *batch, K]", [])
    if where is not None:
        where = checks.booleans("where", where, logits.shape[:-1])
    return loss.cross_entropy(logits, check_targets(targets, logits.shape, where), where)
