"""Checkpointing whose kept inputs wait on the host.

On a GPU the host is pinned memory. On a CPU there is no other memory to move to: what is moved goes into buffers that
PyTorch's allocator knows nothing of, so that the allocator's figures are those of a device, and the host's bytes stand
apart. There a copy costs less than over a bus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(eq=False)
class _OnHost:
    """A tensor that was moved: its bytes, and how to make it again."""

    store: HostStore
    buffer: Any
    """A numpy array of bytes, or a pinned tensor."""
    like: torch.Tensor
    """Empty: dtype and device."""
    shape: torch.Size

    def __del__(self) -> None:
        self.store.bytes -= self.shape.numel() * self.like.element_size()

    def back(self) -> torch.Tensor:
        """The tensor, on its device again."""
        tensor = self.like.new_empty(self.shape)
        if isinstance(self.buffer, torch.Tensor):
            return tensor.copy_(self.buffer, non_blocking=True)
        np.copyto(tensor.view(-1).view(torch.uint8).numpy(), self.buffer)
        return tensor


class HostStore:
    """Counts what lies on the host."""

    def __init__(self) -> None:
        self.bytes = 0
        self.peak = 0

    def around(self, run: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`run(forward, *args, **kwargs)`, with what autograd keeps outside of `run`'s own hooks on the host."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return run(forward, *args, **kwargs)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if isinstance(tensor, torch.nn.Parameter) or not tensor.numel():
            return tensor
        plain = tensor.detach()
        buffer: Any
        if plain.device.type == "cpu":
            buffer = np.empty(plain.numel() * plain.element_size(), dtype=np.uint8)
            np.copyto(buffer, plain.contiguous().view(-1).view(torch.uint8).numpy())
        else:
            buffer = torch.empty(plain.shape, dtype=plain.dtype, pin_memory=True)
            buffer.copy_(plain, non_blocking=True)
        self.bytes += plain.numel() * plain.element_size()
        self.peak = max(self.peak, self.bytes)
        return _OnHost(self, buffer, plain.new_empty(0), plain.shape)

    def _unpack(self, packed: Any) -> torch.Tensor:
        tensor: torch.Tensor = packed.back() if isinstance(packed, _OnHost) else packed
        return tensor
