"""Tensors that wait on the host between forward and backward: side bits, inputs of checkpoints, attention's results.

On a GPU the host is pinned memory. A copy goes on a stream of its own, in both directions, and what backward needs next
is fetched while it computes. Where the system pins no memory (containers and WSL often allow little), ordinary memory
takes its place, which is said once: copies then wait for the device.

On a CPU there is no other memory to move to: what is moved goes into buffers that PyTorch's allocator knows nothing of,
so that the allocator's figures are those of a device, and the host's bytes stand apart. There a copy costs less than
over a bus.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from autorev.engine.digest import looked_at

AHEAD = 3
"""Tensors that are fetched while backward computes: a block's input, and the two that its attention returned."""


@dataclass(eq=False)
class OnHost:
    """A tensor that was moved: its bytes, and how to make it again."""

    store: HostStore
    buffer: Any
    """A numpy array of bytes, or a tensor of the host; None for a tensor without values."""
    like: torch.Tensor
    """Empty: dtype and device."""
    shape: torch.Size
    stride: tuple[int, ...]
    """Of its memory: kernels sum in another order where it is laid out in another way."""
    number: int
    """So many were put there before it."""
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
                self.coming = self._room()
                _memory_of(self.coming).copy_(self.buffer, non_blocking=True)

    def back(self) -> torch.Tensor:
        """The tensor, on its device again."""
        if self.buffer is None:
            return self._room()
        if isinstance(self.buffer, torch.Tensor):
            self.fetch()
            tensor, self.coming = self.coming, None
            assert tensor is not None
            here = torch.accelerator.current_stream(tensor.device)
            here.wait_stream(self.store.stream(tensor.device))
            tensor.record_stream(here)
            self.store.fetch_before(self.number)
            return tensor
        found = self._room()
        np.copyto(_memory_of(found).view(torch.uint8).numpy(), self.buffer)
        return found

    def _room(self) -> torch.Tensor:
        return self.like.new_empty_strided(self.shape, self.stride)


class HostStore:
    """Counts what lies on the host."""

    def __init__(self) -> None:
        self.bytes = 0
        self.peak = 0
        self._put: list[weakref.ref[OnHost]] = []
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
        if not torch.ops.aten.is_non_overlapping_and_dense(plain):
            plain = plain.contiguous()
        while self._put and self._put[-1]() is None:
            self._put.pop()
        moved = OnHost(self, self._copied(plain), plain.new_empty(0), plain.shape, plain.stride(), len(self._put))
        self._put.append(weakref.ref(moved))
        self.bytes += moved.size
        self.peak = max(self.peak, self.bytes)
        return moved

    def fetch_before(self, number: int) -> None:
        """Begin to copy back what backward needs next: what was put there last is needed first."""
        for soon in self._put[max(number - AHEAD, 0) : number]:
            moved = soon()
            if moved is not None:
                moved.fetch()

    def stream(self, device: torch.device) -> torch.Stream:
        """The one on which copies from and to `device` run."""
        if device not in self._streams:
            self._streams[device] = torch.Stream(device)
        return self._streams[device]

    def _copied(self, plain: torch.Tensor) -> Any:
        if plain.is_meta or not looked_at():
            return None
        plain = _memory_of(plain)
        if plain.device.type == "cpu":
            buffer = np.empty(plain.numel() * plain.element_size(), dtype=np.uint8)
            np.copyto(buffer, plain.view(torch.uint8).numpy())
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


def _memory_of(dense: torch.Tensor) -> torch.Tensor:
    """Its elements as they lie in memory."""
    return dense.as_strided((dense.numel(),), (1,))
