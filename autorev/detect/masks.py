"""The mask that a module is given for its attention, and what its code may do with it.

A mask is laid out by queries and keys, both of them positions. What a tile is given of it depends on nothing else than
the tile only if the mask reaches attention as it is: its code may cast or expand it, and cut it to the number of keys.
Which positions it shows is not known here, but when the module runs (`engine.mask`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from autorev.capture.source import caller_line
from autorev.detect.positions import MixesError, Operators
from autorev.operands import tensors_of

CARRIES = frozenset({"slice", "expand", "_to_copy", "clone", "alias", "detach"})
"""Operators behind which a mask may be the same mask."""


def mask_among(given: Sequence[torch.Tensor], axis: int, attends: bool) -> int | None:
    """Which of the tensors that a module is called with is the mask, if it is one that `attends`? All others have their
    positions in `axis`.

    Raises:
        MixesError: there are tensors of which tiles cannot be cut.
    """
    found = [n for n, tensor in enumerate(given) if attends and n and _is_mask(tensor, given[0], axis)]
    if not same_positions([tensor for number, tensor in enumerate(given) if number not in found], axis):
        raise MixesError("it is called with a tensor that has other positions")
    if len(found) > 1:
        raise MixesError("it is called with more than one mask")
    if found and given[found[0]].requires_grad:
        raise MixesError("the mask that it is called with is to have a gradient, which tiles do not give it")
    return found[0] if found else None


def _is_mask(tensor: torch.Tensor, first: torch.Tensor, axis: int) -> bool:
    """Of queries by keys; numbers that have the positions as the first has may have as many features by chance."""
    square = tensor.shape[-2:] == (first.shape[axis],) * 2
    return square and (not same_positions([first, tensor], axis) or (tensor.dtype is torch.bool and tensor.dim() > 2))


def same_positions(given: Iterable[torch.Tensor], axis: int) -> bool:
    """Are all laid out by position as the first is? What is the same for a whole batch may be there once."""
    first, *others = given
    return all(
        tensor.dim() > axis
        and tensor.shape[axis] == first.shape[axis]
        and all(size in (1, like) for size, like in zip(tensor.shape[:axis], first.shape[:axis], strict=True))
        for tensor in others
    )


class OperatorsAndMask(Operators):
    """Operators of a module that attends; those that read its mask are refused, but for those that hand it on."""

    def __init__(self, given: Iterable[torch.Tensor], axis: int, length: int, mask: torch.Tensor | None) -> None:
        super().__init__(given, axis, length)
        self.masks, self.dtype = {id(mask)}, None if mask is None else mask.dtype
        self.alive.append(mask)

    def is_mask(self, tensor: torch.Tensor) -> bool:
        """Is it the mask that the module was called with?"""
        return id(tensor) in self.masks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = tensors_of(args, kwargs)
        space, _, name = func._schema.name.partition("::")
        if self.aside or space == "prim" or not any(map(self.is_mask, read)):
            return super().__torch_dispatch__(func, types, args, kwargs)
        result = func(*args, **(kwargs or {}))
        self.alive.append((args, kwargs, result))
        self.computed.append((name, "of the mask"))
        if len(read) == 1 and name in CARRIES and self._is_the_same(read[0], result, name):
            self.masks.add(id(result))
        else:
            self.refuse(MixesError(f"`{name}` at {caller_line()} reads the mask, which only attention may"))
        return result

    def _is_the_same(self, mask: torch.Tensor, result: torch.Tensor, name: str) -> bool:
        """Does it show the same keys to the same queries? Numbers may be cast once: a tile's rows are, too."""
        shape = result.shape[-mask.dim() :] if name == "expand" else result.shape
        alike = all(new == old or (name == "expand" and old == 1) for new, old in zip(shape, mask.shape, strict=True))
        once = mask.dtype is self.dtype and mask.is_floating_point() and result.is_floating_point()
        return alike and (once or result.dtype is mask.dtype) and result.shape[-2:] == mask.shape[-2:]
