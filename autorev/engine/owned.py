"""One tensor that a branch reads but is not given: a parameter, a buffer or an attribute, as it was found.

What cannot be put back before a later run, the values, is compared.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autorev.engine.digest import Digest, digest, looked_at, waited_for

PARTITIONED = "ds_id"
"""Of a parameter that DeepSpeed's ZeRO-3 gathers for each use of its module and lets go of afterwards; and of the
module."""


@dataclass(eq=False)
class Owned:
    """A parameter or buffer as it was found."""

    path: str
    tensor: torch.Tensor
    version: int
    requires_grad: bool
    address: int
    values: Digest | None
    wholly: bool
    """Are all of its values looked at? Of all weights, twice a step, that would cost a tenth of it. Version counters
    see ordinary writes, and where a branch is run again, what it returns tells, too."""

    @classmethod
    def found(cls, path: str, tensor: torch.Tensor, wholly: bool = False) -> Owned:
        """`tensor` as it is now; of one with a history (a weight-normalised one) only its values are kept."""
        kept = tensor if tensor.is_leaf else tensor.detach().requires_grad_(tensor.requires_grad)
        values = _values(tensor, wholly)
        return cls(path, kept, version_of(tensor), tensor.requires_grad, _address(tensor), values, wholly)

    def change(self) -> str | None:
        """What has become of it, in words; None: it holds what it held."""
        if version_of(self.tensor) != self.version:
            return "was changed in place"
        if _address(self.tensor) != self.address and not self._same_values():
            return "was given other values through .data"
        if not self._same_values():
            return "was changed through .data"
        return None

    def _same_values(self) -> bool:
        return self.values is None or _values(self.tensor, self.wholly) == self.values


def _values(tensor: torch.Tensor, wholly: bool) -> Digest | None:
    """A GPU is not waited for: weights there are compared among what the branch saved."""
    if not waited_for(tensor.device) or hasattr(tensor, PARTITIONED):
        return None
    return digest(tensor, exact=True, wholly=wholly)


def is_zero(parameter: torch.Tensor) -> bool:
    """By a few of its elements."""
    if not waited_for(parameter.device) or not looked_at() or type(parameter) not in (torch.Tensor, nn.Parameter):
        return not waited_for(parameter.device)  # and looking at all of it costs little there
    if hasattr(parameter, PARTITIONED):
        return True  # not to be seen before its module runs
    if parameter.layout is not torch.strided or not parameter.numel():
        return False
    if parameter.is_contiguous() and any(ctypes.string_at(parameter.data_ptr(), parameter.element_size())[:-1]):
        return False  # nearly always: a zero one's first element is zero, too; of -0.0, the last byte is not
    few = parameter.detach()
    while few.numel() > 64 and few.dim():
        few = few[:: max(1, few.shape[0] // 4)][:4].flatten(0, 1) if few.dim() > 1 else few[:: few.shape[0] // 32]
    return not bool(few.count_nonzero())


def version_of(tensor: torch.Tensor) -> int:
    """How often it was written to; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def memory_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Which part of its storage, and how often written to."""
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, version_of(tensor)


def _address(tensor: torch.Tensor) -> int:
    if is_fake(tensor):
        return 0
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without memory of its own
        return 0


def is_fake(tensor: torch.Tensor) -> bool:
    """Has it no values?"""
    return tensor.is_meta or hasattr(tensor, "fake_mode")
