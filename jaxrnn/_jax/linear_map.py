"""A linear map with a hand-written transpose.

`jax.lax.custom_linear_solve` has one too, but only for square systems, and it would save four
arrays of states; `jax.custom_derivatives.linear_call` has no batching rule. So this is a primitive.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxrnn._jax.error_checks import look_into, without_checks
from jaxrnn._jax.primitive import jvp_of


class LinearMap(NamedTuple):
    """A map that is linear in its second argument.

    Args:
      forward: `forward(known, x) -> y`, on pytrees of arrays.
      transpose: `transpose(known, y, wanted) -> x`, its transpose. `wanted` has the shapes and
        dtypes of x. Leaves of y that are 0 may be None, and so may those of x in `forward`.
      plain: the same map as `forward`, in operations that JAX differentiates. It runs if `known`
        has tangents, that is from the second order on.
      effectful: whether the map has effects; it is then traced when it is applied.
    """

    forward: Callable[[Any, Any], Any]
    transpose: Callable[[Any, Any, Any], Any]
    plain: Callable[[Any, Any], Any]
    effectful: bool = False

    def __call__(self, known, given, like):
        """Apply the map; results have the types of the arrays `like`."""
        # The primitive takes and returns flat lists.
        known, known_tree = jax.tree.flatten(known)
        given, given_tree = jax.tree.flatten(given)
        like, out_tree = jax.tree.flatten(like)

        def flat(f):
            def run(known, given):
                known = jax.tree.unflatten(known_tree, known)
                return out_tree.flatten_up_to(f(known, jax.tree.unflatten(given_tree, given)))

            return run

        def transpose(known, out, wanted):
            known = jax.tree.unflatten(known_tree, known)
            out = jax.tree.unflatten(out_tree, out)
            found = self.transpose(known, out, jax.tree.unflatten(given_tree, wanted))
            return given_tree.flatten_up_to(found)

        linear = LinearMap(flat(self.forward), transpose, flat(self.plain), self.effectful)
        out = _bind(linear, known, given, [jax.typeof(x) for x in like])
        return jax.tree.unflatten(out_tree, out)


_map_p = Primitive("linear_map")
_map_p.multiple_results = True


def _bind(linear, known, given, types):
    known, given = list(known), list(given)
    effects = jax.make_jaxpr(linear.forward)(known, given).effects if linear.effectful else ()
    how = dict(split=len(known), types=tuple(types), call_effects=frozenset(effects))
    return _map_p.bind(*known, *given, linear=linear, **how)


# Traced at lowering, not when applied: a gradient applies the map only to transpose it.
@_map_p.def_impl
def _run(*leaves, linear, split, **_):
    return linear.forward(list(leaves[:split]), list(leaves[split:]))


_map_p.def_effectful_abstract_eval(lambda *_, types, call_effects, **__: (types, set(call_effects)))
mlir.register_lowering(_map_p, mlir.lower_fun(_run, multiple_results=True))


def _unchecked(*leaves, linear, split, types, **_):
    def transpose(known, out, wanted):
        of_out = without_checks(lambda known, out: linear.transpose(known, out, wanted))
        return of_out(known, out)

    forward, plain = without_checks(linear.forward), without_checks(linear.plain)
    found = LinearMap(forward, transpose, plain, linear.effectful)
    return _bind(found, leaves[:split], leaves[split:], types)


look_into(_map_p, lambda *leaves, **how: jax.make_jaxpr(partial(_run, **how))(*leaves), _unchecked)


def _differentiate(primals, tangents, *, linear, split, types, call_effects):
    del call_effects
    if all(isinstance(t, ad.Zero) for t in tangents[:split]):
        known, given = primals[:split], primals[split:]
        moved = [ad.instantiate_zeros(t) for t in tangents[split:]]
        return tuple(_bind(linear, known, now, types) for now in (given, moved))
    return jvp_of(lambda *x: linear.plain(list(x[:split]), list(x[split:])), primals, tangents)


ad.primitive_jvps[_map_p] = _differentiate


def _transposed(linear, wanted, present):
    """The transpose as a linear map of the outputs that are present; the others are 0."""

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
        effectful=linear.effectful,
    )


def _transpose(cotangents, *leaves, linear, split, **_):
    known, given = leaves[:split], leaves[split:]
    undefined = [ad.is_undefined_primal(x) for x in given]
    wanted = [x.aval if u else jax.typeof(x) for x, u in zip(given, undefined, strict=True)]
    present = [not isinstance(c, ad.Zero) for c in cotangents]
    cotangents = [c for c, p in zip(cotangents, present, strict=True) if p]
    found = _bind(_transposed(linear, wanted, present), known, cotangents, wanted)
    return [None] * split + [x if u else None for x, u in zip(found, undefined, strict=True)]


ad.primitive_transposes[_map_p] = _transpose


def _batch(leaves, axes, *, linear, split, types, call_effects):
    del call_effects
    (size,) = {x.shape[a] for x, a in zip(leaves, axes, strict=True) if a is not None}
    known, given = list(leaves[:split]), list(leaves[split:])
    known_axes, given_axes = list(axes[:split]), list(axes[split:])
    if any(a is None for a in given_axes):
        # The hand-written map would copy shared arguments, and form sums over the batch per member.
        out = jax.vmap(linear.plain, (known_axes, given_axes), axis_size=size)(known, given)
        return out, [0] * len(out)
    given = [jnp.moveaxis(x, a, 0) for x, a in zip(given, given_axes, strict=True)]

    def each(f):
        return jax.vmap(f, (known_axes, 0), axis_size=size)

    def transpose(known, out, wanted):
        one = [jax.ShapeDtypeStruct(w.shape[1:], w.dtype) for w in wanted]
        return each(lambda known, out: linear.transpose(known, out, one))(known, out)

    of_all = LinearMap(each(linear.forward), transpose, each(linear.plain), linear.effectful)
    if all(t.sharding.mesh.empty for t in types):
        types = [ShapedArray((size, *t.shape), t.dtype) for t in types]
    else:  # inside shard_map and under explicit sharding a type is more than shape and dtype
        types = jax.make_jaxpr(of_all.forward)(known, given).out_avals
    out = _bind(of_all, known, given, types)
    return out, [0] * len(out)


batching.primitive_batchers[_map_p] = _batch
