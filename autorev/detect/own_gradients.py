"""Backward passes that torch has not written: do they keep positions apart, as the operators of forward do?"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_leaves

from autorev.detect.positions import MixesError, Operators


def refuse_own_gradients(result: torch.Tensor, watch: Operators) -> None:
    """Operators show what forward does. Torch's own backward of them keeps positions apart as they do; others' may not.

    Raises:
        MixesError: a backward of somebody else looks across positions, or may, or there is a hook.
    """
    tensors = [leaf for leaf in [result, *tree_leaves(watch.alive)] if isinstance(leaf, torch.Tensor)]
    if any(tensor._backward_hooks for tensor in tensors):
        raise MixesError("its forward puts a hook on a tensor, which may look across positions")
    made = {(tensor.grad_fn, tensor.output_nr): tensor for tensor in tensors if tensor.grad_fn is not None}
    seen, todo = set(), [result.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        if isinstance(node, BackwardCFunction) and not _keeps_apart(node, made, watch):
            name = type(node).__name__.removesuffix("Backward")
            raise MixesError(f"{name} has a backward of its own, which may look across positions")


def _keeps_apart(node: Any, made: dict[Any, torch.Tensor], watch: Operators) -> bool:
    """Are the gradients that the backward of an `autograd.Function` returns laid out by position, as its inputs are?"""
    grads = []
    for number, _ in enumerate(node._input_metadata):
        out = made.get((node, number))
        where = None if out is None else watch.positions(out)
        if out is None or where is None:
            return False
        grads.append(torch.empty_like(out, requires_grad=False))
        watch.note(grads[-1], where)
    with torch.no_grad(), watch:
        returned = node.apply(*grads)
    returned = returned if isinstance(returned, tuple) else (returned,)
    for grad, following in zip(returned, node.next_functions, strict=False):
        if grad is None or following[0] is None or watch.length == 1:
            continue
        given = made.get(following)
        if given is None or watch.positions(given) is None or watch.positions(grad) != watch.positions(given):
            return False
    return watch.refused is None
