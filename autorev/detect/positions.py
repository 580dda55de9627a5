"""Where the positions of a module's input are, followed from operator to operator of its call.

A rule per kind of operator says where they are in its result. An operator without a rule, or one that would look across
positions, ends it. What is computed without them, from the module's parameters and from constants, has to be the same
for any number of positions, and so has every number that an operator is given: `Operators.computed` tells.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from autorev.capture.source import caller_line
from autorev.operands import leaves_of
from autorev.own_mode import OwnMode


@dataclass(frozen=True)
class Positions:
    """Where the positions are in a tensor: the size of `axis` is outer x positions x inner."""

    axis: int
    outer: int = 1
    inner: int = 1


class MixesError(Exception):
    """An operator looks across positions, or may."""


SIZED = frozenset({"view", "_unsafe_view", "reshape", "expand", "slice", "new_empty", "new_zeros", "new_ones"})
"""Operators that are told sizes, and compute nothing."""
LAYOUT = SIZED | {"permute", "transpose", "t", "unsqueeze", "squeeze", "clone", "alias", "detach"}
"""Operators that compute nothing; which of them run depends on how memory lies, where an axis is of size one."""


class Operators(OwnMode):
    """Follows positions from operator to operator."""

    def __init__(self, given: Iterable[torch.Tensor], axis: int, length: int) -> None:
        """`given`: the tensors that have the positions, `length` of them, in `axis`."""
        super().__init__()
        self.length = length
        self.computed: list[tuple[str, str]] = []
        """The operators, with the numbers that they are given besides the number of positions."""
        self.refused: MixesError | None = None
        self.aside = False
        """Does somebody else say where the positions are in what is computed now?"""
        self.alive: list[Any] = []
        self.known: dict[int, Positions] = {}
        for tensor in given:
            self.note(tensor, Positions(axis))

    def positions(self, tensor: torch.Tensor) -> Positions | None:
        """None: it has no positions."""
        return self.known.get(id(tensor))

    def note(self, tensor: torch.Tensor, where: Positions) -> None:
        """`tensor` has its positions there."""
        self.known[id(tensor)] = where
        self.alive.append(tensor)  # so that an id never names two of them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        names, defaults = _schema(func)
        named = dict(zip(names, (*args, *defaults[len(args) :]), strict=True)) | kwargs
        leaves = [*leaves_of(args), *leaves_of(kwargs.values())]
        read = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        result = func(*args, **kwargs)
        self.alive.append((args, kwargs, result))
        if self.aside or space == "prim":
            return result  # that was a question about dtype or device
        if not any(id(tensor) in self.known for tensor in read):
            self.computed.append((name, f"of constants: {[_constant(leaf) for leaf in leaves]}"))
            if torch.Tag.nondeterministic_seeded in func.tags:
                self.refuse(MixesError(f"`{name}` at {caller_line()} draws random numbers that positions share"))
            return result
        plain = name.rstrip("_") if not name.startswith("_") else name
        numbers = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor) and plain not in SIZED]
        self.computed.append((name, f"{numbers}"))
        usual = _pointwise if torch.Tag.pointwise in func.tags else None
        rule = _anywhere if self.length == 1 else _RULES.get(plain, usual) if space == "aten" else None
        try:
            if rule is None:
                raise MixesError(f"`{name}` at {caller_line()} may look across positions")
            found = rule(_Asked(self, plain, named, read, result))
        except MixesError as error:  # torch's own code around an operator may not be left by an exception
            self.refuse(error)
            return result
        for number, leaf in enumerate(leaves_of((result,))):
            where = found[number] if isinstance(found, list) else found
            if isinstance(leaf, torch.Tensor) and where is not None:
                self.note(leaf, where)
        return result

    def refuse(self, error: MixesError) -> None:
        """The first reason counts."""
        self.refused = self.refused or error


@cache
def _schema(func: Any) -> tuple[list[str], list[Any]]:
    """The names of an operator's arguments, and their defaults."""
    arguments = func._schema.arguments
    return [argument.name for argument in arguments], [argument.default_value for argument in arguments]


SMALL = 4096
"""Elements of a real tensor whose values are compared; of what fake tensors are given, constants are real."""


def _constant(leaf: Any) -> str:
    """What an operator without positions is given: a number, the shape of a parameter, the bytes of a real tensor."""
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    if isinstance(leaf, FakeTensor) or leaf.is_meta or not leaf.is_contiguous() or leaf.numel() > SMALL:
        return repr((leaf.shape, leaf.dtype))
    return repr((leaf.shape, ctypes.string_at(leaf.data_ptr(), leaf.numel() * leaf.element_size())))


@dataclass(frozen=True)
class _Asked:
    """One operator."""

    watch: Operators
    name: str
    named: dict[str, Any]
    read: list[torch.Tensor]
    result: Any

    def where(self, tensor: Any) -> Positions | None:
        return self.watch.positions(tensor) if isinstance(tensor, torch.Tensor) else None

    @property
    def first(self) -> torch.Tensor:
        """The operator's first tensor, which has the positions.

        Raises:
            MixesError: another one has them.
        """
        if self.where(self.read[0]) is None or any(self.where(other) for other in self.read[1:]):
            raise self.mixes()
        return self.read[0]

    @property
    def at(self) -> Positions:
        """Where the positions are in the first tensor."""
        found = self.where(self.first)
        assert found is not None
        return found

    def axes(self, name: str) -> list[int]:
        """An argument of one axis or several; of all, where it is None or empty."""
        given, count = self.named.get(name), self.first.dim()
        return [axis % count for axis in ([given] if isinstance(given, int) else given or range(count))]

    def mixes(self) -> MixesError:
        return MixesError(f"`{self.name}` at {caller_line()} looks across positions")


Answer = Positions | None | list[Positions | None]


def _pointwise(op: _Asked) -> Answer:
    """Element by element, with broadcasting."""
    result = next(leaf for leaf in leaves_of((op.result,)) if isinstance(leaf, torch.Tensor))
    found = set()
    for tensor in op.read:
        at = op.where(tensor)
        if at is not None:
            found.add(replace(at, axis=at.axis + result.dim() - tensor.dim()))
    if len(found) != 1:
        raise op.mixes()
    where = found.pop()
    for tensor in op.read:
        axis = where.axis - (result.dim() - tensor.dim())
        if op.where(tensor) is None and axis >= 0 and tensor.shape[axis] != 1:
            raise MixesError(f"`{op.name}` at {caller_line()} reads a tensor with a value of its own for each position")
    return where


def _same(op: _Asked) -> Answer:
    return op.at


def _made(op: _Asked) -> Answer:
    """New memory: it has the positions where its first axes are those of the stream, for any number of positions."""
    last = op.at.axis + 1
    return op.at if op.result.shape[:last] == op.first.shape[:last] else None


def _anywhere(op: _Asked) -> Answer:
    """A single position is wherever one looks for it."""
    return Positions(0)


def _over_features(op: _Asked) -> Answer:
    """A norm over the last axes; its result, and a statistic or two for each position."""
    if op.at.axis >= op.first.dim() - len(op.named["normalized_shape"]):
        raise op.mixes()
    return op.at


def _over_axes(op: _Asked) -> Answer:
    """A reduction."""
    axes = op.axes("dim")
    if op.at.axis in axes:
        raise op.mixes()
    kept = op.named.get("keepdim", False)
    return op.at if kept else replace(op.at, axis=op.at.axis - sum(axis < op.at.axis for axis in axes))


def _along_axis(op: _Asked) -> Answer:
    """Values of one axis become others of the same axis."""
    if op.at.axis in op.axes("dim"):
        raise op.mixes()
    return op.at


def _product(op: _Asked) -> Answer:
    """(n, k) x (k, m), batched or not, and a bias."""
    *bias, a, b = op.read
    if any(op.where(one) is not None for one in bias):
        raise op.mixes()
    left, right = op.where(a), op.where(b)
    rows, columns = a.dim() - 2, b.dim() - 1
    if left is not None and right is not None:
        if left != right or left.axis >= rows:  # the same matrices of a batch
            raise op.mixes()
        found = left
    elif left is not None and left.axis != a.dim() - 1 and (left.axis == rows or b.dim() < 3):
        found = left
    elif right is not None and right.axis == columns:
        found = right
    else:
        raise op.mixes()
    for one in bias:
        axis = found.axis - (op.result.dim() - one.dim())
        if axis >= 0 and one.shape[axis] != 1:
            raise op.mixes()
    return found


def _linear(op: _Asked) -> Answer:
    if op.at.axis == op.first.dim() - 1:
        raise op.mixes()
    return op.at


def _viewed(op: _Asked) -> Answer:
    """Elements keep their order: the same steps lead over the positions."""
    before, passed, length = math.prod(op.first.shape[: op.at.axis]) * op.at.outer, 1, op.watch.length
    for axis, size in enumerate(op.result.shape):
        outer = before // passed
        if before % passed == 0 and size % (outer * length) == 0:
            return Positions(axis, outer, size // (outer * length))
        passed *= size
    raise op.mixes()


def _expanded(op: _Asked) -> Answer:
    return replace(op.at, axis=op.at.axis + op.result.dim() - op.first.dim())


def _unsqueezed(op: _Asked) -> Answer:
    new = op.named["dim"] % (op.first.dim() + 1)
    return replace(op.at, axis=op.at.axis + (new <= op.at.axis))


def _squeezed(op: _Asked) -> Answer:
    gone = [axis for axis in op.axes("dim") if op.first.shape[axis] == 1 and axis < op.at.axis]
    return replace(op.at, axis=op.at.axis - len(gone))


def _permuted(op: _Asked) -> Answer:
    return replace(op.at, axis=[axis % op.first.dim() for axis in op.named["dims"]].index(op.at.axis))


def _transposed(op: _Asked) -> Answer:
    if op.name == "t":
        return replace(op.at, axis=op.first.dim() - 1 - op.at.axis) if op.first.dim() == 2 else op.at
    a, b = (op.named[name] % op.first.dim() for name in ("dim0", "dim1"))
    return replace(op.at, axis={a: b, b: a}.get(op.at.axis, op.at.axis))


def _cut(op: _Asked) -> Answer:
    axis = (op.named.get("dim") or 0) % op.first.dim()
    if axis == op.at.axis and op.result.shape != op.first.shape:
        raise op.mixes()
    return op.at


def _pieces(op: _Asked) -> Answer:
    if (axis := (op.named.get("dim") or 0) % op.first.dim()) == op.at.axis:
        raise op.mixes()
    return [replace(op.at, axis=op.at.axis - (axis < op.at.axis and op.name == "unbind"))] * len(op.result)


def _selected(op: _Asked) -> Answer:
    if (axis := op.named["dim"] % op.first.dim()) == op.at.axis:
        raise op.mixes()
    return replace(op.at, axis=op.at.axis - (axis < op.at.axis))


def _joined(op: _Asked) -> Answer:
    """Beside each other, all with the same positions."""
    where = op.where(op.read[0])
    if where is None or any(op.where(tensor) != where for tensor in op.read):
        raise op.mixes()
    axis = (op.named.get("dim") or 0) % op.result.dim()
    if op.name == "stack":
        return replace(where, axis=where.axis + (axis <= where.axis))
    if axis == where.axis:
        raise op.mixes()
    return where


def _looked_up(op: _Asked) -> Answer:
    """Rows of a table, one for each index."""
    counts = op.named["scale_grad_by_freq"]  # in backward, how often each index occurs
    if op.where(op.named["indices"]) is None or op.where(op.named["weight"]) is not None or counts:
        raise op.mixes()
    return op.where(op.named["indices"])


_RULES: dict[str, Callable[[_Asked], Answer]] = {
    **dict.fromkeys(("_to_copy", "clone", "detach", "alias", "lift_fresh", "native_dropout", "bernoulli"), _same),
    **dict.fromkeys(("new_empty", "new_zeros", "new_ones"), _made),
    **dict.fromkeys(("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"), _same),
    **dict.fromkeys(("uniform", "normal", "fill", "zero"), _same),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _over_features),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod"), _over_axes),
    **dict.fromkeys(("logsumexp", "linalg_vector_norm", "norm", "argmax", "argmin", "any", "all"), _over_axes),
    **dict.fromkeys(("_softmax", "_log_softmax", "cumsum", "cumprod", "glu", "topk", "sort"), _along_axis),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _product),
    **dict.fromkeys(("view", "_unsafe_view", "reshape"), _viewed),
    "linear": _linear,
    "expand": _expanded,
    "unsqueeze": _unsqueezed,
    "squeeze": _squeezed,
    "permute": _permuted,
    **dict.fromkeys(("t", "transpose"), _transposed),
    "slice": _cut,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), _pieces),
    "select": _selected,
    **dict.fromkeys(("cat", "stack"), _joined),
    "copy": _pointwise,
    "embedding": _looked_up,
}
"""Where positions are in what an operator returns; its in-place form has the same rule."""
