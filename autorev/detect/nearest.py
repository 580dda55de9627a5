"""What came nearest to a residual block in a model that has none: the adds are counted on autograd's own graph.

That graph knows no modules and no code, so it also shows adds that the search does not: in scripted functions, and as
part of other operations. Only where it has none may be said that a model has no residual block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from autorev.capture.record import ModuleCall
from autorev.capture.scripted import said_of_scripted
from autorev.detect.judge import judge
from autorev.format import plural

_ADDS = ("Add", "Sub", "Baddbmm", "IndexAdd", "ScatterAdd", "Lerp", "Stack", "torch::jit")
"""Autograd's names of operations that add something to a tensor, or may, begin so; the last are scripted functions."""
_VIEWS = ("View", "UnsafeView", "Reshape", "Transpose", "Permute", "Squeeze", "Unsqueeze", "ToCopy", "Clone")


def nearest(root: ModuleCall, candidates: Iterable[ModuleCall]) -> str:
    """A sentence on the residual adds that no block or loop was found around; empty where there are none to be seen."""
    count = residual_adds(root)
    if not count:
        return said_of_scripted(root.module)
    text = f"{plural(count, 'residual add')} {'was' if count == 1 else 'were'} seen by autograd, and none of them ends "
    text += "a block or a turn of a loop that autorev can follow"
    for call in candidates:
        if residual_adds(call):
            reason = next(map(str, judge(call).obstacles), "")
            return f"{text}; the nearest is {call.path}" + (f": {reason}" if reason else "")
    return f"{text}; they stand in the code of {type(root.module).__name__}, between its modules"


def residual_adds(call: ModuleCall) -> int:
    """The adds `x + f(x)` between what the call received and what it returned."""
    given = {id(node): node for node in _made((call.args, call.kwargs))}
    return sum(_is_residual(node) for node in _graph(_made(call.output), given))


def _made(structure: Any) -> list[Any]:
    tensors = (leaf for leaf in tree_leaves(structure) if isinstance(leaf, torch.Tensor))
    return [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]


def _graph(ends: Iterable[Any], given: dict[int, Any]) -> Iterator[Any]:
    """The nodes above `given`, each once."""
    pending, seen = list(ends), dict(given)
    while pending:
        node = pending.pop()
        if id(node) not in seen:
            seen[id(node)] = node
            yield node
            pending += [before for before, _ in node.next_functions if before is not None]


def _is_residual(node: Any) -> bool:
    """Does one of the two that are added lead to the other?"""
    if not node.name().startswith(_ADDS):
        return False
    before = [(one, number) for one, number in node.next_functions if one is not None]
    if node.name().startswith(("AddBackward", "SubBackward")):  # a mean that is taken off is no branch
        shape = node._input_metadata[0].shape
        before = [(one, number) for one, number in before if one._input_metadata[number].shape == shape]
    added = [_behind_views(one) for one, _ in before]
    return any(_leads(branch, skip) for skip in added for branch in added if branch is not skip)


def _behind_views(node: Any) -> Any:
    while node.name().startswith(_VIEWS):
        node = node.next_functions[0][0]
    return node


def _leads(later: Any, earlier: Any) -> bool:
    """Is `later` computed from `earlier`, with a parameter? (`u + 0.04 u^3` is part of an activation.)

    A node's number in its thread is larger than those of what it was computed from.
    """
    first, pending, seen = earlier._sequence_nr(), [later], {id(earlier)}
    reached = trained = False
    while pending:
        node = pending.pop()
        reached |= node is earlier
        trained |= "AccumulateGrad" in node.name()
        if id(node) not in seen and node._sequence_nr() >= first:
            seen.add(id(node))
            pending += [before for before, _ in node.next_functions if before is not None]
    return reached and trained
