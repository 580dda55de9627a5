"""Tensors that wait on the host between forward and backward: inputs of checkpoints, side bits of reversible steps.

On a GPU the host is pinned memory. A copy goes on a stream of its own, in both directions, and what backward needs next
is fetched while it computes. Where the system pins no memory (containers and WSL often allow little), ordinary memory
takes its place, which is said once: copies then wait for the device.

On a CPU there is no other memory to move to: what is moved goes into buffers that PyTorch's allocator knows nothing of,
so that the allocator's figures are those of a device, and the host's bytes stand apart. There a copy costs less than
over a bus.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from autorev.engine.digest import looked_at


@dataclass(eq=False)
class OnHost:
    """A tensor that was moved: its bytes, and how to make it again."""

    store: HostStore
    buffer: Any
    """A numpy array of bytes, or a tensor of the host; None for a tensor without values."""
    like: torch.Tensor
    """Empty: dtype and device."""
    shape: torch.Size
    coming: torch.Tensor | None = field(init=False, default=None)
    """The tensor, while it is fetched."""

    def __del__(self) -> None:
        self.store.bytes -= self.size

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.shape.numel() * self.like.element_size()

    def fetch(self) -> None:
        """Begin to copy it to its device, where that needs no waiting."""
        if self.coming is None and self.like.device.type not in ("cpu", "meta"):
            stream = self.store.stream(self.like.device)
            with stream:
                self.coming = self.like.new_empty(self.shape).copy_(self.buffer, non_blocking=True)

    def back(self) -> torch.Tensor:
        """The tensor, on its device again."""
        if self.buffer is None:
            return self.like.new_empty(self.shape)
        if isinstance(self.buffer, torch.Tensor):
            self.fetch()
            tensor, self.coming = self.coming, None
            assert tensor is not None
            here = torch.accelerator.current_stream(tensor.device)
            here.wait_stream(self.store.stream(tensor.device))
            tensor.record_stream(here)
            return tensor
        found = self.like.new_empty(self.shape)
        np.copyto(found.view(-1).view(torch.uint8).numpy(), self.buffer)
        return found


class HostStore:
    """Counts what lies on the host."""

    def __init__(self) -> None:
        self.bytes = 0
        self.peak = 0
        self._streams: dict[torch.device, torch.Stream] = {}
        self._pinned = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model holds nothing yet."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(vars(HostStore()))

    def around(self, run: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`run(forward, *args, **kwargs)`, with what autograd keeps outside of `run`'s own hooks on the host."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return run(forward, *args, **kwargs)

    def put(self, tensor: torch.Tensor) -> OnHost:
        """Move a tensor to the host; its values are those of now."""
        plain = tensor.detach()
        moved = OnHost(self, self._copied(plain), plain.new_empty(0), plain.shape)
        self.bytes += moved.size
        self.peak = max(self.peak, self.bytes)
        return moved

    def stream(self, device: torch.device) -> torch.Stream:
        """The one on which copies from and to `device` run."""
        if device not in self._streams:
            self._streams[device] = torch.Stream(device)
        return self._streams[device]

    def _copied(self, plain: torch.Tensor) -> Any:
        if plain.is_meta or not looked_at():
            return None
        if plain.device.type == "cpu":
            buffer = np.empty(plain.numel() * plain.element_size(), dtype=np.uint8)
            np.copyto(buffer, plain.contiguous().view(-1).view(torch.uint8).numpy())
            return buffer
        there = self._room(plain)
        stream = self.stream(plain.device)
        stream.wait_stream(torch.accelerator.current_stream(plain.device))
        with stream:
            there.copy_(plain, non_blocking=True)
        plain.record_stream(stream)
        return there

    def _room(self, plain: torch.Tensor) -> torch.Tensor:
        if self._pinned:
            try:
                return torch.empty(plain.shape, dtype=plain.dtype, pin_memory=True)
            except RuntimeError as error:
                self._pinned = False
                logging.getLogger("autorev").warning(
                    "the system pins no more host memory (%s): ordinary memory takes its place, and copies wait for "
                    "the device. Raise the limit of locked memory (ulimit -l), or keep less on the host",
                    str(error).splitlines()[0],
                )
        return torch.empty(plain.shape, dtype=plain.dtype)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if isinstance(tensor, torch.nn.Parameter) or not tensor.numel():
            return tensor
        return self.put(tensor)

    def _unpack(self, packed: Any) -> torch.Tensor:
        tensor: torch.Tensor = packed.back() if isinstance(packed, OnHost) else packed
        return tensor
