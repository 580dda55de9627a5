"""Numbers that are known also where values are not: how large a picture is, and where in a text it stands.

Models loop over such numbers, split by them and index with them. They come as small tensors (`image_grid_thw`,
`pixel_mask`), which are real ones among fake tensors; what is computed from them alone stays real, and is as small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_MOST = 2**20
"""Elements: a mask of tokens by tokens, made from known positions, is not to take real memory."""
_MAKERS = (torch.arange, torch.tensor, torch.as_tensor, torch.zeros, torch.ones, torch.full)
_DRAWS = ("rand", "dropout", "multinomial", "bernoulli", "normal", "uniform", "exponential")
"""What functions that draw random numbers have in their names: nobody's random streams are moved."""
_OUTER = ("outer", "ger", "mat", "mm", "meshgrid", "einsum", "cartesian", "cdist")
"""What functions have in their names that go with each element of the one through all of the other."""
_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


@contextmanager
def known_numbers_stay() -> Iterator[None]:
    """While it lasts, what is computed under fake tensors from real ones alone is real.

    Once a model has met such numbers, whole numbers that it makes beside them (`torch.arange`) are real, too.
    """
    with _Known():
        yield


class _Known(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], FakeTensor):  # most of the time; nothing is looked for among the others
            if self.met and func in _INDEXING:
                args = (args[0], _by_position(args[1]), *args[2:])
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = bool(tensors) and _are_known(tensors) and not _has(func, _DRAWS) and _at_most(func, tensors) <= _MOST
        self.met |= known and not any(tensor.is_floating_point() for tensor in tensors)
        known |= not tensors and self.met and func in _MAKERS and _is_small_and_whole(func(*args, **kwargs))
        with unset_fake_temporarily() if known else nullcontext():
            return func(*args, **kwargs)


def _are_known(tensors: list[torch.Tensor]) -> bool:
    return not any(isinstance(tensor, FakeTensor) or tensor.requires_grad for tensor in tensors)


def _at_most(function: Any, tensors: list[torch.Tensor]) -> int:
    """How many elements it may make of them: tokens by tokens of two rows of tokens, and no more than it is given if it
    joins them."""
    shapes = [tensor.shape for tensor in tensors]
    if not _has(function, _OUTER):
        try:
            return math.prod(torch.broadcast_shapes(*shapes))
        except RuntimeError:
            return sum(shape.numel() for shape in shapes)
    return math.prod(shape.numel() for shape in shapes)


def _is_small_and_whole(made: torch.Tensor) -> bool:
    return not made.is_floating_point() and made.numel() <= _MOST


def _by_position(index: Any) -> Any:
    """A mask whose values are known, as the positions that it picks: of a fake tensor, how many these are decides."""
    parts = index if isinstance(index, tuple) else (index,)
    if not any(_is_known_mask(part) for part in parts):
        return index
    with unset_fake_temporarily():
        return tuple(at for part in parts for at in (part.nonzero(as_tuple=True) if _is_known_mask(part) else (part,)))


def _is_known_mask(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.dtype == torch.bool and not isinstance(part, FakeTensor)


def _has(function: Any, words: tuple[str, ...]) -> bool:
    name = str(getattr(function, "__name__", ""))
    return any(word in name for word in words)
