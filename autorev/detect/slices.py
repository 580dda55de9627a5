"""A stream that is taken apart and put together again: one token by itself, and `x + f(x)` on the rest of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autorev.detect.stream import Add, Stream, storage_of
from autorev.detect.sums import ONTO_FIRST, add_operands, is_subtraction, scale_of

_JOINS = {"cat", "concat", "concatenate"}
_CUTS = {"detach", "detach_", "data"}


def put_together(node: fx.Node, stream: Stream) -> Add | fx.Node | None:
    """`node` as the concatenation of all slices of one stream node, in their order, with what was added to some.

    An add that the code does on slices stands for one on the whole stream, whose branch is zero elsewhere.
    """
    name, value = getattr(node.target, "__name__", node.target), node.meta.get("val")
    if name not in _JOINS or not node.args or not isinstance(node.args[0], list | tuple):
        return None
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    items = [item for item in node.args[0] if isinstance(item, fx.Node)]
    if not isinstance(value, torch.Tensor) or not isinstance(axis, int) or len(items) < 2:
        return None
    root: fx.Node | None = None
    branch: list[Any] = []
    end = 0
    for item in items:
        found = _slice_below(item, stream, axis % value.dim())
        if found is None or found[0] is not (root or found[0]) or found[1] != end:
            return None
        root, end = found[0], end + item.meta["val"].shape[axis]
        branch += found[2]
    if root is None or value.shape != root.meta["val"].shape:
        return None
    return Add(node, root, tuple(branch)) if branch else root


def in_slices(add: Add) -> bool:
    """Is it no add of the code's own, but stands for those on slices?"""
    return add_operands(add.node) is None


def _slice_below(node: fx.Node, stream: Stream, axis: int) -> tuple[fx.Node, int, list[Any]] | None:
    """(the stream node, where on its axis) that `node` is a slice of, and what was added to that."""
    if (place := _slice_of(node, stream, axis)) is not None:
        return *place, []
    skip, others = add_operands(node) or (None, ())
    operands = [skip, *others]
    plain = not is_subtraction(node) and node.target not in ONTO_FIRST and scale_of(node) == 1
    for number, operand in enumerate(operands if plain else operands[:1]):
        value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
        if isinstance(value, torch.Tensor) and value.shape == node.meta["val"].shape:
            below = _slice_below(operand, stream, axis)
            rest = [*operands[:number], *operands[number + 1 :]]
            if below is not None and not any(_is_slice(item, stream, axis) for item in rest):
                return below[0], below[1], [*below[2], *rest]
    return None


def _is_slice(item: Any, stream: Stream, axis: int) -> bool:
    return isinstance(item, fx.Node) and _slice_of(item, stream, axis) is not None


def _slice_of(node: fx.Node, stream: Stream, axis: int) -> tuple[fx.Node, int] | None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    for root in stream.nodes:
        whole: torch.Tensor = root.meta["val"]
        if root in stream.cats or storage_of(whole) != storage_of(value) or not _views(node, root):
            continue
        same = [n for n in range(value.dim()) if n != axis] if whole.dim() == value.dim() else []
        offset, rest = divmod(int(value.storage_offset() - whole.storage_offset()), whole.stride(axis) or 1)
        strides = all(value.stride(n) == whole.stride(n) for n in range(value.dim()) if value.shape[n] > 1)
        if same and strides and not rest and all(value.shape[n] == whole.shape[n] for n in same):
            return root, offset
    return None


def _views(node: fx.Node, root: fx.Node) -> bool:
    """Is `node` made of `root` by views alone, none of which cuts it off from autograd?"""
    while node is not root:
        name = node.args[1] if node.target is getattr else getattr(node.target, "__name__", node.target)
        if name in _CUTS or not node.args or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return True
