"""A primitive of JAX that stands for a program, until a transformation asks how it is meant.

By the parts of JAX made for that (`jax.extend`, `jax.interpreters`). Its parameter `call` is the
program as a jaxpr, which printers and walkers see.
"""

from collections.abc import Callable, Sequence

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, mlir


def make_primitive(name: str) -> Primitive:
    """One that runs and compiles `call`; derivatives and batching are still to be registered."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(run)
    primitive.def_effectful_abstract_eval(lambda *_, call, **__: (call.out_avals, call.effects))
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))
    return primitive


def run(*leaves, call, **_):
    """What the primitive computes."""
    return jaxpr_as_fun(call)(*leaves)


def is_zero(tangent) -> bool:
    """Whether a tangent is None, JAX's symbolic zero, or that of an integer."""
    if tangent is None or isinstance(tangent, ad.Zero):
        return True
    return tangent.dtype == jax.dtypes.float0


def jvp_of(f: Callable, primals: Sequence, tangents: Sequence) -> tuple:
    """The derivative of `f(*leaves)`, which sees what does not move as a constant."""
    moving = [n for n, t in enumerate(tangents) if not is_zero(t)]

    def of_moving(*values):
        leaves = list(primals)
        for n, value in zip(moving, values, strict=True):
            leaves[n] = value
        return f(*leaves)

    return jax.jvp(of_moving, [primals[n] for n in moving], [tangents[n] for n in moving])
