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
      forward: `forward(known, args) -> out`, on pytrees of arrays.
      transpose: `transpose(known, out, wanted) -> args`, its transpose. `wanted` has the shapes and
        dtypes of args. Leaves that are 0 may be None, here in out and in `forward` in args.
      plain: the same map as `forward`, in operations that JAX differentiates. It runs if `known`
        has tangents, that is from the second order on.
      effectful: whether the map has effects; it is then traced when it is applied.
    """

    forward: Callable[[Any, Any], Any]
    transpose: Callable[[Any, Any, Any], Any]
    plain: Callable[[Any, Any], Any]
    effectful: bool = False

    def __call__(self, known, args, like):
        """Apply the map; results have the types of the arrays `like`."""
        # The primitive takes and returns flat lists.
        known, known_tree = jax.tree.flatten(known)
        args, args_tree = jax.tree.flatten(args)
        like, out_tree = jax.tree.flatten(like)

        def flat(f):
            def run(known, args):
                known = jax.tree.unflatten(known_tree, known)
                return out_tree.flatten_up_to(f(known, jax.tree.unflatten(args_tree, args)))

            return run

        def transpose(known, out, wanted):
            known = jax.tree.unflatten(known_tree, known)
            out = jax.tree.unflatten(out_tree, out)
            args = self.transpose(known, out, jax.tree.unflatten(args_tree, wanted))
            return args_tree.flatten_up_to(args)

        linear = LinearMap(flat(self.forward), transpose, flat(self.plain), self.effectful)
        out = _bind(linear, known, args, [jax.typeof(x) for x in like])
        return jax.tree.unflatten(out_tree, out)


_map_p = Primitive("linear_map")
_map_p.multiple_results = True


def _bind(linear, known, args, types):
    known, args = list(known), list(args)
    effects = jax.make_jaxpr(linear.forward)(known, args).effects if linear.effectful else ()
    how = dict(split=len(known), types=tuple(types), call_effects=frozenset(effects))
    return _map_p.bind(*known, *args, linear=linear, **how)


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
    unchecked = LinearMap(forward, transpose, plain, linear.effectful)
    return _bind(unchecked, leaves[:split], leaves[split:], types)


look_into(_map_p, lambda *leaves, **how: jax.make_jaxpr(partial(_run, **how))(*leaves), _unchecked)


def _differentiate(primals, tangents, *, linear, split, types, call_effects):
    del call_effects
    if all(isinstance(t, ad.Zero) for t in tangents[:split]):
        known, args = primals[:split], primals[split:]
        moved = [ad.instantiate_zeros(t) for t in tangents[split:]]
        return tuple(_bind(linear, known, values, types) for values in (args, moved))
    return jvp_of(lambda *x: linear.plain(list(x[:split]), list(x[split:])), primals, tangents)


ad.primitive_jvps[_map_p] = _differentiate


def _transposed(linear, wanted, present):
    """The transpose as a linear map of the outputs that are present; the others are 0."""

    def chosen(f):
        return lambda known, args: [y for y, p in zip(f(known, args), present, strict=True) if p]

    def plain(known, out):
        of_args = partial(chosen(linear.plain), known)
        (args,) = jax.linear_transpose(of_args, wanted)(out)
        return args

    def forward(known, out):
        out = iter(out)
        return linear.transpose(known, [next(out) if p else None for p in present], wanted)

    return LinearMap(
        forward=forward,
        transpose=lambda known, args, _: chosen(linear.forward)(known, args),
        plain=plain,
        effectful=linear.effectful,
    )


def _transpose(cotangents, *leaves, linear, split, **_):
    known, args = leaves[:split], leaves[split:]
    undefined = [ad.is_undefined_primal(x) for x in args]
    wanted = [x.aval if u else jax.typeof(x) for x, u in zip(args, undefined, strict=True)]
    present = [not isinstance(c, ad.Zero) for c in cotangents]
    cotangents = [c for c, p in zip(cotangents, present, strict=True) if p]
    results = _bind(_transposed(linear, wanted, present), known, cotangents, wanted)
    return [None] * split + [x if u else None for x, u in zip(results, undefined, strict=True)]


ad.primitive_transposes[_map_p] = _transpose


def _batch(leaves, axes, *, linear, split, types, call_effects):
    del call_effects
    (size,) = {x.shape[a] for x, a in zip(leaves, axes, strict=True) if a is not None}
    known, args = list(leaves[:split]), list(leaves[split:])
    known_axes, args_axes = list(axes[:split]), list(axes[split:])
    if any(a is None for a in args_axes):
        # The hand-written map would copy shared arguments, and form sums over the batch per member.
        out = jax.vmap(linear.plain, (known_axes, args_axes), axis_size=size)(known, args)
        return out, [0] * len(out)
    args = [jnp.moveaxis(x, a, 0) for x, a in zip(args, args_axes, strict=True)]

    def each(f):
        return jax.vmap(f, (known_axes, 0), axis_size=size)

    def transpose(known, out, wanted):
        one = [jax.ShapeDtypeStruct(w.shape[1:], w.dtype) for w in wanted]
        return each(lambda known, out: linear.transpose(known, out, one))(known, out)

    of_all = LinearMap(each(linear.forward), transpose, each(linear.plain), linear.effectful)
    if all(t.sharding.mesh.empty for t in types):
        types = [ShapedArray((size, *t.shape), t.dtype) for t in types]
    else:  # inside shard_map and under explicit sharding a type is more than shape and dtype
        types = jax.make_jaxpr(of_all.forward)(known, args).out_avals
    out = _bind(of_all, known, args, types)
    return out, [0] * len(out)


batching.primitive_batchers[_map_p] = _batch
