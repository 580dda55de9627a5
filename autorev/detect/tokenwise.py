"""Which modules act on each position of their input alone, proved on the operators of a call.

Such a module can be run on a few tokens at a time: linear layers, norms over features, activations and products, and
what is made of them. Attention, convolutions and pooling over positions, and routing, mix positions.

The call is run on fake tensors, and every operator is asked where the positions of its input are in its result. A rule
per kind of operator answers; an operator without one, or one that would look across positions, ends the proof with its
name and its place in the code. Names of modules and classes tell nothing here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from autorev.capture.own_mode import OwnMode
from autorev.capture.record import ModuleCall
from autorev.capture.source import caller_line
from autorev.errors import one_line
from autorev.hush import logs_hushed

WORTH = 2.0
"""A module that keeps less for backward, in sizes of its input, is not worth tiling."""


@dataclass(frozen=True)
class Positions:
    """Where the positions are in a tensor: the size of `axis` is outer x positions x inner."""

    axis: int
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class TokenWise:
    """A module that acts on each position alone."""

    path: str
    """Below the block."""
    axis: int
    """Of its input and of its output, whose positions are told apart: the longest but the last."""
    saved: float
    """What it keeps for backward, in sizes of its input."""
    draws_random: bool


@dataclass(frozen=True)
class Mixing:
    """A module that does not, and why."""

    path: str
    reason: str


class MixesError(Exception):
    """An operator looks across positions, or may."""


def token_wise(call: ModuleCall, block: str) -> TokenWise | Mixing:
    """Does the module of `call`, recorded on fake tensors, act on each position alone? `block`: the path above it."""
    path = call.path.removeprefix(f"{block}.") if block else call.path
    hushed = logs_hushed("torch._subclasses.fake_tensor", logging.CRITICAL + 1)
    try:
        given = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, torch.Tensor)]
        with hushed, (getattr(given[0], "fake_mode", None) if given else None) or nullcontext():
            return _proved(call, path)
    except MixesError as error:
        return Mixing(path, str(error))
    except Exception as error:
        return Mixing(path, f"it cannot be run by itself ({one_line(error)})")


def _proved(call: ModuleCall, path: str) -> TokenWise:
    module = call.module
    tensors, axis = _positions_of(call)
    written = [(id(home), name, value) for home in module.modules() for name, value in vars(home).items()]
    whole = _operators(call, tensors, axis, tensors[0].shape[axis])
    now = [(id(home), name, value) for home in module.modules() for name, value in vars(home).items()]
    if len(now) != len(written) or any(a[2] is not b[2] for a, b in zip(now, written, strict=True)):
        raise MixesError("its forward writes to attributes of the module")
    if call.buffers_written:
        raise MixesError(f"it updates {', '.join(call.buffers_written)}")
    if _operators(call, tensors, axis, tensors[0].shape[axis] - 1) != whole:
        raise MixesError("its code does something else for fewer positions")
    return TokenWise(path, axis, _saved(call) / max(_bytes(tensors[0]), 1), call.draws_random)


def tileable(call: ModuleCall, block: str) -> Iterator[TokenWise | Mixing]:
    """Of the modules that the module of `call` calls, the largest that act on each position alone and keep enough for
    backward to be worth it; of the others that keep as much, why they do not."""
    for child in call.children:
        found = token_wise(child, block)
        if isinstance(found, TokenWise):
            if found.saved >= WORTH:
                yield found
            continue
        below = list(tileable(child, block))
        yield from below
        if not any(isinstance(one, TokenWise) for one in below):
            yield found


def _positions_of(call: ModuleCall) -> tuple[list[torch.Tensor], int]:
    """The tensors that a module is called with, and their axis of positions."""
    given = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, torch.Tensor)]
    if not given or not given[0].is_floating_point() or given[0].dim() < 2:
        raise MixesError("its first argument is no stream")
    axis = position_axis(given[0])
    if given[0].shape[axis] < 3:
        raise MixesError("there are too few positions to tell")
    if not same_positions(given, axis):
        raise MixesError("it is called with a tensor that has other positions")
    return given, axis


def position_axis(first: torch.Tensor) -> int:
    """The longest axis but the last; of several, the last of these."""
    sizes = first.shape[:-1]
    return max(range(len(sizes)), key=lambda axis: (sizes[axis], axis))


def same_positions(given: Sequence[torch.Tensor], axis: int) -> bool:
    """Are all laid out by position as the first is?"""
    first = given[0].shape[: axis + 1]
    return all(tensor.dim() > axis and tensor.shape[: axis + 1] == first for tensor in given)


def _operators(call: ModuleCall, tensors: list[torch.Tensor], axis: int, length: int) -> list[str]:
    """The operators of a call on `length` positions.

    Raises:
        MixesError: one of them, or the result, does not keep positions apart.
    """
    leaves, spec = tree_flatten((call.args, call.kwargs))
    marked = {id(tensor) for tensor in tensors}
    fresh = [_fewer(leaf, axis, length) if id(leaf) in marked else leaf for leaf in leaves]
    given = [one for one, leaf in zip(fresh, leaves, strict=True) if id(leaf) in marked]
    args, kwargs = tree_unflatten(fresh, spec)
    watch = _Operators(given, axis, length)
    versions = [tensor._version for tensor in given]
    with torch.enable_grad(), watch:
        result = call.module.forward(*args, **kwargs)
    if watch.refused is not None:
        raise watch.refused
    if [tensor._version for tensor in given] != versions:
        raise MixesError("it writes to its input")
    if not isinstance(result, torch.Tensor):
        raise MixesError(f"it returns a {type(result).__name__}, and not one tensor")
    found = watch.positions(result)
    if found != Positions(axis) or result.shape[: axis + 1] != given[0].shape[: axis + 1]:
        raise MixesError("its result has no value for each position")
    return watch.names


def _fewer(tensor: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    shape = [*tensor.shape]
    shape[axis] = length
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device).requires_grad_(tensor.requires_grad)


def _saved(call: ModuleCall) -> int:
    """Bytes that a call saves for backward, besides its inputs and parameters."""
    args, kwargs = call.args, call.kwargs
    known = [*tree_leaves((args, kwargs)), *call.module.parameters(), *call.module.buffers()]
    mine = {leaf.untyped_storage()._cdata for leaf in known if isinstance(leaf, torch.Tensor)}
    found: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in mine:
            found[storage._cdata] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call.module.forward(*args, **kwargs)
    return sum(storage.nbytes() for storage in found.values())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Operators(OwnMode):
    """Follows positions from operator to operator."""

    def __init__(self, given: Iterable[torch.Tensor], axis: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.names: list[str] = []
        self.refused: MixesError | None = None
        self.alive: list[Any] = []
        self.known: dict[int, Positions] = {}
        for tensor in given:
            self._note(tensor, Positions(axis))

    def positions(self, tensor: torch.Tensor) -> Positions | None:
        """None: it has no positions."""
        return self.known.get(id(tensor))

    def _note(self, tensor: torch.Tensor, where: Positions) -> None:
        self.known[id(tensor)] = where
        self.alive.append(tensor)  # so that an id never names two of them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        self.names.append(name)
        named = {a.name: a.default_value for a in func._schema.arguments}
        named |= {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        result = func(*args, **kwargs)
        self.alive.append((args, kwargs, result))
        if not any(id(tensor) in self.known for tensor in read):
            return result
        plain = name.rstrip("_") if not name.startswith("_") else name
        if space == "prim":
            return result  # a question about dtype or device
        rule = _RULES.get(plain) if space == "aten" else None
        if rule is None and torch.Tag.pointwise in func.tags and space == "aten":
            rule = _pointwise
        try:
            if rule is None:
                raise MixesError(f"`{name}` at {caller_line()} may look across positions")
            found = rule(_Asked(self, plain, named, read, result))
        except MixesError as error:  # torch's own code around an operator may not be left by an exception
            self.refused = self.refused or error
            return result
        for number, leaf in enumerate(tree_leaves(result)):
            where = found[number] if isinstance(found, list) else found
            if isinstance(leaf, torch.Tensor) and where is not None:
                self._note(leaf, where)
        return result


@dataclass(frozen=True)
class _Asked:
    """One operator."""

    watch: _Operators
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
        listed = [given] if isinstance(given, int) else list(given or range(count))
        return [axis % count for axis in listed]

    def mixes(self) -> MixesError:
        return MixesError(f"`{self.name}` at {caller_line()} looks across positions")


Answer = Positions | None | list[Positions | None]


def _pointwise(op: _Asked) -> Answer:
    """Element by element, with broadcasting."""
    result = next(leaf for leaf in tree_leaves(op.result) if isinstance(leaf, torch.Tensor))
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
    at, shape, length = op.at, op.result.shape, op.watch.length
    before = math.prod(op.first.shape[: at.axis]) * at.outer
    passed = 1
    for axis, size in enumerate(shape):
        if before % passed == 0 and size % (before // passed * length) == 0:
            outer = before // passed
            return Positions(axis, outer, size // (outer * length))
        passed *= size
    raise op.mixes()


def _expanded(op: _Asked) -> Answer:
    return replace(op.at, axis=op.at.axis + op.result.dim() - op.first.dim())


def _unsqueezed(op: _Asked) -> Answer:
    new = op.named["dim"] % (op.first.dim() + 1)
    return replace(op.at, axis=op.at.axis + (new <= op.at.axis))


def _squeezed(op: _Asked) -> Answer:
    asked = op.axes("dim")
    gone = [axis for axis in asked if op.first.shape[axis] == 1 and axis < op.at.axis]
    return replace(op.at, axis=op.at.axis - len(gone))


def _permuted(op: _Asked) -> Answer:
    order = [axis % op.first.dim() for axis in op.named["dims"]]
    return replace(op.at, axis=order.index(op.at.axis))


def _transposed(op: _Asked) -> Answer:
    if op.name == "t":
        return replace(op.at, axis=op.first.dim() - 1 - op.at.axis) if op.first.dim() == 2 else op.at
    a, b = (op.named[name] % op.first.dim() for name in ("dim0", "dim1"))
    return replace(op.at, axis={a: b, b: a}.get(op.at.axis, op.at.axis))


def _cut(op: _Asked) -> Answer:
    """A piece of another axis, or all of the positions."""
    axis = (op.named.get("dim") or 0) % op.first.dim()
    if axis == op.at.axis and op.result.shape != op.first.shape:
        raise op.mixes()
    return op.at


def _pieces(op: _Asked) -> Answer:
    axis = (op.named.get("dim") or 0) % op.first.dim()
    if axis == op.at.axis:
        raise op.mixes()
    gone = axis < op.at.axis and op.name == "unbind"
    return [replace(op.at, axis=op.at.axis - gone)] * len(op.result)


def _selected(op: _Asked) -> Answer:
    axis = op.named["dim"] % op.first.dim()
    if axis == op.at.axis:
        raise op.mixes()
    return replace(op.at, axis=op.at.axis - (axis < op.at.axis))


def _joined(op: _Asked) -> Answer:
    """Beside each other, all with the same positions."""
    found = {op.where(tensor) for tensor in op.read}
    if len(found) != 1 or None in found:
        raise op.mixes()
    where = found.pop()
    assert where is not None
    axis = (op.named.get("dim") or 0) % op.result.dim()
    if op.name == "stack":
        return replace(where, axis=where.axis + (axis <= where.axis))
    if axis == where.axis:
        raise op.mixes()
    return where


def _looked_up(op: _Asked) -> Answer:
    """Rows of a table, one for each index."""
    if op.where(op.named["indices"]) is None or op.where(op.named["weight"]) is not None:
        raise op.mixes()
    return op.where(op.named["indices"])


_RULES: dict[str, Callable[[_Asked], Answer]] = {
    **dict.fromkeys(("_to_copy", "clone", "detach", "alias", "lift_fresh", "native_dropout", "bernoulli"), _same),
    **dict.fromkeys(("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"), _same),
    **dict.fromkeys(("uniform", "normal", "fill", "zero"), _same),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _over_features),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod"), _over_axes),
    **dict.fromkeys(("logsumexp", "linalg_vector_norm", "norm", "argmax", "argmin", "any", "all"), _over_axes),
    **dict.fromkeys(("_softmax", "_log_softmax", "cumsum", "cumprod", "glu", "topk", "sort"), _along_axis),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _product),
    "linear": _linear,
    **dict.fromkeys(("view", "_unsafe_view", "reshape"), _viewed),
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
