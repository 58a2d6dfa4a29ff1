"""A linear map that JAX runs, and transposes, as its author wrote both.

`jax.lax.custom_linear_solve` takes a hand-written transpose too, but of a square system alone, and
`jax.custom_derivatives.linear_call` has no batching rule. So this is a primitive of its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from jaxrnn._primitive import jvp_of, make_primitive


class LinearMap(NamedTuple):
    """A map that is linear in its second argument, written three times.

    Args:
      forward: `forward(known, given) -> out`, pytrees of arrays.
      transpose: `transpose(known, out, given) -> given`, its transpose by hand; the last
        argument has the shapes and dtypes that are wanted, and no values. Leaves of `out` that
        are known to be 0 are None; forward is to take None so too.
      plain: the same as forward in operations that JAX differentiates by itself. It runs
        where `known` moves, which is to say from the second order on.
    """

    forward: Callable[[Any, Any], Any]
    transpose: Callable[[Any, Any, Any], Any]
    plain: Callable[[Any, Any], Any]

    def __call__(self, known, given):
        """Apply the map."""
        # The primitive has flat lists on both sides.
        known, known_tree = jax.tree.flatten(known)
        given, given_tree = jax.tree.flatten(given)
        out_tree = []

        def flat(f):
            def run(known, given):
                known = jax.tree.unflatten(known_tree, known)
                out, tree = jax.tree.flatten(f(known, jax.tree.unflatten(given_tree, given)))
                out_tree.append(tree)
                return out

            return run

        def transpose(known, out, wanted):
            known = jax.tree.unflatten(known_tree, known)
            out = jax.tree.unflatten(out_tree[0], out)
            found = self.transpose(known, out, jax.tree.unflatten(given_tree, wanted))
            return jax.tree.leaves(found)

        out = _bind(LinearMap(flat(self.forward), transpose, flat(self.plain)), known, given)
        return jax.tree.unflatten(out_tree[0], out)


_map_p = make_primitive("linear_map")


def _bind(linear, known, given):
    call = jax.make_jaxpr(linear.forward)(list(known), list(given))
    return _map_p.bind(*known, *given, call=call, linear=linear, split=len(known))


def _differentiate(primals, tangents, *, call, linear, split):
    if all(isinstance(t, ad.Zero) for t in tangents[:split]):
        moved = [ad.instantiate_zeros(t) for t in tangents[split:]]
        out = _map_p.bind(*primals, call=call, linear=linear, split=split)
        return out, _map_p.bind(*primals[:split], *moved, call=call, linear=linear, split=split)
    return jvp_of(lambda *x: linear.plain(list(x[:split]), list(x[split:])), primals, tangents)


ad.primitive_jvps[_map_p] = _differentiate


def _transposed(linear, wanted, present):
    """The transpose as a map of those outputs that are present; the others are 0."""

    def chosen(f):
        return lambda known, given: [y for y, p in zip(f(known, given), present, strict=True) if p]

    def plain(known, out):
        of_given = partial(chosen(linear.plain), known)
        (given,) = jax.linear_transpose(of_given, wanted)(out)
        return given

    def forward(known, out):
        out = iter(out)
        return linear.transpose(known, [next(out) if p else None for p in present], wanted)

    return LinearMap(
        forward=forward,
        transpose=lambda known, given, _: chosen(linear.forward)(known, given),
        plain=plain,
    )


def _transpose(cotangents, *leaves, call, linear, split):
    del call
    known, given = leaves[:split], leaves[split:]
    undefined = [ad.is_undefined_primal(x) for x in given]
    wanted = [x.aval if u else jax.typeof(x) for x, u in zip(given, undefined, strict=True)]
    present = [not isinstance(c, ad.Zero) for c in cotangents]
    cotangents = [c for c, p in zip(cotangents, present, strict=True) if p]
    found = _bind(_transposed(linear, wanted, present), known, cotangents)
    return [None] * split + [x if u else None for x, u in zip(found, undefined, strict=True)]


ad.primitive_transposes[_map_p] = _transpose


def _batch(leaves, axes, *, call, linear, split):
    del call
    (size,) = {x.shape[a] for x, a in zip(leaves, axes, strict=True) if a is not None}
    known, given = list(leaves[:split]), list(leaves[split:])
    known_axes, given_axes = list(axes[:split]), list(axes[split:])
    if any(a is None for a in given_axes):
        # By hand the shared ones would be taken apart, and what is summed over the batch
        # would exist for each member.
        out = jax.vmap(linear.plain, (known_axes, given_axes), axis_size=size)(known, given)
        return out, [0] * len(out)
    given = [jnp.moveaxis(x, a, 0) for x, a in zip(given, given_axes, strict=True)]

    def each(f):
        return jax.vmap(f, (known_axes, 0), axis_size=size)

    def transpose(known, out, wanted):
        one = [jax.ShapeDtypeStruct(w.shape[1:], w.dtype) for w in wanted]
        return each(lambda known, out: linear.transpose(known, out, one))(known, out)

    out = _bind(LinearMap(each(linear.forward), transpose, each(linear.plain)), known, given)
    return out, [0] * len(out)


batching.primitive_batchers[_map_p] = _batch
