"""How dataclasses of arrays are printed, compared, copied and serialised."""

import copy
import json
import re
from dataclasses import MISSING, fields
from typing import Any, TypeVar

import jax
import numpy as np
from jax import export

_Class = TypeVar("_Class", bound=type)


class Record:
    """A dataclass of arrays with a repr of one line, equality by values, and deep copies."""

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        """Show each array as dtype and shape; leave out fields that are None by default."""
        shown = jax.tree.map(_Short.of, self)
        return f"{type(self).__name__}({', '.join(shown._parts())})"

    def _parts(self):
        for f in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, f.name)
            if value is not None or f.default is MISSING:
                yield f"{f.name}={by_name(value)}"

    def __eq__(self, other: object) -> bool:
        """Compare structure, static fields, and dtype, shape and values of all arrays."""
        if type(other) is not type(self):
            return NotImplemented
        (mine, tree), (theirs, of_other) = map(jax.tree.flatten, (self, other))
        return tree == of_other and all(map(_same, mine, theirs))

    def __deepcopy__(self, memo):
        """Copy the arrays only: a copied function would compare as another one."""
        return jax.tree.map(lambda x: copy.deepcopy(x, memo), self)


class _Short(str):
    """A string whose repr has no quotes: f32[16,3]."""

    @classmethod
    def of(cls, value: Any) -> Any:
        if not (hasattr(value, "dtype") and hasattr(value, "shape")):
            return value
        name = "float0" if value.dtype == jax.dtypes.float0 else str(value.dtype)
        name = re.sub(r"^(bf|f|u|i|c)[a-z]*(?=\d)", r"\1", name)
        return cls(f"{name}[{','.join(map(str, value.shape))}]")

    __repr__ = str.__str__


def by_name(value: Any) -> str:
    """The name of a function, or of the function of a partial; the repr of anything else."""
    return getattr(getattr(value, "func", value), "__name__", None) or repr(value)


def _same(x: Any, y: Any) -> bool:
    if any(not hasattr(z, "dtype") for z in (x, y)):
        return x is y or (type(x) is type(y) and bool(x == y))
    return x is y or (x.dtype == y.dtype and x.shape == y.shape and bool(np.all(x == y)))


def pytree(cls: _Class) -> _Class:
    """Register a dataclass as a pytree, also for `jax.export`: static fields become JSON."""
    static = [f.name for f in fields(cls) if f.metadata.get("static")]

    def serialize(values):
        for name, value in zip(static, values, strict=True):
            if not isinstance(value, str):
                got = f"functions, {by_name(value)}; or export what takes the arrays alone"
                raise ValueError(f"{name}: expected a name, to be serialised, got {got}")
        return json.dumps(values).encode()

    jax.tree_util.register_dataclass(cls)
    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jaxrnn.{cls.__name__}",
        serialize_auxdata=serialize,
        deserialize_auxdata=lambda data: tuple(json.loads(data)),
    )
    return cls
