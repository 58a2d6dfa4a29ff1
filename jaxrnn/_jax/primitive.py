"""Primitives that stand for a jaxpr, their parameter `call`, with custom transformation rules."""

from collections.abc import Callable, Sequence

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, mlir


def make_primitive(name: str) -> Primitive:
    """A primitive that runs and compiles `call`; it has no derivative and batching rules yet."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(run)
    primitive.def_effectful_abstract_eval(lambda *_, call, **__: (call.out_avals, call.effects))
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))
    return primitive


def run(*leaves, call, **_):
    return jaxpr_as_fun(call)(*leaves)


def is_zero(tangent) -> bool:
    """Whether a tangent is None, a symbolic zero, or of dtype float0."""
    if tangent is None or isinstance(tangent, ad.Zero):
        return True
    return tangent.dtype == jax.dtypes.float0


def jvp_of(f: Callable, primals: Sequence, tangents: Sequence) -> tuple:
    """`jax.jvp` of `f(*leaves)`, with the leaves that have no tangent as constants."""
    moving = [n for n, t in enumerate(tangents) if not is_zero(t)]

    def of_moving(*values):
        leaves = list(primals)
        for n, value in zip(moving, values, strict=True):
            leaves[n] = value
        return f(*leaves)

    return jax.jvp(of_moving, [primals[n] for n in moving], [tangents[n] for n in moving])
