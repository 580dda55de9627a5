"""How code has laid out the stream (OPT flattens tokens around its MLP), and the way back to how it entered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from autorev.detect.sums import is_times_one

_COPIES = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone"}
_PERMUTATIONS = {"permute", "transpose", "t", "T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis"}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}


@dataclass(frozen=True)
class Reshaped:
    """Other axes, the elements in the same order."""

    before: torch.Size
    after: torch.Size

    def forth(self, tensor: torch.Tensor) -> torch.Tensor:
        """From the layout before to the one after."""
        return tensor.reshape(self.after)

    def back(self, tensor: torch.Tensor) -> torch.Tensor:
        """The other way."""
        return tensor.reshape(self.before)


@dataclass(frozen=True)
class Permuted:
    """The same axes in another order."""

    order: tuple[int, ...]

    def forth(self, tensor: torch.Tensor) -> torch.Tensor:
        """From the layout before to the one after."""
        return tensor.permute(self.order)

    def back(self, tensor: torch.Tensor) -> torch.Tensor:
        """The other way."""
        return tensor.permute(tuple(self.order.index(axis) for axis in range(len(self.order))))


@dataclass(frozen=True)
class Multiplied:
    """By a constant: what comes of such a stream is the stream all the same, and nobody divides."""

    factor: float

    def forth(self, tensor: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return tensor

    def back(self, tensor: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return tensor


Form = tuple[Reshaped | Permuted | Multiplied, ...]
"""What the code has made of the stream (OPT flattens tokens around its MLP), from the form in which it entered."""


def factor_in(form: Form) -> float:
    """What the stream was multiplied by, all in all."""
    return math.prod(part.factor for part in form if isinstance(part, Multiplied))


def laid_out(form: Form) -> Form:
    """The layouts alone."""
    return tuple(part for part in form if not isinstance(part, Multiplied))


def layout_of(func: Any, name: str, args: Any, kwargs: Any, result: torch.Tensor) -> Form | None:
    """What a torch function made of its first argument, where it only lays it out anew; None for any other."""
    source: torch.Tensor = args[0]
    if name == "__get__":
        name = getattr(func.__self__, "__name__", "")
    if result.numel() != source.numel() or not result.is_floating_point():
        return None
    if name in _PERMUTATIONS:
        probe = torch.empty(tuple(range(2, 2 + source.dim())), device="meta")
        moved = getattr(probe, name)
        moved = moved(*args[1:], **kwargs) if callable(moved) else moved
        return (Permuted(tuple(size - 2 for size in moved.shape)),)
    if name in _RESHAPES:
        return (Reshaped(source.shape, result.shape),)
    same = name in _COPIES or is_times_one(name, args, kwargs) or (name == "clamp" and _is_guard(args, kwargs))
    return () if same and result.shape == source.shape else None


def _is_guard(args: Any, kwargs: Any) -> bool:
    """Are the bounds of a clamp as large as the dtype allows, or computed for it?"""
    bounds = [bound for bound in (*args[1:], *kwargs.values()) if bound is not None]
    return all(isinstance(b, torch.Tensor) or abs(b) >= 0.9 * torch.finfo(args[0].dtype).max for b in bounds)
