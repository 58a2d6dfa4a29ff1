"""Every transformation of JAX around one recurrent layer: ours in the tests, peers by command.

`python tests/matrix.py --run` runs every transformation on every row that is installed, or only on
the rows that are named, and writes the results into matrix.json; `--write tests/README.md` writes
them as a table between its two marks.
"""

import argparse
import importlib.util
import json
import pathlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from forms import naive
from helpers import TOLERANCE, error, inner, random_case, weights, write_table
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

DATE = "2026-11-23"
FOUND = pathlib.Path(__file__).with_name("matrix.json")
T, B, D, H = 5, 4, 3, 4
LENGTHS = np.array([5, 3, 1, 4])
EMPTY = np.array([5, 0, 2, 0])
GAPS = np.array([[1, 0, 1, 1, 1], [0, 1, 1, 0, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 1]], bool).T


def scalar(f):
    """A loss in which every state counts, and each in another way."""

    def loss(*args):
        h_last, hs = f(*args)
        return jnp.sum(jnp.sin(3 * hs)) + jnp.sum(jnp.exp(h_last))

    return loss


def all_args(loss, args):
    return jax.grad(lambda packed: loss(*packed))(args)


def gradient(f, args, _=None):
    return all_args(scalar(f), args)


class Transformation(NamedTuple):
    """One way to transform a layer.

    Args:
      group: the row of the table it belongs to.
      run: `run(f, args, tangents)`, f being like `unroll`: a pytree of arrays.
      plain: what the naive scan computes in its place, where a plainer way gives the same
        numbers; `run` itself by default.
      order: the order of the derivatives.
      jitted: whether `run` is compiled as one program.
      needs: the option of f that it uses: "lengths" or "mask".
    """

    group: str
    run: Callable[..., Any]
    plain: Callable[..., Any]
    order: int = 1
    jitted: bool = True
    needs: str | None = None


TRANSFORMATIONS: dict[str, Transformation] = {}


def transformation(group, name, plain=None, **how):
    def add(run):
        assert name not in TRANSFORMATIONS
        TRANSFORMATIONS[name] = Transformation(group, run, plain or run, **how)
        return run

    return add


def forward(f, args, _=None):
    return f(*args)


# What compiles --------------------------------------------------------------------------------


@transformation("`jit`, ahead of time, `eval_shape`", "jit")
def _(f, args, tangents):
    return jax.jit(f)(*args)


@transformation("`jit`, ahead of time, `eval_shape`", "ahead of time", forward, jitted=False)
def _(f, args, tangents):
    return jax.jit(f).lower(*args).compile()(*args)


@transformation("`jit`, ahead of time, `eval_shape`", "eval_shape")
def _(f, args, tangents):
    shapes = jax.eval_shape(partial(gradient, f), args)
    return jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)


# vmap -----------------------------------------------------------------------------------------

DATA, PARAMETERS, BOTH = "`vmap` over data", "`vmap` over parameters", "nested `vmap`"


def over_data(f, axis):
    return jax.vmap(f, (None, axis, 0), (0, axis))


def mapped_over_data(axis, f, args, _):
    cell, xs, h0 = args

    def mapped(cell, xs, h0):
        return over_data(f, axis)(cell, jnp.moveaxis(xs, 1, axis), h0)

    one = jax.vmap(lambda x, h: gradient(f, (cell, x, h)), (axis, 0))
    return gradient(mapped, args), one(jnp.moveaxis(xs, 1, axis), h0)


in_place = partial(mapped_over_data, 1)
for axis, where in ((0, "first"), (1, "in place"), (2, "last")):
    transformation(DATA, f"vmap over data, {where}", in_place)(partial(mapped_over_data, axis))


def members(cell):
    return jax.tree.map(lambda x: jnp.stack([x, 0.9 * x, -x]), cell)


@transformation(PARAMETERS, "vmap over parameters")
def _(f, args, tangents):
    return jax.vmap(f, (0, None, None))(members(args[0]), *args[1:])


@transformation(PARAMETERS, "grad of vmap over parameters")
def _(f, args, tangents):
    return gradient(jax.vmap(f, (0, None, None)), (members(args[0]), *args[1:]))


@transformation(PARAMETERS, "vmap of grad over parameters")
def _(f, args, tangents):
    return jax.vmap(lambda cell: gradient(f, (cell, *args[1:])))(members(args[0]))


@transformation(BOTH, "data inside parameters")
def _(f, args, tangents):
    nested = jax.vmap(over_data(f, 1), (0, None, None))
    return gradient(nested, (members(args[0]), *args[1:]))


@transformation(BOTH, "parameters inside data")
def _(f, args, tangents):
    nested = over_data(jax.vmap(f, (0, None, None)), 1)
    return gradient(lambda *a: nested(*a), (members(args[0]), *args[1:]))


@transformation(BOTH, "vmap of vmap of jvp")
def _(f, args, tangents):
    cells, directions = members(args[0]), members(tangents[0])

    def one(cell, d_cell, x, dx, h, dh):
        return jax.jvp(f, (cell, x, h), (d_cell, dx, dh))

    each = jax.vmap(one, (None, None, 1, 1, 0, 0))
    both = jax.vmap(each, (0, 0, None, None, None, None))
    return both(cells, directions, args[1], tangents[1], args[2], tangents[2])


# First order ----------------------------------------------------------------------------------

REVERSE, FORWARD = "`grad`, `vjp`, `jacrev`", "`jvp`, `jacfwd`"


transformation(REVERSE, "grad")(gradient)


@transformation(REVERSE, "value_and_grad")
def _(f, args, tangents):
    return jax.value_and_grad(scalar(f), (0, 1, 2))(*args)


@transformation(REVERSE, "vjp")
def _(f, args, tangents):
    out, pull = jax.vjp(f, *args)
    return out, pull(jax.tree.map(jnp.cos, out))


@transformation(REVERSE, "jacrev")
def _(f, args, tangents):
    return jax.jacrev(f, (0, 1, 2))(*args)


@transformation(FORWARD, "jvp")
def forward_mode(f, args, tangents):
    return jax.jvp(f, args, tangents)


@transformation(FORWARD, "jacfwd")
def _(f, args, tangents):
    return jax.jacfwd(f, (0, 1, 2))(*args)


LINEAR = "`linearize`, `linear_transpose`"


@transformation(LINEAR, "linearize")
def _(f, args, tangents):
    out, push = jax.linearize(f, *args)
    return out, push(*tangents)


@transformation(LINEAR, "linear_transpose")
def _(f, args, tangents):
    out, push = jax.linearize(f, *args)
    return jax.linear_transpose(push, *args)(out)


# Second and third order -----------------------------------------------------------------------

PRODUCTS, THIRD = "Hessian times vector, four mixtures", "third derivatives"


@transformation("`hessian`", "hessian", order=2)
def _(f, args, tangents):
    return jax.hessian(scalar(f), (0, 1, 2))(*args)


def forward_over_reverse(loss, args, tangents):
    return jax.jvp(lambda *a: all_args(loss, a), args, tangents)[1]


def reverse_over_forward(loss, args, tangents):
    return all_args(lambda *a: jax.jvp(loss, a, tangents)[1], args)


def reverse_over_reverse(loss, args, tangents):
    return all_args(lambda *a: inner(all_args(loss, a), tangents), args)


def forward_over_forward(loss, args, tangents):
    return jax.jvp(lambda *a: jax.jvp(loss, a, tangents)[1], args, tangents)[1]


MIXTURES = {
    "forward over reverse": forward_over_reverse,
    "reverse over forward": reverse_over_forward,
    "reverse over reverse": reverse_over_reverse,
    "forward over forward": forward_over_forward,
}


def product(mixture, f, args, tangents):
    return mixture(scalar(f), args, tangents)


def third(mixture, outer, f, args, tangents):
    def curvature(*a):
        found = mixture(scalar(f), a, tangents)
        return found if mixture is forward_over_forward else inner(found, tangents)

    if outer == "forward":
        return jax.jvp(curvature, args, tangents)
    return all_args(curvature, args)


for name, mixture in MIXTURES.items():
    transformation(PRODUCTS, name, order=2)(partial(product, mixture))
for name, outer in (
    ("forward over reverse", "forward"), ("reverse over reverse", "reverse"),
    ("forward over forward", "forward"),
):  # fmt: skip
    which = partial(third, MIXTURES[name], outer)
    transformation(THIRD, f"{outer} over {name}", order=3)(which)


# Inside other programs ------------------------------------------------------------------------

CHECKPOINT, CONTROL = "`jax.checkpoint` and its policies", "in `scan`, `cond`, `while_loop`"


def checkpointed(derivative, policy, f, args, tangents):
    policy = getattr(jax.checkpoint_policies, policy) if policy else None
    return derivative(jax.checkpoint(f, policy=policy), args, tangents)


def hessian_times_vector(f, args, tangents):
    return forward_over_reverse(scalar(f), args, tangents)


for policy in (None, "nothing_saveable", "dots_saveable", "everything_saveable"):
    name = f"checkpoint, {policy or 'no policy'}"
    transformation(CHECKPOINT, name, gradient)(partial(checkpointed, gradient, policy))
of_product = partial(checkpointed, hessian_times_vector, None)
transformation(CHECKPOINT, "checkpoint, second order", hessian_times_vector, order=2)(of_product)


def in_scan(f, cell, xs, h0):
    # The last state of one pass starts the next.
    return lax.scan(lambda h, x: f(cell, x, h), h0, jnp.stack([xs, jnp.cos(xs)]))


def in_fori_loop(f, cell, xs, h0):
    h = lax.fori_loop(0, 2, lambda _, h: f(cell, xs, h)[0], h0)
    return h, h


def in_cond(f, *args):
    def other(cell, xs, h0):
        h_last, hs = f(cell, jnp.sin(xs), h0)
        return 2 * h_last, -hs

    return lax.cond(jnp.sum(args[2]) < 1e3, f, other, *args)


def in_while_loop(f, cell, xs, h0):
    def body(carry):
        return carry[0] + 1, f(cell, xs, carry[1])[0]

    return lax.while_loop(lambda carry: carry[0] < 2, body, (0, h0))[1]


def inside(derivative, program, f, args, tangents):
    return derivative(partial(program, f), args, tangents)


for program in (in_scan, in_fori_loop, in_cond, in_while_loop):
    name = program.__name__.replace("_", " ", 1)
    # JAX has no reverse mode of a while_loop.
    if program is not in_while_loop:
        transformation(CONTROL, f"grad {name}")(partial(inside, gradient, program))
    transformation(CONTROL, f"jvp {name}")(partial(inside, forward_mode, program))


# On several devices ---------------------------------------------------------------------------

SPECS = (P(), P(None, "data"), P("data"))


def mesh(kind):
    return jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2])


def total(f):
    """Over the batch: the data's axis is added up, as devices do."""
    return lambda *args: jnp.sum(jnp.sin(3 * f(*args)[1]), axis=1)


def split_over_devices(local):
    return jax.shard_map(
        lambda *args: lax.psum(local(*args), "data"),
        mesh=mesh(AxisType.Auto), in_specs=SPECS, out_specs=P(),
    )  # fmt: skip


def whole(local):
    return local


# Of f that is split, or whole: what devices add up is the loss.
ON_DEVICES = {
    "grad": (1, lambda split, f, a, _: all_args(split(scalar(f)), a)),
    "jvp": (1, lambda split, f, a, da: jax.jvp(split(total(f)), a, da)),
    "second order": (2, lambda split, f, a, da: forward_over_reverse(split(scalar(f)), a, da)),
}


def placed(kind, derivative, f, args, tangents):
    devices = mesh(kind)

    def place(args):
        return tuple(
            jax.tree.map(lambda x, spec=spec: jax.device_put(x, NamedSharding(devices, spec)), arg)
            for arg, spec in zip(args, SPECS, strict=True)
        )

    with jax.set_mesh(devices):
        found = jax.jit(partial(derivative, whole, f))(place(args), place(tangents))
    return jax.tree.map(np.asarray, found)


for name, (order, derivative) in ON_DEVICES.items():
    plain = partial(derivative, whole)
    transformation("`shard_map`", f"shard_map, {name}", plain, order=order)(
        partial(derivative, split_over_devices)
    )
    for kind, group in ((AxisType.Auto, "automatic"), (AxisType.Explicit, "explicit")):
        transformation(f"{group} sharding", f"{group} sharding, {name}", plain, order=order,
                       jitted=False)(partial(placed, kind, derivative))  # fmt: skip


# Export ---------------------------------------------------------------------------------------

EXPORT, EXPORTED_TWICE = "`export` with symbolic T and B", "`export` with `vjp_order=2`"


def flat(f, args):
    """Of arrays only: an exported file knows no Cell."""
    leaves, tree = jax.tree.flatten(args)
    return (lambda *leaves: f(*jax.tree.unflatten(tree, leaves))), leaves


def symbolic(args):
    time, batch = export.symbolic_shape("T, B")
    cell, xs, h0 = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    return jax.tree.leaves((cell, xs.update(shape=(time, batch, D)), h0.update(shape=(batch, H))))


def shorter(args):
    return args[0], args[1][: T - 2, : B - 1], args[2][: B - 1]


@transformation(EXPORT, "export", lambda f, args, _: f(*shorter(args)), jitted=False)
def _(f, args, tangents):
    f, leaves = flat(f, shorter(args))
    return export.export(jax.jit(f))(*symbolic(args)).call(*leaves)


@transformation(EXPORT, "export of grad", lambda f, args, _: gradient(f, shorter(args)),
                jitted=False)  # fmt: skip
def _(f, args, tangents):
    of_leaves, leaves = flat(lambda *args: gradient(f, args), shorter(args))
    return export.export(jax.jit(of_leaves))(*symbolic(args)).call(*leaves)


def pulled_twice(f, args, _):
    f, leaves = flat(f, shorter(args))
    out = f(*leaves)
    (first, of_first) = jax.vjp(lambda leaves, g: jax.vjp(f, *leaves)[1](g), leaves, cosines(out))
    return first, tuple(jax.tree.leaves(of_first(cosines(first))))


def cosines(tree):
    return jax.tree.map(jnp.cos, tree)


@transformation(EXPORTED_TWICE, "vjp of an exported vjp", pulled_twice, order=2, jitted=False)
def _(f, args, tangents):
    f, leaves = flat(f, shorter(args))
    exported = export.export(jax.jit(f))(*symbolic(args))
    if importlib.util.find_spec("flatbuffers"):
        exported = export.deserialize(exported.serialize(vjp_order=2))
    seen = (*leaves, *cosines(exported.call(*leaves)))
    first = exported.vjp().call(*seen)
    return first, exported.vjp().vjp().call(*seen, *cosines(first))


# Steps that are not there ---------------------------------------------------------------------


def padded(derivative, valid, how, padding, f, args, tangents):
    """A derivative of the states on valid steps, where the others' inputs are `padding`."""
    there = jnp.asarray(valid)[..., None]

    def on_valid_steps(cell, xs, h0):
        h_last, hs = f(cell, xs, h0, **how)
        return h_last, jnp.where(there, hs, 0)

    args = (args[0], jnp.where(there, args[1], padding), args[2])
    return derivative(on_valid_steps, args, tangents)


def up_to(lengths):
    return np.arange(T)[:, None] < lengths


def padding_case(group, valid, how, padding=0.0):
    (needs,) = how
    for name, derivative in (("grad", gradient), ("jvp", forward_mode)):
        # The reference never meets what the padding holds.
        plain = partial(padded, derivative, valid, {"valid": valid}, 0.0)
        add = transformation(group, f"{group}, {name}", plain, needs=needs)
        add(partial(padded, derivative, valid, how, padding))


padding_case("sequences of several lengths", up_to(LENGTHS), {"lengths": LENGTHS})
padding_case("sequences of length 0", up_to(EMPTY), {"lengths": EMPTY})
padding_case("padding that holds NaN", up_to(LENGTHS), {"lengths": LENGTHS}, np.nan)
padding_case("gaps inside sequences", GAPS, {"mask": GAPS})


def without_steps(derivative, f, args, tangents):
    args, tangents = ((cell, xs[:0], h0) for cell, xs, h0 in (args, tangents))
    return derivative(f, args, tangents)


for name, derivative in (("grad", gradient), ("jvp", forward_mode)):
    transformation("no steps, T = 0", f"no steps, {name}")(partial(without_steps, derivative))


# Cases and marks ------------------------------------------------------------------------------


def case(dtype="float64", activation="tanh", batch=(B,), **sizes):
    """(cell, xs, h0) and a direction of the same dtype."""
    sizes = {"T": T, "D": D, "H": H} | sizes
    params, xs, h0, _ = random_case(batch=batch, dtype=dtype, activation=activation, **sizes)
    args = (params.cell, xs, h0)
    return args, jax.tree.map(lambda x: weights(x.shape, x.size, dtype), args)


def ask(name, f, args, tangents):
    """What the transformation of that name makes of f."""
    asked = TRANSFORMATIONS[name]
    run = partial(asked.run, f)
    return jax.jit(run)(args, tangents) if asked.jitted else run(args, tangents)


def expected(name, args, tangents):
    """The same of the naive scan."""
    return jitted(TRANSFORMATIONS[name].plain)(args, tangents)


@cache
def jitted(plain):
    # Several transformations have the same plain one: it is compiled once.
    return jax.jit(partial(plain, naive))


def tolerance(name, first=TOLERANCE["float64"]):
    """Every order multiplies the number of summed terms by about T."""
    return first * 6 ** (TRANSFORMATIONS[name].order - 1)


def judged(find, reference, limit):
    """ "yes", "no" where it raises, "wrong" where it says something else; and why."""
    try:
        found = jax.tree.map(np.asarray, jax.tree.leaves(find()))
    except Exception as problem:
        return "no", f"{type(problem).__name__}: {problem}"
    difference = error(found, jax.tree.map(np.asarray, jax.tree.leaves(reference)))
    return ("yes", "") if difference <= limit else ("wrong", f"error {difference:.1e}")


def marks_of(row):
    """A mark for every transformation that the row has."""
    marks = {}
    args, tangents = case(row.dtype, row.activation)
    exact = jax.tree.map(lambda x: x.astype(jnp.float64), (args, tangents))
    first = TOLERANCE["float64"] if row.dtype == "float64" else 1e-4
    for name, asked in TRANSFORMATIONS.items():
        if row.has is not None and not row.has(name, asked):
            continue
        reference = expected(name, *exact)
        with jax.numpy_dtype_promotion(row.promotion), jax.numpy_rank_promotion(row.ranks):
            find = partial(row.find, name, args, tangents)
            marks[name], why = judged(find, reference, tolerance(name, first))
        print(f"{row.name:24}{name:40}{marks[name]:8}{' '.join(why.split())[:150]}", flush=True)
    return marks


def groups():
    """The table's rows: the names of the transformations in each."""
    found: dict[str, list[str]] = {}
    for name, asked in TRANSFORMATIONS.items():
        found.setdefault(asked.group, []).append(name)
    return found


def summary(marks, names):
    """One word for several transformations."""
    asked = [marks[name] for name in names if name in marks]
    for word in ("yes", "no", "wrong"):
        if asked and set(asked) == {word}:
            return word
    if not asked:
        return "–"
    count = f"{asked.count('yes')} of {len(asked)}"
    return f"{count}, else wrong" if "wrong" in asked else count


def render(found):
    """The table of matrix.json in Markdown."""
    columns = found["rows"]
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " :-: |" * len(columns)]
    for group, names in found["groups"].items():
        cells = [summary(row["marks"], names) for row in columns.values()]
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    versions = dict.fromkeys(row["version"] for row in columns.values())
    lines += ["", f"{found['date']}: {', '.join(versions)}."]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", nargs="*", metavar="ROW", help="run these rows again, all by default"
    )
    parser.add_argument(
        "--write", metavar="FILE", help="write the table into FILE, which is tests/README.md"
    )
    options = parser.parse_args()
    if options.run is not None:
        import conftest  # noqa: F401  the tests' settings
        from peers import ROWS

        rows = json.loads(FOUND.read_text())["rows"] if FOUND.exists() else {}
        for name in options.run or ROWS:
            rows[name] = {"version": ROWS[name].version(), "marks": marks_of(ROWS[name])}
        rows = {name: rows[name] for name in ROWS if name in rows}
        found = {"date": DATE, "groups": groups(), "rows": rows}
        FOUND.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if options.write:
        write_table(options.write, "transformations", render(json.loads(FOUND.read_text())))


if __name__ == "__main__":
    main()
