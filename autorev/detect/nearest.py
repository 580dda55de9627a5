"""What came nearest to a residual block in a model that has none: the adds are counted on autograd's own graph.

That graph knows no modules and no code, so it also shows adds that the search does not: in scripted functions, and as
part of other operations. Only where it has none may be said that a model has no residual block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from autorev.capture.fake import every_layer_kept
from autorev.capture.record import ModuleCall
from autorev.capture.scripted import said_of_scripted
from autorev.detect.judge import judge
from autorev.format import plural

_ADDS = ("Add", "Sub", "Baddbmm", "IndexAdd", "ScatterAdd", "Lerp", "Stack", "torch::jit")
"""Autograd's names of operations that add something to a tensor, or may, begin so; the last are scripted functions."""
_VIEWS = ("View", "UnsafeView", "Reshape", "Transpose", "Permute", "Squeeze", "Unsqueeze", "ToCopy", "Clone")


def nearest(root: ModuleCall, candidates: Iterable[ModuleCall]) -> str:
    """A sentence on the residual adds that no block or loop was found around; empty where there are none to be seen."""
    count = residual_adds(root) or _with_inputs_in_its_graph(root)
    if not count:
        return said_of_scripted(root.module)
    text = f"{plural(count, 'residual add')} {'was' if count == 1 else 'were'} seen by autograd, and none of them ends "
    text = text.replace("none of them ends", "it does not end") if count == 1 else text
    text += "a block or a turn of a loop that autorev can follow"
    for call in candidates:
        if residual_adds(call):
            reason = next(map(str, judge(call).obstacles), "")
            return f"{text}; the nearest is {call.path}" + (f": {reason}" if reason else "")
    where = f"in the code of {type(root.module).__name__}, between its modules"
    return f"{text}; {'it stands' if count == 1 else 'they stand'} {where}"


def _with_inputs_in_its_graph(root: ModuleCall) -> int:
    """The first add to a model's own input is not on autograd's graph, where nobody asks for that one's gradient."""

    def seen(tensor: torch.Tensor) -> torch.Tensor:
        asked = tensor.is_floating_point() and not tensor.requires_grad and tensor.is_leaf
        return tensor.detach().requires_grad_() * 1 if asked else tensor

    args, kwargs = tree_map_only(torch.Tensor, seen, (root.args, root.kwargs))
    try:
        with every_layer_kept(), torch.enable_grad():
            output = root.module(*args, **kwargs)
    except Exception:  # the recorded call succeeded; only this second one did not
        return 0
    return residual_adds(replace(root, args=args, kwargs=kwargs, output=output))


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
    return any(_leads(branch, s) for skip in added for s in _unscaled(skip) for branch in added if branch is not skip)


def _unscaled(skip: Any) -> Iterator[Any]:
    """The skip, and what it is a multiple of: `0.9 x + f(x)`, `(1 - g) x + g f(x)`."""
    yield skip
    if skip.name().startswith(("MulBackward", "DivBackward")):
        shape = skip._input_metadata[0].shape
        for one, number in skip.next_functions:
            if one is not None and one._input_metadata[number].shape == shape:
                yield _behind_views(one)


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
