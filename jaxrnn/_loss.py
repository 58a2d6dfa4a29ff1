"""The loss: cross-entropy of a softmax, from optax."""

import jax
import jax.numpy as jnp
import optax

from jaxrnn import _checks
from jaxrnn._dtypes import accumulation_dtype, wide
from jaxrnn._padding import without_padding


def cross_entropy(
    logits: jax.Array, targets: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Cross-entropy of each step, in nats.

    L_t = −y_t · ln softmax(Ω_t) = ln Σ_k exp Ω_{t,k} − y_t · Ω_t

    Args:
      logits: Ω, `[T, *batch, K]` (any leading axes), float.
      targets: y, integer ids `[T, *batch]`, or floats `[T, *batch, K]`: one-hot rows or
        probabilities.
      where: bool, `[T, *batch]`: steps that count. Elsewhere the loss is 0, whatever stands
        there in logits and targets, and no gradient flows.

    Returns:
      Losses, `[T, *batch]`: float32 for half-precision logits, else in the dtype of logits.

    Raises:
      TypeError: logits that are not floating.
      ValueError: shapes that do not fit, or an id outside 0 … K − 1; under jit, where its
        value cannot be seen, such an id gives NaN.

    Numerics: the maximum is subtracted before the exponential, so logits of ±1e4 are safe.

    Source: section 2, equations 3 and 4. The source lets t of the softmax run to |A|; it runs
    to T, and only the sum inside the softmax runs over the |A| = K characters.
    """
    logits = _checks.floating("logits", logits)
    if logits.ndim < 1:
        _checks.bad_value("logits", "shape [T, *batch, K]", [])
    if where is not None:
        where = _checks.booleans("where", where, logits.shape[:-1])
    targets = check_targets(targets, logits.shape, where)
    logits = logits.astype(accumulation_dtype(logits.dtype))
    # Selected before the logarithm too: NaN on an uncounted step then has no gradient.
    logits = without_padding(logits, where)
    if jnp.issubdtype(targets.dtype, jnp.integer):
        targets, inside = _inside(targets, logits.shape[-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.where(inside, targets, 0)
        )
        losses = jnp.where(inside, losses, jnp.nan)
    else:
        losses = optax.softmax_cross_entropy(logits, targets.astype(logits.dtype))
    return without_padding(losses, where)


def output_error(
    logits: jax.Array, targets: jax.Array, where: jax.Array | None = None
) -> jax.Array:
    """∂L_t/∂Ω_t = ŷ_t − y_t, the softmax gradient of section 3.1; 0 where `where` is False.

    A target row that sums to another value s than 1 has s ŷ_t − y_t.
    """
    logits = logits.astype(accumulation_dtype(logits.dtype))
    y_hat = jax.nn.softmax(without_padding(logits, where))
    if jnp.issubdtype(targets.dtype, jnp.integer):
        targets, inside = _inside(targets, logits.shape[-1])
        # Compared, not gathered: XLA fuses the one-hot rows away.
        error = y_hat - jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
        error = jnp.where(inside[..., None], error, jnp.nan)
    else:
        y = targets.astype(logits.dtype)
        error = y_hat * jnp.sum(y, axis=-1, keepdims=True) - y
    return without_padding(error, where)


def _inside(targets, size):
    targets = wide(targets)
    return targets, (targets >= 0) & (targets < size)


def check_targets(targets: jax.Array, shape: tuple[int, ...], where: jax.Array | None) -> jax.Array:
    """Require ids or rows that fit logits of this shape; ids where `where` is False may be any."""
    targets = _checks.array("targets", targets)
    if jnp.issubdtype(targets.dtype, jnp.integer):
        rows = shape, "rows must be floats"
        hint = rows if targets.ndim == len(shape) else _checks.swapped(shape[:-1])
        _checks.shaped("targets", targets, shape[:-1], hint)
        _checks.in_range("targets", targets, shape[-1], where)
        return targets
    expected = f"integer ids, or floats of shape {list(shape)}"
    if not jnp.issubdtype(targets.dtype, jnp.floating):
        _checks.bad_type("targets", expected, targets.dtype)
    if targets.shape == shape[:-1]:
        _checks.bad_value("targets", expected, f"floats of shape {list(targets.shape)}")
    return _checks.shaped("targets", targets, shape, _checks.swapped(shape))
